"""How large the boxes of a data set are in a network's input, and what of that is hard to learn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spd_zoo.data.boxes.images import BoxImages
from spd_zoo.data.boxes.tiles import Tiles
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import size_text

__all__ = ["describe_sizes", "sides_in_input", "sizes_in_words"]

EDGES = (8, 16, 32, 64, 128)  # pixels in the input, of the square root of a box's area
NAMES = ("tiny (< 8 px)", "small (< 16)", "< 32", "< 64", "< 128", "larger")
SMALLEST = 2  # pixels in the input; a box with a smaller side covers hardly any cell that could learn it
MOST = 0.95  # share of these boxes that a recommended input or tile makes larger than that
LONGEST, NARROWEST = 8192, 32  # limits in pixels of a recommended input or tile
LISTED = 12  # classes that are printed


def sides_in_input(data: BoxImages, image_size: tuple[int, int], keeps_aspect: bool) -> np.ndarray:
    """Label, width and height in pixels of the input of every object, (M, 3), without what is ignored.

    Args:
        data: The images.
        image_size: Height and width of the input in pixels.
        keeps_aspect: Whether an image is scaled to fit into the input, or stretched to it.
    """
    rows = [np.zeros((0, 3))]
    for i in range(len(data)):
        objects = data.objects_in(i).counted()
        width, height = data.sizes[data.rows[i]]
        x, y = image_size[1] / max(width, 1), image_size[0] / max(height, 1)
        scale = (min(x, y), min(x, y)) if keeps_aspect else (x, y)
        boxes = objects.boxes.double().numpy()
        rows.append(np.column_stack([objects.labels.numpy(), (boxes[:, 2:] - boxes[:, :2]) * scale]))
    return np.concatenate(rows)


def describe_sizes(
    data: BoxImages, image_size: tuple[int, int], keeps_aspect: bool, strides: Sequence[int] = ()
) -> dict[str, Any]:
    """What matters of the boxes in a network's input, as JSON.

    Args:
        data: As for `sides_in_input`.
        image_size: As for `sides_in_input`.
        keeps_aspect: As for `sides_in_input`.
        strides: Pixels per cell of each map, if a box is learnt only by cells whose centre it contains.
    """
    whole = data.source if isinstance(data, Tiles) and data.source is not None else data
    table = sides_in_input(data, image_size, keeps_aspect)
    size = np.digitize(np.sqrt(table[:, 1] * table[:, 2]), EDGES)
    per_class = {
        name: np.bincount(size[table[:, 0] == label], minlength=len(NAMES)).tolist()
        for label, name in enumerate(data.class_names)
    }
    numbers = [len(data.objects_in(i).counted().labels) for i in range(len(data))]
    most = max(range(len(data)), key=numbers.__getitem__)
    below = table[:, 1:].min(1) < SMALLEST
    return {
        "image size": size_text(image_size),
        "sizes": per_class,
        "below 2 px": int(below.sum()),
        **(_remedies(data, table[:, 1:].min(1), below, image_size) if below.any() else {}),
        **(_without_cell(table[:, 1:], strides, image_size) if strides and len(table) else {}),
        "ignored": sum(int(whole.objects_in(i).ignored.sum()) for i in range(len(whole))),
        "most objects": {"image": data.name(most), "objects": numbers[most]},
        "above the pixel limit": [
            whole.name(i) for i in range(len(whole)) if math.prod(whole.sizes[whole.rows[i]]) > whole.max_pixels
        ],
    }


def _remedies(data: BoxImages, sides: np.ndarray, below: np.ndarray, image_size: tuple[int, int]) -> dict[str, Any]:
    """A larger input, or tiles for the present one, with which most boxes below 2 px become larger.

    Args:
        data: The images.
        sides: The shorter side of every object in pixels of the input, (M,).
        below: Which of them is too short, (M,).
        image_size: Height and width of the input in pixels.
    """
    boxes = [data.objects_in(i).counted().boxes.double().numpy() for i in range(len(data))]
    own = np.concatenate([(each[:, 2:] - each[:, :2]).min(1) for each in boxes if len(each)])
    in_input, in_image = (max(float(np.quantile(each[below], 1 - MOST)), 1e-9) for each in (sides, own))
    larger = tuple(32 * math.ceil(side * SMALLEST / in_input / 32) for side in image_size)
    tile = math.floor(min(image_size) * in_image / SMALLEST)
    longest = max(max(data.sizes[row]) for row in data.rows)
    found: dict[str, Any] = {"larger image size": size_text(larger)} if max(larger) <= LONGEST else {}
    return found | ({"tile": tile} if NARROWEST <= tile < longest else {})


def _without_cell(sides: np.ndarray, strides: Sequence[int], image_size: tuple[int, int]) -> dict[str, Any]:
    """How many boxes contain no cell's centre on average over positions, if many, and an input in which few do.

    Args:
        sides: Width and height of every object in pixels of the input, (M, 2).
        strides: Pixels per cell of each map.
        image_size: Height and width of the input in pixels.
    """

    def missed(enlarged: float) -> float:
        contained = sum(np.minimum(enlarged * sides / stride, 1).prod(1) for stride in strides)
        return float((1 - np.minimum(contained, 1)).mean())

    share = missed(1)
    if share <= 1 - MOST:
        return {}
    sizes = (tuple(32 * math.ceil(side * factor / 32) for side in image_size) for factor in np.arange(1.25, 33, 0.25))
    fitting = (size for size in sizes if max(size) <= LONGEST)
    found = next((size for size in fitting if missed(min(size) / min(image_size)) <= 1 - MOST), None)
    about = {"cell": min(strides), "missed": max(1, round(share * len(sides)))}
    return {"without a cell": about | ({"larger image size": size_text(found)} if found else {})}


def sizes_in_words(about: Mapping[str, Any]) -> Iterator[str]:
    """The lines to print for what `describe_sizes` found."""
    size, per_class = about["image size"], about["sizes"]
    total = [sum(column) for column in zip(*per_class.values(), strict=True)]
    yield f"  {count(sum(total), 'box', 'boxes')} at {size} px, by the root of their area: {_listed(total)}"
    if 1 < len(per_class) <= LISTED:
        yield from (f"    {name}: {_listed(numbers)}" for name, numbers in per_class.items() if sum(numbers))
    if about["below 2 px"]:
        larger, tile = about.get("larger image size"), about.get("tile")
        ways = [f"--image-size {larger}"] if larger else []
        ways += [f"--tile {tile}, which cuts the images,"] if tile else []
        remedy = f"; {' or '.join(ways)} makes nearly all of them larger" if ways else ""
        small = count(about["below 2 px"], "box", "boxes")
        yield f"  {small} with a side below 2 px at {size} px are hardly seen in training{remedy}"
    if missed := about.get("without a cell"):
        ways = [f"--image-size {missed['larger image size']}"] if "larger image size" in missed else []
        ways += ["a network with cells of 4 px (yolov8n_p2)"] if missed["cell"] > 4 else []
        yield (
            f"  about {missed['missed']} of the boxes contain no cell's centre (cells have {missed['cell']} px and "
            f"more) and cannot be learnt{'; try ' if ways else ''}{' or '.join(ways)}"
        )
    if about["ignored"]:
        yield f"  {about['ignored']} crowds, difficult objects or regions to ignore: neither object nor background"
    yield f"  at most {count(about['most objects']['objects'], 'object')} in an image: {about['most objects']['image']}"
    if about["above the pixel limit"]:
        names = about["above the pixel limit"]
        yield f"  {count(len(names), 'image')} above the limit of --max-pixels: {some(names)}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in zip(NAMES, numbers, strict=True) if number) or "none"
