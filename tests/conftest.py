import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per process, because pytest runs one process per core
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--eighth", metavar="SEED", help="run only an eighth of the exhaustive tests, drawn by SEED")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps an eighth of the exhaustive tests, which depends on SEED; CI uses the commit's hash."""
    seed = config.getoption("--eighth")
    if seed is None:
        return
    drawn = {item: hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest()[0] < 32 for item in items}
    left_out = [item for item in items if "exhaustive" in item.keywords and not drawn[item]]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


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
