"""What is special about detection: its data, loss, score and result. `finetune` knows nothing of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor

from spd_zoo.data.boxes import BoxImages, hold_out, open_boxes, with_names
from spd_zoo.data.check import check, defects_in_words
from spd_zoo.data.labelled import Batches, DataError, Steps, normalize
from spd_zoo.losses import Target
from spd_zoo.models._detector import DetectionNet, YoloNet
from spd_zoo.models.yolov5_spd import YOLOv5SPD
from spd_zoo.process import Process
from spd_zoo.training.config import FinetuneConfig, parse_model_args, parse_sizes
from spd_zoo.training.detection import report as box_report
from spd_zoo.training.detection.anchors import fit_anchors
from spd_zoo.training.detection.augment import box_eval_loader, box_train_loader
from spd_zoo.training.detection.metrics import box_predictions, mean_terms, score
from spd_zoo.training.evaluate import Input
from spd_zoo.training.run import RunFolder

__all__ = [
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

NETWORKS = "detectors"
BEST = "val_ap"  # what early stopping watches
LR = 2e-3  # of AdamW, at 16 images a step; it goes by the square root of the batch size


def defaults(config: FinetuneConfig, net: DetectionNet) -> dict[str, Any]:
    """What options of the optimiser and of augmentation are where they are not given.

    YOLO's are those of its authors; SSD augments as its authors do, without options but those of mirrors.

    Raises:
        ValueError: If an option has no meaning for the network.
    """
    if config.lr is None and config.opt not in (None, "adamw"):
        raise ValueError(f"the default learning rate of detectors is for adamw; give lr with opt {config.opt}")
    batch_size = config.batch_size or 1
    values: dict[str, Any] = {
        "image_size": str(net.pretrained_cfg["input_size"][-1]),
        "opt": "adamw",
        "lr": LR * math.sqrt(batch_size / 16),
        "layer_decay": 1.0,
        "weight_decay": 5e-4,
        "ema": 0.999,
    }
    if isinstance(net, YoloNet):
        off = min(10, config.epochs // 5)
        return values | {"mosaic": 1.0, "mosaic_off": off, "zoom": 0.5, "shift": 0.1, "hsv": "0.015,0.7,0.4"}
    for name in ("mosaic", "mosaic_off", "zoom", "shift", "hsv"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is an option for YOLO; SSD crops, recolours and expands as its authors do")
    return values


def open_splits(
    config: FinetuneConfig, process: Process, began_with: dict[str, Any] | None
) -> tuple[BoxImages, BoxImages, dict[str, Any]]:
    """The images to train on and to validate with, and what is known about them.

    Args:
        config: Where the data is, and how much of it is held out.
        process: This process.
        began_with: What was known when the run began that now goes on: then the images are not checked again.

    Raises:
        DataError: If the data cannot be used, or is not what the run began with.
    """
    train, val = open_boxes(config.data, "train"), open_boxes(config.data, config.val_name)
    if train is None:
        raise DataError(f"{config.data} has no split train; give instances_train.json, images/train or train.txt")
    about: dict[str, Any] = {"fingerprint": train.fingerprint() + (val.fingerprint() if val is not None else "")}
    if began_with is not None and began_with["fingerprint"] != about["fingerprint"]:
        raise DataError(f"{config.data} is not what it was when the run in {config.out} began; begin another one")
    if val is not None and (config.val_split or config.val_size):
        raise DataError(f"{config.data} has a split {config.val_name}; leave --val-split and --val-size out")
    if val is None:
        if config.val_name != "val":
            raise DataError(f"{config.data} has no split {config.val_name}")
        share = 0.2 if config.val_split is None else config.val_split
        train, val = hold_out(train, config.val_size or max(1, round(share * len(train))), config.seed)
    val = with_names(val, train.class_names)
    parts = {"train": train, "val": val}
    if began_with is not None:
        about = began_with
    elif config.check:
        about |= check(parts, config.workers, process)
        for name, part in parts.items():
            about[name]["boxes"] = part.defects
            read = part.without(about[name]["unreadable"])
            about[name]["without boxes"] = sum(not len(read.shown(i).labels) for i in range(len(read)))
    else:
        for line in (line for part in parts.values() for line in defects_in_words(part.defects)):
            process.print(line)
    train, val = (part.without(about.get(name, {}).get("unreadable", {})) for name, part in parts.items())
    empty = [name for name, count in zip(train.class_names, train.counts(), strict=True) if not count]
    if empty:
        raise DataError(f"class {empty[0]!r} has no box to train on; add some, or take the class away")
    if not sum(val.counts()):
        raise DataError(f"the split {config.val_name} has no box of a class that is trained; add some")
    return train, val, about


class Task(ClassificationTask):
    """timm's task with the detector's own loss, in its terms.

    The sum of the terms for an image is minimised: YOLO's authors' loss is that times the images of a batch.
    """

    def __init__(self, net: DetectionNet, config: FinetuneConfig, data: BoxImages, process: Process) -> None:
        def loss(raw: Any, targets: list[Target], image_size: tuple[int, int]) -> dict[str, Tensor]:
            return mean_terms(net, net.loss(raw, targets, image_size), len(targets))

        super().__init__(net, loss, device=process.device, verbose=False)
        if isinstance(net, YOLOv5SPD) and config.auto_anchors:
            process.print(fit_anchors(net, data, parse_sizes(config.image_size or "")[-1][0], config.seed))

    def forward(self, images: Tensor, targets: Any) -> dict[str, Any]:
        """(N, C, H, W) and N targets -> `loss`, a scalar, and its `terms`."""
        terms = self.criterion(self.trainable_module(images), targets, (images.shape[-2], images.shape[-1]))
        return {"loss": torch.stack(list(terms.values())).sum(), "terms": terms}


def preparation(
    config: FinetuneConfig, given: Input, classes: int
) -> Callable[[Tensor, list[Target]], tuple[Tensor, list[Target]]]:
    """What is done to a batch of pixels and targets before the network sees it: normalised."""

    def prepare(pixels: Tensor, targets: list[Target]) -> tuple[Tensor, list[Target]]:
        there: list[Target] = [
            {"boxes": target["boxes"].to(given.device), "labels": target["labels"].to(given.device)}
            for target in targets
        ]
        return normalize(pixels, given.mean, given.std, given.device), there

    return prepare


def train_batches(
    net: DetectionNet, data: BoxImages, image_size: int, steps: Steps, config: FinetuneConfig, given: Input
) -> Batches:
    """The training images, augmented, in the order of `steps`."""
    return box_train_loader(data, net, image_size, steps, given.mode, config)


def val_batches(
    net: DetectionNet, data: BoxImages, image_size: int, config: FinetuneConfig, given: Input, process: Process
) -> Batches:
    """This process's part of the validation images, in order."""
    size = max(1, (config.batch_size or 1) // (config.accumulate or 1))
    return box_eval_loader(data, net, image_size, size, config.workers, process.rank, process.world)


def in_words(row: dict[str, Any]) -> str:
    """How good an epoch was."""
    return f"val AP {row['val_ap']:.2f} %, AP50 {row['val_ap50']:.2f} %"


def finish(
    folder: RunFolder,
    net: Any,
    history: list[dict[str, Any]],
    image_size: int,
    data: BoxImages,
    config: FinetuneConfig,
    given: Input,
    process: Process,
) -> dict[str, float]:
    """Evaluates the network that training has left, and writes it and its report; returns its figures."""
    batches = val_batches(net, data, image_size, config, given, process)
    said = box_predictions(net, batches, data, image_size, given, process)
    figures = said.summary()
    if process.first:
        cfg = {
            **net.pretrained_cfg,
            "input_size": (len(given.mean), image_size, image_size),
            "num_classes": len(data.class_names),
            "label_names": data.class_names,
        }
        folder.write_network(net, cfg, parse_model_args(config.model_args))
        box_report.write(folder, config, history, said)
    process.print(
        f"AP {figures['ap']:.2f} %, AP50 {figures['ap50']:.2f} % on {figures['objects']} objects in "
        f"{figures['images']} validation images; see {folder.path / 'report.html'}"
    )
    return figures | {"image_size": image_size}
