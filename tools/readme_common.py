"""What the generated sections of `make_readme.py` share: records of measurements, and Markdown tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twins_config import read_records

ROOT = Path(__file__).parent.parent


def records(file: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file in `tools/`, each of which holds a measurement.

    Raises:
        OSError: If the file cannot be read.
        ConfigError: If a line is no JSON object.
    """
    path = ROOT / "tools" / file
    path.stat()  # `read_records` has no records where there is no file
    return read_records(path, ())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing where there are no rows."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
