"""Layers that two families use, or that are worth using alone: space-to-depth and pyramidal convolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

__all__ = ["PhaseMix", "PyConv2d", "SPDConv2d", "SpaceToDepth", "space_to_depth", "spd_weight"]


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
    height, width = x.shape[-2], x.shape[-1]
    if height % 2 or width % 2:
        x = F.pad(x, [0, width % 2, 0, height % 2])
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


def spd_weight(weight: Tensor, stride: int, padding: int, phases: int = 1) -> tuple[Tensor, int, int]:
    """The kernel that computes a strided convolution on packed maps, exactly.

    A convolution of `stride` s and `phases` q on (C, H, W) equals a convolution of stride 1 on
    `pixel_unshuffle(x, s * q)` whose result is `pixel_shuffle`d by q: space-to-depth for s = 2, q = 1; packing for
    q > 1, which trades zero taps for channel groups wide enough for vector units. Output phase y of cell m reads tap
    `s * q * m + phase - s * y + padding` of the old kernel; taps that the old kernel has not are zero.

    Args:
        weight: The old kernel, (out_chs, in_chs / groups, k, k).
        stride: Stride of the old convolution.
        padding: Zero padding of the old convolution.
        phases: Rows and columns of output pixels that become channels of one output cell.

    Returns:
        The new kernel (out_chs * q**2, in_chs / groups * (s * q)**2, K, K), and the padding before and after, in cells.
    """
    out_chs, in_chs, kernel, _ = weight.shape
    cell = stride * phases
    before = -(-padding // cell)
    after = (stride * (phases - 1) + kernel - 1 - padding) // cell
    size = cell * (before + 1 + after)
    first = cell * before - padding  # room in front of the old kernel in the window of output phase 0
    last = first + stride * (phases - 1)  # ... and of the last output phase
    padded = F.pad(weight, 2 * (last, size - first - kernel))
    windows = padded.unfold(2, size, stride).unfold(3, size, stride)  # (out, in, q, q, size, size), last phase first
    if phases > 1:
        windows = windows.flip(2, 3)
    cells = windows.reshape(out_chs, in_chs, phases, phases, size // cell, cell, size // cell, cell)
    packed = cells.permute(0, 2, 3, 1, 5, 7, 4, 6).reshape(
        out_chs * phases**2, in_chs * cell**2, size // cell, size // cell
    )
    return packed, before, after


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
        return spd_weight(weight, stride=2, padding=self.strided_kernel_size // 2)[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / 2), ceil(W / 2))."""
        before, after = self.pad_before, self.pad_after
        bottom, right = after + x.shape[-2] % 2, after + x.shape[-1] % 2
        weight = F.pixel_shuffle(self.weight, 2)
        if before == bottom == right:
            return F.conv2d(x, weight, self.bias, 2, before, groups=self.groups)
        return F.conv2d(F.pad(x, [before, right, before, bottom]), weight, self.bias, 2, groups=self.groups)


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
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            x = F.pad(x, [0, x.shape[-1] % 2, 0, x.shape[-2] % 2])
        weight = F.pixel_shuffle(self.weight, 2)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled():
            # oneDNN's bf16 gradient of a depthwise convolution takes twenty times as long as its fp32 one.
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x.float(), weight.float(), None, 2, groups=self.groups).to(x.dtype)
        return F.conv2d(x, weight, None, 2, groups=self.groups)


@register_notrace_module
class PyConv2d(nn.ModuleDict):
    """Pyramidal convolution: kernels of several sizes side by side over the same input (arXiv 2006.11538, section 3).

    Levels whose groups are too narrow for vector units are computed packed (`spd_weight`), which changes no number.

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
            outputs = self._outputs(x)
        return torch.cat(outputs, 1)

    @torch.jit.unused
    def _outputs(self, x: Tensor) -> list[Tensor]:
        """The levels' outputs, those of the narrow levels computed on one packed map."""
        levels = [level for level in self.values() if isinstance(level, nn.Conv2d)]
        narrow = [level for level in levels if x.device.type == "cpu" and _is_narrow(level)]
        outputs: list[Tensor] = [level(x) for level in levels if level not in narrow]
        if narrow:
            height, width = x.shape[-2:]
            cell = 4 if min(height, width) >= 12 else 2
            bottom, right = -height % cell, -width % cell
            cells = F.pixel_unshuffle(F.pad(x, [0, right, 0, bottom]) if bottom or right else x, cell)
            packed = torch.cat([_packed_conv(level, cells, cell) for level in narrow], 1)
            outputs.append(F.pixel_shuffle(packed, cell)[:, :, :height, :width])
        return outputs


def _is_narrow(level: nn.Conv2d) -> bool:
    """Whether packing pays on a CPU (README, "Speed"): a large kernel over few channels per group, not strided."""
    plain = not isinstance(level, SPDConv2d) and level.stride == (1, 1) and level.dilation == (1, 1)
    return plain and level.in_channels // level.groups <= 2 * (level.kernel_size[0] - 3)


def _packed_conv(level: nn.Conv2d, cells: Tensor, cell: int) -> Tensor:
    """`level` on a packed map: (N, in_chs * cell**2, H, W) -> (N, out_chs * cell**2, H, W)."""
    weight, padding, _ = spd_weight(level.weight, 1, level.kernel_size[0] // 2, cell)
    bias = None if level.bias is None else level.bias.repeat_interleave(cell**2)
    return F.conv2d(cells, weight, bias, padding=padding, groups=level.groups)
