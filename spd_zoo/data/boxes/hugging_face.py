"""Data sets of the library `datasets` with a feature `objects`: `bbox` (x, y, width, height in pixels) and categories.

That is the convention of Hugging Face for object detection; `metadata.jsonl` beside images has it, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from spd_zoo.data.boxes.images import Box, BoxImages, Collector, Source, is_set, upright_size
from spd_zoo.data.classes import DataError, in_order
from spd_zoo.data.labelled import EncodedColumn, label_text, load_hugging_face
from spd_zoo.data.notes import some

__all__ = ["find", "find_named"]

_FILES = ("dataset_dict.json", "*.parquet", "*.arrow", "metadata.*")
CATEGORIES = ("category", "categories", "category_id", "label", "labels", "class")


def find(root: Path) -> Source | None:
    """The splits of a folder that the library reads; None if it is no such folder."""
    patterns = (f"{folder}{pattern}" for pattern in _FILES for folder in ("", "*/"))
    return find_named(str(root.resolve())) if any(next(root.glob(pattern), None) for pattern in patterns) else None


def find_named(name: str) -> Source:
    """The splits of a data set of the Hub, or of a folder.

    Raises:
        DataError: If it cannot be read, or has no feature `objects`.
    """
    splits = load_hugging_face(name)
    for split in splits:
        if "objects" not in splits[split].features:
            columns = ", ".join(splits[split].features)
            raise DataError(f"{name} has no column `objects` with bbox and category; its columns are {columns}")
    return Source("data set of Hugging Face", {str(s): partial(_open, name, str(s), splits[s]) for s in splits})


def _open(name: str, split: str, dataset: Any) -> BoxImages:
    import datasets

    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise DataError(f"{name} needs one column of images, and has {some(columns) or 'none'}")
    feature = dataset.features["objects"]
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    keys = list(feature) if isinstance(feature, dict) else []
    category = next((key for key in CATEGORIES if key in keys), None)
    if "bbox" not in keys or category is None:
        raise DataError(f"{name}: the column `objects` needs bbox and category, and has {some(keys) or feature}")
    described = feature[category]
    described = described[0] if isinstance(described, list) else getattr(described, "feature", described)
    rows = [_by_key(objects, keys) for objects in dataset.select_columns(["objects"])[:]["objects"]]
    declared = getattr(described, "names", None)
    class_names = declared or in_order(filter(None, (label_text(value) for each in rows for value in each[category])))
    number = {i if declared else class_name: i for i, class_name in enumerate(class_names)}
    collected, images, present = Collector(class_names, name), EncodedColumn(dataset, columns[0]), []
    for i, objects in enumerate(rows):
        try:
            image = images[i]
        except ValueError:  # the row stays, so that the others keep their numbers
            collected.leave_out("rows hold no image and are left out", f"{split} row {i}")
            collected.add(f"{split} row {i}", None, ())
            continue
        present.append(i)
        image_name = image if isinstance(image, str) else f"{split} row {i}"
        boxes = []
        for j in range(max(len(objects["bbox"]), len(objects[category]))):
            where = f"{image_name} object {j + 1}"
            try:
                x, y, width, height = map(float, objects["bbox"][j])
                value = objects[category][j]
                ignored = any(is_set(objects[key][j]) for key in ("iscrowd", "ignore", "difficult") if key in keys)
                area = float(objects["area"][j]) if "area" in keys and objects["area"][j] is not None else None
            except (IndexError, TypeError, ValueError):
                collected.leave_out(
                    "objects lack four numbers of a box or a category and are left out", where, image_name
                )
                continue
            label = number.get(value if declared else label_text(value))
            boxes.append(Box(label, x, y, x + width, y + height, where, area, ignored))
        collected.add(image_name, upright_size(image), boxes)
    return replace(collected.images(f"{name} {split}", split), encoded=images, rows=present)


def _by_key(objects: Any, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The objects of an image as a list for each key, in either representation of the library."""
    if isinstance(objects, dict):
        return {key: list(objects.get(key) or ()) for key in keys}
    return {key: [(each or {}).get(key) for each in objects or ()] for key in keys}
