"""SSD for small objects: one early stride removed, and a second path at half resolution for large objects.

Paper: Mudassar and Mukhopadhyay, Rethinking Convolutional Feature Extraction for Small Object Detection, BMVC 2019.
Original code: https://github.com/burhanmudassar/small_object_detection (MIT). "S1L0" removes the stride of the stem's
convolution, "S1L2" the first pooling. In a "dual path" network every later layer of the backbone runs twice with the
same weights, at full and at half resolution; the first two heads read the full resolution, the others the half.

As the authors' weights expect, images are BGR with values 0 to 255, minus a mean and not divided by a standard
deviation. Deliberate differences: `num_classes` does not count the background, and images that are too small raise an
error.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import get_device_dtype, to_2tuple
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import ImageSizeError
from spd_zoo.boxes import prior_boxes, ssd_decode
from spd_zoo.losses import Target, ssd_loss
from spd_zoo.models._detector import DetectionNet, check_num_classes
from spd_zoo.models._registry import register_model
from spd_zoo.spd import MaxPool2d, is_exporting

__all__ = ["SSD"]  # register_model adds the entry points

Layers = list[nn.Sequential]  # the stem, then the stages
HEAD_CHS = {"vgg16": (512, 1024, 512, 256, 256, 256), "mobilenetv1": (512, 1024, 512, 256, 256, 128)}
EXTRA_CONVS = {"S": (2, 1), "P": (2, 0), "V": (1, 0)}  # stride and padding of an extra stage's 3x3 convolution


def vgg16(in_chans: int, removed: bool, dd: dict[str, Any]) -> tuple[Layers, list[int], list[int]]:
    """VGG16's stem and stages, the stages' output channels and their total strides.

    A stage starts with a pooling; the last two stages output the maps of the first two heads. The order of layers is
    the authors'.

    Args:
        in_chans: Image channels.
        removed: Whether the first pooling is removed.
        dd: `device` and `dtype` of the parameters.
    """
    first = MaxPool2d(1 if removed else 2)
    pools: list[list[nn.Module]] = [[], [MaxPool2d(2)], [MaxPool2d(2, ceil_mode=True)], [MaxPool2d(2)]]
    widths = ((128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    layers = [nn.Sequential(*convs3x3(in_chans, (64, 64), dd), first)]
    chs = 64
    for pool, stage in zip(pools, widths, strict=True):
        layers.append(nn.Sequential(*pool, *convs3x3(chs, stage, dd)))
        chs = stage[-1]
    dilated = nn.Conv2d(512, 1024, 3, padding=6, dilation=6, **dd)
    last = (
        MaxPool2d(3, 1, 1),
        dilated,
        nn.ReLU(inplace=True),
        nn.Conv2d(1024, 1024, 1, **dd),
        nn.ReLU(inplace=True),
    )
    layers[-1].extend(last)
    return layers, [128, 256, 512, 1024], [2, 4, 8, 16]


def convs3x3(in_chs: int, widths: Sequence[int], dd: dict[str, Any]) -> list[nn.Module]:
    """3x3 convolutions, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(in_chs, width, 3, padding=1, **dd), nn.ReLU(inplace=True)]
        in_chs = width
    return layers


def mobilenetv1(in_chans: int, removed: bool, dd: dict[str, Any]) -> tuple[Layers, list[int], list[int]]:
    """MobileNetV1's stem and stages, the stages' output channels and their total strides.

    Args:
        in_chans: Image channels.
        removed: Whether the stride of the stem is removed.
        dd: `device` and `dtype` of the parameters.
    """
    stem = nn.Conv2d(in_chans, 32, 3, 1 if removed else 2, 1, bias=False, **dd)
    layers, chs = [nn.Sequential(stem, nn.BatchNorm2d(32, **dd), nn.ReLU(inplace=True))], 32
    for width, depth in ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2)):
        stage = nn.Sequential()
        for i in range(depth):
            stage.append(separable(chs, width, 2 if i == 0 and width > 64 else 1, dd))
            chs = width
        layers.append(stage)
    return layers, [64, 128, 256, 512, 1024], [2, 4, 8, 16, 32]


