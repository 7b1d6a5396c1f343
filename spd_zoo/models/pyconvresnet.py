"""PyConvResNet and PyConvHGResNet: residual networks of pyramidal convolutions, strided or with space-to-depth.

Paper: Pyramidal Convolution: Rethinking Convolutional Neural Networks for Visual Recognition,
https://arxiv.org/abs/2006.11538
Original code: https://github.com/iduta/pyconv (MIT); output strides 8 and 16: https://github.com/iduta/pyconvsegnet

The `_spd` networks are ours: every downsampling is space-to-depth and a convolution of stride 1. With the converted
weights of the strided network (`spd_zoo.spd.spd_weight`) they give the same output. Their shortcuts pool with stride 1,
not with a stride as the authors' do, and then mix the four phases of each 2x2 cell (`PhaseMix`). The mix starts by
selecting the phase that the stride would keep.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import PyConv2d
from spd_zoo.models._classifier import Classifier
from spd_zoo.models._registry import register_model
from spd_zoo.spd import MaxPool2d, PhaseMix, SPDConv2d, adapt_image_channels

__all__ = ["PyConvResNet"]  # register_model adds the entry points

# Pyramids of stages 1 to 4: kernel sizes, shares of the output channels, groups (paper, tables 1 and 2).
KERNEL_SIZES = ((3, 5, 7, 9), (3, 5, 7), (3, 5), (3,))
SHARES = ((1 / 4, 1 / 4, 1 / 4, 1 / 4), (1 / 4, 1 / 4, 1 / 2), (1 / 2, 1 / 2), (1,))
GROUPS = ((1, 4, 8, 16), (1, 4, 8), (1, 4), (1,))
GROUPS_HG = ((32, 32, 32, 32), (32, 64, 64), (32, 64), (32,))

# Stride and dilation of stages 1 to 4 for each output stride: the authors' segmentation networks (iduta/pyconvsegnet).
# Every block of a stage has the stage's dilation, including the first block, unlike in timm's ResNet.
STRIDES = {32: (2, 2, 2, 2), 16: (2, 2, 2, 1), 8: (2, 2, 1, 1)}
DILATIONS = {32: (1, 1, 1, 1), 16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


def pyramid(stage: int, hg: bool, in_chs: int, width: int, **conv: Any) -> nn.Module:
    """The pyramid of a stage; in stage 4 its single level as a plain convolution, as in the authors' code."""
    out_chs = [int(width * share) for share in SHARES[stage]]
    levels = PyConv2d(in_chs, out_chs, KERNEL_SIZES[stage], (GROUPS_HG if hg else GROUPS)[stage], **conv)
    return levels if len(levels) > 1 else next(iter(levels.values()))


def shortcut(in_chs: int, out_chs: int, stride: int, spd: bool, dd: dict[str, Any]) -> nn.Sequential:
    """Max-pooling, with `spd` a phase mix, and a 1x1 convolution with BatchNorm if the number of channels changes."""
    pool: nn.Module = MaxPool2d(3, stride, padding=1)
    if spd and stride == 2:
        pool = nn.Sequential(MaxPool2d(3, 1, padding=1), PhaseMix(in_chs, **dd))  # pads odd sizes after pooling
    if in_chs == out_chs:
        return nn.Sequential(pool)
    return nn.Sequential(pool, nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd))


