"""YOLOv5-SPD: YOLOv5 with space-to-depth instead of strides.

Paper: No More Strided Convolutions or Pooling: A New CNN Building Block for Low-Resolution Images and Small Objects,
https://arxiv.org/abs/2208.03641
Original code: https://github.com/LabSAINT/SPD-Conv, folder YOLOv5-SPD (GPL-3.0, based on YOLOv5 v6.0).
Written from a verbal specification and recorded outputs; nothing is taken from that code. As there, and unlike the
paper's text, space-to-depth follows the 3x3 convolution, which therefore runs at full resolution; only in the stem it
comes first.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import SPPF, YoloBottleneck, yolo_conv
from spd_zoo.boxes import anchor_boxes, cell_corners
from spd_zoo.losses import Target, yolov5_loss
from spd_zoo.models._detector import YoloHead, YoloNet, check_num_classes
from spd_zoo.models._registry import register_model
from spd_zoo.spd import SpaceToDepth, adapt_image_channels

__all__ = ["YOLOv5SPD"]  # register_model adds the entry points

ANCHORS = (  # width and height in pixels, three per level
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


def downsample(in_chs: int, out_chs: int, **dd: Any) -> nn.Sequential:
    """A 3x3 convolution and space-to-depth: (N, in_chs, H, W) -> (N, 4 * out_chs, ceil(H / 2), ceil(W / 2))."""
    return nn.Sequential(yolo_conv(in_chs, out_chs, 3, **dd), SpaceToDepth("rows_first"))


class C3(nn.Module):
    """Two parallel 1x1 convolutions, the first followed by bottlenecks, and a 1x1 convolution of both outputs.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        depth: Number of bottlenecks.
        add: Whether the bottlenecks have shortcuts.
    """

    def __init__(self, in_chs: int, out_chs: int, depth: int, add: bool, **dd: Any) -> None:
        super().__init__()
        chs = out_chs // 2
        self.cv1 = yolo_conv(in_chs, chs, **dd)
        self.cv2 = yolo_conv(in_chs, chs, **dd)
        self.cv3 = yolo_conv(2 * chs, out_chs, **dd)
        self.m = nn.Sequential(*(YoloBottleneck(chs, 1, add, **dd) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H, W)."""
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class Neck(nn.Module):
    """Path aggregation: from the coarsest map to the finest and back; each step concatenates an earlier map."""

    def __init__(self, chs: Sequence[int], depth: int, **dd: Any) -> None:
        super().__init__()
        c3, c4, c5 = chs
        self.up = nn.Upsample(scale_factor=2.0)
        self.reduce5 = yolo_conv(c5, c4, **dd)
        self.mix4 = C3(2 * c4, c4, depth, add=False, **dd)
        self.reduce4 = yolo_conv(c4, c3, **dd)
        self.out3 = C3(2 * c3, c3, depth, add=False, **dd)
        self.down3 = downsample(c3, c3, **dd)
        self.out4 = C3(5 * c3, c4, depth, add=False, **dd)
        self.down4 = downsample(c4, c4, **dd)
        self.out5 = C3(5 * c4, c5, depth, add=False, **dd)

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 -> maps of the same shapes."""
        top5 = self.reduce5(p5)
        top4 = self.reduce4(self.mix4(torch.cat([self.up(top5), p4], 1)))
        out3 = self.out3(torch.cat([self.up(top4), p3], 1))
        out4 = self.out4(torch.cat([self.down3(out3), top4], 1))
        out5 = self.out5(torch.cat([self.down4(out4), top5], 1))
        return [out3, out4, out5]


class Head(YoloHead):
    """A 1x1 convolution per map, which outputs box, objectness and class logits for three anchors.

    Args:
        chs: Channels of the maps.
        strides: Strides of the maps in pixels.
        num_classes: Number of classes.
    """

    def __init__(self, chs: Sequence[int], strides: Sequence[int], num_classes: int, **dd: Any) -> None:
        super().__init__()
        self.chs, self.strides = chs, strides
        cells = [
            [(width / stride, height / stride) for width, height in a]
            for a, stride in zip(ANCHORS, strides, strict=True)
        ]
        self.anchors: Tensor  # width and height in cells, (levels, 3, 2)
        self.register_buffer("anchors", torch.tensor(cells, **dd))
        self.m: Any = nn.ModuleList()  # Any: mypy does not know the attributes of its elements
        self.reset_classes(num_classes, **dd)

    def classifiers(self) -> nn.ModuleList:
        """The convolutions."""
        return self.m

    def reset_classes(self, num_classes: int, **dd: Any) -> None:
        """Replaces the convolutions by new, untrained ones.

        Args:
            num_classes: New number of classes.
            dd: `device` and `dtype` of the new parameters.

        Raises:
            ValueError: If `num_classes` is less than one.
        """
        check_num_classes(num_classes)
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * (5 + num_classes), 1, **dd) for c in self.chs)
        with torch.no_grad():
            for conv, stride in zip(self.m, self.strides, strict=True):
                bias = conv.bias.view(3, -1)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (num_classes - 0.99))
        self.train(self.training)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(N, chs, H, W) of each level -> (N, 3, H, W, 5 + classes)."""
        return [conv(x).unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2) for conv, x in zip(self.m, maps, strict=True)]


