"""Metrics of a detector: COCO's average precision, for all classes and for each, and the time of each stage."""

import contextlib
import importlib
import io
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spd_zoo.console import bar_disabled
from spd_zoo.data.boxes import EVERY_CLASS, BoxImages, Objects
from spd_zoo.data.boxes.sizes import EDGES
from spd_zoo.data.boxes.sizes import NAMES as SIZES
from spd_zoo.data.notes import count, some
from spd_zoo.files import whole, write_csv
from spd_zoo.inference.detector import SCORE, Detections, Placement, merge_views, postprocess
from spd_zoo.inference.output import CocoFile, ImageDetections
from spd_zoo.inference.scores import SCORES_FILE, scores_text
from spd_zoo.models._detector import DetectionNet, ObjectFinder, YoloNet
from spd_zoo.process import Process
from spd_zoo.training import comments
from spd_zoo.training.detection.curves import Curve, Outcome, confusion_matrix, curves, match, outcome, rates
from spd_zoo.training.detection.plots import BACKGROUND, plot_confusion, plot_curves
from spd_zoo.training.detection.sheets import IMAGES, box_sheet, false_positives, missed_objects
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.steps import Batches, read

__all__ = ["AREAS", "BoxPredictions", "Suppression", "coco_precision", "mean_terms", "predict", "require_coco", "score"]

AREAS = ("all", "small", "medium", "large")  # of objects: up to 32^2 pixels, up to 96^2, larger
SCORES = np.linspace(0, 1, 101)  # minimum scores in the table of curves
COCO_BOXES = 100  # best boxes per class and image that count by COCO's rules


@dataclass(frozen=True)
class Suppression:
    """How an evaluation differs from the authors' settings for boxes, and from COCO's rules.

    Attributes:
        max_detections: Maximum number of boxes per image, all of which count; None: the authors', of which COCO's rules
            count 100 of each class.
        agnostic: Whether boxes of different classes suppress each other, too.
        iou_threshold: IoU threshold of NMS; None: the authors'.
    """

    max_detections: int | None = None
    agnostic: bool = False
    iou_threshold: float | None = None

    def columns(self) -> dict[str, Any]:
        """The settings that differ, by name."""
        own = {"max_detections": self.max_detections, "agnostic": self.agnostic, "iou_threshold": self.iou_threshold}
        return {name: value for name, value in own.items() if value is not None and value is not False}

    def in_words(self) -> str:
        """The settings that differ from the usual ones, to append to the metrics; empty if none do."""
        most = f"; up to {self.max_detections} boxes count in an image" if self.max_detections else ""
        iou = f"; NMS at an IoU of {self.iou_threshold:g}" if self.iou_threshold is not None else ""
        return most + iou + ("; boxes suppress boxes of other classes" if self.agnostic else "")


def require_coco() -> None:
    """Raises ModuleNotFoundError if the package that computes AP is missing, before any time is spent."""
    importlib.import_module("faster_coco_eval")


