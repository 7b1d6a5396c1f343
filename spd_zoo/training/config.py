"""What to train, on what, and how: a dataclass whose fields are the command's options and the keys of a YAML file."""

import dataclasses
import difflib
import json
import os
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "FinetuneConfig",
    "load_config",
    "make_config",
    "merged",
    "parse_epochs",
    "parse_model_args",
    "parse_numbers",
    "parse_sizes",
    "refuse_others",
    "to_yaml",
]

RECIPES = Path(__file__).parent / "recipes"
UNKNOWN = "unknown"  # in a recipe: its source does not say


def _option(default: Any, text: str, free: bool = False, only: str = "") -> Any:
    """A field; one that is `free` may differ when a stopped run goes on, one for `only` some networks says so."""
    return field(default=default, metadata={"help": f"{only}: {text}" if only else text, "free": free, "only": only})


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train, on what, and how; each field is an option of `spd-zoo finetune`.

    None stands for a value that the run finds by itself and writes into its `run.yaml`.
    """

    model: str = field(metadata={"help": "network, with or without a tag"})
    data: str = field(
        metadata={
            "help": "folder with train/ and val/, CSV file, parquet or tar folder, or hf://NAME; for detectors a "
            "folder in the form of COCO, YOLO or Pascal VOC"
        }
    )
    out: Path = field(metadata={"help": "folder of the run; a run in it goes on where it stopped", "free": True})
    # data
    val_name: str = _option("val", "the split that is evaluated after every epoch")
    val_split: float | None = _option(
        None, "share of the training images to hold out (default: 0.2 if there is no val split)"
    )
    val_size: int = _option(0, "instead of a share, how many images to hold out")
    check: bool = _option(True, "read all images before the training and leave out what cannot be read")
    image_column: str = _option("", "column with the images, where the data set has several", only="classifiers")
    label_column: str = _option("", "column with the classes, where the data set has several", only="classifiers")
    stream: bool = _option(
        False, "read a Hugging Face data set from front to back in every epoch, without a copy", only="classifiers"
    )
    stream_length: int = _option(0, "its training images, where it does not say", only="classifiers")
    # network
    pretrained: bool | None = _option(None, "start from pretrained weights (default: where there are verified ones)")
    model_args: str = _option("", "arguments of the network, for example zero_init_residual=true,drop_path_rate=0.1")
    freeze: str = _option("", "parts that do not learn, for example stem,stages.0")
    head_epochs: int | None = _option(None, "epochs in which the classifier learns alone (default: 1 if pretrained)")
    # steps
    epochs: int = _option(20, "passes over the training images")
    batch_size: int | None = _option(None, "images per step, all processes together (default: 8 to 128, by the data)")
    accumulate: int | None = _option(None, "parts that a step is computed in (default: as few as the memory allows)")
    drop_last: bool = _option(True, "leave images that do not fill a step out of the epoch")
    image_size: str | None = _option(
        None,
        "pixels; 32,48@11 means 32, and 48 from epoch 11 (counted from 0) on (default: 64; detectors: the network's)",
    )
    patience: int = _option(
        0, "stop after so many epochs without a better val top-1 or AP, and keep the best (0: never)"
    )
    # optimiser
    opt: str | None = _option(None, "timm's name of the optimiser (default: adamw; lamb for classifiers from scratch)")
    momentum: float = _option(0.9, "momentum, for optimisers that have one")
    lr: float | None = _option(None, "largest learning rate (default: for lamb and adamw alone, by the batch size)")
    layer_decay: float | None = _option(
        None,
        "factor on the rate from each layer to the one in front of it (default: 1; pretrained classifiers: 0.8)",
    )
    weight_decay: float | None = _option(
        None, "weight decay; none on biases and normalisation layers (default: 0.02, for detectors 0.0005)"
    )
    decay_all: bool = _option(False, "weight decay on biases and normalisation layers too")
    clip_grad: float = _option(0.0, "largest norm of the gradient (0: any)")
    sched: str = _option(
        "cosine", "how the learning rate falls: cosine, or multistep: by --decay-rate at --decay-epochs"
    )
    sched_epochs: bool = _option(False, "change the learning rate between epochs alone, not after every step")
    decay_epochs: str = _option("", "epochs for multistep, counted from 0, for example 100,150,180")
    decay_rate: float = _option(0.1, "factor of each step of multistep")
    min_lr: float = _option(0.0, "where cosine ends")
    warmup_epochs: int | None = _option(
        None, "epochs over which the learning rate rises (default: 2, less in short runs)"
    )
    warmup_lr: float | None = _option(None, "where it begins (default: a hundredth of --lr)")
    ema: float | None = _option(
        None,
        "decay of the moving average of the weights, which then is the result (0: none; default: 0; detectors: 0.999)",
    )
    # loss
    label_smoothing: float = _option(0.1, "share of the target spread over all classes", only="classifiers")
    class_weights: str = _option(
        "", "inv_freq or effective_num: timm's weights by frequency; or numbers, one per class", only="classifiers"
    )
    # augmentation
    crop_scale: float = _option(0.5, "smallest share of an image's area that a random crop keeps", only="classifiers")
    crop_padding: int = _option(
        0, "instead of that, a random crop of the image with so many black pixels around it", only="classifiers"
    )
    interpolation: str = _option("random", "of the random crop: random, bilinear or bicubic", only="classifiers")
    hflip: float = _option(0.5, "how often an image is mirrored")
    vflip: float = _option(0.0, "how often an image is turned upside down")
    rotation: float = _option(0.0, "largest turn in degrees; the corners become black", only="classifiers")
    color_jitter: float = _option(0.0, "largest change of brightness, contrast and saturation", only="classifiers")
    auto_augment: str | None = _option(None, "timm's policy string, for example rand-m6-n2-mstd0.5", only="classifiers")
    erase: float = _option(0.0, "how often a rectangle is erased", only="classifiers")
    mixup: float = _option(0.0, "Mixup alpha", only="classifiers")
    cutmix: float = _option(0.0, "CutMix alpha", only="classifiers")
    mix_prob: float = _option(1.0, "how often Mixup or CutMix is done", only="classifiers")
    mosaic: float | None = _option(
        None, "how often four images make one (default: 1 for YOLO, never for SSD)", only="detectors"
    )
    mosaic_off: int | None = _option(
        None, "so many epochs at the end do without (default: 10, in short runs a fifth)", only="detectors"
    )
    zoom: float | None = _option(
        None, "largest change of size: 0.5 means half to one and a half times (default: 0.5 for YOLO)", only="detectors"
    )
    shift: float | None = _option(
        None, "largest shift, as a share of the image (default: 0.1 for YOLO)", only="detectors"
    )
    hsv: str | None = _option(
        None, "largest change of hue, saturation and brightness (default: 0.015,0.7,0.4 for YOLO)", only="detectors"
    )
    # input of the network
    mean: str = _option(
        "", "of the colours from 0 to 1, for example 0.5,0.5,0.5 (default: the network's)", only="classifiers"
    )
    std: str = _option("", "of the colours (default: the network's)", only="classifiers")
    crop_pct: float = _option(1.0, "share of an image's shorter side that evaluation sees", only="classifiers")
    auto_anchors: bool = _option(True, "YOLOv5: fit the anchors to the boxes where they fit badly", only="detectors")
    # computing
    bf16: bool | None = _option(
        None, "compute in bfloat16 where autocast allows it (default: where the device is made for it)"
    )
    compile: bool = _option(False, "torch.compile the network")
    seed: int = _option(0, "seed of initial weights, order, augmentation and held-out images")
    workers: int = _option(2, "processes that read and augment images", free=True)
    device: str | None = _option(None, "torch device (default: cuda if there is one, else cpu)", free=True)
    # the run
    resume: str = _option(
        "auto", "auto: a run of the same configuration in --out goes on; never: that is an error", free=True
    )
    save_minutes: float = _option(10.0, "save within an epoch, too, when so much time has passed", free=True)
    tensorboard: bool = _option(False, "write events for TensorBoard", free=True)
    dry_run: bool = _option(False, "stop behind the check of the data; write nothing", free=True)

    def __post_init__(self) -> None:
        """Refuses values without meaning."""
        object.__setattr__(self, "data", os.fspath(self.data))
        object.__setattr__(self, "out", Path(self.out))
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and value < 0 and item.name != "seed":
                raise ValueError(f"{item.name} must not be negative, got {value}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.lr is None and self.opt not in (None, "lamb", "adamw"):
            raise ValueError(f"the default learning rates are for lamb and adamw; give lr with opt {self.opt}")
        if not 0 < self.crop_scale <= 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError("crop_scale must be above 0 and at most 1, label_smoothing from 0 to below 1")
        for name in ("layer_decay", "crop_pct", "decay_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("ema", "val_split"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("hflip", "vflip", "erase", "mix_prob", "mosaic", "zoom", "shift"):
            if (getattr(self, name) or 0) > 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.val_split and self.val_size:
            raise ValueError("val_split and val_size both say how much to hold out; give one of them")
        if self.sched not in ("cosine", "multistep") or (self.sched == "multistep") != bool(self.decay_epochs):
            raise ValueError(
                "sched is cosine, or multistep with decay_epochs, "
                f"got {self.sched!r} with decay_epochs {self.decay_epochs!r}"
            )
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume is auto or never, got {self.resume!r}")
        if self.interpolation not in ("random", "bilinear", "bicubic"):
            raise ValueError(f"interpolation is random, bilinear or bicubic, got {self.interpolation!r}")
        (
            parse_sizes("64" if self.image_size is None else self.image_size),
            parse_epochs(self.decay_epochs),
            parse_model_args(self.model_args),
        )
        parse_numbers(self.mean), parse_numbers(self.std)
        if self.hsv is not None and len(parse_numbers(self.hsv)) != 3:
            raise ValueError(f"hsv must be three numbers like 0.015,0.7,0.4, got {self.hsv!r}")
        if (self.mixup or self.cutmix) and not self.drop_last:
            raise ValueError("Mixup and CutMix pair the images of a full step; they need drop_last")
        if (self.mixup or self.cutmix) and (self.batch_size or 0) % 2:
            raise ValueError(f"Mixup and CutMix need an even batch_size, got {self.batch_size}")


def refuse_others(config: FinetuneConfig, networks: str) -> None:
    """Refuses options that only other networks have; `networks` is "classifiers" or "detectors".

    Raises:
        ValueError: If such an option was given.
    """
    for item in fields(config):
        only = item.metadata.get("only")
        if only and only != networks and getattr(config, item.name) != item.default:
            raise ValueError(f"{item.name} is an option for {only}, and {config.model} is another kind; leave it out")


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "32,48@11" -> [(32, 0), (48, 11)]: pixels and the first epoch with that size."""
    sizes = []
    for part in text.split(","):
        pixels, _, first = part.partition("@")
        if not pixels.strip().isdigit() or not (first or "0").isdigit():
            raise ValueError(f"image_size {text!r} is not like 64 or 32,48@11")
        sizes.append((int(pixels), int(first or 0)))
    epochs = [first for _, first in sizes]
    if epochs[0] != 0 or epochs != sorted(set(epochs)):
        raise ValueError(f"image_size {text!r} must begin with a size for epoch 0, then sizes with rising epochs")
    return sizes


