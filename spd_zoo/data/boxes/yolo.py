"""YOLO: one text file for each image, a line for each box, in fractions of the image.

The layout is that of `data.yaml` (or darknet's `obj.data`), or else recognised by folders: `images/SPLIT` and
`labels/SPLIT`, `SPLIT/images` and `SPLIT/labels`, `images` and `labels`, or labels beside images; with lists
`SPLIT.txt` or without.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spd_zoo.data.boxes.folders import (
    child,
    files_with,
    find_moved,
    folders_in,
    folders_of_split,
    hidden_in,
    images_in,
    is_hidden,
    relative_to,
    split_folders,
    text_of,
    unread_folders,
)
from spd_zoo.data.boxes.images import Box, BoxImages, Collector, Source, UnlabelledError
from spd_zoo.data.classes import DataError, clean_name
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import SUFFIXES, files_in, is_comment
from spd_zoo.data.splits import split_of
from spd_zoo.files import compose_yaml, read_yaml

__all__ = ["find", "find_by_config", "find_list"]

CONFIGS = (".yaml", ".yml", ".data")
PIXELS = 2.0  # a coordinate above it is no fraction of an image, but looks like pixels
_CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")
_NO_LABELS = ("classes", "notes", "predefined_classes")  # text files of labelling tools among the labels
_SHARED = "images share their label file with another image, whose name differs in the suffix alone"


class Config(NamedTuple):
    """A `data.yaml`, or a darknet `obj.data` with the keys of one."""

    file: Path
    values: Mapping[str, Any]

    def splits(self) -> dict[str, list[str]]:
        """Folders or list files of each split that is named."""
        named = {key: value for key, value in self.values.items() if isinstance(key, str) and split_of(key) and value}
        return {key: [str(v) for v in (value if isinstance(value, list) else [value])] for key, value in named.items()}


class Names(NamedTuple):
    """The class of each number in the lines, and the file that names them."""

    by_number: Mapping[int, str]
    where: Path
    keypoints: int = 0  # values after the box in each line, if the data set has keypoints
    notes: tuple[str, ...] = ()


def find(root: Path) -> Source | None:
    """The splits of a folder in one of YOLO's layouts; None if it is in none."""
    configs = [config for config in map(_read_config, _config_files(root)) if config is not None]
    notes = [] if len(configs) < 2 else [_several(configs)]
    if configs and configs[0].splits():
        return _by_config(configs[0], notes)
    config = configs[0] if configs else None
    images, labels = child(root, "images", "obj_train_data"), child(root, "labels")
    lists = {file.stem: file for file in files_with(root, ".txt", deep=False) if split_of(file.stem) and _is_list(file)}
    if images and labels and (splits := split_folders(images)):
        notes += unread_folders(images, splits)
        return Source("YOLO", {name: partial(_open, root, [path], config) for name, path in splits.items()}, notes)
    nested = {
        name: inner
        for name, path in split_folders(root).items()
        if split_of(name) and child(path, "labels") and (inner := child(path, "images")) is not None
    }
    if nested:
        return Source("YOLO", {name: partial(_open, root, [path], config) for name, path in nested.items()}, notes)
    if lists and (labels or _has_labels_beside(root)):
        return Source(
            "YOLO by lists", {name: partial(_open, root, [file], config) for name, file in lists.items()}, notes
        )
    inside = _splits_with_labels_beside(images) if images else {}
    if inside:
        return Source("YOLO", {name: partial(_open, root, [path], config) for name, path in inside.items()}, notes)
    if images and (labels or _has_labels_beside(images)):
        texts = [file.name for file in files_with(root, ".txt", deep=False) if split_of(file.stem)]
        notes += [f"{some(texts)} in {root} not read, because they do not list images"] if texts else []
        return Source("YOLO", {"train": partial(_open, root, [images], config)}, notes)
    beside = _splits_with_labels_beside(root)
    if beside:
        return Source("YOLO", {name: partial(_open, root, [path], config) for name, path in beside.items()}, notes)
    if _has_labels_beside(root):
        return Source("YOLO", {"train": partial(_open, root, [root], config)}, notes)
    return None


