"""`spd-zoo convert`: a pretrained network without strides, with the same predictions."""

import argparse
from pathlib import Path

from spd_zoo.cli.common import CommandError, Commands, add_command, print_notes

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the command."""
    text = "remove strides and pooling from a network without changing its predictions"
    command = add_command(commands, "convert", _run, text)
    command.add_argument(
        "model", metavar="MODEL", help="NETWORK or NETWORK.TAG of this zoo or of timm, or the folder of a run"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, which the other commands take as MODEL"
    )
    command.add_argument("--include", nargs="+", metavar="PATTERN", help="only these modules, for example 'layer4.*'")
    command.add_argument("--exclude", nargs="+", metavar="PATTERN", default=[], help="not these modules")


def _run(options: argparse.Namespace) -> int:
    from spd_zoo.convert import ConversionError, convert_checkpoint
    from spd_zoo.inference.detector import trained_on_tiles

    try:
        print(convert_checkpoint(options.model, options.out, options.include, options.exclude))
    except (ValueError, ConversionError) as error:
        raise CommandError(str(error)) from error
    if (tiles := trained_on_tiles(options.model)) is not None:
        print_notes([f"{options.model} was trained on tiles; use {options.out} with --tile {tiles[0]}, too"])
    print(f'saved: timm.create_model("local-dir:{options.out}", pretrained=True)')
    return 0
