"""`spd-zoo predict`: the most probable classes of images."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from spd_zoo.cli import results
from spd_zoo.cli.common import DEVICE, Commands, add_command, complain, explained, positive, print_notes

if TYPE_CHECKING:
    from spd_zoo.inference.classifier import Prediction

__all__ = ["add"]

_LOWER = "use a smaller --batch-size"


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "predict", _run, "classify images")
    command.add_argument(
        "model", metavar="MODEL", help="network, with or without a tag, a run, or an exported .onnx file"
    )
    command.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders or globs")
    command.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes per image (default: 5)")
    command.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: 32)")
    command.add_argument("--device", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print JSON")
    results.add_options(command)


def _run(options: argparse.Namespace) -> int:
    class_map = results.class_map(options)
    if options.results is not None:
        from spd_zoo.inference.results import classification

        return results.write(
            options,
            lambda device: classification(options.model, options.top_k, options.batch_size, device, class_map),
            _LOWER,
        )
    from tqdm import tqdm

    from spd_zoo.data.notes import Notes
    from spd_zoo.inference.classifier import predict

    notes = Notes()
    paths = results.find_images(options, notes)
    predictions = predict(options.model, paths, options.top_k, options.batch_size, options.device, class_map)
    few = len(paths) <= options.batch_size
    failed = False
    separator = "[\n"
    with explained(_LOWER):
        for prediction in tqdm(predictions, total=len(paths), unit="image", leave=False, disable=True if few else None):
            for note in prediction.notes:
                notes.add(note, str(prediction.path))
            if prediction.error is not None:
                failed = True
                complain(f"{prediction.path}: {prediction.error}")
            if options.json:
                tqdm.write(separator + json.dumps(_as_json(prediction)), end="")
                separator = ",\n"
            elif prediction.error is None:
                lines = (f"  {100 * each.probability:6.2f} %  {each.name}" for each in prediction.top)
                tqdm.write("\n".join((str(prediction.path), *lines)))
    if options.json:
        print("\n]")
    print_notes(notes.lines())
    return int(failed)


def _as_json(prediction: "Prediction") -> dict[str, Any]:
    path = str(prediction.path)
    if prediction.error is not None:
        return {"path": path, "error": prediction.error}
    notes = {"notes": prediction.notes} if prediction.notes else {}
    return {"path": path, "top": [asdict(each) for each in prediction.top], **notes}
