"""MobileNetV3-large of the BSConv library, plain or trained as BSConv-S, with padding-free downsampling.

Papers: Searching for MobileNetV3, https://arxiv.org/abs/1905.02244; Rethinking Depthwise Separable Convolutions
(BSConv), https://arxiv.org/abs/2003.13549; the padding-free networks: "Lightweight Deep Neural Network Model With
Padding-free Downsampling" (2024), "first set of hyper-parameters".
Original code: https://github.com/zeiss-microscopy/BSConv and its fork in
https://github.com/xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem (both BSD-3-Clause-Clear).

It takes pixel values from 0 to 1: the first layer is a BatchNorm. Unlike in other MobileNetV3s, every unit has a 1x1
expansion, squeeze-and-excitation has a quarter of the channels without rounding, and the classifier reads the pooled
map directly unless there is a full head.
"""

from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import HybridStem, PaddingFreeDownsample, conv_norm_act, orthonormality
from spd_zoo.models._bsconv import fit_image_norm, flat_classifier, init_weights
from spd_zoo.models._classifier import Classifier, HiddenLayerHead, last_of_each_reduction
from spd_zoo.models._registry import register_model

__all__ = ["BSConvMobileNetV3"]  # register_model adds the entry points

# Stages: kernel size, hard-swish, units of (hidden channels, output channels, squeeze-and-excitation).
STAGES = (
    (3, False, ((16, 16, False),)),
    (3, False, ((64, 24, False), (72, 24, False))),
    (5, False, ((72, 40, True), (120, 40, True), (120, 40, True))),
    (
        3,
        True,
        ((240, 80, False), (200, 80, False), (184, 80, False), (184, 80, False), (480, 112, True), (672, 112, True)),
    ),
    (5, True, ((672, 160, True), (960, 160, True), (960, 160, True))),
)