def _splits_with_labels_beside(folder: Path) -> dict[str, Path]:
    """The folders of splits in a folder whose images have labels beside them."""
    found = split_folders(folder)
    return {name: path for name, path in found.items() if split_of(name) and _has_labels_beside(path)}


def find_by_config(file: Path) -> Source:
    """The splits that a `data.yaml` or `obj.data` names, or those of its folder if it names none.

    Raises:
        DataError: If it is no such file.
    """
    config = _read_config(file)
    if config is None:
        raise DataError(f"{file} names neither classes (names) nor images (train, val); it is no data.yaml")
    if config.splits():
        return _by_config(config, [])
    source = find(file.parent)
    if source is None:
        raise DataError(f"{file} does not say where images are, and {file.parent} has no folders images and labels")
    return source


def find_list(file: Path) -> Source:
    """The images of a text file with one path for each line, as the split of its name, or else as train.

    Raises:
        DataError: If it does not list images.
    """
    if not _is_list(file):
        raise DataError(f"{file} does not list images: it needs the path of an image on each line")
    name = file.stem if split_of(file.stem) else "train"
    return Source("YOLO by a list", {name: partial(_open, file.parent, [file], None)})


def _config_files(root: Path) -> list[Path]:
    """Files that may be a `data.yaml`, the most likely first."""
    found = [file for file in root.glob("*") if file.suffix.lower() in CONFIGS and file.is_file()]
    found = [file for file in found if not is_hidden(file, root)]
    return sorted(found, key=lambda file: (file.stem != "data", file.suffix != ".yaml", file.name))


def _several(configs: list[Config]) -> str:
    others = some([config.file.name for config in configs[1:]])
    return f"{configs[0].file} is read, and not {others}, which name classes or images, too"


def _read_config(file: Path) -> Config | None:
    """The content of a file; None if it names neither classes nor images, like the `args.yaml` of a training."""
    try:
        if file.suffix.lower() == ".data":
            pairs = [line.partition("=") for line in text_of(file).splitlines() if "=" in line]
            values: Any = {key.strip(): value.strip() for key, _, value in pairs}
            names = values.pop("names", "")
            found = find_moved(names, [file.parent]) if names else None
            values["names"] = _class_lines(found) if found else None
        else:
            values = read_yaml(file)
            if isinstance(values, dict) and values.get("names") is not None:  # as text: YAML makes False of no
                values["names"] = yaml.constructor.BaseConstructor().construct_document(compose_yaml(file))["names"]
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(" ".join(str(error).split())) from error
    if not isinstance(values, dict):
        return None
    names_classes = values.get("names") is not None
    if not names_classes and not (file.stem in ("data", "dataset") and Config(file, values).splits()):
        return None
    return Config(file, values)


def _by_config(config: Config, notes: list[str]) -> Source:
    splits: dict[str, Any] = {}
    base = _base(config, notes)
    for name, entries in config.splits().items():
        places = [place for entry in entries if (place := _place(entry, base, config, notes)) is not None]
        if len(places) == len(entries):
            splits[name] = partial(_open, base, places, config)
        elif split_of(name) == "test":
            notes.append(f"{config.file} has a split {name} whose images {some(entries)} do not exist: it is left out")
        else:
            splits[name] = partial(_refuse, config, name, entries, base)
    return Source(f"YOLO by {config.file.name}", splits, notes)


def _base(config: Config, notes: list[str]) -> Path:
    """The folder to which paths are relative: `path` where it exists, else the folder of the file."""
    folder, path = config.file.parent, str(config.values.get("path") or "")
    exact = _exact_base(folder, path)
    if exact is not None:
        return exact
    # YOLOv5's paths are relative to the folder above data/; others are of another machine
    places = (Path(os.path.normpath(folder.parent / path)), find_moved(path, [folder]))
    found = next((place for place in places if place is not None and place.is_dir()), folder)
    notes.append(f"{config.file} has path {path}, which does not exist: {found} is taken")
    return found


def _exact_base(folder: Path, path: str) -> Path | None:
    """Where `path` is, from the folder of the file or from the current one; None if it does not exist."""
    return next((place for place in (folder / path, Path(path)) if place.is_dir()), None) if path else folder


