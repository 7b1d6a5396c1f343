"""Compares the defaults of `spd-zoo finetune` with its own start and with timm's plain recipe, on small data sets.

    python tools/finetune_sweep.py --train DIR --test DIR --out RUNS --name tiny --model tf_efficientnet_lite0_spd
    python tools/finetune_sweep.py --parquet CIFAR100 --out RUNS --name cifar100 --model cifar_resnet20 \
        --classes 100 --images 20 --size 32

`--train` and `--test` hold class folders; `--parquet` holds a data set's splits train and test. Each seed draws classes
and training images. The methods defaults and timm train for the same number of steps, quick and best as these recipes
say. The last epoch counts, so that the test images choose nothing. The start is the network before its first epoch:
with a linear probe as classifier, or with the pretrained outputs of the same classes where they are better on the
training images.

`--record` gets a line for each result; results that it has are not computed again, and interrupted runs are resumed.
"""

import argparse
import csv
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linear_probe import draw, read

from spd_zoo.cli import main as cli
from spd_zoo.cli.common import print_table
from spd_zoo.data.labelled import open_data
from spd_zoo.training.config import GENERAL, load_recipe

METHODS = ("defaults", "timm", *GENERAL)
RECORD = Path(__file__).parent / "finetune_sweep.jsonl"
# timm's train.py with its defaults: SGD, learning rate 0.1 for 256 images, weight decay 2e-5, random classifier
TIMM = ["--opt", "sgd", "--weight-decay", "2e-5", "--layer-decay", "1", "--head-init", "random", "--no-freeze-bn"]
TIMM += ["--head-epochs", "0", "--crop-scale", "0.08", "--color-jitter", "0.4", "--warmup-lr", "1e-5"]


def unpack(parquet: Path, folder: Path, tests: int) -> None:
    """Writes the training images and the first `tests` test images of each class as class folders, if there are none.

    Args:
        parquet: The data set.
        folder: Where they go.
        tests: Test images of a class.
    """
    if folder.is_dir():
        return
    unfinished = folder.with_suffix(".tmp")
    for split in ("train", "test"):
        data = open_data(str(parquet), split)
        if data is None:
            raise SystemExit(f"{parquet} has no split {split}")
        for name in data.class_names:
            (unfinished / split / name).mkdir(parents=True, exist_ok=True)
        written: Counter[int] = Counter()
        for i in range(len(data)):
            label = data.label(i)
            if split == "test" and written[label] == tests:
                continue
            written[label] += 1
            data.image(i).save(unfinished / split / data.class_names[label] / f"{i}.png")
    unfinished.rename(folder)


def epochs(options: argparse.Namespace, method: str) -> int:
    """The epochs of a method."""
    return int(load_recipe(method)["epochs"]) if method in GENERAL else int(options.epochs)


def train(options: argparse.Namespace, data: Path, method: str, seed: int) -> dict[str, float]:
    """Top-1 in per cent before the first epoch, if it was evaluated, and after the last one."""
    run = options.out / f"{data.name}_{options.model}_{options.size}_{epochs(options, method)}_{method}_{seed}"
    command = ["finetune", options.model, "--data", str(data), "--out", str(run), "--image-size", str(options.size)]
    command += ["--seed", str(seed), "--keep", "last", "--workers", "1", "--no-bf16"]
    command += ["--recipe", method] if method in GENERAL else ["--epochs", str(options.epochs)]
    if method == "timm":
        images = options.classes * options.images
        batch = max(8, min(128, 2 ** ((images // 20).bit_length() - 1)))  # finetune's own, so that the steps are equal
        command += [*TIMM, "--lr", str(0.1 * batch / 256), "--batch-size", str(batch)]
    if cli.main(command):
        raise SystemExit(1)
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    start = {"start": float(rows[0]["val_top1"])} if rows[0]["epoch"] == "0" else {}
    return start | {"end": float(rows[-1]["val_top1"])}


def summary(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each setting and method: mean top-1 over the seeds at the start and at the end, and the seeds."""
    found = defaultdict(list)
    for row in rows:
        settings = ("data", "network", "classes", "images", "pixels", "epochs", "method")
        found[tuple(str(row[name]) for name in settings)].append((row.get("start"), row["end"]))
    table = []
    for key, results in sorted(found.items()):
        starts = [start for start, _ in results if start is not None]
        means = (f"{statistics.mean(values):.1f}" if values else "" for values in (starts, [end for _, end in results]))
        table.append((*key, *means, str(len(results))))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--parquet", type=Path, help="instead: a folder with the splits of CIFAR-100")
    parser.add_argument("--out", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--name", required=True, help="name of the data in the record")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--model", required=True)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100, help="training images of a class")
    parser.add_argument("--test-images", type=int, default=20, help="test images of a class, with --parquet")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=["defaults", "timm"], choices=METHODS)
    options = parser.parse_args(argv)
    if options.parquet is not None:
        folder = options.out / options.name
        unpack(options.parquet, folder, options.test_images)
        options.train, options.test = folder / "train", folder / "test"
    for seed in range(options.seeds):
        images = options.out / f"{options.name}_{options.classes}_{options.images}_{seed}"
        data = draw(options.train, options.test, images, seed, options.classes, options.images)
        for method in options.methods:
            facts = {"data": options.name, "network": options.model, "classes": options.classes}
            facts |= {"images": options.images, "pixels": options.size}
            facts |= {"epochs": epochs(options, method), "method": method, "seed": seed}
            if any(row | facts == row for row in read(options.record)):
                continue
            row = facts | {name: round(top1, 2) for name, top1 in train(options, data, method, seed).items()}
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    header = ("data", "network", "classes", "images", "pixels", "epochs", "method", "start", "end", "seeds")
    print_table(header, summary(read(options.record)), right=(2, 3, 4, 5, 7, 8, 9))
    return 0


if __name__ == "__main__":
    sys.exit(main())
