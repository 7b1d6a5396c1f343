"""The comparison of training and evaluation on whole images and on tiles."""

import json
from pathlib import Path

import compare_tiles
import pytest
from box_pictures import scene


def names() -> list[Path]:
    """Images of all sources."""
    starts = ("MOS", "MunichStreet02-MOS")
    found = [Path(f"{start}{i}.png") for start in starts for i in range(74, 94)]
    found += [Path(f"MOS{i}.png") for i in range(155, 180)] + [Path(f"DJI_{i:04}.JPG") for i in range(6, 21)]
    return found + [Path(f"{start}-{i:04}.jpg") for start in ("harlem", "DJI_0005", "DJI-00760") for i in range(10)]


def test_sources_are_either_trained_on_or_validated_with() -> None:
    images, seen = names(), set()
    for seed in range(6):
        train, val = compare_tiles.split(images, seed)
        assert sorted(train + val) == sorted(images)
        assert len(val) >= 0.2 * len(images)
        for source in ("harlem-", "DJI_0005-", "DJI-00760-", "MOS1"):
            assert len({image in val for image in images if image.name.startswith(source)}) == 1
        assert len({image in val for image in images if "MOS8" in image.name}) == 1
        seen.add(tuple(val))
    assert len(seen) > 1


def write_aerial(data: Path, images: int) -> None:
    """Writes a data set like aerial-cars, of three sources."""
    data.mkdir()
    (data / "aerial.names").write_text("car\ntruck\nbus\n")
    for i in range(images):
        image, boxes = scene(i, (160, 120))
        name = f"{('harlem-0', 'harlem-1', 'DJI_0005-', 'MOS10', 'MOS11', 'MOS12')[i % 6]}{i // 6}"
        image.save(data / f"{name}.png")
        lines = (
            f"{label} {(x1 + x2) / 320} {(y1 + y2) / 240} {(x2 - x1) / 160} {(y2 - y1) / 120}"
            for label, x1, y1, x2, y2 in boxes
        )
        (data / f"{name}.txt").write_text("\n".join(lines))


def test_too_few_images_for_a_batch_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_aerial(tmp_path / "data", 12)
    assert compare_tiles.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), "--tile", "64"]) == 1
    assert "training images; a batch needs 16" in capsys.readouterr().err


@pytest.mark.slow
def test_three_combinations_are_recorded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    write_aerial(data, 36)
    command = ["--data", str(data), "--out", str(tmp_path / "runs"), "--seeds", "1"]
    command += ["--image-size", "64", "--tile", "64"]
    assert compare_tiles.main([*command, "--images", "64", "--workers", "0"]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs" / "tiles.jsonl").read_text().splitlines()]
    assert [(each["trained"], each["evaluated"]) for each in records] == list(compare_tiles.COMBINATIONS)
    assert all(abs(each["inputs"] - 64) <= 48 for each in records)
    capsys.readouterr()
    assert compare_tiles.main([*command, "--images", "64", "--workers", "0"]) == 0
    assert "| whole | tiles |" in capsys.readouterr().out
    assert len((tmp_path / "runs" / "tiles.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("line", ['{"seed": 0, "trai', '{"seed": 0}', "[]"])
def test_a_file_of_other_records_is_refused_in_a_sentence(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiles.jsonl").write_text(f"{line}\n")
    assert compare_tiles.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "tiles.jsonl, line 1 " in capsys.readouterr().err
    assert (tmp_path / "tiles.jsonl").read_text() == f"{line}\n"
