"""Layers and blocks that several families of networks share, or that are useful on their own."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, to_2tuple
from timm.models import register_notrace_module
from timm.models.efficientformer_v2 import Attention2dDownsample, Downsample
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from spd_zoo.spd import MaxPool2d, SPDConv2d, is_exporting, phase_weight

__all__ = [
    "SPPF",
    "AttentionDownsample",
    "BSConvS2d",
    "BSConvU2d",
    "HybridStem",
    "ImageSizeError",
    "NormActConv",
    "PaddingFreeDownsample",
    "PositionAwareCircularConv2d",
    "PyConv2d",
    "YoloBottleneck",
    "conv_norm_act",
    "orthonormality",
    "resample_to_fit",
    "yolo_conv",
]


# Attributes that `nn.Module.__call__` runs in addition to, or instead of, the `forward` of the class.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OVERRIDES = ("forward", "_conv_forward", "_call_impl", "_compiled_call_impl")
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_FORWARDS = {nn.Conv2d: nn.Conv2d.forward, SPDConv2d: SPDConv2d.forward}


@register_notrace_module
class PyConv2d(nn.ModuleDict):
    """Pyramidal convolution: kernels of several sizes in parallel on the same input (arXiv 2006.11538, section 3).

    On a CPU, levels with few output channels per group are computed four output pixels at a time (`phase_weight`) where
    that was measured to be faster (`tools/pyramids.jsonl`); the output is the same. A level with hooks, a patched
    `forward` or computed weights is called like any module.

    Args:
        in_chs: Input channels; every level reads all of them.
        out_chs: Output channels of each level.
        kernel_sizes: Kernel size of each level, odd, ascending.
        groups: Groups of each level.
        stride: 1 or 2.
        dilation: Dilation of every level.
        spd: Whether levels of stride 2 are space-to-depth and a convolution of stride 1 (`SPDConv2d`).
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `out_chs`, `kernel_sizes` and `groups` differ in length.
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
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for i, (out, kernel, group) in enumerate(zip(out_chs, kernel_sizes, groups, strict=True)):
            level: nn.Conv2d
            if spd and stride == 2:
                level = SPDConv2d(in_chs, out, kernel, groups=group, **dd)
            else:
                padding = dilation * (kernel // 2)
                level = nn.Conv2d(in_chs, out, kernel, stride, padding, dilation, group, bias=False, **dd)
            self[f"conv2_{i + 1}"] = level

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, sum(out_chs), ceil(H / stride), ceil(W / stride))."""
        outputs = []
        if torch.jit.is_scripting():
            for level in self.values():
                outputs.append(level(x))
        else:
            observed = is_exporting() or is_in_torch_dispatch_mode() or _has_any_global_hook()
            packs = not observed and x.ndim == 4 and x.device.type == "cpu"
            for level in self.values():
                packed = packs and _is_narrow(level) and _is_plain(level)
                outputs.append(_four_at_a_time(level, x) if packed else level(x))
        return torch.cat(outputs, -3)


def _is_narrow(level: Any) -> bool:
    """Whether a level has so few output channels per group that computing four pixels at a time is faster.

    The limit is 4 channels, or 8 at stride 1 in evaluation; without AVX-512 2, or 4 in evaluation. Nothing is timed at
    run time, so that a resumed run computes the same bits. The kernel must be square and padded with half its size.
    """
    if not isinstance(level, nn.Conv2d) or level.padding_mode != "zeros" or level.dilation != (1, 1):
        return False
    size = level.kernel_size[0]
    if size % 2 == 0 or level.kernel_size != (size, size) or level.padding != (size // 2, size // 2):
        return False
    if level.stride not in ((1, 1), (2, 2)):
        return False
    strided, training = level.stride == (2, 2), level.training
    with_avx512, without = 4 if strided or training else 8, 2 if training else 4
    return level.out_channels // level.groups <= (with_avx512 if _HAS_AVX512 else without)


def _is_plain(level: Any) -> bool:
    """Whether calling a level only convolves with its parameters.

    Hooks, a patched `forward`, a parametrization or a pruned weight would be skipped by computing it in another way.
    """
    attributes, parameters = vars(level), level._parameters
    return (
        _FORWARDS.get(type(level)) is type(level).forward
        and not any(attributes[hooks] for hooks in _HOOKS)
        and not any(name in attributes for name in _OVERRIDES)
        and type(parameters.get("weight")) is nn.Parameter
        and type(parameters.get("bias")) in (nn.Parameter, type(None))
    )


def _four_at_a_time(level: Any, x: Tensor) -> Tensor:
    """The output of a narrow level, (N, out_chs, H', W'), computed as channels of 2x2 pixels (`phase_weight`)."""
    if isinstance(level, SPDConv2d):
        weight, stride, before = F.pixel_shuffle(level.weight, 2), 2, level.pad_before[0]
    else:
        weight, stride, before = level.weight, level.stride[0], level.kernel_size[0] // 2
    height, width = -(-x.shape[-2] // stride), -(-x.shape[-1] // stride)
    weight = phase_weight(weight, stride)
    bias = None if level.bias is None else level.bias.repeat_interleave(4)
    kernel, step = weight.shape[-1], 2 * stride
    after = [  # zeros for the last window: at an odd output size, its 2x2 output pixels exceed the output
        step * ((out + 1) // 2 - 1) + kernel - before - size
        for out, size in ((width, x.shape[-1]), (height, x.shape[-2]))
    ]
    if all(before - step < need <= before for need in after):  # equal padding on both sides suffices
        phases = F.conv2d(x, weight, bias, step, before, groups=level.groups)
    else:
        phases = F.conv2d(F.pad(x, [before, after[0], before, after[1]]), weight, bias, step, groups=level.groups)
    return F.pixel_shuffle(phases, 2)[:, :, :height, :width]


class ImageSizeError(ValueError):
    """The network does not accept images of this size."""


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
    """timm's block of convolution (without bias), BatchNorm and activation.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Kernel size, odd; the padding is half of it.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
        act_layer: Activation; None: no activation.
        norm_kwargs: `eps` and `momentum` of the BatchNorm.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Returns:
        The block.
    """
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
    """The block of YOLOv5 and YOLOv8: convolution, BatchNorm (eps 1e-3, momentum 0.03) and SiLU.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Kernel size, odd; the padding is half of it.
        stride: Stride of the convolution.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Returns:
        The block.
    """
    norm = {"eps": 1e-3, "momentum": 0.03}
    return conv_norm_act(in_chs, out_chs, kernel_size, stride, 1, nn.SiLU, norm, device, dtype)


class YoloBottleneck(nn.Module):
    """Two convolutions, the second 3x3, with an optional shortcut: the block inside YOLOv5's C3 and YOLOv8's C2f.

    Args:
        chs: Channels.
        kernel_size: Kernel size of the first convolution.
        add: Whether there is a shortcut.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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
    """Spatial pyramid pooling of YOLOv5 and YOLOv8: concatenates a map and its maxima over 5, 9 and 13 pixels.

    Args:
        chs: Channels.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(self, chs: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.cv1 = yolo_conv(chs, chs // 2, device=device, dtype=dtype)
        self.cv2 = yolo_conv(2 * chs, chs, device=device, dtype=dtype)
        self.pool = MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> the same shape."""
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


