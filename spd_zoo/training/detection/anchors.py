"""YOLOv5's anchors, fitted to the boxes of a data set."""

import numpy as np
from timm.layers import to_2tuple

from spd_zoo.data.boxes import BoxImages
from spd_zoo.models.yolov5_spd import YOLOv5SPD

__all__ = ["anchor_fit", "fit_anchors", "kmeans"]

MAX_RATIO = 4  # largest ratio between the sides of a box and those of an anchor that predicts it
MIN_RECALL = 0.98  # share of boxes that an anchor must fit
RUNS, STEPS = 30, 1000  # restarts of k-means, steps of the random search


def anchor_fit(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """How well the best anchor fits each box: 1 if their sides are equal, 1 / r if one side is r times the other.

    Args:
        sizes: Width and height of each box, (M, 2).
        anchors: Width and height of each anchor, (A, 2).

    Returns:
        (M,).
    """
    ratio = sizes[:, None] / anchors
    best: np.ndarray = np.minimum(ratio, 1 / ratio).min(-1).max(1)
    return best


def kmeans(points: np.ndarray, count: int, generator: np.random.Generator, runs: int = RUNS) -> np.ndarray:
    """Cluster centres (count, D) of points (M, D): Lloyd's algorithm, the best of `runs` random starts."""
    best, least = points[:count], np.inf
    for _ in range(runs):
        centres = points[generator.choice(len(points), count, replace=False)]
        for _ in range(100):
            owner = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
            moved = np.stack([points[owner == i].mean(0) if (owner == i).any() else centres[i] for i in range(count)])
            if np.array_equal(moved, centres):
                break
            centres = moved
        distance = ((points[:, None] - centres) ** 2).sum(-1).min(1).sum()
        if distance < least:
            best, least = centres, distance
    return best


def fit_anchors(net: YOLOv5SPD, data: BoxImages, image_size: int | tuple[int, int], seed: int) -> str:
    """Fits the anchors of `net` to the boxes of `data` at `image_size`, if the current ones fit too few of them.

    The method is that of YOLOv5 v6.0: k-means, then a random search that raises the mean fit.

    Args:
        net: Its anchors are changed in place.
        data: The training images.
        image_size: Height and width of the input in pixels, or one number for both.
        seed: Seed of all random draws.

    Returns:
        A sentence that says what was done.
    """
    generator = np.random.default_rng(seed % 2**64)  # NumPy takes no negative seed
    sizes, jittered = [], []
    for i in range(len(data)):
        boxes = data.objects_in(i).counted().boxes.double().numpy()
        sides = zip(to_2tuple(image_size), data.sizes[data.rows[i]][::-1], strict=True)
        there, here = min(sides, key=lambda pair: pair[0] / pair[1])  # the image fits into the input
        scaled = (boxes[:, 2:] - boxes[:, :2]) * there / here
        sizes.append(scaled)
        jittered.append(scaled * generator.uniform(0.9, 1.1))
    boxes, jittered_sizes = np.concatenate(sizes), np.concatenate(jittered)
    strides = np.array(net.strides, dtype=np.float64)[:, None, None]
    old = (net.head.anchors.cpu().double().numpy() * strides).reshape(-1, 2)
    before = _recall(jittered_sizes, old)
    boxes = boxes[(boxes >= 2).any(1)]
    if before >= MIN_RECALL or len(boxes) < len(old):
        return f"anchors: they fit {100 * before:.1f} % of the boxes and stay"

    deviation = boxes.std(0) + 1e-9
    anchors = np.maximum(kmeans(boxes / deviation, len(old), generator) * deviation, 2)
    fit = _mean_fit(boxes, anchors)
    for _ in range(STEPS):
        chosen = generator.random(anchors.shape) < 0.9
        change = chosen * generator.random() * generator.standard_normal(anchors.shape) * 0.1 + 1
        tried = np.maximum(anchors * change.clip(0.3, 3), 2)
        new_fit = _mean_fit(boxes, tried)
        if new_fit > fit:
            anchors, fit = tried, new_fit
    after = _recall(jittered_sizes, anchors)
    if after <= before:
        return f"anchors: they fit {100 * before:.1f} % of the boxes; none that fit more were found"
    ordered = anchors[anchors.prod(1).argsort()].reshape(len(net.strides), -1, 2)
    new = net.head.anchors.new_tensor(ordered / strides)
    net.head.anchors.copy_(new)
    return f"anchors: {len(old)} new ones fit {100 * after:.1f} % of the boxes, the old ones {100 * before:.1f} %"


def _recall(sizes: np.ndarray, anchors: np.ndarray) -> float:
    return float((anchor_fit(sizes, anchors) > 1 / MAX_RATIO).mean())


def _mean_fit(sizes: np.ndarray, anchors: np.ndarray) -> float:
    fit = anchor_fit(sizes, anchors)
    return float((fit * (fit > 1 / MAX_RATIO)).mean())
