"""Classification networks: a backbone and a head, with timm's interface."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from spd_zoo.arguments import height_and_width
from spd_zoo.models._backbone import Backbone

__all__ = ["Classifier", "HiddenLayerHead", "last_of_each_reduction"]


def last_of_each_reduction(chs: Sequence[int], reductions: Sequence[int]) -> list[dict[str, Any]]:
    """timm's `feature_info` for the last stage of each resolution.

    Args:
        chs: Output channels of each stage.
        reductions: Total stride of each stage's output.

    Returns:
        One description per resolution, from fine to coarse.
    """
    return [
        {"num_chs": chs[i], "reduction": reduction, "module": f"stages.{i}"}
        for i, reduction in enumerate(reductions)
        if reduction not in reductions[i + 1 :]
    ]


class HiddenLayerHead(nn.Module):
    """Pooling, a hidden 1x1 convolution, its activation, dropout and a linear classifier, with the API of timm's heads.

    Args:
        in_features: Input channels.
        num_classes: Number of classes; 0 leaves the classifier out.
        hidden_size: Channels of the hidden layer.
        act_layer: Activation of the hidden layer.
        pool_type: timm's pooling type; "" leaves the map unpooled.
        drop_rate: Dropout rate before the classifier.
        bias: Whether the hidden layer has a bias.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_size: int,
        act_layer: type[nn.Module],
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = hidden_size
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type)
        pooled = in_features * self.global_pool.feat_mult()
        self.hidden: nn.Module = nn.Conv2d(pooled, hidden_size, 1, bias=bias, device=device, dtype=dtype)
        self.act: nn.Module = act_layer()
        self.drop = nn.Dropout(drop_rate)
        self.flatten = nn.Flatten(1) if pool_type else nn.Identity()
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replaces the classifier by a new, untrained one.

        Args:
            num_classes: Number of classes; 0 leaves the classifier out.
            pool_type: timm's pooling type; None keeps the current one.
            reset_other: Remove the hidden layer.
            in_features: New number of input channels, with `reset_other`.
            device: Device of the new parameters.
            dtype: Data type of the new parameters.

        Raises:
            AssertionError: As in timm's heads, if the hidden layer cannot read the output of `pool_type`, or if
                `pool_type` is "" and `num_classes` is not 0.
        """
        if num_classes and pool_type == "":
            raise AssertionError('a classifier needs pooling: global_pool="" works with num_classes=0 only')
        dd = get_device_dtype(self, device=device, dtype=dtype)
        pool = self.global_pool if pool_type is None else SelectAdaptivePool2d(pool_type=pool_type)
        if reset_other:
            self.hidden, self.act = nn.Identity(), nn.Identity()
            self.in_features = in_features or self.in_features
        if isinstance(self.hidden, nn.Identity):
            self.num_features = self.in_features * pool.feat_mult()
        elif pool.feat_mult() != self.global_pool.feat_mult():
            raise AssertionError(f"the hidden layer cannot read pooling {pool_type!r}; give global_pool at creation")
        self.global_pool = pool
        self.flatten = nn.Identity() if pool.is_identity() else nn.Flatten(1)
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, in_features, H, W) -> logits (N, num_classes), or with `pre_logits` the input of the classifier."""
        x = self.drop(self.flatten(self.act(self.hidden(self.global_pool(x)))))
        return x if pre_logits else self.fc(x)


class Classifier(Backbone):
    """stem -> stages -> head, with timm's interface of classification networks and feature backbones.

    Args:
        stem: The first layers.
        stages: One `nn.Sequential` of blocks per stage.
        feature_info: As in `Backbone`.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Image channels.
        global_pool: timm's pooling type; "" leaves the map unpooled.
        drop_rate: Dropout rate before the classifier.
        head: The head; None: timm's `ClassifierHead`.
        device: Device of the parameters of that head.
        dtype: Data type of the parameters of that head.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: nn.Sequential,
        feature_info: list[dict[str, Any]],
        num_classes: int,
        in_chans: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head: HiddenLayerHead | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(stem, stages, feature_info, num_classes, in_chans)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head = head or ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from input to output, for layer-wise learning rates.

        Args:
            coarse: One group per stage instead of one per block.

        Returns:
            timm's description of the groups.
        """
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters that timm's optimizers do not decay: attention biases and position embeddings."""
        return {name for name, _ in self.named_parameters() if name.endswith((".attention_biases", ".pe"))}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resamples the parameters that depend on the image size; most networks have none and accept any size.

        The resampled parameters are new objects, so create the optimizer afterwards.

        Args:
            img_size: Height and width in pixels.

        Raises:
            ValueError: If `img_size` is no size, or too small for the network. The network then stays unchanged.
        """
        height, width = height_and_width("img_size", img_size)
        trial: Any = copy.deepcopy(self).to("meta").eval()
        sizes: dict[str, tuple[int, int]] = {}
        for name, module in trial.named_modules():
            if hasattr(module, "set_size"):

                def set_size(module: Any, args: tuple[Tensor], name: str = name) -> None:
                    sizes[name] = (args[0].shape[-2], args[0].shape[-1])
                    module.set_size(sizes[name])

                module.register_forward_pre_hook(set_size)
        with torch.no_grad():
            trial.stages(trial.stem(next(trial.parameters()).new_zeros(1, self.in_chans, height, width)))
        modules: dict[str, Any] = dict(self.named_modules())
        for name, size in sizes.items():
            if modules[name].size != size:
                modules[name].set_size(size)
        if sizes:  # saved in the config, from which the network is created again
            update_model_input_size(self, (height, width))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new, untrained one.

        Args:
            num_classes: Number of classes; 0 leaves the classifier out.
            global_pool: timm's pooling type; None keeps the current one.
        """
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last map, (N, num_features, H', W')."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (N, num_classes), or with `pre_logits` the input of the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last selected map, and by default the head.

        Args:
            indices: Indices of the maps to keep; an int selects the last n.
            prune_norm: Has no effect; there is no final norm.
            prune_head: Remove the head even if no stage is removed.

        Returns:
            The indices.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        cut = last + 1 < len(self.feature_info)
        if cut:
            self.stages = self.stages[: self.map_depths[last]]
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True, in_features=self.num_features)
            self.head_hidden_size = self.head.num_features
        return take
