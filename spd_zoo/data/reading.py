"""Finds image files by name, folder or glob, and reads them in any format, upright and with 8 bits per channel."""

import glob
import importlib
import importlib.util
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from spd_zoo.data.notes import Notes, count
from spd_zoo.weights.catalogue import ModelError

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "ImageFilter",
    "channel_mode",
    "collect_notes",
    "files_in",
    "find_images",
    "is_comment",
    "is_identified",
    "is_url",
    "note_pages",
    "opened",
    "parse_size",
    "per_channel",
    "read_image",
    "refuse_among",
    "refuse_larger",
    "size_text",
    "size_value",
    "upright",
    "white_of",
]

if importlib.util.find_spec("pillow_heif") is not None:
    importlib.import_module("pillow_heif").register_heif_opener()
Image.init()  # registers every format

_NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")  # which Pillow names but does not decode by itself
SUFFIXES = tuple(
    sorted(
        suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN and form not in _NOT_READ
    )
)
MAX_PIXELS = 178_956_970  # of an image that is read as a whole: Pillow's own limit
_HEIC = (".heic", ".heif", ".hif")

_LIMIT = threading.RLock()  # guards Pillow's limit of pixels, which is global
_collected: ContextVar[list[str] | None] = ContextVar("notes on images", default=None)
_SEVERAL_PAGES = "several pages or frames, of which the first is read"
_DARK = "16 bits, of which the highest two or more are not used: read as 16 bits, and so perhaps too dark"


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether this is an address such as https://example.org/1.png rather than a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(text)) is not None and not os.path.exists(text)


def is_comment(line: str) -> bool:
    """Whether a line of a list of images is a comment, and not the name of an image that begins with #."""
    return line.startswith("#") and not line.lower().endswith(SUFFIXES)


def _url_error(text: str | os.PathLike[str]) -> ValueError:
    return ValueError(f"{os.fspath(text)} is an address, which is not read; download the file and give its path")


class ImageFilter:
    """Recognises image files by their suffix, or by their content if they have none, and counts other files.

    Args:
        others: Further suffixes that count as images.
    """

    def __init__(self, others: tuple[str, ...] = ()) -> None:
        self.suffixes = (*SUFFIXES, *others)
        self.left_out: Counter[str] = Counter()

    def __call__(self, file: str | Path, folder: str | Path) -> bool:
        """Whether a file in a folder is an image, or a broken link to one; hidden files are ignored."""
        if any(part.startswith(".") for part in Path(file).relative_to(folder).parts):
            return False
        suffix = Path(file).suffix.lower()
        if not os.path.isfile(file):
            return suffix in self.suffixes and os.path.islink(file) and not os.path.exists(file)  # reading it says so
        if suffix in self.suffixes or (not suffix.strip(".0123456789") and is_identified(file)):
            return True
        self.left_out[suffix or "no suffix"] += 1
        return False

    def notes(self, where: str | Path) -> list[str]:
        """A note on the files that were left out of the folder `where`, if there are any."""
        if not self.left_out:
            return []
        suffixes = ", ".join(f"{suffix} ({number})" for suffix, number in self.left_out.most_common())
        heic = "; pip install pillow-heif to read HEIC" if any(suffix in _HEIC for suffix in self.left_out) else ""
        left_out = count(self.left_out.total(), "file")
        return [f"{left_out} in {where} left out, because the suffix is not that of an image: {suffixes}{heic}"]


