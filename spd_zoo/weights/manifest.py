"""The manifest: one entry per network and checkpoint, from `weights_manifest.json` and a private manifest, if any."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spd_zoo.files import whole

if TYPE_CHECKING:
    from timm.data import ImageNetInfo

__all__ = [
    "PACKAGE",
    "Entry",
    "WeightsError",
    "default_checkpoints",
    "entries",
    "entries_for_import",
    "find_entry",
    "manifest_path",
    "schema_problem",
    "set_private",
    "tags_in_words",
    "write_manifest",
]

PACKAGE = Path(__file__).parent.parent
_IMAGENET = "imagenet-1k"
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation", "fixed_input_size")
_WORDNET_ID = re.compile("n[0-9]{8}")
_LARGEST = 2**20  # bytes of a private manifest
_private: str | Path | None = os.environ.get("SPD_ZOO_MANIFEST") or None


class WeightsError(RuntimeError):
    """Weights that are unavailable or must not be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Entry:
    """A network, or a checkpoint of it; `manifest.schema.json` describes the fields."""

    name: str  # network, or network.tag
    group: str  # the model file it belongs to; "timm" for a network of timm's own
    num_classes: int
    input_size: tuple[int, int, int]
    params: int  # of the network with num_classes outputs
    macs: int  # of convolutions and linear layers, for one image of input_size
    pool_size: tuple[int, int] | None = None  # size of the last map at input_size; None for detectors
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    fixed_input_size: bool = False  # whether the network only accepts images of the size that it was created for
    source: str | None = None
    extra: str | None = None  # the extra of spd-zoo that installs the package of a source package:NAME:FILE
    default: bool = True  # whether this checkpoint may be the network's default
    part: str | None = None  # "backbone": the file holds stem and stages of a detector, without neck and head
    mirror: str | None = None
    sha256: str | None = None
    size: int | None = None
    license: str | None = None
    origin_url: str | None = None
    original_link: str | None = None
    original_file: str | None = None  # the file's name, if original_link is a folder
    replaced_by: str | None = None  # the checkpoint to use instead, where this one's file is not distributed any more
    train_again: str | None = None  # the command that trained it
    derived_from: str | None = None  # the entry whose weights this network converts when it loads them
    dataset: str | None = None
    class_names: tuple[str, ...] | str | None = None  # "imagenet-1k" stands for the WordNet ids of its 1000 classes
    recipe: dict[str, Any] | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    notes: str | None = None

    @property
    def network(self) -> str:
        """The registered name, without the tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """The name after the network's; empty for the network itself."""
        return self.name.partition(".")[2]

    @property
    def task(self) -> str:
        """What the network is for: "classification" or "detection"."""
        return "classification" if self.pool_size is not None else "detection"

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The name of every class, written out; for ImageNet's, timm must be installed."""
        return tuple(_imagenet().label_names()) if isinstance(self.class_names, str) else self.class_names

    @property
    def label_descriptions(self) -> dict[str, str] | None:
        """timm's English description of each class, if the names are WordNet ids that timm knows."""
        names = self.label_names or ()
        if not names or not all(_WORDNET_ID.fullmatch(name) for name in names):
            return None
        try:
            return {name: _imagenet().label_name_to_description(name) for name in names}
        except KeyError:  # timm has only the synsets of ImageNet-21k
            return None

    @property
    def verified(self) -> bool:
        """Whether there is a file whose sha256 is known."""
        return self.source is not None and self.sha256 is not None


def manifest_path() -> Path:
    """The manifest in the installed package, or at the top of the checkout."""
    installed = PACKAGE / "weights_manifest.json"
    return installed if installed.exists() else PACKAGE.parent / "weights_manifest.json"


def set_private(path: str | Path | None) -> None:
    """Reads `path` in addition to the package's own manifest from now on; None: only the package's own.

    Raises:
        WeightsError: If `path` is no valid manifest; then nothing changes.
    """
    global _private
    if path is not None:
        _read_private(Path(path))
    _private = path
    entries.cache_clear()


@cache
def entries() -> dict[str, Entry]:
    """All entries by name; those of a private manifest replace the package's entries of the same name.

    Raises:
        WeightsError: If a manifest is invalid.
    """
    return _derived(_own() if _private is None else {**_own(), **_read_private(Path(_private))})


def entries_for_import() -> dict[str, Entry]:
    """`entries`, or the package's own ones if the private manifest is invalid, so that `import spd_zoo` always works.

    Loading weights calls `entries`, which then raises the error.
    """
    try:
        return entries()
    except WeightsError:
        return _derived(_own())


def default_checkpoints(found: Mapping[str, Entry]) -> dict[str, str]:
    """The default checkpoint of every network that has one, loaded by `pretrained=True` without a tag.

    It is the first verified checkpoint without `"default": false`.
    """
    defaults: dict[str, str] = {}
    for entry in found.values():
        if entry.tag and entry.verified and entry.default and entry.group != "timm":
            defaults.setdefault(entry.network, entry.name)
    return defaults


def find_entry(name: str) -> Entry | None:
    """The entry of `network.tag` or `network`, if there is one.

    Raises:
        WeightsError: If a manifest is invalid.
    """
    return entries().get(name)


def tags_in_words(network: str) -> str:
    """A network's weights by name, and what each is for: the verified ones, or else all; no backbones; "" if none."""
    tagged = [entry for entry in entries().values() if entry.network == network and entry.tag and entry.part is None]
    found = []
    for entry in [entry for entry in tagged if entry.verified] or tagged:
        classes = f"{entry.num_classes} classes"
        if entry.class_names and entry.num_classes <= 5:
            classes += f": {', '.join(entry.class_names)}"
        facts = [entry.dataset, classes, f"{'x'.join(map(str, dict.fromkeys(entry.input_size[1:])))} px"]
        facts += [] if entry.verified else [f"from their authors, not verified: spd-zoo info {entry.name}"]
        found.append(f"{entry.name} ({', '.join(filter(None, facts))})")
    return "; ".join(found)


