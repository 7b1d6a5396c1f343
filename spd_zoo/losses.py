"""Losses of detectors, computed from raw predictions and targets: one weighted scalar per term.

The authors' training minimises the sum of the terms.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from spd_zoo.boxes import anchor_boxes, as_float, complete_iou, expected_distances, ssd_encode, yolov8_predictions

__all__ = [
    "Target",
    "check_targets",
    "ignored_regions",
    "ssd_loss",
    "yolov5_loss",
    "yolov5_matches",
    "yolov8_loss",
    "yolov8_matches",
]


class _Objects(TypedDict):
    boxes: Tensor
    labels: Tensor


class Target(_Objects, total=False):
    """The objects of an image, and what is neither object nor background.

    Attributes:
        boxes: (M, 4), x1 y1 x2 y2 in pixels of the network's input.
        labels: (M,), classes from 0.
        ignored: (K, 4), boxes in which nothing is taken for background: crowds, difficult objects, regions to ignore.
            Optional.
        ignored_labels: (K,), the classes that are no background there; -1 for all. Optional: all.
    """

    ignored: Tensor
    ignored_labels: Tensor


def check_targets(
    targets: Sequence[Target], batch: int, num_classes: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Checks the targets of a batch and converts them to tensors.

    Args:
        targets: The objects of each image.
        batch: Number of images.
        num_classes: Number of classes.
        device: Device of the result.

    Returns:
        The boxes (M, 4), float32, and labels (M,), int64, of each image.

    Raises:
        ValueError: If there are no images, targets and images differ in number, or a target has wrong shapes, an
            unknown class, or a box that is not finite or has no width or height; or one of its regions to ignore is
            wrong.
    """
    if not batch:
        raise ValueError("a batch without images has no loss; leave it out")
    if len(targets) != batch:
        raise ValueError(f"there are {batch} images and {len(targets)} targets: give one for each image")
    checked = []
    for i, target in enumerate(targets):
        if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys():
            raise ValueError(f"target {i} must be a dict with boxes (M, 4) and labels (M,), got {_described(target)}")
        boxes, labels = torch.as_tensor(target["boxes"]), torch.as_tensor(target["labels"])
        if boxes.numel() == labels.numel() == 0:
            boxes, labels = boxes.reshape(0, 4), labels.reshape(0).long()
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"target {i} must have boxes (M, 4) and integer labels (M,), got {list(boxes.shape)} and "
                f"{labels.dtype} {list(labels.shape)}"
            )
        _check_ignored(i, target, num_classes)
        checked.append((boxes.to(device, torch.float32), labels.to(device, torch.long)))
    every_box, every_label = (torch.cat(tensors) for tensors in zip(*checked, strict=True))
    if len(every_box):  # checked once for the whole batch, because every read value waits for the GPU
        usable = every_box.isfinite().all(1) & (every_box[:, 2:] > every_box[:, :2]).all(1)
        known = (every_label >= 0) & (every_label < num_classes)
        if not bool((usable & known).all()):
            at = int((~(usable & known)).nonzero()[0])
            if not known[at]:
                raise ValueError(f"labels must be 0..{num_classes - 1}, got {int(every_label[at])}")
            raise ValueError(
                f"boxes must be finite, x1 y1 x2 y2 with x2 > x1 and y2 > y1, got {every_box[at].tolist()}: "
                "leave out boxes without width or height"
            )
    return checked


def _check_ignored(i: int, target: Target, num_classes: int) -> None:
    """Checks what the target of image `i` says about regions to ignore."""
    wanted = f"target {i} must have ignored boxes (K, 4) of finite numbers"
    if target.get("ignored", ()) is None:
        raise ValueError(f"{wanted}, got None: leave the key out")
    boxes, labels = torch.as_tensor(target.get("ignored", ())), target.get("ignored_labels")
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(
            f"target {i} must have one of ignored_labels for each of its {len(boxes)} ignored boxes, got {len(labels)}"
        )
    if not boxes.numel():
        return
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not bool(boxes.isfinite().all()):
        raise ValueError(f"{wanted}, got {boxes.tolist()}")
    if labels is not None and not all(-1 <= label < num_classes for label in torch.as_tensor(labels).tolist()):
        raise ValueError(
            f"target {i} must have ignored_labels 0..{num_classes - 1}, or -1 for all classes, got "
            f"{torch.as_tensor(labels).tolist()}"
        )


