"""Training and evaluation of detectors on tiles of large images."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from box_pictures import make_yolo, scene
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from runs import finetune_in_processes, rows_of, same_run, stop_in

from spd_zoo.cli.main import main
from spd_zoo.data.boxes import BoxImages, Objects, Tiling, open_boxes
from spd_zoo.data.boxes.tiles import cut, objects_inside, tile_boxes
from spd_zoo.inference.detector import Detector, trained_on_tiles
from spd_zoo.quantization import export_int8
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.detection import report as box_report
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import Result, Stopped, finetune

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve training and two validation images of 96x64 pixels."""
    return make_yolo(tmp_path / "data", train=12, val=2)


def config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "image_size": "64", "tile": 48, "warmup_epochs": 0}
    options |= {"lr": 1e-3, "workers": 0, "bf16": False, "device": "cpu", "model": "yolov8n_spd"}
    return FinetuneConfig(**options | {"data": data, "out": out} | changes)


def run(data: Path, out: Path, **changes: Any) -> Result:
    result = finetune(config(data, out, **changes))
    assert result is not None
    return result


def images(boxes: list[list[float]], size: tuple[int, int] = (100, 60), **changes: Any) -> BoxImages:
    """One image with boxes of a class, to be cut into tiles of 50 pixels."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(corners)
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    objects = Objects(corners, torch.zeros(count, dtype=torch.long), areas, torch.zeros(count, dtype=torch.bool))
    options: dict[str, Any] = {"tiling": Tiling(50, 0.2)}
    return BoxImages(["a.png"], [size], [objects], ["car"], range(1), **options | changes)


def test_tiles_cover_an_image_and_overlap_by_at_least_what_is_asked() -> None:
    boxes = tile_boxes((100, 60), 50, 0.2)
    assert boxes == [
        (0, 0, 50, 50),
        (25, 0, 75, 50),
        (50, 0, 100, 50),
        (0, 10, 50, 60),
        (25, 10, 75, 60),
        (50, 10, 100, 60),
    ]
    assert tile_boxes((40, 30), 50, 0.2) == [(0, 0, 40, 30)]
    assert tile_boxes((90, 30), 50, 0.2) == [(0, 0, 50, 30), (40, 0, 90, 30)]


def test_an_object_is_clipped_to_a_tile_or_ignored_there_if_less_than_half_is_seen() -> None:
    data = images([[40, 10, 60, 20], [48, 30, 54, 36], [90, 50, 95, 55]])
    inside = objects_inside(data.objects_in(0), (0, 0, 50, 50))
    assert inside.boxes.tolist() == [[40, 10, 50, 20], [48, 30, 50, 36]]
    assert inside.ignored.tolist() == [False, True]
    assert inside.areas.tolist() == [100, 12]


def test_tiles_with_objects_are_in_every_epoch_and_others_are_drawn_for_it() -> None:
    data = images([[10 + 60 * i, 10, 14 + 60 * i, 14] for i in range(16)], (2000, 400))
    tiles = cut(data, (64, 64), 0)
    drawn = [[tiles.in_epoch(i, epoch) for i in range(len(tiles))] for epoch in (0, 1, 0)]
    assert len(tiles) == tiles.with_objects + round(0.25 * tiles.with_objects)
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(len(set(each)) == len(tiles) and max(each) < len(tiles.parts) for each in drawn)
    assert [each[: tiles.with_objects] for each in drawn] == [list(range(tiles.with_objects))] * 3


def test_an_image_with_an_object_that_no_tile_shows_half_of_is_trained_on_as_a_whole() -> None:
    data = images([[0, 0, 100, 60], [10, 10, 20, 20]])
    tiles = cut(data, (32, 32), 0)
    (whole,) = [i for i, (_, box) in enumerate(tiles.parts) if box is None]
    assert whole < tiles.with_objects
    assert tiles.sizes[whole] == (32, 19)
    assert torch.allclose(tiles.objects[whole].boxes[0], torch.tensor([0, 0, 32, 19.0]))
    assert all(bool(tiles.objects[i].ignored[0]) for i in range(len(tiles.parts)) if i != whole)


def test_tiles_are_the_pixels_of_their_image(tmp_path: Path) -> None:
    image, boxes = scene(3)
    image.save(tmp_path / "a.tif", tiffinfo={278: 16})
    corners = [[float(x) for x in box[1:]] for box in boxes]
    data = images(corners, image.size, tiling=Tiling(48, 0.2))
    tiles = cut(
        BoxImages([str(tmp_path / "a.tif")], [image.size], data.objects, ["car"], range(1), tiling=data.tiling),
        (64, 64),
        0,
    )
    for i, (_, box) in enumerate(tiles.parts):
        assert tiles.image(i).size == tiles.sizes[i]
        if box is not None:
            assert tiles.image(i).tobytes() == image.crop(box).tobytes()


@pytest.mark.slow
def test_a_stopped_run_on_tiles_resumes_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_report, "write", lambda *_: None)
    run(folder, tmp_path / "whole")
    stop_in(monkeypatch, 1, 1)
    with pytest.raises(Stopped) as stopped:
        run(folder, tmp_path / "stopped")
    assert stopped.value.number == signal.SIGTERM
    run(folder, tmp_path / "stopped", workers=2)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_train_on_tiles_as_one(folder: Path, tmp_path: Path) -> None:
    shared = {"opt": "momentum", "lr": 0.01}
    one, two = config(folder, tmp_path / "one", **shared, accumulate=2), config(folder, tmp_path / "two", **shared)
    finetune_in_processes(two)
    finetune(one)
    alone, together = (rows_of(run / "metrics.csv") for run in (one.out, two.out))
    for a, b in zip(alone, together, strict=True):
        for name in ("train_loss", "train_box", "train_class", "train_dfl"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-3)
    objects = [[row["objects"] for row in rows_of(run / "per_class.csv")] for run in (one.out, two.out)]
    assert objects[0] == objects[1]


@pytest.mark.slow
def test_a_run_on_tiles_describes_them_and_is_evaluated_on_the_same(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    run(folder, tmp_path / "run", epochs=1)
    printed = capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "data.json").read_text())["tiles"]
    assert (about["side"], about["overlap"], about["val"]) == (48, 0.2, {"images": 2, "views": 14})
    assert about["train"]["with objects"] + about["train"]["without objects"] >= 12 * 6
    assert f"an epoch trains on {about['train']['in an epoch']}" in printed
    assert "val: 2 images in 14 views" in printed
    own, again, whole = (
        evaluate(str(tmp_path / "run"), folder, workers=0, device="cpu", **options)[0]
        for options in ({}, {"tile": 48, "overlap": 0.2}, {"tile": 0})
    )
    assert any("evaluated on tiles of 48 px" in note for note in own.notes)
    assert not any("tiles" in note for note in [*again.notes, *whole.notes])
    assert own.row | {"tile": 48, "overlap": 0.2} == own.row and "tile" not in whole.row
    assert "on tiles of 48 px that overlap by 0.2" in again.in_words() and "tiles" not in whole.in_words()
    detectors = {
        tile: Detector(
            str(tmp_path / "run"),
            device="cpu",
            tile=tile,
            score_threshold=0.001,
            max_detections=300,
        )
        for tile in (48, None)
    }
    data = open_boxes(folder, "val")
    assert data is not None
    for evaluation, tile in ((own, 48), (again, 48), (whole, None)):
        for i, found in enumerate(evaluation.predictions.detections):
            expected = detectors[tile](data.name(i))
            assert torch.allclose(found.scores[:50], expected.scores[:50], atol=1e-5)
            assert torch.allclose(found.boxes[:50], expected.boxes[:50], atol=1e-2)
    limited = evaluate(str(tmp_path / "run"), folder, workers=0, device="cpu", max_detections=5)[0]
    for all_boxes, best in zip(own.predictions.detections, limited.predictions.detections, strict=True):
        assert torch.equal(best.boxes, all_boxes.boxes[:5])  # the limit counts merged boxes, not those of a tile


@pytest.mark.slow
def test_what_is_made_from_a_run_on_tiles_is_used_on_tiles(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    run(folder, tmp_path / "run", epochs=1, model="yolov8n")
    file, before, after = export_int8(str(tmp_path / "run"), folder, tmp_path / "moved.onnx", workers=0)
    for evaluation in (before, after, evaluate(file, folder, workers=0)[0]):
        assert evaluation.row["tile"] == 48
    assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "converted")]) == 0
    assert f"was trained on tiles; use {tmp_path / 'converted'} with --tile 48, too" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["{}", "local-dir:{}", "{}/model.onnx"])
def test_the_tiles_of_a_run_are_known_by_its_folder(name: str, tmp_path: Path) -> None:
    assert trained_on_tiles(name.format(tmp_path)) is None
    (tmp_path / "run.yaml").write_text("tile: 320\noverlap: 0.25\n")
    assert trained_on_tiles(name.format(tmp_path)) == (320, 0.25)
    (tmp_path / "run.yaml").write_text("epochs: 3\n")  # of a version without tiles
    assert trained_on_tiles(name.format(tmp_path)) is None


def large(data: Path) -> None:
    """Adds an image with more pixels than the others, and a box, to the training images."""
    image, boxes = scene(77, (300, 200))
    image.save(data / "images" / "train" / "large.tif", tiffinfo={278: 16})
    lines = [
        f"{label} {(x1 + x2) / 600} {(y1 + y2) / 400} {(x2 - x1) / 300} {(y2 - y1) / 200}"
        for label, x1, y1, x2, y2 in boxes
    ]
    (data / "labels" / "train" / "large.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("tile", [48, 0])
def test_a_tiff_above_the_limit_of_pixels_is_read_by_tiles_or_left_out(
    tile: int, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    large(folder)
    finetune(config(folder, tmp_path / "run", max_pixels=50_000, tile=tile, dry_run=True))
    printed = capsys.readouterr().out
    left_out = "300x200 pixels, more than the limit of 50000; --tile N reads a TIFF in parts, or give --max-pixels"
    assert (left_out in printed) == (not tile)
    assert f"train: {13 if tile else 12} images of 3 classes" in printed


@pytest.mark.slow
@pytest.mark.parametrize("limit", [[], ["--max-pixels", "60000"]])
def test_detection_refuses_large_images_by_themselves(limit: list[str], tmp_path: Path, capsys: Capture) -> None:
    image, _ = scene(5, (300, 200))
    image.save(tmp_path / "large.tif", tiffinfo={278: 16})
    image.save(tmp_path / "large.png")
    scene(6)[0].save(tmp_path / "small.png")
    names = [str(tmp_path / name) for name in ("large.tif", "large.png", "small.png")]
    options = ["--tile", "96", "--image-size", "64", "--device", "cpu", "--out", str(tmp_path / "out")]
    limit = limit or ["--max-pixels", "59999"]
    status = main(["detect", "yolov8n_spd.bccd", *names, *options, *limit])
    errors = capsys.readouterr().err
    assert status == int(limit[1] == "59999")
    assert ("large.png: cannot read this image: it has 300x200 pixels" in errors) == bool(status)
    found = {
        Path(each["file_name"]).name
        for each in json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    }
    assert found == {"large.tif", "small.png"} | (set() if status else {"large.png"})


@pytest.mark.slow
def test_a_detector_finds_the_same_in_a_tiff_that_is_read_by_its_parts(tmp_path: Path) -> None:
    image, _ = scene(5, (300, 200))
    image.save(tmp_path / "large.tif", tiffinfo={278: 16})
    detector = Detector("yolov8n_spd.bccd", image_size=64, tile=96, device="cpu", score_threshold=0.01)
    by_parts, whole = detector(tmp_path / "large.tif"), detector(image)
    assert torch.equal(by_parts.boxes, whole.boxes)
    assert torch.equal(by_parts.scores, whole.scores)
    assert len(whole)


@pytest.mark.slow
def test_a_damaged_part_of_an_image_leaves_the_others(tmp_path: Path, capsys: Capture) -> None:
    image, _ = scene(5, (300, 200))
    image.save(tmp_path / "damaged.tif", compression="tiff_deflate", tiffinfo={278: 16})
    with Image.open(tmp_path / "damaged.tif") as opened:
        assert isinstance(opened, TiffImageFile)
        offset = opened.tag_v2[273][9]
    content = bytearray((tmp_path / "damaged.tif").read_bytes())
    content[offset : offset + 200] = b"\xff" * 200
    (tmp_path / "damaged.tif").write_bytes(content)
    image.save(tmp_path / "good.tif")
    names = [str(tmp_path / name) for name in ("damaged.tif", "good.tif")]
    status = main(["detect", "yolov8n_spd.bccd", *names, "--tile", "96", "--image-size", "64", "--device", "cpu"])
    printed = capsys.readouterr()
    assert status == 1
    assert "damaged.tif: cannot read this image" in printed.err
    assert "good.tif" in printed.out


def test_detect_and_finetune_take_no_overlap_without_tiles(capsys: Capture) -> None:
    with pytest.raises(ValueError, match="overlap is for tiles; give tile, too"):
        FinetuneConfig(model="yolov8n_spd", data="data", out=Path("run"), overlap=0.3)
    assert main(["detect", "yolov8n_spd.bccd", "a.png", "--overlap", "0.3"]) == 1
    assert "--overlap is for tiles; add --tile N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap", "0.3"], "overlap is for tiles; give tile"),
        (["--tile", "0", "--overlap", "0.3"], "overlap is for tiles; give tile"),
        (["--tile", "32", "--overlap", "1"], "overlap from 0 to below 1"),
    ],
)
def test_evaluate_refuses_meaningless_tiles(arguments: list[str], message: str, folder: Path, capsys: Capture) -> None:
    assert main(["evaluate", "yolov8n_spd.bccd", "--data", str(folder), *arguments]) != 0
    assert message in capsys.readouterr().err


def test_a_negative_tile_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="tile must not be negative"):
        evaluate("yolov8n_spd.bccd", str(folder), tile=-1)
