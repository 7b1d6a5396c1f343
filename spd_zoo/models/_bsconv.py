"""Shared by the networks of the BSConv library: initialisation, and adapting the BatchNorm on the image."""

from typing import cast

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from spd_zoo.blocks import HybridStem
from spd_zoo.models._classifier import Classifier
from spd_zoo.spd import SPDConv2d, adapt_image_channels
from spd_zoo.weights.fit import first_conv_name

__all__ = ["fit_image_norm", "flat_classifier", "init_weights"]

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def init_weights(net: nn.Module) -> None:
    """Initialises as the authors do: Kaiming-uniform convolutions, and a Xavier-normal weight of the classifier."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


def fit_image_norm(state_dict: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Adapts a checkpoint to the network's image channels.

    With one channel, a grey image gives the same output as three equal colours would, except near the border
    (`_fold_colours`). For any other number, the BatchNorm's channels are repeated in order, and the kernels as by timm.

    Args:
        state_dict: The checkpoint under the network's own keys; changed in place.
        model: The network.

    Returns:
        The state dict.
    """
    name = first_conv_name(model)
    body = [key for key in model.state_dict() if not key.startswith("head.")]
    if state_dict.keys() >= set(body):  # otherwise loading reports the missing keys
        norm = [state_dict[f"stem.0.{statistic}"] for statistic in _STATISTICS]
        if len({tensor.shape for tensor in norm}) == 1 and norm[0].shape != (model.in_chans,):
            if model.in_chans == 1:
                _fold_colours(state_dict, model, name, norm)
            else:
                _repeat_colours(state_dict, model, name, norm)
    return state_dict


def flat_classifier(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint with the authors' classifier, a 1x1 convolution, as a matrix."""
    classifier = state_dict.get("head.fc.weight")
    if classifier is not None and classifier.ndim == 4:
        state_dict["head.fc.weight"] = classifier.flatten(1)
    return state_dict


def _repeat_colours(state_dict: dict[str, Tensor], model: Classifier, name: str, norm: list[Tensor]) -> None:
    """Repeats the channels of the BatchNorm in order, and those of the first kernel as timm does."""
    for statistic, tensor in zip(_STATISTICS, norm, strict=True):
        state_dict[f"stem.0.{statistic}"] = tensor.repeat(-(-model.in_chans // len(tensor)))[: model.in_chans]
    conv = model.get_submodule(name)
    cell = conv.cell if isinstance(conv, SPDConv2d) else 1
    state_dict[f"{name}.weight"] = adapt_image_channels(state_dict[f"{name}.weight"], model.in_chans, cell)


def _fold_colours(state_dict: dict[str, Tensor], model: Classifier, name: str, norm: list[Tensor]) -> None:
    """Replaces the BatchNorm's and the first kernel's colours by one channel that computes the same for grey images.

    The BatchNorm maps each colour to `scale * x + shift`. The scales are multiplied into the kernel. The shifts are
    replaced by the single one that fits best. The remainder adds a constant to each output channel, which is subtracted
    from the running means of the BatchNorms that read the map. Near the border this is an approximation, because the
    kernel also reads padded zeros there.

    Args:
        state_dict: The checkpoint; changed in place.
        model: The network, with one image channel.
        name: The first convolution.
        norm: The BatchNorm's weight, bias, mean and variance, one number per colour.
    """
    eps = cast("nn.BatchNorm2d", model.get_submodule("stem.0")).eps
    weight, bias, mean, var = (tensor.double() for tensor in norm)
    scale = weight / (var + eps).sqrt()
    shift = bias - mean * scale
    power = scale.square().mean()
    grey_scale = power.sqrt() if power > 0 else power.new_ones(())
    ratio = (scale * shift).mean() / grey_scale.square()  # least squares: shift = ratio * scale
    grey_mean, grey_var = mean.mean(), var.mean()
    grey = (grey_scale * (grey_var + eps).sqrt(), grey_scale * (ratio + grey_mean), grey_mean, grey_var)
    for statistic, old, new in zip(_STATISTICS, norm, grey, strict=True):
        state_dict[f"stem.0.{statistic}"] = new.to(old.dtype).reshape(1)

    kernel = state_dict[f"{name}.weight"]
    colours = kernel.double().unflatten(1, (len(scale), -1))  # after space-to-depth, each colour has several channels
    folded = (colours * (scale / grey_scale)[:, None, None, None]).sum(1)
    state_dict[f"{name}.weight"] = folded.to(kernel.dtype)
    rest = (colours * (shift - ratio * scale)[:, None, None, None]).sum((1, 2, 3, 4))
    if name.endswith(".pw"):  # in a BSConvU2d the constant also passes through the depthwise kernel
        rest = rest * state_dict[f"{name.removesuffix('pw')}dw.weight"].double().sum((1, 2, 3))
    for reader in _readers(model):
        old = state_dict[f"{reader}.running_mean"]
        shifted = [*old[: -len(rest)].double(), *(old[-len(rest) :].double() - rest)]
        state_dict[f"{reader}.running_mean"] = torch.stack(shifted).to(old.dtype)


def _readers(model: Classifier) -> list[str]:
    """Names of the BatchNorms whose last input channels are the output of the first convolution."""
    first: nn.Module = model.stem[1]
    hybrid = isinstance(first, HybridStem)
    place = "stem.1.conv" if hybrid else "stem.1"
    if isinstance(model.get_submodule(place), ConvNormAct):
        return [f"{place}.bn"]
    # Identity shortcuts pass the map on until the first projection, which reads the output of a BatchNorm instead.
    readers = ["stem.1.branch.bn", "stem.1.fuse.bn"] if hybrid else []
    for name, unit in model.stages.named_modules():
        if hasattr(unit, "projects"):
            readers.append(f"stages.{name}.bn")
            if unit.projects:
                break
    return readers
