"""Exported networks give the same outputs in other programs, for any number of images, and describe their input."""

import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from spd_zoo import Classifier
from spd_zoo import exporter as exporting
from spd_zoo.arguments import height_and_width
from spd_zoo.cli.main import main
from spd_zoo.convert import ConversionError, convert_checkpoint
from spd_zoo.exporter import ExportError, export
from spd_zoo.training.evaluate import evaluate
from spd_zoo.weights import save_network
from spd_zoo.weights.load import ModelError, pretrained_cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    cfg = {"input_size": (3, 32, 32), "crop_pct": 0.8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.25)}
    net = timm.create_model("cifar_resnet20_pfd", num_classes=3)
    save_for_hf(net, str(folder), {"pretrained_cfg": cfg, "label_names": ["a", "b", "ü"]}, safe_serialization=True)
    return folder


def expected(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = timm.create_model(f"local-dir:{run}", pretrained=True).eval()(images)
    return logits


def assert_described(metadata: dict[str, str]) -> None:
    assert json.loads(metadata["class_names"]) == ["a", "b", "ü"]
    assert (metadata["image_size"], metadata["resize_shorter_side"]) == ("32", "40")
    assert json.loads(metadata["mean"]) == [0.5, 0.4, 0.3]
    assert "shorter side has 40 pixels; cut out the 32x32 pixels in the middle" in metadata["preprocessing"]


@pytest.mark.slow
def test_an_onnx_file_computes_the_same_for_any_number_of_images(run: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra `export`")
    assert main(["export", str(run), "--to", "onnx"]) == 0
    session = onnxruntime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected(run, images), rtol=1e-4, atol=1e-4)
    assert_described(session.get_modelmeta().custom_metadata_map)
    assert not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_a_pt2_file_computes_the_same_for_any_number_of_images(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = export(str(run), "pt2", tmp_path / "new" / "net.pt2")
    assert not [message for message in caplog.messages if ".pt2" in message]  # torch complains of another suffix
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra)
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), expected(run, images), rtol=1e-4, atol=1e-4)
    assert_described(json.loads(extra["metadata.json"]))


@pytest.mark.slow
def test_the_image_size_may_be_another(run: Path, tmp_path: Path) -> None:
    program = torch.export.load(export(str(run), "pt2", tmp_path / "net.pt2", image_size=48))
    assert program.module()(torch.randn(2, 3, 48, 48)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [True, False])
def test_a_file_has_strided_convolutions_unless_asked_otherwise(fold: bool, tmp_path: Path) -> None:
    convert_checkpoint("cifar_resnet20", tmp_path / "spd")
    file = tmp_path / "net.pt2"
    assert main(["export", str(tmp_path / "spd"), "--to", "pt2", "--out", str(file), *[["--no-fold"], []][fold]]) == 0
    program: Any = torch.export.load(file)
    operators = " ".join(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert operators.count("batch_norm") == (1 if fold else 22)  # one follows an addition
    assert operators.count("pixel_shuffle") == (0 if fold else 4)  # which lays out a space-to-depth kernel
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), expected(tmp_path / "spd", images), rtol=1e-4, atol=1e-4)


def written(net: Any, example: Any, metadata: Any, file: Path) -> Any:
    """Takes the place of a format, to test what `export` does around it."""
    file.write_text(json.dumps(metadata))
    return lambda images, score: (net(images),)


