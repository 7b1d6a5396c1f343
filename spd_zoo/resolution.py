"""A network for smaller images: its first downsamplings without their stride.

Small images are usually enlarged to the size that a network was pretrained at. `keep_resolution` instead takes the
stride away from the layer that first reads them: an image of half the size then gives maps of the size that the rest of
the network knows, at no training and a fraction of the cost. As for every change of resolution between training and
use, accuracy falls with what the first kernels were trained to see: Touvron et al., Fixing the train-test resolution
discrepancy, https://arxiv.org/abs/1906.06423.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame, to_2tuple
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import build_model_with_cfg
from timm.models._input import update_model_args
from torch import Tensor, nn

from spd_zoo.errors import first_line
from spd_zoo.models._detector import DetectionNet
from spd_zoo.models._registry import register_unlisted_model
from spd_zoo.spd import MaxPool2d, PhaseMix, SPDConv2d, SPDMaxPool2d
from spd_zoo.trace import OperatorMode, TraceError, copy_network, image_size, meta_copy, run_on_meta
from spd_zoo.weights.fit import filter_of

__all__ = ["keep_resolution"]

_LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)


@dataclass(frozen=True)
class _Downsampling:
    """An operator that made a map smaller: the module that it ran in, and the pixels before and after.

    In a layer of `_LAYERS` those before are the pixels that the layer was given, without its own padding.
    """

    module: str
    operator: str
    before: tuple[int, int]
    after: tuple[int, int]


def keep_resolution(
    model: nn.Module, steps: int = 1, *, inplace: bool = False, example_input: Tensor | None = None
) -> nn.Module:
    """The same network for images of half the size: its first downsampling has stride 1, all weights are as before.

    Every convolution and pooling that reads maps of the image's own size gets half its stride, with no dilation, and
    where it is needed other padding, so that an image of half the size gives maps of the size that the whole image
    gave. Call it before `convert_to_spd`. timm's `feature_info` and the `input_size` of its config follow, and
    `spd_zoo.weights.save_network` saves a network of timm's as what it has become.

    Args:
        model: The network, for example one of timm's.
        steps: How often to halve the size of the images: 2 also takes the stride of ResNet's max-pooling away.
        inplace: Change `model` itself, and return it, instead of a copy.
        example_input: Images as the network takes them now, (N, C, H, W). Networks that are not timm's need them,
            because no `pretrained_cfg` says their size.

    Raises:
        ValueError: If `steps` is not positive, the size of the images is unknown, something that is not a plain
            convolution or pooling downsamples first, or the network cannot run on the "meta" device; `model` then is
            as it was.
    """
    if steps < 1:
        raise ValueError(f"steps is how often to halve the images, at least 1, got {steps}")
    if isinstance(model, DetectionNet):
        raise ValueError(
            f"{type(model).__name__} places its boxes by the strides of its maps, which would change; give it enlarged "
            "images, or keep_resolution its backbone (features_only=True)"
        )
    if any(isinstance(module, SPDConv2d | SPDMaxPool2d | PhaseMix) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has space-to-depth layers; call keep_resolution first, and convert_to_spd after it"
        )
    size = image_size(model, example_input)
    trial = meta_copy(model)
    changed: dict[str, None] = {}  # an ordered set
    for _ in range(steps):
        changed |= dict.fromkeys(_step(trial, size))
        size = _half(size)
    net = model if inplace else copy_network(model)
    for name in changed:
        _apply(net, name, trial.get_submodule(name))
    _describe(net, steps)
    return net


def _half(size: tuple[int, int, int]) -> tuple[int, int, int]:
    return size[0], -(-size[1] // 2), -(-size[2] // 2)


def _step(net: nn.Module, size: tuple[int, int, int]) -> list[str]:
    """Halves the strides of what reads maps of the image's size; returns the names of these layers."""
    _, height, width = size
    half = _half(size)
    found, last = _run(net, size)
    first = {
        ran.module: ran
        for ran in found
        if all(round(math.log2(pixels / side)) == 0 for pixels, side in zip((height, width), ran.before, strict=True))
    }
    if not first:
        raise ValueError(
            f"no convolution and no pooling of {type(net).__name__} reads maps of the image's size and makes them "
            "smaller, so there is no stride to take away"
        )
    for name, ran in first.items():
        borders = [side - pixels for side, pixels in zip(ran.before, (height, width), strict=True)]
        layer = _halved(net.get_submodule(name), name, ran, (half[1] + borders[0], half[2] + borders[1]))
        net.set_submodule(name, layer)
    try:
        _, now = _run(net, half)
    except TraceError as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"{type(net).__name__} does not take images of {half[1]}x{half[2]} pixels without the stride of "
            f"{', '.join(first)}: {reason}"
        ) from error
    if now != last:
        raise ValueError(
            f"without the stride of {', '.join(first)}, images of {half[1]}x{half[2]} pixels give maps {now}, and not "
            f"{last} as those of {height}x{width}: the maps of {type(net).__name__} do not halve with the image"
        )
    return list(first)


