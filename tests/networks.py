"""Helpers of network tests: recorded weights, networks with these or random weights, and noise as input."""

from pathlib import Path
from typing import Any

import golden
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from spd_zoo.spd import PhaseMix


def authors_tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """The case's tensors under the authors' names."""
    arrays = golden.fill_state_dict(case["entries"], case.get("kept"))
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def config_of(name: str) -> PretrainedCfg:
    """timm's configuration of a network or checkpoint."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, f"timm knows no {name}"
    return cfg


def load(name: str, file: Path, **kwargs: Any) -> Any:
    """The network with the weights of a file, as timm loads them."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs).eval()


def random_network(name: str, **kwargs: Any) -> Any:
    """A network whose channels and phases all differ."""
    torch.manual_seed(0)
    net = timm.create_model(name, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.1)
        elif isinstance(module, PhaseMix):
            nn.init.uniform_(module.weight)
    return net.eval()


def gradient(tensor: Tensor) -> Tensor:
    """The gradient of a tensor, which must exist."""
    assert tensor.grad is not None
    return tensor.grad


def noise(*shape: int) -> Tensor:
    """Normal random numbers, which depend on the shape alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Raises AssertionError unless tensors are equal up to `rtol` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * expected.abs().max().item())
