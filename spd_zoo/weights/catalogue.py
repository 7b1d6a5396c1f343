"""Lists networks and checkpoints, and those on this machine. Needs no torch."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

from spd_zoo.weights.cache import find, imported_names, is_right, origin_of, original_of
from spd_zoo.weights.manifest import Entry, WeightsError, default_checkpoints, entries

__all__ = [
    "ModelError",
    "checkpoint",
    "checkpoints",
    "describe",
    "local_checkpoints",
    "locate",
    "networks",
    "summarize",
    "top1",
    "unknown_network",
]


class ModelError(ValueError):
    """A network that does not exist or cannot be used; the message says what would work."""


def unknown_network(name: str, what: str = "network") -> ModelError:
    """Creates the error for an unknown network, which lists the nearest names.

    Args:
        name: The unknown name.
        what: All that the name could have been.

    Returns:
        The error.
    """
    nearest = difflib.get_close_matches(name.lower(), entries(), n=3, cutoff=0.5)
    advice = f"the nearest names are {', '.join(nearest)}" if nearest else "`spd-zoo list` shows all networks"
    return ModelError(f"there is no {what} {name!r}; {advice}")


def networks(filters: Sequence[str] = (), pretrained: bool = False) -> list[Entry]:
    """Lists every checkpoint, and every network without checkpoints.

    Args:
        filters: Names with wildcards, of which at least one must match; empty: no filter.
        pretrained: Only verified checkpoints.

    Returns:
        The entries.

    Raises:
        ModelError: If nothing matches.
        WeightsError: If a manifest is invalid.
    """
    everything = [entry for entry in entries().values() if entry.group != "timm"]
    tagged = {entry.network for entry in everything if entry.tag}
    candidates = (
        entry for entry in everything if (entry.verified if pretrained else entry.tag or entry.network not in tagged)
    )
    found = [entry for entry in candidates if _matches(entry, filters)]
    if not found:
        what = "verified weights" if pretrained else "networks"
        called = f" called {' or '.join(filters)}" if filters else ""
        raise ModelError(f"there are no {what}{called}; `spd-zoo list` shows all networks")
    return found


def _matches(entry: Entry, filters: Sequence[str]) -> bool:
    """Whether a filter matches the whole name or, as in timm, the name without the tag."""
    return not filters or any(fnmatch(name, pattern) for pattern in filters for name in (entry.name, entry.network))


def summarize(entry: Entry) -> dict[str, Any]:
    """The row of a network or checkpoint in `spd-zoo list --json`."""
    return {
        "name": entry.name,
        "network": entry.network,
        "tag": entry.tag or None,
        "default": entry.name == default_checkpoints(entries()).get(entry.network),
        "params": entry.params,
        "macs": entry.macs,
        "input_size": entry.input_size,
        "num_classes": entry.num_classes,
        "top1": top1(entry),
        "license": entry.license,
        "weights": _availability(entry),
    }


def top1(entry: Entry) -> dict[str, Any] | None:
    """The top-1 accuracy at the checkpoint's own input size, or otherwise the first one in the manifest."""
    found = [metric for metric in entry.metrics if metric["metric"] == "top1"]
    own = (metric for metric in found if metric["input_size"] == entry.input_size[-1])
    return next(own, found[0] if found else None)


def _availability(entry: Entry) -> str:
    if entry.verified:
        place = str(entry.source).partition(":")[0]
        return place if place in ("bundled", "package") else "hub"
    return "unverified" if entry.tag else "none"


def describe(name: str) -> dict[str, Any]:
    """Returns all fields of a network or checkpoint in the manifest.

    Args:
        name: The network, with or without a tag.

    Returns:
        The fields, `weights` and `default` as in `summarize`, and for a network its `checkpoints`.

    Raises:
        ModelError: If there is no such network; with the nearest names.
        WeightsError: If a manifest is invalid.
    """
    entry = entries().get(name)
    if entry is None:
        raise unknown_network(name)
    described = _fields(entry)
    if not entry.tag:
        of_network = [other for other in entries().values() if other.tag and other.network == entry.network]
        described["checkpoints"] = [_fields(other) for other in of_network]
    return described


def _fields(entry: Entry) -> dict[str, Any]:
    row = summarize(entry)
    return asdict(entry) | {key: row[key] for key in ("weights", "default")}


def checkpoints(filters: Sequence[str] = ()) -> list[Entry]:
    """Lists the checkpoints of the manifest, then those that the user imported under tags of their own.

    Args:
        filters: Names with wildcards, of which at least one must match; empty: no filter.

    Returns:
        The entries.

    Raises:
        WeightsError: If nothing matches the filters, or a manifest is invalid.
    """
    known = {entry.network: entry for entry in reversed(entries().values())}
    mine = [name for name in imported_names() if name not in entries() and name.partition(".")[0] in known]
    found = [entry for entry in entries().values() if entry.tag]
    found += [_imported(name, known[name.partition(".")[0]]) for name in mine]
    found = [entry for entry in found if _matches(entry, filters)]
    if filters and not found:
        raise WeightsError(f"there are no weights called {' or '.join(filters)}; `spd-zoo weights list` shows all")
    return found


def _imported(name: str, network: Entry) -> Entry:
    """An entry for an imported checkpoint, with the network's size and input only."""
    of_network = ("group", "num_classes", "input_size", "params", "macs", "pool_size", "mean", "std", "crop_pct")
    fields = {field: getattr(network, field) for field in (*of_network, "interpolation", "fixed_input_size")}
    return Entry(name=name, **fields)


def checkpoint(name: str) -> Entry:
    """Returns the checkpoint of a name.

    Args:
        name: A network with a tag, or without one for its default.

    Returns:
        The entry.

    Raises:
        WeightsError: If there is none, or a manifest is invalid.
    """
    name = default_checkpoints(entries()).get(name, name)
    everything = checkpoints()
    found = next((entry for entry in everything if entry.name == name), None)
    if found is None:
        tags = [entry.name for entry in everything if entry.network == name]
        advice = f"there are {', '.join(tags)}" if tags else "`spd-zoo weights list` shows all"
        raise WeightsError(f"there are no weights called {name}; {advice}")
    return found


def local_checkpoints() -> list[str]:
    """The names of all checkpoints on this machine: bundled, downloaded or imported."""
    return [entry.name for entry in checkpoints() if find(entry)]


def locate(entry: Entry, verify: bool = False) -> dict[str, Any]:
    """The row of a checkpoint in `spd-zoo weights list --json`.

    Args:
        entry: The checkpoint.
        verify: Whether to compute the SHA-256 of its file; otherwise `verified` is None.

    Returns:
        The fields of the row.
    """
    file = find(entry)
    if file is None:
        location, origin = "missing", entry.source or " ".join(filter(None, (entry.original_link, entry.original_file)))
    elif str(entry.source).startswith("bundled:"):
        location, origin = "bundled", "spd-zoo"
    elif str(entry.source).startswith("package:"):
        location, origin = "package", str(entry.source).split(":")[1]
    elif original_of(entry).name in imported_names():
        location, origin = "imported", origin_of(file).get("origin", "")
    else:
        location, origin = "cached", str(entry.source)
    return {
        "name": entry.name,
        "location": location,
        "sha256": entry.sha256,
        "verified": is_right(entry, file) if verify and file is not None else None,
        "size": entry.size if file is None else file.stat().st_size,
        "licence": entry.license,
        "from": entry.derived_from or origin,
        "file": None if file is None else str(file),
    }
