"""Exported detectors find the boxes that the network finds, and every exported file works as the network did."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import timm_contract
import torch
from box_pictures import make_coco
from networks import noise, random_network
from pictures import make_folders
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor
from torchvision.ops import box_iou

from spd_zoo import Detector
from spd_zoo import exporter as exporting
from spd_zoo.blocks import ImageSizeError
from spd_zoo.cli.main import main
from spd_zoo.exporter import ExportError, export
from spd_zoo.inference.exported import read_exported
from spd_zoo.models._detector import DetectionNet
from spd_zoo.training.evaluate import evaluate
from spd_zoo.weights.load import ModelError

ROOT = Path(__file__).parent.parent
TINY: dict[str, Any] = {"chs": (4, 8, 8, 8, 8), "repeats": (0, 0)}


def make_detector(folder: Path, name: str = "yolov8n", **kwargs: Any) -> Any:
    """A random detector with several boxes in every image, as the folder of a run."""
    net = random_network(name, num_classes=3, **kwargs)
    with torch.no_grad():
        for conv in net.get_classifier():
            conv.weight.mul_(5)
            torch.nn.init.normal_(conv.bias, -0.5, 1.0)
        if "yolov8" in name:  # small boxes, among which NMS does not hang on rounding
            for branch in net.head.cv2:
                branch[-1].weight.mul_(0.1)
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


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same boxes, scores and labels, whatever the order of those whose scores are equal but for rounding."""
    (boxes, scores, labels), others = expected, found
    assert len(others[2]) == len(labels) > 0
    torch.testing.assert_close(others[1], scores, rtol=1e-4, atol=1e-5)
    near = (others[0][:, None] - boxes).abs().amax(-1) <= 1e-2 + 1e-4 * boxes.abs().amax(-1)
    near &= ((others[1][:, None] - scores).abs() <= 1e-4) & (others[2][:, None] == labels)
    assert near.any(0).all() and near.any(1).all()


def assert_same_objects(found: Any, expected: Any) -> None:
    assert found.class_names == expected.class_names
    assert_same((found.boxes, found.scores, found.labels), (expected.boxes, expected.scores, expected.labels))


# What the file computes


@pytest.mark.slow
def test_a_detectors_file_finds_what_the_network_finds_for_any_number_and_size(run: Path) -> None:
    session: Any = onnxruntime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    net: Any = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    for shape in ((1, 3, 64, 64), (4, 3, 96, 64)):
        images = noise(*shape)
        num, boxes, scores, classes = session.run(["num", "boxes", "scores", "classes"], {"images": images.numpy()})
        assert (boxes.shape, scores.shape, classes.shape) == ((shape[0], 300, 4), (shape[0], 300), (shape[0], 300))
        with torch.inference_mode():
            expected = net.detections(net(images), shape[2:], 0.25)
        for i, each in enumerate(expected):
            count = len(each["labels"])
            assert num[i] == count > 0
            mine = tuple(torch.from_numpy(values[i, :count]) for values in (boxes, scores, classes))
            assert_same(mine, (each["boxes"], each["scores"], each["labels"]))
            assert not boxes[i, count:].any() and not scores[i, count:].any() and (classes[i, count:] == -1).all()


