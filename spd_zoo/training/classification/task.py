"""What is special about classification: its data, loss, score and result. `finetune` knows nothing of it."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.class_weights import resolve_class_weights
from timm.task import ClassificationTask
from torch import Tensor, nn

from spd_zoo.data.check import check
from spd_zoo.data.labelled import (
    Batches,
    DataError,
    LabelledImages,
    Steps,
    StreamedImages,
    eval_loader,
    eval_transform,
    normalize,
    open_data,
    open_stream,
    train_loader,
    train_transform,
    train_val_split,
    with_classes,
)
from spd_zoo.models.bsconv_mobilenetv3 import BSConvMobileNetV3
from spd_zoo.process import Process
from spd_zoo.training.classification import report
from spd_zoo.training.config import FinetuneConfig, parse_model_args
from spd_zoo.training.evaluate import Input, predictions, score
from spd_zoo.training.run import RunFolder

__all__ = [
    "Images",
    "Task",
    "defaults",
    "finish",
    "in_words",
    "open_splits",
    "preparation",
    "score",
    "train_batches",
    "val_batches",
]

Images = LabelledImages | StreamedImages
NETWORKS = "classifiers"
BEST = "val_top1"  # what early stopping watches
LR = {"lamb": 6e-3, "adamw": 2e-3}  # at 128 images a step; it goes by the square root of the batch size


def defaults(config: FinetuneConfig, net: nn.Module) -> dict[str, Any]:
    """What options of the optimiser are where they are not given."""
    opt = config.opt or ("adamw" if config.pretrained else "lamb")
    return {
        "image_size": "64",
        "opt": opt,
        "lr": LR.get(opt, 0.0) * math.sqrt((config.batch_size or 1) / 128),
        "layer_decay": 0.8 if config.pretrained else 1.0,
        "weight_decay": 0.02,
        "ema": 0.0,
    }


def open_splits(
    config: FinetuneConfig, process: Process, began_with: dict[str, Any] | None
) -> tuple[Images, Images, dict[str, Any]]:
    """The images to train on and to validate with, and what is known about them.

    Args:
        config: Where the data is, and how much of it is held out.
        process: This process.
        began_with: What was known when the run began that now goes on: then the images are not checked again.

    Raises:
        DataError: If the data cannot be used, or is not what the run began with.
        ValueError: If the run's folder would be taken for a class.
    """
    columns: dict[str, Any] = {"image_column": config.image_column, "label_column": config.label_column}
    train: Images | None
    val: Images | None
    if config.stream:
        train = open_stream(config.data, "train", config.stream_length, **columns)
        val = open_stream(config.data, config.val_name, **columns)
    else:
        train, val = open_data(config.data, "train", **columns), open_data(config.data, config.val_name, **columns)
    if train is None:
        raise DataError(
            f"{config.data} has no split train; give train/<class>/ folders, rows in a CSV file or parquet files"
        )
    if len(train.class_names) < 2:
        raise DataError(f"{config.data} has one class only, {train.class_names[0]!r}; a network tells several apart")
    around = config.out.resolve().parents
    if isinstance(train, LabelledImages) and isinstance(train.files, list) and Path(config.data).resolve() in around:
        classes = Path(os.path.commonpath([Path(file).resolve() for file in train.files]))
        if classes in around:
            raise ValueError(f"{config.out} lies among the class folders of {classes}; give another folder with --out")
    about: dict[str, Any] = {"fingerprint": train.fingerprint() + (val.fingerprint() if val is not None else "")}
    if began_with is not None and began_with["fingerprint"] != about["fingerprint"]:
        raise DataError(f"{config.data} is not what it was when the run in {config.out} began; begin another one")
    if val is not None and (config.val_split or config.val_size):
        raise DataError(f"{config.data} has a split {config.val_name}; leave --val-split and --val-size out")
    if isinstance(train, StreamedImages):
        if not isinstance(val, StreamedImages):
            raise DataError(f"{config.data} has no split {config.val_name}, and a stream cannot be split")
        return train, val, about
    if val is None:
        if config.val_name != "val":
            raise DataError(f"{config.data} has no split {config.val_name}")
        share = 0.2 if config.val_split is None else config.val_split
        train, val = train_val_split(train, config.val_size or round(share * len(train)), config.seed)
    assert isinstance(val, LabelledImages)
    val = with_classes(val, train.class_names)
    if began_with is not None:
        about = began_with
    elif config.check:
        about |= check({"train": train, "val": val}, config.workers, process)
    train, val = (
        part.without(about.get(name, {}).get("unreadable", {})) for name, part in (("train", train), ("val", val))
    )
    empty = [name for name, count in zip(train.class_names, train.counts(), strict=True) if not count]
    if empty:
        raise DataError(f"class {empty[0]!r} has no image to train on; add some, or take the class away")
    return train, val, about


class Task(ClassificationTask):
    """timm's task with cross-entropy, class weights, and the regularization that BSConv-S networks bring.

    A weight counts the same in every batch: the loss is the mean over images of weight times cross-entropy.
    """

    def __init__(self, net: nn.Module, config: FinetuneConfig, data: Images, process: Process) -> None:
        classes = len(data.class_names)
        weights: Tensor | None = None
        if config.class_weights:
            if isinstance(data, StreamedImages):
                raise ValueError("class_weights need the counts of all classes, which a stream does not have")
            stats = torch.tensor(data.counts(), dtype=torch.float32), len(data)
            try:
                weights = torch.as_tensor(
                    resolve_class_weights(config.class_weights, class_stats=stats), device=process.device
                )
            except ValueError:
                weights = None
            if weights is None or weights.shape != (classes,):
                wanted = f"{classes} numbers from 0 up, inv_freq or effective_num"
                raise ValueError(f"class_weights must be {wanted}, got {config.class_weights!r}")

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            smoothing = config.label_smoothing if targets.ndim == 1 else 0.0  # Mixup has smoothed its own
            if weights is not None and targets.ndim == 1:
                targets = F.one_hot(targets, classes).float()
            return F.cross_entropy(logits.float(), targets, weights, label_smoothing=smoothing)

        super().__init__(net, loss, device=process.device, verbose=False)
        self.regularized = net if isinstance(net, BSConvMobileNetV3) and net.regularization else None

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Any]:
        """(N, C, H, W) and (N,) classes or (N, classes) probabilities -> `loss`, a scalar, and `output`."""
        result: dict[str, Any] = super().forward(images, targets)
        if self.regularized is not None:
            with torch.autocast(images.device.type, enabled=False):
                result["loss"] = result["loss"] + self.regularized.regularization_loss()
        return result


def preparation(
    config: FinetuneConfig, given: Input, classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What is done to a batch of pixels and labels before the network sees it: normalised, erased, mixed."""
    erase = RandomErasing(config.erase, device=str(given.device)) if config.erase else None
    mix = None
    if config.mixup or config.cutmix:
        mix = Mixup(
            config.mixup,
            config.cutmix,
            prob=config.mix_prob,
            label_smoothing=config.label_smoothing,
            num_classes=classes,
        )

    def prepare(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = normalize(pixels, given.mean, given.std, given.device), labels.to(given.device)
        images = erase(images) if erase is not None else images
        return mix(images, targets) if mix is not None else (images, targets)

    return prepare


def train_batches(
    net: nn.Module, data: Images, image_size: int, steps: Steps, config: FinetuneConfig, given: Input
) -> Batches:
    """The training images, augmented, in the order of `steps`."""
    transform = train_transform(
        image_size,
        config.crop_scale,
        config.crop_padding,
        config.rotation,
        interpolation=config.interpolation,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        mean=given.mean,
    )
    return train_loader(data, transform, steps, config.workers, given.mode)


def val_batches(
    net: nn.Module, data: Images, image_size: int, config: FinetuneConfig, given: Input, process: Process
) -> Batches:
    """This process's part of the validation images, in order."""
    transform = eval_transform(image_size, config.crop_pct, "bilinear")
    size = max(1, (config.batch_size or 1) // (config.accumulate or 1))
    return eval_loader(data, transform, size, config.workers, given.mode, process.rank, process.world)


def in_words(row: dict[str, Any]) -> str:
    """How good an epoch was."""
    return f"val top-1 {row['val_top1']:.2f} %"


def finish(
    folder: RunFolder,
    net: Any,
    history: list[dict[str, Any]],
    image_size: int,
    data: Images,
    config: FinetuneConfig,
    given: Input,
    process: Process,
) -> dict[str, float]:
    """Evaluates the network that training has left, and writes it and its report; returns its figures."""
    batches = val_batches(net, data, image_size, config, given, process)
    said = predictions(net, batches, data.class_names, given, process)
    if process.first:
        cfg = {
            **net.pretrained_cfg,
            "input_size": (len(given.mean), image_size, image_size),
            "num_classes": len(data.class_names),
            "mean": given.mean,
            "std": given.std,
            "crop_pct": config.crop_pct,
            "interpolation": "bilinear",
            "label_names": data.class_names,
        }
        folder.write_network(net, cfg, parse_model_args(config.model_args))
        report.write(folder, config, history, said, data)
    figures = said.summary()
    process.print(
        f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %, mean F1 {figures['macro_f1']:.3f} on "
        f"{figures['images']} validation images; see {folder.path / 'report.html'}"
    )
    return figures | {"image_size": image_size}
