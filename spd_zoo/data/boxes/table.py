"""CSV as Roboflow and TensorFlow's tutorials have it: filename, width, height, class, xmin, ymin, xmax, ymax.

A row is a box; its edges are in pixels from 0. Images without a row are not known to be empty, and are left out.
"""

import csv
from collections import defaultdict
from functools import partial
from pathlib import Path

from spd_zoo.data.boxes.folders import (
    child,
    files_with,
    find_moved,
    folders_in,
    relative_to,
    several_files,
    split_folders,
    without_annotation,
)
from spd_zoo.data.boxes.images import Box, BoxImages, Collector, Source
from spd_zoo.data.classes import DataError, clean_name
from spd_zoo.data.splits import find_split, split_of

__all__ = ["find", "find_file"]

COLUMNS = ("filename", "class", "xmin", "ymin", "xmax", "ymax")


def find(root: Path) -> Source | None:
    """The tables in a folder or in the folders of its splits; None if there is none with these columns."""
    files = files_with(root, ".csv", deep=False)
    for name, folder in split_folders(root).items():
        files += files_with(folder, ".csv", deep=False) if split_of(name) else []
    annotations = child(root, "annotations", "data")
    files += files_with(annotations, ".csv", deep=False) if annotations else []
    found: dict[str, list[Path]] = defaultdict(list)
    for file in (file for file in files if set(COLUMNS) <= set(_header(file))):
        found[_split_name(file)].append(file)
    if not found:
        return None
    splits = {name: partial(_open, root, name, several[0]) for name, several in found.items()}
    return Source("CSV", splits, several_files(root, found))


def find_file(file: Path) -> Source:
    """The images of one table, as the split of its name, or else as train.

    Raises:
        DataError: If it lacks a column.
    """
    missing = [name for name in COLUMNS if name not in _header(file)]
    if missing:
        raise DataError(f"{file} lacks the column {missing[0]}; boxes need a first line with {', '.join(COLUMNS)}")
    name = _split_name(file)
    return Source("CSV", {name: partial(_open, file.parent, name, file)})


def _header(file: Path) -> list[str]:
    try:
        # other bytes than UTF-8 are refused when the rows are read
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
            return [name.strip().lower() for name in next(csv.reader(lines), [])]
    except (OSError, csv.Error):
        return []


def _split_name(file: Path) -> str:
    words = (file.stem, *file.stem.split("_"), file.parent.name)  # train_labels.csv, train/_annotations.csv
    return next((word for word in words if split_of(word)), "train")


def _open(root: Path, split: str, file: Path) -> BoxImages:
    rows: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
            twice = next((name for name in (*COLUMNS, "width", "height") if columns.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{file} has the column {twice} twice; rename or remove one of them")
            for row in reader:
                values = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}
                rows[values["filename"]].append((f"{file} line {reader.line_num}", values))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV file in UTF-8: {error}") from error
    names = sorted({clean_name(row["class"]) for several in rows.values() for _, row in several} - {""})
    collected = Collector(names, file)
    number = {name: i for i, name in enumerate(names)}
    folders = _image_folders(root, split, file)
    paths = {name: find_moved(name, folders) or folders[0] / name for name in rows if name}
    if paths and not any(path.is_file() for path in paths.values()):
        places = ", ".join(map(str, folders))
        raise DataError(f"none of the images that {file} lists, such as {next(iter(paths))}, is in {places}")
    for name, several in rows.items():
        boxes = []
        for where, row in several:
            try:
                x1, y1, x2, y2 = (float(row[column]) for column in COLUMNS[2:])
                boxes.append(Box(number[clean_name(row["class"])], x1, y1, x2, y2, where))
            except (ValueError, KeyError):
                collected.leave_out("lines lack a class or four numbers and are left out", where, paths.get(name, ""))
        if name:
            collected.add(paths[name], _size(several[0][1]), boxes)
    folder = next((path.parent for path in paths.values() if path.is_file()), root)
    notes = without_annotation(folder, set(paths.values()), f"a line in {file}")
    return collected.images(file, relative_to(folder, root), notes)


def _size(row: dict[str, str]) -> tuple[int, int] | None:
    """Width and height, if the row has both."""
    try:
        size = int(float(row.get("width", ""))), int(float(row.get("height", "")))
    except (ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _image_folders(root: Path, split: str, file: Path) -> list[Path]:
    """Where images may be: beside the table, in a folder of the split, in `images`."""
    images = child(root, "images")
    folders = [file.parent]
    for place in filter(None, (images, root)):
        inside = folders_in(place)
        folders += [inside[name] for name in find_split(inside, split_of(split) or split)]
    return list(dict.fromkeys([*folders, *([images] if images else []), root]))
