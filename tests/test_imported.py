"""The authors' checkpoints: reading, refusing, storing and downloading them."""

import argparse
import ast
import errno
import hashlib
import json
import sys
import time
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import timm
import torch
from drive_double import DriveDouble, drive_double
from hub_double import COMMIT, fails, hub_double
from huggingface_hub import constants
from networks import config_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import spd_zoo
from spd_zoo.cli.weights import _timms_overlay
from spd_zoo.weights import (
    WeightsError,
    create,
    fetch,
    find_entry,
    import_weights,
    imported_names,
    is_right,
    origin_of,
    original_of,
    read_checkpoint,
    remove,
    sha256_of,
)
from spd_zoo.weights.download import page_or_pointer
from spd_zoo.weights.fit import filter_of
from spd_zoo.weights.imported import converted
from spd_zoo.weights.manifest import Entry, entries, manifest_path
from spd_zoo.weights.publish import prepare

CASE = next(case for case in golden.cases("pfd_bsconv") if case["model"] == "cifar_resnet20")
NAME = "cifar_resnet20.theirs"
FAR = "cifar_resnet20.far"
DRIVE = f"https://drive.google.com/uc?export=download&id={'1' * 30}"
FOLDER = f"https://drive.google.com/drive/folders/{'f' * 30}"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The authors' state dict of the recorded case."""
    return {key: torch.from_numpy(value) for key, value in golden.fill_state_dict(CASE["entries"]).items()}


def outputs(name: str, cache: Path, file: Path | None = None) -> np.ndarray:
    overlay = {"file": str(file)} if file else None
    net = timm.create_model(name, pretrained=True, cache_dir=cache, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        return net(torch.from_numpy(golden.make_input(**CASE["input"]))).numpy()


def save(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# Where it is kept


def test_a_cache_that_is_a_file_is_refused_in_a_sentence(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("a file where the cache should be")
    with pytest.raises(WeightsError, match=rf"cannot write to {cache}.*; make room, or set HF_HOME to another place"):
        import_weights(NAME, save(tensors, tmp_path / "a.pth"), cache)
    assert cache.read_text() == "a file where the cache should be"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("IoError")], ids=str)
def test_a_full_disk_leaves_the_weights_that_were_imported_before(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    file = save(tensors, tmp_path / "a.pth")
    before = import_weights(NAME, file, tmp_path)

    def full(_: object, path: Path, __: object) -> None:
        path.write_bytes(b"the first bytes")
        raise error

    monkeypatch.setattr("spd_zoo.weights.imported.save_file", full)
    with pytest.raises(WeightsError, match=r"cannot write to .*(No space left|IoError).*; make room"):
        import_weights(NAME, file, tmp_path)
    assert [path for path in before.parent.iterdir() if path.suffix != ".lock"] == [before]


# Forms of checkpoints


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of torch's `AveragedModel` around a network."""
    net = timm.create_model("cifar_resnet20")
    net.load_state_dict(filter_of(net)(tensors, net))
    return dict(AveragedModel(net).state_dict())


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}, "epoch": 7},
        lambda tensors: {"model": {"x": torch.zeros(1)}, "ema": None, "state_dict": tensors, "args": object},
        lambda tensors: {"state_dict": {"x": torch.zeros(1)}, "model_ema": tensors, "optimizer": {"state": [1, 2.5]}},
        lambda tensors: {"model": {"x": torch.zeros(1)}, "model_ema": averaged(tensors)},
        lambda tensors: {"model": tensors, "ema": {"decay": 0.99, "steps": 3}, "model_ema": {}},
        lambda tensors: {"module": {f"module.model.net.{key}": tensor for key, tensor in tensors.items()}},
        lambda tensors: {"params": Config(tensors), "rng": torch.zeros(5), "optimizer": {"state": {0: {"a": tensors}}}},
        lambda tensors: {"ema": {"shadow": tensors, "decay": 0.99}, "model": {"x": torch.zeros(1)}},
        lambda tensors: {"net": {"x": torch.zeros(1)}, "ema_net": tensors, "ema_decay": 0.99},
        lambda tensors: {"ema_state_dict": {"steps": torch.zeros(1), "module.x": torch.ones(1)}, "state_dict": tensors},
        lambda tensors: {"weights": tensors, "ema_loss": {"value": torch.zeros(1)}, "top1": {"sum": torch.zeros(1)}},
    ],
    ids=[
        *("state dict", "data parallel", "unknown class", "averaged", "torch's average", "no average", "wrapped often"),
        *("another key", "averaged under another key", "averaged beside", "mmengine's average", "measurements"),
    ],
)
def test_a_checkpoint_gives_the_recorded_outputs_after_import(
    tensors: dict[str, Tensor], tmp_path: Path, wrap: Callable[[Any], Any], old_format: bool
) -> None:
    file = save(wrap(tensors), tmp_path / "a.pth", _use_new_zipfile_serialization=not old_format)
    import_weights(NAME, file, tmp_path)
    golden.assert_matches(outputs(NAME, tmp_path), CASE["outputs"][0])


