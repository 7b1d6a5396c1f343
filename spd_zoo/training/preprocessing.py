"""Conversion of pixels to a network's input, and the precision of its computation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Preprocessing", "normalize"]


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of pixels to a network's input.

    Attributes:
        mean: Mean of each channel, on a scale from 0 to 1.
        std: Standard deviation of each channel.
        device: The network's device.
        bf16: Whether autocast computes in bfloat16.
        crop_pct: Classifiers: the share of an image's shorter side that is kept in evaluation.
        interpolation: Classifiers: how images are resized in evaluation.
        crop_mode: Classifiers: timm's name for how images are cropped in evaluation; None: the centre.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    bf16: bool = False
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str | None = None

    @property
    def mode(self) -> str:
        """Pillow's name for the channels."""
        return "L" if len(self.mean) == 1 else "RGB"

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which the network computes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def normalize(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float on the device, channels last."""
        return normalize(pixels, self.mean, self.std, self.device)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """(N, C, H, W) uint8 -> float on `device`, channels last, bit for bit as torchvision's ToTensor and Normalize."""
    shape = (1, -1, 1, 1)
    images = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last).div_(255)
    center, scale = (torch.tensor(values, device=device).view(shape) for values in (mean, std))
    return images.sub_(center).div_(scale)
