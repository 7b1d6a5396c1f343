"""Space-to-depth and the layers built on it, which replace strided convolutions and poolings."""

import functools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import adapt_input_conv, register_notrace_module
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "MaxPool2d",
    "PhaseMix",
    "SPDAvgPool2d",
    "SPDConv2d",
    "SPDMaxPool2d",
    "SPDStdConv2d",
    "SpaceToDepth",
    "adapt_image_channels",
    "is_exporting",
    "max_pool2d",
    "phase_weight",
    "same_padding",
    "space_to_depth",
    "spd_weight",
]


def space_to_depth(x: Tensor, order: str = "channels_first") -> Tensor:
    """Moves each 2x2 cell of pixels into channels.

    An odd height or width is first padded with one row or column of zeros at the bottom or right.

    Args:
        x: Feature maps, (N, C, H, W).
        order: Channel that receives pixel (dy, dx) of channel c. "channels_first": 4c + 2dy + dx, as in
            `torch.nn.functional.pixel_unshuffle`, which keeps the channels of a convolution group together.
            "rows_first": (2dx + dy) * C + c, as in the code of the SPD-Conv paper (arXiv 2208.03641, section 3.1).

    Returns:
        (N, 4C, ceil(H / 2), ceil(W / 2)).

    Raises:
        ValueError: If `order` is neither of the two.
    """
    x = _pad_to_cells(x, 2)
    if order == "channels_first":
        return F.pixel_unshuffle(x, 2)
    if order != "rows_first":
        raise ValueError(f"order must be channels_first or rows_first, got {order}")
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


