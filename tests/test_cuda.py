"""Networks, losses, detection and training on a GPU, compared with float64 on the CPU.

`pytest -m cuda` runs everything here on the GPU. Where a test makes sense on a CPU, too, it also runs there.
"""

import copy
import csv
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from box_pictures import make_coco
from networks import noise, random_network
from pictures import make_folders
from runs import finetune_in_processes, rows_of, same_run, stop_in
from torch import Tensor
from torchvision.ops import box_iou

from spd_zoo import convert_to_spd, fold_spd
from spd_zoo.exporter import export
from spd_zoo.inference.detector import Detector
from spd_zoo.losses import Target
from spd_zoo.models._detector import DetectionNet
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.finetune import Stopped, finetune
from spd_zoo.training.memory import bytes_per_image
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.weights.families import FAMILIES

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms, before CUDA is used
on_cpu_too = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
DETECTORS = ("yolov5n_spd", "yolov8n_spd", "ssd_mobilenetv1")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, or a GPU with convolutions in full float32 precision; skips without a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield request.param


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def smallest(family: str) -> tuple[str, int]:
    """The network of a family with the fewest parameters, and the side of its images, 64 pixels if it is free."""
    groups = FAMILIES[family].groups
    table = Path(__file__).parents[1] / "tools" / "complexity.csv"
    rows = [
        row
        for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        if timm.model_entrypoint(row["network"]).__module__.rpartition(".")[2] in groups
    ]
    row = min(rows, key=lambda row: int(row["params"]))
    return row["network"], int(row["input"].split("x")[1]) if family == "ssd" else 64


def flat(output: Any) -> Tensor:
    """The output of a network as one vector."""
    return output.flatten() if isinstance(output, Tensor) else torch.cat([tensor.flatten() for tensor in output])


def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradients with respect to all weights, on the CPU in float64."""
    net.zero_grad()
    output = flat(net(x))
    weights = torch.linspace(-1, 1, len(output), dtype=torch.float64).to(output)
    (output * weights).mean().backward()
    gradients = [parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]
    return output.detach().cpu().double(), torch.cat(gradients).cpu().double()


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square error, relative to that of the expected values."""
    return float((actual.cpu().double() - expected).norm() / expected.norm())