class Config(dict[str, Any]):
    """A kind of dict that only its author has."""


class Ordered(OrderedDict[str, Any]):
    """Another one."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "beside",
    [
        defaultdict(list, {"a": [1]}),
        deque([1, 2]),
        Config(lr=0.1),
        Path("runs"),
        np.float64(0.5),
        {1, 2},
        bytearray(b"abc"),
        argparse.Namespace(a=1),
        torch.nn.functional.gelu,
        torch.float16,
        10**30,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_contents_of_a_checkpoint_do_not_matter(
    tensors: dict[str, Tensor], tmp_path: Path, beside: object, protocol: int
) -> None:
    file = save({"args": beside, "state_dict": tensors}, tmp_path / "a.pth", pickle_protocol=protocol)
    found = read_checkpoint(file)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("kind", [Config, Ordered, OrderedDict])
def test_a_state_dict_of_another_dict_class_is_read(
    tensors: dict[str, Tensor], tmp_path: Path, kind: type[Any]
) -> None:
    assert list(read_checkpoint(save({"model": kind(tensors)}, tmp_path / "a.pth"))) == list(tensors)


def test_tensors_that_share_numbers_are_imported(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """In a network with tied weights, and here where a file has put all biases into one storage."""
    biases = [key for key, tensor in tensors.items() if key.endswith("bias")]
    storage = torch.cat([tensors[key] for key in biases])
    parts = storage.split([len(tensors[key]) for key in biases])
    file = save(tensors | dict(zip(biases, parts, strict=True)), tmp_path / "a.pth")
    import_weights(NAME, file, tmp_path)
    golden.assert_matches(outputs(NAME, tmp_path), CASE["outputs"][0])


def test_prefixes_and_missing_counters_do_not_matter(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    old = {f"net.{key}": tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}
    original = save({"state_dict": old}, tmp_path / "a.pth")
    file = import_weights(NAME, original, tmp_path)
    golden.assert_matches(outputs(NAME, tmp_path), CASE["outputs"][0])
    golden.assert_matches(outputs("cifar_resnet20", tmp_path, original), CASE["outputs"][0])
    assert load_file(file).keys() == timm.create_model("cifar_resnet20").state_dict().keys()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"a": tensors, "b": tensors},
        lambda tensors: {"a": {"state_dict": tensors, "epoch": 3}, "b": tensors},
        lambda tensors: {"a_ema": tensors, "b_ema": tensors, "model": tensors},
        lambda tensors: {**tensors, "best": tensors},
    ],
    ids=["two keys", "one deeper", "two averages", "beside tensors"],
)
def test_a_file_of_two_networks_is_an_error_that_names_both(
    tensors: dict[str, Tensor], tmp_path: Path, wrap: Callable[[Any], dict[str, Any]]
) -> None:
    content = wrap(tensors)
    file = save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=f"It has '{next(iter(content))}', '.*if one of them is the network's, save"):
        read_checkpoint(file)


def test_averaged_weights_without_names_are_left_out_with_a_warning(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    averages = {"decay": 0.9, "shadow_params": [tensor + 1 for tensor in tensors.values()]}
    file = save({"model": tensors, "ema": averages}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="the averaged weights under 'ema' have no names, so others are read"):
        found = read_checkpoint(file)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("content", [{0: torch.zeros(1)}, {(1, 2): torch.zeros(1)}, [], 3, {"a": torch.zeros(1), 5: 1}])
def test_a_file_without_weights_is_an_error(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match="holds no network weights"):
        read_checkpoint(save(content, tmp_path / "a.pth"))


def test_safetensors_are_imported_too(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    import_weights(NAME, tmp_path / "a.safetensors", tmp_path)
    golden.assert_matches(outputs(NAME, tmp_path), CASE["outputs"][0])


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A class of networks in a module `models.yolo`, as a checkpoint's author has it."""
    package, module = types.ModuleType("models"), types.ModuleType("models.yolo")
    monkeypatch.setitem(sys.modules, "models", package)
    monkeypatch.setitem(sys.modules, "models.yolo", module)

    class Model(nn.Module):
        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("code of the checkpoint's author ran")

    Model.__module__, Model.__qualname__ = "models.yolo", "Model"
    vars(module)["Model"] = Model
    return Model


