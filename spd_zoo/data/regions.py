"""Reads regions of images: of a TIFF only the tiles or strips that a region touches, of others the whole image.

Each tile or strip becomes a small TIFF in memory, which Pillow decodes, so that pixels equal those of the whole image.
No further package is needed: tifffile decodes LZW and JPEG with imagecodecs only, and pyvips wraps libvips (LGPL).
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from PIL import Image, TiffImagePlugin

from spd_zoo.data.reading import collect_notes, note_pages, opened, read_image, refuse_larger, upright, white_of

__all__ = ["Box", "PartError", "Recent", "Regions", "TiffRegions", "bands", "bytes_of", "open_regions", "reduced"]

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright image
CACHE = 2**28  # bytes that `Recent` keeps by default
_SMALL = 2**24  # images of up to this many pixels are never reduced
BAND = 256  # rows of each image that `bands` yields
_DATA = 16  # offset of the pixels in a small TIFF
_ROWS = 64  # strips are divided or joined to about this many rows where that is possible
_FORMATS = {1: "B", 2: "c", 3: "H", 4: "L", 5: "LL", 7: "c"}  # struct formats of TIFF's field types
# tags that a decoder needs, and their types: bits, compression, colours, planes, predictor, JPEG's tables, ...
_KEPT = {258: 3, 259: 3, 262: 3, 266: 3, 277: 3, 284: 3, 292: 4, 293: 4, 317: 3, 320: 3, 332: 3, 338: 3, 339: 3}
_KEPT |= {347: 7, 529: 5, 530: 3, 531: 3, 532: 5}
_RAW, _OLD_JPEG = 1, 6  # compressions
_YCBCR = 6  # colours that may be stored in blocks of rows
T = TypeVar("T")


class PartError(ValueError):
    """A part of an image cannot be read, although its header can."""


class Regions(Protocol):
    """An image whose regions can be read, such as a PIL image."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    def crop(self, box: Box) -> Image.Image:
        """The pixels in a box."""


class Recent(Generic[T]):
    """A cache of the most recently used values: at most `limit` bytes, but at least one value.

    A pickled copy, as in another process, is empty.

    Args:
        limit: Maximum size in bytes.
    """

    def __init__(self, limit: int = CACHE) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.limit,)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, read: Callable[[], T], size: Callable[[T], int]) -> T:
        """Returns the value of `key`; if it is not cached, `read` creates it, and `size` returns its bytes."""
        if key not in self._values:
            value = read()
            self._values[key] = (value, size(value))
            while len(self._values) > 1 and sum(bytes_ for _, bytes_ in self._values.values()) > self.limit:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key][0]


def open_regions(
    file: str | Path | BytesIO, mode: str = "RGB", max_pixels: int | None = None
) -> "Image.Image | TiffRegions":
    """Opens an image whose regions can be read, upright, with 8 bits per channel; `collect_notes` gets assumptions.

    Args:
        file: The file, or its bytes.
        mode: PIL's mode of the regions.
        max_pixels: Maximum number of pixels of an image that is decoded as a whole; None: Pillow's limit.

    Raises:
        ValueError: If `file` is not an image that can be read.
    """
    with opened(file, any_size=True) as image:
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _has_regions(image):
            note_pages(image)
            regions = TiffRegions(file, image, mode)
            if max_pixels is not None:
                refuse_larger(regions.side, max_pixels)  # a strip may be the whole image
            return regions
    return read_image(file, mode, max_pixels)


