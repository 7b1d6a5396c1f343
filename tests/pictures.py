"""Generates pictures of three classes, blue, green and red, in class folders."""

from pathlib import Path

import torch
from PIL import Image

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-20, 20, (16, 16, 3), generator=generator)
    pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_folders(root: Path, **counts: int) -> Path:
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(colour, i + 100 * len(split)).save(root / split / name / f"{i}.png")
    return root