@cache
def _own() -> dict[str, Entry]:
    return _entries_of(json.loads(manifest_path().read_text(encoding="utf-8")), manifest_path(), {})


def _derived(found: dict[str, Entry]) -> dict[str, Entry]:
    """The entries, in which derived ones have the other fields of their original."""
    return {
        name: entry
        if entry.derived_from is None
        else replace(
            found[entry.derived_from],
            **{field: getattr(entry, field) for field in ("name", "group", "params", "macs", "derived_from")},
        )
        for name, entry in found.items()
    }


def _entries_of(groups: dict[str, dict[str, Any]], path: Path, networks: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of a manifest; a checkpoint has those fields of its network in `networks` that it leaves out."""
    found: dict[str, Entry] = {}
    for group, members in groups.items():
        for name, fields in members.items():
            if name in found:
                raise WeightsError(f"{path} has {name} twice, in {found[name].group} and in {group}; remove one")
            if "derived_from" in fields:  # placeholders; `_derived` copies these fields from the original
                fields = {"num_classes": 1, "input_size": (1, 1, 1), "pool_size": (1, 1)} | fields
            elif network := networks.get(name.partition(".")[0]):
                fields = {field: getattr(network, field) for field in _PREPROCESSING} | fields
            try:
                found[name] = Entry(name=name, group=group, **{key: _tuple(value) for key, value in fields.items()})
            except TypeError as error:
                raise WeightsError(f"the entry {name} of {path} is invalid: {error}; correct it") from error
    return found


@cache
def _imagenet() -> "ImageNetInfo":
    """The classes of ImageNet-1k, WordNet ids in their order, and English words for all synsets of ImageNet."""
    from timm.data import ImageNetInfo  # here, because it takes seconds and listing the manifest needs no names

    return ImageNetInfo()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def schema_problem(groups: Any) -> str | None:
    """How the content of a manifest contradicts `manifest.schema.json`.

    Args:
        groups: The content.

    Returns:
        The end of a sentence that begins with the manifest's name; None if there is no contradiction.
    """
    import jsonschema  # imported here, because it takes long and few users need it

    schema = json.loads((Path(__file__).parent / "manifest.schema.json").read_text(encoding="utf-8"))
    problems = jsonschema.Draft202012Validator(schema).iter_errors(groups)
    problem = jsonschema.exceptions.best_match(islice(problems, 20))  # a hostile manifest may have very many
    if problem is None:
        return None
    where = "/".join(map(str, problem.absolute_path)) or "top level"
    return f"is invalid at {where[:150]}: {problem.message[:200]}"


def _read_private(path: Path) -> dict[str, Entry]:
    """The entries of a private manifest, after all checks that need no download."""

    def refuse(reason: str, cause: BaseException | None = None) -> NoReturn:
        raise WeightsError(
            f"the manifest {path} {reason}. Correct it (the format is {PACKAGE.name}/weights/manifest.schema.json), "
            "or leave out SPD_ZOO_MANIFEST and use_manifest"
        ) from cause

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            refuse(f"has {name[:80]!r} twice in one place")
        return fields

    try:
        if not path.is_file():
            refuse("is no file" if path.exists() else "does not exist")
        size = path.stat().st_size
        if size > _LARGEST:
            refuse(f"has {size} bytes; a manifest has at most {_LARGEST}")
        groups = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=_number, parse_float=_number
        )
    except OSError as error:
        refuse(f"cannot be read ({error.strerror or error})", error)
    except (ValueError, RecursionError) as error:  # invalid encoding or JSON
        refuse(f"is no JSON ({str(error)[:150]})", error)
    problem = schema_problem(groups)
    if problem is not None:
        refuse(problem)
    found = _entries_of(groups, path, _own())
    for entry in found.values():
        network = _own().get(entry.network)
        if network is None and entry.group != "timm":
            refuse(f"has {entry.name}, but there is no network {entry.network} in this zoo")
        if network is None and not _is_timms(entry.network):
            refuse(f"has {entry.name}, but timm has no network {entry.network}")
        named = 1000 if entry.class_names == _IMAGENET else len(entry.class_names or ())
        if entry.class_names is not None and named != entry.num_classes:
            refuse(f"has {named} class names for the {entry.num_classes} classes of {entry.name}")
        if network is not None and network.group != entry.group:
            refuse(f"has {entry.name} in the group {entry.group}; it belongs to {network.group}")
    merged = {**_own(), **found}
    for entry in merged.values():
        original = merged.get(entry.derived_from or entry.name)
        if original is None or (entry.derived_from and (original.derived_from or not original.tag)):
            if entry.name not in found:
                refuse(f"derives {entry.derived_from} from another entry, but {entry.name} is derived from it")
            refuse(f"derives {entry.name} from {entry.derived_from}, which has no weights or is itself derived")
    return found


def _is_timms(network: str) -> bool:
    import timm  # imported here, because it takes seconds and few private manifests name timm's networks

    return timm.is_model(network)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def write_manifest(path: Path, manifest: dict[str, Any]) -> bool:
    """Writes a manifest atomically if its content changes.

    Args:
        path: The file.
        manifest: The groups of entries.

    Returns:
        Whether the file was written.
    """
    text = json.dumps(manifest, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True
