"""What the figures of a report show, in a sentence each."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["halves", "on_calibration", "on_confusion", "on_errors", "on_training"]

FEW = 5  # with fewer epochs, curves show no trend
RISE = 1.05  # the validation loss counts as risen above this many times its lowest value
GAIN = 0.5  # percentage points in the last quarter of the epochs, above which longer training may help
PAIRS = 3  # confused classes that are named


def on_training(history: Sequence[dict[str, Any]], metric: str) -> str:
    """Whether training overfitted, or ended too early.

    Args:
        history: The metrics of each epoch, with `train_loss`, `val_loss` and `metric`.
        metric: The column to judge by, in per cent.
    """
    if len(history) < FEW:
        return f"Fewer than {FEW} epochs show no trend."
    loss = history[-1]["val_loss"]
    if not math.isfinite(loss):
        return "The validation loss is not finite after the last epoch; a smaller learning rate may help."
    lowest = min((row for row in history if math.isfinite(row["val_loss"])), key=lambda row: row["val_loss"])
    if loss > RISE * lowest["val_loss"] and history[-1]["train_loss"] < lowest["train_loss"]:
        return (
            f"Overfitting: the validation loss was lowest in epoch {lowest['epoch']} ({lowest['val_loss']:.3g}) and "
            f"rose to {loss:.3g}, while the training loss still fell; stronger augmentation, more images or fewer "
            "epochs may help."
        )
    scores = [row[metric] for row in history]
    earlier = max(scores[: -math.ceil(len(scores) / 4)])
    if max(scores) > earlier + GAIN:
        gain = f"{max(scores) - earlier:.1f} points in the last quarter of the epochs"
        return f"No overfitting, and a gain of {gain}: more of them may help (--epochs +{len(history)})."
    if loss > RISE * lowest["val_loss"]:
        return (
            f"The validation loss was lowest in epoch {lowest['epoch']} ({lowest['val_loss']:.3g}) and rose to "
            f"{loss:.3g}, and the training loss is not lower than then, either; a smaller learning rate may help."
        )
    return "No overfitting: the validation loss stayed near its lowest value; longer training would change little."


def on_confusion(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Which classes are confused most.

    Args:
        confusion: (classes, classes), images of each class (rows) that are predicted as each (columns).
        names: The names of the classes.
    """
    wrong = confusion - np.diag(confusion.diagonal())
    if not wrong.any():
        return f"All {confusion.sum()} images are classified correctly."
    shares = wrong / np.maximum(confusion.sum(1, keepdims=True), 1)
    pairs = [divmod(int(i), len(names)) for i in np.lexsort((-shares.ravel(), -wrong.ravel()))[:PAIRS]]
    found = [
        f"{names[true]} is taken for {names[predicted]} in {wrong[true, predicted]} of {confusion[true].sum()} images"
        for true, predicted in pairs
        if wrong[true, predicted]
    ]
    return f"Confused most often: {', '.join(found)}."


def on_calibration(confidence: float, accuracy: float, images: int) -> str:
    """Whether the predicted probabilities are too high or too low.

    Args:
        confidence: The mean probability of the predicted class.
        accuracy: The share of correct predictions.
        images: The number of predictions, on which chance depends.
    """
    error = 2 * math.sqrt(max(accuracy * (1 - accuracy), 1 / images) / images)  # two standard errors
    means = f"the mean confidence is {100 * confidence:.1f} %, and {100 * accuracy:.1f} % of the images are right"
    if abs(confidence - accuracy) <= error:
        return f"Calibrated as far as {images} images can show: {means}."
    return f"{'Overconfident' if confidence > accuracy else 'Underconfident'}: {means}."


def on_errors(wrong: int, images: int) -> str:
    """How many of the images on a sheet are classified wrongly."""
    return f"{wrong} of these {images} images {'is' if wrong == 1 else 'are'} classified wrongly."


def halves(order: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """The first and the last of some images, without repeats.

    Args:
        order: The images, the worst first.
        most: How many each half has at most.

    Returns:
        The worst, the worst first, and the best, the best first.
    """
    worst = list(order[: min(most, math.ceil(len(order) / 2))])
    return worst, list(order[len(worst) :][::-1][:most])
