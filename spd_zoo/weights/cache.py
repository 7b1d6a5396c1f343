"""Where the weights of an entry are on this machine: in a package, imported, or in the Hugging Face cache.

Needs neither torch nor huggingface_hub, so that `spd-zoo weights list` starts at once.
"""

import hashlib
import json
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from spd_zoo.weights.manifest import Entry, WeightsError, entries

__all__ = [
    "BUNDLED",
    "HUB_SOURCE",
    "find",
    "find_imported",
    "find_in_hub_cache",
    "import_folder",
    "imported_files",
    "imported_names",
    "is_right",
    "origin_of",
    "original_of",
    "sha256_in_name",
    "sha256_of",
    "sources",
    "verified_import",
]

BUNDLED = Path(__file__).parent / "bundled"
_NAME = r"\w[\w.-]*"  # neither "..", nor hidden, nor absolute
_BUNDLED_SOURCE = re.compile(rf"bundled:(?P<file>{_NAME})", re.ASCII)
_PACKAGE_SOURCE = re.compile(rf"package:(?P<package>{_NAME}):(?P<file>{_NAME}(/{_NAME})*)", re.ASCII)
HUB_SOURCE = re.compile(
    rf"hf://(?P<repo>{_NAME}/{_NAME})@(?P<commit>[0-9a-f]{{40}}):(?P<file>{_NAME}(/{_NAME})*)", re.A
)
_LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def original_of(entry: Entry) -> Entry:
    """The entry whose file is loaded: `entry`, or the one that it is derived from."""
    return entry if entry.derived_from is None else entries()[entry.derived_from]


def find(entry: Entry, cache_dir: str | Path | None = None) -> Path | None:
    """Finds the file of an entry on this machine: in a package, imported, or in the Hugging Face cache.

    Args:
        entry: The weights.
        cache_dir: Where to look for downloads (default: the Hugging Face cache).

    Returns:
        The file, whose contents are not checked; None if there is none.
    """
    entry = original_of(entry)
    installed, hub = sources(entry)
    if installed:
        path = _installed_file(installed)
        return path if path is not None and path.is_file() else None
    imported = find_imported(entry.name, cache_dir)
    if imported and (hub is None or entry.sha256 in (None, sha256_in_name(imported))):
        return imported
    return find_in_hub_cache(hub, cache_dir) if hub else None


def is_right(entry: Entry, path: Path, cache_dir: str | Path | None = None) -> bool | None:
    """Whether a file has the SHA-256 that is expected of the weights of an entry.

    That is the manifest's. Only an imported file that was converted has another one, which is in its name; its metadata
    says from which file it was made.

    Args:
        entry: The weights.
        path: The file.
        cache_dir: Where imported files are (default: next to the Hugging Face cache).

    Returns:
        True or False; None if no SHA-256 is known.
    """
    entry = original_of(entry)
    if not path.is_file():
        return False
    is_imported = path.parent.resolve() == import_folder(cache_dir).resolve()  # any other file may have any name
    in_name = sha256_in_name(path) if is_imported and not entry.verified else None
    expected = in_name or entry.sha256
    if expected is None:
        return None
    if sha256_of(path) != expected:
        return False
    return in_name is None or entry.sha256 in (None, origin_of(path).get("original_sha256"))


def sources(entry: Entry) -> tuple[re.Match[str] | None, re.Match[str] | None]:
    """Parses the source of an entry.

    Args:
        entry: The weights.

    Returns:
        A match for a file that this package or another one installs, and a match for a file on the Hub; at most one
        of them is not None.

    Raises:
        WeightsError: If the source is neither.
    """
    if entry.source is None:
        return None, None
    installed = _BUNDLED_SOURCE.fullmatch(entry.source) or _PACKAGE_SOURCE.fullmatch(entry.source)
    hub = HUB_SOURCE.fullmatch(entry.source)
    if not installed and not hub:
        raise WeightsError(
            f"the source of {entry.name} is {entry.source!r}; "
            "it must be bundled:FILE, package:NAME:FILE or hf://ORG/REPO@<40-digit commit>:FILE"
        )
    return installed, hub


def _installed_file(source: re.Match[str]) -> Path | None:
    """The path of a file in an installed package, which is not imported; None if the package is not installed."""
    package = source.groupdict().get("package")
    if package is None:
        return BUNDLED / source["file"]
    try:
        return Path(str(distribution(package).locate_file(source["file"])))
    except PackageNotFoundError:
        return None


def _hugging_face_folder(name: str) -> Path:
    """The folder "HUB_CACHE" or "ASSETS_CACHE" of huggingface_hub, by its rules but without importing it."""
    if constants := sys.modules.get("huggingface_hub.constants"):  # the program may have changed them
        return Path(getattr(constants, f"HF_{name}"))
    home = os.environ.get("XDG_CACHE_HOME", str(Path("~", ".cache")))
    home = os.environ.get("HF_HOME", str(Path(home, "huggingface")))
    default = Path(home, {"HUB_CACHE": "hub", "ASSETS_CACHE": "assets"}[name])
    folder = os.environ.get(f"HF_{name}", os.environ.get(f"HUGGINGFACE_{name}", str(default)))
    return Path(os.path.expandvars(folder)).expanduser()


def find_in_hub_cache(source: re.Match[str], cache_dir: str | Path | None) -> Path | None:
    """The file of a `HUB_SOURCE` in the Hugging Face cache."""
    folder = Path(cache_dir or _hugging_face_folder("HUB_CACHE"), f"models--{source['repo'].replace('/', '--')}")
    file = folder / "snapshots" / source["commit"] / source["file"]
    return file if file.is_file() else None


def import_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of imported files: in `cache_dir`, or next to Hugging Face's other downloads."""
    return Path(cache_dir or _hugging_face_folder("ASSETS_CACHE")) / "spd_zoo"


def sha256_in_name(file: Path) -> str | None:
    """The SHA-256 that an imported file must have; None for any other file."""
    found = re.search(r"\.([0-9a-f]{64})\.safetensors$", file.name)
    return found[1] if found else None


def imported_names(cache_dir: str | Path | None = None) -> list[str]:
    """Every name under which a file was imported."""
    files = import_folder(cache_dir).glob("*.safetensors")
    return sorted({file.name.rsplit(".", 2)[0] for file in files if sha256_in_name(file)})


def find_imported(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The file that was imported under this name last."""
    return max(imported_files(name, import_folder(cache_dir)), key=_time, default=None)


def _time(file: Path) -> int:
    """When a file was written; 0 if another process has just deleted it."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def verified_import(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The file that was imported under this name last, after checking its SHA-256.

    Raises:
        WeightsError: If it is damaged, or another process deletes it now.
    """
    found = find_imported(name, cache_dir)
    try:
        damaged = found is not None and sha256_of(found) != sha256_in_name(found)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{found} is being deleted, because {name} is imported again or removed; run this again afterwards"
        ) from error
    if damaged:
        raise WeightsError(f"{found} is damaged, its sha256 is not that of its name; import the weights again")
    return found


def imported_files(name: str, folder: Path) -> list[Path]:
    """All files in `folder` that were imported under this name."""
    files = folder.glob(f"{name}.*.safetensors")
    return [file for file in files if sha256_in_name(file) and file.name.rsplit(".", 2)[0] == name]


def origin_of(file: Path) -> dict[str, str]:
    """An imported file's metadata: `origin`, `original_sha256`, `date`, `license`; empty if the file is damaged."""
    try:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(size)) if size <= _LARGEST_HEADER else None
    except (OSError, ValueError, RecursionError):
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}
