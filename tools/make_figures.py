"""Draws the figures of the README and of docs/: `python tools/make_figures.py [--check]`.

Their sources are the manifest and records in tools/: published figures (`published.csv`), costs of networks
(`complexity.csv`), the output of `tools/latency.py --json` (`latency.jsonl`), results of `spd-zoo evaluate` for two
detectors (`detectors.csv`: AP in per cent by class and by COCO's sizes, in pixels of the image or of the network's
input, and the numbers of boxes), and the maps and boxes of two detectors for a drawn picture (`activations.json`). The
weights of one of them are not in the package: `--record-activations RUN` writes this record from its training run.

A figure's metadata contain the SHA-256 of its data and of the scripts that draw it. --check compares this hash, so that
another version of matplotlib changes nothing. Text stays text, in black or white by the reader's colour scheme.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import figures_common
from figures_common import Drawing, digest, render
from figures_detectors import activations, detectors, draw_activations, draw_detectors, record_activations
from figures_twins import draw_latency, draw_twins, latency, twins

from spd_zoo.files import whole

DRAWINGS = {
    "twins": Drawing(
        "Accuracy against parameters and multiply-accumulates of networks and their padding-free or SPD twins",
        twins,
        draw_twins,
    ),
    "latency": Drawing("Latency and accuracy of padded and padding-free networks", latency, draw_latency),
    "detectors": Drawing("Average precision of detectors by the size of objects", detectors, draw_detectors),
    "activations": Drawing(
        "Mean activations of yolov8n and yolov8n_spd at strides 4, 8 and 16, for one drawn picture of blood cells",
        activations,
        draw_activations,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures, or with --check lists outdated ones; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a figure is not current")
    what.add_argument(
        "--record-activations",
        type=Path,
        metavar="RUN",
        help="first write tools/activations.json: RUN is the folder of a yolov8n trained as yolov8n_spd.bccd was",
    )
    options = parser.parse_args(argv)
    if options.record_activations:
        try:
            record_activations(options.record_activations)
        except (OSError, ValueError) as error:
            print(f"tools/activations.json cannot be written: {error}", file=sys.stderr)
            return 1
    stale = False
    for name, drawing in DRAWINGS.items():
        file = figures_common.FIGURES / f"{name}.svg"
        try:
            if not options.check:
                figures_common.FIGURES.mkdir(exist_ok=True)
                with whole(file) as temporary:
                    temporary.write_text(render(drawing), encoding="utf-8")
            elif not file.exists() or digest(drawing) not in file.read_text(encoding="utf-8"):
                stale = True
                print(f"docs/figures/{file.name} is not current: run python tools/make_figures.py", file=sys.stderr)
        except (OSError, ValueError) as error:
            print(f"docs/figures/{file.name} cannot be drawn: {error}", file=sys.stderr)
            return 1
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
