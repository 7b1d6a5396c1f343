"""From an entry of the manifest to a verified file: in a package, on the Hugging Face Hub or from the authors."""

import re
import warnings
from pathlib import Path

from spd_zoo.weights.cache import BUNDLED, HUB_SOURCE, find, is_right, original_of, sha256_of, sources
from spd_zoo.weights.download import DownloadError, download, download_from_hub, hub_url, public
from spd_zoo.weights.imported import import_file, locked, tagged
from spd_zoo.weights.manifest import Entry, WeightsError, find_entry

__all__ = ["fetch", "import_weights", "remove"]


def fetch(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """Returns the file of an entry, after checking its SHA-256; downloads it if it is not on this machine.

    A damaged file is downloaded once more. The authors' file is converted to our keys. Warns if no SHA-256 is known
    for the file. The file of a derived entry is that of its original.

    Args:
        entry: The weights.
        cache_dir: Where to keep downloads (default: the Hugging Face cache).

    Returns:
        The file.

    Raises:
        WeightsError: If the file cannot be downloaded, or is not the one that the manifest pins.
    """
    entry = original_of(entry)
    installed, hub = sources(entry)
    path = find(entry, cache_dir)
    right = None if path is None else is_right(entry, path, cache_dir)
    if path is None and installed:
        raise _missing(entry, installed)
    if path is not None and installed and not right:
        package = installed.groupdict().get("package")
        again = f"run: pip install --force-reinstall --no-deps {package}" if package else "install spd-zoo again"
        raise _wrong(entry, path, again)
    if path is None or right is False:
        path = _get(entry, hub, path, cache_dir)
        right = is_right(entry, path, cache_dir)
        if right is False:
            raise _wrong(
                entry, path, "do not use it, and report that the server sends another file than the manifest pins"
            )
    if right is None:
        warnings.warn(
            f"the weights of {entry.name} ({path}) are not verified: no sha256 is known, and neither their accuracy "
            "nor that they fit was checked",
            stacklevel=2,
        )
    return path


def _missing(entry: Entry, source: re.Match[str]) -> WeightsError:
    package = source.groupdict().get("package")
    if package is None:
        return WeightsError(
            f"{BUNDLED / source['file']}, the weights of {entry.name}, is missing (expected sha256 {entry.sha256}). "
            "What to do: install spd-zoo again"
        )
    install = f"'spd-zoo[{entry.extra}]'" if entry.extra else package
    return WeightsError(
        f"the weights of {entry.name} come with the package {package}, which is not installed or lacks "
        f"{source['file']}. What to do: pip install {install}"
    )


def _get(entry: Entry, hub: re.Match[str] | None, damaged: Path | None, cache_dir: str | Path | None) -> Path:
    """Downloads the file of `entry`; processes that wait for the lock then find it."""
    if damaged is None and entry.replaced_by:
        raise WeightsError(
            f"the weights {entry.name} are not distributed any more; use {entry.replaced_by}, which replaced them, or "
            f"train them again: {entry.train_again}"
        )
    if hub is None and entry.original_link is None:
        if damaged is not None:
            raise _wrong(entry, damaged, f"import it again: spd-zoo weights import {entry.name} FILE")
        raise WeightsError(
            f"there are no weights for {entry.name}; create it with pretrained=False, or train it: `spd-zoo finetune "
            f"{entry.name} --data DIR --out RUN`"
        )
    with locked(entry.name, cache_dir) as folder:
        path = find(entry, cache_dir)
        if path is not None and is_right(entry, path, cache_dir) is not False:
            return path
        downloaded = folder / f"{entry.name}.original"
        try:
            if hub:
                if path is None:
                    path = download_from_hub(hub, cache_dir)
                if is_right(entry, path, cache_dir) is False:
                    path = download_from_hub(hub, cache_dir, again=True)
                return path
            download(str(entry.original_link), entry.original_file, downloaded)
            return _import(entry, downloaded, cache_dir)
        except DownloadError as error:
            raise _unavailable(entry, hub, damaged, error) from error
        finally:
            downloaded.unlink(missing_ok=True)


def import_weights(name: str, file: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Imports a file, or downloads and imports a link (https, Google Drive, hf://ORG/REPO@COMMIT:FILE).

    Args:
        name: The network, with or without a tag; for a derived entry, its original is imported.
        file: The file or link.
        cache_dir: Where to keep the result (default: next to the Hugging Face cache).

    Returns:
        The imported file.

    Raises:
        WeightsError: If it cannot be downloaded, cannot be read or does not fit; then nothing is kept.
    """
    name = tagged(name)
    entry = find_entry(name)
    name = name if entry is None else original_of(entry).name
    hub = HUB_SOURCE.fullmatch(str(file))
    if hub is None and not re.match("https?://", str(file)):
        if re.match(r"[\w+.-]{2,}://", str(file)):
            raise WeightsError(
                f"{file} is no link that can be imported; give a path, https://..., or "
                "hf://ORG/REPO@<40-digit commit>:FILE"
            )
        return import_file(name, Path(file), cache_dir=cache_dir)
    try:
        origin = str(file) if hub else public(str(file))
    except ValueError as error:
        raise WeightsError(str(error)) from error
    with locked(name, cache_dir) as folder:
        downloaded = folder / f"{name}.original"
        try:
            if hub:
                return import_file(name, download_from_hub(hub, cache_dir), origin, cache_dir)
            download(str(file), None, downloaded)
            return import_file(name, downloaded, origin, cache_dir)
        except DownloadError as error:
            raise WeightsError(
                f"cannot download {origin} ({error}). What to do: try again online, or get the file by hand and run: "
                f"spd-zoo weights import {name} FILE"
            ) from error
        finally:
            downloaded.unlink(missing_ok=True)


def _import(entry: Entry, original: Path, cache_dir: str | Path | None) -> Path:
    """Converts the authors' file that was just downloaded."""
    origin = " ".join(filter(None, (entry.original_link, entry.original_file)))
    path = import_file(entry.name, original, origin, cache_dir)
    if entry.sha256 is None:
        warnings.warn(
            f"the weights of {entry.name} came from {origin} and fit, but no sha256 is known for the file: "
            "neither its contents nor its accuracy were verified",
            stacklevel=4,
        )
    return path


def _unavailable(entry: Entry, hub: re.Match[str] | None, damaged: Path | None, reason: DownloadError) -> WeightsError:
    if damaged is not None:
        return _wrong(entry, damaged, f"delete it, or try again online; now it cannot be replaced: {reason}")
    url = hub_url(hub) if hub else f"{entry.original_link}"
    which = f" the file {entry.original_file} of" if entry.original_file else ""
    expected = f" (expected sha256 {entry.sha256})" if entry.sha256 else ""
    return WeightsError(
        f"cannot get the weights of {entry.name} from {entry.source or url} ({reason}). What to do: try again online, "
        f"or get{which} {url} by hand{expected} and run: spd-zoo weights import {entry.name} FILE"
    )


def _wrong(entry: Entry, path: Path, advice: str) -> WeightsError:
    expected = entry.sha256 if entry.verified else "that of its name"
    found = f"has sha256 {sha256_of(path)}" if path.is_file() else "is no file"
    return WeightsError(
        f"{path}, the weights of {entry.name}, {found}, expected {expected}: it is truncated, changed or another file. "
        f"What to do: {advice}"
    )


def remove(entry: Entry, cache_dir: str | Path | None = None) -> Path | None:
    """Deletes the file of an entry from the user's cache.

    Args:
        entry: The weights.
        cache_dir: Where downloads are (default: the Hugging Face cache).

    Returns:
        The path of the deleted file; None if there was none.

    Raises:
        WeightsError: If the file belongs to a package, or to the entry that this one is derived from.
    """
    if entry.derived_from is not None:
        raise WeightsError(f"the weights of {entry.name} are those of {entry.derived_from}; delete these instead")
    installed, _ = sources(entry)
    if installed:
        package = installed.groupdict().get("package") or "spd-zoo"
        raise WeightsError(
            f"the weights of {entry.name} belong to {package} and cannot be removed; uninstall that instead"
        )
    path = find(entry, cache_dir)
    if path is None:
        return None
    blob = path.resolve()  # in the Hugging Face cache, the target of the snapshot's link
    path.unlink()
    if blob != path.absolute() and blob.is_file():
        snapshots = blob.parents[1] / "snapshots"
        if not any(link.resolve() == blob for link in snapshots.rglob("*") if link.is_symlink()):
            blob.unlink()
    return path