def files_in(folder: str | Path, unreadable: list[str] | None = None) -> Iterator[str]:
    """The paths of all files in a folder and its subfolders; links are followed, but circles of links only once.

    Args:
        folder: The folder.
        unreadable: Receives folders that must not or cannot be read, except hidden ones; None: such a one is an error.

    Raises:
        OSError: If a folder cannot be read.
    """

    def note(error: OSError) -> None:
        parts = Path(error.filename).relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        if unreadable is None:
            raise error
        unreadable.append(error.filename)

    around = {os.fspath(folder): {os.path.realpath(folder)}}
    for inside, folders, names in os.walk(folder, onerror=note, followlinks=True):
        yield from (os.path.join(inside, name) for name in names)
        above = around.pop(inside)
        real = {name: os.path.realpath(os.path.join(inside, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in above]
        around |= {os.path.join(inside, name): above | {real[name]} for name in folders}


def is_identified(file: str | Path) -> bool:
    """Whether Pillow knows the format of a file by its first bytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(file).close()
    except Exception:  # whatever Pillow's parsers raise, the file is no image
        return False
    return True


def find_images(patterns: Iterable[str], notes: Notes | None = None, others: tuple[str, ...] = ()) -> list[Path]:
    """The files named by files, folders (with the folders in them) and globs, in order.

    Folders without images are left out if anything else is found. Other paths stay in the list even if they are not
    images, and so do folders that cannot be read, so that reading them gives an error.

    Args:
        patterns: Files, folders and globs.
        notes: Receives a note for each folder that has no images, or files other than images.
        others: Further suffixes that count as images in folders.

    Returns:
        The paths.

    Raises:
        ValueError: If one of the patterns is empty or an address.
    """
    found, empty = [], []
    for pattern in patterns:
        if not pattern:  # pathlib would take it for the current folder
            raise ValueError("a path is empty; if it is a variable of the shell, it is not set")
        if is_url(pattern):
            raise _url_error(pattern)
        # os.path.exists returns False for over-long or forbidden paths; pathlib raises
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for path in map(Path, matches or [pattern]):
            if os.path.isdir(path):
                is_image, unreadable = ImageFilter(others), list[str]()
                inside = [file for file in sorted(map(Path, files_in(path, unreadable))) if is_image(file, path)]
                inside += map(Path, unreadable)  # reading them gives an error
                found += inside
                empty += [] if inside else [path]
                if notes is not None:
                    notes.extend(is_image.notes(path))
            else:
                found.append(path)
    if found and notes is not None:
        notes.extend(f"the folder {folder} holds no image" for folder in empty)
    return found or empty


def read_image(file: Path | str | BytesIO, mode: str = "RGB", max_pixels: int | None = None) -> Image.Image:
    """An image file, or its bytes, upright and in `mode`, 8 bits per channel; for guesses see `collect_notes`.

    Args:
        file: The file, or its bytes.
        mode: PIL's mode of the result.
        max_pixels: Maximum number of pixels of the image; None: Pillow's limit.

    Raises:
        ValueError: If `file` is not an image that can be read.
    """
    with opened(file, max_pixels is not None) as image:
        if max_pixels is not None:
            tiles = "--tile N reads a TIFF in parts, or " if image.format == "TIFF" else ""
            refuse_larger(image.size, max_pixels, tiles)
        return upright(image, mode)


def refuse_among(out: Path, folders: Iterable[Path], data: str | Path) -> None:
    """Raises ValueError if the folder `out` lies in one of the `folders` of `data`, where its images would be found."""
    if not {folder.resolve() for folder in folders}.isdisjoint(out.resolve().parents):
        raise ValueError(f"{out} lies among the images of {data}; give another --out")


def refuse_larger(size: tuple[int, int], max_pixels: int, others: str = "") -> None:
    """Raises ValueError if an image has more pixels than the limit; `others` names what helps besides raising it."""
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width}x{height} pixels, more than the limit of {max_pixels}; "
            f"{others}give --max-pixels {width * height} if it may be read as a whole"
        )


@contextmanager
def opened(file: Path | str | BytesIO, any_size: bool = False) -> Iterator[Image.Image]:
    """Opens an image file with Pillow; errors until it is closed become a ValueError of one sentence.

    Args:
        file: The file, or its bytes.
        any_size: Whether to lift Pillow's limit of pixels while a larger image is open.

    Raises:
        ValueError: If `file` is not an image that can be read.
    """
    if not isinstance(file, BytesIO):
        if is_url(file):
            raise _url_error(file)
        if not os.path.exists(file):
            if os.path.islink(file):
                raise ValueError("this link leads to no file")
            raise ValueError("there is no such file, nor does a file match it as a pattern")
        if os.path.isdir(file):
            try:
                os.scandir(file).close()
            except OSError as error:
                raise ValueError(f"this folder cannot be read: {error.strerror or error}") from error
            raise ValueError(f"this folder holds no image ({' '.join(SUFFIXES)})")
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # Pillow warns of what it copes with: large images, odd EXIF, palettes
            try:
                image = Image.open(file)
            except Image.DecompressionBombError:
                if not any_size:
                    raise
                stack.enter_context(_without_limit())
                image = Image.open(file)
            yield stack.enter_context(image)
    except UnidentifiedImageError as error:
        if _is_heic(file):
            raise ValueError("this is a HEIC image; pip install pillow-heif to read it") from error
        raise ValueError("this is no image in a format that Pillow knows") from error
    except Exception as error:  # decoders of damaged files raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot read this image: {reason}") from error


@contextmanager
def _without_limit() -> Iterator[None]:
    """Lifts Pillow's limit of pixels, which it checks when it opens a file and again when it decodes one."""
    with _LIMIT:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _is_heic(file: Path | str | BytesIO) -> bool:
    if isinstance(file, BytesIO):
        first = file.getvalue()[:12]
    else:
        with open(file, "rb") as opened:
            first = opened.read(12)
    return first[4:8] == b"ftyp" and first[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1")


def upright(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """An opened image turned as its EXIF says and in `mode`, 8 bits per channel; for guesses see `collect_notes`.

    Raises:
        ValueError: If its pixels have more than 16 bits and an unknown range.
    """
    note_pages(image)
    notes = []
    white, deep = white_of(image), any(";16" in str(tile[-1]) for tile in getattr(image, "tile", []))
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "F" or turned.mode.startswith("I"):
        turned, note = _in_8_bits(turned, white)
        notes += [note] if note else []
        deep = False
    converted = turned.convert(mode)
    if deep and np.asarray(converted).max() < 64:
        notes.append(_DARK)
    collected = _collected.get()
    if collected is not None:
        collected += notes
    return converted


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collects the assumptions of `read_image` and `upright` about images that are read in this context."""
    notes: list[str] = []
    token = _collected.set(notes)
    try:
        yield notes
    finally:
        _collected.reset(token)


def note_pages(image: Image.Image) -> None:
    """Notes if an opened file has several pages, of which only the first is read."""
    collected = _collected.get()
    if collected is not None and _has_several_pages(image):
        collected.append(_SEVERAL_PAGES)


def _has_several_pages(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except (OSError, EOFError, SyntaxError, ValueError):  # the second page is damaged; the first one is read
        return True


def white_of(image: Image.Image) -> float | None:
    """The value of white, if the file declares it: TIFF's MaxSampleValue, SMaxSampleValue or less than 16 bits."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0  # Pillow has scaled it
    tags = getattr(image, "tag_v2", {})
    for tag in (341, 281):
        value = tags.get(tag)
        largest = max(value) if isinstance(value, tuple) else value
        if isinstance(largest, int | float) and 0 < largest < 2**32:
            # often only the largest value that occurs, which still indicates the number of bits
            return 1.0 if largest <= 1 else float(2 ** int(largest).bit_length() - 1)
    bits = tags.get(258)
    depth = bits[0] if isinstance(bits, tuple) else bits
    return float(2**depth - 1) if isinstance(depth, int) and depth < 16 else None


def _in_8_bits(image: Image.Image, white: float | None) -> tuple[Image.Image, str]:
    """A grey image scaled from 0..white to 8 bits, which `convert` would clip, and a note if that is a guess."""
    pixels, note = np.asarray(image), ""
    smallest, largest = float(pixels.min()), float(pixels.max())
    if white is None or largest > white:
        if image.mode.startswith("I;16"):
            white, note = 65535.0, _DARK if largest < 2**14 else ""
        else:
            ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
            white = next((white for white in ranges if largest <= white), None)
            note = f"32 bits without a range, read as values from 0 to {white:g}" if white is not None else ""
    if white is None or not smallest >= 0:
        raise ValueError(
            f"its pixels have 32 bits and values from {smallest:g} to {largest:g}, of unknown range; save it with 8 or "
            "16 bits"
        )
    return Image.fromarray((pixels / (white / 255)).round().astype(np.uint8)), note


def channel_mode(channels: int, model: str) -> str:
    """Pillow's mode of images with so many channels.

    Raises:
        ModelError: If `model` takes neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ModelError(f"{model} takes {channels} channels; images have 1 or 3")
    return "L" if channels == 1 else "RGB"


def parse_size(text: str | int) -> tuple[int, int]:
    """Height and width in pixels: "64" -> (64, 64), "48x96" -> (48, 96).

    Raises:
        ValueError: If the text is something else.
    """
    sides = str(text).strip().lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise ValueError(f"image size {text!r} is not like 64, or HEIGHTxWIDTH like 48x96")
    return int(sides[0]), int(sides[-1])


def size_value(size: Sequence[int]) -> int | str:
    """The size (height, width) for tables, which `parse_size` reads: a number if it is square, otherwise a text."""
    height, width = size
    return height if height == width else f"{height}x{width}"


def size_text(size: Sequence[int]) -> str:
    """The size (height, width) as `parse_size` reads it: "64" if it is square, else "48x96"."""
    return str(size_value(size))


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A number for each of a network's channels: their mean for all if the config has them for other channels."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
