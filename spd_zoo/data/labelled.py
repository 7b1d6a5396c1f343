"""Labelled images for training and evaluation: folders, CSV, Hugging Face data sets and WebDataset shards."""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from spd_zoo.data.reading import SUFFIXES, read_image

__all__ = [
    "DataError",
    "LabelledImages",
    "StreamedImages",
    "open_data",
    "open_stream",
    "train_val_split",
    "with_classes",
]

OTHER_NAMES = {"val": ("val", "validation", "valid", "dev")}
_DATASET_FILES = (
    "dataset_dict.json",  # written by save_to_disk
    *(f"{folder}*.{suffix}" for folder in ("", "data/", "train/", "test/") for suffix in ("parquet", "arrow", "tar")),
)


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says what is wrong and what to do."""


class _EncodedColumn:
    """The images of a Hugging Face data set, not decoded."""

    def __init__(self, dataset: Any, column: str) -> None:
        import datasets

        self.column = column
        self.dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str | BytesIO:
        image = self.dataset[index][self.column]
        return BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]


@dataclass(frozen=True)
class LabelledImages:
    """A split of a data set whose images can be read in any order.

    Attributes:
        files: Of each image, the path of its file or the file's bytes.
        labels: Of each image, the number of its class.
        class_names: What the numbers mean.
        rows: The images that belong to the split, as places in `files` and `labels`.
    """

    files: list[str] | _EncodedColumn
    labels: list[int]
    class_names: list[str]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> int:
        """The class of the image at `index`."""
        return self.labels[self.rows[index]]

    def file(self, index: int) -> str | BytesIO:
        """The path or the bytes of the image at `index`."""
        return self.files[self.rows[index]]

    def name(self, index: int) -> str:
        """What the image is called in messages and reports."""
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

    def counts(self) -> list[int]:
        """How many images each class has."""
        found = Counter(self.label(i) for i in range(len(self)))
        return [found[label] for label in range(len(self.class_names))]

    def fingerprint(self) -> str:
        """A digest of names, labels and classes, by which a run knows its data again; pixels do not count."""
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

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        """By which a run knows its data again."""
        return f"{self.data} {self.split} {self.length} {len(self.class_names)}"


def open_data(data: str | Path, split: str, image_column: str = "", label_column: str = "") -> LabelledImages | None:
    """The `split` (train, val or test) of a data set, or None if there is no such split.

    A data set is one of

    - a folder with `<split>/<class name>/*`, or with the class folders alone, which then are the split `train`;
    - a CSV file with the columns path, label and, if it has several splits, split; or a folder with `<split>.csv`;
    - a folder with parquet, arrow or WebDataset tar files or one that `datasets.save_to_disk` wrote;
    - `hf://NAME`, a data set of the Hugging Face Hub.

    The last two are read by the library `datasets`, which makes a local copy of what it does not have yet.

    Args:
        data: Where the data set is.
        split: Which part of it.
        image_column: The column with the images, where `datasets` reads them; the only one of images if not given.
        label_column: The column with the classes; the only one of classes, `label` or `cls` if not given.

    Raises:
        DataError: If there is no such data set, it has no classes, or a class folder is empty.
    """
    data = str(data)
    names = OTHER_NAMES.get(split, (split,))
    if data.startswith("hf://"):
        return _open_hugging_face(data.removeprefix("hf://"), names, image_column, label_column)
    root = Path(data)
    if root.is_file() and root.suffix.lower() == ".csv":
        return _open_csv(root, names)
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder; give one with train/<class>/ folders or train*.parquet files, a CSV file, or "
            "hf://NAME for a data set of the Hugging Face Hub"
        )
    if any((root / f"{name}.csv").is_file() for name in ("train", *names)):
        files = [root / f"{name}.csv" for name in names if (root / f"{name}.csv").is_file()]
        return _open_csv(files[0], None) if files else None
    if any(next(root.glob(pattern), None) for pattern in _DATASET_FILES):
        return _open_hugging_face(str(root.resolve()), names, image_column, label_column)
    folders = [root / name for name in names if (root / name).is_dir()]
    if not folders and split == "train" and not any((root / name).is_dir() for name in ("test", *OTHER_NAMES["val"])):
        folders = [root]
    return _open_folder(folders[0]) if folders else None


class _VisibleFolders(ImageFolder):
    """torchvision's data set without hidden folders, which tools leave behind."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: i for i, name in enumerate(names)}


def _open_folder(folder: Path) -> LabelledImages:
    if not any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        raise DataError(f"{folder} has no class folders; put the images of each class into {folder}/<class name>/")
    found = _VisibleFolders(folder, is_valid_file=_has_image_suffix, allow_empty=True)
    empty = sorted(set(range(len(found.classes))) - set(found.targets))
    if empty:
        raise DataError(f"class folder {folder / found.classes[empty[0]]} holds no image; fill it or remove it")
    return LabelledImages([path for path, _ in found.samples], found.targets, found.classes, range(len(found)))


