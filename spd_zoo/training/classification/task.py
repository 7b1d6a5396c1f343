"""The task of classification for `finetune` and `evaluate`: data, loss, metrics and report."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.class_weights import resolve_class_weights
from timm.task import ClassificationTask
from torch import Tensor, nn

from spd_zoo.data.check import check, notes_on
from spd_zoo.data.classes import network_classes, outputs_of, pretrained_outputs, without_unused
from spd_zoo.data.labelled import (
    DataError,
    LabelledImages,
    StreamedImages,
    open_data,
    open_stream,
    train_val_split,
    with_classes,
)
from spd_zoo.data.reading import refuse_among
from spd_zoo.inference.classifier import check_classifier
from spd_zoo.models.bsconv_mobilenetv3 import BSConvMobileNetV3
from spd_zoo.process import Process
from spd_zoo.training.classification import metrics, report
from spd_zoo.training.classification.augment import eval_loader, eval_transform, train_loader, train_transform
from spd_zoo.training.classification.head import (
    features,
    linear_classifier,
    pretrained_classifier,
    ridge_classifier,
    set_classifier,
)
from spd_zoo.training.config import FinetuneConfig, Plan, parse_model_args, parse_sizes
from spd_zoo.training.layers import zero_classifier
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.run import RunFolder
from spd_zoo.training.splits import Splits, describe, hold_out, without_unreadable
from spd_zoo.training.steps import Batches, Steps

__all__ = ["LR", "Classification", "ClassifierTraining"]

Images = LabelledImages | StreamedImages
ImagesT = TypeVar("ImagesT", LabelledImages, StreamedImages)
IMAGE_SIZE = "64"
SMALL = 48  # pixels up to which random resized crops lose too much
CROP_SCALE = 0.5
FEW = 64  # images of a step whose BatchNorm statistics make pretrained networks worse
PROBED = 20_000  # training images of which the first classifier is made, a few hundred megabytes of features
LR = {"lamb": 6e-3, "adamw": 2e-3}  # for steps of 128 images; proportional to the square root of the batch size


class ClassifierTraining(ClassificationTask):
    """timm's task with cross-entropy, class weights, and the regularisation loss of BSConv-S networks.

    A class weight has the same effect in every batch: the loss is the mean over images of weight times cross-entropy.
    """

    def __init__(self, net: nn.Module, config: FinetuneConfig, data: Images, device: torch.device) -> None:
        classes = len(data.class_names)
        weights = _class_weights(config.class_weights, data, device) if config.class_weights else None

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            smoothing = config.label_smoothing if targets.ndim == 1 else 0.0  # Mixup smooths its targets itself
            if weights is not None and targets.ndim == 1:
                targets = F.one_hot(targets, classes).float()
            return F.cross_entropy(logits.float(), targets, weights, label_smoothing=smoothing)

        super().__init__(net, loss, device=device, verbose=False)
        self.regularized = net if isinstance(net, BSConvMobileNetV3) and net.regularization else None

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Any]:
        """(N, C, H, W) and (N,) classes or (N, classes) probabilities -> `loss`, a scalar, and `output`."""
        return self.regularize(super().forward(images, targets))

    def regularize(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result` with the regularisation loss of BSConv-S networks added to its `loss`."""
        if self.regularized is not None:
            with torch.autocast(self.device.type, enabled=False):
                result["loss"] = result["loss"] + self.regularized.regularization_loss()
        return result


def _class_weights(text: str, data: Images, device: torch.device) -> Tensor:
    """The weight of each class, (classes,), from `class_weights` of the configuration."""
    if isinstance(data, StreamedImages):
        raise ValueError("class_weights need the counts of all classes, which a stream does not have")
    classes = len(data.class_names)
    wanted = f"class_weights must be {classes} numbers from 0 up, inv_freq or effective_num, got {text!r}"
    try:
        counts = torch.tensor(data.counts(), dtype=torch.float32)
        weights = torch.as_tensor(resolve_class_weights(text, class_stats=(counts, len(data))), device=device)
    except ValueError as error:
        raise ValueError(wanted) from error
    if weights.shape != (classes,):
        raise ValueError(wanted)
    return weights


