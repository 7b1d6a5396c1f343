"""Annotation formats of images with boxes: what is found, what is guessed, and what is wrong with lines."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from box_pictures import NAMES, SIZE, make_coco, make_voc, make_yolo, scenes
from PIL import Image

from spd_zoo.cli.main import main
from spd_zoo.data.boxes import BoxImages, found_in_words, open_boxes, with_names
from spd_zoo.data.boxes.sizes import describe_sizes, sizes_in_words
from spd_zoo.data.boxes.writing import convert_data
from spd_zoo.data.classes import without_unused
from spd_zoo.data.labelled import DataError

Lines = dict[str, str]


def opened(data: Path, split: str = "train") -> BoxImages:
    found = open_boxes(data, split)
    assert found is not None
    return found


def boxes_of(data: BoxImages) -> dict[str, list[list[float]]]:
    """The boxes of each image by the stem of its name."""
    return {
        Path(data.name(i)).stem: data.objects_in(i).boxes.double().round(decimals=2).tolist() for i in range(len(data))
    }


def truth(count: int = 8, first: int = 0, name: str = "train") -> dict[str, list[list[float]]]:
    return {f"{name}_{i}": [list(box[1:]) for box in boxes] for i, (_, boxes) in enumerate(scenes(count, first))}


def one_image(root: Path, lines: str, name: str = "a", size: tuple[int, int] = (100, 50)) -> Path:
    """`images` and `labels` with one image, and two classes."""
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / "images" / "train" / f"{name}.png")
    (root / "labels" / "train" / f"{name}.txt").write_text(lines)
    (root / "data.yaml").write_text("names: [cat, dog]\n")
    return root


# YOLO: where things are


def test_data_yaml_decides_which_folders_are_read(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / kind / "small")
        (root / kind / "train").mkdir()
        (root / kind / "train").rmdir()
    make_yolo(tmp_path / "other")
    for kind in ("images", "labels"):  # of the usual name, and not what data.yaml says
        (tmp_path / "other" / kind / "train").rename(root / kind / "train")
    (root / "data.yaml").write_text(yaml.safe_dump({"train": "images/small", "val": "images/val", "names": NAMES}))
    for data in (root, root / "data.yaml"):
        found = opened(data)
        assert {Path(file).parent.name for file in found.files} == {"small"} and boxes_of(found) == truth()
        assert found_in_words({"train": found, "val": opened(data, "val")}) == (
            "YOLO by data.yaml: train 8 images in images/small, val 4 images in images/val"
        )


def by_path(root: Path) -> Any:
    return {"path": str(root), "train": "images/train", "val": "images/val"}


def by_relative_path(root: Path) -> Any:
    return {"path": "../data", "train": "images/train", "val": "images/val"}


def by_lost_path(root: Path) -> Any:
    return {"path": "/content/datasets/cells", "train": "images/train", "val": "images/val"}


def by_several(root: Path) -> Any:
    (root / "images" / "more").mkdir()
    (root / "labels" / "more").mkdir()
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        name = f"train_0.{suffix}"
        (root / kind / "train" / name).rename(root / kind / "more" / name)
    return {"train": ["images/train", "images/more"], "val": "images/val"}


def by_list(root: Path) -> Any:
    (root / "train.txt").write_text("\n".join(f"./images/train/train_{i}.png" for i in range(8)))
    return {"train": "train.txt", "val": "images/val"}


def by_stale_list(root: Path) -> Any:
    (root / "train.txt").write_text("\n".join(f"C:\\data\\images\\train\\train_{i}.png" for i in range(8)))
    return {"train": "train.txt", "val": "images/val"}


def by_roboflow(root: Path) -> Any:
    for split in ("train", "val"):
        (root / split).mkdir()
        for kind in ("images", "labels"):
            (root / kind / split).rename(root / split / kind)
    return {"train": "../train/images", "val": "../val/images", "test": "../test/images"}


@pytest.mark.parametrize(
    ("make", "noted"),
    [
        (by_path, ""),
        (by_relative_path, ""),
        (by_lost_path, "path /content/datasets/cells, which does not exist"),
        (by_several, ""),
        (by_list, ""),
        (by_stale_list, "8 paths in "),
        (by_roboflow, "whose images ../test/images do not exist"),
    ],
)
def test_data_yaml_names_images_in_every_usual_way(make: Callable[[Path], Any], noted: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "data.yaml").write_text(yaml.safe_dump(make(root) | {"names": NAMES, "nc": 3}))
    data = opened(root / "data.yaml")
    assert boxes_of(data) == truth() and len(opened(root, "val")) == 4
    assert any(noted in note for note in data.notes) if noted else not data.notes
    assert open_boxes(root, "test") is None


def test_missing_images_of_data_yaml_are_an_error_and_no_missing_split(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "val": "images/vall", "names": NAMES}))
    assert len(opened(root)) == 8
    with pytest.raises(DataError, match=r"data\.yaml has the images of val in images/vall, which is not in"):
        open_boxes(root, "val")


@pytest.mark.parametrize("names", [NAMES, dict(enumerate(NAMES)), {str(i): name for i, name in enumerate(NAMES)}])
def test_names_are_a_list_or_a_mapping(names: Any, tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "data.yaml").write_text(yaml.safe_dump({"names": names, "nc": 3}))
    assert opened(root).class_names == NAMES and not opened(root).notes
    (root / "data.yaml").write_text(yaml.safe_dump({"names": names, "nc": 4}))
    with pytest.raises(DataError, match=r"says that there are 4 classes \(nc\), but names 3"):
        open_boxes(root, "train")


def test_names_numbered_from_1_are_read_with_a_note(tmp_path: Path) -> None:
    root = one_image(tmp_path, "1 .5 .5 .2 .2\n2 .2 .2 .1 .1")
    (root / "data.yaml").write_text("names: {1: cat, 2: dog}")
    data = opened(root)
    assert data.objects_in(0).labels.tolist() == [0, 1] and data.class_names == ["cat", "dog"]
    assert any("numbers its classes from 1 on" in note for note in data.notes)


def test_names_are_read_as_text(tmp_path: Path) -> None:
    root = one_image(tmp_path, "0 .5 .5 .2 .2\n1 .2 .2 .1 .1")
    for names in ("[yes, no, 010]", "{0: yes, 1: no, 2: 010}"):
        (root / "data.yaml").write_text(f"names: {names}")
        assert opened(root).class_names == ["yes", "no", "010"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("names: [cat]", r"does not say where images are, and .* has no folders images and labels"),
        ("epochs: 3", "names neither classes"),
        ("names: [cat", "data.yaml"),
    ],
)
def test_a_data_yaml_that_leads_nowhere_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=problem):
        open_boxes(tmp_path / "data.yaml", "train")


def test_yaml_files_of_other_things_are_no_data_yaml(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "args.yaml").write_text("task: detect\ntrain: true\nnames: null\n")
    (root / "._data.yaml").write_bytes(b"\x00\x05\x16\x07")
    (root / "data.yaml").rename(root / "cells.yaml")
    assert boxes_of(opened(root)) == truth() and not opened(root).notes
    with pytest.raises(DataError, match=r"args\.yaml names neither classes \(names\) nor images"):
        open_boxes(root / "args.yaml", "train")


def split_first(root: Path) -> None:
    by_roboflow(root)


def flat(root: Path) -> None:
    for kind in ("images", "labels"):
        for file in list((root / kind / "train").iterdir()):
            file.rename(root / kind / file.name)
        for file in list((root / kind / "val").iterdir()):
            file.unlink()
        for split in ("train", "val"):
            (root / kind / split).rmdir()


def flat_with_lists(root: Path) -> None:
    flat(root)
    (root / "train.txt").write_text("\n".join(f"images/train_{i}.png" for i in range(8)))
    Image.new("RGB", SIZE).save(root / "images" / "unlisted.png")


def other_names(root: Path) -> None:
    (root / "images" / "train").rename(root / "images" / "train2017")


def beside(root: Path) -> None:
    flat(root)
    for kind in ("images", "labels"):
        for file in list((root / kind).iterdir()):
            file.rename(root / file.name)
        (root / kind).rmdir()


def beside_in_splits(root: Path) -> None:
    for split in ("train", "val"):
        (root / "images" / split).rename(root / split)
        for file in list((root / "labels" / split).iterdir()):
            file.rename(root / split / file.name)
        (root / "labels" / split).rmdir()
    (root / "images").rmdir()
    (root / "labels").rmdir()


def darknet(root: Path) -> None:
    """What CVAT exports as YOLO 1.1."""
    beside(root)
    (root / "data.yaml").unlink()
    (root / "obj.names").write_text("\n".join(NAMES))
    (root / "obj_train_data").mkdir()
    for file in [*root.glob("*.png"), *root.glob("train_*.txt")]:
        file.rename(root / "obj_train_data" / file.name)
    (root / "train.txt").write_text("\n".join(f"data/obj_train_data/train_{i}.png" for i in range(8)))
    (root / "obj.data").write_text("classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")


@pytest.mark.parametrize(
    "change",
    [split_first, flat, flat_with_lists, other_names, beside, beside_in_splits, darknet],
    ids=lambda f: f.__name__,
)
def test_every_layout_is_found(change: Callable[[Path], None], tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    change(root)
    data = opened(root)
    assert boxes_of(data) == truth() and data.class_names == NAMES and not data.defects


def test_a_list_file_is_a_data_set(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "chosen.txt").write_text("\n".join(f"images/train/train_{i}.png" for i in (1, 5)))
    (root / "classes.txt").write_text("\n".join(NAMES))
    assert boxes_of(opened(root / "chosen.txt")) == {name: truth()[name] for name in ("train_1", "train_5")}
    (root / "chosen.txt").write_text("red\ngreen\n")
    with pytest.raises(DataError, match=r"chosen\.txt does not list images"):
        open_boxes(root / "chosen.txt", "train")


def test_images_none_of_which_has_labels_are_no_background(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    for file in (root / "labels" / "train").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no image of .*train has a label file; .*train_0\.png needs .*train_0\.txt"):
        open_boxes(root, "train")


# YOLO: lines


def test_polygons_and_oriented_boxes_become_their_extent(tmp_path: Path) -> None:
    root = one_image(tmp_path, "0 .1 .2 .5 .2 .3 .8\n1 .2 .1 .4 .3 .3 .5 .1 .3\n")
    expected = torch.tensor([[10.0, 10, 50, 40], [10, 5, 40, 25]])
    torch.testing.assert_close(opened(root).objects_in(0).boxes, expected)


def test_numbers_of_classes_may_have_a_point_and_lines_a_confidence(tmp_path: Path) -> None:
    data = opened(one_image(tmp_path, "1.0 .5 .5 .2 .4 0.87\n0 .5 .5 .1 .1"))
    assert data.objects_in(0).labels.tolist() == [1, 0]
    assert data.objects_in(0).boxes[0].tolist() == pytest.approx([40, 15, 60, 35])
    assert {sort: len(found) for sort, found in data.problems().items()} == {
        "lines end with a confidence, which is left out": 1
    }


def test_keypoints_are_no_polygons(tmp_path: Path) -> None:
    root = one_image(tmp_path, "0 .5 .5 .2 .4 .9 .9 .01 .01")
    (root / "data.yaml").write_text("names: [cat, dog]\nkpt_shape: [2, 2]\n")
    data = opened(root)
    assert data.objects_in(0).boxes[0].tolist() == pytest.approx([40, 15, 60, 35])
    assert any("keypoints" in note for note in data.notes)


def test_a_repeated_line_counts_once(tmp_path: Path) -> None:
    data = opened(one_image(tmp_path, "0 .5 .5 .2 .4\n0 .5 .5 .2 .4\n1 .5 .5 .2 .4\n"))
    assert data.objects_in(0).labels.tolist() == [0, 1]
    assert data.problems() == {
        "boxes are annotated twice and count once": [f"{tmp_path / 'labels' / 'train' / 'a.txt'} line 2"]
    }


@pytest.mark.parametrize(
    "bad", ["0 .5 .5 .1", "cat .5 .5 .1 .1", "0.5 .5 .5 .1 .1", "0 .5 .5 .1 .1 \xe9", "nan 1 1 1 1"]
)
def test_one_bad_line_is_counted_with_its_file_and_number(bad: str, tmp_path: Path) -> None:
    root = one_image(tmp_path, "")
    (root / "labels" / "train" / "a.txt").write_bytes(f"0 .5 .5 .2 .4\n{bad}\n".encode("latin-1"))
    data = opened(root)
    assert len(data.objects_in(0).labels) == 1
    assert list(data.problems().values()) == [[f"{root / 'labels' / 'train' / 'a.txt'} line 2"]]


def test_ten_bad_lines_above_one_per_cent_are_an_error_that_lists_them(tmp_path: Path) -> None:
    good = "".join(f"0 .5 .5 .2 {0.1 + i / 10000:.4f}\n" for i in range(900))
    (nine,) = opened(one_image(tmp_path, good + "0 .5 .5\n" * 9)).problems().values()
    assert len(nine) == 9
    one_image(tmp_path, good + "0 .5 .5\n" * 9 + "5 .5 .5 .1 .1\n")
    with pytest.raises(DataError, match=r"10 of 910 boxes in .*train cannot be used, and at most 1 % may") as error:
        open_boxes(tmp_path, "train")
    assert "a.txt line 901" in str(error.value) and "a.txt line 910" in str(error.value)
    more = "".join(f"1 .5 .5 .2 {0.1 + i / 10000:.4f}\n" for i in range(100))
    one_image(tmp_path, good + more + "0 .5 .5\n" * 9 + "5 .5 .5 .1 .1\n")
    assert len(opened(tmp_path).objects_in(0).labels) == 1000


def test_pixels_are_no_fractions(tmp_path: Path) -> None:
    root = one_image(tmp_path, "0 50 25 20 20\n1 .5 .5 .1 .1\n0 30 12 9 5")
    with pytest.raises(DataError, match=r"look like pixels, .*a\.txt line 1: '0 50 25 20 20'; divide x and width by"):
        open_boxes(root, "train")
    one_image(root, "0 50 25 20 20\n1 .5 .5 .1 .1\n1 .2 .2 .1 .1")
    assert [sort.partition(",")[0] for sort in opened(root).problems()] == ["lines look like pixels"]


def test_capital_suffixes_are_read_and_hidden_files_skipped_and_counted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    labels, images = root / "labels" / "train", root / "images" / "train"
    (labels / "train_0.txt").rename(labels / "train_0.TXT")
    (images / "train_1.png").rename(images / "train_1.PNG")
    for hidden in (labels / "._train_0.txt", labels / "._train_1.txt", images / "._train_0.png"):
        hidden.write_bytes(b"\x00\x05\x16\x07Mac OS X")
    data = opened(root)
    assert boxes_of(data) == truth() and not data.defects
    assert [note.split(" in ")[0] for note in data.notes] == ["1 hidden file", "2 hidden files"]


# COCO


def change_coco(root: Path, change: Callable[[dict[str, Any]], Any], split: str = "train") -> Path:
    file = root / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return root


def roboflow_coco(root: Path) -> None:
    for split, folder in (("train", "train"), ("val", "valid")):
        (root / folder).mkdir()
        for image in list((root / "images").glob(f"{split}_*")):
            image.rename(root / folder / image.name)
        change_coco(
            root,
            lambda content: content.update(
                categories=[
                    {"id": 0, "name": "blue", "supercategory": "none"},
                    *(category | {"supercategory": "blue"} for category in content["categories"]),
                ]
            ),
            split,
        )
        (root / f"instances_{split}.json").rename(root / folder / "_annotations.coco.json")
    (root / "images").rmdir()


def other_name(root: Path) -> None:
    (root / "instances_train.json").rename(root / "cells-train-v2.json")
    (root / "instances_val.json").unlink()
    (root / "about.json").write_text('{"images": 8}')


def cvat(root: Path) -> None:
    (root / "annotations").mkdir()
    (root / "instances_train.json").rename(root / "annotations" / "instances_default.json")
    (root / "instances_val.json").unlink()
    (root / "images" / "default").mkdir()
    for image in list((root / "images").glob("train_*")):
        image.rename(root / "images" / "default" / image.name)


def inner_folders(root: Path) -> None:
    change_coco(
        root, lambda content: [image.update(file_name=f"a/{image['file_name']}") for image in content["images"]]
    )
    (root / "images" / "a").mkdir()
    for image in list((root / "images").glob("train_*")):
        image.rename(root / "images" / "a" / image.name)


def other_machine(root: Path) -> None:
    change_coco(
        root,
        lambda content: [image.update(file_name=f"D:\\cells\\{image['file_name']}") for image in content["images"]],
    )


def without_sizes(root: Path) -> None:
    change_coco(root, lambda content: [[image.pop("width"), image.pop("height")] for image in content["images"]])


def polygons(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            x, y, w, h = annotation.pop("bbox")
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]

    change_coco(root, change)


def masks(root: Path) -> None:
    """Run lengths: as a list for the first, compressed for the others."""
    import numpy as np
    from faster_coco_eval import mask

    def change(content: dict[str, Any]) -> None:
        for i, annotation in enumerate(content["annotations"]):
            x, y, w, h = annotation.pop("bbox")
            if i == 0:
                runs = [x * SIZE[1] + y, *([h, SIZE[1] - h] * (w - 1)), h]
                annotation["segmentation"] = {"counts": [*runs, SIZE[0] * SIZE[1] - sum(runs)], "size": SIZE[::-1]}
                continue
            pixels = np.zeros(SIZE[::-1], np.uint8, order="F")
            pixels[y : y + h, x : x + w] = 1
            encoded = mask.encode(pixels)
            annotation["segmentation"] = encoded | {"counts": encoded["counts"].decode()}

    change_coco(root, change)


@pytest.mark.parametrize(
    "change",
    [roboflow_coco, other_name, cvat, inner_folders, other_machine, without_sizes, polygons, masks],
    ids=lambda function: function.__name__,
)
def test_coco_is_read_however_it_was_written(change: Callable[[Path], None], tmp_path: Path) -> None:
    root = make_coco(tmp_path / "data")
    change(root)
    data = opened(root)
    assert boxes_of(data) == truth() and data.class_names == NAMES and not data.defects
    noted: dict[Callable[[Path], None], str] = {
        roboflow_coco: "the category blue has no box and is only the parent of others",
        cvat: "instances_default.json names no usual split: it is read as train",
    }
    assert [noted[change] in note for note in data.notes] == [True] * (change in noted)


def test_a_coco_file_is_a_data_set(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    (root / "instances_train.json").rename(root / "my cells.json")
    data = opened(root / "my cells.json")
    assert boxes_of(data) == truth() and open_boxes(root / "my cells.json", "val") is None
    assert found_in_words({"train": data}) == "COCO: train 8 images in images"


def test_annotations_without_a_box_are_counted_by_their_ids(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        a, b, c, d = content["annotations"][:4]
        a["bbox"], b["bbox"], c["bbox"] = None, [], [1, 2, 3]
        del d["image_id"]

    data = opened(change_coco(make_coco(tmp_path), change))
    without, wrong = data.problems().values()
    assert without == ["annotation 1", "annotation 2"] and wrong == ["annotation 3", "annotation 4"]


def test_entries_that_are_nothing_are_counted(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"] += [None, 7, {"id": 99}]
        content["images"] += [None, {"id": 5}]

    data = opened(change_coco(make_coco(tmp_path), change))
    assert boxes_of(data) == truth()
    assert sorted(map(len, data.problems().values())) == [1, 2, 2]


def test_addresses_of_images_are_refused_by_name(tmp_path: Path) -> None:
    address = "https://example.org/1.png"
    root = change_coco(make_coco(tmp_path), lambda content: content["images"][3].update(file_name=address))
    with pytest.raises(DataError, match=r"has the address https://example\.org/1\.png as file_name; download"):
        open_boxes(root, "train")


def rotated(
    root: Path, orientation: int, size: tuple[int, int], labelled: tuple[int, int], name: str = "a.png"
) -> BoxImages:
    """A data set of one image that is stored with `size`, with a box at 2 3 of 10 x 5 pixels of the labelled one."""
    (root / "images").mkdir(parents=True)
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (2, 3, 12, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(root / "images" / name, exif=exif)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 5]}
    content = {"images": [{"id": 1, "file_name": name, "width": labelled[0], "height": labelled[1]}]}
    content |= {"annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}
    (root / "instances_train.json").write_text(json.dumps(content))
    return opened(root)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_stored_pixels_are_turned_with_them(orientation: int, name: str, tmp_path: Path) -> None:
    data = rotated(tmp_path, orientation, (40, 30), (40, 30), name)
    image = data.image(0)
    assert image.size == (30, 40) == data.sizes[0]
    x1, y1, x2, y2 = map(int, data.objects_in(0).boxes[0].tolist())
    assert image.getbbox() == (x1, y1, x2, y2)  # all that is not black
    assert list(data.problems()) == ["images are labelled as stored, without EXIF rotation; their boxes are rotated"]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_boxes_of_the_upright_image_stay(name: str, tmp_path: Path) -> None:
    data = rotated(tmp_path, 6, (40, 30), (30, 40), name)
    assert data.objects_in(0).boxes[0].tolist() == [2, 3, 12, 8] and data.image(0) and not data.defects


@pytest.mark.parametrize(("orientation", "size"), [(3, (40, 30)), (6, (30, 30)), (2, (40, 30))])
def test_boxes_of_a_rotated_image_that_fit_both_ways_are_reported(
    orientation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    data = rotated(tmp_path, orientation, size, size)
    assert data.objects_in(0).boxes[0].tolist() == [2, 3, 12, 8]
    assert [sort.endswith("assumed to be those of the rotated image") for sort in data.problems()] == [True]


# Pascal VOC


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def no_lists(root: Path) -> None:
    for name in ("val.txt", "train.txt"):
        (root / "ImageSets" / "Main" / name).unlink()
    (root / "ImageSets" / "Main").rmdir()
    (root / "ImageSets").rmdir()
    for file in (*root.glob("JPEGImages/val_*"), *root.glob("Annotations/val_*")):
        file.unlink()


def trainval_alone(root: Path) -> None:
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").unlink()
    (lists / "blue_train.txt").write_text("train_0  1\n")


def xml_beside(root: Path) -> None:
    for split in ("train", "val"):
        (root / split).mkdir()
        for file in (*root.glob(f"JPEGImages/{split}_*"), *root.glob(f"Annotations/{split}_*")):
            file.rename(root / split / file.name)
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).rmdir()


def labelimg(root: Path) -> None:
    no_lists(root)
    (root / "JPEGImages").rename(root / "images")
    (root / "Annotations").rename(root / "annotations")


def in_devkit(root: Path) -> None:
    (root / "VOCdevkit").mkdir()
    (root / "VOCdevkit" / "VOC2007").mkdir()
    for folder in ("JPEGImages", "Annotations", "ImageSets"):
        (root / folder).rename(root / "VOCdevkit" / "VOC2007" / folder)


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (no_lists, "has no ImageSets/Main with lists: all its images are the split train"),
        (trainval_alone, "is the only list of images to train on: it is taken as train"),
        (xml_beside, ""),
        (labelimg, "all its images are the split train"),
        (in_devkit, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pascal_voc_is_found_in_every_layout(change: Callable[[Path], None], noted: str, tmp_path: Path) -> None:
    root = make_voc(tmp_path / "data")
    change(root)
    data = opened(root)
    assert boxes_of(data) == truth() and data.class_names == NAMES and not data.defects
    assert [noted in note for note in data.notes] == ([True] if noted else [])


def test_names_of_images_may_have_blanks(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for name, folder in (("train_0.png", "JPEGImages"), ("train_0.xml", "Annotations")):
        (root / folder / name).rename(root / folder / name.replace("_", " no. "))
    edit(root / "Annotations" / "train no. 0.xml", "train_0.png", "train no. 0.png")
    edit(root / "ImageSets" / "Main" / "train.txt", "train_0", "train no. 0")
    assert boxes_of(opened(root))["train no. 0"] == truth()["train_0"] and not opened(root).defects


def test_the_id_decides_which_image_an_annotation_belongs_to(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    edit(root / "Annotations" / "train_3.xml", "train_3.png", "train_4.png")
    data = opened(root)
    assert boxes_of(data) == truth()
    assert data.problems() == {
        "XML files name another image in <filename>; the one with the file's own name is read": [
            str(root / "Annotations" / "train_3.xml")
        ]
    }


def damaged(root: Path) -> None:
    (root / "Annotations" / "train_3.xml").write_text("<annotation><object>")


def lost(root: Path) -> None:
    (root / "Annotations" / "train_3.xml").unlink()


def without_box(root: Path) -> None:
    edit(root / "Annotations" / "train_3.xml", "bndbox", "polygon")


def nameless(root: Path) -> None:
    edit(root / "Annotations" / "train_3.xml", "name>", "title>")


@pytest.mark.parametrize(("change", "images"), [(damaged, 7), (lost, 7), (without_box, 8), (nameless, 8)])
def test_one_wrong_xml_file_does_not_stop_the_others(
    change: Callable[[Path], None], images: int, tmp_path: Path
) -> None:
    root = make_voc(tmp_path)
    change(root)
    data = opened(root)
    wrong = [where for several in data.problems().values() for where in several]
    assert len(data) == images and wrong and all("train_3.xml" in where for where in wrong)


def test_difficult_objects_and_crowds_are_ignored(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc")
    edit(root / "Annotations" / "train_3.xml", "<bndbox>", "<difficult>1</difficult><bndbox>")
    coco = change_coco(make_coco(tmp_path / "coco"), lambda content: content["annotations"][0].update(iscrowd=1))
    change_coco(coco, lambda content: content["annotations"][1].update(ignore=1))
    for data, number in ((opened(root), len(truth()["train_3"])), (opened(coco), 2)):
        assert sum(int(data.objects_in(i).ignored.sum()) for i in range(8)) == number
        assert sum(data.counts()) == sum(map(len, truth().values())) - number


def test_a_class_with_a_name_for_ignored_regions_is_ignored(tmp_path: Path) -> None:
    root = one_image(tmp_path, "0 .5 .5 .2 .2\n1 .5 .5 .1 .1\n2 .2 .2 .1 .1")
    (root / "data.yaml").write_text("names: [ignored regions, cat, dog]")
    data = opened(root)
    assert data.class_names == ["cat", "dog"] and data.counts() == [1, 1]
    assert data.objects_in(0).labels.tolist() == [-1, 0, 1]
    assert data.objects_in(0).ignored.tolist() == [True, False, False]
    assert data.renumbered([1, 0], ["dog", "cat"]).objects_in(0).labels.tolist() == [-1, 1, 0]
    assert any("'ignored regions' is taken for regions to ignore" in note for note in data.notes)


def test_a_class_that_is_only_ignored_is_no_class_to_train_on(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(annotation["category_id"] == 5)  # blue

    data = opened(change_coco(make_coco(tmp_path), change))
    left = without_unused(data)
    assert left.class_names == ["green", "red"] and left.counts() == data.counts()[1:]
    assert not any(left.objects_in(i).ignored.any() for i in range(len(left)))
    assert with_names(data, ["red", "blue"]).counts() == [data.counts()[2], 0]


# other formats


def make_csv(root: Path, file: str) -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for i, (image, boxes) in enumerate(scenes(8)):
        image.save((root / file).parent / f"train_{i}.png")
        lines += [
            f"train_{i}.png,{SIZE[0]},{SIZE[1]},{NAMES[label]},{x1},{y1},{x2},{y2}" for label, x1, y1, x2, y2 in boxes
        ]
    (root / file).write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("file", ["train/_annotations.csv", "train_labels.csv", "cells.csv"])
def test_tables_of_roboflow_and_tensorflow_are_read(file: str, tmp_path: Path) -> None:
    root = make_csv(tmp_path, file)
    for data in (opened(root), opened(root / file)):
        assert boxes_of(data) == truth() and data.class_names == NAMES and not data.defects and not data.notes
    with (root / file).open("a") as table:
        table.write("\ntrain_0.png,96,64,red,1,2,three,4\n")
    Image.new("RGB", SIZE).save((root / file).parent / "nothing.png")
    (wrong,) = opened(root).problems().values()
    assert wrong == [f"{root / file} line {2 + sum(map(len, truth().values()))}"] and len(opened(root)) == 8
    assert any("1 image in" in note and "without a line" in note for note in opened(root).notes)


@pytest.mark.parametrize("folder", ["", "train"])
def test_labelme_files_are_read(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for i, (image, boxes) in enumerate(scenes(8)):
        image.save(tmp_path / folder / f"train_{i}.png")
        shapes: list[dict[str, Any]] = [
            {"label": NAMES[label], "points": [[x2, y1], [x1, y2]], "shape_type": "rectangle"}
            for label, x1, y1, x2, y2 in boxes
        ]
        content = {"shapes": shapes, "imagePath": f"..\\train_{i}.png", "imageWidth": SIZE[0], "imageHeight": SIZE[1]}
        (tmp_path / folder / f"train_{i}.json").write_text(json.dumps(content))
    assert boxes_of(opened(tmp_path)) == truth() and opened(tmp_path).class_names == NAMES
    shapes = [
        {"label": "red", "points": [[20, 20], [23, 24]], "shape_type": "circle"},
        {"label": "red", "points": [[1, 1]]},
    ]
    (tmp_path / folder / "train_0.json").write_text(json.dumps({"shapes": shapes}))
    data = opened(tmp_path)
    assert boxes_of(data)["train_0"] == [[15, 15, 25, 25]]
    assert [where[0].partition("train_0")[2] for where in data.problems().values()] == [".json shape 2"]


def test_labelme_images_lie_elsewhere_or_in_the_file(tmp_path: Path) -> None:
    shape = {"label": "red", "points": [[1, 2], [11, 12]], "shape_type": "rectangle"}
    (tmp_path / "images").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "images" / "elsewhere.png")
    content = BytesIO()
    Image.new("RGB", SIZE, "blue").save(content, "PNG")
    inside = {"imagePath": "inside.png", "imageData": base64.b64encode(content.getvalue()).decode()}
    for name, where in (("a", {"imagePath": "elsewhere.png"}), ("b", inside)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"shapes": [shape], **where}))
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.json").write_text("[")
    data = opened(tmp_path)
    assert boxes_of(data) == {"elsewhere": [[1, 2, 11, 12]], "inside": [[1, 2, 11, 12]]}
    assert [data.image(i).getpixel((0, 0)) for i in range(2)] == [(0, 0, 0), (0, 0, 255)]
    problem = "JSON files are not in LabelMe's format; their images are left out"
    assert data.problems() == {problem: [str(tmp_path / "c.json"), str(tmp_path / "d.json")]}


def test_tables_in_other_encodings_or_without_their_images_are_refused(tmp_path: Path) -> None:
    root = make_csv(tmp_path, "train.csv")
    table = (root / "train.csv").read_bytes()
    (root / "train.csv").write_bytes(table + "train_1.png,96,64,rötlich,1,2,3,4\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.csv is no CSV file in UTF-8"):
        opened(root)
    (root / "train.csv").write_bytes(table)
    for image in root.rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=r"none of the images that .*train\.csv lists, such as train_0\.png, is in"):
        opened(root)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_data_sets_of_hugging_face_have_objects(named: bool, tmp_path: Path) -> None:
    import datasets

    category: Any = datasets.ClassLabel(names=NAMES) if named else datasets.Value("string")
    rows: dict[str, list[Any]] = {"image": [], "objects": []}
    for image, boxes in scenes(8):
        rows["image"].append(image)
        bbox = [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for _, x1, y1, x2, y2 in boxes]
        rows["objects"].append({"bbox": bbox, "category": [label if named else NAMES[label] for label, *_ in boxes]})
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"), 4)), "category": datasets.List(category)}
    columns: Any = {"image": datasets.Image(), "objects": objects}
    features = datasets.Features(columns)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)})
    saved.save_to_disk(tmp_path / "data")
    data = opened(tmp_path / "data")
    assert list(boxes_of(data).values()) == list(truth().values()) and data.class_names == NAMES
    assert data.image(3).tobytes() == scenes(4)[3][0].tobytes()
    assert "data set of Hugging Face: train 8 images" in found_in_words({"train": data})


def parquet_with(objects: list[Any], feature: Any, images: list[Any], root: Path) -> Path:
    """A data set of Hugging Face in a parquet file."""
    import datasets

    columns: Any = {"image": datasets.Image(), "objects": feature}
    root.mkdir()
    rows = {"image": images, "objects": objects}
    datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(root / "train.parquet")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "category", "name"), [("binary", b"cat", "cat"), ("float64", 1.0, "1"), ("bool", True, "1")]
)
def test_categories_of_hugging_face_may_be_bytes_or_numbers_and_an_object_null(
    kind: str, category: Any, name: str, tmp_path: Path
) -> None:
    import datasets

    feature: Any = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": datasets.Value(kind)})
    rows = [[{"bbox": [1, 1, 4, 4], "category": category}], [], [None]]
    data = opened(parquet_with(rows, feature, [scenes(1)[0][0]] * 3, tmp_path / "data"))
    assert data.class_names == [name] and list(map(len, boxes_of(data).values())) == [1, 0, 0]
    assert list(data.defects) == ["objects lack four numbers of a box or a category and are left out"]


@pytest.mark.slow
def test_objects_of_hugging_face_that_are_no_boxes_are_refused(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(DataError, match=r"the column `objects` needs bbox and category, and has Value\('string'\)"):
        opened(parquet_with(["{}"], datasets.Value("string"), [scenes(1)[0][0]], tmp_path / "data"))


@pytest.mark.slow
def test_images_with_metadata_are_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    lines = []
    for i, (image, boxes) in enumerate(scenes(8)):
        image.save(tmp_path / "train" / f"train_{i}.png")
        bbox = [[x1, y1, x2 - x1, y2 - y1] for _, x1, y1, x2, y2 in boxes]
        objects = {"bbox": bbox, "categories": [NAMES[label] for label, *_ in boxes]}
        lines.append(json.dumps({"file_name": f"train_{i}.png", "objects": objects}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    data = opened(tmp_path)
    assert boxes_of(data) == truth() and data.class_names == NAMES and data.image(0).size == SIZE


# conversion


@pytest.mark.parametrize("to", ["yolo", "coco", "voc"])
@pytest.mark.parametrize("make", [make_coco, make_yolo, make_voc])
def test_a_converted_data_set_is_the_same(
    make: Callable[[Path], Path], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make(tmp_path / "data"), tmp_path / "out"
    assert main(["convert-data", str(root), "--to", to, "--out", str(out)]) == 0
    data = opened(out)
    assert boxes_of(data) == truth() and boxes_of(opened(out, "val")) == truth(4, 1000, "val")
    assert data.class_names == NAMES and not data.defects and not data.notes
    assert all(Path(data.name(i)).is_symlink() and data.image(i) for i in range(len(data)))
    assert f"train: wrote 8 images with {sum(map(len, truth().values()))} boxes" in capsys.readouterr().out
    assert main(["convert-data", str(root), "--to", to, "--out", str(out)]) == 1
    assert "exists and is no empty folder" in capsys.readouterr().err


def test_images_are_copied_where_links_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    out = tmp_path / "out"
    assert main(["convert-data", str(make_coco(tmp_path / "data")), "--to", "yolo", "--out", str(out)]) == 0
    assert not any(file.is_symlink() for file in out.rglob("*")) and opened(out).image(0).size == SIZE
    assert "note: 12 images copied, because links to them cannot be made" in capsys.readouterr().out


def test_images_of_one_name_in_several_folders_stay_apart(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        (root / kind / "train" / "inner").mkdir()
        (root / kind / "train" / f"train_1.{suffix}").rename(root / kind / "train" / "inner" / f"train_0.{suffix}")
    for to in ("yolo", "voc"):
        assert main(["convert-data", str(root), "--to", to, "--out", str(tmp_path / to)]) == 0
        found = boxes_of(opened(tmp_path / to))
        assert len(found) == 8 and sorted(found.values()) == sorted(truth().values())


def test_ignored_regions_are_converted_or_their_loss_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_voc(tmp_path / "data")
    edit(root / "Annotations" / "train_3.xml", "<bndbox>", "<difficult>1</difficult><bndbox>")
    before = opened(root)
    number = len(truth()["train_3"])
    for to in ("coco", "voc"):
        assert main(["convert-data", str(root), "--to", to, "--out", str(tmp_path / to)]) == 0
        after = opened(tmp_path / to)
        assert after.counts() == before.counts() and boxes_of(after) == truth()
    capsys.readouterr()
    assert main(["convert-data", str(root), "--to", "yolo", "--out", str(tmp_path / "yolo")]) == 0
    assert f"note: {number} crowds, difficult objects or regions to ignore left out" in capsys.readouterr().out
    assert opened(tmp_path / "yolo").counts() == before.counts()


def test_conversion_leaves_out_and_names_unreadable_images_and_unusual_splits(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "cells", train=2, val=1)
    without_sizes(root)
    (root / "images" / "train_0.png").write_bytes(b"no image")
    (root / "instances_night.json").write_bytes((root / "instances_val.json").read_bytes())
    lines = convert_data(root, "yolo", tmp_path / "yolo")
    left_out = f"note: 1 image of train left out as unreadable: {root / 'images' / 'train_0.png'}"
    assert left_out in lines and "note: not converted, because they are no usual splits: night" in lines
    assert [len(opened(tmp_path / "yolo", split)) for split in ("train", "val")] == [1, 1]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    assert main(["convert-data", str(tmp_path / "data"), "--to", "coco", "--out", str(tmp_path / "out")]) == 1
    assert "is no data set with boxes" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


# sizes


def test_boxes_are_counted_by_their_size_in_the_input(tmp_path: Path) -> None:
    # 100 x 50 pixels; boxes of 10 x 10, 40 x 40, 2 x 2 and 10 x 2
    lines = "0 .5 .5 .1 .2\n0 .5 .5 .4 .8\n1 .5 .5 .02 .04\n1 .5 .5 .1 .04"
    data = opened(one_image(tmp_path, lines))
    about = describe_sizes(data, (50, 50), keeps_aspect=True)  # halves everything
    assert about["sizes"] == {"cat": [1, 0, 1, 0, 0, 0], "dog": [2, 0, 0, 0, 0, 0]}
    assert about["below 2 px"] == 2 and about["most objects"]["objects"] == 4
    stretched = describe_sizes(data, (100, 200), keeps_aspect=False)  # doubles everything
    assert stretched["sizes"] == {"cat": [0, 0, 1, 0, 1, 0], "dog": [1, 1, 0, 0, 0, 0]} and not stretched["below 2 px"]
    words = "\n".join(sizes_in_words(about))
    assert "4 boxes at 50 px, by the root of their area: 3 tiny (< 8 px), 1 < 32" in words
    assert "2 boxes with a side below 2 px at 50 px" in words and "at most 4 objects in an image" in words


def test_the_check_recommends_a_size_and_a_tile_with_which_tiny_boxes_become_larger(tmp_path: Path) -> None:
    # 100 x 50 pixels; twenty boxes of 3 x 3, and one of 0.1 x 0.1 that is no reason for a huge input
    lines = "\n".join(["0 .5 .5 .03 .06"] * 20 + ["0 .2 .2 .001 .002"] + ["1 .5 .5 .4 .8"])
    lines = lines.replace(".5 .5 .03", "{} .5 .03").format(*(0.1 + 0.04 * i for i in range(20)))
    data = opened(one_image(tmp_path, lines))
    about = describe_sizes(data, (32, 32), keeps_aspect=True)
    assert about["below 2 px"] == 21 and about["larger image size"] == "96" and about["tile"] == 48
    (line,) = (line for line in sizes_in_words(about) if "below 2 px" in line)
    assert line.endswith("; --image-size 96 or --tile 48, which cuts the images, makes nearly all of them larger")
    assert describe_sizes(data, (96, 96), True)["below 2 px"] == 1


def test_images_with_more_pixels_than_the_limit_are_counted(tmp_path: Path) -> None:
    data = opened(one_image(tmp_path, "0 .5 .5 .1 .2"))
    assert describe_sizes(data, (64, 64), True)["above the pixel limit"] == []
    data = replace(data, max_pixels=1000)
    assert describe_sizes(data, (64, 64), True)["above the pixel limit"] == [data.name(0)]


def test_boxes_between_the_cells_of_a_network_are_counted(tmp_path: Path) -> None:
    # 100 x 50 pixels; three boxes of 4 x 4 and one of 40 x 40
    data = opened(one_image(tmp_path, "\n".join(f"0 .{i} .5 .04 .08" for i in (1, 2, 3)) + "\n1 .6 .5 .4 .8"))
    about = describe_sizes(data, (100, 100), True, strides=(8, 16, 32))
    # a box of 4 x 4 contains one of the centres that lie 8 px apart in a quarter of all positions, 16 and 32 apart less
    assert about["without a cell"] == {
        "cell": 8,
        "missed": round(3 * (1 - 1 / 4 - 1 / 16 - 1 / 64)),
        "larger image size": "192",
    }
    (line,) = (line for line in sizes_in_words(about) if "no cell's centre" in line)
    assert line.startswith("  about 2 of the boxes contain no cell's centre (cells have 8 px")
    assert line.endswith("and cannot be learnt; try --image-size 192 or a network with cells of 4 px (yolov8n_p2)")
    assert "without a cell" not in describe_sizes(data, (192, 192), True, strides=(8, 16, 32))
    assert "without a cell" not in describe_sizes(data, (100, 100), True)
