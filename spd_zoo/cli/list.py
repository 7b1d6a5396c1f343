"""`spd-zoo list`: the networks and their weights, as a table or JSON."""

import argparse
import json
import shutil
from typing import Any

from spd_zoo.cli.common import Commands, add_command, print_table
from spd_zoo.weights import catalogue

__all__ = ["add"]

_HEADER = ("name", "command", "top-1 or AP (%)", "params", "weights")
_COMMANDS = {"classification": "predict", "detection": "detect"}
_WEIGHTS = {"unverified": "import", "none": "-"}

_LEGEND = """
weights: * is loaded by pretrained=True; import: get the authors' file with
`spd-zoo weights pull NAME`; -: train the network with `spd-zoo finetune NAME`.
`spd-zoo info NAME` tells who measured the accuracy."""


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "list", _run, "list the networks and their weights", networks=False)
    command.add_argument(
        "filters", metavar="FILTER", nargs="*", help="part of a name, or name with wildcards, such as 'pyconv*_spd'"
    )
    command.add_argument("--pretrained", action="store_true", help="only networks with verified weights")
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> int:
    rows = [catalogue.summarize(entry) for entry in catalogue.networks(options.filters, options.pretrained)]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(_HEADER, map(_cells, rows), right=(3,), width=shutil.get_terminal_size().columns)
        print(_LEGEND)
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    found = row["top1"] or row["ap"]
    return (
        row["name"],
        "finetune" if row["part"] else _COMMANDS[row["task"]],
        f"{found['value']:.2f} {found['dataset']}" if found else "-",
        f"{row['params'] / 1e6:.1f} M",
        f"{_WEIGHTS.get(row['weights'], row['weights'])}{'*' if row['default'] else ''}",
    )
