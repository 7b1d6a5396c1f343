"""A local imitation of Google Drive, to which gdown is connected by a proxy setting.

gdown uses HTTPS with drive.google.com; the imitation answers under this name, with a certificate of its own authority.
"""

import html
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme

HOSTS = ("drive.google.com", "drive.usercontent.google.com")


class DriveDouble(ThreadingHTTPServer):
    """The proxy and the server.

    Attributes:
        files: Content by file ID.
        folders: For each folder ID, file IDs by name.
        scanned: IDs of files that are too large for a virus scan; a page asks for confirmation.
        over_quota: IDs of files that were downloaded too often; a page says so.
        failures: HTTP statuses of the next answers.
        requests: Host and path of every request.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.folders: dict[str, dict[str, str]] = {}
        self.scanned: set[str] = set()
        self.over_quota: set[str] = set()
        self.failures: list[int] = []
        self.requests: list[str] = []
        authority = trustme.CA()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(self.tls)
        bundle = folder / "authority.pem"
        authority.cert_pem.write_to_path(bundle)
        proxy = f"http://127.0.0.1:{self.server_port}"
        self.environment = {"HTTPS_PROXY": proxy, "https_proxy": proxy, "REQUESTS_CA_BUNDLE": str(bundle)}


class _Handler(BaseHTTPRequestHandler):
    server: DriveDouble
    protocol_version = "HTTP/1.1"

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path.partition(":")[0] not in HOSTS:
            self.close_connection = True
            return
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def finish(self) -> None:
        super().finish()
        self.connection.close()  # the TLS connection, if there is one

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.headers['Host']}{self.path}")
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        name = query.get("id", [""])[0]
        if self.server.failures:
            self.answer(self.server.failures.pop(0), b"busy", {"Content-Type": "text/html"})
        elif path == "/embeddedfolderview" and name in self.server.folders:
            files = self.server.folders[name].items()
            links = "".join(
                f'<a href="https://drive.google.com/file/d/{i}/view">{html.escape(n)}</a>' for n, i in files
            )
            self.page(f"<html><title>weights</title><body>{links}</body></html>")
        elif name in self.server.over_quota:
            self.page(
                '<html><body><p class="uc-error-subcaption">Too many users have viewed this file.</p></body></html>'
            )
        elif path == "/uc" and name in self.server.scanned:
            fields = f'<input type="hidden" name="id" value="{name}"><input type="hidden" name="confirm" value="t">'
            action = "https://drive.usercontent.google.com/download"
            self.page(f'<html><body><form id="download-form" action="{action}">{fields}</form></body></html>')
        elif path in ("/uc", "/download") and name in self.server.files:
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Disposition": 'attachment; filename="a.pth"',
            }
            self.answer(200, self.server.files[name], headers)
        else:
            self.answer(404, b"<html>not found</html>", {"Content-Type": "text/html"})

    def page(self, text: str) -> None:
        self.answer(200, text.encode(), {"Content-Type": "text/html; charset=utf-8"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


@contextmanager
def drive_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[DriveDouble]:
    """A running `DriveDouble` that this process uses as Google Drive."""
    with tempfile.TemporaryDirectory() as folder, DriveDouble(Path(folder)) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
