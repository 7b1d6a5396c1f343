"""Measures the merging of tiles' boxes against comparing every pair of them.

    python tools/benchmark_merge.py [--tiles 31] [--per-tile 25] [--rounds 3] [--json]

TILES x TILES tiles of 640 pixels, which overlap by 20 %, with PER_TILE boxes of 10 to 60 pixels each at random places,
of one class: the hardest case, because classes are merged one by one. Each way runs in a process of its own, and the
two alternate. Seconds are CPU seconds (medians), MiB what merging added to the process's largest resident set.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area, nms

from spd_zoo import boxes as spd_boxes
from spd_zoo.inference import detector
from spd_zoo.inference.detector import Detections, Placement

TILE, STEP = 640, 512


def views(tiles: int, per_tile: int) -> tuple[list[Detections], list[Placement]]:
    """What the detector finds in each tile, and where the tile lies."""
    generator = torch.Generator().manual_seed(0)
    found, places = [], []
    for i in range(tiles * tiles):
        corner = (i % tiles * STEP, i // tiles * STEP)
        sides = 10 + 50 * torch.rand(per_tile, 2, generator=generator)
        low = (TILE - sides) * torch.rand(per_tile, 2, generator=generator) + torch.tensor(corner)
        labels = torch.zeros(per_tile, dtype=torch.long)
        scores = torch.rand(per_tile, generator=generator)
        found.append(Detections(torch.cat([low, low + sides], 1), scores, labels, ("object",)))
        places.append(Placement((TILE, TILE), (1.0, 1.0), corner=corner))
    return found, places


def every_pair(boxes: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, share: float) -> Tensor:
    """`mostly_covered`, with all pairs in memory."""
    low, high = torch.maximum(boxes[:, None, :2], others[:, :2]), torch.minimum(boxes[:, None, 2:], others[:, 2:])
    covered = (high - low).clamp(min=0).prod(-1) >= share * box_area(boxes)[:, None]
    return (covered & (labels[:, None] == other_labels)).any(1)


def measure(way: str, tiles: int, per_tile: int) -> tuple[float, float, int]:
    """CPU seconds, MiB, and how many boxes are left."""
    torch.set_num_threads(1)
    if way == "every pair":
        vars(detector)["mostly_covered"] = every_pair
        vars(spd_boxes)["_suppress"] = nms_of_sorted
    found, places = views(tiles, per_tile)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    left = len(detector.merge_views(found, places, 0.5))
    seconds = time.process_time() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, left


def nms_of_sorted(boxes: Tensor, iou_threshold: float) -> Tensor:
    """torchvision's suppression of boxes in descending order of their scores."""
    return nms(boxes, -torch.arange(len(boxes), dtype=torch.float64).to(boxes), iou_threshold)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and prints a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=31)
    parser.add_argument("--per-tile", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    measured: dict[str, list[tuple[float, float, int]]] = {"ours": [], "every pair": []}
    for _ in range(args.rounds):
        for way, results in measured.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (way, args.tiles, args.per_tile)))
    if len({left for results in measured.values() for _, _, left in results}) > 1:
        raise RuntimeError("the two ways left different numbers of boxes")
    row: dict[str, float] = {"boxes": args.tiles**2 * args.per_tile, "left": measured["ours"][0][2]}
    for way, results in measured.items():
        row[f"s {way}"] = statistics.median(seconds for seconds, _, _ in results)
        row[f"MiB {way}"] = max(mebibytes for _, mebibytes, _ in results)
    print(json.dumps(row) if args.json else "\n".join(f"{name:15} {value:10.2f}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
