"""Files that exist, atomic writes of files and folders, tables as CSV, and settings as YAML with limits on its cost."""

import csv
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "LEFTOVERS",
    "compose_yaml",
    "exists",
    "is_file",
    "is_folder",
    "is_leftover",
    "read_yaml",
    "remove_leftovers",
    "whole",
    "write_csv",
]

LEFTOVERS = ".writing-*.tmp"  # a process that is killed inside `whole` leaves such a folder
_YAML_BYTES, _YAML_VALUES = 2**20, 50_000  # at most: of a file
_YAML_DEPTH, _YAML_LENGTH = 20, 10_000  # at most: collections in each other, characters of a value


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder; False, too, for over-long or forbidden paths, for which pathlib raises."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file; False as for `exists`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder; False as for `exists`."""
    return os.path.isdir(path)  # noqa: PTH112


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
        ValueError: If `path` is the current folder, which cannot be replaced.
    """
    path = Path(path)
    if path.is_dir() and path.samefile(Path()):
        raise ValueError(f"{path} is the current folder, which cannot be replaced; give the name of a new folder")
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


def compose_yaml(file: Path) -> yaml.Node | None:
    """The nodes of a YAML file in UTF-8, whose scalars are still text; None for an empty file.

    Files that would take long or much memory are refused: large or deep ones, and aliases of lists and mappings, which
    a few lines can nest to more elements than memory holds.

    Args:
        file: The file.

    Returns:
        The root node.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not YAML, or is refused.
    """
    with file.open("rb") as opened:
        content = opened.read(_YAML_BYTES + 1)
    if len(content) > _YAML_BYTES:
        raise ValueError(f"{file} has more than {_YAML_BYTES} bytes, too many for settings in YAML")
    parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # some builds of PyYAML lack the one in C
    depth, values, scalars = 0, 0, set()
    try:
        text = content.decode("utf-8-sig")
        for event in yaml.parse(text, parser):  # without recursion, unlike composing
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _YAML_DEPTH:
                raise ValueError(f"{file} nests lists and mappings more than {_YAML_DEPTH} deep")
            if isinstance(event, yaml.ScalarEvent):
                scalars.add(event.anchor)
                values += 1
                if values > _YAML_VALUES or len(event.value) > _YAML_LENGTH:
                    raise ValueError(
                        f"{file} has more than {_YAML_VALUES} values, or one of more than {_YAML_LENGTH} characters"
                    )
            elif isinstance(event, yaml.AliasEvent) and event.anchor not in scalars:
                raise ValueError(f"{file} repeats a list or mapping by the alias *{event.anchor}; write it out")
        return yaml.compose(text, parser)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not YAML in UTF-8: {' '.join(str(error).split())}") from error


def read_yaml(file: Path) -> Any:
    """What a YAML file holds, under the limits of `compose_yaml`; None for an empty file.

    Args:
        file: The file.

    Returns:
        Dicts, lists, texts, numbers, dates, booleans and None.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not YAML, or is refused.
    """
    node = compose_yaml(file)
    try:
        return None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
    except (ArithmeticError, ValueError, yaml.YAMLError) as error:  # such as the date 2024-13-13
        raise ValueError(f"{file} has a value that is not YAML: {' '.join(str(error).split())}") from error
