"""Prepares networks for deployment: space-to-depth becomes plain strided layers, BatchNorm is folded."""

import copy
import gc
import html
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, BatchNormAct2d, Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from spd_zoo.blocks import PyConv2d
from spd_zoo.rewrite import (
    ConversionError,
    Unchanged,
    check_same,
    expected_outputs,
    has_hooks,
    replace_modules,
    tensors_in,
    what_is_attached,
    with_shared_parameters,
)
from spd_zoo.spd import PhaseMix, SpaceToDepth, SPDAvgPool2d, SPDConv2d, SPDMaxPool2d, SPDStdConv2d
from spd_zoo.trace import OperatorMode, TraceError, copy_network, image_size, meta_copy, run_on_meta

__all__ = ["FoldReport", "Folded", "fold_batchnorm", "fold_spd"]

Padding = tuple[int, int]

_PLAIN_CONVS = (nn.Conv2d, Conv2dSame)
_SPD_LAYERS = (SPDConv2d, SPDStdConv2d, SPDAvgPool2d, SPDMaxPool2d, PhaseMix)
_BATCHNORMS = (nn.BatchNorm2d, BatchNormAct2d)


@dataclass(frozen=True)
class Folded:
    """A layer that was replaced.

    Attributes:
        module: Its name.
        old: Its class.
        new: The class of its replacement.
    """

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold_spd` did to a network.

    Attributes:
        input_size: Image channels, height and width at which the network was run to see which layer reads which map.
        folded: Every layer that was replaced.
        unchanged: Every space-to-depth layer and BatchNorm that was not replaced, and why.
        difference: The largest difference between the outputs for `example_input`, in standard deviations of the
            original output; None without `example_input`.
    """

    input_size: tuple[int, int, int]
    folded: tuple[Folded, ...]
    unchanged: tuple[Unchanged, ...]
    difference: float | None = None

    def __repr__(self) -> str:
        return f"FoldReport({len(self.folded)} layers folded, {len(self.unchanged)} unchanged)"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        rows = [("module", "was", "is"), *((layer.module, layer.old, layer.new) for layer in self.folded)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += map(str, self.unchanged)
        channels, height, width = self.input_size
        lines.append(f"traced at {height}x{width} pixels, {channels} channels: other sizes must follow the same path")
        if self.difference is not None:
            lines.append(f"largest difference of the outputs: {self.difference:.1e} of their standard deviation")
        return "\n".join(lines)


def fold_spd(model: nn.Module, example_input: Tensor | None = None) -> nn.Module:
    """A copy for inference, with plain strided layers instead of space-to-depth, and with folded BatchNorm.

    A space-to-depth and the convolution after it become one strided convolution with a larger kernel. Outer rows and
    columns of zeros are cut off, so an untrained conversion becomes the original kernel again. The function of each
    layer stays the same at every image size.

    A BatchNorm is folded only if nothing else reads the output of its convolution, and the network neither returns nor
    stores it. Layers are left unchanged if their class is not exactly a known one, if they have hooks or computed
    weights, or if no plain layer can express them: trained layers whose padding or divisor depends on the image size
    (TensorFlow's padding, `ceil_mode`, average pooling that does not count padded pixels).

    The network is run once, at the size of `example_input` or of its `pretrained_cfg`, to find which layer reads which
    map. If its code branches on the image size, the result is right only at sizes that take the same branches.

    Args:
        model: The network; its hooks run once with tensors on the "meta" device.
        example_input: Preprocessed images, (N, C, H, W), for which the outputs before and after are compared in fp32.
            Required for networks that are not timm's, whose image size is unknown without a `pretrained_cfg`.

    Returns:
        The copy, in evaluation mode, with a `FoldReport` in its attribute `fold_report`.

    Raises:
        ValueError: If the size of the images is unknown, if the network cannot compute `example_input`, if its weights
            are on the "meta" device, or if a copy of it cannot run on that device.
        ConversionError: If the outputs for `example_input` differ by more than 1e-4 of their standard deviation, or if
            the network's code needs attributes of a layer that is folded away.
    """
    return _fold(model, example_input, plain=True)


def fold_batchnorm(model: nn.Module, example_input: Tensor | None = None) -> nn.Module:
    """Folds BatchNorm into the convolutions, as `fold_spd` does, but leaves space-to-depth layers unchanged.

    Args:
        model: As in `fold_spd`.
        example_input: As in `fold_spd`.

    Returns:
        The copy, in evaluation mode, with a `FoldReport` in its attribute `fold_report`.

    Raises:
        ValueError: As `fold_spd`.
        ConversionError: As `fold_spd`.
    """
    return _fold(model, example_input, plain=False)


@torch.no_grad()
def _fold(model: nn.Module, example_input: Tensor | None, plain: bool) -> nn.Module:
    """Folds BatchNorm, and with `plain` replaces space-to-depth layers."""
    size = image_size(model, example_input)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError('folding needs weights, but those of this network are on the "meta" device; load them first')
    expected = None if example_input is None else expected_outputs(model, example_input)
    net = copy_network(model).eval()
    folding = _Folding(net, _trace(net, size), plain)
    net = replace_modules(net, folding.replacements)
    report = folding.report(size)
    try:
        run_on_meta(meta_copy(net), size)
    except TraceError as error:  # the network's code reads an attribute of a layer that was replaced
        raise ConversionError(f"the folded network cannot run, and so is not returned: {error.__cause__}") from error
    if example_input is not None:
        assert expected is not None
        advice = f"fold its modules separately to find the layer\n{report}"
        report = replace(report, difference=check_same(net, example_input, expected, advice))
    untyped: Any = net
    untyped.fold_report = report
    return net


# Which layers read which maps


class _Dataflow:
    """Which modules and operators read and write which tensors in one forward pass; storages identify tensors.

    Attributes:
        calls: How often each module was called under its name.
        inputs: The first input of each module.
        outputs: The output of each module.
        reads: How many operators, and modules with hooks, read each tensor.
        read_elsewhere: Modules whose parameters or buffers an operator outside of them reads.
        kept: Tensors that exist after the forward pass, because the network returns or stores them.
    """

    def __init__(self) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.inputs: dict[nn.Module, StorageWeakRef] = {}
        self.outputs: dict[nn.Module, StorageWeakRef] = {}
        self.reads: Counter[StorageWeakRef] = Counter()
        self.read_elsewhere: set[nn.Module] = set()
        self.kept: set[StorageWeakRef] = set()


def _storage(tensor: Tensor) -> StorageWeakRef:
    """A key that a tensor shares with its views. It does not keep the tensor alive, and is never used again."""
    return StorageWeakRef(tensor.untyped_storage())


def _trace(net: nn.Module, size: tuple[int, int, int]) -> _Dataflow:
    """Runs a copy of the network on the "meta" device.

    The registered layers are first replaced by clones. A call through any other reference reaches the uncloned layer,
    and is therefore not counted.
    """
    flow = _Dataflow()
    meta = meta_copy(net)
    originals = dict(zip(meta.modules(), net.modules(), strict=True))
    clones: dict[nn.Module, nn.Module] = {}
    for module in originals:
        if isinstance(module, nn.Conv2d | _BatchNorm | SpaceToDepth) and not has_hooks(module):
            tensors = (*module.parameters(), *module.buffers())
            clones[module] = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    meta = replace_modules(meta, clones)
    originals |= {clone: originals[module] for module, clone in clones.items()}
    owners: dict[StorageWeakRef, nn.Module] = {}
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        original = originals[module]
        running.append(original)
        flow.calls[original] += 1
        tensors = tensors_in([args, kwargs])
        if tensors:
            flow.inputs.setdefault(original, _storage(tensors[0]))
        if has_hooks(original):
            flow.reads.update(map(_storage, tensors))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        original = running.pop()
        if isinstance(output, Tensor):
            flow.outputs.setdefault(original, _storage(output))
        if has_hooks(original):
            flow.reads.update(map(_storage, tensors_in(output)))

    for module in meta.modules():
        if module in originals:  # not so for submodules of clones, such as activations
            owners |= {_storage(p): originals[module] for p in module.parameters(recurse=False)}
            owners |= {_storage(b): originals[module] for b in module.buffers(recurse=False)}
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)

    def on_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for storage in map(_storage, tensors_in([args, kwargs])):
            owner = owners.get(storage)
            if owner is None:
                flow.reads[storage] += 1
            elif not running or running[-1] is not owner:
                flow.read_elsewhere.add(owner)

    def alive() -> set[StorageWeakRef]:
        return {storage for storage in flow.outputs.values() if not storage.expired()}

    with OperatorMode(on_operator):
        result = run_on_meta(meta, size)
    if alive() - set(map(_storage, tensors_in(result))):
        gc.collect()  # frees tensors that only reference cycles keep
    flow.kept = alive()
    del result  # only now, so that the returned tensors count as kept
    return flow


# Replacements of layers


class _Folding:
    """Decides which layers can be replaced, and creates the replacements; the network itself is not changed.

    Attributes:
        replacements: The replacement of each replaced module.
        reasons: Why other modules are not replaced.
    """

    def __init__(self, net: nn.Module, flow: _Dataflow, plain: bool) -> None:
        self.names = {module: name for name, module in net.named_modules()}
        self.flow = flow
        self.shared = with_shared_parameters(net)
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.reasons: dict[nn.Module, str] = {}
        convs = [module for module in self.names if isinstance(module, nn.Conv2d | PyConv2d)]
        self.writers = {flow.outputs[conv]: conv for conv in convs if conv in flow.outputs}
        # reversed, so that a pyramid, which precedes its levels in `convs`, overwrites them
        self.readers = {flow.inputs[conv]: conv for conv in reversed(convs) if conv in flow.inputs}
        self.pools: dict[nn.Module, nn.Module] = {  # phase mix -> the pooling that contains it
            pool.mix: pool for pool in self.names if isinstance(pool, SPDMaxPool2d)
        }
        self.norms = [module for module in self.names if isinstance(module, _BatchNorm | FrozenBatchNorm2d)]
        for module in self.names if plain else ():
            if isinstance(module, SpaceToDepth):
                self._record(module, self._join(module))
        for module in self.names if plain else ():
            if type(module) in _SPD_LAYERS and self.pools.get(module) not in self.replacements:
                self._record(module, self._plain(module))
        for module in self.norms:
            self._record(module, self._fold(module))

    def report(self, size: tuple[int, int, int]) -> FoldReport:
        """Lists the decisions of a run at `size` in the order of the network's modules."""
        folded, unchanged = [], []
        for module, name in self.names.items():
            if module in self.replacements:
                folded.append(Folded(name, type(module).__name__, type(self.replacements[module]).__name__))
            elif module in self.reasons:
                unchanged.append(Unchanged(name, type(module).__name__, self.reasons[module]))
        return FoldReport(size, tuple(folded), tuple(unchanged))

    def _record(self, module: nn.Module, reason: str | None) -> None:
        if reason:
            self.reasons[module] = reason

    def _obstacle(self, module: nn.Module, classes: tuple[type, ...]) -> str | None:
        """Why a layer cannot be replaced, regardless of its neighbours."""
        if attached := what_is_attached(module):
            return attached
        if type(module) not in classes:
            return f"{type(module).__name__} is not one of the classes that can be folded"
        if has_hooks(module):
            return "it has hooks"
        if module in self.shared:
            return "it shares a parameter with another module"
        if module in self.flow.read_elsewhere:
            return "its parameters or buffers are also read outside of it"
        return None

    def _obstacle_between(self, first: nn.Module, second: nn.Module) -> str | None:
        """Why two layers cannot be merged."""
        for module in (first, second):
            if (calls := self.flow.calls[module]) != 1:
                name = "" if module is second else f"{self.names[first]} is "
                return f"{name}called {calls} times in evaluation by its name"
        between = self.flow.outputs[first]
        if between in self.flow.kept:
            return f"the output of {self.names[first]} is also returned or kept"
        if self.flow.reads[between] != 1:
            return f"the output of {self.names[first]} is also read by something else"
        return None

    def _join(self, down: SpaceToDepth) -> str | None:
        """Merges a space-to-depth and the convolution after it."""
        if obstacle := self._obstacle(down, (SpaceToDepth,)):
            return obstacle
        conv = self.readers.get(self.flow.outputs[down]) if down in self.flow.outputs else None
        if conv is None:
            return "there is no convolution that reads its output"
        obstacle = self._obstacle(conv, (nn.Conv2d,))
        if obstacle:
            return f"the convolution after it, {self.names[conv]}, is left unchanged: {obstacle}"
        if obstacle := self._obstacle_between(down, conv):
            return obstacle
        assert isinstance(conv, nn.Conv2d)
        if math.prod(conv.stride) > 1 or math.prod(conv.dilation) > 1 or conv.groups > 1:
            return f"the convolution after it, {self.names[conv]}, has a stride, a dilation or groups"
        if conv.padding_mode != "zeros":
            return f"the convolution after it, {self.names[conv]}, pads with {conv.padding_mode}"
        self.replacements[down] = nn.Identity()
        self.replacements[conv] = _joined(down, conv)
        return None

    def _plain(self, layer: nn.Module) -> str | None:
        """Replaces a space-to-depth layer by plain layers."""
        if obstacle := self._obstacle(layer, _SPD_LAYERS):
            return obstacle
        plain: nn.Module | str
        if isinstance(layer, SPDMaxPool2d):
            plain = _max_pool(layer) if not (obstacle := self._obstacle(layer.mix, (PhaseMix,))) else obstacle
        elif isinstance(layer, SPDAvgPool2d):
            plain = _avg_pool(layer)
        elif isinstance(layer, SPDConv2d):
            plain = _conv(layer)
        else:
            assert isinstance(layer, PhaseMix)
            last = layer.cell - 1
            plain = _strided(F.pixel_shuffle(layer.weight, layer.cell), layer, layer.cell, (0, 0), (last, last))
        if isinstance(plain, str):
            return plain
        self.replacements[layer] = plain
        return None

    def _fold(self, norm: Any) -> str | None:
        """Folds a BatchNorm into the convolution or pyramid that it reads."""
        if norm not in self.flow.inputs:
            return "it is not called in evaluation by its name"
        if obstacle := self._obstacle(norm, _BATCHNORMS):
            return obstacle
        if norm.running_mean is None or norm.running_var is None or norm.training:
            return "it normalises by the statistics of each batch"
        writer = self.writers.get(self.flow.inputs[norm])
        if writer is None:
            return "its input is not the output of a convolution"
        convs = list(writer.children()) if isinstance(writer, PyConv2d) else [writer]
        for layer in dict.fromkeys([writer, *convs]):
            if obstacle := self._obstacle(layer, (PyConv2d, *_PLAIN_CONVS, *_SPD_LAYERS)):
                return f"the convolution before it, {self.names[layer]}, is left unchanged: {obstacle}"
            if obstacle := self._obstacle_between(layer, norm):
                return obstacle
        targets: list[nn.Conv2d] = []
        for conv in convs:
            pool = self.pools.get(conv)
            target = _last_conv(self.replacements.get(pool if pool in self.replacements else conv, conv))
            if target is None:
                return f"the layer before it, {self.names[conv]}, is not a plain convolution"
            targets.append(target)
        fused = _fused(targets, norm)
        if not all(weight.isfinite().all() and bias.isfinite().all() for weight, bias in fused):
            return f"the weights would not be finite in {targets[0].weight.dtype}"
        for conv, target, (weight, bias) in zip(convs, targets, fused, strict=True):
            if target is conv:  # not replaced yet
                target = copy.deepcopy(target)
                self.replacements[conv] = target
            _with_weights(target, weight, bias)
        kept = [layer for layer in (getattr(norm, "drop", None), getattr(norm, "act", None)) if layer is not None]
        kept = [layer for layer in kept if type(layer) is not nn.Identity]
        self.replacements[norm] = nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)
        return None


def _last_conv(layer: nn.Module) -> nn.Conv2d | None:
    """The convolution of a layer, which may be a sequence of padding and convolution."""
    conv = layer[-1] if isinstance(layer, nn.Sequential) else layer
    return cast("nn.Conv2d", conv) if type(conv) in (*_PLAIN_CONVS, SPDConv2d) else None


def _fused(convs: list[nn.Conv2d], norm: nn.BatchNorm2d) -> list[tuple[Tensor, Tensor]]:
    """Kernel and bias of each convolution after folding the BatchNorm; computed in float64 and rounded once."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = _double(norm.running_mean), _double(norm.running_var)
    scale = torch.rsqrt(var + norm.eps) * (1 if norm.weight is None else _double(norm.weight))
    shift = (0 if norm.bias is None else _double(norm.bias)) - mean * scale
    sizes = [conv.out_channels for conv in convs]
    fused = []
    for conv, factor, offset in zip(convs, scale.split(sizes), shift.split(sizes), strict=True):
        weight = _double(conv.weight) * factor[:, None, None, None]
        bias = offset if conv.bias is None else offset + _double(conv.bias) * factor
        fused.append((weight.to(conv.weight), bias.to(conv.weight)))
    return fused


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()  # MPS has no float64


# Plain replacements of space-to-depth layers


def _max_pool(pool: SPDMaxPool2d) -> nn.Module | str:
    if not torch.equal(pool.mix.weight, pool.mix.initial_weight()):
        return "its phase mix is trained"
    pooling: Any = MaxPool2dSame if pool.same else nn.MaxPool2d
    plain = pooling(pool.kernel_size, pool.stride, pool.padding, dilation=pool.dilation, ceil_mode=pool.ceil_mode)
    return cast("nn.Module", plain.eval())


def _avg_pool(pool: SPDAvgPool2d) -> nn.Module | str:
    if torch.equal(pool.weight, pool.initial_weight()):
        pooling: Any = AvgPool2dSame if pool.same else nn.AvgPool2d
        options = {"ceil_mode": pool.ceil_mode, "count_include_pad": pool.count_include_pad}
        return cast("nn.Module", pooling(pool.kernel_size, pool.stride, pool.padding, **options).eval())
    if pool.ceil_mode or not (pool.count_include_pad or pool.own_padding == (0, 0)):
        return "it is trained, and its divisor depends on the image size"
    return _conv(pool)


def _conv(conv: SPDConv2d) -> nn.Module | str:
    weight = F.pixel_shuffle(conv.spd_kernel(), conv.cell)
    # standardisation turns zeros of the stored kernel into rounding errors
    negligible = torch.finfo(torch.float32).eps if isinstance(conv, SPDStdConv2d) else 0.0
    if conv.same:
        rows, columns = conv.reach
        taps = _taps(weight, negligible)
        if taps[rows:].any() or taps[:, columns:].any():
            return "it is trained, and its padding depends on the image size"
        options: Any = {"groups": conv.groups, "bias": conv.bias is not None, "device": "meta"}
        same = Conv2dSame(conv.in_channels, conv.out_channels, conv.reach, conv.cell, **options)
        return _with_weights(same, weight[..., :rows, :columns], conv.bias)
    strided = _strided(weight, conv, conv.cell, conv.pad_before, conv.pad_after, negligible)
    if conv.padding_mode == "zeros":
        return strided
    pads: dict[str, Any] = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
    pads["circular"] = nn.CircularPad2d
    pad = pads[conv.padding_mode](tuple(conv._reversed_padding_repeated_twice))
    return nn.Sequential(pad, *(strided if isinstance(strided, nn.Sequential) else [strided])).eval()


def _joined(down: SpaceToDepth, conv: nn.Conv2d) -> nn.Module:
    """One convolution with stride 2 that replaces space-to-depth and a convolution of stride 1."""
    left, right, top, bottom = (2 * pad for pad in conv._reversed_padding_repeated_twice)
    weight = conv.weight
    if down.order == "rows_first":  # channel (2dx + dy) * C + c -> 4c + 2dy + dx
        weight = weight.unflatten(1, (2, 2, -1)).permute(0, 3, 2, 1, 4, 5).flatten(1, 3)
    return _strided(F.pixel_shuffle(weight, 2), conv, 2, (top, left), (bottom + 1, right + 1))


def _strided(
    weight: Tensor, conv: nn.Conv2d, stride: int, before: Padding, after: Padding, negligible: float = 0.0
) -> nn.Module:
    """A strided convolution, without outer rows and columns of zeros in the kernel that would need padding.

    Args:
        weight: The kernel, (out_chs, in_chs / groups, kh, kw).
        conv: The convolution whose groups and bias it gets.
        stride: The stride.
        before: Padding in pixels at the top and at the left.
        after: Padding in pixels at the bottom and at the right, enough for the last window at every image size.
        negligible: Limit below which a weight counts as zero, as a fraction of the largest weight.

    Returns:
        The convolution, preceded by a padding layer if the padding differs between opposite sides.
    """
    pads = [[before[0], after[0]], [before[1], after[1]]]
    taps = _taps(weight, negligible)
    for axis, pad in zip((2, 3), pads, strict=True):
        used = taps.any(3 - axis).nonzero().flatten().tolist() or [0]
        first, last = min(used[0], pad[0]), max(used[-1], weight.shape[axis] - 1 - pad[1])
        pad[0], pad[1] = pad[0] - first, pad[1] - (weight.shape[axis] - 1 - last)
        weight = weight.narrow(axis, first, last - first + 1)
    (top, bottom), (left, right) = pads
    symmetric = top == bottom and left == right
    out_chs, in_chs, *kernel = weight.shape
    padding = (top, left) if symmetric else (0, 0)
    strided = nn.Conv2d(
        in_chs * conv.groups, out_chs, (kernel[0], kernel[1]), stride, padding, groups=conv.groups, device="meta"
    )
    strided = _with_weights(strided, weight, conv.bias)
    return strided if symmetric else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), strided).eval()


def _taps(weight: Tensor, negligible: float) -> Tensor:
    """Which taps of a kernel have a nonzero weight, (kh, kw)."""
    largest = weight.abs().amax((0, 1))
    return largest > negligible * largest.max()


def _with_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv.weight = nn.Parameter(weight.detach().clone())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return conv.eval()
