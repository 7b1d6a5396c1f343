"""What timm expects of a network's first part, of a classifier's as of a detector's: a stem and stages."""

from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """stem -> stages, with timm's contract for feature backbones; a subclass adds what reads the maps.

    Args:
        stem: The first layers.
        stages: One module per stage, each an `nn.Sequential` of blocks.
        feature_info: timm's description of the maps that `features_only` offers: those behind stages, the last stage
            among them, and first, if its module is the stem's last, that behind the stem.
        num_classes: What the network tells apart.
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
        # of each map, how many stages lie in front of it
        self.map_depths = [
            int(info["module"].removeprefix("stages.")) + 1 if info["module"].startswith("stages.") else 0
            for info in feature_info
        ]
        self.stem = stem
        self.stages = stages
        self.num_features: int = feature_info[-1]["num_chs"]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training: the inner maps of every stage are computed again for the gradient."""
        self.grad_checkpointing = enable

    def pyramid(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """The stem's map -> the map behind each stage, or each of the first `count` stages."""
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
        depths = [self.map_depths[i] for i in take]
        x = self.stem(x)
        behind = [x, *self.pyramid(x, self.map_depths[last] if stop_early else None)]
        maps = [fmap for depth, fmap in enumerate(behind) if depth in depths]
        return maps if intermediates_only else (behind[-1], maps)
