"""Image files in, the most probable classes of each out: what `spd-zoo predict` runs."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from spd_zoo.data.reading import read_image
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import pick_device
from spd_zoo.weights.load import ModelError, _cfg, _first_line, class_names, load_network

__all__ = [
    "Answer",
    "Guess",
    "Predictor",
    "Reader",
    "check_classifier",
    "load",
    "predict",
    "transform_errors",
]

_MOST_PIXELS = 100_000_000  # of an image that is resized before it is cropped


@dataclass(frozen=True)
class Guess:
    """One class and how probable the network holds it."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """The most probable classes of an image file, the most probable first, or why there are none."""

    path: Path
    top: tuple[Guess, ...] = ()
    error: str | None = None


@contextmanager
def transform_errors(image: Image.Image) -> Iterator[None]:
    """Makes a ValueError of what transforms raise for images that they cannot cope with."""
    try:
        yield
    except (OverflowError, MemoryError, RuntimeError) as error:
        width, height = image.size
        raise ValueError(f"cannot resize this image of {width} x {height} pixels: {_first_line(error)}") from error


@dataclass(frozen=True)
class Reader:
    """Reads images as a classifier takes them; other processes can have it without the network.

    Attributes:
        transform: Makes the input of an image.
        mode: PIL's name of what the transform takes.
        side: To how many pixels the transform resizes the shorter side; 0 if the longer one is no problem.
    """

    transform: Callable[[Image.Image], Tensor]
    mode: str
    side: int = 0

    def __call__(self, file: Path | str | BytesIO) -> Tensor:
        """An image file, or its bytes -> (C, H, W).

        Raises:
            ValueError: If it is no image that can be read, or it is too long for its width.
        """
        image = read_image(file, self.mode)
        short, long = sorted(image.size)
        if self.side**2 * long > _MOST_PIXELS * short:
            raise ValueError(
                f"this image of {image.width} x {image.height} pixels is too long and narrow: with the shorter side "
                f"resized to {self.side} pixels it would have more than {_MOST_PIXELS:,}; cut it"
            )
        with transform_errors(image):
            return self.transform(image)


class Predictor:
    """Names what images show; `reader` makes the inputs of image files.

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, or the folder of a run.
        top_k: Classes per image.
        device: torch device; a GPU if there is one, unless given.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights cannot be had or must not be used.
    """

    def __init__(self, model: str, top_k: int = 5, device: str | None = None) -> None:
        self.net = load(model, pick_device(device))
        cfg = _cfg(self.net)
        self.names = class_names(cfg)
        self.top_k = top_k
        config = resolve_data_config(pretrained_cfg=cfg)
        mode = {1: "L", 3: "RGB"}.get(config["input_size"][0])
        if mode is None:
            raise ModelError(f"{model} takes {config['input_size'][0]} channels; images have 1 or 3")
        whole = config["crop_mode"] in ("border", "squash")  # then nothing is larger than the input
        side = 0 if whole else math.ceil(max(config["input_size"][1:]) / config["crop_pct"])
        self.reader = Reader(create_transform(**config), mode, side)

    @torch.inference_mode()
    def __call__(self, inputs: Tensor) -> list[tuple[Guess, ...]]:
        """Inputs (N, C, H, W) -> the most probable classes of each, the most probable first."""
        device = next(self.net.parameters()).device
        images = inputs.to(device, memory_format=torch.channels_last)
        best = self.net(images).float().softmax(1).topk(min(self.top_k, len(self.names)))
        return [
            tuple(Guess(i, self.names[i], probability) for i, probability in zip(indices, values, strict=True))
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def predict(
    model: str, paths: Sequence[Path], top_k: int = 5, batch_size: int = 32, device: str | None = None
) -> Iterator[Answer]:
    """The answers for image files, in order, each as soon as its batch is computed.

    Args:
        model: As for `Predictor`.
        paths: Image files, as `spd_zoo.data.reading.find_images` gives them.
        top_k: Classes per image.
        batch_size: Images in memory at once.
        device: torch device; a GPU if there is one, unless given.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights cannot be had or must not be used.
    """
    predictor = Predictor(model, top_k, device)
    for start in range(0, len(paths), batch_size):
        inputs: dict[int, Tensor] = {}
        errors: dict[int, str] = {}
        batch = paths[start : start + batch_size]
        for i, path in enumerate(batch):
            try:
                inputs[i] = predictor.reader(path)
            except ValueError as error:
                errors[i] = str(error)
        tops = dict(zip(inputs, predictor(torch.stack(list(inputs.values()))), strict=True)) if inputs else {}
        for i, path in enumerate(batch):
            yield Answer(path, tops.get(i, ()), errors.get(i))


def load(model: str, device: str) -> nn.Module:
    """A pretrained classifier on a torch device, channels last, ready to compute.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights cannot be had or must not be used.
    """
    net = load_network(model, device)
    check_classifier(net, model)
    return net


def check_classifier(net: nn.Module, model: str) -> None:
    """Raises ModelError if a network, called `model`, cannot name what an image shows."""
    if isinstance(net, DetectionNet):
        raise ModelError(f"{model} is a detector; `spd-zoo detect` finds objects with it")
    if not _cfg(net)["num_classes"]:
        raise ModelError(f"{model} has no classifier, so it cannot name what it sees")
