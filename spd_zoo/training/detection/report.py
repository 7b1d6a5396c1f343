"""What a detector's run has come to, for the eye: curves, tables, and images with true and found boxes."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

from spd_zoo.data.boxes import Objects
from spd_zoo.inference.detector import Detections
from spd_zoo.training.classification.report import fitting, page, png, table
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.detection.metrics import BoxPredictions, write_box_tables
from spd_zoo.training.run import RunFolder

__all__ = ["box_sheet", "matches", "write"]

TILE, ACROSS, SHOWN = 320, 3, 9  # pixels of an image on a sheet, images in a row, images on it
SURE, OVERLAP = 0.25, 0.5  # the score of boxes that are drawn, and the IoU of those that are right


def write(folder: RunFolder, config: FinetuneConfig, history: Sequence[dict[str, Any]], said: BoxPredictions) -> None:
    """Writes `report.html`, and what it shows: `figures/*.png` and `per_class.csv`. Without matplotlib, no curves."""
    with folder.writing("report.html"):
        write_box_tables(said, folder.path)
        pictures = folder.path / "figures"
        pictures.mkdir(exist_ok=True)
        order = sorted(range(len(said.data)), key=lambda i: image_f1(said.found[i], said.data.shown(i)))
        worst, best = box_sheet(said, order[:SHOWN]), box_sheet(said, order[::-1][:SHOWN])
        figures = {
            name: data for name, data in (("curves", _curves(history)), ("worst", worst), ("best", best)) if data
        }
        for name, data in figures.items():
            (pictures / f"{name}.png").write_bytes(data)
    summary = said.summary()
    top = {"images": str(summary["images"]), "objects": str(summary["objects"])}
    top |= {f"AP{name[2:]}": _percent(summary[name]) for name in ("ap", "ap50", "ap75")}
    for prefix, where in (("", "in the image's pixels"), ("input_", "in what the network sees")):
        for area in ("small", "medium", "large"):
            top[f"AP of {area} objects, {where}"] = _percent(summary[f"{prefix}ap_{area}"])
    stages = {
        "prepare": "reading and preparing an image",
        "network": "the network",
        "boxes": "decoding and suppression",
    }
    top |= {f"time of {words}": f"{said.milliseconds[name]:.1f} ms" for name, words in stages.items()}
    rows = sorted(said.per_class(), key=lambda row: row["ap"] if row["ap"] is not None else 101)
    header = ["class", "objects", *(name.upper() for name in ("ap", "ap50", "ap75")), "small", "medium", "large"]
    names = ("ap", "ap50", "ap75", "input_ap_small", "input_ap_medium", "input_ap_large")
    cells = [[row["class"], row["objects"], *(_percent(row[name]) for name in names)] for row in rows]
    colours = "boxes that are right are green, wrong ones red, missed objects yellow"
    titles = {"curves": "Training", "worst": f"Worst images: {colours}", "best": f"Best images: {colours}"}
    folder.write("report.html", page(config, history, top, titles, figures, table(header, cells)))


def _curves(history: Sequence[dict[str, Any]]) -> bytes:
    """Losses and AP by epoch as PNG; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return b""
    figure = Figure((10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses = [name for name in history[0] if name.startswith("train_") or name == "val_loss"]
    for axes, names in ((left, losses), (right, ["val_ap50", "val_ap"])):
        for name in names:
            axes.plot(epochs, [row[name] for row in history], ".-", label=name.replace("_", " "))
        axes.legend()
        axes.grid(alpha=0.3)
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    right.set(xlabel="epoch", ylabel="%", ylim=(0, 101))
    return png(figure)


def matches(found: Detections, shown: Objects) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the boxes that the network is sure of are right: the best first, each takes the object it overlaps most.

    Returns:
        The sure boxes as places in `found` (D,), whether each is right (D,), and whether each object was found (M,).
        Crowds count as found, and what lies in one is no mistake.
    """
    sure = (found.scores >= SURE).nonzero().squeeze(1)
    right, hit = torch.zeros(len(sure), dtype=torch.bool), shown.crowd.clone()
    if len(sure) and len(hit):
        overlap = box_iou(found.boxes[sure], shown.boxes)
        overlap[found.labels[sure][:, None] != shown.labels] = 0
        for i in range(len(sure)):
            best, object_ = overlap[i].masked_fill(hit & ~shown.crowd, 0).max(0)
            if best >= OVERLAP:
                right[i] = hit[object_] = True
    return sure, right, hit


def image_f1(found: Detections, shown: Objects) -> float:
    """F1 of the boxes that the network is sure of in one image; 1 where there is nothing and nothing was found."""
    _, right, hit = matches(found, shown)
    return 2 * int(right.sum()) / (len(right) + len(hit)) if len(right) + len(hit) else 1.0


def box_sheet(said: BoxPredictions, indices: Sequence[int]) -> bytes:
    """A PNG of the images at `indices`: boxes that are right in green, wrong ones in red, missed objects in yellow."""
    rows = -(-len(indices) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (TILE + 8), rows * (TILE + 22)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(indices):
        left, top = place % ACROSS * (TILE + 8), place // ACROSS * (TILE + 22)
        image = said.data.image(index)
        scale = TILE / max(image.size)
        tile = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        pen = ImageDraw.Draw(tile)
        found, shown = said.found[index], said.data.shown(index)
        sure, right, hit = matches(found, shown)
        for box, label in zip(shown.boxes[~hit], shown.labels[~hit], strict=True):
            _box(pen, box * scale, said.data.class_names[label], "yellow")
        for i, good in zip(sure.tolist(), right.tolist(), strict=True):
            text = f"{said.data.class_names[found.labels[i]]} {100 * found.scores[i]:.0f}%"
            _box(pen, found.boxes[i] * scale, text, "lime" if good else "red")
        sheet.paste(tile, (left, top))
        words = f"{int(right.sum())} right, {int((~right).sum())} wrong, {int((~hit).sum())} missed"
        draw.text((left, top + TILE + 4), words, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()


def _box(draw: ImageDraw.ImageDraw, box: Tensor, text: str, colour: str) -> None:
    x1, y1, x2, y2 = box.tolist()
    draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour)
    draw.text((x1 + 2, y1), fitting(draw, text, max(x2 - x1, 40)), fill=colour)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"
