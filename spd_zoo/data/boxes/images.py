"""Images with boxes in memory: what the readers of all formats collect, and what training and evaluation take.

Boxes are x1 y1 x2 y2 in pixels of the upright image, from 0 at its left and upper edge. What is wrong with them is
counted, never silent: a box that extends beyond its image is clipped; one outside it, without area, or of an unknown
class is left out.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from spd_zoo.data.classes import UNUSED, DataError, clean_name
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import MAX_PIXELS, opened, read_image
from spd_zoo.data.regions import Box as Region
from spd_zoo.data.regions import Recent, Regions, bytes_of, open_regions, reduced

__all__ = [
    "EVERY_CLASS",
    "Box",
    "BoxImages",
    "Collector",
    "Defect",
    "Objects",
    "Source",
    "Tiling",
    "UnlabelledError",
    "found_in_words",
    "hold_out",
    "is_set",
    "with_names",
]

AnyRegions = TypeVar("AnyRegions", bound=Regions)
EVERY_CLASS = -1  # the label of a region in which objects of all classes are ignored
CLIPPED = "boxes extend beyond their image by more than half a pixel and are clipped"
TWICE = "images are listed again with other boxes, each time as an image of its own with only those boxes"
UNUSABLE = 0.01  # share of lines that may be unusable, from `UNUSABLE_LINES` of them on
UNUSABLE_LINES = 10
FAR, FAR_OUT = 0.1, 0.2  # share of the boxes that may extend beyond their image by more than this share of its side
_REGIONS = {"ignore", "ignored", "ignore region", "ignore regions", "ignored region", "ignored regions"}
_REGIONS |= {"dontcare", "dont care", "don't care"}


class UnlabelledError(DataError):
    """Images of which none has a label."""


class Objects(NamedTuple):
    """The objects in an image: `boxes` (M, 4), `labels` (M,), `areas` (M,) in square pixels, and `ignored` (M,).

    What is ignored is neither object nor background: COCO's crowds, Pascal VOC's difficult objects, and regions to
    ignore, whose label is -1 if they are of no class. The loss takes nothing there for background, and evaluation
    treats it by COCO's rules for crowds: a box inside counts neither as right nor as wrong.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    ignored: Tensor

    def counted(self) -> "Objects":
        """The objects that are not ignored."""
        return Objects(*(column[~self.ignored] for column in self))


class Defect(NamedTuple):
    """A problem: where it was found, and its image."""

    where: str
    image: str


@dataclass(frozen=True)
class Tiling:
    """How large images are cut into tiles.

    Attributes:
        side: Side of a tile, in pixels of the image.
        overlap: Minimum overlap of neighbouring tiles, as a share of their side.
        recent: The images that were read last, from which tiles are cut.
    """

    side: int
    overlap: float
    recent: Recent[Regions] = field(default_factory=Recent, repr=False, compare=False)


