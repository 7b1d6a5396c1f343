"""`spd-zoo detect`: the objects in images."""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from spd_zoo.cli import results
from spd_zoo.cli.common import (
    DEVICE,
    IMAGE_SIZE,
    MAX_PIXELS,
    CommandError,
    Commands,
    add_command,
    class_scores,
    complain,
    explained,
    image_size,
    positive,
    print_notes,
    threshold,
)
from spd_zoo.console import bar_disabled, cleaned
from spd_zoo.files import is_folder

if TYPE_CHECKING:
    from spd_zoo.inference.detector import Detector
    from spd_zoo.inference.results import Job

__all__ = ["add"]

_LOWER = "use a smaller --batch-size or --image-size; with --tile, small objects are still found at a small one"


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "detect", _run, "detect objects in images")
    command.add_argument(
        "model", metavar="MODEL", help="DETECTOR or DETECTOR.TAG, the folder of a run, or an exported .onnx file"
    )
    command.add_argument(
        "images",
        metavar="IMAGES",
        nargs="*",
        help="images, videos, folders, globs, .txt files that list these, addresses, or a camera's number",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="new folder for marked images and detections.json")
    command.add_argument("--save-txt", action="store_true", help="also write YOLO's label files to DIR/labels")
    command.add_argument("--save-crops", action="store_true", help="also write every object's pixels to DIR/crops")
    command.add_argument("--no-images", action="store_true", help="write no marked images and videos to DIR")
    command.add_argument(
        "--score",
        type=_score,
        default=0.25,
        metavar="X|auto",
        help="minimum score; auto: the best one of each class on the run's validation images (default: 0.25)",
    )
    command.add_argument(
        "--iou",
        type=threshold,
        metavar="X",
        help="IoU threshold of NMS, on tiles at most 0.5 (default: that of the network's authors)",
    )
    command.add_argument(
        "--class-scores", type=class_scores, metavar="CLASS=X,...", help="minimum scores of single classes"
    )
    command.add_argument("--classes", metavar="CLASS,...", help="detect these classes only, by name or number")
    command.add_argument(
        "--agnostic", action="store_true", help="class-agnostic NMS: boxes also suppress boxes of other classes"
    )
    command.add_argument(
        "--max-detections",
        type=positive,
        metavar="N",
        help="maximum number of objects per image (default: 300, or an exported file's)",
    )
    command.add_argument("--image-size", type=image_size, metavar="N|HxW", help=IMAGE_SIZE)
    command.add_argument("--tile", type=positive, metavar="N", help="also cut large images into squares of N pixels")
    command.add_argument("--overlap", type=float, metavar="X", help="overlap of tiles, as a share of N (default: 0.2)")
    command.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    command.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images per batch (default: 8)")
    command.add_argument("--device", help=DEVICE)
    command.add_argument("--json", action="store_true", help="print JSON, as in detections.json")
    results.add_options(command)


def _score(text: str) -> float | str:
    """Raises argparse.ArgumentTypeError if this is neither a number from 0 to 1 nor auto."""
    return text if text == "auto" else threshold(text)


def _run(options: argparse.Namespace) -> int:
    from spd_zoo.inference.sources import find_sources

    if options.out is None and (options.save_txt or options.save_crops or options.no_images):
        raise CommandError("--save-txt, --save-crops and --no-images apply to the files in --out; add --out DIR")
    if options.overlap is not None and options.tile is None:
        raise CommandError("--overlap is for tiles; add --tile N")
    if options.results is not None:
        if options.out is not None:
            raise CommandError("--out draws into every image, --results writes one file; give one of them")
        from spd_zoo.inference.results import detection

        def job(device: str) -> "Job":
            return detection(_detector(options, device), options.model)

        return results.write(options, job, _LOWER, find_sources, boxes=True)
    from tqdm import tqdm

    from spd_zoo.data.notes import Notes
    from spd_zoo.inference.output import CocoFile, Saved
    from spd_zoo.inference.sources import Video
    from spd_zoo.inference.stream import detect
    from spd_zoo.process import StopSignals

    notes = Notes()
    sources = results.find_images(options, notes, find_sources)
    if options.out is not None and (around := _folder_around(options.out, options.images)) is not None:
        raise CommandError(f"{options.out} lies among the images in {around}; give another --out")
    saved = Saved(not options.no_images, options.save_txt, options.save_crops)
    videos = [source for source in sources if isinstance(source, Video)]
    failed = False
    with explained(_LOWER), ExitStack() as opened:
        detector = _detector(options, options.device)
        signals = StopSignals()
        if any(video.live for video in videos):  # Ctrl-C ends them, and what was found is written
            opened.enter_context(signals)
        coco = opened.enter_context(CocoFile(detector.class_names))
        few = len(sources) <= options.batch_size and not videos
        detected = detect(detector, sources, options.out, saved, lambda: bool(signals.number))
        total = None if videos else len(sources)
        for image in tqdm(detected, total=total, unit="image", leave=False, disable=bar_disabled(few)):
            for note in image.notes:
                notes.add(note, str(image.path))
            if image.error is not None:
                failed = True
                complain(f"{image.path}: {image.error}")
            elif options.json:
                coco.add(image)
            elif image.detections is not None:
                found = image.detections
                objects = zip(map(cleaned, found.names), found.scores, found.boxes.tolist(), strict=True)
                lines = (f"  {score:.2f}  {name}  {' '.join(f'{x:.0f}' for x in box)}" for name, score, box in objects)
                least = (
                    "the minimum scores" if options.class_scores or options.score == "auto" else f"{options.score:g}"
                )
                nothing = () if len(found) else (f"  no objects above {least}",)
                tqdm.write("\n".join((str(image), *lines, *nothing)))
        if options.json:
            coco.write(sys.stdout)
    print_notes(notes.lines())
    return int(failed)


def _folder_around(out: Path, images: list[str]) -> str | None:
    """The first of the folders with images around the folder `out`, whose images would be found there the next time."""
    above = out.resolve().parents
    return next((image for image in images if is_folder(image) and Path(image).resolve() in above), None)


def _detector(options: argparse.Namespace, device: str | None) -> "Detector":
    from spd_zoo.inference.detector import Detector, trained_on_tiles

    detector = Detector(
        options.model,
        device=device,
        image_size=options.image_size,
        score_threshold=options.score,
        iou_threshold=options.iou,
        max_detections=options.max_detections,
        batch_size=options.batch_size,
        tile=options.tile,
        class_map=results.class_map(options),
        classes=options.classes.split(",") if options.classes is not None else None,
        class_scores=options.class_scores,
        agnostic=options.agnostic,
        **{name: getattr(options, name) for name in ("overlap", "max_pixels") if getattr(options, name) is not None},
    )
    if options.tile is None and (trained := trained_on_tiles(options.model, detector.net)) is not None:
        side, overlap = trained
        print_notes(
            [f"{options.model} was trained on tiles; --tile {side} --overlap {overlap:g} cuts images the same way"]
        )
    if options.score == "auto":
        print_notes([detector.scores_in_words()])
    return detector