@register_notrace_module
class SpaceToDepth(nn.Module):
    """`space_to_depth` as a module.

    Args:
        order: Order of the output channels, as in `space_to_depth`.
    """

    def __init__(self, order: str = "channels_first") -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4C, ceil(H / 2), ceil(W / 2))."""
        return space_to_depth(x, self.order)


def _pad_to_cells(x: Tensor, size: int) -> Tensor:
    """Pads `x` with zeros at the bottom and right until `size` divides its height and width."""
    right, bottom = (size - x.shape[-1] % size) % size, (size - x.shape[-2] % size) % size
    if not torch.jit.is_scripting() and is_exporting():
        return x if _is_always_zero(right) and _is_always_zero(bottom) else F.pad(x, [0, right, 0, bottom])
    return F.pad(x, [0, right, 0, bottom]) if bottom or right else x


def _is_always_zero(number: Any) -> bool:
    """Whether a number is zero for all image sizes of the graph that is being recorded."""
    return isinstance(number, int | torch.SymInt) and statically_known_true(number == 0)


def is_exporting() -> bool:
    """Whether `torch.export`, `torch.fx.symbolic_trace`, `torch.jit.trace` or the old ONNX exporter is recording.

    A recorded graph is also run at other image sizes, so while recording no branch may depend on the size.

    Returns:
        True while one of them is recording.
    """
    exporting = False
    if not torch.jit.is_scripting():
        exporting = torch.compiler.is_exporting() or torch.jit.is_tracing() or is_fx_symbolic_tracing()
    return exporting


def spd_weight(weight: Tensor, padding: int | tuple[int, int], stride: int = 2) -> Tensor:
    """Converts the kernel of a strided convolution into one of stride 1 that computes the same after space-to-depth.

    Number the taps of the strided kernel from the output's pixel, -padding .. k - 1 - padding. Tap o becomes tap
    floor(o / stride) of phase o mod stride; the other taps of the new kernel are zero. The new convolution has stride
    1, the same groups, and is padded with ceil(padding / stride) cells of zeros at the top and left, and with
    floor((k - 1 - padding) / stride) at the bottom and right.

    Args:
        weight: Kernel of the strided convolution, (out_chs, in_chs / groups, kh, kw).
        padding: Zero padding of the strided convolution in pixels.
        stride: Stride of the strided convolution, and side of a cell in pixels.

    Returns:
        The new kernel, (out_chs, stride**2 * in_chs / groups, KH, KW).
    """
    pads: list[int] = []
    for kernel, before in zip(weight.shape[:1:-1], reversed(to_2tuple(padding)), strict=True):
        lead = -before % stride
        pads += [lead, -(lead + kernel) % stride]
    return F.pixel_unshuffle(F.pad(weight, pads), stride)


def adapt_image_channels(weight: Tensor, in_chans: int, stride: int = 2, order: str = "channels_first") -> Tensor:
    """Adapts a kernel that reads the image after space-to-depth to another number of image channels.

    Each phase is adapted as timm adapts kernels. A kernel whose input channels are not a multiple of `stride**2` is
    returned unchanged, so that loading it fails with an error about its shape.

    Args:
        weight: Kernel of the convolution, (out_chs, stride**2 * image channels, KH, KW).
        in_chans: New number of image channels.
        stride: Side of a cell in pixels.
        order: Order of the channels, as in `space_to_depth`.

    Returns:
        The new kernel, (out_chs, stride**2 * in_chans, KH, KW).
    """
    phases = stride**2
    if weight.ndim != 4 or weight.shape[1] % phases or weight.shape[1] == phases * in_chans:
        return weight
    sizes, axis = ((-1, phases), 2) if order == "channels_first" else ((phases, -1), 1)
    old = weight.unflatten(1, sizes).unbind(axis)
    return torch.stack([adapt_input_conv(in_chans, phase, phase.shape[1]) for phase in old], axis).flatten(1, 2)


def phase_weight(weight: Tensor, stride: int) -> Tensor:
    """Packs a kernel so that one convolution with twice the stride computes 2x2 output pixels at once, as channels.

    `F.pixel_shuffle(packed convolution, 2)` equals the convolution with `weight` and `stride`. The packed kernel
    contains the original one four times, once for each output pixel, shifted by `stride`.

    Args:
        weight: Kernel, (out_chs, in_chs / groups, k, k).
        stride: Stride of its convolution.

    Returns:
        The packed kernel, (4 * out_chs, in_chs / groups, k + stride, k + stride).
    """
    rows = torch.stack([F.pad(weight, [0, 0, 0, stride]), F.pad(weight, [0, 0, stride, 0])], 1)
    return torch.stack([F.pad(rows, [0, stride]), F.pad(rows, [stride, 0])], 2).flatten(0, 2)


@register_notrace_module
class SPDConv2d(nn.Conv2d):
    """Space-to-depth followed by a convolution of stride 1: replaces a strided convolution without losing pixels.

    Its arguments and attributes (`kernel_size`, `stride`, `in_channels` ...) are those of the strided convolution that
    it replaces, in the order of `nn.Conv2d`. Its weight is the kernel after space-to-depth. `from_strided` converts a
    strided kernel to it: the output is then the same at every image size, and the additional taps start at zero and
    are trainable. A new layer is initialised like a strided convolution.

    The forward pass runs one strided convolution with the equivalent larger kernel (twice the size for stride 2) on
    the map itself, which is faster than copying the map (docs/speed.md).

    Args:
        in_channels: Input channels, before space-to-depth.
        out_channels: Output channels.
        kernel_size: Kernel size of the strided convolution.
        stride: Stride of the strided convolution and side of a cell, the same for both axes.
        padding: Padding of the strided convolution; "same" is TensorFlow's, as in timm's `Conv2dSame`. None: half the
            kernel, which must be odd.
        dilation: Dilation of the strided convolution.
        groups: Groups of both convolutions.
        bias: Whether there is a bias.
        padding_mode: Padding mode of the strided convolution.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If the strides of the axes differ, or `padding` is None and the kernel is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel, steps, cell = to_2tuple(kernel_size), to_2tuple(dilation), to_2tuple(stride)
        if cell[0] != cell[1]:
            raise ValueError(f"the stride of SPDConv2d must be the same for both axes, got {stride}")
        rows, columns = (step * (size - 1) + 1 for step, size in zip(steps, kernel, strict=True))
        if padding is None:
            if rows % 2 == 0 or columns % 2 == 0:
                raise ValueError(f"without padding=..., SPDConv2d needs an odd kernel size, got {kernel_size}")
            padding = (rows // 2, columns // 2)
        pads: tuple[int, int] = (0, 0) if padding in ("same", "valid") else to_2tuple(padding)
        mode: Any = padding_mode
        super().__init__(
            in_channels, out_channels, kernel_size, cell, pads, dilation, groups, bias, mode, device=device, dtype=dtype
        )
        self.cell: int = cell[0]
        self.reach = (rows, columns)  # pixels from the first to the last tap of the strided kernel
        self.same = padding == "same"
        if self.same:
            self.padding = "same"  # so that a layer created from these attributes pads in the same way
        # Zeros added around the map. They shift its corner (with other padding modes, the padded map's corner) by a
        # multiple of the cell's side.
        top, left = pads if padding_mode == "zeros" else (0, 0)
        self.own_padding = (top, left)
        self.pad_before = (-(-top // self.cell) * self.cell, -(-left // self.cell) * self.cell)
        self.pad_after = (top + -(rows - top) % self.cell, left + -(columns - left) % self.cell)
        self.weight = nn.Parameter(self.from_strided(self.weight.detach()))

    def new_strided_weight(self) -> Tensor:
        """Allocates a kernel of the strided convolution, uninitialised.

        Returns:
            (out_chs, in_chs / groups, kh, kw).
        """
        return self.weight.new_empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def is_strided_weight(self, weight: Tensor | None) -> bool:
        """Whether a kernel has the shape of the strided convolution's kernel instead of this layer's.

        Args:
            weight: The kernel; None gives False.

        Returns:
            True if `from_strided` should be applied to it.
        """
        return (
            weight is not None
            and weight.ndim == 4
            and tuple(weight.shape[2:]) == self.kernel_size
            and weight.shape != self.weight.shape
        )

    def from_strided(self, weight: Tensor) -> Tensor:
        """Converts a kernel of the strided convolution to this layer's layout.

        Args:
            weight: (out_chs, in_chs / groups, kh, kw).

        Returns:
            (out_chs, stride**2 * in_chs / groups, KH, KW).
        """
        if self.reach != self.kernel_size:
            down, right = self.dilation
            spread = weight.new_zeros(*weight.shape[:2], *self.reach)
            spread[..., ::down, ::right] = weight
            weight = spread
        return spd_weight(weight, self.own_padding, self.cell)

    def spd_kernel(self) -> Tensor:
        """The kernel that is applied after space-to-depth, (out_chs, stride**2 * in_chs / groups, KH, KW)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W'), the size of the strided convolution's output."""
        return self._convolve(input)

    def _convolve(self, x: Tensor) -> Tensor:
        """`forward`, for subclasses: TorchScript has no `super`."""
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
            # Drop the zeros after the last window. If equal padding on opposite sides then suffices, the convolution
            # pads by itself, which avoids a copy of the map.
            bottom -= (x.shape[-2] + top + bottom - weight.shape[-2]) % self.cell
            right -= (x.shape[-1] + left + right - weight.shape[-1]) % self.cell
            if bottom <= top < bottom + self.cell and right <= left < right + self.cell:
                return F.conv2d(x, weight, self.bias, self.cell, (top, left), groups=self.groups)
        x = F.pad(x, [left, right, top, bottom])
        return F.conv2d(x, weight, self.bias, self.cell, groups=self.groups)


def same_padding(size: int, reach: int, stride: int) -> int:
    """Number of zeros that TensorFlow's "same" padding adds along an axis, on both sides together.

    Args:
        size: Pixels along the axis.
        reach: Pixels from the first to the last tap of the kernel.
        stride: Stride of the kernel.

    Returns:
        The number.
    """
    padding = (stride - size % stride) % stride + reach - stride
    return padding if reach >= stride else (padding + abs(padding)) // 2  # at least 0, without a branch


@register_notrace_module
class SPDStdConv2d(SPDConv2d):
    """`SPDConv2d` for timm's weight-standardised convolutions: `StdConv2d` and, with `gain`, `ScaledStdConv2d`.

    The kernel, including its additional taps, is standardised in every forward pass. A factor corrects for the number
    of taps, so that the weights of `from_strided` give the output of the strided convolution.

    Args:
        *args: Arguments of `SPDConv2d`.
        eps: `eps` of the strided convolution.
        scale: Factor of the standardised kernel. None: 1, and without a learnt `gain` per output channel.
        **conv: Keyword arguments of `SPDConv2d`.
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
        """Converts a kernel of the strided convolution to this layer's layout.

        It is centred first, so that the zeros of the additional taps equal its mean.

        Args:
            weight: (out_chs, in_chs / groups, kh, kw).

        Returns:
            (out_chs, stride**2 * in_chs / groups, KH, KW).
        """
        return super().from_strided(weight - weight.mean((1, 2, 3), keepdim=True))

    def spd_kernel(self) -> Tensor:
        """The standardised kernel, (out_chs, stride**2 * in_chs / groups, KH, KW)."""
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (torch.rsqrt(var + self.eps) * self.scale)
        return weight if self.gain is None else weight * self.gain


@register_notrace_module
class SPDAvgPool2d(SPDConv2d):
    """Replaces a strided average pooling by a learnt weighting of every pixel, for each channel separately.

    Starts as the average pooling that it replaces. For 2x2 windows it is a phase mix that starts with weights of 1/4.

    Args:
        chs: Channels.
        kernel_size: Window of the pooling.
        stride: Stride of the pooling.
        padding: Padding of the pooling; "same" is TensorFlow's.
        ceil_mode: As in `nn.AvgPool2d`.
        count_include_pad: As in `nn.AvgPool2d`.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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
        super().__init__(chs, chs, kernel_size, stride, padding, groups=chs, device=device, dtype=dtype)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        with torch.no_grad():
            self.weight.copy_(self.initial_weight())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Averages every window, as a new layer does."""
        if hasattr(self, "count_include_pad"):
            self.weight.copy_(self.initial_weight())
        else:  # called by the constructor of nn.Conv2d, before the layer knows its padding
            super().reset_parameters()

    def initial_weight(self) -> Tensor:
        """The weights that average every window, (chs, stride**2, KH, KW)."""
        return self.from_strided(torch.full_like(self.new_strided_weight(), 1 / math.prod(self.kernel_size)))

    def forward(self, input: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, H', W'), the size of the strided pooling's output."""
        x = input
        height, width = x.shape[-2], x.shape[-1]
        if self.same:
            return self._convolve(x)
        rows = _windows(height, self.reach[0], self.cell, self.own_padding[0], self.ceil_mode)
        columns = _windows(width, self.reach[1], self.cell, self.own_padding[1], self.ceil_mode)
        if self.ceil_mode:
            bottom = _missing(height, rows, self.reach[0], self.cell, self.own_padding[0])
            right = _missing(width, columns, self.reach[1], self.cell, self.own_padding[1])
            x = F.pad(x, [0, right, 0, bottom])
        y = self._convolve(x)
        if self.ceil_mode or not (self.count_include_pad or self.own_padding == (0, 0)):
            # nn.AvgPool2d divides a window at the border by the number of its pixels inside the map
            y = y * self._border_factors(height, rows, self.kernel_size[0], self.own_padding[0], y)[:, None]
            y = y * self._border_factors(width, columns, self.kernel_size[1], self.own_padding[1], y)
        return y

    def _border_factors(self, size: int, windows: int, kernel: int, pad: int, like: Tensor) -> Tensor:
        """Kernel size divided by each window's number of pixels that nn.AvgPool2d counts along an axis, (windows,)."""
        first, last = (-pad, size + pad) if self.count_include_pad else (0, size)
        start = torch.arange(windows, device=like.device) * self.cell - pad
        return kernel / ((start + kernel).clamp(max=last) - start.clamp(min=first)).to(like.dtype)


def _windows(size: int, reach: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Number of windows of a pooling along an axis.

    With `ceil_mode` the last window may end beyond the padded map, but must start inside the map or its padding before.
    """
    if not ceil_mode:
        return (size + 2 * padding - reach) // stride + 1
    windows = -(-(size + 2 * padding - reach) // stride) + 1
    return windows - _at_least_zero(windows - -(-(size + padding) // stride))


def _missing(size: int, windows: int, reach: int, stride: int, padding: int) -> int:
    """Pixels by which the last window of a pooling exceeds the padded axis."""
    return _at_least_zero(stride * (windows - 1) + reach - size - 2 * padding)


def _at_least_zero(n: int) -> int:
    """`max(n, 0)`, recorded without a branch by `torch.export` and `torch.jit.trace`."""
    if torch.jit.is_scripting():
        positive = (n + abs(n)) // 2
    else:
        positive = (n + abs(n)) // 2 if torch.jit.is_tracing() else cast("int", torch.sym_max(n, 0))
    return positive


@register_notrace_module
class PhaseMix(nn.Conv2d):
    """Space-to-depth followed by a learnt weighted sum of each channel's phases; starts as the phase (0, 0).

    The forward pass runs the equivalent depthwise convolution, whose kernel size and stride are the side of a cell.

    Args:
        chs: Channels.
        stride: Side of a cell; 2 gives four phases.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self, chs: int, stride: int = 2, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(stride**2 * chs, chs, 1, groups=chs, bias=False, device=device, dtype=dtype)
        self.cell = stride

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Selects the phase (0, 0) of every channel, as a stride does."""
        self.weight.copy_(self.initial_weight())

    def initial_weight(self) -> Tensor:
        """The weights (1, 0, 0, ...) for every channel, (chs, stride**2, 1, 1)."""
        weight = torch.zeros_like(self.weight)
        weight[:, 0] = 1
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, ceil(H / stride), ceil(W / stride))."""
        x = _pad_to_cells(x, self.cell)
        return _depthwise_conv2d(x, F.pixel_shuffle(self.weight, self.cell), self.cell)


@torch.fx.wrap  # symbolic tracing knows neither device nor data type, on which the branch depends
def _depthwise_conv2d(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled():
        # oneDNN takes twenty times as long for the bf16 gradient of a depthwise convolution as for the fp32 one.
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), weight.float(), None, stride, groups=weight.shape[0]).to(x.dtype)
    return F.conv2d(x, weight, None, stride, groups=weight.shape[0])


def max_pool2d(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """`torch.nn.functional.max_pool2d`, faster on a CPU.

    torch's own kernel also finds the index of every maximum, which only training needs, and scans contiguous maps pixel
    by pixel. Without gradients the maxima of shifted maps replace it; with gradients contiguous maps are pooled as
    channels_last ones. Outputs and gradients are the same numbers.

    Args:
        x: Feature maps, (N, C, H, W).
        kernel_size: Height and width of the window in pixels.
        stride: Step of the window in pixels.
        padding: Pixels of minus infinity at each side.

    Returns:
        (N, C, H', W'), in the memory format of `x`.
    """
    if torch.jit.is_scripting():
        pooled = F.max_pool2d(x, kernel_size, stride, padding)
    else:
        pooled = _max_pool2d(x, kernel_size, stride, padding)
    return pooled


_WIDE = 32  # channels; torch's kernel for more channels_last ones is as fast


def _max_pool2d(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    observed = is_exporting() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if observed or x.device.type != "cpu" or x.ndim != 4 or not x.is_floating_point() or x.numel() == 0:
        return F.max_pool2d(x, kernel_size, stride, padding)
    contiguous = x.is_contiguous()
    fits = all(size + 2 * pad >= taps for size, pad, taps in zip(x.shape[2:], padding, kernel_size, strict=True))
    if torch.is_grad_enabled() and x.requires_grad:
        pooled = F.max_pool2d(x.contiguous(memory_format=torch.channels_last), kernel_size, stride, padding)
        return pooled.contiguous() if contiguous else pooled
    if not fits or (not contiguous and x.shape[1] > _WIDE):
        return F.max_pool2d(x, kernel_size, stride, padding)
    if any(padding):
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], value=-math.inf)
    for axis, taps, step in zip((2, 3), kernel_size, stride, strict=True):
        last = x.shape[axis] - taps + 1
        x = functools.reduce(torch.maximum, [_shifted(x, axis, tap, last + tap, step) for tap in range(taps)])
    return x


def _shifted(x: Tensor, axis: int, begin: int, end: int, step: int) -> Tensor:
    """Every `step`-th row (axis 2) or column (axis 3) of a map."""
    return x[:, :, begin:end:step] if axis == 2 else x[:, :, :, begin:end:step]


@register_notrace_module
class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` by `max_pool2d`: the same numbers, faster on a CPU. Every network of this package uses it."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if torch.jit.is_scripting():
            pooled = F.max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        elif to_2tuple(self.dilation) != (1, 1) or self.ceil_mode or self.return_indices:
            pooled = super().forward(input)
        else:
            pooled = max_pool2d(input, to_2tuple(self.kernel_size), to_2tuple(self.stride), to_2tuple(self.padding))
        return pooled


def _lowest(x: Tensor) -> float:
    """The lowest number of a map's type."""
    if not torch.jit.is_scripting():
        lowest = torch.finfo(x.dtype).min
    elif x.dtype == torch.float16:  # TorchScript has no finfo
        lowest = -65504.0
    elif x.dtype == torch.bfloat16:
        lowest = -3.3895313892515355e38
    elif x.dtype == torch.float64:
        lowest = -1.7976931348623157e308
    else:
        lowest = -3.4028234663852886e38
    return lowest


@register_notrace_module
class SPDMaxPool2d(nn.Module):
    """Max-pooling with stride 1 followed by a `PhaseMix`; starts as the strided max-pooling that it replaces.

    The order is that of the shortcuts in the `pyconv*_spd` networks.

    Args:
        chs: Channels.
        kernel_size: Window of the pooling.
        stride: Stride of the pooling that is replaced.
        padding: Padding of the pooling; "same" is TensorFlow's.
        dilation: Dilation of the pooling.
        ceil_mode: As in `nn.MaxPool2d`.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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

    def forward(self, input: Tensor) -> Tensor:
        """(N, chs, H, W) -> (N, chs, H', W'), the size of the strided pooling's output."""
        x = input
        lowest = _lowest(x)
        x = x.clamp(min=lowest)  # -inf times a weight of zero is NaN
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return self.mix(x)
        if self.dilation == (1, 1) and not self.same and not self.ceil_mode:
            return self.mix(max_pool2d(x, self.kernel_size, (1, 1), self.padding))
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
        x = F.pad(x, pads, value=lowest)
        if self.dilation == (1, 1):
            return self.mix(max_pool2d(x, self.kernel_size, (1, 1), (0, 0)))
        return self.mix(F.max_pool2d(x, self.kernel_size, 1, 0, self.dilation))
