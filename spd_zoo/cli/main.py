"""The parser of `spd-zoo`, and the handling of errors."""

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from spd_zoo.cli import (
    completion,
    convert,
    convert_data,
    demo,
    detect,
    evaluate,
    export,
    finetune,
    info,
    predict,
    weights,
)
from spd_zoo.cli import list as list_command
from spd_zoo.cli.common import CommandError, Parser, complain, explained, warnings_as_notes
from spd_zoo.cli.deferred import load_networks
from spd_zoo.console import quiet_if
from spd_zoo.version import __version__
from spd_zoo.weights.catalogue import ModelError
from spd_zoo.weights.manifest import WeightsError

__all__ = ["main", "make_parser"]

_COMMANDS = (list_command, info, predict, detect, convert, convert_data, weights, finetune, evaluate, export, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `spd-zoo`.

    Returns:
        The exit status: 0, 1 after an error, 2 without a command, 128 + N after the signal N. The parser itself ends
        the program with 2 after an error in the options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as by `>&-`
            setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be valid Unicode
    try:
        parser = make_parser("finetune" in arguments[:1])
        if not arguments:
            parser.print_help(sys.stderr)
            return 2
        options = parser.parse_args(arguments)
        with quiet_if(options.quiet), warnings_as_notes(), _sigterm_as_exit():
            if options.needs_networks:
                with explained():
                    load_networks()
            status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # for example of `spd-zoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:
        if str(stopped):  # a `Stopped`, whose state is saved
            complain(f"{stopped}; the state is saved, and the same command resumes")
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except (CommandError, ModelError, WeightsError, OSError) as error:
        if {"-v", "--verbose"} & {*arguments}:
            traceback.print_exc()
        complain(str(error))
        return 1


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM end the program as an exception, so that files and folders that are half written are deleted."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    usual = signal.getsignal(signal.SIGTERM)
    handles = usual == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if handles:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if handles:
            signal.signal(signal.SIGTERM, usual)


def make_parser(finetune_options: bool = True) -> Parser:
    """The parser of all commands.

    Args:
        finetune_options: Whether it has the options of `finetune`, which load the networks and the training code.

    Raises:
        CommandError: If a package is missing that these need.
    """
    parser = Parser("spd-zoo", description="Networks for low-resolution images and small objects.")
    parser.add_argument("--version", action="version", version=f"spd-zoo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    completion.add(commands, make_parser)
    if finetune_options:
        finetune.add_options(commands.choices["finetune"])
    return parser
