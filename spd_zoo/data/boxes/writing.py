"""Writes a data set with boxes in another format; images are linked, not copied."""

import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from spd_zoo.data.boxes.images import EVERY_CLASS, BoxImages, UnlabelledError, found_in_words, upright_size
from spd_zoo.data.boxes.opening import find_source, open_split
from spd_zoo.data.classes import DataError
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import opened, refuse_among
from spd_zoo.data.splits import split_of
from spd_zoo.files import whole

__all__ = ["FORMS", "convert_data"]

REGION = "ignored regions"  # the class of regions of no class; the readers know it


@dataclass
class _Split:
    """A split to write, with the name of each image's file."""

    name: str
    data: BoxImages
    files: list[str]

    def rows(self, index: int) -> Iterator[tuple[list[float], int, float, bool]]:
        """Corners, label, area and whether it is ignored, of each object of an image."""
        yield from zip(*(tensor.tolist() for tensor in self.data.objects_in(index)), strict=True)


def convert_data(data: str | Path, to: str, out: str | Path) -> list[str]:
    """Writes all splits of a data set in another format, atomically.

    Args:
        data: What `open_boxes` takes.
        to: yolo (`images/SPLIT`, `labels/SPLIT`, `data.yaml`), coco (`images/SPLIT`,
            `annotations/instances_SPLIT.json`) or voc (`JPEGImages`, `Annotations`, `ImageSets/Main`).
        out: A new or empty folder.

    Returns:
        Lines that say what was found, written, guessed and left out.

    Raises:
        DataError: If there is no such data set, it cannot be used, or `out` is not empty.
        OSError: If something cannot be written; `out` is as it was.
        ValueError: If `out` lies among the images.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no empty folder; give another --out")
    splits, lines = _open_splits(data)
    refuse_among(out, set().union(*(each.folders() for each in splits.values())), data)
    names = _common_names(splits)
    used: set[str] = set()
    made = [_Split(name, each, _file_names(each, used)) for name, each in splits.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as folder:
        folder.mkdir()
        copied = FORMS[to](folder, made, names)
    for split in made:
        boxes = sum(split.data.counts())
        lines.append(f"{split.name}: wrote {count(len(split.data), 'image')} with {count(boxes, 'box', 'boxes')}")
    if copied:
        lines.append(f"note: {count(len(copied), 'image')} copied, because links to them cannot be made")
    ignored = sum(int(split.data.objects_in(i).ignored.sum()) for split in made for i in range(len(split.data)))
    unused = _without_box(names, made) if to == "voc" else []
    if unused:
        lines.append(
            f"note: {count(len(unused), 'class', 'classes')} without a box not in the new data set, because Pascal VOC "
            f"only has the names of objects: {some(unused)}"
        )
    if to == "yolo" and ignored:
        lines.append(f"note: {ignored} crowds, difficult objects or regions to ignore left out: YOLO's format has none")
    return lines


def _without_box(names: list[str], made: list[_Split]) -> list[str]:
    labels = {label for split in made for i in range(len(split.data)) for _, label, _, _ in split.rows(i)}
    return [name for i, name in enumerate(names) if i not in labels]


def _open_splits(data: str | Path) -> tuple[dict[str, BoxImages], list[str]]:
    """The splits that can be read, and what to say about them."""
    source = find_source(data)
    names = list(source.splits)
    usual = [name for name in ("train", "val", "test") if any(split_of(each) == name for each in names)]
    others = [name for name in names if split_of(name) is None]
    splits: dict[str, BoxImages] = {}
    unlabelled = []
    for name in usual or others:
        try:
            if (each := open_split(source, data, name)) is not None:
                splits[name] = each
        except UnlabelledError as error:
            if split_of(name) != "test" or not splits:
                raise
            unlabelled.append(f"{name} not converted: {error}")  # the authors of many data sets keep its labels
    notes = dict.fromkeys([*(note for each in splits.values() for note in each.notes), *unlabelled])
    if usual and others:
        notes[f"not converted, because they are no usual splits: {some(others)}"] = None
    lines = [found_in_words(splits), *(f"note: {note}" for note in notes)]
    problems = Counter[str]()
    where: dict[str, list[str]] = {}
    for name, each in list(splits.items()):
        for sort, places in each.problems().items():
            problems[sort] += len(places)
            where.setdefault(sort, []).extend(places)
        found = {each.name(i): upright_size(each.file(i)) for i in range(len(each))}
        expected = {each.name(i): each.sizes[each.rows[i]] for i in range(len(each))}
        unreadable = {image for image, size in found.items() if not all(size)}
        wrong = {image for image, size in found.items() if size != expected[image]} - unreadable
        for images, why in ((unreadable, "as unreadable"), (wrong, "whose size is not that of their annotation")):
            if images:
                lines.append(f"note: {count(len(images), 'image')} of {name} left out {why}: {some(sorted(images))}")
        if len(unreadable | wrong) == len(found):
            raise DataError(f"no image of the split {name} can be used: {lines[-1].removeprefix('note: ')}")
        if unreadable | wrong:
            splits[name] = each.without(unreadable | wrong)
    lines += [f"note: {times} {sort}: {some(where[sort])}" for sort, times in problems.items()]
    return splits, lines


def _common_names(splits: dict[str, BoxImages]) -> list[str]:
    """The classes of all splits, to which each is renumbered."""
    names = list(dict.fromkeys(name for data in splits.values() for name in data.class_names))
    for split, data in splits.items():
        splits[split] = data.renumbered([names.index(name) for name in data.class_names], names)
    return names


def _file_names(data: BoxImages, used: set[str]) -> list[str]:
    """A name for each image whose stem no other image of the data set has, nor one that some systems take for it."""
    names = []
    for i in range(len(data)):
        path = Path(data.name(i))
        suffix = path.suffix
        if not suffix:
            with opened(data.file(i), any_size=True) as image:
                suffix = f".{(image.format or 'png').lower()}"
        stem, number = path.stem.replace(" ", "_") if data.encoded is not None else path.stem, 2
        stem = re.sub("[\ud800-\udfff]", "_", stem)  # what is no Unicode in the name of a file
        unique = stem
        while _as_one_file(unique) in used:
            unique, number = f"{stem}_{number}", number + 1
        used.add(_as_one_file(unique))
        names.append(f"{unique}{suffix}")
    return names


def _as_one_file(name: str) -> str:
    """The same text for names that are one file on macOS or Windows: in either case, and in either Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def _put_images(split: _Split, folder: Path) -> set[str]:
    """Links to the images of a split; returns the stems of those that are copied, because a link is impossible."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = set()
    for i, name in enumerate(split.files):
        file, target = split.data.file(i), folder / name
        if isinstance(file, BytesIO):
            target.write_bytes(file.getvalue())
            copied.add(target.stem)
            continue
        source = Path(file).resolve()
        try:
            target.symlink_to(source)
        except OSError:  # Windows without the right to, or a file system without links
            shutil.copyfile(source, target)
            copied.add(target.stem)
    return copied


def _write_yolo(folder: Path, splits: list[_Split], names: list[str]) -> set[str]:
    copied: set[str] = set()
    for split in splits:
        copied |= _put_images(split, folder / "images" / split.name)
        labels = folder / "labels" / split.name
        labels.mkdir(parents=True)
        for i, file in enumerate(split.files):
            width, height = split.data.sizes[split.data.rows[i]]
            lines = [
                f"{label} {(x1 + x2) / 2 / width:.9g} {(y1 + y2) / 2 / height:.9g} "
                f"{(x2 - x1) / width:.9g} {(y2 - y1) / height:.9g}\n"
                for (x1, y1, x2, y2), label, _, ignored in split.rows(i)
                if not ignored
            ]
            (labels / file).with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
    config: dict[str, Any] = {split.name: f"images/{split.name}" for split in splits}
    config |= {"nc": len(names), "names": dict(enumerate(names))}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return copied


def _write_coco(folder: Path, splits: list[_Split], names: list[str]) -> set[str]:
    copied: set[str] = set()
    (folder / "annotations").mkdir()
    regions = any(EVERY_CLASS in data.labels.tolist() for split in splits for data in split.data.objects)
    categories = [{"id": i, "name": name} for i, name in enumerate([*names, *([REGION] if regions else [])], 1)]
    for split in splits:
        copied |= _put_images(split, folder / "images" / split.name)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i, file in enumerate(split.files):
            width, height = split.data.sizes[split.data.rows[i]]
            images.append({"id": i + 1, "file_name": file, "width": width, "height": height})
            for (x1, y1, x2, y2), label, area, ignored in split.rows(i):
                category = len(categories) if label == EVERY_CLASS else label + 1
                annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": category}
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(ignored)}
                annotations.append(annotation | box)
        content = {"images": images, "annotations": annotations, "categories": categories}
        text = json.dumps(content, ensure_ascii=False)
        (folder / "annotations" / f"instances_{split.name}.json").write_text(text, encoding="utf-8")
    return copied


def _write_voc(folder: Path, splits: list[_Split], names: list[str]) -> set[str]:
    for name in (*names, *(file for split in splits for file in split.files)):
        if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", name):
            raise DataError(f"{name!r} has a character that XML cannot hold; rename it")
    copied: set[str] = set()
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for split in splits:
        copied |= _put_images(split, folder / "JPEGImages")
        for i, file in enumerate(split.files):
            tree = ElementTree.Element("annotation")
            ElementTree.SubElement(tree, "filename").text = file
            size = ElementTree.SubElement(tree, "size")
            for side, pixels in zip(("width", "height"), split.data.sizes[split.data.rows[i]], strict=True):
                ElementTree.SubElement(size, side).text = str(pixels)
            for (x1, y1, x2, y2), label, _, ignored in split.rows(i):
                item = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(item, "name").text = REGION if label == EVERY_CLASS else names[label]
                ElementTree.SubElement(item, "difficult").text = str(int(ignored))
                box = ElementTree.SubElement(item, "bndbox")
                # pixels are counted from 1, the last one included
                for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True):
                    ElementTree.SubElement(box, side).text = f"{value:.9g}"
            target = (folder / "Annotations" / file).with_suffix(".xml")
            ElementTree.ElementTree(tree).write(target, encoding="utf-8")
        stems = "".join(f"{Path(file).stem}\n" for file in split.files)
        (lists / f"{split.name}.txt").write_text(stems, encoding="utf-8")
    return copied


FORMS: dict[str, Callable[[Path, list[_Split], list[str]], set[str]]] = {
    "yolo": _write_yolo,
    "coco": _write_coco,
    "voc": _write_voc,
}
