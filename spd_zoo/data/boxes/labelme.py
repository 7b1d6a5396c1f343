"""LabelMe: one JSON file for each image, beside it, with shapes; the extent of a shape is its box."""

import base64
import binascii
import json
import math
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from spd_zoo.data.boxes.folders import (
    child,
    files_with,
    find_moved,
    hidden_in,
    relative_to,
    split_folders,
    text_of,
    without_annotation,
)
from spd_zoo.data.boxes.images import Box, BoxImages, Collector, Source, is_set
from spd_zoo.data.boxes.voc import image_of
from spd_zoo.data.classes import clean_name
from spd_zoo.data.splits import split_of

__all__ = ["find"]


def find(root: Path) -> Source | None:
    """The splits of a folder with LabelMe's files: folders of their names, or all images as train."""
    splits = {name: path for name, path in split_folders(root).items() if split_of(name) and _has_files(path)}
    if not splits and _has_files(root):
        splits = {"train": root}
    return Source("LabelMe", {name: partial(_open, root, path) for name, path in splits.items()}) if splits else None


def _has_files(folder: Path) -> bool:
    """Whether one of the first JSON files is one of LabelMe's."""
    return any(_read(file) is not None for file in files_with(folder, ".json")[:20])


def _read(file: Path) -> Any:
    """The content of one of LabelMe's files; None if it is none."""
    try:
        content = json.loads(text_of(file))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("shapes"), list) else None


def _open(root: Path, folder: Path) -> BoxImages:
    read = {file: _read(file) for file in files_with(folder, ".json")}
    contents = {file: content for file, content in read.items() if content is not None}
    damaged = [file for file in read if file not in contents]
    names = {_name(shape) for content in contents.values() for shape in content["shapes"]} - {""}
    collected = Collector(sorted(names), folder)
    number = {name: i for i, name in enumerate(sorted(names))}
    for file in damaged:
        collected.leave_out("JSON files are not in LabelMe's format; their images are left out", str(file))
    used = set()
    for file, content in contents.items():
        image, encoded = _image(file, content, root)
        used.add(image)
        boxes = []
        for i, shape in enumerate(content["shapes"], 1):
            where = f"{file} shape {i}"
            try:
                box = Box(number[_name(shape)], *_extent(shape), where=where, ignored=is_set(shape.get("difficult")))
                boxes.append(box)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError):
                collected.leave_out("shapes lack a label or enclose nothing and are left out", where, image)
        collected.add(image, _size(content), boxes, encoded)
    notes = [*hidden_in(folder), *without_annotation(folder, used, "a usable JSON file")]
    return collected.images(folder, relative_to(folder, root), notes)


def _name(shape: Any) -> str:
    return clean_name(str(shape.get("label") or "")) if isinstance(shape, dict) else ""


def _extent(shape: dict[str, Any]) -> tuple[float, float, float, float]:
    """The corners around a rectangle, polygon or circle."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    if shape.get("shape_type") == "circle":  # its centre and a point on it
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return x - radius, y - radius, x + radius, y + radius
    if len(points) < 2:
        raise ValueError("a point has no extent")
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _image(file: Path, content: dict[str, Any], root: Path) -> tuple[Path, BytesIO | None]:
    """The image beside the file, or where `imagePath` says; else the bytes that the file itself holds."""
    beside = image_of(file.stem, file.parent)
    path = str(content.get("imagePath") or "")
    images = child(root, "images")
    folders = [file.parent, *([images] if images else []), root]
    found = beside or (find_moved(path, folders) if path else None)
    if found is not None:
        return found, None
    try:
        data = base64.b64decode(content.get("imageData") or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        data = b""
    return file.with_name(Path(path.replace("\\", "/")).name or f"{file.stem}.jpg"), BytesIO(data) if data else None


def _size(content: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height, if the file says both."""
    width, height = content.get("imageWidth"), content.get("imageHeight")
    return (width, height) if isinstance(width, int) and isinstance(height, int) and width and height else None
