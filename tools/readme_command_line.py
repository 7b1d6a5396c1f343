"""The section of `make_readme.py` about the command `spd-zoo`, made from its parser."""

import argparse
from collections.abc import Iterator

from readme_common import table

from spd_zoo.cli.main import make_parser


def command_line() -> str:
    """Every command of `spd-zoo` with its arguments and options, from its parser."""
    sections = []
    for name, parser in _commands(make_parser()):
        positional, options = [], []
        for action in parser._actions:
            what = (action.help or "").replace("%%", "%").replace("|", "\\|")
            if action.choices is not None:
                what += f" ({' or '.join(map(str, action.choices))})"
            if action.option_strings and action.required:
                what += " (required)"
            value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper()).replace("|", "\\|")
            dots = " ..." if action.nargs in ("+", "*") else ""
            if not action.option_strings:
                positional.append([f"`{value}`{dots}", what])
            elif "--help" not in action.option_strings:
                names = ", ".join(f"`{option}`" for option in action.option_strings)
                options.append([f"{names} {f'`{value}`{dots}' if value else ''}".strip(), what])
        rows = [*positional, *options]
        sections.append(f"## spd-zoo {name}\n\n{parser.description}\n\n{table(('argument or option', 'what'), rows)}")
    return "\n\n".join(sections)


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands that do something, and their parsers; those of `weights` are one level down."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield prefix.strip(), parser
    for action in below:
        for name, command in action.choices.items():
            yield from _commands(command, f"{prefix} {name}")
