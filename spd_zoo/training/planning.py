"""The plan of a run: the values that its configuration does not set, chosen by network, data and hardware."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from timm.optim import list_optimizers

from spd_zoo.data.classes import network_classes
from spd_zoo.data.labelled import DataError
from spd_zoo.data.notes import count
from spd_zoo.data.reading import channel_mode, per_channel, size_text
from spd_zoo.errors import first_line
from spd_zoo.process import Process
from spd_zoo.training.classification.distillation import Teacher
from spd_zoo.training.config import (
    FinetuneConfig,
    Plan,
    parse_epochs,
    parse_model_args,
    parse_numbers,
    parse_sizes,
)
from spd_zoo.training.layers import classifier_of, frozen_layers, lies_in, mostly_depthwise
from spd_zoo.training.memory import bytes_per_image, choose_micro_batches
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.task import Task
from spd_zoo.weights import WeightsError, loads_backbone_only
from spd_zoo.weights.load import has_weights
from spd_zoo.weights.manifest import find_entry, tags_in_words

__all__ = ["blank", "create", "model_args_of", "plan", "preprocessing_of"]

FAMILIAR = 30  # default learning rate for new classes, divided by that for the classes of the pretrained weights


def plan(
    config: FinetuneConfig,
    task: Task[Any],
    net: Any,
    images: int,
    class_names: Sequence[str],
    process: Process,
    teacher: Teacher | None = None,
) -> Plan:
    """Chooses all values that the configuration does not set.

    Args:
        config: The configuration.
        task: The task of its network.
        net: The network, on the meta device.
        images: Number of training images.
        class_names: The names of their classes.
        process: This process, whose device and memory count.
        teacher: The network that it also learns from, on that device.

    Raises:
        DataError: If there are too few images.
        ValueError: If an option has no meaning for the network or the data.
    """
    pretrained = _starts_pretrained(config, process)
    batch_size = _batch_size(config, images, process)
    if config.batch_size is not None and min(batch_size, images) < config.batch_size:
        process.print(f"note: {images} training images: a step has {min(batch_size, images)}, not {config.batch_size}")
    late = [epoch for epoch in parse_epochs(config.decay_epochs) if epoch >= config.epochs]
    if late:
        process.print(f"note: {count(config.epochs, 'epoch')} end before the learning rate falls after epoch {late[0]}")
    defaults = task.defaults(config, net, batch_size, pretrained)
    only_backbone = pretrained and ":" not in config.model and loads_backbone_only(config.model)
    if only_backbone:
        others = tags_in_words(config.model.partition(".")[0])
        process.print(
            f"note: the weights of {config.model} are a backbone: neck and head begin at random"
            + (f"; whole networks for particular data, selected by name: {others}" if others else "")
        )
    known = network_classes(net.pretrained_cfg, net.num_classes)
    keeps_classes = pretrained and not only_backbone and config.head_init != "random"
    if config.lr is None and keeps_classes and known.named and {*known.names} == {*class_names}:
        defaults["lr"] /= FAMILIAR
        process.print(
            f"note: {config.model} was trained for exactly these classes: the learning rate is {FAMILIAR} times "
            "smaller than for new ones (--lr sets another)"
        )
    bf16 = _has_bf16(process.device) and not (process.device.type == "cpu" and mostly_depthwise(net))
    defaults = {"head_epochs": int(pretrained and not only_backbone), "freeze_bn": False} | defaults
    defaults |= {"pretrained": pretrained, "bf16": bf16, "keep": "best"}
    defaults |= {"warmup_epochs": min(2, config.epochs // 4)}
    options = {name: value if (asked := getattr(config, name)) is None else asked for name, value in defaults.items()}
    options |= {"batch_size": batch_size}  # Mixup may have made it smaller than what was asked for
    if config.warmup_lr is None:
        options["warmup_lr"] = options["lr"] / 100
    config = replace(config, **options)

    sizes = parse_sizes(options["image_size"])
    net = blank(config.model, **model_args_of(config, len(class_names), sizes))
    _check_training(net, config)
    largest = max((size for size, _ in sizes), key=math.prod)
    try:
        per_image = bytes_per_image(net, largest, preprocessing_of(net, config, process.device))
    except RuntimeError as error:
        reason = first_line(error)
        raise ValueError(f"{config.model} cannot compute images of {size_text(largest)} pixels: {reason}") from error
    if teacher is not None:
        per_image += teacher.bytes_per_image  # its weights lie in memory already
    weights, pairs = sum(parameter.nbytes for parameter in net.parameters()), bool(config.mixup or config.cutmix)
    step = min(batch_size, images)
    accumulate = config.accumulate or choose_micro_batches(weights, per_image, step, pairs, process)
    return Plan.of(replace(config, accumulate=accumulate))


def _starts_pretrained(config: FinetuneConfig, process: Process) -> bool:
    """Whether training starts from pretrained weights: as asked for, or if there are verified ones.

    Raises:
        ValueError: If there are no weights of that name, or nobody asked for those of a tag that are not verified.
    """
    model = config.model
    named = any(sign in model for sign in ".:")  # by a tag or an address
    if config.pretrained is False or (config.pretrained and named):
        return bool(config.pretrained)
    if has_weights(model):
        return True
    tags = tags_in_words(model)
    if config.pretrained:
        raise ValueError(
            f"{model} has no default weights; select some by name: {tags}"
            if tags
            else f"{model} has no pretrained weights; leave --pretrained out to begin at random"
        )
    if "." in model and find_entry(model) is not None:
        raise ValueError(
            f"the weights {model} are not verified: give --pretrained to begin with them, or --no-pretrained to begin "
            "at random"
        )
    others = f"; {model} has weights for particular data, selected by name: {tags}" if tags else ""
    process.print(
        f"note: {model} has no {'default' if tags else 'pretrained'} weights: all weights begin at random{others}"
    )
    return False


def _check_training(net: Any, config: FinetuneConfig) -> None:
    """Checks what else `start` needs: an optimiser, and something that it trains.

    Raises:
        ValueError: If timm has no such optimiser, `freeze` names no module, or nothing is left to train.
    """
    wrapper, _, name = str(config.opt).lower().rpartition("_")
    if wrapper not in ("", "lookahead") or name not in list_optimizers():
        nearest = difflib.get_close_matches(name, list_optimizers(), n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else "give one of timm's, such as adamw, lamb or sgd"
        raise ValueError(f"there is no optimiser {config.opt!r}; {advice}")
    frozen = frozen_layers(net, config.freeze)
    classifier = classifier_of(net)
    if config.head_epochs and (not classifier or any(lies_in(name, frozen) for name in classifier)):
        raise ValueError("the classifier cannot train alone, it is frozen or unknown; give --head-epochs 0")
    if all(lies_in(name, frozen) for name, _ in net.named_parameters()):
        raise ValueError(f"freeze {config.freeze} leaves nothing to train; name fewer modules")


def _batch_size(config: FinetuneConfig, images: int, process: Process) -> int:
    """Images per step: as asked for, or a power of two with which an epoch has about 20 steps."""
    shares = process.world * (config.accumulate or 1)
    if images < 2 * shares:
        raise DataError(f"{images} training images are too few for {shares} micro-batches of a step: each needs two")
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = max(8, min(128, 2 ** int(math.log2(max(1, images / 20)))))
        batch_size += -batch_size % (2 * shares)
    if batch_size < 2 * shares:
        raise ValueError(f"batch_size {batch_size} is too small for {shares} micro-batches: each needs two images")
    if config.stream and batch_size % shares:
        raise ValueError(
            f"a step of a stream has {shares} equal micro-batches, which batch_size {batch_size} cannot be divided into"
        )
    if config.mixup or config.cutmix:
        batch_size = min(batch_size, images - images % (2 * shares))
        if batch_size % (2 * shares):
            raise ValueError(
                f"Mixup and CutMix need an even size of all {shares} micro-batches, got batch_size {batch_size}"
            )
    return batch_size


def _has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def model_args_of(config: FinetuneConfig, classes: int, sizes: list[tuple[tuple[int, int], int]]) -> dict[str, Any]:
    """Arguments of `timm.create_model` for the network that is trained.

    Raises:
        ValueError: If it takes images of one size, and other sizes are asked for.
    """
    arguments = parse_model_args(config.model_args) | {"num_classes": classes}
    known = get_pretrained_cfg(config.model.partition(".")[0])
    fixed_size = known is not None and known.fixed_input_size
    size = sizes[0][0]
    if fixed_size and (len(sizes) > 1 or to_2tuple(arguments.setdefault("img_size", size)) != size):
        raise ValueError(f"{config.model} takes images of one size: give one --image-size, and no other img_size")
    return arguments


def blank(model: str, **arguments: Any) -> Any:
    """A network on torch's meta device: its structure without any numbers. Raises as `create`."""
    with torch.device("meta"):
        return create(model, pretrained=False, **arguments)


