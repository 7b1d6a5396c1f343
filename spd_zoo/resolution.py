"""Adapts pretrained networks to smaller images, by removing the stride of the first downsampling.

Small images are usually enlarged to the size that a network was pretrained at. `keep_resolution` instead removes the
stride of the first layers. An image of half the size then gives maps of the size that the rest of the network was
trained with, without training and at a fraction of the cost. Accuracy falls, because the first kernels were trained at
another resolution: Touvron et al., Fixing the train-test resolution discrepancy, https://arxiv.org/abs/1906.06423.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame, PatchEmbed, to_2tuple
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import build_model_with_cfg, get_model_traits
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from spd_zoo.arguments import positive_integer
from spd_zoo.errors import first_line
from spd_zoo.models._detector import DetectionNet
from spd_zoo.models._registry import all_maps, register_unlisted_model
from spd_zoo.rewrite import move_hooks, what_is_attached
from spd_zoo.spd import MaxPool2d, PhaseMix, SPDConv2d, SPDMaxPool2d
from spd_zoo.trace import OperatorMode, TraceError, copy_network, image_size, meta_copy, run_on_meta
from spd_zoo.weights.fit import check_fit, filter_of, fit_image_channels

__all__ = ["keep_resolution"]

_LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)
# operators that reorder, divide or regroup the axes of a tensor, as attention does, and downsample nothing
_REARRANGING = {"expand", "permute", "split", "split_with_sizes", "transpose", "unbind", "view", "_unsafe_view"}


@dataclass(frozen=True)
class _Downsampling:
    """An operator that made a map smaller.

    Attributes:
        module: The module that it ran in.
        operator: Its name, or the class of a layer of `_LAYERS`.
        before: Height and width of its input; for a layer, before the layer's own padding.
        after: Height and width of its output.
    """

    module: str
    operator: str
    before: tuple[int, int]
    after: tuple[int, int]


def keep_resolution(
    model: nn.Module, steps: int = 1, *, inplace: bool = False, example_input: Tensor | None = None
) -> nn.Module:
    """Adapts a network to images of half the size, by halving the stride of its first downsampling.

    Every convolution and pooling that reads maps of the image's own size gets half its stride and, if needed, other
    padding, so that an image of half the size gives maps of the same size as the full image did. Weights do not change,
    and no dilation is added. Call this function before `convert_to_spd`. timm's `feature_info` and the `input_size` of
    its config are updated, and `spd_zoo.weights.save_network` saves the changed network.

    Args:
        model: The network, for example one of timm's.
        steps: How often to halve the size of the images; 2 also removes the stride of ResNet's max-pooling.
        inplace: Change and return `model` itself instead of a copy.
        example_input: Preprocessed images of the current size, (N, C, H, W). Required for networks that are not timm's,
            whose image size is unknown without a `pretrained_cfg`.

    Returns:
        The network.

    Raises:
        ValueError: If `steps` is not positive, the size of the images is unknown, something that is not a plain
            convolution or pooling downsamples first, the network is a detector or converted, its maps do not halve with
            the images, or it cannot run on the "meta" device; `model` is then unchanged.
    """
    steps = positive_integer("steps, the number of times to halve the images,", steps)
    if isinstance(model, DetectionNet):
        raise ValueError(
            f"{type(model).__name__} places its boxes by the strides of its maps, which would change; give it enlarged "
            "images, or call keep_resolution with its backbone (features_only=True)"
        )
    sizes = [image_size(model, example_input)]
    if any(isinstance(module, SPDConv2d | SPDMaxPool2d | PhaseMix) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has space-to-depth layers; call keep_resolution before convert_to_spd, or, "
            "for use without training, on spd_zoo.fold_spd(net)"
        )
    trial = meta_copy(model)
    changed: dict[str, None] = {}  # an ordered set
    for _ in range(steps):
        changed |= dict.fromkeys(_step(trial, sizes[-1]))
        sizes.append(_half(sizes[-1]))
    net = model if inplace else copy_network(model)
    for name in changed:
        _apply(net, name, trial.get_submodule(name))
    _describe(net, sizes)
    return net


def _half(size: tuple[int, int, int]) -> tuple[int, int, int]:
    return size[0], -(-size[1] // 2), -(-size[2] // 2)


def _step(net: nn.Module, size: tuple[int, int, int]) -> list[str]:
    """Halves the strides of the layers that read maps of the image's size; returns the names of these layers."""
    _, height, width = size
    half = _half(size)
    found, shapes = _run(net, size)
    first = {
        down.module: down
        for down in found
        if all(round(math.log2(pixels / side)) == 0 for pixels, side in zip((height, width), down.before, strict=True))
    }
    if not first:
        raise ValueError(
            f"no convolution and no pooling of {type(net).__name__} reads maps of the image's size and makes them "
            "smaller, so there is no stride to remove"
        )
    for name, down in first.items():
        borders = [side - pixels for side, pixels in zip(down.before, (height, width), strict=True)]
        layer = _halved(net.get_submodule(name), name, down, (half[1] + borders[0], half[2] + borders[1]))
        net.set_submodule(name, layer)
    try:
        _, new_shapes = _run(net, half)
    except TraceError as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"{type(net).__name__} does not accept images of {half[1]}x{half[2]} pixels without the stride of "
            f"{', '.join(first)}: {reason}"
        ) from error
    if new_shapes != shapes:
        raise ValueError(
            f"without the stride of {', '.join(first)}, images of {half[1]}x{half[2]} pixels give maps {new_shapes} "
            f"instead of {shapes}: the maps of {type(net).__name__} do not halve with the image"
        )
    if any(isinstance(net.get_submodule(name.rpartition(".")[0]), PatchEmbed) for name in first):
        _check_maps(net, half)
    return list(first)


