"""Lists of faults of weights: on the network, on the disk, in manifests and file headers.

`hostile.py` has malicious checkpoints. `tools/fault_report.py` runs all of them and prints the results; the tests run
the same cases.
"""

import copy
import json
import random
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_double import Fault, Request, Response

Answer = Callable[[], Response | None]
CUTS = 20  # offsets at which a download is cut


# Faults of the network


@dataclass(frozen=True)
class NetworkFault:
    """A fault for requests to the local imitation of the Hub.

    Attributes:
        answer: Answers the requests instead of it.
        command: Methods of these requests: GET, HEAD, or HEAD|GET.
        always: Whether it answers all of them, or only the first.
    """

    answer: Fault
    command: str = "GET"
    always: bool = False


def _changed(change: Callable[[Request, Response], Response | None]) -> Fault:
    def fault(request: Request, answer: Answer) -> Response | None:
        response = answer()
        assert response is not None
        return change(request, response)

    return fault


def _cut(share: float) -> Fault:
    """The connection ends after a share of the file."""

    def change(request: Request, response: Response) -> Response:
        full_length = {"Content-Length": str(len(response.body))}
        cut = response.body[: int(share * len(response.body))]
        return Response(response.status, cut, response.headers | full_length)

    return _changed(change)


def _body(change: Callable[[bytes], bytes]) -> Fault:
    """Another body, with its own Content-Length."""
    return _changed(lambda request, response: Response(response.status, change(response.body), response.headers))


def _flip(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def _status(status: int, **headers: str) -> Fault:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, answer: Response(status, b"made-up", fields)


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
    """206 and the second half of the file, although all of it was requested."""
    half, size = len(response.body) // 2, len(response.body)
    return Response(206, response.body[half:], response.headers | {"Content-Range": f"bytes {half}-{size - 1}/{size}"})


def _other(**headers: str) -> Fault:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return _changed(lambda request, response: Response(response.status, response.body, response.headers | fields))


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


# Faults of the disk: functions of the path of a downloaded file in a cache


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


# Invalid manifests: name of the fault -> text


def bad_manifests(good: dict[str, Any]) -> dict[str, str | bytes]:
    """At least 30 invalid manifests, made from `good`, which has a single checkpoint on the Hub."""
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


# Invalid safetensors files: name of the fault -> bytes


def bad_safetensors(good: bytes) -> dict[str, bytes]:
    """At least 30 invalid safetensors files, made from the valid file `good`."""
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


def byte_flips(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`content` with one random bit of one random byte flipped, `count` times."""
    draw = random.Random(seed)
    for _ in range(count):
        place = draw.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
