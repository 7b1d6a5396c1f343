"""Traces networks by running them on the "meta" device, where operators only compute shapes."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spd_zoo.errors import first_line

__all__ = ["OperatorMode", "TraceError", "copy_network", "image_size", "meta_copy", "run_on_meta"]


class TraceError(ValueError):
    """A network that cannot run on the "meta" device."""


class OperatorMode(TorchDispatchMode):
    """Calls a function after every operator that runs inside this context.

    Args:
        on_operator: Gets torch's name of the operator, its positional and keyword arguments, and its result.
    """

    def __init__(self, on_operator: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        TorchDispatchMode.__init__(self)  # mypy refuses super().__init__(), which is untyped
        self.on_operator = on_operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.on_operator(func.overloadpacket.__name__, args, kwargs or {}, result)
        return result


def image_size(net: Any, example_input: Tensor | None) -> tuple[int, int, int]:
    """Channels, height and width of the images that a network takes.

    Args:
        net: The network.
        example_input: Images, (N, C, H, W), whose size is returned; None: the size in timm's `pretrained_cfg`.

    Returns:
        Channels, height and width in pixels.

    Raises:
        ValueError: If the size is unknown, or `example_input` is not a batch of images.
    """
    if example_input is not None:
        if example_input.ndim != 4:
            raise ValueError(
                f"example_input must be a batch of images (N, C, H, W), got shape {list(example_input.shape)}"
            )
        if 0 in example_input.shape:
            raise ValueError(
                f"example_input holds no images, its shape is {list(example_input.shape)}; give at least one"
            )
        channels, height, width = example_input.shape[1:]
        return channels, height, width
    if not isinstance(net, nn.Module):
        raise ValueError(f"give a network, such as timm.create_model returns, got {type(net).__name__}")
    if not getattr(net, "pretrained_cfg", None):
        raise ValueError(
            "the size of the images is unknown, because the network has no pretrained_cfg like timm's networks; "
            "give example_input=, for example torch.randn(2, 3, 224, 224)"
        )
    return cast("tuple[int, int, int]", tuple(get_model_input_config(net)["input_size"]))


def copy_network(net: nn.Module) -> nn.Module:
    """A deep copy, which also works for networks with computed weights, as with `weight_norm` or `prune`.

    Args:
        net: The network.

    Returns:
        The copy.
    """
    attributes = (value for module in net.modules() for value in vars(module).values())
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}  # deepcopy refuses non-leaves
    return copy.deepcopy(net, memo)


def meta_copy(net: nn.Module) -> nn.Module:
    """A copy on the "meta" device, in fp32 and in evaluation mode.

    Args:
        net: The network.

    Returns:
        The copy.

    Raises:
        TraceError: If TorchScript compiled the network or a part of it.
    """
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"the part {name} of {type(net).__name__}" if name else "the network"
            raise TraceError(
                f"{part} was compiled by TorchScript, whose layers cannot be replaced; give the network as it was "
                "before torch.jit.script or torch.jit.trace"
            )
    meta = copy_network(net).to("meta").float().eval()
    for module in meta.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, value.to("meta"))
    return meta


def run_on_meta(meta: nn.Module, size: tuple[int, int, int]) -> Any:
    """Runs a network that is on the "meta" device for one image. Its hooks run, too.

    Args:
        meta: The network.
        size: Channels, height and width of the image in pixels.

    Returns:
        The output of the network.

    Raises:
        TraceError: If its code or a hook reads values of tensors, or fails otherwise.
    """
    try:
        with torch.no_grad():
            return meta(torch.empty(1, *size, device="meta"))
    except Exception as error:  # whatever the network's code raises
        raise TraceError(
            f'{type(meta).__name__} cannot run on the "meta" device for an image of size {list(size)}: '
            f"{first_line(error, with_type=True)}. What to do: give example_input= of "
            "a size that it accepts, remove hooks that read values, or pass a submodule whose shapes depend on no "
            "values, such as the backbone of a detector"
        ) from error
