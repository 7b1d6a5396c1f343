"""Distillation: a classifier that also learns from the outputs of another one, its teacher.

Paper: Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531, as timm's task computes it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import get_model_input_config, get_pretrained_cfg
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from spd_zoo.data.classes import NetworkClasses, network_classes, outputs_of
from spd_zoo.data.reading import parse_size, per_channel, size_text
from spd_zoo.errors import first_line
from spd_zoo.files import is_file
from spd_zoo.inference.classifier import check_classifier
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.training.classification.task import ClassifierTraining
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.memory import forward_bytes_per_image
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.weights import WeightsError
from spd_zoo.weights.fit import check_finite
from spd_zoo.weights.load import ModelError, load_file, load_network
from spd_zoo.weights.manifest import tags_in_words

__all__ = ["DistilledTraining", "Teacher", "load_teacher"]


class Teacher(DistillationTeacher):
    """timm's teacher, of which only the outputs of the student's classes count.

    Args:
        net: A pretrained classifier in evaluation mode.
        size: Height and width in pixels of the images that it sees.
        outputs: Its output for each class of the student.
        digest: By which a resumed run recognises it.
        notes: What was guessed about its classes.
        device: Where both compute.

    Attributes:
        bytes_per_image: What its forward pass takes for an image.
        views: The images of a step before they were reduced for the student.

    Raises:
        RuntimeError: If the network cannot compute images of this size.
    """

    outputs: Tensor

    def __init__(
        self,
        net: Any,
        size: tuple[int, int],
        outputs: Sequence[int],
        digest: str,
        notes: Sequence[str],
        device: torch.device,
    ) -> None:
        super().__init__(net, device=device)
        self.requires_grad_(False)
        self.size, self.digest, self.notes = size, digest, notes
        self.bytes_per_image = forward_bytes_per_image(net, size)
        self.views: Tensor | None = None
        mean, std = _normalization(net)
        self.mean_kd, self.std_kd = (_as_image(values, device) for values in (mean, std))
        self.register_buffer("outputs", torch.tensor(outputs, device=device), persistent=False)

    def settings(self) -> dict[str, Any]:
        """The fields of the configuration that a run chooses by its teacher."""
        return {"teacher_size": size_text(self.size), "teacher_digest": self.digest}

    def in_words(self, config: FinetuneConfig) -> str:
        """The line to print about the teacher that `config` asks for."""
        return (
            f"teacher: {config.teacher} at {size_text(self.size)} px, {len(self.outputs)} of its "
            f"{unwrap_model(self.model).num_classes} classes, weight {config.distill_weight:g}, temperature "
            f"{config.distill_temperature:g}"
        )

    def normalize_input(
        self, input: Tensor, student_mean: Tensor | None = None, student_std: Tensor | None = None
    ) -> Tensor:
        """`views`, or else the student's input -> the teacher's, (N, C, height, width) of `size`."""
        views = input if self.views is None else self.views
        images: Tensor = super().normalize_input(views, student_mean, student_std)
        return _resized(images, self.size)

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, the student's classes): a softmax over them renormalises the teacher's probabilities."""
        logits: Tensor = super().forward(input, return_features)
        return logits[:, self.outputs]

    def compile(self, *args: Any, **kwargs: Any) -> "Teacher":  # type: ignore[override]  # as in timm
        """As timm's, but also if it is compiled already: a run compiles anew when other layers begin to train."""
        self.model = unwrap_model(self.model)
        super().compile(*args, **kwargs)
        return self


