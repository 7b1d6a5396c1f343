"""Draws the README's picture, `docs/figures/result.png`: `python tools/example_picture.py`.

On the left what `yolov8n_spd.bccd` finds in the test image of blood cells in `examples/cells/`, on the right the 32
pixels of `examples/images/rocket.jpg` that `cifar_resnet20_pfd` sees. Both networks come with the package.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from timm.data import create_transform, resolve_data_config

import spd_zoo
from spd_zoo.files import whole

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "figures" / "result.png"
HEIGHT, GAP, LINE = 360, 20, 34  # pixels of a panel, between panels, and of the caption; legible at half the size
COLOURS = {"RBC": "#d64f4f", "WBC": "#1b6fd0", "Platelets": "#0a7d34"}


def cells() -> tuple[Image.Image, str]:
    """The cells with a box for each, and how many there are."""
    picture = Image.open(ROOT / "examples/cells/BloodImage_00007.jpg").convert("RGB")
    found = spd_zoo.Detector("yolov8n_spd.bccd")(picture)
    scale = HEIGHT / picture.height
    picture = picture.resize((round(picture.width * scale), HEIGHT))
    pen = ImageDraw.Draw(picture)
    for name, box in zip(found.names, (found.boxes * scale).tolist(), strict=True):
        pen.rectangle(box, outline=COLOURS[name], width=3)
    words = {"WBC": "white", "RBC": "red", "Platelets": "platelet"}
    return picture, ", ".join(f"{found.names.count(name)} {word}" for name, word in words.items())


def rocket() -> tuple[Image.Image, str]:
    """The 32 pixels of the rocket, enlarged, and its class with the probability."""
    picture = Image.open(ROOT / "examples/images/rocket.jpg").convert("RGB")
    best = spd_zoo.Classifier("cifar_resnet20_pfd")(picture).top(1)[0]
    config = resolve_data_config({"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0})
    pixels = (create_transform(**config)(picture) * 255).round().byte().permute(1, 2, 0).numpy()
    seen = Image.fromarray(pixels).resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
    return seen, f"{best.name}, {100 * best.probability:.0f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture; returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(argv)
    panels = [cells(), rocket()]
    sheet = Image.new("RGB", (sum(image.width for image, _ in panels) + GAP, HEIGHT + LINE), "white")
    pen, left = ImageDraw.Draw(sheet), 0
    for image, caption in panels:
        sheet.paste(image, (left, 0))
        pen.text((left + 4, HEIGHT + 4), caption, "black", ImageFont.load_default(24))
        left += image.width + GAP
    with whole(FILE) as temporary:
        sheet.save(temporary, "png", optimize=True)
    print(f"{FILE.name}: {'; '.join(caption for _, caption in panels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
