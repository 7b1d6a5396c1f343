"""Images with boxes for detectors: folders in the formats of COCO, YOLO and Pascal VOC.

Boxes are x1 y1 x2 y2 in pixels of the upright image, from 0 at its left and upper edge. Every defect is counted: boxes
that extend beyond the image are clipped; boxes outside it, without area, or of an unknown class are left out.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spd_zoo.data.classes import DataError, clean_name
from spd_zoo.data.reading import ImageFilter, is_url, read_image
from spd_zoo.data.splits import find_split, split_notes, split_of
from spd_zoo.files import read_yaml

__all__ = ["BoxImages", "Objects", "hold_out", "open_boxes", "with_names"]

CLIPPED = "boxes reach out of their image by more than half a pixel and are clipped"


class Objects(NamedTuple):
    """The objects in an image: `boxes` (M, 4), `labels` (M,), `areas` (M,) in square pixels, and `crowd` (M,).

    A crowd is a box around many objects. It is not trained on, and is evaluated by COCO's rules.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowd: Tensor


@dataclass(frozen=True)
class BoxImages:
    """A split of a data set with boxes.

    Attributes:
        files: Path of each image.
        sizes: Width and height of each image, from its annotation or its header.
        objects: The objects in each image.
        class_names: Names of the classes.
        rows: The images of the split, as indices into `files`, `sizes` and `objects`.
        defects: For each type of defect, the images that have it, once per defect.
        notes: What was guessed or left out when the data set was opened.
    """

    files: list[str]
    sizes: list[tuple[int, int]]
    objects: list[Objects]
    class_names: list[str]
    rows: Sequence[int]
    defects: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, index: int) -> str:
        """The path of the image at `index`."""
        return self.files[self.rows[index]]

    name = file  # the image's name in messages and reports

    def label(self, index: int) -> Any:
        """The boxes and classes of the image at `index`, as a value that can be compared."""
        boxes, labels, _, _ = self.objects_in(index)
        return tuple(map(tuple, boxes.tolist())), tuple(labels.tolist())

    def objects_in(self, index: int) -> Objects:
        """The objects in the image at `index`."""
        return self.objects[self.rows[index]]

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """The image at `index`, upright and in `mode`.

        Raises:
            DataError: If it cannot be read, or has another size than its annotation says.
        """
        try:
            image = read_image(self.file(index), mode)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from error
        size = self.sizes[self.rows[index]]
        if image.size != size:
            found, expected = (f"{width}x{height}" for width, height in (image.size, size))
            raise DataError(f"{self.name(index)}: it has {found} pixels upright, but its annotation says {expected}")
        return image

    def subset(self, indices: Iterable[int]) -> "BoxImages":
        """The images at `indices`."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def without(self, names: Container[str]) -> "BoxImages":
        """The images that have other names."""
        return self.subset(i for i in range(len(self)) if self.name(i) not in names)

    def renumbered(self, numbers: Sequence[int], class_names: list[str], notes: Sequence[str] = ()) -> "BoxImages":
        """The images with class i as `numbers[i]` of `class_names`, and with more notes."""
        new = torch.tensor(numbers)
        objects = [each._replace(labels=new[each.labels]) for each in self.objects]
        return replace(self, objects=objects, class_names=class_names, notes=(*self.notes, *notes))

    def used(self) -> set[int]:
        """The classes that occur, including those of crowds."""
        return {label for objects in self.objects for label in objects.labels.tolist()}

    def counts(self) -> list[int]:
        """How many objects each class has, crowds not counted."""
        found = Counter(
            label for i in range(len(self)) for label in self.objects_in(i).labels[~self.objects_in(i).crowd].tolist()
        )
        return [found[label] for label in range(len(self.class_names))]

    def fingerprint(self) -> str:
        """A digest of names, boxes and classes, by which a resumed run recognises its data; pixels do not count."""
        digest = hashlib.blake2b(repr(self.class_names).encode(), digest_size=16)
        for i in range(len(self)):
            digest.update(Path(self.file(i)).name.encode("utf-8", "backslashreplace"))
            for tensor in self.objects_in(i):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def open_boxes(data: str | Path, split: str) -> BoxImages | None:
    """The `split` of a data set with boxes, or None if it has none of that name.

    Args:
        data: A folder in one of three formats. COCO: `instances_SPLIT*.json` in it or in `annotations`, the images in
            `images`, in `images/SPLIT*` or in `SPLIT*`. YOLO: `images/SPLIT` and `labels/SPLIT` with a text file for
            each image, names of classes in `data.yaml` or `classes.txt`. Pascal VOC: `ImageSets/Main/SPLIT.txt`,
            `JPEGImages` and `Annotations`.
        split: train, val or test, in any case and under any usual name; or another name.

    Raises:
        DataError: If the folder is no such data set, or something in it cannot be read.
    """
    if is_url(data):
        raise DataError(f"{data} is an address, which is not read; download the data set and give its folder")
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one in the form of COCO, YOLO or Pascal VOC")
    forms: dict[str, dict[str, Path]] = {  # form -> name of a split -> its file or folder
        "COCO": {
            file.stem.removeprefix("instances_"): file
            for file in sorted(
                [*root.glob("instances_*.json"), *root.glob("annotations/instances_*.json")], reverse=True
            )
        },
        "YOLO": _folders(root / "images") if (root / "labels").is_dir() else {},
        "VOC": {file.stem: file for file in sorted(root.glob("ImageSets/Main/*.txt"))},
    }
    signs = {"COCO": bool(forms["COCO"]), "YOLO": (root / "labels").is_dir(), "VOC": (root / "Annotations").is_dir()}
    present = [form for form, is_there in signs.items() if is_there]
    if not present:
        raise DataError(
            f"{root} is no data set with boxes: it has neither instances_train.json (COCO) nor labels/train (YOLO) "
            "nor Annotations (Pascal VOC)"
        )
    form = present[0]
    found = find_split(forms[form], split)
    if not found:
        return None
    opened = {"COCO": _coco, "YOLO": _yolo, "VOC": _voc}[form](root, forms[form][found[0]])
    notes = split_notes(root, split, found)
    if len(present) > 1:
        notes.append(f"{root} has boxes in the forms of {' and '.join(present)}: those of {form} are read")
    return replace(opened, notes=(*notes, *opened.notes))


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder, if there are any, by their names."""
    return {entry.name: entry for entry in sorted(folder.glob("*")) if entry.is_dir() and entry.name[0] != "."}


