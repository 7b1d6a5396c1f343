"""The images of training and validation: steps that both tasks share after opening a data set."""

from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

from spd_zoo.data.labelled import DataError
from spd_zoo.data.notes import count
from spd_zoo.training.config import FinetuneConfig

__all__ = ["Data", "Splits", "describe", "hold_out", "without_unreadable"]


class Data(Protocol):
    """A split of a data set, with labels or boxes."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A digest by which a resumed run recognises its data."""


class Readable(Data, Protocol):
    """Images that can be read in any order, so that some can be left out."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was guessed or left out when the data set was opened."""

    def counts(self) -> list[int]:
        """Images or objects of each class."""

    def name(self, index: int) -> str:
        """The name of an image in messages and reports: its path, if it is a file."""

    def without(self, names: Container[str]) -> Any:
        """The images that have other names."""


DataT = TypeVar("DataT", bound=Data)
ReadableT = TypeVar("ReadableT", bound=Readable)


@dataclass(frozen=True)
class Splits(Generic[DataT]):
    """The images of a run.

    Attributes:
        train: The images to train on.
        val: The images to validate with.
        about: Facts about them, as JSON: their fingerprint, and the results of the check.
    """

    train: DataT
    val: DataT
    about: dict[str, Any]


def describe(config: FinetuneConfig, train: Data, val: Data | None, began_with: dict[str, Any] | None) -> Any:
    """The fingerprint of both splits, or all recorded facts of a resumed run.

    Raises:
        DataError: If the run began with other data, or images are to be held out although there is a validation split.
    """
    about: dict[str, Any] = {"fingerprint": train.fingerprint() + (val.fingerprint() if val is not None else "")}
    if began_with is not None and began_with["fingerprint"] != about["fingerprint"]:
        raise DataError(f"{config.data} is not what it was when the run in {config.out} began; begin another one")
    if val is not None and (config.val_split or config.val_size):
        raise DataError(f"{config.data} has a split {config.val_name}; leave --val-split and --val-size out")
    return about if began_with is None else began_with


def hold_out(
    config: FinetuneConfig,
    train: ReadableT,
    val: ReadableT | None,
    split: Callable[[ReadableT, int, int], tuple[ReadableT, ReadableT]],
) -> tuple[ReadableT, ReadableT]:
    """`train` and `val`; without a validation split, `split` holds out some of the training images.

    Args:
        config: How many images are held out.
        train: The training images.
        val: The validation images, if there are any.
        split: Holds out a number of images by a seed.

    Raises:
        DataError: If the validation split that was asked for is missing.
    """
    if val is not None:
        return train, val
    if config.val_name != "val":
        raise DataError(
            f"{config.data} has no split {config.val_name}; without --val-name, its split val or training images that "
            "are held out are evaluated"
        )
    share, images = 0.2 if config.val_split is None else config.val_split, len(train)
    train, val = split(train, config.val_size or max(1, round(share * images)), config.seed)
    held_out = f"{len(val)} of {count(images, 'training image')} are held out for validation, drawn by the seed"
    note = f"{config.data} has no split {config.val_name}: {held_out} {config.seed}"
    train = replace(cast("Any", train), notes=(*train.notes, note))
    return train, val


def without_unreadable(
    train: ReadableT, val: ReadableT, about: dict[str, Any], examples: str
) -> tuple[ReadableT, ReadableT]:
    """Both splits without the images that the check could not read.

    Raises:
        DataError: If a class has no `examples` (images, boxes) to train on, or an image that the check of a resumed run
            could not read cannot be told from the others.
    """
    train, val = (
        data.without(_names_now(about.get(name, {}).get("unreadable", {}), data))
        for name, data in (("train", train), ("val", val))
    )
    empty = [name for name, count in zip(train.class_names, train.counts(), strict=True) if not count]
    if empty:
        raise DataError(f"class {empty[0]!r} has no {examples} to train on; add some, or remove the class")
    return train, val


def _names_now(unreadable: Collection[str], data: Readable) -> set[str]:
    """The names that unreadable images have now, if the data was in another folder when the run began.

    Raises:
        DataError: If no image or several have a name like it.
    """
    names = {data.name(i) for i in range(len(data))} if unreadable else set()
    return {name if name in names else _alike(name, names) for name in unreadable}


def _alike(name: str, names: Iterable[str]) -> str:
    """The only one of `names` that ends like `name`, in as few parts of the path as tell it from the others."""
    parts = Path(name).parts
    for number in range(1, len(parts)):
        alike = [each for each in names if Path(each).parts[-number:] == parts[-number:]]
        if len(alike) == 1:
            return alike[0]
        if not alike:
            break
    raise DataError(f"{name}, which could not be read when the run began, is not among the data; begin another run")