def ignored_regions(target: Target, device: torch.device) -> tuple[Tensor, Tensor]:
    """The regions of an image in which nothing is background.

    Args:
        target: What the image shows.
        device: Device of the result.

    Returns:
        Boxes (K, 4), float32, and their classes (K,), int64, with -1 for all.
    """
    boxes = torch.as_tensor(target.get("ignored", torch.zeros(0, 4))).reshape(-1, 4)
    labels = torch.as_tensor(target.get("ignored_labels", torch.full((len(boxes),), -1)))
    return boxes.to(device, torch.float32), labels.to(device, torch.long)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether each of the points (P, 2) is in each of the boxes (K, 4), as (P, K)."""
    return ((points[:, None] >= boxes[:, :2]) & (points[:, None] <= boxes[:, 2:])).all(-1)


def _described(target: object) -> str:
    return f"a dict with {', '.join(map(str, target)) or 'nothing'}" if isinstance(target, dict) else repr(type(target))


def _last_writer(cells: Tensor, count: int) -> Tensor:
    """For each of `count` cells the last position at which it occurs in `cells` (K,), or -1."""
    writers = torch.full((count,), -1, device=cells.device)
    return writers.scatter_reduce(0, cells, torch.arange(len(cells), device=cells.device), "amax")


# YOLOv5


def yolov5_matches(
    height: int, width: int, anchors: Tensor, boxes: Tensor, images: Tensor, threshold: float = 4.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Assigns objects to the cells and anchors of one level.

    An object is assigned to every anchor whose sides differ from its own by a factor below `threshold`, in the cell of
    its centre and in the nearest neighbours of that cell along x and along y.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        anchors: Width and height in cells, (3, 2).
        boxes: Centre and size in cells, (T, 4).
        images: Index of each object's image, (T,).
        threshold: Upper bound of the ratio of sides.

    Returns:
        Image, anchor, row, column and object of each match, all (K,), ordered by cell (centre, left, above, right,
        below), anchor and object. Objects and cells may occur several times or never.
    """
    boxes = as_float(boxes)
    ratio = boxes[None, :, 2:] / anchors[:, None]  # (3, T, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < threshold
    centre = boxes[:, :2]
    from_far_side = torch.tensor([width, height], device=boxes.device) - centre
    near = (centre.frac() < 0.5) & (centre > 1)
    far = (from_far_side.frac() < 0.5) & (from_far_side > 1)
    slots = torch.stack([torch.ones_like(near[:, 0]), near[:, 0], near[:, 1], far[:, 0], far[:, 1]])  # (5, T)
    slot, anchor, found = (slots[:, None] & fits).nonzero().unbind(1)
    steps = torch.tensor([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]], device=boxes.device)
    column, row = (centre[found].floor().long() + steps[slot]).unbind(1)
    return images[found], anchor, row.clamp(0, height - 1), column.clamp(0, width - 1), found


