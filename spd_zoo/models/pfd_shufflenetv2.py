"""ShuffleNetV2 x1.0 with padding-free downsampling and a hybrid stem.

Paper: ShuffleNet V2, https://arxiv.org/abs/1807.11164; the padding-free networks:
"Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024).
Original code: https://github.com/xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem (this part has no licence).
"""

from typing import Any

import torch
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import AttentionDownsample, HybridStem, PaddingFreeDownsample, conv_norm_act
from spd_zoo.models._classifier import Classifier, last_of_each_reduction
from spd_zoo.models._pfd import Downsampling, halved, native_size, rename_shared
from spd_zoo.models._registry import register_model
from spd_zoo.spd import MaxPool2d

__all__ = ["PFDShuffleNetV2"]  # register_model adds the entry points

STAGES = ((116, 4), (232, 8), (464, 4))  # output channels and units; the first unit has stride 2 (paper, table 5)


def depthwise(chs: int, stride: int, downsampling: Downsampling, dd: dict[str, Any]) -> nn.Module:
    """A depthwise 3x3 convolution; with padding-free downsampling, the pooled input is added before the BatchNorm."""
    if stride == 2 and downsampling == "pfd":
        return PaddingFreeDownsample(chs, chs, groups=chs, norm=False, **dd)
    return nn.Conv2d(chs, chs, 3, stride, 1, groups=chs, bias=False, **dd)


def pointwise(in_chs: int, out_chs: int, dd: dict[str, Any]) -> list[nn.Module]:
    """1x1 convolution, BatchNorm, ReLU."""
    return [nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd), nn.ReLU(inplace=True)]


class Unit(nn.Module):
    """Two branches and a channel shuffle.

    At stride 1 each branch reads half of the channels, and the first is the identity; at stride 2 both read all.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, downsampling: Downsampling, dd: dict[str, Any]) -> None:
        super().__init__()
        half = out_chs // 2
        self.split = stride == 1
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1.extend([depthwise(in_chs, 2, downsampling, dd), nn.BatchNorm2d(in_chs, **dd)])
            self.branch1.extend(pointwise(in_chs, half, dd))
        self.branch2 = nn.Sequential(*pointwise(half if stride == 1 else in_chs, half, dd))
        self.branch2.extend([depthwise(half, stride, downsampling, dd), nn.BatchNorm2d(half, **dd)])
        self.branch2.extend(pointwise(half, half, dd))
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        left, right = x, x
        if self.split:
            left, right = x.chunk(2, 1)
        return self.shuffle(torch.cat([self.branch1(left), self.branch2(right)], 1))


class PFDShuffleNetV2(Classifier):
    """A stem, three stages of units, a 1x1 convolution and a linear classifier.

    Args:
        small: For images of 32 pixels: a stem without stride, and the last map is 1/8 of the image.
        hybrid_stem: `HybridStem` instead of a convolution and a max-pool.
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
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stride = 1 if small else 2
        if hybrid_stem:
            stem = nn.Sequential(HybridStem(in_chans, 24, stride, stride, **dd))
        else:
            conv = conv_norm_act(in_chans, 24, 3, stride, act_layer=nn.ReLU, **dd)
            stem = nn.Sequential(conv, MaxPool2d(3, stride, 1))
        size = native_size(img_size, small)
        size = size if small else halved(halved(size, "padded"), "padded")
        stages, chs, reductions = nn.Sequential(), 24, []
        for i, (out_chs, depth) in enumerate(STAGES):
            stage = nn.Sequential()
            if downsampling == "attention":
                stage.append(AttentionDownsample(chs, out_chs, size, attention=i == 2, **dd))
            else:
                stage.append(Unit(chs, out_chs, 2, downsampling, dd))
            stage.extend(Unit(out_chs, out_chs, 1, downsampling, dd) for _ in range(1, depth))
            stages.append(stage)
            chs, size = out_chs, halved(size, downsampling)
            reductions.append(stride * stride * 2 ** (i + 1))
        stages.append(nn.Sequential(conv_norm_act(chs, 1024, act_layer=nn.ReLU, **dd)))
        feature_info = last_of_each_reduction([*(chs for chs, _ in STAGES), 1024], [*reductions, reductions[-1]])
        stem_info = {"num_chs": 24, "reduction": stride * stride, "module": f"stem.{len(stem) - 1}"}
        super().__init__(stem, stages, [stem_info, *feature_info], num_classes, in_chans, global_pool, drop_rate, **dd)


_RENAMES = (  # the authors' keys -> ours
    (r"^conv1\.|^conv_stem\.", "stem.0."),
    (r"^stage([234])\.", lambda match: f"stages.{int(match[1]) - 2}."),
    (r"^conv5\.", "stages.3.0."),
    (r"^(stages\.3\.0)\.0\.", r"\1.conv."),
    (r"^(stages\.3\.0)\.1\.", r"\1.bn."),
    (r"^(stages\.\d\.0\.branch\d\.\d)\.dwconv\.", r"\1.conv."),
    (r"\.dwconv\.", "."),
    (r"^fc\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PFDShuffleNetV2) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay."""
    return rename_shared(weights.rename(state_dict, _RENAMES), model)


default_cfgs = weights.default_cfgs("pfd_shufflenetv2", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PFDShuffleNetV2:
    return weights.build(PFDShuffleNetV2, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0 for CIFAR."""
    model_args = dict(small=True)
    return _create("cifar_shufflenetv2", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_shufflenetv2_stem(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0 for CIFAR with a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True)
    return _create("cifar_shufflenetv2_stem", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_shufflenetv2_down(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0 for CIFAR with padding-free downsampling."""
    model_args = dict(small=True, downsampling="pfd")
    return _create("cifar_shufflenetv2_down", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_shufflenetv2_pfd(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0 for CIFAR with padding-free downsampling and a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True, downsampling="pfd")
    return _create("cifar_shufflenetv2_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_shufflenetv2_effdown(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0 for CIFAR with EfficientFormerV2's downsampling."""
    model_args = dict(small=True, downsampling="attention")
    return _create("cifar_shufflenetv2_effdown", pretrained, **dict(model_args, **kwargs))


@register_model
def shufflenetv2(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0."""
    return _create("shufflenetv2", pretrained, **kwargs)


@register_model
def shufflenetv2_pfd(pretrained: bool = False, **kwargs: Any) -> PFDShuffleNetV2:
    """ShuffleNetV2 x1.0 with padding-free downsampling and a hybrid stem."""
    model_args = dict(hybrid_stem=True, downsampling="pfd")
    return _create("shufflenetv2_pfd", pretrained, **dict(model_args, **kwargs))
