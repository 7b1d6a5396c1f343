"""Compares fine-tuning with linear probes of the same pretrained network, on a few images of ten classes.

    python tools/linear_probe.py --train DIR --test DIR --out RUNS [--seeds 3] [--sizes 64] [--probe-sizes 64 128 224]

Both folders hold class folders, for example of Tiny-ImageNet. Each seed draws ten classes and a hundred training images
of each; all test images of these classes are used, and nothing is chosen by them. `spd-zoo finetune` runs with its
defaults and with what `--option` says, for example `--option no-bf16 epochs=10`; the last epoch counts.

A probe classifies the pooled features of the same images without augmentation: by ridge regression in closed form,
whose penalty the leave-one-out error chooses, and by logistic regression, whose penalty five-fold cross-validation
chooses. Every result is a line of `--record`; lines that are there are not computed again, and interrupted runs are
resumed.
"""

import argparse
import csv
import json
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader

import spd_zoo  # noqa: F401  (registers the networks)
from spd_zoo.cli import main as cli
from spd_zoo.cli.common import print_table

RECORD = Path(__file__).parent / "linear_probe.jsonl"
PENALTIES = tuple(10.0**power for power in range(-6, 6))
FOLDS = 5
METHODS = ("ridge probe", "logistic probe", "fine-tuned")


def draw(train: Path, test: Path, folder: Path, seed: int, classes: int, images: int) -> Path:
    """Copies the images of a seed into `folder`, which then has class folders in `train` and `val`."""
    if folder.is_dir():
        return folder
    rng = random.Random(seed)
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in rng.sample(sorted(path.name for path in train.iterdir()), classes):
        for split, source, count in (("train", train, images), ("val", test, None)):
            files = sorted(path for path in (source / name).rglob("*") if path.is_file())
            (unfinished / split / name).mkdir(parents=True)
            for file in files if count is None else rng.sample(files, count):
                shutil.copy(file, unfinished / split / name)
    return unfinished.rename(folder)


@torch.no_grad()
def features(model: str, folder: Path, pixels: int) -> tuple[Tensor, Tensor]:
    """The pooled features of all images in a folder of class folders, (N, C), and their classes, (N,)."""
    net: Any = timm.create_model(model, pretrained=True, num_classes=0).eval().to(memory_format=torch.channels_last)
    config = resolve_data_config({"input_size": (3, pixels, pixels), "crop_pct": 1.0}, model=net)
    images = ImageDataset(str(folder), transform=create_transform(**config))
    found = [(net(batch.to(memory_format=torch.channels_last)), labels) for batch, labels in DataLoader(images, 50)]
    return torch.cat([output for output, _ in found]), torch.cat([labels for _, labels in found])


