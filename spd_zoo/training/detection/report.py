"""The report of a detector's run: curves, tables, and images with true and predicted boxes."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_area, box_iou

from spd_zoo.data.boxes import EVERY_CLASS, Objects
from spd_zoo.inference.detector import Detections
from spd_zoo.training import comments
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.detection.metrics import BoxPredictions
from spd_zoo.training.page import fitting, image_png, page, png, table
from spd_zoo.training.run import RunFolder

__all__ = ["box_sheet", "matches", "write"]

TILE, COLUMNS, IMAGES = 320, 3, 9  # contact sheet: pixels per image, images per row, number of images
SCORE, IOU = 0.25, 0.5  # minimum score of drawn boxes; minimum IoU with an object of correct ones


def write(
    folder: RunFolder,
    config: FinetuneConfig,
    history: Sequence[dict[str, Any]],
    predictions: BoxPredictions,
    notes: Sequence[str] = (),
) -> None:
    """Writes `report.html`, `figures/*.png` and `per_class.csv`; without matplotlib there are no curves."""
    with folder.writing("report.html"):
        predictions.write_tables(folder.path)
        pictures = folder.path / "figures"
        pictures.mkdir(exist_ok=True)
        order = sorted(
            range(len(predictions.data)),
            key=lambda i: image_f1(predictions.detections[i], predictions.data.objects_in(i)),
        )
        halves = dict(zip(("worst", "best"), comments.halves(order, IMAGES), strict=True))
        sheets = [(name, box_sheet(predictions, chosen)) for name, chosen in halves.items() if chosen]
        figures = {name: png for name, png in (("curves", _curves(history)), *sheets) if png}
        for name, content in figures.items():
            (pictures / f"{name}.png").write_bytes(content)
    if (folder.path / "data.png").exists():
        figures["data"] = (folder.path / "data.png").read_bytes()
    numbers = predictions.summary()
    summary = {"images": str(numbers["images"]), "objects": str(numbers["objects"])}
    summary |= {f"AP{name[2:]}": _percent(numbers[name]) for name in ("ap", "ap50", "ap75")}
    for prefix, where in (("", "in the image's pixels"), ("input_", "in what the network sees")):
        for area in ("small", "medium", "large"):
            summary[f"AP of {area} objects, {where}"] = _percent(numbers[f"{prefix}ap_{area}"])
    stages = {
        "prepare": "reading and preprocessing an image",
        "network": "the network",
        "boxes": "decoding and NMS",
    }
    summary |= {f"time of {words}": f"{predictions.milliseconds[name]:.1f} ms" for name, words in stages.items()}
    rows = sorted(predictions.per_class(), key=lambda row: row["ap"] if row["ap"] is not None else 101)
    header = ["class", "objects", *(name.upper() for name in ("ap", "ap50", "ap75")), "small", "medium", "large"]
    names = ("ap", "ap50", "ap75", "input_ap_small", "input_ap_medium", "input_ap_large")
    cells = [[row["class"], row["objects"], *(_percent(row[name]) for name in names)] for row in rows]
    colours = "correct boxes are green, wrong ones red, missed objects yellow"
    titles = {"curves": "Training", "worst": f"Worst images: {colours}", "best": f"Best images: {colours}"}
    remarks = {name: _errors(predictions, chosen) for name, chosen in halves.items()}
    remarks |= {"curves": comments.on_training(history, "val_ap")}
    titles |= {"data": "Training images: sizes and positions of boxes, and some images"}
    folder.write("report.html", page(config, history, summary, titles, figures, table(header, cells), notes, remarks))


def _curves(history: Sequence[dict[str, Any]]) -> bytes:
    """Losses and AP by epoch as PNG; empty without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return b""
    figure = Figure((5.5, 6), layout="constrained")
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


