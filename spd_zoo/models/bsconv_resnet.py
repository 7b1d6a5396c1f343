"""CIFAR ResNets and Wide ResNets of the BSConv library, plain or with BSConv-U, with padding-free downsampling.

Papers: Deep Residual Learning, https://arxiv.org/abs/1512.03385; Wide Residual Networks,
https://arxiv.org/abs/1605.07146; Rethinking Depthwise Separable Convolutions (BSConv), https://arxiv.org/abs/2003.13549;
the padding-free networks: "Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024), "first set of
hyper-parameters".
Original code: https://github.com/zeiss-microscopy/BSConv and its fork in
https://github.com/xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem (both BSD-3-Clause-Clear).

They take pixel values from 0 to 1: the first layer is a BatchNorm.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import BatchNormAct2d, DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import BSConvU2d, HybridStem, PaddingFreeDownsample, conv_norm_act
from spd_zoo.models._bsconv import fit_image_norm, flat_classifier, init_weights
from spd_zoo.models._classifier import Classifier, last_of_each_reduction
from spd_zoo.models._registry import register_model

__all__ = ["CifarResNet"]  # register_model adds the entry points


def strided_conv(in_chs: int, out_chs: int, stride: int, pfd: bool, dd: dict[str, Any]) -> nn.Module:
    """The first convolution of a unit, BatchNorm and ReLU."""
    if stride == 2 and pfd:
        return PaddingFreeDownsample(in_chs, out_chs, act_layer=nn.ReLU, project=True, **dd)
    return conv_norm_act(in_chs, out_chs, 3, stride, act_layer=nn.ReLU, **dd)


def separable_projection(in_chs: int, out_chs: int, dd: dict[str, Any]) -> nn.Sequential:
    """A shortcut of stride 2 without padding: depthwise 3x3 convolution and 1x1 convolution, each with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(in_chs, in_chs, 3, 2, groups=in_chs, bias=False, **dd),
        nn.BatchNorm2d(in_chs, **dd),
        nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd),
        nn.BatchNorm2d(out_chs, **dd),
    )


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the sum."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, pfd: bool, drop_path: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = strided_conv(in_chs, out_chs, stride, pfd, dd)
        self.conv2 = conv_norm_act(out_chs, out_chs, 3, **dd)
        self.projection: nn.Module = nn.Identity()
        if stride == 2 and pfd:
            self.projection = separable_projection(in_chs, out_chs, dd)
        elif stride == 2 or in_chs != out_chs:
            self.projection = conv_norm_act(in_chs, out_chs, 1, stride, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        return self.act(self.drop_path(self.conv2(self.conv1(x))) + self.projection(x))


class PreActivationUnit(nn.Module):
    """BatchNorm and ReLU, two 3x3 convolutions, and a shortcut.

    An identity shortcut passes the unit's input on; a projection reads the output of the ReLU. With `separable`, the
    padding-free projection is `separable_projection`, otherwise a convolution and a projected max-pool.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        pfd: bool,
        drop_path: float,
        dd: dict[str, Any],
        separable: bool = False,
    ) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(in_chs, inplace=False, **dd)
        self.conv1 = strided_conv(in_chs, out_chs, stride, pfd, dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.projects = stride == 2 or in_chs != out_chs
        self.projection: nn.Module = nn.Identity()
        if stride == 2 and pfd and separable:
            self.projection = separable_projection(in_chs, out_chs, dd)
        elif stride == 2 and pfd:
            self.projection = PaddingFreeDownsample(in_chs, out_chs, norm=False, project=True, **dd)
        elif self.projects:
            self.projection = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        y = self.bn(x)
        residual = self.drop_path(self.conv2(self.conv1(y)))
        return residual + (self.projection(y) if self.projects else x)


class CifarResNet(Classifier):
    """A BatchNorm on the image, a stem and three stages of units, at strides 1, 2 and 4.

    Args:
        depth: Units of each stage.
        chs: Channels of the three stages; the stem has 16.
        pre_activation: Normalise before the convolutions instead of after them, as Wide ResNets do.
        bsconvu: BSConv-U layers instead of all 3x3 convolutions that are not depthwise.
        pfd: Padding-free downsampling and a hybrid stem.
    """

    def __init__(
        self,
        depth: int,
        chs: Sequence[int] = (16, 32, 64),
        pre_activation: bool = False,
        bsconvu: bool = False,
        pfd: bool = False,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first: nn.Module
        if pfd:
            first = HybridStem(in_chans, 16, residual=True, pre_activation=pre_activation, **dd)
        elif pre_activation:
            first = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
        else:
            first = conv_norm_act(in_chans, 16, 3, act_layer=nn.ReLU, **dd)
        unit: Callable[..., nn.Module] = (
            partial(PreActivationUnit, separable=bsconvu) if pre_activation else ResidualUnit
        )
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, 3 * [depth], stagewise=True)
        stages, in_chs = nn.Sequential(), 16
        for i, out_chs in enumerate(chs):
            stage = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(unit(in_chs, out_chs, stride, pfd, drop_paths[i][j], dd))
                in_chs = out_chs
            stages.append(stage)
        chs, reductions = list(chs), [1, 2, 4]
        if pre_activation:
            stages.append(nn.Sequential(BatchNormAct2d(in_chs, inplace=False, **dd)))
            chs, reductions = [*chs, in_chs], [*reductions, 4]
        super().__init__(
            nn.Sequential(nn.BatchNorm2d(in_chans, **dd), first),
            stages,
            last_of_each_reduction(chs, reductions),
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            **dd,
        )
        self.pre_activation = pre_activation
        self._traits = {"first_conv": None}  # `fit_image_channels` adapts them, timm must not
        init_weights(self)
        if bsconvu:
            use_bsconvu(self)

    def fit_image_channels(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint under the network's own keys, adapted to its image channels."""
        return fit_image_norm(state_dict, self)


def use_bsconvu(net: nn.Module) -> None:
    """Puts a `BSConvU2d` in the place of every 3x3 and 5x5 convolution of one group, freshly initialised, in place."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.kernel_size in ((3, 3), (5, 5)):
                like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
                kernel_size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
                bias = conv.bias is not None
                new = BSConvU2d(conv.in_channels, conv.out_channels, kernel_size, stride, padding, bias, **like)
                setattr(parent, name, new)


_RENAMES = (  # the authors' keys -> ours
    (r"^backbone\.data_bn\.", "stem.0."),
    (r"^backbone\.stage(\d)\.unit(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.{int(match[2]) - 1}."),
    (r"^backbone\.final_activation\.bn\.", "stages.3.0."),
    (r"\.(conv1|projection)\.conv2\.", r".\1.project."),
    (r"^classifier\.conv\.", "head.fc."),
    (r"^backbone\.init_unit\.(?:conv\.)?", "stem.1."),
    (r"^stem\.1\.stem_1\.", "stem.1.conv."),
    (r"^stem\.1\.stem_1_1\.", "stem.1.branch."),
    (r"^stem\.1\.stem_3\.", "stem.1.fuse."),
)
_PLAIN_STEM = ((r"^(stem\.1\.\w+)\.0\.", r"\1.conv."), (r"^(stem\.1\.\w+)\.1\.", r"\1.bn."))
_PRE_ACTIVATION_STEM = (
    (r"^(stem\.1\.conv)\.0\.", r"\1."),
    (r"^(stem\.1\.\w+)\.0\.", r"\1.bn."),
    (r"^(stem\.1\.\w+)\.2\.", r"\1.conv."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: CifarResNet) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay."""
    state_dict = weights.rename(state_dict, _RENAMES)
    state_dict = weights.rename(state_dict, _PRE_ACTIVATION_STEM if model.pre_activation else _PLAIN_STEM)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | BSConvU2d)]
    bare = [(rf"^{re.escape(name)}\.conv\.", f"{name}.") for name in convs]  # the authors wrap every convolution
    return flat_classifier(weights.rename(state_dict, bare))


