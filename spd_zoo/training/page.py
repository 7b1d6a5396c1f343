"""The page `report.html` of a run: text, tables and figures in one HTML file."""

import base64
import html
import importlib.util
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from spd_zoo.training.config import FinetuneConfig, to_yaml

__all__ = [
    "data_page",
    "draw_confusion",
    "fitting",
    "image_png",
    "new_figure",
    "page",
    "plain",
    "plot_notes",
    "png",
    "short",
    "table",
]

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --stripe: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #181818; --stripe: #262626 }
  .plot { filter: invert(.9) hue-rotate(180deg) }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  color: var(--text); background: var(--page) }
h1, h2, p, li { overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .15rem .8rem; text-align: right }
th { border-bottom: 2px solid #999 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: var(--stripe) } img { max-width: 100%; height: auto }
.wide img { max-width: none }
pre { background: var(--stripe); padding: 1rem; overflow-x: auto }
"""
_HEAD = "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
WIDE = 600  # wider figures, in pixels, scroll on a phone instead of shrinking
_PLOTS = (
    "curves",
    "confusion",
    "calibration",
    "precision_recall",
)  # figures without photos, whose colours dark mode inverts


def page(
    config: FinetuneConfig,
    history: Sequence[dict[str, Any]],
    summary: dict[str, str],
    titles: dict[str, str],
    figures: dict[str, bytes],
    classes: str,
    notes: Sequence[str] = (),
    comments: Mapping[str, str] | None = None,
) -> str:
    """An HTML page without outside resources.

    Args:
        config: What was trained; shown at the end.
        history: The metrics of each epoch.
        summary: Names and values of the table at the top.
        titles: Headings of the figures, by the figures' names, in order.
        figures: PNG files by name; missing ones are left out.
        classes: The HTML table of the classes.
        notes: What was guessed or left out, a line for each.
        comments: What figures show, by their names.
    """
    name = html.escape(config.model)
    sections = [
        f"{_HEAD}<title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p>{len(history)} epochs on {html.escape(config.data)}; metrics on the validation images.</p>",
        table(["", ""], list(summary.items())),
    ]
    if notes:
        sections.append("<h2>Notes</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>")
    for figure, title in titles.items():
        if figure in figures:
            comment = html.escape((comments or {}).get(figure, ""))
            sections.append(f"<h2>{title}</h2>" + (f"<p>{comment}</p>" if comment else ""))
            sections.append(_image(figure, figures[figure]))
    sections += ["<h2>Classes, the worst first</h2>", classes]
    epochs = [[short(value) for value in row.values()] for row in history]
    sections += ["<h2>Epochs</h2>", table(list(history[0]), epochs)]
    sections += [f"<h2>Configuration</h2><pre>{html.escape(to_yaml(config))}</pre></html>"]
    return "\n".join(sections)


def data_page(config: FinetuneConfig, lines: Iterable[str], picture: bytes) -> str:
    """An HTML page on what a run is trained on, until the report of the run takes its place.

    Args:
        config: What is trained.
        lines: What the check found.
        picture: A PNG file.
    """
    name = html.escape(config.model)
    return "\n".join(
        [
            f"{_HEAD}<title>{name}</title><style>{_STYLE}</style>",
            f"<h1>{name}</h1><p>The run is not finished. It is trained on {html.escape(config.data)}:</p>",
            f"<pre>{html.escape(chr(10).join(lines))}</pre>{_image('data', picture)}",
            f"<h2>Configuration</h2><pre>{html.escape(to_yaml(config))}</pre></html>",
        ]
    )


def _image(name: str, content: bytes) -> str:
    """A PNG file as an element; one that a narrow screen would make illegible scrolls instead."""
    with Image.open(io.BytesIO(content)) as image:
        wide = image.width > WIDE
    classes = "class='plot' " if name in _PLOTS else ""
    element = f"<img {classes}alt='{name}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"
    return f"<div class='wide'>{element}</div>" if wide else element


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table."""
    lines = ["".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<div class='wide'><table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def plot_notes() -> list[str]:
    """A note if the report cannot have plots."""
    if importlib.util.find_spec("matplotlib") is not None:
        return []
    return ["the report will have no plots, because matplotlib is not installed: pip install 'spd-zoo[train]'"]


def short(value: Any) -> str:
    """A float with four significant digits; anything else as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    return Figure((width, height), layout="constrained")


def draw_confusion(axes: Any, confusion: np.ndarray, labels: Sequence[str], with_labels: bool, numbers: bool) -> None:
    """Draws a confusion matrix, coloured by the share of each row.

    Args:
        axes: Matplotlib's axes.
        confusion: The counts, (rows, columns).
        labels: The name of each row and column.
        with_labels: Whether rows and columns have names.
        numbers: Whether cells have numbers.
    """
    axes.imshow(confusion / np.maximum(confusion.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if with_labels:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if numbers:
        for i, j in zip(*confusion.nonzero(), strict=True):
            dark = confusion[i, j] > 0.5 * confusion[i].sum()
            axes.text(j, i, str(confusion[i, j]), ha="center", va="center", color="white" if dark else "black")


def plain(name: str) -> str:
    """A name with dollar signs escaped, which matplotlib would read as a formula."""
    return name.replace("$", r"\$")


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about characters that matplotlib's font lacks
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def image_png(image: Image.Image) -> bytes:
    """A Pillow image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def fitting(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    """`text` cut to `width` pixels; characters that Pillow's built-in font lacks become question marks."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text
