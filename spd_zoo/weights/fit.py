"""Compares the tensors of a checkpoint with a network, and finds the network of the zoo that they fit."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import timm
import torch
from timm.models import get_model_traits
from torch import Tensor, nn

from spd_zoo.weights.manifest import WeightsError, entries_for_import

__all__ = [
    "BACKBONE",
    "MOST_DIMENSIONS",
    "MOST_TENSORS",
    "FilterFn",
    "StateDict",
    "backbone_only",
    "cfg_of",
    "check_finite",
    "check_fit",
    "checked_tensors",
    "classifiers",
    "facts",
    "filter_of",
    "first_conv_name",
    "fit_image_channels",
    "misfit",
    "own_networks",
    "own_tensors",
    "rename",
    "which_fits",
]

StateDict = dict[str, Tensor]
FilterFn = Callable[[StateDict, Any], StateDict]
MOST_TENSORS, MOST_DIMENSIONS = 10_000, 64  # largest number of tensors, and of a tensor's dimensions (as in torch)
_LONGEST_NAME = 1_000  # characters
_MOST_PREFIXES = 4  # of wrapped networks, one around the other
BACKBONE = ("stem.", "stages.")  # prefixes of every network that `spd_zoo.models` builds on `Backbone`
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_OTHERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def rename(state_dict: StateDict, renames: Renames) -> StateDict:
    """Renames the keys of a state dict with regular expressions.

    Args:
        state_dict: The tensors.
        renames: Pairs of pattern and replacement, as for `re.sub`; all of them are applied to every key, in order.

    Returns:
        The tensors under their new keys.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        new = key
        for pattern, replacement in renames:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


def filter_of(model: nn.Module) -> FilterFn:
    """The function that renames the authors' keys to this network's; timm's networks need none."""
    module = sys.modules[type(model).__module__]
    filter_fn: FilterFn = getattr(module, "checkpoint_filter_fn", lambda state_dict, model: state_dict)
    return filter_fn


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """timm's configuration of the network."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def own_tensors(state_dict: StateDict, model: nn.Module, filter_fn: FilterFn) -> StateDict:
    """A checkpoint under the network's own keys.

    Prefixes of all keys are removed if more of them are the network's without these. Missing counters of normalisation
    layers, which old versions of torch did not write, become 0.

    Args:
        state_dict: The tensors under the authors' or our keys; at least one.
        model: The network.
        filter_fn: Renames the authors' keys to the network's.

    Returns:
        The tensors; if they do not fit, `misfit` says so.
    """
    forms = [state_dict]
    while len(forms) <= _MOST_PREFIXES:
        prefix = next(iter(forms[-1])).partition(".")[0] + "."
        if not all(key.startswith(prefix) for key in forms[-1]):
            break
        forms.append({key.removeprefix(prefix): tensor for key, tensor in forms[-1].items()})
    own = model.state_dict().keys()
    tensors = max((filter_fn(form, model) for form in forms), key=lambda renamed: len(own & renamed.keys()))
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    return tensors | {key: torch.zeros((), dtype=torch.int64) for key in counters - tensors.keys()}


def check_finite(state_dict: StateDict, name: str) -> None:
    """Refuses a checkpoint with a number that is not finite.

    Args:
        state_dict: The tensors.
        name: The checkpoint's name in errors.

    Raises:
        WeightsError: If there is such a number.
    """
    wild = next((key for key, tensor in state_dict.items() if not tensor.float().isfinite().all()), None)
    if wild:
        raise WeightsError(
            f"{name} is damaged: {wild} holds a number that is not finite. Get it again, or train it again"
        )


def fit_image_channels(state_dict: StateDict, model: nn.Module) -> StateDict:
    """A checkpoint under the network's own keys, adapted to its image channels where timm's way would be wrong.

    Half precision becomes float32 first, because here and in timm the sum of kernels has their type.
    """
    halves = (torch.float16, torch.bfloat16)
    state_dict = {key: tensor.float() if tensor.dtype in halves else tensor for key, tensor in state_dict.items()}
    fit: Callable[[StateDict], StateDict] | None = getattr(model, "fit_image_channels", None)
    return state_dict if fit is None else fit(state_dict)


def backbone_only(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The stem and the stages of a checkpoint, and the network's own tensors for everything else.

    Args:
        state_dict: The tensors under the network's own keys.
        model: A detector.

    Returns:
        The tensors; if the checkpoint's backbone does not fit, `misfit` says so.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(BACKBONE)}
    return own | {key: tensor for key, tensor in state_dict.items() if key.startswith(BACKBONE)}


def first_conv_name(model: nn.Module) -> str:
    """The name of a network's first convolution, in the order of registration."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _keys_of(content: Any) -> str:
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
    if not keys:
        return ""
    shown = ", ".join(repr(key[:40]) for key in keys[:8]) + (" and others" if len(keys) > 8 else "")
    return f". It has {shown}; if one of them is the network's, save its state dict alone"


