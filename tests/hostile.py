"""Malicious checkpoints, which try to run code, to write files, to fill the memory, or to take hours.

`malicious` lists them, `sound` has some that must load, and `mutated` creates any number of others from both.
"""

import argparse
import copy
import gzip
import io
import pickle
import pickletools
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

OLD = {"_use_new_zipfile_serialization": False}


def saved(content: Any, **options: Any) -> bytes:
    """The bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


# Zip files, written record by record


def records(content: bytes) -> dict[str, bytes]:
    """The records of a zip file that `torch.save` wrote."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], compressed: bool = False) -> bytes:
    """A zip file of these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return buffer.getvalue()


def with_pickle(content: bytes, name: str = "archive", compressed: bool = False, zeros: int = 0) -> bytes:
    """A zip file as torch writes it, around a pickle."""
    parts = {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": bytes(zeros)}
    return zipped({f"{name}/{record}": part for record, part in parts.items()}, compressed)


def _edited(content: bytes, change: Callable[[zipfile.ZipFile], None]) -> bytes:
    """A zip file whose directory is changed before it is written."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        change(archive)
        archive._didModify = True  # type: ignore[attr-defined]
    return buffer.getvalue()


def _directory(content: bytes) -> tuple[int, int]:
    """The offsets of the start and the end of a zip file's directory."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start = archive.start_dir
        return start, start + sum(46 + len(m.filename.encode()) + len(m.extra) for m in archive.infolist())


def _two_directories(shown: bytes, hidden: bytes) -> bytes:
    """A zip file with the records of both files, whose end points to the directory of `shown`.

    A parser that searches for the last directory before the end finds that of `hidden` instead.
    """
    first, first_end = _directory(shown)
    second, second_end = _directory(hidden)
    moved = bytearray(hidden[second:second_end])
    place = 0
    while place < len(moved):  # the hidden records start where the other file's directory ends
        name, extra = struct.unpack_from("<2H", moved, place + 28)
        struct.pack_into("<L", moved, place + 42, struct.unpack_from("<L", moved, place + 42)[0] + first_end)
        place += 46 + name + extra
    count = shown.count(b"PK\1\2")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, first_end - first, first, 0)
    return shown[:first_end] + hidden[:second] + bytes(moved) + end


def script(trace: Path) -> bytes:
    """A TorchScript archive whose `__setstate__` writes a file."""

    class Program(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path
            self.training = False

        @torch.jit.export
        def __getstate__(self):  # type: ignore[no-untyped-def]
            return (self.path, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]):  # type: ignore[no-untyped-def]
            torch.save(torch.zeros(1), state[0])
            self.path = state[0]
            self.training = state[1]

        def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
            return x

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Program(str(trace))), buffer)
    return buffer.getvalue()


def _archives(trace: Path, good: bytes) -> dict[str, bytes]:
    """Zip files that different parsers read differently, or that are larger than they seem."""
    torchscript = script(trace)
    parts = records(good)
    bomb = zipped(
        {name: part for name, part in parts.items() if "/data/" not in name} | {"archive/data/0": bytes(10**8)}, True
    )
    start, end = _directory(good)
    locals_ = [place for place in range(len(good)) if good.startswith(b"PK\3\4", place)]

    def patched(place: int, new: bytes, content: bytes = good) -> bytes:
        return content[:place] + new + content[place + len(new) :]

    def comment(archive: zipfile.ZipFile) -> None:
        archive.comment = b"PK\5\6" + bytes(18)

    def comments(archive: zipfile.ZipFile) -> None:
        for member in archive.infolist():
            member.comment = b"a comment"

    def twice(archive: zipfile.ZipFile) -> None:
        archive.filelist.append(copy.copy(archive.filelist[-1]))

    def encrypted(archive: zipfile.ZipFile) -> None:
        for member in archive.infolist():
            member.flag_bits |= 1

    plain = zipped(parts)
    return {
        "TorchScript": torchscript,
        "TorchScript, its end hidden": torchscript + b"PK\5\6",
        "TorchScript, its end hidden by zeros": torchscript + bytes(100_000),
        "TorchScript, not compressed": zipped(records(torchscript)),
        "TorchScript, its name another": zipped(
            {f"x/{name.partition('/')[2]}": part for name, part in records(torchscript).items()}
        ),
        "a directory of TorchScript after one of weights": _two_directories(good, torchscript),
        "a directory of TorchScript before one of weights": _two_directories(torchscript, good),
        "TorchScript after weights": good + torchscript,
        "weights after TorchScript": torchscript + good,
        "TorchScript as an extra field": zipped(
            parts | {"archive/code/__torch__.py": b"", "archive/constants.pkl": b"\x80\x02)."}
        ),
        "compressed": zipped(parts, True),
        "compressed zeros": with_pickle(pickle.dumps({}, 2), compressed=True, zeros=10**8),
        "compressed zeros, the end hidden": bomb + b"PK\5\6",
        "a directory of compressed zeros after one of weights": _two_directories(good, bomb),
        "a second directory after the first": _two_directories(good, zipped({"archive/data.pkl": b"\x80\x02}."})),
        "the directory twice": good[:end] + good[start:],
        "an end within the end": good[:-22] + good[-22:-2] + struct.pack("<H", 22) + good[-22:],
        "four more bytes": good + b"PK\5\6",
        "a byte more": good + b"\0",
        "a byte less": good[:-1],
        "a byte before": b"\0" + good,
        "a program before": b"#!/bin/sh\n" + good,
        "a comment": _edited(plain, comment),
        "comments on records": _edited(plain, comments),
        "the same record twice": _edited(plain, twice),
        "encrypted": _edited(plain, encrypted),
        "another name in front of a record": patched(locals_[0] + 30, b"archivf"),
        "another size in front of a record": patched(locals_[0] + 18, struct.pack("<2L", 5, 5)),
        "another method in front of a record": patched(locals_[0] + 8, struct.pack("<H", 8)),
        "other flags in front of a record": patched(locals_[0] + 6, struct.pack("<H", 0)),
        "a longer extra field": patched(locals_[0] + 28, struct.pack("<H", 60_000)),
        "another checksum": patched(start + 16, bytes(3)),
        "numbers with a flipped bit": _flipped_record(good),
        "bytes between records": _apart(plain),
        "a record past the end": _edited(plain, lambda archive: setattr(archive.filelist[-1], "file_size", 10**9)),
        "a record of 2**63 bytes": _edited(plain, lambda archive: setattr(archive.filelist[-1], "file_size", 2**63)),
        "a record that begins late": _edited(
            plain, lambda archive: setattr(archive.filelist[-1], "header_offset", 10**9)
        ),
        "another place in the end of large files": patched(good.index(b"PK\6\6") + 48, struct.pack("<Q", 0)),
        "another count in the end of large files": patched(good.index(b"PK\6\6") + 24, struct.pack("<2Q", 1, 1)),
        "a locator that points elsewhere": patched(good.index(b"PK\6\7") + 8, struct.pack("<Q", start)),
        "two folders": zipped({name if i else f"other/{name}": part for i, (name, part) in enumerate(parts.items())}),
        "no pickle": zipped({"archive/version": b"3\n"}),
        "an end alone": b"PK\5\6" + bytes(18),
        "records without an end": good[:start],
        "a table of 100,000 records": _edited(
            plain, lambda archive: archive.filelist.extend([archive.filelist[0]] * 60_000)
        ),
        "the same numbers 300 times": _overlapping(300, 4 * 2**20),
        "an unknown byte order": zipped(parts | {"archive/byteorder": b"middle"}),
        "a path that leads out": with_pickle(pickle.dumps({}, 2), name=f"../../../../..{trace.parent}"),
        "an absolute path": with_pickle(pickle.dumps({}, 2), name=str(trace.parent)),
    }


def _flipped_record(good: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        place = archive.getinfo("archive/data/0").header_offset
    place += 30 + sum(struct.unpack_from("<2H", good, place + 26))
    return good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]


def _apart(content: bytes) -> bytes:
    """A zip file with bytes before the directory that belong to no record."""
    start, _ = _directory(content)
    end = content[:-6] + struct.pack("<L", start + 100) + content[-2:]
    return end[:start] + bytes(100) + end[start:]


def _overlapping(count: int, size: int) -> bytes:
    """A zip file whose directory names one record under many names."""
    content = saved({str(i): torch.zeros(1) for i in range(count)} | {"large": torch.zeros(size // 4)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        index = archive.read("archive/data.pkl")
    large = max(members, key=lambda member: member.file_size)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", index)
        archive.writestr("archive/version", "3\n")
        archive.writestr(large.filename, bytes(size))
        offset = archive.getinfo(large.filename).header_offset
        for i in range(count):
            member = copy.copy(archive.getinfo(large.filename))
            member.filename, member.header_offset = f"archive/data/{i}", offset
            if member.filename != large.filename:
                archive.filelist.append(member)
    return buffer.getvalue()


# Tar files


def _tar(members: dict[str, Any]) -> bytes:
    """A tar file; members are bytes, or pairs of a member type and the target of a link."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    return buffer.getvalue()