def _run(net: nn.Module, size: tuple[int, int, int]) -> tuple[list[_Downsampling], list[list[int]]]:
    """What a network on "meta" makes smaller, in order, and the shapes of its last maps."""
    meta: Any = copy_network(net)
    if hasattr(meta, "forward_features"):
        meta.forward = meta.forward_features  # classifiers take maps of many sizes
    running = [("", False)]  # the modules that run, and whether each is a layer
    found: list[_Downsampling] = []

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: running.append((name, isinstance(module, _LAYERS)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name, is_layer = running.pop()
        if is_layer:  # as a whole: inside, it may also compute its weights, which are no maps
            compare(name, type(module).__name__, next(iter((*args, *kwargs.values()))), output)

    for name, module in meta.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave, with_kwargs=True)

    def ran(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name, is_layer = running[-1]
        if args and not is_layer:
            compare(name, operator, args[0], result)

    def compare(name: str, operator: str, source: Any, result: Any) -> None:
        output = result[0] if isinstance(result, tuple | list) and result else result
        if not all(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in (source, output)):
            return
        if output.shape[2:].numel() == 1:
            return
        before, after = (source.shape[2], source.shape[3]), (output.shape[2], output.shape[3])
        if max(old / new for old, new in zip(before, after, strict=True)) > 1.5:
            found.append(_Downsampling(name, operator, before, after))

    with OperatorMode(ran):
        output = run_on_meta(meta, size)
    outputs = output if isinstance(output, list | tuple) else [output]
    return found, [list(tensor.shape) for tensor in outputs]


def _halved(module: Any, name: str, ran: _Downsampling, smaller: tuple[int, int]) -> nn.Module:
    """The layer with half its stride, and the padding with which a map of `smaller` pixels gives what it gave."""
    if not isinstance(module, _LAYERS):
        raise ValueError(
            f"{ran.operator}, which downsamples first, is called in the forward of {type(module).__name__}"
            f"{f' ({name})' if name else ''}; only the stride of a convolution or pooling layer can be taken away"
        )
    strides = to_2tuple(module.stride)
    if strides[0] != strides[1] or strides[0] % 2:
        raise ValueError(f"{name} has stride {strides}, which cannot be halved")
    stride = strides[0] // 2
    kernel = to_2tuple(module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size)
    dilation = to_2tuple(getattr(module, "dilation", 1))
    reach = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel, strict=True)]
    pads = [(out - 1) * stride + taps - pixels for out, taps, pixels in zip(ran.after, reach, smaller, strict=True)]
    same = isinstance(module, Conv2dSame | MaxPool2dSame | AvgPool2dSame) or getattr(module, "same_pad", False)
    if isinstance(module, BlurPool2d):
        module.stride = stride
        module.padding = [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2]
        return module
    module.stride = (stride, stride) if isinstance(module.stride, tuple) else stride
    if same:
        return module
    if stride == 1 and pads == [taps - 1 for taps in reach] and any(pad % 2 for pad in pads):
        return _same(module, name)
    sides = (max(0, -(-pads[0] // 2)), max(0, -(-pads[1] // 2)))
    module.padding = sides
    if isinstance(module, nn.Conv2d):
        module._reversed_padding_repeated_twice = [sides[1], sides[1], sides[0], sides[0]]
    return module


def _same(module: Any, name: str) -> nn.Module:
    """The layer of an even kernel and stride 1 with a pixel more padding on one side, as TensorFlow has it."""
    if type(module) in (nn.MaxPool2d, MaxPool2d):
        return MaxPool2dSame(module.kernel_size, 1, dilation=module.dilation)
    if type(module) is nn.AvgPool2d:
        return AvgPool2dSame(module.kernel_size, 1, count_include_pad=module.count_include_pad)
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        raise ValueError(f"{name}, a {type(module).__name__}, has an even kernel, and with stride 1 no padding fits it")
    kernel, dilation = to_2tuple(module.kernel_size), to_2tuple(module.dilation)
    args = (module.in_channels, module.out_channels, kernel)
    return Conv2dSame(*args, dilation=dilation, groups=module.groups, bias=module.bias is not None, device="meta")


def _apply(net: nn.Module, name: str, planned: nn.Module) -> None:
    """Gives a layer the stride and padding of the planned one, or puts that in its place, with its weights."""
    layer = net.get_submodule(name)
    if type(layer) is type(planned):
        for attribute in ("stride", "padding", "_reversed_padding_repeated_twice"):
            if hasattr(planned, attribute):
                setattr(layer, attribute, getattr(planned, attribute))
        return
    for key, parameter in layer.named_parameters(recurse=False):
        setattr(planned, key, parameter)
    planned._forward_hooks, planned._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
    net.set_submodule(name, planned.train(layer.training))


def _describe(net: Any, steps: int) -> None:
    """Says in timm's description of the network what it has become."""
    infos = getattr(net, "feature_info", None)
    for info in getattr(infos, "info", infos) or ():
        info["reduction"] = max(1, info["reduction"] // 2**steps)
    cfg: dict[str, Any] | None = getattr(net, "pretrained_cfg", None)
    if not cfg:
        return
    sizes = {key: cfg[key] for key in ("input_size", "test_input_size", "min_input_size") if cfg.get(key)}
    cfg = cfg | {key: (size[0], *(-(-side // 2**steps) for side in size[1:])) for key, size in sizes.items()}
    if cfg.get("architecture") and hasattr(net, "num_classes"):
        args: dict[str, Any] = getattr(net, "_model_args", {})
        again = cfg["architecture"] == resolution_kept.__name__
        network = args["network"] if again else cfg["architecture"]
        update_model_args(net, network=network, steps=steps + (args["steps"] if again else 0))
        cfg["architecture"] = resolution_kept.__name__
    net.pretrained_cfg = net.default_cfg = cfg


@register_unlisted_model
def resolution_kept(
    pretrained: bool = False,
    network: str = "",
    steps: int = 1,
    pretrained_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A network from `keep_resolution`, as its saved config describes it: for `timm.create_model("local-dir:...")`.

    Args:
        pretrained: Load the weights beside the config.
        network: The network whose first strides were taken away.
        steps: As in `keep_resolution`.
        pretrained_cfg: The saved config.
        **kwargs: Arguments of the network.

    Raises:
        ValueError: Without the name of a network.
    """
    if not network:
        raise ValueError(
            "resolution_kept is made from a saved network alone: give timm.create_model the folder, local-dir:FOLDER, "
            "or call spd_zoo.keep_resolution"
        )
    like: Any = timm.create_model(network, device="meta")

    def create(**kwargs: Any) -> nn.Module:
        return keep_resolution(timm.create_model(network, **kwargs), steps, inplace=True)

    feature_cfg: dict[str, Any] = {}
    if kwargs.get("features_only"):
        feature_cfg["out_indices"] = tuple(range(len(like.feature_info)))
        feature_cfg["feature_cls"] = "getter" if hasattr(like, "forward_intermediates") else "fx"
    return build_model_with_cfg(
        create,
        resolution_kept.__name__,
        pretrained,
        pretrained_cfg=pretrained_cfg or like.pretrained_cfg | {"architecture": resolution_kept.__name__},
        pretrained_filter_fn=filter_of(like),
        feature_cfg=feature_cfg,
        **kwargs,
    )
