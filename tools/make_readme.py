"""Writes the README's tables: `python tools/make_readme.py [--check]`.

They come from the manifest, from the recorded speeds and latencies, and from counting what papers print.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check_published

from spd_zoo.weights import Entry, entries

ROOT = Path(__file__).parent.parent


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def networks() -> str:
    """Every network: its size, and the input it was made for."""
    rows = []
    for entry in entries().values():
        if not entry.tag:
            size = f"{entry.input_size[1]} px, {entry.num_classes} classes"
            rows.append([f"`{entry.name}`", f"{entry.params / 1e6:.2f}", f"{entry.macs / 1e9:.2f}", size])
    return table(["network", "parameters (M)", "MACs (G)", "counted at"], rows)


def checkpoints() -> str:
    """Every checkpoint: what it was trained on, how good it is and who says so, and where it is."""
    rows = []
    for entry in entries().values():
        if entry.tag:
            figures = ", ".join(_figure(metric) for metric in entry.metrics)
            rows.append([f"`{entry.name}`", str(entry.dataset), figures, _place(entry), str(entry.license)])
    return table(["weights", "trained on", "accuracy", "file", "licence"], rows)


def _figure(metric: dict[str, Any]) -> str:
    who = "measured here" if metric["measured_by"] == "us" else "the authors' figure"
    kind, value = metric["metric"], f"{metric['value']:.2f} %"
    if kind.startswith("ap"):
        value = f"{kind.replace('ap', 'AP').replace('_', ' ')} {metric['value']:.1f} %"
    elif kind != "top1":
        value = f"{kind} {value}"
    return f"{value} on {metric['dataset']} at {metric['input_size']} px ({who})"


def _place(entry: Entry) -> str:
    if entry.verified:
        return "in the package" if str(entry.source).startswith("bundled:") else "on the Hub"
    file = f"`{entry.original_file}` behind the " if entry.original_file else ""
    return f"{file}[authors' link]({entry.original_link}), not verified"


def speed() -> str:
    """What `tools/benchmark.py --json` printed into `tools/speed.jsonl`."""
    lines = (ROOT / "tools" / "speed.jsonl").read_text(encoding="utf-8").splitlines()
    record = [json.loads(line) for line in lines]
    columns = ("ours", "/ plain", "/ plain, same form", "/ resnet50")
    rows = [[f"`{row['network']}`", row["form"], *(f"{row[column]:.2f}" for column in columns)] for row in record]
    settings = {f"batch {row['batch']}, {row['image_size']} px, {row['threads']} threads" for row in record}
    return f"{'; '.join(sorted(settings))}\n\n{table(['network', 'form', 'images/s', *columns[1:]], rows)}"


def published() -> str:
    """What papers print beside what is counted here."""
    head, *rows = check_published.table(check_published.check_published())
    return table(head, rows)


def latency() -> str:
    """What `tools/latency.py --json` printed into `tools/latency.jsonl`, beside the authors' figures."""
    lines = (ROOT / "tools" / "latency.jsonl").read_text(encoding="utf-8").splitlines()
    columns = ("network", "image_size", "runtime", "padded_ms", "padding_free_ms", "ratio")
    rows = [[str(row[column]) for column in columns] for row in map(json.loads, lines)]
    return table(("network", "pixels", "runtime", "padded (ms)", "padding-free (ms)", "ratio"), rows)


def render(text: str) -> str:
    """The README with every generated part made anew."""
    for name, make in (
        ("networks", networks),
        ("checkpoints", checkpoints),
        ("published", published),
        ("latency", latency),
        ("speed", speed),
    ):
        pattern = rf"(<!-- {name}: tools/make_readme.py -->\n).*?(<!-- end -->)"
        made = make().replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{made}\n\g<2>", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has {count} parts called {name}, expected 1")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the README, or with --check says whether it is current; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the README is not current")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    current = render(text)
    if options.check:
        if text != current:
            print("README.md is not current: run python tools/make_readme.py", file=sys.stderr)
        return int(text != current)
    readme.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
