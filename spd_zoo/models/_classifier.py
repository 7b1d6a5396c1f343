"""What timm expects of a classification network, written once: a stem, stages and a head."""

from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """stem -> stages -> head, with timm's contract for classification networks and feature backbones.

    Args:
        stem: The first layers.
        stages: One module per stage, each an `nn.Sequential` of blocks.
        feature_info: timm's description of the maps that `features_only` offers: those behind the stages, and first,
            if there is one more, that behind the stem.
        num_classes: Outputs of the classifier; 0 leaves it out.
        in_chans: Image channels.
        global_pool: timm's pooling type; "" leaves the map unpooled.
        drop_rate: Dropout in front of the classifier.
    """

    pretrained_cfg: dict[str, Any]  # set by timm

    def __init__(
        self,
        stem: nn.Sequential,
        stages: nn.Sequential,
        feature_info: list[dict[str, Any]],
        num_classes: int,
        in_chans: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = feature_info
        self.stem_maps = len(feature_info) - len(stages)
        self.stem = stem
        self.stages = stages
        self.num_features: int = feature_info[-1]["num_chs"]
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from input to output, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training: the inner maps of every stage are computed again for the gradient."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier of `num_classes` outputs (0: none); the pooling stays unless given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last map, (N, num_features, H', W')."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (N, num_classes), or what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that `feature_info` describes, as timm's networks give them.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Which maps: the last n if an int, all if None.
            norm: Has no effect; there is no final norm.
            stop_early: Leave out the stages behind the last map asked for.
            output_fmt: Only "NCHW".
            intermediates_only: Return the list alone, without the last map.

        Raises:
            ValueError: If `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        maps = [x] if self.stem_maps and 0 in take else []
        stages = self.stages[: last + 1 - self.stem_maps] if stop_early else self.stages
        for i, stage in enumerate(stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            if i + self.stem_maps in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the maps `indices` do not need; returns their indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        cut = last + 1 < len(self.feature_info)
        if cut:
            self.stages = self.stages[: last + 1 - self.stem_maps]
            self.num_features = self.feature_info[last]["num_chs"]
            self.head.in_features = self.num_features
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take