def tars(trace: Path, good: bytes) -> dict[str, bytes]:
    """Files in the tar format of torch before 0.1.10, which `torch.load` unpacks."""
    empty = pickle.dumps(0, 2)
    parts: dict[str, Any] = {"storages": empty + pickle.dumps([], 2), "tensors": empty, "pickle": pickle.dumps({}, 2)}
    link = _tar({"storages": (tarfile.LNKTYPE, str(trace.parent)), **parts})
    return {
        "a tar file": _tar(parts),
        "a tar file that leads out": _tar({f"../../../../..{trace}": b"", **parts}),
        "a tar file with a hard link": link,
        "a tar file with a symbolic link": _tar({"storages": (tarfile.SYMTYPE, str(trace)), "tensors": b""}),
        "a tar file with a FIFO": _tar({"storages": (tarfile.FIFOTYPE, "")}),
        "a tar file that is a zip file, too": link + good,
        "a tar file within a zip file's first header": b"PK\3\4" + _tar(parts)[4:],
        "a gzipped tar file": gzip.compress(_tar(parts)),
        "a gzipped tar file of a long name": gzip.compress(_tar({"a" * 50_000_000: b""})),
        "a tar file without a mark": _tar(parts)[:257] + bytes(8) + _tar(parts)[265:],
    }


