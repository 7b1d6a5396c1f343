"""What the padding-free mobile networks share: their stem, their strided parts, and the names in their checkpoints."""

from typing import Any, Literal

from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.blocks import (
    AttentionDownsample,
    HybridStem,
    ImageSizeError,
    PaddingFreeDownsample,
    conv_norm_act,
    resample_to_fit,
)
from spd_zoo.models._classifier import Classifier

__all__ = ["Downsampling", "block_names", "depthwise", "first_conv", "halved", "rename_shared", "stem"]

Downsampling = Literal["padded", "pfd", "attention"]  # the authors' baseline, theirs, and EfficientFormerV2's


def stem(
    hybrid: bool, in_chans: int, chs: int, stride: int, act_layer: type[nn.Module], norm_kwargs: Any, dd: dict[str, Any]
) -> nn.Module:
    """The hybrid stem, or a 3x3 convolution. The hybrid one keeps BatchNorm's defaults, as the authors' does."""
    if hybrid:
        return HybridStem(in_chans, chs, stride, act_layer=act_layer, **dd)
    return conv_norm_act(in_chans, chs, 3, stride, act_layer=act_layer, norm_kwargs=norm_kwargs, **dd)


def first_conv(variant: str) -> str:
    """The name of a network's first convolution."""
    return "stem.0.conv.conv" if variant.endswith(("_stem", "_pfd")) else "stem.0.conv"


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
    """A depthwise convolution, BatchNorm and activation; padding-free where it has a stride and the network is."""
    kwargs = {"groups": chs, "act_layer": act_layer, "norm_kwargs": norm_kwargs} | dd
    if stride == 2 and downsampling == "pfd":
        return PaddingFreeDownsample(chs, chs, kernel_size, pool_size=pool_size, **kwargs)
    return conv_norm_act(chs, chs, kernel_size, stride, **kwargs)


def halved(size: tuple[int, int], downsampling: Downsampling) -> tuple[int, int]:
    """Height and width behind a downsampling; raises ImageSizeError if nothing would be left."""
    height, width = size
    if min(size) < (3 if downsampling == "pfd" else 1):
        raise ImageSizeError(f"img_size is too small: a map of {height}x{width} pixels cannot be halved")
    if downsampling == "pfd":
        return (height - 3) // 2 + 1, (width - 3) // 2 + 1
    return -(-height // 2), -(-width // 2)


def block_names(net: Classifier) -> list[str]:
    """The beginnings of our keys for the blocks in their order, which the authors number through from 1."""
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
    """Ours for the authors' keys inside the stem and the attention, whose parts are resampled to the network's size.

    The stem and the blocks themselves must have our names already.
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