class _Collected:
    """Collects images and their boxes, and checks each box."""

    def __init__(self, class_names: Sequence[str], where: Path) -> None:
        self.class_names = class_names = [clean_name(name) for name in class_names]
        self.files: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.objects: list[Objects] = []
        self.defects: dict[str, list[str]] = defaultdict(list)
        if not class_names:
            raise DataError(f"{where} names no classes")
        twice = [name for name, count in Counter(class_names).items() if count > 1]
        if twice:
            raise DataError(f"{where} has two classes called {twice[0]!r}; give each a name of its own")

    def add(self, file: Path, size: tuple[int, int], rows: Iterable[tuple[Any, ...]]) -> None:
        """An image of a width and height with rows of label (None if unknown), x1, y1, x2, y2, area or None, crowd."""
        kept = []
        width, height = size
        for label, x1, y1, x2, y2, area, crowd in rows if width else ():
            clipped = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
            outside = max(-x1, -y1, x2 - width, y2 - height)
            problem = ""
            if label is None:
                problem = "boxes are of an unknown class and are left out"
            elif not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= x1 or y2 <= y1:
                problem = "boxes have no area and are left out"
            elif clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
                problem = "boxes lie outside their image and are left out"
            elif outside > 0.5:
                self.defects[CLIPPED].append(str(file))
            if problem:
                self.defects[problem].append(str(file))
                continue
            own = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
            kept.append((*clipped, label, own if area is None or area <= 0 else area, crowd))
        table = np.array(kept, dtype=np.float64).reshape(-1, 7)
        self.files.append(str(file))
        self.sizes.append(size)
        self.objects.append(
            Objects(
                torch.from_numpy(table[:, :4].astype(np.float32)),
                torch.from_numpy(table[:, 4].astype(np.int64)),
                torch.from_numpy(table[:, 5].astype(np.float32)),
                torch.from_numpy(table[:, 6].astype(bool)),
            )
        )

    def images(self, where: Path, notes: Sequence[str] = ()) -> BoxImages:
        if not self.files:
            raise DataError(f"{where} lists no image")
        counts = dict(self.defects)
        return BoxImages(
            self.files, self.sizes, self.objects, self.class_names, range(len(self.files)), counts, tuple(notes)
        )


