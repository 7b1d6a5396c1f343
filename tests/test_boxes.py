"""Functions on boxes accept integers, which annotations often are, and give the same results as for floats."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from spd_zoo import boxes as spd_boxes
from spd_zoo.boxes import anchor_boxes, class_nms, complete_iou, labelled_nms, mostly_covered, ssd_decode, ssd_encode
from spd_zoo.inference.detector import Placement
from spd_zoo.losses import (
    check_targets,
    ssd_loss,
    ssd_matches,
    yolov5_loss,
    yolov5_matches,
    yolov8_loss,
    yolov8_matches,
)

BOXES = torch.tensor([[20, 30, 120, 110], [22, 33, 121, 108], [0, 0, 7, 9]])
LABELS = torch.tensor([1, 1, 0])
PRIORS = torch.tensor([[0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0], [70.0, 70.0, 100.0, 80.0]])
PLACEMENT = Placement((200, 320), (1.6, 1.6), (0, 40), (5, 0))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_integer_boxes_are_placed_in_the_input_and_back() -> None:
    placement = Placement((200, 320), (1.6, 1.6), (0, 40))
    placed = placement.to_input(BOXES[:1])
    assert placed.tolist() == [pytest.approx([32, 88, 192, 216])]
    assert placement.to_original(placed.round().int()).tolist() == [pytest.approx([20, 30, 120, 110])]


def losses(boxes: Tensor, labels: Tensor) -> list[Tensor]:
    targets: Sequence[Any] = [{"boxes": boxes, "labels": labels}]
    maps = [noise(1, 3, side, side, 7) for side in (16, 8, 4)]
    anchors = torch.tensor([[[4, 4], [8, 6], [12, 10]]] * 3)
    return [
        *yolov5_loss(maps, targets, anchors, [8, 16, 32]).values(),
        *yolov8_loss([noise(1, 18, 16, 16)], targets, [8], torch.arange(4)).values(),
        *ssd_loss(noise(1, 3, 4), noise(1, 3, 3), targets, PRIORS / 128, (128, 128)).values(),
    ]


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "to_input": PLACEMENT.to_input,
    "to_original": PLACEMENT.to_original,
    "complete_iou": lambda boxes: complete_iou(boxes[:, None], boxes),
    "complete_iou with floats": lambda boxes: complete_iou(boxes, BOXES.flip(0) + 0.5),
    "anchor_boxes": lambda boxes: anchor_boxes(boxes % 3, boxes[:, :2]),
    "ssd_encode": lambda boxes: ssd_encode(boxes, PRIORS),
    "ssd_decode": lambda boxes: ssd_decode(boxes % 3, boxes),
    "labelled_nms": lambda boxes: labelled_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), LABELS, 0.5),
    "labelled_nms with integer scores": lambda boxes: labelled_nms(boxes, torch.tensor([50, 90, 70]), LABELS, 0.5),
    "class_nms": lambda boxes: class_nms(boxes, torch.tensor([[0.5, 0.1], [0.9, 0.8], [0.1, 0.7]]), 0.2, 0.5),
    "check_targets": lambda boxes: check_targets([{"boxes": boxes, "labels": LABELS}], 1, 2, torch.device("cpu"))[0],
    "yolov5_matches": lambda boxes: yolov5_matches(
        16, 16, torch.tensor([[4, 4], [8, 6], [12, 10]]), boxes % 16, LABELS
    ),
    "yolov8_matches": lambda boxes: yolov8_matches(boxes, LABELS, 20 * noise(9, 2) + 60, boxes[[0] * 9], noise(9, 2)),
    "ssd_matches": lambda boxes: ssd_matches(boxes, LABELS, PRIORS),
    "losses": lambda boxes: losses(boxes, LABELS),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_integers_give_the_same_as_floats(function: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    torch.testing.assert_close(function(BOXES.to(dtype)), function(BOXES.float()))


def test_float64_stays_float64() -> None:
    assert PLACEMENT.to_input(BOXES.double()).dtype == complete_iou(BOXES.double(), BOXES).dtype == torch.float64


def test_suppression_accepts_no_boxes() -> None:
    kept = labelled_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5)
    assert kept.dtype == torch.long and kept.shape == (0,)


def crowd(count: int, spread: float, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in clusters, with sides from 0.01 to `largest` pixels, their scores, and labels of three classes."""
    generator = torch.Generator().manual_seed(count)
    cluster = torch.randint(count // 4, (count,), generator=generator)
    centres = spread * torch.rand(count // 4, 2, generator=generator)[cluster]
    centres = centres + torch.randn(count, 2, generator=generator)
    sides = 0.01 * (100 * largest) ** torch.rand(count, 2, generator=generator)
    scores, labels = torch.rand(count, generator=generator), torch.randint(3, (count,), generator=generator)
    return torch.cat([centres - sides / 2, centres + sides / 2], 1), scores, labels


CROWDS = [(400, 50.0, 40.0), (400, 1e5, 2e5), (400, 0.1, 2.0)]


@pytest.mark.parametrize("iou_threshold", [0.05, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", CROWDS, ids=str)
def test_suppression_in_grids_keeps_what_comparing_every_pair_keeps(
    shape: tuple[int, float, float], iou_threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spd_boxes, "FEW", 60)
    monkeypatch.setattr(spd_boxes, "PAIRS", 1000)
    boxes, scores, labels = crowd(*shape)
    boxes[::9] = boxes[1]  # the same box with several scores and labels
    alike = (box_iou(boxes, boxes) > iou_threshold) & (labels[:, None] == labels)
    kept: list[int] = []
    for row in scores.argsort(descending=True).tolist():
        if not alike[row, kept].any():
            kept.append(row)
    assert labelled_nms(boxes, scores, labels, iou_threshold).tolist() == kept
    assert len(kept) < shape[0] or iou_threshold == 1


@pytest.mark.parametrize("few", [16, 4000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_box_that_is_not_finite_is_dropped_and_changes_nothing_else(
    value: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spd_boxes, "FEW", few)
    boxes, scores, labels = crowd(40, 1.0, 1.0)
    boxes[10:20] = boxes[1]
    boxes[3, 2] = value
    others = torch.cat([torch.arange(3), torch.arange(4, 40)])
    expected = others[labelled_nms(boxes[others], scores[others], labels[others], 0.5)]
    assert torch.equal(labelled_nms(boxes, scores, labels, 0.5), expected) and len(expected) < 33
    class_scores = torch.zeros(40, 3).scatter(1, labels[:, None], scores[:, None])
    rows, found = class_nms(boxes, class_scores, 0.0, 0.5)
    assert torch.equal(rows, expected) and torch.equal(found, labels[expected])
    assert labelled_nms(boxes[3:4], scores[3:4], labels[3:4], 0.5).tolist() == []


@pytest.mark.parametrize("label", [0, 80, 1200])
@pytest.mark.parametrize("corner", [0.0, 50_000.0])
def test_small_boxes_of_many_classes_in_large_images_are_compared_exactly(label: int, corner: float) -> None:
    small = [[0, 0, 10, 10], [0, 0, 10, 6], [4, 0, 14, 10]]  # the second has an IoU of 0.6 with the first
    boxes = torch.tensor([*small, [0, 0, 50_000, 50_000], [0, 0, 1e30, 1e30]]) + corner
    labels = torch.tensor([label] * 3 + [0 if label else 1] * 2)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert labelled_nms(boxes, scores, labels, 0.5).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", CROWDS, ids=str)
def test_boxes_are_covered_as_comparing_every_pair_says(
    shape: tuple[int, float, float], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spd_boxes, "PAIRS", 1000)
    every, _, labels = crowd(*shape)
    boxes, others = every[::2], every[1::2]
    shared = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    covered = shared.clamp(min=0).prod(-1) >= share * box_area(boxes)[:, None]
    expected = (covered & (labels[::2, None] == labels[1::2])).any(1)
    assert torch.equal(mostly_covered(boxes, labels[::2], others, labels[1::2], share), expected)
    assert not mostly_covered(boxes, labels[::2], others[:0], labels[:0], share).any()