def _place(entry: str, base: Path, config: Config, notes: list[str]) -> Path | None:
    """The folder or list file that an entry stands for, perhaps on another machine; None if there is none."""
    folders = (base, config.file.parent)
    exact = next((folder / entry for folder in folders if (folder / entry).exists()), None)
    if exact is not None:
        return exact
    least = 1 if entry.endswith(".txt") else 2  # many folders are called images
    moved = find_moved(entry, folders, least)
    if moved is not None and not entry.startswith(".."):  # Roboflow's ../train/images is no surprise
        notes.append(f"{config.file} names {entry}, which does not exist: {moved} is taken")
    return moved


def _refuse(config: Config, split: str, entries: list[str], base: Path) -> BoxImages:
    path = str(config.values.get("path") or "")
    lost = f", and path {path} does not exist" if _exact_base(config.file.parent, path) is None else ""
    raise DataError(
        f"{config.file} has the images of {split} in {some(entries)}, which is not in {base}{lost}; correct the path"
    )


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in text_of(file).splitlines() if line.strip()]


def _class_lines(file: Path) -> list[str]:
    """The names of classes, whose numbers are those of the lines.

    Raises:
        DataError: If there is an empty line above a name.
    """
    lines = [line.strip() for line in text_of(file).rstrip().splitlines()]
    if "" in lines:
        raise DataError(
            f"line {lines.index('') + 1} of {file} is empty, so that the numbers of the classes below it are unclear; "
            "remove it, or write a name there"
        )
    return lines


def _is_list(file: Path) -> bool:
    """Whether the first line of a text file is the path of an image."""
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            first = next((line for line in map(str.strip, lines) if line and not is_comment(line)), "")
    except OSError:
        return False
    return first.lower().endswith(SUFFIXES)


def _has_labels_beside(folder: Path) -> bool:
    """Whether a folder has a text file with a box, or nothing in it, beside an image of the same name."""
    texts = files_with(folder, ".txt")
    if not texts:
        return False
    names = {clean_name(file.stem) for file in map(Path, files_in(folder)) if file.suffix.lower() in SUFFIXES}
    return any(clean_name(text.stem) in names and _is_label(text) and _begins_with_box(text) for text in texts)


def _begins_with_box(text: Path) -> bool:
    """Whether the first line of a text file is a box; True for an empty file, the label of an image without any."""
    try:
        first = next(iter(_lines(text)), "0 0 0 0 0").split()
        return len(first) > 4 and bool(list(map(float, first)))
    except (OSError, ValueError):
        return False


def _is_label(text: Path) -> bool:
    return text.stem.lower() not in _NO_LABELS and not text.stem.lower().startswith("readme") and not _is_list(text)


def _is_pose(values: Sequence[float]) -> bool:
    """Whether the values after a class are a box in the image and keypoints of x, y and a visibility of 0, 1 or 2."""
    if len(values) < 7 or len(values) % 3 != 1 or not all(value in (0, 1, 2) for value in values[6::3]):
        return False
    x, y, width, height = values[:4]
    inside = min(x - width / 2, y - height / 2, 1 - x - width / 2, 1 - y - height / 2) > -0.01
    return inside and width > 0 and height > 0


# names of classes


def _names(root: Path, places: list[Path], config: Config | None) -> Names:
    """The classes: those of the configuration, or else of the first file that names them near the images."""
    if config is None:
        return _names_of_file(root, places)
    found = _names_of_config(config) if config.values.get("names") is not None else _names_of_file(root, places)
    number = config.values.get("nc", config.values.get("classes"))
    if number is not None and str(number) != str(len(found.by_number)):
        where = "" if found.where == config.file else f"{found.where} "
        raise DataError(
            f"{config.file} says that there are {number} classes (nc), but {where}names {len(found.by_number)}; "
            "correct it"
        )
    return found


def _names_of_file(root: Path, places: list[Path]) -> Names:
    folders = [root, root / "labels", *(place if place.is_dir() else place.parent for place in places)]
    folders += [folder for place in places for folder in (_label_folder(place), place.parent) if folder is not None]
    for folder in dict.fromkeys(folders):
        files = {file.name.lower(): file for file in sorted(folder.glob("*")) if not file.name.startswith("._")}
        others = sorted(name for name in files if name.endswith(".names"))
        for file in (files[name] for name in (*_CLASS_FILES, *others) if name in files):
            return Names(dict(enumerate(_class_lines(file))), file)
    raise DataError(
        f"{root} does not name its classes; add data.yaml with names, or classes.txt with one name per line"
    )


