"""Checkpoints as their authors wrote them: read without running anything in them, converted, checked, kept.

A converted file lies in the user's cache under `network.tag.<sha256 of the file>.safetensors`: it appears by one rename
and its name says what must be in it. Where it came from stands in its metadata.
"""

import datetime
import pickle
import pickletools
import re
import shutil
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # the standard library's, which torch uses, too
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from torch import Tensor
from torch.serialization import safe_globals
from torch.utils._pytree import tree_leaves

from spd_zoo.weights.download import sha256_of
from spd_zoo.weights.fit import StateDict, cfg_of, checked_tensors, facts, filter_of, misfit, which_fits
from spd_zoo.weights.manifest import WeightsError, entries, find_entry

__all__ = [
    "UNTAGGED",
    "find_imported",
    "import_original",
    "imported_names",
    "locked",
    "origin_of",
    "read_original",
    "tagged",
]

UNTAGGED = "imported"  # the tag of a checkpoint that was imported without one
_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "net")  # the first one counts
_LARGEST_INDEX = 64 * 2**20  # bytes of the pickle in a checkpoint: names and shapes, no numbers
_MOST_PARTS = 100_000  # modules and tensors of a network
_UNREADABLE = (  # what broken files have been seen to raise in torch's and safetensors' readers
    *(RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, OSError, RecursionError),
    *(pickle.UnpicklingError, struct.error, SafetensorError, zipfile.BadZipFile, NotImplementedError),
)
# what torch's restricted unpickler allows, no checkpoint of weights needs, and can fill the memory
_HUNGRY = re.compile(
    r"builtins\.bytearray|torch\.(\w+\.)*\w*Tensor|torch\._tensor\.\w+"
    r"|torch\._utils\._rebuild_(qtensor|sparse|meta|wrapper|device)\w*"
)