def ridge_probe(x: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The classes that ridge regression to one-hot targets gives test features, (M,).

    Args:
        x: Training features, (N, C), standardised.
        labels: Their classes, (N,).
        test: Test features, (M, C), standardised in the same way.
    """
    x, test, targets = x.double(), test.double(), F.one_hot(labels).double()
    mean = targets.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0)
    scores = []
    for penalty in PENALTIES:
        shrunk = values / (values + penalty * len(x))
        fitted = mean + vectors @ (shrunk[:, None] * (vectors.T @ (targets - mean)))
        leverage = 1 / len(x) + vectors.square() @ shrunk
        left_out = targets - (targets - fitted) / (1 - leverage)[:, None]  # predictions without the image itself
        scores.append((left_out.argmax(1).eq(labels).double().mean().item(), penalty))
    _, penalty = max(scores)
    weights = x.T @ (vectors / (values + penalty * len(x))) @ (vectors.T @ (targets - mean))
    return (test @ weights + mean).argmax(1)


def logistic_probe(x: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The classes that logistic regression gives test features, (M,); arguments as for `ridge_probe`."""
    folds = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % FOLDS
    scores = []
    for penalty in PENALTIES:
        hits = torch.zeros(len(x))
        for fold in range(FOLDS):
            held_out = folds == fold
            linear = _logistic_regression(x[~held_out], labels[~held_out], penalty)
            hits[held_out] = linear(x[held_out]).argmax(1).eq(labels[held_out]).float()
        scores.append((hits.mean().item(), penalty))
    return _logistic_regression(x, labels, max(scores)[1])(test).argmax(1)


def _logistic_regression(x: Tensor, labels: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """A linear layer with the smallest cross-entropy, plus half the penalty times the weights' squares."""
    weight, bias = torch.zeros(int(labels.max()) + 1, x.shape[1]), torch.zeros(int(labels.max()) + 1)
    weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda inputs: (inputs @ weight.T + bias).detach()


def probe(options: argparse.Namespace, data: Path, pixels: int, seed: int) -> dict[str, float]:
    """Top-1 in per cent of each probe on the images in `data/val`."""
    (x, labels), (test, truth) = (features(options.model, data / split, pixels) for split in ("train", "val"))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test = (x - mean) / std, (test - mean) / std
    found = {"ridge probe": ridge_probe(x, labels, test), "logistic probe": logistic_probe(x, labels, test)}
    return {name: 100 * predicted.eq(truth).double().mean().item() for name, predicted in found.items()}


def fine_tune(options: argparse.Namespace, data: Path, pixels: int, seed: int) -> dict[str, float]:
    """Top-1 in per cent after `spd-zoo finetune`, with the weights of the last epoch, on the images in `data/val`."""
    run = options.out / "_".join([f"run_{options.model}_{data.name}_{pixels}", *options.option])
    command = ["finetune", options.model, "--data", str(data), "--out", str(run), "--image-size", str(pixels)]
    command += ["--keep", "last"]  # the test images must not choose the epoch
    if cli.main([*command, "--seed", str(seed), *(f"--{option}" for option in options.option)]):
        raise SystemExit(1)
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return {"fine-tuned": float(list(csv.DictReader(file))[-1]["val_top1"])}


def compare(options: argparse.Namespace) -> None:
    """Appends to the record what it lacks, as soon as it is computed."""
    known = read(options.record)
    for seed in range(options.seeds):
        data = options.out / f"images_{options.classes}_{options.images}_{seed}"
        draw(options.train, options.test, data, seed, options.classes, options.images)
        tasks: list[tuple[Callable[..., dict[str, float]], int, list[str]]]
        tasks = [(fine_tune, pixels, options.option) for pixels in options.sizes]
        tasks += [(probe, pixels, []) for pixels in options.probe_sizes]
        for compute, pixels, used in tasks:
            facts = {"network": options.model, "classes": options.classes, "images": options.images, "seed": seed}
            facts |= {"pixels": pixels, "by": compute.__name__, "options": used}
            if any(row | facts == row for row in known):
                continue
            began = time.process_time()
            figures = {name: round(top1, 2) for name, top1 in compute(options, data, pixels, seed).items()}
            row = facts | figures | {"cpu_minutes": round((time.process_time() - began) / 60, 1)}
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read(record: Path) -> list[dict[str, Any]]:
    """The lines of a record; none if there is no such file."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    return [json.loads(line) for line in lines]


def summary(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """A line for each method, size and set of options: mean top-1 over the seeds, and each seed's."""
    found: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for row in rows:
        for method in METHODS:
            if method in row:
                found[row["pixels"], method, " ".join(f"--{option}" for option in row["options"])].append(row[method])
    return [
        (str(pixels), f"{method} {used}".strip(), f"{statistics.mean(top1):.1f} %", ", ".join(map(str, top1)))
        for (pixels, method, used), top1 in sorted(found.items())
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Computes what is missing and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the images of each seed, and the runs")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--model", default="tf_efficientnet_lite0_spd")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100, help="training images of a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[64], help="pixels, for fine-tuning")
    parser.add_argument("--probe-sizes", type=int, nargs="*", default=[64, 128, 224], help="pixels, for the probes")
    parser.add_argument("--option", nargs="*", default=[], help="options of finetune without --, such as epochs=10")
    options = parser.parse_args(argv)
    compare(options)
    facts = {"network": options.model, "classes": options.classes, "images": options.images}
    rows = [row for row in read(options.record) if row | facts == row]
    print_table(("pixels", "method", "top-1", "each seed"), summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