@register_notrace_module
class PaddingFreeDownsample(nn.Module):
    """A convolution of stride 2 with less padding than usual, plus a max-pool of the convolution's input.

    3x3 windows lie inside the map and 5x5 windows exceed it by one pixel, so n pixels become floor((n - 3) / 2) + 1.
    It follows the code of "Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024). The networks
    there differ in what follows the convolution, and in whether a 1x1 convolution follows the max-pool.

    Args:
        in_chs: Input channels.
        out_chs: Output channels; with `project` they may differ from `in_chs`.
        kernel_size: Kernel size of the convolution, 3 or 5.
        groups: Groups of the convolution.
        norm: Whether BatchNorm follows the convolution.
        act_layer: Activation after the BatchNorm, before the sum; None: no activation.
        pool_size: Window of the max-pool, 3 or 5.
        project: Whether a 1x1 convolution follows the max-pool.
        norm_kwargs: `eps` and `momentum` of the BatchNorm.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If a size is neither 3 nor 5, or the channels differ without `project`.
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
            raise ValueError(f"kernel_size and pool_size must be 3 or 5, got {kernel_size} and {pool_size}")
        if in_chs != out_chs and not project:
            raise ValueError(f"{in_chs} pooled channels cannot be added to {out_chs} without project=True")
        padding = kernel_size // 2 - 1
        self.conv: nn.Module = nn.Conv2d(in_chs, out_chs, kernel_size, 2, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **(norm_kwargs or {}), **dd) if norm else nn.Identity()
        self.act = act_layer() if act_layer is not None else nn.Identity()
        self.pool = MaxPool2d(pool_size, 2, pool_size // 2 - 1)
        self.project = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, floor((H - 3) / 2) + 1, floor((W - 3) / 2) + 1).

        Raises:
            ImageSizeError: If H or W is less than 3.
        """
        if not is_exporting() and min(x.shape[-2], x.shape[-1]) < 3:
            raise ImageSizeError(
                f"padding-free downsampling needs maps of at least 3x3 pixels, got {x.shape[-2]}x{x.shape[-1]}: "
                "give larger images"
            )
        return self.act(self.bn(self.conv(x))) + self.project(self.pool(x))


