"""Labelled images for training and evaluation, from a folder of class folders or of parquet files."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from spd_zoo.images import SUFFIXES, read_image

__all__ = ["DataError", "LabelledImages", "loader", "open_data", "train_val_split"]


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says what is wrong and what to do."""


@dataclass
class LabelledImages:
    """A split of a data set: (image, label) pairs and the class names."""

    images: Dataset[tuple[Image.Image, int]]
    labels: list[int]
    class_names: list[str]

    def subset(self, indices: list[int]) -> "LabelledImages":
        """The images at `indices`."""
        return LabelledImages(Subset(self.images, indices), [self.labels[i] for i in indices], self.class_names)


class _ParquetImages(Dataset[tuple[Image.Image, int]]):
    """Rows of parquet files in the Hugging Face layout: `image` (struct with `bytes`) and `label`."""

    def __init__(self, files: list[Path]) -> None:
        from pyarrow import parquet

        table = parquet.read_table(files)
        missing = {"image", "label"} - set(table.column_names)
        if missing:
            raise DataError(f"{files[0]} has no column {sorted(missing)[0]!r}; it needs `image` and `label`")
        self.encoded = table.column("image").combine_chunks().field("bytes")
        self.labels: list[int] = table.column("label").to_pylist()
        self.class_names = _hugging_face_class_names(table.schema.metadata) or [
            str(i) for i in range(max(self.labels) + 1)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.open(BytesIO(self.encoded[index].as_buffer()))
        return image.convert("RGB"), self.labels[index]


def _hugging_face_class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The class names in the metadata that the `datasets` library writes into parquet files."""
    import json

    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names: list[str] | None = features.get("label", {}).get("names")
    return names


def open_data(root: Path, split: str) -> LabelledImages | None:
    """The `split` of the data set in `root`, or None if there is no such split.

    Either `root/<split>/<class name>/*` holds images, or `root/<split>*.parquet` the Hugging Face layout.

    Raises:
        DataError: If `root` is no folder, or has no class folders or an empty one.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one with train/<class>/ folders or train*.parquet files")
    files = sorted(root.glob(f"{split}*.parquet"))
    if files:
        rows = _ParquetImages(files)
        return LabelledImages(rows, rows.labels, rows.class_names)
    folder = root / split
    if not folder.is_dir():
        return None
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder} has no class folders; put the images of each class into {folder}/<class name>/")
    images = ImageFolder(folder, loader=_read, is_valid_file=_has_image_suffix, allow_empty=True)
    empty = sorted(set(range(len(images.classes))) - set(images.targets))
    if empty:
        raise DataError(f"class folder {folder / images.classes[empty[0]]} holds no image; fill it or remove it")
    return LabelledImages(images, images.targets, images.classes)


def _read(path: str) -> Image.Image:
    return read_image(Path(path))


def _has_image_suffix(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def train_val_split(data: LabelledImages, val_size: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Holds out `val_size` images, the same share of every class, drawn by `seed`.

    Raises:
        DataError: If a class would have no image left on one of the two sides.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(data.labels)
    held_out = []
    for label in range(len(data.class_names)):
        rows = (labels == label).nonzero().flatten()
        count = round(val_size * len(rows) / len(labels))
        if not 0 < count < len(rows):
            raise DataError(
                f"class {data.class_names[label]!r} has {len(rows)} images, too few to hold out {val_size} of "
                f"{len(labels)} images; give another validation size or a val/ folder"
            )
        held_out.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    val = torch.cat(held_out).sort().values.tolist()
    chosen = set(val)
    return data.subset([i for i in range(len(labels)) if i not in chosen]), data.subset(val)


class _Transformed(Dataset[tuple[Tensor, Any]]):
    def __init__(self, images: Dataset[tuple[Image.Image, int]], transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # every data set here has a length

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.images[index]
        return self.transform(image), label


def loader(
    data: LabelledImages,
    image_size: int,
    batch_size: int,
    training: bool,
    num_workers: int,
    crop_padding: int = 0,
    **transform: Any,
) -> DataLoader[tuple[Tensor, Any]]:
    """Batches of (N, 3, image_size, image_size) and (N,): shuffled and augmented for training, else in order.

    `transform` goes to timm's `create_transform`. With `crop_padding`, a crop of the image with so many black pixels on
    every side takes the place of timm's random resized crop.
    """
    make = create_transform(image_size, is_training=training, **transform)
    if training and crop_padding:
        resize = v2.Resize((image_size, image_size))
        make.transforms[0] = v2.Compose([resize, v2.RandomCrop(image_size, padding=crop_padding)])
    return DataLoader(
        _Transformed(data.images, make),
        batch_size,
        shuffle=training,
        drop_last=training and len(data.labels) > batch_size,
        num_workers=num_workers,
        worker_init_fn=_seed_worker,
    )


def _seed_worker(_: int) -> None:
    """Gives Python's and NumPy's generators in a worker the seed that torch derived for it."""
    from timm.utils import random_seed

    random_seed(torch.initial_seed() % 2**31)
