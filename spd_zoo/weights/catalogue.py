"""Lists networks and checkpoints, and those on this machine. Needs no torch."""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spd_zoo.files import exists, is_file
from spd_zoo.weights.cache import find, find_imported, imported_names, is_right, origin_of, original_of, sha256_in_name
from spd_zoo.weights.manifest import Entry, WeightsError, default_checkpoints, entries

__all__ = [
    "CHECKPOINTS",
    "ModelError",
    "accuracy",
    "checkpoint",
    "checkpoints",
    "describe",
    "list_models",
    "local_checkpoints",
    "locate",
    "networks",
    "summarize",
    "unknown_network",
]

CHECKPOINTS = (".bin", ".ckpt", ".onnx", ".pt", ".pt2", ".pth", ".safetensors", ".tar")  # suffixes
TASKS = ("classification", "detection")


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
    suffix = Path(name).suffix.lower()
    if is_file(name) and suffix == ".pt2":
        return ModelError(
            f"{name} is an exported file for other programs, and no {what}; give the network or the run that it was "
            "exported from, or export that with --to onnx"
        )
    if is_file(name) and suffix == ".onnx" and not name.endswith(".onnx"):
        return ModelError(f"{name} is no {what}; if it is an exported file, rename it to end in .onnx")
    if is_file(name) and suffix in CHECKPOINTS:
        return ModelError(
            f"{name} is a file, but no {what}; to use a checkpoint, run `spd-zoo weights import NETWORK.TAG {name}` "
            "and give NETWORK.TAG; to use a run, give its folder"
        )
    if exists(name):
        return ModelError(f"{name} is a file or folder, but no {what}; commands take the network first, then the rest")
    if os.sep in name or suffix in CHECKPOINTS:
        what = "network, file or folder"
    nearest = difflib.get_close_matches(name.lower(), entries(), n=3, cutoff=0.5)
    advice = f"the nearest names are {', '.join(nearest)}" if nearest else "`spd-zoo list` shows all networks"
    return ModelError(f"there is no {what} {name!r}; {advice}")