# Pickles, operation by operation


def text(value: str) -> bytes:
    """Operations that push a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """Operations that push a number."""
    content = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<i", len(content)) + content


def put(place: int) -> bytes:
    """Stores the top of the stack in the memo."""
    return b"r" + struct.pack("<I", place)


def get(place: int) -> bytes:
    """Pushes a value of the memo."""
    return b"j" + struct.pack("<I", place)


def name(module: str, function: str) -> bytes:
    """Pushes a function by its name."""
    return f"c{module}\n{function}\n".encode()


def program(*operations: bytes, **options: Any) -> bytes:
    """A zip file with the pickle of these operations; the top of the stack is its content."""
    return with_pickle(b"\x80\x04" + b"".join(operations) + b".", **options)


STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
TENSOR = REBUILD + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89NtR"  # of four numbers: zeros=16


class _Calls:
    """Is pickled as a call of a function, which an ordinary unpickler makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def _call(module: str, function: str, argument: str | int) -> bytes:
    """A zip file whose pickle calls a function that only its name refers to."""
    return program(name(module, function), text(argument) if isinstance(argument, str) else number(argument), b"\x85R")


def _running(trace: Path, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Pickles without a network's weights that create `trace` when a reader runs them."""
    write = _Calls(Path.touch, trace)
    command = f"open({str(trace)!r}, 'w')"
    touch = f"touch {trace}"
    return {
        "__reduce__ instead of the weights": saved({"state_dict": write}),
        "__reduce__ as the whole": saved(write),
        "__reduce__ as the whole, old format": saved(write, **OLD),
        "__reduce__ nested": saved({"state_dict": {"a": {"b": [(write,)]}}}),
        "__reduce__ as a key": saved({"state_dict": {_Calls(Path, write): torch.zeros(1)}}),
        "__reduce__ instead of the first pickle": pickle.dumps(write, 2) + saved(tensors, **OLD),
        "no file of torch's": pickle.dumps({"state_dict": write}),
        "os.system": _call("os", "system", touch),
        "posix.system": _call("posix", "system", touch),
        "subprocess": _call("subprocess", "getoutput", touch),
        "builtins.eval": _call("builtins", "eval", command),
        "__builtin__.exec": _call("__builtin__", "exec", command),
        "torch.load of another file": _call("torch.serialization", "load", str(trace)),
        "torch.hub": _call("torch.hub", "load_state_dict_from_url", "http://127.0.0.1:1/a"),
        "torch.jit.load": _call("torch.jit", "load", str(trace)),
        "an import": program(name("torch", "_dynamo"), b")R"),
        "INST": program(b"(" + text(touch) + b"ios\nsystem\n"),
        "OBJ": program(b"(" + name("os", "system") + text(touch) + b"o"),
        "NEWOBJ": program(name("os", "system") + text(touch) + b"\x85\x81"),
        "NEWOBJ_EX": program(name("os", "system") + text(touch) + b"\x85}\x92"),
        "STACK_GLOBAL": program(text("os") + text("system") + b"\x93" + text(touch) + b"\x85R"),
        "a subclass rebuilt by eval": program(
            name("torch._tensor", "_rebuild_from_type_v2"),
            b"(",
            name("builtins", "eval"),
            name("torch", "Tensor"),
            text(command),
            b"\x85NtR",
        ),
        "a state for a function": program(REBUILD + b"}" + text("__code__") + b"Nsb"),
        "an extension": program(b"\x82\x01)R"),
        "a buffer from elsewhere": program(b"\x97"),
        "a persistent id in text": program(b"Pstorage\n"),
    }


def _costly() -> dict[str, bytes]:
    """Small files that take much memory or many hours if a reader has no limits."""
    graph = b")" + put(0) + (get(0) * 4 + b"t").join([b"("] * 24) + get(0) * 4 + b"t"
    doubled = b")" + put(0) + (b"0" + get(0) + get(0) + b"\x86" + put(0)) * 45
    collisions = b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 40_000))
    names = [f"{i:05x}" for i in range(20_000)]
    leaf = name("a", "Module") + b")R}" + text("_parameters") + b"}" + text("w") + TENSOR + b"ssb" + put(1)
    root = name("a", "Module") + b")R}" + text("_modules") + b"}("
    chain = b"".join(
        name("a", "Module")
        + b")R"
        + put(2)
        + b"0"
        + get(2)
        + b"}"
        + text("_modules")
        + b"}("
        + b"".join(text(n) + get(1) for n in "ab")
        + b"usb"
        + put(1)
        + b"0"
        for _ in range(40)
    )
    many = text("a") + b"N\x86" + put(0) + b"0(" + get(0) * 100_000 + b"l" + put(0) + b"0"
    long = text("a" * 4_000_000) + put(0) + b"0"
    return {
        "a persistent id of 4**24 tuples": program(graph + b"Q"),
        "a persistent id of 2**45 tuples": program(doubled + b"Q"),
        "a storage's key of 2**45 tuples": program(
            doubled + b"0(" + text("storage") + name("torch", "FloatStorage") + get(0) + text("cpu") + b"K\x04tQ"
        ),
        "a storage's key of 4 MB, 50,000 times": program(
            long, (b"(" + text("storage") + name("torch", "FloatStorage") + get(0) + b"NK\x04tQ") * 50_000
        ),
        "20,000 names of one module": program(
            leaf + b"0" + root + b"".join(text(n) + get(1) for n in names) + b"usb", zeros=16
        ),
        "2**40 modules": program(leaf + b"0" + chain + get(1), zeros=16),
        "a name of 1,000 characters on each of 300 levels": program(
            leaf + b"0" + (root + text("a" * 1000) + get(1) + b"usb" + put(1)) * 300, zeros=16
        ),
        "a size of 3,001 large numbers": program(
            REBUILD + b"(" + STORAGE + b"K\x00(" + number(2**4000) * 3001 + b"t(" + b"K\x01" * 3001 + b"t\x89NtR",
            zeros=16,
        ),
        "a size of 60 large numbers": program(
            REBUILD + b"(" + STORAGE + b"K\x00(" + number(2**60000) * 60 + b"t(" + b"K\x01" * 60 + b"t\x89NtR", zeros=16
        ),
        "a size of 2**62 and 0": program(
            REBUILD
            + b"("
            + STORAGE
            + b"K\x00("
            + number(2**62 - 1) * 9
            + b"K\x00t("
            + number(2**62 - 1) * 10
            + b"t\x89NtR",
            zeros=16,
        ),
        "a negative offset": program(REBUILD + b"(" + STORAGE + number(-4) + b"K\x04\x85K\x01\x85\x89NtR", zeros=16),
        "a negative stride": program(
            REBUILD + b"(" + STORAGE + b"K\x03K\x04\x85" + number(-1) + b"\x85\x89NtR", zeros=16
        ),
        "a size that is no number": program(
            REBUILD + b"(" + STORAGE + b"K\x00" + text("4") + b"\x85K\x01\x85\x89NtR", zeros=16
        ),
        "a storage that is a dict": program(REBUILD + b"(}K\x00K\x04\x85K\x01\x85\x89NtR", zeros=16),
        "a storage that is not there": program(TENSOR.replace(text("0"), text("1")), zeros=16),
        "a storage of 2e9 numbers": program(TENSOR.replace(b"cpu" + b"K\x04", b"cpu" + number(2 * 10**9)), zeros=16),
        "a storage of fewer bytes than it says": program(TENSOR, zeros=12),
        "a storage of two types": program(TENSOR + TENSOR.replace(b"Float", b"Int") + b"\x86", zeros=16),
        "a quantised tensor without a scale": program(TENSOR.replace(b"FloatStorage", b"QInt32Storage"), zeros=16),
        "a key of 2**45 tuples": program(b"}", doubled + b"K\x01s"),
        "a set of 2**45 tuples": program(b"\x8f(", doubled + b"\x90"),
        "40,000 keys of one hash": program(b"}(" + collisions + b"u"),
        "40,000 keys of one hash in a set": program(b"\x8f(" + collisions + b"\x90"),
        "a number of 4 MB as a key, 50,000 times": program(
            number(2**32_000_000) + put(0) + b"0}(", (get(0) + b"N") * 50_000, b"u"
        ),
        "a text of 4 MB as a key, 50,000 times": program(long, b"}(", (get(0) + b"N") * 50_000, b"u"),
        "two equal texts of 3 MB as keys": program(
            text("a" * 3_000_000) + put(0) + text("a" * 3_000_000) + put(1) + b"00}(",
            (get(0) + b"N" + get(1) + b"N") * 30_000,
            b"u",
        ),
        "a name of 4 MB, 50,000 times": program(long, (get(0) + get(0) + b"\x93") * 50_000),
        "a dict of 100,000 pairs, 100,000 times": program(
            many,
            (name("collections", "OrderedDict") + get(0) + b"\x85R0") * 3
            + (name("builtins", "set") + get(0) + b"\x85R0") * 100,
        ),
        "a size of 100,000 numbers, 30,000 times": program(
            many, name("torch", "Size") + put(1) + b"0", (get(1) + get(0) + b"\x85R") * 30_000
        ),
        "a set of a tensor's numbers": program(
            name("builtins", "set") + TENSOR.replace(b"K\x04", number(2_000_000)) + b"\x85R", zeros=8_000_000
        ),
        "90,000 tensors of one storage": program(
            STORAGE
            + put(0)
            + b"0"
            + REBUILD
            + put(1)
            + b"0("
            + get(0)
            + b"K\x00K\x04\x85K\x01\x85\x89Nt"
            + put(2)
            + b"0}(",
            b"".join(text(f"{i:x}") + get(1) + get(2) + b"R" for i in range(60_000)),
            b"u",
            zeros=16,
        ),
        "140,000 names of one tensor": program(
            TENSOR + put(0) + b"0}(" + b"".join(text(f"{i:x}") + get(0) for i in range(140_000)) + b"u", zeros=16
        ),
        "100,000 tuples in each other": program(b")" + b"\x85" * 100_000),
        "100,000 lists in each other": program(b"]" * 100_000 + b"a" * 99_999),
        "60,000 dicts in each other": program(b"}" + (text("a") + b"}") * 60_000 + b"s" * 60_000),
        "60,000 state dicts in each other": program(b"}" + (text("state_dict") + b"}") * 60_000 + b"s" * 60_000),
        "60,000 objects in each other": program(
            name("a", "b") + put(0) + (b")R") + (get(0) + b")R") * 60_000 + b"b" * 60_000
        ),
        "60,000 modules in each other": program(
            leaf + b"0" + name("a", "b") + put(9) + b"0",
            (get(9) + b")R}" + text("_modules") + b"}" + text("a") + get(1) + b"ssb" + put(1) + b"0") * 12_000,
            get(1),
            zeros=16,
        ),
        "subclasses in each other": program(
            name("torch._tensor", "_rebuild_from_type_v2") + put(0) + b"0)" + put(1) + b"0",
            (b"(" + get(0) + b"N" + get(1) + b"Nt" + put(1) + b"0") * 20_000,
            get(0) + get(1) + b"R",
        ),
        "a list that holds itself": program(b"]" + put(0) + get(0) + b"a"),
        "an object whose state is itself": program(name("a", "b") + b")R" + put(0) + get(0) + b"b"),
        "a module that holds itself": _endless("module" * 100),
        "a state dict that holds itself": _endless(""),
        "10**10 lists": saved({"state_dict": _bomb(10)}),
        "4 million lists": program(b"]" * 4_000_000),
        "40 million lists": program(b"]" * 40_000_000),
        "4 million marks": program(b"(" * 4_000_000),
        "290,000 empty sets": program(b"\x8f" * 290_000),
        "290,000 objects": program(name("a", "b") + put(0) + (get(0) + b")R") * 90_000),
        "a memo of 10**9 places": program(b"]r\xff\xff\xff\x3f"),
        "290,000 places in the memo": program(b"]" + b"\x94" * 290_000),
        "a bytearray of 10**12": program(b"\x96" + struct.pack("<Q", 10**12)),
        "a text of 10**12": program(b"\x8d" + struct.pack("<Q", 10**12)),
        "bytes of 2**64": program(b"\x8e" + b"\xff" * 8),
        "a frame of 2**60": program(b"\x95" + struct.pack("<Q", 2**60)),
        "a number of 2**31 bytes": program(b"\x8b\xff\xff\xff\x7f"),
        "a number of a million digits": program(b"I" + b"1" * 1_000_000 + b"\n"),
        "a fraction of a million letters": program(b"F" + b"\x1b[31m a " * 100_000 + b"\n"),
        "a text that sets the terminal's colour": program(b"F\x1b[31m\r\n"),
        "a text of half a letter": program(b"X\x01\x00\x00\x00\xc3"),
        "an unfinished escape": program(b"S'\\x'\n"),
        "10 GB bytearray": _call("builtins", "bytearray", 10**10),
        "10 GB tensor": _call("torch", "FloatTensor", 10**10),
        "an empty stack": program(),
        "a mark that is not there": program(b"t"),
        "a place that is not there": program(get(5)),
        "half a pair": program(b"}(" + text("a") + b"u"),
        "items of a number": program(b"K\x01" + text("a") + b"Ns"),
        "a state for a tensor": program(TENSOR + b"}b", zeros=16),
        "a call of a number": program(b"K\x01)R"),
        "a call without arguments": program(REBUILD + b"NR"),
        "a tensor beyond its numbers": program(TENSOR.replace(b"K\x04\x85", number(10**10) + b"\x85"), zeros=16),
        "a class for each of 10**7 rows": saved({"head.fc.weight": torch.zeros(1, 1).expand(10**7, 64)}),
        "no weights": saved({"state_dict": {"a": "text"}}),
        "an OrderedDict with other items": _ordered("items"),
        "an OrderedDict with other keys": _ordered("keys"),
        "a sparse tensor": saved(
            {"a": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**9, 10**9))}
        ),
        "a tensor without numbers": saved({"a": torch.empty(10**9, device="meta")}),
        "a name with and without module.": saved({"module.a": torch.zeros(1), "a": torch.zeros(1)}),
        "names that are no text": saved({b"a": torch.zeros(1)}),
    }


