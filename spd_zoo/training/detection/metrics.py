"""How good a detector is on images with boxes: COCO's average precision, of all and of each class, and its speed."""

import contextlib
import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from torch import Tensor
from tqdm import tqdm

from spd_zoo.complexity import count_params
from spd_zoo.data.boxes import BoxImages, open_boxes, with_names
from spd_zoo.data.check import check, defects_in_words
from spd_zoo.data.labelled import Batches, DataError, read
from spd_zoo.files import write_csv
from spd_zoo.inference.detector import Detections, postprocess
from spd_zoo.models._detector import DetectionNet, YoloNet
from spd_zoo.process import Process
from spd_zoo.training.detection.augment import box_eval_loader
from spd_zoo.training.evaluate import Input
from spd_zoo.weights.load import class_names

__all__ = ["AREAS", "BoxPredictions", "box_predictions", "coco_precision"]

AREAS = ("all", "small", "medium", "large")  # up to 32 pixels squared, up to 96, above


def coco_precision(
    data: BoxImages, found: Sequence[Detections], scales: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """Precision by COCO's rules: Lin et al., https://arxiv.org/abs/1405.0312, and the COCO API, in C++.

    Args:
        data: Images with their objects.
        found: For each image, what was found in it.
        scales: If given, objects are small, medium or large by their size times these factors in x and y.

    Returns:
        (10 overlaps 0.5, 0.55, ..., 101 recalls 0, 0.01, ..., classes, 4 areas as in `AREAS`), from 0 to 1,
        with -1 where there is no object; of each image the 100 best boxes of a class count.
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
        for box, label, area, crowd in zip(*(part.tolist() for part in data.shown(i)), strict=True):
            annotation = {"id": len(truth["annotations"]) + 1, "image_id": i + 1, "category_id": label + 1}
            truth["annotations"].append(
                annotation | {"bbox": _xywh(box, x, y), "area": area * x * y, "iscrowd": int(crowd)}
            )
        one = found[i]
        for box, score, label in zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True):
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
    """The mean in per cent where there are objects; None where there are none."""
    there = precision[precision > -1]
    return 100 * float(there.mean()) if there.size else None


@dataclass(frozen=True)
class BoxPredictions:
    """What a detector found in images with boxes.

    Attributes:
        data: The images.
        found: Of each image, boxes in its own pixels.
        scales: Of each image, the network's input pixels per pixel, in x and in y.
        losses: The mean of each term of the loss.
        milliseconds: For an image: `prepare` (reading it and making it the network's input), `network`, and `boxes`
            (decoding and suppression), each by one process.
    """

    data: BoxImages
    found: list[Detections]
    scales: list[tuple[float, float]]
    losses: dict[str, float]
    milliseconds: dict[str, float]

    @cached_property
    def precision(self) -> np.ndarray:
        """As `coco_precision` gives it, areas in the images' pixels."""
        return coco_precision(self.data, self.found)

    @cached_property
    def input_precision(self) -> np.ndarray:
        """As `coco_precision` gives it, areas in the pixels that the network sees."""
        return coco_precision(self.data, self.found, self.scales)

    def summary(self) -> dict[str, Any]:
        """`ap`, `ap50`, `ap75` in per cent, also by area in the image and (`input_`) in what the network sees."""
        own, seen = self.precision, self.input_precision
        figures: dict[str, Any] = {"images": len(self.data), "objects": sum(self.data.counts())}
        figures |= {"loss": sum(self.losses.values())}
        figures |= {"ap": _mean(own[..., 0]), "ap50": _mean(own[0, ..., 0]), "ap75": _mean(own[5, ..., 0])}
        for name, precision in (("", own), ("input_", seen)):
            figures |= {f"{name}ap_{area}": _mean(precision[..., i]) for i, area in enumerate(AREAS) if i}
        return figures | {f"ms_{stage}": value for stage, value in self.milliseconds.items()}

    def per_class(self) -> list[dict[str, Any]]:
        """Objects, `ap`, `ap50`, `ap75` and, by area in what the network sees, `input_ap_small` ... of each class."""
        own, seen = self.precision, self.input_precision
        return [
            {
                "class": name,
                "objects": objects,
                "ap": _mean(own[:, :, i, 0]),
                "ap50": _mean(own[0, :, i, 0]),
                "ap75": _mean(own[5, :, i, 0]),
                **{f"ap_{area}": _mean(own[:, :, i, a]) for a, area in enumerate(AREAS) if a},
                **{f"input_ap_{area}": _mean(seen[:, :, i, a]) for a, area in enumerate(AREAS) if a},
            }
            for i, (name, objects) in enumerate(zip(self.data.class_names, self.data.counts(), strict=True))
        ]


def box_predictions(
    net: DetectionNet, batches: Batches, data: BoxImages, image_size: int, given: Input, process: Process
) -> BoxPredictions:
    """What the network finds in all images; every process gets what all of them have found.

    Boxes are suppressed as the authors evaluate: scores above 0.001 (SSD: 0.01), 300 boxes an image at most (SSD: any
    number).
    """
    threshold, most = (0.001, 300) if isinstance(net, YoloNet) else (0.01, 10**6)
    net.eval()
    mine: dict[int, tuple[Detections, tuple[float, float]]] = {}
    sums: dict[str, float] = {}
    clock = {"prepare": 0.0, "network": 0.0, "boxes": 0.0}
    for inputs, placements, targets, indices, seconds in tqdm(
        read(batches), "evaluating", leave=False, disable=None, delay=5
    ):
        clock["prepare"] += sum(seconds)
        with torch.inference_mode():
            images = inputs.to(given.device, memory_format=torch.channels_last)
            with _timed(clock, "network", given.device), given.autocast():
                raw = net(images)
            with _timed(clock, "boxes", given.device):
                found = postprocess(net, raw, placements, (image_size, image_size), threshold, max_detections=most)
            terms = mean_terms(net, net.loss(raw, targets, (image_size, image_size)), len(images))
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.item() * len(images)
        for i, one, placement in zip(indices, found, placements, strict=True):
            mine[i] = (one, placement.scale)
    every = process.all_gather((mine, sums, clock))
    all_found = {i: one for part, _, _ in every for i, one in part.items()}
    order = range(len(data))
    return BoxPredictions(
        data,
        [all_found[i][0] for i in order],
        [all_found[i][1] for i in order],
        {name: sum(part.get(name, 0.0) for _, part, _ in every) / len(data) for name in every[0][1]},
        {name: 1000 * sum(part[name] for _, _, part in every) / len(data) for name in clock},
    )


def mean_terms(net: DetectionNet, terms: dict[str, Tensor], images: int) -> dict[str, Tensor]:
    """The terms of a loss for an image: YOLO's authors multiply them by the number of images, SSD's do not."""
    return {name: term / images for name, term in terms.items()} if isinstance(net, YoloNet) else terms


@contextlib.contextmanager
def _timed(clock: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Adds the seconds inside to `clock`; a GPU is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock[stage] += time.perf_counter() - began


def evaluate_boxes(
    net: DetectionNet,
    model: str,
    data: str | Path,
    split: str,
    image_sizes: Sequence[int],
    batch_size: int,
    workers: int,
    device: torch.device,
    bf16: bool,
) -> list["BoxEvaluation"]:
    """Evaluates a detector on a data set, at one image size after the other; see `evaluate.evaluate` for the arguments.

    Raises:
        DataError: If the data set cannot be used, or its classes are not the network's.
    """
    splits = (split,) if split else ("test", "val", "train")
    parts = ((name, open_boxes(data, name)) for name in splits)
    split, images = next(((name, part) for name, part in parts if part), ("", None))
    if images is None:
        raise DataError(f"{data} has no split {' or '.join(splits)}")
    cfg = net.pretrained_cfg
    images = boxes_of(images, class_names(cfg))
    unreadable = check({split: images}, workers, Process(device))[split]["unreadable"]
    images = images.without(unreadable)
    config = resolve_data_config(pretrained_cfg=cfg)
    given = Input(config["mean"], config["std"], device, bf16)
    evaluations = []
    for size in image_sizes or (config["input_size"][-1],):
        batches = box_eval_loader(images, net, size, batch_size, workers)
        said = box_predictions(net, batches, images, size, given, Process(device))
        figures = {name: value for name, value in said.summary().items() if name not in ("images", "objects")}
        row = {"model": model, **figures, "param_count": round(count_params(net) / 1e6, 2), "img_size": size}
        evaluations.append(BoxEvaluation(row, said, split, unreadable))
    return evaluations


def boxes_of(data: BoxImages, names: list[str]) -> BoxImages:
    """`data` with the classes of a network: by name; by number where no name is the same but there are as many.

    Raises:
        DataError: If the data has other classes.
    """
    common = set(data.class_names) & set(names)
    if not common and len(data.class_names) == len(names):
        return data
    unknown = [name for name in data.class_names if name not in names]
    if unknown:
        raise DataError(
            f"there is a class {unknown[0]!r} that the network does not know; it has {', '.join(names[:20])}"
        )
    return with_names(data, names)


@dataclass(frozen=True)
class BoxEvaluation:
    """One detector at one image size: its figures as a row of a table, and what it found."""

    row: dict[str, Any]
    predictions: BoxPredictions
    split: str
    unreadable: dict[str, str]

    def in_words(self) -> str:
        """The line to print."""
        row = self.row
        by_area = ", ".join(f"{area} {_words(row[f'ap_{area}'])}" for area in AREAS[1:])
        seen = ", ".join(f"{area} {_words(row[f'input_ap_{area}'])}" for area in AREAS[1:])
        classes = ", ".join(f"{one['class']} {_words(one['ap'])}" for one in self.predictions.per_class())
        return (
            f"{row['img_size']} px: AP {_words(row['ap'])}, AP50 {_words(row['ap50'])}, AP75 {_words(row['ap75'])}; "
            f"{by_area} (as the network sees them: {seen}); {classes}; {len(self.predictions.data)} images of "
            f"{self.split}, {row['ms_prepare']:.1f} ms to read and prepare one, {row['ms_network']:.1f} ms in the "
            f"network, {row['ms_boxes']:.1f} ms to decode and suppress boxes"
        )

    def complaints(self) -> Iterator[str]:
        """What was left out of the images, and what is wrong with their boxes."""
        yield from (f"left out {name}: {error}" for name, error in self.unreadable.items())
        yield from (line.strip() for line in defects_in_words(self.predictions.data.defects))

    def write_tables(self, folder: Path) -> None:
        """Writes `per_class_N.csv`."""
        write_box_tables(self.predictions, folder, f"_{self.row['img_size']}")


def _words(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f} %"


def write_box_tables(said: BoxPredictions, folder: Path, suffix: str = "") -> None:
    """Writes `per_class.csv`."""
    classes = said.per_class()
    write_csv(folder / f"per_class{suffix}.csv", classes[0], [row.values() for row in classes])


def score(net: DetectionNet, batches: Batches, given: Input, process: Process) -> dict[str, float]:
    """`loss`, `ap` and `ap50` (per cent) over the images of `batches` of all processes."""
    images = batches.dataset
    said = box_predictions(net, batches, images.data, images.size, given, process)  # type: ignore[attr-defined]
    ap, ap50 = _mean(said.precision[..., 0]), _mean(said.precision[0, ..., 0])
    nothing = math.nan  # there is no object
    return {
        "loss": sum(said.losses.values()),
        "ap": nothing if ap is None else ap,
        "ap50": nothing if ap50 is None else ap50,
    }
