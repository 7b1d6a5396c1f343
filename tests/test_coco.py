"""Found objects as COCO files: every number and name is there, and other readers find them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from spd_zoo.coco import write_coco
from spd_zoo.detect import Detections
from spd_zoo.training.box_data import open_boxes

NAMES = ["cell", "platelet"]


def objects(*rows: tuple[tuple[float, ...], float, int]) -> Detections:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.long))


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Detections]:
    """What was found in two images in `tmp_path / "val"`, one of them in a folder of its own."""
    (tmp_path / "val" / "b").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "val" / "a.png")
    Image.new("L", (32, 16)).save(tmp_path / "val" / "b" / "c.png")
    first = objects(((1.0, 2.0, 11.0, 22.0), 0.75, 1), ((0.0, 0.0, 64.0, 48.0), 0.5, 0))
    return {"a.png": first, "b/c.png": objects()}


def test_every_box_is_written_with_its_image_class_and_score(found: dict[str, Detections], tmp_path: Path) -> None:
    write_coco(tmp_path / "new" / "found.json", tmp_path / "val", found, NAMES)
    content = json.loads((tmp_path / "new" / "found.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a.png", "width": 64, "height": 48},
        {"id": 2, "file_name": "b/c.png", "width": 32, "height": 16},
    ]
    assert content["categories"] == [{"id": 1, "name": "cell"}, {"id": 2, "name": "platelet"}]
    shared = {"image_id": 1, "iscrowd": 0}
    assert content["annotations"] == [
        {"id": 1, "category_id": 2, "bbox": [1, 2, 10, 20], "area": 200, "score": 0.75, **shared},
        {"id": 2, "category_id": 1, "bbox": [0, 0, 64, 48], "area": 3072, "score": 0.5, **shared},
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["found.json"]


def test_what_was_found_can_be_trained_on(found: dict[str, Detections], tmp_path: Path) -> None:
    write_coco(tmp_path / "instances_val.json", tmp_path / "val", found, NAMES)
    data = open_boxes(tmp_path, "val")
    assert data is not None and data.class_names == NAMES and not any(data.defects.values())
    for i, expected in enumerate(found.values()):
        assert torch.equal(data.shown(i).boxes, expected.boxes) and torch.equal(data.shown(i).labels, expected.labels)


def test_an_image_that_was_turned_has_the_size_in_which_objects_were_found(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by a quarter
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.jpg", exif=exif)
    write_coco(tmp_path / "found.json", tmp_path, {"turned.jpg": objects()}, NAMES)
    (image,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert (image["width"], image["height"]) == (48, 64)


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("a.png", NAMES[:1], "a.png has the label 1, but there are 1 class names"),
        ("missing.png", NAMES, "missing.png: there is no such file"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_written(
    name: str, names: list[str], message: str, found: dict[str, Detections], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_coco(tmp_path / "found.json", tmp_path / "val", {name: found["a.png"]}, names)
    assert not list(tmp_path.glob("found*"))