class HybridStem(nn.Module):
    """A 3x3 convolution, then a depthwise 3x3 convolution parallel to a 3x3 max-pool, then a 1x1 convolution of both.

    It follows the code of "Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024).

    Args:
        in_chans: Image channels.
        chs: Channels of every convolution's output.
        stride: Stride of the first convolution.
        inner_stride: Stride of the depthwise convolution and the max-pool.
        act_layer: Activation after every convolution's BatchNorm.
        residual: Whether the output of the first convolution is added to the stem's; needs `inner_stride` 1.
        pre_activation: Whether BatchNorm and activation precede the last two convolutions; the first then has none.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `residual` is combined with an `inner_stride` other than 1.
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
            raise ValueError(f"residual=True needs inner_stride=1, got {inner_stride}")
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
        self.pool = MaxPool2d(3, inner_stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, chs, H', W'), H' = ceil(ceil(H / stride) / inner_stride)."""
        x = self.conv(x)
        y = self.fuse(torch.cat([self.branch(x), self.pool(x)], 1))
        return y + x if self.residual else y


class NormActConv(nn.Module):
    """BatchNorm, activation and a convolution without bias, the order of pre-activation networks.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Kernel size, odd; the padding is half of it.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
        act_layer: Activation.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

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
    """Unconstrained blueprint separable convolution (BSConv-U): a 1x1 convolution `pw`, then a depthwise one, `dw`.

    Haase and Amthor, Rethinking Depthwise Separable Convolutions, https://arxiv.org/abs/2003.13549, section 3.2. It
    replaces a convolution with the same arguments: (N, in_chs, H, W) -> (N, out_chs, H', W').

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Kernel size of the depthwise convolution.
        stride: Stride of the depthwise convolution.
        padding: Padding of the depthwise convolution.
        bias: Whether the depthwise convolution has a bias.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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
    """Subspace blueprint separable convolution (BSConv-S): 1x1 convolutions `pw1` and `pw2`, then a depthwise `dw`.

    Haase and Amthor, Rethinking Depthwise Separable Convolutions, https://arxiv.org/abs/2003.13549, section 3.3. Few
    channels lie between the 1x1 convolutions. It replaces a convolution with the same arguments: (N, in_chs, H, W) ->
    (N, out_chs, H', W'). The paper adds 0.1 * `orthonormality(layer.pw1.weight)` to the training loss.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Kernel size of the depthwise convolution.
        stride: Stride of the depthwise convolution.
        padding: Padding of the depthwise convolution.
        bias: Whether the depthwise convolution has a bias.
        ratio: Channels between the 1x1 convolutions, as a fraction of `in_chs`.
        min_mid_chs: Smallest number of these channels; they never exceed `in_chs`.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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
    """Deviation of a 1x1 convolution's kernels from orthonormality: the Frobenius norm of W W^T - I, not squared.

    It is the regularisation of BSConv-S (arXiv 2003.13549, section 3.3).

    Args:
        weight: Kernels, (out_chs, in_chs, 1, 1).

    Returns:
        A scalar, 0 for orthonormal kernels.
    """
    kernels = weight.flatten(1)
    return torch.linalg.matrix_norm(kernels @ kernels.T - torch.eye(len(kernels), device=weight.device))


@torch.fx.has_side_effect  # keeps the check in an exported graph, where nothing reads its result
@torch.fx.wrap
def _check_size(x: Tensor, size: tuple[int, int]) -> None:
    height, width = x.shape[-2], x.shape[-1]
    if (height, width) != size:
        raise ImageSizeError(
            f"a layer was built for maps of {size[0]}x{size[1]} pixels and got {height}x{width}: this network takes "
            "images of one size; create it with img_size=..., or call its set_input_size(...)"
        )


@register_notrace_module
class PositionAwareCircularConv2d(nn.Module):
    """ParC: a circular depthwise convolution along one axis, with a kernel as long as the map.

    Zhang, Hu and Wang, ParC-Net, https://arxiv.org/abs/2203.03952, section 3.

    Args:
        chs: Channels.
        size: Height and width of the map.
        axis: 0 convolves columns (along the height), 1 rows (along the width).
        position: Whether a learnt position embedding along the axis is added first.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `axis` is neither 0 nor 1.
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
            raise ValueError(f"axis must be 0 (height) or 1 (width), got {axis}")
        self.size: tuple[int, int] = to_2tuple(size)
        self.axis = axis
        kernel = (self.size[0], 1) if axis == 0 else (1, self.size[1])
        self.pe = nn.Parameter(torch.zeros(1, chs, *kernel, **dd)) if position else None
        self.conv = nn.Conv2d(chs, chs, kernel, groups=chs, **dd)

    def resampled(self, name: str, tensor: Tensor, size: tuple[int, int]) -> Tensor:
        """Resamples a parameter of such a layer for maps of another size.

        Position embeddings and kernels are interpolated. Kernels keep their sum, so that the output for a constant map
        stays the same.

        Args:
            name: Name of the parameter in the layer.
            tensor: The parameter.
            size: New height and width of the map.

        Returns:
            The parameter for maps of `size`.
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
        """Resamples the parameters for maps of another size.

        Args:
            size: New height and width of the map.
        """
        if self.pe is not None:
            self.pe = nn.Parameter(self.resampled("pe", self.pe.detach(), size), self.pe.requires_grad)
        weight = self.resampled("conv.weight", self.conv.weight.detach(), size)
        self.conv.weight = nn.Parameter(weight, self.conv.weight.requires_grad)
        self.conv.kernel_size = tuple(self.conv.weight.shape[2:])
        self.size = (size[0], size[1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> the same shape.

        Raises:
            ImageSizeError: If H and W differ from the layer's `size`.
        """
        _check_size(x, self.size)
        if self.pe is not None:
            x = x + self.pe
        if self.axis == 0:
            return self.conv(torch.cat([x, x[:, :, :-1]], 2))
        return self.conv(torch.cat([x, x[:, :, :, :-1]], 3))


