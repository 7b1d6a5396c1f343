"""How long `timm.create_model(..., pretrained=True)` takes, SHA-256 included, beside timm's resnet50 without one.

    python tools/benchmark_load.py [--network pyconvresnet50_spd] [--rounds 9] [--json]

resnet50 reads a local safetensors file of half-precision weights, about as large as ours. Both alternate in one process
of one thread; CPU seconds are medians, the ratio is the median of the ratios of each round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

import spd_zoo  # noqa: F401  (registers the networks)


def measure(network: str, rounds: int) -> dict[str, float]:
    """CPU seconds of both, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet50.safetensors"
        save_file({name: t.half() if t.is_floating_point() else t for name, t in resnet50().state_dict().items()}, file)
        contenders = {"ours": partial(timm.create_model, network, True), "resnet50": partial(resnet50, file)}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for i in range(rounds + 1):  # the first round reads the files from the disk
            for name, create in contenders.items():
                start = time.process_time()
                create()
                if i:
                    seconds[name].append(time.process_time() - start)
    ratio = statistics.median(ours / peer for ours, peer in zip(*seconds.values(), strict=True))
    return {name: statistics.median(times) for name, times in seconds.items()} | {"ratio": ratio}


def resnet50(file: Path | None = None) -> Any:
    """timm's resnet50, with the weights of a file if there is one."""
    overlay = {"file": str(file)} if file else None
    return timm.create_model("resnet50", pretrained=file is not None, pretrained_cfg_overlay=overlay)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="pyconvresnet50_spd", help="a network with weights on this machine")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    row = measure(args.network, args.rounds)
    if args.json:
        print(json.dumps({"network": args.network, **row}))
    else:
        print(f"{args.network} {row['ours']:.3f} s | resnet50 {row['resnet50']:.3f} s | ratio {row['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
