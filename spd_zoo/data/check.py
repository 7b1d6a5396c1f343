"""Checks a data set before training; every image is read once."""

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from spd_zoo.console import bar_disabled
from spd_zoo.data.boxes import BoxImages
from spd_zoo.data.boxes.sizes import sizes_in_words
from spd_zoo.data.boxes.tiles import tiles_in_words
from spd_zoo.data.labelled import DataError, LabelledImages, StreamedImages
from spd_zoo.data.notes import Notes, count, some
from spd_zoo.data.reading import collect_notes, opened
from spd_zoo.data.regions import bands
from spd_zoo.process import Process, worker_options

__all__ = ["check", "defects_in_words", "in_words", "notes_on"]


@dataclass(frozen=True)
class _Fact:
    """The result for one image; `error` says why it cannot be read."""

    index: int
    error: str = ""
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    kinds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Facts(Dataset[_Fact]):
    def __init__(self, data: LabelledImages | BoxImages) -> None:
        self.data = data

    def __getitem__(self, index: int) -> _Fact:
        try:
            with collect_notes() as notes:
                size, digest = self.pixels(index)
        except ValueError as error:
            return _Fact(index, str(error).removeprefix(f"{self.data.name(index)}: "))
        with opened(self.data.file(index), any_size=True) as file:
            kinds = {
                "grey": file.mode in ("1", "L", "LA") or file.mode.startswith("I"),
                "16-bit": file.mode.startswith("I"),
                "CMYK": file.mode == "CMYK",
                "palette": file.mode == "P",
                "transparent": file.mode in ("LA", "RGBA", "PA"),
                "rotated by EXIF": file.getexif().get(0x0112, 1) not in (0, 1),
            }
        found = tuple(kind for kind, is_so in kinds.items() if is_so)
        return _Fact(index, "", size, f"{digest} {size}", found, tuple(dict.fromkeys(notes)))

    def pixels(self, index: int) -> tuple[tuple[int, int], str]:
        """Width and height of an image, and a digest of its pixels, which are not in memory all at once."""
        image = self.data.regions(index) if isinstance(self.data, BoxImages) else self.data.image(index)
        digest = hashlib.blake2b(digest_size=16)
        for band in bands(image):
            digest.update(band.tobytes())
        return image.size, digest.hexdigest()


def check(splits: Mapping[str, LabelledImages | BoxImages], workers: int, process: Process) -> dict[str, Any]:
    """Checks the splits of a data set (train, val).

    Every image is read, and compared with every other by its pixels. With several processes each reads its share.

    Args:
        splits: The splits by their names.
        workers: Processes that read images.
        process: This process.

    Returns:
        For JSON: for each split sizes, counts, defects and duplicates; under "in several splits" images that occur in
        more than one; under "notes" a line for everything that was guessed or left out.

    Raises:
        DataError: If a split has no image that can be read.
    """
    about: dict[str, Any] = {}
    owners: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # digest -> split -> names
    notes = Notes(note for data in splits.values() for note in data.notes)
    for split, data in splits.items():
        facts = _read_all(data, workers, process, split)
        good = [fact for fact in facts if not fact.error]
        if not good:
            why = f"; {data.name(facts[0].index)}: {facts[0].error}" if facts else ""
            raise DataError(f"no image of the split {split} can be read{why}")
        widths, heights = zip(*(fact.size for fact in good), strict=True)
        counts = data.subset(fact.index for fact in good).counts()
        same: dict[str, list[int]] = defaultdict(list)
        for fact in good:
            same[fact.digest].append(fact.index)
            owners[fact.digest][split].append(f"{split} {data.name(fact.index)}")
            for note in fact.notes:
                notes.add(note, data.name(fact.index))
        groups = [group for group in same.values() if len(group) > 1]
        about[split] = {
            "images": len(good),
            "classes": dict(zip(data.class_names, counts, strict=True)),
            "width": {"min": min(widths), "median": statistics.median(widths), "max": max(widths)},
            "height": {"min": min(heights), "median": statistics.median(heights), "max": max(heights)},
            "kinds": dict(Counter(kind for fact in good for kind in fact.kinds)),
            "unreadable": {data.name(fact.index): fact.error for fact in facts if fact.error},
            "duplicates": [[data.name(i) for i in group] for group in groups],
            "duplicates of another class": [
                [data.name(i) for i in group] for group in groups if len({data.label(i) for i in group}) > 1
            ],
        }
    about["in several splits"] = [
        [name for names in found.values() for name in names] for found in owners.values() if len(found) > 1
    ]
    return about | {"notes": notes.lines()}


