"""Replacing layers of a network, and comparing its outputs before and after."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from spd_zoo.errors import first_line
from spd_zoo.process import ran_out_of_memory
from spd_zoo.trace import copy_network

__all__ = [
    "ConversionError",
    "Unchanged",
    "check_same",
    "expected_outputs",
    "has_hooks",
    "max_difference",
    "move_hooks",
    "outputs_of",
    "replace_modules",
    "tensors_in",
    "what_is_attached",
    "with_shared_parameters",
]

TOLERANCE = 1e-4  # largest difference of outputs in fp32, in their standard deviations

_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OWN_TENSORS = {"weight", "bias", "gain", "filt", "running_mean", "running_var", "num_batches_tracked"}


class ConversionError(RuntimeError):
    """A rewritten network whose outputs differ from the original's."""


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """A layer or operator that was left unchanged.

    Attributes:
        module: Name of the module; empty for the network itself.
        layer: The layer's class, kernel and stride, or the operator's name.
        reason: Why it was left unchanged.
    """

    module: str
    layer: str
    reason: str

    def __str__(self) -> str:
        return f"unchanged: {self.module or 'the network itself'}, {self.layer}: {self.reason}"


def replace_modules(net: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replaces modules, under all their names.

    Args:
        net: The network; changed in place.
        replacements: The replacement of each module to replace.

    Returns:
        The network, or its replacement.
    """
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if child is not None and child in replacements:
                module._modules[name] = replacements[child]
    return replacements.get(net, net)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks.

    Args:
        module: The module.

    Returns:
        True if it has at least one.
    """
    return any(getattr(module, hooks) for hooks in _CALL_HOOKS if hooks != "_is_full_backward_hook")


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Swaps the forward and backward hooks of two modules. The handles of the hooks still remove them.

    Args:
        old: The module with the hooks.
        new: The module that gets them.
    """
    for name in _CALL_HOOKS:
        new.__dict__[name], old.__dict__[name] = getattr(old, name), getattr(new, name)


def what_is_attached(module: nn.Module) -> str | None:
    """What a replacement of a layer would lose, apart from forward and backward hooks.

    Args:
        module: A layer of a known class.

    Returns:
        A reason why the layer cannot be replaced, or None.
    """
    if is_parametrized(module):
        return "it has a parametrization; make it permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
    tensors = module._parameters.keys() | module._buffers.keys()
    if extra := sorted(tensors - _OWN_TENSORS):
        return (
            f"it has {', '.join(extra)} (as weight_norm, spectral_norm or prune leave them); make the weight permanent "
            "first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
        )
    if "forward" in vars(module):
        return "its forward was replaced"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "it has hooks on its state dict"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"its {name} has hooks"
    return None


def with_shared_parameters(net: nn.Module) -> set[nn.Module]:
    """The modules that share a parameter with another module.

    Args:
        net: The network.

    Returns:
        The modules.
    """
    owned = [(module, _place(p)) for module in net.modules() for p in module._parameters.values() if p is not None]
    counts = Counter(place for _, place in owned)
    return {module for module, place in owned if counts[place] > 1}


def _place(tensor: Tensor) -> tuple[int, int]:
    """The start of a tensor in memory, as a key; also on the "meta" device."""
    return tensor.untyped_storage()._cdata, cast("int", tensor.storage_offset())


# Comparing outputs


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a network's output: in lists, dictionaries, dataclasses and other objects.

    Args:
        value: The output.

    Returns:
        The tensors in their order.
    """
    return list(_tensors_in(value, set()))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, nn.Module | type | FunctionType | ModuleType):
        return
    seen.add(id(value))
    items: list[Any] = []
    if isinstance(value, Mapping):
        items += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items += value
    elif dataclasses.is_dataclass(value):
        items += [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif hasattr(value, "__dict__"):
        items += vars(value).values()
    for item in items:
        yield from _tensors_in(item, seen)


@torch.no_grad()
def outputs_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    """All tensors that a network returns in evaluation mode, computed in fp32 or fp64; its modes are restored.

    Args:
        net: The network.
        images: Preprocessed images, (N, C, H, W).

    Returns:
        Copies of the tensors.

    Raises:
        ValueError: If there are none.
    """
    if _rounding(net) > torch.finfo(torch.float32).eps:
        net, images = copy_network(net).float(), images.float()
    training = [module for module in net.modules() if module.training]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for networks that draw random numbers in evaluation
            outputs = [tensor.clone() for tensor in tensors_in(net.eval()(images))]
    finally:
        for module in training:
            module.training = True
    if not outputs:
        raise ValueError(f"{type(net).__name__} returns no tensors for example_input, so nothing can be compared")
    return outputs


def expected_outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """`outputs_of` a network before it is rewritten; NaN, which cannot be compared, is an error.

    Args:
        net: The network.
        images: Preprocessed images, (N, C, H, W).

    Returns:
        Copies of the tensors.

    Raises:
        ValueError: If the network cannot compute the images, there are no outputs, or one has NaN.
    """
    try:
        outputs = outputs_of(net, images)
    except RuntimeError as error:  # torch's, for other channels, another type or another device than the weights'
        if ran_out_of_memory(error):
            raise
        given = f"{images.dtype} {list(images.shape)} on {images.device}"
        raise ValueError(
            f"{type(net).__name__} cannot compute example_input, {given}: {first_line(error)}. Give preprocessed "
            "images as the network takes them"
        ) from error
    if any(tensor.isnan().any() for tensor in outputs):
        raise ValueError("the network returns NaN for example_input, so nothing can be compared; give other images")
    return outputs


def max_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference between outputs, in standard deviations of the expected ones.

    The divisor is at least a hundredth of the largest value, because nearly constant outputs differ by fp32 rounding.

    Args:
        actual: The tensors.
        expected: The tensors to compare with.

    Returns:
        The difference; infinite if shapes, types, NaN or infinities differ.
    """
    if len(actual) != len(expected):
        return float("inf")
    return max(map(_difference, actual, expected), default=0.0)


@torch.no_grad()
def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    limit = torch.finfo(expected.dtype).max
    actual, expected = actual.cpu(), expected.cpu()  # MPS has no float64
    a, b = (torch.nan_to_num(x, nan=float("nan"), posinf=limit, neginf=-limit).double() for x in (actual, expected))
    special = ~(a.abs() < limit) | ~(b.abs() < limit)  # NaN, infinities, and the lowest number, used instead of -inf
    if not torch.equal(a[special].nan_to_num(0.5), b[special].nan_to_num(0.5)):
        return float("inf")
    a, b = a[~special], b[~special]
    if not len(a):
        return 0.0
    difference = float((a - b).abs().max())
    scale = max(float(b.std(correction=0)), float(b.abs().max()) / 100)
    return difference and (difference / scale if scale else float("inf"))


def check_same(net: nn.Module, images: Tensor, expected: list[Tensor], advice: str) -> float:
    """Compares the outputs of a rewritten network with those of the original.

    Args:
        net: The rewritten network.
        images: The images, (N, C, H, W).
        expected: `outputs_of` the original for them.
        advice: What to do if the outputs differ.

    Returns:
        The largest difference, in standard deviations.

    Raises:
        ConversionError: If it is above 1e-4 or, with half-precision parameters, above 16 rounding steps of their type.
    """
    difference = max_difference(outputs_of(net, images), expected)
    rounding = _rounding(net)
    limit = TOLERANCE if rounding <= torch.finfo(torch.float32).eps else 16 * rounding
    if not difference <= limit:
        raise ConversionError(
            f"the rewritten network differs by {difference:.1e} of the outputs' standard deviation; {advice}"
        )
    return difference


def _rounding(net: nn.Module) -> float:
    """The largest rounding step (eps) among the data types of a network's parameters."""
    types = {parameter.dtype for parameter in net.parameters() if parameter.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)
