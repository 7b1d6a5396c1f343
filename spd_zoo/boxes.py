"""Boxes of detectors: overlap, decoding of raw predictions, prior boxes, and non-maximum suppression.

Boxes are (x1, y1, x2, y2) unless noted otherwise; `torchvision.ops.box_convert` converts them to centre and size. Every
function also accepts integers, which annotations often are.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

__all__ = [
    "anchor_boxes",
    "as_float",
    "cell_corners",
    "class_nms",
    "complete_iou",
    "expected_distances",
    "labelled_nms",
    "prior_boxes",
    "ssd_decode",
    "ssd_encode",
    "yolov8_predictions",
]


def as_float(boxes: Tensor) -> Tensor:
    """Converts boxes to float32, except float64.

    Args:
        boxes: Of any shape and data type.

    Returns:
        The same values, without a copy if they are float32 or float64 already.
    """
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))


def complete_iou(boxes: Tensor, others: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of pairs of boxes: IoU minus a distance term and an aspect-ratio term.

    Zheng et al., https://arxiv.org/abs/1911.08287. The weight of the aspect-ratio term gets no gradient. Unlike
    torchvision's function this one accepts predicted boxes of zero height, because `eps` is added to heights.

    Args:
        boxes: (..., 4).
        others: (..., 4), broadcast against `boxes`.
        eps: Added to heights and denominators.

    Returns:
        (...), above -2 and at most 1.
    """
    boxes, others = as_float(boxes), as_float(others)
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    other_width, other_height = (others[..., 2:] - others[..., :2]).unbind(-1)
    height, other_height = height + eps, other_height + eps
    overlap = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    iou = intersection / (width * height + other_width * other_height - intersection + eps)
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    between_centres = (others[..., :2] + others[..., 2:] - boxes[..., :2] - boxes[..., 2:]) / 2
    distance = between_centres.square().sum(-1) / (hull.square().sum(-1) + eps)
    shape = 4 / math.pi**2 * (torch.atan(other_width / other_height) - torch.atan(width / height)).square()
    with torch.no_grad():
        weight = shape / (shape - iou + 1 + eps)
    return iou - distance - weight * shape