def checked_tensors(state_dict: Any, name: str) -> StateDict:
    """Checks that a state dict is a dict of tensors that can be compared with a network, and printed.

    Args:
        state_dict: What should be a state dict.
        name: The checkpoint's name in errors.

    Returns:
        `state_dict`.

    Raises:
        WeightsError: If it is something else, or larger than any network.
    """
    if (
        not isinstance(state_dict, dict)
        or not state_dict
        or not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state_dict.items())
    ):
        what = "neither a dict of tensors, nor one under 'state_dict'"
        raise WeightsError(f"{name} holds no network weights: {what}{_keys_of(state_dict)}")
    if len(state_dict) > MOST_TENSORS:
        raise WeightsError(f"{name} holds {len(state_dict)} tensors, more than any network has")
    if not all(key.isprintable() and len(key) <= _LONGEST_NAME for key in state_dict):
        raise WeightsError(f"{name} holds a tensor whose name is too long, or has characters that cannot be printed")
    if not all(tensor.ndim <= MOST_DIMENSIONS for tensor in state_dict.values()):
        raise WeightsError(f"{name} holds a tensor of more than {MOST_DIMENSIONS} dimensions")
    return state_dict


def facts(state_dict: StateDict, meta: nn.Module, in_chans: int) -> dict[str, Any]:
    """Infers the numbers of classes and of image channels from a checkpoint.

    Only tensors whose other dimensions fit `meta` are used. Otherwise a small file could ask for a huge network.

    Args:
        state_dict: The tensors under the network's own keys.
        meta: The network, with `in_chans` image channels.
        in_chans: Image channels of `meta`.

    Returns:
        `num_classes` and `in_chans`.
    """
    first_conv = cfg_of(meta)["first_conv"]
    names = (
        classifiers(meta)[0],
        first_conv if isinstance(first_conv, str) else first_conv[0],
    )  # of timm's, some have several
    classifier, stem = (state_dict.get(f"{name}.weight") for name in names)
    own: list[Any] = [meta.get_submodule(name) for name in names]
    own_classifier, own_stem = (layer.weight for layer in own)
    if stem is not None and own_stem is not None and _same_shape_except(1, stem, own_stem):
        in_chans = stem.shape[1] * in_chans // own_stem.shape[1]
    num_classes = cast("int", meta.num_classes)
    if classifier is None or own_classifier is None or _has_numbers_for_each_class(classifier, own_classifier):
        num_classes = _num_classes(classifier, meta)
    return {"num_classes": num_classes, "in_chans": in_chans}


