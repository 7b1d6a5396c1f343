"""A local imitation of the Hugging Face Hub, with a log of all requests.

It supports reading and writing: `huggingface_hub` can create repositories, and upload and commit files. As on the Hub,
`*.safetensors` are LFS objects, stored by their SHA-256, and other files are git blobs. Uploads use the plain LFS
protocol. Xet, the other protocol, needs a server that is not imitated, so `environment` and `replace` disable it.

`faults` are functions of a request and of a function that answers it. A fault may answer something else, before or
after the request is carried out, change the answer, wait, write to `request.wfile` itself, or return None (no answer).

    def page(request, answer):
        return Response(200, b"<html>") if request.command == "GET" else answer()
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_double"
PAST_PROXIES = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@dataclass
class Response:
    """An answer; `headers` may have a Content-Length that differs from that of `body`."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Fault = Callable[["Request", Callable[[], Response | None]], Response | None]


def fails(route: str, status: int | None = 503, times: int | None = 1, late: bool = False, **headers: str) -> Fault:
    """A fault: requests that match `route` fail.

    Args:
        route: Regular expression for the method and the path, for example "POST /api/.*".
        status: Status of the answer; None resets the connection.
        times: How often; None: always.
        late: Carry out the request before it fails.
        headers: Headers of the answer, with _ instead of -.
    """
    left = [times]

    def fault(request: "Request", answer: Callable[[], Response | None]) -> Response | None:
        if left[0] == 0 or not re.fullmatch(route, f"{request.command} {request.path}"):
            return answer()
        left[0] = left[0] and left[0] - 1
        if late:
            answer()
        if status is None:
            return request.reset()
        body = json.dumps({"error": f"made-up error {status}"}).encode()
        return Response(status, body, {name.replace("_", "-"): value for name, value in headers.items()})

    return fault


