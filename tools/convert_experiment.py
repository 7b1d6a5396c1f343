"""Does converting a pretrained network help when it is fine-tuned on images with less detail? CIFAR-100 at 16x16.

    python tools/convert_experiment.py --data CIFAR100 --out DIR [--image-sizes 32 16] [--lrs 1e-3] [--seeds 3]

The images are averaged down to half their size. `--model`, which was trained on full-size images, and the same network
after `convert_to_spd` are evaluated on them, and then fine-tuned by `spd-zoo finetune`: on the same `--train-images`,
in the same order and with the same augmentation, number of epochs and learning rate, at each of `--image-sizes`. The
validation images were not used in pretraining either; nothing is chosen by the test images.

DIR gets `results.csv`, with a line per run, and `results.svg`. Interrupted runs are resumed.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from spd_zoo.convert import convert_checkpoint
from spd_zoo.data.labelled import DataError, LabelledImages, open_data, train_val_split
from spd_zoo.files import whole, write_csv
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import FinetuneConfig, finetune

COLUMNS = ("image_size", "start", "lr", "epochs", "train_images", "seed", "val_top1", "test_top1")
STARTS = ("as it was", "converted")
DETECTORS = Path(__file__).with_name("convert_detectors.csv")  # results of `spd-zoo evaluate` for each run


def make_images(options: argparse.Namespace, target: Path) -> None:
    """Writes the data set with images of `--pixels`, and some of the training images, evenly over the classes."""
    import datasets

    original, test = (open_data(options.data, split, label_column=options.label_column) for split in ("train", "test"))
    if original is None or test is None:
        raise DataError(f"{options.data} lacks a split train or test")
    train, val = train_val_split(original, options.held_out, seed=0)
    _, train = train_val_split(train, options.train_images, seed=0)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=original.class_names))
    size = (options.pixels, options.pixels)

    def rows(data: LabelledImages) -> dict[str, list[Any]]:
        small = [data.image(i).resize(size, Image.Resampling.BOX) for i in range(len(data))]
        return {"image": small, "label": [data.label(i) for i in range(len(data))]}

    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as temporary:
        temporary.mkdir()
        for name, data in (("train", train), ("val", val), ("test", test)):
            datasets.Dataset.from_dict(rows(data), features).to_parquet(temporary / f"{name}-00000.parquet")


def top1(model: str, data: Path, split: str, image_size: int) -> float:
    """Top-1 in per cent."""
    (found,) = evaluate(model, data, split, image_size, workers=0)
    return float(found.row["top1"])


def experiment(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each run, and for each network before it is fine-tuned (without a seed); written after each."""
    images = options.out / f"images_{options.pixels}_{options.train_images}"
    if not images.is_dir():
        make_images(options, images)
    converted = options.out / "converted"
    if not converted.is_dir():
        print(convert_checkpoint(options.model, converted))
    starts = {"as it was": options.model, "converted": f"local-dir:{converted}"}
    file = options.out / "results.csv"
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            found = {_key(row): row for row in csv.DictReader(lines)}

    def record(row: dict[str, Any], model: str) -> None:
        for split in ("val", "test"):
            row[f"{split}_top1"] = top1(model, images, split, row["image_size"])
        found[_key(row)] = row
        write_csv(file, COLUMNS, [[row[name] for name in COLUMNS] for row in found.values()])

    for size in options.image_sizes:
        for start, model in starts.items():
            row = {"image_size": size, "start": start, "lr": "", "epochs": 0, "train_images": 0, "seed": ""}
            if _key(row) not in found:
                record(row, model)
        for lr in options.lrs:
            for seed in range(options.seeds):
                for start, model in starts.items():
                    row = {"image_size": size, "start": start, "lr": lr, "epochs": options.epochs}
                    row |= {"train_images": options.train_images, "seed": seed}
                    if _key(row) in found:
                        continue
                    run = (
                        options.out / f"{images.name}_{size}px_{options.epochs}x{lr:g}_{start.replace(' ', '_')}_{seed}"
                    )
                    finetune(
                        FinetuneConfig(
                            model,
                            str(images),
                            run,
                            pretrained=True,
                            epochs=options.epochs,
                            head_epochs=0,  # the classifier is already trained
                            layer_decay=1.0,  # the new weights are in the middle of the network
                            lr=lr,
                            batch_size=options.batch_size,
                            image_size=str(size),
                            seed=seed,
                            workers=options.workers,
                        )
                    )
                    record(row, str(run))
    return list(found.values())


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in COLUMNS[:-2])


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each image size and learning rate: both starts before and after, and the mean difference of equal seeds.

    Figures are top-1 on the test images, with standard deviations over the seeds; the gain has its standard error.
    """
    by_key = {_key(row): float(row["test_top1"]) for row in rows}
    runs = [row for row in rows if str(row["seed"]) != "" and row["start"] == "as it was"]
    lines = []
    for size, lr, epochs, images in dict.fromkeys(
        (row["image_size"], row["lr"], row["epochs"], row["train_images"]) for row in runs
    ):
        of_runs = [
            [by_key.get(_key(row | {"start": start})) for start in STARTS]
            for row in runs
            if (row["image_size"], row["lr"], row["epochs"], row["train_images"]) == (size, lr, epochs, images)
        ]
        pairs = [(was, now) for was, now in of_runs if was is not None and now is not None]
        if len(pairs) < 2:
            continue
        line: dict[str, Any] = {"image_size": size, "lr": lr, "epochs": epochs, "train_images": images}
        for i, start in enumerate(STARTS):
            before = {"image_size": size, "start": start, "lr": "", "epochs": 0, "train_images": 0, "seed": ""}
            values = [pair[i] for pair in pairs]
            line[f"{start}, before"] = by_key[_key(before)]
            line[start], line[f"{start}, std"] = statistics.mean(values), statistics.stdev(values)
        gains = [now - was for was, now in pairs]
        line["gain"] = statistics.mean(gains)
        line["gain, standard error"] = statistics.stdev(gains) / len(gains) ** 0.5
        line["seeds"] = len(pairs)
        lines.append(line)
    return lines


def detectors() -> list[dict[str, Any]]:
    """The figures in `tools/convert_detectors.csv`, as in `summary`, for the strided and the converted detector."""
    with DETECTORS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for name in [name for name in rows[0] if name not in ("start", "seed")]:
        line: dict[str, Any] = {"figure": name, "before": float(next(row[name] for row in rows if not row["seed"]))}
        was, now = (
            [
                float(row[name])
                for row in sorted(rows, key=lambda row: row["seed"])
                if row["start"] == start and row["seed"]
            ]
            for start in STARTS
        )
        for start, values in zip(STARTS, (was, now), strict=True):
            line[start], line[f"{start}, std"] = statistics.mean(values), statistics.stdev(values)
            line[f"{start}, all"] = values
        gains = [after - before for before, after in zip(was, now, strict=True)]
        line |= {"gain": statistics.mean(gains), "gain, standard error": statistics.stdev(gains) / len(gains) ** 0.5}
        lines.append(line | {"seeds": len(gains)})
    return lines


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws every run as a dot, means with standard deviations, and the accuracy before fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for line in summary(rows):
        for start in STARTS:
            alike = {name: str(line[name]) for name in ("image_size", "lr", "epochs", "train_images")} | {
                "start": start
            }
            line[f"{start}, all"] = [
                float(row["test_top1"]) for row in rows if all(str(row[name]) == alike[name] for name in alike)
            ]
        title = f"16x16 seen at {line['image_size']} px\n{line['epochs']} epochs, {line['train_images']} images"
        panels.append((title, "top-1 on CIFAR-100 test, %", line, line["as it was, before"]))
    line = detectors()[0]
    panels.append(("yolov8n on blood cells\n5 epochs, 205 images", "AP on BCCD test, %", line, line["before"]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
    for axis, (title, label, line, before) in zip(axes[0], panels, strict=True):
        for i, start in enumerate(STARTS):
            axis.plot([i] * len(line[f"{start}, all"]), line[f"{start}, all"], "o", color=f"C{i}", alpha=0.5)
            axis.errorbar(i + 0.15, line[start], line[f"{start}, std"], fmt="s", color=f"C{i}", capsize=4)
        axis.axhline(before, color="grey", linestyle="--", label="both, before fine-tuning")
        axis.set_xticks([0, 1], STARTS)
        axis.set_xlim(-0.5, 1.6)
        axis.set_ylabel(label)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with whole(file) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints a line per image size and learning rate; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-100, as `spd-zoo finetune` takes it")
    parser.add_argument("--label-column", default="", help="where it has several, as on the Hub: fine_label")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="cifar_resnet20.cifar100")
    parser.add_argument("--pixels", type=int, default=16)
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[32, 16])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-images", type=int, default=10000)
    parser.add_argument("--held-out", type=int, default=2500, help="training images that pretraining held out (seed 0)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(argv)
    rows = experiment(options)
    plot(rows, options.out / "results.svg")
    for line in summary(rows):
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
