"""Layers that two families use, or that are worth using alone: space-to-depth and pyramidal convolution."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

__all__ = ["PhaseMix", "PyConv2d", "SPDConv2d", "SpaceToDepth", "phase_weight", "space_to_depth", "spd_weight"]


def space_to_depth(x: Tensor, order: str = "channels_first") -> Tensor:
    """Moves each 2x2 cell of pixels into channels: (N, C, H, W) -> (N, 4C, ceil(H / 2), ceil(W / 2)).

    An odd height or width first gets one row or column of zeros at the bottom or right.

    Args:
        x: The maps, (N, C, H, W).
        order: Where pixel (dy, dx) of channel c goes. "channels_first": channel 4c + 2dy + dx, as
            `torch.nn.functional.pixel_unshuffle`, which keeps the channels of a convolution group together.
            "rows_first": channel (2dx + dy) * C + c, the order of the SPD-Conv paper's code
            (arXiv 2208.03641, section 3.1).

    Raises:
        ValueError: If `order` is neither.
    """
    x = _pad_to_even(x)
    if order == "channels_first":
        return F.pixel_unshuffle(x, 2)
    if order != "rows_first":
        raise ValueError(f"order is channels_first or rows_first, got {order}")
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


@register_notrace_module
class SpaceToDepth(nn.Module):
    """`space_to_depth` as a module."""

    def __init__(self, order: str = "channels_first") -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4C, ceil(H / 2), ceil(W / 2))."""
        return space_to_depth(x, self.order)


def _pad_to_even(x: Tensor) -> Tensor:
    """`x` with a row or column of zeros at the bottom or right where its height or width is odd."""
    height, width = x.shape[-2], x.shape[-1]
    if _is_exporting() or height % 2 or width % 2:
        return F.pad(x, [0, width % 2, 0, height % 2])
    return x


def _is_exporting() -> bool:
    """Whether `torch.export` reads the code: then no branch may depend on the image size, which may be dynamic."""
    exporting = False
    if not torch.jit.is_scripting():
        exporting = torch.compiler.is_exporting()
    return exporting


def spd_weight(weight: Tensor, padding: int) -> Tensor:
    """The kernel that gives, behind `space_to_depth`, what `weight` gives as a convolution of stride 2.

    Tap o of the old kernel, counted from the output's pixel (-padding .. k - 1 - padding), becomes tap floor(o / 2) of
    phase o mod 2 of the new one; taps that the old kernel has not are zero. The new convolution has stride 1, the same
    groups, and ceil(padding / 2) cells of zeros before, floor((k - 1 - padding) / 2) behind.

    Args:
        weight: The old kernel, (out_chs, in_chs / groups, k, k).
        padding: Zero padding of the old convolution.

    Returns:
        The new kernel, (out_chs, 4 * in_chs / groups, K, K).
    """
    kernel = weight.shape[-1]
    before, after = padding % 2, (kernel - padding) % 2
    return F.pixel_unshuffle(F.pad(weight, [before, after, before, after]), 2)


def phase_weight(weight: Tensor, stride: int) -> Tensor:
    """The kernel that computes 2x2 output pixels at once, as channels: a convolution of twice the stride.

    With it, `F.pixel_shuffle(convolution, 2)` is the convolution with `weight` and `stride`. The kernel stands in it
    four times, once for each output pixel, shifted by `stride`.

    Args:
        weight: The old kernel, (out_chs, in_chs / groups, k, k).
        stride: Stride of the old convolution.

    Returns:
        The new kernel, (4 * out_chs, in_chs / groups, k + stride, k + stride).
    """
    rows = torch.stack([F.pad(weight, [0, 0, 0, stride]), F.pad(weight, [0, 0, stride, 0])], 1)
    return torch.stack([F.pad(rows, [0, stride]), F.pad(rows, [stride, 0])], 2).flatten(0, 2)


