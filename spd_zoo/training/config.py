"""The configuration of a run, whose fields are the command's options and the keys of a YAML file; and its plan."""

import difflib
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from timm.data import create_transform

from spd_zoo.data.notes import count
from spd_zoo.data.reading import MAX_PIXELS, parse_size, size_text
from spd_zoo.files import read_yaml

__all__ = [
    "DISTILLATION",
    "FinetuneConfig",
    "Plan",
    "as_options",
    "completed",
    "load_config",
    "load_recipe",
    "make_config",
    "merged",
    "parse_epochs",
    "parse_model_args",
    "parse_numbers",
    "parse_sizes",
    "recipe_names",
    "refuse_others",
    "to_yaml",
]

RECIPES = Path(__file__).parent / "recipes"
SEPARATORS = {"image_size": "x", "teacher_size": "x", "mean": ",", "std": ",", "hsv": ",", "decay_epochs": ","}
GENERAL = ("quick", "best")  # recipes for any data
DISTILLATION = ("teacher_model", "teacher_size", "teacher_digest", "distill_weight", "distill_temperature")
MAX_ZOOM = 0.9  # near 1, images shrink to nothing on a grey area that no memory holds
UNKNOWN = "unknown"  # in a recipe: its source does not give the value


def _option(default: Any, text: str, free: bool = False, only: str = "", **former: Any) -> Any:
    """A field: `free` ones may change when a run is resumed, and some are for `only` classifiers or detectors.

    `former` is the value of runs that a version without this option, or with another default, began.
    """
    metadata = {"help": f"{only}: {text}" if only else text, "free": free, "only": only}
    return field(default=default, metadata=metadata | {"former": former.get("former", default)})


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train, on which data, with which settings; each field is an option of `spd-zoo finetune`.

    None stands for a value that the run chooses and writes into its `run.yaml`.
    """

    model: str = field(
        metadata={"help": "NETWORK, NETWORK.TAG or local-dir:FOLDER; with --epochs +N: the folder of a finished run"}
    )
    data: str = field(
        metadata={
            "help": "folder with train/ and val/, CSV file, parquet or tar folder, or hf://NAME; for detectors a "
            "folder with boxes in any usual format, a data.yaml, a COCO .json, a list of images, or a CSV file",
            "free": True,  # it may move; a run recognises its images by their fingerprint
        }
    )
    out: Path = field(metadata={"help": "folder of the run; an interrupted run in it is resumed", "free": True})
    # data
    val_name: str = _option("val", "split to evaluate after every epoch")
    val_split: float | None = _option(
        None, "share of the training images to hold out for validation (default: 0.2 if there is no val split)"
    )
    val_size: int = _option(0, "number of images to hold out, instead of a share")
    check: bool = _option(True, "read all images before training and leave out unreadable ones")
    image_column: str = _option("", "column with the images, if the data set has several", only="classifiers")
    label_column: str = _option("", "column with the classes, if the data set has several", only="classifiers")
    stream: bool = _option(False, "stream a Hugging Face data set instead of copying it", only="classifiers")
    stream_length: int = _option(
        0, "with --stream: number of training images, if the data set does not declare it", only="classifiers"
    )
    tile: int = _option(
        0,
        "train and validate on tiles of N pixels, cut from larger images as they are read (0: no)",
        only="detectors",
    )
    overlap: float = _option(0.2, "overlap of tiles, as a share of their side", only="detectors")
    max_pixels: int = _option(
        MAX_PIXELS,
        "largest image that may be read as a whole, in pixels; with --tile, a TIFF is read in parts",
        free=True,
        only="detectors",
    )
    # network
    pretrained: bool | None = _option(None, "start from pretrained weights (default: if there are verified ones)")
    model_args: str = _option("", "arguments of the network, for example zero_init_residual=true,drop_path_rate=0.1")
    freeze: str = _option("", "modules that are not trained, for example stem,stages.0")
    head_init: str | None = _option(
        None,
        "initial weights of a pretrained network's classifier: probe (a linear probe of the training images, or the "
        "pretrained outputs of the same classes, whichever is better), zero, or random (default: probe; zero with "
        "--stream)",
        only="classifiers",
    )
    head_epochs: int | None = _option(
        None, "epochs in which only the classifier is trained (default: 1 if it starts at zero or is a detector's)"
    )
    freeze_bn: bool | None = _option(
        None,
        "use BatchNorm's pretrained statistics and do not update them (default: for pretrained classifiers with "
        "steps of up to 64 images)",
        former=False,
    )
    # steps
    epochs: int = _option(20, "passes over the training images; +10: train MODEL, a finished run, for 10 more")
    batch_size: int | None = _option(
        None, "images per step, summed over all processes (default: 8 to 128, depending on the data)"
    )
    accumulate: int | None = _option(
        None, "micro-batches of gradient accumulation (default: as few as fit into memory)"
    )
    drop_last: bool = _option(True, "leave out the last images of an epoch if they do not fill a step")
    image_size: str | None = _option(
        None,
        "pixels, 48x96 is height by width; 32,48@11 means 32, then 48 from epoch 11 on, counted from 0 (default: 64; "
        "detectors: the network's)",
    )
    patience: int = _option(0, "stop after this many epochs without a better val top-1 or AP (0: never)")
    keep: str | None = _option(
        None,
        "network to keep: best, of the epoch with the best val top-1 or AP, which may be the start; or last "
        "(default: best)",
    )
    # optimiser
    opt: str | None = _option(None, "optimiser, by timm's name (default: adamw; lamb for classifiers from scratch)")
    momentum: float = _option(0.9, "momentum, for optimisers that have it")
    lr: float | None = _option(None, "peak learning rate (default, for lamb and adamw only: depends on the batch size)")
    layer_decay: float | None = _option(
        None,
        "factor on the learning rate from each layer to the one before it (default: 1; pretrained classifiers: 0.8)",
    )
    weight_decay: float | None = _option(
        None, "weight decay; biases and normalisation layers have none (default: 0.02; detectors: 0.0005)"
    )
    decay_all: bool = _option(False, "apply weight decay to biases and normalisation layers, too")
    clip_grad: float = _option(0.0, "maximum norm of the gradient (0: no clipping)")
    sched: str = _option(
        "cosine", "learning rate schedule: cosine, or multistep, which multiplies it by --decay-rate at --decay-epochs"
    )
    sched_epochs: bool = _option(False, "update the learning rate once per epoch instead of every step")
    decay_epochs: str = _option("", "epochs of multistep, counted from 0, for example 100,150,180")
    decay_rate: float = _option(0.1, "factor of multistep")
    min_lr: float = _option(0.0, "learning rate at the end of cosine")
    warmup_epochs: int | None = _option(None, "epochs of linear warmup (default: 2, fewer in short runs)")
    warmup_lr: float | None = _option(None, "learning rate at the start of warmup (default: a hundredth of --lr)")
    ema: float | None = _option(
        None,
        "decay of the exponential moving average of the weights, which is then evaluated and saved (0: none; default: "
        "0; detectors: 0.999)",
    )
    # loss
    label_smoothing: float = _option(0.1, "label smoothing", only="classifiers")
    class_weights: str = _option(
        "",
        "loss weights: inv_freq or effective_num (timm's, by class frequency), or one number per class",
        only="classifiers",
    )
    # distillation
    teacher: str = _option(
        "",
        "learn from the outputs of this network, too: a pretrained one, the folder of a run, or a file of weights with "
        "--teacher-model; it must know every class of the data",
        only="classifiers",
    )
    teacher_model: str = _option(
        "",
        "architecture of the file given as --teacher; with a tag, it has the classes of that tag",
        only="classifiers",
    )
    teacher_size: str | None = _option(
        None, "pixels of the images that the teacher sees (default: its own size)", only="classifiers"
    )
    teacher_digest: str | None = _option(
        None,
        "refuse a teacher whose weights, normalisation and classes have another digest (default: recorded when a run "
        "begins)",
        only="classifiers",
    )
    distill_weight: float = _option(
        0.9, "weight of the teacher's loss, at most 1; the loss of the labels has 1 minus this", only="classifiers"
    )
    distill_temperature: float = _option(4.0, "softmax temperature of teacher and student", only="classifiers")
    # augmentation
    crop_scale: float | None = _option(
        None,
        "smallest share of the area that a random resized crop keeps (default: 0.5)",
        only="classifiers",
        former=0.5,
    )
    crop_padding: int | None = _option(
        None,
        "pad each side by this many black pixels and crop at random, instead of random resized crops; 0: do not "
        "(default: an eighth of images of up to 48 pixels, unless --crop-scale is set)",
        only="classifiers",
        former=0,
    )
    interpolation: str = _option(
        "random", "interpolation of the random crop: random, bilinear or bicubic", only="classifiers"
    )
    hflip: float = _option(0.5, "probability of a horizontal flip")
    vflip: float = _option(0.0, "probability of a vertical flip")
    rotation: float = _option(0.0, "largest rotation in degrees; corners become black", only="classifiers")
    color_jitter: float = _option(0.0, "strength of changes of brightness, contrast and saturation", only="classifiers")
    auto_augment: str | None = _option(None, "timm's policy string, for example rand-m6-n2-mstd0.5", only="classifiers")
    erase: float = _option(0.0, "probability of random erasing", only="classifiers")
    mixup: float = _option(0.0, "Mixup alpha", only="classifiers")
    cutmix: float = _option(0.0, "CutMix alpha", only="classifiers")
    mix_prob: float = _option(1.0, "probability of Mixup or CutMix", only="classifiers")
    mosaic: float | None = _option(
        None, "probability of a mosaic of four images (default: 1 for YOLO; not for SSD)", only="detectors"
    )
    mosaic_off: int | None = _option(
        None, "epochs at the end without mosaic (default: 10; in short runs a fifth)", only="detectors"
    )
    zoom: float | None = _option(
        None, "largest change of scale, up to 0.9: 0.5 means 0.5 to 1.5 times (default: 0.5 for YOLO)", only="detectors"
    )
    shift: float | None = _option(
        None, "largest shift as a share of the image (default: 0.1 for YOLO)", only="detectors"
    )
    hsv: str | None = _option(
        None, "largest change of hue, saturation and brightness (default: 0.015,0.7,0.4 for YOLO)", only="detectors"
    )
    keep_tiny: bool | None = _option(
        None,
        "keep objects that augmentation shrinks below 2 px (SSD: 1 % of the image), which the authors drop; objects "
        "that it cuts off are still dropped (default: yes)",
        only="detectors",
        former=False,
    )
    # input of the network
    mean: str = _option(
        "", "mean of each channel, from 0 to 1, for example 0.5,0.5,0.5 (default: the network's)", only="classifiers"
    )
    std: str = _option("", "standard deviation of each channel (default: the network's)", only="classifiers")
    crop_mode: str = _option(
        "center",
        "how evaluation makes an image fit: center cuts it, squash stretches it, border pads it",
        only="classifiers",
    )
    crop_pct: float = _option(1.0, "share of the shorter side that evaluation keeps", only="classifiers")
    auto_anchors: bool = _option(True, "YOLOv5: fit the anchors to the data if too few boxes fit", only="detectors")
    # computing
    bf16: bool | None = _option(
        None,
        "mixed precision with bfloat16 (default: if the hardware supports it, but not on a CPU for networks of "
        "depthwise convolutions, which it slows down)",
    )
    compile: bool = _option(False, "torch.compile the network")
    seed: int = _option(0, "seed of initial weights, data order, augmentation and held-out images")
    workers: int = _option(2, "worker processes that read and augment images", free=True)
    device: str | None = _option(
        None, "torch device, such as cpu, cuda:1 or mps (default: cuda if available, else cpu)", free=True
    )
    # the run
    resume: str = _option(
        "auto", "auto: resume a run of the same configuration in --out; never: a run there is an error", free=True
    )
    save_minutes: float = _option(10.0, "minutes after which the state is saved within an epoch, too", free=True)
    log: str = _option("", "also log the metrics of each epoch with tensorboard or wandb", free=True)
    dry_run: bool = _option(False, "check the data, print what would be trained and exit; write nothing", free=True)

    def __post_init__(self) -> None:
        """Raises ValueError for invalid values."""
        object.__setattr__(self, "data", os.fspath(self.data))
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "teacher", os.fspath(self.teacher))
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and value < 0 and item.name != "seed":
                raise ValueError(f"{item.name} must not be negative, got {value}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be a number of 64 bits, got {self.seed}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.lr is None and self.opt not in (None, "lamb", "adamw"):
            raise ValueError(f"the default learning rates are for lamb and adamw; give lr with opt {self.opt}")
        for item in fields(self):
            if item.name in DISTILLATION and not self.teacher and getattr(self, item.name) != item.default:
                raise ValueError(f"{item.name} is for a teacher; give --teacher, too")
        if not 0 < self.distill_temperature < math.inf:
            raise ValueError(f"distill_temperature must be positive and finite, got {self.distill_temperature}")
        for name in ("crop_scale", "layer_decay", "crop_pct", "decay_rate", "distill_weight"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("ema", "val_split", "label_smoothing", "overlap"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name, owner, there in (
            ("overlap", "tiles; give tile", self.tile),
            ("mix_prob", "Mixup and CutMix; give mixup or cutmix", self.mixup or self.cutmix),
            ("decay_rate", "sched multistep; give it", self.sched == "multistep"),
            ("stream_length", "a streamed data set; give stream", self.stream),
        ):
            if not there and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} is for {owner}, too")
        for name in ("hflip", "vflip", "erase", "mix_prob", "mosaic", "shift"):
            if (getattr(self, name) or 0) > 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if (self.zoom or 0) > MAX_ZOOM:
            raise ValueError(f"zoom must be from 0 to {MAX_ZOOM}, which shrinks images to a tenth, got {self.zoom}")
        if self.val_split and self.val_size:
            raise ValueError("val_split and val_size both set how much to hold out; give only one")
        if self.sched not in ("cosine", "multistep") or (self.sched == "multistep") != bool(self.decay_epochs):
            raise ValueError(
                "sched is cosine, or multistep with decay_epochs, "
                f"got {self.sched!r} with decay_epochs {self.decay_epochs!r}"
            )
        if self.log not in ("", "tensorboard", "wandb"):
            raise ValueError(f"log is tensorboard or wandb, got {self.log!r}")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume is auto or never, got {self.resume!r}")
        if self.crop_mode not in ("center", "squash", "border"):
            raise ValueError(f"crop_mode is center, squash or border, got {self.crop_mode!r}")
        if self.keep not in (None, "best", "last"):
            raise ValueError(f"keep is best or last, got {self.keep!r}")
        if self.head_init not in (None, "probe", "zero", "random"):
            raise ValueError(f"head_init is probe, zero or random, got {self.head_init!r}")
        if self.interpolation not in ("random", "bilinear", "bicubic"):
            raise ValueError(f"interpolation is random, bilinear or bicubic, got {self.interpolation!r}")
        try:
            create_transform(32, is_training=True, auto_augment=self.auto_augment, use_prefetcher=True)
        except AssertionError as error:
            raise ValueError(
                f"auto_augment {self.auto_augment!r} is no policy of timm's; give one like rand-m6-n2-mstd0.5"
            ) from error
        for size, first in parse_sizes("64" if self.image_size is None else self.image_size):
            if first >= self.epochs:
                raise ValueError(
                    f"the {count(self.epochs, 'epoch')} of the run end before image size {size_text(size)}@{first} "
                    "begins; give more epochs or leave the size out"
                )
        if self.teacher_size is not None:
            parse_size(self.teacher_size)
        parse_epochs(self.decay_epochs)
        if "num_classes" in parse_model_args(self.model_args):
            raise ValueError("num_classes follows from the data; leave it out of model_args")
        parse_numbers(self.mean)
        if not all(value > 0 for value in parse_numbers(self.std)):
            raise ValueError(f"std must be positive, got {self.std}")
        if self.hsv is not None:
            hsv = parse_numbers(self.hsv)
            if len(hsv) != 3 or not all(0 <= value < math.inf for value in hsv) or hsv[0] > 0.5:
                raise ValueError(
                    f"hsv must be three numbers like 0.015,0.7,0.4, from 0 up, the first at most 0.5, got {self.hsv!r}"
                )
        if self.stream and not self.drop_last:
            raise ValueError("a stream fills every step; leave --no-drop-last out")
        if (self.mixup or self.cutmix) and not self.drop_last:
            raise ValueError("Mixup and CutMix pair the images of a full step; they need drop_last")
        if (self.mixup or self.cutmix) and (self.batch_size or 0) % 2:
            raise ValueError(f"Mixup and CutMix need an even batch_size, got {self.batch_size}")


@dataclass(frozen=True)
class Plan:
    """All values of a run, after those that the configuration does not set were chosen by data and hardware.

    Attributes:
        config: The configuration with these values filled in, as in `run.yaml`.
        pretrained: Whether training starts from pretrained weights.
        head_epochs: Epochs in which only the classifier is trained.
        sizes: Heights and widths of images in pixels, each with its first epoch.
        batch_size: Images per step, summed over all processes.
        micro_batches: Batches that each process computes per step, one after the other.
        opt: timm's name of the optimiser.
        lr: Peak learning rate.
        layer_decay: Factor on the learning rate from each layer to the one before it.
        weight_decay: Weight decay.
        warmup_epochs: Epochs of linear warmup.
        warmup_lr: Learning rate at the start of warmup.
        ema: Decay of the moving average of the weights; 0: no average.
        bf16: Whether autocast computes in bfloat16.
        freeze_bn: Whether BatchNorm uses its pretrained statistics and does not update them.
        keep: Which network is kept: "best" or "last".
    """

    config: FinetuneConfig
    pretrained: bool
    head_epochs: int
    sizes: list[tuple[tuple[int, int], int]]
    batch_size: int
    micro_batches: int
    opt: str
    lr: float
    layer_decay: float
    weight_decay: float
    warmup_epochs: int
    warmup_lr: float
    ema: float
    bf16: bool
    freeze_bn: bool
    keep: str

    @property
    def eval_batch_size(self) -> int:
        """Images per batch of an evaluation: those of a micro-batch."""
        return max(1, self.batch_size // self.micro_batches)

    @classmethod
    def of(cls, config: FinetuneConfig) -> "Plan":
        """The plan of a configuration in which every value is set.

        Raises:
            ValueError: If a value is not set.
        """
        values: dict[str, Any] = {item.name: getattr(config, item.name, None) for item in fields(cls)}
        values |= {"config": config, "sizes": parse_sizes(config.image_size or ""), "micro_batches": config.accumulate}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise ValueError(f"the configuration does not set {', '.join(missing)}")
        return cls(**values)


def refuse_others(config: FinetuneConfig, networks: str) -> None:
    """Refuses options that the run's network does not have.

    Args:
        config: The request.
        networks: "classifiers" or "detectors".

    Raises:
        ValueError: If an option of other networks was given.
    """
    for item in fields(config):
        only = item.metadata.get("only")
        neutral = (item.default, item.metadata.get("former"))  # a run.yaml lists every option
        if only and only != networks and getattr(config, item.name) not in neutral:
            raise ValueError(f"{item.name} is an option for {only}, and {config.model} is none of them; leave it out")


def parse_sizes(text: str) -> list[tuple[tuple[int, int], int]]:
    """Image sizes: `"32,32x48@11"` -> `[((32, 32), 0), ((32, 48), 11)]`, height and width, and each one's first epoch.

    Raises:
        ValueError: If the text is not of that form.
    """
    sizes = []
    for item in text.split(","):
        pixels, _, first = item.partition("@")
        try:
            sizes.append((parse_size(pixels), int(first or 0)))
        except ValueError as error:
            raise ValueError(f"image_size {text!r} is not like 64, 32x48 or 32,48@11") from error
    epochs = [first for _, first in sizes]
    if epochs[0] != 0 or epochs != sorted(set(epochs)):
        raise ValueError(f"image_size {text!r} must begin with a size for epoch 0, then sizes with rising epochs")
    return sizes


def parse_epochs(text: str) -> list[int]:
    """Epochs: `"100,150,180"` -> `[100, 150, 180]`.

    Raises:
        ValueError: If the text is not of that form.
    """
    epochs = text.split(",") if text else []
    numbers = [int(epoch) for epoch in epochs if epoch.strip().isdigit()]
    if len(numbers) < len(epochs) or numbers != sorted(set(numbers)):
        raise ValueError(f"decay_epochs {text!r} is not like 100,150,180: rising whole numbers")
    return numbers


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers: `"0.5,0.4"` -> `(0.5, 0.4)`.

    Raises:
        ValueError: If the text is not of that form.
    """
    try:
        return tuple(float(number) for number in text.split(",") if text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not like 0.5,0.5,0.5") from error


def parse_model_args(text: str) -> dict[str, Any]:
    """Arguments of a network: `"depth=3,drop_rate=0.1"` -> `{"depth": 3, "drop_rate": 0.1}`; values are JSON.

    Raises:
        ValueError: If the text is not of that form.
    """
    arguments = {}
    for argument in filter(None, text.split(",")):
        name, _, value = argument.partition("=")
        try:
            arguments[name.strip()] = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"model_args {argument[:80]!r} is not like zero_init_residual=true, drop_rate=0.1, or for text "
                'detector="yolov8n"'
            ) from error
    return arguments


