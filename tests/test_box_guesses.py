"""Data sets with boxes as tools and people leave them: nothing is guessed, left out or wrong without a word."""

import json
import os
import shutil
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from box_pictures import NAMES, SIZE, make_coco, make_voc, make_yolo, scenes
from PIL import Image
from test_box_forms import boxes_of, change_coco, flat, make_csv, one_image, opened, truth

from spd_zoo.data.boxes import open_boxes
from spd_zoo.data.boxes.writing import convert_data
from spd_zoo.data.labelled import DataError

# YOLO


def test_lists_may_have_comments(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    flat(root)
    images = "\n\n".join(f"images/train_{i}.png" for i in range(8))
    (root / "train.txt").write_text(f"# made by hand\n\n{images}\n# of the second day\n")
    Image.new("RGB", SIZE).save(root / "images" / "unlisted.png")
    for data in (root, root / "train.txt"):
        if data != root:
            (root / "classes.txt").write_text("\n".join(NAMES))
        assert boxes_of(opened(data)) == truth() and opened(data).format.startswith("YOLO by")


def test_a_text_file_of_a_splits_name_that_lists_no_images_is_noted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    flat(root)
    (root / "train.txt").write_text("\n".join(f"train_{i}" for i in range(4)))
    assert any("train.txt in" in note and "not read" in note for note in opened(root).notes)


def test_nc_must_agree_with_a_file_of_names(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "classes.txt").write_text("\n".join(NAMES))
    (root / "data.yaml").write_text("train: images/train\nnc: 3\n")
    assert boxes_of(opened(root)) == truth()
    (root / "data.yaml").write_text("train: images/train\nnc: 4\n")
    with pytest.raises(DataError, match=r"says that there are 4 classes \(nc\), but .*classes\.txt names 3"):
        open_boxes(root, "train")


@pytest.mark.parametrize("backwards", [False, True])
def test_which_file_names_the_classes_does_not_depend_on_the_order_in_which_the_system_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    root, glob = make_yolo(tmp_path), Path.glob
    (root / "data.yaml").unlink()
    (root / "Classes.txt").write_text("\n".join(NAMES[::-1]))
    (root / "classes.txt").write_text("\n".join(NAMES))
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: sorted(glob(folder, pattern), reverse=backwards))
    assert list(opened(root).class_names) == NAMES


@pytest.mark.parametrize("names", ["[[cat], [dog]]", "[{0: cat}, {1: dog}]", "\n- cat\n-\n", "{0: cat, 1: {dog: 2}}"])
def test_names_that_are_no_texts_are_refused(names: str, tmp_path: Path) -> None:
    root = one_image(tmp_path, "0 .5 .5 .2 .2")
    (root / "data.yaml").write_text(f"names: {names}")
    with pytest.raises(DataError, match=r"data\.yaml needs names: a list of classes, or a mapping"):
        open_boxes(root, "train")