@register_notrace_module
class SPDConv2d(nn.Conv2d):
    """Space-to-depth and a convolution of stride 1: reads every pixel that a convolution of stride 2 reads, and more.

    Stands for a convolution of odd `kernel_size` k, stride 2 and padding k // 2, whose weights `from_strided` turns
    into this layer's: the same function then, and the taps that the old kernel lacks are zero and can learn.

    It is computed as what it equals, one convolution of twice the kernel and stride 2 on the map itself, which saves
    the copy and is faster (README, "Speed").
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        groups: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"SPDConv2d stands for a strided convolution of odd kernel size, got {kernel_size}")
        half = kernel_size // 2
        before, after = (half + 1) // 2, half // 2
        cells = before + 1 + after
        super().__init__(4 * in_chs, out_chs, cells, groups=groups, bias=bias, device=device, dtype=dtype)
        self.strided_kernel_size = kernel_size  # of the convolution that this one stands for
        self.pad_before, self.pad_after = 2 * before, 2 * after  # in pixels

    def new_strided_weight(self) -> Tensor:
        """An uninitialised kernel of the convolution that this one stands for, (out_chs, in_chs / groups, k, k)."""
        kernel = self.strided_kernel_size
        return self.weight.new_empty(self.out_channels, self.in_channels // 4 // self.groups, kernel, kernel)

    def is_strided_weight(self, weight: Tensor | None) -> bool:
        """Whether a kernel has the size of the convolution that this one stands for (it is never this one's own)."""
        return weight is not None and weight.ndim == 4 and weight.shape[-1] == self.strided_kernel_size

    def from_strided(self, weight: Tensor) -> Tensor:
        """A kernel of the convolution that this one stands for as one of this."""
        return spd_weight(weight, padding=self.strided_kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / 2), ceil(W / 2))."""
        before, after = self.pad_before, self.pad_after
        bottom, right = after + x.shape[-2] % 2, after + x.shape[-1] % 2
        weight = F.pixel_shuffle(self.weight, 2)
        if _is_exporting() or not (before == bottom and before == right):
            return F.conv2d(F.pad(x, [before, right, before, bottom]), weight, self.bias, 2, groups=self.groups)
        return F.conv2d(x, weight, self.bias, 2, before, groups=self.groups)


@register_notrace_module
class PhaseMix(nn.Conv2d):
    """Space-to-depth and, for each channel alone, a learnt mix of its four phases; starts as the phase (0, 0).

    Computed as the depthwise 2x2 convolution of stride 2 that it equals.
    """

    def __init__(self, chs: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(4 * chs, chs, 1, groups=chs, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Takes the phase (0, 0) of every channel, as a stride of 2 does."""
        self.weight.copy_(self.initial_weight())

    def initial_weight(self) -> Tensor:
        """The weights (1, 0, 0, 0) for every channel, (chs, 4, 1, 1)."""
        return torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1).repeat(self.out_channels, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, ceil(H / 2), ceil(W / 2))."""
        x = _pad_to_even(x)
        weight = F.pixel_shuffle(self.weight, 2)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled():
            # oneDNN's bf16 gradient of a depthwise convolution takes twenty times as long as its fp32 one.
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x.float(), weight.float(), None, 2, groups=self.groups).to(x.dtype)
        return F.conv2d(x, weight, None, 2, groups=self.groups)


@register_notrace_module
class PyConv2d(nn.ModuleDict):
    """Pyramidal convolution: kernels of several sizes side by side over the same input (arXiv 2006.11538, section 3).

    Levels whose groups have few output channels are computed four output pixels at a time (`phase_weight`), which
    changes no number and is faster on a CPU (README, "Speed").

    Args:
        in_chs: Input channels; every level reads all of them.
        out_chs: Output channels of each level.
        kernel_sizes: Kernel size of each level, odd, ascending.
        groups: Groups of each level.
        stride: 1 or 2.
        dilation: Dilation of every level.
        spd: At stride 2, space-to-depth and convolutions of stride 1 (`SPDConv2d`) instead of a stride.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: Sequence[int],
        kernel_sizes: Sequence[int],
        groups: Sequence[int],
        stride: int = 1,
        dilation: int = 1,
        spd: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for i, (out, kernel, group) in enumerate(zip(out_chs, kernel_sizes, groups, strict=True)):
            level: nn.Conv2d
            if spd and stride == 2:
                level = SPDConv2d(in_chs, out, kernel, groups=group, device=device, dtype=dtype)
            else:
                level = nn.Conv2d(
                    in_chs,
                    out,
                    kernel,
                    stride,
                    padding=dilation * (kernel // 2),
                    dilation=dilation,
                    groups=group,
                    bias=False,
                    device=device,
                    dtype=dtype,
                )
            self[f"conv2_{i + 1}"] = level

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, sum(out_chs), ceil(H / stride), ceil(W / stride))."""
        outputs = []
        if torch.jit.is_scripting():
            for level in self.values():
                outputs.append(level(x))
        else:
            for level in self.values():
                narrow = x.device.type == "cpu" and is_narrow(level) and not _is_exporting()
                outputs.append(four_at_a_time(level, x) if narrow else level(x))
        return torch.cat(outputs, 1)


def is_narrow(level: nn.Module) -> bool:
    """Whether a level's groups fill too little of a vector: at most 4 output channels each."""
    return isinstance(level, nn.Conv2d) and level.out_channels // level.groups <= 4 and level.dilation == (1, 1)


def four_at_a_time(level: Any, x: Tensor) -> Tensor:
    """What `level`, SPD or not, gives for `x`, computed as channels of 2x2 pixels (`phase_weight`)."""
    if isinstance(level, SPDConv2d):
        weight, stride, before = F.pixel_shuffle(level.weight, 2), 2, level.pad_before
    else:
        weight, stride, before = level.weight, level.stride[0], level.kernel_size[0] // 2
    height, width = -(-x.shape[-2] // stride), -(-x.shape[-1] // stride)
    weight = phase_weight(weight, stride)
    bias = None if level.bias is None else level.bias.repeat_interleave(4)
    kernel, step = weight.shape[-1], 2 * stride
    behind = [  # padding that the last window needs, whose 2x2 cell may reach over an odd output
        step * ((out + 1) // 2 - 1) + kernel - before - size
        for out, size in ((width, x.shape[-1]), (height, x.shape[-2]))
    ]
    if all(before - step < need <= before for need in behind):  # then the convolution's own padding does
        phases = F.conv2d(x, weight, bias, step, before, groups=level.groups)
    else:
        phases = F.conv2d(F.pad(x, [before, behind[0], before, behind[1]]), weight, bias, step, groups=level.groups)
    return F.pixel_shuffle(phases, 2)[:, :, :height, :width]