def _ordered(attribute: str) -> bytes:
    """An OrderedDict one of whose methods is overwritten by an attribute."""
    state = b"}" + text(attribute) + b"K\x01s"
    return program(name("collections", "OrderedDict") + b")R" + text("a") + text("b") + b"s" + state + b"b")


def _bomb(levels: int) -> list[Any]:
    content: list[Any] = []
    for _ in range(levels):
        content = [content] * 10
    return content


def _endless(name: str) -> bytes:
    """A module that is its own child, or a dict that is its own state dict."""
    if not name:
        content: dict[str, Any] = {}
        content["state_dict"] = content
        return saved(content)
    module = torch.nn.Module()
    module._modules[name] = module
    return saved({"model": module})


# Files of torch before 1.6


_BEGIN = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
_FOUR = struct.pack("<q4f", 4, 1, 2, 3, 4)


def stream(
    part: bytes = b"N", size: bytes = b"K\x00K\x04\x85K\x01\x85", length: int = 4, numbers: bytes = _FOUR
) -> bytes:
    """A file of torch before 1.6 with one tensor `a`.

    Args:
        part: Pickled position of its storage in another one, or None.
        size: Pickled offset, size and stride.
        length: Length of its storage.
        numbers: The bytes after the pickles.
    """
    entry = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + number(length) + part
    tensor = b"\x80\x02}" + text("a") + REBUILD + b"(" + entry + b"tQ" + size + b"\x89NtRs."
    return _BEGIN + tensor + pickle.dumps(["0"], 2) + numbers


