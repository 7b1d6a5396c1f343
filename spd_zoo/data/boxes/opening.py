"""Finds the format of a data set with boxes, and opens a split of it."""

from dataclasses import replace
from pathlib import Path

from spd_zoo.data.boxes import coco, hugging_face, labelme, table, voc, yolo
from spd_zoo.data.boxes.folders import is_hidden
from spd_zoo.data.boxes.images import BoxImages, Source
from spd_zoo.data.classes import DataError
from spd_zoo.data.reading import is_url
from spd_zoo.data.splits import find_split, split_notes, split_of

__all__ = ["find_source", "open_boxes", "open_split"]

_FORMS = (coco.find, yolo.find, voc.find, table.find, labelme.find, hugging_face.find)
_FILES = {".json": coco.find_file, ".csv": table.find_file, ".txt": yolo.find_list}
_FILES |= dict.fromkeys(yolo.CONFIGS, yolo.find_by_config)
_LAYOUT = ("images", "annotations", "annotation", "vocdevkit", "obj_train_data")  # folders that belong to a data set


def open_boxes(data: str | Path, split: str) -> BoxImages | None:
    """The `split` of a data set with boxes, or None if it has none of that name.

    Args:
        data: A folder in the format of COCO, YOLO, Pascal VOC, CSV, LabelMe or the library `datasets`; a `data.yaml`,
            a COCO file, a text file that lists images, or a CSV file; or hf://NAME.
        split: train, val or test, which other usual names and any case stand for, too; or another name.

    Raises:
        DataError: If there is no such data set, or it cannot be used.
    """
    return open_split(find_source(data), data, split)


def open_split(source: Source, data: str | Path, split: str) -> BoxImages | None:
    """The `split` of what `find_source` found for `data`; see `open_boxes`."""
    found = find_split(source.splits, split)
    if not found:
        return None
    opened: BoxImages = source.splits[found[0]]()
    notes = (*split_notes(data, split, found), *source.notes, *opened.notes)
    return replace(opened, notes=notes, format=source.format)


def find_source(data: str | Path) -> Source:
    """The splits of a data set with boxes, found but not read; see `open_boxes`.

    Raises:
        DataError: If there is no such data set.
    """
    if str(data).startswith("hf://"):
        return hugging_face.find_named(str(data).removeprefix("hf://"))
    if is_url(data):
        raise DataError(f"{data} is an address, which is not read; download the data set and give its folder")
    root = _unpacked(Path(data))
    if root.is_file():
        if (find := _FILES.get(root.suffix.lower())) is None:
            raise DataError(f"{root} is no data set with boxes; give a folder, a data.yaml, or a .json, .txt or .csv")
        return find(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one with boxes in the format of COCO, YOLO or Pascal VOC")
    found = [source for find in _FORMS[:3] if (source := find(root)) is not None]
    found = found or [source for find in _FORMS[3:] if (source := find(root)) is not None]
    if not found:
        raise DataError(
            f"{root} is no data set with boxes: it has neither instances_train.json (COCO) nor labels/train (YOLO) "
            "nor Annotations (Pascal VOC), and no table, LabelMe file or data set of Hugging Face"
        )
    notes = list(found[0].notes)
    if len(found) > 1:
        formats = " and ".join(source.format for source in found)
        notes.append(f"{root} has boxes in the formats of {formats}: those of {found[0].format} are read")
    return found[0]._replace(notes=notes)


def _unpacked(folder: Path) -> Path:
    """The folder in which an archive put its files, if there is nothing else in `folder`."""
    entries = [entry for entry in folder.glob("*") if not is_hidden(entry, folder)]
    if len(entries) != 1 or not entries[0].is_dir() or _belongs_to_a_layout(entries[0].name):
        return folder
    return _unpacked(entries[0])


def _belongs_to_a_layout(name: str) -> bool:
    return name.lower() in _LAYOUT or split_of(name) is not None
