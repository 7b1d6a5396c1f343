"""YOLOv8 with space-to-depth instead of strides, and the strided YOLOv8 for comparison.

Idea: No More Strided Convolutions or Pooling, https://arxiv.org/abs/2208.03641, applied to YOLOv8 (Jocher et al.,
2023, no paper): six of its seven strided 3x3 convolutions become space-to-depth and a 1x1 convolution; the first stays.
Written from a verbal specification and recorded outputs; nothing is taken from ultralytics' code (AGPL-3.0).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torchvision.ops import box_convert

from spd_zoo import weights
from spd_zoo.blocks import SPPF, YoloBottleneck, yolo_conv
from spd_zoo.boxes import expected_distances, yolov8_predictions
from spd_zoo.losses import Target, yolov8_loss
from spd_zoo.models._detector import YoloHead, YoloNet, check_num_classes
from spd_zoo.models._registry import register_model
from spd_zoo.spd import space_to_depth

__all__ = ["YOLOv8"]  # register_model adds the entry points

BINS = 16  # per side of a box: its distance is predicted as a distribution over these bins


class SPDConv(ConvNormAct):
    """Space-to-depth, 1x1 convolution, BatchNorm and SiLU; replaces a strided `yolo_conv`."""

    def __init__(self, in_chs: int, out_chs: int, **dd: Any) -> None:
        super().__init__(4 * in_chs, out_chs, 1, act_layer=nn.SiLU, norm_kwargs={"eps": 1e-3, "momentum": 0.03}, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, ceil(H / 2), ceil(W / 2))."""
        return self.bn(self.conv(space_to_depth(x, "rows_first")))


def downsample(in_chs: int, out_chs: int, spd: bool, **dd: Any) -> ConvNormAct:
    """Downsamples by 2: space-to-depth and a 1x1 convolution, or a strided 3x3 convolution."""
    return SPDConv(in_chs, out_chs, **dd) if spd else yolo_conv(in_chs, out_chs, 3, 2, **dd)


class C2f(nn.Module):
    """A 1x1 convolution split in two, a chain of bottlenecks on one half, and a 1x1 convolution over all outputs.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        depth: Number of bottlenecks.
        add: Whether the bottlenecks have shortcuts.
    """

    def __init__(self, in_chs: int, out_chs: int, depth: int, add: bool, **dd: Any) -> None:
        super().__init__()
        chs = out_chs // 2
        self.cv1 = yolo_conv(in_chs, 2 * chs, **dd)
        self.cv2 = yolo_conv((2 + depth) * chs, out_chs, **dd)
        self.m = nn.ModuleList(YoloBottleneck(chs, 3, add, **dd) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H, W)."""
        first, second = self.cv1(x).chunk(2, 1)
        maps = [first, second]
        for block in self.m:
            maps.append(block(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class Neck(nn.Module):
    """Path aggregation: from the coarsest map to the finest and back; each step concatenates an earlier map."""

    def __init__(self, chs: Sequence[int], depth: int, spd: bool, **dd: Any) -> None:
        super().__init__()
        c3, c4, c5 = chs
        self.up = nn.Upsample(scale_factor=2.0)
        self.mix4 = C2f(c5 + c4, c4, depth, add=False, **dd)
        self.out3 = C2f(c4 + c3, c3, depth, add=False, **dd)
        self.down3 = downsample(c3, c3, spd, **dd)
        self.out4 = C2f(c3 + c4, c4, depth, add=False, **dd)
        self.down4 = downsample(c4, c4, spd, **dd)
        self.out5 = C2f(c4 + c5, c5, depth, add=False, **dd)

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 -> maps of the same shapes."""
        mix4 = self.mix4(torch.cat([self.up(p5), p4], 1))
        out3 = self.out3(torch.cat([self.up(mix4), p3], 1))
        out4 = self.out4(torch.cat([self.down3(out3), mix4], 1))
        out5 = self.out5(torch.cat([self.down4(out4), p5], 1))
        return [out3, out4, out5]


