"""Reads checkpoints from others without running code in them: safetensors, and the formats of `torch.save`.

The first bytes of a file determine its format, and each format has one parser here. No file is passed to a second
parser, which might read something else from it; in particular not to `torch.load`, which also runs TorchScript and
unpacks tar files.
"""

import os
import sys
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor

from spd_zoo.weights.archive import Archive, FormatError
from spd_zoo.weights.contents import weights_in
from spd_zoo.weights.described import fields_of_metadata
from spd_zoo.weights.download import page_or_pointer
from spd_zoo.weights.fit import MOST_DIMENSIONS, MOST_TENSORS, StateDict, checked_tensors
from spd_zoo.weights.manifest import WeightsError
from spd_zoo.weights.unpickle import Unpickler

__all__ = ["read_checkpoint", "read_described", "read_saved"]

_COUNTER = "n_averaged"  # beside the tensors that torch's `AveragedModel` averages
_LARGEST_INDEX = 8 * 2**20  # bytes of a checkpoint's pickle or safetensors' header, which hold names and shapes
_LARGEST_NUMBER = 2**62
_LONGEST_KEY = 100  # characters of a storage's name, which is a number
_MAGIC = 0x1950A86A20F9469CFC6C  # starts a file of torch before 1.6
_UNREADABLE = (  # exceptions of the parsers for damaged files
    *(ValueError, LookupError, TypeError, OverflowError, RuntimeError, MemoryError, SafetensorError),
)


def read_checkpoint(file: Path, name: str = "") -> StateDict:
    """Reads the tensors of a checkpoint, without running code in it.

    It reads safetensors and files of `torch.save`: a state dict, also under `state_dict`, `model` or another usual key,
    or under any other if only one holds tensors, also with `module.` before each name, or of torch's `AveragedModel`;
    or a whole pickled network, whose classes need not be installed. Averaged weights (any key with the word `ema`) have
    priority.

    Args:
        file: The checkpoint.
        name: Its name in error messages, if it is not the path.

    Returns:
        The tensors by name.

    Raises:
        WeightsError: If the file has another format, is truncated or damaged, or takes too much memory or time.
    """
    return read_described(file, name)[0]


def read_described(file: Path, name: str = "") -> tuple[StateDict, dict[str, Any]]:
    """Reads the tensors of a checkpoint, and what it says about its network beside them.

    Args:
        file: As for `read_checkpoint`.
        name: As for `read_checkpoint`.

    Returns:
        The tensors by name; and the fields, which `described` checks.

    Raises:
        WeightsError: As `read_checkpoint`.
    """
    name = name or str(file)
    found, fields = _found(file, name, _described)
    checked = checked_tensors(found, name)
    checked = {key: tensor for key, tensor in checked.items() if key != _COUNTER} or checked
    tensors: StateDict = clean_state_dict(checked)
    if len(tensors) != len(checked):
        raise WeightsError(f"{name} holds two tensors of one name, with and without `module.`; take one of them out")
    return tensors, fields


def read_saved(file: Path) -> Any:
    """Reads everything in a checkpoint, without running code in it.

    Args:
        file: The checkpoint.

    Returns:
        Tensors, numbers and strings, in dicts, lists and tuples. Objects of other classes are `Unknown`, and keys that
        are neither short strings nor small numbers are None.

    Raises:
        WeightsError: If the file is not a checkpoint, is truncated or damaged, or takes too much memory or time.
    """
    return _found(file, str(file), lambda content: content.tensors if isinstance(content, _Safetensors) else content)


def _found(file: Path, name: str, take: Callable[[Any], Any]) -> Any:
    """Reads a checkpoint, and applies `take` to its content."""
    if not file.is_file():
        raise WeightsError(f"{name} does not exist or is no file; give the path of a checkpoint")
    try:
        with file.open("rb") as content:
            start = content.read(512)
            what = page_or_pointer(start)
            found = take(_read(content, start, file)) if start and not what else None
    except OSError as error:
        raise WeightsError(f"{name} cannot be read: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise WeightsError(
            f"{name} is no checkpoint that can be read safely: {_reason(error)}. It must be a file of tensors: "
            "safetensors, or one of torch.save's. Get it again, or convert it where you trust it"
        ) from error
    if not start:
        raise WeightsError(f"{name} is empty; get it again")
    if what:
        raise WeightsError(f"{name} is {what}, not a checkpoint. Open the link in a browser and get the file itself")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, FormatError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it does not fit into the memory"
    text = "".join(char if char.isprintable() else " " for char in str(error)[:200])
    return f"it is damaged ({type(error).__name__}: {' '.join(text.split())})"


