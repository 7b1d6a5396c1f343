"""From space-to-depth back to plain strided layers, and BatchNorm into the convolutions: the form for deployment."""

import copy
import math
from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, BatchNormAct2d, Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves

from spd_zoo.blocks import PyConv2d
from spd_zoo.spd import PhaseMix, SpaceToDepth, SPDAvgPool2d, SPDConv2d, SPDMaxPool2d
from spd_zoo.watch import Watch, image_size

__all__ = ["fold_batchnorm", "fold_spd"]

Pads = tuple[int, int]


def fold_spd(model: nn.Module, example_input: Tensor | None = None) -> nn.Module:
    """A copy for inference: plain strided layers in place of space-to-depth ones, BatchNorm folded in.

    A space-to-depth with its convolution becomes one convolution of a larger kernel with a stride, without outer rows
    and columns of weights that are all zero: what was converted and not trained since becomes what it was. The
    function stays the same at every image size. What no plain layer computes stays as it is: layers that have learnt
    something where TensorFlow's padding, `ceil_mode` or a divisor that varies at the border depends on the image size.

    Args:
        model: The network.
        example_input: Images as it takes them, (N, C, H, W); needed for those with BatchNorm that are not timm's.

    Raises:
        ValueError: If the size of the images is unknown.
    """
    net = copy.deepcopy(model).eval()
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential):
            _join(module)
    return fold_batchnorm(_with_plain_layers(net), example_input)


def _with_plain_layers(module: nn.Module) -> nn.Module:
    """The module with plain layers in place of ours."""
    if isinstance(module, SPDMaxPool2d):
        return _max_pool(module)
    if isinstance(module, SPDAvgPool2d):
        return _avg_pool(module)
    if isinstance(module, SPDConv2d):
        return _conv(module)
    if isinstance(module, PhaseMix):
        last = module.cell - 1
        return _strided(F.pixel_shuffle(module.weight, module.cell), module, module.cell, (0, 0), (last, last))
    for name, child in module.named_children():
        setattr(module, name, _with_plain_layers(child))
    return module


def _max_pool(pool: SPDMaxPool2d) -> nn.Module:
    if not torch.equal(pool.mix.weight, pool.mix.initial_weight()):
        return pool
    kind: Any = MaxPool2dSame if pool.same else nn.MaxPool2d
    return cast(
        "nn.Module",
        kind(pool.kernel_size, pool.stride, pool.padding, dilation=pool.dilation, ceil_mode=pool.ceil_mode),
    )


def _avg_pool(pool: SPDAvgPool2d) -> nn.Module:
    if torch.equal(pool.weight, pool.initial_weight()):
        kind: Any = AvgPool2dSame if pool.same else nn.AvgPool2d
        options = {"ceil_mode": pool.ceil_mode, "count_include_pad": pool.count_include_pad}
        return cast("nn.Module", kind(pool.kernel_size, pool.stride, pool.padding, **options))
    if pool.ceil_mode or not (pool.count_include_pad or pool.own_padding == (0, 0)):
        return pool
    return _conv(pool)


@torch.no_grad()
def _conv(conv: SPDConv2d) -> nn.Module:
    weight = F.pixel_shuffle(conv.spd_kernel(), conv.cell)
    if conv.same:
        rows, columns = conv.reach
        taps = _taps(weight)
        if taps[rows:].any() or taps[:, columns:].any():
            return conv
        same = Conv2dSame(conv.in_channels, conv.out_channels, conv.reach, conv.cell, groups=conv.groups)
        return _with_weights(same, weight[..., :rows, :columns], conv.bias)
    strided = _strided(weight, conv, conv.cell, conv.pad_before, conv.pad_after)
    if conv.padding_mode == "zeros":
        return strided
    pads: dict[str, Any] = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
    pads["circular"] = nn.CircularPad2d
    return nn.Sequential(pads[conv.padding_mode](tuple(conv._reversed_padding_repeated_twice)), strided)


@torch.no_grad()
def _join(layers: nn.Sequential) -> None:
    """Makes one layer of every space-to-depth and the convolution right behind it."""
    for i, (down, conv) in enumerate(zip(list(layers), list(layers)[1:], strict=False)):
        if not isinstance(down, SpaceToDepth) or type(conv) is not nn.Conv2d or math.prod(conv.stride) > 1:
            continue
        if math.prod(conv.dilation) > 1 or conv.groups > 1 or conv.padding_mode != "zeros":
            continue
        rows, columns = (2 * pad for pad in cast("Pads", conv.padding))
        weight = conv.weight
        if down.order == "rows_first":  # channel (2dx + dy) * C + c -> 4c + 2dy + dx
            weight = weight.unflatten(1, (2, 2, -1)).permute(0, 3, 2, 1, 4, 5).flatten(1, 3)
        joined = _strided(F.pixel_shuffle(weight, 2), conv, 2, (rows, columns), (rows + 1, columns + 1))
        layers[i], layers[i + 1] = nn.Identity(), joined


