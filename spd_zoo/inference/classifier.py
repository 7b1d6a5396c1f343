"""Classifies image files, as `spd-zoo predict` does."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from spd_zoo.data.classes import network_classes, renamed
from spd_zoo.data.reading import channel_mode, read_image
from spd_zoo.errors import first_line
from spd_zoo.inference.exported import load_model
from spd_zoo.inference.loop import Files, Task, batches, run
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.weights.load import ModelError, pretrained_cfg

__all__ = [
    "DEFAULT_CLASSIFIER",
    "ClassProbability",
    "Classifier",
    "ImageReader",
    "Prediction",
    "check_classifier",
    "load_classifier",
    "predict",
    "transform_errors",
]

DEFAULT_CLASSIFIER = "tf_efficientnet_lite0_spd"  # knows ImageNet's classes, and its weights are in the package
_MOST_PIXELS = 100_000_000  # of an image that is resized before it is cropped


@dataclass(frozen=True)
class ClassProbability:
    """A class and the probability that the network gives it."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image file, in descending order, or the reason why it could not be read."""

    path: Path
    top: tuple[ClassProbability, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()  # what was guessed when it was read


@contextmanager
def transform_errors(image: Image.Image) -> Iterator[None]:
    """Turns errors of transforms that cannot resize an image into a ValueError."""
    try:
        yield
    except (OverflowError, MemoryError, RuntimeError) as error:
        width, height = image.size
        raise ValueError(
            f"cannot resize this image of {width} x {height} pixels: {first_line(error, with_type=True)}"
        ) from error


@dataclass(frozen=True)
class ImageReader:
    """Reads and preprocesses images for a classifier; it can be sent to other processes without the network.

    Attributes:
        transform: Creates the input from an image.
        mode: PIL's mode of the images for the transform.
        side: Pixels to which the transform resizes the shorter side; 0 disables the limit on long narrow images.
    """

    transform: Callable[[Image.Image], Tensor]
    mode: str
    side: int = 0

    def __call__(self, file: Path | str | BytesIO) -> Tensor:
        """An image file, or its bytes -> (C, H, W).

        Raises:
            ValueError: If it cannot be read, or it is too long for its width.
        """
        image = read_image(file, self.mode)
        short, long = sorted(image.size)
        if self.side**2 * long > _MOST_PIXELS * short:
            raise ValueError(
                f"this image of {image.width} x {image.height} pixels is too long and narrow: with the shorter side "
                f"resized to {self.side} pixels it would have more than {_MOST_PIXELS:,}; crop it"
            )
        with transform_errors(image):
            return self.transform(image)


class Classifier:
    """A pretrained classifier with its preprocessing (`reader`) and the names of its classes (`names`).

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, the folder of a run, or an
            ONNX file that `spd-zoo export` wrote, which ONNX Runtime runs on the CPU.
        top_k: Classes per image.
        device: torch device; a GPU by default if there is one.
        class_map: Other names for the network's classes: from the new name to the network's own.

    Raises:
        DataError: If `class_map` names a class that the network does not have.
        ModelError: If there is no such network, or it cannot be used.
        ValueError: If there is no such device.
        WeightsError: If its weights are unavailable or must not be used.
    """

    def __init__(
        self, model: str, top_k: int = 5, device: str | None = None, class_map: Mapping[str, str] | None = None
    ) -> None:
        self.net = load_classifier(model, device)
        cfg = pretrained_cfg(self.net)
        self.names = renamed(network_classes(cfg, cfg["num_classes"]), class_map or {})
        self.top_k = top_k
        config = resolve_data_config(pretrained_cfg=cfg)
        mode = channel_mode(config["input_size"][0], model)
        never_larger = config["crop_mode"] in ("border", "squash")  # the resized image is never larger than the input
        side = 0 if never_larger else math.ceil(max(config["input_size"][1:]) / config["crop_pct"])
        self.reader = ImageReader(create_transform(**config), mode, side)

    @torch.inference_mode()
    def __call__(self, inputs: Tensor) -> list[tuple[ClassProbability, ...]]:
        """Inputs (N, C, H, W) -> the most probable classes of each, in descending order."""
        device = next(self.net.parameters()).device
        images = inputs.to(device, memory_format=torch.channels_last)
        best = self.net(images).float().softmax(1).topk(min(self.top_k, len(self.names)))
        return [
            tuple(ClassProbability(i, self.names[i], p) for i, p in zip(indices, probabilities, strict=True))
            for indices, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def task(self, batch_size: int) -> Task[tuple[ClassProbability, ...]]:
        """The task for the loop over images."""
        return Task(self.reader, torch.stack, self, batch_size)


def predict(
    model: str,
    paths: Sequence[Path],
    top_k: int = 5,
    batch_size: int = 32,
    device: str | None = None,
    class_map: Mapping[str, str] | None = None,
) -> Iterator[Prediction]:
    """Classifies image files, in order; yields each prediction as soon as its batch is computed.

    Args:
        model: As for `Classifier`.
        paths: Image files, as `spd_zoo.data.reading.find_images` returns them.
        top_k: Classes per image.
        batch_size: Images in memory at once.
        device: torch device; a GPU by default if there is one.
        class_map: As for `Classifier`.

    Raises:
        DataError: If `class_map` names a class that the network does not have.
        ModelError: If there is no such network, or it cannot be used.
        ValueError: If there is no such device.
        WeightsError: If its weights are unavailable or must not be used.
    """
    task = Classifier(model, top_k, device, class_map).task(batch_size)
    images = Files([str(path) for path in paths])
    for batch, outcomes in run(images, task, batches(range(len(paths)), batch_size)):
        for index, outcome in zip(batch, outcomes, strict=True):
            yield Prediction(paths[index], outcome.result or (), outcome.error, outcome.notes)


def load_classifier(model: str, device: str | None) -> nn.Module:
    """A pretrained classifier as `load_model` returns it.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights are unavailable or must not be used.
    """
    net = load_model(model, device)
    check_classifier(net, model)
    return net


def check_classifier(net: nn.Module, model: str) -> None:
    """Checks that a network, called `model` in the message, is a classifier.

    Raises:
        ModelError: If it is a detector or has no classes.
    """
    if isinstance(net, ObjectFinder):
        raise ModelError(f"{model} is a detector; `spd-zoo detect` finds objects with it")
    if not pretrained_cfg(net)["num_classes"]:
        raise ModelError(f"{model} has no classifier, only features")
