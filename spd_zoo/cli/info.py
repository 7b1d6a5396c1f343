"""`spd-zoo info`: all that the manifest says about a network or a checkpoint."""

import argparse
import json
from typing import Any

from spd_zoo.cli.common import Commands, add_command
from spd_zoo.weights import catalogue

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "info", _run, "print what is known about a network or its weights", networks=False)
    command.add_argument("model", metavar="MODEL", help="network, with or without a tag")
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> int:
    described = catalogue.describe(options.model)
    if options.json:
        print(json.dumps(described, indent=2))
    else:
        _print_tree(described)
    return 0


def _print_tree(fields: dict[str, Any], indent: str = "") -> None:
    """Prints a line per field that has a value; dicts and lists of dicts are indented."""
    for name, value in fields.items():
        label = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict):
            print(label)
            _print_tree(value, f"{indent}  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            for item in value:
                print(label)
                _print_tree(item, f"{indent}  ")
        elif isinstance(value, list | tuple) and value:
            print(label, ", ".join(map(str, value)))
        elif value is not None and not isinstance(value, list | tuple):
            print(label, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value)
