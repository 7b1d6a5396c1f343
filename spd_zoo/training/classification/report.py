"""What a run has come to, for the eye: figures, tables, and one HTML file that holds them all."""

import base64
import html
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from spd_zoo.data.labelled import LabelledImages, StreamedImages
from spd_zoo.training.config import FinetuneConfig, to_yaml
from spd_zoo.training.evaluate import Predictions, write_tables
from spd_zoo.training.run import RunFolder

__all__ = ["contact_sheet", "fitting", "page", "png", "short", "table", "write"]

TILE, ACROSS, SHOWN = 96, 8, 24  # pixels of an image on a contact sheet, images in a row, images on it

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .15rem .8rem; text-align: right }
th { border-bottom: 2px solid #999 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f4f4f4 } img { max-width: 100%; height: auto }
pre { background: #f4f4f4; padding: 1rem }
"""


def write(
    folder: RunFolder,
    config: FinetuneConfig,
    history: Sequence[dict[str, Any]],
    said: Predictions,
    data: LabelledImages | StreamedImages,
) -> None:
    """Writes `report.html`, and what it shows: `figures/*.png`, `per_class.csv` and `confusion.csv`.

    Without matplotlib there are no curves; of a stream there are no images.
    """
    with folder.writing("report.html"):
        write_tables(said, folder.path)
        pictures = folder.path / "figures"
        pictures.mkdir(exist_ok=True)
        figures = _plots(history, said)
        if isinstance(data, LabelledImages):
            order = said.losses().argsort().tolist()
            figures["worst"] = contact_sheet(said, data, order[::-1][:SHOWN])
            figures["best"] = contact_sheet(said, data, order[:SHOWN])
        for name, png in figures.items():
            (pictures / f"{name}.png").write_bytes(png)
    summary = said.summary()
    top = {
        "images": f"{summary['images']}",
        "top-1": f"{summary['top1']:.2f} %",
        "top-5": f"{summary['top5']:.2f} %",
        "loss": f"{summary['loss']:.4f}",
        "mean F1 of the classes": f"{summary['macro_f1']:.4f}",
        "expected calibration error": f"{summary['ece']:.4f}",
    }
    titles = {
        "curves": "Training",
        "confusion": "Confusion: each row is a class, its colours what the images of the class were taken for",
        "calibration": "Calibration: how often the network is right when it is so sure",
        "worst": "Largest loss: class, then guess",
        "best": "Smallest loss",
    }
    classes = sorted(said.per_class(), key=lambda row: row["f1"] if row["f1"] is not None else 2)
    rows = [
        [row["class"], row["images"], *(_percent(row[key]) for key in ("precision", "recall", "f1"))] for row in classes
    ]
    by_class = table(["class", "images", "precision", "recall", "F1"], rows)
    folder.write("report.html", page(config, history, top, titles, figures, by_class))


def _plots(history: Sequence[dict[str, Any]], said: Predictions) -> dict[str, bytes]:
    """Curves, confusion matrix and calibration as PNG; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return {}
    figures = {}

    figure = Figure((10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name in ("train_loss", "val_loss"):
        left.plot(epochs, [row[name] for row in history], ".-", label=name.replace("_", " "))
    for name in ("val_top1", "val_top5"):
        right.plot(epochs, [row[name] for row in history], ".-", label=name.replace("_", " "))
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="%", ylim=(0, 101))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figures["curves"] = png(figure)

    confusion = said.confusion()
    classes = len(said.class_names)
    side = min(14.0, 3 + 0.3 * classes)
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion / np.maximum(confusion.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="taken for", ylabel="class")
    if classes <= 40:
        axes.set_xticks(range(classes), _plain(said.class_names), rotation=90)
        axes.set_yticks(range(classes), _plain(said.class_names))
    if classes <= 20:
        for i, j in zip(*confusion.nonzero(), strict=True):
            dark = confusion[i, j] > 0.5 * confusion[i].sum()
            axes.text(j, i, str(confusion[i, j]), ha="center", va="center", color="white" if dark else "black")
    figures["confusion"] = png(figure)

    figure = Figure((4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = said.calibration()
    axes.plot([0, 1], [0, 1], "--", color="grey")
    axes.plot([s["confidence"] for s in steps], [s["accuracy"] for s in steps], "o-")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"ECE {said.ece():.3f}")
    axes.grid(alpha=0.3)
    figures["calibration"] = png(figure)
    return figures


def _plain(names: Sequence[str]) -> list[str]:
    """Names in which matplotlib finds no formula."""
    return [name.replace("$", r"\$") for name in names]


def png(figure: Any) -> bytes:
    """A figure of matplotlib's as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that matplotlib's font does not have
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def contact_sheet(said: Predictions, data: LabelledImages, indices: Sequence[int]) -> bytes:
    """A PNG of the images at `indices`, with the true class, the guess and how probable the network holds it."""
    line = 12
    rows = -(-len(indices) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (TILE + 8), rows * (TILE + 2 * line + 10)), "white")
    draw = ImageDraw.Draw(sheet)
    probabilities = said.logits.softmax(1)
    for place, index in enumerate(indices):
        x, y = place % ACROSS * (TILE + 8), place // ACROSS * (TILE + 2 * line + 10)
        image = data.image(index)
        scale = TILE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC), (x, y))
        true, guess = int(said.labels[index]), int(probabilities[index].argmax())
        sure = f"{100 * probabilities[index, guess]:.0f}%"
        draw.text((x, y + TILE + 2), fitting(draw, said.class_names[true], TILE), fill="black")
        colour = "darkgreen" if true == guess else "darkred"
        text = fitting(draw, said.class_names[guess], TILE - draw.textlength(f" {sure}"))
        draw.text((x, y + TILE + 2 + line), f"{text} {sure}", fill=colour)
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    return buffer.getvalue()


def fitting(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """`text` cut to `width` pixels, with what the built-in font does not have as question marks."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def page(
    config: FinetuneConfig,
    history: Sequence[dict[str, Any]],
    top: dict[str, str],
    titles: dict[str, str],
    figures: dict[str, bytes],
    classes: str,
) -> str:
    """An HTML page: lines at its `top`, figures as PNG by name with their titles, classes, epochs, configuration."""
    name = html.escape(config.model)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p>{len(history)} epochs on {html.escape(config.data)}; figures of the validation images.</p>",
        table(["", ""], list(top.items())),
    ]
    for figure, title in titles.items():
        if figure in figures:
            source = base64.b64encode(figures[figure]).decode()
            parts.append(f"<h2>{title}</h2><img alt='{figure}' src='data:image/png;base64,{source}'>")
    parts += ["<h2>Classes, the worst first</h2>", classes]
    epochs = [[short(value) for value in row.values()] for row in history]
    parts += ["<h2>Epochs</h2>", table(list(history[0]), epochs)]
    parts += [f"<h2>Configuration</h2><pre>{html.escape(to_yaml(config))}</pre></html>"]
    return "\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table."""
    lines = ["".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def short(value: Any) -> str:
    """A number with the digits that matter; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