@pytest.mark.slow
def test_an_spd_detectors_file_pads_nothing_and_refuses_sides_that_are_no_multiples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("yolov8n_spd", num_classes=3, **TINY).eval()
    file = export(net, "onnx", tmp_path / "spd.onnx", image_size=64, raw=True)
    assert "Pad" not in {node.op_type for node in onnx.load(file).graph.node}
    session = onnxruntime.InferenceSession(str(file))
    images = noise(1, 3, 32, 160)
    with torch.inference_mode():
        for found, expected in zip(session.run(None, {"images": images.numpy()}), net(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        session.run(None, {"images": noise(1, 3, 48, 64).numpy()})


@pytest.mark.slow
def test_a_file_says_how_to_use_it(run: Path) -> None:
    described = {item.key: item.value for item in onnx.load(run / "model.onnx").metadata_props}
    assert json.loads(described["class_names"]) == ["blue", "green", "red"]
    assert (described["score_threshold"], described["iou_threshold"], described["max_detections"]) == (
        *("0.25", "0.7", "300"),
    )
    assert "middle of such an image of grey 114" in described["preprocessing"]


# The sizes of a YOLO differ in depth and width alone, and torch takes minutes for large ones: one of those is enough.
DETECTORS = [
    name for name in timm_contract.own_networks(DetectionNet) if name.startswith(("ssd", "yolov5n", "yolov8n"))
]
IN_CI = ("yolov8n", "ssd_mobilenetv1")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.exhaustive)
        for name in [*DETECTORS, "yolov8x_spd"]
    ],
)
def test_the_file_of_a_detector_computes_the_same_on_noise_on_zeros_and_on_saturated_images(
    name: str, tmp_path: Path
) -> None:
    net = random_network(name, num_classes=3)
    size = 64 if "yolo" in name else 128 if name == "ssd_mobilenetv1" else 300  # the others take no smaller images
    model: Any = onnx.load(export(net, "onnx", tmp_path / "net.onnx", image_size=size))
    model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in exporting.CANDIDATES)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for images in (noise(2, 3, size, size), torch.zeros(1, 3, size, size), torch.full((1, 3, size, size), 151.0)):
        found = map(torch.from_numpy, session.run(list(exporting.CANDIDATES), {"images": images.numpy()}))
        with torch.inference_mode():
            expected = exporting._Candidates(net)(images)
        for actual, right in zip(found, expected, strict=True):
            assert right.isfinite().all()
            torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-3 * max(1.0, right.abs().max().item() / 10))


