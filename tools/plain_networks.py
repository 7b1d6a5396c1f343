"""Plain implementations of our networks, as in the papers' code, with which `benchmark.py` compares ours."""

import copy
from collections.abc import Iterable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from spd_zoo.blocks import PyConv2d
from spd_zoo.models._classifier import Classifier
from spd_zoo.spd import MaxPool2d, PhaseMix, SpaceToDepth, SPDConv2d

__all__ = ["check_agreement", "plain_twin", "with_plain_version"]


@register_notrace_module
class PlainSpaceToDepth(nn.Module):
    """`SpaceToDepth` by slices and concatenation."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4C, ceil(H / 2), ceil(W / 2))."""
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        if self.order == "rows_first":
            return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        phases = [x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]]
        return torch.stack(phases, 2).flatten(1, 2)  # stacked, to keep the channels of a group together


class PlainPyConv(PyConv2d):
    """`PyConv2d` with one convolution per level."""

    def __init__(self, levels: dict[str, nn.Module]) -> None:
        nn.ModuleDict.__init__(self, levels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the concatenated outputs of the levels."""
        return torch.cat([level(x) for level in self.values()], 1)


def plain(module: nn.Module) -> nn.Module:
    """The plain implementation of one of our layers, with the same weights; in other modules, replaces the children."""
    if isinstance(module, SpaceToDepth):
        return PlainSpaceToDepth(module.order)
    if isinstance(module, SPDConv2d | PhaseMix):
        out_chs, in_chs, kernel, _ = module.weight.shape
        conv = nn.Conv2d(in_chs * module.groups, out_chs, kernel, groups=module.groups, bias=False)
        conv.weight, conv.bias = module.weight, module.bias  # after folding there is a bias
        down = PlainSpaceToDepth("channels_first")
        if isinstance(module, PhaseMix) or kernel == 1:
            return nn.Sequential(down, conv)
        before, after = module.pad_before[0] // 2, module.pad_after[0] // 2
        return nn.Sequential(down, nn.ZeroPad2d((before, after, before, after)), conv)
    if isinstance(module, PyConv2d):
        return PlainPyConv({name: plain(level) for name, level in module.items()})
    if type(module) is MaxPool2d:
        return nn.MaxPool2d(
            module.kernel_size, module.stride, module.padding, module.dilation, ceil_mode=module.ceil_mode
        )
    for name, child in module.named_children():
        setattr(module, name, plain(child))
    return module


def plain_twin(net: nn.Module) -> nn.Module:
    """A plain implementation of a network, with the same weights."""
    return plain(copy.deepcopy(net))


def with_plain_version(names: Iterable[str]) -> list[str]:
    """The classifiers among the networks that have a layer with a plain implementation."""
    ours = (SpaceToDepth, SPDConv2d, PhaseMix, PyConv2d)
    nets = {name: timm.create_model(name, device="meta") for name in names}
    return [
        name
        for name, net in nets.items()
        if isinstance(net, Classifier) and any(isinstance(module, ours) for module in net.modules())
    ]


def check_agreement(nets: dict[str, nn.Module], image_size: int) -> None:
    """Raises an AssertionError if the outputs of networks differ."""
    x = torch.randn(2, 3, image_size, image_size)
    with torch.inference_mode():
        results = {name: _joined(net.eval()(x)) for name, net in nets.items()}
    first, *others = results
    for name in others:
        error = (results[name] - results[first]).abs().max() / results[first].std()
        if not error < 1e-3:
            raise AssertionError(f"{name} differs from {first} by {error:.2g} of the results' standard deviation")


def _joined(result: Any) -> Tensor:
    """The output of a network as one tensor; detectors return several."""
    return result if isinstance(result, Tensor) else torch.cat([tensor.flatten(1) for tensor in result], 1)
