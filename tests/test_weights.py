import copy
import hashlib
import json
import logging
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import jsonschema
import pytest
import timm
import torch
from hub_double import COMMIT, HubDouble, hub_double
from huggingface_hub import constants
from networks import config_of
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg, load_checkpoint, load_pretrained, save_for_hf
from torch.utils._pytree import tree_leaves

import spd_zoo
from spd_zoo import WeightsError
from spd_zoo.inference.detector import Detector
from spd_zoo.models._detector import DetectionNet
from spd_zoo.weights import entries, fetch, fit, save_network, sha256_of
from spd_zoo.weights.cache import BUNDLED
from spd_zoo.weights.catalogue import ModelError, locate
from spd_zoo.weights.fit import own_networks
from spd_zoo.weights.load import class_names
from spd_zoo.weights.manifest import Entry, manifest_path

MANIFEST = json.loads(manifest_path().read_text(encoding="utf-8"))
SCHEMA = json.loads((Path(spd_zoo.__file__).parent / "weights/manifest.schema.json").read_text(encoding="utf-8"))
NETWORKS = own_networks()
ENTRIES = list(entries().values())
CHECKPOINTS = [entry for entry in ENTRIES if entry.tag]
UNVERIFIED = [entry for entry in CHECKPOINTS if not entry.verified]
PINNED = f"hf://org/repo@{COMMIT}:weights.safetensors"
MIB = 2**20


# The manifest


def test_the_manifest_follows_its_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(MANIFEST)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"source": "hf://org/repo@main:weights.safetensors"},
        {"source": f"hf://org/repo@{COMMIT}:../weights.safetensors"},
        {"source": f"hf://org/repo@{COMMIT}:/weights.safetensors"},
        {"source": f"https://example.org/repo@{COMMIT}:weights.safetensors"},
        {"source": "bundled:../weights.safetensors", "sha256": "0" * 64, "size": 1},
        {"source": "bundled:/weights.safetensors", "sha256": "0" * 64, "size": 1},
        {"source": "bundled:weights.safetensors", "sha256": None, "size": 1},
        {"source": "bundled:weights.safetensors", "sha256": "0" * 64, "size": None},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"license": None},
        {"metrics": []},
        {"first_conv": "stem.0"},
    ],
    ids=str,
)
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest[UNVERIFIED[0].group][UNVERIFIED[0].name].update(change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_no_name_or_field_occurs_twice() -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        assert sorted(set(keys)) == sorted(keys)
        return dict(pairs)

    json.loads(manifest_path().read_text(encoding="utf-8"), object_pairs_hook=unique)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_an_entry_in_the_group_of_its_file(network: str) -> None:
    assert network in MANIFEST[timm.model_entrypoint(network).__module__.rpartition(".")[2]]


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.group != "timm"], ids=lambda entry: entry.name)
def test_an_entry_describes_the_network_that_is_built(entry: Entry) -> None:
    net: Any = timm.create_model(entry.name, device="meta", num_classes=entry.num_classes).eval()
    cfg: dict[str, Any] = net.pretrained_cfg
    if cfg.get("tag", "") == entry.tag:  # else another entry is the network's default
        for field in ("num_classes", "input_size", "pool_size", "mean", "std", "crop_pct", "interpolation"):
            assert cfg[field] == getattr(entry, field)
    assert cfg["architecture"] == entry.network
    assert net.num_classes == entry.num_classes
    first_conv = net.get_submodule(cfg["first_conv"])
    assert first_conv is next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    maps = net.forward_features(torch.empty(1, *entry.input_size, device="meta"))
    if isinstance(net, DetectionNet):
        classifiers: list[Any] = [net.get_submodule(name) for name in cfg["classifier"]]
        assert classifiers == list(net.get_classifier())
        assert net.num_classes_of(classifiers[0].out_channels) == entry.num_classes
        assert len(maps) == len(classifiers)
        assert entry.pool_size is None
    else:
        assert net.get_submodule(cfg["classifier"]).out_features == entry.num_classes
        assert maps.shape[-2:] == entry.pool_size


@pytest.mark.parametrize("entry", CHECKPOINTS, ids=lambda entry: entry.name)
def test_a_file_is_named_exactly_where_the_link_is_a_folder(entry: Entry) -> None:
    assert bool(entry.original_file) == ("/folders/" in str(entry.original_link))