@dataclass(frozen=True)
class BoxImages:
    """A split of a data set with boxes.

    Attributes:
        files: Path of each image; its name, if it is in a table.
        sizes: Width and height of each image, from its annotation or its header.
        objects: The objects in each image.
        class_names: Names of the classes.
        rows: The images of the split, as indices into `files`, `sizes` and `objects`.
        defects: For each type of defect, where it is found.
        notes: What was guessed or left out when the data set was opened.
        encoded: The bytes of each image, or None if it is a file; None if all are files.
        format: The format that was found, such as "YOLO by data.yaml".
        place: Where the images of the split are.
        max_pixels: Maximum number of pixels of an image that is read as a whole.
        tiling: How images are cut for training and evaluation; None: they are not cut.
    """

    files: list[str]
    sizes: list[tuple[int, int]]
    objects: list[Objects]
    class_names: list[str]
    rows: Sequence[int]
    defects: dict[str, list[Defect]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    encoded: Any = None
    format: str = ""
    place: str = ""
    max_pixels: int = MAX_PIXELS
    tiling: Tiling | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The name of the image at `index` in messages and reports: its path, if it is a file."""
        return self.files[self.rows[index]]

    def file(self, index: int) -> str | BytesIO:
        """The path or the bytes of the image at `index`."""
        encoded = None if self.encoded is None else self.encoded[self.rows[index]]
        return self.name(index) if encoded is None else encoded

    def folders(self) -> set[Path]:
        """The folders of the image files, in which further images might be found."""
        files = map(self.file, range(len(self)))
        return {Path(file).parent for file in files if isinstance(file, str)}

    def label(self, index: int) -> Any:
        """The boxes and classes of the image at `index`, as a value that can be compared."""
        boxes, labels, _, _ = self.objects_in(index)
        return tuple(map(tuple, boxes.tolist())), tuple(labels.tolist())

    def objects_in(self, index: int) -> Objects:
        """The objects in the image at `index`."""
        return self.objects[self.rows[index]]

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """The image at `index`, upright and in `mode`.

        Raises:
            DataError: If it cannot be read, or has another size than its annotation says.
        """
        return self._read(read_image, index, mode)

    def regions(self, index: int, mode: str = "RGB") -> Regions:
        """The image at `index`, for reading parts of it; with `tiling` it is cached.

        Raises:
            DataError: If it cannot be read, or has another size than its annotation says.
        """
        if self.tiling is None:
            return self.image(index, mode)
        read = partial(self._read, open_regions, index, mode)
        return self.tiling.recent.get((self.name(index), self.rows[index], mode), read, bytes_of)

    def part(self, index: int, box: Region | None, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
        """A part of the image at `index`; without a `box` the whole image, scaled to the width and height `size`.

        Raises:
            DataError: If it cannot be read, or has another size than its annotation says.
        """
        image = self.regions(index, mode)
        try:
            if box is not None:
                return image.crop(box)
            return reduced(image, size).resize(size, Image.Resampling.BILINEAR)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from error

    def _read(self, read: Callable[..., AnyRegions], index: int, mode: str) -> AnyRegions:
        try:
            image = read(self.file(index), mode, self.max_pixels)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from error
        size = self.sizes[self.rows[index]]
        if image.size != size:
            found, expected = (f"{width}x{height}" for width, height in (image.size, size))
            raise DataError(f"{self.name(index)}: it has {found} pixels upright, but its annotation says {expected}")
        return image

    def in_epoch(self, index: int, epoch: int) -> int:
        """The image that is at `index` in an epoch: the same in each."""
        return index

    def subset(self, indices: Iterable[int]) -> "BoxImages":
        """The images at `indices`."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def without(self, names: Container[str]) -> "BoxImages":
        """The images that have other names."""
        return self.subset(i for i in range(len(self)) if self.name(i) not in names)

    def renumbered(self, numbers: Sequence[int], class_names: list[str], notes: Sequence[str] = ()) -> "BoxImages":
        """The images with class i as `numbers[i]` of `class_names`, without those of `UNUSED`, and with more notes."""
        new = torch.tensor([*numbers, EVERY_CLASS])  # which the label -1 finds at the end
        objects = [_chosen(each._replace(labels=new[each.labels])) for each in self.objects]
        return replace(self, objects=objects, class_names=class_names, notes=(*self.notes, *notes))

    def used(self) -> set[int]:
        """The classes of which there is an object that is not ignored."""
        return {label for objects in self.objects for label in objects.counted().labels.tolist()}

    def counts(self) -> list[int]:
        """How many objects each class has, without those that are ignored."""
        found = Counter(label for i in range(len(self)) for label in self.objects_in(i).counted().labels.tolist())
        return [found[label] for label in range(len(self.class_names))]

    def problems(self) -> dict[str, list[str]]:
        """For each type of defect, where it is found."""
        return {sort: [defect.where for defect in defects] for sort, defects in self.defects.items()}

    def fingerprint(self) -> str:
        """A digest of names, boxes and classes, by which a resumed run recognises its data; pixels do not count."""
        digest = hashlib.blake2b(repr(self.class_names).encode(), digest_size=16)
        for i in range(len(self)):
            digest.update(Path(self.name(i)).name.encode("utf-8", "backslashreplace"))
            for tensor in self.objects_in(i):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def is_set(value: object) -> bool:
    """Whether a flag such as `iscrowd` or `difficult` is set: true, a number but 0, or a text that says so."""
    return value.strip().lower() not in ("", "0", "0.0", "false", "no") if isinstance(value, str) else bool(value)


class Source(NamedTuple):
    """A data set that was found but not read: its format, what opens each split, and what was guessed."""

    format: str
    splits: Mapping[str, Any]  # name of a split -> a function without arguments that returns `BoxImages`
    notes: Sequence[str] = ()


class Box(NamedTuple):
    """A box as an annotation has it.

    Attributes:
        label: The place of its class in the list of classes; None if it is not among them.
        x1: Left edge in pixels.
        y1: Upper edge in pixels.
        x2: Right edge in pixels.
        y2: Lower edge in pixels.
        where: Where the annotation was found, for messages.
        area: Its area in square pixels, if the annotation says it.
        ignored: Whether it is neither object nor background.
    """

    label: int | None
    x1: float
    y1: float
    x2: float
    y2: float
    where: str
    area: float | None = None
    ignored: bool = False


class Collector:
    """Images and their boxes while a format is read; checks each box, and counts what is wrong.

    Args:
        class_names: The classes of the data set. Those that are called like regions to ignore become regions.
        where: The file or folder that names them, for messages.

    Raises:
        DataError: If there is no class, or a name is no Unicode, or that of two.
    """

    def __init__(self, class_names: Sequence[str], where: object) -> None:
        names = [clean_name(name) for name in class_names]
        if not names:
            raise DataError(f"{where} names no classes")
        broken = next((name for name in names if any("\ud800" <= each <= "\udfff" for each in name)), None)
        if broken is not None:
            raise DataError(f"{where} has a class {broken!r} that is no Unicode; rename it")
        twice = [name for name, number in Counter(names).items() if number > 1]
        if twice:
            raise DataError(f"{where} has two classes called {twice[0]!r}; give each a name of its own")
        regions = [name for name in names if " ".join(name.lower().replace("_", " ").split()) in _REGIONS]
        if len(regions) == len(names):
            regions = []
        self.class_names = [name for name in names if name not in regions]
        number = {name: i for i, name in enumerate(self.class_names)}
        self.numbers = [number.get(name, EVERY_CLASS) for name in names]
        self.notes = [f"the class {name!r} is taken for regions to ignore, not for objects" for name in regions]
        self.files: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.objects: list[Objects] = []
        self.encoded: list[Any] = []
        self.defects: dict[str, list[Defect]] = defaultdict(list)
        self._added: dict[str, Objects] = {}
        self.lines, self.far_out, self.unusable = 0, 0, Counter[str]()

    def defect(self, sort: str, where: str, image: object = "", times: int = 1) -> None:
        """Counts something odd that does not make the data unusable."""
        self.defects[sort] += [Defect(where, str(image))] * times

    def leave_out(self, sort: str, where: str, image: object = "") -> None:
        """Counts a line that cannot be used; `images` refuses the data if there are too many."""
        self.lines += 1
        self.unusable[sort] += 1
        self.defect(sort, where, image)

    def add(
        self,
        file: object,
        size: tuple[int, int] | None,
        boxes: Iterable[Box] | Callable[[tuple[int, int]], Iterable[Box]],
        encoded: Any = None,
    ) -> None:
        """Adds an image.

        Args:
            file: Its path, or its name.
            size: Width and height of the image in which the boxes are; None if the annotation does not say.
            boxes: Its boxes, or what returns them for the width and height of the upright image.
            encoded: What `reading.read_image` takes, if the image is no file.
        """
        stored, orientation = stored_size(str(file) if encoded is None else encoded)
        turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
        boxes = boxes(turned) if callable(boxes) else boxes
        if size is not None and orientation != 1 and stored[0]:
            boxes = list(boxes)
            if size == stored != turned:
                boxes = [_turned(box, size, orientation) for box in boxes]
                self.defect("images are labelled as stored, without EXIF rotation; their boxes are rotated", str(file))
                size = turned
            elif boxes and stored == turned == size:
                sort = "images keep their size when EXIF rotates them: their boxes are assumed to be those of the "
                self.defect(f"{sort}rotated image", str(file))
        size = size or turned
        different = self._different(boxes, str(file)) if size[0] else ()
        kept = [row for box in different if (row := self._checked(box, size, str(file))) is not None]
        table = np.array(kept, dtype=np.float64).reshape(-1, 7)
        self.files.append(str(file))
        self.sizes.append(size)
        self.encoded.append(encoded)
        objects = Objects(
            torch.from_numpy(table[:, :4].astype(np.float32)),
            torch.from_numpy(table[:, 4].astype(np.int64)),
            torch.from_numpy(table[:, 5].astype(np.float32)),
            torch.from_numpy(table[:, 6].astype(bool)),
        )
        self.objects.append(objects)
        if encoded is None:
            first = self._added.setdefault(os.path.normpath(str(file)), objects)
            if not all(map(torch.equal, first, objects)):
                self.defect(TWICE, str(file), file)

    def _different(self, boxes: Iterable[Box], image: str) -> Iterator[Box]:
        """The boxes of an image, each once."""
        seen = set()
        for box in boxes:
            same = (*box[:5], box.ignored)
            if same in seen and box.label is not None:
                self.defect("boxes are annotated twice and count once", box.where, image)
            else:
                seen.add(same)
                yield box

    def _checked(self, box: Box, size: tuple[int, int], image: str) -> tuple[float, ...] | None:
        """Corners, label, area and whether it is ignored, of a box inside its image; None if it is left out."""
        (width, height), (x1, y1, x2, y2) = size, box[1:5]
        if box.label is None:
            self.leave_out("boxes are of an unknown class and are left out", box.where, image)
            return None
        if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
            self.leave_out("boxes have a negative or no finite size and are left out", box.where, image)
            return None
        if x2 == x1 or y2 == y1:
            self.lines += 1
            self.defect("boxes have no area and are left out", box.where, image)
            return None
        corners = min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            self.leave_out("boxes lie outside their image and are left out", box.where, image)
            return None
        if max(-x1, -y1, x2 - width, y2 - height) > 0.5:
            self.defect(CLIPPED, box.where, image)
        if max(-x1 / width, -y1 / height, x2 / width - 1, y2 / height - 1) > FAR:
            self.far_out += 1
        self.lines += 1
        label = self.numbers[box.label]
        own = (corners[2] - corners[0]) * (corners[3] - corners[1])
        area = own if box.area is None or not box.area > 0 else box.area
        return (*corners, label, area, box.ignored or label == EVERY_CLASS)

    def images(self, where: object, place: object, notes: Sequence[str] = ()) -> BoxImages:
        """All that was added.

        Args:
            where: The file or folder that was read, for messages.
            place: The folder with the images, for the line that says what was found.
            notes: What was guessed.

        Raises:
            DataError: If there is no image, too many lines cannot be used, or no box goes beyond the first pixel.
        """
        if not self.files:
            raise DataError(f"{where} lists no image")
        farthest = max((float(each.boxes.max()) for each in self.objects if len(each.boxes)), default=math.inf)
        if farthest <= 1 < max(map(max, self.sizes)):
            raise DataError(
                f"the boxes of {where} look like fractions of the image, not like pixels: all lie in the first pixel; "
                "multiply x and width by the image's width, and y and height by its height"
            )
        bad = self.unusable.total()
        if bad >= UNUSABLE_LINES and bad > UNUSABLE * self.lines:
            sorts = [
                f"{number} {sort} ({some([defect.where for defect in self.defects[sort]], 20)})"
                for sort, number in self.unusable.items()
            ]
            raise DataError(
                f"{bad} of {count(self.lines, 'box', 'boxes')} in {where} cannot be used, and at most 1 % may be "
                f"wrong; correct them: {'; '.join(sorts)}"
            )
        if self.far_out >= UNUSABLE_LINES and self.far_out > FAR_OUT * self.lines:
            raise DataError(
                f"{self.far_out} of {count(self.lines, 'box', 'boxes')} in {where} extend beyond their images by more "
                "than a tenth of its side; are corners given in place of width and height, or is their size wrong?"
            )
        return BoxImages(
            self.files,
            self.sizes,
            self.objects,
            self.class_names,
            range(len(self.files)),
            dict(self.defects),
            (*self.notes, *notes),
            self.encoded if any(each is not None for each in self.encoded) else None,
            place=str(place),
        )


def stored_size(file: str | BytesIO) -> tuple[tuple[int, int], int]:
    """Width and height as the header says, and EXIF's orientation; (0, 0) and 1 if the file cannot be read."""
    try:
        with opened(file, any_size=True) as image:
            orientation = image.getexif().get(0x0112, 1)
            size = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow's size of a TIFF is that of the upright image
                size = image.tag_v2[256], image.tag_v2[257]
            return size, orientation if orientation in range(1, 9) else 1
    except ValueError:  # reading the image says what is wrong
        return (0, 0), 1


def upright_size(file: str | BytesIO) -> tuple[int, int]:
    """Width and height of the upright image as its header says; (0, 0) if it cannot be read."""
    size, orientation = stored_size(file)
    return size[::-1] if orientation in (5, 6, 7, 8) else size


def _turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """A box of the stored image of `size` in the upright one, for the orientations that swap the sides."""
    width, height = size
    _, x1, y1, x2, y2, *_ = box
    if orientation in (6, 7):
        y1, y2 = height - y2, height - y1
    if orientation in (7, 8):
        x1, x2 = width - x2, width - x1
    return box._replace(x1=y1, y1=x1, x2=y2, y2=x2)


def with_names(data: BoxImages, class_names: list[str]) -> BoxImages:
    """Renumbers the classes of `data` by `class_names`; boxes of other classes are counted and left out."""
    if data.class_names == class_names:
        return data
    number = {name: i for i, name in enumerate(class_names)}
    renumbered = data.renumbered([number.get(name, UNUSED) for name in data.class_names], class_names)
    lost = [
        Defect(file, file)
        for file, before, after in zip(data.files, data.objects, renumbered.objects, strict=True)
        for _ in range(len(before.labels) - len(after.labels))
    ]
    defects = data.defects | ({"boxes are of a class that is not trained and are left out": lost} if lost else {})
    return replace(renumbered, defects=defects)


def _chosen(objects: Objects) -> Objects:
    """The objects without those of the class `UNUSED`."""
    known = objects.labels != UNUSED
    return objects if bool(known.all()) else Objects(*(part[known] for part in objects))


def hold_out(data: BoxImages, val_size: int, seed: int) -> tuple[BoxImages, BoxImages]:
    """Holds out `val_size` images, drawn by `seed`; defects that belong to no image stay in the first split.

    Raises:
        DataError: If no image would be left for one of the two.
    """
    if not 0 < val_size < len(data):
        raise DataError(
            f"cannot hold out {val_size} of {len(data)} images; give another validation size or a val split"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    train, val = data.subset(sorted(order[val_size:])), data.subset(sorted(order[:val_size]))
    held = {val.name(i) for i in range(len(val))}
    parts: list[dict[str, list[Defect]]] = [{}, {}]
    for sort, defects in data.defects.items():
        for defect in defects:
            parts[defect.image in held].setdefault(sort, []).append(defect)
    return replace(train, defects=parts[0]), replace(val, defects=parts[1])


def found_in_words(splits: Mapping[str, BoxImages | None]) -> str:
    """What was found, on one line: the format, and for each split the number of its images and their folder."""
    opened = {name: data for name, data in splits.items() if data is not None}
    parts = [f"{name} {count(len(data), 'image')} in {data.place}" for name, data in opened.items()]
    return f"{next(iter(opened.values())).format}: {', '.join(parts)}"