class _Record:
    """Stands for an object of a class that is not here: takes whatever the file says of it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.fields: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


def read_original(file: Path, called: str = "") -> StateDict:
    """The tensors of a checkpoint; no code in it runs.

    Understands safetensors, and what `torch.save` writes: a state dict; one under `state_dict`, `model` or another
    usual key, with or without `module.` before each name; a whole network, pickled by classes that need not exist
    here, whose tensors are taken out of its modules. Averaged weights (`ema`) come before plain ones.

    Args:
        file: The checkpoint.
        called: What error messages call it, if not by its path.

    Raises:
        WeightsError: If the file is none of these, is truncated or damaged, or asks for more than tensors.
    """
    called = called or str(file)
    if not file.is_file():
        raise WeightsError(f"{called} does not exist or is no file; give the path of a checkpoint")
    with file.open("rb") as content:
        start = content.read(512)
    if not start:
        raise WeightsError(f"{called} is empty; get it again")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        raise WeightsError(
            f"{called} is a web page, not a checkpoint: what the server says instead of the file, for example that a "
            "quota is used up. Open the link in a browser and get the file itself"
        )
    try:
        found = load_file(file) if start[8:9] == b"{" else _unpickle(file)
    except _UNREADABLE as error:
        text = " ".join(str(error).split())
        reason = text.rpartition("WeightsUnpickler error: ")[2][:200]  # behind torch's advice not to be so strict
        raise WeightsError(
            f"{called} is no checkpoint that can be read safely ({type(error).__name__}: {reason}); it must be "
            "a file of tensors: safetensors, or one of torch.save's. Get it again, or convert it where you trust it"
        ) from error
    return clean_state_dict(checked_tensors(_state_dict_in(found), called))


def _unpickle(file: Path) -> Any:
    """What `torch.save` wrote, with records in place of objects of unknown classes."""
    with file.open("rb") as content:
        names = _globals_in_zip(content) if zipfile.is_zipfile(content) else _globals_in_streams(content)
    hungry = next(filter(_HUNGRY.fullmatch, sorted(names)), None)
    if hungry:
        raise pickle.UnpicklingError(f"it asks for {hungry}, which weights do not need")
    records: list[Any] = [(type("Record", (_Record,), {}), name) for name in names if not name.startswith("torch._")]
    with safe_globals(records):
        return torch.load(file, map_location="cpu", weights_only=True)


def _globals_in_zip(content: BinaryIO) -> set[str]:
    with zipfile.ZipFile(content) as archive:
        index = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(index) != 1:
            raise zipfile.BadZipFile("a zip file without exactly one data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise zipfile.BadZipFile("a compressed zip file; torch.save compresses nothing")
        if index[0].file_size > _LARGEST_INDEX:
            raise zipfile.BadZipFile(f"its data.pkl has {index[0].file_size} bytes")
        with archive.open(index[0]) as stream:
            return _globals(stream)


def _globals_in_streams(content: BinaryIO) -> set[str]:
    """The same for the format before torch 1.6: magic number, version, system, content and order of the tensors."""
    content.seek(0)
    return set().union(*(_globals(content) for _ in range(5)))


def _globals(stream: Any) -> set[str]:
    """The names of the classes and functions in a pickle, those of Python 2 as they are called today."""
    found = [str(arg).split(" ", 1) for op, arg, _ in pickletools.genops(stream) if op.name == "GLOBAL"]
    renamed = [NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)) for module, name in found]
    return {f"{module}.{name}" for module, name in renamed}


def _state_dict_in(found: Any) -> Any:
    """The state dict in what a checkpoint holds."""
    if isinstance(found, _Record):
        return _tensors_of_module(found)
    if isinstance(found, dict):
        inner = next((found[key] for key in _KEYS if isinstance(found.get(key), dict | _Record)), None)
        if inner is not None:
            return _state_dict_in(inner)
    return found


def _tensors_of_module(module: _Record) -> StateDict:
    """What `module.state_dict()` would give, by its parameters, persistent buffers and modules."""
    tensors: StateDict = {}
    waiting: list[tuple[str, Any]] = [("", module)]
    parts = 0
    while waiting:
        prefix, part = waiting.pop()
        parts += 1
        if parts > _MOST_PARTS:
            raise WeightsError("the network in this checkpoint has no end: its modules hold each other")
        if isinstance(part, Tensor):
            tensors[prefix.removesuffix(".")] = part.detach()
        if not isinstance(part, _Record):
            continue
        transient = part.fields.get("_non_persistent_buffers_set") or ()
        for kind in ("_modules", "_buffers", "_parameters"):  # taken from the end of the list, so in reverse
            inner = part.fields.get(kind)
            if isinstance(inner, dict):
                waiting += [(f"{prefix}{name}.", inner[name]) for name in reversed(inner) if name not in transient]
    return tensors


def tagged(name: str) -> str:
    """The name under which a checkpoint is imported: `network.tag`; without a tag it is "imported".

    Raises:
        WeightsError: If there is no such network, or the tag is none.
    """
    network, _, tag = name.partition(".")
    if network not in {entry.network for entry in entries().values()} or not re.fullmatch(r"[a-z0-9_]*", tag, re.A):
        raise WeightsError(
            f"{name} is not NETWORK or NETWORK.TAG (lower case, digits and _) of this zoo; "
            "`spd-zoo list` shows the networks"
        )
    return f"{network}.{tag or UNTAGGED}"


def import_original(name: str, file: Path, origin: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Converts a checkpoint to our keys, checks it, and keeps it where `pretrained=True` with this name finds it.

    Checked are all keys and shapes, that every number is finite, and that the network computes finite outputs.

    Args:
        name: `network.tag`, a tag of the manifest or any other; without one it is "imported".
        file: The checkpoint, in any form that `read_original` understands.
        origin: Where it came from, if not from `file`.
        cache_dir: The user's cache; Hugging Face's unless given.

    Returns:
        The converted file.

    Raises:
        WeightsError: If the checkpoint cannot be read, does not fit or is not what the manifest pins; nothing is kept.
    """
    name = tagged(name)
    network = name.partition(".")[0]
    entry = find_entry(name)
    called = origin or str(file)
    original = read_original(file, called)
    original_sha256 = sha256_of(file)
    if entry is not None and entry.sha256 not in (None, original_sha256):
        raise WeightsError(
            f"{called} has sha256 {original_sha256}, the weights of {name} have {entry.sha256}: it is another file. "
            f"Give it another tag to import it as your own, for example {network}.mine"
        )
    meta = timm.create_model(network, device="meta")
    in_chans = cfg_of(meta)["input_size"][0]
    made_for: dict[str, Any] = facts(filter_of(meta)(original, meta), meta, in_chans)
    if entry is not None:
        made_for["num_classes"] = entry.num_classes
    net = timm.create_model(network, **made_for).eval()
    converted = filter_of(net)(original, net)
    problem = misfit(converted, net, with_classifier=True)
    if problem:
        raise WeightsError(f"{called} does not fit {name}: {problem}; {which_fits(original)}")
    wild = next((key for key, tensor in converted.items() if not tensor.isfinite().all()), None)
    if wild:
        raise WeightsError(f"{called} is damaged: {wild} holds a number that is not finite. Get it again")
    net.load_state_dict(converted)
    with torch.inference_mode():
        outputs = tree_leaves(net(torch.zeros(1, made_for["in_chans"], *cfg_of(net)["input_size"][1:])))
    if not all(output.isfinite().all() for output in outputs):
        raise WeightsError(f"{called} is damaged: {network} computes a number that is not finite with it. Get it again")
    metadata = {
        "format": "pt",
        "name": name,
        "origin": origin or file.resolve().as_uri(),
        "original_sha256": original_sha256,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "license": (entry.license if entry is not None else None) or "unknown",
    }
    tensors = {key: tensor.contiguous() for key, tensor in converted.items()}
    if entry is not None and entry.verified:  # then the file's own bytes are what the manifest pins
        return _keep(lambda part: shutil.copyfile(file, part), name, cache_dir)
    return _keep(lambda part: save_file(tensors, part, metadata), name, cache_dir)


