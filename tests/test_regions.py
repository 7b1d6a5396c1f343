"""Reading regions of images, and images of very many pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spd_zoo.data.reading import read_image
from spd_zoo.data.regions import TiffRegions, bands, open_regions

BOXES = ((0, 0, 100, 70), (37, 21, 90, 66), (-5, 40, 20, 90))
STRIPED = {
    "raw": ("RGB", {}),
    "raw, one strip": ("RGB", {"tiffinfo": {278: 70}}),
    "deflate": ("RGB", {"compression": "tiff_deflate", "tiffinfo": {278: 16}}),
    "LZW with a predictor": ("RGB", {"compression": "tiff_lzw", "tiffinfo": {278: 16, 317: 2}}),
    "JPEG": ("RGB", {"compression": "jpeg", "tiffinfo": {278: 16}}),
    "grey": ("L", {"compression": "packbits", "tiffinfo": {278: 16}}),
    "16 bits": ("I;16", {"tiffinfo": {278: 16}}),
    "palette": ("P", {"tiffinfo": {278: 16}}),
    "transparent": ("RGBA", {"compression": "tiff_lzw", "tiffinfo": {278: 16}}),
    "black and white": ("1", {"compression": "group4", "tiffinfo": {278: 16}}),
    "big endian": ("I;16B", {"tiffinfo": {278: 16}}),
    "BigTIFF": ("RGB", {"big_tiff": True, "tiffinfo": {278: 16}}),
}


def pixels(mode: str) -> Image.Image:
    """Noise of 100x70 pixels."""
    rng = np.random.default_rng(0)
    if mode.startswith("I;16"):
        order = ">" if mode.endswith("B") else "<"
        return Image.frombytes(mode, (100, 70), rng.integers(0, 65536, (70, 100)).astype(f"{order}u2").tobytes())
    return Image.fromarray(rng.integers(0, 256, (70, 100, 4), dtype=np.uint8), "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("case", STRIPED)
def test_regions_of_a_striped_tiff_are_those_of_the_whole_image(case: str, mode: str, tmp_path: Path) -> None:
    stored, options = STRIPED[case]
    pixels(stored).save(tmp_path / "image.tif", **options)
    image, whole = open_regions(tmp_path / "image.tif", mode), read_image(tmp_path / "image.tif", mode)
    assert isinstance(image, TiffRegions)
    assert image.size == (100, 70)
    for box in BOXES:
        assert image.crop(box).tobytes() == whole.crop(box).tobytes()
    assert b"".join(band.tobytes() for band in bands(image)) == whole.tobytes()