@pytest.mark.slow
def test_the_network_that_is_exported_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    net: Any = timm.create_model("cifar_ghostnet_effdown").to(memory_format=torch.channels_last)
    before = dict(net.named_parameters())
    export(net, "pt2", tmp_path / "net.pt2", image_size=64, fold=False)
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert all(module.training for module in net.modules())
    assert net.stem[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_network_is_exported_at_the_size_that_it_was_created_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    net = timm.create_model("cifar_ghostnet_effdown", num_classes=3, img_size=64)
    file = export(net, "pt2", tmp_path / "net.pt2", fold=False)
    assert json.loads(file.read_text())["image_size"] == "64"


@pytest.mark.parametrize("bias", [None, 0.0, 0.3])
def test_a_network_with_one_output_or_constant_ones_is_exported(
    bias: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    net: Any = timm.create_model("cifar_resnet20", num_classes=1 if bias is None else 3)
    if bias is not None:
        torch.nn.init.zeros_(net.head.fc.weight)
        torch.nn.init.constant_(net.head.fc.bias, bias)
    assert export(net, "pt2", tmp_path / "net.pt2", fold=False).is_file()


def test_a_network_that_computes_nan_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    net: Any = timm.create_model("cifar_resnet20")
    torch.nn.init.constant_(net.head.fc.bias, math.nan)
    with pytest.raises(ExportError, match="computes NaN for noise, so its file cannot be checked"):
        export(net, "pt2", tmp_path / "net.pt2", fold=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_are_exported_in_float32_with_a_note(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    net = timm.create_model("cifar_resnet20").to(dtype)
    file = export(net, "pt2", tmp_path / "net.pt2", fold=False)
    note = f"cifar_resnet20 has weights of {dtype}: the file computes in torch.float32"
    assert note in json.loads(json.loads(file.read_text())["notes"])
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}


def test_a_network_without_weights_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match='cifar_resnet20 has no weights to export, because it is on the "meta" device'
    ):
        export(timm.create_model("cifar_resnet20", device="meta"), "pt2", tmp_path / "net.pt2")


def test_frozen_parameters_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    net = timm.create_model("cifar_resnet20").requires_grad_(False)
    file = export(net, "pt2", tmp_path / "net.pt2", fold=False)
    assert json.loads(file.read_text())["parameters"] == "278330"


def test_a_file_with_other_outputs_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(net: Any, *arguments: Any) -> Any:
        arguments[-1].write_text("a file")
        return lambda images, score: (1.01 * net(images),)

    monkeypatch.setitem(exporting.FORMATS, "onnx", wrong)
    with pytest.raises(ExportError, match="computes something else: logits differ by"):
        export(str(run), "onnx", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def assert_cannot_be_folded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "pt2", "--out", str(run / "net.pt2")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"spd-zoo: error: {run} cannot be folded: the ") and err.count("\n") == 1, err
    assert "--no-fold" in err
    assert not list(run.glob("*.pt2*"))


@pytest.mark.parametrize("fold", [True, False])
def test_an_image_size_that_the_network_does_not_take_is_refused(fold: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"yolov8n_spd: .* must be multiples of 32, got 40x40") as refused:
        export(timm.create_model("yolov8n_spd"), "pt2", tmp_path / "net.pt2", image_size=40, fold=fold)
    assert "--no-fold" not in str(refused.value)  # which would not help
    assert not list(tmp_path.iterdir())


def test_a_run_with_weights_that_are_not_finite_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    save_file(weights | {"head.fc.bias": torch.full((3,), math.nan)}, tmp_path / "run" / "model.safetensors")
    assert main(["export", str(tmp_path / "run"), "--to", "pt2"]) == 1
    assert "head.fc.bias holds a number that is not finite. Get it again, or train it again" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt2*"))


def test_a_network_that_folding_would_change_is_one_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(*_: Any) -> Any:
        raise ConversionError("the rewritten network differs")

    monkeypatch.setattr(exporting, "fold_spd", differ)
    assert_cannot_be_folded(run, capsys)


@pytest.mark.slow
def test_a_network_made_for_grey_images_is_described_by_its_own_channels(tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet20", num_classes=3, in_chans=1)
    extra = {"metadata.json": ""}
    torch.export.load(export(net, "pt2", tmp_path / "net.pt2"), extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    mean = sum(pretrained_cfg(net)["mean"]) / 3
    assert metadata["channels"] == "1" and json.loads(metadata["mean"]) == [pytest.approx(mean)]


def test_the_file_of_a_network_does_not_go_into_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cifar_resnet20").mkdir()
    assert export("cifar_resnet20", "pt2") == Path("cifar_resnet20.pt2")


@pytest.mark.parametrize("write", ["export", "convert", "save"])
def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            if write == "export":
                export(str(run), "pt2", "file.pt2")
            elif write == "convert":
                convert_checkpoint("cifar_resnet20", Path("converted"))
            else:
                save_network(timm.create_model("cifar_resnet20"), "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_only_an_earlier_export_is_replaced(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporting.FORMATS, "pt2", written)
    precious = tmp_path / "net.pt2"
    precious.write_text("something else")
    with pytest.raises(ExportError, match=r"net\.pt2 exists already and is no exported network; remove it, or give"):
        export(str(run), "pt2", precious, fold=False)
    with pytest.raises(ExportError, match=r"is a folder; give the name of a file, such as .*model\.pt2"):
        export(str(run), "pt2", tmp_path, fold=False)
    assert precious.read_text() == "something else"
    for _ in range(2):
        assert export(str(run), "pt2", tmp_path / "other.pt2", fold=False).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_an_exported_file_may_be_written_again(run: Path, tmp_path: Path, to: str) -> None:
    for _ in range(2):
        assert export(str(run), to, tmp_path / f"net.{to}").is_file()


def test_a_failed_export_makes_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(net: Any, example: Any, metadata: Any, file: Path) -> Any:
        raise ExportError("failed")

    monkeypatch.setitem(exporting.FORMATS, "pt2", fail)
    with pytest.raises(ExportError, match="failed"):
        export(str(run), "pt2", tmp_path / "new" / "net.pt2", fold=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [torch.tensor(64), (64, torch.tensor(64)), torch.tensor([64, 64])])
def test_numbers_of_torch_are_sizes(size: Any) -> None:
    assert height_and_width("image_size", size) == (64, 64)


def test_an_image_of_no_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        export(timm.create_model("cifar_resnet20", num_classes=3), "pt2", tmp_path / "a.pt2", image_size=0)


def test_another_format_is_refused(run: Path) -> None:
    with pytest.raises(ExportError, match="the formats are onnx and pt2, got 'tflite'"):
        export(str(run), "tflite")


def test_a_path_is_taken_as_its_text_and_nothing_else_is_a_network(run: Path, tmp_path: Path) -> None:
    calls: list[Callable[[Any], Any]] = [lambda model: export(model, "onnx"), lambda model: evaluate(model, tmp_path)]
    for call in calls:
        with pytest.raises(ModelError, match=r"there is no network, file or folder '.*gone'"):
            call(tmp_path / "gone")
        with pytest.raises(TypeError, match="not Classifier"):
            call(Classifier(run, device="cpu"))
