"""Training a classifier: data, network, optimiser, epochs, result; one function that reads from top to bottom."""

import csv
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.models import get_pretrained_cfg, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from spd_zoo.models.bsconv_mobilenetv3 import BSConvMobileNetV3
from spd_zoo.training.data import DataError, loader, open_data, train_val_split
from spd_zoo.weights import WeightsError

__all__ = ["FinetuneConfig", "finetune", "top1"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train, on what, and how; each field is an option of `spd-zoo finetune`."""

    model: str = field(metadata={"help": "network, with or without a tag, or the folder of a run"})
    data: Path = field(metadata={"help": "folder with train/<class>/ or train*.parquet, and val likewise"})
    out: Path = field(metadata={"help": "folder of the run; a run in it goes on where it stopped"})
    pretrained: bool = _option(False, "start from the network's pretrained weights")
    model_args: str = _option("", "arguments of the network, for example zero_init_residual=true,drop_path_rate=0.1")
    epochs: int = _option(20, "passes over the training images")
    batch_size: int = _option(128, "images per step")
    image_size: str = _option("64", "pixels; 32,48@11 means 32, and 48 from epoch 11 (counted from 0) on")
    val_size: int = _option(0, "training images to hold out where the data has no val split")
    opt: str = _option("lamb", "timm's name of the optimiser")
    lr: float = _option(6e-3, "largest learning rate")
    weight_decay: float = _option(0.02, "weight decay; none on biases and normalisation layers")
    decay_all: bool = _option(False, "weight decay on biases and normalisation layers too")
    sched: str = _option("cosine", "how the learning rate falls: cosine, or multistep: to a tenth at --decay-epochs")
    decay_epochs: str = _option("", "epochs for multistep, counted from 0, for example 100,150,180")
    warmup_epochs: int = _option(2, "epochs over which the learning rate rises")
    label_smoothing: float = _option(0.1, "share of the target spread over all classes")
    crop_scale: float = _option(0.5, "smallest share of an image's area that a random crop keeps")
    crop_padding: int = _option(0, "instead of that, a random crop of the image with so many black pixels around it")
    auto_augment: str | None = _option(None, "timm's policy string, for example rand-m6-n2-mstd0.5")
    mixup: float = _option(0.0, "Mixup alpha")
    cutmix: float = _option(0.0, "CutMix alpha")
    bf16: bool = _option(False, "compute in bfloat16 where autocast allows it")
    seed: int = _option(0, "seed of initial weights, order, augmentation and held-out images")
    workers: int = _option(2, "processes that read and augment images")
    device: str = _option("cpu", "torch device")

    def __post_init__(self) -> None:
        """Refuses numbers without meaning."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("val_size", "warmup_epochs", "workers", "mixup", "cutmix", "weight_decay", "crop_padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 < self.crop_scale <= 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError("crop_scale must be above 0 and at most 1, label_smoothing from 0 to below 1")
        if self.sched not in ("cosine", "multistep") or (self.sched == "multistep") != bool(self.decay_epochs):
            raise ValueError(
                "sched is cosine, or multistep with decay_epochs, "
                f"got {self.sched!r} with decay_epochs {self.decay_epochs!r}"
            )
        _parse_sizes(self.image_size), _parse_epochs(self.decay_epochs), _parse_model_args(self.model_args)
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"Mixup and CutMix need an even batch_size, got {self.batch_size}")


