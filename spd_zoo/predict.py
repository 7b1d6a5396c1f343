"""Image files in, the most probable classes of each out: what `spd-zoo predict` runs."""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import CustomDatasetInfo, DatasetInfo, ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from spd_zoo.images import read_image
from spd_zoo.models._detector import DetectionNet
from spd_zoo.weights import WeightsError, create, entries, fetch, imported_names

__all__ = [
    "Answer",
    "Guess",
    "ModelError",
    "Predictor",
    "Reader",
    "check_classifier",
    "class_names",
    "load",
    "load_network",
    "predict",
    "timm_name",
    "transform_errors",
]

_MOST_PIXELS = 100_000_000  # of an image that is resized before it is cropped
_LOADING_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, OSError, EOFError, UnpicklingError, SafetensorError)


class ModelError(ValueError):
    """A network that there is not or that cannot be used; the message says what would work."""


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


def timm_name(name: str) -> str:
    """What timm calls a network given by its name, by a source such as `local-dir:`, or by the folder of a run.

    Raises:
        ModelError: If there is no such network; with the nearest names.
    """
    network = name.partition(".")[0]
    ours = {entry.network for entry in entries().values()}
    known = name in entries() or (network in ours and name in imported_names())
    if known or ":" in name or (network not in ours and timm.is_model(network)):
        return name
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json; give one that a finished run left")
        return f"local-dir:{name}"
    nearest = difflib.get_close_matches(name.lower(), entries(), n=3, cutoff=0.5)
    advice = f"the nearest names are {', '.join(nearest)}" if nearest else "`spd-zoo list` shows all networks"
    raise ModelError(f"there is no network {name!r}; {advice}")


def class_names(cfg: dict[str, Any]) -> list[str]:
    """What each output of the network with this `pretrained_cfg` means; its number where nobody says."""
    names = [str(index) for index in range(cfg["num_classes"])]
    info: DatasetInfo
    if cfg.get("label_names"):
        info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    elif _is_imagenet(cfg):
        info = ImageNetInfo()
    elif _is_coco(cfg):
        info = CustomDatasetInfo(_coco_names())
    else:
        return names
    return [info.index_to_description(i) if info.has_label(i) else number for i, number in enumerate(names)]


def _is_imagenet(cfg: dict[str, Any]) -> bool:
    """Whether the outputs are ImageNet-1k's: the manifest says so of our weights, the tag of timm's."""
    tag = cfg.get("tag") or ""
    entry = entries().get(f"{cfg['architecture']}.{tag}")
    dataset = tag if entry is None else entry.dataset or ""
    return cfg["num_classes"] == 1000 and ("in1k" in dataset or dataset.startswith("ImageNet-1k"))


def _is_coco(cfg: dict[str, Any]) -> bool:
    """Whether the outputs are COCO's 80 classes, as the manifest says."""
    entry = entries().get(f"{cfg['architecture']}.{cfg.get('tag') or ''}")
    return cfg["num_classes"] == 80 and entry is not None and (entry.dataset or "").startswith("COCO")


def _coco_names() -> list[str]:
    """COCO's classes in the order of its annotations; torchvision leaves a place for those that COCO never used."""
    names = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    return [name for name in names if name not in ("__background__", "N/A")]


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
        self.net = load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
        paths: Image files, as `spd_zoo.images.find_images` gives them.
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


def load_network(model: str, device: str) -> nn.Module:
    """A pretrained network of any kind on a torch device, channels last, ready to compute.

    Raises:
        ModelError: If there is no such network, or it cannot be loaded.
        WeightsError: If its weights cannot be had or must not be used.
    """
    name = timm_name(model)
    entry = entries().get(name)
    try:
        if entry is not None and entry.group == "timm":
            net = create(entry, fetch(entry)).eval()
        else:
            net = timm.create_model(name, pretrained=True).eval()
    except WeightsError:
        raise
    except _LOADING_ERRORS as error:
        raise ModelError(f"cannot load {model}: {_first_line(error)}") from error
    try:
        return net.to(device).to(memory_format=torch.channels_last)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot use device {device!r}: {_first_line(error)}") from error


def _cfg(net: nn.Module) -> dict[str, Any]:
    cfg: dict[str, Any] = vars(net)["pretrained_cfg"]
    return cfg


def _first_line(error: BaseException) -> str:
    return type(error).__name__ + ": " + str(error).strip().partition("\n")[0]