def _read(content: BufferedReader, start: bytes, file: Path) -> Any:
    """Reads a file whose first bytes are `start`."""
    size = os.fstat(content.fileno()).st_size
    if start.startswith(b"PK\3\4"):
        return _read_archive(Archive(content, size), size)
    if start[8:9] == b"{":
        if int.from_bytes(start[:8], "little") > _LARGEST_INDEX:
            raise FormatError("safetensors with a header that is larger than names and shapes need")
        return _read_safetensors(file)
    if start.startswith(b"\x80"):
        return _read_stream(content, size)
    if start[257:262] == b"ustar" or start.startswith(b"sys_info\0"):
        raise FormatError("a tar file, which only torch before 0.1.10 wrote")
    raise FormatError("it begins like no checkpoint")


class _Safetensors(NamedTuple):
    """The content of a safetensors file."""

    tensors: StateDict
    metadata: dict[str, str] | None


def _described(content: Any) -> tuple[Any, dict[str, Any]]:
    """The state dict in the content of a checkpoint, and the fields that describe its network."""
    if isinstance(content, _Safetensors):
        return content.tensors, fields_of_metadata(content.metadata)
    return weights_in(content)


def _read_safetensors(file: Path) -> _Safetensors:
    with safe_open(file, "pt") as content:
        names = content.offset_keys()
        if len(names) > MOST_TENSORS:
            raise FormatError(f"{len(names)} tensors, more than any network has")
        return _Safetensors({name: content.get_tensor(name) for name in names}, content.metadata())


# Formats of torch.save


class _Storage:
    """A storage: the numbers that tensors view."""

    __slots__ = ("dtype", "numbers")

    def __init__(self, content: bytearray | memoryview, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.numbers = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor:
    """Creates a tensor inside its storage; `others` are hooks and such, and for newer data types the dtype."""
    if not (isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise FormatError("a tensor without numbers or a shape")
    if len(size) > MOST_DIMENSIONS or len(size) != len(stride):
        raise FormatError("a tensor with too many dimensions, or not one stride for each")
    if not all(type(n) is int and 0 <= n < _LARGEST_NUMBER for n in (offset, *size, *stride)):
        raise FormatError("a tensor whose shape is no numbers")
    dtype = next((other for other in others if isinstance(other, torch.dtype)), storage.dtype)
    if dtype in _WITH_SCALE:
        raise FormatError("a quantised tensor without its scale")
    available = len(storage.numbers) // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= available:
        raise FormatError("a tensor that is larger than its numbers")
    count = 1
    for n in size:
        count *= n
    if count > available:
        raise FormatError("a tensor that repeats its numbers")
    return torch.empty(0, dtype=dtype).set_(storage.numbers.untyped_storage(), offset, size, stride)


def _data(data: Any, *others: Any) -> Any:
    """Creates a parameter, as its plain tensor."""
    return data


def _plain(rebuild: Any, subclass: Any, arguments: Any, state: Any) -> Any:
    """Creates a tensor of a subclass, as a plain tensor."""
    if rebuild not in (_tensor, _data) or not isinstance(arguments, tuple):
        raise FormatError("a tensor that an unknown function creates")
    return rebuild(*arguments)


def _shape(dimensions: Any) -> tuple[Any, ...]:
    """Creates a torch.Size, as a tuple."""
    if not isinstance(dimensions, tuple | list):
        raise FormatError("a tensor whose shape is no numbers")
    return tuple(dimensions)


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.bits8,  # its tensors state their own type
}
_WITH_SCALE = (torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4)
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _data,
    ("torch._utils", "_rebuild_parameter_with_state"): _data,
    ("torch._tensor", "_rebuild_from_type_v2"): _plain,
    ("torch", "Size"): _shape,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{(place, name): dtype for place in ("torch", "torch.cuda", "torch.storage") for name, dtype in _STORAGES.items()},
}


