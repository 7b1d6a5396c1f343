"""Which detections are correct at an IoU of 0.5, and what follows: precision and recall over the score, confusions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from spd_zoo.data.boxes import EVERY_CLASS, Objects
from spd_zoo.inference.detector import Detections

__all__ = [
    "FALSE_POSITIVE",
    "IN_IGNORED",
    "IOU",
    "Curve",
    "Outcome",
    "confusion_matrix",
    "curves",
    "match",
    "outcome",
    "rates",
]

IOU = 0.5  # minimum, with an object of its class, of a correct detection
FALSE_POSITIVE, IN_IGNORED = -1, -2  # in place of the index of an object


def match(detections: Detections, objects: Objects) -> Tensor:
    """The object that each detection of an image detects, by COCO's rules at an IoU of `IOU`.

    By descending score, each detection is matched with the unmatched object of its class that it overlaps most. Lower
    scores therefore change nothing, and the result holds for every minimum score.

    Args:
        detections: The detections in an image.
        objects: Its objects.

    Returns:
        For each detection the index of its object, `FALSE_POSITIVE`, or `IN_IGNORED`, which is neither correct nor
        wrong, (D,).
    """
    found = torch.full((len(detections),), FALSE_POSITIVE)
    if not len(detections) or not len(objects.labels):
        return found
    boxes = detections.boxes.double()
    iou = box_iou(boxes, objects.boxes.double())
    iou[(detections.labels[:, None] != objects.labels) & (objects.labels != EVERY_CLASS)] = 0
    # a box only has to lie inside an ignored region, not to cover it; iou / (1 + iou) is intersection / sum of areas
    sums = box_area(boxes)[:, None] + box_area(objects.boxes.double())
    inside = iou / (1 + iou) * sums / box_area(boxes)[:, None]
    found[(inside * objects.ignored).amax(1) >= IOU] = IN_IGNORED
    taken = objects.ignored.clone()
    overlaps = (iou.masked_fill(taken, 0) >= IOU).any(1)
    for i in detections.scores.argsort(descending=True, stable=True).tolist():
        if overlaps[i]:
            best, index = iou[i].masked_fill(taken, 0).max(0)
            if best >= IOU:
                found[i], taken[index] = index, True
    return found


@dataclass(frozen=True)
class Curve:
    """The numbers of correct and of wrong boxes of a class at each minimum score.

    Attributes:
        objects: The number of its objects.
        scores: The scores that occur, descending, (S,); entry i of the others counts boxes of at least `scores[i]`.
        correct: The number of correct boxes.
        wrong: The number of wrong boxes.
    """

    objects: int
    scores: np.ndarray
    correct: np.ndarray
    wrong: np.ndarray

    def threshold(self) -> float | None:
        """The minimum score with the highest F1, in the middle between two scores that occur.

        The highest if several have the same F1; None if no box is correct.
        """
        if not self.correct.any():
            return None
        best = int(rates(self.correct, self.wrong, self.objects)["f1"].argmax())
        higher, lower = float(self.scores[best]), float(self.scores[best + 1]) if best + 1 < len(self.scores) else 0.0
        rounded = round((higher + lower) / 2, 4)
        return rounded if lower < rounded < higher else (higher + lower) / 2

    def at(self, minimum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of correct and of wrong boxes with scores above each minimum."""
        above = np.searchsorted(-self.scores, -minimum, side="left")
        return np.append(0, self.correct)[above], np.append(0, self.wrong)[above]


def rates(correct: np.ndarray, wrong: np.ndarray, objects: int) -> dict[str, np.ndarray]:
    """`precision`, `recall` and `f1`, from 0 to 1; NaN where they are undefined.

    Args:
        correct: Numbers of correct boxes.
        wrong: Numbers of wrong boxes.
        objects: The number of objects.
    """
    with np.errstate(invalid="ignore"):
        precision, recall = correct / (correct + wrong), np.divide(correct, objects)
        return {"precision": precision, "recall": recall, "f1": 2 * correct / (correct + wrong + objects)}