def grow(cls: type[nn.Module], tensors: dict[str, Tensor]) -> nn.Module:
    """A network of nested `cls` whose state dict is `tensors` in half precision, and one more buffer outside it."""
    root = cls()
    for key, tensor in tensors.items():
        *path, leaf = key.split(".")
        part = root
        for name in path:
            if name not in dict(part.named_children()):
                part.add_module(name, cls())
            part = part.get_submodule(name)
        if "running" in leaf or not tensor.is_floating_point():
            part.register_buffer(leaf, tensor.half() if tensor.is_floating_point() else tensor)
        else:
            part.register_parameter(leaf, nn.Parameter(tensor.half()))
    root.register_buffer("grid", torch.zeros(3), persistent=False)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("averaged", "old_format"), [(False, False), (True, False), (True, True)])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")  # torch's, when it saves such a class
def test_a_whole_network_is_imported_without_its_classes(
    foreign: type[nn.Module],
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    averaged: bool,
    old_format: bool,
) -> None:
    net = grow(foreign, tensors)
    other = grow(foreign, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    content = {
        "epoch": -1,
        "best_fitness": np.array([0.25]),
        "model": other if averaged else net,
        "ema": net if averaged else None,
        "optimizer": None,
        "path": Path("runs/train"),
    }
    file = save(content, tmp_path / "best.pt", _use_new_zipfile_serialization=not old_format)
    monkeypatch.delitem(sys.modules, "models.yolo")
    monkeypatch.delitem(sys.modules, "models")
    found = read_checkpoint(file)
    assert list(found) == list(tensors)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16, torch.int64}
    kept = load_file(import_weights(NAME, file, tmp_path))
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16, torch.int64}
    golden.assert_matches(outputs(NAME, tmp_path), CASE["outputs"][0], rtol=5e-3)


def test_a_network_whose_modules_hold_each_other_is_refused(foreign: type[nn.Module], tmp_path: Path) -> None:
    net = foreign()
    net._modules["self"] = net
    with pytest.raises(WeightsError, match="contain each other"):
        read_checkpoint(save({"model": net}, tmp_path / "a.pt"))


# What is refused


def test_a_web_page_is_recognised(tmp_path: Path) -> None:
    for start in ("\n <!DOCTYPE html><html>Quota exceeded</html>", "\ufeff<!-- a --><HTML>", "<title>Sign in</title>"):
        (tmp_path / "a.pth").write_text(start, encoding="utf-8")
        with pytest.raises(WeightsError, match=r"a\.pth is a web page \(a quota .*\), not a checkpoint"):
            import_weights(NAME, tmp_path / "a.pth", tmp_path)
    (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match="is a git-lfs pointer"):
        import_weights(NAME, tmp_path / "a.pth", tmp_path)


@pytest.mark.parametrize("length", [0x3C, 0x3C20, 0x3C0A])
def test_the_length_of_a_header_is_not_taken_for_text(length: int) -> None:
    assert page_or_pointer(length.to_bytes(8, "little") + b'{"a":') is None
    assert page_or_pointer(length.to_bytes(8, "little").rstrip(b"\0") + b"html>") is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(tensors: dict[str, Tensor], tmp_path: Path, value: float) -> None:
    key = next(iter(tensors))
    damaged = tensors | {key: tensors[key].clone()}
    damaged[key].view(-1)[0] = value
    file = save(damaged, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=f"{file} is damaged: .* holds a number that is not finite. Get it again"):
        import_weights(NAME, file, tmp_path)
    with pytest.raises(WeightsError, match=f"{file} is damaged: .* holds a number that is not finite. Get it again"):
        outputs("cifar_resnet20", tmp_path, file)


def test_numbers_that_overflow_in_the_network_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    large = {key: torch.full_like(tensor, 1e38) if key.endswith("bias") else tensor for key, tensor in tensors.items()}
    with pytest.raises(WeightsError, match="computes a number that is not finite"):
        import_weights(NAME, save(large, tmp_path / "a.pth"), tmp_path)


