"""Exported detectors find the boxes that the network finds, and every exported file works as the network did."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from box_pictures import make_coco
from networks import noise, random_network
from pictures import make_folders
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor

from spd_zoo import Detector
from spd_zoo import exporter as exporting
from spd_zoo.blocks import ImageSizeError
from spd_zoo.cli.main import main
from spd_zoo.exporter import ExportError, export
from spd_zoo.inference.exported import ExportedDetector, read_exported
from spd_zoo.training.evaluate import evaluate
from spd_zoo.weights.load import ModelError

ROOT = Path(__file__).parent.parent
TINY = {"chs": (4, 8, 8, 8, 8), "repeats": (0, 0)}
onnx = pytest.importorskip("onnx", reason="ONNX needs the extra `export`")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra `export`")
pytest.importorskip("onnxscript", reason="ONNX needs the extra `export`")


def make_detector(folder: Path, name: str = "yolov8n", **kwargs: Any) -> Any:
    """A random detector with several boxes in every image, as the folder of a run."""
    net = random_network(name, num_classes=3, **kwargs)
    with torch.no_grad():
        for conv in net.get_classifier():
            torch.nn.init.normal_(conv.bias, -0.5, 1.0)
        if "yolov8" in name:  # small boxes, among which NMS does not hang on rounding
            for branch in net.head.cv2:
                branch[-1].bias.copy_(-torch.arange(16.0).repeat(4))
    size = 64 if "ssd" not in name else 300
    cfg = {"pretrained_cfg": {"input_size": (3, size, size)}, "label_names": ["blue", "green", "red"]}
    save_for_hf(net, str(folder), cfg | {"model_args": kwargs}, safe_serialization=True)
    return net


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    make_detector(folder, **TINY)
    assert main(["export", str(folder), "--to", "onnx"]) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    cfg = {"input_size": (3, 32, 32), "crop_pct": 0.8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.25)}
    net = timm.create_model("cifar_resnet20_pfd", num_classes=3)
    save_for_hf(
        net, str(folder), {"pretrained_cfg": cfg, "label_names": ["blue", "green", "red"]}, safe_serialization=True
    )
    assert main(["export", str(folder), "--to", "onnx"]) == 0
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("cells"), train=3, val=3)


def assert_same_objects(found: Any, expected: Any, some: bool = True) -> None:
    assert len(expected) or not some
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-2)
    assert found.names == expected.names


# What the file computes


@pytest.mark.slow
def test_a_detectors_file_finds_what_the_network_finds_for_any_number_and_size(run: Path) -> None:
    session = onnxruntime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    net: Any = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    for shape in ((1, 3, 64, 64), (4, 3, 96, 160)):
        images = noise(*shape)
        num, boxes, scores, classes = session.run(["num", "boxes", "scores", "classes"], {"images": images.numpy()})
        assert (boxes.shape, scores.shape, classes.shape) == ((shape[0], 300, 4), (shape[0], 300), (shape[0], 300))
        with torch.inference_mode():
            expected = net.detections(net(images), shape[2:], 0.25)
        for i, each in enumerate(expected):
            count = len(each["labels"])
            assert num[i] == count > 0
            torch.testing.assert_close(torch.from_numpy(scores[i, :count]), each["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(boxes[i, :count]), each["boxes"], rtol=1e-4, atol=1e-2)
            assert classes[i, :count].tolist() == each["labels"].tolist()
            assert not boxes[i, count:].any() and not scores[i, count:].any() and (classes[i, count:] == -1).all()


@pytest.mark.slow
def test_a_file_says_how_to_use_it(run: Path) -> None:
    described = {item.key: item.value for item in onnx.load(run / "model.onnx").metadata_props}
    assert json.loads(described["class_names"]) == ["blue", "green", "red"]
    assert (described["score_threshold"], described["iou_threshold"], described["max_detections"]) == (
        *("0.25", "0.7", "300"),
    )
    assert "middle of such an image of grey 114" in described["preprocessing"]
