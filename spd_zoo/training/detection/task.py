"""The task of detection for `finetune` and `evaluate`: data, loss, metrics and report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor

from spd_zoo.data.boxes import BoxImages, Tiling, found_in_words, open_boxes, with_names
from spd_zoo.data.boxes import hold_out as split_boxes
from spd_zoo.data.boxes.sizes import describe_sizes
from spd_zoo.data.boxes.tiles import cut, describe_tiles
from spd_zoo.data.check import check, defects_in_words, in_words, notes_on
from spd_zoo.data.classes import network_classes, outputs_of, pretrained_outputs, without_unused
from spd_zoo.data.labelled import DataError
from spd_zoo.data.notes import some
from spd_zoo.data.reading import refuse_among, size_text
from spd_zoo.files import whole
from spd_zoo.losses import Target
from spd_zoo.models._detector import DetectionNet, YoloNet
from spd_zoo.models.yolov5_spd import YOLOv5SPD
from spd_zoo.models.yolov8_spd import YOLOv8
from spd_zoo.process import Process
from spd_zoo.training.config import FinetuneConfig, Plan, parse_sizes
from spd_zoo.training.detection import data_report, metrics, report
from spd_zoo.training.detection.anchors import fit_anchors
from spd_zoo.training.detection.augment import box_eval_loader, box_train_loader
from spd_zoo.training.page import data_page
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.run import RunFolder
from spd_zoo.training.splits import Splits, describe, hold_out, without_unreadable
from spd_zoo.training.steps import Batches, Steps

__all__ = ["LR", "Detection", "DetectorTraining"]

LR = 2e-3  # of AdamW for steps of 16 images; proportional to the square root of the batch size
BOX_TERMS = ("train_box", "train_dfl", "train_location")  # 0 if no box contributes to the loss
YOLO_OPTIONS = ("mosaic", "mosaic_off", "zoom", "shift", "hsv")


class DetectorTraining(ClassificationTask):
    """timm's task with the detector's own loss.

    The sum of the loss terms per image is minimised; YOLO's authors minimise that times the images of a batch.
    """

    def __init__(self, net: DetectionNet, device: torch.device) -> None:
        def loss(raw: Any, targets: list[Target], image_size: tuple[int, int]) -> dict[str, Tensor]:
            return metrics.mean_terms(net, net.loss(raw, targets, image_size), len(targets))

        super().__init__(net, loss, device=device, verbose=False)

    def forward(self, images: Tensor, targets: Any) -> dict[str, Any]:
        """(N, C, H, W) and N targets -> `loss`, a scalar, and its `terms`."""
        terms = self.criterion(self.trainable_module(images), targets, (images.shape[-2], images.shape[-1]))
        return {"loss": torch.stack(list(terms.values())).sum(), "terms": terms}


def _input_sizes(config: FinetuneConfig, net: Any) -> list[tuple[int, int]]:
    """The heights and widths in pixels of a run's inputs, in the order of the epochs."""
    return [size for size, _ in parse_sizes(config.image_size or size_text(net.pretrained_cfg["input_size"][1:]))]