@pytest.mark.slow
def test_a_stem_for_more_channels_than_can_be_tried_is_refused(tmp_path: Path) -> None:
    net: Any = timm.create_model("cifar_shufflenetv2")
    tensors, key = net.state_dict(), f"{net.pretrained_cfg['first_conv']}.weight"
    for channels in (5, 40_000):
        tensors[key] = torch.zeros(len(tensors[key]), channels, *tensors[key].shape[2:])
        save(tensors, tmp_path / f"{channels}.pth")
    import_weights("cifar_shufflenetv2.wide", tmp_path / "5.pth", tmp_path)
    with pytest.raises(
        WeightsError, match="images of 40000 channels, too many to try it on an image of 32 x 32 pixels"
    ):
        import_weights("cifar_shufflenetv2.wide", tmp_path / "40000.pth", tmp_path)


@pytest.mark.slow
def test_the_error_for_a_misfit_names_the_network_that_it_fits(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit cifar_resnet20_pfd\.theirs: .*; it fits cifar_resnet20$"):
        import_weights("cifar_resnet20_pfd.theirs", save(tensors, tmp_path / "a.pth"), tmp_path)
    wrong = dict(tensors)
    wrong.pop(next(iter(tensors)))
    with pytest.raises(WeightsError, match=r"1 of .* tensors are missing"):
        import_weights(NAME, save(wrong, tmp_path / "b.pth"), tmp_path)


def test_the_error_for_tensors_beside_the_networks_own_says_what_to_save(tensors: dict[str, Tensor]) -> None:
    training = {f"model.{key}": tensor for key, tensor in tensors.items()} | {"criterion.weight": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"; those under model\. fit; save these .* such as criterion\.weight$"):
        converted("cifar_resnet20", training, {})
    both = {f"{part}.{key}": tensor for key, tensor in tensors.items() for part in ("model", "ema")}
    with pytest.raises(WeightsError, match=r"; model\. and ema\. each hold tensors that fit; save those of one"):
        converted("cifar_resnet20", both, {})


@pytest.mark.parametrize("name", ["no_network", "../cifar_resnet20", "cifar_resnet20.../x", "cifar_resnet20.A", ""])
def test_an_invalid_name_is_refused(tensors: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"is not NETWORK or NETWORK\.TAG"):
        import_weights(name, save(tensors, tmp_path / "a.pth"), tmp_path)


@pytest.mark.slow
def test_a_refused_file_leaves_nothing_behind(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    save(tensors, tmp_path / "a.pth")
    with pytest.raises(WeightsError):
        import_weights("cifar_resnet20_pfd.theirs", tmp_path / "a.pth", cache)
    assert [file for file in cache.rglob("*") if file.is_file()] == []


# What is kept


def test_an_imported_file_says_where_it_came_from(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    original = save(tensors, tmp_path / "a.pth")
    file = import_weights(NAME, original, tmp_path)
    about = origin_of(file)
    assert about["origin"] == original.as_uri()
    assert about["original_sha256"] == sha256_of(original)
    assert (about["name"], about["license"]) == (NAME, "unknown")
    assert about["date"].startswith("20")
    assert file.name == f"{NAME}.{sha256_of(file)}.safetensors"


def test_the_last_import_under_a_name_counts_and_brings_its_classes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    import_weights(NAME, save(tensors, tmp_path / "a.pth"), tmp_path)
    ten = {key: tensor[:10] if tensor.shape[:1] == (100,) else tensor for key, tensor in tensors.items()}
    import_weights(NAME, save(ten, tmp_path / "b.pth"), tmp_path)
    net: Any = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)
    assert (net.num_classes, net.pretrained_cfg["tag"]) == (10, "theirs")
    assert timm.create_model(NAME, pretrained=True, cache_dir=tmp_path, num_classes=3).num_classes == 3
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.slow
def test_a_checkpoint_without_a_tag_is_found_where_there_is_no_default(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("pyconvresnet18", num_classes=7).state_dict()
    import_weights("pyconvresnet18", save(theirs, tmp_path / "a.pth"), tmp_path)
    assert imported_names(tmp_path) == ["pyconvresnet18.imported"]
    for name in ("pyconvresnet18", "pyconvresnet18.imported"):
        net: Any = timm.create_model(name, pretrained=True, cache_dir=tmp_path)
        assert (net.num_classes, net.pretrained_cfg["tag"]) == (7, "imported")


def test_a_damaged_import_is_noticed(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = import_weights(NAME, save(tensors, tmp_path / "a.pth"), tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged"):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)


def test_a_manually_downloaded_file_serves_as_the_pinned_one(private: Callable[..., Entry], tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet20")
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    sha256 = sha256_of(tmp_path / "a.safetensors")
    entry = private(source=f"hf://org/repo@{'0' * 40}:a.safetensors", sha256=sha256)
    save_file({**net.state_dict(), "conv": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=f"the weights of {entry.name} have {sha256}: it is another file"):
        import_weights(entry.name, tmp_path / "b.safetensors", tmp_path)
    file = import_weights(entry.name, tmp_path / "a.safetensors", tmp_path)
    assert sha256_of(file) == sha256
    assert fetch(entry, tmp_path) == file
    assert remove(entry, tmp_path) == file
    assert not file.exists()


def test_a_file_that_has_its_own_sha256_in_its_name_is_still_not_the_pinned_one(
    private: Callable[..., Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("cifar_resnet20", num_classes=100).state_dict(), tmp_path / "a.safetensors")
    mine = import_weights(NAME, tmp_path / "a.safetensors", tmp_path)
    overlay = {"file": str(mine)}
    with pytest.raises(
        WeightsError, match=r"the weights of cifar_resnet20\.cifar100 have .*: it is truncated, changed"
    ):
        timm.create_model(
            "cifar_resnet20.cifar100", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path
        )
    with hub_double() as server, server.replace(monkeypatch):
        server.files[f"org/repo/{mine.name}"] = mine.read_bytes()
        entry = private(source=f"hf://org/repo@{COMMIT}:{mine.name}", sha256="0" * 64)
        with pytest.raises(WeightsError, match=f"has sha256 {sha256_of(mine)}, expected {'0' * 64}"):
            fetch(entry, tmp_path)
        path = next(path for path in tmp_path.rglob(mine.name) if "snapshots" in path.parts)
        assert is_right(entry, path, tmp_path) is False


@pytest.mark.parametrize("group", ["bsconv_resnet", pytest.param("timm", marks=pytest.mark.slow)])
def test_a_pinned_file_of_torch_save_is_loaded_after_its_import(
    private: Callable[..., Entry], tmp_path: Path, group: str
) -> None:
    network = FAR if group == "bsconv_resnet" else "resnet18.far"
    net = timm.create_model(network.partition(".")[0])
    file = save({"state_dict": net.state_dict(), "args": argparse.Namespace(a=Path())}, tmp_path / "a.pth")
    entry = private(network, group, source=f"hf://org/repo@{COMMIT}:a.pth", sha256=sha256_of(file))
    imported = import_weights(network, file, tmp_path)
    assert fetch(entry, tmp_path) == imported and imported.read_bytes() == file.read_bytes()
    if group == "timm":
        loaded = create(entry, imported)
    else:
        loaded = timm.create_model(network, pretrained=True, cache_dir=tmp_path)
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_file_of_the_hub_without_a_known_sha256_can_be_imported_by_hand(
    private: Callable[..., Entry], tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    entry = private(source=f"hf://org/repo@{COMMIT}:a.pth", sha256=None)
    file = import_weights(FAR, save(tensors, tmp_path / "a.pth"), tmp_path)
    assert fetch(entry, tmp_path) == file  # without a connection
    golden.assert_matches(outputs(FAR, tmp_path), CASE["outputs"][0])
    file.write_bytes(file.read_bytes()[:-1])
    assert is_right(entry, file, tmp_path) is False


def test_removing_one_file_of_a_repository_leaves_the_others(
    private: Callable[..., Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_double() as server, server.replace(monkeypatch):
        entries = []
        for name, content in {"a": b"a" * 99, "b": b"b" * 99, "c": b"b" * 99}.items():
            server.files[f"org/repo/{name}.safetensors"] = content
            sha = hashlib.sha256(content).hexdigest()
            entries.append(private(source=f"hf://org/repo@{COMMIT}:{name}.safetensors", sha256=sha))
        first, second, third = (fetch(entry, tmp_path) for entry in entries)
        for entry, path, others in ((entries[0], first, (second, third)), (entries[1], second, (third,))):
            blob = path.resolve()
            assert remove(entry, tmp_path) == path
            assert not path.exists()
            assert all(other.is_file() for other in others)
            assert blob.exists() == any(other.resolve() == blob for other in others)


def test_a_file_that_another_process_replaces_now_is_an_error_that_says_so(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = import_weights(NAME, save(tensors, tmp_path / "a.pth"), tmp_path)
    monkeypatch.setattr("spd_zoo.weights.cache.imported_files", lambda name, folder: [file])
    file.unlink()
    with pytest.raises(WeightsError, match=f"{file} is being deleted, because {NAME} is imported again or removed"):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)


def test_weights_of_the_package_are_not_imported_over(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="come with a package"):
        import_weights("cifar_resnet20.cifar100", save(tensors, tmp_path / "a.pth"), tmp_path)


# Downloads


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Callable[..., Entry]]:
    """Puts a checkpoint with such fields into a private manifest."""
    own = json.loads(manifest_path().read_text(encoding="utf-8"))
    like = own["pyconvresnet"]["pyconvresnet50.in1k"]

    def use(name: str = FAR, group: str = "bsconv_resnet", **fields: Any) -> Entry:
        network = own[group].get(name.partition(".")[0], {})
        (tmp_path / "private.json").write_text(json.dumps({group: {name: like | network | fields}}))
        spd_zoo.use_manifest(tmp_path / "private.json")
        entry = find_entry(name)
        assert entry is not None
        return entry

    yield use
    spd_zoo.use_manifest(None)


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor], tmp_path: Path) -> Iterator[DriveDouble]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with drive_double(monkeypatch) as server:
        server.files["1" * 30] = save(tensors, tmp_path / "theirs.pth").read_bytes()
        server.folders["f" * 30] = {"resnet.pt": "1" * 30}
        yield server


@pytest.mark.slow
def test_the_authors_file_is_downloaded_converted_and_kept(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path
) -> None:
    entry = private(original_link=DRIVE)
    with pytest.warns(UserWarning, match="no sha256 is known for the file"):
        golden.assert_matches(outputs(FAR, tmp_path), CASE["outputs"][0])
    asked = len(drive.requests)
    golden.assert_matches(outputs(FAR, tmp_path), CASE["outputs"][0])
    assert len(drive.requests) == asked
    assert origin_of(fetch(entry, tmp_path))["origin"] == DRIVE


def test_a_file_in_a_folder_is_found_by_its_name(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="no sha256 is known for the file"):
        fetch(private(original_link=FOLDER, original_file="resnet.pt"), tmp_path)
    with pytest.raises(WeightsError, match=r"the folder holds resnet\.pt, and no other\.pt"):
        fetch(private(original_link=FOLDER, original_file="other.pt"), tmp_path / "other")


def test_the_link_of_a_folder_is_not_that_of_a_checkpoint(drive: DriveDouble, tmp_path: Path) -> None:
    text = rf"cannot download {FOLDER} \(it is a folder with resnet\.pt; give the link of one file in it\)"
    with pytest.raises(WeightsError, match=text):
        import_weights(NAME, FOLDER, tmp_path)


def test_googles_question_about_viruses_is_answered(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path
) -> None:
    drive.scanned.add("1" * 30)
    with pytest.warns(UserWarning, match="no sha256 is known for the file"):
        fetch(private(original_link=DRIVE), tmp_path)
    assert any("confirm=t" in request for request in drive.requests)


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_drive_that_is_busy_once_is_asked_again(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path, status: int
) -> None:
    drive.failures = [status]
    with pytest.warns(UserWarning, match="no sha256 is known for the file"):
        fetch(private(original_link=DRIVE), tmp_path)


def test_a_quota_is_reported_with_what_to_do(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    drive.over_quota.add("1" * 30)
    with pytest.raises(WeightsError, match=r"Too many users.*by hand.*spd-zoo weights import cifar_resnet20\.far FILE"):
        fetch(private(original_link=DRIVE), tmp_path)
    assert [file.suffix for file in tmp_path.rglob("cifar_resnet20.far*")] == [".lock"]


def test_the_authors_file_must_be_the_one_whose_sha256_is_known(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="it is another file"):
        fetch(private(original_link=DRIVE, sha256="0" * 64), tmp_path)
    entry = private(original_link=DRIVE, sha256=sha256_of(tmp_path / "theirs.pth"))
    assert fetch(entry, tmp_path) == fetch(entry, tmp_path)  # without a warning, which would be an error here


def test_a_damaged_import_is_downloaded_again(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path
) -> None:
    entry = private(original_link=DRIVE)
    with pytest.warns(UserWarning, match="no sha256 is known for the file"):
        file = fetch(entry, tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="no sha256 is known for the file"):
        assert sha256_of(fetch(entry, tmp_path)) in fetch(entry, tmp_path).name


@pytest.mark.parametrize("obstacle", ["no gdown", "offline"])
def test_the_error_of_a_failed_download_explains_the_manual_one(
    drive: DriveDouble, private: Callable[..., Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "no gdown":
        monkeypatch.setitem(sys.modules, "gdown", None)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"(pip install 'spd-zoo\[gdrive\]'|HF_HUB_OFFLINE).*by hand"):
        fetch(private(original_link=DRIVE), tmp_path)
    assert drive.requests == []


@pytest.mark.slow
def test_a_link_is_imported_over_http(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = save(tensors, tmp_path / "a.pth").read_bytes()
    with hub_double() as server, server.replace(monkeypatch):
        server.files["org/repo/a.pth"] = content
        server.faults.append(fails("GET /org.*", 503))
        link = f"{server.url}/org/repo/resolve/{COMMIT}/a.pth"
        file = import_weights(NAME, link, tmp_path)
        assert origin_of(file)["origin"] == link
        server.files["org/repo/a.pth"] = b"<!DOCTYPE html><html>Sign in</html>"
        with pytest.raises(WeightsError, match="answered with a web page"):
            import_weights(NAME, link, tmp_path)
    golden.assert_matches(outputs(NAME, tmp_path), CASE["outputs"][0])


def test_passwords_of_links_are_neither_kept_nor_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = "http://me:secret@127.0.0.1:9/a.pth"
    monkeypatch.setattr("spd_zoo.weights.download._TRIES", 1)
    with pytest.raises(WeightsError, match=r"cannot download http://127.0.0.1:9/a.pth \(ConnectError"):
        import_weights(NAME, link, tmp_path)
    origins: list[str] = []
    module = sys.modules["spd_zoo.weights.fetch"]  # the package has a function of this name
    monkeypatch.setattr(module, "download", lambda *_: None)
    monkeypatch.setattr(module, "import_file", lambda name, file, origin, _: origins.append(origin))
    import_weights(NAME, link, tmp_path)
    assert origins == ["http://127.0.0.1:9/a.pth"]


@pytest.mark.parametrize("link", ["http://127.0.0.1:port/a.pth", "http://[::1/a.pth"])
def test_a_link_that_is_no_address_is_refused_in_a_sentence(link: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"InvalidURL: Invalid port|is no address"):
        import_weights(NAME, link, tmp_path)


def test_the_call_for_one_of_timms_networks_quotes_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = 'C:\\Users\\a "b" ü.safetensors'
    module = sys.modules["spd_zoo.weights.build"]  # the package has a function of this name
    monkeypatch.setattr(module, "timms_network", lambda name, _: timm.create_model(name, device="meta"))
    assert ast.literal_eval(_timms_overlay("resnet18", Path(path))) == {"file": path}


@pytest.mark.slow
def test_timms_own_network_loads_what_is_pulled_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: Any = timm.create_model("resnet50")
    content = save(theirs.state_dict(), tmp_path / "a.pth")
    file = import_weights("resnet50.pyconv_in1k", content, tmp_path)
    net: Any = timm.create_model("resnet50", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(net.fc.weight, theirs.fc.weight)


# Weights that a network converts


DERIVED = {name: entry for name, entry in entries().items() if entry.derived_from}


def test_every_checkpoint_of_the_authors_pyramids_has_a_derived_one_and_no_other_has() -> None:
    pyramids = {name for name in entries() if name.startswith("pyconv") and name.endswith("in1k")}
    assert pyramids == set(DERIVED) | {entry.derived_from for entry in DERIVED.values()}
    assert {entry.derived_from for entry in DERIVED.values()} == {name.replace("_spd.", ".") for name in DERIVED}


@pytest.mark.parametrize("entry", DERIVED.values(), ids=lambda entry: entry.name)
def test_a_derived_checkpoint_describes_its_weights_like_the_original(entry: Entry) -> None:
    original = original_of(entry)
    for field in ("source", "sha256", "license", "original_link", "dataset", "metrics", "input_size", "mean", "recipe"):
        assert getattr(entry, field) == getattr(original, field)
    assert entry.network == f"{original.network}_spd"
    cfg = config_of(entry.name)
    assert (cfg.license, cfg.num_classes) == ("mit", 1000) and not cfg.has_weights  # not verified


@pytest.mark.slow
def test_a_derived_checkpoint_is_the_original_converted(tmp_path: Path) -> None:
    case = next(case for case in golden.cases("pyconv") if case["model"] == "pyconvresnet50" and not case["model_args"])
    theirs = {key: torch.from_numpy(value) for key, value in golden.fill_state_dict(case["entries"]).items()}
    name = "pyconvresnet50_spd.in1k"
    with pytest.raises(WeightsError, match=r"weights of pyconvresnet50\.in1k.*by hand"):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    file = import_weights(name, save(theirs, tmp_path / "a.pth"), tmp_path)
    assert imported_names(tmp_path) == ["pyconvresnet50.in1k"]
    assert fetch(entries()[name], tmp_path) == file
    x = torch.from_numpy(golden.make_input(**case["input"]))
    for tag in (name, "pyconvresnet50.in1k"):
        with torch.inference_mode():
            net = timm.create_model(tag, pretrained=True, cache_dir=tmp_path).eval()
            golden.assert_matches(net(x).numpy(), case["outputs"][0])
    with pytest.raises(WeightsError, match=r"are those of pyconvresnet50\.in1k; delete these instead"):
        remove(entries()[name], tmp_path)
    with pytest.raises(WeightsError, match=r"has no file of its own: .* pyconvresnet50\.in1k; publish that"):
        prepare(entries()[name], "org", file)


def test_a_private_original_is_that_of_the_derived_checkpoint(tmp_path: Path) -> None:
    own = json.loads(manifest_path().read_text(encoding="utf-8"))["pyconvresnet"]["pyconvresnet50.in1k"]
    pinned = own | {"source": f"hf://org/repo@{COMMIT}:a.safetensors", "sha256": "0" * 64}
    (tmp_path / "private.json").write_text(json.dumps({"pyconvresnet": {"pyconvresnet50.in1k": pinned}}))
    try:
        spd_zoo.use_manifest(tmp_path / "private.json")
        assert entries()["pyconvresnet50_spd.in1k"].sha256 == "0" * 64
        assert config_of("pyconvresnet50_spd").tag == "tiny_in200"
        mine = {"derived_from": "pyconvresnet50.in1k", "params": 1, "macs": 1}
        (tmp_path / "b.json").write_text(json.dumps({"pyconvresnet": {"pyconvhgresnet50_spd.mine": mine}}))
        spd_zoo.use_manifest(tmp_path / "b.json")
        assert entries()["pyconvhgresnet50_spd.mine"].original_link == own["original_link"]
        for wrong in ("pyconvresnet50.in2k", "pyconvresnet50_spd.in1k"):
            (tmp_path / "c.json").write_text(json.dumps({"pyconvresnet": {"a.b": mine | {"derived_from": wrong}}}))
            with pytest.raises(WeightsError, match="there is no network a"):
                spd_zoo.use_manifest(tmp_path / "c.json")
            named = {"pyconvresnet50_spd.b": mine | {"derived_from": wrong}}
            (tmp_path / "c.json").write_text(json.dumps({"pyconvresnet": named}))
            with pytest.raises(WeightsError, match=f"derives pyconvresnet50_spd.b from {wrong}, which has no weights"):
                spd_zoo.use_manifest(tmp_path / "c.json")
    finally:
        spd_zoo.use_manifest(None)


@pytest.mark.slow
@pytest.mark.parametrize("chans", [1, 4])
@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet20",
        "cifar_wrn40_3_pfd",
        "cifar_mobilenetv3_large_w1",
        "resnet18_spd",
        "pyconvresnet50_spd",
        "ghostnet",
        "tf_efficientnet_lite0_spd",
        "yolov5n_spd",
        "yolov8n_spd",
    ],
)
def test_a_checkpoint_for_other_image_channels_keeps_them(name: str, chans: int, tmp_path: Path) -> None:
    net: Any = timm.create_model(name, in_chans=chans).eval()
    file = save(net.state_dict(), tmp_path / "a.pth")
    import_weights(f"{name}.mine", file, tmp_path)
    ways: list[Any] = [
        timm.create_model(f"{name}.mine", pretrained=True, cache_dir=tmp_path),
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}),
    ]
    for loaded in ways:
        assert loaded.in_chans == loaded.pretrained_cfg["input_size"][0] == chans
        assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in loaded.state_dict().items())
