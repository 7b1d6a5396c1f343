"""COCO: one JSON file for each split, with images, annotations and categories.

Paper: Microsoft COCO: Common Objects in Context, https://arxiv.org/abs/1405.0312. Also what Roboflow, Label Studio and
CVAT call COCO: any name of the file, folders with `_annotations.coco.json`, polygons without boxes.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spd_zoo.data.boxes.folders import (
    child,
    files_with,
    find_moved,
    folders_of_split,
    relative_to,
    several_files,
    split_folders,
    text_of,
)
from spd_zoo.data.boxes.images import Box, BoxImages, Collector, Source, is_set
from spd_zoo.data.classes import DataError
from spd_zoo.data.notes import some
from spd_zoo.data.reading import is_url
from spd_zoo.data.splits import split_of

__all__ = ["find", "find_file"]


def find(root: Path) -> Source | None:
    """The splits of a folder with COCO's files: `instances_*.json` if there are any, else others of that content."""
    annotations = child(root, "annotations", "annotation")
    folders = [root, *([annotations] if annotations else [])]
    files = [file for folder in folders for file in files_with(folder, ".json", deep=False)]
    instances = {file.stem.removeprefix("instances_"): file for file in reversed(files) if _is_instances(file)}
    if instances:
        notes = []
        if len(instances) == 1 and not any(map(split_of, instances)):  # CVAT's instances_default.json
            (file,) = instances.values()
            notes.append(f"{relative_to(file, root)} names no usual split: it is read as train")
            return Source("COCO", {"train": partial(_open, root, *next(iter(instances.items())))}, notes)
        return _source(root, instances, notes)
    for folder in folders:
        for name, inside in split_folders(folder).items():
            files += files_with(inside, ".json", deep=False) if split_of(name) else []
    found: dict[str, list[Path]] = defaultdict(list)
    is_coco = {file: _is_coco(file) for file in _few_of_each_folder(files)}
    damaged = [file for file, known in is_coco.items() if known is None]
    if not any(is_coco.values()) and not any("coco" in file.name.lower() for file in damaged):
        return None
    for file in (*(file for file, known in is_coco.items() if known), *damaged):  # opening a damaged one says so
        found[_split_name(file, root)].append(file)
    return _source(root, {name: several[0] for name, several in found.items()}, several_files(root, found))


def find_file(file: Path) -> Source:
    """The images of one file, as the split of its name, or else as train.

    Raises:
        DataError: If it is not in COCO's format.
    """
    root = file.parent.parent if file.parent.name.lower() in ("annotations", "annotation") else file.parent
    return _source(root, {_split_name(file, root): file}, [])


def _source(root: Path, files: dict[str, Path], notes: list[str]) -> Source:
    return Source("COCO", {name: partial(_open, root, name, file) for name, file in files.items()}, notes)


def _is_instances(file: Path) -> bool:
    return file.stem.startswith("instances_")


def _few_of_each_folder(files: list[Path]) -> list[Path]:
    """At most 20 files of each folder: where there are more, they are those of single images."""
    number = Counter(file.parent for file in files)
    return [file for file in files if number[file.parent] <= 20]


def _is_coco(file: Path) -> bool | None:
    """Whether a JSON file has the keys of COCO's object annotations; None if it cannot be read."""
    try:
        content = json.loads(text_of(file))
    except (ValueError, OSError, RecursionError):
        return None
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        return False
    annotations = content["annotations"]
    if not isinstance(annotations, list):
        return False
    objects = [each for each in annotations[:1000] if isinstance(each, dict)]
    if _has_scores(objects):
        return False
    return not annotations or any("bbox" in each or "segmentation" in each for each in objects)


def _has_scores(annotations: Sequence[Any]) -> bool:
    """Whether annotations are results of a detector, as `detect` writes them; VisDrone has scores of 0 and 1."""
    scores = [each.get("score") for each in annotations if isinstance(each, dict)]
    return any(isinstance(score, float) and 0 < score < 1 for score in scores)


def _split_name(file: Path, root: Path) -> str:
    """The split in a word of the file's name or its folder: train_coco.json, train/_annotations.coco.json."""
    stem = file.stem.removeprefix("instances_")
    words = (stem, *re.split(r"[-_. ]+", stem), *file.relative_to(root).parts[:-1])
    return next((word for word in words if split_of(word)), "train")