def _has_image_suffix(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _open_csv(file: Path, names: Sequence[str] | None) -> LabelledImages | None:
    """The rows of `file`, or those whose column `split` is one of `names`; paths are relative to its folder."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV file in UTF-8: {error}") from error
    if not {"path", "label"} <= set(columns):
        raise DataError(f"{file} needs a first line with the columns path and label, got {', '.join(columns)!r}")
    short = next((i for i, row in enumerate(rows) if not row["path"] or not row["label"]), None)
    if short is not None:
        raise DataError(f"{file}: row {short + 1} behind the header lacks a path or a label")
    class_names = _in_order({row["label"] for row in rows})
    if names is not None:
        rows = [row for row in rows if row.get("split", "train") in names]
    if not rows:
        return None
    number = {name: i for i, name in enumerate(class_names)}
    paths = [str(file.parent / row["path"]) for row in rows]
    return LabelledImages(paths, [number[row["label"]] for row in rows], class_names, range(len(rows)))


def _in_order(names: set[str]) -> list[str]:
    """Numbers by value, else by alphabet."""
    return sorted(names, key=(lambda name: int(name)) if all(name.isdecimal() for name in names) else str)


def _open_hugging_face(
    name: str, split_names: Sequence[str], image_column: str, label_column: str
) -> LabelledImages | None:
    import datasets

    try:
        if Path(name, "dataset_dict.json").is_file():
            splits: Any = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {name} as a data set: {str(error).partition(chr(10))[0]}") from error
    dataset = next((splits[split] for split in split_names if split in splits), None)
    if dataset is None:
        return None
    image_column, label_column = _columns(name, dataset.features, image_column, label_column)
    labels = list(dataset.select_columns([label_column])[:][label_column])
    if any(label is None or label == -1 for label in labels):
        raise DataError(f"{name}: rows of the split {dataset.split} have no label")
    class_names = getattr(dataset.features[label_column], "names", None)
    if class_names is None and all(isinstance(label, int) and label >= 0 for label in labels):
        class_names = [str(i) for i in range(max(labels) + 1)]
    elif class_names is None:
        class_names = _in_order({str(label) for label in labels})
        number = {name: i for i, name in enumerate(class_names)}
        labels = [number[str(label)] for label in labels]
    return LabelledImages(_EncodedColumn(dataset, image_column), labels, class_names, range(len(labels)))


def _columns(name: str, features: Any, image_column: str, label_column: str) -> tuple[str, str]:
    """The columns with images and classes: those asked for, or those that can be nothing else."""
    import datasets

    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    chosen = []
    for asked, certain, usual, kind in (
        (image_column, images, ("image",), "image"),
        (label_column, classes, ("label", "cls"), "label"),
    ):
        found = [asked] if asked else certain if len(certain) == 1 else [c for c in usual if c in features]
        if len(found) != 1 or found[0] not in features:
            raise DataError(
                f"{name} has no column {(asked or kind)!r}, but {', '.join(features)}; name one with --{kind}-column"
            )
        chosen.append(found[0])
    return chosen[0], chosen[1]


def open_stream(
    data: str | Path, split: str, length: int = 0, image_column: str = "", label_column: str = ""
) -> StreamedImages | None:
    """The `split` of a Hugging Face data set (`hf://NAME`, or a folder) without copying it, or None if it has none.

    Args:
        data: Where the data set is.
        split: Which part of it.
        length: How many images it has, where the data set does not say; needed to train on it alone.
        image_column: The column with the images; the only one of images if not given.
        label_column: The column with the classes; the only one of classes, `label` or `cls` if not given.

    Raises:
        DataError: If there is no such data set, or it does not say its classes, or how many images to train on.
    """
    import datasets

    name = str(data).removeprefix("hf://")
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    try:
        splits = datasets.load_dataset(name, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {name} as a data set: {str(error).partition(chr(10))[0]}") from error
    known = next((known for known in OTHER_NAMES.get(split, (split,)) if known in splits), None)
    if known is None:
        return None
    stream: Any = splits[known]
    image_column, label_column = _columns(name, stream.features or {}, image_column, label_column)
    class_names = getattr(stream.features[label_column], "names", None)
    info = (stream.info.splits or {}).get(known)
    length = length or (info.num_examples if info is not None else 0) or 0
    if not class_names:
        raise DataError(f"{name} does not name the classes of column {label_column!r}; read it without --stream")
    if not length and split == "train":  # an epoch must know its steps; evaluation reads to the end
        raise DataError(f"{name} does not say how many images its split {known} has; give --stream-length")
    return StreamedImages(name, known, class_names, length, image_column, label_column)


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
    """`data` with the numbers that its classes have in `class_names`.

    Raises:
        DataError: If it has a class that is not among them.
    """
    if data.class_names == class_names:
        return data
    number = {name: i for i, name in enumerate(class_names)}
    unknown = [name for name in data.class_names if name not in number]
    if unknown:
        raise DataError(
            f"there is a class {unknown[0]!r} that the network does not know; it has {', '.join(class_names[:20])}"
        )
    renumbered = [number[name] for name in data.class_names]
    return replace(data, labels=[renumbered[label] for label in data.labels], class_names=class_names)