@pytest.mark.slow
def test_raw_predictions_are_those_of_the_network(tmp_path: Path) -> None:
    net = make_detector(tmp_path, **TINY)
    assert main(["export", str(tmp_path), "--to", "onnx", "--raw"]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = noise(2, 3, 96, 64)
    with torch.inference_mode():
        for actual, expected in zip(session.run(None, {"images": images.numpy()}), net(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match=r"raw_0, raw_1, raw_2.*without --raw"):
        Detector(tmp_path / "model.onnx")


@pytest.mark.slow
def test_a_pt2_file_finds_what_the_network_finds(tmp_path: Path) -> None:
    net = make_detector(tmp_path, **TINY)
    file = export(str(tmp_path), "pt2", max_detections=200, score_threshold=0.4)
    program: Any = torch.export.load(file)
    images = noise(3, 3, 64, 96)
    with torch.inference_mode():
        num, boxes, scores, classes = program.module()(images)
        expected = net.detections(net(images), (64, 96), 0.4)
    assert boxes.shape == (3, 200, 4)
    for i, each in enumerate(expected):
        count = len(each["labels"])
        assert num[i] == count > 0
        mine = tuple(values[i, :count] for values in (boxes, scores, classes))
        assert_same(mine, (each["boxes"], each["scores"], each["labels"]))
        assert (classes[i, count:] == -1).all()


def test_a_file_with_other_boxes_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_detector(tmp_path / "run", **TINY)
    candidates = exporting._Candidates(net).eval()

    def wrong(part: Any, example: Tensor, metadata: Any, file: Path) -> Any:
        file.write_text("a file")
        return lambda images, score: (
            torch.ones(len(images)),
            *3 * [torch.zeros(0)],
            *(1.1 * x for x in candidates(images)),
        )

    monkeypatch.setitem(exporting.FORMATS, "onnx", wrong)
    with pytest.raises(ExportError, match="computes something else: other boxes or scores"):
        export(str(tmp_path / "run"), "onnx", tmp_path / "net.onnx", fold=False)
    assert not (tmp_path / "net.onnx").exists()


def test_options_of_detectors_are_refused_for_classifiers(classifier: Path) -> None:
    with pytest.raises(ExportError, match="is a classifier"):
        export(str(classifier), "onnx", raw=True)


# The file in place of the network


@pytest.mark.slow
def test_a_detectors_file_is_a_detector(run: Path) -> None:
    image = ROOT / "examples" / "images" / "coffee.png"
    for options in ({}, {"score_threshold": 0.6, "tile": 300}, {"iou_threshold": 0.3}, {"image_size": (96, 128)}):
        expected = Detector(run, **options, max_detections=300)(image)  # the file's limit
        assert_same_objects(Detector(run / "model.onnx", **options, max_detections=300)(image), expected)
    few = Detector(run / "model.onnx", max_detections=5)(image)
    torch.testing.assert_close(few.scores, Detector(run)(image).scores[:5], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="limit of 300 objects, fewer than 301"):
        Detector(run / "model.onnx", max_detections=301)
    with pytest.raises(ImageSizeError, match="multiples of 32, got 50x64"):
        Detector(run / "model.onnx", image_size=(50, 64))(image)
    with pytest.raises(ValueError, match="on the CPU; leave the device cuda out"):
        Detector(run / "model.onnx", device="cuda")


@pytest.mark.slow
def test_a_file_finds_the_classes_that_are_asked_for(run: Path) -> None:
    image, file = ROOT / "examples" / "images" / "coffee.png", run / "model.onnx"
    everything = Detector(file)(image)
    options: dict[str, Any]
    for options in ({"classes": ["blue", "red"]}, {"class_scores": {"blue": 0.6, 1: 0.3}}):
        actual = Detector(file, **options)(image)
        assert_same_objects(actual, Detector(run, **options)(image))
        assert 1 < len(actual) < len(everything) and not actual.limited
    apart = Detector(file, agnostic=True)(image)  # after boxes of one class have suppressed each other in the file
    assert 1 < len(apart) < len(everything)
    overlaps = box_iou(apart.boxes, apart.boxes).fill_diagonal_(0)
    assert overlaps.max() <= 0.7 < box_iou(everything.boxes, everything.boxes).fill_diagonal_(0).max()


@pytest.mark.slow
def test_a_file_without_scores_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = ROOT / "examples" / "images" / "coffee.png"
    assert main(["detect", str(run / "model.onnx"), str(image), "--score", "auto"]) == 1
    assert "does not hold the best minimum score of each class" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_reports_that_its_limit_was_reached(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, file = str(ROOT / "examples" / "images" / "coffee.png"), str(run / "model.onnx")
    with pytest.warns(UserWarning, match="file's limit of 300 objects was reached, so some may be missing"):
        assert Detector(file, score_threshold=0.0, image_size=128)(image).limited
    command = ["detect", file, image, "--score", "0", "--image-size", "128", "--classes", "blue"]
    assert main([*command, "--max-detections", "2"]) == 0
    err = capsys.readouterr().err
    assert "more than 2 objects (max_detections), or the exported file's limit of 300 objects was reached" in err
    cells = make_coco(tmp_path / "data", 2, 2)
    with pytest.raises(ValueError, match="was exported with a limit of 300 objects, fewer than 301"):
        evaluate(file, cells, workers=0, max_detections=301)
    (measured,) = evaluate(file, cells, workers=0, max_detections=50)
    assert measured.row["max_detections"] == 50


@pytest.mark.slow
def test_detect_takes_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[list[str]] = []
    rows: list[list[Any]] = []
    for model in (run, run / "model.onnx"):
        assert main(["detect", str(model), str(ROOT / "examples" / "images" / "rocket.jpg"), "--score", "0.5"]) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")])
        results = tmp_path / f"{len(rows)}.jsonl"
        command = ["detect", str(model), str(ROOT / "examples" / "images"), "--results", str(results), "--score", "0.5"]
        assert main([*command, "--workers", "1"]) == 0
        rows.append([json.loads(line) for line in results.read_text().splitlines()])
    assert len(printed[0]) == len(printed[1]) > 1
    assert [len(row["objects"]) for row in rows[0]] == [len(row["objects"]) for row in rows[1]]


@pytest.mark.slow
def test_an_evaluation_notes_that_a_file_holds_too_few_boxes(run: Path, cells: Path, tmp_path: Path) -> None:
    model = onnx.load(run / "model.onnx")
    values = {each.key: each for each in model.metadata_props}
    limit, values["evaluation_score"].value = values["evaluation_boxes"], "0.0"  # so that the file is full
    assert limit.value == "300"  # as many as it holds
    options: dict[str, Any] = {"workers": 0, "image_size": 128, "iou_threshold": 1.0}
    onnx.save(model, tmp_path / "model.onnx")
    (evaluation,) = evaluate(str(tmp_path / "model.onnx"), cells, **options)
    assert all(found.limited for found in evaluation.predictions.detections)
    assert not any("can hold" in note for note in evaluation.notes)
    limit.value = "1000000"  # as of SSD's authors
    onnx.save(model, tmp_path / "model.onnx")
    (evaluation,) = evaluate(str(tmp_path / "model.onnx"), cells, **options)
    assert any("3 images with as many boxes as the exported file can hold (300)" in note for note in evaluation.notes)
    (evaluation,) = evaluate(str(tmp_path / "model.onnx"), cells, **options, max_detections=50)
    assert not any("can hold" in note for note in evaluation.notes)
    limit.value = "5"
    onnx.save(model, tmp_path / "model.onnx")
    (evaluation,) = evaluate(str(tmp_path / "model.onnx"), cells, **options)
    assert evaluation.predictions.max_detections == 5  # the authors' limit is smaller than the file's


@pytest.mark.slow
def test_a_file_has_the_networks_ap(run: Path, cells: Path) -> None:
    figures = []
    for model in (run, run / "model.onnx"):
        (evaluation,) = evaluate(str(model), cells, workers=0)
        figures.append(evaluation.predictions.summary() | {"params": evaluation.row["param_count"]})
        assert "decoding and NMS" in evaluation.in_words()
    for name in ("ap", "ap50", "input_ap_small", "objects", "images", "params"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=1e-3), name
    assert figures[0]["loss"] > 0 and figures[1]["loss"] is None and "ms_boxes" not in figures[1]
    with pytest.raises(ValueError, match="bf16"):
        evaluate(str(run / "model.onnx"), cells, workers=0, bf16=True)


@pytest.mark.slow
def test_a_classifiers_file_predicts_and_is_evaluated_as_the_network(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folders(tmp_path / "data", val=2)
    printed = []
    for model in (classifier, classifier / "model.onnx"):
        assert main(["predict", str(model), str(data / "val")]) == 0
        assert main(["evaluate", str(model), "--data", str(data), "--workers", "0", "--flip"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "top-1" in printed[0]
    with pytest.raises(ImageSizeError, match="takes images of 32 pixels only, got 48"):
        evaluate(classifier / "model.onnx", data, workers=0, image_size=48)
    with pytest.raises(ModelError, match=r"`spd-zoo predict .*IMAGES`"):
        Detector(classifier / "model.onnx")


def test_a_file_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folders(tmp_path / "data", train=2, val=1)
    assert main(["finetune", "run/model.onnx", "--data", str(data), "--out", str(tmp_path / "run")]) == 1
    assert "is an exported file, which predict, detect and evaluate run" in capsys.readouterr().err


# int8


@pytest.mark.slow
def test_int8_is_measured_before_and_after(
    run: Path, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run), "--to", "onnx", "--int8", "--data", str(cells), "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "small.onnx")]) == 0
    before, after, path = capsys.readouterr().out.splitlines()
    assert before.startswith("float32, 64 px: AP ") and after.startswith("int8, 64 px: AP ")
    assert path == str(tmp_path / "small.onnx")
    model = onnx.load(path)
    kernels = [
        each for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) > 1
    ]
    assert len(kernels) == sum(node.op_type == "Conv" for node in model.graph.node) > 10
    (measured,) = evaluate(path, cells, workers=0)
    assert measured.in_words().split(" to read")[0].split("; per image")[0] in after
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx"]


def test_int8_needs_data_and_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--to", "onnx", "--int8"],
        ["--to", "pt2", "--int8", "--data", "x"],
        ["--to", "onnx", "--data", "x"],
    ):
        assert main(["export", "yolov8n", *options]) == 1
        assert capsys.readouterr().err.startswith("spd-zoo: error: --")


# Files of strangers


def small(**changes: str | None) -> Any:
    """A classifier of three means of an image as an ONNX model, with metadata changed; None removes an entry."""
    graph = onnx.parser.parse_graph(
        """g (float[batch, 3, 8, 8] images) => (float[batch, 3] logits)
        <int64[2] axes = {2, 3}> { logits = ReduceMean <keepdims = 0> (images, axes) }"""
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    metadata: dict[str, str | None] = {"made_by": "x", "class_names": '["a", "b", "c"]', "architecture": "x"}
    metadata |= {"parameters": "0", "channels": "3", "image_size": "8", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"}
    metadata |= {"interpolation": "bilinear", "crop_mode": "center", "crop_pct": "1.0"}
    for key, value in (metadata | changes).items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    return model


def refusal(content: Any, tmp_path: Path) -> str:
    file = tmp_path / "net.onnx"
    file.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(ModelError) as error:
        read_exported(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


def test_a_small_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(small().SerializeToString())
    net = read_exported(tmp_path / "net.onnx")
    torch.testing.assert_close(net(torch.ones(2, 3, 8, 8)), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"made_by": None}, "only files of `spd-zoo export` do"),
        ({"crop_pct": "1e-9"}, "metadata"),
        ({"crop_pct": "nan"}, "metadata"),
        ({"image_size": "100000x100000"}, "metadata"),
        ({"image_size": "16"}, "another size"),
        ({"image_size": None}, "incomplete or damaged"),
        ({"mean": "[0, 0]"}, "mean and std"),
        ({"mean": "[0, 0, 1e999]"}, "metadata"),
        ({"std": "[1, 1, 0]"}, "mean and std"),
        ({"class_names": "[" * 100000}, "metadata"),
        ({"class_names": '{"a": 1}'}, "metadata"),
        ({"channels": "1"}, "metadata"),
        ({"interpolation": "x"}, "metadata"),
        ({"parameters": "many"}, "metadata"),
    ],
)
def test_wrong_metadata_is_refused_in_a_sentence(changes: dict[str, str | None], words: str, tmp_path: Path) -> None:
    assert words in refusal(small(**changes), tmp_path)


def test_a_file_that_is_no_onnx_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert "is empty" in refusal(b"", tmp_path)
    assert "no ONNX file, or damaged" in refusal(b"PK\3\4" + bytes(200), tmp_path)
    assert "a web page" in refusal(b"<html>", tmp_path)
    whole = small().SerializeToString()
    for end in range(1, len(whole), 7):
        refusal(whole[:end], tmp_path)
    with pytest.raises(ModelError, match="No such file"):
        read_exported(tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ModelError, match="is no file"):
        read_exported(tmp_path / "folder.onnx")


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    model = small()
    tensor = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(secret))
    assert "weights in other files" in refusal(model, tmp_path)
    constant = small()
    constant.graph.node.add(op_type="Constant", output=["w"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR, t=tensor
    )
    assert "weights in other files" in refusal(constant, tmp_path)


def test_what_no_exported_network_contains_is_refused(tmp_path: Path) -> None:
    loop = small()
    node = loop.graph.node.add(op_type="Loop", output=["x"])
    node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(small().graph)
    assert "a loop or a branch" in refusal(loop, tmp_path)
    function = small()
    function.functions.add(name="f", domain="mine")
    assert "functions of its own" in refusal(function, tmp_path)
    foreign = small()
    foreign.graph.node.add(op_type="ReadFile", domain="their.lib", output=["x"])
    assert "another library" in refusal(foreign, tmp_path)
    sparse = small()
    sparse.graph.sparse_initializer.add(dims=[10**6, 10**6])
    assert "sparse" in refusal(sparse, tmp_path)
    unknown = small()
    unknown.graph.node.add(op_type="NoSuchOperator", output=["x"])
    assert "cannot load" in refusal(unknown, tmp_path)


def test_unexpected_outputs_are_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(small(class_names='["a", "b"]').SerializeToString())
    with pytest.raises(ModelError, match=r"computes \[1, 3\] logits for 2 classes"):
        read_exported(file)(torch.zeros(1, 3, 8, 8))


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    image = str(ROOT / "examples" / "images" / "coffee.png")
    for command in (["predict", "x.onnx", image], ["detect", "x.onnx", image], ["evaluate", "x.onnx", "--data", "x"]):
        assert main(command) == 1
        assert capsys.readouterr().err == (
            "spd-zoo: error: this needs the package onnxruntime: pip install 'spd-zoo[export]'\n"
        )


# The script that needs no torch


@pytest.mark.slow
def test_the_script_without_torch_draws_the_detectors_boxes(run: Path, tmp_path: Path) -> None:
    image = ROOT / "examples" / "images" / "coffee.png"
    script = (ROOT / "examples" / "onnx" / "detect.py").read_text()
    blocked = "import sys\nsys.modules['torch'] = sys.modules['spd_zoo'] = None\n"
    command = [sys.executable, "-c", blocked + script, str(run / "model.onnx"), str(image), str(tmp_path / "out.png")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = Detector(run / "model.onnx")(image)
    assert len(printed) == len(found) > 0
    drawn = [(line.split()[0], torch.tensor([float(number) for number in line.split()[2:]])) for line in printed]
    for name, box in zip(found.names, found.boxes, strict=True):
        assert any(name == other and (box - place).abs().max() <= 0.51 for other, place in drawn)
    with Image.open(tmp_path / "out.png") as marked, Image.open(image) as original:
        assert marked.size == original.size and marked.tobytes() != original.convert("RGB").tobytes()