def cell_corners(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Coordinates of every cell of a feature map.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        device: Device of the result.

    Returns:
        (column, row) of each cell, row by row, (height * width, 2).
    """
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)


def anchor_boxes(raw: Tensor, anchors: Tensor) -> Tensor:
    """Decodes YOLOv5's raw boxes.

    Args:
        raw: Raw predictions, (..., 4).
        anchors: Width and height in cells, (..., 2).

    Returns:
        Centre relative to the cell's corner, and size, in cells, (..., 4).
    """
    p = 2 * raw.sigmoid()
    return torch.cat([p[..., :2] - 0.5, p[..., 2:].square() * anchors], -1)


def expected_distances(sides: Tensor, bins: Tensor) -> Tensor:
    """Decodes YOLOv8's raw boxes.

    Each distance is the mean of a distribution over bins (Li et al., Generalized Focal Loss,
    https://arxiv.org/abs/2006.04388), computed in float32 even under autocast.

    Args:
        sides: Logits of left, top, right and bottom, (..., 4 * number of bins).
        bins: Distance of each bin in cells, any shape.

    Returns:
        Distances from the cell's centre to left, top, right and bottom in cells, (..., 4).
    """
    probabilities = sides.float().unflatten(-1, (4, -1)).softmax(-1)
    device = sides.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        return F.linear(probabilities, bins.float().view(1, -1)).squeeze(-1)


def yolov8_predictions(raw: Sequence[Tensor], strides: Sequence[int], bins: int) -> tuple[Tensor, ...]:
    """Flattens YOLOv8's raw maps of all levels to A anchors, and computes the positions of the anchors.

    Args:
        raw: A map (N, 4 * bins + classes, H, W) for each level.
        strides: Pixels per cell of each level.
        bins: Number of bins of each side.

    Returns:
        Logits of the sides (N, A, 4 * bins), logits of the classes (N, A, classes), centres in cells (A, 2), and pixels
        per cell (A, 1).
    """
    flat = torch.cat([level.float().flatten(2) for level in raw], 2).mT
    sides, logits = flat[..., : 4 * bins], flat[..., 4 * bins :]
    corners = [cell_corners(level.shape[2], level.shape[3], level.device) for level in raw]
    per_cell = [torch.full_like(cells[:, :1], stride) for cells, stride in zip(corners, strides, strict=True)]
    return sides, logits, torch.cat(corners) + 0.5, torch.cat(per_cell)


def prior_boxes(
    maps: Sequence[tuple[int, int]],
    steps: Sequence[int],
    sizes: Sequence[int],
    boxes_per_cell: Sequence[int],
    image_size: tuple[int, int],
) -> Tensor:
    """SSD's prior boxes.

    Liu et al., https://arxiv.org/abs/1512.02325, section 2.2. Steps are fixed numbers of pixels, which need not divide
    the image by the size of the map.

    Args:
        maps: Height and width of each map.
        steps: Pixels between the cells of each map.
        sizes: Side of each map's square prior in pixels, and a last one for the larger square of the last map.
        boxes_per_cell: For each map 4 (two squares, 2:1, 1:2) or 6 (also 3:1 and 1:3).
        image_size: Height and width of the image in pixels.

    Returns:
        Centre and size in fractions of the image, clamped to 0..1, (P, 4), in the order map, row, column, box.
    """
    priors = []
    for i, (height, width) in enumerate(maps):
        size, larger = (side / max(image_size) for side in sizes[i : i + 2])
        shapes = [(size, size), (math.sqrt(size * larger),) * 2]
        for ratio in (2, 3)[: boxes_per_cell[i] // 2 - 1]:
            shapes += [(size * ratio**0.5, size / ratio**0.5), (size / ratio**0.5, size * ratio**0.5)]
        scale = torch.tensor([steps[i] / image_size[1], steps[i] / image_size[0]], dtype=torch.float64)
        centres = (cell_corners(height, width).double() + 0.5) * scale
        pairs = [
            centres[:, None].expand(-1, len(shapes), -1),
            torch.tensor(shapes).double().expand(len(centres), -1, -1),
        ]
        priors.append(torch.cat(pairs, -1).flatten(0, 1))
    return torch.cat(priors).clamp(0, 1).float()


def ssd_encode(boxes: Tensor, priors: Tensor, variances: Sequence[float] = (0.1, 0.2)) -> Tensor:
    """SSD's regression targets.

    Args:
        boxes: Boxes in fractions of the image, (..., 4).
        priors: Prior of each box as centre and size, (..., 4).
        variances: Scales of centres and of sizes.

    Returns:
        (..., 4).
    """
    boxes = box_convert(as_float(boxes), "xyxy", "cxcywh")
    centre = (boxes[..., :2] - priors[..., :2]) / (variances[0] * priors[..., 2:])
    return torch.cat([centre, (boxes[..., 2:] / priors[..., 2:]).log() / variances[1]], -1)


def ssd_decode(codes: Tensor, priors: Tensor, variances: Sequence[float] = (0.1, 0.2)) -> Tensor:
    """Decodes SSD's raw boxes.

    Args:
        codes: Raw predictions, (..., 4).
        priors: Prior of each prediction as centre and size, (..., 4).
        variances: Scales of centres and of sizes.

    Returns:
        Centre and size in fractions of the image, (..., 4), not clipped to it.
    """
    centre = priors[..., :2] + variances[0] * codes[..., :2] * priors[..., 2:]
    return torch.cat([centre, priors[..., 2:] * (variances[1] * codes[..., 2:]).exp()], -1)


def labelled_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each class.

    Args:
        boxes: (D, 4); coordinates may be negative.
        scores: (D,).
        labels: (D,).
        iou_threshold: Boxes whose IoU with a better box of their class is larger are dropped.

    Returns:
        Indices of the boxes that are kept, by descending score.
    """
    if not len(boxes):
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    boxes = as_float(boxes)
    # batched_nms shifts the boxes of each class, which needs non-negative coordinates
    return batched_nms(boxes - boxes.min(), scores.to(boxes.dtype), labels, iou_threshold)


def class_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_candidates: int | None = 30000
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each class; a box may be a detection of several classes.

    Args:
        boxes: (P, 4).
        scores: (P, classes).
        score_threshold: Lower scores, and equal ones, are ignored.
        iou_threshold: Boxes whose IoU with a better box of their class is larger are dropped.
        max_candidates: Largest number of scores considered, over all classes together, best first; None: no limit.

    Returns:
        The row in `boxes` and the class of each detection, both (D,), by descending score.
    """
    flat = scores.flatten()
    candidates = (flat > score_threshold).nonzero().squeeze(1)
    if max_candidates is not None and len(candidates) > max_candidates:
        candidates = candidates[flat[candidates].topk(max_candidates).indices]
    rows, labels = candidates // scores.shape[1], candidates % scores.shape[1]
    keep = labelled_nms(boxes[rows], flat[candidates], labels, iou_threshold)
    return rows[keep], labels[keep]