class BasicBlock(nn.Module):
    """A pyramid, then a 1x1 convolution (with `second_pyramid` a second pyramid), plus a shortcut."""

    def __init__(
        self,
        in_chs: int,
        width: int,
        out_chs: int,
        pyramid: Callable[..., nn.Module],
        downsample: nn.Module,
        stride: int,
        drop_path: float,
        dd: dict[str, Any],
        second_pyramid: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = pyramid(in_chs, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = pyramid(width, out_chs) if second_pyramid else nn.Conv2d(width, out_chs, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.drop_path(self.bn2(self.conv2(y)))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1 convolution, pyramid, 1x1 convolution, plus a shortcut."""

    def __init__(
        self,
        in_chs: int,
        width: int,
        out_chs: int,
        pyramid: Callable[..., nn.Module],
        downsample: nn.Module,
        stride: int,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, width, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = pyramid(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, out_chs, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(out_chs, **dd)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.drop_path(self.bn3(self.conv3(y)))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class PyConvResNet(Classifier):
    """A 7x7 stem of stride 2 without max-pooling, and four stages that start with stride 2.

    Args:
        block: `Bottleneck` or `BasicBlock`.
        depths: Number of blocks per stage.
        hg: Whether it is PyConvHGResNet, with twice the width and more groups.
        spd: Whether space-to-depth replaces every stride and strided pooling.
        num_classes: Number of classes.
        in_chans: Image channels.
        global_pool: timm's pooling type.
        output_stride: 32, 16 or 8; below 32 the last stages have dilation instead of strides.
        zero_init_residual: Whether the last BatchNorm of every bottleneck starts at zero.
        weight_init: "skip" keeps torch's initialisation, for weights that are loaded next (as in timm's ViT).
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Drop-path rate of the last block.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `output_stride` is not 8, 16 or 32.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: Sequence[int],
        hg: bool = False,
        spd: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        zero_init_residual: bool = False,
        weight_init: str = "",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if output_stride not in STRIDES:
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        chs, reduction = 64, 2
        conv = SPDConv2d(in_chans, chs, 7, **dd) if spd else nn.Conv2d(in_chans, chs, 7, 2, 3, bias=False, **dd)
        stem = nn.Sequential(conv, nn.BatchNorm2d(chs, **dd), nn.ReLU(inplace=True))
        feature_info = [{"num_chs": chs, "reduction": reduction, "module": "stem.2"}]
        stages = nn.Sequential()
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, depth in enumerate(depths):
            width = (128 if hg else 64) * 2**i
            out_chs = width * (1 if block is not Bottleneck else 2 if hg else 4)
            dilation = DILATIONS[output_stride][i]
            levels = partial(pyramid, i, hg, dilation=dilation, spd=spd, **dd)
            stage = nn.Sequential()
            for j in range(depth):
                stride = STRIDES[output_stride][i] if j == 0 else 1
                down = shortcut(chs, out_chs, stride, spd, dd) if j == 0 else nn.Identity()
                stage.append(block(chs, width, out_chs, levels, down, stride, drop_paths[i][j], dd))
                chs = out_chs
            stages.append(stage)
            reduction *= STRIDES[output_stride][i]
            feature_info.append({"num_chs": chs, "reduction": reduction, "module": f"stages.{i}"})
        super().__init__(stem, stages, feature_info, num_classes, in_chans, global_pool, drop_rate, **dd)
        if spd:
            self._traits = {"first_conv": None}  # `fit_image_channels` adapts them, timm must not
        if weight_init != "skip":
            self.init_weights(zero_init_residual)

    def fit_image_channels(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint under the network's own keys, adapted to its image channels phase by phase."""
        stem = state_dict.get("stem.0.weight")
        if isinstance(self.stem[0], SPDConv2d) and stem is not None:
            state_dict["stem.0.weight"] = adapt_image_channels(stem, self.in_chans)
        return state_dict

    @torch.no_grad()
    def init_weights(self, zero_init_residual: bool = False) -> None:
        """Initialises as the authors do; an SPD convolution starts as the strided convolution that it replaces.

        Args:
            zero_init_residual: Whether the last BatchNorm of every bottleneck starts at zero.
        """
        for module in self.modules():
            if isinstance(module, SPDConv2d):
                strided = module.new_strided_weight()
                nn.init.kaiming_normal_(strided, mode="fan_out", nonlinearity="relu")
                module.weight.copy_(module.from_strided(strided))
            elif isinstance(module, nn.Conv2d) and not isinstance(module, PhaseMix):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


_RENAMES = (  # the authors' keys -> ours
    (r"^conv1\.", "stem.0."),
    (r"^bn1\.", "stem.1."),
    (r"^layer(\d)\.", lambda match: f"stages.{int(match[1]) - 1}."),
    (r"^fc\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PyConvResNet) -> dict[str, Tensor]:
    """Renames the authors' keys, and converts strided kernels for networks with space-to-depth; our own keys stay."""
    state_dict = weights.rename(state_dict, _RENAMES)
    spd_convs = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, SPDConv2d)}
    if all(conv.is_strided_weight(state_dict.get(key)) for key, conv in spd_convs.items()):
        for key, conv in spd_convs.items():
            state_dict[key] = conv.from_strided(state_dict[key])
        for name, module in model.named_modules():
            if isinstance(module, PhaseMix):
                state_dict.setdefault(f"{name}.weight", module.initial_weight())
    return state_dict


default_cfgs = weights.default_cfgs("pyconvresnet", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PyConvResNet:
    kwargs.setdefault("weight_init", "skip" if pretrained else "")
    return weights.build(PyConvResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def pyconvresnet18(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-18 as the authors' constructor builds it: blocks with a pyramid and a 1x1 convolution."""
    model_args = dict(block=BasicBlock, depths=(2, 2, 2, 2))
    return _create("pyconvresnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet34(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-34 as the authors' constructor builds it: blocks with a pyramid and a 1x1 convolution."""
    model_args = dict(block=BasicBlock, depths=(3, 4, 6, 3))
    return _create("pyconvresnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet18_basicblock1(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-18 with blocks of two pyramids, which are commented out in the authors' code."""
    block = partial(BasicBlock, second_pyramid=True)
    model_args = dict(block=block, depths=(2, 2, 2, 2))
    return _create("pyconvresnet18_basicblock1", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet34_basicblock1(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-34 with blocks of two pyramids, which are commented out in the authors' code."""
    block = partial(BasicBlock, second_pyramid=True)
    model_args = dict(block=block, depths=(3, 4, 6, 3))
    return _create("pyconvresnet34_basicblock1", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet50(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-50 of the paper."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 6, 3))
    return _create("pyconvresnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet101(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-101 of the paper."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 23, 3))
    return _create("pyconvresnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet152(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-152 of the paper."""
    model_args = dict(block=Bottleneck, depths=(3, 8, 36, 3))
    return _create("pyconvresnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvhgresnet50(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvHGResNet-50 of the paper."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 6, 3), hg=True)
    return _create("pyconvhgresnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvhgresnet101(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvHGResNet-101 of the paper."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 23, 3), hg=True)
    return _create("pyconvhgresnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvhgresnet152(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvHGResNet-152 of the paper."""
    model_args = dict(block=Bottleneck, depths=(3, 8, 36, 3), hg=True)
    return _create("pyconvhgresnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet50_spd(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-50 with space-to-depth instead of every stride and strided pooling."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 6, 3), spd=True)
    return _create("pyconvresnet50_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet101_spd(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-101 with space-to-depth instead of every stride and strided pooling."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 23, 3), spd=True)
    return _create("pyconvresnet101_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvresnet152_spd(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvResNet-152 with space-to-depth instead of every stride and strided pooling."""
    model_args = dict(block=Bottleneck, depths=(3, 8, 36, 3), spd=True)
    return _create("pyconvresnet152_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvhgresnet50_spd(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvHGResNet-50 with space-to-depth instead of every stride and strided pooling."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 6, 3), hg=True, spd=True)
    return _create("pyconvhgresnet50_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvhgresnet101_spd(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvHGResNet-101 with space-to-depth instead of every stride and strided pooling."""
    model_args = dict(block=Bottleneck, depths=(3, 4, 23, 3), hg=True, spd=True)
    return _create("pyconvhgresnet101_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def pyconvhgresnet152_spd(pretrained: bool = False, **kwargs: Any) -> PyConvResNet:
    """PyConvHGResNet-152 with space-to-depth instead of every stride and strided pooling."""
    model_args = dict(block=Bottleneck, depths=(3, 8, 36, 3), hg=True, spd=True)
    return _create("pyconvhgresnet152_spd", pretrained, **dict(model_args, **kwargs))