class _Attention(Attention2dDownsample):
    """timm's attention without its cache of biases, which would keep old biases after weights are loaded."""

    attention_bias_idxs: Tensor

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """Biases, (heads, queries, keys)."""
        return self.attention_biases[:, self.attention_bias_idxs]


@register_notrace_module
class AttentionDownsample(Downsample):
    """EfficientFormerV2's downsampling: the sum of a 3x3 convolution and an attention, both of stride 2.

    Li et al., Rethinking Vision Transformers for MobileNet Size and Speed, https://arxiv.org/abs/2212.08059.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        size: Height and width of the map.
        attention: Whether there is attention; without it the layer accepts maps of any size.
        norm_kwargs: `eps` and `momentum` of the convolution's BatchNorm.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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
        """Resamples a parameter of such a layer for maps of another size.

        Attention biases whose map is neither of the layer's size nor square are returned unchanged.

        Args:
            name: Name of the parameter in the layer.
            tensor: The parameter.
            size: New height and width of the map.

        Returns:
            The parameter for maps of `size`.
        """
        side = math.isqrt(tensor.shape[-1])
        old = self.size if tensor.shape[-1] == self.size[0] * self.size[1] else (side, side)
        if name != "attn.attention_biases" or old == size or tensor.shape[-1] != old[0] * old[1]:
            return tensor
        table = tensor.float().unflatten(1, old)[None]  # one bias per distance in rows and columns
        return F.interpolate(table, size, mode="bilinear")[0].flatten(1).to(tensor.dtype)

    def set_size(self, size: tuple[int, int]) -> None:
        """Resamples the attention biases for maps of another size.

        Args:
            size: New height and width of the map.
        """
        if self.attn is not None:
            old = self.attn
            fresh = _Attention(old.q.local.in_channels, out_dim=old.out_dim, resolution=size, device="meta")
            biases = self.resampled("attn.attention_biases", old.attention_biases.detach(), size)
            old.resolution, old.resolution2, old.N, old.N2 = fresh.resolution, fresh.resolution2, fresh.N, fresh.N2
            old.attention_biases = nn.Parameter(biases, old.attention_biases.requires_grad)
            old.attention_bias_idxs = old._compute_attention_bias_idxs(biases.device)
        self.size = (size[0], size[1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / 2), ceil(W / 2)).

        Raises:
            ImageSizeError: If there is attention, and H and W differ from the layer's `size`.
        """
        out = self.conv(x)
        if self.attn is not None:
            _check_size(x, self.size)
            out = self.attn(x) + out
        return out


def resample_to_fit(state_dict: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Resamples the parameters of a checkpoint that depend on the image size.

    Args:
        state_dict: The checkpoint; changed in place.
        net: The network that will load it.

    Returns:
        `state_dict`.
    """
    for prefix, module in net.named_modules():
        if isinstance(module, PositionAwareCircularConv2d | AttentionDownsample):
            for name, parameter in module.named_parameters():
                key = f"{prefix}.{name}"
                if key in state_dict and state_dict[key].ndim == parameter.ndim:
                    state_dict[key] = module.resampled(name, state_dict[key], module.size)
    return state_dict
