"""Pascal VOC: one XML file for each image, in `Annotations` or beside the images.

Paper: The Pascal Visual Object Classes (VOC) Challenge, https://doi.org/10.1007/s11263-009-0275-4. Pixels are counted
from 1, the last one included.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from spd_zoo.data.boxes.folders import (
    child,
    files_with,
    folders_in,
    hidden_in,
    relative_to,
    spellings,
    split_folders,
    text_of,
    without_annotation,
)
from spd_zoo.data.boxes.images import Box, BoxImages, Collector, Source
from spd_zoo.data.classes import DataError, clean_name
from spd_zoo.data.notes import some
from spd_zoo.data.reading import SUFFIXES
from spd_zoo.data.splits import split_of
from spd_zoo.errors import first_line

__all__ = ["find", "image_of"]


class _Folder(NamedTuple):
    """Where the XML files and the images are."""

    annotations: Path
    images: Path


def find(root: Path) -> Source | None:
    """The splits of a folder in the format of Pascal VOC: by `ImageSets/Main`, by folders, or all as train."""
    devkit = child(root, "VOCdevkit")
    inside = [devkit, *folders_in(devkit).values()] if devkit else [root]
    found = {folder: source for folder in inside if (source := _find(folder)) is not None}
    if not found:
        return None
    (folder, source), *others = found.items()
    names = [relative_to(other, root) for other, _ in others]
    notes = [f"{some(names)} not read, only {relative_to(folder, root)}; give each by itself"] if names else []
    return source._replace(notes=[*source.notes, *notes])


def _find(root: Path) -> Source | None:
    annotations = child(root, "Annotations")
    images = child(root, "JPEGImages", "images") or root
    if annotations is not None and (any(files_with(annotations, ".xml")) or child(root, "ImageSets")):
        lists = child(root, "ImageSets") or root
        lists = child(lists, "Main") or lists
        files = {file.stem: file for file in files_with(lists, ".txt", deep=False)}
        notes = []
        whole = files.get("trainval")
        if whole is not None and not any(split_of(name) in ("train", "val") for name in files):
            notes.append(f"{relative_to(whole, root)} is the only list of images to train on: it is taken as train")
            files["train"] = whole
        files = {name: file for name, file in files.items() if split_of(name) or name == "trainval"}
        folder = _Folder(annotations, images)
        by_list = {name: partial(_open, root, folder, file) for name, file in files.items()}
        if by_list:
            return Source("Pascal VOC", by_list, notes)
        nested = {name: path for name, path in split_folders(annotations).items() if split_of(name)}
        if nested:  # Annotations/train, images/train
            pairs = {name: _Folder(path, child(images, name) or images) for name, path in nested.items()}
            return Source("Pascal VOC", {name: partial(_open, root, pair, None) for name, pair in pairs.items()})
        note = f"{root} has no ImageSets/Main with lists: all its images are the split train"
        return Source("Pascal VOC", {"train": partial(_open, root, folder, None)}, [note])
    splits = {name: path for name, path in split_folders(root).items() if split_of(name)}
    found = {name: pair for name, path in splits.items() if (pair := _beside(path)) is not None}
    if not found and (here := _beside(root)) is not None:
        found = {"train": here}
    if not found:
        return None
    return Source("Pascal VOC", {name: partial(_open, root, pair, None) for name, pair in found.items()})


def _beside(folder: Path) -> _Folder | None:
    """XML files beside the images, or in folders `annotations` and `images` of a split."""
    annotations = child(folder, "Annotations") or folder
    images = child(folder, "JPEGImages", "images") or folder
    files = files_with(annotations, ".xml", deep=annotations != folder)
    return _Folder(annotations, images) if any(map(_is_annotation, files)) else None


def _is_annotation(file: Path) -> bool:
    """Whether an XML file has the root element of Pascal VOC's, or is damaged, which opening it says."""
    try:
        return ElementTree.parse(file).getroot().tag == "annotation"
    except (OSError, ElementTree.ParseError, ValueError, LookupError):  # LookupError: an unknown encoding
        return True


def image_of(stem: str, folder: Path) -> Path | None:
    """The image in a folder with this name but for its suffix."""
    suffixes = (".jpg", ".jpeg", ".png", ".JPG", ".bmp")
    usual = (folder / f"{spelling}{suffix}" for spelling in spellings(stem) for suffix in suffixes)
    found = next((path for path in usual if path.is_file()), None)
    if found is None and folder.is_dir():
        # a stem may hold what a glob takes for a pattern
        others = (path for path in sorted(folder.iterdir()) if path.stem == stem and path.suffix.lower() in SUFFIXES)
        found = next(others, None)
    return found


