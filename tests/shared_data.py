"""Data that lies beside the project and is no part of it."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(path: str) -> Path:
    """A file or folder of the data beside the project; skips the test where there is no such data at all.

    Raises:
        FileNotFoundError: If the data is there, but not this file of it.
    """
    if not FOLDER.is_dir():
        pytest.skip(f"needs the data folder beside the project, and {FOLDER} does not exist")
    file = FOLDER / path
    if not file.exists():
        raise FileNotFoundError(f"{FOLDER} lacks {path}")
    return file
