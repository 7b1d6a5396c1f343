"""Training a network: plan the run, train epoch by epoch, write the result."""

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm

from spd_zoo.console import bar_disabled
from spd_zoo.data.check import in_words
from spd_zoo.data.labelled import DataError
from spd_zoo.data.notes import count
from spd_zoo.data.reading import parse_size, size_text, size_value
from spd_zoo.inference.images import as_html
from spd_zoo.process import Process, Stopped, StopSignals, freed_memory_kept, join, ran_out_of_memory
from spd_zoo.training.classification.distillation import DistilledTraining, Teacher, load_teacher
from spd_zoo.training.config import (
    FinetuneConfig,
    Plan,
    merged,
    parse_epochs,
    parse_model_args,
    refuse_others,
)
from spd_zoo.training.continuing import Continuation
from spd_zoo.training.layers import (
    classifier_of,
    frozen_layers,
    set_trainable,
    set_training_mode,
)
from spd_zoo.training.logs import Log, open_log, require
from spd_zoo.training.messages import choices, next_commands, verdict
from spd_zoo.training.page import plot_notes, short
from spd_zoo.training.planning import blank, create, model_args_of, plan, preprocessing_of
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.run import RunError, RunFolder
from spd_zoo.training.splits import Splits
from spd_zoo.training.steps import Batches, Steps, read, seed_everything
from spd_zoo.training.task import Task, names_other_task, score_of, task_of
from spd_zoo.weights import BackboneWarning
from spd_zoo.weights.load import is_network, timm_name

__all__ = ["FinetuneConfig", "Result", "RunError", "Stopped", "finetune", "finish", "start", "train_epoch"]

