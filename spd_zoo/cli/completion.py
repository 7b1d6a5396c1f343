"""`spd-zoo completion`: a script with which a shell completes commands, options and names of networks."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

from spd_zoo.cli.common import Commands, add_command, explained
from spd_zoo.weights.manifest import entries

__all__ = ["add"]

_NAMES = (
    "model",
    "models",
    "name",
    "names",
    "teacher",
    "teacher_model",
)  # arguments that take a network or a checkpoint
_FILES = ("images", "file", "out", "results", "manifest", "config", "data")


def add(commands: Commands, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Adds the command, which reads the parser that `make_parser` returns."""
    text = "print a script that completes commands in a shell"
    command = add_command(commands, "completion", partial(_run, make_parser), text, networks=False)
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def _run(make_parser: Callable[[], argparse.ArgumentParser], options: argparse.Namespace) -> int:
    with explained():
        import shtab
    parser = make_parser()
    names = " ".join(entries())
    for action in _actions(parser):
        if action.dest in _NAMES:
            action.complete = {  # type: ignore[attr-defined]
                "bash": "_spd_zoo_networks",
                "zsh": f"\"_alternative 'networks:network:({names})' 'files:folder of a run, or image:_files'\"",
                "tcsh": f"`echo {names}`",
            }
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    bash = f'_spd_zoo_networks() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}'
    print(shtab.complete(parser, options.shell, preamble=bash if options.shell == "bash" else ""))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All actions of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
