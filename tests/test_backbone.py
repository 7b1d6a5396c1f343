"""Backbones of detectors: trained as classifiers, published without a head, and used by detectors."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundle_weights
import pytest
import timm
import torch
import yaml
from box_pictures import make_coco
from pictures import make_folders
from safetensors.torch import load_file, save_file
from torch import Tensor

import spd_zoo
from spd_zoo.cli.main import main
from spd_zoo.training.finetune import FinetuneConfig, finetune
from spd_zoo.weights import BackboneWarning, WeightsError, cache, entries, loads_backbone_only, sha256_of
from spd_zoo.weights.catalogue import local_checkpoints
from spd_zoo.weights.load import ModelError, load_backbone, load_network
from spd_zoo.weights.manifest import manifest_path
from spd_zoo.weights.publish import prepare

DETECTORS = ["yolov8n", "yolov8n_spd"]
BACKBONE = ("stem.", "stages.")
Publish = Callable[..., dict[str, Tensor]]


def classifier(detector: str, **kwargs: Any) -> Any:
    """A backbone with random weights and three classes."""
    return timm.create_model("backbone_classifier", detector=detector, num_classes=3, **kwargs)


@pytest.fixture
def publish(tmp_path: Path) -> Iterator[Publish]:
    """Publishes tensors, or a random backbone, as `DETECTOR.tiny_in200_backbone` of a private manifest."""

    def publish(detector: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        if tensors is None:
            state = classifier(detector).state_dict()
            tensors = {key: tensor for key, tensor in state.items() if key.startswith(BACKBONE)}
        file = tmp_path / "backbone.safetensors"
        save_file(tensors, file)
        known = entries()[detector]
        metric = {"dataset": "Tiny-ImageNet val", "metric": "top1", "value": 1.0, "input_size": 64, "measured_by": "us"}
        entry = {
            **{"num_classes": known.num_classes, "input_size": known.input_size, "params": known.params},
            **{"macs": known.macs, "source": f"bundled:{file.name}", "sha256": sha256_of(file)},
            **{"size": file.stat().st_size, "license": "apache-2.0", "dataset": "Tiny-ImageNet-200"},
            **{"recipe": {"model": "backbone_classifier"}, "metrics": [metric], "part": "backbone"},
        }
        manifest = tmp_path / "manifest.json"
        manifest.write_text(json.dumps({known.group: {f"{detector}.tiny_in200_backbone": entry}}))
        spd_zoo.use_manifest(manifest)
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "BUNDLED", tmp_path)
        yield publish
    spd_zoo.use_manifest(None)  # after that, because it looks for the bundled files again


@pytest.mark.slow
def test_a_run_is_published_as_a_backbone_of_its_detector(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("yolov8n_spd")  # makes the folder that of the package
    name, own = "yolov8n_spd.tiny_in200_backbone", tmp_path / "weights_manifest.json"
    shutil.copy(manifest_path(), own)
    monkeypatch.setattr(bundle_weights, "BUNDLED", tmp_path)
    monkeypatch.setattr(bundle_weights, "manifest_path", lambda: own)
    make_folders(tmp_path / "data", train=8, val=4, test=4)
    run = tmp_path / "run"
    options: dict[str, Any] = {"epochs": 1, "image_size": "32", "batch_size": 8, "workers": 0, "pretrained": False}
    options |= {"model_args": 'detector="yolov8n_spd"', "device": "cpu", "bf16": False}
    finetune(FinetuneConfig("backbone_classifier", str(tmp_path / "data"), run, **options))
    arguments = [str(run), name, "--dataset", "Colours", "--hardware", "a test", "--image-sizes", "32"]
    assert bundle_weights.main(arguments) == 0
    group = entries()["yolov8n_spd"].group
    (tmp_path / "manifest.json").write_text(json.dumps({group: {name: json.loads(own.read_text())[group][name]}}))
    spd_zoo.use_manifest(tmp_path / "manifest.json")
    entry = entries()[name]
    assert entry.part == "backbone" and entry.num_classes == entries()["yolov8n_spd"].num_classes
    written = json.loads(own.read_text())[group][name]
    assert (written["mean"], written["std"], written["crop_pct"]) == ([0, 0, 0], [1, 1, 1], 1)  # not ImageNet's
    assert {metric["dataset"] for metric in entry.metrics} == {"Colours test", "Colours held-out train"}
    with pytest.warns(BackboneWarning):
        net: Any = timm.create_model(name, pretrained=True)
    trained = load_file(run / "model.safetensors")
    for key, tensor in net.state_dict().items():
        if key.startswith(BACKBONE):
            torch.testing.assert_close(tensor, trained[key].to(torch.half).to(tensor.dtype))


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_classifier_has_the_layers_of_the_detector(detector: str) -> None:
    net: Any = classifier(detector).eval()
    whole: Any = timm.create_model(detector).eval()
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items() if key.startswith(BACKBONE)}
    assert shapes == {key: tensor.shape for key, tensor in whole.state_dict().items() if key.startswith(BACKBONE)}
    whole.load_state_dict(net.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    *_, last = whole.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(net(images), net.head.fc(last.mean((2, 3))))


@pytest.mark.parametrize("detector", ["resnet18", "ssd_vgg16", "yolov9"])
def test_only_yolos_have_such_a_backbone(detector: str) -> None:
    with pytest.raises(ValueError, match="give the name of"):
        classifier(detector, device="meta")


def test_the_classifier_has_no_weights_of_its_own() -> None:
    with pytest.raises(WeightsError, match="there are no weights for backbone_classifier; create it with pretrained=F"):
        timm.create_model("backbone_classifier", pretrained=True)


@pytest.mark.parametrize("classes", [None, 3], ids=["own classes", "3 classes"])
def test_pretrained_loads_the_backbone_and_says_that_the_rest_is_random(publish: Publish, classes: int | None) -> None:
    tensors = publish("yolov8n")
    arguments: Any = {} if classes is None else {"num_classes": classes}
    torch.manual_seed(0)
    fresh = timm.create_model("yolov8n", **arguments).state_dict()
    torch.manual_seed(0)
    with pytest.warns(BackboneWarning, match="yolov8n.tiny_in200_backbone are a backbone without neck and head"):
        loaded = timm.create_model("yolov8n", pretrained=True, **arguments).state_dict()
    assert not torch.equal(fresh["stem.0.conv.weight"], loaded["stem.0.conv.weight"])
    for key, tensor in loaded.items():
        assert torch.equal(tensor, tensors[key] if key in tensors else fresh[key]), key


def test_the_tag_decides_whether_only_a_backbone_is_loaded(publish: Publish, tmp_path: Path) -> None:
    publish("yolov8n_spd")
    assert loads_backbone_only("yolov8n_spd")
    assert loads_backbone_only("yolov8n_spd.tiny_in200_backbone")
    assert not loads_backbone_only("yolov8n_spd.bccd")
    file = {"file": str(tmp_path / "backbone.safetensors")}
    with pytest.raises(WeightsError, match="tensors are missing"):  # without the tag, it must be a whole network
        timm.create_model("yolov8n_spd", pretrained=True, pretrained_cfg_overlay=file)
    tag = "yolov8n_spd.tiny_in200_backbone"
    with pytest.warns(BackboneWarning):
        net = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=file)
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


def test_features_need_no_head_and_no_warning(publish: Publish) -> None:
    tensors = publish("yolov8n")
    net = timm.create_model("yolov8n", pretrained=True, features_only=True)
    assert torch.equal(next(iter(net.parameters())), tensors["stem.0.conv.weight"])


def test_nothing_is_detected_without_a_head(publish: Publish) -> None:
    publish("yolov8n")
    for name in ("yolov8n", "yolov8n.tiny_in200_backbone"):
        with pytest.raises(ModelError, match=f"the weights of {name} are a backbone .* spd-zoo finetune {name} --data"):
            load_network(name, "cpu")


def test_a_backbone_is_not_published_as_a_network(publish: Publish) -> None:
    publish("yolov8n")
    with pytest.raises(WeightsError, match="is a backbone only, which timm cannot load from the Hub"):
        prepare(entries()["yolov8n.tiny_in200_backbone"], "org", offline=True)


def test_list_and_info_say_what_a_backbone_is_for(publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    publish("yolov8n")
    name = "yolov8n.tiny_in200_backbone"
    assert main(["list", "yolov8n.*"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    assert " finetune " in row and " detect " not in row
    assert main(["info", name]) == 0
    card = capsys.readouterr().out
    assert f"{name}: detection, 80 classes, backbone trained on Tiny-ImageNet-200" in card
    assert f"{name}: backbone only, top-1 1.00 %" in card and f"spd-zoo finetune {name} --data DIR --out RUN" in card
    assert "spd_zoo.Detector" not in card
    assert name not in local_checkpoints()  # nothing to try in the demo


def test_a_backbone_that_does_not_fit_is_refused(publish: Publish, tmp_path: Path) -> None:
    tensors = publish("yolov8n")
    publish("yolov8n_spd", tensors)
    with pytest.raises(WeightsError, match=r"does not fit yolov8n_spd: stages\.0\.0\.conv\.weight has shape"):
        timm.create_model("yolov8n_spd", pretrained=True)
    del tensors["stem.0.conv.weight"]
    publish("yolov8n", tensors)
    with pytest.raises(WeightsError, match=r"the first is stem\.0\.conv\.weight"):
        timm.create_model("yolov8n", pretrained=True)
    net = timm.create_model("yolov8n")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(WeightsError, match=r"the first is stem\.0\.conv\.weight"):
        load_backbone(net, tmp_path / "backbone.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("in_chans", [1, 5])
def test_a_backbone_is_adapted_to_image_channels_as_with_pretrained(
    publish: Publish, tmp_path: Path, in_chans: int
) -> None:
    publish("yolov8n")
    net: Any = timm.create_model("yolov8n", in_chans=in_chans)
    load_backbone(net, tmp_path / "backbone.safetensors")
    with pytest.warns(BackboneWarning):
        other: Any = timm.create_model("yolov8n", in_chans=in_chans, pretrained=True)
    assert torch.equal(net.stem[0].conv.weight, other.stem[0].conv.weight)


@pytest.mark.slow
def test_a_detector_begins_with_the_backbone_of_a_run(tmp_path: Path) -> None:
    data = make_folders(tmp_path / "colours", train=6, val=2)
    options: dict[str, Any] = {"epochs": 1, "image_size": "32", "batch_size": 6, "workers": 0, "bf16": False}
    model_args = 'detector="yolov8n_spd"'
    finetune(FinetuneConfig("backbone_classifier", str(data), tmp_path / "run", model_args=model_args, **options))
    trained = load_file(tmp_path / "run" / "model.safetensors")
    net: Any = timm.create_model("yolov8n_spd", num_classes=3)
    head = net.head.cv2[0][2].weight.clone()
    load_backbone(net, tmp_path / "run")
    own = net.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in trained.items() if key.startswith(BACKBONE))
    assert torch.equal(net.head.cv2[0][2].weight, head)
    again: Any = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert torch.equal(again.stem[0].conv.weight, trained["stem.0.conv.weight"])


@pytest.mark.slow
def test_finetune_uses_the_backbone_by_default_and_trains_all_layers_at_once(
    publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("yolov8n")
    data = make_coco(tmp_path / "boxes")
    options: dict[str, Any] = {"epochs": 1, "image_size": "64", "batch_size": 8, "workers": 0, "bf16": False}
    finetune(FinetuneConfig("yolov8n", str(data), tmp_path / "run", lr=1e-12, warmup_epochs=0, **options))
    line = "note: the weights of yolov8n are a backbone: neck and head begin at random"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    run = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (run["pretrained"], run["head_epochs"]) == (True, 0)
