"""Boxes of detectors: overlap, what raw predictions mean, prior boxes, and suppression. Functions without a state.

Boxes are (x1, y1, x2, y2) unless said otherwise; `torchvision.ops.box_convert` turns them into centre and size.
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


def complete_iou(boxes: Tensor, others: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of boxes with others, one by one or broadcast: IoU less the distance and the difference in shape.

    Zheng et al., https://arxiv.org/abs/1911.08287, with the weight of the shape a constant for the gradient. Unlike
    torchvision's it takes boxes without height, which predictions can be: heights get `eps`.

    Args:
        boxes: (..., 4).
        others: (..., 4).
        eps: Added to heights and to the denominators.

    Returns:
        (...), above -2 and at most 1.
    """
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
    """(column, row) of every cell of a map, row by row, (height * width, 2)."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)


def anchor_boxes(raw: Tensor, anchors: Tensor) -> Tensor:
    """What YOLOv5's raw box means: centre, from its cell's corner, and size, in cells.

    Args:
        raw: (..., 4).
        anchors: Width and height in cells, (..., 2).
    """
    p = 2 * raw.sigmoid()
    return torch.cat([p[..., :2] - 0.5, p[..., 2:].square() * anchors], -1)


def expected_distances(sides: Tensor, bins: Tensor) -> Tensor:
    """What YOLOv8's raw box means: the distances from a cell's centre to the four sides, in cells.

    The mean of a distribution over bins (Li et al., Generalized Focal Loss, https://arxiv.org/abs/2006.04388), computed
    in full precision also under autocast.

    Args:
        sides: Logits of left, top, right and bottom, (..., 4 * number of bins).
        bins: The distance that each bin stands for, any shape.

    Returns:
        (..., 4).
    """
    probabilities = sides.float().unflatten(-1, (4, -1)).softmax(-1)
    device = sides.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        return F.linear(probabilities, bins.float().view(1, -1)).squeeze(-1)


def yolov8_predictions(raw: Sequence[Tensor], strides: Sequence[int], bins: int) -> tuple[Tensor, ...]:
    """YOLOv8's raw maps, levels and cells joined to A anchors, and where the anchors lie.

    Args:
        raw: A map (N, 4 * bins + classes, H, W) for each level.
        strides: Pixels per cell of each level.
        bins: Bins of each side.

    Returns:
        Logits of the sides (N, A, 4 * bins) and of the classes (N, A, classes), centres in cells (A, 2), and the pixels
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
    """SSD's prior boxes as centre and size in fractions of the image, clamped to 0..1.

    Liu et al., https://arxiv.org/abs/1512.02325, section 2.2, with fixed steps in pixels that need not fit the map.

    Args:
        maps: Height and width of every map.
        steps: Image pixels between the cells of every map.
        sizes: Side of the square prior of every map in pixels, and one more.
        boxes_per_cell: Of every map: 4 (two squares, 2:1, 1:2) or 6 (also 3:1 and 1:3).
        image_size: Height and width of the image.

    Returns:
        (P, 4), rows in the order map, row, column, box.
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
    """SSD's regression targets (..., 4) for boxes in fractions (..., 4) and their priors as centre and size."""
    boxes = box_convert(boxes, "xyxy", "cxcywh")
    centre = (boxes[..., :2] - priors[..., :2]) / (variances[0] * priors[..., 2:])
    return torch.cat([centre, (boxes[..., 2:] / priors[..., 2:]).log() / variances[1]], -1)


def ssd_decode(codes: Tensor, priors: Tensor, variances: Sequence[float] = (0.1, 0.2)) -> Tensor:
    """What SSD's raw boxes mean: centre and size in fractions, (..., 4), not clipped to the image."""
    centre = priors[..., :2] + variances[0] * codes[..., :2] * priors[..., 2:]
    return torch.cat([centre, priors[..., 2:] * (variances[1] * codes[..., 2:]).exp()], -1)


def labelled_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression of each class by itself.

    Args:
        boxes: (D, 4), anywhere: negative corners are fine.
        scores: (D,).
        labels: (D,).
        iou_threshold: Boxes that overlap a better one of their class by more are dropped.

    Returns:
        The places of those that are kept, the best score first.
    """
    if not len(boxes):
        return labels
    return batched_nms(boxes - boxes.min(), scores, labels, iou_threshold)  # it moves boxes, and needs them positive


def class_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_candidates: int | None = 30000
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression of each class by itself; a box may stand for several classes.

    Args:
        boxes: (P, 4).
        scores: (P, classes).
        score_threshold: Scores above it are looked at.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped.
        max_candidates: At most so many of the best scores, over all classes together, are looked at; None: all.

    Returns:
        The row in `boxes` and the class of each detection, both (D,), the best score first.
    """
    flat = scores.flatten()
    candidates = (flat > score_threshold).nonzero().squeeze(1)
    if max_candidates is not None and len(candidates) > max_candidates:
        candidates = candidates[flat[candidates].topk(max_candidates).indices]
    rows, labels = candidates // scores.shape[1], candidates % scores.shape[1]
    keep = labelled_nms(boxes[rows], flat[candidates], labels, iou_threshold)
    return rows[keep], labels[keep]
