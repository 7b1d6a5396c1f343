"""Complexity of networks: parameters and operations, counted on the real network without computing its outputs.

`trace` lists the operators that a network runs, and every count is a sum over that list. Published figures depend on
the counting rule of the authors' tool, so they can only be compared by the same rule; `COUNTERS` has all rules.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spd_zoo.trace import OperatorMode, run_on_meta

__all__ = ["COUNTERS", "Operation", "count_activations", "count_layer_params", "count_macs", "count_params", "trace"]

KINDS = {  # torch's name of an operator -> what the rules call it
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
        kind: One of the values of `KINDS`, "global_pool" (`nn.AdaptiveAvgPool2d(1)`), "global_mean" (a mean over the
            pixels in other words), or torch's name of the operator.
        inputs: Elements of the map that it reads.
        outputs: Elements of its output.
        macs: Multiply-accumulates of a convolution, linear layer or matrix product.
        biased: Elements that a convolution or linear layer adds a bias to.
        params: Elements of the parameters that a convolution, linear layer or BatchNorm is the first to read.
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
        """Adds an operator to the list, unless it reads or returns no tensor."""
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
            kind = "global_pool" if args[1] == [-1, -2] else "global_mean"  # torch's own pooling says [-1, -2]
        if kind in ("conv", "linear", "batch_norm"):
            params = sum(self.unread.pop(_storage(tensor), 0) for tensor in tensors)
        return Operation(kind, x.numel(), output.numel(), macs, biased, params)


def _storage(tensor: Tensor) -> int:
    """A key that a parameter shares with its views, because a linear layer reads its weight transposed."""
    return tensor.untyped_storage()._cdata


def trace(net: nn.Module, input_size: tuple[int, int, int]) -> list[Operation]:
    """The operators that `net` runs in evaluation for one image of `input_size` (C, H, W), in their order.

    For a detector they include the decoding of its predictions.

    Only `net` on the "meta" device is counted exactly: on a CPU, pyramids are computed packed, with more operations.

    Raises:
        ValueError: If `net` is not on the "meta" device, or cannot run there.
    """
    if any(parameter.device.type != "meta" for parameter in net.parameters()):
        raise ValueError('counting needs a network on the "meta" device: timm.create_model(name, device="meta")')
    was_training = net.training
    recorder = _Recorder(net.parameters())
    with OperatorMode(recorder.record), torch.no_grad():
        result = run_on_meta(net.eval(), input_size)
        if hasattr(net, "decode"):
            cast("Any", net).decode(result, input_size[1:])
    net.train(was_training)
    return recorder.operations


def count_params(net: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def count_layer_params(operations: Iterable[Operation]) -> int:
    """Parameters that convolutions, linear layers and BatchNorms read, as thop counts them.

    thop counts modules without children that run: it misses position encodings, attention biases and unused layers.
    (This function also misses kernels computed from parameters, as in `SPDConv2d`; thop has no figures of those.)
    """
    return sum(operation.params for operation in operations)


def count_macs(net: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one image of `input_size` (C, H, W).

    Only `net` on the "meta" device is counted exactly: on a CPU, pyramids are computed packed, with more operations.

    Raises:
        ValueError: If `net` is not on the "meta" device.
    """
    return macs(trace(net, input_size))


def count_activations(operations: Iterable[Operation]) -> int:
    """Output elements of convolutions, linear layers and matrix products, as fvcore counts activations."""
    return _total(operations, dict.fromkeys(("conv", "linear", "matmul"), lambda op: op.outputs))


def _total(operations: Iterable[Operation], costs: dict[str, Callable[[Operation], int]]) -> int:
    return sum(costs[operation.kind](operation) for operation in operations if operation.kind in costs)


def macs(operations: Sequence[Operation]) -> int:
    """Multiply-accumulates of convolutions and linear layers: the MACs on this project's pages."""
    return _total(operations, {"conv": lambda op: op.macs, "linear": lambda op: op.macs})


def fvcore(operations: Sequence[Operation]) -> int:
    """fvcore 0.1.5: MACs, of matrix products too, 2 for each element into a BatchNorm, 1 into `nn.AdaptiveAvgPool2d`.

    fvcore itself gives the same counts, but cannot trace on the "meta" device, and on a CPU pyramids are packed.
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
    """The profiler of BSConv's library, which also made the first tables of padding-free downsampling.

    Convolutions with their bias, 2 for each element into a BatchNorm, 1 out of a ReLU, 1 into a pool of either kind.
    The authors' classifiers are 1x1 convolutions, so a linear layer counts as one.
    """
    costs: dict[str, Callable[[Operation], int]] = {
        **dict.fromkeys(("conv", "linear"), lambda op: op.macs + op.biased),
        "batch_norm": lambda op: 2 * op.inputs,
        "relu": lambda op: op.outputs,
        **dict.fromkeys(("max_pool", "global_pool", "global_mean"), lambda op: op.inputs),
    }
    return _total(operations, costs)


def thop_2019(operations: Sequence[Operation]) -> int:
    """thop 0.0.22 to 0.0.23.post1907, which made PyConvResNet's tables.

    Convolutions, 4 for each element into a BatchNorm, 3 (not 9) out of a 3x3 max-pool, h * w + 1 out of the average
    pool, 2 * inputs - 1 out of a linear layer. Of a ReLU module only the last call counts: the stem's, and in a block,
    whose calls share one module, the call after the addition.
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
    """thop 0.0.31, which made the other tables of padding-free downsampling.

    Convolutions with their bias, linear layers without, 2 for each element into a BatchNorm, 1 out of an average pool
    with a stride, and 1 into and 1 out of a global average pool that is a module of the authors' network.

    Args:
        operations: What `trace` gives.
        pools: Which global pools are modules there. "all", GhostNet: those of squeeze-and-excitation and of the head.
            "head", MobileNetV3: the last one; the layer after it is linear there, but a 1x1 convolution in ours.
            "none", ParC-MobileNetV2 and ShuffleNetV2, which call functions.
    """
    found = [i for i, operation in enumerate(operations) if operation.kind in ("global_pool", "global_mean")]
    modules = {"all": found, "head": found[-1:], "none": []}[pools]
    linear = modules[-1] if pools == "head" else len(operations)  # from there on, 1x1 convolutions are
    costs: dict[str, Callable[[Operation], int]] = {
        "conv": lambda op: op.macs,
        "linear": lambda op: op.macs,
        "batch_norm": lambda op: 2 * op.inputs,
        "avg_pool2d": lambda op: op.outputs,
    }
    biases = sum(operation.biased for operation in operations[:linear] if operation.kind == "conv")
    return _total(operations, costs) + biases + sum(operations[i].inputs + operations[i].outputs for i in modules)


def thop_yolo(operations: Sequence[Operation]) -> int:
    """What YOLOv5 v6.0 and ultralytics 8.1.0 print: twice thop's convolutions and 4 for each element of a BatchNorm."""
    return 2 * (macs(operations) + _total(operations, {"batch_norm": lambda op: 4 * op.outputs}))


def ssd(operations: Sequence[Operation]) -> int:
    """The profiler of small_object_detection, for its SSD networks.

    Convolutions with their bias, 2 for each element into a BatchNorm, 1 into a max-pool, a ReLU6 and a ReLU of the
    backbone. It does not count functions, such as the ReLUs after the L2 normalisation there.
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
