"""Private manifests add and replace entries, and an invalid one is refused as a whole."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_double import COMMIT, hub_double
from networks import config_of
from safetensors.torch import save

import spd_zoo
from spd_zoo.cli.main import main
from spd_zoo.weights import WeightsError, entries, sha256_of
from spd_zoo.weights.fit import own_networks
from spd_zoo.weights.manifest import default_checkpoints, manifest_path

OWN = json.loads(manifest_path().read_text(encoding="utf-8"))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a private manifest with one checkpoint; afterwards there is none again."""

    def write(name: str = "cifar_resnet20.company", group: str = "bsconv_resnet", **fields: Any) -> Path:
        network = OWN[group][name.partition(".")[0]]
        source = {"source": f"hf://org/repo@{COMMIT}:a.safetensors", "sha256": "0" * 64}
        path = tmp_path / "private.json"
        path.write_text(
            json.dumps({group: {name: OWN["pyconvresnet"]["pyconvresnet50.in1k"] | network | source | fields}})
        )
        return path

    yield write
    spd_zoo.use_manifest(None)


def test_a_private_checkpoint_is_listed_and_becomes_the_default(write: Write) -> None:
    before = timm.list_pretrained("pyconvresnet18.*")
    spd_zoo.use_manifest(write("pyconvresnet18.company", "pyconvresnet"))
    assert timm.list_pretrained("pyconvresnet18.*") == ["pyconvresnet18.company"]
    assert config_of("pyconvresnet18").tag == "company"
    assert timm.create_model("pyconvresnet18", device="meta").num_classes == 1000
    spd_zoo.use_manifest(None)
    assert timm.list_pretrained("pyconvresnet18.*") == before
    assert "pyconvresnet18.company" not in entries()


@pytest.mark.parametrize("first", [False, True])
def test_the_catalogue_and_timm_agree_on_the_default_weights(first: bool, write: Write) -> None:
    path = write("pyconvresnet18.first", "pyconvresnet", default=first)
    groups = json.loads(path.read_text())
    groups["pyconvresnet"]["pyconvresnet18.second"] = groups["pyconvresnet"]["pyconvresnet18.first"] | {"default": True}
    path.write_text(json.dumps(groups))
    spd_zoo.use_manifest(path)
    cfgs = {name: config_of(name) for name in own_networks()}
    of_timm = {name: f"{name}.{cfg.tag}" for name, cfg in cfgs.items() if cfg.has_weights}
    assert default_checkpoints(entries()) == of_timm
    assert of_timm["pyconvresnet18"] == f"pyconvresnet18.{'first' if first else 'second'}"
    assert of_timm["yolov8n_spd"] == "yolov8n_spd.tiny_in200_backbone"  # "yolov8n_spd.bccd" says "default": false


def test_a_private_checkpoint_replaces_one_of_the_package(write: Write) -> None:
    name = "pyconvresnet50_spd.tiny_in200"
    spd_zoo.use_manifest(write(name, "pyconvresnet", license="proprietary"))
    assert entries()[name].license == "proprietary"
    assert config_of(name).license == "proprietary"
    assert set(entries()) == {key for members in OWN.values() for key in members}


def test_a_private_checkpoint_gets_its_images_as_its_network_does(write: Write) -> None:
    path = write("yolov8n.company", "yolov8_spd")
    groups = json.loads(path.read_text())
    for field in ("mean", "std", "crop_pct"):
        groups["yolov8_spd"]["yolov8n.company"].pop(field, None)
    path.write_text(json.dumps(groups))
    spd_zoo.use_manifest(path)
    cfg = config_of("yolov8n.company")
    assert (cfg.mean, cfg.std, cfg.crop_pct) == ((0, 0, 0), (1, 1, 1), 1)  # not ImageNet's


COMMAND = "spd-zoo finetune cifar_resnet20 --data CIFAR100 --out RUN"


