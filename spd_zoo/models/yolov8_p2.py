"""YOLOv8 with a fourth, finer map, of stride 4, for small objects; with strides and with space-to-depth.

P2 is the usual name of a map of stride 4. The strided networks are the variant "P2" of YOLOv8 (Jocher et al., 2023, no
paper). No source has the networks with space-to-depth: as `yolov8n_spd` does, they apply the idea of No More Strided
Convolutions or Pooling, https://arxiv.org/abs/2208.03641, to the same convolutions and to the additional one of the
neck.
Written from a verbal specification and recorded outputs; nothing is taken from ultralytics' code (AGPL-3.0).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.models._registry import register_model
from spd_zoo.models.yolov8_spd import BACKBONE_LAYERS, C2f, YOLOv8, downsample, rename_layers

__all__ = ["YOLOv8P2"]  # register_model adds the entry points


class P2Neck(nn.Module):
    """YOLOv8's path aggregation over four maps: from the coarsest to the finest and back."""

    def __init__(self, chs: Sequence[int], depth: int, spd: bool, **dd: Any) -> None:
        super().__init__()
        c2, c3, c4, c5 = chs
        self.up = nn.Upsample(scale_factor=2.0)
        self.mix4 = C2f(c5 + c4, c4, depth, add=False, **dd)
        self.mix3 = C2f(c4 + c3, c3, depth, add=False, **dd)
        self.out2 = C2f(c3 + c2, c2, depth, add=False, **dd)
        self.down2 = downsample(c2, c2, spd, **dd)
        self.out3 = C2f(c2 + c3, c3, depth, add=False, **dd)
        self.down3 = downsample(c3, c3, spd, **dd)
        self.out4 = C2f(c3 + c4, c4, depth, add=False, **dd)
        self.down4 = downsample(c4, c4, spd, **dd)
        self.out5 = C2f(c4 + c5, c5, depth, add=False, **dd)

    def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor) -> list[Tensor]:
        """Maps of strides 4, 8, 16 and 32 -> maps of the same shapes."""
        mix4 = self.mix4(torch.cat([self.up(p5), p4], 1))
        mix3 = self.mix3(torch.cat([self.up(mix4), p3], 1))
        out2 = self.out2(torch.cat([self.up(mix3), p2], 1))
        out3 = self.out3(torch.cat([self.down2(out2), mix3], 1))
        out4 = self.out4(torch.cat([self.down3(out3), mix4], 1))
        out5 = self.out5(torch.cat([self.down4(out4), p5], 1))
        return [out2, out3, out4, out5]


class YOLOv8P2(YOLOv8):
    """YOLOv8 with maps of strides 4, 8, 16 and 32; `YOLOv8` describes the arguments."""

    strides = (4, 8, 16, 32)
    neck_type = P2Neck


_LAYERS = BACKBONE_LAYERS | {
    12: "neck.mix4",
    15: "neck.mix3",
    18: "neck.out2",
    19: "neck.down2",
    21: "neck.out3",
    22: "neck.down3",
    24: "neck.out4",
    25: "neck.down4",
    27: "neck.out5",
    28: "head",
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: YOLOv8P2) -> dict[str, Tensor]:
    """`rename_layers` with the layers of these networks."""
    return rename_layers(state_dict, model, _LAYERS)


default_cfgs = weights.default_cfgs("yolov8_p2", classifier=tuple(f"head.cv3.{i}.2" for i in range(4)))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> YOLOv8P2:
    return weights.build(YOLOv8P2, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def yolov8n_p2(pretrained: bool = False, **kwargs: Any) -> YOLOv8P2:
    """YOLOv8, nano, strided, with a map of stride 4."""
    model_args = dict(chs=(16, 32, 64, 128, 256), repeats=(1, 2), spd=False)
    return _create("yolov8n_p2", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8s_p2(pretrained: bool = False, **kwargs: Any) -> YOLOv8P2:
    """YOLOv8, small, strided, with a map of stride 4."""
    model_args = dict(chs=(32, 64, 128, 256, 512), repeats=(1, 2), spd=False)
    return _create("yolov8s_p2", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8n_spd_p2(pretrained: bool = False, **kwargs: Any) -> YOLOv8P2:
    """YOLOv8, nano, with space-to-depth and a map of stride 4."""
    model_args = dict(chs=(16, 32, 64, 128, 256), repeats=(1, 2), spd=True)
    return _create("yolov8n_spd_p2", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8s_spd_p2(pretrained: bool = False, **kwargs: Any) -> YOLOv8P2:
    """YOLOv8, small, with space-to-depth and a map of stride 4."""
    model_args = dict(chs=(32, 64, 128, 256, 512), repeats=(1, 2), spd=True)
    return _create("yolov8s_spd_p2", pretrained, **dict(model_args, **kwargs))