class Head(YoloHead):
    """Two branches per map, for the four sides of boxes and for class logits. The attributes have the authors' names.

    Args:
        chs: Channels of the maps.
        strides: Strides of the maps in pixels.
        num_classes: Number of classes.
    """

    def __init__(self, chs: Sequence[int], strides: Sequence[int], num_classes: int, **dd: Any) -> None:
        super().__init__()
        self.chs, self.strides = chs, strides
        width = max(16, chs[0] // 4, 4 * BINS)
        self.cv2: Any = nn.ModuleList(self.branch(c, width, 4 * BINS, dd) for c in chs)  # sides
        self.cv3: Any = nn.ModuleList()  # classes; Any: mypy does not know the attributes of its elements
        self.dfl = nn.Conv2d(BINS, 1, 1, bias=False, **dd).requires_grad_(False)  # distance of each bin, not trained
        self.reset_classes(num_classes, **dd)
        with torch.no_grad():
            self.dfl.weight.copy_(torch.arange(BINS).view(1, BINS, 1, 1))
            for i in range(len(chs)):
                nn.init.ones_(self.cv2.get_parameter(f"{i}.2.bias"))

    @staticmethod
    def branch(in_chs: int, width: int, outputs: int, dd: dict[str, Any]) -> nn.Sequential:
        """Two 3x3 convolutions and a 1x1 one with bias."""
        convs = (yolo_conv(in_chs, width, 3, **dd), yolo_conv(width, width, 3, **dd))
        return nn.Sequential(*convs, nn.Conv2d(width, outputs, 1, **dd))

    def class_width(self, num_classes: int) -> int:
        """Channels inside the class branches, which depend on the number of classes."""
        return max(self.chs[0], min(num_classes, 100))

    def classifiers(self) -> nn.ModuleList:
        """The last convolution of every class branch."""
        return nn.ModuleList(branch[-1] for branch in self.cv3)

    def reset_classes(self, num_classes: int, **dd: Any) -> None:
        """Replaces the last convolutions of the class branches, or the whole branches if their width changes.

        Args:
            num_classes: New number of classes.
            dd: `device` and `dtype` of the new parameters.

        Raises:
            ValueError: If `num_classes` is less than one.
        """
        check_num_classes(num_classes)
        width = self.class_width(num_classes)
        if not len(self.cv3) or self.cv3[0][-1].in_channels != width:
            self.cv3 = nn.ModuleList(self.branch(c, width, num_classes, dd) for c in self.chs)
        for branch, stride in zip(self.cv3, self.strides, strict=True):
            branch[-1] = nn.Conv2d(width, num_classes, 1, **dd)
            nn.init.constant_(branch[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))
        self.train(self.training)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(N, chs, H, W) of each level -> (N, 4 * BINS + classes, H, W)."""
        branches = zip(self.cv2, self.cv3, maps, strict=True)
        return [torch.cat([sides(x), classes(x)], 1) for sides, classes, x in branches]


class YOLOv8(YoloNet):
    """YOLOv8: raw maps (N, 64 + classes, H / s, W / s) for each stride s; 16 bins per side, then class logits.

    Args:
        chs: Channels of the stem and of the stages.
        repeats: Bottlenecks per C2f: in the first and last stage and the neck, and in the two stages between.
        spd: Whether space-to-depth replaces all strides except the first.
        num_classes: Number of classes.
        in_chans: Image channels.
    """

    iou_threshold = 0.7
    neck_type: type[nn.Module] = Neck
    head: Head

    def __init__(
        self,
        chs: tuple[int, int, int, int, int],
        repeats: tuple[int, int],
        spd: bool,
        num_classes: int = 80,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        outer, inner = repeats
        stem = nn.Sequential(yolo_conv(in_chans, chs[0], 3, 2, **dd))
        stages = nn.Sequential()
        for in_chs, out_chs, depth in zip(chs, chs[1:], (outer, inner, inner, outer), strict=False):
            down, mix = downsample(in_chs, out_chs, spd, **dd), C2f(out_chs, out_chs, depth, add=True, **dd)
            stages.append(stage := nn.Sequential(down, mix))
        stage.append(SPPF(chs[4], **dd))
        fused = chs[-len(self.strides) :]
        neck = self.neck_type(fused, outer, spd, **dd)
        head = Head(fused, self.strides, num_classes, **dd)
        super().__init__(stem, stages, neck, head, chs, num_classes, in_chans)

    def num_classes_of(self, outputs: int) -> int:
        """The number of classes of a network whose first class layer has `outputs` output channels."""
        return outputs

    def decode(self, raw: list[Tensor], image_size: tuple[int, int] | None = None) -> Tensor:
        """Raw maps -> (N, boxes, 4 + classes): centre and size in input pixels, class probabilities.

        Boxes are ordered by level, row and column.
        """
        sides, logits, centres, stride = yolov8_predictions(raw, self.strides, BINS)
        distances = expected_distances(sides, self.head.dfl.weight)
        corners = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], -1)
        return torch.cat([box_convert(corners, "xyxy", "cxcywh") * stride, logits.sigmoid()], -1)

    def loss(
        self, raw: list[Tensor], targets: list[Target], image_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms `box`, `class` and `dfl`; see `DetectionNet.loss` for the arguments."""
        return yolov8_loss(raw, targets, self.strides, self.head.dfl.weight)


BACKBONE_LAYERS = {  # the authors' layer number -> our module
    0: "stem.0",
    1: "stages.0.0",
    2: "stages.0.1",
    3: "stages.1.0",
    4: "stages.1.1",
    5: "stages.2.0",
    6: "stages.2.1",
    7: "stages.3.0",
    8: "stages.3.1",
    9: "stages.3.2",
}
_LAYERS = BACKBONE_LAYERS | {
    12: "neck.mix4",
    15: "neck.out3",
    16: "neck.down3",
    18: "neck.out4",
    19: "neck.down4",
    21: "neck.out5",
    22: "head",
}


def rename_layers(state_dict: dict[str, Tensor], model: YOLOv8, layers: dict[int, str]) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay.

    The width of the class branches depends on the number of classes. If it differs, the network keeps its own,
    untrained branches.

    Args:
        state_dict: Tensors under the authors' keys or ours.
        model: The network that will load them.
        layers: The authors' layer number -> our module.
    """
    numbered = (r"^model\.(\d+)\.", lambda match: f"{layers.get(int(match[1]), match[0])}.")
    state_dict = weights.rename(state_dict, (numbered, (r"^head\.dfl\.conv\.", "head.dfl.")))
    last = state_dict.get("head.cv3.0.2.weight")
    if last is not None and last.ndim == 4 and last.shape[0] != model.num_classes:
        width, own_width = last.shape[1], model.head.class_width(model.num_classes)
        if width == model.head.class_width(last.shape[0]) != own_width:
            own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("head.cv3.")}
            state_dict |= {key: own[key] for key in own.keys() & state_dict.keys() if key.split(".")[3] != "2"}
    return state_dict


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: YOLOv8) -> dict[str, Tensor]:
    """`rename_layers` with the layers of these networks."""
    return rename_layers(state_dict, model, _LAYERS)


default_cfgs = weights.default_cfgs("yolov8_spd", classifier=("head.cv3.0.2", "head.cv3.1.2", "head.cv3.2.2"))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> YOLOv8:
    return weights.build(YOLOv8, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def yolov8n_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, nano, with space-to-depth."""
    model_args = dict(chs=(16, 32, 64, 128, 256), repeats=(1, 2), spd=True)
    return _create("yolov8n_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8s_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, small, with space-to-depth."""
    model_args = dict(chs=(32, 64, 128, 256, 512), repeats=(1, 2), spd=True)
    return _create("yolov8s_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8m_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, medium, with space-to-depth."""
    model_args = dict(chs=(48, 96, 192, 384, 576), repeats=(2, 4), spd=True)
    return _create("yolov8m_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8l_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, large, with space-to-depth."""
    model_args = dict(chs=(64, 128, 256, 512, 512), repeats=(3, 6), spd=True)
    return _create("yolov8l_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8x_spd(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, extra large, with space-to-depth."""
    model_args = dict(chs=(80, 160, 320, 640, 640), repeats=(3, 6), spd=True)
    return _create("yolov8x_spd", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8n(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, nano, strided."""
    model_args = dict(chs=(16, 32, 64, 128, 256), repeats=(1, 2), spd=False)
    return _create("yolov8n", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8s(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, small, strided."""
    model_args = dict(chs=(32, 64, 128, 256, 512), repeats=(1, 2), spd=False)
    return _create("yolov8s", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8m(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, medium, strided."""
    model_args = dict(chs=(48, 96, 192, 384, 576), repeats=(2, 4), spd=False)
    return _create("yolov8m", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8l(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, large, strided."""
    model_args = dict(chs=(64, 128, 256, 512, 512), repeats=(3, 6), spd=False)
    return _create("yolov8l", pretrained, **dict(model_args, **kwargs))


@register_model
def yolov8x(pretrained: bool = False, **kwargs: Any) -> YOLOv8:
    """YOLOv8, extra large, strided."""
    model_args = dict(chs=(80, 160, 320, 640, 640), repeats=(3, 6), spd=False)
    return _create("yolov8x", pretrained, **dict(model_args, **kwargs))