def _strided(weight: Tensor, conv: nn.Conv2d, stride: int, before: Pads, after: Pads) -> nn.Module:
    """A convolution with a stride, without outer rows and columns of zeros that need padding.

    Args:
        weight: Its kernel, (out_chs, in_chs / groups, kh, kw).
        conv: Whose groups and bias it has.
        stride: Its stride.
        before: Zeros at the top and at the left.
        after: Zeros at the bottom and at the right, enough for the last window at every image size.
    """
    pads = [[before[0], after[0]], [before[1], after[1]]]
    taps = _taps(weight)
    for axis, pad in zip((2, 3), pads, strict=True):
        used = taps.any(3 - axis).nonzero().flatten().tolist() or [0]
        first, last = min(used[0], pad[0]), max(used[-1], weight.shape[axis] - 1 - pad[1])
        pad[0], pad[1] = pad[0] - first, pad[1] - (weight.shape[axis] - 1 - last)
        weight = weight.narrow(axis, first, last - first + 1)
    (top, bottom), (left, right) = pads
    even = top == bottom and left == right
    out_chs, in_chs, *kernel = weight.shape
    padding = (top, left) if even else (0, 0)
    strided = nn.Conv2d(
        in_chs * conv.groups, out_chs, (kernel[0], kernel[1]), stride, padding, groups=conv.groups, device="meta"
    )
    strided = _with_weights(strided, weight, conv.bias)
    return strided if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), strided)


def _taps(weight: Tensor) -> Tensor:
    """Which taps of a kernel are not zero up to rounding, (kh, kw)."""
    largest = weight.abs().amax((0, 1))
    return largest > torch.finfo(weight.dtype).eps * largest.max()


def _with_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv.weight = nn.Parameter(weight.detach().clone())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return conv.eval()


def fold_batchnorm(net: nn.Module, example_input: Tensor | None = None) -> nn.Module:
    """A copy for inference, in which every BatchNorm right behind a convolution or pyramid is part of it.

    Args:
        net: The network.
        example_input: Images as it takes them, (N, C, H, W); needed for those with BatchNorm that are not timm's.

    Raises:
        ValueError: If the size of the images is unknown.
    """
    net = copy.deepcopy(net).eval()
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        for source, target in _convs_with_norm(net, image_size(net, example_input)):
            norm: Any = net.get_submodule(target)
            _fold(net.get_submodule(source), norm)
            net.set_submodule(target, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return net


@torch.no_grad()
def _convs_with_norm(net: nn.Module, size: tuple[int, int, int]) -> list[tuple[str, str]]:
    """The names of convolutions whose map goes to one BatchNorm and nowhere else, and of these.

    A copy of the network runs without numbers ("meta"); neither may be called twice.
    """
    meta = copy.deepcopy(net).to("meta").float().eval()
    given: dict[str, list[Tensor]] = {}  # to each norm
    made: dict[str, list[Tensor]] = {}  # by each convolution
    readers: Counter[int] = Counter()  # of each tensor: operators that read it

    def watch(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None:
            module.register_forward_pre_hook(lambda _, args: given.setdefault(name, []).append(args[0]))
        if type(module) in (nn.Conv2d, Conv2dSame, SPDConv2d) or isinstance(module, PyConv2d):
            module.register_forward_hook(lambda _, args, output: made.setdefault(name, []).append(output))

    for name, module in meta.named_modules():
        watch(name, module)
    read: dict[int, Tensor] = {}  # all that is read, kept so that no two tensors have the same id

    def ran(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        here = {id(leaf): leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        readers.update(here.keys())
        read.update(here)

    with Watch(ran):
        meta(torch.empty(1, *size, device="meta"))
    makers = {id(maps[0]): name for name, maps in made.items() if len(maps) == 1}
    once = {name: maps[0] for name, maps in given.items() if len(maps) == 1}
    return [(makers[id(x)], name) for name, x in once.items() if id(x) in makers and readers[id(x)] == 1]


def _fold(conv: nn.Module, norm: nn.BatchNorm2d) -> None:
    convs = [module for module in conv.modules() if isinstance(module, nn.Conv2d)]
    assert norm.running_mean is not None and norm.running_var is not None  # `fold_batchnorm` saw to it
    values = [norm.running_mean, norm.running_var, norm.weight.detach(), norm.bias.detach()]
    splits = [value.split([level.out_channels for level in convs]) for value in values]
    for level, mean, var, scale, shift in zip(convs, *splits, strict=True):
        level.weight, level.bias = fuse_conv_bn_weights(level.weight, level.bias, mean, var, norm.eps, scale, shift)