def _check_maps(net: Any, size: tuple[int, int, int]) -> None:
    """Refuses a network whose `forward_intermediates` cuts tokens into maps by its patches' former size."""
    if not hasattr(net, "forward_intermediates"):
        return
    meta: Any = copy_network(net)
    meta.forward = partial(meta.forward_intermediates, intermediates_only=True)
    if [fmap.shape[1] for fmap in run_on_meta(meta, size)] != [info["num_chs"] for info in net.feature_info]:
        raise ValueError(
            f"{type(net).__name__} counts its maps in patches of a fixed size, so forward_intermediates would return "
            "wrong maps; create it with a smaller patch_size, or give it smaller images as it is"
        )


def _run(net: nn.Module, size: tuple[int, int, int]) -> tuple[list[_Downsampling], list[list[int]]]:
    """The downsamplings of a network on "meta", in order, and the shapes of its last maps."""
    meta: Any = copy_network(net)
    if hasattr(meta, "forward_features"):
        meta.forward = meta.forward_features  # after pooling, the output would not show the size of the map
    running = [("", False)]  # stack of running modules, and whether each is a layer
    found: list[_Downsampling] = []

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: running.append((name, isinstance(module, _LAYERS)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name, is_layer = running.pop()
        if is_layer:  # compared as a whole, because operators inside may also compute its weights
            compare(name, type(module).__name__, next(iter((*args, *kwargs.values()))), output)

    for name, module in meta.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave, with_kwargs=True)

    def on_operator(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name, is_layer = running[-1]
        if args and not is_layer and operator not in _REARRANGING:
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

    with OperatorMode(on_operator):
        output = run_on_meta(meta, size)
    outputs = output if isinstance(output, list | tuple) else [output]
    return found, [list(tensor.shape) for tensor in outputs]


def _halved(module: Any, name: str, down: _Downsampling, smaller: tuple[int, int]) -> nn.Module:
    """The layer with half its stride, padded so that an input of `smaller` pixels gives an output of the same size."""
    if not isinstance(module, _LAYERS):
        raise ValueError(
            f"{type(module).__name__}{f' ({name})' if name else ''} downsamples first, by {down.operator}; only the "
            "stride of a convolution or pooling layer can be removed"
        )
    strides = to_2tuple(module.stride)
    if strides[0] != strides[1] or strides[0] % 2:
        raise ValueError(f"{name} has stride {strides}, which cannot be halved")
    stride = strides[0] // 2
    kernel = to_2tuple(module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size)
    dilation = to_2tuple(getattr(module, "dilation", 1))
    reach = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel, strict=True)]
    pads = [(out - 1) * stride + taps - pixels for out, taps, pixels in zip(down.after, reach, smaller, strict=True)]
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
    """A layer with an even kernel and stride 1, with TensorFlow's padding: one pixel more on one side."""
    if type(module) in (nn.MaxPool2d, MaxPool2d):
        return MaxPool2dSame(module.kernel_size, 1, dilation=module.dilation)
    if type(module) is nn.AvgPool2d:
        return AvgPool2dSame(module.kernel_size, 1, count_include_pad=module.count_include_pad)
    if attached := what_is_attached(module):
        raise ValueError(f"{name} has an even kernel and needs a new layer for its padding at stride 1, but {attached}")
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        raise ValueError(
            f"{name}, a {type(module).__name__}, has an even kernel, for which there is no padding at stride 1"
        )
    kernel, dilation = to_2tuple(module.kernel_size), to_2tuple(module.dilation)
    args = (module.in_channels, module.out_channels, kernel)
    return Conv2dSame(*args, dilation=dilation, groups=module.groups, bias=module.bias is not None, device="meta")