def list_models(filter: str | Sequence[str] = "", pretrained: bool = False, task: str | None = None) -> list[str]:
    """Lists the names of networks, for `timm.create_model`, `Classifier`, `Detector` and the command `spd-zoo`.

    Args:
        filter: Text that the name contains, or a name with wildcards such as "pyconv*_spd", or several of these, of
            which at least one must match.
        pretrained: Only networks with verified weights: one name with its tag for each set of weights.
        task: "classification" or "detection"; None: both.

    Returns:
        The names, in the order of the families; empty if nothing matches.

    Raises:
        ValueError: If there is no such task.
        WeightsError: If a manifest is invalid.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"the tasks are {' and '.join(TASKS)}, got {task!r}")
    filters = [filter] if isinstance(filter, str) else filter
    found = [each for each in _selected([text for text in filters if text], pretrained) if task in (None, each.task)]
    return list(dict.fromkeys(each.name if pretrained else each.network for each in found))


def networks(filters: Sequence[str] = (), pretrained: bool = False) -> list[Entry]:
    """Lists every checkpoint, and every network without checkpoints.

    Args:
        filters: Parts of names, or names with wildcards, of which at least one must match; empty: no filter.
        pretrained: Only verified checkpoints.

    Returns:
        The entries.

    Raises:
        ModelError: If nothing matches.
        WeightsError: If a manifest is invalid.
    """
    found = _selected(filters, pretrained)
    if not found:
        what = "verified weights" if pretrained else "networks"
        called = f" called {' or '.join(filters)}" if filters else ""
        raise ModelError(f"there are no {what}{called}; `spd-zoo list` shows all networks")
    return found


def _selected(filters: Sequence[str], pretrained: bool) -> list[Entry]:
    everything = [entry for entry in entries().values() if entry.group != "timm"]
    tagged = {entry.network for entry in everything if entry.tag}
    candidates = (
        entry for entry in everything if (entry.verified if pretrained else entry.tag or entry.network not in tagged)
    )
    return _filtered(candidates, filters)


def _filtered(candidates: Iterable[Entry], filters: Sequence[str]) -> list[Entry]:
    """The entries that a filter matches, in their order.

    A filter with wildcards matches the whole name or, as in timm, the name without the tag. Any other filter is a name,
    or else a part of names in upper or lower case.
    """
    if not filters:
        return list(candidates)
    named = [(entry, {entry.name.lower(), entry.network.lower()}) for entry in candidates]
    exact = {name.lower() for name in entries()}.union(*(names for _, names in named))
    patterns = [text.lower() for text in filters]
    patterns = [text if text in exact or set(text) & set("*?[") else f"*{text}*" for text in patterns]
    return [entry for entry, names in named if any(fnmatchcase(name, text) for name in names for text in patterns)]


def summarize(entry: Entry) -> dict[str, Any]:
    """The row of a network or checkpoint in `spd-zoo list --json`."""
    return {
        "name": entry.name,
        "network": entry.network,
        "tag": entry.tag or None,
        "task": entry.task,
        "default": entry.name == default_checkpoints(entries()).get(entry.network),
        "params": entry.params,
        "macs": entry.macs,
        "input_size": entry.input_size,
        "num_classes": entry.num_classes,
        "top1": accuracy(entry.metrics, entry.input_size, "top1"),
        "ap": accuracy(entry.metrics, entry.input_size, "ap"),
        "license": entry.license,
        "weights": _availability(entry),
        "part": entry.part,
    }


def accuracy(metrics: Iterable[dict[str, Any]], input_size: tuple[int, ...], metric: str) -> dict[str, Any] | None:
    """The first measurement of a metric at the checkpoint's own input size, or otherwise at any.

    Args:
        metrics: The measurements in the manifest.
        input_size: The checkpoint's own input size.
        metric: "top1" or "ap".

    Returns:
        The measurement, or None.
    """
    found = [each for each in metrics if each["metric"] == metric]
    own = (each for each in found if each["input_size"] == input_size[-1])
    return next(own, found[0] if found else None)


def _availability(entry: Entry) -> str:
    if entry.verified:
        place = str(entry.source).partition(":")[0]
        return place if place in ("bundled", "package") else "hub"
    if entry.replaced_by:
        return "replaced"
    return "unverified" if entry.tag else "none"


def describe(name: str) -> dict[str, Any]:
    """Returns all fields of a network or checkpoint in the manifest.

    Args:
        name: The network, with or without a tag.

    Returns:
        The fields, `task`, `weights` and `default` as in `summarize`, and for a network its `checkpoints`.

    Raises:
        ModelError: If there is no such network, with the nearest names; or its weights were imported.
        WeightsError: If a manifest is invalid.
    """
    entry = entries().get(name)
    if entry is None and name in imported_names():
        network = name.partition(".")[0]
        raise ModelError(
            f"{name} was imported, and the manifest does not know it; `spd-zoo weights list {name}` shows its file, "
            f"and `spd-zoo info {network}` the network"
        )
    if entry is None:
        raise unknown_network(name)
    described = _fields(entry)
    if not entry.tag:
        of_network = [other for other in entries().values() if other.tag and other.network == entry.network]
        described["checkpoints"] = [_fields(other) for other in of_network]
    return described


def _fields(entry: Entry) -> dict[str, Any]:
    row = summarize(entry)
    return asdict(entry) | {key: row[key] for key in ("task", "weights", "default")}


def checkpoints(filters: Sequence[str] = ()) -> list[Entry]:
    """Lists the checkpoints of the manifest, then those that the user imported under tags of their own.

    Args:
        filters: Parts of names, or names with wildcards, of which at least one must match; empty: no filter.

    Returns:
        The entries.

    Raises:
        WeightsError: If nothing matches the filters, or a manifest is invalid.
    """
    known = {entry.network: entry for entry in reversed(entries().values())}
    mine = [name for name in imported_names() if name not in entries() and name.partition(".")[0] in known]
    found = [entry for entry in entries().values() if entry.tag]
    found += [_imported(name, known[name.partition(".")[0]]) for name in mine]
    found = _filtered(found, filters)
    if filters and not found:
        raise WeightsError(f"there are no weights called {' or '.join(filters)}; `spd-zoo weights list` shows all")
    return found


def _imported(name: str, network: Entry) -> Entry:
    """An entry for an imported checkpoint, with the network's size and input, and the file's own licence only."""
    of_network = ("group", "num_classes", "input_size", "params", "macs", "pool_size", "mean", "std", "crop_pct")
    fields = {field: getattr(network, field) for field in (*of_network, "interpolation", "fixed_input_size")}
    file = find_imported(name)
    return Entry(name=name, license=origin_of(file).get("license") if file else None, **fields)


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
    """The names of all checkpoints of whole networks on this machine: bundled, downloaded or imported."""
    return [entry.name for entry in checkpoints() if entry.part is None and find(entry)]


def locate(entry: Entry, verify: bool = False) -> dict[str, Any]:
    """The row of a checkpoint in `spd-zoo weights list --json`.

    Args:
        entry: The checkpoint.
        verify: Whether to compute the SHA-256 of its file; otherwise `verified` is None.

    Returns:
        The fields of the row.
    """
    file = find(entry)
    if file is None and entry.replaced_by:
        location, origin = "replaced", f"replaced by {entry.replaced_by}"
    elif file is None:
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
        "sha256": entry.sha256 or (sha256_in_name(file) if file is not None and location == "imported" else None),
        "verified": is_right(entry, file) if verify and file is not None else None,
        "size": entry.size if file is None else file.stat().st_size,
        "licence": entry.license,
        "from": entry.derived_from or origin,
        "file": None if file is None else str(file),
    }
