"""Any convolutional network without strided or pooling downsampling, computing the same as before; and the way back.

`convert_to_spd` puts a space-to-depth layer of `spd_zoo.spd` in the place of every convolution and pooling with a
stride, with weights that give the same function (docs/convert.md). What it replaced, and what it could not, is in the
`spd_report` of the network that it returns. `spd_zoo.fold` is the way back, for deployment.

Space-to-depth: Sunkara and Luo, No More Strided Convolutions or Pooling, https://arxiv.org/abs/2208.03641. Weights that
keep the function: Chen, Goodfellow and Shlens, Net2Net, https://arxiv.org/abs/1511.05641.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import (
    AvgPool2dSame,
    BlurPool2d,
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    to_2tuple,
)
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models import build_model_with_cfg, get_model_input_config
from timm.models._input import update_model_args
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spd_zoo import complexity
from spd_zoo.models._registry import register_model
from spd_zoo.spd import PhaseMix, SPDAvgPool2d, SPDConv2d, SPDMaxPool2d, SPDStdConv2d, adapt_image_channels
from spd_zoo.watch import Watch, image_size
from spd_zoo.weights import WeightsError, save_network
from spd_zoo.weights.fit import misfit
from spd_zoo.weights.load import load_network

__all__ = [
    "ConversionError",
    "Left",
    "Replaced",
    "SPDReport",
    "convert_checkpoint",
    "convert_to_spd",
    "spd_converted",
]

TOLERANCE = 1e-4  # of the outputs' standard deviation, in fp32

_STD_CONVS = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_MAX_POOLS = (nn.MaxPool2d, MaxPool2dSame)
_AVG_POOLS = (nn.AvgPool2d, AvgPool2dSame)


class ConversionError(RuntimeError):
    """A converted network that does not compute what the original computes."""


@dataclass(frozen=True)
class Replaced:
    """A layer that was replaced; pairs are before and after. MACs are for one image of the report's `input_size`."""

    module: str
    old: str
    new: str
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True)
class Left:
    """Something that downsamples and was left as it is."""

    module: str
    what: str
    reason: str