def _text(file: Path) -> str:
    """The contents of a text file, without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not in UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8") from error


def _coco(root: Path, file: Path) -> BoxImages:
    try:
        content = json.loads(_text(file))
        images, annotations = content["images"], content["annotations"]
        categories = [(category["id"], str(category["name"])) for category in content["categories"]]
        boxes: dict[Any, list[tuple[Any, ...]]] = defaultdict(list)
        number = {key: i for i, (key, _) in enumerate(categories)}
        for annotation in annotations:
            x, y, width, height = map(float, annotation["bbox"])
            label = number.get(annotation["category_id"])
            area, crowd = annotation.get("area"), bool(annotation.get("iscrowd", 0))
            boxes[annotation["image_id"]].append((label, x, y, x + width, y + height, area, crowd))
        collected = _Collected([name for _, name in categories], file)
        image_ids = [image["id"] for image in images]
        for list_name, keys in (("categories", [key for key, _ in categories]), ("images", image_ids)):
            twice = next((key for key, count in Counter(keys).items() if count > 1), None)
            if twice is not None:
                raise DataError(f"{file} has two {list_name} with the id {twice!r}; give each an id of its own")
        split = file.stem.removeprefix("instances_")
        folders = [*_split_folders(root / "images", split), *_split_folders(root, split), root / "images", root]
        names = [image["file_name"] for image in images]
        if not names:
            raise DataError(f"{file} lists no image")
        folder = next((place for place in folders if any((place / name).is_file() for name in names)), None)
        if folder is None:
            places = ", ".join(map(str, folders))
            raise DataError(f"none of the images that {file} lists, such as {names[0]}, is in the folders {places}")
        for image in images:
            size = int(image["width"]), int(image["height"])
            collected.add(folder / image["file_name"], size, boxes.pop(image["id"], ()))
    except (OSError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"cannot read {file} as JSON: {error}") from error
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{file} is not in COCO's form for objects ({reason}); it needs images, annotations and categories"
        ) from error
    for key, lost in boxes.items():
        collected.defects["boxes belong to no image of the list and are left out"] += [f"image {key}"] * len(lost)
    return collected.images(file)


def _split_folders(root: Path, split: str) -> list[Path]:
    """Where the images of a split may be: in the folder of its name, or of another name of the same split."""
    names = find_split(_folders(root), split) or find_split(_folders(root), split_of(split) or split)
    return [root / name for name in names] or [root / split]


def _yolo(root: Path, folder: Path) -> BoxImages:
    collected = _Collected(_yolo_names(root), root)
    labels, is_image = _split_folders(root / "labels", folder.name)[0], ImageFilter()
    for file in sorted(file for file in folder.rglob("*") if is_image(file, folder)):
        size = _header_size(file)
        text = (labels / file.relative_to(folder)).with_suffix(".txt")
        collected.add(file, size, _yolo_rows(text, size, len(collected.class_names)))
    images = {Path(file).relative_to(folder).with_suffix("") for file in collected.files}
    for text in sorted(labels.rglob("*.txt")):
        if text.name != "classes.txt" and text.relative_to(labels).with_suffix("") not in images:
            collected.defects["label files belong to no image"].append(str(text))
    return collected.images(folder, is_image.notes(folder))


def _yolo_names(root: Path) -> list[str]:
    for file in (root / "data.yaml", root / "data.yml", *sorted(root.glob("*.yaml"))):
        if file.is_file():
            try:
                found = read_yaml(file)
            except ValueError as error:
                raise DataError(str(error)) from error
            names = found.get("names") if isinstance(found, dict) else None
            if isinstance(names, dict) and names.keys() == set(range(len(names))):
                names = [names[i] for i in range(len(names))]
            if not isinstance(names, list):
                raise DataError(f"{file} needs names: a list of classes, or a mapping from 0, 1, ... to them")
            return [str(name) for name in names]
    for file in (root / "classes.txt", root / "labels" / "classes.txt"):
        if file.is_file():
            return [line for line in _text(file).splitlines() if line.strip()]
    raise DataError(
        f"{root} does not name its classes; add data.yaml with names, or classes.txt with one name per line"
    )


def _yolo_rows(text: Path, size: tuple[int, int], classes: int) -> list[tuple[Any, ...]]:
    """Lines of class, centre and size in fractions of the image; no file means no object."""
    rows: list[tuple[Any, ...]] = []
    if not text.is_file():
        return rows
    width, height = size
    for number, line in enumerate(_text(text).splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *values = line.split()
            x, y, w, h = map(float, values)
            known = int(label) if 0 <= int(label) < classes else None
        except ValueError as error:
            raise DataError(f"{text}, line {number}: {line!r} is not class, x, y, width and height") from error
        left, top = (x - w / 2) * width, (y - h / 2) * height
        rows.append((known, left, top, left + w * width, top + h * height, None, False))
    return rows


def _voc(root: Path, file: Path) -> BoxImages:
    lines = [line.split()[0] for line in _text(file).splitlines() if line.strip()]
    found = [(name, _voc_annotation(root / "Annotations" / f"{name}.xml")) for name in lines]
    collected = _Collected(sorted({row[0] for _, (_, _, rows) in found for row in rows}), file)
    number = {name: i for i, name in enumerate(collected.class_names)}
    for name, (image_name, size, rows) in found:
        image = root / "JPEGImages" / (image_name or f"{name}.jpg")
        if not image.is_file():  # the name in the XML is often that of another machine
            image = next(iter(sorted((root / "JPEGImages").glob(f"{name}.*"))), image)
        collected.add(image, size or _header_size(image), [(number[row[0]], *row[1:]) for row in rows])
    return collected.images(file)


def _voc_annotation(file: Path) -> tuple[str, tuple[int, int] | None, list[tuple[Any, ...]]]:
    """The image's file name, its size if the file states it, and its objects, whose pixels are counted from 1."""
    try:
        tree = ElementTree.parse(file).getroot()
        sides = [int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height")]
        rows: list[tuple[Any, ...]] = []
        for item in tree.iter("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax"))
            name = clean_name(item.findtext("name") or "")
            if not name:
                raise ValueError("an object has no name")
            rows.append((name, x1 - 1, y1 - 1, x2, y2, None, False))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; every image of the split needs its XML file") from error
    except (ElementTree.ParseError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is not in Pascal VOC's form: {error}") from error
    return (tree.findtext("filename") or "").strip(), (sides[0], sides[1]) if all(sides) else None, rows


def _header_size(file: Path) -> tuple[int, int]:
    """Width and height of the upright image, from its header; (0, 0) if it cannot be read."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, ValueError):
        return 0, 0


def with_names(data: BoxImages, class_names: list[str]) -> BoxImages:
    """Renumbers the classes of `data` by `class_names`; boxes of other classes are counted and left out."""
    if data.class_names == class_names:
        return data
    number = {name: i for i, name in enumerate(class_names)}
    new = torch.tensor([number.get(name, -1) for name in data.class_names])
    objects, lost = [], []
    for file, before in zip(data.files, data.objects, strict=True):
        labels = new[before.labels]
        known = labels >= 0
        lost += [file] * int((~known).sum())
        objects.append(Objects(before.boxes[known], labels[known], before.areas[known], before.crowd[known]))
    defects = data.defects | ({"boxes are of a class that is not trained and are left out": lost} if lost else {})
    return replace(data, objects=objects, class_names=class_names, defects=defects)


def hold_out(data: BoxImages, val_size: int, seed: int) -> tuple[BoxImages, BoxImages]:
    """Holds out `val_size` images, drawn by `seed`; defects that belong to no image stay in the first split.

    Raises:
        DataError: If no image would be left for one of the two.
    """
    if not 0 < val_size < len(data):
        raise DataError(
            f"cannot hold out {val_size} of {len(data)} images; give another validation size or a val split"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    train, val = data.subset(sorted(order[val_size:])), data.subset(sorted(order[:val_size]))
    held = {val.file(i) for i in range(len(val))}
    sorts = data.defects.items()
    train_defects = {sort: [name for name in names if name not in held] for sort, names in sorts}
    val_defects = {sort: [name for name in names if name in held] for sort, names in sorts}
    return (
        replace(train, defects={sort: names for sort, names in train_defects.items() if names}),
        replace(val, defects={sort: names for sort, names in val_defects.items() if names}),
    )
