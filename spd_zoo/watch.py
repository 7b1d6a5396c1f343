"""Watching what a network runs: the size of its images, and every operator."""

from collections.abc import Callable
from typing import Any, cast

from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Watch", "image_size"]


def image_size(net: nn.Module, example_input: Tensor | None) -> tuple[int, int, int]:
    """Channels, height and width of the images that a network takes: those of an example, else timm's.

    Raises:
        ValueError: If the size is unknown, or `example_input` is no batch of images.
    """
    if example_input is not None:
        if example_input.ndim != 4:
            raise ValueError(f"example_input is a batch of images (N, C, H, W), got shape {list(example_input.shape)}")
        channels, height, width = example_input.shape[1:]
        return channels, height, width
    if not getattr(net, "pretrained_cfg", None):
        raise ValueError(
            "the size of the images is unknown, because the network has no pretrained_cfg as timm's have; "
            "give example_input=, for example torch.randn(2, 3, 224, 224)"
        )
    return cast("tuple[int, int, int]", tuple(get_model_input_config(net)["input_size"]))


class Watch(TorchDispatchMode):
    """Calls a function with the name, arguments and output of every operator that runs inside of it."""

    def __init__(self, ran: Callable[[str, tuple[Any, ...], Tensor], None]) -> None:
        TorchDispatchMode.__init__(self)  # untyped: as super().__init__() mypy refuses it
        self.ran = ran

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(output, Tensor):
            self.ran(func.overloadpacket.__name__, args, output)
        return result
