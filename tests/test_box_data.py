"""Images with boxes: their check, classes and splits, and augmentation that moves boxes with their objects."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from box_pictures import COLOURS, NAMES, SIZE, make_coco, make_voc, make_yolo, scenes
from PIL import Image
from torchvision import tv_tensors

from spd_zoo.blocks import ImageSizeError
from spd_zoo.data.boxes import BoxImages, hold_out, open_boxes, with_names
from spd_zoo.data.classes import NetworkClasses, match_classes
from spd_zoo.data.labelled import DataError
from spd_zoo.inference.detector import prepare
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.detection.augment import Sample, box_train_loader, mosaic, window
from spd_zoo.training.finetune import finetune
from spd_zoo.training.steps import Steps

Make = Callable[[Path], Path]


def opened(root: Path, split: str = "train") -> BoxImages:
    data = open_boxes(root, split)
    assert data is not None
    return data


def as_lists(data: BoxImages) -> list[tuple[Any, ...]]:
    order = sorted(range(len(data)), key=data.name)
    return [tuple(part.double().round(decimals=3).tolist() for part in data.objects_in(i)[:3]) for i in order]


@pytest.mark.parametrize("make", [make_coco, make_yolo, make_voc])
def test_all_formats_give_the_same_data(make: Make, tmp_path: Path) -> None:
    data = opened(make(tmp_path / "data"))
    truth = sorted((f"train_{i}", boxes) for i, (_, boxes) in enumerate(scenes(8)))
    assert [shown[0] for shown in as_lists(data)] == [[list(box[1:]) for box in boxes] for _, boxes in truth]
    assert [shown[1] for shown in as_lists(data)] == [[box[0] for box in boxes] for _, boxes in truth]
    areas = [[float((x2 - x1) * (y2 - y1)) for _, x1, y1, x2, y2 in boxes] for _, boxes in truth]
    assert [shown[2] for shown in as_lists(data)] == areas
    assert data.class_names == NAMES and set(data.sizes) == {SIZE} and not data.defects
    assert len(opened(tmp_path / "data", "val")) == 4 and open_boxes(tmp_path / "data", "test") is None


def test_cocos_own_layout_is_read(tmp_path: Path) -> None:
    make_coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "instances_train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    (tmp_path / "instances_val.json").rename(tmp_path / "annotations" / "instances_val2017.json")
    (tmp_path / "images").rename(tmp_path / "train2017")
    assert len(opened(tmp_path)) == 8
    with pytest.raises(DataError, match=r"such as val_0\.png, is in the folders"):
        open_boxes(tmp_path, "val")


def test_class_names_may_be_in_a_text_file_or_a_mapping(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: {0: blue, 1: green, 2: red}")
    assert opened(tmp_path).class_names == NAMES
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("b\ng\nr\n")
    assert opened(tmp_path).class_names == ["b", "g", "r"]


def test_an_image_without_a_label_file_has_no_boxes(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "train_0.txt").unlink()
    data = opened(tmp_path)
    assert len(data) == 8 and len(data.objects_in(0).labels) == 0


def test_invalid_boxes_are_counted_and_left_out(tmp_path: Path) -> None:
    file = make_coco(tmp_path) / "instances_train.json"
    content = json.loads(file.read_text())
    wrong = [
        [-10, 5, 30, 30],
        [90, 60, 500, 500],
        [200, 5, 10, 10],
        [5, 5, 0, 10],
        [5, 5, -3, 10],
        [5, float("nan"), 3, 3],
    ]
    count = len(content["annotations"])
    for box in wrong:
        content["annotations"].append({"id": 1000, "image_id": 7, "category_id": 5, "bbox": box})
    content["annotations"].append({"id": 1001, "image_id": 7, "category_id": 99, "bbox": [1, 1, 5, 5]})
    content["annotations"].append({"id": 1002, "image_id": 999, "category_id": 5, "bbox": [1, 1, 5, 5]})
    file.write_text(json.dumps(content))
    data = opened(tmp_path)
    assert {kind: len(names) for kind, names in data.defects.items()} == {
        "boxes extend beyond their image by more than half a pixel and are clipped": 2,
        "boxes lie outside their image and are left out": 1,
        "boxes have no area and are left out": 1,
        "boxes have a negative or no finite size and are left out": 2,
        "boxes are of an unknown class and are left out": 1,
        "boxes belong to no image of the list and are left out": 1,
    }
    assert sum(data.counts()) == count + 2
    assert data.objects_in(0).boxes[-2:].tolist() == [[0, 5, 20, 35], [90, 60, 96, 64]]
    assert data.objects_in(0).areas[-2:].tolist() == [20 * 30, 6 * 4]


@pytest.mark.parametrize("swapped", [False, True])
def test_boxes_in_another_convention_are_an_error(tmp_path: Path, swapped: bool) -> None:
    file = make_coco(tmp_path, train=16) / "instances_train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x + width, y + height, -width, -height] if swapped else [x, y, x + width, y + height]
    file.write_text(json.dumps(content))
    message = "have a negative or no finite size" if swapped else "are corners given in place of width and height"
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_the_results_of_a_detector_are_no_annotations(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    found = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.9}
    images, categories = [{"id": 1, "file_name": "train_0.png"}], [{"id": 1, "name": "blue"}]
    content = {"images": images, "annotations": [found], "categories": categories}
    (tmp_path / "detections.json").write_text(json.dumps(content))
    assert opened(tmp_path).format.startswith("YOLO")
    with pytest.raises(DataError, match="results of a detector, and no annotations"):
        open_boxes(tmp_path / "detections.json", "train")


def test_labels_beside_the_images_of_each_split_are_read(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    for label in (tmp_path / "labels").rglob("*.txt"):
        label.rename(tmp_path / "images" / label.relative_to(tmp_path / "labels"))
    shutil.rmtree(tmp_path / "labels")
    assert len(opened(tmp_path)) == 8 and len(opened(tmp_path, "val")) == 4


def config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {"image_size": "64", "workers": 0, "device": "cpu", "bf16": False}
    options |= {"model": "yolov8n_spd", "pretrained": False, "data": data, "out": out}
    return FinetuneConfig(**options | changes)


def test_a_dry_run_reports_problems_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "images" / "train" / "train_1.png").write_bytes(b"no image")
    text = root / "labels" / "train" / "train_2.txt"
    text.write_text(text.read_text() + "\n0 1.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n")
    (root / "labels" / "train" / "nothing.txt").write_text("")
    (root / "labels" / "train" / "train_5.txt").unlink()
    assert finetune(config(root, tmp_path / "run", dry_run=True)) is None
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("chosen: random weights, 20 epochs at 64 px, ")
    for line in (
        "train: 7 images of 3 classes, 96x64 to 96x64 pixels",
        "1 image left out as unreadable",
        "1 boxes lie outside their image and are left out",
        "1 boxes are of an unknown class and are left out",
        "1 label files belong to no image",
        "1 image without objects",
    ):
        assert line in printed
    assert not (tmp_path / "run").exists()
    finetune(config(root, tmp_path / "run", dry_run=True, check=False))
    assert "1 boxes lie outside their image and are left out" in capsys.readouterr().out


def test_a_dry_run_refuses_a_size_that_the_network_does_not_take(tmp_path: Path) -> None:
    data = make_yolo(tmp_path / "data")
    with pytest.raises(ImageSizeError, match="height and width must be multiples of 32, got 60x60"):
        finetune(config(data, tmp_path / "run", dry_run=True, image_size="64,60@1"))


def test_an_image_of_another_size_than_its_annotation_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path / "data")
    Image.new("RGB", (64, 96)).save(root / "images" / "train_3.png")
    finetune(config(root, tmp_path / "run", dry_run=True))
    assert "it has 64x96 pixels upright, but its annotation says 96x64" in capsys.readouterr().out


def test_boxes_are_in_the_pixels_of_the_upright_image(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    file = root / "images" / "train" / "train_0.png"
    with Image.open(file) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by a quarter
        image.rotate(90, expand=True).save(file, exif=exif)
    data = opened(root)
    assert data.sizes[0] == SIZE == data.image(0).size
    assert data.objects_in(0).boxes.tolist() == [list(box[1:]) for box in scenes(1)[0][1]]


def test_the_first_image_may_be_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_coco(tmp_path / "data")
    (root / "images" / "train_0.png").unlink()
    finetune(config(root, tmp_path / "run", dry_run=True))
    printed = capsys.readouterr().out
    assert "train: 7 images" in printed and "1 image left out as unreadable" in printed


@pytest.mark.slow
@pytest.mark.parametrize("file", ["data.yaml", "labels/train/train_0.txt"])
def test_a_byte_order_mark_is_ignored(file: str, tmp_path: Path) -> None:
    before = opened(make_yolo(tmp_path)).counts()
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + (tmp_path / file).read_bytes())
    assert opened(tmp_path).counts() == before


def test_images_without_objects_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "labels" / "train" / "train_0.txt").unlink()
    finetune(config(root, tmp_path / "run", dry_run=True))
    assert capsys.readouterr().out.count("1 image without objects") == 1


def damaged_json(root: Path) -> None:
    (make_coco(root) / "instances_train.json").write_text('{"images": [')


def no_boxes_json(root: Path) -> None:
    (make_coco(root) / "instances_train.json").write_text('{"images": [], "annotations": [{}]}')


def no_names(root: Path) -> None:
    (make_yolo(root) / "data.yaml").unlink()


def twice_a_name(root: Path) -> None:
    (make_yolo(root) / "data.yaml").write_text("names: [a, a, b]")


def change_coco(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = make_coco(root) / "instances_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def twice_an_image(root: Path) -> None:
    change_coco(root, lambda content: content["images"][1].update(id=content["images"][0]["id"]))


def twice_a_category(root: Path) -> None:
    change_coco(root, lambda content: content["categories"][1].update(id=content["categories"][0]["id"]))


def no_image(root: Path) -> None:
    change_coco(root, lambda content: content.update(images=[], annotations=[]))


def all_images_lost(root: Path) -> None:
    for file in (make_coco(root) / "images").glob("train_*"):
        file.unlink()


def mixed_keys(root: Path) -> None:
    (make_yolo(root) / "data.yaml").write_text("names: {0: a, b: b}")


def nothing(root: Path) -> None:
    root.mkdir()


def no_train(root: Path) -> None:
    (make_coco(root) / "instances_train.json").unlink()


def empty_val(root: Path) -> None:
    for file in (make_yolo(root) / "labels" / "val").iterdir():
        file.write_text("")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged_json, r"cannot read .*instances_train\.json as JSON"),
        (no_boxes_json, r"instances_train\.json is not in COCO's format"),
        (no_names, r"does not name its classes; add data\.yaml with names, or classes\.txt"),
        (twice_a_name, "has two classes called 'a'"),
        (twice_an_image, r"instances_train\.json has two images with the id \d+; give each an id of its own"),
        (twice_a_category, r"instances_train\.json has two categories with the id \d+; give each"),
        (no_image, r"instances_train\.json lists no image"),
        (all_images_lost, r"none of the images that .*instances_train\.json lists, such as train_0\.png"),
        (mixed_keys, r"data\.yaml needs names: a list of classes, or a mapping"),
        (nothing, "is no data set with boxes: it has neither"),
        (lambda root: None, "there is no folder"),
        (no_train, "has no split train"),
        (empty_val, "the split val has no box of a class that is trained"),
    ],
)
def test_unusable_data_gives_one_sentence(make: Make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        finetune(config(tmp_path / "data", tmp_path / "run", dry_run=True))


def test_held_out_images_are_the_same_every_time(tmp_path: Path) -> None:
    data = opened(make_coco(tmp_path))
    (train, val), again = hold_out(data, 3, 0), hold_out(data, 3, 0)
    assert len(val) == 3 and {train.name(i) for i in range(5)}.isdisjoint({val.name(i) for i in range(3)})
    assert val.rows == again[1].rows != hold_out(data, 3, 1)[1].rows
    with pytest.raises(DataError, match="cannot hold out 8 of 8 images"):
        hold_out(data, 8, 0)


def test_problems_are_counted_in_the_split_of_their_image(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    text = root / "labels" / "train" / "train_0.txt"
    text.write_text(text.read_text() + "\n7 .5 .5 .1 .1")
    (root / "labels" / "train" / "lost.txt").write_text("")
    for seed in range(4):  # the image is held out by one of them, and not by another
        train, val = hold_out(opened(root), 4, seed)
        held = str(root / "images" / "train" / "train_0.png") in {val.file(i) for i in range(4)}
        kind = "boxes are of an unknown class and are left out"
        assert [kind in part.defects for part in (train, val)] == [not held, held]
        assert "label files belong to no image" in train.defects and len(val.defects) == held


def test_classes_are_matched_by_name_and_unknown_ones_counted(tmp_path: Path) -> None:
    data = opened(make_coco(tmp_path))
    blue, green, red = data.counts()
    renamed = with_names(data, ["red", "blue"])
    assert renamed.counts() == [red, blue] and min(blue, green, red) > 0
    (lost,) = renamed.defects.values()
    assert len(lost) == green


def test_a_class_without_a_box_is_left_out_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "data.yaml").write_text(f"names: {[*NAMES, 'violet']}")
    finetune(config(root, tmp_path / "run", dry_run=True))
    printed = capsys.readouterr().out
    assert "train: 8 images of 3 classes" in printed
    assert printed.count("note: 1 class without anything to train on left out: violet") == 1
    finetune(config(root, tmp_path / "run", dry_run=True, check=False))
    assert capsys.readouterr().out.count("note: 1 class without anything") == 1


def test_classes_of_a_detector_are_matched_by_name_or_not_at_all(tmp_path: Path) -> None:
    data = opened(make_coco(tmp_path))
    blue, green, red = data.counts()
    assert match_classes(data, NetworkClasses(["red", "green", "blue", "pink"])).counts() == [red, green, blue, 0]
    capitals = NetworkClasses(["Red", "Green", "Blue"])
    with pytest.raises(DataError, match="the network has no class 'blue'"):
        match_classes(data, capitals)
    assert match_classes(data, capitals, {name.lower(): name for name in capitals.names}).counts() == [red, green, blue]


@pytest.mark.parametrize("make", [make_coco, make_yolo, make_voc])
def test_splits_have_usual_names_in_any_case(make: Make, tmp_path: Path) -> None:
    before = opened(make(tmp_path), "val")
    for path in sorted(tmp_path.rglob("*val*")):
        if path.stem in ("val", "instances_val"):
            path.rename(path.with_name(path.name.replace("val", "Validation")))
    after = opened(tmp_path, "val")
    assert after.counts() == before.counts() and len(after) == 4


def test_with_several_formats_the_one_that_is_read_is_noted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    make_voc(root)
    data = open_boxes(root, "val")
    assert data is not None and data.format == "YOLO"
    assert data.notes == (f"{root} has boxes in the formats of YOLO and Pascal VOC: those of YOLO are read",)


def test_images_without_a_known_suffix_are_counted(tmp_path: Path) -> None:
    folder = make_yolo(tmp_path) / "images" / "train"
    (folder / "notes.doc").write_text("no image")
    (folder / "train_0.png").rename(folder / "train_0.jfif")
    (folder / "train_1.png").rename(folder / "train_1")
    data = opened(tmp_path)
    assert len(data) == 8 and sum(data.counts()) == sum(len(boxes) for _, boxes in scenes(8))
    (note,) = data.notes
    assert note.startswith("1 file in ") and note.endswith(".doc (1)")


def test_the_error_for_an_address_keeps_both_slashes() -> None:
    with pytest.raises(DataError, match=r"https://example\.org/data is an address"):
        open_boxes("https://example.org/data", "train")


def test_a_changed_box_counts_as_changed_data(tmp_path: Path) -> None:
    data = opened(make_yolo(tmp_path))
    text = tmp_path / "labels" / "train" / "train_0.txt"
    text.write_text(text.read_text().replace("0.", "0.0", 1))
    assert opened(tmp_path).fingerprint() != data.fingerprint()


YOLO = {"mosaic": 1.0, "mosaic_off": 1, "zoom": 0.5, "shift": 0.1, "hsv": "0,0,0", "vflip": 0.5}


def augmented(root: Path, model: str, epoch: int, **options: Any) -> list[tuple[torch.Tensor, Any]]:
    data = opened(root)
    net: Any = timm.create_model(model, num_classes=3)
    made = config(root, root / "run", model=model, epochs=3, **options)
    steps = Steps(len(data), 4)
    steps.epoch = epoch
    batches = box_train_loader(data, net, 64, steps, "RGB", made)
    return [(image, target) for images, targets in batches for image, target in zip(images, targets, strict=True)]


@pytest.mark.parametrize(
    ("model", "epoch", "options"), [("yolov8n_spd", 0, YOLO), ("yolov8n_spd", 2, YOLO), ("ssd_mobilenetv1", 0, {})]
)
def test_augmentation_moves_boxes_with_their_squares(
    model: str, epoch: int, options: dict[str, Any], tmp_path: Path
) -> None:
    seen = 0
    for image, target in augmented(make_coco(tmp_path, train=16), model, epoch, **options):
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
            middle = image[:, int((y1 + y2) / 2), int((x1 + x2) / 2)].float()
            middle = middle.flip(0) if model.startswith("ssd") else middle  # SSD takes blue, green, red
            brightest = middle.argmax().item()
            if min(x2 - x1, y2 - y1) >= 4:
                assert brightest == torch.tensor(COLOURS[NAMES[label]]).argmax()
                seen += 1
    assert seen >= 16


def test_a_mosaic_shows_more_than_an_image_and_ends_before_the_last_epochs(tmp_path: Path) -> None:
    root = make_coco(tmp_path, train=16)
    in_mosaics, alone = (
        sum(len(target["labels"]) for _, target in augmented(root, "yolov8n_spd", epoch, **YOLO)) for epoch in (1, 2)
    )
    assert in_mosaics > 1.2 * alone
    assert alone <= sum(opened(root).counts())


def test_an_epoch_is_the_same_whichever_process_reads_it(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    here, there = (augmented(root, "yolov8n_spd", 0, **YOLO, workers=workers) for workers in (0, 2))
    for (image, target), (other, other_target) in zip(here, there, strict=True):
        assert torch.equal(image, other) and torch.equal(target["boxes"], other_target["boxes"])
    assert not torch.equal(augmented(root, "yolov8n_spd", 1, **YOLO)[0][0], here[0][0])


@pytest.mark.parametrize(("model", "options"), [("yolov8n_spd", YOLO), ("ssd_mobilenetv1", {})])
def test_crowds_are_ignored_in_training(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    file = make_coco(tmp_path) / "instances_train.json"
    content = json.loads(file.read_text())
    first = [annotation for annotation in content["annotations"] if annotation["image_id"] % 2]
    for annotation in first:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    data = opened(tmp_path)
    assert sum(data.counts()) == len(content["annotations"]) - len(first) > 0
    seen = 0
    for image, target in augmented(tmp_path, model, 0, **options):
        for (x1, y1, x2, y2), label in zip(target["ignored"].tolist(), target["ignored_labels"].tolist(), strict=True):
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
            if min(x2 - x1, y2 - y1) >= 4:  # it moved with its square
                middle = image[:, int((y1 + y2) / 2), int((x1 + x2) / 2)].float()
                middle = middle.flip(0) if model.startswith("ssd") else middle
                assert middle.argmax() == torch.tensor(COLOURS[NAMES[label]]).argmax()
                seen += 1
    assert seen >= 4


# tiny objects: of 1.3 to 1.8 pixels in the input

WITHOUT_SHIFTS = YOLO | {"zoom": 0.25, "shift": 0.0, "mosaic": 0.0}


def make_tiny(root: Path, objects: int = 19) -> Path:
    """Data whose images of 96x64 pixels have small objects alone, in rows."""
    make_yolo(root, train=16)
    for i, file in enumerate(sorted((root / "labels" / "train").iterdir())):
        side = 1.95 + i / 16 * 0.75  # at 64 pixels two thirds of it
        places = [(6 + 14 * (j % 6), 8 + 14 * (j // 6)) for j in range(objects)]
        file.write_text(
            "\n".join(f"{j % 3} {x / 96} {y / 64} {side / 96} {side / 64}" for j, (x, y) in enumerate(places))
        )
    return root


def objects_in(root: Path, model: str, **options: Any) -> list[torch.Tensor]:
    return [target["boxes"] for _, target in augmented(root, model, 0, **options)]


@pytest.mark.parametrize(("model", "options"), [("yolov8n_spd", WITHOUT_SHIFTS), ("yolov5n_spd", WITHOUT_SHIFTS)])
def test_tiny_objects_stay_unless_the_authors_rule_is_asked_for(
    model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    root = make_tiny(tmp_path)
    kept, authors = (
        sum(map(len, objects_in(root, model, **options, keep_tiny=keep_tiny))) for keep_tiny in (True, False)
    )
    assert kept > 0.8 * 16 * 19 > 0.5 * 16 * 19 > authors  # zoom moves those at the sides out of the image


def test_ssd_keeps_objects_that_its_expansion_makes_tiny(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    kept, authors = (objects_in(root, "ssd_mobilenetv1", keep_tiny=keep_tiny) for keep_tiny in (True, False))
    smallest, authors_smallest = (
        min((boxes[:, 2:] - boxes[:, :2]).min() for boxes in found if len(boxes)) for found in (kept, authors)
    )
    assert smallest < 0.64 < authors_smallest  # a hundredth of the image


@pytest.mark.parametrize(("model", "options"), [("yolov8n_spd", YOLO | {"zoom": 0.1}), ("yolov5n_spd", WITHOUT_SHIFTS)])
def test_objects_that_are_not_tiny_are_augmented_as_by_the_authors(
    model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    root = make_coco(tmp_path, train=16)
    ours, authors = (objects_in(root, model, **options, keep_tiny=keep_tiny) for keep_tiny in (True, False))
    assert sum(map(len, ours)) > 16 and all(map(torch.equal, ours, authors))


def sample_of(*boxes: tuple[float, float, float, float], size: int = 64) -> Sample:
    shape = torch.zeros(3, size, size, dtype=torch.uint8)
    made = tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=(size, size))
    labels = torch.zeros(len(boxes), dtype=torch.long)
    return {"image": tv_tensors.Image(shape), "boxes": made, "labels": labels, "ignored": labels.bool()}


def test_a_sliver_of_a_larger_object_is_dropped_and_a_tiny_one_stays_while_half_of_its_side_is_seen() -> None:
    left = [
        (-18.1, 20.0),
        (-1.0, 2.0),
        (-0.5, 1.0),
        (-0.8, 0.7),
        (-2.5, 1.5),
        (3.0, 4.0),
    ]  # from x1 to x2, input from 0
    sample = sample_of(*((32 + x1, 40.0, 32 + x2, 60.0) for x1, x2 in left), size=128)
    for keep_tiny, expected in ((False, [20.0]), (True, [20.0, 2.0, 1.0, 1.0])):
        boxes = window(sample, 64, 0.0, 0.0, keep_tiny)["boxes"]
        assert (boxes[:, 2] - boxes[:, 0]).tolist() == pytest.approx(expected)


def test_a_mosaic_keeps_the_sizes_of_objects_before_clipping() -> None:
    torch.manual_seed(0)
    slivers = 0
    for _ in range(20):
        made = mosaic([sample_of((0.0, 0.0, 40.0, 40.0)) for _ in range(4)], 64)
        sides = (made["boxes"][:, 2:] - made["boxes"][:, :2]).as_subclass(torch.Tensor)
        assert (made["sides"] == 40).all()
        slivers += int((sides < 30).any())
    assert slivers


def test_a_network_learns_from_objects_below_a_pixel_with_finite_numbers() -> None:
    boxes = torch.tensor([[10.0, 10.0, 10.3, 10.2], [20.0, 4.0, 20.001, 4.001], [4.0, 4.0, 4.6, 12.0]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 1, 2])}
    for name in ("yolov8n_p2", "yolov5n_spd", "ssd_mobilenetv1"):
        net: Any = timm.create_model(name, num_classes=3).eval()
        size = (300, 300) if name.startswith("ssd") else (64, 64)
        terms = net.loss(net(torch.rand(1, 3, *size)), [target], size)
        sum(terms.values()).backward()
        assert all(term.isfinite() for term in terms.values()), (name, terms)
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in net.parameters()), name


@pytest.mark.slow
def test_an_epoch_without_any_box_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tiny(tmp_path / "data")
    options: dict[str, Any] = WITHOUT_SHIFTS | {"zoom": 0.0, "epochs": 1, "warmup_epochs": 0, "device": "cpu"}
    options |= {"image_size": "64", "batch_size": 8, "bf16": False}
    finetune(config(root, tmp_path / "run", **options, keep_tiny=False))
    line = "note: no box contributed to train_box and train_dfl in epoch 1"
    assert line in capsys.readouterr().out and line in (tmp_path / "run" / "log.txt").read_text()
    finetune(config(root, tmp_path / "kept", **options))
    assert "no box contributed" not in capsys.readouterr().out
    assert "keep_tiny: true" in (tmp_path / "kept" / "run.yaml").read_text()


def test_training_and_evaluation_feed_ssd_the_same_colours(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    for split in ("train", "val"):  # without boxes SSD's augmentation leaves images alone
        content = json.loads((root / f"instances_{split}.json").read_text())
        (root / f"instances_{split}.json").write_text(json.dumps(content | {"annotations": []}))
    net: Any = timm.create_model("ssd_mobilenetv1", num_classes=3)
    data = opened(root)
    (images, _), *_ = box_train_loader(data, net, 64, Steps(8, 8), "RGB", config(root, root, model="ssd_mobilenetv1"))
    prepared = torch.stack([prepare(data.image(i), net, (64, 64))[0] for i in range(8)])
    mean = 255 * torch.tensor(net.pretrained_cfg["mean"])[:, None, None]
    differences = [min((image - mean - other).abs().max().item() for other in prepared) for image in images.float()]
    assert max(differences) < 2.5  # of 255; Pillow and torch round differently
