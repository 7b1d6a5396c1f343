"""Classifies images, as `spd-zoo predict` does."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from spd_zoo.arguments import positive_integer
from spd_zoo.data.classes import network_classes, renamed
from spd_zoo.data.reading import channel_mode, per_channel, read_image, size_text
from spd_zoo.errors import first_line
from spd_zoo.inference.exported import load_model
from spd_zoo.inference.images import ImageLike, as_html, check_colour, listed, open_image, optional_package
from spd_zoo.inference.loop import Files, Task, batches, check_finite, run
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.process import pick_device
from spd_zoo.weights.load import ModelError, pretrained_cfg, task_by_name

__all__ = [
    "DEFAULT_CLASSIFIER",
    "ClassProbability",
    "Classification",
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
class Classification:
    """The probability of every class for one image.

    Attributes:
        probabilities: (classes,), in the network's order; their sum is 1.
        names: The name of each class, in the same order.
        image: The image as it was given to the classifier; None if it is unknown.
    """

    probabilities: Tensor
    names: tuple[str, ...]
    image: ImageLike | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        best = (f"{each.name} {100 * each.probability:.1f} %" for each in self.top(3))
        return f"Classification({', '.join(best)})"

    def _repr_html_(self) -> str:
        try:
            image = open_image(self.image) if self.image is not None else None
        except ValueError:  # the file is gone
            image = None
        rows = ((each.name, f"{100 * each.probability:.2f} %") for each in self.top())
        return as_html(image, ("class", "probability"), rows)

    @property
    def name(self) -> str:
        """The name of the most probable class."""
        return self.top(1)[0].name

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.top(1)[0].probability

    def top(self, k: int = 5) -> tuple[ClassProbability, ...]:
        """The `k` most probable classes, or all if there are fewer, in descending order.

        Raises:
            ValueError: If `k` is less than 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = self.probabilities.topk(min(k, len(self.names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(ClassProbability(index, self.names[index], probability) for index, probability in pairs)

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """`class` and `probability` of the most probable class, and `top`, the best `k` as dicts; ready for JSON."""
        return {"class": self.name, "probability": self.probability, "top": [asdict(each) for each in self.top(k)]}

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the columns `class` and `probability`, a row per class in the network's order.

        Raises:
            ModuleNotFoundError: If the package pandas is missing.
        """
        columns = {"class": self.names, "probability": self.probabilities.tolist()}
        return optional_package("pandas", "to_pandas").DataFrame(columns)


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image file, in descending order, or the reason why it could not be read."""

    path: Path
    top: tuple[ClassProbability, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()  # what was guessed when it was read


@contextmanager
def transform_errors(image: Image.Image) -> Iterator[None]:
    """Turns errors of transforms that cannot resize an image into a ValueError.

    Raises:
        ValueError: In place of those errors.
    """
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
        return self.prepare(read_image(file, self.mode))

    def prepare(self, image: Image.Image) -> Tensor:
        """An upright image of the mode -> (C, H, W).

        Raises:
            ValueError: If it is too long for its width.
        """
        short, long = sorted(image.size)
        if self.side**2 * long > _MOST_PIXELS * short:
            raise ValueError(
                f"this image of {image.width} x {image.height} pixels is too long and narrow: with the shorter side "
                f"resized to {self.side} pixels it would have more than {_MOST_PIXELS:,}; crop it"
            )
        with transform_errors(image):
            return self.transform(image)


class Classifier:
    """Names what an image shows. For objects and where they are, see `Detector`.

    Args:
        model: A network, or one with pretrained weights by its name, with or without a tag, `local-dir:FOLDER`, the
            folder of a run, or an ONNX file that `spd-zoo export` wrote, which ONNX Runtime runs on the CPU.
        device: torch device; by default a network stays where it is, and a name is loaded on a GPU if there is one.
        batch_size: Images per batch.
        class_map: Other names for the network's classes: from the new name to the network's own.
        colour: The order of the channels of arrays: "rgb", or "bgr" as OpenCV reads them.

    Attributes:
        names: The name of each class, in the network's order.

    Raises:
        DataError: If `class_map` names a class that the network does not have.
        ModelError: If there is no such network, it is no classifier, or it cannot be used.
        ValueError: If `batch_size` is less than 1, `colour` is neither, or there is no such device.
        WeightsError: If its weights are unavailable or must not be used.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        device: str | None = None,
        batch_size: int = 32,
        class_map: Mapping[str, str] | None = None,
        colour: str = "rgb",
    ) -> None:
        self.batch_size = positive_integer("batch_size", batch_size)
        check_colour(colour)
        self.colour = colour
        self.name = type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)
        if isinstance(model, nn.Module):
            check_classifier(model, self.name)
            self.net: Any = model if device is None else model.to(pick_device(device))
        else:
            self.net = load_classifier(self.name, device)
        self.net.eval()
        cfg = pretrained_cfg(self.net)
        self.names = tuple(renamed(network_classes(cfg, self.net.num_classes), class_map or {}))
        # timm's config has the channels and the size of the weights, whatever the network was created with
        channels, height, width = get_model_input_config(self.net)["input_size"]
        config = resolve_data_config({"input_size": (channels, height, width)}, pretrained_cfg=cfg)
        self.image_size: tuple[int, int] = (height, width)
        mode = channel_mode(channels, self.name)
        config |= {name: per_channel(config[name], channels) for name in ("mean", "std")}
        never_larger = config["crop_mode"] in ("border", "squash")  # the resized image is never larger than the input
        side = 0 if never_larger else math.ceil(max(config["input_size"][1:]) / config["crop_pct"])
        self.reader = ImageReader(create_transform(**config), mode, side)

    def __repr__(self) -> str:
        device = next(self.net.parameters()).device
        return f"Classifier({self.name}, {len(self.names)} classes, {size_text(self.image_size)} pixels, on {device})"

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Classification]: ...

    @overload
    def __call__(self, images: ImageLike) -> Any: ...

    def __call__(self, images: Any) -> Any:
        """What an image shows, or each image of a list or folder.

        Args:
            images: A file, a PIL image, an array of uint8, (H, W, 3) in the order `colour` or grey (H, W), a tensor
                (3, H, W) or grey (1, H, W) of uint8 or of floats from 0 to 1, or a list of these, of any sizes; or a
                folder or a pattern such as photos/*.png, for its images in the order of their paths. Files and PIL
                images are turned as their EXIF says.

        Returns:
            A `Classification`; for a list, a folder or a pattern, a list of them.

        Raises:
            ModelError: If the network computes numbers that are not finite.
            ValueError: If an image cannot be read or is none of these.
        """
        sources, several = listed(images, self.colour)
        found = []
        for batch in batches(range(len(sources)), self.batch_size):
            inputs = [self.reader.prepare(open_image(sources[i], self.reader.mode)) for i in batch]
            results = zip(batch, self.compute(torch.stack(inputs)), strict=True)
            found += [replace(each, image=sources[i]) for i, each in results]
        return found if several else found[0]

    @torch.inference_mode()
    def compute(self, inputs: Tensor) -> list[Classification]:
        """Preprocessed inputs (N, C, H, W) -> the probabilities for each.

        Raises:
            ModelError: If the network computes numbers that are not finite.
        """
        weight = next(self.net.parameters())  # its device and precision are those of the inputs
        logits = self.net(inputs.to(weight, memory_format=torch.channels_last))
        check_finite(logits, self.name)
        return [Classification(each, self.names) for each in logits.float().softmax(1).cpu()]

    @property
    def task(self) -> Task[Classification]:
        """The task for the loop over image files."""
        return Task(self.reader, torch.stack, self.compute, self.batch_size)


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
        ModelError: If there is no such network, it cannot be used, or it computes numbers that are not finite.
        ValueError: If there is no such device.
        WeightsError: If its weights are unavailable or must not be used.
    """
    task = Classifier(model, device=device, batch_size=batch_size, class_map=class_map).task
    images = Files([str(path) for path in paths])
    for batch, outcomes in run(images, task, batches(range(len(paths)), batch_size)):
        for index, outcome in zip(batch, outcomes, strict=True):
            top = outcome.result.top(top_k) if outcome.result is not None else ()
            yield Prediction(paths[index], top, outcome.error, outcome.notes)


def load_classifier(model: str, device: str | None) -> nn.Module:
    """A pretrained classifier as `load_model` returns it.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights are unavailable or must not be used.
    """
    if task_by_name(model) == "detection":
        raise _no_classifier(model)
    net = load_model(model, device)
    check_classifier(net, model)
    return net


def _no_classifier(model: str) -> ModelError:
    return ModelError(f"{model} is a detector; run `spd-zoo detect {model} IMAGES`, or use spd_zoo.Detector")


def check_classifier(net: nn.Module, model: str) -> None:
    """Checks that a network, called `model` in the message, is a classifier.

    Raises:
        ModelError: If it is a detector, none of timm's networks, or has no classes.
    """
    if isinstance(net, ObjectFinder):
        raise _no_classifier(model)
    pretrained_cfg(net)  # an error now, if it has none
    if not getattr(net, "num_classes", 0):
        raise ModelError(f"{model} has no classifier, only features")