@pytest.mark.parametrize("name", ["Classes.txt", "OBJ.NAMES", "coco.names"])
def test_a_file_of_names_is_found_in_any_case_and_beside_hidden_ones(name: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "data.yaml").unlink()
    (root / name).write_text("\n".join(NAMES))
    (root / f"._{name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert opened(root).class_names == NAMES


def test_labels_may_be_in_one_folder(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    for split in ("train", "val"):
        for file in list((root / "labels" / split).iterdir()):
            file.rename(root / "labels" / file.name)
        (root / "labels" / split).rmdir()
    assert boxes_of(opened(root)) == truth() and len(opened(root, "val")) == 4
    assert not opened(root).defects  # the labels of val are not without an image


def test_images_that_share_a_label_file_are_counted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    images = root / "images" / "train"
    shutil.copy(images / "train_3.png", images / "train_3.bmp")
    data = opened(root)
    problem = "images share their label file with another image, whose name differs in the suffix alone"
    assert len(data) == 9 and data.problems() == {problem: [str(images / "train_3.png")]}
    (root / "train.txt").write_text("images/train/train_3.png\n" * 3)  # the same image more often is meant so
    (root / "classes.txt").write_text("\n".join(NAMES))
    assert not opened(root / "train.txt").defects


def test_a_link_to_a_lost_label_file_is_counted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    text = root / "labels" / "train" / "train_3.txt"
    text.unlink()
    text.symlink_to(tmp_path / "elsewhere" / "train_3.txt")
    data = opened(root)
    assert data.problems() == {"label files cannot be read, and their images have no boxes": [str(text)]}
    assert boxes_of(data) == truth() | {"train_3": []}


def test_files_of_names_beside_images_are_no_lost_images(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / kind / "x")
    (root / "train").mkdir()
    for file in (*(root / "images" / "x").iterdir(), *(root / "labels" / "x").iterdir()):
        file.rename(root / "train" / file.name)
    for name in ("images", "labels", "data.yaml"):
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    (root / "train" / "_darknet.labels").write_text("\n".join(NAMES))
    data = opened(root)
    assert boxes_of(data) == truth() and not data.notes


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("/content/datasets/cells", "c.yaml"),  # beside the folder, with the path of another machine
        ("../datasets/cells", "repository/data/c.yaml"),  # as YOLOv5 has it: from the repository
    ],
)
def test_path_is_found_from_where_it_was_written(path: str, file: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / ("cells" if "/" not in file else "datasets/cells"))
    config = tmp_path / file
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f"path: {path}\ntrain: images/train\nval: images/val\nnames: {NAMES}\n")
    data = opened(config)
    assert boxes_of(data) == truth() and any(f"path {path}, which does not exist: {root}" in n for n in data.notes)


def test_a_path_that_does_not_exist_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("path: ../datasets/cells\ntrain: images/train\nnames: [cat]\n")
    with pytest.raises(DataError, match=r"path \.\./datasets/cells does not exist"):
        opened(tmp_path / "c.yaml")


@pytest.mark.parametrize("make", [make_coco, make_yolo, make_voc])
def test_a_folder_that_an_archive_was_unpacked_into_is_opened(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "cells" / "cells v1 yolo")
    (tmp_path / "cells" / "__MACOSX").mkdir()
    assert boxes_of(opened(tmp_path / "cells")) == truth()


@pytest.mark.parametrize("file", ["classes.txt", "obj.data"])
def test_a_list_of_classes_with_an_empty_line_is_refused(file: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "data.yaml").unlink()
    names = root / ("obj.names" if file == "obj.data" else file)
    if file == "obj.data":
        (root / file).write_text("train = images/train\nnames = obj.names\n")
    names.write_text("blue\ngreen\nred\n\n")
    assert boxes_of(opened(root)) == truth() and opened(root).class_names == NAMES
    names.write_text("blue\n\ngreen\nred\n")
    with pytest.raises(DataError, match=rf"line 2 of .*{names.name} is empty, so that the numbers of the classes"):
        opened(root)


@pytest.mark.parametrize("points", [".45 .5 2 .55 .5 1", ".45 .5 2", ".45 .5 2 0 0 0 .5 .5 1"])
def test_boxes_with_keypoints_are_not_read_as_polygons(points: str, tmp_path: Path) -> None:
    root = one_image(tmp_path, f"0 .5 .5 .2 .4 {points}\n")
    with pytest.raises(DataError, match=r"look like boxes with keypoints, and not like polygons.*kpt_shape: \[17, 3\]"):
        opened(root)
    (root / "data.yaml").write_text(f"names: [cat, dog]\nkpt_shape: [{len(points.split()) // 3}, 3]\n")
    assert opened(root).objects_in(0).boxes[0].tolist() == pytest.approx([40, 15, 60, 35])


@pytest.mark.parametrize("polygon", ["0 0 1 0 1 1 0 1 0 0", ".1 .1 .3 .1 .3 .3 .1 .3 .1 .1", ".1 .2 .3 .2 .3 .4 .93"])
def test_polygons_are_not_taken_for_keypoints(polygon: str, tmp_path: Path) -> None:
    assert len(opened(one_image(tmp_path, f"0 {polygon}\n")).objects_in(0).labels) == 1


