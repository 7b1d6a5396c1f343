"""Image files: found by name, folder or glob, and read as networks take them, whatever their format."""

import glob
import os
import struct
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["SUFFIXES", "find_images", "read_image", "upright"]

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_READING_ERRORS = (  # what PIL's decoders raise for broken files
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError),
    *(struct.error, MemoryError, Image.DecompressionBombError),
)


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The files behind files, folders (with the folders in them) and globs, in order.

    Folders without images are left out if anything else is given. What else is no image stays in the list: reading it
    says what is wrong.
    """
    found, empty = [], []  # os.path, unlike pathlib, takes too long and forbidden paths for missing ones
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for path in map(Path, matches or [pattern]):
            if os.path.isdir(path):
                inside = [file for file in sorted(path.rglob("*")) if _is_visible_image(file, path)]
                found += inside
                empty += [] if inside else [path]
            else:
                found.append(path)
    return found or empty


def _is_visible_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def read_image(file: Path | str | BytesIO, mode: str = "RGB") -> Image.Image:
    """An image file, or its bytes, upright and in `mode`, 8 bits per channel; 16-bit grey is scaled to 8.

    Raises:
        ValueError: If `file` is no image that can be read.
    """
    if not isinstance(file, BytesIO):
        if not os.path.exists(file):
            raise ValueError("there is no such file, nor does a file match it as a pattern")
        if os.path.isdir(file):
            raise ValueError(f"this folder holds no image ({' '.join(SUFFIXES)})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of what it copes with: large images, odd EXIF, palettes
            with Image.open(file) as image:
                return upright(image, mode)
    except UnidentifiedImageError as error:
        raise ValueError("this is no image in a format that Pillow knows") from error
    except _READING_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot read this image: {reason}") from error


def upright(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """An opened image turned as its EXIF says and in `mode`, 8 bits per channel; 16-bit grey is scaled to 8.

    Raises:
        ValueError: If its pixels have 32 bits.
    """
    return _in_8_bits(ImageOps.exif_transpose(image)).convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Modes with more than 8 bits scaled, which `convert` would clip; the others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have 32 bits, of unknown range; save it with 8 or 16 bits")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))
