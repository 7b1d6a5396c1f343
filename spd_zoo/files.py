"""Atomic writes of files and folders, and of tables as CSV."""

import csv
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["LEFTOVERS", "is_leftover", "remove_leftovers", "whole", "write_csv"]

LEFTOVERS = ".writing-*.tmp"  # a process that is killed inside `whole` leaves such a folder


@contextmanager
def whole(path: str | Path, within: str | Path | None = None) -> Iterator[Path]:
    """Writes a file or a folder atomically, as a context manager.

    The block writes to a temporary path, which has the name of `path` in a temporary folder. When the block ends
    without an exception, the result is renamed to `path`, and replaces a file or an empty folder there. A file is
    flushed to the disk first and gets the default mode of new files, whatever library wrote it.

    Args:
        path: The file or folder to write; its parent must exist.
        within: Folder for the temporary folder, on the same file system (default: the parent of `path`).

    Yields:
        The temporary path.

    Raises:
        OSError: If it cannot be written; `path` is then unchanged.
    """
    path = Path(path)
    folder = Path(within or path.parent) / f".writing-{os.urandom(6).hex()}.tmp"
    folder.mkdir()
    try:
        temporary = folder / path.name
        yield temporary
        if temporary.is_file():
            temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors and tempfile write 0600
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        if temporary.is_dir() and path.is_dir():
            path.rmdir()  # Windows cannot rename onto a folder, not even an empty one
        temporary.replace(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flushes a folder, so that new names in it survive a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_leftover(path: Path) -> bool:
    """Whether `path` is a temporary folder of a process that was killed inside `whole`."""
    return path.match(LEFTOVERS)


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary folders of processes that were killed inside `whole`.

    Args:
        folder: The folder that contains them; no other process may be writing there.
    """
    for leftover in folder.glob(LEFTOVERS):
        shutil.rmtree(leftover, ignore_errors=True)


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table as CSV (UTF-8), atomically.

    Args:
        path: The file to write.
        header: The names of the columns.
        rows: The cells of each row.

    Raises:
        OSError: If it cannot be written; `path` is then unchanged.
    """
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
