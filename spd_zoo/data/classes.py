"""Matches the classes of a data set with those of a network, by name."""

import difflib
import operator
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from timm.utils.misc import natural_key

from spd_zoo.data.notes import count, some
from spd_zoo.files import compose_yaml
from spd_zoo.weights.load import class_names, class_synonyms

__all__ = [
    "UNUSED",
    "DataError",
    "NetworkClasses",
    "class_numbers",
    "clean_name",
    "in_order",
    "load_class_map",
    "look_alikes",
    "match_classes",
    "network_classes",
    "outputs_of",
    "pretrained_outputs",
    "renamed",
    "without_unused",
]

UNUSED = -2  # in place of the number of a class that does not occur
LISTED = 20  # classes of each side that an error lists


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says what is wrong and what to do."""


def clean_name(name: str) -> str:
    """A class name in the form in which it is compared: Unicode's composed form (NFC), without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


def _number(name: str) -> int | None:
    return int(name) if name.isdecimal() and len(name) <= 18 else None


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The names as numbers, if all are decimal numbers and differ."""
    numbers = [number for number in map(_number, names) if number is not None]
    return numbers if len(set(numbers)) == len(names) else None


def in_order(names: Iterable[str]) -> list[str]:
    """The distinct names, sorted by value if all are numbers, otherwise alphabetically; the same in every process."""
    different = sorted(set(names))
    if all(_number(name) is not None for name in different):
        different.sort(key=int)  # stable: 001, 01, 1 keep their alphabetical order
    return different


def look_alikes(names: Iterable[str]) -> list[str]:
    """A note if classes differ only in case or zeros around a number, which may be an accident."""
    groups = defaultdict(list)
    for name in names:
        number = re.sub(r"(?<=\d)\.0*$", "", name)  # 1.0, as tables write whole numbers where one is missing
        groups[number.lstrip("0") or "0" if number.isdecimal() else name.casefold()].append(name)
    alike = [" and ".join(group) for group in groups.values() if len(group) > 1]
    return [f"classes that differ only in case or zeros around a number are kept apart: {some(alike)}"] if alike else []


@dataclass(frozen=True)
class NetworkClasses:
    """The classes of a network.

    Attributes:
        names: Name of each output; its index if no name is known.
        named: Whether names are known.
        synonyms: Other names of each output, such as the WordNet ids of ImageNet; may be empty.
        listed: Whether outputs without names are taken in the order in which the data lists its classes, as for
            detectors, and not in timm's natural order, as for class folders.
    """

    names: Sequence[str]
    named: bool = True
    synonyms: Sequence[Sequence[str]] = ()
    listed: bool = False

    def numbers(self) -> dict[str, int]:
        """The output of each name; a synonym counts only if it is not a name and belongs to one output."""
        found: dict[str, int] = {}
        for level in ([[name] for name in self.names], self.synonyms):
            outputs = defaultdict(set)
            for i, names in enumerate(level):
                for name in map(clean_name, names):
                    outputs[name].add(i)
            found = {name: min(places) for name, places in outputs.items() if len(places) == 1} | found
        return found


def network_classes(cfg: Mapping[str, Any], num_classes: int, listed: bool = False) -> NetworkClasses:
    """The classes of a network.

    Args:
        cfg: Its `pretrained_cfg`.
        num_classes: Its number of outputs; if it differs from that of `cfg`, their names are unknown.
        listed: As in `NetworkClasses`.

    Returns:
        The classes.
    """
    if cfg["num_classes"] != num_classes:
        return NetworkClasses([str(i) for i in range(num_classes)], named=False, listed=listed)
    synonyms = class_synonyms(dict(cfg))
    return NetworkClasses(class_names(dict(cfg)), synonyms is not None, synonyms or (), listed)


class _Images(Protocol):
    """Images whose labels are numbers of classes: `LabelledImages` and `BoxImages`."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""

    def used(self) -> set[int]:
        """The classes that occur."""

    def renumbered(self: "_T", numbers: Sequence[int], class_names: list[str], notes: Sequence[str] = ()) -> "_T":
        """The images with class i as `numbers[i]` of `class_names`, and with more notes."""


_T = TypeVar("_T", bound=_Images)


