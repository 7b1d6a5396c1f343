"""Measures speed and memory of `spd-zoo predict --results` against a plain PyTorch loop.

    python tools/benchmark_many.py [--model cifar_resnet20.cifar100] [--images 10000] [--rounds 3] [--json]

The images are 4,000 generated JPEG files with sides of 64 to 200 pixels; further images are links to them. The plain
loop is torchvision's ImageFolder, a DataLoader with the same batch size, transform and processes, the same network, and
a list of results that is written at the end. Both write the same five classes per image. They alternate, each run in a
process of its own. Seconds are those of the whole command, including imports; CPU seconds include all its processes,
and hardly depend on other load. Peak memory is the main process's largest resident set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES, PER_FOLDER, BATCH_SIZE = 4000, 1000, 32


def generate(folder: Path, count: int) -> None:
    """Writes `count` JPEG files, or links to the first ones, into folders of a thousand."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"{i // PER_FOLDER:04}" / f"{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i < FILES:
            noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            width, height = rng.integers(64, 201, 2).tolist()
            noise.resize((width, height), Image.Resampling.BICUBIC).save(file)
        else:
            file.hardlink_to(folder / f"{i % FILES // PER_FOLDER:04}" / f"{i % FILES:06}.jpg")


def plain(model: str, folder: str, out: str, workers: int) -> None:
    """The plain PyTorch loop."""
    import timm
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    import spd_zoo  # noqa: F401  (registers the networks)

    net = timm.create_model(model, pretrained=True).eval().to(memory_format=torch.channels_last)
    cfg = vars(net)["pretrained_cfg"]
    config = timm.data.resolve_data_config(pretrained_cfg=cfg)
    names = cfg["label_names"]
    dataset = ImageFolder(folder, timm.data.create_transform(**config))
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for images, _ in DataLoader(dataset, BATCH_SIZE, num_workers=workers):
            top = net(images.to(memory_format=torch.channels_last)).softmax(1).topk(5)
            for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                guesses = [
                    {"index": i, "name": names[i], "probability": round(value, 6)}
                    for i, value in zip(indices, values, strict=True)
                ]
                results.append({"path": dataset.samples[len(results)][0], "error": None, "top": guesses})
    with Path(out).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in results)


def measure(command: list[str]) -> dict[str, float]:
    """Wall seconds of a command, and the peak memory of its main process in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _peak(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {"seconds": seconds, "peak_mib": peak}


def _peak(pid: int) -> float:
    """The peak resident memory of a running process in MiB, as Linux reports it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def cpu_seconds() -> float:
    """CPU seconds of all finished child processes."""
    times = os.times()
    return times.children_user + times.children_system


def best_of(results: str) -> list[tuple[str, int]]:
    """Each image and its most probable class."""
    with Path(results).open(encoding="utf-8") as lines:
        return [(row["path"], row["top"][0]["index"]) for row in map(json.loads, lines)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="cifar_resnet20.cifar100")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print a JSON line per contender")
    parser.add_argument("--plain", nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.plain:
        plain(options.model, options.plain[0], options.plain[1], options.workers)
        return 0
    runs: dict[str, list[dict[str, float]]] = {"spd-zoo": [], "plain": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        generate(folder, options.images)
        for i in range(options.rounds):
            out = {name: str(Path(temporary, f"{name}{i}.jsonl")) for name in runs}
            common = ["--workers", str(options.workers)]
            commands = {
                "spd-zoo": ["-m", "spd_zoo", "predict", options.model, str(folder), "--results", out["spd-zoo"]],
                "plain": [__file__, "--model", options.model, "--plain", str(folder), out["plain"]],
            }
            for name, command in commands.items():
                before = cpu_seconds()
                run = measure([sys.executable, *command, *common])
                runs[name].append(run | {"cpu_seconds": cpu_seconds() - before})
            if best_of(out["spd-zoo"]) != best_of(out["plain"]):
                raise SystemExit("the two contenders disagree")
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    for name, median in medians.items():
        row = {"contender": name, "model": options.model, "images": options.images, "workers": options.workers}
        row |= {"rounds": options.rounds, "images_per_s": round(options.images / median["seconds"], 1)}
        row |= {"cpu_ms_per_image": round(1000 * median["cpu_seconds"] / options.images, 2)}
        row |= {"peak_mib": round(median["peak_mib"])}
        row |= {f"{key}_ratio": round(median[key] / medians["plain"][key], 2) for key in median}
        print(json.dumps(row) if options.json else row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