class DistilledTraining(LogitDistillationTask):
    """timm's task of distillation, with the loss of a `ClassifierTraining` for the labels.

    The loss is (1 - weight) times that of the labels, plus weight times the Kullback-Leibler divergence of the
    student's probabilities from the teacher's, both at the temperature, times the temperature squared. Both networks
    see the same views. A teacher whose images are larger than the student's gets views of its own size, which are
    reduced for the student.

    Args:
        labelled: The student and its loss for labels.
        teacher: The teacher, on the same device.
        config: The weight and the temperature.
        preprocessing: How pixels became the student's input, which the teacher undoes.
    """

    teacher: Teacher

    def __init__(
        self, labelled: ClassifierTraining, teacher: Teacher, config: FinetuneConfig, preprocessing: Preprocessing
    ) -> None:
        device, criterion = preprocessing.device, cast("nn.Module", labelled.criterion)  # timm takes functions, too
        super().__init__(
            labelled.trainable_module,
            teacher,
            criterion,
            task_loss_weight=1 - config.distill_weight,
            # a float32 tensor of one dimension: half-precision logits divided by it become float32
            temperature=torch.tensor([config.distill_temperature], device=device),  # type: ignore[arg-type]
            device=device,
            verbose=False,
        )
        self.student_mean, self.student_std = (_as_image(v, device) for v in (preprocessing.mean, preprocessing.std))
        self.regularize = labelled.regularize
        self.image_size: tuple[int, int] | None = None

    def set_image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Sets the student's height and width in pixels; returns those of the views for `forward`.

        Views have the aspect of the student's images, so that they are cropped as without a teacher.
        """
        self.image_size = size
        scale = max(1.0, *(seen / own for seen, own in zip(self.teacher.size, size, strict=True)))
        return round(size[0] * scale), round(size[1] * scale)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Any]:
        """(N, C, H, W) and (N,) classes or (N, classes) probabilities -> `loss`, its `terms`, and `output`."""
        self.teacher.views = images  # timm's task passes on what the student sees
        result: dict[str, Any] = super().forward(_resized(images, self.image_size), targets)
        self.teacher.views = None
        terms = {"label_loss": result["task_loss"], "distill_loss": result["kd_loss"].squeeze()}
        return self.regularize({"loss": result["loss"].squeeze(), "terms": terms, "output": result["output"]})


def load_teacher(config: FinetuneConfig, class_names: Sequence[str], channels: int, device: torch.device) -> Teacher:
    """The teacher that `config` asks for.

    Args:
        config: The request.
        class_names: The student's classes.
        channels: Of the student's images.
        device: Where both compute.

    Returns:
        The teacher.

    Raises:
        DataError: If the teacher does not know all classes.
        ModelError: If there is no such network, or it is no classifier.
        ValueError: If it takes other images, or is not the one that `config.teacher_digest` pins.
        WeightsError: If its weights cannot be had, do not fit or are not finite.
    """
    label = f"the teacher {config.teacher}"
    net = _load(config, device)
    if isinstance(net, ObjectFinder):
        raise ModelError(f"{label} is a detector; choose a classifier")
    check_classifier(net, label)
    check_finite(net.state_dict(), label)
    if net.in_chans != channels:
        raise ValueError(
            f"{label} takes images of {net.in_chans} channels, {config.model} of {channels}; choose a "
            "teacher that takes the same"
        )
    classes = network_classes(net.pretrained_cfg, net.num_classes)
    digest = _digest(net, classes)
    if config.teacher_digest not in (None, digest):
        raise ValueError(
            f"{label} is not what it was when the run began: the digest of its weights, normalisation and classes is "
            f"{digest}, not {config.teacher_digest}; give the former one, or begin another run with --out and without "
            "teacher_digest, an option or a line of the --config file"
        )
    outputs, note = outputs_of(class_names, classes, label)
    own: tuple[int, int] = tuple(get_model_input_config(net)["input_size"][1:])
    size = own if config.teacher_size is None else parse_size(config.teacher_size)
    notes = [f"{label}: {note}"] if note else []
    try:
        if size != own and hasattr(net, "set_input_size"):
            net.set_input_size(size)
        return Teacher(net, size, outputs, digest, notes, device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{label} cannot compute images of {size_text(size)} pixels ({first_line(error)}); give another "
            "--teacher-size"
        ) from error


def _load(config: FinetuneConfig, device: torch.device) -> Any:
    """The teacher's network with its weights."""
    if config.teacher.endswith(".onnx") or not is_file(config.teacher):
        if config.teacher_model and not is_file(config.teacher):
            raise ValueError(f"teacher_model is for a teacher that is a file, and there is no file {config.teacher}")
        try:
            return load_network(config.teacher, str(device))
        except ModelError as error:
            raise ModelError(f"the teacher: {error}") from error
        except WeightsError as error:
            known = get_pretrained_cfg(config.teacher)
            if known is None or known.has_weights or tags_in_words(config.teacher):
                raise
            raise WeightsError(
                f"the teacher {config.teacher} has no pretrained weights; choose one that has, or the folder of a run, "
                "or a file of weights with --teacher-model"
            ) from error
    if not config.teacher_model:
        raise ValueError(
            f"the teacher {config.teacher} is a file, which does not say of which network it is: give --teacher-model "
            "NETWORK, or the folder of a run as --teacher"
        )
    return load_file(config.teacher_model, config.teacher, str(device))


def _normalization(net: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of a network's input."""
    cfg = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
    return per_channel(cfg["mean"], net.in_chans), per_channel(cfg["std"], net.in_chans)


def _resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(N, C, H, W) -> (N, C, height, width) of `size`; None keeps the size."""
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def _as_image(values: Sequence[float], device: torch.device) -> Tensor:
    """A number for each channel, (1, C, 1, 1)."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def _digest(net: nn.Module, classes: NetworkClasses) -> str:
    """The SHA-256 of what a teacher computes with: its weights, normalisation and classes."""
    digest = hashlib.sha256(repr((_normalization(net), list(classes.names))).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
