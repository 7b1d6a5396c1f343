"""Recognises the splits of a data set by their usual names, in any case."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from spd_zoo.data.notes import some

__all__ = ["find_split", "looks_like_split", "no_split", "split_notes", "split_of"]

_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "validation", "valid", "validate", "dev"),
    "test": ("test", "tests", "testing", "tst", "eval", "evaluation"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
_AROUND = r"(?:set|data|dataset|split|images?|imgs?)?"  # train_set, images_train, testdata
_PATTERN = re.compile(rf"{_AROUND}[-_. ]*({'|'.join(sorted(_SPLITS, key=len)[::-1])})[-_. ]*{_AROUND}[-_. ]*\d*")


def split_of(name: str) -> str | None:
    """The split (train, val or test) that a name stands for, or None: train2017 is train, train_extra is none."""
    match = _PATTERN.fullmatch(name.strip().lower())
    return _SPLITS[match[1]] if match else None


def looks_like_split(name: str) -> bool:
    """Whether a split's name is one of the words of a name, as in seg_train or trainA."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return split_of(name) is not None or any(word.lower() in _SPLITS for word in words)


def find_split(names: Iterable[str], split: str) -> list[str]:
    """The names that stand for `split`, best match first: equal, equal except for case, another usual name."""
    usual = _NAMES.get(split, ())

    def rank(name: str) -> tuple[bool, bool, int]:
        word = name.strip().lower()
        return name != split, word != split.lower(), usual.index(word) if word in usual else len(usual)

    found = [name for name in names if name.strip().lower() == split.lower() or (usual and split_of(name) == split)]
    return sorted(found, key=lambda name: (*rank(name), name))


def split_notes(where: object, split: str, found: Sequence[str]) -> list[str]:
    """A note if several names stand for a split, of which the first is read."""
    if len(found) < 2:
        return []
    return [f"{where} has {len(found)} names for the split {split}: {found[0]} is read, {some(found[1:])} not"]


def no_split(data: object, split: str, opened: Callable[[str], object]) -> str:
    """A sentence: the data set has no `split`, and which of train, val and test it has, as `opened` finds them."""
    there: list[str] = []
    for name in _NAMES:
        with suppress(ValueError):  # what is wrong with a split that nobody asked for
            there += [name] if opened(name) else []
    return f"{data} has no split {split}" + (f"; it has {some(there)}" if there else "")
