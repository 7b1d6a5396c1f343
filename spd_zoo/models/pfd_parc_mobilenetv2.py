"""ParC-MobileNetV2, a MobileNetV2 with position-aware circular convolutions, with padding-free downsampling.

Papers: ParC-Net, https://arxiv.org/abs/2203.03952; MobileNetV2, https://arxiv.org/abs/1801.04381; the padding-free
networks: "Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024).
Original code: https://github.com/xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem (this part has no licence).

Deliberate difference: a network can be created for any image size, and its weights are resampled from one to another.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import PositionAwareCircularConv2d, conv_norm_act
from spd_zoo.models._classifier import Classifier
from spd_zoo.models._pfd import Downsampling, block_names, build_stages, depthwise, rename_shared, stem
from spd_zoo.models._registry import register_model

__all__ = ["ParCMobileNetV2"]  # register_model adds the entry points

# For each stage: expansion, output channels, number of units, and how many of the first units are MobileNetV2's.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 3), (6, 64, 4, 2), (6, 96, 3, 2), (6, 160, 3, 2), (6, 320, 1, 1))
STRIDED = (1, 2, 3, 5)  # stages whose first unit has stride 2


class PlainUnit(nn.Module):
    """MobileNetV2's unit: 1x1 convolution if it expands, depthwise 3x3 convolution, 1x1 convolution."""

    def __init__(
        self,
        in_chs: int,
        expansion: int,
        out_chs: int,
        stride: int,
        downsampling: Downsampling,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        chs = in_chs * expansion
        self.branch = nn.Sequential()
        if expansion != 1:
            self.branch.append(conv_norm_act(in_chs, chs, act_layer=nn.ReLU6, **dd))
        self.branch.append(depthwise(chs, 3, stride, downsampling, nn.ReLU6, dd))
        self.branch.append(nn.Conv2d(chs, out_chs, 1, bias=False, **dd))
        self.branch.append(nn.BatchNorm2d(out_chs, **dd))
        self.residual = stride == 1 and in_chs == out_chs
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        y = self.drop_path(self.branch(x))
        return x + y if self.residual else y


class ParCUnit(nn.Module):
    """1x1 convolution, circular convolutions (half of the channels along the height, half along the width), 1x1 one."""

    def __init__(
        self,
        in_chs: int,
        expansion: int,
        out_chs: int,
        size: tuple[int, int],
        position: bool,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        chs = in_chs * expansion
        self.pw_expand = conv_norm_act(in_chs, chs, act_layer=nn.ReLU6, **dd)
        self.parc_h = PositionAwareCircularConv2d(chs // 2, size, 0, position, **dd)
        self.parc_w = PositionAwareCircularConv2d(chs // 2, size, 1, position, **dd)
        self.bn = nn.BatchNorm2d(chs, **dd)
        self.act = nn.ReLU6()
        self.pw_linear = nn.Sequential(nn.Conv2d(chs, out_chs, 1, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd))
        self.residual = in_chs == out_chs
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H, W)."""
        columns, rows = self.pw_expand(x).chunk(2, 1)
        y = self.act(self.bn(torch.cat([self.parc_h(columns), self.parc_w(rows)], 1)))
        y = self.drop_path(self.pw_linear(y))
        return x + y if self.residual else y


class ParCMobileNetV2(Classifier):
    """A stem, seven stages of plain and position-aware units, a 1x1 convolution and a linear classifier.

    Args:
        small: For images of 32 pixels: the stem and stage 2 have stride 1, and the last map is 1/8 of the image.
        hybrid_stem: `HybridStem` instead of a convolution.
        downsampling: "padded", padding-free ("pfd") or `AttentionDownsample` blocks ("attention").
        img_size: Image size in pixels, one number or height and width. Default: 32 with `small`, else 224.
    """

    def __init__(
        self,
        small: bool = False,
        hybrid_stem: bool = False,
        downsampling: Downsampling = "padded",
        num_classes: int = 292,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def unit(i: int, j: int, in_chs: int, stride: int, size: tuple[int, int], drop_path: float) -> nn.Module:
            expansion, out_chs, _, plain = STAGES[i]
            if j < plain:
                return PlainUnit(in_chs, expansion, out_chs, stride, downsampling, drop_path, dd)
            return ParCUnit(in_chs, expansion, out_chs, size, j == plain, drop_path, dd)

        stages, feature_info = build_stages(
            [[out_chs] * depth for _, out_chs, depth, _ in STAGES],
            STRIDED,
            unit,
            in_chs=32,
            head_chs=1280,
            act_layer=nn.ReLU6,
            small=small,
            downsampling=downsampling,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            dd=dd,
        )
        super().__init__(
            nn.Sequential(stem(hybrid_stem, in_chans, 32, 1 if small else 2, nn.ReLU6, None, dd)),
            stages,
            feature_info,
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            **dd,
        )
        init_weights(self)


def init_weights(net: nn.Module) -> None:
    """Initialises as the authors do: Kaiming-normal convolutions (fan-out not divided by groups), normal classifier."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PositionAwareCircularConv2d) and module.pe is not None:
            nn.init.trunc_normal_(module.pe, std=0.02, a=-2, b=2)


_RENAMES = (  # the authors' keys -> ours
    (r"^features\.0\.", "stem.0."),
    (r"\.gcc_H\.(?:gcc_)?", ".parc_h."),
    (r"\.gcc_W\.(?:gcc_)?", ".parc_w."),
    (r"^(stages\.\d+\.\d+(?:\.branch\.\d+|\.pw_expand)?)\.0\.(?=\w+$)", r"\1.conv."),
    (r"^(stages\.\d+\.\d+(?:\.branch\.\d+|\.pw_expand)?)\.1\.(?=\w+$)", r"\1.bn."),
    (r"^classifier\.1\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: ParCMobileNetV2) -> dict[str, Tensor]:
    """Renames the authors' keys and resamples weights for another image size; our own keys stay."""
    units = [(rf"^features\.{i}\.conv\.(?=\d)", f"{name}branch.") for i, name in enumerate(block_names(model), 1)]
    others = [(rf"^features\.{i}\.", name) for i, name in enumerate(block_names(model), 1)]
    return rename_shared(weights.rename(state_dict, (*units, *others, *_RENAMES)), model)


default_cfgs = weights.default_cfgs("pfd_parc_mobilenetv2", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ParCMobileNetV2:
    return weights.build(ParCMobileNetV2, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_parc_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2 for CIFAR."""
    model_args = dict(small=True)
    return _create("cifar_parc_mobilenetv2", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_parc_mobilenetv2_stem(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2 for CIFAR with a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True)
    return _create("cifar_parc_mobilenetv2_stem", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_parc_mobilenetv2_down(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2 for CIFAR with padding-free downsampling."""
    model_args = dict(small=True, downsampling="pfd")
    return _create("cifar_parc_mobilenetv2_down", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_parc_mobilenetv2_pfd(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2 for CIFAR with padding-free downsampling and a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True, downsampling="pfd")
    return _create("cifar_parc_mobilenetv2_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_parc_mobilenetv2_effdown(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2 for CIFAR with EfficientFormerV2's downsampling."""
    model_args = dict(small=True, downsampling="attention")
    return _create("cifar_parc_mobilenetv2_effdown", pretrained, **dict(model_args, **kwargs))


@register_model
def parc_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2."""
    return _create("parc_mobilenetv2", pretrained, **kwargs)


@register_model
def parc_mobilenetv2_pfd(pretrained: bool = False, **kwargs: Any) -> ParCMobileNetV2:
    """ParC-MobileNetV2 with padding-free downsampling and a hybrid stem."""
    model_args = dict(hybrid_stem=True, downsampling="pfd")
    return _create("parc_mobilenetv2_pfd", pretrained, **dict(model_args, **kwargs))
