"""Training a network: data, network, optimiser, epochs, result; one function that reads from top to bottom."""

import copy
import importlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import IterableDataset
from tqdm import tqdm

from spd_zoo.data.check import in_words
from spd_zoo.data.labelled import Batches, DataError, Steps, read, seed_everything
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import Process, Stopped, StopSignals, join
from spd_zoo.training.classification import task as classification
from spd_zoo.training.config import (
    FinetuneConfig,
    merged,
    parse_epochs,
    parse_model_args,
    parse_numbers,
    parse_sizes,
    refuse_others,
)
from spd_zoo.training.evaluate import Input
from spd_zoo.training.run import RunError, RunFolder
from spd_zoo.weights import WeightsError

__all__ = ["FinetuneConfig", "Result", "RunError", "Stopped", "finetune"]

FUSED = ("adam", "adamw")  # computed in one pass over the weights; torch's fused SGD cannot begin with the head alone


@dataclass(frozen=True)
class Result:
    """What a run has come to: its folder, a dict per epoch, and the figures of the network that it left."""

    folder: Path
    history: list[dict[str, Any]]
    metrics: dict[str, float]


def finetune(config: FinetuneConfig) -> Result | None:
    """Trains `config.model` on `config.data`; returns None if it is a dry run.

    `config.out` then holds

    - `model.safetensors` and `config.json`, which `timm.create_model("local-dir:OUT")` loads,
    - `report.html`, `metrics.csv`, `per_class.csv`, `confusion.csv` and `figures/`,
    - `run.yaml` (the configuration), `environment.json`, `data.json` (what the check of the data found), `log.txt`,
    - `last.pt`, from which a run that was stopped goes on, to the same bits, when it is called again with the same
      configuration. Every random choice is drawn from (seed, epoch, step), so no generator's state belongs to it.

    Under torchrun the processes share every step's images.

    Raises:
        DataError: If the data set cannot be used.
        RunError: If the run cannot go on: the loss is not finite, or the disk is full.
        Stopped: After SIGINT or SIGTERM, when the step in hand is done and saved.
        ValueError: If an option has no meaning, or `config.out` holds a run of another configuration.
    """
    if config.tensorboard:
        importlib.import_module("torch.utils.tensorboard")  # an error now, not behind the first epoch
    process = join(config.device)
    folder = RunFolder(config.out)
    began = process.broadcast(folder.beginning(config) if process.first else None)
    if began is not None:
        config = merged(began.config, config)
    with torch.device("meta"):  # a network without numbers, to see what it is
        blank = _made(config.model, pretrained=False)
    kind = _kind(blank)
    refuse_others(config, kind.NETWORKS)

    # data
    train, val, about = kind.open_splits(config, process, began.about_data if began is not None else None)
    for line in in_words(about) if "train" in about else ["the images are not checked"]:
        process.print(line)
    if config.dry_run:
        return None

    # network
    config = _chosen(config, len(train), kind, blank, process)
    sizes = parse_sizes(config.image_size or "")
    seed_everything(config.seed)
    net = _create(config, len(train.class_names), sizes, process)
    given = _input(net, config, process.device)
    config = replace(config, accumulate=_parts(net, sizes, config, given, process))
    assert config.batch_size and config.accumulate and config.opt  # nothing is open any more
    assert config.warmup_epochs is not None and config.warmup_lr is not None and config.head_epochs is not None
    assert config.weight_decay is not None
    frozen = _named(net, config.freeze)
    if config.head_epochs and (not _classifier(net) or any(_inside(part, frozen) for part in _classifier(net))):
        raise ValueError("the classifier cannot learn alone, it is frozen or unknown; give --head-epochs 0")
    for name, parameter in net.named_parameters():
        parameter.requires_grad = not _inside(name, frozen)
    task: Any = kind.Task(net, config, train, process)
    if config.ema:
        task.setup_ema(config.ema, use_warmup=True)
    trained: Any = task.trainable_module_ema.module if config.ema else net  # what is evaluated and kept
    prepare = kind.preparation(config, given, len(train.class_names))

    # optimiser and learning rate
    fused: dict[str, Any] = {"fused": True} if config.opt in FUSED else {}
    optimizer = create_optimizer_v2(
        net,
        config.opt,
        config.lr,
        config.weight_decay,
        momentum=config.momentum,
        filter_bias_and_bn=not config.decay_all,
        layer_decay=None if config.layer_decay == 1 else config.layer_decay,
        **fused,
    )
    steps = Steps(
        len(train), config.batch_size, config.accumulate, process.rank, process.world, config.drop_last, config.seed
    )
    updates = 1 if config.sched_epochs else steps.per_epoch
    # timm looks one step ahead: half a step behind the beginning of an epoch, its first step has the new rate
    milestones: Any = [epoch + 0.5 / updates for epoch in parse_epochs(config.decay_epochs)]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        decay_milestones=milestones,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        step_on_epochs=config.sched_epochs,
        updates_per_epoch=updates,
    )

    # state: where a stopped run goes on
    if process.first:
        folder.begin(config, about)
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {}  # the network of the best epoch, for early stopping
    done, sums = 0, _Sums()  # of the epoch in hand: its steps, and their loss with its terms
    state = process.broadcast(folder.load() if process.first else None)
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        if config.ema:
            trained.load_state_dict(state["ema"])
        history, best, done = state["history"], state["best"], state["step"]
        for losses in state["losses"][process.rank :: process.world]:  # another number of processes may go on
            sums.add({name: torch.tensor(value, device=process.device) for name, value in losses.items()}, 1.0)

    def save() -> None:
        losses = _finite(process.all_gather(sums.numbers()))
        if process.first:
            now = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history, "best": best}
            now |= {"ema": trained.state_dict() if config.ema else None, "step": done, "losses": losses}
            folder.save(now | {"class_names": train.class_names})

    # epochs
    learning: Sequence[str] | None = None
    size = 0
    saved = time.monotonic()
    with StopSignals() as signals, _progress(config, steps, len(history), done, process) as bar:
        for epoch in range(len(history), config.epochs):
            if _stagnates([row[kind.BEST] for row in history], config.patience):
                break
            started, first = time.monotonic(), done
            if size != _size_in(epoch, sizes):
                size = _size_in(epoch, sizes)
                batches = kind.train_batches(net, train, size, steps, config, given)
                val_batches = kind.val_batches(net, val, size, config, given, process)
            bar.set_description(f"epoch {epoch + 1}/{config.epochs} at {size} px")

            # first the classifier learns alone, then all that is not frozen
            now_learning = _classifier(net) if epoch < config.head_epochs else [""]
            if now_learning != learning:
                learning = now_learning
                _let_learn(task, net, learning, frozen, config, process)
            net.train()
            for name, module in net.named_modules():
                if name and (_inside(name, frozen) or not (_inside(name, learning) or _around(name, learning))):
                    module.eval()

            scheduler.step(epoch)
            reading = _reading(batches, epoch, done, steps)
            for step in range(done, steps.per_epoch):
                shares = _next(reading, steps.parts, signals)
                late = time.monotonic() - saved > 60 * config.save_minutes
                asked, overdue = process.all_reduce_max(signals.number, late)
                if shares is None or asked:
                    break
                if overdue:
                    save()
                    saved = time.monotonic()
                scheduler.step_update(epoch * steps.per_epoch + step)
                for part, (pixels, targets) in enumerate(shares):
                    seed_everything(config.seed, epoch, step, process.rank + process.world * part)
                    images, targets = prepare(pixels, targets)
                    share = len(images) / steps.size(step)
                    with task.no_sync() if part + 1 < len(shares) else nullcontext():
                        with given.autocast():
                            result = task(images, targets)
                        loss = result["loss"]
                        if not part:
                            optimizer.zero_grad()  # not before: the backward pass writes where the old gradients lay
                        (loss * (share * process.world)).backward()  # torch takes the mean over processes
                    sums.add({"loss": loss, **result.get("terms", {})}, share)
                if config.clip_grad:
                    dispatch_clip_grad(task.get_clip_parameters(), config.clip_grad)
                optimizer.step()
                task.update_ema(epoch * steps.per_epoch + step + 1)
                done = step + 1
                bar.update(steps.size(step))
            train_seconds = time.monotonic() - started
            asked = process.all_reduce_max(signals.number)[0]
            if asked:
                save()
                raise Stopped(int(asked), f"stopped in epoch {epoch + 1} behind step {done} of {steps.per_epoch}")

            if process.world > 1:  # where BatchNorm is not synchronised, that of the first process counts
                distribute_bn(net, process.world)
                distribute_bn(trained, process.world)
            try:
                metrics = kind.score(trained, val_batches, given, process)
            except RuntimeError as error:
                if not signals.number or process.world > 1:
                    raise
                save()  # the processes that read the images were stopped together with this one
                raise Stopped(signals.number, f"stopped behind the last step of epoch {epoch + 1}") from error
            row = {
                "epoch": epoch + 1,
                "image_size": size,
                "lr": max(group["lr"] for group in optimizer.param_groups),
                **_means(_finite(process.all_gather(sums.numbers())), steps.per_epoch),
                **{f"val_{name}": value for name, value in metrics.items()},
            }
            if config.patience and row[kind.BEST] > max((old[kind.BEST] for old in history), default=-math.inf):
                best = {"net": copy.deepcopy(trained.state_dict()), "image_size": size}
            history.append(row)
            done = 0
            sums.clear()
            if process.first:
                folder.write_history(history)
            save()
            saved = time.monotonic()
            speed = (steps.per_epoch - first) * steps.batch_size / train_seconds
            minutes = (config.epochs - epoch - 1) * (saved - started) / 60
            line = (
                f"epoch {epoch + 1}/{config.epochs} at {size} px: train loss {row['train_loss']:.3f}, "
                f"{kind.in_words(row)}, {speed:.0f} images/s, {minutes:.0f} min left"
            )
            process.print(line)
            if process.first:
                folder.log(line)
                if config.tensorboard:
                    folder.to_tensorboard(row)
            asked = process.all_reduce_max(signals.number)[0]
            if asked:
                raise Stopped(int(asked), f"stopped behind epoch {epoch + 1}")

    # result
    if best:
        trained.load_state_dict(best["net"])
    size = best["image_size"] if best else history[-1]["image_size"]
    figures = kind.finish(folder, trained, history, size, val, config, given, process)
    return Result(config.out, history, figures)


