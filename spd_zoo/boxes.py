"""Boxes of detectors: overlap, decoding of raw predictions, prior boxes, and non-maximum suppression.

Boxes are (x1, y1, x2, y2) unless noted otherwise; `torchvision.ops.box_convert` converts them to centre and size. Every
function also accepts integers, which annotations often are.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_area, box_convert, nms

__all__ = [
    "MAX_CANDIDATES",
    "above",
    "anchor_boxes",
    "as_float",
    "cell_corners",
    "class_nms",
    "compared_labels",
    "complete_iou",
    "expected_distances",
    "labelled_nms",
    "mostly_covered",
    "prior_boxes",
    "ssd_decode",
    "ssd_encode",
    "yolov8_predictions",
]

MAX_CANDIDATES = 30_000  # scores of an image that enter non-maximum suppression by default
FEW = 4000  # boxes: up to here comparing every pair is the fastest
PAIRS = 2**20  # compared at a time, which limits memory


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
    """Non-maximum suppression within each class. A box with a coordinate that is not finite is dropped.

    Args:
        boxes: (D, 4); coordinates may be negative.
        scores: (D,).
        labels: (D,).
        iou_threshold: Boxes whose IoU with a better box of their class is larger are dropped.

    Returns:
        Indices of the boxes that are kept, by descending score.
    """
    finite = boxes.isfinite().all(1).nonzero().squeeze(1)
    if not len(finite):
        return finite
    boxes, labels = as_float(boxes[finite]), labels[finite]
    scores = scores[finite].to(boxes.dtype)
    if len(boxes) <= FEW or boxes.device.type != "cpu" or iou_threshold < 0.05:
        # batched_nms shifts the boxes of each class by the largest coordinate times the class. This needs coordinates
        # that are not negative, and float64, which MPS lacks: float32 would round off the pixels of small boxes.
        shifted = boxes if boxes.device.type == "mps" else boxes.double()
        shifted = shifted.clamp(-1e8, 1e8)
        return finite[batched_nms(shifted - shifted.min(), scores.to(shifted.dtype), labels, iou_threshold)]
    kept = []
    for rows in _by_class(labels):
        rows = rows[scores[rows].sort(descending=True, stable=True).indices]
        kept.append(rows[_suppress(boxes[rows], iou_threshold)])
    rows = torch.cat(kept).sort().values
    return finite[rows[scores[rows].sort(descending=True).indices]]


def _by_class(labels: Tensor) -> tuple[Tensor, ...]:
    """The indices of each class, in ascending order."""
    order = labels.sort(stable=True).indices
    return order.split(labels.unique(return_counts=True)[1].tolist())


def _suppress(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression of boxes in descending order of their scores, in about n log(n)^2 steps.

    What is kept of the better half suppresses boxes of the other half, the rest of which is then suppressed by itself.
    """
    if len(boxes) <= FEW:
        return nms(boxes, -torch.arange(len(boxes), dtype=boxes.dtype), iou_threshold)
    half = len(boxes) // 2
    kept = _suppress(boxes[:half], iou_threshold)

    def alike(box: Tensor, other: Tensor) -> Tensor:
        shared = _intersection(box, other)
        return (shared / (box_area(box) + box_area(other) - shared)).double() > iou_threshold

    rows = half + (~_any_near(boxes[half:], boxes[kept], iou_threshold, alike)).nonzero().squeeze(1)
    return torch.cat([kept, rows[_suppress(boxes[rows], iou_threshold)]])


def mostly_covered(boxes: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, share: float) -> Tensor:
    """Which boxes are covered by a single other box of their class, up to a share.

    Args:
        boxes: (D, 4), finite.
        labels: Classes of the boxes, (D,).
        others: (E, 4), finite.
        other_labels: Classes of the others, (E,).
        share: Smallest share of a box's area, above 0, that the other box covers.

    Returns:
        (D,) of bool.
    """

    def covered(box: Tensor, other: Tensor) -> Tensor:
        return _intersection(box, other) >= share * box_area(box)

    boxes, others = as_float(boxes), as_float(others)
    found = torch.zeros(len(boxes), dtype=torch.bool)
    for rows in _by_class(labels):
        found[rows] = _any_near(boxes[rows], others[other_labels == labels[rows[0]]], share, covered)
    return found


def _intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """Areas that pairs of boxes share, (...)."""
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    return sides.clamp(min=0).prod(-1)


