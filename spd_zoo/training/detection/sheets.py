"""Contact sheets of a detector's images, false positives and misses, with boxes drawn.

Correct boxes are green, wrong ones red, missed objects yellow, and ignored ones grey.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou

from spd_zoo.data.boxes import BoxImages
from spd_zoo.inference.detector import Detections
from spd_zoo.training.detection.curves import FALSE_POSITIVE, IN_IGNORED, IOU, Outcome
from spd_zoo.training.page import fitting, image_png

__all__ = ["COLUMNS", "IMAGES", "TILE", "arranged", "box_sheet", "false_positives", "missed_objects"]

TILE, COLUMNS, IMAGES = 320, 3, 9  # sheet of images: pixels per image, images per row, number of images
CROP, CROP_COLUMNS, CROPS = 240, 2, 12  # the same for a sheet of boxes
CONTEXT, LEAST = 3, 48  # side of a crop: this times that of the box, and at least so many pixels
_GAP, _LINE = 8, 18  # pixels between pictures, and of a line of text


class _Mark(NamedTuple):
    """A box to crop: its image, its corners, and a line of text."""

    image: int
    box: Tensor
    text: str


def box_sheet(
    data: BoxImages, detections: Sequence[Detections], outcomes: Sequence[Outcome], indices: Sequence[int]
) -> bytes:
    """A PNG of the images at `indices`; empty if there are none."""
    pictures = []
    for i in indices:
        (width, height), result = data.sizes[data.rows[i]], outcomes[i]
        scale = TILE / max(width, height)
        tile = data.part(i, None, (max(1, round(width * scale)), max(1, round(height * scale))))
        _draw(tile, data, detections[i], result, i, scale)
        correct, wrong, missed = (int(each.sum()) for each in (result.correct, result.wrong, ~result.detected))
        pictures.append((tile, f"{correct} correct, {wrong} wrong, {missed} missed"))
    return _sheet(pictures, TILE, COLUMNS)


def false_positives(data: BoxImages, detections: Sequence[Detections], outcomes: Sequence[Outcome]) -> bytes:
    """A PNG of the wrong boxes with the highest scores, and what is below each; empty if there are none."""
    wrong = [
        (float(detections[i].scores[index]), i, index)
        for i, result in enumerate(outcomes)
        for index in result.boxes[result.wrong].tolist()
    ]
    marks = []
    for score, i, index in sorted(wrong, key=lambda each: -each[0])[:CROPS]:
        box, label, objects = detections[i].boxes[index], int(detections[i].labels[index]), data.objects_in(i)
        words = "background"
        counted = objects.counted()
        if len(counted.labels):
            iou = box_iou(box[None].double(), counted.boxes.double())[0]
            same = iou.masked_fill(counted.labels != label, 0)
            other = iou.masked_fill(counted.labels == label, 0)
            if other.max() >= IOU:
                words = f"on {data.class_names[counted.labels[other.argmax()]]}"
            elif same.max() >= IOU:
                words = "duplicate"
            elif same.max() >= 0.1:
                words = f"IoU {float(same.max()):.2f}"
        marks.append(_Mark(i, box, f"{data.class_names[label]} {100 * score:.0f} %: {words}"))
    return _crops(data, detections, outcomes, marks, "red")


def missed_objects(
    data: BoxImages,
    detections: Sequence[Detections],
    outcomes: Sequence[Outcome],
    matches: Sequence[Tensor],
    thresholds: Sequence[float],
) -> bytes:
    """A PNG of the largest missed objects, with the score of a box below the minimum; empty if there are none."""
    missed = [
        (float(data.objects_in(i).areas[index]), i, index)
        for i, result in enumerate(outcomes)
        for index in (~result.detected).nonzero().squeeze(1).tolist()
    ]
    marks = []
    for _, i, index in sorted(missed, key=lambda each: -each[0])[:CROPS]:
        box, label = data.objects_in(i).boxes[index], int(data.objects_in(i).labels[index])
        width, height = (box[2:] - box[:2]).round().int().tolist()
        own = detections[i].scores[matches[i] == index]
        below = f", score {float(own[0]):.2f} of {thresholds[label]:.2f}" if len(own) else ""
        marks.append(_Mark(i, box, f"{data.class_names[label]} {width}x{height}{below}"))
    return _crops(data, detections, outcomes, marks, "yellow")


def _crops(
    data: BoxImages,
    detections: Sequence[Detections],
    outcomes: Sequence[Outcome],
    marks: Sequence[_Mark],
    colour: str,
) -> bytes:
    """A PNG of the surroundings of each mark; empty if there are none."""
    pictures = []
    for mark in marks:
        image = data.regions(mark.image)
        side = max(LEAST, CONTEXT * float((mark.box[2:] - mark.box[:2]).max()))
        corner = ((mark.box[:2] + mark.box[2:]) / 2 - side / 2).round()
        left, top = map(int, corner.tolist())
        crop = image.crop((left, top, left + round(side), top + round(side))).resize((CROP, CROP))
        scale = CROP / round(side)
        _draw(crop, data, detections[mark.image], outcomes[mark.image], mark.image, scale, (left, top), names=False)
        x1, y1, x2, y2 = _scaled(mark.box, scale, (left, top))
        ImageDraw.Draw(crop).rectangle((x1, y1, x2, y2), outline=colour, width=2)
        pictures.append((crop, mark.text))
    return _sheet(pictures, CROP, CROP_COLUMNS)


def _draw(
    tile: Image.Image,
    data: BoxImages,
    found: Detections,
    result: Outcome,
    index: int,
    scale: float,
    corner: tuple[int, int] = (0, 0),
    names: bool = True,
) -> None:
    """Draws the boxes of image `index` on `tile`, a part of it that begins at `corner` and is scaled by `scale`."""
    pen, objects = ImageDraw.Draw(tile), data.objects_in(index)

    def draw(box: Tensor, text: str, colour: str) -> None:
        x1, y1, x2, y2 = _scaled(box, scale, corner)
        pen.rectangle((x1, y1, x2, y2), outline=colour)
        if names:
            pen.text((x1 + 2, y1), fitting(pen, text, max(x2 - x1, 40)), fill=colour)

    for box in objects.boxes[objects.ignored]:
        draw(box, "ignored", "grey")
    for box, label in zip(objects.boxes[~result.detected], objects.labels[~result.detected], strict=True):
        draw(box, data.class_names[label], "yellow")
    for i, match in zip(result.boxes.tolist(), result.matches.tolist(), strict=True):
        text = f"{data.class_names[found.labels[i]]} {100 * found.scores[i]:.0f}%"
        draw(found.boxes[i], text, {FALSE_POSITIVE: "red", IN_IGNORED: "grey"}.get(match, "lime"))


def _scaled(box: Tensor, scale: float, corner: tuple[int, int]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = ((box - torch.tensor(corner * 2)) * scale).tolist()
    return x1, y1, max(x1, x2), max(y1, y2)


def _sheet(pictures: Sequence[tuple[Image.Image, str]], side: int, columns: int) -> bytes:
    """`arranged` as PNG; empty without pictures."""
    return image_png(arranged(pictures, side, columns)) if pictures else b""


def arranged(pictures: Sequence[tuple[Image.Image, str]], side: int, columns: int) -> Image.Image:
    """Pictures in rows, each in a square of `side` pixels with a line of text below."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + _GAP), rows * (side + _LINE + _GAP // 2)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(14)
    for position, (picture, text) in enumerate(pictures):
        left, top = position % columns * (side + _GAP), position // columns * (side + _LINE + _GAP // 2)
        sheet.paste(picture, (left, top))
        draw.text((left, top + side + 1), fitting(draw, text, side), fill="black")
    return sheet
