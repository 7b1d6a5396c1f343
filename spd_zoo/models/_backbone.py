"""The backbone of classifiers and detectors: a stem and stages, with timm's interface."""

from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """stem -> stages, with timm's interface of feature backbones; subclasses add a head.

    Args:
        stem: The first layers.
        stages: One `nn.Sequential` of blocks per stage.
        feature_info: timm's description of the maps that `features_only` returns: outputs of stages, among them the
            last stage, and optionally the output of the stem first.
        num_classes: Number of classes.
        in_chans: Image channels.
    """

    pretrained_cfg: dict[str, Any]  # set by timm

    def __init__(
        self,
        stem: nn.Sequential,
        stages: nn.Sequential,
        feature_info: list[dict[str, Any]],
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = feature_info
        # For each map, the number of stages that compute it.
        self.map_depths = [
            int(info["module"].removeprefix("stages.")) + 1 if info["module"].startswith("stages.") else 0
            for info in feature_info
        ]
        self.stem = stem
        self.stages = stages
        self.num_features: int = feature_info[-1]["num_chs"]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the maps inside a stage in the backward pass, which saves memory in training.

        Args:
            enable: Whether to recompute them.
        """
        self.grad_checkpointing = enable

    def pyramid(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """Runs the stages.

        Args:
            x: Output of the stem, (N, C, H, W).
            count: Number of stages to run; None: all.

        Returns:
            The output of each stage that ran.
        """
        maps = []
        for i, stage in enumerate(self.stages):
            if i == count:
                break
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            maps.append(x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the maps that `feature_info` describes, as timm's networks do.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Indices of the maps; an int selects the last n, None all.
            norm: Has no effect; there is no final norm.
            stop_early: Skip the stages after the last selected map.
            output_fmt: Only "NCHW".
            intermediates_only: Return the maps without the output of the last stage.

        Returns:
            The maps, or the output of the last stage that ran and the maps.

        Raises:
            ValueError: If `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        depths = [self.map_depths[i] for i in take]
        x = self.stem(x)
        outputs = [x, *self.pyramid(x, self.map_depths[last] if stop_early else None)]
        maps = [fmap for depth, fmap in enumerate(outputs) if depth in depths]
        return maps if intermediates_only else (outputs[-1], maps)
