"""From an entry of the manifest to a verified file: in the package, on the Hugging Face Hub or at the authors'."""

import hashlib
import re
import tempfile
import warnings
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of the Hub's client, httpx or httpx2

from spd_zoo.weights.manifest import Entry

__all__ = ["BUNDLED", "WeightsError", "fetch", "sha256_of"]

BUNDLED = Path(__file__).parent / "bundled"
_NAME = r"\w[\w.-]*"  # neither "..", nor hidden, nor absolute
_BUNDLED_SOURCE = re.compile(rf"bundled:(?P<file>{_NAME})")
_HUB_SOURCE = re.compile(rf"hf://(?P<repo>{_NAME}/{_NAME})@(?P<commit>[0-9a-f]{{40}}):(?P<file>{_NAME}(/{_NAME})*)")
_PATIENCE = 4.0  # seconds to wait for the first answer of a server


class WeightsError(RuntimeError):
    """Weights that cannot be had or must not be used; the message says what is wrong and what to do."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fetch(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """The file of `entry`, its SHA-256 checked; what is not in the package is downloaded once.

    Warns if the file is not verified, because no SHA-256 is known for it.

    Args:
        entry: Which weights.
        cache_dir: Where to keep downloads; the Hugging Face cache unless given.

    Raises:
        WeightsError: If the file cannot be had, or is not the one that the manifest pins.
    """
    source = entry.source or ""
    bundled, hub = _BUNDLED_SOURCE.fullmatch(source), _HUB_SOURCE.fullmatch(source)
    if bundled:
        path, advice = BUNDLED / bundled["file"], "install spd-zoo again"
        if not path.is_file():
            raise WeightsError(
                f"{path}, the weights of {entry.name}, is missing (expected sha256 {entry.sha256}). "
                f"What to do: {advice}"
            )
    elif hub:
        path = _from_hub(entry, hub, cache_dir)
        advice = "do not use it, and report that the Hub serves another file than the manifest pins"
    elif source:
        raise WeightsError(
            f"the source of {entry.name} is {source!r}; it must be bundled:FILE or hf://ORG/REPO@<40-digit commit>:FILE"
        )
    elif entry.original_link:
        path = _from_authors(entry, entry.original_link, cache_dir)
        advice = f"delete it and try again; if that does not help, {entry.original_link} is not what it was"
    else:
        raise WeightsError(f"there are no weights for {entry.name}; create it with pretrained=False")

    if entry.sha256 is None:
        warnings.warn(
            f"the weights of {entry.name} ({path}) are not verified: nobody here has seen the authors' file, so no "
            "sha256 is known, and neither their accuracy nor that they fit was checked",
            stacklevel=2,
        )
        return path
    actual = sha256_of(path)
    if actual != entry.sha256 and hub:
        try:
            path = _from_hub(entry, hub, cache_dir, again=True)
            actual = sha256_of(path)
        except WeightsError as error:
            advice = f"delete it, or try again online; now it could not be downloaded again: {error}"
    if actual != entry.sha256:
        raise WeightsError(
            f"{path}, the weights of {entry.name}, has sha256 {actual}, expected {entry.sha256}: it is truncated, "
            f"changed or another file. What to do: {advice}"
        )
    return path


def _from_hub(entry: Entry, source: re.Match[str], cache_dir: str | Path | None, again: bool = False) -> Path:
    """The file from the Hugging Face cache or, if it is not there or `again`, from the Hub."""
    repo, commit, file = source["repo"], source["commit"], source["file"]
    cached = try_to_load_from_cache(repo, file, cache_dir, commit)
    if isinstance(cached, str) and not again:
        return Path(cached)
    url = hf_hub_url(repo, file, revision=commit)
    try:
        get_hf_file_metadata(url, timeout=_PATIENCE)  # asks once; offline, hf_hub_download asks for half a minute
        return Path(hf_hub_download(repo, file, revision=commit, cache_dir=cache_dir, force_download=again))
    except (HTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"cannot get the weights of {entry.name} from {entry.source} ({_reason(error)}). What to do: try again "
            f"online, or get {url} by hand (expected sha256 {entry.sha256}) and load it with {_by_hand(entry)}"
        ) from error


def _from_authors(entry: Entry, link: str, cache_dir: str | Path | None) -> Path:
    """The authors' file from Google Drive, or where an earlier download put it."""
    path = Path(cache_dir or constants.HF_ASSETS_CACHE) / "spd_zoo" / "originals" / f"{entry.name}.pth"
    if path.is_file():
        return path
    file = f"{entry.original_file} " if entry.original_file else "it "
    by_hand = f"get {file}from {link} by hand, check that it is what you expect, and load it with {_by_hand(entry)}"
    if "/folders/" in link or "://drive.google.com/" not in link:
        place = "in a folder" if "/folders/" in link else "on a page"
        raise WeightsError(
            f"the weights of {entry.name} are {place} of the authors', not verified. What to do: {by_hand}"
        )
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"cannot download the authors' weights of {entry.name}: HF_HUB_OFFLINE is set. What to do: {by_hand}"
        )
    try:
        import gdown
    except ImportError as error:
        raise WeightsError(
            f"the weights of {entry.name} are on the authors' Google Drive only, not verified. What to do: "
            f"pip install 'spd-zoo[originals]' and try again, or {by_hand}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        try:
            gdown.download(link, str(part), timeout=(_PATIENCE, 60.0))  # to connect, and between bytes
            part.replace(path)
        except (gdown.DownloadError, OSError) as error:
            raise WeightsError(
                f"cannot download the authors' weights of {entry.name} ({_reason(error)}). "
                f"What to do: try again online, or {by_hand}"
            ) from error
    return path


def _by_hand(entry: Entry) -> str:
    return f'timm.create_model("{entry.name}", pretrained=True, pretrained_cfg_overlay={{"file": PATH}})'


def _reason(error: Exception) -> str:
    """The first line of an error, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