def match_classes(data: _T, network: NetworkClasses, class_map: Mapping[str, str] | None = None) -> _T:
    """Renumbers the classes of `data` as outputs of a network, by name.

    Classes that become one output add a note to `data`, and so do two assumptions: that names 0 to n-1 are the indices
    of n outputs, and that a network without class names has learned the classes in timm's natural order, or if its
    classes are `listed`, in that of the data.

    Args:
        data: Labelled images, or images with boxes.
        network: The network's classes.
        class_map: The network's names of classes that have other names in the data; disables the assumptions.

    Returns:
        The data with new labels and notes.

    Raises:
        DataError: If a class of the data cannot be found among the network's.
    """
    known, outputs = network.numbers(), list(network.names)
    wrong = next((name for name in (class_map or {}).values() if name not in known), None)
    if wrong is not None:
        raise DataError(f"the class map leads to {wrong!r}, which the network does not have: {_listed(outputs)}")
    names = [clean_name(name) for name in data.class_names]
    names = [(class_map or {}).get(name, name) for name in names]
    used = sorted(data.used())
    numbers, note = _found(names, used, network, guess=class_map is None)
    missing = next((data.class_names[i] for i in used if i not in numbers), None)
    if missing is not None:
        raise DataError(
            f"{_lacking('the network', missing, outputs)}. The data has {_listed(data.class_names)}; the network has "
            f"{_listed(outputs)}. Give --class-map FILE with a line `NAME IN THE DATA: NAME IN THE NETWORK` for each "
            "class that is called differently"
        )
    sources = defaultdict(list)
    for i in used:
        sources[numbers[i]].append(data.class_names[i])
    merged = [f"{' and '.join(same)} as {outputs[number]}" for number, same in sources.items() if len(same) > 1]
    notes = [note] if note else []
    notes += [f"several classes of the data are one of the network: {some(merged)}"] if merged else []
    return data.renumbered([numbers.get(i, UNUSED) for i in range(len(names))], outputs, notes)


def outputs_of(class_names: Sequence[str], network: NetworkClasses, network_name: str) -> tuple[list[int], str]:
    """The output of a network for each class, as `match_classes` finds it, and a note if it is a guess.

    Args:
        class_names: The classes.
        network: The network's classes.
        network_name: Its name in error messages.

    Returns:
        The outputs, and the note; empty without a guess.

    Raises:
        DataError: If a class is not among the network's, or the network does not tell two of them apart.
    """
    names = [clean_name(name) for name in class_names]
    numbers, note = _found(names, range(len(names)), network)
    missing = next((class_names[i] for i in range(len(names)) if i not in numbers), None)
    if missing is not None:
        raise DataError(
            f"{_lacking(network_name, missing, network.names)}. The data has {_listed(class_names)}; "
            f"{network_name} has {_listed(network.names)}. Each class of the data must be one of "
            "them, by its name or WordNet id"
        )
    outputs = [numbers[i] for i in range(len(names))]
    twice = next((output for output, count in Counter(outputs).items() if count > 1), None)
    if twice is not None:
        same = [name for name, output in zip(class_names, outputs, strict=True) if output == twice]
        raise DataError(f"{' and '.join(map(repr, same))} are one class of {network_name}, {network.names[twice]!r}")
    return outputs, note


def pretrained_outputs(model: str, known: NetworkClasses, class_names: Sequence[str]) -> list[int] | None:
    """The outputs of the pretrained network for the classes of the data; None unless it knows every name.

    Args:
        model: The network's name.
        known: The classes of its weights.
        class_names: The classes of the data.
    """
    if not known.named:
        return None
    try:
        outputs, guess = outputs_of(class_names, known, model)
    except DataError:
        return None
    return None if guess else outputs


def without_unused(data: _T) -> _T:
    """`data` without the classes that do not occur, with a note that names them."""
    used = sorted(data.used())
    if len(used) == len(data.class_names):
        return data
    names = [data.class_names[i] for i in used]
    unused = [name for i, name in enumerate(data.class_names) if i not in set(used)]
    note = f"{count(len(unused), 'class', 'classes')} without anything to train on left out: {some(unused)}"
    place = {label: i for i, label in enumerate(used)}
    return data.renumbered([place.get(i, UNUSED) for i in range(len(data.class_names))], names, [note])


def _found(
    names: Sequence[str], used: Sequence[int], network: NetworkClasses, guess: bool = True
) -> tuple[dict[int, int], str]:
    """The network's output for each place in `names` that has one, and the note of a guess; `used` places need one."""
    known = network.numbers()
    numbers, note = {i: known[name] for i, name in enumerate(names) if name in known}, ""
    if not numbers.keys() >= set(used) and guess:
        for places in (range(len(names)), used):  # classes that do not occur may be unknown
            outputs, note = _guessed([names[i] for i in places], network)
            if outputs:
                return dict(zip(places, outputs, strict=True)), note
    elif not network.named and guess and set(numbers.values()) != set(range(len(network.names))):
        occurring = some([names[i] for i in used])
        note = f"the network does not name its classes; {occurring} are taken for the numbers of its outputs"
    return numbers, note


