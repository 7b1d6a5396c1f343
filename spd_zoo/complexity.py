"""What a network costs: parameters and multiply-accumulates, counted on the real network without computing it."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_params"]


def count_params(net: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def count_macs(net: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one image of `input_size` (C, H, W).

    Only `net` on the "meta" device is counted exactly: on a CPU, pyramids are computed packed, with more operations.

    Raises:
        ValueError: If `net` is not on the "meta" device.
    """
    if any(parameter.device.type != "meta" for parameter in net.parameters()):
        raise ValueError('count_macs needs a network on the "meta" device: timm.create_model(name, device="meta")')
    was_training = net.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, *input_size, device="meta"))
    net.train(was_training)
    return int(counter.get_total_flops()) // 2
