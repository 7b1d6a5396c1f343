"""What can go wrong with weights, as lists: on the network, on the disk, in manifests, file headers and pickles.

`tools/fault_report.py` runs them all and prints what came of each; the tests run the same.
"""

import copy
import io
import json
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hub_double import Fault, Request, Response

Answer = Callable[[], Response | None]
CUTS = 20  # offsets at which a download is cut


# The network: what answers a request instead of the Hub, for which requests, and whether always or once


@dataclass(frozen=True)
class NetworkFault:
    """`answer` stands between the double and those requests whose method matches `command`."""

    answer: Fault
    command: str = "GET"  # or HEAD, or HEAD|GET
    always: bool = False


def _changed(change: Callable[[Request, Response], Response | None]) -> Fault:
    def fault(request: Request, answer: Answer) -> Response | None:
        response = answer()
        assert response is not None
        return change(request, response)

    return fault


def _cut(share: float) -> Fault:
    """The connection ends after that share of the file."""

    def change(request: Request, response: Response) -> Response:
        whole = {"Content-Length": str(len(response.body))}
        return Response(response.status, response.body[: int(share * len(response.body))], response.headers | whole)

    return _changed(change)


def _body(change: Callable[[bytes], bytes]) -> Fault:
    """Another body, of which the length is told rightly."""
    return _changed(lambda request, response: Response(response.status, change(response.body), response.headers))


