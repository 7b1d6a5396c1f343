"""GhostNet with padding-free downsampling and a hybrid stem.

Paper: GhostNet: More Features from Cheap Operations, https://arxiv.org/abs/1911.11907; the padding-free networks:
"Lightweight Deep Neural Network Model With Padding-free Downsampling" (2024).
Original code: https://github.com/xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem (this part has no licence).

Deliberate difference: networks with attention can be created for any image size.
"""

from typing import Any

from timm.layers import DropPath, make_divisible
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.ghostnet import GhostModule
from torch import Tensor, nn

from spd_zoo import weights
from spd_zoo.models._classifier import Classifier, HiddenLayerHead
from spd_zoo.models._pfd import Downsampling, build_stages, depthwise, rename_shared, stem
from spd_zoo.models._registry import register_model

__all__ = ["PFDGhostNet"]  # register_model adds the entry points

# For each block of each stage: kernel size, hidden channels, output channels, squeeze-and-excitation (paper, table 1).
STAGES = (
    ((3, 16, 16, False),),
    ((3, 48, 24, False),),
    ((3, 72, 24, False),),
    ((5, 72, 40, True),),
    ((5, 120, 40, True),),
    ((3, 240, 80, False),),
    ((3, 200, 80, False), (3, 184, 80, False), (3, 184, 80, False), (3, 480, 112, True), (3, 672, 112, True)),
    ((5, 672, 160, True),),
    ((5, 960, 160, False), (5, 960, 160, True), (5, 960, 160, False), (5, 960, 160, True)),
)
STRIDED = (1, 3, 5, 7)  # stages whose first block has stride 2


class UnusedBatchNorm2d(nn.BatchNorm2d):
    """The BatchNorm after the original's hybrid stem, which it never calls; checkpoints contain its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> `x` itself; in training the parameters get gradients of zero, which distributed runs need.

        With weight decay on BatchNorms these parameters shrink, without effect.
        """
        return x + 0 * (self.weight.sum() + self.bias.sum()) if self.training else x


class Bottleneck(nn.Module):
    """Ghost module, at stride 2 a depthwise convolution, squeeze-and-excitation, ghost module; and a shortcut."""

    def __init__(
        self,
        in_chs: int,
        hidden_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        se: bool,
        downsampling: Downsampling,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.ghost1 = GhostModule(in_chs, hidden_chs, **dd)
        self.down: nn.Module = nn.Identity()
        if stride == 2:
            self.down = depthwise(hidden_chs, kernel_size, 2, downsampling, None, dd, pool_size=kernel_size)
        self.se: nn.Module = nn.Identity()
        if se:
            rd_chs = make_divisible(hidden_chs * 0.25, 4)
            self.se = SqueezeExcite(hidden_chs, rd_channels=rd_chs, gate_layer="hard_sigmoid", **dd)
        self.ghost2 = GhostModule(hidden_chs, out_chs, act_layer=nn.Identity, **dd)
        self.shortcut = nn.Sequential()
        if stride == 2 or in_chs != out_chs:
            padding = kernel_size // 2 - (stride == 2 and downsampling == "pfd")
            conv = nn.Conv2d(in_chs, in_chs, kernel_size, stride, padding, groups=in_chs, bias=False, **dd)
            self.shortcut.extend([conv, nn.BatchNorm2d(in_chs, **dd)])
            self.shortcut.extend([nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd)])
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H', W')."""
        return self.drop_path(self.ghost2(self.se(self.down(self.ghost1(x))))) + self.shortcut(x)


class PFDGhostNet(Classifier):
    """A stem, nine stages of ghost bottlenecks, a 1x1 convolution and a head with a hidden layer.

    Args:
        small: For images of 32 pixels: the stem and stage 2 have stride 1, and the last map is 1/8 of the image.
        hybrid_stem: `HybridStem` instead of a convolution.
        downsampling: "padded", padding-free ("pfd") or `AttentionDownsample` blocks ("attention").
        img_size: Image size in pixels, one number or height and width; used by attention only. Default: 32 if
            `small`, else 224.
    """

    def __init__(
        self,
        small: bool = False,
        hybrid_stem: bool = False,
        downsampling: Downsampling = "padded",
        num_classes: int = 292,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def block(i: int, j: int, in_chs: int, stride: int, size: tuple[int, int], drop_path: float) -> nn.Module:
            kernel_size, hidden_chs, out_chs, se = STAGES[i][j]
            return Bottleneck(in_chs, hidden_chs, out_chs, kernel_size, stride, se, downsampling, drop_path, dd)

        stages, feature_info = build_stages(
            [[out_chs for _, _, out_chs, _ in stage] for stage in STAGES],
            STRIDED,
            block,
            in_chs=16,
            head_chs=960,
            act_layer=nn.ReLU,
            small=small,
            downsampling=downsampling,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            dd=dd,
        )
        first = nn.Sequential(stem(hybrid_stem, in_chans, 16, 1 if small else 2, nn.ReLU, None, dd))
        if hybrid_stem:
            first.append(UnusedBatchNorm2d(16, **dd))
        super().__init__(
            first,
            stages,
            feature_info,
            num_classes,
            in_chans,
            head=HiddenLayerHead(960, num_classes, 1280, nn.ReLU, global_pool, drop_rate, **dd),
        )


_RENAMES = (  # the authors' keys -> ours
    (r"^conv_stem\.weight$", "stem.0.conv.weight"),
    (r"^conv_stem\.", "stem.0."),
    (r"^blocks\.", "stages."),
    (r"^stages\.9\.0\.bn1\.", "stages.9.0.bn."),
    (r"\.conv_dw\.", ".down.conv."),
    (r"\.bn_dw\.", ".down.bn."),
    (r"^conv_head\.", "head.hidden."),
    (r"^classifier\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PFDGhostNet) -> dict[str, Tensor]:
    """Renames the authors' keys to ours; our own keys stay."""
    norm = (r"^bn1\.", "stem.1." if len(model.stem) > 1 else "stem.0.bn.")
    return rename_shared(weights.rename(state_dict, (norm, *_RENAMES)), model)


default_cfgs = weights.default_cfgs("pfd_ghostnet", classifier="head.fc")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PFDGhostNet:
    return weights.build(PFDGhostNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_ghostnet(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet for CIFAR."""
    model_args = dict(small=True)
    return _create("cifar_ghostnet", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_ghostnet_stem(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet for CIFAR with a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True)
    return _create("cifar_ghostnet_stem", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_ghostnet_down(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet for CIFAR with padding-free downsampling."""
    model_args = dict(small=True, downsampling="pfd")
    return _create("cifar_ghostnet_down", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_ghostnet_pfd(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet for CIFAR with padding-free downsampling and a hybrid stem."""
    model_args = dict(small=True, hybrid_stem=True, downsampling="pfd")
    return _create("cifar_ghostnet_pfd", pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_ghostnet_effdown(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet for CIFAR with EfficientFormerV2's downsampling."""
    model_args = dict(small=True, downsampling="attention")
    return _create("cifar_ghostnet_effdown", pretrained, **dict(model_args, **kwargs))


@register_model
def ghostnet(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet."""
    return _create("ghostnet", pretrained, **kwargs)


@register_model
def ghostnet_pfd(pretrained: bool = False, **kwargs: Any) -> PFDGhostNet:
    """GhostNet with padding-free downsampling and a hybrid stem."""
    model_args = dict(hybrid_stem=True, downsampling="pfd")
    return _create("ghostnet_pfd", pretrained, **dict(model_args, **kwargs))
