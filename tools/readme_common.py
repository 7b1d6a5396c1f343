"""What the generated sections of `make_readme.py` share: records of measurements, and Markdown tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def records(file: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file in `tools/`, each of which holds a measurement."""
    lines = (ROOT / "tools" / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing where there are no rows."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
