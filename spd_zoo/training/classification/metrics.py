"""Metrics of a classifier: top-1 and top-5, metrics of each class, confusion, calibration."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from spd_zoo.console import bar_disabled
from spd_zoo.files import write_csv
from spd_zoo.process import Process
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.steps import Batches, read

__all__ = ["Predictions", "predict", "score"]


@dataclass(frozen=True)
class Predictions:
    """Predictions of a classifier for labelled images: `logits` (N, classes) and `labels` (N,), on the CPU."""

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
        """Confusion matrix (classes, classes): how many images of each class (rows) are predicted as each (columns)."""
        classes = len(self.class_names)
        pairs = self.labels * classes + self.logits.argmax(1)
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).numpy()

    def per_class(self) -> list[dict[str, Any]]:
        """Images, precision, recall and F1 of each class.

        F1 is 0 without a correct prediction, and None if the class is neither labelled nor predicted. Precision is None
        if the class is never predicted, recall if it never occurs.
        """
        confusion = self.confusion()
        correct, images, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        return [
            {
                "class": name,
                "images": int(images[i]),
                "precision": float(correct[i] / predicted[i]) if predicted[i] else None,
                "recall": float(correct[i] / images[i]) if images[i] else None,
                "f1": float(2 * correct[i] / (images[i] + predicted[i])) if images[i] + predicted[i] else None,
            }
            for i, name in enumerate(self.class_names)
        ]

    def calibration(self, bins: int = 15) -> list[dict[str, float]]:
        """Images, mean confidence and accuracy of each of `bins` equal ranges of confidence that has images.

        The confidence is the largest probability (Guo et al., On Calibration of Modern Neural Networks, 2017).
        """
        confidence, predicted = self.logits.double().softmax(1).max(1)
        correct = (predicted == self.labels).double()
        bin_of = (confidence * bins).ceil().clamp(1, bins)
        return [
            {
                "images": int(inside.sum()),
                "confidence": confidence[inside].mean().item(),
                "accuracy": correct[inside].mean().item(),
            }
            for inside in (bin_of == i for i in range(1, bins + 1))
            if inside.any()
        ]

    def ece(self, bins: int = 15) -> float:
        """Expected calibration error: the mean distance between confidence and accuracy, from 0 to 1."""
        ranges = self.calibration(bins)
        return sum(b["images"] * abs(b["confidence"] - b["accuracy"]) for b in ranges) / len(self.labels)

    def summary(self) -> dict[str, float]:
        """Images, loss, top1 and top5 in per cent, mean F1 of the classes that have one, expected calibration error."""
        f1 = [row["f1"] for row in self.per_class() if row["f1"] is not None]
        return {
            "images": len(self.labels),
            "loss": self.losses().double().mean().item(),
            "top1": self.top(1),
            "top5": self.top(5),
            "macro_f1": sum(f1) / len(f1),
            "ece": self.ece(),
        }

    def columns(self) -> dict[str, float]:
        """The accuracy columns of timm's results tables."""
        top1, top5 = round(self.top(1), 4), round(self.top(5), 4)
        return {"top1": top1, "top1_err": round(100 - top1, 4), "top5": top5, "top5_err": round(100 - top5, 4)}

    def headline(self) -> str:
        """The most important figures."""
        figures = self.summary()
        return f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %, mean F1 {figures['macro_f1']:.3f}"

    def in_words(self) -> str:
        """All figures on one line."""
        return f"{self.headline()}, ECE {self.ece():.3f}"

    def notes(self) -> list[str]:
        """Nothing: every image counts."""
        return []

    def write_tables(self, folder: Path, suffix: str = "") -> None:
        """Writes `per_class.csv` and `confusion.csv` (true classes down, predicted classes across)."""
        classes = self.per_class()
        write_csv(folder / f"per_class{suffix}.csv", classes[0], [row.values() for row in classes])
        confusion = zip(self.class_names, self.confusion().tolist(), strict=True)
        rows = [[name, *counts] for name, counts in confusion]
        write_csv(folder / f"confusion{suffix}.csv", ["class", *self.class_names], rows)


def _outputs(
    net: nn.Module, batches: Batches, preprocessing: Preprocessing, flip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, batch by batch; with `flip`, the mean of the logits of every image and its mirror image."""
    net.eval()
    total = None if isinstance(batches.dataset, IterableDataset) else len(batches)
    for pixels, labels in tqdm(read(batches), "evaluating", total, leave=False, disable=bar_disabled(), delay=5):
        images = preprocessing.normalize(pixels)
        with torch.inference_mode(), preprocessing.autocast():
            logits = net(images).float()
            if flip:
                logits = (logits + net(images.flip(-1)).float()) / 2
        yield logits, labels.to(preprocessing.device)


def score(net: nn.Module, batches: Batches, preprocessing: Preprocessing, process: Process) -> dict[str, float]:
    """`loss`, `top1` and `top5` (per cent) over the images of all processes."""
    evaluator = ClassificationEvaluator(preprocessing.device)
    for logits, labels in _outputs(net, batches, preprocessing):
        evaluator.update(logits, labels)
    return dict(evaluator.compute(distributed=process.world > 1))


def predict(
    net: nn.Module,
    batches: Batches,
    class_names: list[str],
    preprocessing: Preprocessing,
    process: Process,
    flip: bool = False,
) -> Predictions:
    """Predictions for the images of all processes, in the order of the data set; every process gets all of them.

    Args:
        net: The classifier.
        batches: This process's images, from `eval_loader`.
        class_names: The names of its classes.
        preprocessing: The network's preprocessing, device and precision.
        process: This process.
        flip: Whether to average the logits of every image and its mirror image.

    Returns:
        The predictions.
    """
    mine = [(logits.cpu(), labels.cpu()) for logits, labels in _outputs(net, batches, preprocessing, flip)]
    gathered = process.all_gather(mine)
    logits = torch.cat([logits for batches_of_rank in gathered for logits, _ in batches_of_rank])
    labels = torch.cat([labels for batches_of_rank in gathered for _, labels in batches_of_rank])
    ranks = range(process.world)
    indices = [i for rank in ranks for i in range(rank, len(labels), process.world)]  # the order of `eval_loader`
    order = torch.tensor(indices).argsort()
    return Predictions(logits[order], labels[order], class_names)
