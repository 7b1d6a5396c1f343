import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Writes a network's own tensors, or given ones, to a file that lives as long as the test."""
    written = []

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
