"""`spd-zoo export`: a network as one ONNX or pt2 file."""

import argparse
from pathlib import Path

from spd_zoo.cli.common import Commands, add_command, explained, image_size, print_notes

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "export", _run, "export a network to one file for other runtimes")
    command.add_argument("model", metavar="MODEL", help="network, with or without a tag, or the folder of a run")
    command.add_argument("--to", choices=("onnx", "pt2"), required=True, help="ONNX, or torch.export's format")
    command.add_argument("--out", type=Path, metavar="FILE", help="the file (default: in the run, or here)")
    command.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels (default: the network's)")
    command.add_argument("--no-fold", action="store_true", help="keep space-to-depth and BatchNorm as layers")


def _run(options: argparse.Namespace) -> int:
    with explained("use a smaller --image-size, or a machine with more memory"):
        from spd_zoo.data.notes import Notes
        from spd_zoo.exporter import export

        notes = Notes()
        print(export(options.model, options.to, options.out, options.image_size, not options.no_fold, notes))
    print_notes(notes.lines())
    return 0
