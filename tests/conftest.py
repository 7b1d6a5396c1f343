import hashlib
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

# What these are elsewhere changes no result, here or in the processes that tests start: the width of the terminal, a
# proxy before the servers that tests run, and a setting that forbids to ask them.
os.environ |= {"COLUMNS": "80", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
os.environ.pop("HF_HUB_OFFLINE", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per process, because pytest runs one process per core
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sixteenth", metavar="SEED", help="run only a sixteenth of the exhaustive tests, drawn by SEED")
    parser.addoption("--one-case", metavar="SEED", help="run one case of each parametrized test, drawn by SEED")


@pytest.hookimpl(trylast=True)  # draws from the tests that -m and -k select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what --sixteenth and --one-case do not draw; another SEED, as CI's commit, draws other tests."""
    kept = list(items)
    if (seed := config.getoption("--sixteenth")) is not None:
        kept = [item for item in kept if "exhaustive" not in item.keywords or _digest(seed, item)[0] < 16]
    if (seed := config.getoption("--one-case")) is not None:
        drawn: dict[str, pytest.Item] = {}
        for item in sorted(kept, key=lambda item: _digest(seed, item)):
            drawn.setdefault(item.nodeid.partition("[")[0], item)
        kept = [item for item in kept if drawn[item.nodeid.partition("[")[0]] is item]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _digest(seed: str, item: pytest.Item) -> bytes:
    return hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Makes random weights and images the same in every run, whichever tests ran before in this process."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """The same for the test, with other numbers: a fixture's weights must not be those of a network made here."""
    _seed(item.nodeid)


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode())  # not 0, with which tests seed themselves
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def save(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a network's tensors, or other content, to a file that is deleted after the test."""
    written: list[Path] = []

    def save(content: Any, suffix: str = ".pth") -> Path:
        file = tmp_path / f"{len(written)}{suffix}"
        written.append(file)
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if suffix == ".safetensors":
            save_file(content, file)
        else:
            torch.save(content, file)
        return file

    yield save
    for file in written:
        file.unlink()