def separable(in_chs: int, out_chs: int, stride: int, dd: dict[str, Any]) -> nn.Sequential:
    """A depthwise 3x3 and a 1x1 convolution, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_chs, in_chs, 3, stride, 1, groups=in_chs, bias=False, **dd),
        nn.BatchNorm2d(in_chs, **dd),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd),
        nn.BatchNorm2d(out_chs, **dd),
        nn.ReLU(inplace=True),
    )


def vgg16_extra(in_chs: int, out_chs: int, extra: str, dd: dict[str, Any]) -> nn.Sequential:
    """A 1x1 convolution to half the channels and a 3x3 convolution as in `EXTRA_CONVS`, each with a ReLU."""
    narrow = nn.Conv2d(in_chs, out_chs // 2, 1, **dd)
    down = nn.Conv2d(out_chs // 2, out_chs, 3, *EXTRA_CONVS[extra], **dd)
    return nn.Sequential(narrow, nn.ReLU(inplace=True), down, nn.ReLU(inplace=True))


def mobilenetv1_extra(in_chs: int, out_chs: int, extra: str, dd: dict[str, Any]) -> nn.Sequential:
    """1x1 convolution, depthwise 3x3 as in `EXTRA_CONVS`, 1x1; each with BatchNorm, then ReLU6, ReLU6 and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd),
        nn.BatchNorm2d(out_chs, **dd),
        nn.ReLU6(inplace=True),
        nn.Conv2d(out_chs, out_chs, 3, *EXTRA_CONVS[extra], groups=out_chs, bias=False, **dd),
        nn.BatchNorm2d(out_chs, **dd),
        nn.ReLU6(inplace=True),
        nn.Conv2d(out_chs, out_chs, 1, bias=False, **dd),
        nn.BatchNorm2d(out_chs, **dd),
        nn.ReLU(inplace=True),
    )


