"""The report of a classifier's run: tables, figures, and one HTML page that contains them."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from spd_zoo.data.labelled import LabelledImages, StreamedImages
from spd_zoo.training import comments
from spd_zoo.training.classification.metrics import Predictions
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.page import draw_confusion, fitting, image_png, new_figure, page, plain, png, table
from spd_zoo.training.run import RunFolder

__all__ = ["contact_sheet", "write"]

TILE, COLUMNS, IMAGES = 96, 4, 24  # contact sheet: pixels per image, images per row, number of images


def write(
    folder: RunFolder,
    config: FinetuneConfig,
    history: Sequence[dict[str, Any]],
    predictions: Predictions,
    data: LabelledImages | StreamedImages,
    notes: Sequence[str] = (),
) -> None:
    """Writes `report.html`, `figures/*.png`, `per_class.csv` and `confusion.csv`.

    Without matplotlib there are no plots; a streamed data set has no contact sheets.
    """
    with folder.writing("report.html"):
        predictions.write_tables(folder.path)
        pictures = folder.path / "figures"
        pictures.mkdir(exist_ok=True)
        figures, remarks = _plots(history, predictions), _remarks(history, predictions)
        if isinstance(data, LabelledImages):
            worst, best = comments.halves(predictions.losses().argsort(descending=True).tolist(), IMAGES)
            correct = predictions.logits.argmax(1) == predictions.labels
            for name, chosen in (("worst", worst), ("best", best)):
                if chosen:
                    figures[name] = contact_sheet(predictions, data, chosen)
                    remarks[name] = comments.on_errors(int((~correct[chosen]).sum()), len(chosen))
        for name, content in figures.items():
            (pictures / f"{name}.png").write_bytes(content)
    numbers = predictions.summary()
    summary = {
        "images": f"{numbers['images']}",
        "top-1": f"{numbers['top1']:.2f} %",
        "top-5": f"{numbers['top5']:.2f} %",
        "loss": f"{numbers['loss']:.4f}",
        "mean F1 of the classes": f"{numbers['macro_f1']:.4f}",
        "expected calibration error": f"{numbers['ece']:.4f}",
    }
    titles = {
        "curves": "Training",
        "confusion": "Confusion: rows are true classes, columns predicted classes",
        "calibration": "Calibration: accuracy by confidence",
        "worst": "Largest loss: true class, then predicted class",
        "best": "Smallest loss",
    }
    classes = sorted(predictions.per_class(), key=lambda row: row["f1"] if row["f1"] is not None else 2)
    rows = [
        [row["class"], row["images"], *(_percent(row[key]) for key in ("precision", "recall", "f1"))] for row in classes
    ]
    by_class = table(["class", "images", "precision", "recall", "F1"], rows)
    folder.write("report.html", page(config, history, summary, titles, figures, by_class, notes, remarks))


def _remarks(history: Sequence[dict[str, Any]], predictions: Predictions) -> dict[str, str]:
    """What the plots show, by their names."""
    confidence = predictions.logits.double().softmax(1).amax(1).mean().item()
    return {
        "curves": comments.on_training(history, "val_top1"),
        "confusion": comments.on_confusion(predictions.confusion(), predictions.class_names),
        "calibration": comments.on_calibration(confidence, predictions.top(1) / 100, len(predictions.labels)),
    }


def _plots(history: Sequence[dict[str, Any]], predictions: Predictions) -> dict[str, bytes]:
    """Curves, confusion matrix and calibration as PNG, by name; empty without matplotlib."""
    figures: dict[str, bytes] = {}

    figure = new_figure(5.5, 6)
    if figure is None:
        return figures
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] for row in history]
    for name in ("train_loss", "val_loss"):
        above.plot(epochs, [row[name] for row in history], ".-", label=name.replace("_", " "))
    for name in ("val_top1", "val_top5"):
        below.plot(epochs, [row[name] for row in history], ".-", label=name.replace("_", " "))
    above.set(ylabel="loss")
    below.set(xlabel="epoch", ylabel="%", ylim=(0, 101))
    for axes in (above, below):
        axes.legend()
        axes.grid(alpha=0.3)
    figures["curves"] = png(figure)

    confusion = predictions.confusion()
    classes = len(predictions.class_names)
    side = min(14.0, 3 + 0.3 * classes)
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.set(xlabel="predicted class", ylabel="true class")
    labels = [*map(plain, predictions.class_names)]
    draw_confusion(axes, confusion, labels, with_labels=classes <= 40, numbers=classes <= 20)
    figures["confusion"] = png(figure)

    figure = new_figure(4.5, 4.5)
    axes = figure.subplots()
    ranges = predictions.calibration()
    axes.plot([0, 1], [0, 1], "--", color="grey")
    axes.plot([s["confidence"] for s in ranges], [s["accuracy"] for s in ranges], "o-")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"ECE {predictions.ece():.3f}")
    axes.grid(alpha=0.3)
    figures["calibration"] = png(figure)
    return figures


def contact_sheet(predictions: Predictions, data: LabelledImages, indices: Sequence[int]) -> bytes:
    """A PNG of the images at `indices`, with the true class, the predicted class and its probability."""
    line = 12
    rows = -(-len(indices) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 8), rows * (TILE + 2 * line + 10)), "white")
    draw = ImageDraw.Draw(sheet)
    probabilities = predictions.logits.softmax(1)
    for position, index in enumerate(indices):
        x, y = position % COLUMNS * (TILE + 8), position // COLUMNS * (TILE + 2 * line + 10)
        image = data.image(index)
        scale = TILE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC), (x, y))
        true, predicted = int(predictions.labels[index]), int(probabilities[index].argmax())
        percent = f"{100 * probabilities[index, predicted]:.0f}%"
        draw.text((x, y + TILE + 2), fitting(draw, predictions.class_names[true], TILE), fill="black")
        colour = "darkgreen" if true == predicted else "darkred"
        text = fitting(draw, predictions.class_names[predicted], TILE - draw.textlength(f" {percent}"))
        draw.text((x, y + TILE + 2 + line), f"{text} {percent}", fill=colour)
    return image_png(sheet)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