def _names_of_config(config: Config) -> Names:
    names, file, notes = config.values["names"], config.file, []
    needed = f"{file} needs names: a list of classes, or a mapping from 0, 1, ... to them"
    if isinstance(names, dict):
        try:
            by_number = {int(str(key)): str(name) for key, name in names.items()}
        except ValueError as error:
            raise DataError(needed) from error
        if len(by_number) != len(names) or min(by_number, default=0) < 0:
            raise DataError(needed)
        by_number = dict(sorted(by_number.items()))
        if by_number and min(by_number) > 0:
            notes.append(f"{file} numbers its classes from {min(by_number)} on; the lines are read accordingly")
    elif isinstance(names, list):
        by_number = {i: str(name) for i, name in enumerate(names)}
    else:
        raise DataError(needed)
    if not all(isinstance(name, str) and name for name in (names.values() if isinstance(names, dict) else names)):
        raise DataError(needed)
    shape = config.values.get("kpt_shape")
    if isinstance(shape, list) and shape:
        notes.append(f"{file} has keypoints (kpt_shape): only the boxes are read")
    return Names(by_number, file, math.prod(shape) if isinstance(shape, list) and shape else 0, tuple(notes))


# labels


def _label_folder(folder: Path) -> Path | None:
    """The folder with the labels of the images in `folder`: labels in place of images, or else the folder itself."""
    parts = folder.parts
    first = None
    for i in reversed(range(len(parts))):
        if parts[i].lower() != "images":
            continue
        found = child(Path(*parts[:i]) if i else Path(), "labels")
        for part in parts[i + 1 :]:
            # images/train2017 with labels/train, or images/train with labels
            if found is not None and not (found / part).is_dir():
                found = next(iter(folders_of_split(found, part)), None if folders_in(found) else found)
            elif found is not None:
                found = found / part
        if found is not None and any(files_with(found, ".txt")):
            return found
        first = first or found
    return folder if first is None or any(files_with(folder, ".txt", deep=False)) else first


def _usual_label(image: Path) -> Path:
    """Where the label file of an image belongs: below labels in place of images, or else beside the image."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i].lower() == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


@dataclass
class _Labels:
    """The text files of a data set's labels, by the folders of the images."""

    files: dict[Path, dict[str, Path]] = field(default_factory=dict)
    used: dict[Path, Path] = field(default_factory=dict)  # label file -> its first image

    def of(self, image: Path) -> Path | None:
        """The label file of an image; None if there is none."""
        folder = image.parent
        if folder not in self.files:
            labels = _label_folder(folder)
            texts = files_with(labels, ".txt", deep=False) if labels else []
            self.files[folder] = {clean_name(text.stem): text for text in texts}
        text = self.files[folder].get(clean_name(image.stem))
        if text is not None and text.stem.lower() in _NO_LABELS and not _begins_with_box(text):
            return None  # a tool's list of classes, and an image of that name
        if text is not None:
            self.used.setdefault(text, image)
        return text


def _open(root: Path, places: list[Path], config: Config | None) -> BoxImages:
    """The images of folders and lists, with the boxes of their label files."""
    names = _names(root, places, config)
    collected, labels, notes = _Lines(names), _Labels(), [*names.notes]
    for place in places:
        if place.is_dir():
            images, more = images_in(place)
            notes += more
        else:
            images = _listed(place, root, notes)
        for image in images:
            text = labels.of(image)
            if text is not None and labels.used[text] != image:
                collected.defect(_SHARED, str(image), image)
            collected.add(image, None, partial(collected.boxes, text, image) if text is not None else ())
        below = _label_folder(place) if place.is_dir() else None
        of_all_splits = below is not None and below.name.lower() == "labels" and place.name.lower() != "images"
        if below is not None and not of_all_splits:
            for text in files_with(below, ".txt"):
                if text not in labels.used and _is_label(text):
                    collected.defect("label files belong to no image", str(text))
            notes += hidden_in(below) if below != place else []
    where = places[0] if len(places) == 1 else root
    if collected.files and not labels.used:
        image = Path(collected.files[0])
        raise UnlabelledError(f"no image of {where} has a label file; {image} needs {_usual_label(image)}")
    collected.refuse_misread(where)
    return collected.images(where, some([relative_to(place, root) for place in places], 3), notes)


