"""Plots of a detector's precision, recall and confusions, narrow enough to be read on a phone."""

from collections.abc import Sequence

import numpy as np

from spd_zoo.training.detection.curves import Curve, rates
from spd_zoo.training.page import draw_confusion, new_figure, plain, png

__all__ = ["BACKGROUND", "plot_confusion", "plot_curves"]

BACKGROUND = "background"
_WIDTH = 4.8  # inches, at 100 pixels per inch
_LEGEND = 8  # up to this many classes, the legend names each curve
_NUMBERS = 10  # up to this many classes, the cells of the confusion matrix have numbers
_LABELS = 40  # up to this many classes, its rows and columns have names


def plot_curves(precision: np.ndarray, curves: Sequence[Curve], names: Sequence[str]) -> bytes:
    """Precision by recall, and precision, recall and F1 by the minimum score; empty without matplotlib or objects.

    Args:
        precision: Precision of each class at 101 recalls from 0 to 1, (101, classes); -1 for classes without objects.
        curves: The curve of each class.
        names: The name of each class.

    Returns:
        A PNG.
    """
    present = [i for i, curve in enumerate(curves) if curve.objects]
    figure = new_figure(_WIDTH, 8)
    if figure is None or not present:
        return b""
    above, below = figure.subplots(2, 1)
    recalls = np.linspace(0, 1, 101)
    for i in present if len(present) > 1 else []:
        label = _short(names[i]) if len(present) <= _LEGEND else None
        above.plot(recalls, precision[:, i].clip(0), lw=1, alpha=0.9 if label else 0.3, label=label)
    label = "mean of the classes" if len(present) > 1 else _short(names[present[0]])
    above.plot(recalls, precision[:, present].clip(0).mean(1), color="black", lw=2.5, label=label)
    above.set(xlabel="recall", ylabel="precision", title="at an IoU of 0.5")
    scores = np.linspace(0, 1, 201)
    found = [rates(*curves[i].at(scores), curves[i].objects) for i in present]
    for column, colour in (("precision", "blue"), ("recall", "orange"), ("f1", "green")):
        values = np.array([each[column] for each in found])
        defined = np.isfinite(values).any(0)
        mean = np.nanmean(values[:, defined], 0)
        below.plot(scores[defined], mean, color=f"tab:{colour}", lw=2, label="F1" if column == "f1" else column)
    below.set(xlabel="minimum score", title="mean of the classes" if len(present) > 1 else _short(names[present[0]]))
    for axes in (above, below):
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return png(figure)


def plot_confusion(confusion: np.ndarray, names: Sequence[str]) -> bytes:
    """A confusion matrix, coloured by the share of each row; empty without matplotlib.

    Args:
        confusion: Objects down, boxes across, background last, (classes + 1, classes + 1).
        names: The name of each class.

    Returns:
        A PNG.
    """
    classes, labels = len(names), [*map(_short, names), BACKGROUND]
    side = max(_WIDTH, min(14.0, 2.5 + 0.32 * classes))
    figure = new_figure(side, side)
    if figure is None:
        return b""
    axes = figure.subplots()
    axes.set(xlabel="detected as (background: missed)", ylabel="object (background: none)")
    draw_confusion(axes, confusion, labels, with_labels=classes <= _LABELS, numbers=classes <= _NUMBERS)
    return png(figure)


def _short(name: str) -> str:
    """The first 30 characters of a name."""
    return plain(name[:30])