def parse_epochs(text: str) -> list[int]:
    """ "100,150,180" -> [100, 150, 180]."""
    epochs = text.split(",") if text else []
    numbers = [int(epoch) for epoch in epochs if epoch.strip().isdigit()]
    if len(numbers) < len(epochs) or numbers != sorted(set(numbers)):
        raise ValueError(f"decay_epochs {text!r} is not like 100,150,180: rising whole numbers")
    return numbers


def parse_numbers(text: str) -> tuple[float, ...]:
    """ "0.5,0.4" -> (0.5, 0.4)."""
    try:
        return tuple(float(part) for part in text.split(",") if text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not like 0.5,0.5,0.5") from error


def parse_model_args(text: str) -> dict[str, Any]:
    """ "zero_init_residual=true,drop_path_rate=0.1" -> {"zero_init_residual": True, "drop_path_rate": 0.1}."""
    arguments = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            arguments[name.strip()] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"model_args {part!r} is not like zero_init_residual=true or drop_rate=0.1") from error
    return arguments


def load_config(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file, or in the recipe of that name that comes with the package.

    Raises:
        ValueError: If there is no such file or recipe, or it has an option that there is not.
    """
    path = Path(file)
    recipes = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.yaml"))}
    if not path.is_file():
        if str(file) not in recipes:
            raise ValueError(f"there is no file {file}, nor a recipe of that name; recipes: {', '.join(recipes)}")
        path = recipes[str(file)]
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold lines like `epochs: 20`")
    hints = typing.get_type_hints(FinetuneConfig)
    for name in found:
        if name not in hints:
            nearest = difflib.get_close_matches(str(name), hints, n=1)
            advice = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{path} has an option {name!r} that there is not{advice}")
    return {
        name: value if value == UNKNOWN else _as(hints[name], value, f"{path}: {name}") for name, value in found.items()
    }


def make_config(given: dict[str, Any], file: str | Path | None = None) -> FinetuneConfig:
    """The configuration of `given` options, and of a YAML file or recipe for those that are not given.

    Raises:
        ValueError: If an option has no meaning, or one that is needed is neither given nor in the file.
    """
    values = (load_config(file) if file is not None else {}) | given
    unknown = [f"--{name.replace('_', '-')}" for name, value in values.items() if value == UNKNOWN]
    if unknown:
        raise ValueError(f"the source of {file} does not say everything: give {', '.join(unknown)}")
    missing = [name for name in ("model", "data", "out") if not values.get(name)]
    if missing:
        raise ValueError(f"give {' and '.join(name.upper() if name == 'model' else f'--{name}' for name in missing)}")
    return FinetuneConfig(**values)


def _as(hint: Any, value: Any, where: str) -> Any:
    """A value of YAML as the field's type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = kinds[0]
    fits = (
        isinstance(value, bool)
        if kind is bool
        else isinstance(value, int | float | str) and not isinstance(value, bool)
    )
    try:
        if not fits or (kind is int and int(value) != float(value)):
            raise ValueError
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{where} is {value!r}, not of the kind {kind.__name__}") from error


def to_yaml(config: FinetuneConfig) -> str:
    """All fields as YAML, which `load_config` reads."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def merged(stored: dict[str, Any], given: FinetuneConfig) -> FinetuneConfig:
    """The configuration with which a run goes on: as it began, but for the fields that are free.

    Raises:
        ValueError: If `given` asks for something else.
    """
    values = {}
    for item in dataclasses.fields(FinetuneConfig):
        old, new = stored.get(item.name, item.default), getattr(given, item.name)
        if item.metadata.get("free") and not (item.name == "workers" and stored.get("stream")):  # they share a stream
            values[item.name] = new
        elif new is None or new == old:
            values[item.name] = old
        else:
            raise ValueError(
                f"{given.out} holds a run with {item.name}={old}, not {new}; give another folder with --out"
            )
    return FinetuneConfig(**values)
