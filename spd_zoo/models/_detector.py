"""Base classes of the detectors: raw maps in training and evaluation, and `decode` and `loss` to process them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import get_device_dtype
from torch import Tensor, nn
from torchvision.ops import box_convert

from spd_zoo.blocks import ImageSizeError
from spd_zoo.boxes import MAX_CANDIDATES, above, class_nms
from spd_zoo.losses import Target
from spd_zoo.models._backbone import Backbone
from spd_zoo.spd import is_exporting

__all__ = ["DetectionNet", "ObjectFinder", "YoloHead", "YoloNet", "check_num_classes"]


def check_num_classes(num_classes: int) -> None:
    """Checks the number of classes of a detector.

    Raises:
        ValueError: If it is less than one.
    """
    if num_classes < 1:
        raise ValueError(f"a detector needs at least one class of objects, got num_classes={num_classes}")


class ObjectFinder(nn.Module, ABC):
    """What inference and evaluation ask of a detector, be it a network or an exported file.

    Attributes:
        pretrained_cfg: timm's configuration.
        num_classes: Number of classes.
        in_chans: Image channels.
        channel_order: Order of the image's colour channels.
        keeps_aspect: Whether images keep their aspect ratio and are padded with grey; else they are stretched.
        iou_threshold: IoU threshold of non-maximum suppression in the authors' evaluation.
        evaluation_score: Minimum score in the authors' evaluation.
        evaluation_boxes: Maximum number of detections per image in the authors' evaluation.
        size_multiple: Height and width must be multiples of it; 0: an exported file takes one size only.
        max_detections: Maximum number of detections per image of an exported file; None: no limit.
        holds_all_boxes: Whether that is no less than `evaluation_boxes`.
    """

    pretrained_cfg: dict[str, Any]
    num_classes: int
    in_chans: int
    channel_order = "RGB"
    keeps_aspect = True
    iou_threshold: float
    evaluation_score = 0.001
    evaluation_boxes = 300
    size_multiple = 0
    max_detections: int | None = None
    holds_all_boxes = True

    def check_size(self, height: int, width: int) -> None:
        """Checks the size of an input in pixels.

        Raises:
            ImageSizeError: If a side is not a multiple of `size_multiple`.
        """
        multiple = self.size_multiple
        if multiple and (height % multiple or width % multiple):
            raise ImageSizeError(
                f"height and width must be multiples of {multiple}, got {height}x{width}: resize or pad the images"
            )

    def check_limit(self, max_detections: int | None, name: str) -> None:
        """Checks the number of detections per image that is requested from `name`.

        Raises:
            ValueError: If it is above the limit of an exported file.
        """
        limit = self.max_detections
        if max_detections is not None and limit is not None and max_detections > limit:
            raise ValueError(f"{name} was exported with a limit of {limit} objects, fewer than {max_detections}")

    @abstractmethod
    def detections(
        self,
        raw: Any,
        image_size: tuple[int, int],
        score_threshold: float | Tensor,
        iou_threshold: float | None = None,
        max_detections: int | None = 300,
        max_candidates: int | None = MAX_CANDIDATES,
        agnostic: bool = False,
    ) -> list[dict[str, Tensor]]:
        """What `forward` returned -> for each image `boxes`, `scores` and `labels`; see `DetectionNet.detections`."""


class DetectionNet(Backbone, ObjectFinder):
    """stem -> stages -> neck -> raw predictions, with timm's interface as far as it applies to detectors.

    Raw predictions are a list of maps, or for SSD a pair of tensors. `image_size` is the height and width of the input
    images. SSD needs it and YOLO does not, so code for any detector should pass it.

    Attributes:
        outputs_before_classes: Outputs of each box in a class layer that come before those of the classes.
    """

    outputs_before_classes = 0

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from input to output (stem, stages, neck, head), for layer-wise learning rates.

        Args:
            coarse: One group per stage instead of one per block.

        Returns:
            timm's description of the groups.
        """
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^(?:neck|norm|extras)\."}  # the rest is the head

    @abstractmethod
    def get_classifier(self) -> nn.ModuleList:
        """The layers that output class scores, one per map."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the layers that depend on the number of classes by new, untrained ones.

        Args:
            num_classes: New number of classes.
            global_pool: None; timm's functions hand it on to any network, but detectors pool nothing.

        Raises:
            ValueError: If `num_classes` is less than one, or there is a `global_pool`.
        """
        if global_pool:
            raise ValueError(f"a detector has no global pooling; leave global_pool={global_pool!r} out")
        self.replace_classifier(num_classes)
        self.num_classes = num_classes

    @abstractmethod
    def replace_classifier(self, num_classes: int) -> None:
        """Does what `reset_classifier` does to the layers.

        Raises:
            ValueError: If `num_classes` is less than one.
        """

    @torch.no_grad()
    def reorder_classes(self, order: Sequence[int]) -> None:
        """Reorders the outputs of the classes.

        Args:
            order: For each new class the number of the old one.
        """
        for layer in self.get_classifier():
            for parameter in layer.parameters():
                of_box = parameter.unflatten(0, (-1, self.outputs_before_classes + self.num_classes))
                of_classes = of_box[:, self.outputs_before_classes :]
                of_classes.copy_(of_classes[:, list(order)])

    @abstractmethod
    def num_classes_of(self, outputs: int) -> int:
        """The number of classes of a network whose first class layer has `outputs` output channels."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) -> the input maps of the head, from fine to coarse."""

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
        """The output of `decode` -> the score of every class for every box, (N, boxes, classes)."""
        return decoded[..., 4:]

    def overlap_boxes(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Boxes (P, 4), x1 y1 x2 y2 in input pixels -> the boxes that non-maximum suppression compares."""
        return boxes

    def detections(
        self,
        raw: Any,
        image_size: tuple[int, int],
        score_threshold: float | Tensor,
        iou_threshold: float | None = None,
        max_detections: int | None = 300,
        max_candidates: int | None = MAX_CANDIDATES,
        agnostic: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Decodes raw predictions and applies non-maximum suppression.

        Args:
            raw: Output of `forward`.
            image_size: Height and width of the images.
            score_threshold: Minimum score, exclusive; one for all classes, or one for each (classes,).
            iou_threshold: IoU above which the box with the lower score is dropped; None: the authors' value.
            max_detections: Maximum number of detections per image; None: no limit.
            max_candidates: Maximum number of scores per image that enter suppression; None: no limit.
            agnostic: Whether boxes of different classes suppress each other, too.

        Returns:
            For each image `boxes` (D, 4), x1 y1 x2 y2 in input pixels, `scores` and `labels` (D,), the best score
            first, and `limited`, a scalar: whether `max_detections` or `max_candidates` left some out. Unless
            `agnostic`, a box may occur with several labels. Boxes are not clipped to the image.
        """
        iou_threshold = self.iou_threshold if iou_threshold is None else iou_threshold
        found = []
        decoded = self.decode(raw, image_size)
        for centred, scores in zip(decoded[..., :4], self.class_scores(decoded), strict=True):
            boxes = box_convert(centred, "cxcywh", "xyxy")
            overlap = self.overlap_boxes(boxes, image_size)
            rows, labels = class_nms(overlap, scores, score_threshold, iou_threshold, max_candidates, agnostic)
            limited = max_detections is not None and len(rows) > max_detections
            if max_candidates is not None and scores.numel() > max_candidates:
                limited |= int(above(scores, score_threshold).sum()) > max_candidates
            rows, labels = rows[:max_detections], labels[:max_detections]
            each = {"boxes": boxes[rows], "scores": scores[rows, labels], "labels": labels}
            found.append(each | {"limited": torch.tensor(limited)})
        return found

    @abstractmethod
    def loss(self, raw: Any, targets: list[Target], image_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The terms of the authors' training loss, each a scalar and weighted; the loss is their sum.

        Args:
            raw: Output of `forward`.
            targets: For each image `boxes` (M, 4), x1 y1 x2 y2 in input pixels, and `labels` (M,) from 0, as
                torchvision's detectors take them; M may be 0.
            image_size: Height and width of the images.

        Returns:
            The terms by name.

        Raises:
            ValueError: If the targets are invalid.
        """


class YoloHead(nn.Module, ABC):
    """Turns each map of the neck into a raw map."""

    @abstractmethod
    def classifiers(self) -> nn.ModuleList:
        """The layers that output class scores, one per map."""

    @abstractmethod
    def reset_classes(self, num_classes: int, **dd: Any) -> None:
        """Replaces the layers that depend on the number of classes.

        Args:
            num_classes: New number of classes.
            dd: `device` and `dtype` of the new parameters.

        Raises:
            ValueError: If `num_classes` is less than one.
        """


class YoloNet(DetectionNet):
    """A detector: a stem, four stages, a neck over the last ones, and a head.

    Args:
        stem: The first layers, of stride 2.
        stages: Four stages of stride 2.
        neck: Fuses the outputs of the last stages into as many maps of the same strides.
        head: Turns these maps into raw predictions.
        chs: Output channels of the stem and of the stages.
        num_classes: Number of classes.
        in_chans: Image channels.

    Attributes:
        strides: Strides of the maps in pixels, which are those of the last stages.
    """

    strides: tuple[int, ...] = (8, 16, 32)
    size_multiple = 32

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
        """(N, in_chans, H, W) -> the input maps of the head, one for each of `strides`.

        Raises:
            ImageSizeError: If H and W are not multiples of 32.
        """
        if not is_exporting():
            self.check_size(*x.shape[-2:])
        return self.neck(*self.pyramid(self.stem(x))[-len(self.strides) :])

    def forward_head(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps of `forward_features` -> one raw map per input map."""
        return self.head(maps)

    def get_classifier(self) -> nn.ModuleList:
        """The layers that output class scores, one per map."""
        return self.head.classifiers()

    def replace_classifier(self, num_classes: int) -> None:
        """Does what `reset_classifier` does to the layers.

        Raises:
            ValueError: If `num_classes` is less than one.
        """
        self.head.reset_classes(num_classes, **get_device_dtype(self.head))
