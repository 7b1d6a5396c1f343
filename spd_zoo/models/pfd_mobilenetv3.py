"""MobileNetV3-large with padding-free downsampling and a hybrid stem.

Paper: Searching for MobileNetV3, https://arxiv.org/abs/1905.02244; the padding-free networks:
"Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024), "second set of hyper-parameters".
Original code: https://github.com/xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem (this part has no licence).
The first set has a different MobileNetV3, which is in `bsconv_mobilenetv3`.
"""

from typing import Any

from timm.layers import DropPath, SEModule, make_divisible
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import conv_norm_act
from spd_zoo.models._classifier import Classifier, HiddenLayerHead
from spd_zoo.models._pfd import Downsampling, block_names, build_stages, depthwise, rename_shared, stem
from spd_zoo.models._registry import register_model

__all__ = ["PFDMobileNetV3"]  # register_model adds the entry points

# For each unit of each stage: kernel size, hidden channels, output channels, squeeze-and-excitation, hard-swish
# (paper, table 1).
STAGES = (
    ((3, 16, 16, False, False),),
    ((3, 64, 24, False, False), (3, 72, 24, False, False)),
    ((5, 72, 40, True, False), (5, 120, 40, True, False), (5, 120, 40, True, False)),
    ((3, 240, 80, False, True), (3, 200, 80, False, True), (3, 184, 80, False, True), (3, 184, 80, False, True)),
    ((3, 480, 112, True, True), (3, 672, 112, True, True)),
    ((5, 672, 160, True, True), (5, 960, 160, True, True), (5, 960, 160, True, True)),
)
STRIDED = (1, 2, 3, 5)  # stages whose first unit has stride 2
NORM = {"eps": 1e-3, "momentum": 0.01}


class InvertedResidual(nn.Module):
    """1x1 convolution if it expands, depthwise convolution, squeeze-and-excitation, 1x1 convolution."""

    def __init__(
        self,
        in_chs: int,
        hidden_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        se: bool,
        act_layer: type[nn.Module],
        downsampling: Downsampling,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.block = nn.Sequential()
        if hidden_chs != in_chs:
            self.block.append(conv_norm_act(in_chs, hidden_chs, act_layer=act_layer, norm_kwargs=NORM, **dd))
        self.block.append(depthwise(hidden_chs, kernel_size, stride, downsampling, act_layer, dd, norm_kwargs=NORM))
        if se:
            rd_chs = make_divisible(hidden_chs // 4, 8)
            self.block.append(SEModule(hidden_chs, rd_channels=rd_chs, gate_layer="hard_sigmoid", **dd))
        self.block.append(conv_norm_act(hidden_chs, out_chs, norm_kwargs=NORM, **dd))
        self.residual = stride == 1 and in_chs == out_chs
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        y = self.drop_path(self.block(x))
        return x + y if self.residual else y


class PFDMobileNetV3(Classifier):
    """A stem, six stages of inverted residuals, a 1x1 convolution and a head with a hidden layer.

    Args:
        small: For images of 32 pixels: the stem and stage 2 have stride 1, and the last map is 1/8 of the image.
        hybrid_stem: `HybridStem` instead of a convolution.
        downsampling: "padded", padding-free ("pfd") or `AttentionDownsample` blocks ("attention").
        img_size: Image size in pixels, one number or height and width; used by attention only. Default: 32 if
            `small`, else 224.
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
            kernel_size, hidden_chs, out_chs, se, hard_swish = STAGES[i][j]
            act_layer = nn.Hardswish if hard_swish else nn.ReLU
            return InvertedResidual(
                in_chs, hidden_chs, out_chs, kernel_size, stride, se, act_layer, downsampling, drop_path, dd
            )

        stages, feature_info = build_stages(
            [[out_chs for _, _, out_chs, _, _ in stage] for stage in STAGES],
            STRIDED,
            unit,
            in_chs=16,
            head_chs=960,
            act_layer=nn.Hardswish,
            small=small,
            downsampling=downsampling,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            dd=dd,
            norm_kwargs=NORM,
        )
        super().__init__(
            nn.Sequential(stem(hybrid_stem, in_chans, 16, 1 if small else 2, nn.Hardswish, NORM, dd)),
            stages,
            feature_info,
            num_classes,
            in_chans,
            head=HiddenLayerHead(960, num_classes, 1280, nn.Hardswish, global_pool, drop_rate, **dd),
        )
        init_weights(self)


def init_weights(net: Classifier) -> None:
    """Initialises as the authors do: Kaiming-normal convolutions (fan-out not divided by groups), normal head."""
    linear = [module for module in net.head.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module in linear:
                nn.init.normal_(module.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_RENAMES = (  # the authors' keys -> ours
    (r"^features\.0\.", "stem.0."),
    (r"^(stages\.\d+\.\d+(?:\.block\.\d+)?)\.0\.(?=\w+$)", r"\1.conv."),
    (r"^(stages\.\d+\.\d+(?:\.block\.\d+)?)\.1\.(?=\w+$)", r"\1.bn."),
    (r"^classifier\.0\.", "head.hidden."),
    (r"^classifier\.3\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PFDMobileNetV3) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay."""
    flat = tuple((rf"^features\.{i}\.", name) for i, name in enumerate(block_names(model), 1))
    state_dict = rename_shared(weights.rename(state_dict, (*flat, *_RENAMES)), model)
    hidden = state_dict.get("head.hidden.weight")
    if hidden is not None and hidden.ndim == 2:
        state_dict["head.hidden.weight"] = hidden[:, :, None, None]
    return state_dict


default_cfgs = weights.default_cfgs("pfd_mobilenetv3", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PFDMobileNetV3:
    return weights.build(PFDMobileNetV3, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_mobilenetv3_large(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large for CIFAR."""
    model_args = dict(small=True)
    return _create("cifar_mobilenetv3_large", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_stem(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large for CIFAR with a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True)
    return _create("cifar_mobilenetv3_large_stem", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_down(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large for CIFAR with padding-free downsampling."""
    model_args = dict(small=True, downsampling="pfd")
    return _create("cifar_mobilenetv3_large_down", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_pfd(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large for CIFAR with padding-free downsampling and a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True, downsampling="pfd")
    return _create("cifar_mobilenetv3_large_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_mobilenetv3_large_effdown(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large for CIFAR with EfficientFormerV2's downsampling."""
    model_args = dict(small=True, downsampling="attention")
    return _create("cifar_mobilenetv3_large_effdown", pretrained, **dict(model_args, **kwargs))


@register_model
def mobilenetv3_large(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large."""
    return _create("mobilenetv3_large", pretrained, **kwargs)


@register_model
def mobilenetv3_large_pfd(pretrained: bool = False, **kwargs: Any) -> PFDMobileNetV3:
    """MobileNetV3-large with padding-free downsampling and a hybrid stem."""
    model_args = dict(hybrid_stem=True, downsampling="pfd")
    return _create("mobilenetv3_large_pfd", pretrained, **dict(model_args, **kwargs))