default_cfgs = weights.default_cfgs("bsconv_resnet", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return weights.build(CifarResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR."""
    model_args = dict(depth=3)
    return _create("cifar_resnet20", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet20_pfd(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR, with padding-free downsampling and a hybrid stem."""
    model_args = dict(depth=3, pfd=True)
    return _create("cifar_resnet20_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet110_bsconvu(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR with BSConv-U."""
    model_args = dict(depth=18, bsconvu=True)
    return _create("cifar_resnet110_bsconvu", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet110_bsconvu_pfd(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR with BSConv-U, padding-free downsampling and a hybrid stem."""
    model_args = dict(depth=18, bsconvu=True, pfd=True)
    return _create("cifar_resnet110_bsconvu_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_wrn40_3(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-40-3 for CIFAR."""
    model_args = dict(depth=6, chs=(48, 96, 192), pre_activation=True)
    return _create("cifar_wrn40_3", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_wrn40_3_pfd(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-40-3 for CIFAR, with padding-free downsampling and a hybrid stem."""
    model_args = dict(depth=6, chs=(48, 96, 192), pre_activation=True, pfd=True)
    return _create("cifar_wrn40_3_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_wrn40_8_bsconvu(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-40-8 for CIFAR with BSConv-U."""
    model_args = dict(depth=6, chs=(128, 256, 512), pre_activation=True, bsconvu=True)
    return _create("cifar_wrn40_8_bsconvu", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_wrn40_8_bsconvu_pfd(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """WRN-40-8 for CIFAR with BSConv-U, padding-free downsampling and a hybrid stem."""
    model_args = dict(depth=6, chs=(128, 256, 512), pre_activation=True, bsconvu=True, pfd=True)
    return _create("cifar_wrn40_8_bsconvu_pfd", pretrained, **dict(model_args, **kwargs))
