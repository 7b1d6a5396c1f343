"""`spd-zoo list`: the networks and their weights, as a table or JSON."""

import argparse
import json
from typing import Any

from spd_zoo.cli.common import Commands, add_command, print_table
from spd_zoo.weights import catalogue

__all__ = ["add"]

_HEADER = ("name", "tag", "params", "MACs", "input", "top-1", "licence", "weights")


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "list", _run, "list the networks and their weights", networks=False)
    command.add_argument("filters", metavar="FILTER", nargs="*", help="name with wildcards, for example 'pyconv*_spd'")
    command.add_argument("--pretrained", action="store_true", help="only verified weights")
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> int:
    rows = [catalogue.summarize(entry) for entry in catalogue.networks(options.filters, options.pretrained)]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(_HEADER, map(_cells, rows), right=(2, 3))
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    top1 = row["top1"]
    return (
        row["network"],
        f"{row['tag'] or '-'}{' (default)' if row['default'] else ''}",
        f"{row['params'] / 1e6:.1f} M",
        f"{row['macs'] / 1e9:.2f} G",
        "x".join(map(str, row["input_size"])),
        f"{top1['value']:.2f} % {top1['dataset']} at {top1['input_size']} px ({top1['measured_by']})" if top1 else "-",
        row["license"] or "-",
        row["weights"],
    )