def _has_regions(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether each region can be decoded without the rest of the image."""
    tags = image.tag_v2
    known_range = image.mode not in ("F", "I") and (not image.mode.startswith("I") or white_of(image) is None)
    whole = tags.get(259, _RAW) == _OLD_JPEG or tags.get(274, 1) not in (0, 1)
    return known_range and not whole and (324 in tags or 273 in tags)


class TiffRegions:
    """A TIFF whose tiles or strips are decoded as they are needed.

    Args:
        file: The file, or its bytes.
        image: The file as Pillow opened it.
        mode: PIL's mode of the regions.
    """

    def __init__(self, file: str | Path | BytesIO, image: TiffImagePlugin.TiffImageFile, mode: str) -> None:
        tags = image.tag_v2
        self.file, self.size, self.mode = file, image.size, mode
        self.width, self.height = image.size
        self.order = ">" if tags.prefix == b"MM" else "<"
        self.tiled = 324 in tags
        self.side = (tags[322], tags[323]) if self.tiled else (self.width, min(tags.get(278, self.height), self.height))
        offsets, sizes = (_numbers(tags[tag]) for tag in ((324, 325) if self.tiled else (273, 279)))
        if len(offsets) != len(sizes) or min(self.side) < 1:
            raise ValueError("cannot read this image: its table of tiles or strips is damaged")
        self.planes = tags.get(277, 1) if tags.get(284, 1) == 2 else 1
        self.kept = {tag: (type_, tags[tag]) for tag, type_ in _KEPT.items() if tag in tags}
        self.table = list(zip(offsets, sizes, strict=True))
        raw = tags.get(259, _RAW) == _RAW and not self.tiled and self.planes == 1
        if raw and self.side[1] > _ROWS and tags.get(262) != _YCBCR:
            self._split_strips()
        across, down = (-(-length // side) for length, side in zip(self.size, self.side, strict=True))
        if len(self.table) < across * down * self.planes:
            raise ValueError("cannot read this image: its table of tiles or strips is damaged")
        self.in_plane, self.rows = across * down, self.side[1]
        self.together = 1 if self.tiled else max(1, _ROWS // self.rows)  # short strips are decoded together
        self.side = (self.side[0], self.rows * self.together)
        self.grid = (across, -(-down // self.together))
        self.recent: Recent[Image.Image] = Recent()

    def _split_strips(self) -> None:
        """Divides long strips into short ones, which is possible without compression."""
        rows, short = self.side[1], []
        for number, (offset, size) in enumerate(self.table):
            inside = min(rows, self.height - number * rows)
            if inside < 1 or size % inside or (rows % _ROWS and len(self.table) > 1):
                return  # an unusual layout: the file's own strips are read
            row = size // inside
            short += [(offset + first * row, min(_ROWS, inside - first) * row) for first in range(0, inside, _ROWS)]
        self.table, self.side = short, (self.width, _ROWS)

    def crop(self, box: Box) -> Image.Image:
        """The pixels in a box; black outside the image.

        Raises:
            PartError: If a part of them cannot be read.
        """
        left, top, right, bottom = box
        region = Image.new(self.mode, (right - left, bottom - top))
        (width, height), (across, down) = self.side, self.grid
        for row in range(max(0, top // height), min(down, -(-bottom // height))):
            for column in range(max(0, left // width), min(across, -(-right // width))):
                segment = self.recent.get((column, row), partial(self._decoded, column, row), bytes_of)
                region.paste(segment, (column * width - left, row * height - top))
        return region

    def _decoded(self, column: int, row: int) -> Image.Image:
        """A tile, or some strips, clipped to the image."""
        first = (row * self.grid[0] + column) * self.together
        numbers = range(first, min(first + self.together, self.in_plane))
        parts = [self.table[plane * self.in_plane + number] for plane in range(self.planes) for number in numbers]
        inside = (
            min(self.side[0], self.width - column * self.side[0]),
            min(self.side[1], self.height - row * self.side[1]),
        )
        if not any(size for _, size in parts):  # GDAL leaves out tiles without data
            return Image.new(self.mode, inside)
        try:
            return self._pixels(parts, inside)
        except (OSError, ValueError) as error:
            raise PartError(str(error)) from error

    def _pixels(self, parts: list[tuple[int, int]], inside: tuple[int, int]) -> Image.Image:
        """The pixels of a tile or of strips; `parts` are the offsets and lengths of their bytes."""
        data = []
        with _binary(self.file) as stream:
            for offset, size in parts:
                stream.seek(offset)
                data.append(stream.read(size))
        small = BytesIO(self._small_tiff(data, self.side if self.tiled else (self.width, inside[1])))
        with collect_notes(), opened(small, any_size=True) as image:  # a note on one part may be wrong for the image
            decoded = upright(image, self.mode)
        return decoded if decoded.size == inside else decoded.crop((0, 0, *inside))

    def _small_tiff(self, data: list[bytes], size: tuple[int, int]) -> bytes:
        """A TIFF of this width and height with one tile or a few strips, for each plane."""
        starts = [_DATA + sum(map(len, data[:i])) for i in range(len(data))]
        lengths = [len(each) for each in data]
        entries = self.kept | {256: (4, size[0]), 257: (4, size[1])}
        if self.tiled:
            entries |= {322: (4, size[0]), 323: (4, size[1]), 324: (4, starts), 325: (4, lengths)}
        else:
            entries |= {273: (4, starts), 278: (4, min(self.rows, size[1])), 279: (4, lengths)}
        pixels = b"".join(data)
        pixels += b"\0" * (len(pixels) % 2)
        start = _DATA + len(pixels)
        table, more = b"", b""
        values_at = start + 2 + 12 * len(entries) + 4
        for tag, (type_, value) in sorted(entries.items()):
            count, packed = _packed(type_, value, self.order)
            if len(packed) > 4:
                place, packed = values_at + len(more), packed + b"\0" * (len(packed) % 2)
                more += packed
                packed = struct.pack(f"{self.order}L", place)
            table += struct.pack(f"{self.order}HHL", tag, type_, count) + packed.ljust(4, b"\0")
        header = (b"MM" if self.order == ">" else b"II") + struct.pack(f"{self.order}HL", 42, start)
        number = struct.pack(f"{self.order}H", len(entries))
        return header.ljust(_DATA, b"\0") + pixels + number + table + b"\0" * 4 + more


def bands(image: Regions) -> Iterator[Image.Image]:
    """The image from top to bottom, `BAND` rows at a time."""
    width, height = image.size
    for top in range(0, height, BAND):
        yield image.crop((0, top, width, min(top + BAND, height)))


def reduced(image: Regions, size: tuple[int, int]) -> Image.Image:
    """The whole image; a large one that is read by regions is averaged down to about twice `size`, or more.

    Args:
        image: The image.
        size: Width and height.

    Raises:
        ValueError: If a part of it cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    width, height = image.size
    factor = max(1, round(max(width / size[0], height / size[1])) // 2)
    if factor == 1 or width * height <= _SMALL:
        return image.crop((0, 0, width, height))
    rows = factor * max(1, BAND // factor)
    small = Image.new(image.crop((0, 0, 1, 1)).mode, (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        small.paste(image.crop((0, top, width, min(top + rows, height))).reduce(factor), (0, top // factor))
    return small


def _binary(file: str | Path | BytesIO) -> Any:
    return nullcontext(file) if isinstance(file, BytesIO) else Path(file).open("rb")


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _packed(type_: int, value: Any, order: str) -> tuple[int, bytes]:
    """The number of values of a TIFF tag, and their bytes."""
    if isinstance(value, bytes):
        return len(value), value
    values = value if isinstance(value, tuple | list) else (value,)
    if type_ == 5:
        pairs = [number for each in values for number in (int(each.numerator), int(each.denominator))]
        return len(values), struct.pack(f"{order}{len(pairs)}L", *pairs)
    return len(values), struct.pack(f"{order}{len(values)}{_FORMATS[type_]}", *map(int, values))


def bytes_of(image: Regions) -> int:
    """The memory of an image: Pillow uses four bytes per colour pixel; `TiffRegions` only keeps a cache."""
    width, height = image.size
    every = width * height * (4 if getattr(image, "mode", "") != "L" else 1)
    return min(every, image.recent.limit) if isinstance(image, TiffRegions) else every