def _any_near(boxes: Tensor, others: Tensor, share: float, test: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """For which boxes `test` is true with any of the others.

    The others lie in grids, one for each power of two between their sizes, in the cell of their top left corner. Only
    those of nearby cells are tested, so that time and memory grow with the number of boxes if these are spread out.

    Args:
        boxes: (D, 4), finite.
        others: (E, 4), finite.
        share: `test` is false where the longer side of the other is less than this share of the box's longer side.
        test: Takes pairs (P, 4) and (P, 4), and returns (P,). It is false where the two do not touch.

    Returns:
        (D,) of bool.
    """
    found = torch.zeros(len(boxes), dtype=torch.bool)
    if not len(boxes) or not len(others):
        return found
    size, corner = (boxes[:, 2:] - boxes[:, :2]).amax(1).double(), others[:, :2].double()
    extent = (corner.amax(0) - corner.amin(0)).amax()
    exponents = torch.frexp((others[:, 2:] - others[:, :2]).amax(1)).exponent  # sizes are below 2**exponent
    exponents = exponents.clamp(min=int(torch.frexp(extent).exponent) - 20)  # cells are numbered in 64 bits
    for exponent in exponents.unique().tolist():
        cell, members = 2.0**exponent, (exponents == exponent).nonzero().squeeze(1)
        columns, rows = (corner[members] / cell).floor().unbind(1)
        left, top = columns.min(), rows.min()
        width, height = columns.max() - left + 1, rows.max() - top + 1
        keys, order = ((rows - top) * width + columns - left).long().sort()
        members = members[order]

        asking = (~found & (cell > 0.999 * share * size)).nonzero().squeeze(1)
        low, high = ((boxes[asking, i : i + 2].double() / cell).floor() for i in (0, 2))
        first_column, first_row = (low[:, 0] - 1 - left).clamp(min=0), (low[:, 1] - 1 - top).clamp(min=0)
        last_column, last_row = (high[:, 0] - left).clamp(max=width - 1), (high[:, 1] - top).clamp(max=height - 1)
        heights = torch.where(first_column <= last_column, last_row - first_row + 1, 0).clamp(min=0).long()
        which, offset = _ranges(heights)
        start = ((first_row[which] + offset) * width).long()
        begin = torch.searchsorted(keys, start + first_column[which].long())
        counts = torch.searchsorted(keys, start + last_column[which].long(), right=True) - begin
        blocks = (counts.cumsum(0) // PAIRS).unique_consecutive(return_counts=True)[1].tolist()
        for which_, begin_, counts_ in zip(*(part.split(blocks) for part in (which, begin, counts)), strict=True):
            pair, offset = _ranges(counts_)
            box = asking[which_[pair]]
            found[box[test(boxes[box], others[members[begin_[pair] + offset]])]] = True
    return found


def _ranges(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each index as often as its length says, and the number of each repetition from 0."""
    which = torch.arange(len(lengths)).repeat_interleave(lengths)
    return which, torch.arange(len(which)) - (lengths.cumsum(0) - lengths)[which]


def above(scores: Tensor, score_threshold: float | Tensor) -> Tensor:
    """Which scores (P, classes) are above a threshold for all classes, or for each (classes,): (P, classes)."""
    return scores > (score_threshold.to(scores.device) if isinstance(score_threshold, Tensor) else score_threshold)


def compared_labels(labels: Tensor, agnostic: bool) -> Tensor:
    """The labels (M,) for suppression: boxes of equal ones suppress each other, if `agnostic` all of them."""
    return torch.zeros_like(labels) if agnostic else labels


def class_nms(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float | Tensor,
    iou_threshold: float,
    max_candidates: int | None = MAX_CANDIDATES,
    agnostic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each class; a box may be a detection of several classes.

    Args:
        boxes: (P, 4); one with a coordinate that is not finite is no detection.
        scores: (P, classes).
        score_threshold: Lower scores, and equal ones, are ignored; one for all classes, or one for each (classes,).
        iou_threshold: Boxes whose IoU with a better box of their class is larger are dropped.
        max_candidates: Largest number of scores considered, over all classes together, best first; None: no limit.
        agnostic: Whether better boxes of other classes count, too; then a box is a detection of one class.

    Returns:
        The row in `boxes` and the class of each detection, both (D,), by descending score.
    """
    flat = scores.flatten()
    candidates = above(scores, score_threshold).flatten().nonzero().squeeze(1)
    if max_candidates is not None and len(candidates) > max_candidates:
        candidates = candidates[flat[candidates].topk(max_candidates).indices]
    rows, labels = candidates // scores.shape[1], candidates % scores.shape[1]
    keep = labelled_nms(boxes[rows], flat[candidates], compared_labels(labels, agnostic), iou_threshold)
    return rows[keep], labels[keep]