def finetune(config: FinetuneConfig) -> float:
    """Trains `config.model` and returns the validation top-1 in per cent.

    `config.out` then holds `model.safetensors` and `config.json`, which `timm.create_model("local-dir:OUT")` loads,
    `metrics.csv`, `run.json` (this configuration) and `last.pt`. A run that was stopped goes on behind its last
    finished epoch when it is called again with the same configuration.

    Raises:
        DataError: If the data set cannot be used.
        ValueError: If an option has no meaning, or `config.out` holds a run of another configuration.
    """
    sizes = _parse_sizes(config.image_size)
    train = open_data(config.data, "train")
    if train is None:
        raise DataError(f"{config.data} has neither train/<class>/ folders nor train*.parquet files")
    val = open_data(config.data, "val")
    if val is None:
        if not config.val_size:
            raise DataError(f"{config.data} has no val split; add one or hold images out with --val-size")
        train, val = train_val_split(train, config.val_size, config.seed)
    random_seed(config.seed)
    network_args = _parse_model_args(config.model_args) | {"num_classes": len(train.class_names)}
    network = get_pretrained_cfg(config.model.partition(".")[0])
    fixed_size = network is not None and network.fixed_input_size
    if fixed_size and (len(sizes) > 1 or network_args.setdefault("img_size", sizes[0][0]) != sizes[0][0]):
        raise ValueError(f"{config.model} takes images of one size: give one --image-size, and no other img_size")
    try:
        net = timm.create_model(config.model, pretrained=config.pretrained, **network_args)
        net = net.to(config.device).to(memory_format=torch.channels_last)
    except TypeError as error:
        raise ValueError(f"{config.model} does not take these model_args: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise ValueError(f"cannot use device {config.device!r}: {error}") from error
    _claim(config)
    input_config = resolve_data_config(model=net)
    normalize = {"mean": input_config["mean"], "std": input_config["std"]}
    optimizer = create_optimizer_v2(
        net, config.opt, config.lr, config.weight_decay, filter_bias_and_bn=not config.decay_all
    )
    steps_per_epoch = max(1, len(train.labels) // config.batch_size)
    # timm looks one step ahead: half a step behind the beginning of an epoch, its first step has the new rate
    milestones: Any = [epoch + 0.5 / steps_per_epoch for epoch in _parse_epochs(config.decay_epochs)]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.lr / 100,
        decay_milestones=milestones,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    mixup = None
    if config.mixup or config.cutmix:
        mixup = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=len(train.class_names)
        )

    state_file = config.out / "last.pt"
    history: list[dict[str, Any]] = []
    if state_file.exists():
        state = torch.load(state_file, map_location=config.device, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    for epoch in range(len(history), config.epochs):
        started = time.monotonic()
        random_seed(config.seed, epoch + 1)  # so that an epoch is the same after a stop
        size = next(pixels for pixels, first in reversed(sizes) if epoch >= first)
        batches = loader(
            train,
            size,
            config.batch_size,
            True,
            config.workers,
            crop_padding=config.crop_padding,
            scale=(config.crop_scale, 1.0),
            color_jitter=0.0,
            auto_augment=config.auto_augment,
            interpolation="random",
            **normalize,
        )
        loss_sum = torch.zeros((), device=config.device)
        net.train()
        progress = tqdm(batches, f"epoch {epoch + 1}/{config.epochs} at {size} px", mininterval=5.0, leave=False)
        for step, (images, labels) in enumerate(progress):
            images, labels = images.to(config.device, memory_format=torch.channels_last), labels.to(config.device)
            if mixup is not None:
                images, labels = mixup(images, labels)
            scheduler.step_update(epoch * steps_per_epoch + step)
            with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
                logits = net(images)
            loss = _loss(logits.float(), labels, config.label_smoothing)
            if isinstance(net, BSConvMobileNetV3) and net.regularization:
                loss = loss + net.regularization_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            if step % 20 == 19:
                progress.set_postfix(loss=f"{loss_sum.item() / (step + 1):.3f}")

        val_batches = loader(val, size, 250, False, config.workers, crop_pct=1.0, interpolation="bilinear", **normalize)
        accuracy = top1(net, val_batches, config.device, config.bf16)
        row = {
            "epoch": epoch + 1,
            "image_size": size,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": loss_sum.item() / len(batches),
            "val_top1": accuracy,
            "seconds": round(time.monotonic() - started, 1),
        }
        history.append(row)
        _write_metrics(config.out / "metrics.csv", history)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)
        print(f"epoch {epoch + 1}: train loss {row['train_loss']:.3f}, val top-1 {accuracy:.2f} %", flush=True)

    net = net.to(memory_format=torch.contiguous_format)  # what safetensors stores
    cfg: Any = net.pretrained_cfg
    source = {
        "input_size": (net.in_chans, sizes[-1][0], sizes[-1][0]),
        "num_classes": len(train.class_names),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "label_names": train.class_names,
    }
    save_for_hf(net, str(config.out), {"pretrained_cfg": cfg | source}, safe_serialization=True)
    return float(history[-1]["val_top1"])


def _claim(config: FinetuneConfig) -> None:
    """Makes the run's folder, or checks that the run in it is this one."""
    wanted = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    file = config.out / "run.json"
    if file.exists():
        given = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key in wanted if wanted[key] != given.get(key) and key not in ("out", "workers", "device")]
        if other:
            raise ValueError(
                f"{config.out} holds a run with {other[0]}={given.get(other[0])}, not {wanted[other[0]]}; "
                "give another folder with --out"
            )
        return
    if config.out.exists() and any(config.out.iterdir()):
        raise ValueError(f"{config.out} is not empty and holds no run; give a new folder with --out")
    config.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "32,48@11" -> [(32, 0), (48, 11)]: pixels and the first epoch with that size."""
    sizes = []
    for part in text.split(","):
        pixels, _, first = part.partition("@")
        if not pixels.strip().isdigit() or not (first or "0").isdigit():
            raise ValueError(f"image_size {text!r} is not like 64 or 32,48@11")
        sizes.append((int(pixels), int(first or 0)))
    epochs = [first for _, first in sizes]
    if epochs[0] != 0 or epochs != sorted(set(epochs)):
        raise ValueError(f"image_size {text!r} must begin with a size for epoch 0, then sizes with rising epochs")
    return sizes


def _parse_epochs(text: str) -> list[int]:
    """ "100,150,180" -> [100, 150, 180]."""
    epochs = text.split(",") if text else []
    numbers = [int(epoch) for epoch in epochs if epoch.strip().isdigit()]
    if len(numbers) < len(epochs) or numbers != sorted(set(numbers)):
        raise ValueError(f"decay_epochs {text!r} is not like 100,150,180: rising whole numbers")
    return numbers


def _parse_model_args(text: str) -> dict[str, Any]:
    """ "zero_init_residual=true,drop_path_rate=0.1" -> {"zero_init_residual": True, "drop_path_rate": 0.1}."""
    arguments = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            arguments[name.strip()] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"model_args {part!r} is not like zero_init_residual=true or drop_rate=0.1") from error
    return arguments


def _loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with class indices, or with class probabilities (which Mixup has smoothed already)."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)


@torch.inference_mode()
def top1(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: str, bf16: bool = False) -> float:
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
    with path.with_suffix(".tmp").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
    path.with_suffix(".tmp").replace(path)