@pytest.mark.parametrize("name", ["classes", "Notes"])
def test_an_image_may_be_called_like_a_file_of_a_tool(name: str, tmp_path: Path) -> None:
    one_image(tmp_path, "0 .5 .5 .2 .4\n")
    data = opened(one_image(tmp_path, "1 .5 .5 .2 .4\n", name))
    assert [objects.labels.tolist() for objects in data.objects] in ([[0], [1]], [[1], [0]])
    (tmp_path / "labels" / "train" / f"{name}.txt").write_text("cat\ndog\n")
    data = opened(tmp_path)
    assert sorted(len(objects.labels) for objects in data.objects) == [0, 1] and not data.defects


# COCO


def test_ids_that_are_neither_numbers_nor_texts_are_refused(tmp_path: Path) -> None:
    def lists_as_ids(key: str, content: dict[str, Any]) -> None:
        for entry in content[key]:
            entry["id"] = [entry["id"]]

    for key in ("images", "categories"):
        root = make_coco(tmp_path / key)
        change_coco(root, partial(lists_as_ids, key))
        with pytest.raises(DataError, match="is not in COCO's format for objects"):
            opened(root)


@pytest.mark.parametrize("counts", ["garbage!!", [-1, 2], ["x"], [10**30], {"a": 1}])
def test_a_damaged_mask_is_counted(counts: Any, tmp_path: Path) -> None:
    mask = {"counts": counts, "size": [SIZE[1], SIZE[0]]}
    root = make_coco(tmp_path)
    change_coco(root, lambda content: content["annotations"][0].update(segmentation=mask, bbox=[]))
    assert [len(found) for found in opened(root).problems().values()] == [1]


@pytest.mark.parametrize(("flag", "ignored"), [("0", 0), ("False", 0), ("", 0), (None, 0), ("1", 1), (True, 1)])
def test_crowds_may_be_written_as_text(flag: Any, ignored: int, tmp_path: Path) -> None:
    root = change_coco(make_coco(tmp_path), lambda content: content["annotations"][0].update(iscrowd=flag))
    assert sum(int(objects.ignored.sum()) for objects in opened(root).objects) == ignored


def test_an_image_that_is_listed_twice_is_counted(tmp_path: Path) -> None:
    root = change_coco(make_coco(tmp_path), lambda content: content["images"][1].update(file_name="./train_0.png"))
    ((sort, (where,)),) = opened(root).problems().items()
    assert sort.startswith("images are listed again with other boxes")
    assert Path(where) == root / "images" / "train_0.png"


def test_a_class_name_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    change_coco(root, lambda content: content["categories"][1].update(name="a\ud800b"))
    with pytest.raises(DataError, match=r"instances_train\.json has a class 'a\\ud800b' that is no Unicode; rename it"):
        opened(root)


@pytest.mark.parametrize("content", [b'{"images": [', '{"a": "бык"}'.encode("cp1251")])
def test_a_damaged_coco_file_is_no_missing_split(content: bytes, tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / f"instances_{split}.json").rename(root / split / "_annotations.coco.json")
    (root / "val" / "_annotations.coco.json").write_bytes(content)
    assert boxes_of(opened(root)) == truth()
    with pytest.raises(DataError, match=r"_annotations\.coco\.json"):
        open_boxes(root, "val")
    (root / "train" / "_annotations.coco.json").write_bytes(content)  # every file
    with pytest.raises(DataError, match=r"_annotations\.coco\.json"):
        open_boxes(root, "train")


