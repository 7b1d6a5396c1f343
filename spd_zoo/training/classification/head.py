"""The first weights of a new classifier on pretrained layers: a linear probe in closed form."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_zoo.process import Process
from spd_zoo.training.layers import classifier_of
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.steps import Batches, read

__all__ = [
    "features",
    "linear_classifier",
    "pretrained_classifier",
    "ridge_classifier",
    "set_classifier",
]

PENALTIES = tuple(10.0**power for power in range(-4, 4))  # per image
SCALES = torch.logspace(0, 2, 41, dtype=torch.float64)


def linear_classifier(net: Any) -> nn.Linear | nn.Conv2d | None:
    """The network's last layer if it is a single linear layer or 1x1 convolution, else None."""
    names = classifier_of(net)
    layer = dict(net.named_modules()).get(names[0]) if len(names) == 1 else None
    if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1):
        return layer
    return None


@torch.no_grad()
def features(
    net: nn.Module, layer: nn.Module, batches: Batches, preprocessing: Preprocessing, process: Process
) -> tuple[Tensor, Tensor]:
    """What a network's last layer gets for images, in evaluation mode.

    Args:
        net: The network.
        layer: Its last layer.
        batches: This process's share of the images.
        preprocessing: How pixels become the network's input.
        process: This process; the results are those of all processes.

    Returns:
        Inputs of the layer (N, C) and labels (N,), on the CPU.
    """
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, taken: inputs.append(taken[0].flatten(1).float().cpu()))
    net.eval()
    try:
        for pixels, targets in read(batches):
            with preprocessing.autocast():
                net(preprocessing.normalize(pixels))
            labels.append(targets)
    finally:
        handle.remove()
    shares = process.all_gather((torch.cat(inputs), torch.cat(labels)) if labels else None)
    taken = [share for share in shares if share is not None]
    return torch.cat([share[0] for share in taken]), torch.cat([share[1] for share in taken])


def ridge_classifier(inputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """A linear layer from ridge regression to one-hot targets, scaled to logits.

    Penalty and scale minimise the cross-entropy of the leave-one-out predictions, which have a closed form. Its labels
    are smoothed, which bounds the logits where all predictions are right.

    Args:
        inputs: Features of training images, (N, C).
        labels: Their classes, (N,).
        classes: Number of classes.

    Returns:
        Weight (classes, C), bias (classes,), and the share of images whose leave-one-out prediction is right.
    """
    center, variance = inputs.double().mean(0), inputs.double().var(0)
    spread = (variance + variance.mean()).clamp(min=1e-12).sqrt()  # noise of nearly constant features is not enlarged
    x, targets = (inputs.double() - center) / spread, F.one_hot(labels, classes).double()
    prior = targets.mean(0)
    if len(x) <= x.shape[1]:  # x = left * root(values) * right^T, from the smaller of the two Gram matrices
        values, left = torch.linalg.eigh(x @ x.T)
        values = values.clamp(min=1e-12)
        right = (x.T @ left) / values.sqrt()
    else:
        values, right = torch.linalg.eigh(x.T @ x)
        values = values.clamp(min=1e-12)
        left = (x @ right) / values.sqrt()
    projected = left.T @ (targets - prior)
    found = []
    for penalty in PENALTIES:
        shrunk = values / (values + penalty * len(x))
        fitted = prior + left @ (shrunk[:, None] * projected)
        leverage = 1 / len(x) + left.square() @ shrunk
        left_out = targets - (targets - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]
        losses = torch.stack([F.cross_entropy(scale * left_out, labels, label_smoothing=0.1) for scale in SCALES])
        correct = left_out.argmax(1).eq(labels).double().mean().item()
        found.append((losses.min().item(), penalty, SCALES[losses.argmin()].item(), correct))
    _, penalty, scale, correct = min(found)
    weight = right @ ((values.sqrt() / (values + penalty * len(x)))[:, None] * projected)
    weight = scale * weight / spread[:, None]
    return weight.T.float(), (scale * prior - center @ weight).float(), correct


def pretrained_classifier(model: str, arguments: dict[str, Any], outputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weight (len(outputs), C) and bias of these outputs of the pretrained classifier.

    Args:
        model: The network's name.
        arguments: Its other arguments.
        outputs: Numbers of the pretrained classes.
    """
    layer: Any = linear_classifier(timm.create_model(model, pretrained=True, **arguments))
    weight = layer.weight.detach().flatten(1)[list(outputs)]
    bias = layer.bias.detach()[list(outputs)] if layer.bias is not None else torch.zeros(len(weight))
    return weight, bias


@torch.no_grad()
def set_classifier(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Copies a weight (classes, C) and a bias (classes,) into a network's last layer."""
    layer.weight.copy_(weight.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(bias)
