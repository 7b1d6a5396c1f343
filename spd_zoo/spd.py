"""Space-to-depth, and the layers that are built on it."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import adapt_input_conv, register_notrace_module
from torch import Tensor, nn

__all__ = [
    "PhaseMix",
    "SPDAvgPool2d",
    "SPDConv2d",
    "SPDMaxPool2d",
    "SPDStdConv2d",
    "SpaceToDepth",
    "adapt_image_channels",
    "is_exporting",
    "phase_weight",
    "same_padding",
    "space_to_depth",
    "spd_weight",
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
        lowest = torch.finfo(x.dtype).min
        x = x.clamp(min=lowest)  # -inf times a weight of zero is NaN
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
        return self.mix(F.max_pool2d(F.pad(x, pads, value=lowest), self.kernel_size, 1, 0, self.dilation))
