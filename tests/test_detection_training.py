"""Training and evaluation of detectors: results of a run, exact resume, metrics checked by hand."""

import csv
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from box_pictures import NAMES, make_coco, make_yolo
from PIL import Image
from runs import finetune_in_processes, rows_of, same_run, stop_in
from safetensors.torch import load_file

from spd_zoo.cli.main import main
from spd_zoo.data.boxes import BoxImages, Objects, open_boxes
from spd_zoo.data.labelled import DataError
from spd_zoo.inference.detector import Detections
from spd_zoo.training import call
from spd_zoo.training.config import FinetuneConfig, make_config
from spd_zoo.training.detection import report as box_report
from spd_zoo.training.detection.anchors import anchor_fit, fit_anchors, kmeans
from spd_zoo.training.detection.curves import FALSE_POSITIVE, IN_IGNORED, match, outcome
from spd_zoo.training.detection.metrics import AREAS, BoxPredictions, coco_precision
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import Result, Stopped, finetune
from spd_zoo.weights import save_network
from spd_zoo.weights.load import ModelError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "data", train=12, val=4)


def config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 4,
        "image_size": "64",
        "warmup_epochs": 0,
        "lr": 1e-3,
        "workers": 0,
    }
    options |= {"bf16": False, "device": "cpu"}
    options |= {"model": "yolov8n_spd", "pretrained": False, "data": data, "out": out}
    return FinetuneConfig(**options | changes)


def run(data: Path, out: Path, **changes: Any) -> Result:
    result = finetune(config(data, out, **changes))
    assert result is not None
    return result


def test_without_the_package_that_computes_ap_no_time_is_spent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    for measured in (lambda: run(folder, tmp_path / "run", dry_run=True), lambda: evaluate("yolov8n_spd.bccd", folder)):
        with pytest.raises(ModuleNotFoundError, match="faster_coco_eval"):
            measured()


@pytest.mark.slow
def test_a_run_leaves_a_detector_that_timm_loads_with_the_class_names(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "run")
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert net.pretrained_cfg["label_names"] == NAMES and net.num_classes == 3
    assert tuple(net.pretrained_cfg["input_size"]) == (3, 64, 64)
    decoded = net.decode(net(torch.zeros(1, 3, 64, 64)), image_size=(64, 64))
    assert decoded.shape == (1, 64 + 16 + 4, 4 + 3)
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    assert (
        len(rows) == 2 and {"train_box", "train_class", "train_dfl", "val_loss", "val_ap", "val_ap50"} <= rows[0].keys()
    )
    for row in rows:
        terms = sum(float(row[f"train_{name}"]) for name in ("box", "class", "dfl"))
        assert float(row["train_loss"]) == pytest.approx(terms, rel=1e-5)
    assert result.metrics["ap"] == result.history[-1]["val_ap"] and result.metrics["objects"] > 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["class_names"] == NAMES
    page = (tmp_path / "run" / "report.html").read_text()
    assert "AP of small objects, at the network&#x27;s input" in page and page.count("data:image/png;base64,") >= 7
    assert [row["class"] for row in rows_of(tmp_path / "run" / "per_class.csv")] == NAMES


@pytest.mark.slow
def test_a_run_begins_with_a_picture_of_its_data(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spd_zoo.training.finetune.train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "run")
    with Image.open(tmp_path / "run" / "data.png") as picture:
        assert picture.width > 900 and len(picture.convert("RGB").getcolors(2**24) or ()) > 1000
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The run is not finished" in page and "COCO: train 12 images in images, val 4 images in images" in page
    assert "boxes at 64 px, by the root of their area" in page and page.count("<img") == 1


def test_options_that_are_not_set_get_the_defaults_of_detectors(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", epochs=1, batch_size=None, lr=None, bf16=None)
    stored = make_config({}, tmp_path / "run" / "run.yaml")
    assert (stored.opt, stored.batch_size, stored.ema, stored.weight_decay) == ("adamw", 8, 0.999, 5e-4)
    assert stored.lr == pytest.approx(2e-3 * 0.5**0.5)
    assert (stored.mosaic, stored.mosaic_off, stored.zoom, stored.shift) == (1.0, 0, 0.5, 0.1)
    assert (stored.pretrained, stored.head_epochs, stored.layer_decay) == (False, 0, 1.0)


EVERYTHING = {"epochs": 3, "mosaic_off": 1, "accumulate": 2, "clip_grad": 10.0, "patience": 3, "image_size": "64,32@1"}


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    run(folder, tmp_path / "whole", **EVERYTHING)
    for epoch, step in ((0, 1), (2, 0)):
        stop_in(monkeypatch, epoch, step)
        with pytest.raises(Stopped, match=f"stopped in epoch {epoch + 1} after step {step + 1} of 3") as stopped:
            run(folder, tmp_path / "stopped", **EVERYTHING)
        assert stopped.value.number == signal.SIGTERM
        torch.manual_seed(epoch)
    run(folder, tmp_path / "stopped", **EVERYTHING, workers=2)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["yolov5n_spd", "ssd_mobilenetv1_s1l0_dualpath"])