def load_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe that comes with the package.

    Raises:
        ValueError: If there is no recipe of that name.
    """
    if name not in recipe_names():
        raise ValueError(f"there is no recipe {name!r}; recipes: {', '.join(recipe_names())}")
    return load_config(RECIPES / f"{name}.yaml")


def recipe_names() -> list[str]:
    """The names of all recipes: quick and best, which are for any data, then those of publications."""
    published = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml") if recipe.stem not in GENERAL)
    return [*GENERAL, *published]


def load_config(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: If there is no such file, or it has an unknown option.
    """
    path = Path(file)
    if not path.is_file():
        advice = f"; the recipe of this name is --recipe {file}" if str(file) in recipe_names() else ""
        raise ValueError(f"there is no file {file}{advice}")
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold lines like `epochs: 20`")
    if found.pop("tensorboard", False):  # the option of earlier versions, in their `run.yaml`
        found.setdefault("log", "tensorboard")
    return as_options(found, str(path))


def as_options(found: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Options by their names, with values of the types of `FinetuneConfig`.

    Args:
        found: The options; paths may be of any type, sizes and numbers in lists or tuples.
        where: Where they come from, for messages.

    Raises:
        ValueError: If one is unknown, or a value has another type.
    """
    hints = typing.get_type_hints(FinetuneConfig)
    for name in found:
        if name not in hints:
            nearest = difflib.get_close_matches(str(name), hints, n=1)
            advice = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{where} has an unknown option {reprlib.repr(name)}{advice}")
    values = {name: _as_text(name, value) for name, value in found.items()}
    return {
        name: value if value == UNKNOWN else _as(hints[name], value, f"{where}: {name}")
        for name, value in values.items()
    }


def make_config(options: dict[str, Any], file: str | Path | None = None, recipe: str | None = None) -> FinetuneConfig:
    """Creates the configuration from `options`, which take precedence, then a YAML file, then a recipe.

    Raises:
        ValueError: If an option has no meaning, or a required one is missing.
    """
    values = load_recipe(recipe) if recipe is not None else {}
    values |= (load_config(file) if file is not None else {}) | options
    unknown = [f"--{name.replace('_', '-')}" for name, value in values.items() if value == UNKNOWN]
    if unknown:
        source = file if recipe is None else f"the recipe {recipe}"
        raise ValueError(f"the publication behind {source} leaves some settings out: give {', '.join(unknown)}")
    missing = [name for name in ("model", "data", "out") if not values.get(name)]
    if missing:
        names = " and ".join(name.upper() if name == "model" else f"--{name}" for name in missing)
        raise ValueError(f"give {names}: `spd-zoo finetune MODEL --data DATA --out RUN`")
    return FinetuneConfig(**values)


def _as_text(name: str, value: Any) -> Any:
    """The value of an option as it is written on the command line, if it is a path, a list or a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if name in SEPARATORS and isinstance(value, list | tuple) and value:
        return SEPARATORS[name].join(map(str, value))
    return value


def _as(hint: Any, value: Any, where: str) -> Any:
    """A value of YAML as the field's type."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in allowed:
        return None
    wanted = allowed[0]
    fits = (
        isinstance(value, bool)
        if wanted is bool
        else isinstance(value, int | float | str) and not isinstance(value, bool)
    )
    try:
        if not fits or (wanted is int and int(value) != float(value)):
            raise ValueError
        return wanted(value)
    except ValueError as error:
        shown = " ".join(reprlib.repr(value).split())  # that of a network has several lines
        raise ValueError(f"{where} is {shown}, not of the type {wanted.__name__}") from error


def to_yaml(config: FinetuneConfig) -> str:
    """All fields as YAML, which `load_config` reads."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def merged(stored: dict[str, Any], config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with which a run is resumed: `stored`, except for the fields that may change.

    Raises:
        ValueError: If `config` asks for something else.
    """
    values, began = {}, completed(stored, config.out)
    for item in fields(FinetuneConfig):
        old, new = began[item.name], getattr(config, item.name)
        if item.metadata.get("free") and not (
            item.name == "workers" and stored.get("stream")
        ):  # workers share a stream
            values[item.name] = new
        elif new is None or new == old:
            values[item.name] = old
        else:
            raise ValueError(
                f"{config.out} holds a run with {item.name}={old}, not {new}; give another folder with --out"
            )
    return FinetuneConfig(**values)


def completed(stored: dict[str, Any], run: Path) -> dict[str, Any]:
    """All options of a run.

    Args:
        stored: Its `run.yaml`; a version without some of today's options may have written it.
        run: Its folder, for messages.

    Raises:
        ValueError: If an option has another type.
    """
    hints = typing.get_type_hints(FinetuneConfig)
    former = {item.name: item.metadata.get("former", item.default) for item in fields(FinetuneConfig)}
    former |= {"keep": "best" if stored.get("patience") else "last"}  # as it was before there was a choice
    former |= {"head_init": None if not stored.get("pretrained") else "zero"}
    known = {name: _as(hints[name], stored[name], f"{run / 'run.yaml'}: {name}") for name in hints if name in stored}
    return former | known