def notes_on(splits: Iterable[LabelledImages | BoxImages | StreamedImages]) -> list[str]:
    """The notes on splits whose images are not checked, each once."""
    return Notes(note for data in splits for note in data.notes).lines()


def _read_all(data: LabelledImages | BoxImages, workers: int, process: Process, split: str) -> list[_Fact]:
    mine = range(process.rank, len(data), process.world)
    facts: list[_Fact] = []
    with tqdm(total=len(mine), desc=f"checking {split}", leave=False, disable=bar_disabled(not process.first)) as bar:
        for batch in DataLoader(_Facts(data), 32, sampler=mine, collate_fn=list, **worker_options(workers)):
            facts += batch
            bar.update(len(batch))
    return sorted((fact for found in process.all_gather(facts) for fact in found), key=lambda fact: fact.index)


def in_words(about: dict[str, Any]) -> Iterator[str]:
    """The lines to print for the result of `check`; only notes if nothing was checked."""
    if "found" in about:
        yield about["found"]
    for split in ("train", "val"):
        if split in about:
            yield from _split_in_words(split, about[split])
    if "tiles" in about:
        yield from tiles_in_words(about["tiles"])
    shared = about.get("in several splits", [])
    if shared:
        yield f"  {count(len(shared), 'image')} in both splits: {some([' = '.join(names) for names in shared])}"
    yield from (f"note: {note}" for note in about.get("notes", ()))


def _split_in_words(split: str, about: dict[str, Any]) -> Iterator[str]:
    counts, width, height = about["classes"], about["width"], about["height"]
    sizes = f"{width['min']}x{height['min']} to {width['max']}x{height['max']} pixels"
    yield (
        f"{split}: {count(about['images'], 'image')} of {count(len(counts), 'class', 'classes')}, {sizes}, "
        f"median {width['median']:g}x{height['median']:g}"
    )
    ordered = sorted(counts.items(), key=lambda item: item[1])
    if len(ordered) <= 12:
        yield f"  {', '.join(f'{name} {number}' for name, number in counts.items())}"
    elif ordered[0][1] == ordered[-1][1]:
        yield f"  {ordered[0][1]} of each class"
    else:
        fewest = ", ".join(f"{name} {number}" for name, number in ordered[:5])
        yield f"  fewest: {fewest}; most: {ordered[-1][0]} {ordered[-1][1]}"
    missing = [name for name, number in counts.items() if not number]
    if missing:
        yield f"  {count(len(missing), 'class', 'classes')} without an image here: {some(missing)}"
    if about["kinds"]:
        kinds = ", ".join(f"{number} {kind}" for kind, number in about["kinds"].items())
        yield f"  {kinds}: all are read upright, with 8 bits, in the network's colours and without transparency"
    if about["unreadable"]:
        named = [f"{name} ({error})" for name, error in about["unreadable"].items()]
        yield f"  {count(len(named), 'image')} left out as unreadable: {some(named)}"
    if about.get("without boxes"):
        yield f"  {count(about['without boxes'], 'image')} without objects, used as background"
    if "box sizes" in about:
        yield from sizes_in_words(about["box sizes"])
    yield from defects_in_words(about.get("boxes", {}))
    if about["duplicates"]:
        named = [" = ".join(names) for names in about["duplicates"]]
        yield f"  {count(len(named), 'image')} with copies: {some(named)}"
    if about["duplicates of another class"]:
        named = [" = ".join(names) for names in about["duplicates of another class"]]
        yield f"  {len(named)} of them labelled differently: {some(named)}"


def defects_in_words(defects: Mapping[str, list[str]]) -> Iterator[str]:
    """A line for each type of defect of boxes."""
    for defect, names in defects.items():
        yield f"  {len(names)} {defect}: {some(sorted(set(names)))}"
