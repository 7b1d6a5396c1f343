"""SPD-ResNet: ResNet whose strided 3x3 convolutions have stride 1 and are followed by space-to-depth.

Paper: No More Strided Convolutions or Pooling: A New CNN Building Block for Low-Resolution Images and Small Objects,
https://arxiv.org/abs/2208.03641
Original code: https://github.com/LabSAINT/SPD-Conv (MIT). As there, and unlike the paper's text, space-to-depth follows
the 3x3 convolution of a block, the stem's convolution is 1x1, and shortcuts keep their strided 1x1 convolution.

Deliberate differences: any image size works (odd sizes are padded with a row or column of zeros before space-to-depth;
the original fails), and names match the architecture (the authors' `resnet18_spd` command builds `resnet50_spd`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.models._classifier import Classifier
from spd_zoo.models._registry import register_model
from spd_zoo.spd import SpaceToDepth, adapt_image_channels

__all__ = ["SPDResNet"]  # register_model adds the entry points


def residual_basic(in_chs: int, width: int, stride: int, dd: dict[str, Any]) -> nn.Sequential:
    """3x3 (and space-to-depth at stride 2), 3x3; indices as in the authors' `residual_function`."""
    first = nn.Conv2d(in_chs, width, 3, padding=1, bias=False, **dd)
    down = [SpaceToDepth("rows_first")] if stride == 2 else []
    chs = 4 * width if stride == 2 else width
    last = nn.Conv2d(chs, width, 3, padding=1, bias=False, **dd)
    return nn.Sequential(
        first, *down, nn.BatchNorm2d(chs, **dd), nn.ReLU(inplace=True), last, nn.BatchNorm2d(width, **dd)
    )


def residual_bottleneck(in_chs: int, width: int, stride: int, dd: dict[str, Any]) -> nn.Sequential:
    """1x1, 3x3 (and space-to-depth at stride 2), 1x1; indices as in the authors' `residual_function`."""
    reduce = [nn.Conv2d(in_chs, width, 1, bias=False, **dd), nn.BatchNorm2d(width, **dd), nn.ReLU(inplace=True)]
    conv = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
    down = [SpaceToDepth("rows_first")] if stride == 2 else []
    chs = 4 * width if stride == 2 else width
    expand = [nn.Conv2d(chs, 4 * width, 1, bias=False, **dd), nn.BatchNorm2d(4 * width, **dd)]
    return nn.Sequential(*reduce, conv, *down, nn.BatchNorm2d(chs, **dd), nn.ReLU(inplace=True), *expand)


class Block(nn.Module):
    """A residual branch (`residual_basic` or `residual_bottleneck`) plus a shortcut."""

    def __init__(
        self, residual: nn.Sequential, in_chs: int, out_chs: int, stride: int, drop_path: float, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = nn.Sequential()
        if stride != 1 or in_chs != out_chs:
            self.shortcut.append(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False, **dd))
            self.shortcut.append(nn.BatchNorm2d(out_chs, **dd))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / stride), ceil(W / stride))."""
        y = self.drop_path(self.residual(x))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class SPDResNet(Classifier):
    """A space-to-depth stem and four stages of `depths` blocks, at strides 2, 4, 8 and 16.

    Args:
        depths: Number of blocks per stage.
        bottleneck: Whether blocks are bottlenecks, whose output has four times the width, or basic blocks.
        num_classes: Number of classes.
        in_chans: Image channels.
        global_pool: timm's pooling type.
        output_stride: Only 16; the network has no dilated version.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Drop-path rate of the last block.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `output_stride` is not 16.
    """

    def __init__(
        self,
        depths: Sequence[int],
        bottleneck: bool,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if output_stride != 16:
            raise ValueError(f"SPD-ResNet supports output_stride=16 only, got {output_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        chs = 64
        conv = nn.Conv2d(4 * in_chans, chs, 1, bias=False, **dd)
        stem = nn.Sequential(SpaceToDepth("rows_first"), conv, nn.BatchNorm2d(chs, **dd), nn.SiLU(inplace=True))
        stages, feature_info = nn.Sequential(), []
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, depth in enumerate(depths):
            width = 64 * 2**i
            out_chs = 4 * width if bottleneck else width
            stage = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                residual = (residual_bottleneck if bottleneck else residual_basic)(chs, width, stride, dd)
                stage.append(Block(residual, chs, out_chs, stride, drop_paths[i][j], dd))
                chs = out_chs
            stages.append(stage)
            feature_info.append({"num_chs": chs, "reduction": 2 ** (i + 1), "module": f"stages.{i}"})
        super().__init__(stem, stages, feature_info, num_classes, in_chans, global_pool, drop_rate, **dd)
        self._traits = {"first_conv": None}  # `fit_image_channels` adapts them, timm must not

    def fit_image_channels(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint under the network's own keys, adapted to its image channels phase by phase."""
        stem = state_dict.get("stem.1.weight")
        if stem is not None:
            state_dict["stem.1.weight"] = adapt_image_channels(stem, self.in_chans, order="rows_first")
        return state_dict


_RENAMES = (  # the authors' keys -> ours
    (r"^conv1\.conv\.conv\.", "stem.1."),
    (r"^conv1\.conv\.bn\.", "stem.2."),
    (r"^conv([2-5])_x\.", lambda match: f"stages.{int(match[1]) - 2}."),
    (r"\.residual_function\.", ".residual."),
    (r"^fc\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: SPDResNet) -> dict[str, Tensor]:
    """Renames the authors' keys; our own keys stay."""
    return weights.rename(state_dict, _RENAMES)


default_cfgs = weights.default_cfgs("resnet_spd", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SPDResNet:
    return weights.build(SPDResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def resnet18_spd(pretrained: bool = False, **kwargs: Any) -> SPDResNet:
    """SPD-ResNet-18: basic blocks; the authors' command of this name builds `resnet50_spd`."""
    model_args = dict(depths=(2, 2, 2, 2), bottleneck=False)
    return _create("resnet18_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_spd(pretrained: bool = False, **kwargs: Any) -> SPDResNet:
    """SPD-ResNet-34: basic blocks."""
    model_args = dict(depths=(3, 4, 6, 3), bottleneck=False)
    return _create("resnet34_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_spd(pretrained: bool = False, **kwargs: Any) -> SPDResNet:
    """SPD-ResNet-50 of the paper: bottlenecks."""
    model_args = dict(depths=(3, 4, 6, 3), bottleneck=True)
    return _create("resnet50_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_spd(pretrained: bool = False, **kwargs: Any) -> SPDResNet:
    """SPD-ResNet-101: bottlenecks."""
    model_args = dict(depths=(3, 4, 23, 3), bottleneck=True)
    return _create("resnet101_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_spd(pretrained: bool = False, **kwargs: Any) -> SPDResNet:
    """SPD-ResNet-152: bottlenecks."""
    model_args = dict(depths=(3, 8, 36, 3), bottleneck=True)
    return _create("resnet152_spd", pretrained, **dict(model_args, **kwargs))