def matches(detections: Detections, objects: Objects) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the boxes with a score of at least `SCORE` are correct.

    The best box comes first, and each takes the object of its class that it overlaps most.

    Returns:
        The boxes as indices into `detections` (D,), whether each is correct (D,), and whether each object is detected
        (M,). What is ignored counts as detected, and boxes on it as correct.
    """
    drawn = (detections.scores >= SCORE).nonzero().squeeze(1)
    correct, detected = torch.zeros(len(drawn), dtype=torch.bool), objects.ignored.clone()
    if len(drawn) and len(detected):
        boxes, ignored = detections.boxes[drawn], objects.ignored
        iou = box_iou(boxes, objects.boxes)
        iou[(detections.labels[drawn][:, None] != objects.labels) & (objects.labels != EVERY_CLASS)] = 0
        # of what is ignored a box needs to lie in it, not to cover it; iou / (1 + iou) is intersection / sum of areas
        sums = box_area(boxes)[:, None] + box_area(objects.boxes)
        in_ignored = ((iou / (1 + iou) * sums / box_area(boxes)[:, None]) * ignored).amax(1) >= IOU
        for i in range(len(drawn)):
            best, index = iou[i].masked_fill(detected, 0).max(0)
            if best >= IOU:
                correct[i] = detected[index] = True
            else:
                correct[i] = in_ignored[i]
    return drawn, correct, detected


def _errors(predictions: BoxPredictions, indices: Sequence[int]) -> str:
    """What is wrong in some images, in one sentence."""
    right, wrong, confused, missed = 0, 0, 0, 0
    for index in indices:
        detections, objects = predictions.detections[index], predictions.data.objects_in(index)
        drawn, correct, detected = matches(detections, objects)
        on_object = box_iou(detections.boxes[drawn[~correct]], objects.boxes) >= IOU
        other_class = detections.labels[drawn[~correct]][:, None] != objects.labels
        right, wrong = right + int(correct.sum()), wrong + int((~correct).sum())
        confused, missed = confused + int((on_object & other_class).any(1).sum()), missed + int((~detected).sum())
    return (
        f"With a score of {SCORE} or more, {right} boxes are correct, {wrong} are wrong ({confused} of them on an "
        f"object of another class), and {missed} objects are missed."
    )


def image_f1(detections: Detections, objects: Objects) -> float:
    """F1 of the boxes of one image with a score of at least `SCORE`; 1 if there are neither boxes nor objects."""
    _, correct, detected = matches(detections, objects)
    return 2 * int(correct.sum()) / (len(correct) + len(detected)) if len(correct) + len(detected) else 1.0


def box_sheet(predictions: BoxPredictions, indices: Sequence[int]) -> bytes:
    """A PNG of the images at `indices`: correct boxes in green, wrong ones in red, missed objects in yellow."""
    rows = -(-len(indices) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 8), rows * (TILE + 22)), "white")
    draw = ImageDraw.Draw(sheet)
    names = predictions.data.class_names
    for position, index in enumerate(indices):
        left, top = position % COLUMNS * (TILE + 8), position // COLUMNS * (TILE + 22)
        image = predictions.data.image(index)
        scale = TILE / max(image.size)
        tile = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        pen = ImageDraw.Draw(tile)
        detections, objects = predictions.detections[index], predictions.data.objects_in(index)
        drawn, correct, detected = matches(detections, objects)
        for box, label in zip(objects.boxes[~detected], objects.labels[~detected], strict=True):
            _box(pen, box * scale, names[label], "yellow")
        for i, is_correct in zip(drawn.tolist(), correct.tolist(), strict=True):
            text = f"{names[detections.labels[i]]} {100 * detections.scores[i]:.0f}%"
            _box(pen, detections.boxes[i] * scale, text, "lime" if is_correct else "red")
        sheet.paste(tile, (left, top))
        words = f"{int(correct.sum())} correct, {int((~correct).sum())} wrong, {int((~detected).sum())} missed"
        draw.text((left, top + TILE + 4), words, fill="black")
    return image_png(sheet)


def _box(draw: ImageDraw.ImageDraw, box: Tensor, text: str, colour: str) -> None:
    x1, y1, x2, y2 = box.tolist()
    draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour)
    draw.text((x1 + 2, y1), fitting(draw, text, max(x2 - x1, 40)), fill=colour)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"
