"""Shared by the figures of `make_figures.py`: style, records, and writing a drawing as SVG."""

import hashlib
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RECORDS, FIGURES = ROOT / "tools", ROOT / "docs" / "figures"
WIDTH = 5.4  # inches: 389 px, so that letters keep their size on a phone
INK = "#0b0c0d"  # replaced by the colour of text, which the style below sets
STYLE = "svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }"
FONTS = "system-ui, Helvetica, Arial, sans-serif"
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spd_zoo",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = (
    "#2f81d6",
    "#c96a10",
    "#2b9461",
    "#a366d1",
    "#d64f4f",
    "#7d8590",
)  # legible on light and dark backgrounds


class Drawing(NamedTuple):
    """A figure: its title, a function that returns its data, and one that draws them."""

    title: str
    data: Callable[[], Any]
    draw: Callable[[Any], Figure]


def digest(drawing: Drawing) -> str:
    """The SHA-256 of a figure's sources: its data, this script, and the one that draws it."""
    scripts = (__file__, str(sys.modules[drawing.draw.__module__].__file__))
    code = "".join(Path(script).read_text(encoding="utf-8") for script in scripts)
    return hashlib.sha256((json.dumps(drawing.data(), sort_keys=True) + code).encode()).hexdigest()


def heading(figure: Any, text: str) -> None:
    """Writes a bold heading at the top left of a figure or a part of it, broken into lines that fit."""
    figure.suptitle(textwrap.fill(text, 58), x=0.01, ha="left", weight="bold", fontsize=10)


def render(drawing: Drawing) -> str:
    """The figure as SVG without a background."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.draw(drawing.data()).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("'DejaVu Sans'", FONTS)
    head = (
        f"<title>{escape(drawing.title)}</title>\n <metadata>sha256 of data and scripts: {digest(drawing)}</metadata>\n"
        f" <style>{STYLE}</style>"
    )
    text, count = re.subn(r"<svg\b[^>]*>", lambda tag: f'{tag[0][:-1]} role="img">\n {head}', text, count=1)
    assert count == 1
    return text
