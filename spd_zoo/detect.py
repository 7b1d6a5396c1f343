"""Objects in images: images as a detector takes them, and its raw predictions as boxes in the images' own pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from spd_zoo.images import upright
from spd_zoo.models._detector import DetectionNet

__all__ = ["Detections", "Placement", "postprocess", "prepare"]

GREY = 114  # of 255: what YOLO's authors pad with


@dataclass(frozen=True)
class Placement:
    """Where an image lies in what a network sees: input pixels are (pixels - corner) * scale + offset."""

    size: tuple[int, int]  # height and width of the image
    scale: tuple[float, float]  # input pixels per pixel, in x and in y
    offset: tuple[int, int] = (0, 0)  # of the left and of the top side, in input pixels
    corner: tuple[int, int] = (0, 0)  # left and top of a tile in the larger image that boxes go back to

    def to_input(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4), x1 y1 x2 y2 in the image's pixels -> the same in input pixels."""
        scale, offset, corner = (boxes.new_tensor(pair * 2) for pair in (self.scale, self.offset, self.corner))
        return (boxes - corner) * scale + offset

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4), x1 y1 x2 y2 in input pixels -> the same in the image's pixels, clipped to the image."""
        scale, offset, corner = (boxes.new_tensor(pair * 2) for pair in (self.scale, self.offset, self.corner))
        return clip_boxes_to_image((boxes - offset) / scale, self.size) + corner


@dataclass(frozen=True)
class Detections:
    """The objects found in an image, the most certain first."""

    boxes: Tensor  # (M, 4), x1 y1 x2 y2 in pixels of the image
    scores: Tensor  # (M,), 0..1
    labels: Tensor  # (M,), classes from 0

    def __len__(self) -> int:
        return len(self.labels)


def prepare(image: Image.Image, net: DetectionNet, image_size: tuple[int, int]) -> tuple[Tensor, Placement]:
    """An image as the authors of a detector feed it, but always scaled bilinearly, with antialiasing.

    YOLO: proportions kept, grey at the sides, RGB from 0 to 1. SSD: stretched, BGR, less a mean. The colours' mean and
    deviation are those of `net.pretrained_cfg`.

    Args:
        image: Of any mode and size; turned upright if its EXIF says so.
        net: The detector.
        image_size: Height and width of the network's input.

    Returns:
        The input (in_chans, H, W), and where the upright image lies in it.

    Raises:
        ValueError: If the network takes neither grey nor colour images, or the image has 32-bit pixels.
    """
    if net.in_chans not in (1, 3):
        raise ValueError(f"the network takes {net.in_chans} channels; images have 1 or 3")
    image = upright(image, "L" if net.in_chans == 1 else "RGB")
    height, width = image_size
    scaled, offset = (width, height), (0, 0)
    if net.keeps_aspect:
        scale = min(height / image.height, width / image.width)
        scaled = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        offset = (round((width - scaled[0]) / 2 - 0.1), round((height - scaled[1]) / 2 - 0.1))
    placement = Placement((image.height, image.width), (scaled[0] / image.width, scaled[1] / image.height), offset)
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    if scaled != (width, height):
        canvas = Image.new(image.mode, (width, height), (GREY,) * net.in_chans)
        canvas.paste(image, offset)
        image = canvas
    pixels = torch.from_numpy(np.array(image)).reshape(height, width, net.in_chans).permute(2, 0, 1)
    if net.in_chans == 3 and net.channel_order == "BGR":
        pixels = pixels.flip(0)
    mean, std = (_per_channel(net, name) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std, placement


def _per_channel(net: DetectionNet, name: str) -> Tensor:
    """`mean` or `std` of the network's configuration, (in_chans, 1, 1)."""
    values = torch.tensor(net.pretrained_cfg[name])
    return (values if len(values) == net.in_chans else values.mean().expand(net.in_chans))[:, None, None]


def postprocess(
    net: DetectionNet,
    raw: Any,
    placements: Sequence[Placement],
    image_size: tuple[int, int],
    score_threshold: float = 0.25,
    iou_threshold: float | None = None,
    max_detections: int = 300,
) -> list[Detections]:
    """Raw predictions of a batch -> the objects in each image, on the CPU.

    Each class is suppressed by itself, and a box counts for every class whose score is large enough, as the authors
    evaluate. Boxes are clipped to the image.

    Args:
        net: The detector.
        raw: What it gave.
        placements: What `prepare` gave with each input.
        image_size: Height and width of the inputs.
        score_threshold: Scores above it are looked at; evaluation takes 0.001, or 0.01 for SSD.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped; None: the authors' value.
        max_detections: At most so many per image.
    """
    found = net.detections(raw, image_size, score_threshold, iou_threshold, max_detections)
    return [
        Detections(placement.to_original(one["boxes"].cpu()), one["scores"].cpu(), one["labels"].cpu())
        for one, placement in zip(found, placements, strict=True)
    ]
