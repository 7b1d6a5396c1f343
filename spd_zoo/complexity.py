"""Complexity of networks: parameters and operations, counted on the real network without computing its outputs.

`trace` lists the operators that a network runs, and every count is a sum over that list. Published figures depend on
the counting rule of the authors' tool, so they can only be compared by the same rule; `COUNTERS` contains all rules.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spd_zoo.trace import OperatorMode, run_on_meta

__all__ = ["COUNTERS", "Operation", "count_activations", "count_layer_params", "count_macs", "count_params", "trace"]

KINDS = {  # torch's name of an operator -> its name in the rules
    "convolution": "conv",
    "addmm": "linear",
    "mm": "linear",
    "bmm": "matmul",
    "native_batch_norm": "batch_norm",
    "relu_": "relu",
    "max_pool2d_with_indices": "max_pool",
    "add_": "add",
}


@dataclass(frozen=True)
class Operation:
    """One operator that a network ran.

    Attributes:
        kind: One of the values of `KINDS`, "global_pool" (`nn.AdaptiveAvgPool2d(1)`), "global_mean" (any other mean
            over all pixels), or torch's name of the operator.
        inputs: Elements of its input.
        outputs: Elements of its output.
        macs: Multiply-accumulates of a convolution, linear layer or matrix product.
        biased: Output elements of a convolution or linear layer with a bias; 0 without a bias.
        params: Elements of parameters that a convolution, linear layer or BatchNorm reads and no earlier one did.
    """

    kind: str
    inputs: int
    outputs: int
    macs: int = 0
    biased: int = 0
    params: int = 0


class _Recorder:
    """Lists the operators that a network runs."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.operations: list[Operation] = []
        self.unread = {_storage(parameter): parameter.numel() for parameter in parameters}

    def record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Adds an operator to the list if it reads and returns tensors."""
        output = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(output, Tensor) and any(isinstance(arg, Tensor) for arg in args):
            self.operations.append(self._describe(name, args, output))

    def _describe(self, name: str, args: tuple[Any, ...], output: Tensor) -> Operation:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        kind = KINDS.get(name, name)
        x = tensors[1] if name == "addmm" else tensors[0]  # the bias is the first argument
        macs = biased = params = 0
        if kind == "conv":
            positions = (x if args[6] else output).shape[2:].numel()  # args[6]: transposed
            macs = x.shape[0] * positions * tensors[1].numel()
            biased = output.numel() if len(tensors) == 3 else 0
        elif kind in ("linear", "matmul"):
            macs = x.numel() * tensors[-1].shape[-1]
            biased = output.numel() if name == "addmm" else 0
        elif name == "mean" and x.ndim == 4 and len(args) > 1 and {axis % 4 for axis in args[1]} == {2, 3}:
            kind = "global_pool" if args[1] == [-1, -2] else "global_mean"  # torch's own pooling passes [-1, -2]
        if kind in ("conv", "linear", "batch_norm"):
            params = sum(self.unread.pop(_storage(tensor), 0) for tensor in tensors)
        return Operation(kind, x.numel(), output.numel(), macs, biased, params)


def _storage(tensor: Tensor) -> int:
    """A key that a parameter shares with its views; linear layers read a transposed view of their weight."""
    return tensor.untyped_storage()._cdata


def trace(net: nn.Module, input_size: tuple[int, int, int]) -> list[Operation]:
    """Lists the operators that a network runs in evaluation for one image; for a detector, including `decode`.

    The modes of its modules are restored.

    Args:
        net: The network, on the "meta" device: on a CPU, pyramids are computed packed, with more operations.
        input_size: Channels, height and width of the image in pixels.

    Returns:
        The operators in the order of execution.

    Raises:
        ValueError: If `net` is not on the "meta" device, or cannot run there.
    """
    if any(parameter.device.type != "meta" for parameter in net.parameters()):
        raise ValueError('counting needs a network on the "meta" device: timm.create_model(name, device="meta")')
    training = [module for module in net.modules() if module.training]
    recorder = _Recorder(net.parameters())
    try:
        with OperatorMode(recorder.record), torch.no_grad():
            result = run_on_meta(net.eval(), input_size)
            if hasattr(net, "decode"):
                cast("Any", net).decode(result, input_size[1:])
    finally:
        for module in training:
            module.training = True
    return recorder.operations


def count_params(net: nn.Module) -> int:
    """Counts the trainable parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def count_layer_params(operations: Iterable[Operation]) -> int:
    """Counts the parameters that convolutions, linear layers and BatchNorms read, as thop does.

    thop only counts modules without children that are called: it misses position encodings, attention biases and unused
    layers. This function also misses parameters from which kernels are computed, as in `SPDConv2d`.

    Args:
        operations: The result of `trace`.

    Returns:
        The number of parameters.
    """
    return sum(operation.params for operation in operations)


