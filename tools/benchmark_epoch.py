"""Where the time of a training epoch goes: the share that is not forward, backward and optimiser step.

    python tools/benchmark_epoch.py [--network yolov8n pyconvresnet50_spd] [--data DIR] [--steps 8] [--json]

Trains with the code of `spd-zoo finetune` for one epoch that is not counted and for `--epochs` others, on random
pictures unless --data names a data set. Every moment belongs to one stage, the innermost: "forward" (of training and of
evaluation), "backward" and "optimiser" are the network's; all others are "overhead". Target assignment and loss are in
"loss". Reading in other processes (--workers) appears as the time that training waits for it. On a GPU each stage ends
with a synchronisation, without which its work would be counted in a later one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from PIL import Image
from tqdm import tqdm

import spd_zoo  # noqa: F401  (registers the networks)
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import StopSignals, freed_memory_kept, join
from spd_zoo.training import finetune as training
from spd_zoo.training import planning
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.run import RunFolder
from spd_zoo.training.task import task_of

NETWORKS = ("forward", "backward", "optimiser")
SETTINGS = {True: (320, 8), False: (64, 128)}  # pixels and batch size of detectors and classifiers
CLASSES = 10


class Stages:
    """Seconds of each stage; time inside a nested stage counts for that one only."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self._open = ["rest"]
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        """Begins a stage."""
        self._change()
        self._open.append(name)

    def leave(self) -> None:
        """Ends the innermost stage."""
        self._change()
        self._open.pop()

    def _change(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside belongs to a stage."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a stage."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call


def make_pictures(root: Path, detector: bool, train: int, val: int) -> Path:
    """A data set of smooth random JPEGs: of 64 pixels in class folders, or of 640x480 with three boxes each."""
    generator = torch.Generator().manual_seed(0)
    width, height = (640, 480) if detector else (64, 64)
    for split, count in (("train", train), ("val", val)):
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)]
        for i in range(count):
            coarse = torch.randint(0, 256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
            folder = root / ("images" if detector else f"{split}/class {i % CLASSES}")
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{split}_{i}.jpg"
            Image.fromarray(coarse.numpy()).resize((width, height)).save(file)
            content["images"].append({"id": i, "file_name": file.name, "width": width, "height": height})
            for left, top in torch.randint(0, 350, (3, 2), generator=generator).tolist():
                annotation = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": 1 + i % CLASSES}
                content["annotations"].append(annotation | {"bbox": [left, top, 100, 90], "iscrowd": 0})
        if detector:
            (root / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def measure(config: FinetuneConfig) -> dict[str, float]:
    """Seconds of each stage in the epochs of a run after the first."""
    process = join(config.device)
    blank: Any = timm.create_model(config.model, device="meta")
    task = task_of(blank)
    splits = task.open_splits(config, blank, process, None)
    chosen = planning.plan(config, task, blank, len(splits.train), splits.train.class_names, process)
    run = training.start(chosen, task, splits, RunFolder(config.out), process)
    stages = Stages(process.device)
    for net in {id(net): net for net in (run.net, run.eval_net)}.values():
        net.register_forward_pre_hook(lambda *_: stages.enter("forward"))
        net.register_forward_hook(lambda *_: stages.leave())
    for owner, attribute, name in (
        (run, "prepare", "normalisation"),
        (run.training, "forward", "loss"),
        (run.training, "update_ema", "EMA"),
        (run.optimizer, "step", "optimiser"),
        (run.optimizer, "zero_grad", "optimiser"),
        (run.task, "score", "metrics"),
        (run, "save", "saving"),
    ):
        setattr(owner, attribute, stages.timed(name, getattr(owner, attribute)))
    patches = [
        mock.patch.object(torch.Tensor, "backward", stages.timed("backward", torch.Tensor.backward)),
        mock.patch.object(training, "_next_micro_batches", stages.timed("reading", training._next_micro_batches)),
    ]
    bar: tqdm[Any] = tqdm(disable=True)
    with freed_memory_kept(process.device), StopSignals() as signals, patches[0], patches[1]:
        for epoch in range(config.epochs):
            if epoch == 1:
                stages.enter("rest")  # ends what the first epoch has left open
                stages.leave()
                stages.seconds.clear()
            training.train_epoch(run, signals, bar)
            training.end_epoch(run, signals)
        stages.enter("rest")
    return dict(stages.seconds)


def benchmark(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """The share of each stage, in per cent, and seconds per epoch."""
    detector = isinstance(timm.create_model(network, device="meta"), DetectionNet)
    image_size, batch_size = SETTINGS[detector]
    images = options.steps * batch_size
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or make_pictures(Path(folder) / "data", detector, images, max(CLASSES, images // 10))
        config = FinetuneConfig(
            network,
            str(data),
            Path(folder) / "run",
            check=False,
            pretrained=False,
            head_epochs=0,
            epochs=1 + options.epochs,
            batch_size=batch_size,
            accumulate=1,
            image_size=str(image_size),
            warmup_epochs=0,
            bf16=options.bf16,
            workers=options.workers,
            device=options.device,
            mosaic_off=0 if detector else None,
        )
        with redirect_stdout(sys.stderr):
            seconds = measure(config)
    total = sum(seconds.values())
    row: dict[str, Any] = {"network": network, "image_size": image_size, "batch": batch_size}
    row |= {"overhead": 100 * sum(value for name, value in seconds.items() if name not in NETWORKS) / total}
    row |= {name: 100 * value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return row | {"s / epoch": total / options.epochs}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["yolov8n", "pyconvresnet50_spd"])
    parser.add_argument("--data", help="a data set for `spd-zoo finetune` (default: random pictures)")
    parser.add_argument("--steps", type=int, default=8, help="steps per epoch on random pictures")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that are timed")
    parser.add_argument("--workers", type=int, default=FinetuneConfig.workers, help="processes that read")
    parser.add_argument("--device")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for network in options.network:
        row = benchmark(network, options)
        if options.json:
            print(json.dumps(row | {key: getattr(options, key) for key in ("workers", "threads", "bf16")}), flush=True)
        else:
            cells = (f"{name} {value:.1f}" for name, value in row.items() if isinstance(value, float))
            print(f"{network} {row['image_size']} px, batch {row['batch']}: {' | '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
