"""Downloads files from the Hugging Face Hub, from the authors' links and from users' addresses.

No other code here downloads anything, except that OpenCV opens the streams that a user names.

Temporary failures (a broken connection, an overloaded server) are retried a few times.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of the Hub's client, httpx or httpx2
from tqdm import tqdm

from spd_zoo.console import bar_disabled, is_quiet
from spd_zoo.weights.manifest import WeightsError

__all__ = ["DownloadError", "download", "download_bytes", "download_from_hub", "hub_url", "page_or_pointer", "public"]

_TRIES = 4
_TIMEOUT = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 4))  # seconds to wait for a server's first answer
_PAUSES = (_TIMEOUT, float(constants.HF_HUB_DOWNLOAD_TIMEOUT), 60.0, _TIMEOUT)  # connect, read, write, pool
# what the Hub's client raises for an address that is none; it does not belong to its other errors
_InvalidURL: type[Exception] = import_module(HTTPError.__module__.partition(".")[0]).InvalidURL
_LONGEST_PAUSE = 30.0  # seconds, if the server asks for one

T = TypeVar("T")


class DownloadError(WeightsError):
    """A file that cannot be downloaded now; the message is only the reason, for use inside a sentence."""


def page_or_pointer(start: bytes) -> str | None:
    """Describes a web page or git-lfs pointer by its first bytes; None for any other file."""
    if start[7:9] == b"\0{":  # safetensors, which begin with the length of their header; its bytes may look like text
        return None
    text = start.removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe").lstrip()
    if text.startswith(b"<"):
        return "a web page (a quota that is used up, a login, a question)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, which only refers to a file"
    return None


def public(address: str) -> str:
    """An address without user and password.

    Raises:
        ValueError: If it is no address.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:  # such as a bracket that is not closed
        raise ValueError(f"{_without_password(address)} is no address: {error}") from error
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _without_password(text: str) -> str:
    """A text that may contain addresses, without users and passwords in them."""
    return re.sub(r"(?<=://)[^\s/?#]*@", "", text)


def hub_url(source: re.Match[str]) -> str:
    """The address at which a browser downloads the file of a `HUB_SOURCE`."""
    return hf_hub_url(source["repo"], source["file"], revision=source["commit"])


def download_from_hub(source: re.Match[str], cache_dir: str | Path | None, again: bool = False) -> Path:
    """Downloads the file of a `HUB_SOURCE` to the Hugging Face cache, if it is not there.

    Args:
        source: A match of `HUB_SOURCE`.
        cache_dir: The cache (default: the Hugging Face cache).
        again: Download the file even if it is there.

    Returns:
        The file.

    Raises:
        DownloadError: If it cannot be downloaded; with the reason.
    """
    if constants.HF_HUB_OFFLINE:
        raise DownloadError("OfflineModeIsEnabled: HF_HUB_OFFLINE is set")

    def get() -> Path:
        get_hf_file_metadata(hub_url(source), timeout=_TIMEOUT)  # hf_hub_download alone waits minutes for a server
        file = hf_hub_download(
            source["repo"], source["file"], revision=source["commit"], cache_dir=cache_dir, force_download=again
        )
        return Path(file)

    return _with_retries(get)


def download(link: str, file: str | None, path: Path) -> None:
    """Downloads a link.

    Args:
        link: A file or folder on Google Drive, or any HTTPS file.
        file: The file's name, if `link` is a folder.
        path: The file to write.

    Raises:
        DownloadError: If it cannot be downloaded, with the reason, or is a web page.
    """
    if constants.HF_HUB_OFFLINE:
        raise DownloadError("OfflineModeIsEnabled: HF_HUB_OFFLINE is set")
    if "drive.google.com" in link:
        _download_from_drive(link, file, path)
    else:
        _with_retries(lambda: _download_from_server(link, path))
    with path.open("rb") as content:
        what = page_or_pointer(content.read(512))
    if what:
        raise DownloadError(f"{public(link)} answered with {what}, instead of the file")