def _guessed(names: Sequence[str], network: NetworkClasses) -> tuple[Sequence[int], str]:
    """The network's outputs for `names` by one of the assumptions, and a note; empty if no assumption fits."""
    values, output_values = _numbers(names), _numbers(network.names)
    if values is not None and output_values is not None and set(values) <= set(output_values):
        return [output_values.index(value) for value in values], (
            f"classes are matched by their value as numbers: {_pairs(names, network.names, values, output_values)}"
        )
    if values is not None and output_values is None and set(values) == set(range(len(network.names))):
        return values, (
            "the data's class names are numbers and are taken for those of the network's outputs: "
            f"{_pairs(names, network.names, values, range(len(network.names)))}"
        )
    if not network.named and len(names) == len(network.names):
        order = list(names) if network.listed else sorted(names, key=lambda name: (natural_key(name), name))
        which = "their order there" if network.listed else "timm's natural order"
        return [order.index(name) for name in names], (
            f"the network does not name its classes; those of the data are taken in {which}: "
            + some([f"{name} = {i}" for i, name in enumerate(order)], LISTED)
        )
    return [], ""


def _pairs(names: Sequence[str], outputs: Sequence[str], values: Sequence[int], output_values: Sequence[int]) -> str:
    return some([f"{name} = {outputs[output_values.index(value)]}" for name, value in zip(names, values, strict=True)])


def _lacking(network_name: str, name: str, outputs: Sequence[str]) -> str:
    """Why a class of the data is no output."""
    several = Counter(map(clean_name, outputs))[clean_name(name)] > 1
    return f"{network_name} has {'several classes' if several else 'no class'} {name!r}"


def _listed(names: Sequence[str]) -> str:
    return f"{count(len(names), 'class', 'classes')} ({some(names, LISTED)})"


def load_class_map(file: str | Path) -> dict[str, str]:
    """Reads a class map.

    Args:
        file: YAML or JSON, with a line like `healthy: negative` for each class whose names differ.

    Returns:
        The network's class name for each class name in the data.

    Raises:
        DataError: If there is no such file, or it holds something else.
    """
    try:
        node = compose_yaml(Path(file))
    except OSError as error:
        raise DataError(f"cannot read the class map {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"the class map {error}") from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    if not pairs or not all(isinstance(side, yaml.ScalarNode) for pair in pairs for side in pair):
        raise DataError(
            f"the class map {file} needs lines like `healthy: negative`: a name in the data, one in the network"
        )
    # texts of the nodes, because YAML turns a class called `no` into False, and 01 into 1
    names = [(clean_name(key.value), clean_name(value.value)) for key, value in pairs]
    twice = next((name for name, count in Counter(name for name, _ in names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"the class map {file} names {twice!r} twice")
    return dict(names)


def class_numbers(classes: Iterable[str | int], names: Sequence[str]) -> list[int]:
    """The numbers of classes.

    Args:
        classes: Names of classes, or their numbers from 0; a text is a number only if no class has that name.
        names: The names of all classes.

    Returns:
        The numbers, in order and each once; several for a name that several classes have.

    Raises:
        DataError: If there is no such class, or one is neither a name nor a whole number.
    """
    found: set[int] = set()
    for each in classes:
        if isinstance(each, bool) or not (isinstance(each, str) or hasattr(each, "__index__")):
            raise DataError(f"a class must be a name or a whole number, got {each!r}")
        name = clean_name(each) if isinstance(each, str) else operator.index(each)
        number = _number(name) if isinstance(name, str) else name
        same = [i for i, other in enumerate(names) if clean_name(other) == name]
        if not same and number is not None and 0 <= number < len(names):
            same = [number]
        if not same:
            nearest = difflib.get_close_matches(str(name), names, n=1)
            advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(f"there is no class {name!r} among the {_listed(names)}{advice}")
        found.update(same)
    return sorted(found)


def renamed(network: NetworkClasses, class_map: Mapping[str, str]) -> list[str]:
    """The name of each output of a network, after replacing names by those of a class map.

    Args:
        network: The network's classes.
        class_map: From the new name of a class to the network's name.

    Returns:
        The names.

    Raises:
        DataError: If it leads to a class that the network does not have, or from two names to the same one.
    """
    known, names = network.numbers(), list(network.names)
    taken: dict[int, str] = {}
    for name, output in class_map.items():
        if output not in known:
            raise DataError(f"the class map leads to {output!r}, which the network does not have: {_listed(names)}")
        number = known[output]
        if number in taken:
            raise DataError(f"the class map calls {output!r} both {taken[number]!r} and {name!r}; give it one name")
        taken[number] = names[number] = name
    return names