def _apply(net: nn.Module, name: str, planned: nn.Module) -> None:
    """Copies stride and padding from a planned layer, or puts it into the network if its class differs."""
    layer = net.get_submodule(name)
    if type(layer) is type(planned):
        for attribute in ("stride", "padding", "_reversed_padding_repeated_twice"):
            if hasattr(planned, attribute):
                setattr(layer, attribute, getattr(planned, attribute))
        return
    for key, parameter in layer.named_parameters(recurse=False):
        setattr(planned, key, parameter)
    move_hooks(layer, planned)
    net.set_submodule(name, planned.train(layer.training))


def _describe(net: Any, sizes: list[tuple[int, int, int]]) -> None:
    """Updates timm's description of a network whose images had these sizes, the last of which is the new one."""
    steps = len(sizes) - 1
    infos = getattr(net, "feature_info", None)
    for info in getattr(infos, "info", infos) or ():
        info["reduction"] = max(1, info["reduction"] // 2**steps)
    cfg: dict[str, Any] | None = getattr(net, "pretrained_cfg", None)
    if not cfg:
        return
    if get_model_traits(net).get("img_size"):  # the network was made for one size, which timm records apart from cfg
        update_model_input_size(net, sizes[-1][1:])
    others = {key: cfg[key] for key in ("test_input_size", "min_input_size") if cfg.get(key)}
    halved = {key: (size[0], *(-(-side // 2**steps) for side in size[1:])) for key, size in others.items()}
    cfg = cfg | halved | {"input_size": sizes[-1]}
    if cfg.get("architecture") and hasattr(net, "num_classes"):
        args: dict[str, Any] = getattr(net, "_model_args", {})
        again = cfg["architecture"] == resolution_kept.__name__
        network = args["network"] if again else cfg["architecture"]
        earlier = args["sizes"] if again else []
        update_model_args(net, network=network, sizes=[*earlier, *map(list, sizes[:-1])])
        cfg["architecture"] = resolution_kept.__name__
    net.pretrained_cfg = net.default_cfg = cfg


@register_unlisted_model
def resolution_kept(
    pretrained: bool = False,
    network: str = "",
    sizes: Sequence[Sequence[int]] = (),
    steps: int = 0,
    pretrained_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A network from `keep_resolution`, as its saved config describes it, for `timm.create_model("local-dir:...")`.

    Args:
        pretrained: Load the weights in the config's folder.
        network: The network whose first strides were removed.
        sizes: The size (C, H, W) of the images before each step.
        steps: As in `keep_resolution`, in earlier configs, which have no `sizes`.
        pretrained_cfg: The saved config.
        **kwargs: Arguments of the network.

    Returns:
        The network.

    Raises:
        ValueError: If `network` is empty, or cannot be made for an `img_size` in the config.
        WeightsError: If the weights are not those of the network that the config describes.
    """
    if not network:
        raise ValueError(
            "resolution_kept needs a saved network: give timm.create_model the folder, local-dir:FOLDER, "
            "or call spd_zoo.keep_resolution"
        )
    like: Any = timm.create_model(network, device="meta")

    def create(**kwargs: Any) -> nn.Module:
        img_size = kwargs.get("img_size")  # of a network made for one size: that of the images after all steps
        if img_size is not None and sizes:
            kwargs["img_size"] = tuple(sizes[0][1:])
        net: Any = timm.create_model(network, **kwargs)
        if not sizes:
            return keep_resolution(net, steps, inplace=True)
        for channels, *size in sizes:
            images = torch.empty(1, kwargs.get("in_chans", channels), *size, device="meta")
            net = keep_resolution(net, inplace=True, example_input=images)
        if img_size is not None and to_2tuple(img_size) != image_size(net, None)[1:]:
            if not hasattr(net, "set_input_size"):
                raise ValueError(
                    f"{network} cannot be changed to img_size={img_size}; create it with another size, and call "
                    "spd_zoo.keep_resolution again"
                )
            net.set_input_size(img_size)
        return net

    def fitting(state_dict: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
        state_dict = fit_image_channels(filter_of(like)(state_dict, net), net)
        check_fit(state_dict, net, f"{network} after keep_resolution", kwargs.get("features_only", False))
        return state_dict

    return build_model_with_cfg(
        create,
        resolution_kept.__name__,
        pretrained,
        pretrained_cfg=pretrained_cfg or like.pretrained_cfg | {"architecture": resolution_kept.__name__},
        pretrained_filter_fn=fitting,
        feature_cfg=all_maps(like) if kwargs.get("features_only") else {},
        **kwargs,
    )