def create(model: str, **arguments: Any) -> Any:
    """A network of timm's registry, of this zoo or of timm.

    Args:
        model: Its name.
        **arguments: Arguments of `timm.create_model`.

    Raises:
        ValueError: If it does not take these arguments, or cannot be made.
        WeightsError: If its weights are not available.
    """
    try:
        return timm.create_model(model, **arguments)
    except TypeError as error:
        raise ValueError(f"{model} does not take these model_args: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise ValueError(f"cannot make {model}: {error}") from error


def preprocessing_of(net: Any, config: FinetuneConfig, device: torch.device) -> Preprocessing:
    """The preprocessing that the network's config and the run's configuration describe.

    Raises:
        ValueError: If the configuration has other numbers of channels than the network.
    """
    channel_mode(net.in_chans, config.model)
    cfg = resolve_data_config(model=net)
    colours = []
    for name in ("mean", "std"):
        asked = parse_numbers(getattr(config, name))
        if asked and len(asked) != net.in_chans:
            raise ValueError(f"{name} has {len(asked)} numbers, but {config.model} takes {net.in_chans} channels")
        colours.append(per_channel(asked or cfg[name], net.in_chans))
    mean, std = colours
    return Preprocessing(mean, std, device, bool(config.bf16), config.crop_pct, crop_mode=config.crop_mode)