def download_bytes(address: str, most: int, seconds: float) -> bytes:
    """The file at an http or https address that a user names.

    Args:
        address: The address.
        most: Its maximum size in bytes.
        seconds: How long the download may take.

    Raises:
        DownloadError: If it cannot be downloaded, with the reason, or is too large or a web page.
    """
    if constants.HF_HUB_OFFLINE:
        raise DownloadError("OfflineModeIsEnabled: HF_HUB_OFFLINE is set")

    def get() -> bytes:
        content, end = bytearray(), time.monotonic() + seconds
        with get_session().stream("GET", address, timeout=_PAUSES, follow_redirects=True) as response:
            response.raise_for_status()
            for block in response.iter_bytes():  # as they come, so that a server that trickles is noticed
                content += block
                if len(content) > most:
                    raise DownloadError(f"it has more than {most / 2**20:.0f} MiB")
                if time.monotonic() > end:
                    raise DownloadError(f"it takes more than {seconds:.0f} seconds")
        return bytes(content)

    content = _with_retries(get)
    what = page_or_pointer(content[:512])
    if what:
        raise DownloadError(f"the server answered with {what}")
    return content


def _download_from_server(link: str, path: Path) -> None:
    with get_session().stream("GET", link, timeout=_PAUSES, follow_redirects=True) as response, path.open("wb") as out:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(
            desc=path.stem, total=size, unit="B", unit_scale=True, leave=False, disable=bar_disabled()
        ) as progress:
            for block in response.iter_bytes(2**20):
                progress.update(out.write(block))


def _download_from_drive(link: str, file: str | None, path: Path) -> None:
    try:
        import gdown
    except ImportError as error:
        raise DownloadError("Google Drive needs the package gdown: pip install 'spd-zoo[gdrive]'") from error

    def get() -> None:
        url, timeout = link, (_TIMEOUT, 60.0)  # to connect, and between bytes
        if "/folders/" in link:
            listed: Any = gdown.download_folder(link, skip_download=True, quiet=True, timeout=timeout)
            ids = {Path(item.path).name: item.id for item in listed}
            if file is None:
                raise DownloadError(f"it is a folder with {', '.join(sorted(ids))}; give the link of one file in it")
            if file not in ids:
                raise DownloadError(f"the folder holds {', '.join(sorted(ids)) or 'nothing'}, and no {file}")
            url = f"https://drive.google.com/uc?id={ids[file]}"
        gdown.download(url, str(path), timeout=timeout, use_cookies=False, quiet=is_quiet() or not sys.stderr.isatty())

    _with_retries(get, gdown.DownloadError)


def _with_retries(get: Callable[[], T], vague: type[Exception] = ConnectionError) -> T:
    """Calls `get`, and retries it after temporary errors; `vague` errors, which give no reason, count as temporary."""
    attempt = 0
    while True:
        try:
            return get()
        except (HTTPError, _InvalidURL, OSError, ValueError, vague) as error:
            pause = 0.5 * 2**attempt if isinstance(error, vague) else _pause(error, attempt)
            attempt += 1
            if attempt == _TRIES or pause is None:
                raise DownloadError(_reason(error)) from error
            time.sleep(pause)


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before a retry; None if a retry cannot succeed."""
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code not in (408, 429) and response.status_code < 500:
            return None
        requested = response.headers.get("Retry-After", "")
        seconds = float(requested) if requested.isdigit() else 0.5 * 2**attempt
        return seconds if seconds <= _LONGEST_PAUSE else None
    if type(error).__name__ in ("ReadTimeout", "ConnectTimeout"):
        return 0.0 if attempt == 0 else None  # more tries would take too long
    broken = type(error).__name__ in _BROKEN_CONNECTIONS
    wrong_length = type(error) is OSError and error.errno is None  # as huggingface_hub raises it
    return 0.5 * 2**attempt if broken or wrong_length else None


# Names of exceptions that httpx, httpx2 and requests (used by gdown) share.
_BROKEN_CONNECTIONS = {
    *("ConnectError", "ReadError", "WriteError", "CloseError", "RemoteProtocolError"),
    *("ConnectionError", "ChunkedEncodingError"),
}


def _reason(error: Exception) -> str:
    """An error in one line, for use inside a sentence."""
    text = _without_password(" ".join(str(error).split()).rstrip("."))
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