def test_images_of_fiftyone_are_found(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    (root / "images").rename(root / "data")
    (root / "instances_train.json").rename(root / "labels.json")
    (root / "instances_val.json").unlink()
    assert boxes_of(opened(root)) == truth()


# all formats


@pytest.mark.parametrize("make", [make_coco, make_yolo, make_voc, partial(make_csv, file="train.csv")])
@pytest.mark.parametrize("letters", [("\u0439", "\u0438\u0306"), ("\u0438\u0306", "\u0439")])
def test_letters_that_macos_takes_apart_are_the_same(make: Any, letters: tuple[str, str], tmp_path: Path) -> None:
    root = make(tmp_path)
    for file in [*root.rglob("*train_0*")]:
        file.rename(file.with_name(f"{letters[file.suffix == '.png']}{file.suffix}"))
    for file in (file for suffix in ("json", "xml", "csv", "txt") for file in root.rglob(f"*.{suffix}")):
        file.write_text(file.read_text().replace("train_0", letters[0]))
    data = opened(root)
    assert len(data) == 8 and not data.defects
    assert truth()["train_0"] in boxes_of(data).values() and all(data.image(i) for i in range(8))


def test_fractions_are_no_pixels(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco")
    width, height = SIZE

    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x / width, y / height, w / width, h / height]

    change_coco(root, change)
    with pytest.raises(DataError, match=r"instances_train\.json look like fractions of the image, not like pixels"):
        opened(root)
    tiny = make_csv(tmp_path / "csv", "train.csv")  # a tiny object in the corner is no reason
    with (tiny / "train.csv").open("a") as table:
        table.write("\ntrain_0.png,96,64,red,0,0,1,1")
    assert sum(opened(tiny).counts()) == 1 + sum(map(len, truth().values()))


def test_several_tables_of_a_split_are_noted(tmp_path: Path) -> None:
    root = make_csv(tmp_path, "a.csv")
    shutil.copy(root / "a.csv", root / "b.csv")
    assert any("a.csv, b.csv; the first is read" in note for note in opened(root).notes)


@pytest.mark.parametrize("form", ["coco", "voc", "csv"])
def test_a_box_that_is_annotated_twice_counts_once(form: str, tmp_path: Path) -> None:
    if form == "coco":
        root = make_coco(tmp_path)
        change_coco(root, lambda content: content["annotations"].append(content["annotations"][0] | {"id": 999}))
    elif form == "voc":
        root = make_voc(tmp_path)
        file = root / "Annotations" / "train_0.xml"
        text = file.read_text()
        first = text[text.index("<object>") : text.index("</object>") + len("</object>")]
        file.write_text(text.replace("</annotation>", f"{first}</annotation>"))
    else:
        root = make_csv(tmp_path, "train.csv")
        lines = (root / "train.csv").read_text().splitlines()
        (root / "train.csv").write_text("\n".join([*lines, lines[1]]))
    data = opened(root)
    assert boxes_of(data) == truth()
    assert {sort: len(where) for sort, where in data.problems().items()} == {
        "boxes are annotated twice and count once": 1
    }


@pytest.mark.parametrize("make", [make_coco, make_voc])
def test_a_conversion_leaves_out_missing_images_and_those_of_another_size(make: Any, tmp_path: Path) -> None:
    root = make(tmp_path / "data")
    images = root / ("images" if make is make_coco else "JPEGImages")
    (images / "train_1.png").unlink()
    Image.new("RGB", (50, 30)).save(images / "train_2.png")
    lines = convert_data(root, "yolo", tmp_path / "yolo")
    left = {name: boxes for name, boxes in truth().items() if name not in ("train_1", "train_2")}
    assert boxes_of(opened(tmp_path / "yolo")) == left
    assert f"note: 1 image of train left out as unreadable: {images / 'train_1.png'}" in lines
    words = "left out whose size is not that of their annotation"
    assert f"note: 1 image of train {words}: {images / 'train_2.png'}" in lines


@pytest.mark.parametrize("to", ["yolo", "coco", "voc"])
def test_names_that_are_no_unicode_are_converted(to: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    for kind, suffix in (("images", "png"), ("labels", "txt")):
        folder = root / kind / "train"
        (folder / f"train_0.{suffix}").rename(folder / os.fsdecode(b"train\xff0." + suffix.encode()))
    convert_data(root, to, tmp_path / "out")
    assert boxes_of(opened(tmp_path / "out")) == truth()


def test_names_that_xml_cannot_hold_are_refused(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "data.yaml").write_text('names: ["a\\x01b", red, green]\n')
    with pytest.raises(DataError, match=r"'a\\x01b' has a character that XML cannot hold; rename it"):
        convert_data(root, "voc", tmp_path / "voc")
    assert not (tmp_path / "voc").exists()


@pytest.mark.parametrize("to", ["yolo", "coco", "voc"])
def test_names_that_some_systems_take_for_one_stay_apart(to: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    for i, name in enumerate(["Cell", "cell", "\u00e9", "e\u0301"]):
        for kind, suffix in (("images", "png"), ("labels", "txt")):
            folder = root / kind / "train"
            (folder / str(i)).mkdir()
            (folder / f"train_{i}.{suffix}").rename(folder / str(i) / f"{name}.{suffix}")
    convert_data(root, to, tmp_path / "out")
    data = opened(tmp_path / "out")
    stems = {unicodedata.normalize("NFC", Path(data.name(i)).stem).casefold() for i in range(len(data))}
    assert len(stems) == 8 and sorted(boxes_of(data).values()) == sorted(truth().values())


def test_classes_that_pascal_voc_cannot_hold_are_noted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    (root / "data.yaml").write_text(f"names: {[*NAMES, 'grey']}\n")
    (note,) = (line for line in convert_data(root, "voc", tmp_path / "voc") if line.startswith("note"))
    assert note.startswith("note: 1 class without a box not in the new data set") and note.endswith(": grey")
    assert not any(line.startswith("note") for line in convert_data(root, "coco", tmp_path / "coco"))


def test_a_data_set_is_not_written_among_its_own_images(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    with pytest.raises(ValueError, match="lies among the images of"):
        convert_data(root, "yolo", root / "images" / "train" / "out")
    convert_data(root, "coco", root / "as_coco")


def test_test_images_without_labels_are_not_converted(tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    shutil.copytree(root / "images" / "val", root / "images" / "test")
    (note,) = (line for line in convert_data(root, "coco", tmp_path / "coco") if "not converted" in line)
    image = root / "images" / "test" / "val_0.png"
    needed = root / "labels" / "test" / "val_0.txt"
    assert note == f"note: test not converted: no image of {image.parent} has a label file; {image} needs {needed}"
    assert sorted(file.name for file in (tmp_path / "coco" / "annotations").iterdir()) == [
        "instances_train.json",
        "instances_val.json",
    ]
    shutil.rmtree(root / "labels" / "val")
    with pytest.raises(DataError, match=r"no image of .*val has a label file"):
        convert_data(root, "coco", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_split_without_a_usable_image_is_not_converted(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "data")
    for image in (root / "images").glob("val_*"):
        Image.new("RGB", (50, 30)).save(image)
    with pytest.raises(DataError, match="no image of the split val can be used"):
        convert_data(root, "yolo", tmp_path / "yolo")
    assert not (tmp_path / "yolo").exists()


# Pascal VOC


def test_other_folders_of_a_devkit_are_noted(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        make_voc(tmp_path / "VOCdevkit" / year)
    assert any("VOC2012" in note and "not read" in note for note in opened(tmp_path).notes)


@pytest.mark.parametrize("text", ["<annotations><image/></annotations>", "<project/>"])
def test_other_xml_files_are_not_taken_for_annotations(text: str, tmp_path: Path) -> None:
    root = make_csv(tmp_path, "train.csv")
    (root / "annotations.xml").write_text(text)
    data = opened(root)
    assert boxes_of(data) == truth() and data.format == "CSV"
    (root / "train.csv").unlink()
    with pytest.raises(DataError, match="is no data set with boxes"):
        opened(root)


def test_of_two_images_of_one_stem_the_named_one_is_read(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    Image.new("RGB", (5, 5)).save(root / "JPEGImages" / "train_3.jpg")
    data = opened(root)
    assert boxes_of(data) == truth() and data.image(3).size == SIZE and not data.defects


def test_images_without_an_annotation_file_are_noted(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc")
    shutil.rmtree(root / "ImageSets")
    Image.new("RGB", SIZE).save(root / "JPEGImages" / "new.png")
    assert any("1 image in" in note and "without a usable XML file left out" in note for note in opened(root).notes)
    labelme = make_labelme(tmp_path / "labelme")
    Image.new("RGB", SIZE).save(labelme / "new.png")
    assert any("1 image in" in note and "without a usable JSON file left out" in note for note in opened(labelme).notes)


def test_an_xml_file_whose_image_is_gone_keeps_its_own_name_for_it(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    (root / "JPEGImages" / "train_3.png").unlink()
    assert opened(root).name(3).endswith("train_3.png")


def test_an_xml_file_in_an_unknown_encoding_is_counted_with_the_reason(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    files = sorted((root / "Annotations").glob("train_*.xml"))
    for number, encoding in enumerate(("foo", "gb2312")):
        files[number].write_text(f'<?xml version="1.0" encoding="{encoding}"?>{files[number].read_text()}')
    data = opened(root)
    assert len(data) == 6
    ((first, second),) = data.problems().values()
    assert "unknown encoding" in first and "multi-byte encodings are not supported" in second
    for file in files:
        file.write_text("<annotation>")
    with pytest.raises(DataError, match=r"none of the XML files of .*train\.txt can be read, such as .* \(no element"):
        opened(root)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt lists no image"):
        opened(root)


# tables, LabelMe and the library datasets


def test_a_table_with_two_columns_of_a_name_is_refused(tmp_path: Path) -> None:
    file = make_csv(tmp_path, "train.csv") / "train.csv"
    header, _, rows = file.read_text().partition("\n")
    file.write_text(f"{header},Class\n{rows}")
    with pytest.raises(DataError, match=r"train\.csv has the column class twice"):
        opened(file)


def make_labelme(root: Path) -> Path:
    root.mkdir()
    for i, (image, boxes) in enumerate(scenes(8)):
        image.save(root / f"train_{i}.png")
        shapes = [{"label": NAMES[label], "points": [[x1, y1], [x2, y2]]} for label, x1, y1, x2, y2 in boxes]
        (root / f"train_{i}.json").write_text(json.dumps({"shapes": shapes}))
    return root


@pytest.mark.parametrize("text", ['{"a": 1}', "{", "[]"])
def test_the_first_json_file_need_not_be_one_of_labelme(text: str, tmp_path: Path) -> None:
    root = make_labelme(tmp_path / "data")
    (root / "a_first.json").write_text(text)
    data = opened(root)
    assert boxes_of(data) == truth() and [len(where) for where in data.problems().values()] == [1]


@pytest.mark.slow
def test_objects_of_hugging_face_with_lists_of_different_lengths_are_counted(tmp_path: Path) -> None:
    import datasets

    images = [image for image, _ in scenes(2)]
    objects = [
        {"bbox": [[1.0, 1.0, 9.0, 9.0], [2.0, 2.0, 9.0, 9.0]], "category": ["cat"]},
        {"bbox": [[1.0, 1.0, 9.0, 9.0]], "category": ["dog"]},
    ]
    columns: Any = {"image": datasets.Image()}
    boxes = datasets.List(datasets.List(datasets.Value("float32")))
    columns["objects"] = {"bbox": boxes, "category": datasets.List(datasets.Value("string"))}
    rows = datasets.Dataset.from_dict({"image": images, "objects": objects}, datasets.Features(columns))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    rows.save_to_disk(tmp_path / "single")
    for folder in ("dict", "single"):  # a data set without splits is train
        data = opened(tmp_path / folder)
        assert data.counts() == [1, 1] and data.class_names == ["cat", "dog"]
        assert [len(where) for where in data.problems().values()] == [1]


@pytest.mark.slow
def test_a_row_of_hugging_face_without_an_image_is_counted_and_left_out(tmp_path: Path) -> None:
    import datasets

    first, last = (image for image, _ in scenes(2))
    objects = [{"bbox": [[1.0, 1.0, 9.0, 9.0]], "category": [name]} for name in ("cat", "dog", "cow")]
    columns: Any = {"image": datasets.Image()}
    boxes = datasets.List(datasets.List(datasets.Value("float32")))
    columns["objects"] = {"bbox": boxes, "category": datasets.List(datasets.Value("string"))}
    rows = {"image": [first, None, last], "objects": objects}
    datasets.Dataset.from_dict(rows, datasets.Features(columns)).save_to_disk(tmp_path / "data")
    data = opened(tmp_path / "data")
    assert [data.name(i) for i in range(len(data))] == ["train row 0", "train row 2"]
    assert data.problems() == {"rows hold no image and are left out": ["train row 1"]}
    assert data.class_names == ["cat", "cow", "dog"] and data.counts() == [1, 1, 0]
    np.testing.assert_array_equal(data.image(1), last)


def test_the_xml_files_of_a_damaged_data_set_are_named(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for file in (root / "Annotations").iterdir():
        file.write_text("<annotation>")
    with pytest.raises(DataError, match="none of the XML files"):
        opened(root)