def yolov5_loss(
    raw: Sequence[Tensor],
    targets: Sequence[Target],
    anchors: Tensor,
    strides: Sequence[int],
    image_size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Loss of YOLOv5 v6.0, with which SPD-Conv (arXiv 2208.03641) trains.

    Args:
        raw: A map (N, 3, H, W, 5 + classes) for each level, from fine to coarse.
        targets: The objects of each image.
        anchors: Width and height in cells, (levels, 3, 2).
        strides: Pixels per cell of each level.
        image_size: Height and width of the images in pixels, whose longer side scales the objectness term; None:
            computed from the finest map.

    Returns:
        The terms `box`, `objectness` and `class`.

    Raises:
        ValueError: If `check_targets` refuses the targets.
    """
    batch, num_classes = raw[0].shape[0], raw[0].shape[-1] - 5
    objects = check_targets(targets, batch, num_classes, raw[0].device)
    boxes = box_convert(torch.cat([boxes for boxes, _ in objects]), "xyxy", "cxcywh")
    labels = torch.cat([labels for _, labels in objects])
    counts = torch.tensor([len(boxes) for boxes, _ in objects], device=boxes.device)
    images = torch.arange(batch, device=boxes.device).repeat_interleave(counts)

    box, objectness, classes = (torch.zeros((), device=boxes.device) for _ in range(3))
    for level, stride, level_anchors, weight in zip(raw, strides, anchors.float(), (4.0, 1.0, 0.4), strict=True):
        level = level.float()
        _, _, height, width, _ = level.shape
        image, anchor, row, column, found = yolov5_matches(height, width, level_anchors, boxes / stride, images)
        overlap = torch.zeros(level.shape[:4], device=level.device)
        predictions = level[image, anchor, row, column]
        if len(found):
            corner = torch.stack([column, row], 1)
            target = torch.cat([boxes[found, :2] / stride - corner, boxes[found, 2:] / stride], 1)
            predicted = anchor_boxes(predictions[:, :4], level_anchors[anchor])
            iou = complete_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy"))
            box = box + (1 - iou).mean()
            if num_classes > 1:
                one_hot = F.one_hot(labels[found], num_classes).to(predictions)
                classes = classes + F.binary_cross_entropy_with_logits(predictions[:, 5:], one_hot)
            # if a cell and anchor have several matches, the last one counts
            cells = ((image * level.shape[1] + anchor) * height + row) * width + column
            last = _last_writer(cells, overlap.numel())
            overlap = torch.where(last < 0, 0.0, iou.detach().clamp(min=0)[last]).view_as(overlap)
        counted = _counted_cells(targets, overlap, stride)
        objectness = objectness + weight * F.binary_cross_entropy_with_logits(level[..., 4], overlap, counted)

    longer = max(image_size or (raw[0].shape[2] * strides[0], raw[0].shape[3] * strides[0]))
    scale = batch * 3 / len(raw)
    return {
        "box": 0.05 * scale * box,
        "objectness": (longer / 640) ** 2 * scale * objectness,
        "class": 0.5 * num_classes / 80 * scale * classes,
    }


def _counted_cells(targets: Sequence[Target], overlap: Tensor, stride: int) -> Tensor | None:
    """1 for the cells that count as object or background, 0 for those without an object that are ignored.

    Args:
        targets: What each image shows.
        overlap: The wanted objectness, (N, 3, H, W); above 0 where there is an object.
        stride: Pixels per cell.

    Returns:
        A tensor like `overlap`; None if nothing is ignored, and all cells count.
    """
    if not any(len(target.get("ignored", ())) for target in targets):
        return None
    height, width = overlap.shape[2:]
    rows, columns = torch.meshgrid(
        *(torch.arange(side, device=overlap.device) for side in (height, width)), indexing="ij"
    )
    centres = (torch.stack([columns, rows], -1).flatten(0, 1) + 0.5) * stride
    ignored = [_inside(centres, ignored_regions(target, overlap.device)[0]).any(1) for target in targets]
    inside = torch.stack(ignored).view(-1, 1, height, width)
    return (~inside | (overlap > 0)).to(overlap)


# YOLOv8


def yolov8_matches(
    boxes: Tensor, labels: Tensor, centres: Tensor, predicted: Tensor, logits: Tensor, candidates: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Task-aligned assignment of one image's objects to anchors.

    Feng et al., TOOD, https://arxiv.org/abs/2108.07755, section 3.2, with the exponents 0.5 and 6.

    Args:
        boxes: Boxes of the objects in pixels, (M, 4).
        labels: Classes of the objects, (M,).
        centres: Centre of each anchor in pixels, (A, 2).
        predicted: Predicted box of each anchor in pixels, (A, 4).
        logits: Class logits of each anchor, (A, classes).
        candidates: Largest number of anchors for an object.

    Returns:
        Anchor, object and target score (0..1) of each match, all (K,), by ascending anchor. An anchor has at most one
        object.
    """
    boxes, predicted = as_float(boxes), as_float(predicted)
    shape = (len(boxes), len(centres))
    to_sides = torch.cat([centres - boxes[:, None, :2], boxes[:, None, 2:] - centres], -1)
    inside = to_sides.amin(-1) > 1e-9  # (M, A)
    found, anchor = inside.nonzero().unbind(1)
    overlap, metric = torch.zeros(shape, device=boxes.device), torch.zeros(shape, device=boxes.device)
    overlap[found, anchor] = complete_iou(boxes[found], predicted[anchor]).clamp(min=0)
    metric[found, anchor] = logits[anchor, labels[found]].sigmoid().sqrt() * overlap[found, anchor] ** 6
    best = metric.topk(min(candidates, len(centres)), dim=1)
    chosen = torch.zeros_like(inside).scatter_(1, best.indices, best.values > 0)
    # an anchor chosen by several objects is assigned to the object of the image that it overlaps most
    contested = chosen.sum(0) > 1
    winner = torch.where(contested, overlap.argmax(0), chosen.byte().argmax(0))
    anchor = chosen.any(0).nonzero().squeeze(1)
    found = winner[anchor]
    metric, overlap = metric[found, anchor], overlap[found, anchor]
    largest = torch.zeros(2, len(boxes), device=boxes.device)
    largest = largest.scatter_reduce(1, found.expand(2, -1), torch.stack([metric, overlap]), "amax")[:, found]
    return anchor, found, metric * largest[1] / (largest[0] + 1e-9)


def yolov8_loss(
    raw: Sequence[Tensor], targets: Sequence[Target], strides: Sequence[int], bins: Tensor
) -> dict[str, Tensor]:
    """Loss of YOLOv8 (ultralytics 8.1.0).

    Args:
        raw: A map (N, 4 * bins + classes, H, W) for each level, from fine to coarse.
        targets: The objects of each image.
        strides: Pixels per cell of each level.
        bins: Distance of each bin in cells: 0, 1, 2, ...

    Returns:
        The terms `box`, `class` and `dfl`.

    Raises:
        ValueError: If `check_targets` refuses the targets.
    """
    batch, last_bin = raw[0].shape[0], bins.numel() - 1
    sides, logits, centres, stride = yolov8_predictions(raw, strides, bins.numel())
    objects = check_targets(targets, batch, logits.shape[2], logits.device)
    distances = expected_distances(sides, bins)
    predicted = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], -1)  # in cells

    target_scores = torch.zeros_like(logits)
    images, anchors, target_boxes, weights = [], [], [], []
    with torch.no_grad():
        for i, (boxes, labels) in enumerate(objects):
            if len(boxes):
                anchor, found, score = yolov8_matches(boxes, labels, centres * stride, predicted[i] * stride, logits[i])
                target_scores[i, anchor, labels[found]] = score
                images.append(torch.full_like(anchor, i))
                anchors.append(anchor)
                target_boxes.append(boxes[found] / stride[anchor])
                weights.append(score)
    total = target_scores.sum().clamp(min=1)
    counted = _counted_scores(targets, centres * stride, target_scores)
    classes = F.binary_cross_entropy_with_logits(logits, target_scores, counted, reduction="sum") / total
    if not images:
        zero = sides[:0].sum()  # has a gradient, unlike a constant
        return {"box": zero, "class": 0.5 * batch * classes, "dfl": zero}

    image, anchor, box, weight = (torch.cat(tensors) for tensors in (images, anchors, target_boxes, weights))
    iou = complete_iou(predicted[image, anchor], box)
    distance = torch.cat([centres[anchor] - box[:, :2], box[:, 2:] - centres[anchor]], 1).clamp(0, last_bin - 0.01)
    lower = distance.floor()
    side_logits = sides[image, anchor].unflatten(1, (4, -1)).flatten(0, 1)  # (K * 4, bins)
    below, above = (
        F.cross_entropy(side_logits, bin.long().flatten(), reduction="none").view_as(distance)
        for bin in (lower, lower + 1)
    )
    dfl = ((lower + 1 - distance) * below + (distance - lower) * above).mean(1)
    return {
        "box": 7.5 * batch * (weight * (1 - iou)).sum() / total,
        "class": 0.5 * batch * classes,
        "dfl": 1.5 * batch * (weight * dfl).sum() / total,
    }