def _same_shape_except(dimension: int, tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor has the shape of the network's own one, except in one dimension."""
    return tensor.ndim == own.ndim and all(
        a == b for i, (a, b) in enumerate(zip(tensor.shape, own.shape, strict=True)) if i != dimension
    )


def _has_numbers_for_each_class(tensor: Tensor, own: Tensor) -> bool:
    """Whether a classifier's weight has at least a quarter as many numbers per class as the network's own one.

    They need not be equal: the input width of a YOLOv8 classifier depends on the number of classes (32 to 100 in the
    smallest network, 80 in its default).
    """
    return tensor.ndim == own.ndim and 4 * tensor[:1].numel() >= own[:1].numel()


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that depend on the number of classes; empty if there are none."""
    names = cfg_of(model)["classifier"] or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _num_classes(weight: Tensor | None, model: nn.Module) -> int:
    """Infers a checkpoint's number of classes from the weight of its first classifier, if any."""
    of_outputs: Callable[[int], int] | None = getattr(model, "num_classes_of", None)  # detectors have more outputs
    if of_outputs is None:
        return 0 if weight is None else weight.shape[:1].numel()
    return cast("int", model.num_classes) if weight is None else of_outputs(weight.shape[:1].numel())


def misfit(state_dict: StateDict, model: nn.Module, with_classifier: bool = False) -> str | None:
    """The first difference between a checkpoint and a network.

    Args:
        state_dict: The tensors under the network's own keys.
        model: The network.
        with_classifier: Compare the classifier, too.

    Returns:
        A description for an error; None if there is no difference.
    """
    cfg, own = cfg_of(model), model.state_dict()
    other = () if with_classifier else tuple(f"{name}." for name in classifiers(model))
    expected = {key: list(tensor.shape) for key, tensor in own.items() if not key.startswith(other)}
    found = {key: list(tensor.shape) for key, tensor in state_dict.items() if not key.startswith(other)}
    first_convs = get_model_traits(model).get("first_conv") or ()
    names = (first_convs,) if isinstance(first_convs, str) else first_convs
    adapted = {f"{name}.weight" for name in names}  # timm adapts them to the image channels
    surplus = [key for key in found if key not in expected]
    without_place = f"{len(surplus)} tensors have no place, the first is {surplus[0]}" if surplus else ""
    for key, shape in expected.items():
        if key not in found:
            missing = len(expected.keys() - found.keys())
            also = f"; {without_place}" if surplus else ""
            return f"{missing} of {len(expected)} tensors are missing, the first is {key}{also}"
        if found[key] != shape and not (key in adapted and found[key] == [shape[0], cfg["input_size"][0], *shape[2:]]):
            return f"{key} has shape {found[key]}, the network's has {shape}"
        if state_dict[key].dtype not in (_FLOATS if own[key].is_floating_point() else _FLOATS | _OTHERS):
            return f"{key} holds {state_dict[key].dtype}, the network's {own[key].dtype}"
    return without_place or None


def check_fit(state_dict: StateDict, model: nn.Module, words: str, features_only: bool) -> None:
    """Checks that the weights in a saved folder fit the network that its config describes.

    Args:
        state_dict: The tensors under the network's own keys.
        model: The network.
        words: What it is called in the error.
        features_only: Whether the network is created without its classifier.

    Raises:
        WeightsError: If they do not; the classifier may differ if the network has another number of classes.
    """
    cfg = cfg_of(model)
    same_classes = cast("Any", model).num_classes == cfg["num_classes"] and not features_only
    problem = misfit(state_dict, model, with_classifier=same_classes)
    if problem:
        raise WeightsError(
            f"{cfg.get('file') or 'the checkpoint'} does not fit {words}: {problem}. What to do: make the network "
            "again, and save it with the arguments that it was created with"
        )


def which_fits(state_dict: StateDict, other_than: str) -> str:
    """Finds what a checkpoint fits that does not fit a network: the network without others' tensors, or other networks.

    Args:
        state_dict: The tensors under the authors' or our keys.
        other_than: The network that it does not fit.

    Returns:
        A clause for an error.
    """
    if parts := _parts_that_fit(state_dict, other_than):
        others = [key for key in state_dict if not key.startswith(tuple(parts))]
        without = f", without the others, such as {others[0]}" if others else ""
        if len(parts) == 1:
            return f"those under {parts[0]} fit; save these in a file of their own{without}"
        return f"{' and '.join(parts)} each hold tensors that fit; save those of one of them in a file of their own"
    numbers = sum(tensor.numel() for tensor in state_dict.values())
    similar = [
        name
        for name in own_networks()
        if name != other_than and 1 / 3 < numbers / entries_for_import()[name].params < 3
    ]
    fitting = [name for name in similar if _fits(state_dict, name)]  # comparing with all networks would take long
    return f"it fits {' and '.join(fitting)}" if fitting else "it fits no other network of the zoo"


def _parts_that_fit(state_dict: StateDict, network: str) -> list[str]:
    """The prefixes of a checkpoint's tensors, such as `model.`, of which one's tensors alone fit a network."""
    parts: dict[str, StateDict] = {}
    for key, tensor in state_dict.items():
        prefix, _, name = key.partition(".")
        parts.setdefault(f"{prefix}.", {})[name] = tensor
    if len(parts) == 1:
        return []
    fewest = len(list(timm.create_model(network, device="meta").parameters())) // 2
    return [prefix for prefix, part in parts.items() if len(part) >= fewest and _fits(part, network)]


def own_networks() -> list[str]:
    """The names of this zoo's networks in timm's registry."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("spd_zoo.models.")]


def _fits(state_dict: StateDict, name: str) -> bool:
    meta = timm.create_model(name, device="meta")
    if len(state_dict) > 3 * len(meta.state_dict()):  # renaming 10,000 keys would take long
        return False
    return misfit(fit_image_channels(own_tensors(state_dict, meta, filter_of(meta)), meta), meta) is None