def test_the_classes_of_tiny_imagenet_are_in_the_order_of_its_wnids_and_have_english_words() -> None:
    cfg = config_of("resnet50_spd.spd_tiny_in200").to_dict()
    wnids = "".join(f"{name}\n" for name in cfg["label_names"])  # wnids.txt, which is not sorted
    assert hashlib.sha256(wnids.encode()).hexdigest().startswith("a36eb4b603007f1985cdfbfc5987166a")
    assert class_names(cfg)[:3] == ["Egyptian cat", "reel", "volleyball"]
    assert list(cfg["label_descriptions"]) == list(cfg["label_names"])


@pytest.mark.parametrize("name", ["n00000000", "cat", "n0212407"])
def test_names_that_are_no_wordnet_ids_of_timms_have_no_english_words(name: str) -> None:
    entry = replace(entries()["resnet50_spd.spd_tiny_in200"], class_names=("n02124075", name))
    assert entry.label_names == ("n02124075", name) and entry.label_descriptions is None


@pytest.mark.parametrize("entry", CHECKPOINTS, ids=lambda entry: entry.name)
def test_a_checkpoint_names_all_its_classes_or_none(entry: Entry) -> None:
    assert entry.label_names is None or len(set(entry.label_names)) == entry.num_classes
    if entry.group != "timm":
        assert config_of(entry.name).label_names == entry.label_names


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.group == "timm"], ids=lambda entry: entry.name)
def test_a_checkpoint_for_a_network_of_timms_describes_that(entry: Entry) -> None:
    net: Any = timm.create_model(entry.network, device="meta")
    assert sum(parameter.numel() for parameter in net.parameters()) == entry.params
    assert (net.num_classes, net.pretrained_cfg["pool_size"]) == (entry.num_classes, entry.pool_size)


def test_the_bundled_files_are_those_of_the_manifest_and_small() -> None:
    bundled = {
        str(entry.source).removeprefix("bundled:"): entry for entry in CHECKPOINTS if "bundled:" in str(entry.source)
    }
    files = {path.name: path for path in BUNDLED.glob("*") if not path.name.startswith(".")}
    assert files.keys() == bundled.keys()
    for name, path in files.items():
        assert (sha256_of(path), path.stat().st_size) == (bundled[name].sha256, bundled[name].size)
        assert path.stat().st_size <= 50 * MIB
    assert sum(path.stat().st_size for path in files.values()) <= 80 * MIB


@pytest.mark.parametrize("network", NETWORKS)
def test_only_verified_weights_are_a_default(network: str) -> None:
    tag = config_of(network).tag
    verified = {entry.name: entry.default for entry in CHECKPOINTS if entry.network == network and entry.verified}
    assert timm.list_pretrained(f"{network}.*") == sorted(verified)
    if any(verified.values()):
        assert verified[f"{network}.{tag}"]
    else:
        assert tag is None
        with pytest.raises(WeightsError, match=r"no default weights|there are no weights"):
            timm.create_model(network, pretrained=True)


def test_a_network_without_default_weights_says_what_each_of_its_weights_is_for() -> None:
    with pytest.raises(ModelError, match=r"a backbone .*, by name: yolov8n_spd\.bccd \(BCCD, 3 classes: RBC, .* px\)"):
        Detector("yolov8n_spd")
    with pytest.raises(WeightsError, match=r"spd_cifar10 \(.*, not verified: spd-zoo info resnet50_spd\."):
        timm.create_model("resnet50_spd", pretrained=True)


# Fetching


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    with hub_double() as server, server.replace(monkeypatch):
        server.files["org/repo/weights.safetensors"] = b"the weights"
        yield server


def an_entry(content: bytes = b"the weights", **fields: Any) -> Entry:
    entry = Entry("network.tag", "group", 10, (3, 32, 32), params=1, macs=1)
    pinned: dict[str, Any] = {"source": PINNED, "sha256": hashlib.sha256(content).hexdigest()}
    return replace(entry, **pinned | fields)