def test_weights_that_were_replaced_say_by_what_and_how_to_train_them_again(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"source": None, "replaced_by": "cifar_resnet20.cifar100", "train_again": COMMAND, "notes": "Old."}
    spd_zoo.use_manifest(write(sha256=None, **gone))
    text = (
        "the weights cifar_resnet20.company are not distributed any more; use cifar_resnet20.cifar100, which replaced "
        f"them, or train them again: {COMMAND}"
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(text)}$"):
        timm.create_model("cifar_resnet20.company", pretrained=True)
    assert main(["weights", "pull", "cifar_resnet20.company"]) == 1
    assert capsys.readouterr().err == f"spd-zoo: error: {text}\n"
    assert config_of("cifar_resnet20").tag == "cifar100"
    assert main(["weights", "list", "cifar_resnet20.company", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["location"], row["from"]) == ("replaced", "replaced by cifar_resnet20.cifar100")
    assert main(["info", "cifar_resnet20.company"]) == 0
    card = capsys.readouterr().out.splitlines()
    assert f"train     {COMMAND}" in card
    assert not any("predict" in line or "pretrained=True" in line for line in card)
    assert main(["info", "cifar_resnet20"]) == 0
    (own,) = (line for line in capsys.readouterr().out.splitlines() if "cifar_resnet20.company" in line)
    assert "replaced by cifar_resnet20.cifar100" in own


INVALID = r"is invalid at bsconv_resnet/cifar_resnet20\.company"


@pytest.mark.parametrize("missing", ["train_again", "replaced_by"])
def test_replaced_weights_need_all_that_is_said_about_them(write: Write, missing: str) -> None:
    gone = {"source": None, "replaced_by": "cifar_resnet20.cifar100", "train_again": COMMAND, "notes": "Old."}
    del gone[missing]
    with pytest.raises(WeightsError, match=INVALID):
        spd_zoo.use_manifest(write(sha256=None, **gone))
    with pytest.raises(WeightsError, match=INVALID):
        spd_zoo.use_manifest(write(replaced_by="cifar_resnet20.cifar100", train_again=COMMAND))  # has a source


def test_a_private_checkpoint_is_loaded_from_a_mirror(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = timm.create_model("cifar_resnet20")
    content = save(net.state_dict())
    (tmp_path / "a.safetensors").write_bytes(content)
    with hub_double() as mirror, mirror.replace(monkeypatch):
        mirror.files["org/repo/a.safetensors"] = content
        spd_zoo.use_manifest(write(sha256=sha256_of(tmp_path / "a.safetensors")))
        loaded = timm.create_model("cifar_resnet20.company", pretrained=True, cache_dir=tmp_path)
    for key, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


def test_after_an_invalid_manifest_the_previous_one_still_applies(write: Write, tmp_path: Path) -> None:
    spd_zoo.use_manifest(write("pyconvresnet18.company", "pyconvresnet"))
    (tmp_path / "wrong.json").write_text("{")
    for path in (tmp_path / "wrong.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(WeightsError, match=f"the manifest {path} "):
            spd_zoo.use_manifest(path)
    assert timm.list_pretrained("pyconvresnet18.*") == ["pyconvresnet18.company"]


def test_an_original_of_the_package_cannot_become_a_derived_entry(tmp_path: Path) -> None:
    chained = {"params": 24847720, "macs": 5, "derived_from": "pyconvresnet101.in1k"}
    (tmp_path / "a.json").write_text(json.dumps({"pyconvresnet": {"pyconvresnet50.in1k": chained}}))
    text = r"derives pyconvresnet50\.in1k from another entry, but pyconvresnet50_spd\.in1k is derived from it\. Correct"
    with pytest.raises(WeightsError, match=text):
        spd_zoo.use_manifest(tmp_path / "a.json")
    assert entries()["pyconvresnet50_spd.in1k"].input_size == (3, 224, 224)


ASK = """
import timm, spd_zoo
timm.create_model("pyconvresnet18", device="meta")
try:
    timm.create_model("pyconvresnet50_spd", pretrained=True)
except spd_zoo.WeightsError as error:
    print(error)
"""


def run(*command: str, manifest: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SPD_ZOO_MANIFEST": str(manifest)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_wrong_manifest_in_the_environment_stops_loading_and_the_command_but_not_the_import(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text('{"pyconvresnet": {}}')
    asked = run("-c", ASK, manifest=tmp_path / "wrong.json")
    assert asked.returncode == 0, asked.stderr
    assert f"the manifest {tmp_path / 'wrong.json'} is invalid at pyconvresnet" in asked.stdout
    listed = run("-m", "spd_zoo", "list", manifest=tmp_path / "wrong.json")
    assert (listed.returncode, listed.stdout) == (1, "")
    assert listed.stderr.startswith(f"spd-zoo: error: the manifest {tmp_path / 'wrong.json'} is invalid")
    assert len(listed.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_manifest_in_the_environment_applies_from_the_start(write: Write) -> None:
    listed = run(
        "-m", "spd_zoo", "list", "--json", "pyconvresnet18.*", manifest=write("pyconvresnet18.company", "pyconvresnet")
    )
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["default"], row["weights"]) == ("pyconvresnet18.company", True, "hub")
