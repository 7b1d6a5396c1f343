"""`spd-zoo detect`: the objects in images."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from spd_zoo.cli import results
from spd_zoo.cli.common import (
    DEVICE,
    MAX_PIXELS,
    CommandError,
    Commands,
    add_command,
    bar_disabled,
    complain,
    explained,
    image_size,
    positive,
    print_notes,
)

if TYPE_CHECKING:
    from spd_zoo.inference.detector import Detector

__all__ = ["add"]

_LOWER = "use a smaller --batch-size or --image-size; with --tile, small objects are still found at a small one"


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "detect", _run, "detect objects in images")
    command.add_argument(
        "model", metavar="MODEL", help="detector, with or without a tag, a run, or an exported .onnx file"
    )
    command.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders or globs")
    command.add_argument("--out", type=Path, metavar="DIR", help="new folder for marked images and detections.json")
    command.add_argument("--score", type=float, default=0.25, metavar="X", help="minimum score (default: 0.25)")
    command.add_argument("--iou", type=float, metavar="X", help="IoU threshold of NMS (default: the authors')")
    command.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels (default: the network's)")
    command.add_argument("--tile", type=positive, metavar="N", help="also cut large images into squares of N pixels")
    command.add_argument(
        "--overlap", type=float, default=0.2, metavar="X", help="overlap of tiles, as a share of N (default: 0.2)"
    )
    command.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    command.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per batch (default: 8)")
    command.add_argument("--device", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print JSON, as in detections.json")
    results.add_options(command)


def _run(options: argparse.Namespace) -> int:
    if options.results is not None:
        if options.out is not None:
            raise CommandError("--out draws into every image, --results writes one file; give one of them")
        from spd_zoo.inference.results import detection

        return results.write(options, lambda device: detection(_detector(options, device), options.model), _LOWER)
    from tqdm import tqdm

    from spd_zoo.data.notes import Notes
    from spd_zoo.inference.detector import as_coco, detect

    notes = Notes()
    paths = results.find_images(options, notes)
    done = []
    with explained(_LOWER):
        detector = _detector(options, options.device)
        few = len(paths) <= options.batch_size
        detected = detect(detector, paths, options.out)
        for image in tqdm(detected, total=len(paths), unit="image", leave=False, disable=bar_disabled(few)):
            done.append(image)
            for note in image.notes:
                notes.add(note, str(image.path))
            if image.error is not None:
                complain(f"{image.path}: {image.error}")
            elif image.detections is not None and not options.json:
                found = image.detections
                objects = zip(found.names, found.scores, found.boxes.tolist(), strict=True)
                lines = (f"  {score:.2f}  {name}  {' '.join(f'{x:.0f}' for x in box)}" for name, score, box in objects)
                nothing = () if len(found) else (f"  no objects above {options.score:g}",)
                tqdm.write("\n".join((str(image.path), *lines, *nothing)))
    if options.json:
        print(json.dumps(as_coco(done, detector.class_names), indent=2))
    print_notes(notes.lines())
    return int(any(image.error is not None for image in done))


def _detector(options: argparse.Namespace, device: str | None) -> "Detector":
    from spd_zoo.inference.detector import Detector

    return Detector(
        options.model,
        device=device,
        image_size=options.image_size,
        score_threshold=options.score,
        iou_threshold=options.iou,
        batch_size=options.batch_size,
        tile=options.tile,
        overlap=options.overlap,
        class_map=results.class_map(options),
    )
