"""Logs of a run's metrics by other libraries: TensorBoard, and Weights & Biases."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeAlias

from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.run import RunError, RunFolder

__all__ = ["Log", "open_log", "require"]

Log: TypeAlias = Callable[[dict[str, Any]], None]  # takes the metrics of an epoch

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def require(log: str) -> None:
    """Raises ModuleNotFoundError if the library of the option `log` is missing, before any time is spent."""
    if log:
        importlib.import_module(_MODULES[log])


@contextmanager
def open_log(folder: RunFolder, config: FinetuneConfig) -> Iterator[Log]:
    """A function that logs the metrics of an epoch as `config.log` says.

    Args:
        folder: The folder of the run, which has begun. The libraries write into its `tensorboard/` or `wandb/`.
        config: The options of the run.

    Raises:
        RunError: If the library refuses, or the disk is full.
    """
    if config.log == "wandb":
        with _wandb(folder, config) as log:
            yield log
    elif config.log == "tensorboard":
        yield lambda row: _to_tensorboard(folder, row)
    else:
        yield lambda _: None


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of an epoch."""
    return {name: value for name, value in row.items() if name != "epoch" and isinstance(value, int | float)}


def _to_tensorboard(folder: RunFolder, row: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with folder.writing("tensorboard"), SummaryWriter(folder.path / "tensorboard") as writer:
        for name, value in _metrics(row).items():
            writer.add_scalar(name, value, row["epoch"])


@contextmanager
def _wandb(folder: RunFolder, config: FinetuneConfig) -> Iterator[Log]:
    import wandb

    options = {name: value if isinstance(value, int | float) else str(value) for name, value in asdict(config).items()}
    first_start = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))[0]
    run_id = hashlib.blake2b(
        json.dumps(first_start).encode(), digest_size=8
    ).hexdigest()  # stays the same after a resume
    try:
        run = wandb.init(
            project="spd_zoo",
            name=folder.path.resolve().name,
            id=run_id,
            resume="allow",
            dir=folder.path,
            config=options,
            settings=wandb.Settings(console="off"),  # it would capture the progress bar
        )
    except wandb.errors.Error as error:
        raise RunError(f"wandb cannot log this run: {error}; WANDB_MODE=offline needs no account") from error
    with run:
        yield lambda row: run.log(_metrics(row), step=row["epoch"])
