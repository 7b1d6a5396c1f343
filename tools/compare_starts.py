"""Compares pretrained and random initial weights on your own data set, with the same options and number of epochs.

    python tools/compare_starts.py --data DIR --out RUNS [--epochs 20] [--seeds 3] [--image-size 48]
    python tools/compare_starts.py --coco BCCD --out RUNS --largest-class 300

Trains `--model` from its pretrained weights and from scratch, and timm's resnet50 from scratch (with
`--timm-pretrained`, from its weights on the Hub). Each is trained with several seeds, with the defaults of `spd-zoo
finetune` and the same number of epochs, and evaluated on the split test, or val if there is none. Interrupted runs are
resumed; their minutes do not count. With `--coco`, a folder with `images/` and `instances_{train,val,test}.json`, every
annotated box becomes an image.
"""

import argparse
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from exit_status import explained
from PIL import Image

import spd_zoo  # noqa: F401  (registers the networks)
from spd_zoo.files import whole
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import FinetuneConfig, finetune


def crop_boxes(coco: Path, target: Path, largest_class: int) -> None:
    """Crops COCO boxes into class folders; in train and val at most `largest_class` images per class, if not 0."""
    for split in ("train", "val", "test"):
        found = json.loads((coco / f"instances_{split}.json").read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in found["categories"]}
        files = {image["id"]: image["file_name"] for image in found["images"]}
        counts: Counter[str] = Counter()
        for box in random.Random(0).sample(found["annotations"], len(found["annotations"])):
            name = names[box["category_id"]]
            counts[name] += 1
            if largest_class and counts[name] > largest_class and split != "test":
                continue
            left, top, width, height = box["bbox"]
            folder = target / split / name
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(coco / "images" / files[box["image_id"]]) as image:
                image.crop((left, top, left + width, top + height)).save(folder / f"{box['id']}.png")


def minutes_of(run: Path) -> float | None:
    """Time between the ends of the first and last epoch, scaled to all epochs; None of one epoch, or if interrupted."""
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines]
    ends = [datetime.fromisoformat(time).timestamp() for time, first, *_ in words if first == "epoch"]
    starts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    again = [datetime.fromisoformat(start["time"]).timestamp() for start in starts[1:]]
    if len(ends) < 2 or any(time < ends[-1] for time in again):
        return None
    return (ends[-1] - ends[0]) / (len(ends) - 1) * len(ends) / 60


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per start: accuracy over the seeds, and minutes of training."""
    starts = {
        f"{options.model}, pretrained": (options.model, True),
        f"{options.model}, from scratch": (options.model, False),
        f"timm's resnet50, {'pretrained' if options.timm_pretrained else 'from scratch'}": (
            "resnet50",
            options.timm_pretrained,
        ),
    }
    rows = []
    for name, (model, pretrained) in starts.items():
        found = []
        for seed in range(options.seeds):
            run = options.out / f"{model}_{'pretrained' if pretrained else 'scratch'}_{seed}"
            config = FinetuneConfig(
                model,
                str(options.data),
                run,
                pretrained=pretrained,
                epochs=options.epochs,
                image_size=str(options.image_size),
                batch_size=options.batch_size,
                seed=seed,
                workers=options.workers,
            )
            finetune(config)
            (on_test,) = evaluate(str(run), options.data, workers=options.workers)
            found.append(on_test.predictions.summary() | {"minutes": minutes_of(run)})
        data = json.loads((run / "data.json").read_text(encoding="utf-8"))
        row: dict[str, Any] = {
            "start": name,
            "train_images": data["train"]["images"],
            "test_images": found[0]["images"],
        }
        row |= {"epochs": options.epochs, "image_size": options.image_size, "seeds": options.seeds}
        for key in ("top1", "macro_f1", "minutes"):
            values = [figures[key] for figures in found if figures[key] is not None]
            row[key] = round(statistics.mean(values), 4) if values else None
        row["top1_std"] = round(statistics.stdev([figures["top1"] for figures in found]), 4) if len(found) > 1 else None
        rows.append(row)
    return rows


@explained
def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per start; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path)
    source.add_argument("--coco", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, and for the images of --coco")
    parser.add_argument(
        "--largest-class", type=int, default=0, help="images of a class in train and in val of --coco (0: all)"
    )
    parser.add_argument("--model", default="pyconvresnet50_spd")
    parser.add_argument("--timm-pretrained", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.coco:
        options.data = options.out / f"images_{options.coco.resolve().name}_{options.largest_class or 'all'}"
        if not options.data.is_dir():
            options.out.mkdir(parents=True, exist_ok=True)
            with whole(options.data) as folder:  # all images, or none
                crop_boxes(options.coco, folder, options.largest_class)
    rows = compare(options)
    for row in rows:
        print(json.dumps(row) if options.json else ", ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