@cache
def reference(family: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The smallest network of a family, an input, and its output and gradients in float64 on the CPU."""
    name, side = smallest(family)
    net, x = random_network(name), noise(2, 3, side, side)
    output, gradients = run(net.double(), x.double())
    return net.float(), x, output, gradients


by_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.slow
@by_family
@on_cpu_too
def test_forward_and_backward_are_those_of_float64(family: str, device: str) -> None:
    net, x, output, gradients = reference(family)
    net, x = copy.deepcopy(net).to(device), x.to(device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        actual, slope = run(net.to(memory_format=memory_format), x.to(memory_format=memory_format))
        assert (actual - output).abs().max() < 1e-3 * output.std()
        assert error(slope, gradients) < 1e-3


@pytest.mark.slow
@by_family
@on_cpu_too
def test_bf16_autocast_is_within_its_rounding(family: str, device: str) -> None:
    net, x, output, _ = reference(family)
    net = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
    x = x.to(device, memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        actual, _ = run(net, x)
    assert 1e-5 < error(actual, output) < 0.05


@pytest.mark.slow
@on_cpu_too
def test_the_compiled_network_computes_the_same(device: str) -> None:
    net: Any = random_network("cifar_resnet20_pfd").to(device)
    x = noise(2, 3, 32, 32).to(device)
    with torch.inference_mode():
        expected = net(x)
        compiled: Any = torch.compile(net, backend="inductor" if device == "cuda" else "aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def raw_and_targets(name: str) -> tuple[DetectionNet, Any, list[Target], tuple[int, int]]:
    """A detector, its output for two images, their objects, and the image size."""
    net: Any = random_network(name, num_classes=3)
    side = net.pretrained_cfg["input_size"][-1] if name.startswith("ssd") else 64
    with torch.inference_mode():
        raw = net(noise(2, 3, side, side))
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 10.0, 60.0, 60.0]])
    targets: list[Target] = [
        {"boxes": boxes, "labels": torch.tensor([0, 2])},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.long)},
    ]
    return net, raw, targets, (side, side)


def moved(raw: Any, device: str) -> Any:
    return raw.to(device) if isinstance(raw, Tensor) else type(raw)(tensor.to(device) for tensor in raw)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
@on_gpu
def test_losses_and_detections_are_those_of_the_cpu(name: str, device: str) -> None:
    net, raw, targets, size = raw_and_targets(name)
    with torch.inference_mode():
        losses, found = net.loss(raw, targets, size), net.detections(raw, size, 0.3)
        net = net.to(device)
        on_device: list[Target] = [
            {"boxes": each["boxes"].to(device), "labels": each["labels"].to(device)} for each in targets
        ]
        for given in (targets, on_device):  # wherever the targets are
            for term, value in net.loss(moved(raw, device), given, size).items():
                assert value.device.type == device
                torch.testing.assert_close(value.cpu(), losses[term], rtol=1e-4, atol=1e-6)
        for actual, expected in zip(net.detections(moved(raw, device), size, 0.3), found, strict=True):
            assert len(expected["labels"]) > 0 and actual["boxes"].device.type == device
            assert same_objects(actual, expected) > 0.98


def same_objects(actual: Any, expected: Any) -> float:
    """The share of the expected objects that were found, with their class and nearly their box."""
    overlap = box_iou(actual["boxes"].cpu(), expected["boxes"]) > 0.95
    return float((overlap & (actual["labels"].cpu()[:, None] == expected["labels"])).any(0).float().mean())


@pytest.mark.slow
@on_gpu
def test_a_detector_finds_in_tiles_what_it_finds_on_the_cpu(device: str) -> None:
    net = random_network("yolov8n_spd", num_classes=3)
    picture = (noise(3, 90, 150).sigmoid() * 255).byte()
    options: dict[str, Any] = {"image_size": 64, "tile": 64, "score_threshold": 0.3}
    expected = Detector(net, device="cpu", **options)(picture)
    actual = Detector(net, device=device, **options)(picture)
    assert len(expected) > 0 and actual.boxes.device.type == "cpu"
    found = [{"boxes": each.boxes, "labels": each.labels} for each in (actual, expected)]
    assert same_objects(*found) > 0.95


TASKS: dict[str, dict[str, Any]] = {
    "classifier": {"model": "cifar_resnet20_pfd", "image_size": "32", "mixup": 0.2, "erase": 0.2, "ema": 0.9},
    "detector": {"model": "yolov8n_spd", "image_size": "64"},
}


def config(task: str, folder: Path, out: str, device: str, **changes: Any) -> FinetuneConfig:
    """A short run on pictures, which are made if they do not exist."""
    data = folder / "data"
    if not data.exists():
        make_coco(data) if task == "detector" else make_folders(data, train=4, val=2)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "lr": 1e-3, "workers": 0}
    options |= {"data": data, "out": folder / out, "device": device, "pretrained": False, "head_epochs": 0}
    return FinetuneConfig(**options | TASKS[task] | changes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("task", TASKS)
@on_cpu_too
def test_a_stopped_run_is_resumed_to_the_same_bits(
    task: str, device: str, deterministic: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(config(task, tmp_path, "whole", device))
    stop_in(monkeypatch, epoch=1, step=0)
    with pytest.raises(Stopped):
        finetune(config(task, tmp_path, "stopped", device))
    finetune(config(task, tmp_path, "stopped", device))
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@on_gpu
def test_two_processes_share_a_gpu(task: str, device: str, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"opt": "momentum", "bf16": False, "mixup": 0.0, "erase": 0.0, "ema": None}
    if task == "detector":
        plain = {"opt": "momentum", "bf16": False}
    one = config(task, tmp_path, "one", device, accumulate=2, **plain)
    two = config(task, tmp_path, "two", device, **plain)
    finetune_in_processes(two, torch.cuda.device_count() + 1)
    finetune(one)
    alone, together = (rows_of(run / "metrics.csv") for run in (one.out, two.out))
    first = [float(rows[0]["train_loss"]) for rows in (alone, together)]
    assert first[1] == pytest.approx(first[0], rel=0.05)  # BatchNorm sees all images of a step


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "images"), [("pyconvresnet50_spd", 64, 128), ("yolov8n", 320, 16)])
@on_gpu
def test_the_memory_of_a_step_is_estimated_within_a_fifth(name: str, side: int, images: int, device: str) -> None:
    net: Any = timm.create_model(name).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, torch.device(device))
    weights = sum(parameter.nbytes for parameter in net.parameters())
    expected = 4 * weights + 1.5 * images * bytes_per_image(net, side, preprocessing)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        run_step = flat(net(torch.randn(images, 3, side, side, device=device))).square().mean()
        optimizer.zero_grad()
        run_step.backward()
        optimizer.step()
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
@on_cpu_too
def test_conversion_and_folding_keep_the_predictions(device: str) -> None:
    net = random_network("cifar_resnet20").to(device)
    x = noise(2, 3, 32, 32).to(device)
    with torch.inference_mode():
        expected = net(x)
        converted = convert_to_spd(net)
        for each in (converted, fold_spd(converted)):
            assert next(each.parameters()).device.type == device
            torch.testing.assert_close(each(x), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
@on_gpu
def test_a_network_that_was_trained_there_is_exported(to: str, device: str, tmp_path: Path) -> None:
    finetune(config("classifier", tmp_path, "run", device, epochs=1))
    assert export(str(tmp_path / "run"), to).is_file()  # after it has compared the outputs
