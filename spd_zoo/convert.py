"""Removes strided and pooling downsampling from any convolutional network without changing what it computes.

`convert_to_spd` replaces every convolution and pooling with a stride by a space-to-depth layer of `spd_zoo.spd` whose
weights give the same function (docs/convert.md). The `spd_report` of the returned network lists what was replaced and
what was not. `spd_zoo.fold` turns space-to-depth back into strides, for deployment.

Space-to-depth: Sunkara and Luo, No More Strided Convolutions or Pooling, https://arxiv.org/abs/2208.03641. Weights that
keep the function: Chen, Goodfellow and Shlens, Net2Net, https://arxiv.org/abs/1511.05641.
"""

import html
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

from spd_zoo import complexity
from spd_zoo.files import whole
from spd_zoo.models._registry import all_maps, register_unlisted_model
from spd_zoo.rewrite import (
    ConversionError,
    Unchanged,
    check_same,
    expected_outputs,
    move_hooks,
    replace_modules,
    tensors_in,
    what_is_attached,
    with_shared_parameters,
)
from spd_zoo.spd import MaxPool2d, PhaseMix, SPDAvgPool2d, SPDConv2d, SPDMaxPool2d, SPDStdConv2d, adapt_image_channels
from spd_zoo.trace import OperatorMode, copy_network, image_size, meta_copy
from spd_zoo.weights import save_network
from spd_zoo.weights.fit import check_fit, filter_of, fit_image_channels, own_networks
from spd_zoo.weights.load import load_network

__all__ = [
    "ConversionError",
    "Replaced",
    "SPDReport",
    "Unchanged",
    "convert_checkpoint",
    "convert_to_spd",
    "spd_converted",
]

_STD_CONVS = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_MAX_POOLS = (nn.MaxPool2d, MaxPool2d, MaxPool2dSame)
_AVG_POOLS = (nn.AvgPool2d, AvgPool2dSame)


