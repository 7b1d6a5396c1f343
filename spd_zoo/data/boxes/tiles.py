"""Large images cut into tiles for training: the positions of the tiles, and the objects in each.

Nothing is written: a tile is cut when it is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from PIL import Image

from spd_zoo.data.boxes.images import BoxImages, Objects
from spd_zoo.data.notes import count
from spd_zoo.data.regions import Box

__all__ = [
    "Tiles",
    "cut",
    "describe_tiles",
    "objects_inside",
    "tile_boxes",
    "tiles_in_words",
    "view_boxes",
    "views",
    "visible_shares",
]

VISIBLE = 0.5  # minimum share of an object's area in a tile; with less, the object is ignored there
EMPTY = 0.25  # tiles without objects per tile with objects, in each epoch


def tile_boxes(size: tuple[int, int], side: int, overlap: float) -> list[Box]:
    """The tiles of an image, row by row; they have the same side and reach exactly to the image's edges.

    Args:
        size: Width and height of the image in pixels.
        side: Side of a tile in pixels; an image that is no larger becomes one tile.
        overlap: Minimum overlap of neighbouring tiles, as a share of their side.
    """
    columns, rows = (_starts(length, side, overlap) for length in size)
    ends = (min(side, size[0]), min(side, size[1]))
    return [(left, top, left + ends[0], top + ends[1]) for top, left in product(rows, columns)]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Where tiles start along a side of an image: the first at its start, the last one ends at its end."""
    if length <= side:
        return [0]
    last = length - side
    steps = -(-last // max(1, int(side * (1 - overlap))))
    return [round(i * last / steps) for i in range(steps + 1)]


def visible_shares(objects: Objects, boxes: Sequence[Box]) -> torch.Tensor:
    """How much of the area of each object lies in each box, (boxes, objects), from 0 to 1."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 1, 4)
    inside = torch.minimum(objects.boxes[:, 2:], corners[..., 2:]) - torch.maximum(
        objects.boxes[:, :2], corners[..., :2]
    )
    return inside.clamp(min=0).prod(-1) / (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(-1)


def objects_inside(objects: Objects, box: Box) -> Objects:
    """The objects in a part of an image, clipped to it, with coordinates relative to it.

    Objects with less than `VISIBLE` of their area inside are marked as ignored.
    """
    (shares,) = visible_shares(objects, [box])
    seen = shares > 0
    left, top, right, bottom = box
    low, high = torch.tensor([left, top] * 2), torch.tensor([right, bottom] * 2)
    boxes = objects.boxes[seen].clamp(low, high) - low
    ignored = objects.ignored[seen] | (shares[seen] < VISIBLE)
    return Objects(boxes, objects.labels[seen], objects.areas[seen] * shares[seen], ignored)


def views(data: BoxImages, index: int) -> list[Box | None]:
    """The parts of an image that inference runs on: the whole image, which is None, and its tiles.

    Images no larger than a tile, and those of a data set without `tiling`, are only used as a whole.
    """
    if data.tiling is None:
        return [None]
    return view_boxes(data.sizes[data.rows[index]], data.tiling.side, data.tiling.overlap)


def view_boxes(size: tuple[int, int], side: int, overlap: float, whole: bool = True) -> list[Box | None]:
    """As `views`, for an image of width and height `size`; `whole=False` leaves out the whole image."""
    if max(size) <= side:
        return [None]
    return [*([None] if whole else []), *tile_boxes(size, side, overlap)]


@dataclass(frozen=True)
class Tiles(BoxImages):
    """Tiles as images of their own: those with objects, then the others, of which an epoch has a few.

    Attributes:
        source: The images.
        parts: For each tile the index of its image, and its box; a box of None is the whole image, scaled down.
        with_objects: The number of tiles with objects, which come first and are in every epoch.
        seed: Seed of the random choice of tiles without objects.
    """

    source: BoxImages | None = None
    parts: Sequence[tuple[int, Box | None]] = ()
    with_objects: int = 0
    seed: int = 0

    def __len__(self) -> int:
        """The number of tiles in an epoch."""
        return self.with_objects + min(len(self.parts) - self.with_objects, round(EMPTY * self.with_objects))

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """The tile at `index`.

        Raises:
            DataError: If its image cannot be read.
        """
        assert self.source is not None
        row = self.rows[index]
        number, box = self.parts[row]
        return self.source.part(number, box, self.sizes[row], mode)

    def in_epoch(self, index: int, epoch: int) -> int:
        """The tile at `index` in an epoch; those without objects are drawn anew for each epoch."""
        first = self.with_objects
        if index < first:
            return index
        return first + _drawn(len(self.parts) - first, self.seed, epoch)[index - first]


@lru_cache(2)
def _drawn(number: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    drawn: list[int] = torch.randperm(number, generator=generator).tolist()
    return drawn


def cut(data: BoxImages, fit: tuple[int, int], seed: int) -> Tiles:
    """Cuts all images into tiles as `data.tiling` says.

    If no tile contains `VISIBLE` of an object, its image is also trained on as a whole, because inference runs on whole
    images, too.

    Args:
        data: The images.
        fit: Height and width of the network's input, to which a whole image is scaled down.
        seed: Seed of the random choice of tiles without objects.
    """
    assert data.tiling is not None
    full: list[tuple[tuple[int, Box | None], Objects, tuple[int, int]]] = []
    empty: list[tuple[tuple[int, Box | None], Objects, tuple[int, int]]] = []
    for i in range(len(data)):
        objects, size = data.objects_in(i), data.sizes[data.rows[i]]
        boxes = tile_boxes(size, data.tiling.side, data.tiling.overlap)
        shares = visible_shares(objects, boxes)
        nothing = objects_inside(objects, (0, 0, 0, 0))
        for box, row in zip(boxes, shares, strict=True):
            own = objects_inside(objects, box) if bool((row > 0).any()) else nothing
            has_some = len(boxes) == 1 or not bool(own.ignored.all())
            (full if has_some else empty).append(((i, box), own, (box[2] - box[0], box[3] - box[1])))
        if bool((shares.amax(0)[~objects.ignored] < VISIBLE).any()):
            scale = min(1.0, fit[1] / size[0], fit[0] / size[1])
            small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
            x, y = small[0] / size[0], small[1] / size[1]
            own = objects._replace(boxes=objects.boxes * torch.tensor([x, y, x, y]), areas=objects.areas * x * y)
            full.append(((i, None), own, small))
    parts, objects_of, sizes = zip(*full, *empty, strict=True)
    return Tiles(
        [_tile_name(data.name(i), box, data.sizes[data.rows[i]]) for i, box in parts],
        list(sizes),
        list(objects_of),
        data.class_names,
        range(len(parts)),
        format=data.format,
        place=data.place,
        source=data,
        parts=parts,
        with_objects=len(full),
        seed=seed,
    )


def _tile_name(name: str, box: Box | None, size: tuple[int, int]) -> str:
    if box == (0, 0, *size):
        return name
    return f"{name} as a whole" if box is None else f"{name} at {box[0]},{box[1]}"


def describe_tiles(train: Tiles, val: BoxImages) -> dict[str, Any]:
    """How the images of a run are cut, as a dict for JSON."""
    source = train.source
    assert source is not None
    assert source.tiling is not None
    objects = train.objects[: train.with_objects]
    return {
        "side": source.tiling.side,
        "overlap": source.tiling.overlap,
        "train": {
            "images": len(source),
            "objects": sum(source.counts()),
            "with objects": train.with_objects,
            "whole images": sum(box is None for _, box in train.parts),
            "without objects": len(train.parts) - train.with_objects,
            "in an epoch": len(train),
            "objects in tiles": sum(int((~each.ignored).sum()) for each in objects),
        },
        "val": {"images": len(val), "views": sum(len(views(val, i)) for i in range(len(val)))},
    }


def tiles_in_words(about: dict[str, Any]) -> Iterator[str]:
    """The result of `describe_tiles` as lines to print."""
    train, val = about["train"], about["val"]
    images = count(train["whole images"], "whole image")
    whole = f" ({images} with objects too large for a tile)" if train["whole images"] else ""
    yield f"tiles of {about['side']} px that overlap by {about['overlap']:g} at least:"
    yield (
        f"  train: {count(train['images'], 'image')} in {count(train['with objects'], 'tile')} with objects{whole} and "
        f"{train['without objects']} without; an epoch trains on {train['in an epoch']} (those without drawn anew); "
        f"{count(train['objects'], 'object')} seen {train['objects in tiles']} times"
    )
    seen = f"{count(val['images'], 'image')} in {count(val['views'], 'view')} (tiles and whole images)"
    yield f"  val: {seen}, whose boxes are merged"
