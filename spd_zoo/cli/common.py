"""Shared by several commands: errors, types of options, tables. Has no slow imports."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

from spd_zoo.console import is_quiet
from spd_zoo.errors import first_line
from spd_zoo.weights.manifest import PACKAGE, WeightsError

__all__ = [
    "DEVICE",
    "IMAGE_SIZE",
    "MAX_PIXELS",
    "CommandError",
    "Parser",
    "add_command",
    "class_scores",
    "complain",
    "explained",
    "image_size",
    "non_negative",
    "positive",
    "print_notes",
    "print_table",
    "threshold",
    "warnings_as_notes",
]

DEVICE = "torch device, such as cpu, cuda:1 or mps (default: cuda if available, else cpu)"
IMAGE_SIZE = "size of the network's input in pixels (default: the network's own)"
MAX_PIXELS = "largest image that may be read as a whole, in pixels; with --tile, a TIFF is read in parts"

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

_EXTRAS = {
    "cv2": "[video]",
    "datasets": "[train]",
    "pyarrow": "[train]",
    "faster_coco_eval": "[train]",
    "tensorboard": "[tensorboard]",
    "wandb": "[wandb]",
    "gradio": "[demo]",
    "onnx": "[export]",
    "onnxscript": "[export]",
    "onnxruntime": "[export]",
    "shtab": "[completion]",
}


class CommandError(Exception):
    """A command that cannot be carried out; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, instead of all options and then the error."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and where the help is, and exits with 2."""
        complain(f"{message}; see `{self.prog} --help`")
        self.exit(2)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    networks: bool = True,
    own_help: bool = False,
) -> Parser:
    """Adds a command.

    Args:
        commands: The commands to which it is added.
        name: Its name.
        run: Runs the command and returns its exit status.
        text: Its description in the help.
        networks: Whether it needs the networks, and therefore torch and timm.
        own_help: Whether it defines --help itself.

    Returns:
        The command's parser.
    """
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", add_help=not own_help)
    command.set_defaults(run=run, needs_networks=networks, command=name)
    command.add_argument("-q", "--quiet", action="store_true", help="print results and errors only")
    command.add_argument("-v", "--verbose", action="store_true", help="print the traceback of an error")
    return command


def complain(text: str) -> None:
    """Prints an error, above a progress bar if there is one."""
    line = f"spd-zoo: error: {text}"
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)


def print_notes(notes: Iterable[str]) -> None:
    """Prints what was guessed or left out, a line for each, to standard error; nothing in a quiet command."""
    for note in () if is_quiet() else notes:
        print(f"note: {note}", file=sys.stderr)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Shows this package's own warnings as notes: what is guessed about a file is one line in every command."""
    usual = warnings.formatwarning

    def as_note(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not filename.startswith(str(PACKAGE)):
            return usual(message, category, filename, lineno, line)
        return "" if is_quiet() else f"note: {message}\n"

    warnings.formatwarning = as_note
    try:
        yield
    finally:
        warnings.formatwarning = usual


def image_size(text: str) -> tuple[int, int]:
    """Height and width: 64, or 48x96.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    from spd_zoo.data.reading import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def class_scores(text: str) -> dict[str, float]:
    """Minimum scores of classes: cell=0.4,2=0.1.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, score = item.rpartition("=")
        if not name or name in found:
            raise argparse.ArgumentTypeError(f"must be like cell=0.4,platelet=0.1, got {item!r}")
        try:
            found[name] = threshold(score)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"the minimum score of {name} {error}") from error
    return found


@contextmanager
def explained(lower: str = "") -> Iterator[None]:
    """Turns a ValueError, a missing package or missing memory into one sentence for the user.

    Args:
        lower: What needs less memory: the advice after "out of memory".

    Raises:
        CommandError: In place of those errors, with the sentence.
    """
    try:
        yield
    except (CommandError, WeightsError):
        raise
    except Exception as error:  # libraries raise many types of errors when memory runs out
        sentence = _sentence(error, lower)
        if not sentence:
            raise
        raise CommandError(sentence) from error


def _sentence(error: Exception, lower: str) -> str:
    """The message about an error for the user; empty if the error is a bug."""
    if "torch" in sys.modules:
        from spd_zoo.process import out_of_memory, ran_out_of_memory

        if ran_out_of_memory(error):
            return "; ".join(filter(None, (out_of_memory(error), lower)))
    if isinstance(error, ValueError):  # for example a DataError, a RunError, or an option without meaning
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return f"this needs the package {error.name}: pip install 'spd-zoo{_EXTRAS.get(package, '')}'"
    reason = first_line(error)
    if isinstance(error, RuntimeError) and reason.startswith("DataLoader worker (pid"):  # ended by the system
        return f"a process that reads images ended: {reason}; if memory ran out, use fewer --workers"
    return ""


def non_negative(text: str) -> int:
    """An integer from 0.

    Raises:
        argparse.ArgumentTypeError: If it is negative or no integer.
    """
    return _at_least(0, text)


def positive(text: str) -> int:
    """An integer from 1.

    Raises:
        argparse.ArgumentTypeError: If it is less or no integer.
    """
    return _at_least(1, text)


def threshold(text: str) -> float:
    """A number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}") from error
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return number


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def print_table(
    header: tuple[str, ...], rows: Iterable[tuple[Any, ...]], right: tuple[int, ...] = (), width: int = 0
) -> None:
    """Prints columns as wide as needed.

    Args:
        header: The titles.
        rows: The cells.
        right: The numbers of the columns that are right-aligned.
        width: Characters of a line, for which the first column may become narrower: a first cell that is too long for
            it gets a line of its own. 0: no limit.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if width:
        widths[0] = max(len(header[0]), min(widths[0], width - sum(2 + each for each in widths[1:])))
    for line in lines:
        cells = [
            cell.rjust(each) if i in right else cell.ljust(each)
            for i, (cell, each) in enumerate(zip(line, widths, strict=True))
        ]
        if len(cells[0]) > widths[0]:
            print(cells[0])
            cells[0] = " " * widths[0]
        print("  ".join(cells).rstrip())