def coco_precision(
    data: BoxImages,
    detections: Sequence[Detections],
    scales: Sequence[tuple[float, float]] | None = None,
    max_boxes: int = COCO_BOXES,
) -> np.ndarray:
    """Precision by the rules of COCO (Lin et al., https://arxiv.org/abs/1405.0312), computed by faster-coco-eval.

    Args:
        data: Images with their objects.
        detections: Detections in each image.
        scales: Factors in x and y for each image, by which sizes are multiplied before objects are sorted into small,
            medium and large; None: 1.
        max_boxes: Number of boxes per class and image that count, those with the highest scores.

    Returns:
        (10 IoU thresholds 0.5, 0.55, ..., 101 recalls 0, 0.01, ..., classes, 4 areas as in `AREAS`), from 0 to 1, with
        -1 for classes and areas without objects.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(data.class_names, 1)],
    }
    results: list[dict[str, Any]] = []
    for i in range(len(data)):
        x, y = scales[i] if scales is not None else (1.0, 1.0)
        truth["images"].append({"id": i + 1})
        for box, label, area, ignored in zip(*(tensor.tolist() for tensor in data.objects_in(i)), strict=True):
            shared = {"image_id": i + 1, "bbox": _xywh(box, x, y), "area": area * x * y, "iscrowd": int(ignored)}
            for category in range(1, len(data.class_names) + 1) if label == EVERY_CLASS else (label + 1,):
                truth["annotations"].append({"id": len(truth["annotations"]) + 1, "category_id": category, **shared})
        columns = (detections[i].boxes.tolist(), detections[i].scores.tolist(), detections[i].labels.tolist())
        for box, score, label in zip(*columns, strict=True):
            results.append({"image_id": i + 1, "category_id": label + 1, "bbox": _xywh(box, x, y), "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        evaluation = COCOeval_faster(coco, coco.loadRes(results), "bbox")
        evaluation.params.maxDets = [max_boxes]
        evaluation.evaluate()
        evaluation.accumulate()
    precision: np.ndarray = np.asarray(evaluation.eval["precision"])
    return precision[..., -1]


def _xywh(box: Sequence[float], x: float, y: float) -> list[float]:
    return [box[0] * x, box[1] * y, (box[2] - box[0]) * x, (box[3] - box[1]) * y]


def _mean(precision: np.ndarray) -> float | None:
    """The mean in per cent; None without any object."""
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else None


@dataclass(frozen=True)
class BoxPredictions:
    """Predictions of a detector for images with boxes.

    Attributes:
        data: The images.
        detections: Detections in each image, in its own pixels.
        scales: Input pixels per pixel of each image, or of its tiles, in x and in y.
        losses: The mean of each term of the loss, over tiles where images are cut; empty for an exported file, which
            has no loss.
        milliseconds: Per image and process: `prepare` (reading and preprocessing), `network`, and `boxes` (decoding and
            NMS; of an exported file, they are in `network`).
        max_detections: Maximum number of boxes per image; None: no limit.
        suppression: Settings that differ from the authors' and COCO's rules.
        in_file: Maximum number of boxes per image of an exported file, if the authors' evaluation counts more.
    """

    data: BoxImages
    detections: list[Detections]
    scales: list[tuple[float, float]]
    losses: dict[str, float]
    milliseconds: dict[str, float]
    max_detections: int | None = None
    suppression: Suppression = Suppression()
    in_file: int | None = None

    @property
    def max_boxes(self) -> int:
        """Number of boxes of a class that count in each image."""
        return self.suppression.max_detections or COCO_BOXES

    @cached_property
    def precision(self) -> np.ndarray:
        """`coco_precision` with areas in the images' pixels."""
        return coco_precision(self.data, self.detections, max_boxes=self.max_boxes)

    @cached_property
    def input_precision(self) -> np.ndarray:
        """`coco_precision` with areas in the network's input pixels."""
        return coco_precision(self.data, self.detections, self.scales, self.max_boxes)

    @cached_property
    def curves(self) -> list[Curve]:
        """Precision, recall and F1 of each class by the minimum score."""
        return curves(self.detections, self._matches, self.data.counts())

    @cached_property
    def best_scores(self) -> list[float | None]:
        """The minimum score with the best F1 of each class; None for a class without a correct box."""
        return [curve.threshold() for curve in self.curves]

    @cached_property
    def thresholds(self) -> list[float]:
        """`best_scores`, with `SCORE` for a class without a correct box."""
        return [SCORE if score is None else score for score in self.best_scores]

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """What is detected in each image with the minimum scores `thresholds`."""
        images = zip(self.detections, self._objects, self._matches, strict=True)
        return [outcome(detections, objects, found, self.thresholds) for detections, objects, found in images]

    @cached_property
    def confusion(self) -> np.ndarray:
        """`confusion_matrix` with the minimum scores `thresholds`."""
        return confusion_matrix(self.detections, self._objects, self.outcomes, len(self.data.class_names))

    @cached_property
    def halves(self) -> dict[str, list[int]]:
        """The `worst` and the `best` images by F1 with the minimum scores `thresholds`, without repeats."""
        order = sorted(range(len(self.data)), key=lambda i: self.outcomes[i].f1())
        halves = dict(zip(("worst", "best"), comments.halves(order, IMAGES), strict=True))
        return {name: chosen for name, chosen in halves.items() if chosen}

    @cached_property
    def _objects(self) -> list[Objects]:
        return [self.data.objects_in(i) for i in range(len(self.data))]

    @cached_property
    def _matches(self) -> list[Tensor]:
        return [match(*each) for each in zip(self.detections, self._objects, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Images, objects, loss, AP in per cent, AP by area in the image and (`input_`) in the input, milliseconds.

        Also `precision`, `recall` and `f1` in per cent: means over the classes that have objects, each with its best
        minimum score, at an IoU of 0.5.
        """
        own, scaled = self.precision, self.input_precision
        figures: dict[str, Any] = {"images": len(self.data), "objects": sum(self.data.counts())}
        figures |= {"loss": sum(self.losses.values()) if self.losses else None}
        figures |= {"ap": _mean(own[..., 0]), "ap50": _mean(own[0, ..., 0]), "ap75": _mean(own[5, ..., 0])}
        classes = [row for row in self.per_class() if row["objects"]]
        figures |= {name: _mean_of([row[name] for row in classes]) for name in ("precision", "recall", "f1")}
        for name, precision in (("", own), ("input_", scaled)):
            figures |= {f"{name}ap_{area}": _mean(precision[..., i]) for i, area in enumerate(AREAS) if i}
        return figures | {f"ms_{stage}": value for stage, value in self.milliseconds.items()}

    def per_class(self) -> list[dict[str, Any]]:
        """Objects and AP of each class, also by area in the image and (`input_`) in the network's input.

        Also its best minimum score (`score`, None without a correct box), and with it precision, recall, F1, and the
        number of `correct` and `wrong` boxes and of `missed` objects, at an IoU of 0.5.
        """
        own, scaled = self.precision, self.input_precision
        return [
            {
                "class": name,
                "objects": objects,
                "ap": _mean(own[:, :, i, 0]),
                "ap50": _mean(own[0, :, i, 0]),
                "ap75": _mean(own[5, :, i, 0]),
                **_at_best(self.curves[i], self.best_scores[i]),
                **{f"ap_{area}": _mean(own[:, :, i, a]) for a, area in enumerate(AREAS) if a},
                **{f"input_ap_{area}": _mean(scaled[:, :, i, a]) for a, area in enumerate(AREAS) if a},
            }
            for i, (name, objects) in enumerate(zip(self.data.class_names, self.data.counts(), strict=True))
        ]

    def columns(self) -> dict[str, Any]:
        """The columns of the results table."""
        figures = {name: value for name, value in self.summary().items() if name not in ("images", "objects")}
        tiling = self.data.tiling
        tiles = {} if tiling is None else {"tile": tiling.side, "overlap": tiling.overlap}
        return figures | tiles | self.suppression.columns()

    def notes(self) -> list[str]:
        """Notes that name images with more objects than the number of boxes that count, or boxes than a file holds."""
        names = [self.data.name(i) for i, found in enumerate(self.detections) if found.limited]
        full = f"{count(len(names), 'image')} with as many boxes as the exported file can hold ({self.in_file})"
        advice = "export it again with a larger --max-detections for the AP of the network"
        notes = [f"{full}: {some(names)}; {advice}"] if self.in_file and names else []
        crowded, most = [], 0
        for i in range(len(self.data)):
            labels = self.data.objects_in(i).counted().labels
            objects, of_a_class = len(labels), int(labels.bincount().max()) if len(labels) else 0
            if of_a_class > self.max_boxes or objects > (self.max_detections or math.inf):
                crowded.append(self.data.name(i))
                most = max(most, objects)
        if not crowded:
            return notes
        limits = [f"{self.max_detections} per image"] if self.max_detections else []
        if not self.suppression.max_detections:
            limits.append(f"{COCO_BOXES} per class and image by COCO's rules")
        return [
            *notes,
            f"{count(len(crowded), 'image')} with up to {count(most, 'object')}, of which AP counts only the "
            f"best {' and '.join(limits)}: {some(crowded)}; evaluate --max-detections {most} counts all",
        ]

    def headline(self) -> str:
        """The most important figures."""
        figures = self.summary()
        return f"AP {_words(figures['ap'])}, AP50 {_words(figures['ap50'])} on {figures['objects']} objects"

    def in_words(self) -> str:
        """All figures on one line."""
        row = self.summary()
        by_area = ", ".join(f"{area} {_words(row[f'ap_{area}'])}" for area in AREAS[1:])
        in_input = ", ".join(f"{area} {_words(row[f'input_ap_{area}'])}" for area in AREAS[1:])
        classes = ", ".join(f"{row['class']} {_words(row['ap'])}" for row in self.per_class())
        boxes = f", {row['ms_boxes']:.1f} ms for" if "ms_boxes" in row else ", including"
        tiling = self.data.tiling
        tiles = "" if tiling is None else f"; on tiles of {tiling.side} px that overlap by {tiling.overlap:g}"
        scores = zip(self.data.class_names, self.best_scores, strict=True)
        best = ", ".join(f"{name} {score:.2f}" for name, score in scores if score is not None)
        return (
            f"AP {_words(row['ap'])}, AP50 {_words(row['ap50'])}, AP75 {_words(row['ap75'])}; precision "
            f"{_words(row['precision'])}, recall {_words(row['recall'])}, F1 {_words(row['f1'])} at the minimum score "
            f"with the best F1 of each class ({best or 'no box is correct'}); "
            f"{by_area} (at the network's input: {in_input}); {classes}; per image {row['ms_prepare']:.1f} ms to "
            f"read and preprocess, {row['ms_network']:.1f} ms in the network{boxes} decoding and NMS"
            f"{tiles}{self.suppression.in_words()}"
        )

    def by_size(self) -> list[dict[str, Any]]:
        """Objects, how many of them are detected, and recall in per cent, by size in the network's input."""
        sizes, detected = [], []
        for objects, result, (x, y) in zip(self._objects, self.outcomes, self.scales, strict=True):
            sizes.append((objects.areas.double() * x * y).sqrt()[~objects.ignored])
            detected.append(result.detected[~objects.ignored])
        place = np.digitize(torch.cat(sizes).numpy(), EDGES)
        found = np.bincount(place[torch.cat(detected).numpy()], minlength=len(SIZES)).tolist()
        return [
            {"size": name, "objects": objects, "detected": right, "recall": 100 * right / objects if objects else None}
            for name, objects, right in zip(
                SIZES, np.bincount(place, minlength=len(SIZES)).tolist(), found, strict=True
            )
        ]

    def write_tables(self, folder: Path, suffix: str = "") -> None:
        """Writes the tables as CSV and JSON, and the figures.

        `curves.csv` has a row for each class and each of the minimum scores `SCORES`. `predictions.json` has the form
        of `detections.json`, which `spd-zoo detect` writes.
        """
        names = self.data.class_names
        points = [
            [name, f"{score:.2f}", *("" if math.isnan(value) else f"{100 * value:.6g}" for value in values)]
            for name, curve in zip(names, self.curves, strict=True)
            for score, *values in zip(SCORES, *rates(*curve.at(SCORES), curve.objects).values(), strict=True)
        ]
        write_csv(folder / f"curves{suffix}.csv", ["class", "score", "precision", "recall", "f1"], points)
        rows = zip([*names, BACKGROUND], self.confusion.tolist(), strict=True)
        write_csv(folder / f"confusion{suffix}.csv", ["", *names, BACKGROUND], [[name, *row] for name, row in rows])
        for name, table in (("per_class", self.per_class()), ("by_size", self.by_size())):
            write_csv(folder / f"{name}{suffix}.csv", table[0], [row.values() for row in table])
        with whole(folder / f"{Path(SCORES_FILE).stem}{suffix}.json") as temporary:
            temporary.write_text(scores_text(dict(zip(names, self.best_scores, strict=True))), encoding="utf-8")
        with whole(folder / f"predictions{suffix}.json") as temporary, CocoFile(names) as coco:
            for i, found in enumerate(self.detections):
                width, height = self.data.sizes[self.data.rows[i]]
                coco.add(ImageDetections(self.data.name(i), (height, width), found))
            with temporary.open("w", encoding="utf-8") as file:
                coco.write(file)
        pictures = folder / f"figures{suffix}"
        pictures.mkdir(exist_ok=True)
        for name, content in self._figures().items():
            (pictures / f"{name}.png").unlink(missing_ok=True)  # from an earlier evaluation
            if content:
                (pictures / f"{name}.png").write_bytes(content)

    def _figures(self) -> dict[str, bytes]:
        """Plots and contact sheets as PNG, by name; empty where there is nothing to show, or no matplotlib."""
        names = self.data.class_names
        images = (self.data, self.detections, self.outcomes)
        return {
            "precision_recall": plot_curves(self.precision[0, ..., 0], self.curves, names),
            "confusion": plot_confusion(self.confusion, names),
            "false_positives": false_positives(*images),
            "missed": missed_objects(*images, self._matches, self.thresholds),
            **{name: box_sheet(*images, self.halves.get(name, [])) for name in ("worst", "best")},
        }


def _at_best(curve: Curve, score: float | None) -> dict[str, Any]:
    """The metrics of a class at its best minimum score, without one at `SCORE`; undefined rates are None."""
    correct, wrong = curve.at(np.array(SCORE if score is None else score))
    figures = {name: float(rate) for name, rate in rates(correct, wrong, curve.objects).items()}
    return {
        "score": score,
        **{name: 100 * rate if math.isfinite(rate) else None for name, rate in figures.items()},
        "correct": int(correct),
        "wrong": int(wrong),
        "missed": curve.objects - int(correct),
    }


def _mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are defined; None if there are none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def predict(
    net: ObjectFinder,
    batches: Batches,
    data: BoxImages,
    image_size: tuple[int, int],
    preprocessing: Preprocessing,
    process: Process,
    suppression: Suppression | None = None,
) -> BoxPredictions:
    """Predictions for the images of all processes; every process gets all of them.

    By default, boxes are filtered as in the authors' evaluation: scores above 0.001 (SSD: 0.01), at most
    300 boxes an image (SSD: no limit).

    Args:
        net: The detector.
        batches: This process's images, from `box_eval_loader`.
        data: All images.
        image_size: Height and width of the network's input in pixels.
        preprocessing: The network's device and precision; the batches are normalised already.
        process: This process.
        suppression: Settings that differ from these.

    Returns:
        The predictions.
    """
    suppression = suppression or Suppression()
    max_detections = suppression.max_detections or net.evaluation_boxes
    of_a_view = max_detections if data.tiling is None else None  # those of tiles are counted after merging
    limits = (net.evaluation_score, suppression.iou_threshold, of_a_view, suppression.agnostic)
    net.eval()
    device = preprocessing.device
    sums: dict[str, float] = {}
    seen = 0
    clock = {"prepare": 0.0, "network": 0.0, "boxes": 0.0}

    def of_views() -> Iterator[tuple[int, Placement, Detections]]:
        nonlocal seen
        for inputs, placements, targets, indices, seconds in tqdm(
            read(batches), "evaluating", leave=False, disable=bar_disabled(), delay=5
        ):
            clock["prepare"] += sum(seconds)
            with torch.inference_mode():
                images = inputs.to(device, memory_format=torch.channels_last)
                with _timed(clock, "network", device), preprocessing.autocast():
                    raw = net(images)
                with _timed(clock, "boxes", device):
                    found = postprocess(net, raw, placements, image_size, *limits)
                terms = {}
                if isinstance(net, DetectionNet):
                    terms = mean_terms(net, net.loss(raw, targets, image_size), len(images))
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item() * len(images)
            seen += len(images)
            yield from zip(indices, placements, found, strict=True)

    mine: dict[int, tuple[Detections, tuple[float, float]]] = {}
    iou_threshold = net.iou_threshold if suppression.iou_threshold is None else suppression.iou_threshold
    for i, group in itertools.groupby(of_views(), itemgetter(0)):
        _, placements, found = zip(*group, strict=True)
        began = time.perf_counter()
        merged = merge_views(found, placements, iou_threshold, suppression.agnostic)
        clock["boxes"] += time.perf_counter() - began
        limited = any(each.limited for each in found)
        mine[i] = (replace(merged[:max_detections], limited=limited), placements[-1].scale)  # of tiles, which come last
    if not isinstance(net, DetectionNet):  # an exported file computes all in one
        clock["network"] += clock.pop("boxes")
    gathered = process.all_gather((mine, sums, clock, seen))
    every = {i: result for results, *_ in gathered for i, result in results.items()}
    views = sum(seen for *_, seen in gathered)
    order = range(len(data))
    return BoxPredictions(
        data,
        [every[i][0] for i in order],
        [every[i][1] for i in order],
        {name: sum(sums.get(name, 0.0) for _, sums, *_ in gathered) / views for name in gathered[0][1]},
        {name: 1000 * sum(clock[name] for _, _, clock, _ in gathered) / len(data) for name in clock},
        max_detections,
        suppression,
        None if net.holds_all_boxes or suppression.max_detections else net.max_detections,
    )


def mean_terms(net: DetectionNet, terms: dict[str, Tensor], images: int) -> dict[str, Tensor]:
    """The terms of a loss per image: YOLO's loss is defined times the images of the batch, SSD's is not."""
    return {name: term / images for name, term in terms.items()} if isinstance(net, YoloNet) else terms


@contextlib.contextmanager
def _timed(clock: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Adds the duration of the block to `clock`, in seconds, after synchronising with the GPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    began = time.perf_counter()
    yield
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    clock[stage] += time.perf_counter() - began


def _words(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f} %"


def score(net: DetectionNet, batches: Batches, preprocessing: Preprocessing, process: Process) -> dict[str, float]:
    """`loss`, `ap` and `ap50` (per cent) over the images of all processes; NaN without any object."""
    images: Any = batches.dataset
    predictions = predict(net, batches, images.data, images.size, preprocessing, process)
    ap, ap50 = _mean(predictions.precision[..., 0]), _mean(predictions.precision[0, ..., 0])
    return {
        "loss": sum(predictions.losses.values()),
        "ap": math.nan if ap is None else ap,
        "ap50": math.nan if ap50 is None else ap50,
    }
