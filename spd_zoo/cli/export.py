"""`spd-zoo export`: a network as one ONNX or pt2 file."""

import argparse
from pathlib import Path

from spd_zoo.cli.common import (
    IMAGE_SIZE,
    CommandError,
    Commands,
    add_command,
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
    command = add_command(commands, "export", _run, "export a network to one file for other runtimes")
    command.add_argument("model", metavar="MODEL", help="NETWORK or NETWORK.TAG, or the folder of a run")
    command.add_argument("--to", choices=("onnx", "pt2"), required=True, help="ONNX, or torch.export's format")
    command.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: in the run, or here)")
    command.add_argument("--image-size", type=image_size, metavar="N|HxW", help=IMAGE_SIZE)
    command.add_argument("--no-fold", action="store_true", help="keep space-to-depth and BatchNorm as layers")
    group = command.add_argument_group("detectors")
    group.add_argument("--raw", action="store_true", help="raw predictions, without decoding and NMS")
    group.add_argument("--score", type=threshold, default=0.25, metavar="X", help="minimum score (default: 0.25)")
    group.add_argument(
        "--iou", type=threshold, metavar="X", help="IoU threshold of NMS (default: that of the network's authors)"
    )
    group.add_argument(
        "--max-detections",
        type=positive,
        default=300,
        metavar="N",
        help="maximum number of boxes per image (default: 300)",
    )
    group = command.add_argument_group("int8", "static quantisation of an ONNX file, measured before and after")
    group.add_argument("--int8", action="store_true", help="compute convolutions and linear layers in int8")
    group.add_argument("--data", help="with --int8: data set for calibration and for the measurement, as for finetune")
    group.add_argument("--image-column", default="", help="as for finetune")
    group.add_argument("--label-column", default="", help="as for finetune")
    group.add_argument(
        "--workers", type=non_negative, default=2, metavar="N", help="processes that read images (default: 2)"
    )


def _run(options: argparse.Namespace) -> int:
    if options.int8 and (options.to != "onnx" or options.raw or options.data is None):
        raise CommandError("--int8 is for --to onnx with --data, and without --raw, whose boxes cannot be measured")
    if not options.int8 and (options.data or options.image_column or options.label_column):
        raise CommandError("--data and its columns are for --int8; add it, or leave them out")
    with explained("use a smaller --image-size, or a machine with more memory"):
        from spd_zoo.data.notes import Notes
        from spd_zoo.exporter import export
        from spd_zoo.quantization import export_int8

        notes = Notes()
        settings = {"image_size": options.image_size, "fold": not options.no_fold, "notes": notes}
        settings |= {"score_threshold": options.score, "iou_threshold": options.iou}
        settings |= {"max_detections": options.max_detections}
        if options.int8:
            columns = {"image_column": options.image_column, "label_column": options.label_column}
            file, before, after = export_int8(
                options.model, options.data, options.out, workers=options.workers, **columns, **settings
            )
            for note in (*before.warnings, *before.notes):
                notes.add(note)
            print(f"float32, {before.in_words()}\nint8, {after.in_words()}")
        else:
            file = export(options.model, options.to, options.out, raw=options.raw, **settings)
        print(file)
    print_notes(notes.lines())
    return 0
