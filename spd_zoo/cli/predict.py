"""`spd-zoo predict`: the most probable classes of images."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_zoo.cli import results
from spd_zoo.cli.common import (
    DEVICE,
    CommandError,
    Commands,
    add_command,
    complain,
    explained,
    positive,
    print_notes,
)
from spd_zoo.console import bar_disabled, cleaned

if TYPE_CHECKING:
    from spd_zoo.inference.classifier import Prediction

__all__ = ["add"]

_LOWER = "use a smaller --batch-size"


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "predict", _run, "classify images")
    command.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="NETWORK or NETWORK.TAG, the folder of a run, or an exported .onnx file (default: "
        "tf_efficientnet_lite0_spd, which knows the 1,000 classes of ImageNet)",
    )
    command.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders or globs")
    command.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes per image (default: 5)")
    command.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: 32)")
    command.add_argument("--device", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print JSON")
    group = results.add_options(command)
    group.add_argument(
        "--probabilities", action="store_true", help="a column with the probabilities of all classes, in their order"
    )


def _run(options: argparse.Namespace) -> int:
    from spd_zoo.data.reading import find_images

    class_map = results.class_map(options)
    _set_model(options)
    if options.results is not None:
        from spd_zoo.inference.results import classification

        return results.write(
            options,
            lambda device: classification(
                options.model, options.top_k, options.batch_size, device, class_map, options.probabilities
            ),
            _LOWER,
            find_images,
        )
    if options.probabilities:
        raise CommandError("--probabilities is a column of --results; add --results FILE")
    from tqdm import tqdm

    from spd_zoo.data.notes import Notes
    from spd_zoo.inference.classifier import predict

    notes = Notes()
    paths = results.find_images(options, notes, find_images)
    predictions = predict(options.model, paths, options.top_k, options.batch_size, options.device, class_map)
    few = len(paths) <= options.batch_size
    failed = False
    separator = "[\n"
    with explained(_LOWER):
        for prediction in tqdm(predictions, total=len(paths), unit="image", leave=False, disable=bar_disabled(few)):
            for note in prediction.notes:
                notes.add(note, str(prediction.path))
            if prediction.error is not None:
                failed = True
                complain(f"{prediction.path}: {prediction.error}")
            if options.json:
                tqdm.write(separator + json.dumps(_as_json(prediction)), end="")
                separator = ",\n"
            elif prediction.error is None:
                lines = (f"  {100 * each.probability:6.2f} %  {cleaned(each.name)}" for each in prediction.top)
                tqdm.write("\n".join((str(prediction.path), *lines)))
    if options.json:
        print("\n]")
    print_notes(notes.lines())
    return int(failed)


def _set_model(options: argparse.Namespace) -> None:
    """Sets the default network unless the first argument is a network; it then is one of the images.

    Raises:
        CommandError: If it could be both, or cannot be used.
        ModelError: If there is nothing of this name.
    """
    from spd_zoo.inference.classifier import DEFAULT_CLASSIFIER

    first = options.model
    if first is not None and _is_model(first):
        return
    options.model = DEFAULT_CLASSIFIER
    if first is not None:
        options.images = [first, *options.images]
    if options.images or options.data:
        print_notes([f"no network is named, so {DEFAULT_CLASSIFIER} is used (1,000 classes of ImageNet)"])


def _is_model(first: str) -> bool:
    """Whether the first argument is a network or the folder of a run; otherwise it names images."""
    from spd_zoo.data.reading import SUFFIXES, ImageFilter, files_in
    from spd_zoo.files import exists, is_folder
    from spd_zoo.weights.catalogue import CHECKPOINTS, unknown_network
    from spd_zoo.weights.folder import CONFIG, WEIGHTS
    from spd_zoo.weights.load import is_network

    there, folder = exists(first), is_folder(first)
    suffix = Path(first).suffix.lower()
    if (suffix in SUFFIXES and not folder) or "://" in first:
        return False
    if suffix == ".onnx" and not folder:
        return True
    if is_network(first):
        if there:
            raise CommandError(
                f"{first} is the name of a network, and of a file or folder here; write ./{first} for the latter, or "
                "the network with its tag"
            )
        return True
    if folder:
        is_image, inside, unreadable = ImageFilter(), Path(first), list[str]()
        if any((inside / name).exists() for name in (CONFIG, WEIGHTS, "run.yaml")):
            return True
        if not any(is_image(file, inside) for file in files_in(inside, unreadable)) and not unreadable:
            raise CommandError(f"{first} is a folder without images, and without the {CONFIG} of a finished run")
    elif suffix in CHECKPOINTS and there:
        raise unknown_network(first)
    elif not there and not set(first) & set("*?["):
        raise unknown_network(first, "network, file or folder")
    return False


def _as_json(prediction: "Prediction") -> dict[str, Any]:
    path = str(prediction.path)
    if prediction.error is not None:
        return {"path": path, "error": prediction.error}
    notes = {"notes": prediction.notes} if prediction.notes else {}
    return {"path": path, "top": [asdict(each) for each in prediction.top], **notes}
