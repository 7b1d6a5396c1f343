"""Which layers of a network train: without frozen ones, and at first only the classifier."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "classifier_of",
    "frozen_layers",
    "lies_in",
    "mostly_depthwise",
    "set_trainable",
    "set_training_mode",
    "zero_classifier",
]


def frozen_layers(net: nn.Module, text: str) -> list[str]:
    """The names of modules in `text`, separated by commas.

    Raises:
        ValueError: If the network has no such module.
    """
    frozen = [name.strip() for name in text.split(",") if name.strip()]
    names = [name for name, _ in net.named_modules()]
    for name in frozen:
        if name not in names:
            children = ", ".join(child for child, _ in net.named_children())
            raise ValueError(f"freeze names {name!r}, which the network does not have; its modules are {children}")
    return frozen


def classifier_of(net: Any) -> list[str]:
    """The names of the network's last layers."""
    names = net.pretrained_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names or ())


def zero_classifier(net: nn.Module) -> None:
    """Lets all logits start at zero, so that pretrained layers get no gradients of random outputs.

    timm draws the classifier of EfficientNets from +-1/sqrt(classes), which with few classes gives logits of more than
    ten. Zero is the start of Kolesnikov et al., Big Transfer, https://arxiv.org/abs/1912.11370.
    """
    classifier = classifier_of(net)
    for name, module in net.named_modules():
        if name in classifier and type(module) in (nn.Linear, nn.Conv2d):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def mostly_depthwise(net: nn.Module) -> bool:
    """Whether more than half of a network's convolutions over more than one pixel are depthwise.

    On CPUs, torch computes depthwise convolutions more slowly in bfloat16 than in float32.
    """
    spatial = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return 2 * sum(m.groups == m.in_channels > 1 for m in spatial) > len(spatial)


def lies_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter or module belongs to one of the `modules`; the module "" is the whole network."""
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def _contains(name: str, modules: Sequence[str]) -> bool:
    """Whether the module `name` contains one of the `modules`."""
    return any(module.startswith(f"{name}.") for module in modules)


def set_trainable(net: nn.Module, trained: Sequence[str], frozen: Sequence[str]) -> None:
    """Gives gradients to the parameters of the modules `trained` except `frozen`."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad = lies_in(name, trained) and not lies_in(name, frozen)


def set_training_mode(net: nn.Module, trained: Sequence[str], frozen: Sequence[str], freeze_bn: bool = False) -> None:
    """Puts everything that does not train into evaluation mode, so that its BatchNorm statistics stay.

    Args:
        net: The network.
        trained: The modules that train.
        frozen: Modules in them that do not.
        freeze_bn: Whether no BatchNorm statistics change; their scales and shifts train.
    """
    net.train()
    for name, module in net.named_modules():
        idle = lies_in(name, frozen) or not (lies_in(name, trained) or _contains(name, trained))
        if name and (idle or (freeze_bn and isinstance(module, _BatchNorm))):
            module.eval()
