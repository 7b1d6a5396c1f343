"""How good a classifier is on labelled images: top-1 and top-5, each class, confusion, calibration."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from spd_zoo.complexity import count_params
from spd_zoo.data.check import check
from spd_zoo.data.labelled import (
    Batches,
    DataError,
    LabelledImages,
    eval_loader,
    eval_transform,
    normalize,
    open_data,
    read,
    with_classes,
)
from spd_zoo.files import write_csv
from spd_zoo.inference.classifier import check_classifier
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import Process, pick_device
from spd_zoo.weights.load import class_names, load_network

if TYPE_CHECKING:
    from spd_zoo.training.detection.metrics import BoxEvaluation

__all__ = ["Input", "Predictions", "evaluate", "predictions", "score"]


@dataclass(frozen=True)
class Input:
    """What a network takes: normalised images of some channels, on a device.

    Attributes:
        mean: Of each channel, on a scale from 0 to 1.
        std: Of each channel.
        device: Where the network computes.
        bf16: Whether autocast computes in bfloat16.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    bf16: bool = False

    @property
    def mode(self) -> str:
        """Pillow's name for the channels."""
        return "L" if len(self.mean) == 1 else "RGB"

    def autocast(self) -> Any:
        """The context in which the network computes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def _outputs(net: nn.Module, batches: Batches, given: Input, flip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, batch by batch; with `flip`, the mean of the logits of every image and its mirror image."""
    net.eval()
    total = None if isinstance(batches.dataset, IterableDataset) else len(batches)
    for images, labels in tqdm(read(batches), "evaluating", total, leave=False, disable=None, delay=5):
        x = normalize(images, given.mean, given.std, given.device)
        with torch.inference_mode(), given.autocast():
            logits = net(x).float()
            if flip:
                logits = (logits + net(x.flip(-1)).float()) / 2
        yield logits, labels.to(given.device)


def score(net: nn.Module, batches: Batches, given: Input, process: Process) -> dict[str, float]:
    """`loss`, `top1` and `top5` (per cent) over all images; with several processes over those of all, each once."""
    evaluator = ClassificationEvaluator(given.device)
    for logits, labels in _outputs(net, batches, given):
        evaluator.update(logits, labels)
    return dict(evaluator.compute(distributed=process.world > 1))


@dataclass(frozen=True)
class Predictions:
    """What a network said about labelled images: `logits` (N, classes) and `labels` (N,), on the CPU."""

    logits: Tensor
    labels: Tensor
    class_names: list[str]

    def top(self, k: int) -> float:
        """Share of images, in per cent, whose class is among the `k` with the largest logits."""
        best = self.logits.topk(min(k, self.logits.shape[1])).indices
        return 100 * (best == self.labels[:, None]).any(1).double().mean().item()

    def losses(self) -> Tensor:
        """Cross-entropy of each image, (N,)."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")

    def confusion(self) -> np.ndarray:
        """How many images of each class (rows) were taken for each class (columns)."""
        classes = len(self.class_names)
        pairs = self.labels * classes + self.logits.argmax(1)
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).numpy()

    def per_class(self) -> list[dict[str, Any]]:
        """Images, precision, recall and F1 of each class; F1 is 0 where nothing is right, None where nothing is."""
        confusion = self.confusion()
        right, images, taken = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        return [
            {
                "class": name,
                "images": int(images[i]),
                "precision": float(right[i] / taken[i]) if taken[i] else None,
                "recall": float(right[i] / images[i]) if images[i] else None,
                "f1": float(2 * right[i] / (images[i] + taken[i])) if images[i] + taken[i] else None,
            }
            for i, name in enumerate(self.class_names)
        ]

    def calibration(self, bins: int = 15) -> list[dict[str, float]]:
        """Images, mean confidence and accuracy, by confidence in `bins` equal steps; empty steps are left out.

        The confidence is the largest probability (Guo et al., On Calibration of Modern Neural Networks, 2017).
        """
        confidence, guess = self.logits.double().softmax(1).max(1)
        right = (guess == self.labels).double()
        step = (confidence * bins).ceil().clamp(1, bins)
        return [
            {
                "images": int(inside.sum()),
                "confidence": confidence[inside].mean().item(),
                "accuracy": right[inside].mean().item(),
            }
            for inside in (step == i for i in range(1, bins + 1))
            if inside.any()
        ]

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error: the mean distance between confidence and accuracy, from 0 to 1."""
        steps = self.calibration(bins)
        return sum(b["images"] * abs(b["confidence"] - b["accuracy"]) for b in steps) / len(self.labels)

    def summary(self) -> dict[str, float]:
        """The figures of a run: loss, top1 and top5 in per cent, mean F1 of the classes that occur, ece."""
        f1 = [row["f1"] for row in self.per_class() if row["f1"] is not None]
        return {
            "images": len(self.labels),
            "loss": self.losses().double().mean().item(),
            "top1": self.top(1),
            "top5": self.top(5),
            "macro_f1": sum(f1) / len(f1),
            "ece": self.ece(),
        }


def predictions(
    net: nn.Module, batches: Batches, names: list[str], given: Input, process: Process, flip: bool = False
) -> Predictions:
    """What the network says about all images, in their order; every process gets what all of them have found."""
    mine = [(logits.cpu(), labels.cpu()) for logits, labels in _outputs(net, batches, given, flip)]
    every = process.all_gather(mine)
    logits = torch.cat([logits for part in every for logits, _ in part])
    labels = torch.cat([labels for part in every for _, labels in part])
    ranks = range(process.world)
    dealt = [i for rank in ranks for i in range(rank, len(labels), process.world)]  # as `eval_loader` deals them
    order = torch.tensor(dealt).argsort()
    return Predictions(logits[order], labels[order], names)