class LinearBottleneck(nn.Module):
    """1x1 convolution, depthwise convolution, squeeze-and-excitation, 1x1 convolution without activation."""

    def __init__(
        self,
        in_chs: int,
        hidden_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        se: bool,
        act_layer: type[nn.Module],
        pfd: bool,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm_act(in_chs, hidden_chs, act_layer=act_layer, **dd)
        kwargs: dict[str, Any] = {"groups": hidden_chs, "act_layer": act_layer} | dd
        self.conv2: nn.Module
        if stride == 2 and pfd:
            self.conv2 = PaddingFreeDownsample(hidden_chs, hidden_chs, kernel_size, **kwargs)
        else:
            self.conv2 = conv_norm_act(hidden_chs, hidden_chs, kernel_size, stride, **kwargs)
        self.se: nn.Module = nn.Identity()
        if se:
            self.se = SqueezeExcite(hidden_chs, rd_channels=hidden_chs // 4, gate_layer="hard_sigmoid", **dd)
        self.conv3 = conv_norm_act(hidden_chs, out_chs, **dd)
        self.residual = stride == 1 and in_chs == out_chs
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        y = self.drop_path(self.conv3(self.se(self.conv2(self.conv1(x)))))
        return x + y if self.residual else y


class BSConvMobileNetV3(Classifier):
    """A BatchNorm on the image, a stem, five stages of linear bottlenecks, a 1x1 convolution and a head.

    Args:
        small: For images of 32 pixels: the stem and stage 2 have stride 1, and the last map is 1/8 of the image.
        full_head: A hidden layer of 1280 channels before the classifier.
        pfd: Padding-free downsampling and a hybrid stem.
        regularization: Weight of `regularization_loss`; 0.1 for BSConv-S.
    """

    def __init__(
        self,
        small: bool = False,
        full_head: bool = False,
        pfd: bool = False,
        regularization: float = 0.0,
        num_classes: int = 120,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first_stride = 1 if small else 2
        first: nn.Module
        if pfd:
            first = HybridStem(in_chans, 16, first_stride, act_layer=nn.Hardswish, **dd)
        else:
            first = conv_norm_act(in_chans, 16, 3, first_stride, act_layer=nn.Hardswish, **dd)
        stages, chs, reductions = nn.Sequential(), 16, []
        depths = [len(units) for _, _, units in STAGES]
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        reduction = first_stride
        for i, (kernel_size, hard_swish, units) in enumerate(STAGES):
            act_layer: type[nn.Module] = nn.Hardswish if hard_swish else nn.ReLU
            stage = nn.Sequential()
            for j, (hidden_chs, out_chs, se) in enumerate(units):
                stride = 1 if i == 0 or j > 0 else first_stride if i == 1 else 2
                drop_path = drop_paths[i][j]
                stage.append(
                    LinearBottleneck(chs, hidden_chs, out_chs, kernel_size, stride, se, act_layer, pfd, drop_path, dd)
                )
                chs, reduction = out_chs, reduction * stride
            stages.append(stage)
            reductions.append(reduction)
        stages.append(nn.Sequential(conv_norm_act(chs, 960, act_layer=nn.Hardswish, **dd)))
        head = None
        if full_head:
            head = HiddenLayerHead(960, num_classes, 1280, nn.Hardswish, global_pool, drop_rate, bias=False, **dd)
        super().__init__(
            nn.Sequential(nn.BatchNorm2d(in_chans, **dd), first),
            stages,
            last_of_each_reduction([*(units[-1][1] for _, _, units in STAGES), 960], [*reductions, reduction]),
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            head,
            **dd,
        )
        self.regularization = regularization
        self._traits = {"first_conv": None}  # `fit_image_channels` adapts them, timm must not
        init_weights(self)

    def fit_image_channels(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint under the network's own keys, adapted to its image channels."""
        return fit_image_norm(state_dict, self)

    @torch.jit.ignore
    def regularization_loss(self) -> Tensor:
        """The additional loss term of BSConv-S (Rethinking Depthwise Separable Convolutions, section 3.3).

        Returns:
            A scalar: `regularization` times the sum of `orthonormality` over every `conv3`.
        """
        units = [module for module in self.stages.modules() if isinstance(module, LinearBottleneck)]
        return self.regularization * torch.stack([orthonormality(unit.conv3.conv.weight) for unit in units]).sum()


_RENAMES = (  # the authors' keys -> ours
    (r"^backbone\.data_bn\.", "stem.0."),
    (r"^backbone\.init_conv\.", "stem.1."),
    (r"^stem\.1\.stem_1\.", "stem.1.conv."),
    (r"^stem\.1\.stem_1_1\.", "stem.1.branch."),
    (r"^stem\.1\.stem_3\.", "stem.1.fuse."),
    (r"^backbone\.stage(\d)\.unit(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.{int(match[2]) - 1}."),
    (r"\.se_unit\.conv1\.", ".se.conv_reduce."),
    (r"\.se_unit\.conv2\.", ".se.conv_expand."),
    (r"^backbone\.final_conv1\.", "stages.5.0."),
    (r"^backbone\.final_conv2\.conv\.", "head.hidden."),
    (r"^classifier\.conv\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: BSConvMobileNetV3) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay."""
    return flat_classifier(weights.rename(state_dict, _RENAMES))


default_cfgs = weights.default_cfgs("bsconv_mobilenetv3", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BSConvMobileNetV3:
    return weights.build(BSConvMobileNetV3, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_mobilenetv3_large_w1(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large for CIFAR."""
    model_args = dict(small=True)
    return _create("cifar_mobilenetv3_large_w1", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_w1_pfd(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large for CIFAR, with padding-free downsampling and a hybrid stem."""
    model_args = dict(small=True, pfd=True)
    return _create("cifar_mobilenetv3_large_w1_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_w1_bsconvs(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large for CIFAR, a BSConv-S network."""
    model_args = dict(small=True, regularization=0.1)
    return _create("cifar_mobilenetv3_large_w1_bsconvs", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_w1_bsconvs_pfd(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large for CIFAR, a BSConv-S network, with padding-free downsampling and a hybrid stem."""
    model_args = dict(small=True, regularization=0.1, pfd=True)
    return _create("cifar_mobilenetv3_large_w1_bsconvs_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv3_large_w1(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large with a light head."""
    return _create("mobilenetv3_large_w1", pretrained, **kwargs)


@register_model
def mobilenetv3_large_w1_pfd(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large with a light head, with padding-free downsampling and a hybrid stem."""
    model_args = dict(pfd=True)
    return _create("mobilenetv3_large_w1_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv3_large_w1_bsconvs(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large with a light head, a BSConv-S network."""
    model_args = dict(regularization=0.1)
    return _create("mobilenetv3_large_w1_bsconvs", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv3_large_w1_bsconvs_pfd(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large with a light head, a BSConv-S network, with padding-free downsampling and a hybrid stem."""
    model_args = dict(regularization=0.1, pfd=True)
    return _create("mobilenetv3_large_w1_bsconvs_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv3_large_w1_fullhead(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large with a full head."""
    model_args = dict(full_head=True)
    return _create("mobilenetv3_large_w1_fullhead", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv3_large_w1_fullhead_pfd(pretrained: bool = False, **kwargs: Any) -> BSConvMobileNetV3:
    """MobileNetV3-large with a full head, with padding-free downsampling and a hybrid stem."""
    model_args = dict(full_head=True, pfd=True)
    return _create("mobilenetv3_large_w1_fullhead_pfd", pretrained, **dict(model_args, **kwargs))