def _counted_scores(targets: Sequence[Target], centres: Tensor, wanted: Tensor) -> Tensor | None:
    """1 for the scores that count, 0 for those of classes that are ignored at an anchor's centre.

    Args:
        targets: What each image shows.
        centres: Centre of each anchor in pixels, (A, 2).
        wanted: Target scores, (N, A, classes); above 0 where there is an object.

    Returns:
        A tensor like `wanted`; None if nothing is ignored, and all scores count.
    """
    if not any(len(target.get("ignored", ())) for target in targets):
        return None
    classes = torch.arange(wanted.shape[2], device=wanted.device)
    ignored = []
    for target in targets:
        boxes, labels = ignored_regions(target, wanted.device)
        of_class = (labels[:, None] == classes) | (labels[:, None] < 0)  # (K, classes)
        ignored.append(_inside(centres, boxes).float() @ of_class.float() > 0)
    return (~torch.stack(ignored) | (wanted > 0)).to(wanted)


# SSD


def ssd_matches(boxes: Tensor, labels: Tensor, priors: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Assigns one image's objects to priors: Liu et al., https://arxiv.org/abs/1512.02325, section 2.2.

    A prior is assigned to the object that it overlaps most. Each object is also assigned to its best prior, whatever
    their IoU; if several objects have the same best prior, the last one is assigned to it.

    Args:
        boxes: Boxes of the objects in fractions of the image, (M, 4).
        labels: Classes of the objects from 0, (M,).
        priors: Centre and size in fractions of the image, (P, 4).
        threshold: Smallest IoU of a match.

    Returns:
        The class of each prior (0: background, otherwise 1 + label) and the index of its object, both (P,).
    """
    iou = box_iou(as_float(boxes), box_convert(priors, "cxcywh", "xyxy"))  # (M, P)
    largest, found = iou.max(0)
    best_for = _last_writer(iou.argmax(1), len(priors))
    found = torch.where(best_for >= 0, best_for, found)
    return torch.where((largest >= threshold) | (best_for >= 0), labels[found] + 1, 0), found


def ssd_loss(
    loc: Tensor,
    logits: Tensor,
    targets: Sequence[Target],
    priors: Tensor,
    image_size: tuple[int, int],
    negatives: int = 3,
) -> dict[str, Tensor]:
    """Loss of SSD (Liu et al., https://arxiv.org/abs/1512.02325, section 2.2).

    Without a positive in the batch both terms are 0; the authors' code returns NaN with zero gradients in this case.

    Args:
        loc: Raw boxes, (N, P, 4).
        logits: Class logits, the background first, (N, P, 1 + classes).
        targets: The objects of each image.
        priors: Centre and size in fractions of the image, (P, 4).
        image_size: Height and width of the images in pixels.
        negatives: Number of negatives per positive, the hardest of each image.

    Returns:
        The terms `location` and `class`.

    Raises:
        ValueError: If `check_targets` refuses the targets.
    """
    loc, logits = loc.float(), logits.float()
    batch, count, outputs = logits.shape
    objects = check_targets(targets, batch, outputs - 1, loc.device)
    scale = torch.tensor([image_size[1], image_size[0]] * 2, device=loc.device)
    classes, codes = torch.zeros(batch, count, dtype=torch.long, device=loc.device), torch.zeros_like(loc)
    for i, (boxes, labels) in enumerate(objects):
        if len(boxes):
            classes[i], found = ssd_matches(boxes / scale, labels, priors)
            codes[i] = ssd_encode((boxes / scale)[found], priors)
    positive = classes > 0
    location = F.smooth_l1_loss(loc[positive], codes[positive], reduction="sum")

    hardness = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view(batch, count)
    ignored = _ignored_priors(targets, priors, scale) & ~positive
    order = hardness.detach().masked_fill(positive | ignored, -torch.inf).argsort(1, descending=True)
    rank = order.argsort(1)
    used = positive | ((rank < negatives * positive.sum(1, keepdim=True)) & ~ignored)
    divisor = positive.sum().clamp(min=1)
    return {"location": location / divisor, "class": hardness[used].sum() / divisor}


def _ignored_priors(targets: Sequence[Target], priors: Tensor, scale: Tensor) -> Tensor:
    """Whether at least half of each prior lies in a region that is ignored, (N, P)."""
    corners = box_convert(priors, "cxcywh", "xyxy")
    ignored = []
    for target in targets:
        boxes = ignored_regions(target, priors.device)[0] / scale
        sides = torch.minimum(corners[:, None, 2:], boxes[:, 2:]) - torch.maximum(corners[:, None, :2], boxes[:, :2])
        shared = sides.clamp(min=0).prod(-1)  # (P, K)
        ignored.append((shared >= 0.5 * priors[:, None, 2:].prod(-1)).any(1))
    return torch.stack(ignored)
