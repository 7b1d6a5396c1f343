"""Checkpoints as others wrote them, read without running anything in them: safetensors, and what `torch.save` writes.

A pickle is a program: it names functions and has them called. Here it finds under every name either what rebuilds a
tensor or a container, or `_Record`, which takes everything and does nothing.
"""

import pickle
import struct
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from spd_zoo.weights.download import page_or_pointer
from spd_zoo.weights.fit import StateDict, checked_tensors
from spd_zoo.weights.manifest import WeightsError

__all__ = ["read_original"]

_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "net")  # the first one counts
_LARGEST_INDEX = 8 * 2**20  # bytes of the pickle in a checkpoint: names and shapes, no numbers
_MOST_OPERATIONS = 300_000  # of a pickle; a network of 500 modules needs 50,000
_MOST_PARTS, _LONGEST_NAME = 100_000, 1_000  # modules and tensors of a network; characters in the name of one
_UNREADABLE = (  # what broken files have been seen to raise in torch's and safetensors' readers
    *(RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, OSError, RecursionError),
    *(pickle.UnpicklingError, struct.error, SafetensorError, zipfile.BadZipFile, NotImplementedError, MemoryError),
    *(AssertionError, ImportError),
)


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
    if what := page_or_pointer(start):
        raise WeightsError(f"{called} is {what}, not a checkpoint. Open the link in a browser and get the file itself")
    try:
        found = _state_dict_in(load_file(file) if start[8:9] == b"{" else _unpickle(file))
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{called} is no checkpoint that can be read safely ({type(error).__name__}: {reason}); it must be "
            "a file of tensors: safetensors, or one of torch.save's. Get it again, or convert it where you trust it"
        ) from error
    return clean_state_dict(checked_tensors(found, called))


def _state_dict_in(found: Any, depth: int = 0) -> Any:
    """The state dict in what a checkpoint holds."""
    if isinstance(found, _Record):
        if "_modules" in found.fields:
            return _tensors_of_module(found)
        found = found.entries
    if isinstance(found, dict) and depth < 10:
        inner = next((found[key] for key in _KEYS if isinstance(found.get(key), dict | _Record)), None)
        if inner is not None:
            return _state_dict_in(inner, depth + 1)
    return found


def _tensors_of_module(module: "_Record") -> StateDict:
    """What `module.state_dict()` would give, by its parameters, persistent buffers and modules."""
    tensors: StateDict = {}
    waiting: list[tuple[str, Any]] = [("", module)]
    parts = 0
    while waiting:
        prefix, part = waiting.pop()
        parts += 1
        if parts > _MOST_PARTS or len(prefix) > _LONGEST_NAME:
            raise ValueError("the network has no end: its modules hold each other")
        if isinstance(part, Tensor):
            tensors[prefix.removesuffix(".")] = part
        if not isinstance(part, _Record):
            continue
        transient = part.fields.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set | list | tuple) else ()
        for kind in ("_modules", "_buffers", "_parameters"):  # taken from the end of the list, so in reverse
            inner = part.fields.get(kind)
            inner = inner.entries if isinstance(inner, _Record) else inner
            if isinstance(inner, dict):
                waiting += [(f"{prefix}{name}.", inner[name]) for name in reversed(inner) if name not in transient]
    return tensors


# Unpickling


class _Record:
    """Stands for an object of a class that is not here: takes whatever the file says of it, and does nothing."""

    dump_patches = False  # what torch asks a network's class in old files

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.fields: dict[Any, Any] = {}  # an object's attributes
        self.entries: dict[Any, Any] = {}  # what stands in it, if it is some kind of dict

    def __setstate__(self, state: Any) -> None:
        self.__init__()  # type: ignore[misc]  # unpickled objects are made without it
        state = state[0] if isinstance(state, tuple) and state else state  # a tuple has slots, too
        self.fields = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        vars(self).setdefault("entries", {})[key] = value

    def append(self, *items: Any) -> None:
        """Nothing, as `extend` and `add`: lists and sets of unknown classes hold no weights."""

    extend = add = append

    def __getattr__(self, name: str) -> Any:
        if name in ("fields", "entries"):
            return {}
        raise AttributeError(name)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *others: Any) -> Tensor:
    """A tensor that lies inside its storage; `others` are hooks and the like, and in files of new types the dtype."""
    dtype = next((other for other in others if isinstance(other, torch.dtype)), storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    room = storage._untyped_storage.nbytes() // dtype.itemsize
    if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= room):
        raise ValueError("a tensor that is larger than its numbers")
    count = 1
    for n in size:
        count *= n
    if count > room:
        raise ValueError("a tensor that repeats its numbers")
    empty = torch.empty(0, dtype=dtype)
    return empty.set_(storage._untyped_storage, offset, torch.Size(size), tuple(stride))