class HubDouble(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: Initial files, {"org/repo/name": bytes}, all at `COMMIT`.
        repos: Created repositories, {"org/repo": [(commit, {name: bytes}), ...]}, oldest commit first.
        objects: Uploaded LFS objects by SHA-256.
        requests: All requests, as "HEAD /path".
        faults: The faults; the last one is called first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files: dict[str, bytes] = {}
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints a traceback, unless the client closed the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that uses this server as the Hub, without a proxy."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        return inherited | {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"} | PAST_PROXIES

    @contextmanager
    def replace(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Inside this context, this process uses this server as the Hub."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        for name, value in PAST_PROXIES.items():
            monkeypatch.setenv(name, value)
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()

    def history(self, repo: str) -> list[tuple[str, dict[str, bytes]]]:
        start = f"{repo}/"
        fixed = {path.removeprefix(start): data for path, data in self.files.items() if path.startswith(start)}
        return self.repos.get(repo, [(COMMIT, fixed)] if fixed else [])

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision, and its files."""
        return next((found for found in reversed(self.history(repo)) if revision in ("main", found[0])), None)

    def commit(self, repo: str, files: dict[str, bytes], message: str) -> str:
        """Adds a commit; returns its hash, which depends on its content."""
        history = self.repos.setdefault(repo, [])
        content = [
            [parent for parent, _ in history],
            message,
            sorted((name, blob_id(data)) for name, data in files.items()),
        ]
        commit = hashlib.sha1(repr(content).encode()).hexdigest()
        history.append((commit, files))
        return commit


def is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def blob_id(content: bytes) -> str:
    """git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(name) else blob_id(content)


def as_json(content: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def missing(what: str) -> Response:
    return Response(404, b"", {"X-Error-Code": f"{what}NotFound"})


class Request(BaseHTTPRequestHandler):
    """One request, with its `body`."""

    server: HubDouble
    body: bytes
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: Callable[[], Response | None] = self.carry_out
        for fault in self.server.faults:
            answer = partial(fault, self, answer)
        response = answer()
        if response is None:
            self.close_connection = True
            return
        headers = {"Content-Length": str(len(response.body))} | response.headers
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)
            self.close_connection |= headers["Content-Length"] != str(len(response.body))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reset(self) -> Response | None:
        """Resets the connection, as a crash does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        return None

    def carry_out(self) -> Response:
        path = unquote(urlsplit(self.path).path)
        public = self.command in ("GET", "HEAD", "PUT") and path != "/api/whoami-v2"  # PUT has a signed address
        if not public and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return as_json({"error": "Invalid username or password."}, 401)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, **match.groupdict())
        return as_json({"error": f"the double does not know {self.command} {path}"}, 501)

    def whoami(self) -> Response:
        return as_json({"type": "user", "name": "someone", "orgs": []})

    def create(self) -> Response:
        fields = json.loads(self.body)
        repo = f"{fields['organization']}/{fields['name']}"
        if repo in self.server.repos:
            return as_json({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, 409)
        self.server.commit(repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial")
        return as_json({"url": f"{self.server.url}/{repo}"})

    def validate_yaml(self) -> Response:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.S)
        if front and isinstance(yaml.safe_load(front[1]), dict):
            return as_json({"errors": [], "warnings": []})
        return as_json({"errors": [{"message": "no metadata"}], "warnings": []}, 400)

    def info(self, repo: str, revision: str | None) -> Response:
        found = self.server.tree(repo, revision or "main")
        if found is None:
            return missing("Revision" if self.server.history(repo) else "Repo")
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
            | ({"lfs": {"sha256": etag(name, content), "size": len(content), "pointerSize": 1}} if is_lfs(name) else {})
            for name, content in found[1].items()
        ]
        return as_json({"id": repo, "sha": found[0], "siblings": siblings})

    def preupload(self, repo: str, revision: str) -> Response:
        found = self.server.tree(repo, revision)
        if found is None:
            return missing("Repo")
        files = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            oid = etag(path, found[1][path]) if path in found[1] else None
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    def batch(self, repo: str) -> Response:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.objects:
                names = {"upload": f"lfs/{item['oid']}", "verify": f"{repo}.git/info/lfs/verify"}
                item["actions"] = {name: {"href": f"{self.server.url}/{path}"} for name, path in names.items()}
        return as_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> Response:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return as_json({"error": "these bytes have another sha256"}, 400)
        self.server.objects[oid] = self.body
        return Response()

    def verify(self, repo: str) -> Response:
        item = json.loads(self.body)
        exists = len(self.server.objects.get(item["oid"], b"")) == item["size"]
        return as_json({}) if exists else as_json({"error": f"{item['oid']} was not uploaded"}, 404)

    def make_commit(self, repo: str, revision: str) -> Response:
        found = self.server.tree(repo, revision)
        if found is None:
            return missing("Repo")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        files = dict(found[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file" and not is_lfs(value["path"]):
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.server.objects:
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                return as_json({"error": f"{operation['key']} {value['path']} cannot be committed"}, 400)
        commit = self.server.commit(repo, files, header["value"]["summary"])
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return as_json({"success": True, "commitOid": commit, "commitUrl": url})

    def resolve(self, repo: str, revision: str, file: str) -> Response:
        found = self.server.tree(repo, revision)
        if found is None or file not in found[1]:
            return missing("Entry" if found else "Revision" if self.server.history(repo) else "Repo")
        content = found[1][file]
        headers = {"ETag": f'"{etag(file, content)}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Response(206 if start else 200, content[start:], headers)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_AT = r"(?P<revision>[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., Response]], ...] = (
    (r"GET /api/whoami-v2", Request.whoami),
    (r"POST /api/repos/create", Request.create),
    (r"POST /api/validate-yaml", Request.validate_yaml),
    (rf"GET /api/models/{_REPO}(?:/revision/{_AT})?", Request.info),
    (rf"POST /api/models/{_REPO}/preupload/{_AT}", Request.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Request.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Request.upload),
    (rf"POST /{_REPO}\.git/info/lfs/verify", Request.verify),
    (rf"POST /api/models/{_REPO}/commit/{_AT}", Request.make_commit),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/{_AT}/(?P<file>.+)", Request.resolve),
)


@contextmanager
def hub_double() -> Iterator[HubDouble]:
    """A running `HubDouble`."""
    with HubDouble() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