@dataclass(frozen=True)
class SPDReport:
    """What `convert_to_spd` did to a network.

    Attributes:
        input_size: Image channels, height and width that MACs are counted for.
        replaced: Every layer that was replaced.
        left: Everything that still downsamples by a stride or a pooling, and why.
        params: Parameters of the whole network, before and after.
        macs: Multiply-accumulates of its convolutions and linear layers, before and after.
        difference: The largest difference between the outputs for `example_input`, in standard deviations of the
            original's; None if there was none.
    """

    input_size: tuple[int, int, int]
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    difference: float | None = None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("module", "was", "is", "parameters", "", "MACs", "")]
        for layer in (*self.replaced, Replaced("whole network", "", "", self.params, self.macs)):
            counts = (f"{number:,}" for number in (*layer.params, *layer.macs))
            rows.append((layer.module, layer.old, layer.new, *counts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            words = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
            numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
            arrow = "->" if row[4] else "  "
            pairs = [f"{before} {arrow} {after}" for before, after in (numbers[:2], numbers[2:])]
            lines.append("  ".join([*words, *pairs]).rstrip())
        lines += [f"left: {left.module or 'the network itself'}, {left.what}: {left.reason}" for left in self.left]
        if self.difference is not None:
            lines.append(f"largest difference of the outputs: {self.difference:.1e} of their standard deviation")
        return "\n".join(lines)


def convert_to_spd(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    inplace: bool = False,
    example_input: Tensor | None = None,
) -> nn.Module:
    """The same network with space-to-depth layers in place of strides and poolings; not one prediction changes.

    Replaced are convolutions of any kernel, padding (also TensorFlow's "same"), dilation, groups and bias, weight
    standardised ones too; max-pooling, average pooling and timm's BlurPool2d; at any stride that is the same for rows
    and columns. The new layers read every pixel in front of them: `spd_zoo.spd` says how. Downsampling that is no
    module of its own (a function called in some `forward`, a slice with a step) stays, and is in the report.

    A network of timm's remembers in its config what was done: `spd_zoo.weights.save_network` writes it, and
    `timm.create_model("local-dir:...")` makes the converted network again.

    Args:
        model: The network; the layers' hooks go on to their successors.
        include: Patterns of module names, as `layer4.*`; None: all.
        exclude: Patterns of module names that stay as they are.
        inplace: Change `model` itself, and return it, instead of a copy.
        example_input: Images as the network takes them, (N, C, H, W), with which to compare the outputs before and
            after, in fp32. Networks that are not timm's need them, because no `pretrained_cfg` says their size.

    Returns:
        The network, with an `SPDReport` in its attribute `spd_report`.

    Raises:
        ValueError: If the size of the images is unknown, or a pattern in `include` names nothing that downsamples.
        ConversionError: If the outputs for `example_input` differ by more than 1e-4 of their standard deviation;
            `model` then is as it was.
    """
    size = image_size(model, example_input)
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    net = model if inplace else copy.deepcopy(model)
    expected = None if example_input is None else _outputs(net, example_input)
    before = _look(net, size)
    numbers = (tensor for tensor in (*net.parameters(), *net.buffers()) if tensor.is_floating_point())
    like = next(numbers, torch.empty(0) if example_input is None else example_input)
    reasons: dict[str, str] = {}
    new: dict[str, nn.Module] = {}
    candidates = {name: module for name, module in net.named_modules() if _downsamples(module)}
    for pattern in include or ():
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(
                f"include={pattern!r} names nothing that downsamples; there are: {', '.join(candidates) or 'none'}"
            )
    for name, module in candidates.items():
        wanted = include is None or any(fnmatchcase(name, pattern) for pattern in include)
        if not wanted or any(fnmatchcase(name, pattern) for pattern in exclude):
            reasons[name] = "left out by include or exclude"
        elif name not in before.channels:
            reasons[name] = "not called in evaluation, so nothing could be compared"
        elif len(before.channels[name]) > 1:
            reasons[name] = "called with maps of different numbers of channels"
        else:
            (chs,) = before.channels[name]
            made = _successor(module, chs, like)
            if isinstance(made, str):
                reasons[name] = made
            else:
                new[name] = made
    old = {name: candidates[name] for name in new}
    converted = _exchange(net, old, new)
    after = _look(converted, size)
    replaced = [
        Replaced(
            name,
            _describe(old[name]),
            _describe(new[name]),
            (_numel(old[name]), _numel(new[name])),
            (before.macs_in(name), after.macs_in(name)),
        )
        for name in new
    ]
    idle = [Left(name, _describe(candidates[name]), why) for name, why in reasons.items() if name not in after.channels]
    busy = [
        Left(name, _describe(candidates[name]), reasons[name]) if name in reasons else Left(name, what, why)
        for name, what, why in after.downsampling
    ]
    report = SPDReport(
        size,
        tuple(replaced),
        tuple(dict.fromkeys([*busy, *idle])),
        (before.params, after.params),
        (before.macs, after.macs),
    )
    if example_input is not None:
        assert expected is not None
        difference = _difference(_outputs(converted, example_input), expected)
        if not difference <= TOLERANCE:
            _exchange(converted, new, old)
            raise ConversionError(
                f"the converted network differs by {difference:.1e} of the outputs' standard deviation; find the layer "
                f"by converting a part at a time, with include=..., and leave it out with exclude=...\n{report}"
            )
        report = replace(report, difference=difference)
    anything: Any = converted
    anything.spd_report = report
    _remember(converted, list(new))
    return converted


# Looking at a network


@dataclass
class _Look:
    """What a network does with an image.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of convolutions and linear layers.
        channels: For each module that was called, the numbers of channels of the maps that it was given.
        conv_macs: Multiply-accumulates of the convolutions that ran right in a module.
        downsampling: Module, operator and reason of everything that downsampled outside of our layers.
    """

    params: int
    macs: int
    channels: dict[str, set[int]]
    conv_macs: Counter[str]
    downsampling: list[tuple[str, str, str]]

    def macs_in(self, name: str) -> int:
        """Multiply-accumulates of the convolutions in a module."""
        return sum(macs for key, macs in self.conv_macs.items() if key == name or key.startswith(f"{name}."))


def _look(net: nn.Module, size: tuple[int, int, int]) -> _Look:
    """Runs a copy of the network without numbers ("meta"), in evaluation."""
    meta = copy.deepcopy(net).to("meta").float()
    look = _Look(_numel(meta), 0, {}, Counter(), [])
    running: list[str] = [""]
    rows: list[Tensor] = []  # of every second row, the last slice

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            running.append(name)
            if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
                look.channels.setdefault(name, set()).add(args[0].shape[1])

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    for name, module in meta.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)

    def ran(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        module = running[-1]
        if name == "convolution":
            look.conv_macs[module] += output.shape[2:].numel() * args[1].numel()
        if name == "slice" and output.ndim == 4 and len(args) > 4 and args[4] > 1:
            if args[1] % 4 == 2:
                rows[:] = [output]
            stepped = args[1] % 4 == 3 and len(rows) == 1 and args[0] is rows[0]
        else:
            stepped = _shrinks(name, args, output)
        owner = meta.get_submodule(module)
        if not stepped or isinstance(owner, SPDConv2d | PhaseMix):
            return
        why = f"called in the forward of {type(owner).__name__}, not a layer of its own"
        if type(owner).__module__.startswith("torch.nn."):
            why = f"there is nothing to put in the place of {type(owner).__name__}"
        look.downsampling.append((module, name.lstrip("_").removesuffix("_with_indices"), why))

    with Watch(ran):
        look.macs = complexity.macs(complexity.trace(meta, size))
    return look


def _shrinks(name: str, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether an operator downsamples: by a stride, or to a number of pixels that is smaller.

    Pooling of the whole map to one pixel is a classifier's or an attention's, and no downsampling.
    """
    if name == "convolution":
        return max(args[3]) > 1 and not args[6]  # args[6]: transposed
    if name.startswith(("max_pool2d", "avg_pool2d")):
        stride = args[2] if len(args) > 2 and args[2] else args[1]
        return max(stride) > 1 and output.shape[2:].numel() > 1
    if name == "im2col":
        return max(args[4]) > 1
    if name.startswith(("_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_")):
        return 1 < output.shape[2:].numel() < args[0].shape[2:].numel()
    return False


def _downsamples(module: nn.Module) -> bool:
    """Whether a module is a convolution or pooling with a stride, and none of ours."""
    if isinstance(module, SPDConv2d | PhaseMix):
        return False
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)
    return isinstance(module, kinds) and max(to_2tuple(module.stride)) > 1


@torch.no_grad()
def _outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    """All tensors that the network gives in evaluation."""
    training = [module for module in net.modules() if module.training]
    outputs: list[Tensor] = [leaf.clone() for leaf in tree_leaves(net.eval()(images)) if isinstance(leaf, Tensor)]
    for module in training:
        module.training = True
    return outputs


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference in standard deviations of what was expected; infinite where shapes differ."""
    if [a.shape for a in actual] != [b.shape for b in expected]:
        return float("inf")
    largest = [float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)]
    return max(value and value / float(b.std(correction=0)) for value, b in zip(largest, expected, strict=True))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe(module: nn.Module) -> str:
    """Kind, kernel and stride of a layer, as `Conv2d 7x7/2`; of ours, the kernel behind space-to-depth."""
    stride = f"/{max(to_2tuple(module.stride))}"
    kernel: Any = module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size
    if isinstance(module, SPDConv2d):
        kernel, stride = module.weight.shape[2:], ""
    elif isinstance(module, SPDMaxPool2d):
        stride = ""
    return f"{type(module).__name__} {'x'.join(map(str, to_2tuple(kernel)))}{stride}"


# Replacing its layers


def _exchange(net: nn.Module, old: dict[str, nn.Module], new: dict[str, nn.Module]) -> nn.Module:
    """The network with other modules in the place of some, under all their names."""
    successors = {id(module): new[name] for name, module in old.items()}
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if id(module) in successors:
            successor = successors[id(module)]
            successor.train(module.training)
            successor._forward_hooks, successor._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
            if not name:
                return successor
            net.set_submodule(name, successor)
    return net


@torch.no_grad()
def _successor(module: Any, chs: int, like: Tensor) -> nn.Module | str:
    """Our layer that computes what a convolution or pooling with a stride does, or why there is none.

    Args:
        module: The convolution or pooling.
        chs: Channels of the map that it is given.
        like: A tensor whose device and type a new parameter has where `module` has none.
    """
    strides = to_2tuple(module.stride)
    if strides[0] != strides[1]:
        return f"its stride differs between rows and columns: {strides}"
    if isinstance(module, nn.Conv2d):
        return _conv_successor(module, strides[0])
    if isinstance(module, BlurPool2d):
        return _blur_successor(module, chs, like)
    made: nn.Module
    kwargs: dict[str, Any] = {"stride": strides[0], "ceil_mode": module.ceil_mode}
    kwargs |= {"device": like.device, "dtype": like.dtype}
    same = isinstance(module, MaxPool2dSame | AvgPool2dSame)
    kwargs["padding"] = "same" if same else module.padding
    if same and module.ceil_mode:
        return "ceil_mode together with TensorFlow's padding"
    if type(module) in _MAX_POOLS:
        if module.return_indices:
            return "it returns indices"
        made = SPDMaxPool2d(chs, module.kernel_size, dilation=module.dilation, **kwargs)
    elif type(module) in _AVG_POOLS:
        if module.divisor_override is not None:
            return "it has a divisor_override"
        made = SPDAvgPool2d(chs, module.kernel_size, count_include_pad=module.count_include_pad, **kwargs)
    else:
        return f"a pooling of a kind of its own, {type(module).__name__}"
    return made


def _conv_successor(conv: nn.Conv2d, stride: int) -> nn.Module | str:
    same = isinstance(conv, Conv2dSame) or bool(getattr(conv, "same_pad", False))
    args: dict[str, Any] = {
        "in_chs": conv.in_channels,
        "out_chs": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "stride": stride,
        "padding": "same" if same else 0 if conv.padding == "valid" else conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }
    made: SPDConv2d
    if type(conv) in _STD_CONVS:
        scale = getattr(conv, "scale", None)
        made = SPDStdConv2d(**args, eps=cast("float", conv.eps), scale=cast("float | None", scale))
        if made.gain is not None:
            gain = cast("nn.Parameter", conv.gain)
            made.gain.copy_(gain).requires_grad_(gain.requires_grad)
    elif type(conv) in (nn.Conv2d, Conv2dSame):
        made = SPDConv2d(**args)
    else:
        return f"a convolution of a kind of its own, {type(conv).__name__}"
    made.weight.copy_(made.from_strided(conv.weight)).requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None and made.bias is not None:
        made.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
    return made


def _blur_successor(blur: BlurPool2d, chs: int, like: Tensor) -> nn.Module | str:
    padding: set[Any] = set(blur.padding)
    if len(padding) > 1:
        return f"its padding differs between the sides: {blur.padding}"
    made = SPDConv2d(
        chs,
        chs,
        blur.filt_size,
        groups=chs,
        stride=blur.stride,
        padding=int(padding.pop()),
        padding_mode="zeros" if blur.pad_mode == "constant" else blur.pad_mode,
        device=like.device,
        dtype=like.dtype,
    )
    made.weight.copy_(made.from_strided(cast("Tensor", blur.filt).to(like).expand_as(made.new_strided_weight())))
    return made


# Saving and loading


def _remember(net: Any, names: list[str]) -> None:
    """Says in the config of a classifier of timm's from which network it was made, and what was replaced."""
    cfg: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    if not names or not cfg.get("architecture") or not hasattr(net, "num_classes"):
        return
    args: dict[str, Any] = getattr(net, "_model_args", {})
    base = args["base"] if cfg["architecture"] == spd_converted.__name__ else cfg["architecture"]
    update_model_args(net, base=base, include=[*args.get("include", ()), *names])
    net.pretrained_cfg = net.default_cfg = cfg | {"architecture": spd_converted.__name__}


@register_model
def spd_converted(
    pretrained: bool = False,
    base: str = "",
    include: Sequence[str] = (),
    pretrained_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A converted network, as its saved config describes it: what `timm.create_model("local-dir:...")` calls.

    Args:
        pretrained: Load the weights beside the config.
        base: The network that was converted.
        include: The modules that were replaced.
        pretrained_cfg: The saved config.

    Raises:
        ValueError: Without a saved config.
        WeightsError: If the weights are not those of the network that the config describes.
    """
    if not base or not pretrained_cfg:
        raise ValueError(
            "spd_converted is made from a saved network alone: give timm.create_model the folder, local-dir:FOLDER, "
            "or convert a network with spd_zoo.convert_to_spd"
        )
    own = {key: kwargs[key] for key in ("network", "steps") if key in kwargs}  # where base is resolution_kept
    like: Any = timm.create_model(base, device="meta", **own)
    first_convs: Any = like.pretrained_cfg.get("first_conv")
    names = [first_convs] if isinstance(first_convs, str) else list(first_convs or ())

    def create(**kwargs: Any) -> nn.Module:
        net: Any = convert_to_spd(timm.create_model(base, **kwargs), include=include, inplace=True)
        if any(isinstance(net.get_submodule(name), SPDConv2d) for name in names):
            net._traits["first_conv"] = None  # `fitting` adapts the image channels, timm must not
        return cast("nn.Module", net)

    def fitting(state_dict: dict[str, Tensor], net: Any) -> dict[str, Tensor]:
        for name in names:
            conv, weight = net.get_submodule(name), state_dict.get(f"{name}.weight")
            if isinstance(conv, SPDConv2d) and weight is not None:
                state_dict[f"{name}.weight"] = adapt_image_channels(weight, conv.in_channels, conv.cell)
        cfg = net.pretrained_cfg
        same_classes = net.num_classes == cfg["num_classes"] and not kwargs.get("features_only", False)
        problem = misfit(state_dict, net, with_classifier=same_classes)
        if problem:
            raise WeightsError(
                f"{cfg.get('file') or 'the checkpoint'} does not fit the converted {base}: {problem}. What to do: "
                "convert the network again, and save it with the arguments that it was created with"
            )
        return state_dict

    feature_cfg: dict[str, Any] = {}
    if kwargs.get("features_only"):
        feature_cfg["out_indices"] = tuple(range(len(like.feature_info)))
        feature_cfg["feature_cls"] = "getter" if hasattr(like, "forward_intermediates") else "fx"
    net: Any = build_model_with_cfg(
        create,
        spd_converted.__name__,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_filter_fn=fitting,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    net._traits["first_conv"] = net.pretrained_cfg["first_conv"] = first_convs
    return cast("nn.Module", net)


def convert_checkpoint(
    name: str, out: Path, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> SPDReport:
    """Converts a pretrained network, compares the outputs for noise, and saves it.

    Args:
        name: A network with pretrained weights, with or without a tag; `hf-hub:...`, `local-dir:...`; a run's folder.
        out: The new folder, which `timm.create_model("local-dir:OUT")` loads.
        include: As in `convert_to_spd`.
        exclude: As in `convert_to_spd`.

    Raises:
        ModelError: If there is no such network, or it cannot be loaded.
        WeightsError: If its weights cannot be had or must not be used.
        ValueError: If `out` exists, or a pattern in `include` names nothing that downsamples.
        ConversionError: If the outputs differ.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; give a new folder")
    net = load_network(name, "cpu")
    size = get_model_input_config(net)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    converted = convert_to_spd(net, include=include, exclude=exclude, inplace=True, example_input=images)
    report: Any = converted.spd_report
    if not report.replaced:
        raise ValueError(f"{name} has nothing to convert")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        save_network(converted, f"{folder}/{out.name}")
        Path(folder, out.name).rename(out)
    return cast("SPDReport", report)