def _listed(file: Path, root: Path, notes: list[str]) -> list[Path]:
    """The images of a list file; paths of another machine are looked for beside the list."""
    images, moved = [], []
    for line in (line for line in _lines(file) if not is_comment(line)):
        path = next((path for path in (Path(line), file.parent / line, root / line) if path.is_file()), None)
        if path is None and (path := find_moved(line, dict.fromkeys((root, file.parent)))) is not None:
            moved.append(line)
        images.append(path or file.parent / line)
    if images and not any(image.is_file() for image in images):
        raise DataError(f"none of the images that {file} lists, such as {images[0]}, exists")
    if moved:
        notes.append(f"{count(len(moved), 'path')} in {file} found elsewhere: {some(moved)}")
    return images


class _Lines(Collector):
    """Collects the boxes of YOLO's lines: class, centre and size; or class and a polygon, whose extent is taken."""

    def __init__(self, names: Names) -> None:
        super().__init__(list(names.by_number.values()), names.where)
        self.place = {number: i for i, number in enumerate(names.by_number)}
        self.keypoints = names.keypoints
        self.pixels: list[str] = []
        self.poses: list[str] = []

    def boxes(self, text: Path, image: Path, size: tuple[int, int]) -> Iterator[Box]:
        """The boxes of a label file in pixels of its image of a width and height."""
        width, height = size
        try:
            lines = text.read_bytes().decode("utf-8-sig", "replace").splitlines()
        except OSError:
            self.leave_out("label files cannot be read, and their images have no boxes", str(text), image)
            return
        for number, line in enumerate(lines, 1):
            where = f"{text} line {number}"
            if not line.strip():
                continue
            try:
                label, *values = map(float, line.split())
            except ValueError:
                label, values = math.nan, []
            if not self.keypoints and _is_pose(values):
                self.poses.append(f"{where}: {line.strip()!r}")
            box = self._box(values, where, image)
            if box is None or not label.is_integer():
                self.leave_out("lines are not class, x, y, width and height, and are left out", where, image)
            elif max(values, default=0) > PIXELS:
                self.pixels.append(f"{where}: {line.strip()!r}")
                self.leave_out(
                    "lines look like pixels, not like fractions of the image, and are left out", where, image
                )
            else:
                left, top = box[0] * width, box[1] * height
                yield Box(self.place.get(int(label)), left, top, left + box[2] * width, top + box[3] * height, where)

    def _box(self, values: list[float], where: str, image: Path) -> tuple[float, ...] | None:
        """Left, top, width and height in fractions, of a box or the extent of a polygon; None if it is neither."""
        if self.keypoints and len(values) == 4 + self.keypoints:
            values = values[:4]
        if len(values) == 5 or (len(values) > 6 and len(values) % 2):
            self.defect("lines end with a confidence, which is left out", where, image)
            values = values[:-1]
        if len(values) == 4:
            x, y, w, h = values
            return x - w / 2, y - h / 2, w, h
        if len(values) < 6:
            return None
        xs, ys = values[::2], values[1::2]
        return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)

    def refuse_misread(self, where: Path) -> None:
        """Refuses lines most of which are in pixels, or boxes with keypoints that would be taken for polygons.

        Raises:
            DataError: If they are.
        """
        if 2 * len(self.poses) > self.lines:
            raise DataError(
                f"the lines of {where} look like boxes with keypoints, and not like polygons, such as {self.poses[0]}; "
                "say how many there are in data.yaml, such as kpt_shape: [17, 3]"
            )
        if 2 * len(self.pixels) > self.lines:
            raise DataError(
                f"the lines of {where} look like pixels, and not like fractions of the image, such as "
                f"{self.pixels[0]}; divide x and width by the image's width, and y and height by its height"
            )
