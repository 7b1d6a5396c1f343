"""From an entry of the manifest to a verified file: bundled with the package, or on the Hugging Face Hub."""

import hashlib
import re
import warnings
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from spd_zoo.weights.manifest import Entry

__all__ = ["BUNDLED", "WeightsError", "fetch", "sha256_of"]

BUNDLED = Path(__file__).parent / "bundled"
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40}):(?P<file>[\w.-]+(/[\w.-]+)*)")


class WeightsError(RuntimeError):
    """Weights that cannot be had or must not be used; the message says what is wrong and what to do."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """The file of `entry`, its SHA-256 checked; downloaded once if it is on the Hub.

    Args:
        entry: Which weights.
        cache_dir: Where to keep downloads; the Hugging Face cache unless given.

    Raises:
        WeightsError: If the file cannot be had, or is not the one that the manifest pins.
    """
    if entry.source is None:
        raise WeightsError(_no_source(entry))
    if entry.source.startswith("bundled:"):
        path = BUNDLED / entry.source.removeprefix("bundled:")
        if not path.is_file():
            raise WeightsError(f"{path}, the weights of {entry.name}, is missing: install spd-zoo again")
        _check(path, entry, "install spd-zoo again")
        return path
    path = _download(entry, cache_dir)
    if entry.sha256 is None:
        warnings.warn(f"the weights of {entry.name} are not verified: no sha256 is known for them", stacklevel=2)
    elif sha256_of(path) != entry.sha256:
        path = _download(entry, cache_dir, again=True)
        _check(path, entry, "the Hub serves another file than the manifest pins: do not use it, and report it")
    return path


def _check(path: Path, entry: Entry, advice: str) -> None:
    actual = sha256_of(path)
    if entry.sha256 != actual:
        raise WeightsError(
            f"{path}, the weights of {entry.name}, has sha256 {actual}, expected {entry.sha256}: it is truncated, "
            f"changed or another file. What to do: {advice}"
        )


def _download(entry: Entry, cache_dir: str | Path | None, again: bool = False) -> Path:
    """The file from the Hugging Face cache or, if it is not there or `again`, from the Hub."""
    match = _HUB.fullmatch(entry.source or "")
    if match is None:
        raise WeightsError(
            f"the source of {entry.name} is {entry.source!r}; it must be bundled:FILE or "
            "hf://ORG/REPO@<40-digit commit>:FILE"
        )
    repo, commit, file = match["repo"], match["commit"], match["file"]
    try:
        return Path(hf_hub_download(repo, file, revision=commit, cache_dir=cache_dir, force_download=again))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise WeightsError(
            f"cannot get the weights of {entry.name} from {entry.source} ({_reason(error)}). What to do: try again "
            f"online, or get {file} from {constants.ENDPOINT}/{repo}/resolve/{commit}/{file} by hand and load it with "
            f'pretrained_cfg_overlay={{"file": PATH}}'
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _no_source(entry: Entry) -> str:
    if entry.original_link is None:
        return f"there are no weights for {entry.name}; create it with pretrained=False"
    return (
        f"the weights of {entry.name} are on the authors' page only and not verified (no sha256 is known): get "
        f"{entry.original_link} by hand, check that it is what you expect, and load it with "
        f'pretrained_cfg_overlay={{"file": PATH}}'
    )
