"""Metrics of a detector: COCO's average precision, for all classes and for each, and the time of each stage."""

import contextlib
import io
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spd_zoo.data.boxes import EVERY_CLASS, BoxImages
from spd_zoo.files import write_csv
from spd_zoo.inference.detector import Detections, Placement, merge_views, postprocess
from spd_zoo.models._detector import DetectionNet, ObjectFinder, YoloNet
from spd_zoo.process import Process
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.steps import Batches, read

__all__ = ["AREAS", "BoxPredictions", "coco_precision", "mean_terms", "predict", "score"]

AREAS = ("all", "small", "medium", "large")  # of objects: up to 32^2 pixels, up to 96^2, larger


def coco_precision(
    data: BoxImages, detections: Sequence[Detections], scales: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """Precision by the rules of COCO (Lin et al., https://arxiv.org/abs/1405.0312), computed by faster-coco-eval.

    Args:
        data: Images with their objects.
        detections: Detections in each image.
        scales: Factors in x and y for each image, by which sizes are multiplied before objects are sorted into small,
            medium and large; None: 1.

    Returns:
        (10 IoU thresholds 0.5, 0.55, ..., 101 recalls 0, 0.01, ..., classes, 4 areas as in `AREAS`), from 0 to 1, with
        -1 for classes and areas without objects. Only the 100 best boxes of a class count in each image.
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
    """

    data: BoxImages
    detections: list[Detections]
    scales: list[tuple[float, float]]
    losses: dict[str, float]
    milliseconds: dict[str, float]

    @cached_property
    def precision(self) -> np.ndarray:
        """`coco_precision` with areas in the images' pixels."""
        return coco_precision(self.data, self.detections)

    @cached_property
    def input_precision(self) -> np.ndarray:
        """`coco_precision` with areas in the network's input pixels."""
        return coco_precision(self.data, self.detections, self.scales)

    def summary(self) -> dict[str, Any]:
        """Images, objects, loss, AP in per cent, AP by area in the image and (`input_`) in the input, milliseconds."""
        own, scaled = self.precision, self.input_precision
        figures: dict[str, Any] = {"images": len(self.data), "objects": sum(self.data.counts())}
        figures |= {"loss": sum(self.losses.values()) if self.losses else None}
        figures |= {"ap": _mean(own[..., 0]), "ap50": _mean(own[0, ..., 0]), "ap75": _mean(own[5, ..., 0])}
        for name, precision in (("", own), ("input_", scaled)):
            figures |= {f"{name}ap_{area}": _mean(precision[..., i]) for i, area in enumerate(AREAS) if i}
        return figures | {f"ms_{stage}": value for stage, value in self.milliseconds.items()}

    def per_class(self) -> list[dict[str, Any]]:
        """Objects and AP of each class, also by area in the image and (`input_`) in the network's input."""
        own, scaled = self.precision, self.input_precision
        return [
            {
                "class": name,
                "objects": objects,
                "ap": _mean(own[:, :, i, 0]),
                "ap50": _mean(own[0, :, i, 0]),
                "ap75": _mean(own[5, :, i, 0]),
                **{f"ap_{area}": _mean(own[:, :, i, a]) for a, area in enumerate(AREAS) if a},
                **{f"input_ap_{area}": _mean(scaled[:, :, i, a]) for a, area in enumerate(AREAS) if a},
            }
            for i, (name, objects) in enumerate(zip(self.data.class_names, self.data.counts(), strict=True))
        ]

    def columns(self) -> dict[str, Any]:
        """The columns of the results table."""
        return {name: value for name, value in self.summary().items() if name not in ("images", "objects")}

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
        boxes = f"{row['ms_boxes']:.1f} ms" if "ms_boxes" in row else "in it"
        return (
            f"AP {_words(row['ap'])}, AP50 {_words(row['ap50'])}, AP75 {_words(row['ap75'])}; "
            f"{by_area} (as the network sees them: {in_input}); {classes}; per image {row['ms_prepare']:.1f} ms to "
            f"read and preprocess, {row['ms_network']:.1f} ms in the network, {boxes} to decode and suppress boxes"
        )

    def write_tables(self, folder: Path, suffix: str = "") -> None:
        """Writes `per_class.csv`."""
        classes = self.per_class()
        write_csv(folder / f"per_class{suffix}.csv", classes[0], [row.values() for row in classes])


def predict(
    net: ObjectFinder,
    batches: Batches,
    data: BoxImages,
    image_size: tuple[int, int],
    preprocessing: Preprocessing,
    process: Process,
) -> BoxPredictions:
    """Predictions for the images of all processes; every process gets all of them.

    Boxes are kept as the authors evaluate: scores above 0.001 (SSD: 0.01), at most 300 boxes an image (SSD: no limit).

    Args:
        net: The detector.
        batches: This process's images, from `box_eval_loader`.
        data: All images.
        image_size: Height and width of the network's input in pixels.
        preprocessing: The network's device and precision; the batches are normalised already.
        process: This process.

    Returns:
        The predictions.
    """
    threshold, max_detections = net.evaluation_score, net.evaluation_boxes
    net.eval()
    device = preprocessing.device
    sums: dict[str, float] = {}
    seen = 0
    clock = {"prepare": 0.0, "network": 0.0, "boxes": 0.0}

    def of_views() -> Iterator[tuple[int, Placement, Detections]]:
        nonlocal seen
        for inputs, placements, targets, indices, seconds in tqdm(
            read(batches), "evaluating", leave=False, disable=None, delay=5
        ):
            clock["prepare"] += sum(seconds)
            with torch.inference_mode():
                images = inputs.to(device, memory_format=torch.channels_last)
                with _timed(clock, "network", device), preprocessing.autocast():
                    raw = net(images)
                with _timed(clock, "boxes", device):
                    found = postprocess(net, raw, placements, image_size, threshold, max_detections=max_detections)
                terms = {}
                if isinstance(net, DetectionNet):
                    terms = mean_terms(net, net.loss(raw, targets, image_size), len(images))
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item() * len(images)
            seen += len(images)
            yield from zip(indices, placements, found, strict=True)

    mine: dict[int, tuple[Detections, tuple[float, float]]] = {}
    for i, group in itertools.groupby(of_views(), itemgetter(0)):
        _, placements, found = zip(*group, strict=True)
        began = time.perf_counter()
        merged = merge_views(found, placements, net.iou_threshold)
        clock["boxes"] += time.perf_counter() - began
        mine[i] = (merged[:max_detections], placements[-1].scale)  # of the tiles, which come last
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