@dataclass(frozen=True)
class Evaluation:
    """One network at one image size.

    Attributes:
        row: As timm's results tables have it.
        predictions: What the network said.
        split: The part of the data set.
        unreadable: Images that were left out, and why.
    """

    row: dict[str, Any]
    predictions: Predictions
    split: str
    unreadable: dict[str, str]

    def in_words(self) -> str:
        """The line to print."""
        figures = self.predictions.summary()
        return (
            f"{self.row['img_size']} px: top-1 {self.row['top1']:.2f} %, top-5 {self.row['top5']:.2f} %, mean F1 "
            f"{figures['macro_f1']:.3f}, ECE {figures['ece']:.3f}, {figures['images']} images of {self.split}"
        )

    def complaints(self) -> Iterator[str]:
        """What was left out of the images."""
        yield from (f"left out {name}: {error}" for name, error in self.unreadable.items())

    def write_tables(self, folder: Path) -> None:
        """Writes `per_class_N.csv` and `confusion_N.csv`."""
        write_tables(self.predictions, folder, f"_{self.row['img_size']}")


def evaluate(
    model: str,
    data: str | Path,
    split: str = "",
    image_sizes: Sequence[int] = (),
    flip: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    bf16: bool = False,
    image_column: str = "",
    label_column: str = "",
) -> "Sequence[Evaluation | BoxEvaluation]":
    """Evaluates a classifier or a detector on the images of a data set that can be read, one size after the other.

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, or the folder of a run.
        data: As `open_data` takes it, or for a detector `open_boxes`.
        split: Part of the data set; test, val or a lone split if not given.
        image_sizes: Pixels; the network's own input size if empty.
        flip: Whether to average the logits of every image and its mirror image; not for detectors.
        batch_size: Images in memory at once.
        workers: Processes that read images.
        device: torch device; a GPU if there is one, unless given.
        bf16: Whether to compute in bfloat16 where autocast allows it.
        image_column: As `open_data` takes it.
        label_column: As `open_data` takes it.

    Raises:
        DataError: If the data set cannot be used, or its classes are not the network's.
        ModelError: If there is no such network, or it cannot be used.
        ValueError: If an option has no meaning for a detector.
    """
    name = pick_device(device)
    net: Any = load_network(model, name)
    place = torch.device(name)
    if isinstance(net, DetectionNet):
        if flip or image_column or label_column:
            raise ValueError("flip, image_column and label_column are options for classifiers; leave them out")
        boxes = importlib.import_module("spd_zoo.training.detection.metrics")  # which needs packages that others do not
        found: list[BoxEvaluation] = boxes.evaluate_boxes(
            net, model, data, split, image_sizes, batch_size, workers, place, bf16
        )
        return found
    check_classifier(net, model)
    splits = (split,) if split else ("test", "val", "train")
    parts = ((name, open_data(data, name, image_column, label_column)) for name in splits)
    split, labelled = next(((name, part) for name, part in parts if part), ("", None))
    if labelled is None:
        raise DataError(f"{data} has no split {' or '.join(splits)}")
    cfg = net.pretrained_cfg
    images = with_classes_of(labelled, class_names(cfg))
    unreadable = check({split: images}, workers, Process(place))[split]["unreadable"]
    images = images.without(unreadable)
    config = resolve_data_config(pretrained_cfg=cfg)
    given = Input(config["mean"], config["std"], place, bf16)
    evaluations = []
    for size in image_sizes or (config["input_size"][-1],):
        if hasattr(net, "set_input_size"):
            net.set_input_size(size)
        transform = eval_transform(size, config["crop_pct"], config["interpolation"], config["crop_mode"])
        batches = eval_loader(images, transform, batch_size, workers, given.mode)
        said = predictions(net, batches, images.class_names, given, Process(place), flip)
        top1, top5 = round(said.top(1), 4), round(said.top(5), 4)
        row = {
            "model": model,
            "top1": top1,
            "top1_err": round(100 - top1, 4),
            "top5": top5,
            "top5_err": round(100 - top5, 4),
            "param_count": round(count_params(net) / 1e6, 2),
            "img_size": size,
            "crop_pct": config["crop_pct"],
            "interpolation": config["interpolation"],
        }
        evaluations.append(Evaluation(row, said, split, unreadable))
    return evaluations


def with_classes_of(data: LabelledImages, names: list[str]) -> LabelledImages:
    """`data` with the classes of a network: by name; by number where no name is the same but there are as many.

    Raises:
        DataError: If the data has other classes.
    """
    if set(data.class_names) & set(names):
        return with_classes(data, names)
    if len(data.class_names) != len(names):
        raise DataError(
            f"the data has {len(data.class_names)} classes ({data.class_names[0]}, ...), the network {len(names)} "
            f"({names[0]}, ...), and they have no name in common"
        )
    return data


def save(evaluations: "Sequence[Evaluation | BoxEvaluation]", folder: Path) -> None:
    """Writes `results.csv` (for classifiers with timm's columns), and tables of each image size."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [evaluation.row for evaluation in evaluations]
    write_csv(folder / "results.csv", rows[0], [row.values() for row in rows])
    for evaluation in evaluations:
        evaluation.write_tables(folder)


def write_tables(said: Predictions, folder: Path, suffix: str = "") -> None:
    """Writes `per_class.csv` and `confusion.csv` (true classes down, guesses across)."""
    classes = said.per_class()
    write_csv(folder / f"per_class{suffix}.csv", classes[0], [row.values() for row in classes])
    confusion = zip(said.class_names, said.confusion().tolist(), strict=True)
    rows = [[name, *counts] for name, counts in confusion]
    write_csv(folder / f"confusion{suffix}.csv", ["class", *said.class_names], rows)