class YOLOv5SPD(YoloNet):
    """YOLOv5-SPD: raw maps (N, 3, H / s, W / s, 5 + classes) for s = 8, 16, 32; x, y, w, h, objectness, classes.

    Args:
        chs: Channels of the stem and of the stages.
        repeats: Bottlenecks per C3: in the first and last stage and the neck, in the second, and in the third stage.
        num_classes: Number of classes.
        in_chans: Image channels.
    """

    iou_threshold = 0.65
    outputs_before_classes = 5
    head: Head

    def __init__(
        self,
        chs: tuple[int, int, int, int, int],
        repeats: tuple[int, int, int],
        num_classes: int = 80,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        outer, second, third = repeats
        stem = nn.Sequential(SpaceToDepth("rows_first"), yolo_conv(4 * in_chans, chs[0], 3, **dd))
        stages = nn.Sequential()
        for in_chs, out_chs, depth in zip(chs, chs[1:], (outer, second, third, outer), strict=False):
            down, mix = downsample(in_chs, out_chs, **dd), C3(4 * out_chs, out_chs, depth, add=True, **dd)
            stages.append(stage := nn.Sequential(*down, mix))
        stage.append(SPPF(chs[4], **dd))
        neck = Neck(chs[2:], outer, **dd)
        head = Head(chs[2:], self.strides, num_classes, **dd)
        super().__init__(stem, stages, neck, head, chs, num_classes, in_chans)
        self._traits = {"first_conv": None}  # `fit_image_channels` adapts them, timm must not

    def fit_image_channels(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint under the network's own keys, adapted to its image channels phase by phase."""
        stem = state_dict.get("stem.1.conv.weight")
        if stem is not None:
            state_dict["stem.1.conv.weight"] = adapt_image_channels(stem, self.in_chans, order="rows_first")
        return state_dict

    def num_classes_of(self, outputs: int) -> int:
        """The number of classes of a network whose first class layer has `outputs` output channels."""
        return max(outputs // 3 - 5, 1)

    def decode(self, raw: list[Tensor], image_size: tuple[int, int] | None = None) -> Tensor:
        """Raw maps -> (N, boxes, 5 + classes): centre and size in input pixels, objectness, class probabilities.

        Boxes are ordered by level, anchor, row and column. The score of a class is objectness times its probability.
        """
        levels = []
        for level, stride, anchors in zip(raw, self.strides, self.head.anchors.float(), strict=True):
            level = level.float()
            height, width = level.shape[2:4]
            box = anchor_boxes(level[..., :4], anchors[:, None, None])
            corner = cell_corners(height, width, level.device).view(height, width, 2)
            box = torch.cat([box[..., :2] + corner, box[..., 2:]], -1) * stride
            levels.append(torch.cat([box, level[..., 4:].sigmoid()], -1).flatten(1, 3))
        return torch.cat(levels, 1)

    def class_scores(self, decoded: Tensor) -> Tensor:
        """The output of `decode` -> objectness times class probability, (N, boxes, classes)."""
        return decoded[..., 4:5] * decoded[..., 5:]

    def loss(
        self, raw: list[Tensor], targets: list[Target], image_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms `box`, `objectness` and `class`; see `DetectionNet.loss` for the arguments.

        The weight of objectness depends on the longer side of `image_size`; None: the maps' size times their stride.
        """
        return yolov5_loss(raw, targets, self.head.anchors, self.strides, image_size)


_LAYERS = {  # the authors' layer number -> our module
    1: "stages.0.0",
    3: "stages.0.2",
    4: "stages.1.0",
    6: "stages.1.2",
    7: "stages.2.0",
    9: "stages.2.2",
    10: "stages.3.0",
    12: "stages.3.2",
    13: "stages.3.3",
    14: "neck.reduce5",
    17: "neck.mix4",
    18: "neck.reduce4",
    21: "neck.out3",
    22: "neck.down3.0",
    25: "neck.out4",
    26: "neck.down4.0",
    29: "neck.out5",
    30: "head",
}
_RENAMES = (
    (r"^model\.0\.conv\.", "stem.1."),
    (r"^model\.(\d+)\.", lambda match: f"{_LAYERS.get(int(match[1]), match[0])}."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: YOLOv5SPD) -> dict[str, Tensor]:
    """Renames the authors' keys; our own keys stay."""
    return weights.rename(state_dict, _RENAMES)


default_cfgs = weights.default_cfgs("yolov5_spd", classifier=("head.m.0", "head.m.1", "head.m.2"))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> YOLOv5SPD:
    return weights.build(YOLOv5SPD, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def yolov5n_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv5SPD:
    """YOLOv5-SPD, nano."""
    model_args = dict(chs=(16, 32, 64, 128, 256), repeats=(1, 2, 3))
    return _create("yolov5n_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov5s_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv5SPD:
    """YOLOv5-SPD, small."""
    model_args = dict(chs=(32, 64, 128, 256, 512), repeats=(1, 2, 3))
    return _create("yolov5s_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov5m_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv5SPD:
    """YOLOv5-SPD, medium."""
    model_args = dict(chs=(48, 96, 192, 384, 768), repeats=(2, 4, 6))
    return _create("yolov5m_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov5l_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv5SPD:
    """YOLOv5-SPD, large."""
    model_args = dict(chs=(64, 128, 256, 512, 1024), repeats=(3, 6, 9))
    return _create("yolov5l_spd", pretrained, **dict(model_args, **kwargs))
