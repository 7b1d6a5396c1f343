"""What a run prints before it begins and after it ends."""

import shlex
from collections.abc import Sequence
from typing import Any

from timm.models import get_pretrained_cfg

from spd_zoo.data.notes import count
from spd_zoo.data.reading import size_text
from spd_zoo.process import Process
from spd_zoo.training.config import FinetuneConfig, Plan
from spd_zoo.training.task import Task, score_of

__all__ = ["choices", "next_commands", "verdict"]

NOTHING = 1.0  # an AP in per cent below which a detector is of no use


def choices(plan: Plan, process: Process, recipe: str | None = None) -> str:
    """What a run does, on one line.

    Args:
        plan: All values of the run.
        process: This process, whose device is named.
        recipe: The recipe that some of them come from.
    """
    config = plan.config
    weights = "random weights"
    if plan.pretrained:
        known = get_pretrained_cfg(config.model) if "." not in config.model else None
        tag = known.tag if known is not None and ":" not in config.model else ""
        weights = f"weights {f'{config.model}.{tag}' if tag else config.model}"
    rate = f"{plan.opt} with learning rate {plan.lr:.2g}"
    if plan.layer_decay != 1:
        rate += f" (times {plan.layer_decay:g} per layer from the end)"
    sizes = ", ".join(size_text(size) for size, _ in plan.sizes)
    parts = [f"recipe {recipe}" if recipe else "", weights]
    parts += [f"{count(config.epochs, 'epoch')} at {sizes} px", f"batch {plan.batch_size}", rate]
    parts += [f"moving average {plan.ema:g}" if plan.ema else "", _augmentation(config)]
    parts += ["BatchNorm statistics frozen" if plan.freeze_bn else ""]
    parts += [f"{'bfloat16' if plan.bf16 else 'float32'} on {process.device}", f"keep {plan.keep}"]
    return f"chosen: {', '.join(filter(None, parts))}"


def _augmentation(config: FinetuneConfig) -> str:
    """The augmentation that is in use."""
    names = "crop_padding crop_scale hflip vflip rotation color_jitter auto_augment erase mixup cutmix"
    hidden = {"crop_scale"} if config.crop_padding or config.mosaic is not None else set()
    found = {
        name: getattr(config, name)
        for name in f"{names} mosaic zoom shift hsv".split()
        if name not in hidden and getattr(config, name)
    }
    return "augmentation " + (" ".join(f"{name} {value}" for name, value in found.items()) or "none")


def verdict(plan: Plan, task: Task[Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which network was kept, if not the last; and what to try if the network became worse or detects nothing.

    Args:
        plan: All values of the run.
        task: Its task.
        rows: The metrics before the first epoch, if they are known, then those of each epoch.
    """
    scores = [score_of(task, row) for row in rows]
    best, kept = scores.index(max(scores)), plan.keep == "best"
    lines = []
    if kept and rows[best]["epoch"] and best < len(rows) - 1:
        lines.append(f"kept: the network of epoch {rows[best]['epoch']}, which had the best {task.metric}")
    if scores[-1] < 0:
        lines.append(
            f"note: the loss on the validation images is not finite after epoch {rows[-1]['epoch']}, the last one; try "
            f"a smaller learning rate (--lr {plan.lr / 4:.1g})"
        )
    elif not rows[0]["epoch"] and scores[-1] < scores[0]:
        lower = f"--lr {plan.lr / 4:.1g}"
        frozen = "" if plan.freeze_bn else ", --freeze-bn"
        at_start = "; the network is kept as it began" if kept and best == 0 else ""
        began, ended = (task.epoch_in_words(row) for row in (rows[0], rows[-1]))
        lines.append(
            f"note: training ended below where it began: {ended}, before the first epoch {began}{at_start}. Try a "
            f"smaller learning rate ({lower}){frozen}, more --epochs, or weaker augmentation"
        )
    elif task.metric == "val_ap" and max(scores) < NOTHING:
        start = "" if plan.pretrained else ", pretrained weights"
        lines.append(
            f"note: the network detects next to nothing: {task.epoch_in_words(rows[best])}. Try more --epochs{start}, "
            "or a larger --image-size"
        )
    return lines


def next_commands(config: FinetuneConfig, task: Task[Any]) -> list[str]:
    """Commands that use the network."""
    out, data = shlex.quote(str(config.out)), shlex.quote(config.data)
    return [
        "next:",
        f"  spd-zoo {'predict' if task.networks == 'classifiers' else 'detect'} {out} IMAGE",
        f"  spd-zoo evaluate {out} --data {data}",
        f"  spd-zoo export {out} --to onnx",
    ]