@dataclass(frozen=True)
class Replaced:
    """A layer that was replaced.

    Attributes:
        module: Its name.
        old: Its class, kernel and stride.
        new: The class and kernel of its replacement.
        params: Its parameters, before and after.
        macs: Its multiply-accumulates for one image of the report's `input_size`, before and after.
    """

    module: str
    old: str
    new: str
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True)
class SPDReport:
    """What `convert_to_spd` did to a network.

    Attributes:
        input_size: Image channels, height and width that MACs are counted for.
        replaced: Every layer that was replaced.
        unchanged: Everything that still downsamples by a stride or pooling, and why.
        params: Parameters of the whole network, before and after.
        macs: Multiply-accumulates of its convolutions and linear layers, before and after.
        difference: The largest difference between the outputs for `example_input`, in standard deviations of the
            original output; None without `example_input`.
    """

    input_size: tuple[int, int, int]
    replaced: tuple[Replaced, ...]
    unchanged: tuple[Unchanged, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    difference: float | None = None

    def __repr__(self) -> str:
        (params, new_params), (macs, new_macs) = self.params, self.macs
        costs = f"parameters {params:,} -> {new_params:,}, MACs {macs:,} -> {new_macs:,}"
        return f"SPDReport({len(self.replaced)} layers replaced, {len(self.unchanged)} unchanged, {costs})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

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
        lines += map(str, self.unchanged)
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
    """Replaces strides and pooling in a network by space-to-depth layers, without changing its predictions.

    It replaces convolutions of any kernel, padding (also TensorFlow's "same"), dilation, groups and bias, also with
    weight standardisation; max-pooling, average pooling and timm's BlurPool2d; at any stride that is the same for rows
    and columns. The new layers read every pixel of their input (see `spd_zoo.spd`). Downsampling that is not a module
    (a function called in a `forward`, a slice with a step) is left unchanged, and the report lists it.

    What the network calls, and with how many channels, is found by running it once, at the size of `example_input` or
    of its `pretrained_cfg`. If its code takes another way at another size, layers that only run there are left
    unchanged.

    The config of a timm network records the conversion: `spd_zoo.weights.save_network` writes it, and
    `timm.create_model("local-dir:...")` creates the converted network again.

    Args:
        model: The network; hooks of replaced layers move to the new layers. If all its parameters are frozen, those of
            the new layers are frozen, too.
        include: Patterns of module names, such as `layer4.*`; None: all.
        exclude: Patterns of module names to leave unchanged.
        inplace: Change and return `model` itself instead of a copy.
        example_input: Preprocessed images, (N, C, H, W), for which the outputs before and after are compared in fp32.
            Required for networks that are not timm's, whose image size is unknown without a `pretrained_cfg`.

    Returns:
        The network, with an `SPDReport` in its attribute `spd_report`.

    Raises:
        ValueError: If the size of the images is unknown, the network cannot compute `example_input`, or a pattern in
            `include` or `exclude` names nothing that downsamples.
        ConversionError: If the outputs for `example_input` differ by more than 1e-4 of their standard deviation;
            `model` is then unchanged.
    """
    size = image_size(model, example_input)
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    patterns = [("include", pattern) for pattern in include or ()] + [("exclude", pattern) for pattern in exclude]
    expected = None if example_input is None else expected_outputs(model, example_input)
    net = model if inplace else copy_network(model)
    before = _trace(net, size)
    candidates = {name: module for name, module in net.named_modules() if _downsamples(module)}
    for option, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(
                f"{option}={pattern!r} names nothing that downsamples; there are: {', '.join(candidates) or 'none'}"
            )
    trained = [parameter.requires_grad for parameter in net.parameters()]
    frozen = bool(trained) and not any(trained)
    numbers = (tensor for tensor in (*net.parameters(), *net.buffers()) if tensor.is_floating_point())
    like = next(numbers, torch.empty(0) if example_input is None else example_input)
    shared = with_shared_parameters(net)
    reasons: dict[str, str] = {}
    replacements: dict[str, nn.Module] = {}
    for name, module in candidates.items():
        included = include is None or any(fnmatchcase(name, pattern) for pattern in include)
        new_layer: nn.Module | str
        if not included or any(fnmatchcase(name, pattern) for pattern in exclude):
            new_layer = "left out by include or exclude"
        elif obstacle := _obstacle(name, module, before, shared):
            new_layer = obstacle
        else:
            new_layer = _replacement(module, next(iter(before.channels[name])), like)
        if isinstance(new_layer, str):
            reasons[name] = new_layer
        else:
            replacements[name] = new_layer.requires_grad_(False) if frozen else new_layer
    converted = net
    try:
        converted = _replace(net, {candidates[name]: new for name, new in replacements.items()})
        after = _trace(converted, size)
        uncalled = [name for name in replacements if name not in after.channels]
        if uncalled:
            converted = _replace(converted, {replacements.pop(name): candidates[name] for name in uncalled})
            reasons |= dict.fromkeys(uncalled, "called through another reference than its name")
            after = _trace(converted, size)
        report = _report(size, before, after, candidates, replacements, reasons)
        if example_input is not None:
            assert expected is not None
            advice = (
                "find the layer by converting a few modules at a time with include=..., "
                f"and leave it out with exclude=...\n{report}"
            )
            report = replace(report, difference=check_same(converted, example_input, expected, advice))
        _remember(converted, list(replacements))
    except BaseException:
        _replace(converted, {new: candidates[name] for name, new in replacements.items()})
        raise
    untyped: Any = converted
    untyped.spd_report = report
    return converted


def _report(
    size: tuple[int, int, int],
    before: "_Trace",
    after: "_Trace",
    old: dict[str, nn.Module],
    new: dict[str, nn.Module],
    reasons: dict[str, str],
) -> SPDReport:
    """Describes the replaced layers, and those that still downsample."""
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
    stay = {name: Unchanged(name, _describe(old[name]), reason) for name, reason in reasons.items()}
    called = [stay.get(operator.module, operator) for operator in after.downsampling]
    idle = [layer for name, layer in stay.items() if name not in after.channels]
    return SPDReport(
        size,
        tuple(replaced),
        tuple(dict.fromkeys([*called, *idle])),
        (before.params, after.params),
        (before.macs, after.macs),
    )


# Tracing a network


@dataclass
class _Trace:
    """Operations of a network on an image.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of convolutions and linear layers.
        channels: For each module that was called, the numbers of channels of its input maps.
        conv_macs: Multiply-accumulates of the convolutions that a module runs itself, not in a submodule.
        downsampling: Every operator that downsampled, except in space-to-depth layers.
        parameters_read_elsewhere: Modules whose parameters an operator outside of them reads.
    """

    params: int
    macs: int
    channels: dict[str, set[int]]
    conv_macs: Counter[str]
    downsampling: list[Unchanged]
    parameters_read_elsewhere: set[str]

    def macs_in(self, name: str) -> int:
        """Multiply-accumulates of the convolutions in a module."""
        return sum(macs for key, macs in self.conv_macs.items() if key == name or key.startswith(f"{name}."))


def _trace(net: nn.Module, size: tuple[int, int, int]) -> _Trace:
    """Runs a copy of the network on the "meta" device, in evaluation."""
    meta = meta_copy(net)
    trace = _Trace(_numel(meta), 0, {}, Counter(), [], set())
    running: list[str] = [""]
    stepped: dict[int, Tensor] = {}  # axis -> the last output of a slice with a step along it

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(name)
            maps = [tensor for tensor in tensors_in([args, kwargs]) if tensor.ndim == 4]
            if maps:
                trace.channels.setdefault(name, set()).add(maps[0].shape[1])

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    owners: dict[int, str] = {}  # id of a parameter -> module
    for name, module in meta.named_modules():
        owners |= {id(parameter): name for parameter in module.parameters(recurse=False)}
        module.register_forward_pre_hook(enter(name), with_kwargs=True)
        module.register_forward_hook(leave)

    def on_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        module = running[-1]
        owners_read = {owners.get(id(tensor), module) for tensor in tensors_in([args, kwargs])}
        trace.parameters_read_elsewhere |= owners_read - {module}
        output = result[0] if isinstance(result, (tuple, list)) else result
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        if name == "convolution":
            trace.conv_macs[module] += output.shape[2:].numel() * args[1].numel()
        if name == "slice":
            downsamples = output.ndim == 4 and len(args) > 4 and args[4] > 1 and args[1] % 4 > 1
            if downsamples:
                axis = args[1] % 4
                stepped[axis] = output
                downsamples = stepped.get(5 - axis) is args[0]  # a rotary embedding slices one axis only
        else:
            downsamples = _downsamples_by(name, args, output)
        owner = meta.get_submodule(module)
        if not downsamples or isinstance(owner, SPDConv2d | PhaseMix):
            return
        why = f"called in the forward of {type(owner).__name__}, not a layer of its own"
        if type(owner).__module__.startswith("torch.nn."):
            why = f"there is no replacement for {type(owner).__name__}"
        operator = name.lstrip("_").removesuffix("_with_indices")
        trace.downsampling.append(Unchanged(module, operator, why))

    with OperatorMode(on_operator):
        trace.macs = complexity.macs(complexity.trace(meta, size))
    return trace


# Operators that resample a map; whether they downsample depends on the sizes.
_RESAMPLING = (
    *("adaptive_avg_pool2d", "adaptive_max_pool2d", "fractional_max_pool2d", "upsample_", "grid_sampler"),
    *("index_select", "gather", "take_along_dim", "roi_align"),
)


def _downsamples_by(name: str, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether an operator downsamples: by a stride, or to a smaller number of pixels.

    Pooling of the whole map to one pixel, as in a classifier or in attention, does not count as downsampling.
    """
    name, x = name.lstrip("_"), args[0]
    if name == "convolution":
        return max(args[3]) > 1 and not args[6]  # args[6]: transposed
    if name.startswith(("max_pool2d", "avg_pool2d")):
        stride = args[2] if len(args) > 2 and args[2] else args[1]
        return max(stride) > 1 and output.shape[2:].numel() > 1
    if name == "im2col":
        return max(args[4]) > 1
    if name in ("mean", "sum", "amax", "max", "amin", "min") and x.ndim == 6 and output.ndim in (4, 6):
        axes = args[1] if len(args) > 1 else ()  # of a map divided into cells, (N, C, H, cell, W, cell)
        axes = [axes] if isinstance(axes, int) else axes
        return {axis % 6 for axis in axes} == {3, 5} and x.shape[2] * x.shape[4] > 1
    if name == "index":
        if x.ndim != 4 or not any(index is not None for index in args[1][2:]):
            return False
    elif not name.startswith(_RESAMPLING):
        return False
    return output.ndim == 4 and 1 < output.shape[2:].numel() < x.shape[2:].numel()


def _downsamples(module: nn.Module) -> bool:
    """Whether a module is a convolution or pooling with a stride, and not a space-to-depth layer."""
    if isinstance(module, SPDConv2d | PhaseMix):
        return False
    layers = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)
    return isinstance(module, layers) and max(to_2tuple(module.stride)) > 1


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe(module: nn.Module) -> str:
    """Class, kernel and stride of a layer, as `Conv2d 7x7/2`; for space-to-depth layers, the kernel after it."""
    stride = f"/{max(to_2tuple(module.stride))}"
    kernel: Any = module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size
    if isinstance(module, SPDConv2d):
        kernel, stride = module.weight.shape[2:], ""
    elif isinstance(module, SPDMaxPool2d):
        stride = ""
    return f"{type(module).__name__} {'x'.join(map(str, to_2tuple(kernel)))}{stride}"


# Replacing layers


def _replace(net: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """The network with some modules replaced; their hooks and modes move to the new modules."""
    for old, new in replacements.items():
        new.train(old.training)
        move_hooks(old, new)
    return replace_modules(net, replacements)


def _obstacle(name: str, module: nn.Module, trace: _Trace, shared: set[nn.Module]) -> str | None:
    """Why a layer cannot be replaced, whatever its class; `shared` are the modules that share a parameter."""
    channels = trace.channels.get(name, set())
    if not channels:
        return "not called in evaluation, so nothing could be compared"
    if len(channels) > 1:
        return "called with maps that differ in their number of channels"
    if attached := what_is_attached(module):
        return attached
    if module in shared:
        return "it shares a parameter with another module"
    if name in trace.parameters_read_elsewhere:
        return "its parameters are also read outside of it"
    return None


@torch.no_grad()
def _replacement(module: Any, chs: int, like: Tensor) -> nn.Module | str:
    """The space-to-depth layer with the same output as a strided convolution or pooling, or why there is none.

    Args:
        module: The convolution or pooling.
        chs: Channels of its input.
        like: A tensor with the device and type for new parameters, used if `module` has none.
    """
    strides = to_2tuple(module.stride)
    if strides[0] != strides[1]:
        return f"its stride differs between rows and columns: {strides}"
    if isinstance(module, nn.Conv2d):
        return _conv_replacement(module, strides[0])
    if isinstance(module, BlurPool2d):
        if type(module) is not BlurPool2d:
            return f"a blur of an unknown class, {type(module).__name__}"
        return _blur_replacement(module, chs, like)
    new_layer: nn.Module
    kwargs: dict[str, Any] = {"stride": strides[0], "ceil_mode": module.ceil_mode}
    kwargs |= {"device": like.device, "dtype": like.dtype}
    same = isinstance(module, MaxPool2dSame | AvgPool2dSame)
    kwargs["padding"] = "same" if same else module.padding
    if same and module.ceil_mode:
        return "ceil_mode together with TensorFlow's padding"
    if type(module) in _MAX_POOLS:
        if module.return_indices:
            return "it returns indices"
        new_layer = SPDMaxPool2d(chs, module.kernel_size, dilation=module.dilation, **kwargs)
    elif type(module) in _AVG_POOLS:
        if module.divisor_override is not None:
            return "it has a divisor_override"
        new_layer = SPDAvgPool2d(chs, module.kernel_size, count_include_pad=module.count_include_pad, **kwargs)
    else:
        return f"a pooling of an unknown class, {type(module).__name__}"
    return new_layer


def _conv_replacement(conv: nn.Conv2d, stride: int) -> nn.Module | str:
    same = isinstance(conv, Conv2dSame) or bool(getattr(conv, "same_pad", False))
    args: dict[str, Any] = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
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
    new_layer: SPDConv2d
    if type(conv) in _STD_CONVS:
        scale = getattr(conv, "scale", None)
        new_layer = SPDStdConv2d(**args, eps=cast("float", conv.eps), scale=cast("float | None", scale))
        if new_layer.gain is not None:
            gain = cast("nn.Parameter", conv.gain)
            new_layer.gain.copy_(gain).requires_grad_(gain.requires_grad)
    elif type(conv) in (nn.Conv2d, Conv2dSame):
        new_layer = SPDConv2d(**args)
    else:
        return f"a convolution of an unknown class, {type(conv).__name__}"
    new_layer.weight.copy_(new_layer.from_strided(conv.weight)).requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None and new_layer.bias is not None:
        new_layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
    return new_layer


def _blur_replacement(blur: BlurPool2d, chs: int, like: Tensor) -> nn.Module | str:
    padding: set[Any] = set(blur.padding)
    if len(padding) > 1:
        return f"its padding differs between the sides: {blur.padding}"
    new_layer = SPDConv2d(
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
    new_layer.weight.copy_(
        new_layer.from_strided(cast("Tensor", blur.filt).to(like).expand_as(new_layer.new_strided_weight()))
    )
    return new_layer


# Saving and loading


def _remember(net: Any, names: list[str]) -> None:
    """Records in the config of a timm network its original and the modules that were replaced."""
    cfg: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    if not names or not cfg.get("architecture") or not hasattr(net, "num_classes"):
        return
    args: dict[str, Any] = getattr(net, "_model_args", {})
    base = args["base"] if cfg["architecture"] == spd_converted.__name__ else cfg["architecture"]
    update_model_args(net, base=base, include=[*args.get("include", ()), *names])
    net.pretrained_cfg = net.default_cfg = cfg | {"architecture": spd_converted.__name__}


@register_unlisted_model
def spd_converted(
    pretrained: bool = False,
    base: str = "",
    include: Sequence[str] = (),
    pretrained_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A converted network, as its saved config describes it; `timm.create_model("local-dir:...")` calls this function.

    Args:
        pretrained: Load the weights in the config's folder.
        base: The network that was converted.
        include: The modules that were replaced.
        pretrained_cfg: The saved config.
        **kwargs: Arguments of the network that was converted.

    Returns:
        The network.

    Raises:
        ValueError: Without a saved config.
        WeightsError: If the weights are not those of the network that the config describes.
    """
    if not base or not pretrained_cfg:
        raise ValueError(
            "spd_converted needs a saved network: give timm.create_model the folder, local-dir:FOLDER, "
            "or convert a network with spd_zoo.convert_to_spd"
        )
    own = {key: kwargs[key] for key in ("network", "sizes", "steps") if key in kwargs}  # arguments of resolution_kept
    like: Any = timm.create_model(base, device="meta", **own)
    first_convs: Any = like.pretrained_cfg.get("first_conv")
    names = [first_convs] if isinstance(first_convs, str) else list(first_convs or ())

    def create(**kwargs: Any) -> nn.Module:
        net: Any = convert_to_spd(timm.create_model(base, **kwargs), include=include, inplace=True)
        if any(isinstance(net.get_submodule(name), SPDConv2d) for name in names):
            net._traits["first_conv"] = None  # `fitting` adapts the image channels; timm must not
        return cast("nn.Module", net)

    def fitting(state_dict: dict[str, Tensor], net: Any) -> dict[str, Tensor]:
        if own.get("network", base) in own_networks():  # it may adapt more than the first convolution
            state_dict = fit_image_channels(filter_of(net)(state_dict, net), net)
        for name in names:
            conv, weight = net.get_submodule(name), state_dict.get(f"{name}.weight")
            if isinstance(conv, SPDConv2d) and weight is not None:
                state_dict[f"{name}.weight"] = adapt_image_channels(weight, conv.in_channels, conv.cell)
        check_fit(state_dict, net, f"the converted {base}", kwargs.get("features_only", False))
        return state_dict

    net: Any = build_model_with_cfg(
        create,
        spd_converted.__name__,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_filter_fn=fitting,
        feature_cfg=all_maps(like) if kwargs.get("features_only") else {},
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

    Returns:
        The report of the conversion.

    Raises:
        ModelError: If there is no such network, or it cannot be loaded.
        WeightsError: If its weights are unavailable or must not be used.
        ValueError: If `out` exists, or a pattern in `include` or `exclude` names nothing that downsamples.
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
    with whole(out) as folder:
        save_network(converted, folder)
    return cast("SPDReport", report)
