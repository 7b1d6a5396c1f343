"""Reading regions of images, and images of very many pixels."""

import pickle
import struct
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spd_zoo.data import regions
from spd_zoo.data.reading import read_image
from spd_zoo.data.regions import PartError, Recent, TiffRegions, bands, open_regions, reduced

BOXES = ((0, 0, 100, 70), (37, 21, 90, 66), (-5, 40, 20, 90))
STRIPED: dict[str, tuple[str, dict[str, Any]]] = {
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


def write_tiled(file: Path, image: Image.Image, side: int, order: str = "<") -> None:
    """Writes a TIFF of tiles, not compressed; Pillow writes strips only."""
    width, height = image.size
    bands_ = len(image.getbands())
    boxes = [(x, y, x + side, y + side) for y in range(0, height, side) for x in range(0, width, side)]
    data = [image.crop(box).tobytes() for box in boxes]
    starts = [8 + i * len(data[0]) for i in range(len(data))]
    lengths = [len(data[0])] * len(data)
    photometric = 2 if bands_ == 3 else 1
    entries = [(256, [width]), (257, [height]), (258, [8] * bands_), (259, [1]), (262, [photometric])]
    entries += [(277, [bands_]), (322, [side]), (323, [side]), (324, starts), (325, lengths)]
    start = 8 + len(data) * len(data[0])
    more_at, table, more = start + 6 + 12 * len(entries), b"", b""
    for tag, values in entries:
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(values) > 1:
            more += packed
            packed = struct.pack(f"{order}L", more_at + len(more) - len(packed))
        table += struct.pack(f"{order}HHL", tag, 4, len(values)) + packed
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, start)
    count = struct.pack(f"{order}H", len(entries))
    file.write_bytes(header + b"".join(data) + count + table + b"\0" * 4 + more)


@pytest.mark.parametrize(("mode", "order"), [("RGB", "<"), ("L", ">")])
def test_only_the_tiles_of_a_tiff_that_a_region_touches_are_decoded(mode: str, order: str, tmp_path: Path) -> None:
    write_tiled(tmp_path / "image.tif", pixels(mode), 32, order)
    image, whole = open_regions(tmp_path / "image.tif", mode), read_image(tmp_path / "image.tif", mode)
    assert whole.tobytes() == pixels(mode).tobytes()
    assert isinstance(image, TiffRegions)
    for box in BOXES:
        assert image.crop(box).tobytes() == whole.crop(box).tobytes()
    fresh = open_regions(tmp_path / "image.tif", mode)
    assert isinstance(fresh, TiffRegions)
    fresh.crop((40, 10, 70, 30))
    assert len(fresh.recent) == 2


def test_regions_are_read_from_bytes_too(tmp_path: Path) -> None:
    pixels("RGB").save(tmp_path / "image.tif", tiffinfo={278: 16})
    image = open_regions(BytesIO((tmp_path / "image.tif").read_bytes()))
    assert isinstance(image, TiffRegions)
    assert image.crop(BOXES[1]).tobytes() == pixels("RGB").crop(BOXES[1]).tobytes()


@pytest.mark.parametrize("turned", [False, True])
def test_an_image_whose_pixels_depend_on_each_other_is_read_as_a_whole(turned: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6 if turned else 1
    image = pixels("RGB") if turned else Image.new("I", (100, 70), 300)
    image.save(tmp_path / "image.tif", exif=exif)
    read = open_regions(tmp_path / "image.tif")
    assert isinstance(read, Image.Image)
    assert read.size == ((70, 100) if turned else (100, 70))


def test_recent_images_are_kept_within_bytes_but_at_least_one() -> None:
    recent: Recent[int] = Recent(10)
    read: list[int] = []

    def make(value: int) -> int:
        read.append(value)
        return value

    for value in (4, 5, 4, 3, 4, 5, 90, 90):
        assert recent.get(value, partial(make, value), int) == value
    assert read == [4, 5, 3, 5, 90]
    assert len(recent) == 1
    assert len(pickle.loads(pickle.dumps(recent))) == 0


def test_a_large_image_is_averaged_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pixels("RGB").resize((700, 500))
    image.save(tmp_path / "image.tif", tiffinfo={278: 16})
    monkeypatch.setattr(regions, "_SMALL", 1000)
    monkeypatch.setattr(regions, "BAND", 64)
    small = reduced(open_regions(tmp_path / "image.tif"), (70, 60))
    assert small.tobytes() == image.reduce(5).tobytes()
    assert reduced(image, (70, 60)) is image


def test_an_image_above_the_limit_of_pixels_is_refused_with_the_options_that_help(tmp_path: Path) -> None:
    pixels("RGB").save(tmp_path / "image.png")
    pixels("RGB").save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=r"100x70 pixels, more than the limit of 6999; give --max-pixels 7000"):
        read_image(tmp_path / "image.png", max_pixels=6999)
    with pytest.raises(ValueError, match="--tile N reads a TIFF in parts, or give --max-pixels"):
        read_image(tmp_path / "image.tif", max_pixels=6999)
    assert open_regions(tmp_path / "image.tif", max_pixels=6999).size == (100, 70)
    with pytest.raises(ValueError, match="give --max-pixels 7000"):
        open_regions(tmp_path / "image.png", max_pixels=6999)


def test_the_limit_of_pillow_is_lifted_for_one_image_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pixels("RGB").save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png", max_pixels=7000).size == (100, 70)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(ValueError, match="exceeds limit"):
        read_image(tmp_path / "image.png")


def test_a_damaged_part_is_an_error_where_it_is_needed(tmp_path: Path) -> None:
    pixels("RGB").save(tmp_path / "image.tif", compression="tiff_deflate", tiffinfo={278: 16})
    content = bytearray((tmp_path / "image.tif").read_bytes())
    image = open_regions(BytesIO(bytes(content)))
    assert isinstance(image, TiffRegions)
    offset, size = image.table[-1]
    content[offset : offset + size] = b"\xff" * size
    damaged = open_regions(BytesIO(bytes(content)))
    assert damaged.crop((0, 0, 100, 60)).tobytes() == image.crop((0, 0, 100, 60)).tobytes()
    with pytest.raises(PartError, match="cannot read this image"):
        damaged.crop((0, 50, 100, 70))
