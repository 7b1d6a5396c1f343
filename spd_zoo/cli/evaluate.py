"""`spd-zoo evaluate`: the accuracy of a network on labelled images."""

import argparse
import json
from pathlib import Path

from spd_zoo.cli.common import (
    DEVICE,
    MAX_PIXELS,
    Commands,
    add_command,
    complain,
    explained,
    image_size,
    non_negative,
    positive,
    print_notes,
    threshold,
)

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "evaluate", _run, "measure a network on labelled images")
    command.add_argument(
        "model", metavar="MODEL", help="NETWORK or NETWORK.TAG, the folder of a run, or an exported .onnx file"
    )
    command.add_argument("--data", required=True, help="labelled images, as for finetune")
    command.add_argument(
        "--split",
        default="",
        help="split of the data (default: test, else val, else what the run held out, else train)",
    )
    command.add_argument(
        "--image-size",
        type=image_size,
        nargs="+",
        default=(),
        metavar="N|HxW",
        help="sizes of the network's input in pixels, each evaluated (default: the network's own)",
    )
    command.add_argument(
        "--tile",
        type=non_negative,
        metavar="N",
        help="detectors: also cut larger images into squares of N pixels; 0: never (default: as the run was trained)",
    )
    command.add_argument("--overlap", type=float, metavar="X", help="overlap of tiles, as a share of N (default: 0.2)")
    command.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    command.add_argument(
        "--iou",
        type=threshold,
        metavar="X",
        help="detectors: IoU threshold of NMS, on tiles at most 0.5 (default: that of the network's authors)",
    )
    command.add_argument(
        "--max-detections",
        type=positive,
        metavar="N",
        help="detectors: boxes that count per image, and per class in an image (default: the authors' limit per image, "
        "and COCO's 100 per class)",
    )
    command.add_argument(
        "--agnostic",
        action="store_true",
        help="detectors: class-agnostic NMS: boxes also suppress boxes of other classes",
    )
    command.add_argument("--flip", action="store_true", help="average over every image and its mirror image")
    command.add_argument("--out", type=Path, help="folder for results.csv and tables per class")
    command.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images per batch (default: 64)")
    command.add_argument(
        "--workers", type=non_negative, default=2, metavar="N", help="processes that read images (default: 2)"
    )
    command.add_argument("--device", help=DEVICE)
    command.add_argument("--bf16", action="store_true", help="compute in bfloat16 where autocast allows it")
    command.add_argument("--image-column", default="", help="as for finetune")
    command.add_argument("--label-column", default="", help="as for finetune")
    command.add_argument(
        "--class-map", metavar="FILE", help="YAML file with lines like `name in the data: name in the network`"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> int:
    with explained("use a smaller --batch-size or --image-size, or fewer --workers"):
        from spd_zoo.data.classes import load_class_map
        from spd_zoo.training.evaluate import evaluate, save

        evaluations = evaluate(
            options.model,
            options.data,
            split=options.split,
            image_size=list(options.image_size),
            flip=options.flip,
            max_detections=options.max_detections,
            agnostic=options.agnostic,
            iou_threshold=options.iou,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            bf16=options.bf16,
            image_column=options.image_column,
            label_column=options.label_column,
            tile=options.tile,
            overlap=options.overlap,
            max_pixels=options.max_pixels,
            class_map=load_class_map(options.class_map) if options.class_map is not None else None,
            out=options.out,
        )
    for line in evaluations[0].warnings:
        complain(line)
    print_notes(evaluations[0].notes)
    if options.json:
        rows = [
            evaluation.row | evaluation.predictions.summary() | {"split": evaluation.split, "notes": evaluation.notes}
            for evaluation in evaluations
        ]
        print(json.dumps(rows, indent=2))
    else:
        for evaluation in evaluations:
            print(evaluation.in_words())
    if options.out is not None:
        save(evaluations, options.out)
    return 0
