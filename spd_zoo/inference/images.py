"""Images in every form that `Classifier` and `Detector` take, and how results show them."""

import base64
import html
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from glob import has_magic
from importlib import import_module
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageShow
from torch import Tensor

from spd_zoo.data.reading import collect_notes, find_images, read_image, upright
from spd_zoo.files import exists, is_folder

__all__ = ["COLOURS", "ImageLike", "as_html", "check_colour", "listed", "open_image", "optional_package", "show"]

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor

COLOURS = ("rgb", "bgr")  # orders of the channels of an array
_SHOWN = 640  # longest side of an image in a notebook, in pixels


def check_colour(colour: str) -> None:
    """Raises ValueError if this is no order of an array's channels."""
    if colour not in COLOURS:
        raise ValueError(f"colour must be {' or '.join(COLOURS)}, got {colour!r}")


def listed(images: Any, colour: str = "rgb") -> tuple[list[Any], bool]:
    """The images that a caller means: one, those of a list, or those of a folder or pattern.

    Args:
        images: An image, a list of images, or the path of a folder, or a pattern such as photos/*.png.
        colour: The order of the channels of arrays (H, W, 3); those of "bgr" are returned in RGB.

    Returns:
        The images, and whether they are several.

    Raises:
        ValueError: If a list has a folder or a pattern in it.
    """
    if isinstance(images, list | tuple):
        for image in images:
            if _is_folder(image) or _is_pattern(image):
                what = "folder" if _is_folder(image) else "pattern"
                raise ValueError(f"{os.fspath(image)} is a {what}; give it alone, not in a list")
        return [_in_rgb(image, colour) for image in images], True
    if _is_folder(images) or _is_pattern(images):
        return list(find_images([os.fspath(images)])), True
    return [_in_rgb(images, colour)], False


def _in_rgb(image: Any, colour: str) -> Any:
    """The image; an array of colours in BGR as a view in RGB."""
    is_colour = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3
    return image[..., ::-1] if is_colour and colour == "bgr" else image


def _is_folder(image: Any) -> bool:
    return isinstance(image, str | os.PathLike) and is_folder(image)


def _is_pattern(image: Any) -> bool:
    return isinstance(image, str | os.PathLike) and has_magic(os.fspath(image)) and not exists(image)


def open_image(image: Any, mode: str = "RGB", read: Callable[[str, str], Any] = read_image) -> Any:
    """Opens an image, upright and with 8 bits per channel; warns of what was guessed about it.

    Args:
        image: A file, a PIL image, an array of uint8, (H, W, 3) in RGB or grey (H, W) or (H, W, 1), or a tensor
            (3, H, W) or (1, H, W) of uint8 or of floats from 0 to 1.
        mode: PIL's mode of the result.
        read: Reads a file in a mode.

    Returns:
        The image; of a file what `read` returns.

    Raises:
        ValueError: If it cannot be read or is none of these.
    """
    with collect_notes() as notes:
        opened = _opened(image, mode, read)
    for note in notes:
        warnings.warn(f"an image with {note}", stacklevel=2)
    return opened


def _opened(image: Any, mode: str, read: Callable[[str, str], Any]) -> Any:
    if isinstance(image, str | os.PathLike):
        try:
            return read(os.fspath(image), mode)
        except ValueError as error:
            if str(error).startswith(os.fspath(image)):  # as for an address
                raise
            raise ValueError(f"{os.fspath(image)}: {error}") from error
    if isinstance(image, Image.Image):
        if not all(image.size):  # cut out of another one by an empty box
            raise ValueError(f"an image must have pixels, got {image.width} x {image.height}")
        return upright(image, mode)
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        is_colour = pixels.ndim == 3 and pixels.shape[2] == 3
        if not (is_colour or pixels.ndim == 2) or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"an array must be of uint8, (H, W, 3) in colour or (H, W) in grey, got {image.shape} of {image.dtype}"
            )
        return Image.fromarray(np.ascontiguousarray(pixels)).convert(mode)
    if not isinstance(image, Tensor):
        kind = type(image).__name__
        raise ValueError(f"an image must be a file, a PIL image, an array or a tensor, or a list of these, got {kind}")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(
            f"a tensor must be (3, H, W), or (1, H, W) in grey, got {tuple(image.shape)}; give several images as a list"
        )
    image = image.detach().cpu()
    if image.is_floating_point():
        if not ((image >= 0) & (image <= 1)).all():
            raise ValueError("a tensor of floats must hold values from 0 to 1")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"a tensor must be of uint8, or of floats from 0 to 1, got {image.dtype}")
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy()).convert(mode)


def show(image: Image.Image) -> None:
    """Shows an image in the notebook that runs this code, or else in the system's viewer.

    Raises:
        RuntimeError: If there is no viewer.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        sys.modules["IPython"].display.display(image)
    elif not ImageShow.show(image):
        raise RuntimeError("this machine has no program that shows images; save what `draw` returns instead")


def as_html(image: Image.Image | None, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An image, if there is one, and a table, for notebooks."""
    picture = ""
    if image is not None:
        small, file = image.copy(), BytesIO()
        small.thumbnail((_SHOWN, _SHOWN))
        small.save(file, format="PNG")
        picture = f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div>{picture}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def optional_package(name: str, needed_by: str) -> Any:
    """A package that is no dependency.

    Args:
        name: The package.
        needed_by: What needs it, for the error.

    Raises:
        ModuleNotFoundError: If it is missing.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{needed_by} needs the package {error.name}: pip install {error.name}", name=error.name
        ) from error
