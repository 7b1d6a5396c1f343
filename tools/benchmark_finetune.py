"""Measures speed and memory of `spd-zoo finetune` against a loop of timm's components on the same data.

    python tools/benchmark_finetune.py --data DIR [--model pyconvresnet50_spd] [--image-size 48] [--rounds 3] [--json]

DIR has train/<class>/ and val/<class>/, or parquet files. Both contenders train from scratch with the same network,
optimiser, schedule, crops, batch size, precision, threads and reading processes, evaluate and save after every epoch,
and alternate, each run in a process of its own. An epoch's time is that between the ends of two epochs, so that imports
and the first epoch do not count. Peak memory is the training process's largest resident set.

timm's own train.py is neither in timm's package nor in its source archive on PyPI. The loop here has the same
components in the same order: `create_dataset`, `create_loader` (which prefetches and normalises), `ClassificationTask`,
`create_optimizer_v2`, `create_scheduler_v2`, `ClassificationEvaluator`, `CheckpointSaver`. Ours uses torch's fused
AdamW, which timm does not by default; everything else is the same.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationEvaluator, ClassificationTask
from timm.utils import CheckpointSaver

import spd_zoo  # noqa: F401  (registers the networks)
from spd_zoo.training.finetune import FinetuneConfig, finetune

OPT, LR, WEIGHT_DECAY, SMOOTHING, CROP_SCALE = "adamw", 1e-3, 0.02, 0.1, 0.5


def ours(options: argparse.Namespace, out: Path) -> list[float]:
    """Trains with `finetune`; returns the time at which each epoch ended, in seconds."""
    config = FinetuneConfig(
        options.model,
        options.data,
        out / "run",
        val_name=options.val_name,
        check=False,
        pretrained=False,
        head_epochs=0,
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulate=1,
        image_size=str(options.image_size),
        opt=OPT,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        warmup_epochs=0,
        label_smoothing=SMOOTHING,
        crop_scale=CROP_SCALE,
        bf16=options.bf16,
        workers=options.workers,
        device="cpu",
    )
    finetune(config)
    lines = (out / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    return [datetime.fromisoformat(line.split()[0]).timestamp() for line in lines]


def timms(options: argparse.Namespace, out: Path) -> list[float]:
    """Trains with timm's components; returns the time at which each epoch ended, in seconds."""
    device = torch.device("cpu")
    root = str(Path(options.data).resolve())
    parquet = any(Path(root).glob("*.parquet"))
    source: dict[str, Any] = {"name": f"hfds/{root}", "root": None} if parquet else {"name": "", "root": root}
    train = create_dataset(**source, split="train", is_training=True)
    val = create_dataset(**source, split=options.val_name)
    torch.manual_seed(0)
    net = timm.create_model(options.model, num_classes=len(train.reader.class_to_idx))
    config = resolve_data_config(model=net)
    net = net.to(memory_format=torch.channels_last)
    task = ClassificationTask(net, criterion_kwargs={"smoothing": SMOOTHING}, device=device, verbose=False)
    optimizer = create_optimizer_v2(net, OPT, LR, WEIGHT_DECAY)
    common: dict[str, Any] = {
        "input_size": (3, options.image_size, options.image_size),
        "batch_size": options.batch_size,
        "mean": config["mean"],
        "std": config["std"],
        "num_workers": options.workers,
        "device": device,
    }
    batches: Any = create_loader(
        train, **common, is_training=True, scale=(CROP_SCALE, 1.0), color_jitter=0.0, interpolation="random"
    )
    val_batches: Any = create_loader(val, **common, crop_pct=1.0, interpolation="bilinear")
    scheduler: Any
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=options.epochs, step_on_epochs=False, updates_per_epoch=len(batches)
    )
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(out), recovery_dir=str(out), max_history=1, task=task)
    ends = []
    for epoch in range(options.epochs):
        net.train()
        loss_sum = 0.0
        for step, (images, labels) in enumerate(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                loss = task(images.contiguous(memory_format=torch.channels_last), labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * len(batches) + step + 1)
            loss_sum += loss.item()
        net.eval()
        evaluator: Any = ClassificationEvaluator(device)
        with torch.inference_mode():
            for images, labels in val_batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                    logits = net(images.contiguous(memory_format=torch.channels_last))
                evaluator.update(logits.float(), labels)
        top1 = evaluator.compute()["top1"]
        saver.save_checkpoint(epoch, top1)
        print(f"epoch {epoch + 1}: train loss {loss_sum / len(batches):.3f}, val top-1 {top1:.2f} %", file=sys.stderr)
        ends.append(time.time())
    return ends


CONTENDERS = {"ours": ours, "timm": timms}


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs one contender in this process: epochs per hour, peak memory in MiB."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        ends = CONTENDERS[name](options, Path(folder))
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return {"epochs_per_hour": 3600 / seconds, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per contender and the ratios; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--val-name", default="val", help="the split to evaluate on (default: val)")
    parser.add_argument("--model", default="pyconvresnet50_spd")
    parser.add_argument("--epochs", type=int, default=3, help="per run, at least 2 (default: 3)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)  # the process of one run
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: an epoch is timed between the ends of two epochs")
    if options.only:
        print("result", json.dumps(run(options.only, options)))
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, rows in found.items():
            command = [sys.executable, __file__, *arguments, "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1].removeprefix("result ")))
    result: dict[str, Any] = {
        name: {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
        for name, rows in found.items()
    }
    for key in ("epochs_per_hour", "MiB"):
        ratios = [a[key] / b[key] for a, b in zip(found["ours"], found["timm"], strict=True)]
        result[f"{key}, ours / timm"] = round(statistics.median(ratios), 3)
    if options.json:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        settings = {key: getattr(options, key) for key in ("model", "image_size", "batch_size", "threads", "bf16")}
        print(json.dumps(settings | result | {"versions": versions}))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