class Classification:
    """The `Task` of classifiers."""

    networks = "classifiers"
    metric = "val_top1"

    def defaults(self, config: FinetuneConfig, net: nn.Module, batch_size: int, pretrained: bool) -> dict[str, Any]:
        """The values of options that depend on the task; see `Task.defaults`.

        Raises:
            ValueError: If `head_init` needs a pretrained network, and this one is not.
        """
        opt = config.opt or ("adamw" if pretrained else "lamb")
        if config.head_init not in (None, "random") and not pretrained:
            raise ValueError(f"head_init {config.head_init} is for pretrained networks; leave it out")
        side = min(min(size) for size, _ in parse_sizes(config.image_size or IMAGE_SIZE))
        padding = side // 8 if side <= SMALL and config.crop_scale is None else 0
        can_probe = not config.stream and linear_classifier(net) is not None
        head = "random" if not pretrained else "probe" if can_probe else "zero"
        return {
            "image_size": IMAGE_SIZE,
            "crop_scale": CROP_SCALE,
            "crop_padding": padding,
            "head_init": head,
            "head_epochs": int((config.head_init or head) == "zero"),
            "freeze_bn": pretrained and batch_size <= FEW,
            "opt": opt,
            "lr": LR.get(opt, 0.0) * math.sqrt(batch_size / 128),
            "layer_decay": 0.8 if pretrained else 1.0,
            "weight_decay": 0.02,
            "ema": 0.0,
        }

    def open_splits(
        self, config: FinetuneConfig, net: nn.Module, process: Process, began_with: dict[str, Any] | None
    ) -> Splits[Images]:
        """Opens, splits and checks the data; see `Task.open_splits`."""
        columns: dict[str, Any] = {"image_column": config.image_column, "label_column": config.label_column}
        if config.stream:
            return self._open_stream(config, began_with, columns)
        train, val = open_data(config.data, "train", **columns), open_data(config.data, config.val_name, **columns)
        train = _with_several_classes(train, config)
        refuse_among(config.out, set().union(*(each.folders() for each in (train, val) if each)), config.data)
        about = describe(config, train, val, began_with)
        train = _with_several_classes(without_unused(train), config)
        train, val = hold_out(config, train, val, train_val_split)
        val = with_classes(val, train.class_names)
        if began_with is None and config.check:
            about |= check({"train": train, "val": val}, config.workers, process)
        elif began_with is None:
            about |= {"notes": notes_on([train, val])}
        train, val = without_unreadable(train, val, about, "image")
        if config.class_weights:
            _class_weights(config.class_weights, train, torch.device("cpu"))  # an error here, before anything is made
        return Splits(train, val, about)

    def write_data_report(self, folder: RunFolder, config: FinetuneConfig, net: Any, splits: Splits[Images]) -> None:
        """Nothing: only boxes are drawn before training."""

    def _open_stream(
        self, config: FinetuneConfig, began_with: dict[str, Any] | None, columns: dict[str, Any]
    ) -> Splits[Images]:
        train = open_stream(config.data, "train", config.stream_length, **columns)
        val = open_stream(config.data, config.val_name, **columns)
        train = _with_several_classes(train, config)
        about = describe(config, train, val, began_with)
        if val is None:
            raise DataError(f"{config.data} has no split {config.val_name}, and a stream cannot be split")
        return Splits(train, val, {"fingerprint": about["fingerprint"], "notes": notes_on([train, val])})

    def open_split(self, data: str | Path, split: str, image_column: str = "", label_column: str = "") -> Images | None:
        """The images of a split; None if there is none of that name."""
        return open_data(data, split, image_column, label_column)

    def warnings(self, data: Images) -> list[str]:
        """Nothing: every defect of labels is an error."""
        return []

    def training(self, net: Any, plan: Plan, data: Images, process: Process) -> ClassifierTraining:
        """The network with its loss."""
        return ClassifierTraining(net, plan.config, data, process.device)

    def init_head(self, net: Any, plan: Plan, data: Images, process: Process, preprocessing: Preprocessing) -> bool:
        """Sets the classifier of a pretrained network as `head_init` says, and prints what was chosen.

        A classifier whose outputs have no names is kept if there are as many as classes, with its outputs in the order
        of the classes that `outputs_of` assumes.
        """
        config, classes = plan.config, data.class_names
        if not plan.pretrained:
            return False
        known = network_classes(net.pretrained_cfg, net.pretrained_cfg["num_classes"])
        layer = linear_classifier(net)
        if not known.named and len(known.names) == len(classes):
            order, guess = outputs_of(classes, known, config.model)
            as_it_is = order == list(range(len(classes)))
            if layer is not None and not as_it_is:
                bias = layer.bias.detach()[order] if layer.bias is not None else torch.zeros(len(order))
                set_classifier(layer, layer.weight.detach().flatten(1)[order], bias)
            if layer is not None or as_it_is:
                if guess:
                    process.print(f"note: {guess}")
                return True
        outputs = pretrained_outputs(config.model, known, classes)
        trained = outputs == list(range(len(known.names)))
        probe = config.head_init == "probe"
        if probe and (layer is None or isinstance(data, StreamedImages)):
            reason = "the data is a stream" if layer is not None else "the classifier has more than one layer"
            process.print(f"note: {reason}, so there is no linear probe: the weights of a new classifier start at zero")
            probe = False
        if not probe and config.head_init != "random" and not trained:
            zero_classifier(net)
        if not probe or layer is None or isinstance(data, StreamedImages):
            return trained
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))[:PROBED]
        probed = data.subset(sorted(chosen.tolist()))
        size, batch_size = plan.sizes[0][0], plan.eval_batch_size
        batches = self.eval_batches(net, probed, size, batch_size, config.workers, preprocessing, process)
        inputs, labels = features(net, layer, batches, preprocessing, process)
        weight, bias, right = ridge_classifier(inputs, labels, len(classes))
        text = f"a linear probe of {len(probed)} training images, leave-one-out accuracy {100 * right:.1f} %"
        if outputs is not None:
            arguments = parse_model_args(config.model_args)
            arguments.pop("num_classes", None)
            old = pretrained_classifier(config.model, arguments, outputs)
            share = (inputs @ old[0].T + old[1]).argmax(1).eq(labels).double().mean().item()
            if share >= right:
                (weight, bias), text = old, f"the pretrained outputs of these classes, accuracy {100 * share:.1f} %"
        weight, bias = process.broadcast((weight, bias))
        set_classifier(layer, weight, bias)
        process.print(f"the classifier starts as {text}")
        return True

    def preparation(
        self, config: FinetuneConfig, preprocessing: Preprocessing, classes: int
    ) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
        """Normalises, erases and mixes a batch of pixels and labels."""
        erase = RandomErasing(config.erase, device=str(preprocessing.device)) if config.erase else None
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
            images, targets = preprocessing.normalize(pixels), labels.to(preprocessing.device)
            images = erase(images) if erase is not None else images
            return mix(images, targets) if mix is not None else (images, targets)

        return prepare

    def train_batches(
        self,
        net: nn.Module,
        data: Images,
        image_size: tuple[int, int],
        steps: Steps,
        config: FinetuneConfig,
        preprocessing: Preprocessing,
    ) -> Batches:
        """The training images, augmented, in the order of `steps`."""
        transform = train_transform(
            image_size,
            CROP_SCALE if config.crop_scale is None else config.crop_scale,
            config.crop_padding or 0,
            config.rotation,
            preprocessing.crop_mode,
            interpolation=config.interpolation,
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            mean=preprocessing.mean,
        )
        return train_loader(data, transform, steps, config.workers, preprocessing.mode)

    def eval_batches(
        self,
        net: nn.Module,
        data: Images,
        image_size: tuple[int, int],
        batch_size: int,
        workers: int,
        preprocessing: Preprocessing,
        process: Process,
    ) -> Batches:
        """This process's share of the images, in order."""
        crop = (preprocessing.crop_pct, preprocessing.interpolation, preprocessing.crop_mode)
        transform = eval_transform(image_size, *crop, preprocessing.mean)
        return eval_loader(data, transform, batch_size, workers, preprocessing.mode, process.rank, process.world)

    def score(
        self, net: nn.Module, batches: Batches, preprocessing: Preprocessing, process: Process
    ) -> dict[str, float]:
        """`loss`, `top1` and `top5` (per cent)."""
        return metrics.score(net, batches, preprocessing, process)

    def predict(
        self,
        net: nn.Module,
        batches: Batches,
        data: Images,
        image_size: tuple[int, int],
        preprocessing: Preprocessing,
        process: Process,
        flip: bool = False,
        suppression: Any = None,
    ) -> metrics.Predictions:
        """The predictions for all images; `check_evaluation` refuses `suppression`."""
        return metrics.predict(net, batches, data.class_names, preprocessing, process, flip)

    def epoch_in_words(self, row: dict[str, Any]) -> str:
        """The most important metrics of an epoch."""
        return f"val top-1 {row['val_top1']:.2f} %"

    def epoch_notes(self, row: dict[str, Any]) -> list[str]:
        """Nothing."""
        return []

    def pretrained_cfg(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """Fields of a trained network's config that describe its preprocessing."""
        return {
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "crop_pct": preprocessing.crop_pct,
            "interpolation": preprocessing.interpolation,
            "crop_mode": preprocessing.crop_mode,
        }

    def write_report(
        self,
        folder: RunFolder,
        config: FinetuneConfig,
        history: list[dict[str, Any]],
        predictions: metrics.Predictions,
        data: Images,
        notes: Sequence[str],
    ) -> None:
        """Writes the report and its tables and figures."""
        report.write(folder, config, history, predictions, data, notes)

    def check_evaluation(self, net: nn.Module, model: str, only_classifiers: bool, suppression: Any = None) -> None:
        """Raises ModelError if the network has no classifier, and ValueError if an option is only for detectors."""
        check_classifier(net, model)
        if suppression is not None:
            raise ValueError("max_detections, agnostic and iou_threshold are options for detectors; leave them out")

    def result_columns(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """How images were cropped and resized, as timm's results tables have it."""
        return {"crop_pct": preprocessing.crop_pct, "interpolation": preprocessing.interpolation}


def _with_several_classes(train: ImagesT | None, config: FinetuneConfig) -> ImagesT:
    """`train`; raises DataError unless there are training images of several classes."""
    if train is None:
        raise DataError(
            f"{config.data} has no split train; give train/<class>/ folders, rows in a CSV file or parquet files"
        )
    if len(train.class_names) < 2:
        raise DataError(f"{config.data} has one class only, {train.class_names[0]!r}; training needs two or more")
    return train