def _streams() -> dict[str, bytes]:
    """Files whose storages are not completely filled by bytes of the file."""
    tensors = {"a": torch.arange(4.0), "b": torch.arange(3)}
    good = saved(tensors, **OLD)
    ends = [i + 1 for i in _stops(good)]
    keys = pickle.loads(good[ends[3] :])
    numbers = good[ends[4] :]
    index = good[: ends[3]]

    def listing(listed: Any, after: bytes = numbers) -> bytes:
        return index + pickle.dumps(listed, 2) + after

    def part(key: bytes, begin: bytes, length: bytes) -> bytes:
        return stream(b"(" + key + begin + length + b"t")

    huge = number(2 * 10**9)
    return {
        "no storage's bytes": listing([], b""),
        "no storage listed": listing([]),
        "one of two storages listed": listing(keys[:1], numbers[: len(numbers) // 2]),
        "a storage listed twice": listing([*keys, keys[0]], numbers * 2),
        "another storage listed": listing(["1", "2"]),
        "a number as a list of storages": listing(3),
        "a dict as a list of storages": listing(dict.fromkeys(keys, 1)),
        "lists as storages": listing([[], []]),
        "no list of storages": index,
        "a storage that is cut": good[:-1],
        "a storage that goes on": good + b"\0",
        "a zip file after it": good + saved(tensors),
        "a tensor of 2e9 numbers without bytes": stream(
            size=b"K\x00" + huge + b"\x85K\x01\x85", length=2 * 10**9, numbers=b""
        ),
        "a tensor of 2e9 numbers that are not listed": stream(
            size=b"K\x00" + huge + b"\x85K\x01\x85", length=2 * 10**9
        ).replace(pickle.dumps(["0"], 2), pickle.dumps([], 2)),
        "a storage of 2e9 numbers": stream(length=2 * 10**9),
        "a storage of 2**61 numbers": stream(length=2**61),
        "a storage of 2**80 numbers": stream(length=2**80),
        "a storage of -1 numbers": stream(length=-1),
        "a storage that says 2**62": stream(numbers=struct.pack("<q", 2**62) + _FOUR[8:]),
        "a storage that says -4": stream(numbers=struct.pack("<q", -4) + _FOUR[8:]),
        "a part beyond its storage": part(text("1"), b"K\x03", b"K\x04"),
        "a part before its storage": part(text("1"), number(-4), b"K\x04"),
        "a part that is no part": part(text("1"), b"}", b"}"),
        "a part of nothing": stream(b")"),
        "another first number": pickle.dumps(1, 2) + good[ends[0] :],
        "a list as the first number": pickle.dumps([1], 2) + good[ends[0] :],
        "a first number of 4 MB": b"\x80\x02" + number(2**32_000_000) + b"." + good[ends[0] :],
        "a pickle of 9 MB first": b"\x80\x02X" + struct.pack("<I", 9_000_000) + bytes(9_000_000) + b"0K\x01." + good,
        "a TorchScript of old": _BEGIN + b"\x80\x02c__torch__\nM\n)\x81}b." + pickle.dumps([], 2),
    }


def _stops(content: bytes) -> list[int]:
    """The offsets at which the five pickles of an old file end."""
    stream = io.BytesIO(content)
    return [[place or 0 for *_, place in pickletools.genops(stream)][-1] for _ in range(5)]


# safetensors


def _headers() -> dict[str, bytes]:
    """safetensors whose header alone takes much time or memory."""

    def file(header: bytes, numbers: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + numbers

    def tensor(shape: str, dtype: str = "U8", end: int = 0) -> bytes:
        return f'"dtype":"{dtype}","shape":[{shape}],"data_offsets":[0,{end}]'.encode()

    empty = b",".join(b'"%x":{' % i + tensor("0") + b"}" for i in range(90_000))
    return {
        "90,000 tensors of nothing": file(b"{" + empty + b"}"),
        "a header of 9 MB": file(b"{" + b" " * 9_000_000 + b"}"),
        "a million dimensions": file(b'{"a":{' + tensor("1," * 1_000_000 + "1", end=1) + b"}}", b"\0"),
        "2**64 numbers of nothing": file(b'{"a":{' + tensor("0," * 9 + str(2**63)) + b"}}"),
        "a name of 4 MB": file(b'{"' + b"a" * 4_000_000 + b'":{' + tensor("1", end=1) + b"}}", b"\0"),
        "a name that sets the terminal's colour": file(
            b'{"\\u001b[31m\\r\\n":{' + tensor("1", "X\\u001b[31m", 1) + b"}}", b"\0"
        ),
        "metadata of 4 MB": file(b'{"__metadata__":{"a":"' + b"a" * 4_000_000 + b'"}}'),
        "100,000 arrays in each other": file(b'{"a":' + b"[" * 100_000 + b"}"),
    }


# All of them


def malicious(trace: Path, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Checkpoints without a network's weights; a reader that runs their code may create `trace`."""
    good = saved({"a": torch.arange(16.0), "b": torch.arange(4)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about TorchScript and sparse tensors
        files = _archives(trace, good) | tars(trace, good) | _running(trace, tensors)
        return files | _costly() | _streams() | _headers()


def harmless(trace: Path, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Checkpoints with the right weights, and a call that would create `trace` or take 10 GB."""
    write, large = _Calls(Path.touch, trace), _Calls(bytearray, 10**10)
    return {
        "__reduce__ beside the weights": saved({"state_dict": tensors, "epoch": write}),
        "__reduce__ beside the weights, old format": saved({"state_dict": tensors, "epoch": write}, **OLD),
        "10 GB bytearray beside the weights": saved({"state_dict": tensors, "epoch": large}),
    }


class _Net(torch.nn.Module):
    """A network whose class the reader does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        self.register_buffer("grid", torch.zeros(2), persistent=False)


def sound(trace: Path) -> dict[str, bytes]:
    """Small checkpoints with weights; two also have a call that would create `trace`."""
    net = _Net()
    weights = net.state_dict()
    optimiser = torch.optim.SGD(net.parameters(), momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    numbers = torch.arange(12.0)
    training = {
        "epoch": 3,
        "state_dict": {f"module.{key}": tensor for key, tensor in weights.items()},
        "optimizer": optimiser.state_dict(),
        "args": argparse.Namespace(lr=0.1, names={1: "a", (1, 2): "b"}),
    }
    shared = {"a": numbers, "b": numbers[2:6], "c": numbers.view(3, 4).t(), "d": torch.zeros(0), "e": torch.tensor(1)}
    dtypes = {
        str(dtype): torch.ones(3).to(dtype)
        for dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int8,
            torch.bool,
            torch.uint16,
            torch.complex64,
        )
    }
    running = {"state_dict": weights, "a": _Calls(Path.touch, trace), "b": _Calls(bytearray, 10**10)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it finds no source of the class
        found = {
            f"{title}{', old format' if options else ''}": saved(content, **options)
            for title, content in {
                "a state dict": weights,
                "a network": {"model": net, "ema": None},
                "a training": training,
                "shared numbers": shared,
                "types": dtypes,
                "a call beside": running,
            }.items()
            for options in ({}, OLD)
        }
    return {
        **found,
        "protocol 4": saved(training, pickle_protocol=4),
        "protocol 5, old format": saved(training, pickle_protocol=5, **OLD),
        "rewritten": zipped(records(saved(weights))),
        "no checksums": _without_checksums(saved(weights)),
        "safetensors": save_safetensors(dict(weights)),
        "safetensors around a zip file": save_safetensors(
            {"a": torch.frombuffer(bytearray(saved(running)), dtype=torch.uint8)}
        ),
        "one tensor": program(b"}" + text("a") + TENSOR + b"s", zeros=16),
    }


def _without_checksums(content: bytes) -> bytes:
    """The file as `torch.save` writes it after `torch.serialization.set_crc32_options(False)`."""
    for part in records(content).values():
        if part:
            content = content.replace(struct.pack("<L", zlib.crc32(part)), bytes(4))
    return content


# Any number of others


def mutated(sound: Sequence[bytes], malicious: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Checkpoints with one to four random changes: to their bytes, or to the pickle inside a newly written zip file."""
    draw = random.Random(seed)
    for _ in range(count):
        content, other = (draw.choice(draw.choice((sound, malicious))) for _ in range(2))
        for _ in range(draw.choice((1, 1, 2, 4))):
            content = _changed_inside(content, other, draw) if draw.random() < 0.7 else _changed(content, other, draw)
        yield content


_EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def _changed(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The content with some bytes flipped, replaced, removed, repeated, or copied from another file."""
    place = draw.randrange(len(content) + 1)
    length = min(int(draw.expovariate(1 / 20)) + 1, len(content))
    match draw.randrange(8):
        case 0:
            return (
                content[:place]
                + bytes(byte ^ (1 << draw.randrange(8)) for byte in content[place : place + 1])
                + content[place + 1 :]
            )
        case 1:
            return content[:place] + draw.randbytes(length) + content[place + length :]
        case 2:
            return content[:place] + content[place + length :]
        case 3:
            return (
                content[:place] + content[place : place + length] * draw.choice((2, 3, 100)) + content[place + length :]
            )
        case 4:
            size = draw.choice((1, 2, 4, 8))
            value = (draw.choice(_EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")
            return content[:place] + value + content[place + size :]
        case 5:
            begin = draw.randrange(len(other) + 1)
            return (
                content[:place]
                + other[begin : begin + draw.choice((4, 30, 200))]
                + content[place + draw.choice((0, 4, 30)) :]
            )
        case 6:
            return content[:place]
        case _:
            return draw.choice(
                (content + other, content + b"PK\5\6", content[:place] + draw.randbytes(length) + content[place:])
            )


def _changed_inside(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The content with changed bytes of the pickle, or with moved, repeated or foreign operations in it."""
    parts, operations = _index(content)
    if not operations:
        return _changed(content, other, draw)
    foreign = _index(other)[1] or operations
    place = draw.randrange(len(operations))
    match draw.randrange(6):
        case 0:
            del operations[place : place + draw.choice((1, 1, 3))]
        case 1:
            operations[place:place] = operations[place : place + draw.choice((1, 3, 20))] * draw.choice((1, 2, 50))
        case 2:
            begin = draw.randrange(len(foreign))
            operations[place:place] = foreign[begin : begin + draw.choice((1, 3, 20))]
        case 3:
            begin = draw.randrange(len(operations))
            operations[place], operations[begin] = operations[begin], operations[place]
        case 4:
            extreme = draw.choice(_EXTREMES)
            simple = (b"]", b"}", b")", b"N", b"(", b"0", b"2", b"Q", b"R", b"b", text("a"))
            operations[place] = draw.choice((number(extreme), number(-extreme), *simple))
        case _:
            operations = [_changed(b"".join(operations), b"".join(foreign), draw)]
    name = next(name for name in parts if name.endswith("data.pkl"))
    return zipped(parts | {name: b"".join(operations)})


def _index(content: bytes) -> tuple[dict[str, bytes], list[bytes]]:
    """The records of a zip file and the operations of its pickle; empty if it is already broken."""
    try:
        parts = records(content)
        index = next(part for name, part in parts.items() if name.endswith("data.pkl"))
        places = [place for *_, place in pickletools.genops(index)]
    except Exception:  # zipfile and pickletools raise many different errors for broken files
        return {}, []
    return parts, [index[a:b] for a, b in zip(places, [*places[1:], len(index)], strict=True)]
