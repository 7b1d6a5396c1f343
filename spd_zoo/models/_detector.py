"""What every detector of the zoo does alike: raw maps in training and evaluation, `decode` and `loss` beside them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import get_device_dtype
from torch import Tensor, nn
from torchvision.ops import box_convert

from spd_zoo.blocks import ImageSizeError
from spd_zoo.boxes import class_nms
from spd_zoo.losses import Target
from spd_zoo.models._backbone import Backbone
from spd_zoo.spd import is_exporting

__all__ = ["DetectionNet", "YoloHead", "YoloNet", "check_num_classes"]


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError if a detector cannot have so many classes."""
    if num_classes < 1:
        raise ValueError(f"a detector has at least one class of objects, got num_classes={num_classes}")


class DetectionNet(Backbone, ABC):
    """stem -> stages -> maps for the head -> raw predictions, with timm's contract as far as a detector can keep it.

    Raw predictions are a list of maps, or for SSD a pair of tensors. `image_size` is the height and width of the images
    that they belong to: SSD needs it, YOLO takes it from the maps, so code for any detector gives it.

    Attributes:
        channel_order: In what order the network takes the colours of an image.
        keeps_aspect: Whether images are scaled alike in both directions and padded with grey, or stretched.
        iou_threshold: By how much boxes of a class may overlap; the authors' value in evaluation.
    """

    channel_order = "RGB"
    keeps_aspect = True
    iou_threshold: float

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from input to output, for layer-wise learning rates: stem, stages, neck and head."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^(?:neck|norm|extras)\."}  # the rest is the head

    @abstractmethod
    def get_classifier(self) -> nn.ModuleList:
        """The last layers whose outputs are scores of classes, one for each map."""

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """New, untrained layers for `num_classes` classes of objects; all that does not depend on their number stays.

        Raises:
            ValueError: If there is not at least one class.
        """

    @abstractmethod
    def num_classes_of(self, outputs: int) -> int:
        """How many classes of objects a network of this kind has whose first classifier has so many outputs."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) -> the maps that the head reads, from fine to coarse."""

    @abstractmethod
    def forward_head(self, maps: list[Tensor]) -> Any:
        """The maps of `forward_features` -> raw predictions."""

    def forward(self, x: Tensor) -> Any:
        """(N, in_chans, H, W) -> raw predictions, in training and in evaluation.

        Raises:
            ImageSizeError: If the network cannot take images of this size.
        """
        return self.forward_head(self.forward_features(x))

    @abstractmethod
    def decode(self, raw: Any, image_size: tuple[int, int] | None = None) -> Tensor:
        """Raw predictions -> boxes as centre and size in input pixels, and probabilities, (N, boxes, 4 + ...)."""

    def class_scores(self, decoded: Tensor) -> Tensor:
        """What `decode` gives -> the score of every class for every box, (N, boxes, classes)."""
        return decoded[..., 4:]

    def overlap_boxes(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Boxes (P, 4), x1 y1 x2 y2 in input pixels -> those whose overlap decides which ones are dropped."""
        return boxes

    def detections(
        self,
        raw: Any,
        image_size: tuple[int, int],
        score_threshold: float,
        iou_threshold: float | None = None,
        max_detections: int | None = 300,
        max_candidates: int | None = 30000,
    ) -> list[dict[str, Tensor]]:
        """What is found in each image: `boxes` (D, 4), x1 y1 x2 y2 in input pixels, `scores` and `labels` (D,).

        The best score comes first. A box may stand for several classes; boxes are not clipped to the image.

        Args:
            raw: What `forward` gives.
            image_size: Height and width of the images.
            score_threshold: Scores above it are looked at.
            iou_threshold: Boxes that overlap a better one of their class by more are dropped; None: the authors' value.
            max_detections: At most so many per image; None: all.
            max_candidates: At most so many of an image's best scores are looked at; None: all.
        """
        iou_threshold = self.iou_threshold if iou_threshold is None else iou_threshold
        found = []
        decoded = self.decode(raw, image_size)
        for centred, scores in zip(decoded[..., :4], self.class_scores(decoded), strict=True):
            boxes = box_convert(centred, "cxcywh", "xyxy")
            overlap = self.overlap_boxes(boxes, image_size)
            rows, labels = class_nms(overlap, scores, score_threshold, iou_threshold, max_candidates)
            rows, labels = rows[:max_detections], labels[:max_detections]
            found.append({"boxes": boxes[rows], "scores": scores[rows, labels], "labels": labels})
        return found

    @abstractmethod
    def loss(self, raw: Any, targets: list[Target], image_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The terms that the authors' training minimises the sum of, each a scalar, gains included.

        Args:
            raw: What `forward` gives.
            targets: For each image `boxes` (M, 4), x1 y1 x2 y2 in input pixels, and `labels` (M,) from 0, as
                torchvision's detectors take them; M may be 0.
            image_size: Height and width of the images.

        Raises:
            ValueError: If the targets are not what they must be.
        """


class YoloHead(nn.Module, ABC):
    """What makes a raw map out of each of three maps."""

    @abstractmethod
    def classifiers(self) -> nn.ModuleList:
        """The last layers whose outputs are scores of classes, one for each map."""

    @abstractmethod
    def reset_classes(self, num_classes: int, **dd: Any) -> None:
        """New, untrained layers for so many classes, with `device` and `dtype`; raises ValueError without any class."""


class YoloNet(DetectionNet):
    """A detector of three levels, strides 8, 16 and 32: a stem, four stages, a neck over the last three, a head.

    Args:
        stem: The first layers, stride 2.
        stages: Four, each of stride 2.
        neck: What makes the three maps for the head out of the last three stages' maps.
        head: What makes raw predictions out of them.
        chs: Channels of the stem and of the stages.
        num_classes: Classes of objects.
        in_chans: Image channels.
    """

    strides = (8, 16, 32)

    def __init__(
        self,
        stem: nn.Sequential,
        stages: nn.Sequential,
        neck: nn.Module,
        head: YoloHead,
        chs: Sequence[int],
        num_classes: int,
        in_chans: int,
    ) -> None:
        modules = (f"stem.{len(stem) - 1}", *(f"stages.{i}" for i in range(len(stages))))
        feature_info = [
            {"num_chs": c, "reduction": 2 ** (i + 1), "module": module}
            for i, (c, module) in enumerate(zip(chs, modules, strict=True))
        ]
        super().__init__(stem, stages, feature_info, num_classes, in_chans)
        self.neck = neck
        self.head = head

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) -> the maps that the head reads, of strides 8, 16 and 32.

        Raises:
            ImageSizeError: If H and W are not multiples of 32.
        """
        height, width = x.shape[-2:]
        if not is_exporting() and (height % 32 or width % 32):
            raise ImageSizeError(
                f"height and width must be multiples of 32, got {height}x{width}: resize or pad the images"
            )
        return self.neck(*self.pyramid(self.stem(x))[1:])

    def forward_head(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps of `forward_features` -> a raw map for each."""
        return self.head(maps)

    def get_classifier(self) -> nn.ModuleList:
        """The last layers whose outputs are scores of classes, one for each map."""
        return self.head.classifiers()

    def reset_classifier(self, num_classes: int) -> None:
        """New, untrained layers for `num_classes` classes of objects; all that does not depend on their number stays.

        Raises:
            ValueError: If there is not at least one class.
        """
        self.head.reset_classes(num_classes, **get_device_dtype(self.head))
        self.num_classes = num_classes