def _open(root: Path, folder: _Folder, listed: Path | None) -> BoxImages:
    """The images of a list, or all that have an XML file."""
    notes = hidden_in(folder.annotations)
    if listed is not None:
        files = [_xml_of(stem, folder.annotations) for stem in _stems(listed, folder)]
    else:
        files = files_with(folder.annotations, ".xml")
    where = listed or folder.annotations
    if not files:
        raise DataError(f"{where} lists no image")
    read: list[tuple[Path, _Annotation]] = []
    damaged: list[tuple[str, str]] = []
    for file in files:
        try:
            read.append((file, _read(file)))
        except OSError:
            damaged.append(("images have no XML file and are left out", str(file)))
        except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
            sort = "XML files are not in Pascal VOC's format; their images are left out"
            damaged.append((sort, f"{file} ({first_line(error)})"))
    if not read:
        raise DataError(f"none of the XML files of {where} can be read, such as {damaged[0][1]}")
    names = sorted({box.name for _, annotation in read for box in annotation.boxes})
    collected = Collector(names, where)
    number = {name: i for i, name in enumerate(names)}
    for sort, lost in damaged:
        collected.leave_out(sort, lost)
    used = set()
    for file, annotation in read:
        below = file.parent.relative_to(folder.annotations)
        image = _image_of(file.stem, annotation, folder.images / below, folder.images)
        if image is None:  # only now does the name in the file matter
            image = folder.images / (annotation.file_name or f"{file.stem}.jpg")
        elif annotation.file_name and _last_part(annotation.file_name) not in map(clean_name, (image.name, image.stem)):
            other = "XML files name another image in <filename>; the one with the file's own name is read"
            collected.defect(other, str(file), image)
        for problem, where_it_is in annotation.problems:
            collected.leave_out(problem, where_it_is, image)
        used.add(image)
        boxes = [Box(number[box.name], *box.corners, box.where, None, box.difficult) for box in annotation.boxes]
        collected.add(image, annotation.size, boxes)
    if listed is None:
        notes += without_annotation(folder.images, used, "a usable XML file")
    return collected.images(where, relative_to(folder.images, root), notes)


def _image_of(stem: str, annotation: "_Annotation", *folders: Path) -> Path | None:
    """The image with the stem of an XML file; of several, the one that the file names."""
    name = _last_part(annotation.file_name)
    same = Path(name).stem == clean_name(stem)
    named = next((folder / name for folder in folders if same and (folder / name).is_file()), None)
    if named is not None:
        return named
    return next((image for folder in folders if (image := image_of(stem, folder)) is not None), None)


def _last_part(file_name: str) -> str:
    return clean_name(Path(file_name.replace("\\", "/")).name)


def _xml_of(stem: str, folder: Path) -> Path:
    files = [folder / f"{spelling}.xml" for spelling in spellings(stem)]
    return next((file for file in files if file.is_file()), files[0])


def _stems(file: Path, folder: _Folder) -> list[str]:
    """The names of the images of a list; they may have blanks in them, and 1 or -1 after them."""
    stems = []
    for line in (line.strip() for line in text_of(file).splitlines()):
        name, _, sign = line.rpartition(" ")
        is_sign = sign in ("1", "-1", "0") and not (folder.annotations / f"{line}.xml").is_file()
        stems += [name.strip() if is_sign and name.strip() else line] if line else []
    return [Path(stem).stem if Path(stem).suffix.lower() in SUFFIXES else stem for stem in stems]


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool
    where: str


class _Annotation(NamedTuple):
    """The content of an XML file: the image's name, its size if there is one, objects, and problems of others."""

    file_name: str
    size: tuple[int, int] | None
    boxes: list[_Object]
    problems: list[tuple[str, str]]


def _read(file: Path) -> _Annotation:
    tree = ElementTree.parse(file).getroot()
    if tree.tag != "annotation":
        raise ValueError(f"its root is {tree.tag}, not annotation")
    width, height = (_side(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    boxes, problems = [], []
    for i, item in enumerate(tree.iter("object"), 1):
        name, where = clean_name(item.findtext("name") or ""), f"{file} object {i}"
        box = item.find("bndbox")
        if not name:
            problems.append(("objects have no name and are left out", where))
            continue
        if box is None:
            problems.append(("objects have no bndbox and are left out", where))
            continue
        try:
            x1, y1, x2, y2 = (float(box.findtext(side) or "") for side in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            problems.append(("objects have a bndbox without four numbers and are left out", where))
            continue
        difficult = (item.findtext("difficult") or "0").strip().lower() in ("1", "true")
        boxes.append(_Object(name, (x1 - 1, y1 - 1, x2, y2), difficult, where))
    size = (width, height) if width > 0 and height > 0 else None
    return _Annotation((tree.findtext("filename") or "").strip(), size, boxes, problems)


def _side(text: str | None) -> int:
    """A side of the image in pixels; 0 where the file does not say it."""
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):
        return 0