def test_a_pinned_file_is_downloaded_once_and_then_no_socket_is_opened(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(an_entry(), tmp_path)
    assert path.read_bytes() == b"the weights"
    assert path.is_relative_to(tmp_path)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a warm load opened a socket")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    hub.requests.clear()
    assert fetch(an_entry(), tmp_path) == path
    assert hub.requests == []


@pytest.mark.parametrize("damaged", [b"the veights", b"the wei", b""], ids=["one bit", "truncated", "empty"])
def test_a_damaged_file_in_the_cache_is_downloaded_once_more(hub: HubDouble, tmp_path: Path, damaged: bytes) -> None:
    path = fetch(an_entry(), tmp_path)
    path.write_bytes(damaged)
    hub.requests.clear()
    assert fetch(an_entry(), tmp_path).read_bytes() == b"the weights"
    assert hub.requests.count(f"GET /org/repo/resolve/{COMMIT}/weights.safetensors") == 1


def test_other_bytes_from_the_hub_are_refused(hub: HubDouble, tmp_path: Path) -> None:
    hub.files["org/repo/weights.safetensors"] = b"other weights"
    with pytest.raises(WeightsError) as error:
        fetch(an_entry(), tmp_path)
    expected, found = (hashlib.sha256(content).hexdigest() for content in (b"the weights", b"other weights"))
    for part in ("weights.safetensors", expected, found, "What to do"):
        assert part in str(error.value)


def test_a_damaged_file_is_refused_where_the_hub_cannot_be_asked(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(an_entry(), tmp_path).write_bytes(b"the veights")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(WeightsError, match=f"has sha256 .*, expected {an_entry().sha256}.*What to do"):
        fetch(an_entry(), tmp_path)


def test_without_a_hub_a_cold_cache_is_reported_soon(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)  # and no clock, which tells how busy the machine is
    with pytest.raises(WeightsError, match=r"cannot get the weights of network\.tag .*by hand"):
        fetch(an_entry(), tmp_path)
    assert 0 < sum(pauses) < 10


def test_offline_mode_is_honoured(hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(WeightsError, match="OfflineModeIsEnabled"):
        fetch(an_entry(), tmp_path)
    assert hub.requests == []


@pytest.mark.parametrize("source", [PINNED.replace("weights", "others"), PINNED.replace(COMMIT, "f" * 40)])
def test_a_file_that_the_hub_does_not_have_is_reported(hub: HubDouble, tmp_path: Path, source: str) -> None:
    with pytest.raises(WeightsError, match=r"cannot get the weights of network\.tag"):
        fetch(an_entry(source=source), tmp_path)


@pytest.mark.parametrize("source", ["bundled:../manifest.py", "hf://org/repo@main:a", "https://example.org/a.pth"])
def test_a_source_that_is_not_pinned_or_leads_elsewhere_is_refused(source: str) -> None:
    with pytest.raises(WeightsError, match="it must be bundled:FILE, package:NAME:FILE or hf://"):
        fetch(an_entry(source=source))


def test_a_bundled_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["spd_zoo.weights.cache"], "BUNDLED", tmp_path)
    entry = an_entry(source="bundled:weights.safetensors")
    with pytest.raises(WeightsError, match="is missing"):
        fetch(entry)
    (tmp_path / "weights.safetensors").write_bytes(b"the weights")
    assert fetch(entry) == tmp_path / "weights.safetensors"
    (tmp_path / "weights.safetensors").write_bytes(b"the veights")
    with pytest.raises(WeightsError, match=f"has sha256 .*, expected {entry.sha256}"):
        fetch(entry)


def test_a_hub_file_without_a_known_sha256_loads_with_a_warning(hub: HubDouble, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not verified"):
        assert fetch(an_entry(sha256=None), tmp_path).read_bytes() == b"the weights"


# Loading


@pytest.mark.parametrize("features_only", [False, True])
def test_pretrained_weights_replace_every_tensor(features_only: bool) -> None:
    # what the checkpoint replaces is not initialised first, so a tensor that it lacked would hold anything
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(timm.create_model("cifar_resnet20", pretrained=True, features_only=features_only).state_dict())
    torch.testing.assert_close(*nets, rtol=0, atol=0)


def test_a_new_classifier_is_drawn_at_random() -> None:
    classifiers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        net: Any = timm.create_model("cifar_resnet20", pretrained=True, num_classes=7)
        classifiers.append(net.get_classifier().weight)
    assert torch.equal(classifiers[0], classifiers[1])
    assert 0.01 < (classifiers[0] - classifiers[2]).std() < 1


@pytest.fixture(scope="module")
def small() -> Any:
    """The smallest network, untrained, with ten classes."""
    torch.manual_seed(0)
    return timm.create_model("pyconvresnet18", num_classes=10).eval()


@pytest.fixture(scope="module")
def checkpoint(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(small.state_dict(), path)
    return path


def load(file: Path, name: str = "pyconvresnet18", **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs).eval()


def test_a_number_of_classes_in_the_overlay_means_the_same(checkpoint: Path) -> None:
    overlay = {"file": str(checkpoint), "num_classes": 7}
    net: Any = timm.create_model("pyconvresnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert (net.num_classes, net.pretrained_cfg["num_classes"]) == (7, 10)


def test_a_file_without_a_classifier_makes_a_network_without_one(small: Any, tmp_path: Path) -> None:
    body = {key: tensor for key, tensor in small.state_dict().items() if not key.startswith("head.fc")}
    save_file(body, tmp_path / "body.safetensors")
    assert load(tmp_path / "body.safetensors").num_classes == 0
    assert load(tmp_path / "body.safetensors", num_classes=7).num_classes == 7


def test_features_load_the_same_weights(small: Any, checkpoint: Path) -> None:
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        maps = load(checkpoint, features_only=True, out_indices=(1, 4))(image)
        expected = small.forward_intermediates(image, indices=[1, 4], intermediates_only=True)
    for ours, theirs in zip(maps, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_features_are_refused_a_checkpoint_that_does_not_fit(small: Any, tmp_path: Path) -> None:
    tensors = dict(small.state_dict())
    del tensors["stages.2.1.bn1.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        WeightsError, match=r"does not fit pyconvresnet18: 1 of .*stages\.2\.1\.bn1\.weight; it fits no "
    ):
        load(tmp_path / "a.safetensors", features_only=True)


@pytest.mark.slow
def test_a_checkpoint_of_another_family_is_refused(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit resnet18_spd: .*it fits pyconvresnet18$"):
        load(checkpoint, "resnet18_spd")


@pytest.mark.slow
def test_a_broken_classifier_is_refused(small: Any, tmp_path: Path) -> None:
    save_file(small.state_dict() | {"head.fc.weight": torch.zeros(10, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"head\.fc\.weight has shape"):
        load(tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors", num_classes=7).num_classes == 7


@pytest.mark.slow
def test_a_file_of_many_names_is_not_compared_with_every_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "filter_of", lambda model: pytest.fail("its names are looked at, which takes long"))
    many = {f"{i:04d}{'a' * 990}": torch.zeros(500) for i in range(10_000)}
    assert fit.which_fits(many, "pyconvresnet18") == "it fits no other network of the zoo"


@pytest.mark.parametrize(
    ("key", "shape"),
    [("head.fc.weight", (10**9, 0)), ("head.fc.weight", (10**6, 1)), ("stem.0.weight", (64, 10**9, 7, 0))],
)
def test_a_tensor_that_does_not_fit_makes_no_network_for_its_classes(
    small: Any, key: str, shape: tuple[int, ...]
) -> None:
    """Which would be larger than the file, and fill the memory before the tensors are compared."""
    meta = timm.create_model("pyconvresnet18", device="meta")
    assert fit.facts(small.state_dict(), meta, 3) == {"num_classes": 10, "in_chans": 3}
    found = fit.facts(small.state_dict() | {key: torch.zeros(shape)}, meta, 3)
    assert found == {"num_classes": 10 if key.startswith("stem") else meta.num_classes, "in_chans": 3}


class Large:
    """Takes 10 TB when it is unpickled."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (10**13,)


@pytest.mark.parametrize("features", [{}, {"features_only": True}], ids=["network", "features"])
@pytest.mark.parametrize(
    "wrap", [lambda net: {"model": net}, lambda net: {"state_dict": net.state_dict(), "a": Large()}]
)
def test_a_file_is_read_only_by_our_parser(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any], features: dict[str, Any]
) -> None:
    """Not a second time by timm, which calls what torch allows, and knows no networks pickled as a whole."""
    torch.save(wrap(small), tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("torch.load was called"))
    net = load(tmp_path / "a.pth", **features)
    own = {
        key.replace("stem_", "stem.").replace("stages_", "stages."): value for key, value in net.state_dict().items()
    }
    expected = small.state_dict()
    assert own
    assert features or own.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in own.items())
    assert "state_dict" not in net.pretrained_cfg


def test_numbers_that_no_network_computes_with_are_refused(small: Any, tmp_path: Path) -> None:
    key = "head.fc.bias"
    save_file(small.state_dict() | {key: torch.zeros(10).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"head\.fc\.bias holds torch\.float8_e4m3fn, the network's torch\.float32"):
        load(tmp_path / "a.safetensors")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


def broken_files(small: Any, checkpoint: Path, folder: Path) -> list[str]:
    torch.save(small.state_dict(), folder / "whole.pth")
    contents = {
        "truncated.safetensors": checkpoint.read_bytes()[:-1000],
        "truncated.pth": (folder / "whole.pth").read_bytes()[:-1000],
        "empty.safetensors": b"",
        "empty.pth": b"",
        "page.safetensors": b"<!DOCTYPE html><html>Quota exceeded</html>",
        "page.pth": b"<!DOCTYPE html><html>Quota exceeded</html>",
        "payload.pth": pickle.dumps({"state_dict": Payload(folder / "trace")}, protocol=2),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save({"model": {"epoch": 1, "stem.0.weight": torch.zeros(1)}}, folder / "no tensors.pth")
    torch.save({"state_dict": Payload(folder / "trace")}, folder / "zipped payload.pth")
    torch.save([torch.zeros(1)], folder / "list.pth")
    torch.save({}, folder / "nothing.pth")
    return [*contents, "no tensors.pth", "zipped payload.pth", "list.pth", "nothing.pth", "missing.pth", "."]


def test_other_files_are_refused_and_nothing_in_them_runs(small: Any, checkpoint: Path, tmp_path: Path) -> None:
    for name in broken_files(small, checkpoint, tmp_path):
        with pytest.raises(WeightsError) as error:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(AttributeError):  # the payload works where pickle is trusted; then nothing like a dict is left
        pickle.loads((tmp_path / "payload.pth").read_bytes())["state_dict"].items()
    assert (tmp_path / "trace").exists()


def warnings_of_loading(caplog: pytest.LogCaptureFixture) -> list[str]:
    builder = [record for record in caplog.records if record.name == "timm.models._builder"]
    return [record.message for record in builder if record.levelno >= logging.WARNING]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyconvresnet18", "pyconvresnet50_spd", "resnet18_spd"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_a_saved_network_is_loaded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, in_chans: int
) -> None:
    net = timm.create_model(name, num_classes=10, in_chans=in_chans).eval()
    save_for_hf(net, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    again = timm.create_model(name, num_classes=10, in_chans=in_chans)
    load_checkpoint(again, str(tmp_path / "model.safetensors"))
    for key, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
        assert torch.equal(again.state_dict()[key], tensor)
    assert warnings_of_loading(caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20", "yolov8n_spd"])
def test_save_network_writes_a_folder_that_timm_loads_with_its_class_names(tmp_path: Path, name: str) -> None:
    net = timm.create_model(name, num_classes=3)
    save_network(net, tmp_path / "new", {"input_size": (3, 64, 64), "label_names": ["a", "b", "c"]})
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)
    assert (loaded.num_classes, loaded.pretrained_cfg["input_size"]) == (3, (3, 64, 64))
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    for key, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["num_classes"] == 3 and "num_classes" not in config["model_args"]  # transformers wants it once
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"model.safetensors", "config.json"}


def test_new_class_names_replace_the_descriptions_of_the_old_ones(tmp_path: Path) -> None:
    net: Any = timm.create_model("tf_efficientnet_lite0_spd.in1k", num_classes=3)
    save_network(net, tmp_path, dict(net.pretrained_cfg, num_classes=3, label_names=["a", "b", "c"]))
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert class_names(loaded.pretrained_cfg) == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["local-dir", "file"])
@pytest.mark.parametrize("name", ["pyconvresnet18", "pyconvresnet50_spd", "resnet18_spd"])
def test_a_network_for_grey_images_computes_what_it_did_for_the_three_channels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10).eval()
    save_for_hf(net, str(tmp_path), safe_serialization=True)
    if how == "file":
        grey = load(tmp_path / "model.safetensors", name, in_chans=1)
    else:
        grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(grey(image), net(image.expand(1, 3, 64, 64)), rtol=1e-4, atol=1e-4)
    assert warnings_of_loading(caplog) == []


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0_spd.in1k", "yolov8n_spd.bccd"])
def test_the_channels_of_weights_in_half_precision_are_summed_without_rounding(name: str) -> None:
    net, grey = (timm.create_model(name, pretrained=True, in_chans=chans).eval() for chans in (3, 1))
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        for ours, theirs in zip(tree_leaves(grey(image)), tree_leaves(net(image.expand(1, 3, 64, 64))), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


# A tag, from the manifest to the network


LOAD_TWICE = """
import socket, sys, timm, torch, spd_zoo
net = timm.create_model("resnet50_spd", pretrained=True)
def refuse(*args): raise AssertionError("a warm load opened a socket")
socket.create_connection = socket.socket.connect = refuse
again = timm.create_model("resnet50_spd.spd_cifar10", pretrained=True, num_classes=10)
assert torch.equal(again.stem[1].weight, net.stem[1].weight)
print(spd_zoo.__file__, net.pretrained_cfg["tag"], net.num_classes, float(net.head.fc.bias[0]))
"""


@pytest.mark.slow
def test_an_entry_that_moves_to_the_hub_is_loaded_from_there_and_is_a_default(tmp_path: Path) -> None:
    net: Any = timm.create_model("resnet50_spd", num_classes=100)
    torch.nn.init.constant_(net.head.fc.bias, 0.25)
    save_file({key: tensor.half() for key, tensor in net.state_dict().items()}, tmp_path / "weights.safetensors")
    manifest = copy.deepcopy(MANIFEST)
    entry = manifest["resnet_spd"]["resnet50_spd.spd_cifar10"]
    entry.update(source=PINNED, sha256=sha256_of(tmp_path / "weights.safetensors"))
    jsonschema.validate(manifest, SCHEMA)
    package = tmp_path / "site" / "spd_zoo"
    shutil.copytree(Path(spd_zoo.__file__).parent, package, ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    (package / "weights_manifest.json").write_text(json.dumps(manifest))
    with hub_double() as server:
        server.files["org/repo/weights.safetensors"] = (tmp_path / "weights.safetensors").read_bytes()
        environment = server.environment | {"PYTHONPATH": str(package.parent), "HF_HOME": str(tmp_path / "hf")}
        environment.pop("HF_HUB_CACHE", None)
        command = [sys.executable, "-c", LOAD_TWICE]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(package / "__init__.py"), "spd_cifar10", "100", "0.25"]
    assert list((tmp_path / "hf").rglob("weights.safetensors"))


def test_the_error_for_an_unknown_tag_names_those_that_exist() -> None:
    with pytest.raises(WeightsError, match=r"no weights called resnet50_spd\.nonsense; .*resnet50_spd\.spd_cifar10"):
        timm.create_model("resnet50_spd.nonsense", pretrained=True)


def test_a_manually_downloaded_file_is_loaded_under_its_tag(tmp_path: Path) -> None:
    net = timm.create_model("resnet50_spd", num_classes=100)
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", "resnet50_spd.spd_cifar10")
    assert loaded.pretrained_cfg["tag"] == "spd_cifar10"
    assert torch.equal(loaded.head.fc.weight, load_file(tmp_path / "a.safetensors")["head.fc.weight"])


@pytest.mark.slow
def test_a_file_without_a_tag_is_not_taken_for_the_default_weights(tmp_path: Path) -> None:
    """Here resnet50_spd.spd_tiny_in200 stands for a default whose input differs from the network's own."""
    net = timm.create_model("resnet50_spd", num_classes=7)
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors")}
    plain: Any = timm.create_model("resnet50_spd", pretrained=True, pretrained_cfg_overlay=overlay).pretrained_cfg
    assert (plain["input_size"], plain["num_classes"]) == ((3, 32, 32), 7)
    assert not plain.keys() & {"tag", "license", "origin_url", "url"}
    tagged: Any = timm.create_model("resnet50_spd.spd_tiny_in200", pretrained=True, pretrained_cfg_overlay=overlay)
    assert (tagged.pretrained_cfg["input_size"], tagged.pretrained_cfg["tag"]) == ((3, 64, 64), "spd_tiny_in200")


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["truncated", "missing"])
def test_a_broken_file_in_a_folder_or_in_the_callers_configuration_is_named(tmp_path: Path, broken: str) -> None:
    net = timm.create_model("resnet18_spd", num_classes=7)
    timm.models.save_for_hf(net, str(tmp_path), safe_serialization=True)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()[:5000]
    file.unlink()
    if broken == "truncated":
        file.write_bytes(content)
    with pytest.raises(RuntimeError, match=re.escape(str(tmp_path))):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    cfg = dict(config_of("resnet18_spd").to_dict(), file=str(file))
    with pytest.raises(WeightsError, match=re.escape(str(file))):
        timm.create_model("resnet18_spd", pretrained=True, pretrained_cfg=cfg)


IDIOMS: dict[str, Callable[[str], Any]] = {
    "configuration": lambda name: timm.create_model(name, pretrained=True, pretrained_cfg=config_of(name)),
    "dict": lambda name: timm.create_model(
        name, pretrained=True, pretrained_cfg=vars(timm.create_model(name))["pretrained_cfg"]
    ),
    "no file": lambda name: timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": None}),
    "empty file": lambda name: timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": ""}),
    "load_pretrained": lambda name: loaded_by_timm(timm.create_model(name)),
}


def loaded_by_timm(net: Any) -> Any:
    load_pretrained(net, num_classes=net.num_classes)
    return net


@pytest.mark.parametrize("idiom", IDIOMS)
def test_timms_idioms_load_bundled_weights(idiom: str) -> None:
    net = IDIOMS[idiom]("cifar_resnet20")
    expected = timm.create_model("cifar_resnet20.cifar100", pretrained=True).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in net.state_dict().items())
    assert net.pretrained_cfg["tag"] == "cifar100"


def test_weights_of_ones_own_go_before_the_bundled_ones(tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet20")
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    torch.save(net.state_dict(), tmp_path / "a.pth")
    ways: list[dict[str, Any]] = [
        {"pretrained_cfg": replace(config_of("cifar_resnet20"), file=str(tmp_path / "a.safetensors"))},
        {"pretrained_cfg_overlay": {"url": (tmp_path / "a.pth").as_uri()}, "cache_dir": tmp_path / "cache"},
        {"pretrained_cfg_overlay": {"state_dict": net.state_dict()}},
    ]
    for arguments in ways:
        loaded = timm.create_model("cifar_resnet20.cifar100", pretrained=True, **arguments)
        assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("source", ["configuration", "dict", "url", "hub"])
def test_weights_that_timm_cannot_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    file, name = tmp_path / "bad.pt", "cifar_resnet20"
    file.write_bytes(b"garbage")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "configuration": ({"pretrained_cfg": PretrainedCfg(file="nope.pt")}, "nope.pt"),
        "dict": ({"pretrained_cfg": {"file": str(file), "num_classes": 100, "input_size": (3, 32, 32)}}, str(file)),
        "url": ({"pretrained_cfg_overlay": {"url": file.as_uri()}, "cache_dir": tmp_path / "cache"}, file.as_uri()),
        "hub": ({"pretrained_cfg_overlay": {"hf_hub_id": "o/r"}, "cache_dir": tmp_path / "cache"}, "o/r"),
    }
    arguments, named = cases[source]
    with pytest.raises(WeightsError, match=rf"timm cannot read the weights in {named} \(.*; get them again") as error:
        timm.create_model(f"{name}.cifar100", pretrained=True, **arguments)
    assert "weights_only" not in str(error.value)


def test_the_advice_about_a_folder_that_timm_cannot_read_does_not_import_the_folder(tmp_path: Path) -> None:
    save_network(timm.create_model("cifar_resnet20"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(WeightsError, match=r"get them again, or .*: spd-zoo weights import cifar_resnet20 FILE$"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_row_of_the_catalogue_says_where_the_weights_are() -> None:
    bundled = next(entry for entry in CHECKPOINTS if "bundled:" in str(entry.source))
    row = locate(bundled, verify=True)
    assert (row["name"], row["location"], row["verified"]) == (bundled.name, "bundled", True)
    assert (row["size"], row["sha256"], row["licence"]) == (bundled.size, bundled.sha256, bundled.license)
    assert locate(bundled)["verified"] is None


def test_a_row_of_the_catalogue_is_of_the_file_in_the_cache(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = replace(UNVERIFIED[0], source=PINNED, derived_from=None, sha256=an_entry().sha256, size=12345)
    assert (locate(entry)["location"], locate(entry)["size"]) == ("missing", 12345)
    fetch(entry)
    row = locate(entry, verify=True)
    assert (row["location"], row["size"], row["verified"]) == ("cached", len(b"the weights"), True)