def test_other_detectors_train_and_resume_too(
    model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    run(folder, tmp_path / "whole", model=model, epochs=1)
    stop_in(monkeypatch, 0, 1)
    with pytest.raises(Stopped):
        run(folder, tmp_path / "stopped", model=model, epochs=1)
    run(folder, tmp_path / "stopped", model=model, epochs=1)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    (row,) = rows_of(tmp_path / "whole" / "metrics.csv")
    assert {"train_box", "train_objectness"} <= row.keys() or {"train_location", "train_class"} <= row.keys()


@pytest.mark.slow
def test_a_run_may_start_from_another_one_with_other_classes(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    first, _ = finished
    other = make_yolo(tmp_path / "other", train=4, val=2)
    for text in (other / "labels").rglob("*.txt"):
        text.write_text("\n".join("0" + line[1:] for line in text.read_text().splitlines()))
    (other / "data.yaml").write_text("names: [square]")
    options = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0, "ema": 0.0, "batch_size": 2, "pretrained": None}
    run(other, tmp_path / "second", model=f"local-dir:{first}", **options)
    assert make_config({}, tmp_path / "second" / "run.yaml").pretrained
    old, new = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "second"))
    kept = [key for key in old if "cv3" not in key and key.endswith("weight")]
    assert all(torch.allclose(old[key], new[key]) for key in kept) and len(kept) > 50
    assert len(new["head.cv3.0.2.bias"]) == 1


def test_a_run_among_the_images_is_refused(tmp_path: Path) -> None:
    data = make_yolo(tmp_path / "data", train=4, val=2)
    for place in ("train", "val"):
        with pytest.raises(ValueError, match=r"run lies among the images of .*; give another --out"):
            run(data, data / "images" / place / "run")


@pytest.mark.slow
def test_outputs_without_names_are_taken_in_the_order_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    data = make_yolo(tmp_path / "data", train=4, val=2)
    (data / "data.yaml").write_text("names: [square, circle, arrow]")
    save_network(timm.create_model("yolov8n_spd", num_classes=3), tmp_path / "start")
    options = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0, "ema": 0.0, "batch_size": 2, "pretrained": True}
    run(data, tmp_path / "run", model=f"local-dir:{tmp_path / 'start'}", **options)
    printed = capsys.readouterr().out
    assert "those of the data are taken in their order there: square = 0, circle = 1, arrow = 2\n" in printed
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run"))
    assert torch.allclose(old["head.cv3.0.2.weight"], new["head.cv3.0.2.weight"])


@pytest.mark.slow
def test_a_finished_run_can_be_continued_and_exported(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    first, data = finished
    options: dict[str, Any] = {"out": tmp_path / "more", "lr": 1e-12, "weight_decay": 0.0, "keep": "last", "workers": 0}
    result = call.finetune(first, epochs="+1", data=data, device="cpu", **options)
    assert result is not None and result.before["val_ap"] == pytest.approx(rows_best(first), abs=0.5)
    printed = capsys.readouterr().out
    assert f"spd-zoo export {tmp_path / 'more'} --to onnx" in printed
    assert "note: the network detects next to nothing: val AP 0." in printed  # after a few steps from random weights
    old, new = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "more"))
    assert all(torch.allclose(old[key], new[key]) for key in old if key.endswith(".weight"))


