"""What a detector is trained on, in one picture: sizes and positions of the boxes, and some images with their boxes."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from spd_zoo.data.boxes import BoxImages
from spd_zoo.data.boxes.sizes import sides_in_input
from spd_zoo.data.labelled import DataError
from spd_zoo.data.reading import size_text
from spd_zoo.training.detection.sheets import COLUMNS, IMAGES, TILE, arranged
from spd_zoo.training.page import fitting, image_png, new_figure, png

__all__ = ["data_picture"]

COLOURS = ("lime", "red", "deepskyblue", "yellow", "magenta", "orange", "cyan", "white")


def data_picture(data: BoxImages, image_size: tuple[int, int], keeps_aspect: bool, seed: int) -> bytes:
    """A PNG of the training images; without matplotlib it is the contact sheet alone.

    Args:
        data: The images.
        image_size: Height and width of the network's input in pixels.
        keeps_aspect: Whether an image is scaled to fit into the input, or stretched to it.
        seed: Of the choice of images.
    """
    sheet = arranged([_picture(data, i) for i in _chosen(data, seed)], TILE, COLUMNS)
    content = _histograms(data, image_size, keeps_aspect)
    if not content:
        return image_png(sheet)
    with Image.open(io.BytesIO(content)) as above:
        whole = Image.new("RGB", (max(above.width, sheet.width), above.height + sheet.height), "white")
        whole.paste(above.convert("RGB"), (0, 0))
        whole.paste(sheet, (0, above.height))
    return image_png(whole)


def _chosen(data: BoxImages, seed: int) -> list[int]:
    """Random images, those with objects first, in the order of the data."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda i: not len(data.objects_in(i).labels))
    return sorted(order[:IMAGES])


def _histograms(data: BoxImages, image_size: tuple[int, int], keeps_aspect: bool) -> bytes:
    """Sizes in the input and centres in the image of all objects, as PNG; empty without matplotlib or objects."""
    sides = sides_in_input(data, image_size, keeps_aspect)
    figure = new_figure(9.84, 3.2)
    if figure is None or not len(sides):
        return b""
    left, middle, right = figure.subplots(1, 3)
    root = np.sqrt(sides[:, 1] * sides[:, 2]).clip(0.5)
    left.hist(root, bins=np.geomspace(0.5, max(2.0, root.max()), 40))
    left.axvline(2, color="red")
    left.set(xscale="log", xlabel=f"root of the area in pixels, at {size_text(image_size)} px", ylabel="boxes")
    left.set_title("size")
    middle.scatter(sides[:, 1], sides[:, 2], s=2, alpha=0.3)
    middle.set(xlabel="width in pixels", ylabel="height in pixels", title="width and height")
    centres = _centres(data)
    right.hist2d(centres[:, 0], centres[:, 1], bins=24, range=((0, 1), (0, 1)), cmap="viridis")
    right.set(xlabel="x as a share of the image", ylabel="y", title="position", ylim=(1, 0))
    return png(figure)


def _centres(data: BoxImages) -> np.ndarray:
    """The centre of every object as a share of its image, (M, 2)."""
    rows = [np.zeros((0, 2))]
    for i in range(len(data)):
        boxes = data.objects_in(i).counted().boxes.double().numpy()
        rows.append((boxes[:, :2] + boxes[:, 2:]) / 2 / np.maximum(data.sizes[data.rows[i]], 1))
    return np.concatenate(rows)


def _picture(data: BoxImages, index: int) -> tuple[Image.Image, str]:
    """An image with its boxes drawn, a colour for each class and grey for what is ignored; and a line about it."""
    name = Path(data.name(index)).name
    try:
        image = data.image(index)
    except DataError as error:
        tile = Image.new("RGB", (TILE, TILE), "white")
        pen = ImageDraw.Draw(tile)
        pen.text((0, 0), fitting(pen, str(error), TILE), fill="red")
        return tile, name
    scale = TILE / max(image.size)
    tile = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen, objects = ImageDraw.Draw(tile), data.objects_in(index)
    for box, label, ignored in zip(objects.boxes, objects.labels.tolist(), objects.ignored.tolist(), strict=True):
        x1, y1, x2, y2 = (box * scale).tolist()
        colour = "grey" if ignored else COLOURS[label % len(COLOURS)]
        pen.rectangle((x1, y1, x2, y2), outline=colour)
        words = "ignored" if ignored else data.class_names[label]
        pen.text((x1 + 2, y1), fitting(pen, words, max(x2 - x1, 40)), fill=colour)
    return tile, f"{len(objects.labels)} boxes: {name}"
