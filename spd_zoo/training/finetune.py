"""Training a classifier: data, network, optimiser, epochs, result; one function that reads from top to bottom."""

import csv
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from spd_zoo.training.data import DataError, loader, open_data, train_val_split

__all__ = ["FinetuneConfig", "finetune", "top1"]


@dataclass
class FinetuneConfig:
    """What to train, on what, and how. The names are those of the command line."""

    model: str
    data: Path
    out: Path
    pretrained: bool = False
    model_args: tuple[tuple[str, Any], ...] = ()  # arguments of the network, e.g. ("zero_init_residual", True)
    epochs: int = 20
    batch_size: int = 128
    image_size: tuple[tuple[int, int], ...] = ((64, 0),)  # (pixels, first epoch with that size)
    val_size: int = 0  # images held out of the training split where there is no val split
    opt: str = "lamb"
    lr: float = 6e-3
    weight_decay: float = 0.02
    warmup_epochs: int = 2
    label_smoothing: float = 0.1
    crop_scale: float = 0.5  # smallest share of the image's area that a random crop keeps
    auto_augment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    bf16: bool = False
    seed: int = 0
    workers: int = 2
    device: str = "cpu"


def finetune(config: FinetuneConfig) -> float:
    """Trains `config.model`, resuming where an earlier run into `config.out` stopped; returns the validation top-1.

    `config.out` then holds `model.safetensors` and `config.json`, which `timm.create_model("local-dir:OUT")` loads,
    `metrics.csv`, and `last.pt`, from which the run resumes (its weights are tensors only; nothing is unpickled).

    Raises:
        DataError: If the data set cannot be used.
    """
    train = open_data(config.data, "train")
    if train is None:
        raise DataError(f"{config.data} has neither train/<class>/ folders nor train*.parquet files")
    val = open_data(config.data, "val")
    if val is None:
        if not config.val_size:
            raise DataError(f"{config.data} has no val split; add one or hold images out with --val-size")
        train, val = train_val_split(train, config.val_size, config.seed)
    config.out.mkdir(parents=True, exist_ok=True)

    random_seed(config.seed)
    network_args = dict(config.model_args) | {"num_classes": len(train.class_names)}
    net = timm.create_model(config.model, pretrained=config.pretrained, **network_args)
    net = net.to(config.device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, config.opt, lr=config.lr, weight_decay=config.weight_decay)
    steps_per_epoch = max(1, len(train.labels) // config.batch_size)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.lr / 100,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    mixup = None
    if config.mixup or config.cutmix:
        mixup = Mixup(
            config.mixup,
            config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=len(train.class_names),
        )

    state_file = config.out / "last.pt"
    history: list[dict[str, Any]] = []
    if state_file.exists():
        state = torch.load(state_file, map_location=config.device, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    normalize = {"mean": config.mean, "std": config.std}
    for epoch in range(len(history), config.epochs):
        started = time.monotonic()
        random_seed(config.seed, epoch + 1)
        size = next(pixels for pixels, first in reversed(config.image_size) if epoch >= first)
        batches = loader(
            train,
            size,
            config.batch_size,
            True,
            config.workers,
            scale=(config.crop_scale, 1.0),
            color_jitter=0.0,
            auto_augment=config.auto_augment,
            interpolation="random",
            **normalize,
        )
        loss_sum = torch.zeros((), device=config.device)
        net.train()
        progress = tqdm(batches, f"epoch {epoch + 1}/{config.epochs} at {size} px", mininterval=5.0)
        for step, (images, labels) in enumerate(progress):
            images, labels = images.to(config.device, memory_format=torch.channels_last), labels.to(config.device)
            if mixup is not None:
                images, labels = mixup(images, labels)
            scheduler.step_update(epoch * steps_per_epoch + step)
            with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
                logits = net(images)
            loss = _loss(logits.float(), labels, config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            if step % 20 == 19:
                progress.set_postfix(loss=f"{loss_sum.item() / (step + 1):.3f}")

        val_batches = loader(val, size, 250, False, config.workers, crop_pct=1.0, interpolation="bilinear", **normalize)
        accuracy = top1(net, val_batches, config.device, config.bf16)
        history.append(
            {
                "epoch": epoch + 1,
                "image_size": size,
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": loss_sum.item() / len(batches),
                "val_top1": accuracy,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        _write_metrics(config.out / "metrics.csv", history)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)
        print(f"epoch {epoch + 1}: train loss {history[-1]['train_loss']:.3f}, val top-1 {accuracy:.2f} %", flush=True)
    _write_network(net, config, train.class_names)
    return float(history[-1]["val_top1"])


def _loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with class indices, or with class probabilities (which Mixup has smoothed already)."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)


@torch.inference_mode()
def top1(net: nn.Module, batches: Any, device: str, bf16: bool = False) -> float:
    """Share of images whose class has the largest logit, in per cent."""
    net.eval()
    right = total = 0
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = net(images)
        right += int((logits.argmax(1).cpu() == labels).sum())
        total += len(labels)
    return 100 * right / total


def _write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
    os.replace(path.with_suffix(".tmp"), path)


def _write_network(net: nn.Module, config: FinetuneConfig, class_names: list[str]) -> None:
    """The folder that `timm.create_model("local-dir:...")` loads, and the exact configuration beside it."""
    size = config.image_size[-1][0]
    cfg = net.pretrained_cfg | {
        "input_size": (3, size, size),
        "num_classes": len(class_names),
        "mean": config.mean,
        "std": config.std,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "label_names": class_names,
    }
    save_for_hf(net, str(config.out), {"pretrained_cfg": cfg}, safe_serialization=True)
    (config.out / "run.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")
