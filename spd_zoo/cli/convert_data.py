"""`spd-zoo convert-data`: a data set with boxes in another format."""

import argparse
from pathlib import Path

from spd_zoo.cli.common import Commands, add_command, explained

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the command."""
    text = "write a data set with boxes in another format; images are linked, not copied"
    command = add_command(commands, "convert-data", _run, text)
    command.add_argument("data", metavar="DATA", help="as --data of finetune, for detectors")
    command.add_argument("--to", choices=("yolo", "coco", "voc"), required=True, help="format to write")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")


def _run(options: argparse.Namespace) -> int:
    with explained():
        from spd_zoo.data.boxes.writing import convert_data

        lines = convert_data(options.data, options.to, options.out)
    for line in lines:
        print(line)
    print(f"saved: {options.out}")
    return 0
