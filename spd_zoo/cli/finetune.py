"""`spd-zoo finetune`: trains a network; its options are the fields of `FinetuneConfig`."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from spd_zoo.cli.common import Commands, add_command, explained
from spd_zoo.cli.deferred import load_networks

__all__ = ["add", "add_options"]

_FIRST = (
    "data",
    "out",
    "recipe",
    "epochs",
    "image_size",
    "batch_size",
    "lr",
    "pretrained",
    "device",
    "dry_run",
)  # options used most


class _ShortHelp(argparse.Action):
    """Prints the help with the options used most."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        listed = (*_FIRST, "help", "help_all")
        for action in parser._actions:
            if action.option_strings and action.dest not in listed:
                action.help = argparse.SUPPRESS  # this process prints the help and ends
        parser.print_help()
        parser.exit()


def add(commands: Commands) -> None:
    """Adds the command without its options."""
    add_command(commands, "finetune", _run, "train a network on your images", own_help=True)


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options: one per field of `FinetuneConfig`, which imports torch and timm.

    Raises:
        CommandError: If a package is missing.
    """
    with explained():
        load_networks()
        from spd_zoo.training.config import FinetuneConfig, recipe_names
    suppress: dict[str, Any] = {"default": argparse.SUPPRESS}
    command.add_argument(
        "-h", "--help", action=_ShortHelp, nargs=0, help="show the options used most and exit", **suppress
    )
    command.add_argument("--help-all", action="help", help="show all options and exit")
    command.add_argument("--config", metavar="FILE", help="YAML file with options, such as the run.yaml of a run")
    command.add_argument(
        "--recipe", metavar="NAME", help=f"predefined options, which any others override: {', '.join(recipe_names())}"
    )
    hints = typing.get_type_hints(FinetuneConfig)
    for field in dataclasses.fields(FinetuneConfig):
        type_ = hints[field.name]
        if typing.get_origin(type_) in (types.UnionType, typing.Union):
            type_ = next(option for option in typing.get_args(type_) if option is not types.NoneType)
        default = "" if field.default in (dataclasses.MISSING, None, "") else f" (default: {field.default})"
        text = (field.metadata.get("help", "") + default).replace("%", "%%")
        if field.name == "model":
            command.add_argument(field.name, metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=text)
            continue
        action: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if type_ is bool else {"type": type_}
        if field.name == "epochs":
            action["type"] = _epochs
        # SUPPRESS: an option that is not on the command line is left to the configuration file and the dataclass
        command.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **action)


def _epochs(text: str) -> int | str:
    """A number of epochs; +10, which continues a finished run, stays text.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    try:
        return text if text.startswith("+") else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, or like +10, got {text!r}") from error


def _run(options: argparse.Namespace) -> int:
    ours = ("run", "config", "recipe", "needs_networks", "command", "quiet", "verbose")
    lower = "use a smaller --batch-size or --image-size, a larger --accumulate, or fewer --workers"
    lower += "; where the run has saved its state, also another --out"
    on_command_line = {key: value for key, value in vars(options).items() if key not in ours}
    with explained(lower):
        from spd_zoo.training.call import finetune

        finetune(config=options.config, recipe=options.recipe, **on_command_line)
    return 0
