"""Labelled images for training and evaluation: folders, CSV, Hugging Face data sets and WebDataset shards."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spd_zoo.data.classes import DataError, clean_name, in_order, look_alikes
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import ImageFilter, files_in, is_url, read_image
from spd_zoo.data.splits import find_split, looks_like_split, split_notes, split_of
from spd_zoo.errors import first_line

__all__ = [
    "DataError",
    "EncodedColumn",
    "LabelledImages",
    "StreamedImages",
    "label_text",
    "load_hugging_face",
    "open_data",
    "open_stream",
    "train_val_split",
    "with_classes",
]

_DATASET_FILES = (
    "dataset_dict.json",  # written by save_to_disk
    *(f"{folder}*.{suffix}" for folder in ("", "*/") for suffix in ("parquet", "arrow", "tar")),
)


class EncodedColumn:
    """The images of a Hugging Face data set, not decoded; a row without one raises ValueError."""

    def __init__(self, dataset: Any, column: str) -> None:
        import datasets

        self.column = column
        self.dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str | BytesIO:
        image = self.dataset[index][self.column]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise ValueError("this row holds no image")
        return BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


@dataclass(frozen=True)
class LabelledImages:
    """A split of a data set whose images can be read in any order.

    Attributes:
        files: Path or bytes of each image file.
        labels: Class index of each image.
        class_names: Names of the classes.
        rows: The images of the split, as indices into `files` and `labels`.
        notes: What was guessed or left out when the data set was opened.
        folder: That of the class folders; None if the classes come from a table.
    """

    files: list[str] | EncodedColumn
    labels: list[int]
    class_names: list[str]
    rows: Sequence[int]
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def folders(self) -> set[Path]:
        """The folder in which a further folder of images would be a class, if there is one."""
        return set() if self.folder is None else {self.folder}

    def label(self, index: int) -> int:
        """The class of the image at `index`."""
        return self.labels[self.rows[index]]

    def file(self, index: int) -> str | BytesIO:
        """The path or the bytes of the image at `index`."""
        return self.files[self.rows[index]]

    def name(self, index: int) -> str:
        """The image's name in messages and reports."""
        row = self.rows[index]
        return self.files[row] if isinstance(self.files, list) else f"row {row}"

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        """The image at `index`, upright and in `mode`.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            return read_image(self.file(index), mode)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from error

    def subset(self, indices: Iterable[int]) -> "LabelledImages":
        """The images at `indices`."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def without(self, names: Container[str]) -> "LabelledImages":
        """The images that have other names."""
        return self.subset(i for i in range(len(self)) if self.name(i) not in names)

    def renumbered(self, numbers: Sequence[int], class_names: list[str], notes: Sequence[str] = ()) -> "LabelledImages":
        """The images with class i as `numbers[i]` of `class_names`, and with more notes."""
        labels = [numbers[label] for label in self.labels]
        return replace(self, labels=labels, class_names=class_names, notes=(*self.notes, *notes))

    def used(self) -> set[int]:
        """The classes that occur."""
        return set(self.labels)

    def counts(self) -> list[int]:
        """How many images each class has."""
        found = Counter(self.label(i) for i in range(len(self)))
        return [found[label] for label in range(len(self.class_names))]

    def fingerprint(self) -> str:
        """A digest of names, labels and classes, by which a resumed run recognises its data; pixels do not count."""
        digest = hashlib.blake2b(repr(self.class_names).encode(), digest_size=16)
        digest.update(repr([self.label(i) for i in range(len(self))]).encode())
        if isinstance(self.files, list):
            names = [os.path.split(self.files[row])[1] for row in self.rows]
            digest.update(repr(names).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


@dataclass(frozen=True)
class StreamedImages:
    """A split of a Hugging Face data set that is read once from front to back in every epoch, without a local copy."""

    data: str
    split: str
    class_names: list[str]
    length: int
    image_column: str
    label_column: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        """A digest by which a resumed run recognises its data."""
        return f"{self.data} {self.split} {self.length} {len(self.class_names)}"


def open_data(data: str | Path, split: str, image_column: str = "", label_column: str = "") -> LabelledImages | None:
    """The `split` (train, val or test) of a data set, or None if there is no such split.

    A data set is one of

    - a folder with `<split>/<class name>/*`, or only with class folders, which then are the split `train`;
    - a CSV file with the columns path, label and, if it has several splits, split; or a folder with `<split>.csv`;
    - a folder with parquet, arrow or WebDataset tar files or one that `datasets.save_to_disk` wrote;
    - `hf://NAME`, a data set of the Hugging Face Hub.

    The last two are read by the library `datasets`, which makes a local copy of what it does not have yet.

    Args:
        data: Where the data set is.
        split: train, val or test, in any case and under any usual name; or another name.
        image_column: The column with the images; by default `path` in CSV files, and where `datasets` reads them, the
            only one of images.
        label_column: The column with the classes; by default `label` in CSV files, and where `datasets` reads them,
            the only one of classes, `label` or `cls`.

    Raises:
        DataError: If there is no such data set, it has no classes, a class folder is empty, or a column is given for
            class folders.
    """
    data = os.fspath(data)
    if data.startswith("hf://"):
        return _open_hugging_face(data.removeprefix("hf://"), split, image_column, label_column)
    if is_url(data):
        raise DataError(f"{data} is an address, which is not read; download the data set and give its folder")
    root = Path(data)
    if root.is_file() and root.suffix.lower() == ".csv":
        return _open_csv(root, split, image_column, label_column)
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder; give one with train/<class>/ folders or train*.parquet files, a CSV file, or "
            "hf://NAME for a data set of the Hugging Face Hub"
        )
    tables = {file.stem: file for file in sorted(root.iterdir()) if file.suffix.lower() == ".csv" and file.is_file()}
    folders = sorted(entry.name for entry in root.iterdir() if split_of(entry.name) and entry.is_dir())
    folders = [name for name in folders if _has_folders(root / name)]
    found = find_split(tables, split)
    train_in_folders = bool(find_split(folders, "train"))
    in_tables = bool(find_split(tables, "train")) or (bool(found) and not (train_in_folders and split_of(split)))
    notes = []
    if folders and (named := [table.name for stem, table in tables.items() if split_of(stem)]):
        read, other = (named, folders) if in_tables else (folders, named)
        notes.append(
            f"{root} has {some(named)} and class folders in {some(folders)}: {some(read)} read, {some(other)} not"
        )
    if in_tables:
        opened = _open_csv(tables[found[0]], None, image_column, label_column) if found else None
        return opened and replace(opened, notes=(*split_notes(root, split, found), *notes, *opened.notes))
    files = [file for pattern in _DATASET_FILES if (file := next(root.glob(pattern), None))]
    if files and not train_in_folders:
        return _open_hugging_face(str(root.resolve()), split, image_column, label_column)
    notes += [f"{root} has {files[0].name} and class folders in {some(folders)}: the folders are read"] if files else []
    if image_column or label_column:
        raise DataError(
            f"image_column and label_column are for CSV files and data sets with columns, and {root} is neither: the "
            "names of its folders are the classes"
        )
    opened = _open_folders(root, split)
    return opened and replace(opened, notes=(*notes, *opened.notes))


