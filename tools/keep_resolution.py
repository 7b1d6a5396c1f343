"""Compares three ways to classify small photos: as they are, enlarged, and with a network whose stem has no stride.

    python tools/keep_resolution.py --photos NIPS2017/dataset [--limit N] > tools/keep_resolution.jsonl

The photos (see tools/efficientnet_lite.py) are first reduced to a few pixels, which are the same for each way. The
networks are EfficientNet-Lite0 and -Lite2, folded by `fold_spd`; nothing is trained. Milliseconds are per photo in a
batch of eight on one thread, as medians of alternating runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite import classes, photos
from PIL import Image
from timm.data import create_transform
from torch import nn

from spd_zoo import fold_spd, keep_resolution

NETWORKS = ("tf_efficientnet_lite0_spd", "tf_efficientnet_lite2_spd")
SIZES = (160, 112, 96, 64)
BATCH, RUNS = 8, 15


class Reduced:
    """Reduces a photo to `small` pixels, and preprocesses it for an input of `size` pixels, as timm does."""

    def __init__(self, small: int, size: int, cfg: dict[str, Any]) -> None:
        norm = {key: cfg[key] for key in ("mean", "std", "interpolation")}
        self.small = small
        self.prepare: Any = create_transform((3, size, size), crop_pct=1.0, **norm)

    def __call__(self, photo: Image.Image) -> torch.Tensor:
        """A photo -> (3, size, size)."""
        return self.prepare(photo.resize((self.small, self.small), Image.Resampling.BICUBIC))


@torch.inference_mode()
def milliseconds(ways: dict[str, tuple[nn.Module, int]]) -> dict[str, float]:
    """Median milliseconds per photo of each way."""
    images = {way: torch.randn(BATCH, 3, size, size) for way, (_, size) in ways.items()}
    images = {way: batch.contiguous(memory_format=torch.channels_last) for way, batch in images.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(RUNS + 1):
        for way, (net, _) in ways.items():
            start = time.perf_counter()
            net(images[way])
            if run:  # the first one warms up
                times[way].append(1000 * (time.perf_counter() - start) / BATCH)
    return {way: round(statistics.median(found), 1) for way, found in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line of JSON for each network and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only use so many photos")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    files, labels = photos(options.photos, options.limit)
    for name in NETWORKS:
        net: Any = fold_spd(timm.create_model(f"{name}.in1k", pretrained=True).eval())
        cfg = net.pretrained_cfg
        kept = keep_resolution(net)
        for small in SIZES:
            ways: dict[str, tuple[nn.Module, int]] = {
                "as it is": (net, small),
                "enlarged": (net, cfg["input_size"][-1]),
                "without the stem's stride": (kept, small),
            }
            row: dict[str, Any] = {"network": name, "photos": len(files), "pixels": small}
            for way, (used, size) in ways.items():
                (found,) = classes([used], files, Reduced(small, size, cfg))
                row[f"{way}, top1"] = round(100 * (found == labels).double().mean().item(), 1)
            row |= {f"{way}, ms": value for way, value in milliseconds(ways).items()}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
