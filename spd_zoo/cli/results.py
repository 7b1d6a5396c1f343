"""`--results` of predict and detect: one file with a row per image."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spd_zoo.cli.common import CommandError, complain, explained, non_negative, positive, print_notes

if TYPE_CHECKING:
    from spd_zoo.data.notes import Notes
    from spd_zoo.inference.results import Job

T = TypeVar("T")

__all__ = ["add_options", "class_map", "find_images", "write"]

_OF_DATA = {"split": "", "image_column": "", "label_column": ""}


def add_options(command: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Adds the options for a file of results, and returns their group."""
    command.add_argument(
        "--class-map",
        metavar="FILE",
        help="your own names for classes: a YAML file with lines like `your name: name in the network`",
    )
    group = command.add_argument_group("many images", "one file of results, in bounded memory, that can be resumed")
    group.add_argument(
        "--results", type=Path, metavar="FILE", help="new .jsonl, .csv or .parquet file, one row per image"
    )
    group.add_argument("--data", help="a data set instead of IMAGES, as for finetune")
    group.add_argument("--split", default="", help="split of the data set (default: the only one)")
    group.add_argument("--image-column", default="", help="as for finetune")
    group.add_argument("--label-column", default="", help="as for finetune; the labels are not used")
    group.add_argument(
        "--workers", type=non_negative, default=2, metavar="N", help="processes that read images (default: 2)"
    )
    group.add_argument(
        "--save-every", type=positive, default=512, metavar="N", help="save after every N images (default: 512)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing FILE once the new one is complete")
    return group


def find_images(
    options: argparse.Namespace, notes: "Notes", find: "Callable[[list[str], Notes], list[T]]"
) -> "list[T]":
    """The images of a command without `--results`.

    Args:
        options: The command's options.
        notes: Receives notes on files that are left out.
        find: `spd_zoo.data.reading.find_images` or `spd_zoo.inference.sources.find_sources`.

    Returns:
        What `find` returns for them.

    Raises:
        CommandError: If there are none, or a data set instead.
    """
    if options.data:
        raise CommandError("--data needs --results FILE, which receives a row for each image")
    _refuse(options, "--results FILE", workers=2, save_every=512, overwrite=False, **_OF_DATA)
    if not options.images:
        usage = f"spd-zoo {options.command} MODEL"
        raise CommandError(f"give IMAGES: `{usage} IMAGES`, or `{usage} --data DATA --results FILE`")
    with explained():
        _check_order(options)
        return find(options.images, notes)


def _refuse(options: argparse.Namespace, owner: str, **defaults: Any) -> None:
    """Raises CommandError if one of the options, which only mean something with `owner`, has not its default."""
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise CommandError(f"--{name.replace('_', '-')} goes with {owner}; add that, or leave it out")


def _check_order(options: argparse.Namespace) -> None:
    """Raises CommandError if one of the images is the name or the folder of a network, which comes first."""
    from spd_zoo.files import exists, is_file
    from spd_zoo.weights.folder import CONFIG, WEIGHTS
    from spd_zoo.weights.load import is_network

    for image in options.images:
        usage = f"spd-zoo {options.command} {image} IMAGES"
        if ":" not in image and not exists(image) and is_network(image):
            raise CommandError(f"{image} is a network; give it before the images: `{usage}`")
        if image and all(is_file(Path(image, name)) for name in (CONFIG, WEIGHTS)):  # its figures are no images
            raise CommandError(f"{image} is the folder of a network; give it before the images: `{usage}`")


def class_map(options: argparse.Namespace) -> dict[str, str]:
    """The class map of `--class-map`; empty without it.

    Raises:
        CommandError: If there is no such file, or it is no class map.
    """
    if options.class_map is None:
        return {}
    from spd_zoo.data.classes import load_class_map

    with explained():
        return load_class_map(options.class_map)


def write(
    options: argparse.Namespace,
    job_for: "Callable[[str], Job]",
    lower: str,
    find: "Callable[[list[str], Notes], Sequence[Any]]",
    boxes: bool = False,
) -> int:
    """Writes the file of results.

    Args:
        options: The command's options.
        job_for: Creates the job for a torch device.
        lower: Advice for the case that memory runs out.
        find: As for `find_images`.
        boxes: Whether the data set may have boxes.

    Returns:
        The exit status.

    Raises:
        CommandError: If options do not go together, or the file cannot be written.
    """
    if options.json:
        raise CommandError("--json prints, --results writes a file; give one of them")
    if bool(options.data) == bool(options.images):
        raise CommandError("give either IMAGES or a data set with --data")
    if not options.data:
        _refuse(options, "--data DATA", **_OF_DATA)
    with explained(lower):
        from spd_zoo.data.notes import Notes
        from spd_zoo.inference.loop import Files, Images
        from spd_zoo.inference.results import open_split, write_results
        from spd_zoo.inference.sources import Video
        from spd_zoo.process import join

        process = join(options.device)
        images: Images
        left_out = Notes()
        if options.data:
            images = open_split(options.data, options.split, options.image_column, options.label_column, boxes)
        else:
            _check_order(options)
            sources = find(options.images, left_out)
            video = next((source for source in sources if isinstance(source, Video)), None)
            if video is not None:
                raise CommandError(f"--results is for images, and {video} is a video; use --out or --json for it")
            images = Files([str(source) for source in sources])
        job = job_for(str(process.device))
        summary = write_results(
            images,
            job,
            options.results,
            process,
            options.workers,
            options.save_every,
            options.overwrite,
        )
    if summary is None:
        return 0  # another process writes the file and prints the summary
    print(f"{options.results}: {summary.images:,} images")
    print_notes([*left_out.lines(), *summary.notes])
    if summary.failed:
        total = f"{summary.failed:,} of {summary.images:,} images"
        complain(f"{total} could not be read; the column error of {options.results} says why")
    return int(summary.failed > 0)
