from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn


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
