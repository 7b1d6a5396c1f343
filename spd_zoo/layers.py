"""Layers that two families use, or that are worth using alone."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, to_2tuple
from timm.models import adapt_input_conv, register_notrace_module
from timm.models.efficientformer_v2 import Attention2dDownsample, Downsample
from torch import Tensor, nn

__all__ = [
    "SPPF",
    "AttentionDownsample",
    "BSConvS2d",
    "BSConvU2d",
    "HybridStem",
    "ImageSizeError",
    "NormActConv",
    "PaddingFreeDownsample",
    "PhaseMix",
    "PositionAwareCircularConv2d",
    "PyConv2d",
    "SPDAvgPool2d",
    "SPDConv2d",
    "SPDMaxPool2d",
    "SPDStdConv2d",
    "SpaceToDepth",
    "YoloBottleneck",
    "adapt_image_channels",
    "conv_norm_act",
    "is_exporting",
    "orthonormality",
    "phase_weight",
    "resample_to_fit",
    "same_padding",
    "space_to_depth",
    "spd_weight",
    "yolo_conv",
]


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
    x = _pad_to_cells(x, 2)
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


def _pad_to_cells(x: Tensor, size: int) -> Tensor:
    """`x` with rows and columns of zeros at the bottom and right, so that `size` divides its height and width."""
    right, bottom = (size - x.shape[-1] % size) % size, (size - x.shape[-2] % size) % size
    if is_exporting() or bottom or right:
        return F.pad(x, [0, right, 0, bottom])
    return x


def is_exporting() -> bool:
    """Whether `torch.export` reads the code: then no branch may depend on the image size, which may be dynamic."""
    exporting = False
    if not torch.jit.is_scripting():
        exporting = torch.compiler.is_exporting()
    return exporting


def spd_weight(weight: Tensor, padding: int | tuple[int, int], stride: int = 2) -> Tensor:
    """The kernel that gives, behind space-to-depth, what `weight` gives as a convolution with a stride.

    Tap o of the old kernel, counted from the output's pixel (-padding .. k - 1 - padding), becomes tap
    floor(o / stride) of phase o mod stride of the new one; taps that the old kernel has not are zero. The new
    convolution has stride 1, the same groups, and ceil(padding / stride) cells of zeros before,
    floor((k - 1 - padding) / stride) behind.

    Args:
        weight: The old kernel, (out_chs, in_chs / groups, kh, kw).
        padding: Zero padding of the old convolution.
        stride: Of the old convolution, and the side of a cell.

    Returns:
        The new kernel, (out_chs, stride**2 * in_chs / groups, KH, KW).
    """
    pads: list[int] = []
    for kernel, before in zip(weight.shape[:1:-1], reversed(to_2tuple(padding)), strict=True):
        lead = -before % stride
        pads += [lead, -(lead + kernel) % stride]
    return F.pixel_unshuffle(F.pad(weight, pads), stride)


def adapt_image_channels(weight: Tensor, in_chans: int, stride: int = 2, order: str = "channels_first") -> Tensor:
    """The kernel of a convolution behind space-to-depth of the image, for other image channels.

    As timm adapts kernels, but phase by phase. A kernel that does not read `stride**2` phases stays, and fails its
    check.

    Args:
        weight: The old kernel, (out_chs, stride**2 * image channels, KH, KW).
        in_chans: The new image channels.
        stride: The side of a cell.
        order: As in `space_to_depth`.
    """
    phases = stride**2
    if weight.ndim != 4 or weight.shape[1] % phases or weight.shape[1] == phases * in_chans:
        return weight
    sizes, axis = ((-1, phases), 2) if order == "channels_first" else ((phases, -1), 1)
    old = weight.unflatten(1, sizes).unbind(axis)
    return torch.stack([adapt_input_conv(in_chans, phase, phase.shape[1]) for phase in old], axis).flatten(1, 2)


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
    """Space-to-depth and a convolution of stride 1: reads every pixel that a strided convolution reads, and more.

    Stands for a convolution with a stride, whose size its attributes (`kernel_size`, `stride`, `in_channels` ...) say,
    and whose weights `from_strided` turns into this layer's: the same function then, at every image size, and the taps
    that the old kernel lacks are zero and can learn. A fresh one is a fresh strided convolution so turned.

    It is computed as what it equals, one convolution of a larger kernel (for stride 2 twice as large) with that stride
    on the map itself, which saves the copy and is faster (docs/speed.md).

    Args:
        in_chs: Input channels, in front of space-to-depth.
        out_chs: Output channels.
        kernel_size: Of the convolution that this one stands for.
        groups: Of both.
        bias: Of both.
        stride: Of the convolution that this one stands for, and the side of a cell.
        padding: Of the convolution that this one stands for; "same" is TensorFlow's, as in timm's `Conv2dSame`.
            Unless given, half an odd kernel.
        dilation: Of the convolution that this one stands for.
        padding_mode: Of the convolution that this one stands for.

    Raises:
        ValueError: If the padding of an even kernel is not given.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int | tuple[int, int],
        groups: int = 1,
        bias: bool = False,
        stride: int = 2,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel, steps = to_2tuple(kernel_size), to_2tuple(dilation)
        rows, columns = (step * (size - 1) + 1 for step, size in zip(steps, kernel, strict=True))
        if padding is None:
            if rows % 2 == 0 or columns % 2 == 0:
                raise ValueError(
                    f"without padding, SPDConv2d stands for a convolution of odd kernel size, got {kernel_size}"
                )
            padding = (rows // 2, columns // 2)
        pads: tuple[int, int] = (0, 0) if padding == "same" else to_2tuple(padding)
        mode: Any = padding_mode
        super().__init__(
            in_chs, out_chs, kernel_size, stride, pads, dilation, groups, bias, mode, device=device, dtype=dtype
        )
        self.cell = stride
        self.reach = (rows, columns)  # pixels from the first to the last tap of the strided kernel
        self.same = padding == "same"
        # Zeros around the map with which the last window lies inside at every size: before the first tap as many as the
        # strided convolution has, up to whole cells; other borders are added first, and so does a cell begin there.
        top, left = pads if padding_mode == "zeros" else (0, 0)
        self.own_padding = (top, left)
        self.pad_before = (-(-top // stride) * stride, -(-left // stride) * stride)
        self.pad_after = (top + -(rows - top) % stride, left + -(columns - left) % stride)
        self.weight = nn.Parameter(self.from_strided(self.weight.detach()))

    def new_strided_weight(self) -> Tensor:
        """An uninitialised kernel of the convolution that this one stands for, (out_chs, in_chs / groups, kh, kw)."""
        return self.weight.new_empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def is_strided_weight(self, weight: Tensor | None) -> bool:
        """Whether a kernel has the size of the convolution that this one stands for (and not this one's own)."""
        return (
            weight is not None
            and weight.ndim == 4
            and tuple(weight.shape[2:]) == self.kernel_size
            and weight.shape != self.weight.shape
        )

    def from_strided(self, weight: Tensor) -> Tensor:
        """A kernel of the convolution that this one stands for as one of this."""
        if self.reach != self.kernel_size:
            down, right = self.dilation
            spread = weight.new_zeros(*weight.shape[:2], *self.reach)
            spread[..., ::down, ::right] = weight
            weight = spread
        return spd_weight(weight, self.own_padding, self.cell)

    def spd_kernel(self) -> Tensor:
        """The kernel behind space-to-depth, (out_chs, stride**2 * in_chs / groups, KH, KW)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W'), what the strided convolution gives: for stride 2 mostly half."""
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        weight = F.pixel_shuffle(self.spd_kernel(), self.cell)
        (top, left), (bottom, right) = self.pad_before, self.pad_after
        if self.same:
            rows = same_padding(x.shape[-2], self.reach[0], self.cell)
            columns = same_padding(x.shape[-1], self.reach[1], self.cell)
            top, left, bottom, right = (
                rows // 2,
                columns // 2,
                bottom + rows - rows // 2,
                right + columns - columns // 2,
            )
        if not is_exporting():
            # where equally many zeros on both sides do, the convolution adds them without a copy
            bottom -= (x.shape[-2] + top + bottom - weight.shape[-2]) % self.cell
            right -= (x.shape[-1] + left + right - weight.shape[-1]) % self.cell
            if bottom <= top < bottom + self.cell and right <= left < right + self.cell:
                return F.conv2d(x, weight, self.bias, self.cell, (top, left), groups=self.groups)
        x = F.pad(x, [left, right, top, bottom])
        return F.conv2d(x, weight, self.bias, self.cell, groups=self.groups)


def same_padding(size: int, reach: int, stride: int) -> int:
    """Zeros on both sides of an axis of `size` pixels together, as TensorFlow's "same" has it."""
    padding = (stride - size % stride) % stride + reach - stride
    return padding if reach >= stride else max(padding, 0)


@register_notrace_module
class SPDStdConv2d(SPDConv2d):
    """`SPDConv2d` for timm's weight-standardised convolutions, `StdConv2d` and with `gain` `ScaledStdConv2d`.

    The kernel is standardised whenever it is used, over the new taps, too. A factor makes up for these, so that with
    the weights of `from_strided` the function is the strided convolution's.

    Args:
        eps: Of the strided convolution.
        scale: Factor of the standardised kernel; None: there is neither that nor a learnt `gain` per output channel.
        conv: For `SPDConv2d`.
    """

    def __init__(self, *args: Any, eps: float = 1e-6, scale: float | None = None, **conv: Any) -> None:
        super().__init__(*args, **conv)
        share = self.new_strided_weight()[0].numel() / self.weight[0].numel()
        self.eps = eps * share
        self.scale = (1.0 if scale is None else scale) * share**0.5
        gain = None if scale is None else nn.Parameter(self.weight.new_ones(self.out_channels, 1, 1, 1))
        self.gain: nn.Parameter | None
        self.register_parameter("gain", gain)

    def from_strided(self, weight: Tensor) -> Tensor:
        """A kernel of the convolution that this one stands for as one of this: centred, so that new zeros are means."""
        return super().from_strided(weight - weight.mean((1, 2, 3), keepdim=True))

    def spd_kernel(self) -> Tensor:
        """The standardised kernel."""
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (torch.rsqrt(var + self.eps) * self.scale)
        return weight if self.gain is None else weight * self.gain


@register_notrace_module
class SPDAvgPool2d(SPDConv2d):
    """Average pooling without throwing pixels away by position: a learnt mix of all of them, for each channel alone.

    Starts as the strided average pooling that it stands for. For 2x2 it is a phase mix that starts as 1/4.

    Args:
        chs: Channels.
        kernel_size: Of the pooling.
        stride: Of the pooling.
        padding: Of the pooling; "same" is TensorFlow's.
        ceil_mode: As in `nn.AvgPool2d`.
        count_include_pad: As in `nn.AvgPool2d`.
    """

    def __init__(
        self,
        chs: int,
        kernel_size: int | tuple[int, int],
        stride: int = 2,
        padding: int | tuple[int, int] | str = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(chs, chs, kernel_size, groups=chs, stride=stride, padding=padding, device=device, dtype=dtype)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        with torch.no_grad():
            self.weight.copy_(self.initial_weight())

    def initial_weight(self) -> Tensor:
        """The mean of every window, (chs, stride**2, KH, KW)."""
        return self.from_strided(torch.full_like(self.new_strided_weight(), 1 / math.prod(self.kernel_size)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, H', W'), what the strided pooling gives."""
        height, width = x.shape[-2], x.shape[-1]
        if self.same:
            return super().forward(x)
        sizes = [
            _windows(size, reach, self.cell, pad, self.ceil_mode)
            for size, reach, pad in zip((height, width), self.reach, self.own_padding, strict=True)
        ]
        if self.ceil_mode:
            missing = [
                _missing(size, out, reach, self.cell, pad)
                for size, out, reach, pad in zip((height, width), sizes, self.reach, self.own_padding, strict=True)
            ]
            x = F.pad(x, [0, missing[1], 0, missing[0]])
        y = super().forward(x)
        if self.ceil_mode or not (self.count_include_pad or self.own_padding == (0, 0)):
            # torch divides by the pixels that a window at the border has
            y = y * self._shares(height, sizes[0], 0, y)[:, None] * self._shares(width, sizes[1], 1, y)
        return y

    def _shares(self, size: int, out: int, axis: int, like: Tensor) -> Tensor:
        """Of each window along an axis, its length over the pixels that count in it, (out,)."""
        kernel, pad = self.kernel_size[axis], self.own_padding[axis]
        first, last = (-pad, size + pad) if self.count_include_pad else (0, size)
        start = torch.arange(out, device=like.device) * self.cell - pad
        return kernel / ((start + kernel).clamp(max=last) - start.clamp(min=first)).to(like.dtype)


def _windows(size: int, reach: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows a pooling has along an axis; with `ceil_mode` also one that begins inside and ends beyond."""
    if not ceil_mode:
        return (size + 2 * padding - reach) // stride + 1
    windows = -(-(size + 2 * padding - reach) // stride) + 1
    return cast("int", torch.sym_min(windows, -(-(size + padding) // stride)))


def _missing(size: int, windows: int, reach: int, stride: int, padding: int) -> int:
    """Pixels that the last of so many windows reaches beyond the padded axis."""
    return cast("int", torch.sym_max(stride * (windows - 1) + reach - size - 2 * padding, 0))


@register_notrace_module
class PhaseMix(nn.Conv2d):
    """Space-to-depth and, for each channel alone, a learnt mix of its phases; starts as the phase (0, 0).

    Computed as the depthwise convolution of as large a kernel and stride that it equals.

    Args:
        chs: Channels.
        stride: Side of a cell; 2 gives four phases.
    """

    def __init__(
        self, chs: int, stride: int = 2, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(stride**2 * chs, chs, 1, groups=chs, bias=False, device=device, dtype=dtype)
        self.cell = stride

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Takes the phase (0, 0) of every channel, as a stride does."""
        self.weight.copy_(self.initial_weight())

    def initial_weight(self) -> Tensor:
        """The weights (1, 0, 0, ...) for every channel, (chs, stride**2, 1, 1)."""
        weight = torch.zeros_like(self.weight)
        weight[:, 0] = 1
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, ceil(H / stride), ceil(W / stride))."""
        x = _pad_to_cells(x, self.cell)
        weight = F.pixel_shuffle(self.weight, self.cell)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled():
            # oneDNN's bf16 gradient of a depthwise convolution takes twenty times as long as its fp32 one.
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x.float(), weight.float(), None, self.cell, groups=self.groups).to(x.dtype)
        return F.conv2d(x, weight, None, self.cell, groups=self.groups)


@register_notrace_module
class SPDMaxPool2d(nn.Module):
    """Max-pooling with stride 1 and a `PhaseMix`: starts as the strided max-pooling that it stands for.

    As in the shortcuts of the `pyconv*_spd` networks: the pool sees the map as it is, and only then comes
    space-to-depth.

    Args:
        chs: Channels.
        kernel_size: Of the pooling.
        stride: Of the pooling.
        padding: Of the pooling; "same" is TensorFlow's.
        dilation: Of the pooling.
        ceil_mode: As in `nn.MaxPool2d`.
    """

    def __init__(
        self,
        chs: int,
        kernel_size: int | tuple[int, int],
        stride: int = 2,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        ceil_mode: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size: tuple[int, int] = to_2tuple(kernel_size)
        self.stride = stride
        self.same = padding == "same"
        self.padding: tuple[int, int] = (0, 0) if self.same else to_2tuple(padding)
        self.dilation: tuple[int, int] = to_2tuple(dilation)
        self.ceil_mode = ceil_mode
        self.mix = PhaseMix(chs, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, H', W'), what the strided pooling gives."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return self.mix(x)
        if self.dilation == (1, 1) and not self.same and not self.ceil_mode:
            return self.mix(F.max_pool2d(x, self.kernel_size, 1, self.padding))
        pads: list[int] = []
        for axis in (1, 0):
            size, stride, before = x.shape[2 + axis], self.stride, self.padding[axis]
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            after = before
            if self.same:
                both = same_padding(size, reach, stride)
                before, after = both // 2, both - both // 2
            elif self.ceil_mode:
                after += _missing(size, _windows(size, reach, stride, before, True), reach, stride, before)
            pads += [before, after]
        lowest = torch.finfo(x.dtype).min  # not -inf, which a weight of zero would make NaN
        return self.mix(F.max_pool2d(F.pad(x, pads, value=lowest), self.kernel_size, 1, 0, self.dilation))


@register_notrace_module
class PyConv2d(nn.ModuleDict):
    """Pyramidal convolution: kernels of several sizes side by side over the same input (arXiv 2006.11538, section 3).

    Levels whose groups have few output channels are computed four output pixels at a time (`phase_weight`), which
    changes no number and is faster on a CPU (docs/speed.md).

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
                narrow = x.device.type == "cpu" and is_narrow(level) and not is_exporting()
                outputs.append(four_at_a_time(level, x) if narrow else level(x))
        return torch.cat(outputs, 1)


def is_narrow(level: nn.Module) -> bool:
    """Whether a level's groups fill too little of a vector: 4 output channels each, or 8 at stride 1 in evaluation."""
    if not isinstance(level, nn.Conv2d) or level.dilation != (1, 1):
        return False
    strided = isinstance(level, SPDConv2d) or level.stride != (1, 1)
    return level.out_channels // level.groups <= (4 if strided or level.training else 8)


def four_at_a_time(level: Any, x: Tensor) -> Tensor:
    """What `level`, SPD or not, gives for `x`, computed as channels of 2x2 pixels (`phase_weight`)."""
    if isinstance(level, SPDConv2d):
        weight, stride, before = F.pixel_shuffle(level.weight, 2), 2, level.pad_before[0]
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


class ImageSizeError(ValueError):
    """An image of a size that the network does not take."""


def conv_norm_act(
    in_chs: int,
    out_chs: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
    act_layer: type[nn.Module] | None = None,
    norm_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ConvNormAct:
    """timm's convolution (odd kernel, "same" padding, no bias), BatchNorm and activation; None: no activation."""
    return ConvNormAct(
        in_chs,
        out_chs,
        kernel_size,
        stride,
        padding=kernel_size // 2,
        groups=groups,
        apply_act=act_layer is not None,
        act_layer=act_layer,
        norm_kwargs=norm_kwargs,
        device=device,
        dtype=dtype,
    )


def yolo_conv(
    in_chs: int,
    out_chs: int,
    kernel_size: int = 1,
    stride: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ConvNormAct:
    """The convolution of YOLOv5 and YOLOv8: BatchNorm (eps 1e-3, momentum 0.03) and SiLU behind it."""
    norm = {"eps": 1e-3, "momentum": 0.03}
    return conv_norm_act(in_chs, out_chs, kernel_size, stride, 1, nn.SiLU, norm, device, dtype)


class YoloBottleneck(nn.Module):
    """Two convolutions, the second 3x3, and with `add` their input on top: a block inside YOLOv5's C3 and YOLOv8's C2f.

    Args:
        chs: Channels.
        kernel_size: Of the first convolution.
        add: Whether there is a shortcut.
    """

    def __init__(
        self,
        chs: int,
        kernel_size: int,
        add: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cv1 = yolo_conv(chs, chs, kernel_size, device=device, dtype=dtype)
        self.cv2 = yolo_conv(chs, chs, 3, device=device, dtype=dtype)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> the same shape."""
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class SPPF(nn.Module):
    """Spatial pyramid pooling as YOLOv5 and YOLOv8 have it: a map beside its maxima over 5, 9 and 13 pixels."""

    def __init__(self, chs: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.cv1 = yolo_conv(chs, chs // 2, device=device, dtype=dtype)
        self.cv2 = yolo_conv(2 * chs, chs, device=device, dtype=dtype)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> the same shape."""
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


@register_notrace_module
class PaddingFreeDownsample(nn.Module):
    """A convolution of stride 2 with less padding than usual, plus a max-pool of the convolution's input.

    Their 3x3 windows lie inside the map, 5x5 ones reach one pixel beyond it, so a map of n pixels becomes one of
    floor((n - 3) / 2) + 1, and fewer zeros or none take part. Code of
    "Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024); which parts follow the convolution,
    and whether the pooled input goes through a 1x1 convolution, differs from network to network there.

    Args:
        in_chs: Input channels.
        out_chs: Output channels; other than `in_chs` they need `project`.
        kernel_size: 3 or 5.
        groups: Groups of the convolution.
        norm: Whether BatchNorm follows the convolution.
        act_layer: What follows that, before the sum.
        pool_size: Kernel of the max-pool; 3 or, with the padding of a 5x5 convolution, 5.
        project: A 1x1 convolution behind the max-pool.
        norm_kwargs: `eps` and `momentum` of the BatchNorm.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        groups: int = 1,
        norm: bool = True,
        act_layer: type[nn.Module] | None = None,
        pool_size: int = 3,
        project: bool = False,
        norm_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if kernel_size not in (3, 5) or pool_size not in (3, 5):
            raise ValueError(f"padding-free downsampling has kernels of 3 or 5, got {kernel_size} and {pool_size}")
        if in_chs != out_chs and not project:
            raise ValueError(f"{in_chs} pooled channels cannot be added to {out_chs} without project=True")
        padding = kernel_size // 2 - 1
        self.conv: nn.Module = nn.Conv2d(in_chs, out_chs, kernel_size, 2, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **(norm_kwargs or {}), **dd) if norm else nn.Identity()
        self.act = act_layer() if act_layer is not None else nn.Identity()
        self.pool = nn.MaxPool2d(pool_size, 2, pool_size // 2 - 1)
        self.project = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, floor((H - 3) / 2) + 1, floor((W - 3) / 2) + 1); H and W at least 3."""
        if not is_exporting() and min(x.shape[-2], x.shape[-1]) < 3:
            raise ImageSizeError(
                f"padding-free downsampling needs maps of at least 3x3 pixels, got {x.shape[-2]}x{x.shape[-1]}: "
                "give larger images"
            )
        return self.act(self.bn(self.conv(x))) + self.project(self.pool(x))


class HybridStem(nn.Module):
    """A 3x3 convolution, then a depthwise 3x3 convolution beside a 3x3 max-pool, then a 1x1 convolution over both.

    Code of "Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024).

    Args:
        in_chans: Image channels.
        chs: Output channels, and those inside.
        stride: Of the first convolution.
        inner_stride: Of the depthwise convolution and the max-pool.
        act_layer: Behind every convolution's BatchNorm.
        residual: Add what the first convolution gives to the output; needs `inner_stride` 1.
        pre_activation: BatchNorm and activation in front of the convolutions, and none at the first one.
    """

    def __init__(
        self,
        in_chans: int,
        chs: int,
        stride: int = 1,
        inner_stride: int = 1,
        act_layer: type[nn.Module] = nn.ReLU,
        residual: bool = False,
        pre_activation: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if residual and inner_stride != 1:
            raise ValueError(f"a residual hybrid stem has inner_stride 1, got {inner_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kwargs: dict[str, Any] = {"act_layer": act_layer, **dd}
        self.residual = residual
        self.conv: nn.Module
        self.branch: nn.Module
        self.fuse: nn.Module
        if pre_activation:
            self.conv = nn.Conv2d(in_chans, chs, 3, stride, 1, bias=False, **dd)
            self.branch = NormActConv(chs, chs, 3, inner_stride, groups=chs, **kwargs)
            self.fuse = NormActConv(2 * chs, chs, 1, **kwargs)
        else:
            self.conv = conv_norm_act(in_chans, chs, 3, stride, **kwargs)
            self.branch = conv_norm_act(chs, chs, 3, inner_stride, groups=chs, **kwargs)
            self.fuse = conv_norm_act(2 * chs, chs, 1, **kwargs)
        self.pool = nn.MaxPool2d(3, inner_stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, chs, H', W'), H' = ceil(ceil(H / stride) / inner_stride)."""
        x = self.conv(x)
        y = self.fuse(torch.cat([self.branch(x), self.pool(x)], 1))
        return y + x if self.residual else y


class NormActConv(nn.Module):
    """BatchNorm, activation and a convolution (odd kernel, "same" padding, no bias), as pre-activation networks do."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act_layer: type[nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm2d(in_chs, **dd)
        self.act = act_layer()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        return self.conv(self.act(self.bn(x)))


class BSConvU2d(nn.Sequential):
    """Blueprint separable convolution, unconstrained: a 1x1 convolution `pw`, then a depthwise one `dw`.

    Haase and Amthor, Rethinking Depthwise Separable Convolutions, https://arxiv.org/abs/2003.13549, section 3.2. It
    takes the place of a convolution of the same arguments: (N, in_chs, H, W) -> (N, out_chs, H', W').
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.out_channels = in_chs, out_chs
        self.pw = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        self.dw = nn.Conv2d(out_chs, out_chs, kernel_size, stride, padding, groups=out_chs, bias=bias, **dd)


class BSConvS2d(nn.Sequential):
    """Blueprint separable convolution, subspace: 1x1 convolutions `pw1` and `pw2` with few channels between, then `dw`.

    Haase and Amthor, Rethinking Depthwise Separable Convolutions, https://arxiv.org/abs/2003.13549, section 3.3. It
    takes the place of a convolution of the same arguments: (N, in_chs, H, W) -> (N, out_chs, H', W'). Add
    `orthonormality(layer.pw1.weight)`, times 0.1 in the paper, to the training loss.

    Args:
        ratio: Channels between the 1x1 convolutions, as a share of `in_chs`.
        min_mid_chs: But at least so many, and at most `in_chs`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        ratio: float = 0.25,
        min_mid_chs: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.out_channels = in_chs, out_chs
        mid_chs = min(in_chs, max(min_mid_chs, math.ceil(ratio * in_chs)))
        self.pw1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.pw2 = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.dw = nn.Conv2d(out_chs, out_chs, kernel_size, stride, padding, groups=out_chs, bias=bias, **dd)


def orthonormality(weight: Tensor) -> Tensor:
    """How far the kernels of a 1x1 convolution are from orthonormal: the Frobenius norm of W W^T - I, a scalar.

    The regularisation of BSConv-S (arXiv 2003.13549, section 3.3), not squared.

    Args:
        weight: The kernels, (out_chs, in_chs, 1, 1).
    """
    kernels = weight.flatten(1)
    return torch.linalg.matrix_norm(kernels @ kernels.T - torch.eye(len(kernels), device=weight.device))


def _check_size(x: Tensor, size: tuple[int, int]) -> None:
    height, width = x.shape[-2], x.shape[-1]
    if (height, width) != size:
        raise ImageSizeError(
            f"a layer was built for maps of {size[0]}x{size[1]} pixels and got {height}x{width}: this network takes "
            "images of one size; create it with img_size=..., or call its set_input_size(...)"
        )


@register_notrace_module
class PositionAwareCircularConv2d(nn.Module):
    """ParC: a depthwise convolution as long as the map along one axis, which wraps around, and optionally a position.

    Zhang, Hu and Wang, ParC-Net, https://arxiv.org/abs/2203.03952, section 3.

    Args:
        chs: Channels.
        size: Height and width of the map.
        axis: 0 convolves columns (along the height), 1 rows (along the width).
        position: Add a learnt value for every place along the axis first.
    """

    def __init__(
        self,
        chs: int,
        size: tuple[int, int],
        axis: int,
        position: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if axis not in (0, 1):
            raise ValueError(f"axis is 0 (height) or 1 (width), got {axis}")
        self.size: tuple[int, int] = to_2tuple(size)
        self.axis = axis
        kernel = (self.size[0], 1) if axis == 0 else (1, self.size[1])
        self.pe = nn.Parameter(torch.zeros(1, chs, *kernel, **dd)) if position else None
        self.conv = nn.Conv2d(chs, chs, kernel, groups=chs, **dd)

    def resampled(self, name: str, tensor: Tensor, size: tuple[int, int]) -> Tensor:
        """The parameter `name` of such a layer as one for maps of height and width `size`.

        Positions and kernels are interpolated; kernels keep their sum, and so what they make of a constant map.
        """
        kernel = (size[0], 1) if self.axis == 0 else (1, size[1])
        if name == "conv.bias" or tensor.shape[2:] == kernel:
            return tensor
        resampled = F.interpolate(tensor.float(), kernel, mode="bilinear")
        if name == "conv.weight":
            resampled = resampled * (tensor[0, 0].numel() / max(kernel))
            missing = tensor.float().sum((2, 3), keepdim=True) - resampled.sum((2, 3), keepdim=True)
            resampled = resampled + missing / max(kernel)
        return resampled.to(tensor.dtype)

    def set_size(self, size: tuple[int, int]) -> None:
        """Resamples the parameters for maps of another height and width."""
        if self.pe is not None:
            self.pe = nn.Parameter(self.resampled("pe", self.pe.detach(), size), self.pe.requires_grad)
        weight = self.resampled("conv.weight", self.conv.weight.detach(), size)
        self.conv.weight = nn.Parameter(weight, self.conv.weight.requires_grad)
        self.conv.kernel_size = tuple(self.conv.weight.shape[2:])
        self.size = (size[0], size[1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> the same shape; raises ImageSizeError if H and W are not the layer's."""
        _check_size(x, self.size)
        if self.pe is not None:
            x = x + self.pe
        if self.axis == 0:
            return self.conv(torch.cat([x, x[:, :, :-1]], 2))
        return self.conv(torch.cat([x, x[:, :, :, :-1]], 3))


class _Attention(Attention2dDownsample):
    """timm's, without its cache of attention biases, which would outlive weights that are loaded after a prediction."""

    attention_bias_idxs: Tensor

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """(heads, queries, keys)."""
        return self.attention_biases[:, self.attention_bias_idxs]


@register_notrace_module
class AttentionDownsample(Downsample):
    """EfficientFormerV2's downsampling: a 3x3 convolution of stride 2, and beside it attention of the same stride.

    Li et al., Rethinking Vision Transformers for MobileNet Size and Speed, https://arxiv.org/abs/2212.08059.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        size: Height and width of the map.
        attention: Whether there is attention; without it every size works.
        norm_kwargs: `eps` and `momentum` of the convolution's BatchNorm.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        size: tuple[int, int],
        attention: bool = True,
        norm_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chs, out_chs, device=device, dtype=dtype)
        for name, value in (norm_kwargs or {}).items():
            setattr(self.conv.bn, name, value)
        self.size: tuple[int, int] = to_2tuple(size)
        if attention:
            self.attn = _Attention(in_chs, out_dim=out_chs, resolution=self.size, device=device, dtype=dtype)

    def resampled(self, name: str, tensor: Tensor, size: tuple[int, int]) -> Tensor:
        """The parameter `name` of such a layer as one for maps of `size`; biases for maps of unknown shape stay.

        Known are those of the layer's own size and square ones.
        """
        side = math.isqrt(tensor.shape[-1])
        old = self.size if tensor.shape[-1] == self.size[0] * self.size[1] else (side, side)
        if name != "attn.attention_biases" or old == size or tensor.shape[-1] != old[0] * old[1]:
            return tensor
        table = tensor.float().unflatten(1, old)[None]  # one bias per distance (rows, columns)
        return F.interpolate(table, size, mode="bilinear")[0].flatten(1).to(tensor.dtype)

    def set_size(self, size: tuple[int, int]) -> None:
        """Resamples the attention's biases for maps of another height and width."""
        if self.attn is not None:
            old = self.attn
            fresh = _Attention(old.q.local.in_channels, out_dim=old.out_dim, resolution=size, device="meta")
            biases = self.resampled("attn.attention_biases", old.attention_biases.detach(), size)
            old.resolution, old.resolution2, old.N, old.N2 = fresh.resolution, fresh.resolution2, fresh.N, fresh.N2
            old.attention_biases = nn.Parameter(biases, old.attention_biases.requires_grad)
            old.attention_bias_idxs = old._compute_attention_bias_idxs(biases.device)
        self.size = (size[0], size[1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / 2), ceil(W / 2)); raises ImageSizeError for another size."""
        out = self.conv(x)
        if self.attn is not None:
            _check_size(x, self.size)
            out = self.attn(x) + out
        return out


def resample_to_fit(state_dict: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """A checkpoint whose parts that depend on the image size are resampled to the size of the network."""
    for prefix, module in net.named_modules():
        if isinstance(module, PositionAwareCircularConv2d | AttentionDownsample):
            for name, parameter in module.named_parameters():
                key = f"{prefix}.{name}"
                if key in state_dict and state_dict[key].ndim == parameter.ndim:
                    state_dict[key] = module.resampled(name, state_dict[key], module.size)
    return state_dict