def _same(data: Any, *others: Any) -> Any:
    return data


def _ordered_dict(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    return OrderedDict((_name(key), value) for key, value in pairs)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    return {_name(item) for item in items}


def _subclass(rebuild: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a subclass, as a plain one."""
    if rebuild not in _KNOWN.values():
        raise pickle.UnpicklingError("a tensor that is made by something else")
    return rebuild(*arguments)


def _name(key: Any) -> Any:
    """What may be a key: anything that is compared in a moment, which tuples of tuples of tuples are not."""
    plain = str | bytes | int | float | None | _Record | torch.dtype
    if isinstance(key, plain) or (isinstance(key, tuple) and all(isinstance(item, plain) for item in key)):
        return key
    raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")


_KNOWN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": tuple,
    "collections.OrderedDict": _ordered_dict,
    **{f"{module}.{kind}": _set for module in ("builtins", "__builtin__") for kind in ("set", "frozenset")},
}


class _Metered:
    """A file that is read only so often."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.left = _MOST_OPERATIONS
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it has no end")
        return self.file.read(size)


class _Unpickler(pickle._Unpickler):
    """The standard library's, in Python, whose operations can be looked at; it finds nothing that does anything."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(_Metered(file), **options)

    def find_class(self, module: str, name: str) -> Any:
        """What stands under a name."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _KNOWN.get(f"{module}.{name}", _Record)


def _before(operation: bytes, check: Callable[[list[Any]], None]) -> None:
    """Has the unpickler look at its stack before an operation."""
    plain = _Unpickler.dispatch[operation[0]]

    def checked(unpickler: Any) -> None:
        check(unpickler.stack)
        plain(unpickler)

    _Unpickler.dispatch[operation[0]] = checked


def _names(keys: Iterable[Any]) -> None:
    for key in keys:
        _name(key)


def _takes_state(stack: list[Any]) -> None:
    if not isinstance(stack[-2], _Record | OrderedDict):
        raise pickle.UnpicklingError(f"a {type(stack[-2]).__name__} that is given a state")


def _load_bytearray(unpickler: Any) -> None:
    """Without making room for as many bytes as the file says before they are there."""
    (size,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(unpickler.read(min(size, _LARGEST_INDEX)))


_before(pickle.SETITEM, lambda stack: _names([stack[-2]]))
_before(pickle.SETITEMS, lambda stack: _names(stack[::2]))
_before(pickle.DICT, lambda stack: _names(stack[::2]))
_before(pickle.ADDITEMS, _names)
_before(pickle.FROZENSET, _names)
_before(pickle.BUILD, _takes_state)
_Unpickler.dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _unpickle(file: Path) -> Any:
    """What `torch.save` wrote, with records in place of objects of unknown classes."""
    if zipfile.is_zipfile(file):
        _check_archive(file)
    elif tarfile.is_tarfile(file):
        raise tarfile.ReadError("the format before torch 0.1.10, a tar file")
    module: Any = types.SimpleNamespace(__name__="unpickling", Unpickler=_Unpickler, load=_load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the source of an unknown class is not there
        return torch.load(file, map_location="cpu", pickle_module=module, weights_only=False)


def _check_archive(file: Path) -> None:
    """Refuses what is no zip file of `torch.save`, or would be larger in memory than it is."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    index = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(index) != 1 or any(member.filename.endswith("/constants.pkl") for member in members):
        raise zipfile.BadZipFile("a zip file that torch.save did not write")
    if index[0].file_size > _LARGEST_INDEX:
        raise zipfile.BadZipFile(f"its data.pkl has {index[0].file_size} bytes")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise zipfile.BadZipFile("its parts are larger than the whole")