def _open_folders(root: Path, split: str) -> LabelledImages | None:
    """The folder of a split, or for the split train `root` itself if its folders are classes."""
    folders = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    found = find_split(folders, split)
    splits = [name for name in folders if split_of(name) or name in found]
    others = [name for name in folders if name not in splits]
    if splits and others and not any(_has_folders(root / name) for name in splits):
        note = f"{some(splits)} in {root} without class folders of their own: taken as classes, not as splits"
        return _open_classes(root, (note,)) if split == "train" else None
    if splits:
        notes = split_notes(root, split, found)
        if others:
            notes.append(f"folders of {root} that are no splits are not read: {some(others)}")
        return _open_classes(root / found[0], notes) if found else None
    if folders and all(map(looks_like_split, folders)):
        raise DataError(
            f"the folders of {root}, {some(folders)}, look like splits and not like classes; call them train, val and "
            "test, or give one of them"
        )
    return _open_classes(root) if split == "train" else None


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def _open_classes(folder: Path, notes: Sequence[str] = ()) -> LabelledImages:
    """The images in the class folders of `folder`; names that only differ in blanks or Unicode form are one class."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    if not classes:
        raise DataError(f"{folder} has no class folders; put the images of each class into {folder}/<class name>/")
    broken = next((entry for entry in classes if any("\ud800" <= each <= "\udfff" for each in entry.name)), None)
    if broken is not None:  # which no file of results could hold
        raise DataError(f"class folder {os.fspath(broken)!r} has a name that is no Unicode; rename it")
    class_names = list(dict.fromkeys(clean_name(entry.name) for entry in classes))
    is_image = ImageFilter()
    files: list[str] = []
    labels: list[int] = []
    nested, split_inside = [], []
    for top in classes:
        images = [image for file in sorted(files_in(top), key=os.path.split) if is_image(image := Path(file), folder)]
        if not images:
            parts = [f"class folder {top} holds no image", *is_image.notes(folder), "fill it or remove it"]
            raise DataError("; ".join(parts))
        if all(image.parent != top for image in images):
            nested.append(top.name)
            inner = {image.relative_to(top).parts[0] for image in images}
            split_inside += [top] if all(map(split_of, inner)) else []
        files += map(str, images)
        labels += [class_names.index(clean_name(top.name))] * len(images)
    if split_inside and len(split_inside) == len(classes):
        raise DataError(
            f"the class folders of {folder} hold splits instead of images, such as {split_inside[0]}; arrange them as "
            "<split>/<class name>/, or give the folder with the splits"
        )
    stray = [entry.name for entry in entries if not entry.is_dir() and is_image(entry, folder)]
    notes = [*notes, *is_image.notes(folder), *look_alikes(class_names)]
    if nested:
        notes.append(f"class folders of {folder} with images only in inner folders, all of one class: {some(nested)}")
    if stray:
        notes.append(f"{count(len(stray), 'image')} outside the class folders of {folder} left out: {some(stray)}")
    return LabelledImages(files, labels, class_names, range(len(files)), tuple(notes), folder)


def _open_csv(file: Path, split: str | None, image_column: str, label_column: str) -> LabelledImages | None:
    """The rows of `file`, or those of a split by its column `split`; paths are relative to its folder."""
    path, label = image_column.strip().lower() or "path", label_column.strip().lower() or "label"
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns = [column.strip().lower() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            read = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV file in UTF-8: {error}") from error
    if not {path, label} <= set(columns):
        raise DataError(f"{file} needs a first line with the columns {path} and {label}, got {', '.join(columns)!r}")
    twice = next((name for name in (path, label, "split") if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file} has the column {twice} twice; rename or remove one of them")
    surplus = next((i for i, row in enumerate(read) if any(map(str.strip, row.get(None) or []))), None)
    if surplus is not None:
        raise DataError(
            f"{file}: row {surplus + 1} after the header has more values than columns; put quotes around a value with "
            "a comma"
        )
    rows = [{name: (value or "").strip() for name, value in row.items() if name in columns} for row in read]
    short = next((i for i, row in enumerate(rows) if not row[path] or not row[label]), None)
    if short is not None:
        raise DataError(f"{file}: row {short + 1} after the header lacks a path or a label")
    notes = []
    if "split" in columns and split is None:
        notes.append(f"the column split of {file} is not read: all its rows are the split of its name")
    elif "split" in columns:
        blank = [row for row in rows if not row["split"]]
        known = [row for row in rows if split_of(row["split"]) or find_split([row["split"]], split or "")]
        others = Counter(row["split"] for row in rows) - Counter(row["split"] for row in known + blank)
        if blank:
            notes.append(f"{count(len(blank), 'row')} of {file} without a split left out")
        if others:
            values = some([f"{value} ({number})" for value, number in others.items()])
            left_out = count(sum(others.values()), "row")
            notes.append(f"{left_out} of {file} left out, of other splits than train, val and test: {values}")
        rows = [row for row in known if row["split"]]
    class_names = in_order(clean_name(row[label]) for row in rows)
    known_splits = {row.get("split", "train") for row in rows}
    if split is not None:
        chosen = find_split(known_splits, split)
        rows = [row for row in rows if row.get("split", "train") in chosen]
    if not rows:
        if notes and (split == "train" or not known_splits):  # nobody else would say what was left out
            raise DataError(
                f"{file} has no row of the split {split}: {'; '.join(notes)}; write train, val or test into the column "
                "split, or remove the column"
            )
        return None
    number = {name: i for i, name in enumerate(class_names)}
    paths = [row[path] if is_url(row[path]) else str(file.parent / row[path]) for row in rows]
    labels = [number[clean_name(row[label])] for row in rows]
    return LabelledImages(paths, labels, class_names, range(len(rows)), (*notes, *look_alikes(class_names)))


def load_hugging_face(name: str) -> Any:
    """The splits of a data set of the Hub, or of a folder with files of one.

    Raises:
        DataError: If it cannot be read.
    """
    import datasets

    try:
        if Path(name, "dataset_dict.json").is_file() or Path(name, "state.json").is_file():
            saved = datasets.load_from_disk(name)
            return saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        splits = datasets.load_dataset(name)
        files = _files_by_split(Path(name))
        if files and not any(Path(name).glob("README.md")) and {split_of(str(split)) for split in splits} != set(files):
            suffix = Path(next(iter(files.values()))[0]).suffix.lower()
            builder = {".tar": "webdataset"}.get(suffix, suffix[1:])
            splits = datasets.load_dataset(builder, data_files=files)
        return splits
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {name} as a data set: {first_line(error.__cause__ or error)}") from error


def _files_by_split(folder: Path) -> dict[str, list[str]]:
    """The parquet, arrow or tar files of a folder by the split in their names or folders, in any case."""
    found: dict[str, list[str]] = {}
    for file in sorted(file for suffix in ("parquet", "arrow", "tar") for file in folder.rglob(f"*.{suffix}")):
        names = [file.name.partition(".")[0], *file.relative_to(folder).parts[:-1]]
        words = [re.split(r"[-_. ]\d", name)[0] for name in names]  # train-00000-of-00004, val_0
        split = next((split for split in map(split_of, words) if split), None)
        if split is not None:
            found.setdefault(split, []).append(str(file))
    return found


def _open_hugging_face(name: str, split: str, image_column: str, label_column: str) -> LabelledImages | None:
    splits = load_hugging_face(name)
    found = find_split(splits, split)
    if not found:
        _refuse_without_train(name, split, splits)
        return None
    dataset = splits[found[0]]
    image_column, label_column = _columns(name, dataset.features, image_column, label_column)
    values = list(dataset.select_columns([label_column])[:][label_column])
    declared = getattr(dataset.features[label_column], "names", None)
    several = next((value for value in values if isinstance(value, list | dict)), None)
    if several is not None:
        raise DataError(f"{name}: the column {label_column} holds values such as {several!r}; an image needs one class")
    for row, value in enumerate(values):
        if declared is not None and value is not None and not -1 <= value < len(declared):
            raise DataError(
                f"{name}: row {row} of the split {dataset.split} has {value} in the column {label_column}, whose "
                f"classes are numbered from 0 to {len(declared) - 1}; correct it"
            )
    texts = [label_text(value, declared) for value in values]
    if not all(texts):
        raise DataError(f"{name}: {texts.count('')} rows of the split {dataset.split} have no label")
    class_names = in_order(texts) if declared is None else list(dict.fromkeys(map(clean_name, declared)))
    notes = split_notes(name, split, found)
    number = {class_name: i for i, class_name in enumerate(class_names)}
    labels = [number[text] for text in texts]
    notes += look_alikes(class_names)
    return LabelledImages(EncodedColumn(dataset, image_column), labels, class_names, range(len(labels)), tuple(notes))


def label_text(value: Any, declared: Sequence[str] | None = None) -> str:
    """The class of a row or an object, by its number in `declared` if there is that; "" without a label."""
    if value is None or value != value or (declared is not None and value == -1):
        return ""
    if declared is not None:
        return clean_name(declared[value])
    if isinstance(value, bytes):  # text in a binary column
        return clean_name(value.decode("utf-8", "backslashreplace"))
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())  # a column of 0.0 and 1.0
    return clean_name(str(int(value) if whole else value))


def _refuse_without_train(name: str, split: str, splits: Iterable[Any]) -> None:
    """Raises DataError if the split that a data set lacks is the one to train on."""
    if split == "train":
        raise DataError(f"{name} has no split train, but {some(sorted(map(str, splits)))}; call one of them train")


def _columns(name: str, features: Any, image_column: str, label_column: str) -> tuple[str, str]:
    """The columns with images and classes: the requested ones, or the only possible ones."""
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    chosen = []
    for asked, certain, usual, what in (
        (image_column, images, ("image",), "image"),
        (label_column, classes, ("label", "cls"), "label"),
    ):
        found = [asked] if asked else certain if len(certain) == 1 else [c for c in usual if c in features]
        if len(found) != 1 or found[0] not in features:
            raise DataError(
                f"{name} has no column {(asked or what)!r}, but {', '.join(features)}; name one with --{what}-column"
            )
        chosen.append(found[0])
    return chosen[0], chosen[1]


def open_stream(
    data: str | Path, split: str, length: int = 0, image_column: str = "", label_column: str = ""
) -> StreamedImages | None:
    """The `split` of a Hugging Face data set (`hf://NAME`, or a folder) without copying it, or None if it has none.

    Args:
        data: Where the data set is.
        split: The split.
        length: Its number of images, if the data set does not state it; only needed for training.
        image_column: The column with the images; by default the only one of images.
        label_column: The column with the classes; by default the only one of classes, `label` or `cls`.

    Raises:
        DataError: If there is no such data set, or it does not state its classes or its number of training images.
    """
    import datasets

    name = str(data).removeprefix("hf://")
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    try:
        splits = datasets.load_dataset(name, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {name} as a data set: {first_line(error.__cause__ or error)}") from error
    by_name = _files_by_split(Path(name)) if not any(Path(name).glob("README.md")) else {}
    if by_name and {split_of(str(read_as)) for read_as in splits} != set(by_name):
        raise DataError(
            f"the library datasets does not know the splits of {name} by the names of their files; call them train-*, "
            "validation-* and test-*, or read them without --stream"
        )
    found = find_split(map(str, splits), split)
    if not found:
        _refuse_without_train(name, split, splits)
        return None
    known = found[0]
    stream: Any = splits[known]
    image_column, label_column = _columns(name, stream.features or {}, image_column, label_column)
    class_names = getattr(stream.features[label_column], "names", None)
    info = (stream.info.splits or {}).get(known)
    length = length or (info.num_examples if info is not None else 0) or 0
    if not class_names:
        raise DataError(f"{name} does not name the classes of column {label_column!r}; read it without --stream")
    if not length and split == "train":  # an epoch must know its steps; evaluation reads to the end
        raise DataError(f"{name} does not say how many images its split {known} has; give --stream-length")
    names, notes = [clean_name(class_name) for class_name in class_names], tuple(split_notes(name, split, found))
    return StreamedImages(name, known, names, length, image_column, label_column, notes)


def train_val_split(data: LabelledImages, val_size: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Holds out `val_size` images, the same share of every class but at least one, drawn by `seed`.

    A class of a single image stays in the training images.

    Raises:
        DataError: If a class would have no image left for training.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([data.label(i) for i in range(len(data))])
    held_out = []
    for label in range(len(data.class_names)):
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(val_size * len(rows) / len(labels))), len(rows) if len(rows) != 1 else 0)
        if count and count == len(rows):
            raise DataError(
                f"class {data.class_names[label]!r} has {len(rows)} images, too few to hold out {val_size} of "
                f"{len(labels)} images; give another validation size or a val/ folder"
            )
        held_out.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    if not any(len(rows) for rows in held_out):
        raise DataError("no class has an image to hold out, for each has only one; add images or give a val/ folder")
    val = torch.cat(held_out).sort().values.tolist()
    chosen = set(val)
    return data.subset(i for i in range(len(labels)) if i not in chosen), data.subset(val)


def with_classes(data: LabelledImages, class_names: list[str]) -> LabelledImages:
    """Renumbers the classes of `data` by `class_names`.

    Raises:
        DataError: If an image has a class that is not among them.
    """
    number = {name: i for i, name in enumerate(class_names)}
    unknown = [data.class_names[i] for i in sorted(data.used()) if data.class_names[i] not in number]
    if unknown:
        raise DataError(
            f"the class {unknown[0]!r} is not one of those that are trained. The split has "
            f"{some(data.class_names, 20)}; trained are {some(class_names, 20)}"
        )
    return data.renumbered([number.get(name, 0) for name in data.class_names], class_names)