def curves(detections: Sequence[Detections], matches: Sequence[Tensor], counts: Sequence[int]) -> list[Curve]:
    """The curve of each class.

    Args:
        detections: The detections in each image.
        matches: What `match` returned for each image.
        counts: How many objects each class has.
    """
    scores, labels, found = (
        torch.cat([torch.zeros(0), *parts]).double().numpy()
        for parts in ([d.scores for d in detections], [d.labels for d in detections], matches)
    )
    result = []
    for label, objects in enumerate(counts):
        mine = (labels == label) & (found != IN_IGNORED)
        order = np.argsort(-scores[mine], kind="stable")
        ordered, right = scores[mine][order], np.cumsum(found[mine][order] >= 0)
        last = np.flatnonzero(np.diff(ordered, append=-1))  # the last of the boxes with the same score
        result.append(Curve(objects, ordered[last], right[last], last + 1 - right[last]))
    return result


@dataclass(frozen=True)
class Outcome:
    """The boxes of an image with a score above the minimum of their class.

    Attributes:
        boxes: Their indices among the image's detections, (D,).
        matches: What each detects, as `match` returns it, (D,).
        detected: Which objects are detected, (M,); what is ignored counts as detected.
    """

    boxes: Tensor
    matches: Tensor
    detected: Tensor

    @property
    def correct(self) -> Tensor:
        """Which boxes detect an object, (D,)."""
        return self.matches >= 0

    @property
    def wrong(self) -> Tensor:
        """Which boxes are false positives, (D,)."""
        return self.matches == FALSE_POSITIVE

    def f1(self) -> float:
        """F1 of the image; 1 if there are neither boxes nor objects."""
        right, wrong, missed = (int(each.sum()) for each in (self.correct, self.wrong, ~self.detected))
        return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def outcome(detections: Detections, objects: Objects, matches: Tensor, thresholds: Sequence[float]) -> Outcome:
    """The boxes above the minimum score of their class, and the objects that these detect.

    Args:
        detections: The detections in an image.
        objects: Its objects.
        matches: What `match` returned.
        thresholds: The minimum score of each class.
    """
    above = detections.scores.double() > torch.tensor(thresholds, dtype=torch.float64)[detections.labels]
    boxes = above.nonzero().squeeze(1)
    boxes = boxes[detections.scores[boxes].argsort(descending=True, stable=True)]
    detected = objects.ignored.clone()
    detected[matches[boxes][matches[boxes] >= 0]] = True
    return Outcome(boxes, matches[boxes], detected)


def confusion_matrix(
    detections: Sequence[Detections], objects: Sequence[Objects], outcomes: Sequence[Outcome], classes: int
) -> np.ndarray:
    """How often an object of each class is detected as each class.

    Correct boxes are those of `match`. By descending score, each remaining box is then matched with the
    unmatched object of another class that it overlaps most, if the IoU is at least `IOU`.

    Args:
        detections: The detections in each image.
        objects: Its objects.
        outcomes: What `outcome` returned for each image.
        classes: The number of classes.

    Returns:
        (classes + 1, classes + 1): objects down, boxes across, and background last: missed objects are in the last
        column, boxes without an object in the last row.
    """
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for found, truth, result in zip(detections, objects, outcomes, strict=True):
        free = ~result.detected
        guesses = found.labels[result.boxes]
        for index, guess in zip(result.matches.tolist(), guesses.tolist(), strict=True):
            if index >= 0:
                matrix[truth.labels[index], guess] += 1
        wrong = result.wrong.nonzero().squeeze(1)
        iou = box_iou(found.boxes[result.boxes[wrong]].double(), truth.boxes.double())
        for row, guess in zip(iou, guesses[wrong].tolist(), strict=True):
            best, index = row.masked_fill(~free, 0).max(0) if len(row) else (torch.zeros(()), torch.zeros(()))
            if best >= IOU:
                free[index] = False
                matrix[truth.labels[index], guess] += 1
            else:
                matrix[classes, guess] += 1
        for label in truth.labels[free].tolist():
            matrix[label, classes] += 1
    return matrix