FUSED = ("adam", "adamw")  # torch's fused SGD fails when some weights get their first gradient later than others


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: What it wrote.
        history: The metrics of each epoch.
        metrics: The metrics of the network that it wrote.
        before: The metrics before the first epoch; empty if the network did not know the classes.
    """

    folder: Path
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    before: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items() if isinstance(value, float))
        return f"Result({self.folder}, {len(self.history)} epochs, {figures})"

    def _repr_html_(self) -> str:
        columns = list(self.history[-1])
        rows = ([short(each.get(name)) for name in columns] for each in self.history)
        return as_html(None, columns, rows) + f"<p>{self.folder / 'report.html'}</p>"


def finetune(config: FinetuneConfig, recipe: str | None = None, continued: Continuation | None = None) -> Result | None:
    """Trains `config.model` on `config.data`, also with the outputs of `config.teacher` as targets if there is one.

    `config.out` then holds

    - `model.safetensors` and `config.json`, which `timm.create_model("local-dir:OUT")` loads,
    - `report.html`, `metrics.csv`, `per_class.csv`, `confusion.csv` and `figures/`,
    - `run.yaml` (the configuration), `environment.json`, `data.json` (what the check of the data found), `log.txt`,
    - `last.pt`, from which the same call resumes a stopped run, to the same bits. Every random draw depends on
      (seed, epoch, step) only, so the state of no generator has to be saved.

    Under torchrun the processes share every step's images.

    Args:
        config: What to train, on which data, with which settings.
        recipe: The recipe that some of the options come from, for the line that lists them.
        continued: How this run continues a finished one, whose data it must have.

    Returns:
        The result; None after a dry run.

    Raises:
        DataError: If the data set cannot be used, or has classes that the teacher does not know.
        ModelError: If the teacher is no classifier.
        RunError: If the run cannot continue: the loss is not finite, or the disk is full.
        Stopped: After SIGINT or SIGTERM, when the current step is done and the state is saved.
        ValueError: If an option has no meaning, or `config.out` holds a run of another configuration.
        WeightsError: If pretrained weights are unavailable or must not be used.
    """
    require(config.log)
    process = join(config.device)
    if continued is not None:
        process.print(continued.in_words)
    folder = RunFolder(config.out)
    began = process.broadcast(folder.beginning(config) if process.first else None)
    if began is not None:
        config = merged(began.config, config)
    if config.model.startswith("local-dir:"):
        timm_name(config.model)  # checks the folder
    if began is None and ":" not in str(config.out) and is_network(str(config.out)):
        raise ValueError(f"{config.out} is the name of a network, which would be taken for the run; give another --out")
    structure = blank(config.model)
    task = task_of(structure)
    if began is None:
        refuse_others(config, task.networks)

    with names_other_task(task, config.data, "finetune"):
        splits = task.open_splits(config, structure, process, began.about_data if began is not None else None)
    if continued is not None and continued.fingerprint != splits.about["fingerprint"]:
        raise DataError(f"{config.data} is not what {config.model.partition(':')[2]} was trained on; begin a new run")
    teacher = None
    if config.teacher:
        channels = parse_model_args(config.model_args).get("in_chans", structure.in_chans)
        teacher = load_teacher(config, splits.train.class_names, channels, process.device)
        config = replace(config, **teacher.settings())
        notes = splits.about.setdefault("notes", [])
        notes += [note for note in teacher.notes if note not in notes]
    if "train" not in splits.about:
        process.print("the images are not checked")
    for line in in_words(splits.about):
        process.print(line, result=config.dry_run)
    if teacher is not None:
        process.print(teacher.in_words(config))
    for note in plot_notes():
        process.print(f"note: {note}")

    chosen = plan(config, task, structure, len(splits.train), splits.train.class_names, process, teacher)
    process.print(choices(chosen, process, recipe), result=config.dry_run)
    if config.dry_run:
        return None

    try:
        run = start(chosen, task, splits, folder, process, teacher)
        log = open_log(folder, chosen.config) if process.first else nullcontext(run.log)
        with freed_memory_kept(process.device), StopSignals() as signals, _progress_bar(run) as bar, log as run.log:
            begin(run, signals)
            if began is not None:
                process.print(_resumed(run))
            while not _is_over(run):
                train_epoch(run, signals, bar)
                end_epoch(run, signals)
        return finish(run)
    except (MemoryError, RuntimeError) as error:
        if process.first and ran_out_of_memory(error):
            folder.abandon()
        raise


@dataclass
class Run:
    """A run in progress.

    Attributes:
        plan: The values that it uses.
        task: Classification or detection.
        splits: Its images.
        folder: Where it writes.
        process: This process.
        preprocessing: How pixels become the network's input.
        net: The network.
        training: timm's task: the network with its loss and its moving average, perhaps compiled or distributed.
        eval_net: The network that is evaluated and written: its moving average if there is one, else itself.
        prepare: Converts a batch to the network's input, on its device.
        frozen: The modules that never train.
        optimizer: torch's.
        scheduler: timm's.
        steps: The images of each step.
        history: The metrics of each finished epoch.
        best: The network with the best metric so far and its image size, unless the last one is kept.
        before: The metrics before the first epoch; empty if the network did not know the classes.
        evaluated: Whether the start has been evaluated, or need not be.
        done: Finished steps of the current epoch.
        losses: The sums of the loss and its terms over these steps.
        began: When the current epoch began, in seconds of the monotonic clock.
        began_at: The step with which the current epoch began or was resumed.
        saved: When the state was last saved.
        trained: The modules that train in the current epoch.
        image_size: Height and width in pixels, in the current epoch.
        train_batches: The training images at this size.
        val_batches: The validation images at this size.
        log: Logs the metrics of an epoch by another library.
    """

    plan: Plan
    task: Task[Any]
    splits: Splits[Any]
    folder: RunFolder
    process: Process
    preprocessing: Preprocessing
    net: Any
    training: Any
    eval_net: Any
    prepare: Callable[[Tensor, Any], tuple[Tensor, Any]]
    frozen: list[str]
    optimizer: Any
    scheduler: Any
    steps: Steps
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    evaluated: bool = True
    done: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    began: float = 0.0
    began_at: int = 0
    saved: float = field(default_factory=time.monotonic)
    trained: list[str] = field(default_factory=list)
    image_size: tuple[int, int] = (0, 0)
    train_batches: Any = None
    val_batches: Any = None
    log: Log = lambda _: None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics before the first epoch, if they are known, then those of each epoch."""
        return [self.before, *self.history] if self.before else self.history

    def save(self) -> None:
        """Writes `last.pt`.

        Raises:
            RunError: If the loss is not finite, or the file cannot be written.
        """
        losses = self.gathered_losses()
        if self.process.first:
            averaged = self.eval_net.state_dict() if self.plan.ema else None
            state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "history": self.history}
            state |= {"best": self.best, "ema": averaged, "step": self.done, "losses": losses}
            state |= {"before": self.before, "evaluated": self.evaluated}
            self.folder.save(state | {"class_names": self.splits.train.class_names})
        self.saved = time.monotonic()

    def resume(self, state: dict[str, Any]) -> None:
        """Continues from the contents of `last.pt`.

        Raises:
            RunError: If an earlier version of spd-zoo began the run, whose optimizer has other groups of parameters.
        """
        saved, own = state["optimizer"]["param_groups"], self.optimizer.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            raise RunError(
                "the run was begun by an earlier version of spd-zoo, in which weight decay applied to other parameters "
                "of this network; finish it with that version, or begin another run"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.plan.ema:
            self.eval_net.load_state_dict(state["ema"])
        self.history, self.best, self.done = state["history"], state["best"], state["step"]
        self.before, self.evaluated = state.get("before", {}), state.get("evaluated", True)  # older versions had none
        mine = state["losses"][self.process.rank :: self.process.world]  # the number of processes may have changed
        for losses in mine:
            self.add_losses({name: torch.tensor(value, device=self.process.device) for name, value in losses.items()})

    def add_losses(self, losses: dict[str, Tensor], weight: float = 1.0) -> None:
        """Adds `weight` times the loss and its terms to the sums, without waiting for the device."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach() * weight

    def gathered_losses(self) -> list[dict[str, float]]:
        """The sums of each process.

        Raises:
            RunError: If one is not finite.
        """
        gathered = self.process.all_gather({name: value.item() for name, value in self.losses.items()})
        if not all(math.isfinite(value) for losses in gathered for value in losses.values()):
            raise RunError("the loss is not finite any more; begin another run with a smaller --lr")
        return gathered


def start(
    plan: Plan,
    task: Task[Any],
    splits: Splits[Any],
    folder: RunFolder,
    process: Process,
    teacher: Teacher | None = None,
) -> Run:
    """Creates everything that training needs, claims the folder, and loads the state of a resumed run.

    Args:
        plan: What the run does.
        task: Classification or detection.
        splits: Its images.
        folder: Where it writes.
        process: This process.
        teacher: The network that it also learns from.

    Raises:
        RunError: If the folder cannot be written, or its state is damaged.
        ValueError: If `freeze` names no module.
        WeightsError: If pretrained weights are unavailable or must not be used.
    """
    config, classes = plan.config, len(splits.train.class_names)
    seed_everything(config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackboneWarning)  # `plan` printed it
        net = create(config.model, pretrained=plan.pretrained, **model_args_of(config, classes, plan.sizes))
    net = net.to(process.device).to(memory_format=torch.channels_last)
    if process.world > 1 and process.device.type == "cuda":
        net = convert_sync_batchnorm(net)
    preprocessing = preprocessing_of(net, config, process.device)
    frozen = frozen_layers(net, config.freeze)
    set_trainable(net, [""], frozen)
    state = process.broadcast(folder.load() if process.first else None)
    knows_classes = state is None and task.init_head(net, plan, splits.train, process, preprocessing)
    training: Any = task.training(net, plan, splits.train, process)
    if teacher is not None:
        training = DistilledTraining(training, teacher, config, preprocessing)
    if plan.ema:
        training.setup_ema(plan.ema, use_warmup=True)
    eval_net = training.trainable_module_ema.module if plan.ema else net
    batch_size, micro_batches = plan.batch_size, plan.micro_batches
    drop_last, rank, world = config.drop_last, process.rank, process.world
    if config.stream:  # whose batches have one size
        batch_size = min(batch_size, len(splits.train))
        batch_size -= batch_size % (world * micro_batches)
    steps = Steps(len(splits.train), batch_size, micro_batches, rank, world, drop_last, config.seed)
    optimizer = _optimizer(net, plan)
    scheduler = _scheduler(optimizer, plan, steps.per_epoch)
    prepare = task.preparation(config, preprocessing, classes)
    run = Run(
        plan, task, splits, folder, process, preprocessing, net, training, eval_net, prepare, frozen,
        optimizer, scheduler, steps, evaluated=not knows_classes,
    )  # fmt: skip
    if process.first:
        folder.begin(config, splits.about)
        task.write_data_report(folder, config, net, splits)
    if state is not None:
        run.resume(state)
    return run


def _optimizer(net: nn.Module, plan: Plan) -> Any:
    fused: dict[str, Any] = {"fused": True} if plan.opt in FUSED else {}
    return create_optimizer_v2(
        net,
        plan.opt,
        plan.lr,
        plan.weight_decay,
        momentum=plan.config.momentum,
        filter_bias_and_bn=not plan.config.decay_all,
        layer_decay=None if plan.layer_decay == 1 else plan.layer_decay,
        **fused,
    )


def _scheduler(optimizer: Any, plan: Plan, steps_per_epoch: int) -> Any:
    config = plan.config
    updates = 1 if config.sched_epochs else steps_per_epoch
    # timm looks one update ahead: half an update later, the first step of an epoch gets the new rate.
    milestones: Any = [epoch + 0.5 / updates for epoch in parse_epochs(config.decay_epochs)]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        decay_milestones=milestones,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_epochs=plan.warmup_epochs,
        warmup_lr=plan.warmup_lr,
        step_on_epochs=config.sched_epochs,
        updates_per_epoch=updates,
    )
    return scheduler


def begin(run: Run, signals: StopSignals) -> None:
    """Evaluates a network that knows the classes before its first epoch; does nothing if that is done.

    Raises:
        DataError: If an image cannot be read.
        RunError: If a file cannot be written.
        Stopped: After a signal, when the state is saved.
    """
    if run.evaluated:
        return
    _set_image_size(run, 0)
    metrics = _score(run, signals, "stopped before the first epoch")
    row = {"epoch": 0, "image_size": size_value(run.image_size)}
    run.before, run.evaluated = row | {f"val_{name}": value for name, value in metrics.items()}, True
    _keep_if_best(run, run.before)
    run.save()
    line = f"before the first epoch: {run.task.epoch_in_words(run.before)}"
    run.process.print(line)
    if run.process.first:
        run.folder.log(line)
        run.log(run.before)
    _stop_if_asked(run, signals, "stopped before the first epoch")


def train_epoch(run: Run, signals: StopSignals, bar: "tqdm[Any]") -> None:
    """Trains for one epoch, or for what is left of it.

    Args:
        run: The run; its epoch is the one after those of its history.
        signals: After one, the epoch ends after the current step.
        bar: Counts images.

    Raises:
        DataError: If an image cannot be read.
        RunError: If the loss is not finite, or the state cannot be saved.
        Stopped: After a signal, when the state is saved.
    """
    epoch, steps, process = len(run.history), run.steps, run.process
    run.began, run.began_at = time.monotonic(), run.done
    _set_image_size(run, epoch)
    _set_trained(run, epoch)
    bar.set_description(f"epoch {epoch + 1}/{run.plan.config.epochs} at {size_text(run.image_size)} px")
    run.scheduler.step(epoch)
    batches = _batches_of_epoch(run.train_batches, epoch, run.done, steps)
    for step in range(run.done, steps.per_epoch):
        micro_batches = _next_micro_batches(batches, steps.micro_batches, signals)
        late = time.monotonic() - run.saved > 60 * run.plan.config.save_minutes
        stop, save = process.all_reduce_max(signals.number, late)
        if micro_batches is None or stop:
            break
        if save:
            run.save()
        run.scheduler.step_update(epoch * steps.per_epoch + step)
        _train_step(run, epoch, step, micro_batches)
        run.done = step + 1
        bar.update(steps.size(step))
    _stop_if_asked(run, signals, f"stopped in epoch {epoch + 1} after step {run.done} of {steps.per_epoch}")


def _train_step(run: Run, epoch: int, step: int, micro_batches: list[Any]) -> None:
    """One update of the weights."""
    process = run.process
    for i, (pixels, targets) in enumerate(micro_batches):
        seed_everything(run.plan.config.seed, epoch, step, process.rank + process.world * i)
        images, targets = run.prepare(pixels, targets)
        share = len(images) / run.steps.size(step)
        with run.training.no_sync() if i + 1 < len(micro_batches) else nullcontext():
            with run.preprocessing.autocast():
                outputs = run.training(images, targets)
            loss = outputs["loss"]
            if i == 0:
                run.optimizer.zero_grad()  # as late as this, so that the backward pass reuses the memory
            (loss * (share * process.world)).backward()  # torch averages gradients over the processes
        run.add_losses({"loss": loss, **outputs.get("terms", {})}, share)
    if run.plan.config.clip_grad:
        dispatch_clip_grad(run.training.get_clip_parameters(), run.plan.config.clip_grad)
    run.optimizer.step()
    run.training.update_ema(epoch * run.steps.per_epoch + step + 1)


def end_epoch(run: Run, signals: StopSignals) -> None:
    """Evaluates the network after an epoch, adds a row to the history, saves and reports.

    Raises:
        DataError: If an image cannot be read.
        RunError: If the loss is not finite, or a file cannot be written.
        Stopped: After a signal, when the state is saved.
    """
    epoch, task, process, epochs = len(run.history), run.task, run.process, run.plan.config.epochs
    train_seconds = time.monotonic() - run.began
    if process.world > 1:  # unsynchronised BatchNorm: the statistics of the first process count
        distribute_bn(run.net, process.world)
        distribute_bn(run.eval_net, process.world)
    metrics = _score(run, signals, f"stopped after the last step of epoch {epoch + 1}")
    losses = run.gathered_losses()
    row: dict[str, Any] = {"epoch": epoch + 1, "image_size": size_value(run.image_size)}
    row |= {"lr": max(group["lr"] for group in run.optimizer.param_groups)}
    trained = max(run.steps.per_epoch, run.began_at)  # fewer processes may have had a last step of fewer images
    row |= {f"train_{name}": sum(sums.get(name, 0.0) for sums in losses) / trained for name in losses[0]}
    row |= {f"val_{name}": value for name, value in metrics.items()}
    _keep_if_best(run, row)
    run.history.append(row)
    run.done, run.losses = 0, {}
    if process.first:
        run.folder.write_history([*_before_in_columns(run), *run.history])
    run.save()
    line = (
        f"epoch {epoch + 1}/{epochs} at {size_text(run.image_size)} px: train loss {row['train_loss']:.3f}, "
        f"{task.epoch_in_words(row)}{_pace(run, train_seconds)}"
    )
    for each in (line, *(f"note: {note}" for note in task.epoch_notes(row))):
        process.print(each)
        if process.first:
            run.folder.log(each)
    if process.first:
        run.log(row)
    number = int(process.all_reduce_max(signals.number)[0])
    if number:
        raise Stopped(number, f"stopped after epoch {epoch + 1}")


def _pace(run: Run, train_seconds: float) -> str:
    """Images per second and the time left after an epoch; empty if no step of it was done since the run was resumed."""
    steps, epochs = run.steps, run.plan.config.epochs - len(run.history)
    done = steps.per_epoch - run.began_at
    if done < 1:
        return ""
    speed = (steps.images - run.began_at * steps.batch_size) / train_seconds
    epoch_seconds = train_seconds * steps.per_epoch / done + (run.saved - run.began - train_seconds)
    return f", {speed:.0f} images/s, {epochs * epoch_seconds / 60:.0f} min left"


def finish(run: Run) -> Result:
    """Evaluates the network that training leaves, and writes it and its report.

    Raises:
        DataError: If an image cannot be read.
        RunError: If the network is not finite, or a file cannot be written.
    """
    if not run.best and not math.isfinite(run.history[-1]["val_loss"]):
        raise RunError(
            f"the loss on the validation images is not finite after epoch {len(run.history)}: there is no network to "
            "write; begin another run with a smaller --lr"
        )
    config, process, net, val = run.plan.config, run.process, run.eval_net, run.splits.val
    if run.best:
        net.load_state_dict(run.best["net"])
    size = parse_size(run.best["image_size"] if run.best else run.history[-1]["image_size"])
    preprocessing = replace(run.preprocessing, bf16=False)  # the precision in which the network is used
    predictions = run.task.predict(net, _val_batches(run, size), val, size, preprocessing, process)
    figures, missed = predictions.summary(), predictions.notes()
    if process.first:
        own = net.pretrained_cfg.items()
        cfg = {
            **{key: value for key, value in own if key not in ("test_input_size", "test_crop_pct")},
            "input_size": (len(run.preprocessing.mean), *size),
            "num_classes": len(val.class_names),
            **run.task.pretrained_cfg(run.preprocessing),
            "label_names": val.class_names,
        }
        arguments = parse_model_args(config.model_args)
        if "img_size" in arguments:  # it is created for the size that it was evaluated at
            arguments["img_size"] = size
        run.folder.write_network(net, cfg, arguments)
        notes = [*run.splits.about.get("notes", []), *plot_notes(), *missed]
        run.task.write_report(run.folder, config, run.history, predictions, val, notes)
    process.print(
        f"{predictions.headline()}, {figures['images']} validation images; see {run.folder.path / 'report.html'}",
        result=True,
    )
    for note in missed:
        process.print(f"note: {note}")
    for line in verdict(run.plan, run.task, run.evaluations):
        process.print(line, result=True)
    for line in next_commands(config, run.task):
        process.print(line)
    return Result(config.out, run.history, figures | {"image_size": size_value(size)}, run.before)


def _score(run: Run, signals: StopSignals, stopped: str) -> dict[str, float]:
    """The metrics on the validation images; saves and raises Stopped if a signal has ended the loader workers."""
    try:
        return run.task.score(run.eval_net, run.val_batches, run.preprocessing, run.process)
    except RuntimeError as error:
        if not signals.number or run.process.world > 1:
            raise
        run.save()
        raise Stopped(signals.number, stopped) from error


def _scores(run: Run) -> list[float]:
    """The metric that counts, before the first epoch if it is known, then after each one."""
    return [score_of(run.task, row) for row in run.evaluations]


def _keep_if_best(run: Run, row: dict[str, Any]) -> None:
    """Copies the network if `row`, the newest metrics, is the best so far and the best one is to be kept."""
    earlier = [score_of(run.task, old) for old in run.evaluations if old is not row]
    if run.plan.keep == "best" and score_of(run.task, row) > max(earlier, default=-1):
        run.best = {"net": copy.deepcopy(run.eval_net.state_dict()), "image_size": size_value(run.image_size)}


def _before_in_columns(run: Run) -> list[dict[str, Any]]:
    """The metrics before the first epoch, with the columns of an epoch; those of training are empty."""
    return [{name: run.before.get(name, "") for name in run.history[0]}] if run.before else []


def _set_image_size(run: Run, epoch: int) -> None:
    """Creates new loaders if the image size changes with this epoch."""
    size = next(size for size, first in reversed(run.plan.sizes) if epoch >= first)
    if size != run.image_size:
        run.image_size = size
        config, views = run.plan.config, size
        if isinstance(run.training, DistilledTraining):
            views = run.training.set_image_size(size)
            config = replace(config, crop_padding=round((config.crop_padding or 0) * views[0] / size[0]))
        run.train_batches = run.task.train_batches(
            run.net, run.splits.train, views, run.steps, config, run.preprocessing
        )
        run.val_batches = _val_batches(run, size)


def _val_batches(run: Run, image_size: tuple[int, int]) -> Batches:
    batch_size = run.plan.eval_batch_size
    workers = run.plan.config.workers
    return run.task.eval_batches(
        run.net, run.splits.val, image_size, batch_size, workers, run.preprocessing, run.process
    )


def _set_trained(run: Run, epoch: int) -> None:
    """Lets the classifier train alone at first, then everything that is not frozen."""
    trained = classifier_of(run.net) if epoch < run.plan.head_epochs else [""]
    if trained != run.trained:
        run.trained = trained
        set_trainable(run.net, trained, run.frozen)
        run.training.trainable_module = run.net  # torch's wrappers must be made anew when requires_grad changes
        if run.plan.config.compile:
            run.training.compile()
        if run.process.world > 1:
            device = run.process.device
            run.training.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
    set_training_mode(run.net, trained, run.frozen, run.plan.freeze_bn)


def _batches_of_epoch(batches: Batches, epoch: int, first: int, steps: Steps) -> Iterator[Any]:
    """The batches of an epoch from step `first` on."""
    steps.epoch, steps.first = epoch, first
    if not isinstance(batches.dataset, IterableDataset):
        return read(batches)
    batches.dataset.epoch = epoch  # type: ignore[attr-defined]
    return itertools.islice(read(batches), first * steps.micro_batches, None)


def _next_micro_batches(batches: Iterator[Any], count: int, signals: StopSignals) -> list[Any] | None:
    """The batches of a step; None if a signal has ended the loader workers."""
    try:
        return [next(batches) for _ in range(count)]
    except RuntimeError:
        if signals.number:
            return None
        raise


def _stop_if_asked(run: Run, signals: StopSignals, message: str) -> None:
    """Saves the state and raises Stopped if any process got a signal."""
    number = int(run.process.all_reduce_max(signals.number)[0])
    if number:
        run.save()
        raise Stopped(number, message)


def _is_over(run: Run) -> bool:
    return len(run.history) >= run.plan.config.epochs or _stagnates(run)


def _resumed(run: Run) -> str:
    """The line about a run that was in the folder."""
    if _is_over(run):
        return f"{run.folder.path} is trained already, for {count(len(run.history), 'epoch')}"
    step = f" after step {run.done} of {run.steps.per_epoch}" if run.done else ""
    return f"the run in {run.folder.path} is resumed in epoch {len(run.history) + 1}{step}"


def _stagnates(run: Run) -> bool:
    """Whether the last `patience` epochs brought no improvement."""
    patience, scores = run.plan.config.patience, _scores(run)
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


def _progress_bar(run: Run) -> "tqdm[Any]":
    """One line on a terminal: epoch, images per second, time left."""
    steps = run.steps
    return tqdm(
        total=run.plan.config.epochs * steps.images,
        initial=len(run.history) * steps.images + run.done * steps.batch_size,
        unit=" images",
        smoothing=0,  # the mean over the run: a time left that does not jump with every evaluation
        disable=bar_disabled(not run.process.first),
    )
