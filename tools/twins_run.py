"""One run of `tools/twins.py`: builds a network as a config says, trains and evaluates it, and returns its record."""

import csv
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import nn
from twins_config import ConfigError, digest

from spd_zoo.complexity import count_params
from spd_zoo.convert import convert_to_spd
from spd_zoo.data.labelled import DataError, LabelledImages, open_data, train_val_split
from spd_zoo.files import whole
from spd_zoo.resolution import keep_resolution
from spd_zoo.training.config import FinetuneConfig, make_config
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import finetune
from spd_zoo.training.steps import seed_everything
from spd_zoo.training.task import task_of
from spd_zoo.weights import catalogue, fetch, save_network
from spd_zoo.weights.cache import origin_of, sha256_of
from spd_zoo.weights.load import load_backbone, load_file, load_network

__all__ = ["build", "checkpoint", "files_of", "request", "run", "write_subset"]

BATCH, TIMES = 8, 15  # images per batch, and timed batches


def checkpoint(name: str) -> Path:
    """The verified file of a checkpoint, which may be an imported one.

    Raises:
        ConfigError: If the name has no tag.
        WeightsError: If there is no such checkpoint, or it is unavailable.
    """
    if "." not in name:
        raise ConfigError(f"there are no weights called {name}; give network.tag")
    return fetch(catalogue.checkpoint(name))


def files_of(spec: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each checkpoint that a run begins with, as it was before it was imported.

    Raises:
        ConfigError: As `checkpoint`.
        WeightsError: As `checkpoint`.
    """
    files = {key: checkpoint(spec[key]) for key in ("weights", "backbone") if key in spec}
    return {key: origin_of(file).get("original_sha256") or sha256_of(file) for key, file in files.items()}


def build(spec: dict[str, Any], class_names: list[str], seed: int) -> nn.Module:
    """The network with which a run begins.

    Args:
        spec: Its fields in the config.
        class_names: The classes of the data; a network with the weights of a checkpoint has those of the checkpoint.
        seed: Seed of random weights.

    Raises:
        ConfigError: If the checkpoint does not exist, or the network downsamples nowhere.
        WeightsError: If its weights are unavailable.
    """
    seed_everything(seed)
    net: Any
    if "weights" in spec:
        net = load_file(spec["model"], checkpoint(spec["weights"]), "cpu")
    else:
        net = timm.create_model(spec["model"], num_classes=len(class_names))
        net.pretrained_cfg = net.pretrained_cfg | {"num_classes": len(class_names), "label_names": class_names}
    if "backbone" in spec:
        load_backbone(net, checkpoint(spec["backbone"]))
    if spec.get("keep_resolution"):
        net = keep_resolution(net, spec["keep_resolution"], inplace=True)
    if spec.get("convert"):
        net = convert_to_spd(net, inplace=True)
        if not net.spd_report.replaced:
            raise ConfigError(f"{spec['name']} has nothing to convert")
    return net


def write_subset(data: Path, count: int, file: Path) -> None:
    """Writes a data set with `count` of the training images, evenly over the classes, as a CSV file of paths."""
    splits = {split: open_data(data, split) for split in ("train", "val", "test")}
    train = splits["train"]
    if train is None or len(train) < count:
        raise DataError(f"{data} has {0 if train is None else len(train)} training images, the config wants {count}")
    if len(train) > count:
        _, splits["train"] = train_val_split(train, count, seed=0)

    def rows(split: str, images: LabelledImages) -> Iterator[tuple[str, str, str]]:
        for i in range(len(images)):
            path = images.file(i)
            if not isinstance(path, str):
                raise DataError(f"train_images needs images in files of their own, which {data} does not have")
            yield str(Path(path).resolve()), images.class_names[images.label(i)], split

    with whole(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(("path", "label", "split"))
        for split, images in splits.items():
            if images is not None:
                writer.writerows(rows(split, images))


@torch.inference_mode()
def milliseconds(net: nn.Module, size: tuple[int, int, int]) -> float:
    """Milliseconds per image of a network, in the fastest of some batches, which other processes disturb least."""
    images = torch.randn(BATCH, *size).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        net(images)
        times.append(1000 * (time.perf_counter() - began) / BATCH)
    return min(times)


def request(
    config: dict[str, Any], spec: dict[str, Any], model: str, data: Path, out: Path, seed: int
) -> FinetuneConfig:
    """The configuration of a run, whose options are checked as those of `spd-zoo finetune --config`.

    Raises:
        ValueError: If an option has no meaning.
    """
    own = {"model": model, "data": str(data), "out": out, "seed": seed, "pretrained": True, "workers": 0}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{config['name']}.yaml"
        file.write_text(yaml.safe_dump(config["options"] | spec.get("options", {})), encoding="utf-8")
        return make_config(own, file)


def run(config: dict[str, Any], spec: dict[str, Any], seed: int, data: Path, out: Path) -> dict[str, Any]:
    """Trains and evaluates a network, or resumes its run; returns its record.

    Args:
        config: A config, as `read_config` returns it.
        spec: One of its networks.
        seed: The seed.
        data: The folder of the data set, or the CSV file of its subset.
        out: The folder of the run and of the network with which it begins.

    Raises:
        Stopped: After a signal, when the state of the run is saved.
    """
    start, folder, clock = out / "start", out / "run", out / "seconds.txt"
    bf16 = config["options"]["bf16"]
    if not start.is_dir():
        task = task_of(timm.create_model(spec["model"], device="meta"))
        train = task.open_split(data, "train")
        if train is None:
            raise DataError(f"{data} has no split train")
        out.mkdir(parents=True, exist_ok=True)
        with whole(start) as temporary:
            save_network(build(spec, train.class_names, seed), temporary)
    seconds, began = float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0, time.monotonic()
    try:
        finetune(request(config, spec, f"local-dir:{start}", data, folder, seed))
    finally:
        seconds += time.monotonic() - began
        clock.write_text(str(seconds), encoding="utf-8")
    (found,) = evaluate(str(folder), data, workers=0, bf16=bf16)
    net: Any = load_network(str(folder), "cpu")
    figures = found.predictions.summary()
    return {
        "config": config["name"],
        "digest": digest(config, spec),
        "network": spec["name"],
        "seed": seed,
        "data": json.loads((folder / "data.json").read_text(encoding="utf-8"))["fingerprint"],
        "split": found.split,
        "images": figures.pop("images"),
        "metrics": figures,
        "params": count_params(net),
        "seconds": round(seconds, 1),
        "ms_per_image": round(milliseconds(net, net.pretrained_cfg["input_size"]), 3),
        "bf16": bf16,
        "files": files_of(spec),
    }