def _storage_of(persistent_id: Any) -> tuple[torch.dtype, str, int, Any]:
    """Type, key and length of the storage of a persistent id, and its position if it is a view of another storage."""
    if not isinstance(persistent_id, tuple) or not 5 <= len(persistent_id) <= 6 or type(persistent_id[0]) is not str:
        raise FormatError("a persistent id that is not of a storage")
    name, dtype, key, _, length, view = (*persistent_id, None)[:6]
    if name != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or len(key) > _LONGEST_KEY:
        raise FormatError("a storage without a type or a name")
    if type(length) is not int or not 0 <= length < _LARGEST_NUMBER:
        raise FormatError("a storage without a length")
    return dtype, key, length, view


def _read_archive(archive: Archive, size: int) -> Any:
    """Reads the object in a zip file of `torch.save` with `size` bytes."""
    if "data.pkl" not in archive.names:
        raise FormatError("a zip file that torch.save did not write")
    if any(name == "constants.pkl" or name.startswith("code/") for name in archive.names):
        raise FormatError("a TorchScript archive, which is a program")
    if archive.size("data.pkl") > _LARGEST_INDEX:
        raise FormatError(f"its data.pkl has {archive.size('data.pkl')} bytes, more than names and shapes need")
    order = bytes(archive.read("byteorder")) if "byteorder" in archive.names else b"little"
    if order not in (b"little", b"big"):
        raise FormatError("numbers of an unknown byte order")
    storages: dict[str, _Storage] = {}

    def storage(persistent_id: Any) -> _Storage:
        dtype, key, length, _ = _storage_of(persistent_id)
        name = f"data/{key}"
        if name not in archive.names or archive.size(name) != length * dtype.itemsize:
            raise FormatError("a storage whose numbers are not in the file")
        if key not in storages or (length == 0 and storages[key].dtype != dtype):
            storages[key] = _Storage(archive.read(name), dtype)
            if order.decode() != sys.byteorder and dtype.itemsize > 1 and length:
                storages[key].numbers.untyped_storage().byteswap(dtype)
        if storages[key].dtype != dtype or (order.decode() != sys.byteorder and dtype == torch.bits8):
            raise FormatError("a storage of two types, or of an unknown one")
        return storages[key]

    return Unpickler(archive.read("data.pkl"), _KNOWN, storage, size).load()


def _read_stream(content: BufferedReader, size: int) -> Any:
    """Reads the object in a file of torch before 1.6: five pickles, then the numbers of all storages."""
    storages: dict[str, tuple[bytearray, _Storage]] = {}
    left = size

    def storage(persistent_id: Any) -> Any:
        nonlocal left
        if isinstance(persistent_id, tuple) and len(persistent_id) == 4:  # "module", a class, its file and source
            return persistent_id[1]
        dtype, key, length, view = _storage_of(persistent_id)
        if key not in storages:
            left -= length * dtype.itemsize
            if left < 0:
                raise FormatError("a storage whose numbers are not in the file")
            buffer = bytearray(length * dtype.itemsize)  # filled when the pickle is read
            storages[key] = buffer, _Storage(buffer, dtype)
        buffer, full = storages[key]
        if (full.dtype, len(buffer)) != (dtype, length * dtype.itemsize):
            raise FormatError("a storage of two types or lengths")
        if view is None:
            return full
        if not (
            isinstance(view, tuple) and len(view) == 3 and all(type(n) is int and 0 <= n <= length for n in view[1:])
        ):
            raise FormatError("a storage outside the one that it is a part of")
        begin, count = view[1] * dtype.itemsize, view[2] * dtype.itemsize
        if begin + count > len(buffer):
            raise FormatError("a storage outside the one that it is a part of")
        return _Storage(memoryview(buffer)[begin : begin + count], dtype)

    content.seek(0)
    unpickler = Unpickler(content.read(_LARGEST_INDEX), _KNOWN, storage, size)
    magic = unpickler.load()
    if type(magic) is not int or magic != _MAGIC:
        raise FormatError("a pickle that torch.save did not write")
    _version, _system, found, keys = (unpickler.load() for _ in range(4))
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise FormatError("a file that does not list its storages")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise FormatError("a storage whose numbers are not in the file")
    content.seek(unpickler.position)
    for key in keys:
        buffer, full = storages[key]
        length = int.from_bytes(content.read(8), "little")
        if length * full.dtype.itemsize != len(buffer) or content.readinto(buffer) != len(buffer):
            raise FormatError("a file that ends too early, or a storage of another length than it says")
        if sys.byteorder != "little" and full.dtype.itemsize > 1:
            full.numbers.untyped_storage().byteswap(full.dtype)
    if content.tell() != size:
        raise FormatError("a file with bytes after its last storage")
    return found