class Detection:
    """The `Task` of detectors."""

    networks = "detectors"
    metric = "val_ap"

    def defaults(self, config: FinetuneConfig, net: Any, batch_size: int, pretrained: bool) -> dict[str, Any]:
        """The values of options that depend on the task.

        YOLO's augmentation is that of its authors, except that it keeps tiny objects. SSD's only has options for flips
        and tiny objects.

        Raises:
            ValueError: If an option has no meaning for the network.
        """
        if config.lr is None and config.opt not in (None, "adamw"):
            raise ValueError(f"the default learning rate of detectors is for adamw; give lr with opt {config.opt}")
        values: dict[str, Any] = {
            "image_size": size_text(net.pretrained_cfg["input_size"][1:]),
            "opt": "adamw",
            "lr": LR * math.sqrt(batch_size / 16),
            "layer_decay": 1.0,
            "weight_decay": 5e-4,
            "ema": 0.999,
            "keep_tiny": True,
        }
        if isinstance(net, YoloNet):
            off = min(10, config.epochs // 5)
            return values | {"mosaic": 1.0, "mosaic_off": off, "zoom": 0.5, "shift": 0.1, "hsv": "0.015,0.7,0.4"}
        for name in YOLO_OPTIONS:
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is an option for YOLO; SSD crops, recolours and expands as its authors do")
        return values

    def open_splits(
        self, config: FinetuneConfig, net: Any, process: Process, began_with: dict[str, Any] | None
    ) -> Splits[BoxImages]:
        """Opens, splits and checks the data; see `Task.open_splits`.

        Raises:
            DataError: If there are no training images, or no validation box of a class that is trained.
            ImageSizeError: If the network does not take inputs of a size.
        """
        metrics.require_coco()
        sizes = _input_sizes(config, net)
        for size in sizes:
            net.check_size(*size)
        train, val = (self._opened(config, name) for name in ("train", config.val_name))
        if train is None:
            raise DataError(f"{config.data} has no split train; give instances_train.json, images/train or train.txt")
        about = describe(config, train, val, began_with)
        if began_with is None:
            refuse_among(config.out, set().union(*(each.folders() for each in (train, val) if each)), config.data)
        found = found_in_words({"train": train, config.val_name: val})
        train = without_unused(train)
        train, val = hold_out(config, train, val, split_boxes)
        if began_with is None:
            about["found"] = found
        val = with_names(val, train.class_names)
        splits = {"train": train, "val": val}
        checked = began_with is None and config.check
        if checked:
            about |= check(splits, config.workers, process)
            for name, data in splits.items():
                readable = data.without(about[name]["unreadable"])
                about[name]["boxes"] = data.problems()
                about[name]["without boxes"] = sum(not len(readable.objects_in(i).labels) for i in range(len(readable)))
        elif began_with is None:
            about |= {"notes": notes_on(splits.values())}
            for line in (line for data in splits.values() for line in defects_in_words(data.problems())):
                process.print(line)
        train, val = without_unreadable(train, val, about, "box")
        if not sum(val.counts()):
            raise DataError(f"the split {config.val_name} has no box of a class that is trained; add some")
        cut_val: BoxImages = val
        if config.tile:
            largest = max(sizes, key=math.prod)
            train = cut(train, largest, config.seed)
            about.setdefault("tiles", describe_tiles(train, val))
            cut_val = cut(val, largest, config.seed) if checked else val
        learnt_at = net.strides if isinstance(net, YOLOv8) else ()
        for name, data, strides in (("train", train, learnt_at), ("val", cut_val, ())) if checked else ():
            about[name]["box sizes"] = describe_sizes(data, sizes[-1], net.keeps_aspect, strides)
        return Splits(train, val, about)

    def _opened(self, config: FinetuneConfig, split: str) -> BoxImages | None:
        """A split with the configuration's options for reading images."""
        data = open_boxes(config.data, split)
        tiling = Tiling(config.tile, config.overlap) if config.tile else None
        return data and replace(data, max_pixels=config.max_pixels, tiling=tiling)

    def open_split(
        self, data: str | Path, split: str, image_column: str = "", label_column: str = ""
    ) -> BoxImages | None:
        """The images of a split; None if there is none of that name. Folders with boxes have no columns."""
        opened = open_boxes(data, split)
        return opened and replace(opened, notes=(found_in_words({split: opened}), *opened.notes))

    def write_data_report(self, folder: RunFolder, config: FinetuneConfig, net: Any, splits: Splits[BoxImages]) -> None:
        """Writes `data.png` and a first `report.html`, unless the run is resumed."""
        if (folder.path / "data.png").exists():
            return
        size = _input_sizes(config, net)[-1]
        picture = data_report.data_picture(splits.train, size, net.keeps_aspect, config.seed)
        with folder.writing("data.png"), whole(folder.path / "data.png") as temporary:
            temporary.write_bytes(picture)
        folder.write("report.html", data_page(config, in_words(splits.about), picture))

    def warnings(self, data: BoxImages) -> list[str]:
        """Defects of the boxes."""
        return [line.strip() for line in defects_in_words(data.problems())]

    def training(self, net: Any, plan: Plan, data: BoxImages, process: Process) -> DetectorTraining:
        """The network with its loss; YOLOv5's anchors are fitted to the data first."""
        if isinstance(net, YOLOv5SPD) and plan.config.auto_anchors:
            process.print(fit_anchors(net, data, plan.sizes[-1][0], plan.config.seed))
        return DetectorTraining(net, process.device)

    def init_head(self, net: Any, plan: Plan, data: BoxImages, process: Process, preprocessing: Preprocessing) -> bool:
        """Matches the outputs of a pretrained network with the classes of the data by name.

        If the network names its classes and does not have those of the data, the class outputs begin at random. If it
        does not name them, but has as many, they are matched as `outputs_of` assumes.
        """
        known = network_classes(net.pretrained_cfg, net.pretrained_cfg["num_classes"], listed=True)
        classes = data.class_names
        if not plan.pretrained or len(known.names) != len(classes):
            return False
        if not known.named:
            order, guess = outputs_of(classes, known, plan.config.model)
            if guess:
                process.print(f"note: {guess}")
            net.reorder_classes(order)
            return True
        outputs = pretrained_outputs(plan.config.model, known, classes)
        if outputs is None:
            process.print(
                f"note: the weights of {plan.config.model} are for the classes {some(list(known.names))}: the class "
                f"outputs for {some(classes)} begin at random"
            )
            trainable = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
            net.reset_classifier(len(classes))
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(trainable[name])
            return False
        net.reorder_classes(outputs)
        return True

    def preparation(
        self, config: FinetuneConfig, preprocessing: Preprocessing, classes: int
    ) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
        """Normalises a batch of pixels, and moves its targets to the device."""

        def prepare(pixels: Tensor, targets: list[dict[str, Tensor]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
            device = preprocessing.device
            moved = [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]
            return preprocessing.normalize(pixels), moved

        return prepare

    def train_batches(
        self,
        net: Any,
        data: BoxImages,
        image_size: tuple[int, int],
        steps: Steps,
        config: FinetuneConfig,
        preprocessing: Preprocessing,
    ) -> Batches:
        """The training images, augmented, in the order of `steps`."""
        return box_train_loader(data, net, image_size, steps, preprocessing.mode, config)

    def eval_batches(
        self,
        net: Any,
        data: BoxImages,
        image_size: tuple[int, int],
        batch_size: int,
        workers: int,
        preprocessing: Preprocessing,
        process: Process,
    ) -> Batches:
        """This process's share of the images, in order, normalised as inference does it."""
        return box_eval_loader(data, net, image_size, batch_size, workers, process.rank, process.world)

    def score(self, net: Any, batches: Batches, preprocessing: Preprocessing, process: Process) -> dict[str, float]:
        """`loss`, `ap` and `ap50` (per cent)."""
        return metrics.score(net, batches, preprocessing, process)

    def predict(
        self,
        net: Any,
        batches: Batches,
        data: BoxImages,
        image_size: tuple[int, int],
        preprocessing: Preprocessing,
        process: Process,
        flip: bool = False,
        suppression: metrics.Suppression | None = None,
    ) -> metrics.BoxPredictions:
        """The predictions for all images; `check_evaluation` refuses `flip`."""
        return metrics.predict(net, batches, data, image_size, preprocessing, process, suppression)

    def epoch_in_words(self, row: dict[str, Any]) -> str:
        """The most important metrics of an epoch."""
        return f"val AP {row['val_ap']:.2f} %, AP50 {row['val_ap50']:.2f} %"

    def epoch_notes(self, row: dict[str, Any]) -> list[str]:
        """A note if the loss was computed from no box."""
        empty = [name for name in BOX_TERMS if row.get(name) == 0]
        if not empty:
            return []
        return [
            f"no box contributed to {' and '.join(empty)} in epoch {row['epoch']}: augmentation left none, or none "
            "matched a cell of the network; a larger --image-size or --tile makes objects larger"
        ]

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """Nothing: a detector's preprocessing does not change in training."""
        return {}

    def write_report(
        self,
        folder: RunFolder,
        config: FinetuneConfig,
        history: list[dict[str, Any]],
        predictions: metrics.BoxPredictions,
        data: BoxImages,
        notes: Sequence[str],
    ) -> None:
        """Writes the report and its tables and figures."""
        report.write(folder, config, history, predictions, notes)

    def check_evaluation(
        self, net: Any, model: str, only_classifiers: bool, suppression: metrics.Suppression | None = None
    ) -> None:
        """Checks the options of an evaluation.

        Raises:
            ValueError: If one is for classifiers only, or exceeds the limit of boxes of an exported file.
        """
        if only_classifiers:
            raise ValueError("flip, image_column and label_column are options for classifiers; leave them out")
        metrics.require_coco()
        net.check_limit(suppression and suppression.max_detections, model)

    def result_columns(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """Nothing: detectors resize whole images."""
        return {}
