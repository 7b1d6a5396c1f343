"""Precision, recall and F1 over the score, best minimum scores, confusions, and what evaluation writes about them."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from box_pictures import NAMES
from PIL import Image
from runs import rows_of
from test_detection_training import finished_run, found, predictions_of, truth
from timm.models import save_for_hf

from spd_zoo import Detector
from spd_zoo.cli.main import main
from spd_zoo.exporter import export
from spd_zoo.inference.detector import Detections
from spd_zoo.inference.scores import read_scores, scores_text
from spd_zoo.training.detection.curves import Curve, rates
from spd_zoo.training.detection.metrics import BoxPredictions
from spd_zoo.training.detection.plots import plot_confusion, plot_curves
from spd_zoo.training.detection.sheets import false_positives, missed_objects
from spd_zoo.training.evaluate import evaluate
from spd_zoo.weights.load import ModelError

Capture = pytest.CaptureFixture[str]


def many(seed: int = 0, images: int = 20) -> BoxPredictions:
    """Objects of two classes, some ignored, and boxes near them and elsewhere."""
    generator = np.random.default_rng(seed)
    objects, detections = [], []
    for _ in range(images):
        corners = generator.uniform(0, 300, (6, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(8, 200, (6, 2))], 1)
        labels = generator.integers(0, 2, 6)
        objects.append([(int(label), *box.tolist()) for label, box in zip(labels, boxes, strict=True)])
        near = np.concatenate([boxes + generator.normal(0, 6, boxes.shape), boxes[::-1] + 40])
        scores = np.sort(generator.uniform(0, 1, 12).round(2))[::-1]  # some are equal
        seen = np.where(generator.random(6) < 0.3, 1 - labels, labels)
        rows = zip([*seen, *generator.permutation(labels)], scores, near, strict=True)
        detections.append(found(*((int(label), float(score), *box.tolist()) for label, score, box in rows)))
    data = truth(*objects)
    data.objects[3].ignored[:2] = True
    data.objects[4].labels[1], data.objects[4].ignored[1] = -1, True
    return predictions_of(data, *detections)


def last_f1(curve: Curve) -> float:
    """F1 with all boxes."""
    return float(rates(curve.correct, curve.wrong, curve.objects)["f1"][-1])


def test_precision_recall_and_f1_agree_with_a_calculation_by_hand() -> None:
    data = truth([(0, 0, 0, 40, 40), (0, 100, 0, 140, 40), (0, 200, 0, 240, 40), (1, 300, 0, 340, 40)])
    boxes = found(
        (0, 0.9, 0, 0, 40, 40), (0, 0.6, 300, 0, 340, 40), (0, 0.4, 100, 0, 140, 40), (0, 0.2, 0, 200, 40, 240)
    )
    predictions = predictions_of(data, boxes)
    a, b = predictions.curves
    assert a.scores.tolist() == pytest.approx([0.9, 0.6, 0.4, 0.2])
    found_rates = rates(*a.at(np.array([0.7, 0.5, 0.3, 0.1, 0.95])), a.objects)
    assert found_rates["precision"].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4, math.nan], nan_ok=True)
    assert found_rates["recall"].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 0])
    assert found_rates["f1"].tolist() == pytest.approx([2 / 4, 2 / 5, 4 / 6, 4 / 7, 0])
    assert a.threshold() == pytest.approx(0.3) and b.threshold() is None and not len(b.scores)
    first, second = predictions.per_class()
    figures = {name: first[name] for name in ("score", "precision", "recall", "f1", "correct", "wrong", "missed")}
    expected = {"score": 0.3, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "correct": 2, "wrong": 1}
    assert figures == pytest.approx(expected | {"missed": 1})
    assert second["score"] is second["precision"] is None and second["recall"] == 0 and second["missed"] == 1
    summary = predictions.summary()
    assert summary["recall"] == pytest.approx(100 / 3) and summary["precision"] == pytest.approx(200 / 3)
    # the wrong box of 0.6 lies on the object of class b
    assert predictions.confusion.tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_the_best_minimum_score_has_the_highest_f1_of_all() -> None:
    predictions = many(images=6)
    for label, threshold in enumerate(predictions.thresholds):
        best = 0.0
        for score in np.arange(0.005, 1, 0.01):  # between scores of two digits
            above = predictions_of(
                predictions.data,
                *(each[(each.scores > score) & (each.labels == label)] for each in predictions.detections),
            ).curves[label]
            if len(above.scores):
                best = max(best, last_f1(above))
        mine = [each[(each.scores > threshold) & (each.labels == label)] for each in predictions.detections]
        assert last_f1(predictions_of(predictions.data, *mine).curves[label]) == pytest.approx(best)
        assert predictions.per_class()[label]["f1"] == pytest.approx(100 * best)


def test_curves_have_the_average_precision_of_coco() -> None:
    predictions = many()
    for i, curve in enumerate(predictions.curves):
        found_rates = rates(curve.correct, curve.wrong, curve.objects)
        envelope = np.maximum.accumulate(found_rates["precision"][::-1])[::-1]
        at = np.searchsorted(found_rates["recall"], np.linspace(0, 1, 101), side="left")
        interpolated = np.append(envelope, 0)[np.minimum(at, len(envelope))].mean()
        assert 100 * interpolated == pytest.approx(predictions.per_class()[i]["ap50"], abs=1)  # equal scores: one point
        assert 0.2 < interpolated < 0.95


def test_the_confusion_matrix_counts_every_object_and_every_box_once() -> None:
    predictions = many(1)
    confusion = predictions.confusion
    assert confusion[:2].sum(1).tolist() == predictions.data.counts()
    rows = predictions.per_class()
    assert confusion.diagonal()[:2].tolist() == [row["correct"] for row in rows]
    assert confusion[:, :2].sum(0).tolist() == [row["correct"] + row["wrong"] for row in rows]
    assert confusion[2, 2] == 0 and confusion[0, 1] + confusion[1, 0] > 0


def test_recall_by_size_is_in_the_pixels_of_the_input() -> None:
    data = truth([(0, 0, 0, 12, 12), (0, 100, 0, 140, 40), (0, 200, 0, 210, 10)])
    boxes = found((0, 0.9, 0, 0, 12, 12), (0, 0.8, 200, 0, 210, 10))
    by_size = {row["size"]: row for row in predictions_of(data, boxes, scale=0.5).by_size()}
    assert by_size["tiny (< 8 px)"] == {"size": "tiny (< 8 px)", "objects": 2, "detected": 2, "recall": 100.0}
    assert by_size["< 32"]["objects"] == 1 and by_size["< 32"]["recall"] == 0
    assert by_size["larger"]["recall"] is None
    assert sum(row["objects"] for row in by_size.values()) == 3


def test_thresholds_lie_between_scores_and_are_short() -> None:
    def threshold(*scores: float) -> float | None:
        counts = np.arange(1, len(scores) + 1)
        return Curve(
            len(scores), np.array([*scores, 0.001]), np.append(counts, len(scores)), np.array([0] * len(scores) + [9])
        ).threshold()

    assert threshold(0.9, 0.8) == pytest.approx(0.4005)
    assert threshold(0.9, 0.0010004) == pytest.approx(0.0010002, abs=1e-9)


# pictures


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.fixture
def pictured(tmp_path: Path) -> BoxPredictions:
    """An image with a false positive, a missed object and a correct box."""
    Image.new("RGB", (640, 480), (60, 60, 60)).save(tmp_path / "0.png")
    data = truth([(0, 20, 20, 60, 60), (0, 400, 300, 410, 310)])
    data.files[0] = str(tmp_path / "0.png")
    return predictions_of(
        data, found((0, 0.9, 20, 20, 60, 60), (1, 0.8, 200, 200, 230, 230), (0, 0.05, 400, 300, 410, 310))
    )


def test_contact_sheets_show_false_positives_and_misses_in_their_colours(pictured: BoxPredictions) -> None:
    pictured.__dict__["thresholds"] = [0.5, 0.5]  # so that something is missed
    images = (pictured.data, pictured.detections, pictured.outcomes)
    wrong = pixels(false_positives(*images))
    missed = pixels(missed_objects(*images, pictured._matches, pictured.thresholds))
    assert (wrong == (255, 0, 0)).all(2).sum() > 100 and not (wrong == (255, 255, 0)).all(2).any()
    assert (missed == (255, 255, 0)).all(2).sum() > 100 and not (missed == (255, 0, 0)).all(2).any()
    rows, columns = np.nonzero((missed == (255, 255, 0)).all(2))
    assert 40 <= np.ptp(rows[columns < 240]) <= 90  # 10 of 48 pixels, enlarged to 240
    assert max(wrong.shape[1], missed.shape[1]) <= 500  # legible on a phone
    perfect = predictions_of(truth([]), found())
    assert false_positives(perfect.data, perfect.detections, perfect.outcomes) == b""


@pytest.mark.slow
def test_plots_are_narrow_and_take_any_classes() -> None:
    predictions = many()
    names = ["$a^$", "b"]
    curves = plot_curves(predictions.precision[0, ..., 0], predictions.curves, names)
    assert pixels(curves).shape[1] <= 500 and pixels(plot_confusion(predictions.confusion, names)).shape[1] <= 500
    empty = predictions_of(truth([]), found())
    assert plot_curves(empty.precision[0, ..., 0], empty.curves, names) == b""
    lonely = predictions_of(truth([(0, 0, 0, 9, 9)]), found())
    assert plot_curves(lonely.precision[0, ..., 0], lonely.curves, names)


# what a run stores


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return finished_run(tmp_path_factory.mktemp("finished"))


def test_a_run_stores_its_best_scores_curves_and_predictions(finished: tuple[Path, Path]) -> None:
    folder, _ = finished
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores) == NAMES
    rows = rows_of(folder / "per_class.csv")
    assert [row["score"] for row in rows] == ["" if score is None else str(score) for score in scores.values()]
    assert set(rows[0]) >= {"precision", "recall", "f1", "correct", "wrong", "missed", "input_ap_small"}
    curve = rows_of(folder / "curves.csv")
    assert set(curve[0]) == {"class", "score", "precision", "recall", "f1"} and {row["class"] for row in curve} <= {
        *NAMES
    }
    with (folder / "confusion.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0] == ["", *NAMES, "background"] and [row[0] for row in table[1:]] == [*NAMES, "background"]
    assert [sum(map(int, row[1:])) for row in table[1:4]] == [int(row["objects"]) for row in rows]
    page = (folder / "report.html").read_text()
    for title in ("Precision and recall", "Confusion", "Missed objects", "Recall by size", "background"):
        assert title in page
    assert re.search(r"minimum scores: \d+ correct box(es)?, \d+ wrong box(es)?, \d+ missed objects?\.", page)
    assert not re.search(r"\b1 (correct boxes|wrong boxes|missed objects)", page)
    assert {"precision_recall.png", "confusion.png", "missed.png"} <= {
        file.name for file in (folder / "figures").iterdir()
    }


def test_stored_predictions_have_the_average_precision_of_the_run(finished: tuple[Path, Path]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder, data = finished
    predicted = json.loads((folder / "predictions.json").read_text())
    real = json.loads((data / "instances_val.json").read_text())
    ids = {image["file_name"]: image["id"] for image in real["images"]}
    for image in predicted["images"]:
        image["own"] = ids[Path(image["file_name"]).name]
    own = {image["id"]: image["own"] for image in predicted["images"]}
    category = {each["id"]: 10 * (each["id"] - 1) + 5 for each in predicted["categories"]}
    results = [
        {
            "image_id": own[each["image_id"]],
            "category_id": category[each["category_id"]],
            "bbox": each["bbox"],
            "score": each["score"],
        }
        for each in predicted["annotations"]
    ]
    coco = COCO()
    coco.dataset = real | {
        "annotations": [each | {"area": each["bbox"][2] * each["bbox"][3]} for each in real["annotations"]]
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    history = rows_of(folder / "metrics.csv")
    assert 100 * evaluation.stats[0] == pytest.approx(float(history[-1]["val_ap"]), abs=0.1)


@pytest.mark.slow
def test_evaluate_writes_what_the_run_stores_and_takes_an_iou(
    finished: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    folder, data = finished
    options = ["--split", "val", "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]
    (tmp_path / "figures_64").mkdir()
    (tmp_path / "figures_64" / "best.png").write_bytes(b"of an earlier evaluation")
    assert main(["evaluate", str(folder), "--data", str(data), *options]) == 0
    assert pixels((tmp_path / "figures_64" / "best.png").read_bytes()).size
    assert "precision" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "scores_64.json").read_text())) == NAMES
    assert (tmp_path / "figures_64" / "precision_recall.png").exists()
    for name in ("curves_64.csv", "confusion_64.csv", "by_size_64.csv", "per_class_64.csv", "predictions_64.json"):
        assert (tmp_path / name).exists()

    def boxes(iou: float | None) -> int:
        (evaluation,) = evaluate(str(folder), data, "val", iou_threshold=iou, device="cpu", workers=0)
        return sum(map(len, evaluation.predictions.detections))

    assert boxes(0.05) < boxes(None) == boxes(0.7) < boxes(0.95)  # 0.7 is the authors'
    assert main(["evaluate", str(folder), "--data", str(data), *options, "--iou", "0.05"]) == 0
    assert "NMS at an IoU of 0.05" in capsys.readouterr().out
    assert rows_of(tmp_path / "results.csv")[0]["iou_threshold"] == "0.05"
    with pytest.raises(ValueError, match="iou_threshold must be from 0 to 1, got 70"):
        evaluate(str(folder), data, iou_threshold=70, device="cpu")


# --score auto


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The folder of a run, with a small untrained detector, and scores for two of its classes."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"pretrained_cfg": {"input_size": (3, 96, 96)}, "label_names": ["cat", "dog", "eel"]}
    net = timm.create_model("yolov8n_spd", num_classes=3)
    save_for_hf(net, str(tmp_path / "run"), config, safe_serialization=True)
    (tmp_path / "run" / "scores.json").write_text(scores_text({"cat": 0.0125, "dog": 0.4, "eel": None}))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "run"


def of_class(found: Detections, label: int) -> list[float]:
    return found.scores[found.labels == label].tolist()


def test_auto_takes_the_minimum_scores_of_the_run(own: Path, capsys: Capture) -> None:
    detector = Detector(own, device="cpu", score_threshold="auto")
    assert isinstance(detector.thresholds, torch.Tensor)
    assert detector.thresholds.tolist() == pytest.approx([0.0125, 0.4, 0.25])
    image = own.parent / "a.png"
    every = Detector(own, device="cpu", score_threshold=0.0, max_detections=10000)(image)
    least = sorted(every.scores[every.labels == 0].tolist())[len(every) // 6]  # so that some of the class pass
    (own / "scores.json").write_text(scores_text({"cat": least, "dog": 1.0, "eel": None}))
    found = Detector(f"local-dir:{own}", device="cpu", score_threshold="auto", max_detections=10000)(image)
    assert of_class(found, 0) == [score for score in of_class(every, 0) if score > least] != []
    assert of_class(found, 1) == [] and of_class(found, 2) == [score for score in of_class(every, 2) if score > 0.25]
    chosen = Detector(own, device="cpu", score_threshold="auto", classes=["dog"], class_scores={"dog": 0.3}).thresholds
    assert isinstance(chosen, torch.Tensor) and chosen.tolist() == pytest.approx([torch.inf, 0.3, torch.inf])
    assert main(["detect", str(own), str(image), "--score", "auto", "--device", "cpu"]) == 0
    note = capsys.readouterr().err
    assert "dog 1.00" in note and "0.25 for eel, of which no box was correct" in note
    assert "measured" not in detector.scores_in_words()
    other = Detector(own, device="cpu", score_threshold="auto", tile=48, iou_threshold=0.3)
    settings = "this detection runs on tiles of 48 px, with an IoU threshold of 0.3"
    assert other.scores_in_words().endswith(f"; they were measured with other settings: {settings}")
    some = Detector(own, device="cpu", score_threshold="auto", classes=["dog", "eel"], class_scores={"dog": 0.3})
    assert "cat" not in some.scores_in_words() and "dog 0.30" in some.scores_in_words()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"has no scores\.json.*spd-zoo evaluate"),
        ("{", "cannot be used"),
        ('{"cat": 0.1, "dog": 0.2}', "its classes are not the network's"),
        ('{"cat": 0.1, "dog": 0.2, "eel": 7}', "a score is not between 0 and 1"),
        ('{"cat": 0.1, "dog": 0.2, "eel": "0.3"}', "a score is not between 0 and 1"),
        ('{"cat": 0.1, "dog": 0.2, "eel": NaN}', "a score is not between 0 and 1"),
        ("[" * 100000, "cannot be used"),
    ],
)
def test_scores_that_do_not_fit_are_refused(content: str | None, words: str, own: Path) -> None:
    (own / "scores.json").unlink()
    if content is not None:
        (own / "scores.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        Detector(own, device="cpu", score_threshold="auto")
    with pytest.raises(ValueError, match="score_threshold must be a number or 'auto', got 'car'"):
        Detector(own, device="cpu", score_threshold="car")


def test_a_network_of_the_zoo_has_no_scores_of_its_own(capsys: Capture) -> None:
    with pytest.raises(ModelError, match=r"yolov8n_spd\.spd_bccd has no scores\.json.*--class-scores"):
        read_scores("yolov8n_spd.spd_bccd", ["a"])


@pytest.mark.exhaustive
def test_an_exported_file_knows_the_scores_of_its_run(own: Path, tmp_path: Path) -> None:
    file = export(str(own), "onnx", tmp_path / "model.onnx")
    exported, network = (Detector(model, device="cpu", score_threshold="auto") for model in (file, own))
    assert isinstance(exported.thresholds, torch.Tensor) and isinstance(network.thresholds, torch.Tensor)
    assert torch.equal(exported.thresholds, network.thresholds)
    (own / "scores.json").unlink()
    with pytest.raises(ModelError, match="does not hold the best minimum score"):
        Detector(export(str(own), "onnx", tmp_path / "other.onnx"), score_threshold="auto")
