"""Shared by the readers of all formats: images in folders, folders of splits, and files whose paths are stale."""

import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from spd_zoo.data.classes import DataError
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import SUFFIXES, ImageFilter, files_in
from spd_zoo.data.splits import find_split, split_of

__all__ = [
    "child",
    "files_with",
    "find_moved",
    "folders_in",
    "folders_of_split",
    "hidden_in",
    "images_in",
    "is_hidden",
    "relative_to",
    "several_files",
    "spellings",
    "split_folders",
    "text_of",
    "unread_folders",
    "without_annotation",
]

_ANNOTATIONS = (".txt", ".xml", ".json", ".csv", ".labels", ".names", ".yaml", ".yml", ".data")  # beside images


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is hidden, such as the files that macOS creates beside others."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def folders_in(folder: Path) -> dict[str, Path]:
    """The folders in a folder, if there are any, by their names."""
    return {entry.name: entry for entry in sorted(folder.glob("*")) if entry.is_dir() and not is_hidden(entry, folder)}


def child(folder: Path, *names: str) -> Path | None:
    """The folder in `folder` with one of these names in any case, the first name first."""
    found = {name.lower(): path for name, path in folders_in(folder).items()}
    return next((found[name.lower()] for name in names if name.lower() in found), None)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by their names, if any of them is named like a split."""
    found = folders_in(folder)
    return found if any(map(split_of, found)) else {}


def folders_of_split(folder: Path, split: str) -> list[Path]:
    """The folders in a folder that are named like a split, or else like another name of the same split."""
    found = folders_in(folder)
    return [found[name] for name in find_split(found, split) or find_split(found, split_of(split) or split)]


def unread_folders(folder: Path, splits: Iterable[str]) -> list[str]:
    """A note on folders beside those of the splits."""
    others = [name for name in splits if not split_of(name)]
    return [f"folders beside the splits in {folder} are not read: {some(others)}"] if others else []


def files_with(folder: Path, suffix: str, deep: bool = True) -> list[Path]:
    """The files in a folder whose names end with a suffix in any case, without hidden ones, in order.

    Links that lead nowhere are among them: reading them is an error, and a missing file is not.
    """
    found = map(Path, files_in(folder)) if deep else folder.glob("*")
    named = (file for file in found if file.suffix.lower() == suffix and not is_hidden(file, folder))
    return sorted(file for file in named if file.is_file() or (file.is_symlink() and not file.exists()))


def images_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The images in a folder and the folders in it, in order, and notes on what else is there."""
    is_image = ImageFilter()
    images = [
        file
        for file in sorted(map(Path, files_in(folder)))
        if file.suffix.lower() not in _ANNOTATIONS and not is_hidden(file, folder) and is_image(file, folder)
    ]
    return images, [*is_image.notes(folder), *hidden_in(folder)]


def several_files(root: Path, files: Mapping[str, Sequence[Path]]) -> list[str]:
    """A note for each split that has several files, of which the first is read."""
    return [
        f"{root} has several files for the split {split}: {some([relative_to(each, root) for each in several])}; "
        "the first is read"
        for split, several in files.items()
        if len(several) > 1
    ]


def without_annotation(folder: Path, annotated: Container[Path], needed: str) -> list[str]:
    """A note on the images in a folder that lack what is `needed`, if there are any."""
    others = [str(image) for image in images_in(folder)[0] if image not in annotated]
    return [f"{count(len(others), 'image')} in {folder} without {needed} left out: {some(others)}"] if others else []


def hidden_in(folder: Path) -> list[str]:
    """A note on hidden images and annotations in a folder, if there are any."""
    hidden = sorted(
        file.name
        for file in map(Path, files_in(folder))
        if file.suffix.lower() in (*SUFFIXES, *_ANNOTATIONS) and is_hidden(file, folder)
    )
    if not hidden:
        return []
    files = count(len(hidden), "hidden file")
    return [f"{files} in {folder} skipped (macOS writes such files): {some(hidden)}"]


def spellings(name: str) -> list[str]:
    """A name as it is, and with letters such as й in one piece, and in two, as macOS stores them."""
    return list(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def find_moved(path: str, folders: Iterable[Path], least: int = 1) -> Path | None:
    """Finds the file of a path from another machine: the longest end of the path that exists in one of the folders.

    Args:
        path: The path.
        folders: Where to look, the most likely first.
        least: Minimum number of its last parts that must exist; fewer if the path has fewer.
    """
    plain = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    parts = [part for part in plain.parts if part not in (plain.anchor, ".", "..")]
    places = list(folders)
    for i in range(max(len(parts) - least + 1, min(1, len(parts)))):
        ends = spellings("/".join(parts[i:]))
        for found in (folder / end for folder in places for end in ends):
            if found.exists():
                return found
    return None


def relative_to(path: Path, root: Path) -> str:
    """A path as messages name it: within `root`, if it is there."""
    return str(path.relative_to(root)) if path.is_relative_to(root) and path != root else str(path)


def text_of(file: Path) -> str:
    """The content of a text file, with or without a byte order mark.

    Raises:
        DataError: If it is not in UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not in UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8") from error
