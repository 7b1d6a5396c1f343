"""Helpers of training tests: stopping and comparing runs."""

import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd_zoo.training.config import FinetuneConfig, to_yaml
from spd_zoo.training.steps import seed_everything

PATIENCE = 500  # seconds; more than a process takes on a busy machine, so only one that waits for ever is given up
USED = "spd_zoo.training.finetune.seed_everything"  # called before each step


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs have bit-identical networks and the same metrics."""
    networks = [load_file(folder / "model.safetensors") for folder in (one, other)]
    tables = [(folder / "metrics.csv").read_text() for folder in (one, other)]
    equal = [torch.equal(networks[0][key], networks[1][key]) for key in networks[0]]
    return all(equal) and tables[0] == tables[1] and networks[0].keys() == networks[1].keys()


def stop_in(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int) -> None:
    """Sends this process SIGTERM in a step of the next run, as a job scheduler would."""

    def seed_and_stop(*key: int) -> None:
        seed_everything(*key)
        if key[1:3] == (epoch, step):
            monkeypatch.setattr(USED, seed_everything)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(USED, seed_and_stop)


def finetune_in_processes(config: FinetuneConfig, processes: int = 2) -> None:
    """Runs `spd-zoo finetune` by torchrun."""
    file = config.out.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, "-m", "spd_zoo", "finetune", "--config", str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, timeout=PATIENCE, env=environment)


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))
