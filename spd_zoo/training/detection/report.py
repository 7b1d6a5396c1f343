"""The report of a detector's run: curves, tables, and images with true and predicted boxes."""

from collections.abc import Sequence
from typing import Any

from spd_zoo.data.notes import count
from spd_zoo.training import comments
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.detection.metrics import BoxPredictions
from spd_zoo.training.page import new_figure, page, png, table
from spd_zoo.training.run import RunFolder

__all__ = ["write"]


def write(
    folder: RunFolder,
    config: FinetuneConfig,
    history: Sequence[dict[str, Any]],
    predictions: BoxPredictions,
    notes: Sequence[str] = (),
) -> None:
    """Writes `report.html`, `figures/*.png` and the tables; without matplotlib there are no curves."""
    with folder.writing("report.html"):
        predictions.write_tables(folder.path)
        pictures = folder.path / "figures"
        figures = {file.stem: file.read_bytes() for file in pictures.glob("*.png")}
        curves = _curves(history)
        if curves:
            figures["curves"] = curves
            (pictures / "curves.png").write_bytes(curves)
    if (folder.path / "data.png").exists():
        figures["data"] = (folder.path / "data.png").read_bytes()
    numbers = predictions.summary()
    summary = {"images": str(numbers["images"]), "objects": str(numbers["objects"])}
    summary |= {f"AP{name[2:]}": _percent(numbers[name]) for name in ("ap", "ap50", "ap75")}
    for name, title in (("precision", "precision"), ("recall", "recall"), ("f1", "F1")):
        summary[f"{title} at the best minimum scores, mean of the classes"] = _percent(numbers[name])
    for prefix, where in (("", "in the image's pixels"), ("input_", "at the network's input")):
        for area in ("small", "medium", "large"):
            summary[f"AP of {area} objects, {where}"] = _percent(numbers[f"{prefix}ap_{area}"])
    stages = {
        "prepare": "reading and preprocessing an image",
        "network": "the network",
        "boxes": "decoding and NMS",
    }
    summary |= {f"time of {words}": f"{predictions.milliseconds[name]:.1f} ms" for name, words in stages.items()}
    rows = sorted(predictions.per_class(), key=lambda row: row["ap"] if row["ap"] is not None else 101)
    columns = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "precision": "precision", "recall": "recall", "f1": "F1"}
    columns |= {f"input_ap_{area}": area for area in ("small", "medium", "large")}
    cells = [
        [
            row["class"],
            row["objects"],
            "" if row["score"] is None else f"{row['score']:.2f}",
            *(_percent(row[name]) for name in columns),
        ]
        for row in rows
    ]
    classes = table(["class", "objects", "score", *columns.values()], cells)
    by_size = predictions.by_size()
    sizes = [[row["size"], row["objects"], row["detected"], _percent(row["recall"])] for row in by_size]
    classes += (
        "<p>score: the minimum score with the best F1, at which precision, recall and F1 are measured (IoU 0.5). "
        "Small, medium and large: AP by size at the network's input</p><h2>Recall by size at the network's input</h2>"
        + table(["root of the area", "objects", "detected", "recall"], sizes)
    )
    colours = "correct boxes are green, wrong ones red, missed objects yellow"
    titles = {
        "curves": "Training",
        "precision_recall": "Precision and recall",
        "confusion": "Confusion: rows are objects, columns what they are detected as",
        "false_positives": "False positives, the most certain first (red)",
        "missed": "Missed objects, the largest first (yellow)",
        "worst": f"Worst images: {colours}",
        "best": f"Best images: {colours}",
    }
    titles |= {"data": "Training images: sizes and positions of boxes, and some images"}
    remarks = {name: _errors(predictions, chosen) for name, chosen in predictions.halves.items()}
    remarks |= {"curves": comments.on_training(history, "val_ap"), "confusion": _confused(predictions)}
    folder.write("report.html", page(config, history, summary, titles, figures, classes, notes, remarks))


def _curves(history: Sequence[dict[str, Any]]) -> bytes:
    """Losses and AP by epoch as PNG; empty without matplotlib."""
    figure = new_figure(5.5, 6)
    if figure is None:
        return b""
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] for row in history]
    losses = [name for name in history[0] if name.startswith("train_") or name == "val_loss"]
    for axes, names in ((above, losses), (below, ["val_ap50", "val_ap"])):
        for name in names:
            axes.plot(epochs, [row[name] for row in history], ".-", label=name.replace("_", " "))
        axes.legend()
        axes.grid(alpha=0.3)
    above.set(ylabel="loss", yscale="log")
    below.set(xlabel="epoch", ylabel="%", ylim=(0, 101))
    return png(figure)


def _errors(predictions: BoxPredictions, indices: Sequence[int]) -> str:
    """What is wrong in some images, in one sentence."""
    outcomes = [predictions.outcomes[i] for i in indices]
    right, wrong, missed = (
        sum(int(number) for number in numbers)
        for numbers in zip(
            *((each.correct.sum(), each.wrong.sum(), (~each.detected).sum()) for each in outcomes),
            strict=True,
        )
    )
    return (
        f"With the best minimum scores: {count(right, 'correct box', 'correct boxes')}, "
        f"{count(wrong, 'wrong box', 'wrong boxes')}, {count(missed, 'missed object')}."
    )


def _confused(predictions: BoxPredictions) -> str:
    """What the confusion matrix shows, in one sentence."""
    confusion = predictions.confusion
    right, objects = int(confusion.diagonal().sum()), int(confusion[:-1].sum())
    missed, background = int(confusion[:-1, -1].sum()), int(confusion[-1].sum())
    return (
        f"Of {objects} objects, {right} are detected, {objects - right - missed} are taken for another class and "
        f"{missed} are missed; {background} boxes lie on none of these."
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"
