"""The folder of a run; every file in it is written atomically."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spd_zoo.files import is_leftover, read_yaml, remove_leftovers, whole, write_csv
from spd_zoo.training.config import FinetuneConfig, to_yaml
from spd_zoo.weights import WeightsError, save_network
from spd_zoo.weights.checkpoint import read_saved

__all__ = ["Beginning", "RunError", "RunFolder"]

_FIRST_FILES = {"data.json", "environment.json"}  # written before run.yaml, which makes it a run
_STATE = {"net", "optimizer", "history", "best", "ema", "step", "losses"}  # what a run is resumed from


class RunError(ValueError):
    """A run that cannot continue; its last checkpoint is unchanged."""


@dataclass(frozen=True)
class Beginning:
    """The configuration of a run when it began, and what was known about its data."""

    config: dict[str, Any]
    about_data: dict[str, Any]


class RunFolder:
    """The folder of a run; every file in it is written atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def beginning(self, asked: FinetuneConfig) -> "Beginning | None":
        """The beginning of the run in the folder, which is resumed; None without a run, or for a dry run.

        Raises:
            RunError: If its `run.yaml` or `data.json` is damaged.
            ValueError: If the folder holds something else, or a run although `asked.resume` is "never".
        """
        if asked.dry_run:
            return None
        file = self.path / "run.yaml"
        if file.is_file():
            if asked.resume == "never":
                raise ValueError(f"{self.path} holds a run; give another folder with --out, or --resume auto")
            try:
                config, about_data = read_yaml(file), json.loads((self.path / "data.json").read_text(encoding="utf-8"))
                if not isinstance(config, dict) or not isinstance(about_data, dict) or "fingerprint" not in about_data:
                    raise ValueError("they are not what a run writes")
                return Beginning(config, about_data)
            except (ValueError, OSError, RecursionError) as error:
                raise RunError(f"{self.path} holds a run with a damaged run.yaml or data.json: {error}") from error
        if self.path.exists() and (
            not self.path.is_dir()
            or {file.name for file in self.path.iterdir() if not is_leftover(file)} - _FIRST_FILES
        ):
            raise ValueError(f"{self.path} is not empty and holds no run; give a new folder with --out")
        return None

    def begin(self, config: FinetuneConfig, about_data: dict[str, Any]) -> None:
        """Writes the first files of a run, or adds this start to `environment.json` of the run in the folder."""
        with self.writing("run.yaml"):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
        if not (self.path / "run.yaml").exists():
            self.write("data.json", json.dumps(about_data, indent=2))
        file = self.path / "environment.json"
        starts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self.write("environment.json", json.dumps([*starts, environment()], indent=2))
        if not (self.path / "run.yaml").exists():  # last: from now on the folder holds a run
            self.write("run.yaml", to_yaml(config))

    def abandon(self) -> None:
        """Undoes `begin` if nothing is saved yet, so that a run with other options can begin here."""
        if not (self.path / "last.pt").exists():
            # without run.yaml, which goes first, it is no run any more
            for name in ("run.yaml", "metrics.csv", "data.png", "report.html", *_FIRST_FILES):
                (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Writes a file of text."""
        with self.writing(name), whole(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def log(self, line: str) -> None:
        """Adds a line to `log.txt`, with the time."""
        with self.writing("log.txt"), (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {line}\n")

    def write_history(self, history: Sequence[dict[str, Any]]) -> None:
        """Writes `metrics.csv`, a line per epoch."""
        with self.writing("metrics.csv"):
            write_csv(self.path / "metrics.csv", history[0], [row.values() for row in history])

    def save(self, state: dict[str, Any]) -> None:
        """Writes `last.pt`, from which the run is resumed."""
        with self.writing("last.pt"), whole(self.path / "last.pt") as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def load(self) -> dict[str, Any] | None:
        """The state of the run, on the CPU; None if nothing was saved yet.

        No code in the file runs, whoever wrote it.

        Raises:
            RunError: If the file is damaged, or is not the state of a run.
        """
        file = self.path / "last.pt"
        if not file.exists():
            return None
        try:
            state = read_saved(file)
        except WeightsError as error:
            raise RunError(f"cannot read {file}: {error}; if it is damaged, begin a run in another --out") from error
        if not isinstance(state, dict) or not state.keys() >= _STATE:
            raise RunError(f"{file} does not hold the state of a run; begin a run in another --out")
        return state

    def write_network(self, net: nn.Module, cfg: dict[str, Any], model_args: dict[str, Any]) -> None:
        """Writes `model.safetensors` and `config.json`: a folder that timm (`local-dir:`) and transformers load."""
        with self.writing("model.safetensors"):
            save_network(net, self.path, cfg, model_args)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turns an error of writing `name` into a sentence with the reason.

        Raises:
            RunError: If the disk is full, or refuses to be written.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = _reason(error)
            if reason is None:
                raise
            kept = "the last checkpoint is intact, and the same command resumes from it"
            advice = kept if (self.path / "last.pt").exists() else "there is no checkpoint yet"
            raise RunError(f"cannot write {self.path / name}: {reason}; {advice}") from error


def _reason(error: BaseException | None) -> str | None:
    """The reason of the operating system, which torch hides in the context of a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or (str(error) if error is not None else None)


def environment() -> dict[str, Any]:
    """Command, versions and hardware of this start."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("spd-zoo", "torchvision", "timm", "numpy", "pillow", "datasets", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "time": _now(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "git": _commit(),
        "versions": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with a + if it was changed; None elsewhere."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()  # they round apart, and AMD EPYC names none
    return f"{name}, {os.cpu_count()} cores, {instructions}"