def _keep(write: Callable[[Path], object], name: str, cache_dir: str | Path | None) -> Path:
    """Writes the file and takes away those that were imported under this name before."""
    with locked(name, cache_dir) as folder:
        part = folder / f"{name}.part"
        try:
            write(part)
            kept = part.rename(folder / f"{name}.{sha256_of(part)}.safetensors")
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"cannot write to {folder} ({error}); make room, or set HF_HOME elsewhere") from error
        finally:
            part.unlink(missing_ok=True)
        for file in _imported(name, folder):
            if file != kept:
                file.unlink(missing_ok=True)
        return kept


def _folder(cache_dir: str | Path | None = None) -> Path:
    """Where imported files lie: in `cache_dir`, or beside Hugging Face's other downloads."""
    return Path(cache_dir or constants.HF_ASSETS_CACHE) / "spd_zoo"


@contextmanager
def locked(name: str, cache_dir: str | Path | None = None) -> Iterator[Path]:
    """The folder of imported files, while no other process of this user's works on `name`.

    Raises:
        WeightsError: If nothing can be written there.
    """
    folder = _folder(cache_dir)
    lock = FileLock(folder / f"{name}.lock", is_singleton=True)  # one per file, so that a holder may enter again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise WeightsError(f"cannot write to {folder} ({error}); make room, or set HF_HOME to another place") from error
    try:
        yield folder
    finally:
        lock.release()


def imported_names(cache_dir: str | Path | None = None) -> list[str]:
    """Every name under which a file was imported."""
    files = _folder(cache_dir).glob("*.safetensors")
    return sorted({file.name.rsplit(".", 2)[0] for file in files if file.name.count(".") == 3})


def find_imported(name: str, cache_dir: str | Path | None = None) -> tuple[Path, str] | None:
    """The file that was imported under this name last, and the SHA-256 that it must have."""
    files = _imported(name, _folder(cache_dir))
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if newest is None else (newest, newest.name.split(".")[-2])


def _imported(name: str, folder: Path) -> list[Path]:
    pattern = re.compile(rf"{re.escape(name)}\.[0-9a-f]{{64}}\.safetensors")
    return [file for file in folder.glob(f"{name}.*.safetensors") if pattern.fullmatch(file.name)]


def origin_of(file: Path) -> dict[str, str]:
    """What an imported file says of itself: `origin`, `original_sha256`, `date`, `license`; empty if it is damaged."""
    try:
        with safe_open(file, "pt") as content:
            return dict(content.metadata() or {})
    except (OSError, SafetensorError):
        return {}