def count_macs(net: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Counts the multiply-accumulates of the convolutions and linear layers for one image.

    Args:
        net: The network, on the "meta" device.
        input_size: Channels, height and width of the image in pixels.

    Returns:
        The number of multiply-accumulates.

    Raises:
        ValueError: If `net` is not on the "meta" device.
    """
    return macs(trace(net, input_size))


def count_activations(operations: Iterable[Operation]) -> int:
    """Counts the output elements of convolutions, linear layers and matrix products, as fvcore counts activations.

    Args:
        operations: The result of `trace`.

    Returns:
        The number of elements.
    """
    return _total(operations, dict.fromkeys(("conv", "linear", "matmul"), lambda op: op.outputs))


def _total(operations: Iterable[Operation], costs: dict[str, Callable[[Operation], int]]) -> int:
    return sum(costs[operation.kind](operation) for operation in operations if operation.kind in costs)


def macs(operations: Sequence[Operation]) -> int:
    """Multiply-accumulates of convolutions and linear layers: the MACs in this project's documentation."""
    return _total(operations, {"conv": lambda op: op.macs, "linear": lambda op: op.macs})


def fvcore(operations: Sequence[Operation]) -> int:
    """The rule of fvcore 0.1.5.

    MACs of convolutions, linear layers and matrix products, 2 per input element of a BatchNorm, and 1 per input element
    of `nn.AdaptiveAvgPool2d`. fvcore itself gives the same counts, but it cannot trace on the "meta" device, and on a
    CPU pyramids are packed.
    """
    costs: dict[str, Callable[[Operation], int]] = {
        **dict.fromkeys(("conv", "linear", "matmul"), lambda op: op.macs),
        "batch_norm": lambda op: 2 * op.inputs,
        "global_pool": lambda op: op.inputs,
        "upsample_nearest2d": lambda op: op.outputs,
        "upsample_bilinear2d": lambda op: 4 * op.outputs,
    }
    return _total(operations, costs)


def bsconv(operations: Sequence[Operation]) -> int:
    """The rule of the BSConv library's profiler, also used for the first tables of padding-free downsampling.

    MACs and bias additions of convolutions, 2 per input element of a BatchNorm, 1 per output element of a ReLU, and 1
    per input element of a max-pool or global pool. A linear layer counts like a convolution, because the authors'
    classifiers are 1x1 convolutions.
    """
    costs: dict[str, Callable[[Operation], int]] = {
        **dict.fromkeys(("conv", "linear"), lambda op: op.macs + op.biased),
        "batch_norm": lambda op: 2 * op.inputs,
        "relu": lambda op: op.outputs,
        **dict.fromkeys(("max_pool", "global_pool", "global_mean"), lambda op: op.inputs),
    }
    return _total(operations, costs)


def thop_2019(operations: Sequence[Operation]) -> int:
    """The rule of thop 0.0.22 to 0.0.23.post1907, used for PyConvResNet's tables.

    MACs of convolutions, 4 per input element of a BatchNorm, 3 (not 9) per output element of a 3x3 max-pool, h * w + 1
    per output element of the average pool, and 2 * inputs - 1 per output element of a linear layer. Only the last call
    of each ReLU module counts, which is 1 per input element: the stem's call, and in each block the one after the
    addition.
    """
    costs: dict[str, Callable[[Operation], int]] = {
        "conv": lambda op: op.macs,
        "linear": lambda op: 2 * op.macs - op.outputs,
        "batch_norm": lambda op: 4 * op.inputs,
        "max_pool": lambda op: 3 * op.outputs,
        "global_pool": lambda op: op.inputs + op.outputs,
    }
    relus = [i for i, operation in enumerate(operations) if operation.kind == "relu"]
    last_calls = [operations[i] for i in relus if i == relus[0] or operations[i - 1].kind == "add"]
    return _total(operations, costs) + sum(operation.inputs for operation in last_calls)


def thop_2020(operations: Sequence[Operation], pools: str = "none") -> int:
    """The rule of thop 0.0.31, used for the other tables of padding-free downsampling.

    MACs and bias additions of convolutions, MACs of linear layers, 2 per input element of a BatchNorm, 1 per output
    element of a strided average pool, and 1 per input and output element of each global average pool that is a module
    of the authors' network.

    Args:
        operations: The result of `trace`.
        pools: Which global pools are modules there. "all": those of squeeze-and-excitation and of the head (GhostNet).
            "head": the last one (MobileNetV3); the layer after it is linear there, but a 1x1 convolution here. "none":
            none, because functions are called (ParC-MobileNetV2, ShuffleNetV2).

    Returns:
        The number of operations.
    """
    found = [i for i, operation in enumerate(operations) if operation.kind in ("global_pool", "global_mean")]
    modules = {"all": found, "head": found[-1:], "none": []}[pools]
    linear = modules[-1] if pools == "head" else len(operations)  # from here on, convolutions count as linear layers
    costs: dict[str, Callable[[Operation], int]] = {
        "conv": lambda op: op.macs,
        "linear": lambda op: op.macs,
        "batch_norm": lambda op: 2 * op.inputs,
        "avg_pool2d": lambda op: op.outputs,
    }
    biases = sum(operation.biased for operation in operations[:linear] if operation.kind == "conv")
    return _total(operations, costs) + biases + sum(operations[i].inputs + operations[i].outputs for i in modules)


def thop_yolo(operations: Sequence[Operation]) -> int:
    """The rule of YOLOv5 v6.0 and ultralytics 8.1.0: twice the sum of MACs and 4 per output element of a BatchNorm."""
    return 2 * (macs(operations) + _total(operations, {"batch_norm": lambda op: 4 * op.outputs}))


def ssd(operations: Sequence[Operation]) -> int:
    """The rule of small_object_detection's profiler, used for its SSD networks.

    MACs and bias additions of convolutions, 2 per input element of a BatchNorm, and 1 per input element of a max-pool,
    a ReLU6 and a ReLU of the backbone. Functions do not count, such as its ReLUs after the L2 normalisation.
    """
    costs: dict[str, Callable[[Operation], int]] = {
        "conv": lambda op: op.macs + op.biased,
        "batch_norm": lambda op: 2 * op.inputs,
        **dict.fromkeys(("max_pool", "hardtanh_"), lambda op: op.inputs),
    }
    normalised = [operation.kind for operation in operations].index("linalg_vector_norm")
    relus = [operation.inputs for operation in operations[:normalised] if operation.kind == "relu"]
    return _total(operations, costs) + sum(relus)


COUNTERS: dict[str, Callable[[Sequence[Operation]], int]] = {
    "macs": macs,
    "fvcore": fvcore,
    "bsconv": bsconv,
    "thop_2019": thop_2019,
    "thop_2020": thop_2020,
    "thop_2020_head": partial(thop_2020, pools="head"),
    "thop_2020_pools": partial(thop_2020, pools="all"),
    "thop_yolo": thop_yolo,
    "ssd": ssd,
}