def _flip(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def _status(status: int, **headers: str) -> Fault:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, answer: Response(status, b"made-up", told)


def _reset(request: Request, answer: Answer) -> Response | None:
    return request.reset()


def _page(request: Request, answer: Answer) -> Response | None:
    return Response(200, b"<!DOCTYPE html><html>Sign in to continue</html>", {"Content-Type": "text/html"})


def _redirect_loop(request: Request, answer: Answer) -> Response | None:
    return Response(302, b"", {"Location": f"{request.server.url}{request.path}"})


def _silence(request: Request, answer: Answer) -> Response | None:
    time.sleep(8)
    return None


def _trickle(request: Request, response: Response) -> Response | None:
    request.send_response(response.status)
    for name, value in ({"Content-Length": str(len(response.body))} | response.headers).items():
        request.send_header(name, value)
    request.end_headers()
    step = -(-len(response.body) // 10)
    for start in range(0, len(response.body), step):
        request.wfile.write(response.body[start : start + step])
        time.sleep(0.1)
    return None


slowly = _changed(_trickle)


def _garbage(request: Request, answer: Answer) -> Response | None:
    request.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
    return None


def _second_half(request: Request, response: Response) -> Response:
    """206 and the file's second half, where the whole was asked for."""
    half, size = len(response.body) // 2, len(response.body)
    return Response(206, response.body[half:], response.headers | {"Content-Range": f"bytes {half}-{size - 1}/{size}"})


def _other(**headers: str) -> Fault:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return _changed(lambda request, response: Response(response.status, response.body, response.headers | told))


_WRONG_FILES: dict[str, Fault] = {
    "cut in the middle": _cut(0.5),
    "a short file, its length told": _body(lambda content: content[:-1000]),
    "a long file, its length told": _body(lambda content: content + b"\0" * 1000),
    "an empty file": _body(lambda content: b""),
    "one bit flipped": _body(_flip),
    "206 with the second half": _changed(_second_half),
    "a web page instead of the file": _page,
    "reset before the file": _reset,
}
NETWORK_FAULTS: dict[str, NetworkFault] = {
    **{f"cut at {100 * i // CUTS} %": NetworkFault(_cut(i / CUTS)) for i in range(CUTS)},
    **{name: NetworkFault(fault) for name, fault in _WRONG_FILES.items()},
    **{f"{name}, always": NetworkFault(fault, always=True) for name, fault in _WRONG_FILES.items()},
    "reset before the headers": NetworkFault(_reset, "HEAD"),
    "reset, always": NetworkFault(_reset, "HEAD|GET", always=True),
    "a web page, always": NetworkFault(_page, "HEAD|GET", always=True),
    "silence, once": NetworkFault(_silence, "HEAD"),
    "a slow file": NetworkFault(slowly),
    "a redirect loop": NetworkFault(_redirect_loop, "HEAD|GET", always=True),
    "no HTTP": NetworkFault(_garbage, "HEAD|GET", always=True),
    "silence": NetworkFault(_silence, "HEAD|GET", always=True),
    "another ETag, always": NetworkFault(_other(ETag='"0"'), "HEAD|GET", always=True),
    "another commit, always": NetworkFault(_other(X_Repo_Commit="f" * 40), "HEAD|GET", always=True),
    **{f"{status}": NetworkFault(_status(status), "HEAD") for status in (408, 429, 500, 502, 503, 504)},
    **{f"{status} for the file": NetworkFault(_status(status)) for status in (429, 500, 503)},
    "429, wait 1 s": NetworkFault(_status(429, Retry_After="1"), "HEAD"),
    "429, wait an hour, always": NetworkFault(_status(429, Retry_After="3600"), "HEAD|GET", always=True),
    **{
        f"{status}, always": NetworkFault(_status(status), "HEAD|GET", always=True)
        for status in (401, 403, 404, 429, 500, 503)
    },
}


# The disk: each fault takes the path of a downloaded file, in the cache that it lies in


def _overwrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.resolve().write_bytes(change(path.read_bytes()))

    return damage


def _dangle(path: Path) -> None:
    path.resolve().unlink()


def _unlink(path: Path) -> None:
    path.unlink()


def _become_folder(path: Path) -> None:
    blob = path.resolve()
    blob.unlink()
    blob.mkdir()


DISK_FAULTS: dict[str, Callable[[Path], None]] = {
    "bit flip": _overwrite(_flip),
    "truncation": _overwrite(lambda content: content[:-1000]),
    "appended bytes": _overwrite(lambda content: content + b"\0"),
    "empty": _overwrite(lambda content: b""),
    "zeros": _overwrite(lambda content: bytes(len(content))),
    "dangling link": _dangle,
    "missing link": _unlink,
    "a folder instead": _become_folder,
}


# Manifests, as what is wrong with a text that was right


def bad_manifests(good: dict[str, Any]) -> dict[str, str | bytes]:
    """At least 30 texts that are no manifest; `good` is one with a single checkpoint on the Hub."""
    ((group, members),) = good.items()
    ((name, _),) = members.items()
    network = name.partition(".")[0]

    def changed(**fields: Any) -> str:
        manifest = copy.deepcopy(good)
        manifest[group][name] |= fields
        return json.dumps(manifest)

    def without(field: str) -> str:
        manifest = copy.deepcopy(good)
        del manifest[group][name][field]
        return json.dumps(manifest)

    text, commit = json.dumps(good), "0" * 40
    return {
        "empty": "",
        "no JSON": "{",
        "a list": "[]",
        "a number": "1",
        "no text": b"\xff\xfe\x00",
        "NaN": changed().replace('"params": ', '"params": NaN, "macs": ', 1),
        "nested too deep": "[" * 100_000,
        "a huge number": changed(size=10**30),
        "a number of 5,000 digits": changed(size=1).replace('"size": 1', '"size": ' + "1" * 5000),
        "too large": text + " " * 5 * 2**20,
        "the same field twice": text.replace('"sha256"', '"license": "mit", "sha256"', 1),
        "one of 40,000 entries twice": json.dumps({group: {f"a{i}": 1 for i in range(40_000)}})[:-2] + ', "a1": 1}}',
        "a million classes too many": changed(num_classes=10**9),
        "an image of 10**9 pixels": changed(input_size=[3, 10**9, 1]),
        "an infinite top-1": changed(metrics=[{"value": 0}]).replace('"value": 0', '"value": 1e999'),
        "a division by 0": changed(std=[0, 0, 0]),
        "class names for other classes": changed(class_names=["a"]),
        "lists of nothing": "[" + "[]," * 300_000 + "[]]",
        "the same entry twice": text.replace(f'"{name}": ', f'"{name}": {{}}, "{name}": ', 1),
        "an unknown field": changed(command="rm"),
        "no licence": without("license"),
        "no sha256": without("sha256"),
        "sha256 of 63 digits": changed(sha256="0" * 63),
        "sha256 of 65 digits": changed(sha256="0" * 65),
        "sha256 in capitals": changed(sha256="A" * 64),
        "sha256 and a line end": changed(sha256="0" * 64 + "\n"),
        "sha256 a number": changed(sha256=0),
        "a branch": changed(source="hf://org/repo@main:a.safetensors"),
        "a short commit": changed(source="hf://org/repo@0123456:a.safetensors"),
        "a source and a line end": changed(source=f"hf://org/repo@{commit}:a.safetensors\n"),
        "../ in the file": changed(source=f"hf://org/repo@{commit}:../a.safetensors"),
        "../ inside the file": changed(source=f"hf://org/repo@{commit}:a/../../a.safetensors"),
        "an absolute file": changed(source=f"hf://org/repo@{commit}:/etc/passwd"),
        "../ in the repository": changed(source=f"hf://../repo@{commit}:a.safetensors"),
        "no organisation": changed(source=f"hf://repo@{commit}:a.safetensors"),
        "../ in a bundled file": changed(source="bundled:../../a"),
        "an absolute bundled file": changed(source="bundled:/etc/passwd"),
        "another scheme": changed(source="https://example.org/a.safetensors"),
        "a local file": changed(source="file:///etc/passwd"),
        "an original that is no link": changed(source=None, original_link="javascript:alert(1)"),
        "a negative size": changed(size=-1),
        "no classes": changed(num_classes=0),
        "an image of two dimensions": changed(input_size=[32, 32]),
        "a top-1 above 100": changed(metrics=[{"value": 101}]),
        "a name with a path": text.replace(name, f"../{name}"),
        "a name in capitals": text.replace(name, name.upper()),
        "an unknown network": text.replace(network, "no_such_network"),
        "an unknown group": text.replace(f'"{group}"', '"no_such_group"', 1),
    }


# safetensors files, as what is wrong in front of the numbers


def bad_safetensors(good: bytes) -> dict[str, bytes]:
    """At least 30 files that are no safetensors; `good` is a right one."""
    length = struct.unpack("<Q", good[:8])[0]
    header: dict[str, Any] = json.loads(good[8 : 8 + length])
    numbers = good[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    first, second = names[:2]
    end = max(header[name]["data_offsets"][1] for name in names)

    def file(text: str | bytes, size: int | None = None) -> bytes:
        content = text if isinstance(text, bytes) else text.encode()
        return struct.pack("<Q", len(content) if size is None else size) + content + numbers

    def changed(name: str = first, **fields: Any) -> bytes:
        other = copy.deepcopy(header)
        other[name] |= fields
        return file(json.dumps(other))

    def with_entry(name: str, value: Any) -> bytes:
        return file(json.dumps(header | {name: value}))

    start, stop = header[first]["data_offsets"]
    return {
        "nothing": b"",
        "seven bytes": good[:7],
        "a length alone": good[:8],
        "half a header": good[: 8 + length // 2],
        "no numbers": good[: 8 + length],
        "a byte too few": good[:-1],
        "a byte too many": good + b"\0",
        "header length 0": file(b"", 0),
        "header length 1": file(json.dumps(header), 1),
        "header length 2**63": file(json.dumps(header), 2**63),
        "header length 2**64 - 1": file(json.dumps(header), 2**64 - 1),
        "header length 10 GB": file(json.dumps(header), 10**10),
        "header past the end": file(json.dumps(header), len(good)),
        "no JSON": file("{"),
        "a list": file("[]"),
        "an empty dict": file("{}"),
        "no text": file(b"{\xff\xfe}"),
        "nested too deep": file('{"a":' * 50_000),
        "the same name twice": file(json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[second])}}}'),
        "an unknown dtype": changed(dtype="X32"),
        "whole numbers": changed(next(name for name in names if header[name]["dtype"] == "F32"), dtype="I32"),
        "no dtype": with_entry(first, {"shape": [1], "data_offsets": [start, stop]}),
        "a negative shape": changed(shape=[-1]),
        "a huge shape": changed(shape=[2**62, 2**62]),
        "a shape too large": changed(shape=[10**9]),
        "a shape of fractions": changed(shape=[1.5]),
        "offsets past the end": changed(data_offsets=[start, end + 10**12]),
        "offsets reversed": changed(data_offsets=[stop, start]),
        "negative offsets": changed(data_offsets=[-8, stop]),
        "overlapping offsets": changed(second, data_offsets=[start, stop]),
        "a hole": changed(second, data_offsets=[end, end]),
        "a tensor that is a number": with_entry(first, 1),
        "metadata that is no text": with_entry("__metadata__", {"a": 1}),
        "metadata that is a list": with_entry("__metadata__", []),
        "another network's names": file(json.dumps({f"x{name}": value for name, value in header.items()})),
    }


# Pickles that try to run something, to write somewhere, or to fill the memory


class _Calls:
    """Is pickled as a call of a function, which an ordinary unpickler makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _call(module: str, function: str, argument: str | int) -> bytes:
    """A zip file whose pickle calls a function that only its name refers to."""
    given = b"X" + struct.pack("<I", len(argument)) + argument.encode() if isinstance(argument, str) else b""
    if isinstance(argument, int):
        given = b"\x8a\x08" + struct.pack("<Q", argument)
    return _with_pickle(b"\x80\x02c" + f"{module}\n{function}\n".encode() + given + b"\x85R.")


def _with_pickle(content: bytes, name: str = "archive", compressed: bool = False, zeros: int = 0) -> bytes:
    """A zip file as torch writes it, around a pickle."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(f"{name}/data.pkl", content)
        archive.writestr(f"{name}/version", "3\n")
        archive.writestr(f"{name}/byteorder", "little")
        archive.writestr(f"{name}/data/0", bytes(zeros))
    return buffer.getvalue()


def _bomb(levels: int) -> list[Any]:
    content: list[Any] = []
    for _ in range(levels):
        content = [content] * 10
    return content


def malicious_pickles(trace: Path, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """At least 10 checkpoints that would create `trace`, or use up the memory, if they were believed."""
    write = _Calls(Path.touch, trace)
    command = f"open({str(trace)!r}, 'w')"
    legacy = {"_use_new_zipfile_serialization": False}
    return {
        "__reduce__ beside the weights": _saved({"state_dict": tensors, "epoch": write}),
        "__reduce__ beside the weights, old format": _saved({"state_dict": tensors, "epoch": write}, **legacy),
        "__reduce__ instead of the weights": _saved({"state_dict": write}),
        "__reduce__ as the whole": _saved(write),
        "__reduce__ nested": _saved({"state_dict": {"a": {"b": [(write,)]}}}),
        "__reduce__ as a key": _saved({"state_dict": {_Calls(Path, write): torch.zeros(1)}}),
        "no file of torch's": pickle.dumps({"state_dict": write}),
        "os.system": _call("os", "system", f"touch {trace}"),
        "posix.system": _call("posix", "system", f"touch {trace}"),
        "subprocess": _call("subprocess", "getoutput", f"touch {trace}"),
        "builtins.eval": _call("builtins", "eval", command),
        "__builtin__.exec": _call("__builtin__", "exec", command),
        "torch.load of another file": _call("torch.serialization", "load", str(trace)),
        "torch.hub": _call("torch.hub", "load_state_dict_from_url", "http://127.0.0.1:1/a"),
        "a path that leads out": _with_pickle(pickle.dumps({}, 2), name=f"../../../../..{trace.parent}"),
        "an absolute path": _with_pickle(pickle.dumps({}, 2), name=str(trace.parent)),
        "10 GB bytearray": _call("builtins", "bytearray", 10**10),
        "10 GB tensor": _call("torch", "FloatTensor", 10**10),
        "10**10 lists": _saved({"state_dict": _bomb(10)}),
        "compressed zeros": _with_pickle(pickle.dumps({}, 2), compressed=True, zeros=10**8),
        "a key of 2**45 tuples": _with_pickle(b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 45 + b"K\x01s."),
        "a set of 2**45 tuples": _with_pickle(b"\x80\x04\x8f()q\x00" + b"h\x00h\x00\x86q\x00" * 45 + b"\x90."),
        "4 million lists": _with_pickle(b"\x80\x02" + b"]" * 4_000_000 + b"."),
        "40 million lists": _with_pickle(b"\x80\x02" + b"]" * 40_000_000 + b"."),
        "a memo of 10**9 places": _with_pickle(b"\x80\x02]r\xff\xff\xff\x3f."),
        "a bytearray of 10**12": _with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"."),
        "a tensor beyond its numbers": _resized(lambda size: b"\x8a\x05" + struct.pack("<Q", 10**10)[:5]),
        "a class for each of 10**7 rows": _saved({"head.fc.weight": torch.zeros(1, 1).expand(10**7, 64)}),
        "the same numbers 300 times": _overlapping(300, 4 * 2**20),
        "a module that holds itself": _endless("module" * 100),
        "a state dict that holds itself": _endless(""),
        "no weights": _saved({"state_dict": {"a": "text"}}),
        "TorchScript": _script(),
    }


def _resized(number: Callable[[int], bytes]) -> bytes:
    """A tensor of one number whose pickled size says another."""
    content = _saved({"a": torch.zeros(7)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        index = archive.read("archive/data.pkl")
    assert index.count(b"K\x07") == 2  # that of the storage, that of the tensor
    before, middle, after = index.split(b"K\x07")
    return _with_pickle(before + b"K\x07" + middle + number(7) + after, zeros=28)


def _overlapping(count: int, size: int) -> bytes:
    """A zip file whose table of contents names one part of it under many names."""
    content = _saved({str(i): torch.zeros(1) for i in range(count)} | {"large": torch.zeros(size // 4)})
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


def _endless(name: str) -> bytes:
    """A module that is its own child, or a dict that is its own state dict."""
    if not name:
        content: dict[str, Any] = {}
        content["state_dict"] = content
        return _saved(content)
    module = torch.nn.Module()
    module._modules[name] = module
    return _saved({"model": module})


def _script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def byte_flips(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`content` with one random bit of one random byte flipped, `count` times."""
    draw = random.Random(seed)
    for _ in range(count):
        place = draw.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
