"""Data in a folder next to the project, which is not distributed with it."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(path: str) -> Path:
    """A file or folder of the data; skips the test if the data folder does not exist.

    Raises:
        FileNotFoundError: If the data folder exists without this file.
    """
    if not FOLDER.is_dir():
        pytest.skip(f"needs the data folder next to the project, and {FOLDER} does not exist")
    file = FOLDER / path
    if not file.exists():
        raise FileNotFoundError(f"{FOLDER} lacks {path}")
    return file
