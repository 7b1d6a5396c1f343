"""Shared by the padding-free mobile networks: stem, stages, strided layers, mapping of the authors' parameter names."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.arguments import height_and_width
from spd_zoo.blocks import (
    AttentionDownsample,
    HybridStem,
    ImageSizeError,
    PaddingFreeDownsample,
    conv_norm_act,
    resample_to_fit,
)
from spd_zoo.models._classifier import Classifier, last_of_each_reduction

__all__ = ["Downsampling", "block_names", "build_stages", "depthwise", "halved", "native_size", "rename_shared", "stem"]

# The paper's baseline, its padding-free downsampling, and, for comparison, EfficientFormerV2's attention.
Downsampling = Literal["padded", "pfd", "attention"]


def stem(
    hybrid: bool, in_chans: int, chs: int, stride: int, act_layer: type[nn.Module], norm_kwargs: Any, dd: dict[str, Any]
) -> nn.Module:
    """The hybrid stem, or a 3x3 convolution with BatchNorm and activation.

    `norm_kwargs` does not apply to the hybrid stem: in the authors' code its BatchNorms have torch's defaults.
    """
    if hybrid:
        return HybridStem(in_chans, chs, stride, act_layer=act_layer, **dd)
    return conv_norm_act(in_chans, chs, 3, stride, act_layer=act_layer, norm_kwargs=norm_kwargs, **dd)


def build_stages(
    widths: Sequence[Sequence[int]],
    strided: Sequence[int],
    block: Callable[[int, int, int, int, tuple[int, int], float], nn.Module],
    in_chs: int,
    head_chs: int,
    act_layer: type[nn.Module],
    small: bool,
    downsampling: Downsampling,
    img_size: int | tuple[int, int] | None,
    drop_path_rate: float,
    dd: dict[str, Any],
    norm_kwargs: dict[str, Any] | None = None,
) -> tuple[nn.Sequential, list[dict[str, Any]]]:
    """Builds the stages of a network and the 1x1 convolution after them.

    Args:
        widths: Output channels of every block of every stage.
        strided: Stages whose first block has stride 2; the first of them has stride 1 in a `small` network.
        block: Builds one block from its stage, its index in the stage, input channels, stride, height and width of its
            input, and drop-path rate.
        in_chs: Output channels of the stem.
        head_chs: Output channels of the 1x1 convolution.
        act_layer: Activation of the 1x1 convolution.
        small: Whether the stem has stride 1, else 2.
        downsampling: How the strided blocks downsample; for "attention", `AttentionDownsample` replaces them.
        img_size: Height and width of the images in pixels; None: 32 for a `small` network, else 224.
        drop_path_rate: Drop-path rate of the last block.
        dd: `device` and `dtype` of the parameters.
        norm_kwargs: `eps` and `momentum` of the BatchNorms.

    Returns:
        The stages and timm's `feature_info` for them.

    Raises:
        ImageSizeError: If `img_size` is too small.
        ValueError: If it is no size.
    """
    size, reduction = native_size(img_size, small), 1
    if not small:
        size, reduction = halved(size, "padded"), 2
    drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(map(len, widths)), stagewise=True)
    stages, reductions = nn.Sequential(), []
    for i, stage_widths in enumerate(widths):
        stage = nn.Sequential()
        for j, out_chs in enumerate(stage_widths):
            stride = 2 if i in strided and j == 0 and not (small and i == strided[0]) else 1
            if stride == 2 and downsampling == "attention":
                attention = i not in strided[:2]  # no attention on the two largest maps
                stage.append(AttentionDownsample(in_chs, out_chs, size, attention, norm_kwargs, **dd))
            else:
                stage.append(block(i, j, in_chs, stride, size, drop_paths[i][j]))
            if stride == 2:
                size, reduction = halved(size, downsampling), 2 * reduction
            in_chs = out_chs
        stages.append(stage)
        reductions.append(reduction)
    stages.append(nn.Sequential(conv_norm_act(in_chs, head_chs, act_layer=act_layer, norm_kwargs=norm_kwargs, **dd)))
    chs = [*(stage_widths[-1] for stage_widths in widths), head_chs]
    return stages, last_of_each_reduction(chs, [*reductions, reduction])


def native_size(img_size: int | tuple[int, int] | None, small: bool) -> tuple[int, int]:
    """Height and width of the images; without `img_size` 32 for a `small` network, else 224.

    Raises:
        ValueError: If `img_size` is no size.
    """
    return height_and_width("img_size", (32 if small else 224) if img_size is None else img_size)


def depthwise(
    chs: int,
    kernel_size: int,
    stride: int,
    downsampling: Downsampling,
    act_layer: type[nn.Module] | None,
    dd: dict[str, Any],
    pool_size: int = 3,
    norm_kwargs: Any = None,
) -> nn.Module:
    """A depthwise convolution, BatchNorm and activation; at stride 2 padding-free if `downsampling` is "pfd"."""
    kwargs = {"groups": chs, "act_layer": act_layer, "norm_kwargs": norm_kwargs} | dd
    if stride == 2 and downsampling == "pfd":
        return PaddingFreeDownsample(chs, chs, kernel_size, pool_size=pool_size, **kwargs)
    return conv_norm_act(chs, chs, kernel_size, stride, **kwargs)


def halved(size: tuple[int, int], downsampling: Downsampling) -> tuple[int, int]:
    """Height and width after a downsampling layer.

    Raises:
        ImageSizeError: If the input is too small.
    """
    height, width = size
    if min(size) < (3 if downsampling == "pfd" else 1):
        raise ImageSizeError(f"img_size is too small: a map of {height}x{width} pixels cannot be halved")
    if downsampling == "pfd":
        return (height - 3) // 2 + 1, (width - 3) // 2 + 1
    return -(-height // 2), -(-width // 2)


def block_names(net: Classifier) -> list[str]:
    """Key prefixes of all blocks in order; the authors number the blocks consecutively from 1."""
    return [f"stages.{i}.{j}." for i, stage in enumerate(net.stages.children()) for j, _ in enumerate(stage.children())]


_STEM = (  # the authors' keys -> ours
    (r"^stem\.0\.stem_1\.", "stem.0.conv."),
    (r"^stem\.0\.stem_1_1\.", "stem.0.branch."),
    (r"^stem\.0\.stem_3\.", "stem.0.fuse."),
    (r"^(stem\.0(?:\.conv|\.branch|\.fuse)?)\.0\.(?=\w+$)", r"\1.conv."),
    (r"^(stem\.0(?:\.conv|\.branch|\.fuse)?)\.1\.(?=\w+$)", r"\1.bn."),
    (r"\.norm\.(?=\w+$)", ".bn."),
)
_ATTENTION = (
    (r"^(?:downsampling|block\.0\.0|branch\.0)\.", ""),
    (r"^(?:proj|conv)\.(?=\w+$)", "conv.conv."),
    (r"^bn\.", "conv.bn."),
    (r"^attn\.q\.local\.0\.", "attn.q.local."),
    (r"^attn\.(q\.proj|k|v|v_local)\.0\.", r"attn.\1.conv."),
    (r"^attn\.(q\.proj|k|v|v_local)\.1\.", r"attn.\1.bn."),
    (r"^attn\.proj\.1\.", "attn.proj.conv."),
    (r"^attn\.proj\.2\.", "attn.proj.bn."),
)


def rename_shared(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames the authors' keys inside the stem and the attention, and resamples weights to the network's image size.

    Args:
        state_dict: The checkpoint, whose stem and blocks have our prefixes already.
        model: The network.

    Returns:
        The checkpoint under our keys.
    """
    state_dict = weights.rename(state_dict, _STEM)
    for name, module in model.named_modules():
        if isinstance(module, AttentionDownsample):
            inner = {key: key.removeprefix(f"{name}.") for key in state_dict if key.startswith(f"{name}.")}
            for key, rest in inner.items():
                renamed = weights.rename({rest: state_dict.pop(key)}, _ATTENTION)
                state_dict |= {f"{name}.{new}": tensor for new, tensor in renamed.items()}
    state_dict = {key: tensor for key, tensor in state_dict.items() if not key.endswith(".attention_bias_idxs")}
    return resample_to_fit(state_dict, model)