def _open(root: Path, split: str, file: Path) -> BoxImages:
    try:
        content = json.loads(text_of(file))
    except (OSError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"cannot read {file} as JSON: {error}") from error
    try:
        annotations, categories = content["annotations"], content["categories"]
        images = [image for image in content["images"] if _is_image(image)]
        image_ids = [image["id"] for image in images]
        names = [str(image["file_name"]) for image in images]
        used = {str(annotation.get("category_id")) for annotation in annotations if isinstance(annotation, dict)}
        categories, notes = _without_parent(categories, used, file)
        category_ids = [category["id"] for category in categories]
        class_names = [str(category["name"]) for category in categories]
        number = {key: i for i, key in enumerate(category_ids)}
        set(image_ids)  # an id that is a list or mapping is a TypeError
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"{file} is not in COCO's format for objects ({type(error).__name__}: {error}); it needs images, "
            "annotations and categories"
        ) from error
    if _has_scores(annotations):
        raise DataError(
            f"{file} has the results of a detector, and no annotations; give annotations, or correct these boxes and "
            "remove their scores"
        )
    collected = Collector(class_names, file)
    for list_name, keys in (("categories", category_ids), ("images", image_ids)):
        twice = next((key for key, number in Counter(map(repr, keys)).items() if number > 1), None)
        if twice is not None:
            raise DataError(f"{file} has two {list_name} with the id {twice}; give each an id of its own")
    if not names:
        raise DataError(f"{file} lists no image")
    for _ in range(len(content["images"]) - len(images)):
        collected.leave_out("images lack an id or a file_name and are left out", str(file))
    boxes = _boxes(annotations, number, file, collected)
    paths, folder = _paths(root, split, file, names)
    for image, key, path in zip(images, image_ids, paths, strict=True):
        collected.add(path, _size(image), boxes.pop(key, ()))
    for key, lost in boxes.items():
        for box in lost:
            collected.leave_out("boxes belong to no image of the list and are left out", f"{box.where} of image {key}")
    return collected.images(file, folder, notes)


def _without_parent(
    categories: list[dict[str, Any]], used: set[str], file: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The categories without one that is only the parent of others, such as Roboflow's first one."""
    parents = {str(category.get("supercategory")) for category in categories}
    kept = [
        category
        for category in categories
        if str(category["id"]) in used
        or str(category["name"]) not in parents
        or str(category.get("supercategory", "none")).lower() not in ("none", "")
    ]
    gone = [str(category["name"]) for category in categories if category not in kept]
    if not gone or not kept:
        return categories, []
    return kept, [f"{file}: the category {some(gone)} has no box and is only the parent of others: it is left out"]


def _boxes(
    annotations: list[dict[str, Any]], number: dict[Any, int], file: Path, collected: Collector
) -> dict[Any, list[Box]]:
    """The boxes of each image by its id."""
    boxes: dict[Any, list[Box]] = defaultdict(list)
    for i, annotation in enumerate(annotations):
        where = f"annotation {annotation.get('id', f'number {i + 1}') if isinstance(annotation, dict) else i + 1}"
        try:
            x, y, width, height = _bbox(annotation)
            label = number.get(annotation["category_id"])
            area = annotation.get("area")
            ignored = is_set(annotation.get("iscrowd")) or is_set(annotation.get("ignore"))
            box = Box(label, x, y, x + width, y + height, where, None if area is None else float(area), ignored)
            boxes[annotation["image_id"]].append(box)
        except _NoBoxError:
            collected.leave_out("annotations have neither a box nor a mask and are left out", where)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            collected.leave_out(
                "annotations lack an image, a category or four numbers of a box and are left out", where
            )
    return boxes


class _NoBoxError(Exception):
    """An annotation that does not say where its object is."""


def _bbox(annotation: dict[str, Any]) -> Sequence[float]:
    """Left, top, width and height: those of `bbox`, or else the extent of the polygon or the RLE."""
    bbox = annotation.get("bbox")
    if bbox:
        x, y, width, height = map(float, bbox)
        return x, y, width, height
    mask = annotation.get("segmentation")
    if isinstance(mask, dict) and mask.get("counts"):
        from faster_coco_eval import mask as masks

        height, width = mask["size"]
        try:
            encoded = masks.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask
            x, y, width, height = map(float, masks.toBbox(encoded))
        except RuntimeError as error:
            raise ValueError("the RLE is damaged") from error
        return x, y, width, height
    points = [float(value) for polygon in mask or () for value in polygon] if isinstance(mask, list) else []
    if not points:
        raise _NoBoxError
    xs, ys = points[::2], points[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _is_image(image: Any) -> bool:
    return isinstance(image, dict) and {"id", "file_name"} <= image.keys()


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height, if the file says both."""
    try:
        size = int(image["width"]), int(image["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _paths(root: Path, split: str, file: Path, names: list[str]) -> tuple[list[Path], str]:
    """The path of each image, and the folder with the first of them."""
    url = next((name for name in names if is_url(name)), None)
    if url is not None:
        raise DataError(
            f"{file} has the address {url} as file_name; download the images, and give the names of their files"
        )
    images = child(root, "images", "data")
    folders = [*_split_folders(images, split), *_split_folders(root, split)]
    folders = list(dict.fromkeys([*folders, *([images] if images else []), file.parent, root]))
    for folder in folders:
        if any((folder / name).is_file() for name in names):
            paths = [folder / name for name in names]
            # what is not in this folder may be in another one
            paths = [
                path if path.is_file() else find_moved(name, folders) or path
                for path, name in zip(paths, names, strict=True)
            ]
            return paths, relative_to(folder, root)
    paths = [find_moved(name, folders) or folders[0] / name for name in names]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        places = ", ".join(map(str, folders))
        raise DataError(f"none of the images that {file} lists, such as {names[0]}, is in the folders {places}")
    return paths, relative_to(found.parent, root)


def _split_folders(root: Path | None, split: str) -> list[Path]:
    """Where the images of a split may be: in the folder of its name, or of another name of the same split."""
    if root is None:
        return []
    places = (place for folder in folders_of_split(root, split) for place in (folder, child(folder, "images")))
    return [place for place in places if place is not None]