def _kind(net: nn.Module) -> Any:
    """The module with what is special about the network: `classification` or `detection`, with the same functions."""
    if isinstance(net, DetectionNet):
        return importlib.import_module("spd_zoo.training.detection.task")  # which needs packages that others do not
    return classification


def _chosen(config: FinetuneConfig, images: int, kind: Any, net: nn.Module, process: Process) -> FinetuneConfig:
    """The configuration with a value for what is left to the run, but for `accumulate`."""
    pretrained = config.pretrained
    if pretrained is None:
        known = get_pretrained_cfg(config.model)
        pretrained = ":" in config.model or (known is not None and bool(known.has_weights))  # local-dir:RUN has weights
    batch_size = config.batch_size
    shares = process.world * (config.accumulate or 1)
    if images < 2 * shares:
        raise DataError(f"{images} training images are too few for steps in {shares} parts: each needs two")
    if batch_size is None:  # a power of two that gives an epoch 20 steps, so that small data sets take enough of them
        batch_size = max(8, min(128, 2 ** int(math.log2(max(1, images / 20)))))
        batch_size += -batch_size % (2 * shares)
    if batch_size < 2 * shares:
        raise ValueError(f"batch_size {batch_size} is too small for steps in {shares} parts: each needs two images")
    if config.mixup or config.cutmix:
        batch_size = min(batch_size, images - images % (2 * shares))
        if batch_size % (2 * shares):
            raise ValueError(f"Mixup and CutMix need an even batch_size in each of {shares} parts, got {batch_size}")
    config = replace(config, pretrained=pretrained, batch_size=batch_size)
    values = kind.defaults(config, net)
    config = replace(config, **{name: value for name, value in values.items() if getattr(config, name) is None})
    assert config.lr is not None
    return replace(
        config,
        warmup_epochs=min(2, config.epochs // 4) if config.warmup_epochs is None else config.warmup_epochs,
        warmup_lr=config.lr / 100 if config.warmup_lr is None else config.warmup_lr,
        head_epochs=int(pretrained) if config.head_epochs is None else config.head_epochs,
        bf16=_made_for_bf16(process.device) if config.bf16 is None else config.bf16,
    )


def _made_for_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 rather than imitating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _create(config: FinetuneConfig, classes: int, sizes: list[tuple[int, int]], process: Process) -> Any:
    """The network, on its device."""
    arguments = parse_model_args(config.model_args) | {"num_classes": classes}
    known = get_pretrained_cfg(config.model.partition(".")[0])
    fixed_size = known is not None and known.fixed_input_size
    if fixed_size and (len(sizes) > 1 or arguments.setdefault("img_size", sizes[0][0]) != sizes[0][0]):
        raise ValueError(f"{config.model} takes images of one size: give one --image-size, and no other img_size")
    net = _made(config.model, pretrained=bool(config.pretrained), **arguments)
    net = net.to(process.device).to(memory_format=torch.channels_last)
    if process.world > 1 and process.device.type == "cuda":
        net = convert_sync_batchnorm(net)
    return net


def _made(model: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(model, **arguments)
    except TypeError as error:
        raise ValueError(f"{model} does not take these model_args: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise ValueError(f"cannot make {model}: {error}") from error


def _input(net: Any, config: FinetuneConfig, device: torch.device) -> Input:
    """What images the network takes."""
    if net.in_chans not in (1, 3):
        raise ValueError(f"{config.model} takes {net.in_chans} channels; images have 1 or 3")
    cfg = resolve_data_config(model=net)
    colours = []
    for name in ("mean", "std"):
        asked = parse_numbers(getattr(config, name))
        if asked and len(asked) != net.in_chans:
            raise ValueError(f"{name} has {len(asked)} numbers, but {config.model} takes {net.in_chans} channels")
        values = asked or tuple(cfg[name])
        colours.append(values if len(values) == net.in_chans else (sum(values) / len(values),) * net.in_chans)
    return Input(colours[0], colours[1], device, bool(config.bf16))


def _parts(net: nn.Module, sizes: list[tuple[int, int]], config: FinetuneConfig, given: Input, process: Process) -> int:
    """In how many parts a step is computed: as asked for, or so that its images fit into the memory that is free."""
    largest = max(size for size, _ in sizes)
    try:
        per_image = 1.5 * _kept_by_an_image(net, largest, given)  # the backward pass needs some, too
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{config.model} cannot compute images of {largest} pixels: {reason}") from error
    free = _free_memory(process.device)
    if config.accumulate is not None or free is None:
        return config.accumulate or 1
    fixed = 4 * sum(parameter.nbytes for parameter in net.parameters())  # gradients, optimiser, moving average
    share = math.ceil((config.batch_size or 1) / process.world)
    parts, unit = 1, 2 if config.mixup or config.cutmix else 1  # Mixup needs pairs
    while fixed + per_image * share / parts > 0.8 * free and share % (2 * parts * unit) == 0 and share >= 4 * parts:
        parts *= 2
    parts = int(process.all_reduce_max(parts)[0])
    if parts > 1:
        process.print(
            f"each step is computed in {parts} parts: {share} images need {per_image * share / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )
    return parts


def _kept_by_an_image(net: nn.Module, image_size: int, given: Input) -> float:
    """Bytes that the forward pass over one image leaves for the backward pass, the weights not counted."""
    kept: dict[int, int] = {}  # of storages without memory, their bytes
    dtype = torch.bfloat16 if given.bf16 else torch.float32
    trial = copy.deepcopy(net).train().to("meta", dtype)

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.zeros(2, len(given.mean), image_size, image_size, device="meta", dtype=dtype)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        left = trial(images.to(memory_format=torch.channels_last))
    weights = {parameter.untyped_storage()._cdata for parameter in trial.parameters()}
    del left  # which kept all storages, and so their addresses, apart
    return sum(size for where, size in kept.items() if where not in weights) / 2


def _free_memory(device: torch.device) -> float | None:
    """Bytes that this process may take on the device; None where that cannot be known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
    return 1024 * float(lines["MemAvailable"].split()[0]) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _named(net: nn.Module, text: str) -> list[str]:
    """The parts of the network that `freeze` names."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    names = [name for name, _ in net.named_modules()]
    for part in parts:
        if part not in names:
            children = ", ".join(name for name, _ in net.named_children())
            raise ValueError(f"freeze names {part!r}, which the network does not have; its parts are {children}")
    return parts


def _classifier(net: Any) -> list[str]:
    """The names of the network's last layers."""
    names = net.pretrained_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names or ())


def _inside(name: str, parts: Sequence[str]) -> bool:
    """Whether a parameter or module belongs to one of the parts; the part "" is everything."""
    return any(not part or name == part or name.startswith(f"{part}.") for part in parts)


def _around(name: str, parts: Sequence[str]) -> bool:
    """Whether one of the parts lies in the module `name`."""
    return any(part.startswith(f"{name}.") for part in parts)


def _let_learn(
    task: TrainingTask, net: nn.Module, learning: list[str], frozen: list[str], config: FinetuneConfig, process: Process
) -> None:
    """Lets the parts `learning` but for `frozen` learn, and wraps the network anew, as torch's wrappers need it."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad = _inside(name, learning) and not _inside(name, frozen)
    task.trainable_module = net
    if config.compile:
        task.compile()
    if process.world > 1:
        task.prepare_distributed(device_ids=[process.device] if process.device.type == "cuda" else None)


def _size_in(epoch: int, sizes: list[tuple[int, int]]) -> int:
    return next(pixels for pixels, first in reversed(sizes) if epoch >= first)


def _stagnates(scores: list[float], patience: int) -> bool:
    """Whether the last `patience` epochs brought nothing better."""
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


class _Sums(dict[str, Tensor]):
    """The loss of some steps and its terms, summed up where they were computed."""

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        for name, value in losses.items():
            self[name] = self.get(name, 0) + value.detach() * weight

    def numbers(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.items()}


def _finite(losses: list[dict[str, float]]) -> list[dict[str, float]]:
    """The losses of each process, if they are numbers to go on with."""
    if not all(math.isfinite(value) for part in losses for value in part.values()):
        raise RunError("the loss is not finite any more; begin another run with a smaller --lr")
    return losses


def _means(losses: list[dict[str, float]], steps: int) -> dict[str, float]:
    """The mean of each term over an epoch's steps, of all processes together."""
    return {f"train_{name}": sum(part[name] for part in losses) / steps for name in losses[0]}


def _reading(batches: Batches, epoch: int, done: int, steps: Steps) -> Iterator[Any]:
    """The batches of an epoch from step `done` on."""
    steps.epoch, steps.first = epoch, done
    if not isinstance(batches.dataset, IterableDataset):
        return read(batches)
    batches.dataset.epoch = epoch  # type: ignore[attr-defined]
    return itertools.islice(read(batches), done * steps.parts, None)


def _next(reading: Iterator[Any], parts: int, signals: StopSignals) -> list[Any] | None:
    """The batches of a step; None if the processes that read them were asked to stop together with this one."""
    try:
        return [next(reading) for _ in range(parts)]
    except RuntimeError:
        if signals.number:
            return None
        raise


def _progress(config: FinetuneConfig, steps: Steps, epochs: int, done: int, process: Process) -> "tqdm[Any]":
    """One line on a terminal: epoch, images per second, time left."""
    return tqdm(
        total=config.epochs * steps.images,
        initial=epochs * steps.images + done * steps.batch_size,
        unit=" images",
        disable=None if process.first else True,
    )