class L2Norm(nn.Module):
    """Divides the channels of every pixel by their Euclidean norm and scales them by a learnt factor per channel.

    Computed in float32 at least: in float16 the norm of large maps overflows.
    """

    def __init__(self, chs: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((chs,), 20.0, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """(N, chs, H, W) -> the same shape."""
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(x32, dim=1, keepdim=True)
        # The authors' norm + 1e-10 would fail: 1e-10 is zero in float16, and torch's ONNX exporter drops it.
        x32 = x32 / torch.where(norm > 0, norm, 1.0)
        return x32.to(x.dtype) * self.weight[:, None, None]


class SSD(DetectionNet):
    """SSD with six heads.

    Raw predictions are (boxes (N, P, 4), logits (N, P, 1 + classes)); the background is the first class.

    Args:
        backbone: "vgg16" or "mobilenetv1".
        extras: The four stages after the backbone, as keys of `EXTRA_CONVS`.
        steps: Stride of each head's map in image pixels.
        sizes: Side of each map's square prior box in pixels, and a last one for the larger box of the last map.
        boxes: Prior boxes per cell of each map: 4 or 6.
        removed: Whether the first stride of the backbone is removed.
        dual: Whether all heads except the first two read a second path at half resolution.
        num_classes: Number of classes, without the background.
        in_chans: Image channels.
    """

    channel_order = "BGR"
    keeps_aspect = False
    outputs_before_classes = 1
    iou_threshold = 0.6
    evaluation_score = 0.01
    evaluation_boxes = 10**6  # no limit

    def __init__(
        self,
        backbone: str,
        extras: str,
        steps: tuple[int, ...],
        sizes: tuple[int, ...],
        boxes: tuple[int, ...],
        removed: bool = False,
        dual: bool = False,
        num_classes: int = 80,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        make_layers, make_extra = {"vgg16": (vgg16, vgg16_extra), "mobilenetv1": (mobilenetv1, mobilenetv1_extra)}[
            backbone
        ]
        (stem, *stages), chs, reductions = make_layers(in_chans, removed, dd)
        feature_info = [
            {"num_chs": c, "reduction": reduction // (2 if removed else 1), "module": f"stages.{i}"}
            for i, (c, reduction) in enumerate(zip(chs, reductions, strict=True))
        ]
        super().__init__(stem, nn.Sequential(*stages), feature_info, num_classes, in_chans)
        self.backbone, self.dual = backbone, dual
        self.steps, self.sizes, self.boxes = steps, sizes, boxes
        head_chs = HEAD_CHS[backbone]
        self.norm = L2Norm(head_chs[0], dd)
        self.extras = nn.ModuleList(
            make_extra(c, out, extra, dd) for c, out, extra in zip(head_chs[1:5], head_chs[2:], extras, strict=True)
        )
        self.loc = nn.ModuleList(nn.Conv2d(c, 4 * b, 3, padding=1, **dd) for c, b in zip(head_chs, boxes, strict=True))
        self.conf = self._new_classifier(num_classes, dd)

    def _new_classifier(self, num_classes: int, dd: dict[str, Any]) -> nn.ModuleList:
        check_num_classes(num_classes)
        heads = zip(HEAD_CHS[self.backbone], self.boxes, strict=True)
        return nn.ModuleList(nn.Conv2d(c, b * (1 + num_classes), 3, padding=1, **dd) for c, b in heads)

    def get_classifier(self) -> nn.ModuleList:
        """The convolutions that output class logits, one per map."""
        return self.conf

    def replace_classifier(self, num_classes: int) -> None:
        """Replaces the convolutions for class logits by new, untrained ones.

        Raises:
            ValueError: If `num_classes` is less than one.
        """
        self.conf = self._new_classifier(num_classes, get_device_dtype(self)).train(self.training)

    def num_classes_of(self, outputs: int) -> int:
        """The number of classes of a network whose first class layer has `outputs` output channels."""
        return max(outputs // self.boxes[0] - 1, 1)

    def map_sizes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of the heads' maps for images of height and width `image_size`.

        Raises:
            ImageSizeError: If the images are too small.
        """
        sizes = self._map_sizes(image_size)
        if min(map(min, sizes)) < 1:
            smallest = next(n for n in itertools.count(1) if min(map(min, self._map_sizes((n, n)))) >= 1)
            raise ImageSizeError(
                f"images must have at least {smallest} pixels a side, got {image_size[0]}x{image_size[1]}: resize them"
            )
        return sizes

    def _map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        size = coarse = output_size(self.stem, size)
        if self.dual:
            coarse = (-(-size[0] // 2), -(-size[1] // 2))
        sizes = []
        for i, stage in enumerate(self.stages):
            size, coarse = output_size(stage, size), output_size(stage, coarse)
            if i >= len(self.stages) - 2:
                sizes.append(size)
        for extra in self.extras:
            coarse = output_size(extra, coarse)
            sizes.append(coarse)
        return sizes

    def priors(self, image_size: tuple[int, int]) -> Tensor:
        """The prior boxes for images of height and width `image_size`, (P, 4): centre and size, as shares of the image.

        Raises:
            ImageSizeError: If the images are too small.
        """
        priors = prior_boxes(self.map_sizes(image_size), self.steps, self.sizes, self.boxes, image_size)
        return priors.to(self.norm.weight.device)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) -> the input maps of the six heads, from fine to coarse.

        Raises:
            ImageSizeError: If the images are too small.
        """
        if not is_exporting():
            self.map_sizes((x.shape[-2], x.shape[-1]))
        x = self.stem(x)
        fine, last = self.pyramid(x)[-2:]
        coarse = self.pyramid(x[..., ::2, ::2])[-1] if self.dual else last
        maps = [self.norm(fine), last]
        for extra in self.extras:
            coarse = extra(coarse)
            maps.append(coarse)
        return maps

    def forward_head(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The maps of `forward_features` -> raw boxes (N, P, 4) and logits (N, P, 1 + classes)."""
        loc, conf = (
            torch.cat([conv(x).permute(0, 2, 3, 1).flatten(1) for conv, x in zip(convs, maps, strict=True)], 1)
            for convs in (self.loc, self.conf)
        )
        return loc.unflatten(1, (-1, 4)), conf.unflatten(1, (-1, 1 + self.num_classes))

    def _priors_of(self, loc: Tensor, image_size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        if image_size is None:
            raise ValueError("SSD's prior boxes depend on the image size: give image_size=(height, width)")
        priors = self.priors(image_size)
        if len(priors) != loc.shape[1]:
            raise ValueError(
                f"there are {loc.shape[1]} raw boxes and, for images of {image_size[0]}x{image_size[1]}, {len(priors)} "
                "prior boxes: give the height and width of the network's input images"
            )
        return priors, image_size

    def decode(self, raw: tuple[Tensor, Tensor], image_size: tuple[int, int] | None = None) -> Tensor:
        """Raw predictions -> (N, P, 4 + classes): centre and size in input pixels, class probabilities.

        Boxes are not clipped to the image. The softmax includes the background, which is then left out.

        Raises:
            ValueError: If `image_size` is None, or not the size of the images.
        """
        loc, logits = raw
        priors, (height, width) = self._priors_of(loc, image_size)
        boxes = ssd_decode(loc.float(), priors) * torch.tensor([width, height] * 2, device=loc.device)
        return torch.cat([boxes, logits.float().softmax(-1)[..., 1:]], -1)

    def overlap_boxes(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Boxes (P, 4) in input pixels -> boxes in a 300x300 image, one pixel larger, as the authors compare them."""
        sides = torch.tensor([image_size[1], image_size[0]] * 2, device=boxes.device)
        return 300 * boxes / sides + torch.tensor([0, 0, 1, 1], device=boxes.device)

    def loss(
        self, raw: tuple[Tensor, Tensor], targets: list[Target], image_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """The terms `location` and `class`; see `DetectionNet.loss` for the arguments. `image_size` is required."""
        priors, image_size = self._priors_of(raw[0], image_size)
        return ssd_loss(*raw, targets, priors, image_size)


def output_size(layers: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the output of successive convolutions and poolings for an input of `size`."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, stride, padding, dilation = (
                to_2tuple(value)[0] for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            )
            rounding = stride - 1 if getattr(layer, "ceil_mode", False) else 0
            height, width = ((n + 2 * padding - dilation * (kernel - 1) - 1 + rounding) // stride + 1 for n in size)
            size = (height, width)
    return size


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: SSD) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay."""
    stem = [f"stem.{j}" for j in range(len(model.stem))] if model.backbone == "vgg16" else ["stem"]
    places = [*stem, *(f"stages.{i}.{j}" for i, stage in enumerate(model.stages) for j, _ in stage.named_children())]
    base = {f"base.{i}": place for i, place in enumerate(places)}
    return weights.rename(
        state_dict,
        (
            (r"^(base\.\d+)\.(?:conv\.)?", lambda match: f"{base.get(match[1], match[1])}."),
            (r"^extras\.(\d+)\.(weight|bias)$", lambda match: f"extras.{_pair(int(match[1]))}.{match[2]}"),  # VGG16's
        ),
    )


def _pair(number: int) -> str:
    """The authors' index of a layer, of which a stage has two, as our index: stage, position in it."""
    return f"{number // 2}.{number % 2 * 2}"


default_cfgs = weights.default_cfgs("ssd_small", classifier=tuple(f"conf.{i}" for i in range(6)))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SSD:
    return weights.build(SSD, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def ssd_vgg16(pretrained: bool = False, **kwargs: Any) -> SSD:
    """SSD with VGG16, the baseline."""
    steps, sizes, boxes = (8, 16, 32, 64, 100, 300), (30, 60, 111, 162, 213, 264, 315), (6, 6, 6, 6, 4, 4)
    model_args = dict(backbone="vgg16", extras="SSVV", steps=steps, sizes=sizes, boxes=boxes)
    return _create("ssd_vgg16", pretrained, **dict(model_args, **kwargs))


@register_model
def ssd_vgg16_s1l2(pretrained: bool = False, **kwargs: Any) -> SSD:
    """SSD with VGG16 without its first pooling."""
    steps, sizes, boxes = (4, 8, 16, 32, 64, 100), (15, 30, 60, 111, 162, 213, 264), (6, 6, 6, 6, 4, 4)
    model_args = dict(backbone="vgg16", removed=True, extras="SSSS", steps=steps, sizes=sizes, boxes=boxes)
    return _create("ssd_vgg16_s1l2", pretrained, **dict(model_args, **kwargs))


@register_model
def ssd_vgg16_s1l2_dualpath(pretrained: bool = False, **kwargs: Any) -> SSD:
    """SSD with VGG16 without its first pooling, dual path."""
    steps, sizes, boxes = (4, 8, 32, 64, 100, 300), (15, 30, 111, 162, 213, 264, 315), (6, 6, 6, 6, 4, 4)
    model_args = dict(backbone="vgg16", removed=True, dual=True, extras="SSVV", steps=steps, sizes=sizes, boxes=boxes)
    return _create("ssd_vgg16_s1l2_dualpath", pretrained, **dict(model_args, **kwargs))


@register_model
def ssd_mobilenetv1(pretrained: bool = False, **kwargs: Any) -> SSD:
    """SSD with MobileNetV1, the baseline."""
    steps, sizes, boxes = (16, 32, 64, 100, 150, 300), (45, 90, 135, 180, 225, 270, 315), (6, 6, 6, 6, 4, 4)
    model_args = dict(backbone="mobilenetv1", extras="SSSS", steps=steps, sizes=sizes, boxes=boxes)
    return _create("ssd_mobilenetv1", pretrained, **dict(model_args, **kwargs))


@register_model
def ssd_mobilenetv1_s1l0(pretrained: bool = False, **kwargs: Any) -> SSD:
    """SSD with MobileNetV1 without the stem's stride."""
    steps, sizes, boxes = (8, 16, 32, 64, 100, 300), (10, 45, 90, 135, 180, 225, 270), (6, 6, 6, 6, 6, 4)
    model_args = dict(backbone="mobilenetv1", removed=True, extras="SSSP", steps=steps, sizes=sizes, boxes=boxes)
    return _create("ssd_mobilenetv1_s1l0", pretrained, **dict(model_args, **kwargs))


@register_model
def ssd_mobilenetv1_s1l0_dualpath(pretrained: bool = False, **kwargs: Any) -> SSD:
    """SSD with MobileNetV1 without the stem's stride, dual path."""
    steps, sizes, boxes = (8, 16, 64, 100, 150, 300), (10, 45, 135, 180, 225, 270, 315), (6, 6, 6, 6, 6, 4)
    model_args = dict(
        backbone="mobilenetv1", removed=True, dual=True, extras="SSSS", steps=steps, sizes=sizes, boxes=boxes
    )
    return _create("ssd_mobilenetv1_s1l0_dualpath", pretrained, **dict(model_args, **kwargs))