def rows_best(run: Path) -> float:
    return max(float(row["val_ap"]) for row in rows_of(run / "metrics.csv"))


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    shared = {"epochs": 2, "opt": "momentum", "lr": 0.01, "workers": 1}
    one, two = config(folder, tmp_path / "one", **shared, accumulate=2), config(folder, tmp_path / "two", **shared)
    finetune_in_processes(two)
    finetune(one)
    alone, together = (rows_of(run / "metrics.csv") for run in (one.out, two.out))
    for a, b in zip(alone, together, strict=True):
        for name in ("train_loss", "train_box", "train_class", "train_dfl"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-3)
    assert sum(int(row["objects"]) for row in rows_of(two.out / "per_class.csv")) == sum(
        int(row["objects"]) for row in rows_of(one.out / "per_class.csv")
    )


@pytest.mark.exhaustive
def test_a_detector_learns_to_find_squares(tmp_path: Path) -> None:
    data = make_yolo(tmp_path / "data", train=64, val=16)
    options = {"epochs": 30, "batch_size": 8, "image_size": "96", "warmup_epochs": None, "lr": None}
    result = run(data, tmp_path / "run", **options)
    assert result.metrics["ap50"] > 50
    (row,) = (evaluation.row for evaluation in evaluate(str(tmp_path / "run"), data, device="cpu", workers=0))
    assert row["ap50"] == pytest.approx(result.metrics["ap50"], abs=0.5)  # in batches of another size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.2}, "mixup is an option for classifiers"),
        ({"crop_scale": 0.2}, "crop_scale is an option for classifiers"),
        ({"model": "cifar_resnet20", "mosaic": 1.0}, "mosaic is an option for detectors"),
        ({"model": "ssd_mobilenetv1", "mosaic": 1.0}, "mosaic is an option for YOLO"),
        ({"opt": "lamb", "lr": None}, "the default learning rate of detectors is for adamw"),
        ({"image_size": "60"}, "height and width must be multiples of 32, got 60x60"),
        ({"val_name": "test"}, "has no split test"),
        ({"val_size": 2}, "leave --val-split and --val-size out"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_without_meaning_are_refused(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hsv", ["0.1", "a,b,c", "0.7,0,0", "-0.1,0.7,0.4", "0.1,nan,0.4", "0.1,0.7,inf"])
def test_colour_changes_are_three_numbers(hsv: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hsv must be three numbers|is not like"):
        config(tmp_path, tmp_path, hsv=hsv)


# average precision


def truth(*images: list[tuple[int, float, float, float, float]], crowd: bool = False) -> BoxImages:
    """Images with objects given as label, x1, y1, x2, y2."""
    objects = []
    for boxes in images:
        table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
        areas = (table[:, 3:] - table[:, 1:3]).prod(1)
        objects.append(Objects(table[:, 1:], table[:, 0].long(), areas, torch.full((len(table),), crowd)))
    names = [f"{i}.png" for i in range(len(images))]
    return BoxImages(names, [(640, 480)] * len(images), objects, ["a", "b"], range(len(images)))


def found(*boxes: tuple[int, float, float, float, float, float]) -> Detections:
    """Boxes given as label, score, x1, y1, x2, y2."""
    table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long(), ("a", "b"))


def predictions_of(data: BoxImages, *detections: Detections, scale: float = 1.0) -> BoxPredictions:
    return BoxPredictions(data, list(detections), [(scale, scale)] * len(data), {}, {})


def test_average_precision_agrees_with_a_calculation_by_hand() -> None:
    data = truth([(0, 0, 0, 40, 40), (0, 100, 0, 140, 40)])
    boxes = found((0, 0.9, 0, 0, 40, 40), (0, 0.8, 300, 0, 340, 40), (0, 0.7, 100, 0, 140, 40))
    # recall up to 0.5 (51 of 101 points) at precision 1, the rest at 2/3, for every overlap
    expected = 100 * (51 + 50 * 2 / 3) / 101
    figures = predictions_of(data, boxes).summary()
    assert [figures[name] for name in ("ap", "ap50", "ap75")] == pytest.approx([expected] * 3, abs=1e-9)
    assert figures["ap_medium"] == pytest.approx(expected) and figures["ap_small"] is figures["ap_large"] is None
    a, b = predictions_of(data, boxes).per_class()
    assert a["ap"] == pytest.approx(expected) and a["objects"] == 2 and b["ap"] is None and b["objects"] == 0


def test_a_box_must_overlap_as_much_as_the_threshold_says() -> None:
    figures = predictions_of(truth([(0, 0, 0, 100, 100)]), found((0, 0.9, 0, 0, 100, 72))).summary()
    assert figures["ap50"] == pytest.approx(100) and figures["ap75"] == 0
    assert figures["ap"] == pytest.approx(50)  # right at 0.5, 0.55, 0.6, 0.65 and 0.7


def test_object_sizes_can_be_those_at_the_network_input() -> None:
    data = truth([(0, 0, 0, 40, 40), (0, 100, 0, 260, 160)])
    boxes = found((0, 0.9, 0, 0, 40, 40))
    figures = predictions_of(data, boxes, scale=0.5).summary()
    assert figures["ap_small"] is None and figures["ap_medium"] == pytest.approx(100) and figures["ap_large"] == 0
    assert figures["input_ap_small"] == pytest.approx(100) and figures["input_ap_medium"] == 0
    assert figures["input_ap_large"] is None


def test_a_crowd_is_not_an_object_and_boxes_in_it_are_not_errors() -> None:
    data = truth([(0, 0, 0, 40, 40)], [(0, 0, 0, 400, 400)])
    data.objects[1].ignored[:] = True
    figures = predictions_of(data, found((0, 0.5, 0, 0, 40, 40)), found((0, 0.9, 50, 50, 90, 90))).summary()
    assert figures["ap"] == pytest.approx(100) and figures["objects"] == 1


def test_a_region_of_no_class_is_ignored_for_every_class() -> None:
    data = truth([(0, 0, 0, 40, 40), (1, 0, 100, 40, 140), (0, 300, 0, 500, 200)])
    data.objects[0].ignored[2] = True
    right = [(0, 0.5, 0, 0, 40, 40), (1, 0.5, 0, 100, 40, 140)]
    inside = [(0, 0.9, 310, 10, 350, 50), (1, 0.9, 410, 10, 450, 50)]
    figures = predictions_of(data, found(*right, *inside)).summary()
    assert figures["ap"] == pytest.approx(75)  # class b has a false positive
    data.objects[0].labels[2] = -1
    figures = predictions_of(data, found(*right, *inside)).summary()
    assert figures["ap"] == pytest.approx(100) and figures["objects"] == 2
    assert match(found(*right, *inside), data.objects[0]).tolist() == [0, 1, IN_IGNORED, IN_IGNORED]


def test_a_box_on_an_object_inside_a_crowd_is_that_object() -> None:
    data = truth([(0, 50, 50, 90, 90), (0, 0, 0, 400, 400)])
    data.objects[0].ignored[1] = True
    assert match(found((0, 0.9, 50, 50, 90, 92)), data.objects[0]).tolist() == [0]
    inside = found((0, 0.9, 200, 50, 240, 90))
    result = outcome(inside, data.objects[0], match(inside, data.objects[0]), [0.25, 0.25])
    assert result.matches.tolist() == [IN_IGNORED] and result.detected.tolist() == [False, True]


def test_average_precision_agrees_with_cocos_own_code() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = np.random.default_rng(0)
    images, detections = [], []
    for _ in range(20):
        corners = generator.uniform(0, 300, (6, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(8, 200, (6, 2))], 1)
        labels = generator.integers(0, 2, 6)
        images.append([(int(label), *box.tolist()) for label, box in zip(labels, boxes, strict=True)])
        near = np.concatenate([boxes + generator.normal(0, 6, boxes.shape), boxes[::-1] + 40])
        scores = generator.uniform(0, 1, 12)
        rows = zip([*labels, *labels], scores, near, strict=True)
        detections.append(found(*((int(label), float(score), *box.tolist()) for label, score, box in rows)))
    data = truth(*images)
    data.objects[3].ignored[:2] = True
    ours = coco_precision(data, detections)

    content: dict[str, Any] = {"images": [{"id": i} for i in range(20)], "annotations": []}
    content |= {"categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}
    results = []
    for i, detection in enumerate(detections):
        for box, label, area, crowd in zip(*(part.tolist() for part in data.objects_in(i)), strict=True):
            annotation = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": label, "area": area}
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            content["annotations"].append(annotation | {"bbox": sides, "iscrowd": int(crowd)})
        for box, score, label in zip(
            detection.boxes.tolist(), detection.scores.tolist(), detection.labels.tolist(), strict=True
        ):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": i, "category_id": label, "bbox": sides, "score": score})
    truth_of_coco = COCO()
    truth_of_coco.dataset = content
    truth_of_coco.createIndex()
    evaluation = COCOeval(truth_of_coco, truth_of_coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    np.testing.assert_allclose(ours, evaluation.eval["precision"][..., -1], atol=1e-6)
    assert ours.shape == (10, 101, 2, len(AREAS)) and 0.1 < ours[..., 0].mean() < 0.9


def test_boxes_are_right_wrong_or_missed() -> None:
    shown = truth([(0, 0, 0, 40, 40), (1, 100, 0, 140, 40), (0, 200, 0, 240, 40)]).objects_in(0)
    boxes = found((0, 0.9, 0, 0, 40, 38), (0, 0.8, 0, 0, 40, 40), (0, 0.7, 100, 0, 140, 40), (0, 0.1, 200, 0, 240, 40))
    matches = match(boxes, shown)
    assert matches.tolist() == [0, FALSE_POSITIVE, FALSE_POSITIVE, 2]
    result = outcome(boxes, shown, matches, [0.25, 0.25])
    assert result.boxes.tolist() == [0, 1, 2] and result.wrong.tolist() == [False, True, True]
    assert result.detected.tolist() == [True, False, False] and result.f1() == pytest.approx(2 / 6)
    assert outcome(boxes, shown, matches, [0.75, 0.05]).boxes.tolist() == [0, 1]  # a minimum for each class


def test_a_box_in_what_is_ignored_is_neither_correct_nor_wrong() -> None:
    shown = truth([(0, 0, 0, 40, 40), (0, 100, 0, 140, 40)]).objects_in(0)
    shown.ignored[1] = True
    boxes = found((0, 0.9, 100, 0, 120, 20), (0, 0.8, 120, 20, 140, 40))
    result = outcome(boxes, shown, match(boxes, shown), [0.25])
    assert result.correct.tolist() == result.wrong.tolist() == [False, False] and result.f1() == 0
    predictions = predictions_of(truth([(0, 0, 0, 40, 40), (0, 100, 0, 140, 40)]), boxes)
    predictions.data.objects[0].ignored[1] = True
    assert box_report._errors(predictions, [0]) == (
        "With the best minimum scores: 0 correct boxes, 0 wrong boxes, 1 missed object."
    )


# evaluation


def finished_run(root: Path) -> tuple[Path, Path]:
    """A finished run, and its data."""
    data = make_coco(root / "data", train=12, val=4)
    run(data, root / "run", epochs=1)
    return root / "run", data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return finished_run(tmp_path_factory.mktemp("finished"))


def test_evaluate_prints_and_writes_the_figures_of_the_run(
    finished: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    folder, data = finished
    options = ["--image-size", "64", "32", "--out", str(tmp_path / "out"), "--device", "cpu", "--workers", "0"]
    assert main(["evaluate", str(folder), "--data", str(data), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0].startswith("64 px: AP ") and "at the network's input: small" in printed[0]
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert [row["img_size"] for row in rows] == ["64", "32"]
    history = rows_of(folder / "metrics.csv")
    assert float(rows[0]["ap"]) == pytest.approx(float(history[-1]["val_ap"]), abs=0.1)  # batches of another size
    assert all(float(rows[0][f"ms_{stage}"]) > 0 for stage in ("prepare", "network", "boxes"))
    with (tmp_path / "out" / "per_class_64.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == NAMES


def test_evaluate_reports_invalid_boxes(finished: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    folder, _ = finished
    data = make_yolo(tmp_path / "data", 1, 2)
    text = data / "labels" / "val" / "val_0.txt"
    text.write_text(text.read_text() + "\n0 1.5 .5 .1 .1")
    options = ["--split", "val", "--device", "cpu", "--workers", "0"]
    assert main(["evaluate", str(folder), "--data", str(data), *options]) == 0
    assert "1 boxes lie outside their image and are left out: " in capsys.readouterr().err


def test_evaluate_prints_json(finished: tuple[Path, Path], capsys: Capture) -> None:
    folder, data = finished
    options = ["--split", "train", "--device", "cpu", "--workers", "0", "--json"]
    assert main(["evaluate", str(folder), "--data", str(data), *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["images"] == 12 and 0 <= row["ap50"] <= 100 and row["img_size"] == 64


def test_evaluate_refuses_a_place_for_its_results_before_it_computes(
    finished: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    folder, _ = finished
    data = make_yolo(tmp_path / "data", 1, 2)
    (tmp_path / "file").touch()
    command = ["evaluate", str(folder), "--data", str(data), "--split", "val", "--device", "cpu", "--workers", "0"]
    among = data / "images" / "val" / "results"
    for out, message in ((among, f"lies among the images of {data}"), (tmp_path / "file", "is no folder")):
        assert main([*command, "--out", str(out)]) == 1
        assert capsys.readouterr() == ("", f"spd-zoo: error: {out} {message}; give another --out\n")


def test_evaluate_refuses_invalid_options_data_and_networks(finished: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = finished
    with pytest.raises(ValueError, match="flip, image_column and label_column are options for classifiers"):
        evaluate(str(folder), data, flip=True, device="cpu")
    with pytest.raises(DataError, match="has no split test"):
        evaluate(str(folder), data, split="test", device="cpu")
    other = make_yolo(tmp_path / "other")
    (other / "data.yaml").write_text("names: [blue, green, violet]")
    with pytest.raises(DataError, match=r"no class 'violet'\. The data has 3 classes"):
        evaluate(str(folder), other, device="cpu")
    with pytest.raises(ModelError, match="is a folder without"):
        evaluate(str(data), data, device="cpu")


# anchors


def tall(count: int) -> BoxImages:
    """Images of 640x480 with boxes far taller than YOLOv5's anchors at 64 pixels can predict."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(count, 2, generator=generator) * torch.tensor([4.0, 150.0]) + torch.tensor([20.0, 200.0])
    return truth(*([(0, 5.0, 5.0, 5 + width, 5 + height)] for width, height in sizes.tolist()))


def test_anchors_are_fitted_where_they_fit_badly() -> None:
    nets: list[Any] = [timm.create_model("yolov5n_spd", num_classes=2) for _ in range(2)]
    net, again = nets
    before = net.head.anchors.clone()
    data = tall(60)
    assert "9 new ones fit 100.0 % of the boxes" in fit_anchors(net, data, 64, seed=0)
    assert not torch.equal(net.head.anchors, before)
    sizes = torch.stack(
        [(data.objects_in(i).boxes[0, 2:] - data.objects_in(i).boxes[0, :2]) / 10 for i in range(60)]
    ).numpy()
    pixels = (net.head.anchors * torch.tensor([8.0, 16.0, 32.0])[:, None, None]).flatten(0, 1)
    assert anchor_fit(sizes, pixels.numpy()).min() > 0.5
    assert pixels.prod(1).tolist() == sorted(pixels.prod(1).tolist())
    fit_anchors(again, data, 64, seed=0)
    assert torch.equal(again.head.anchors, net.head.anchors)


def test_anchors_that_fit_stay() -> None:
    net: Any = timm.create_model("yolov5n_spd", num_classes=2)
    before = net.head.anchors.clone()
    data = truth(*([(0, 0.0, 0.0, float(10 + i), float(12 + i))] for i in range(50)))
    for seed in (0, -1):
        assert "they fit 100.0 % of the boxes and stay" in fit_anchors(net, data, 640, seed)
    assert torch.equal(net.head.anchors, before)


@pytest.mark.slow
def test_new_anchors_belong_to_the_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    content = json.loads((folder / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = [1, 1, 3, 60]
    (folder / "instances_train.json").write_text(json.dumps(content))
    fresh = timm.create_model("yolov5n_spd").get_buffer("head.anchors")
    for auto, name in ((True, "fitted"), (False, "as they were")):
        run(folder, tmp_path / name, model="yolov5n_spd", epochs=1, auto_anchors=auto)
        net: Any = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        assert torch.equal(net.head.anchors, fresh) != auto


def test_k_means_finds_the_centres_of_clusters() -> None:
    generator = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = np.concatenate([centre + generator.normal(0, 0.1, (50, 2)) for centre in centres])
    found = kmeans(points, 3, generator)
    assert np.abs(found[found.sum(1).argsort()][0]).max() < 0.1
    assert sorted(found.sum(1).round().tolist()) == [0, 10, 10]


@pytest.mark.slow
def test_a_detector_takes_images_without_any_object(tmp_path: Path) -> None:
    data = make_yolo(tmp_path / "data", train=8, val=2)
    for i in range(5):
        (data / "labels" / "train" / f"train_{i}.txt").unlink()
    (data / "labels" / "train" / "train_7.txt").write_text("0 .5 .5 .3 .3\n1 .5 .5 .3 .3\n2 .5 .5 .3 .3")
    assert open_boxes(data, "train") is not None
    result = run(data, tmp_path / "run", epochs=1, batch_size=2, mosaic=0.0)
    assert result.history[0]["train_loss"] > 0
