"""Data sets of all formats (folders, CSV, Hugging Face data sets, WebDataset shards), and their check."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import COLOURS, make_folders, picture
from PIL import Image

from spd_zoo.data.check import check, in_words
from spd_zoo.data.classes import NetworkClasses, load_class_map, match_classes, renamed, without_unused
from spd_zoo.data.labelled import (
    DataError,
    LabelledImages,
    open_data,
    open_stream,
    train_val_split,
    with_classes,
)
from spd_zoo.data.reading import channel_mode, collect_notes, find_images, parse_size, read_image, size_text
from spd_zoo.process import Process
from spd_zoo.training.classification.augment import eval_loader, eval_transform, train_loader, train_transform
from spd_zoo.training.preprocessing import normalize
from spd_zoo.training.steps import Steps
from spd_zoo.training.steps import read as read_batches

ALONE = Process(torch.device("cpu"))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "data", train=8, val=2)


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="Hugging Face data sets need the extra `train`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "dataset"


def opened(data: Path | str, split: str = "train", **columns: str) -> LabelledImages:
    found = open_data(data, split, **columns)
    assert found is not None
    return found


def test_folders_of_classes_are_a_data_set(folders: Path) -> None:
    data = opened(folders, "val")
    assert data.class_names == ["blue", "green", "red"]
    assert data.labels == [0, 0, 1, 1, 2, 2]
    assert data.image(5).size == (16, 16) and data.name(5).endswith("red/1.png")
    assert open_data(folders, "test") is None


@pytest.mark.parametrize(
    "name", ["validation", "valid", "Val", "VALID", "dev", "validate", "val_set", "images-val", "val2017"]
)
def test_the_split_val_has_other_names(folders: Path, name: str) -> None:
    (folders / "val").rename(folders / name)
    assert len(opened(folders, "val")) == 6


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("TRAIN", "Eval"), ("train_set", "test_set"), ("trn", "tst")]
)
def test_splits_have_usual_names_in_any_case_and_are_no_classes(folders: Path, names: tuple[str, str]) -> None:
    for old, new in zip(("train", "val"), names, strict=True):
        (folders / old).rename(folders / new)
    assert opened(folders).class_names == ["blue", "green", "red"]
    assert len(opened(folders, "test")) == 6 and open_data(folders, "val") is None


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("trainA", "trainB"), ("my_train", "my_val")])
def test_folders_that_look_like_splits_are_no_classes(folders: Path, names: tuple[str, str]) -> None:
    for old, new in zip(("train", "val"), names, strict=True):
        (folders / old).rename(folders / new)
    with pytest.raises(DataError, match=rf"{names[1]}, {names[0]}|{names[0]}, {names[1]}, look like splits"):
        open_data(folders, "train")


def test_two_names_of_a_split_and_folders_beside_it_are_noted(folders: Path) -> None:
    shutil.copytree(folders / "val", folders / "validation")
    shutil.copytree(folders / "train" / "red", folders / "violet")
    notes = opened(folders, "val").notes
    assert any("val is read, validation not" in note for note in notes)
    assert any(note.endswith("are not read: violet") for note in notes)


def test_a_class_may_be_called_train(folders: Path) -> None:
    (folders / "train" / "red").rename(folders / "train" / "train")
    data = opened(folders / "train")
    assert data.class_names == ["blue", "green", "train"]
    assert any("taken as classes, not as splits" in note for note in data.notes)


def test_files_without_the_suffix_of_an_image_are_counted(folders: Path) -> None:
    blue = folders / "train" / "blue"
    for name in ("a.txt", "b.txt", "c.heic", ".hidden.txt", "no_suffix"):
        (blue / name).write_text("no image")
    for name in ("d.JFIF", "e.jpe", "f.dib", "bare", "img_0.5"):
        shutil.copy(blue / "0.png", blue / name)
    data = opened(folders)
    assert data.counts() == [13, 8, 8]
    (note,) = data.notes
    assert "4 files" in note and ".txt (2)" in note and ".heic (1)" in note and "no suffix (1)" in note
    assert "pip install pillow-heif" in note
    assert f"note: {note}" in list(in_words(check({"train": data}, 0, ALONE)))


def test_images_without_a_class_and_images_in_inner_folders_are_noted(folders: Path) -> None:
    shutil.copy(folders / "train" / "blue" / "0.png", folders / "train" / "stray.png")
    (folders / "train" / "red").rename(folders / "red")
    (folders / "train" / "red").mkdir()
    (folders / "red").rename(folders / "train" / "red" / "inner")
    data = opened(folders)
    assert data.counts() == [8, 8, 8]
    assert any("1 image outside the class folders" in note and "stray.png" in note for note in data.notes)
    assert any("only in inner folders" in note and note.endswith("red") for note in data.notes)


def test_a_class_folder_whose_name_no_file_can_hold_is_refused(folders: Path) -> None:
    (folders / "train" / "red").rename(folders / "train" / os.fsdecode(b"r\xff"))
    with pytest.raises(DataError, match=r"class folder '.*r\\udcff' has a name that is no Unicode; rename it"):
        open_data(folders, "train")


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "tst")])
def test_splits_inside_of_class_folders_are_not_mixed(folders: Path, names: tuple[str, str]) -> None:
    for old, new in zip(("train", "val"), names, strict=True):
        for colour in ("blue", "red"):
            (folders / "set" / colour).mkdir(parents=True, exist_ok=True)
            (folders / old / colour).rename(folders / "set" / colour / new)
    with pytest.raises(DataError, match=r"hold splits instead of images, such as .*blue; arrange them as"):
        open_data(folders / "set", "train")


def test_a_folder_around_the_splits_is_no_class(folders: Path) -> None:
    around = folders / "around"
    around.mkdir()
    for split in ("train", "val"):
        (folders / split).rename(around / split)
    with pytest.raises(DataError, match="or give the folder with the splits"):
        open_data(folders, "train")


def test_names_that_differ_in_blanks_or_unicode_form_are_one_class(folders: Path) -> None:
    (folders / "train" / "blue").rename(folders / "train" / "caf\u00e9")
    (folders / "train" / "green").rename(folders / "train" / "cafe\u0301 ")
    data = opened(folders)
    assert data.class_names == ["caf\u00e9", "red"] and data.counts() == [16, 8]


def test_class_folders_without_splits_are_training_images(folders: Path) -> None:
    assert len(opened(folders / "train")) == 24
    assert open_data(folders / "train", "val") is None


def test_a_folder_with_only_val_has_no_training_images(folders: Path) -> None:
    shutil.rmtree(folders / "train")
    assert open_data(folders, "train") is None


def test_an_empty_class_folder_is_named(folders: Path) -> None:
    for file in (folders / "train" / "green").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="green holds no image; fill it or remove it"):
        open_data(folders, "train")


def test_a_hidden_folder_is_no_class(folders: Path) -> None:
    shutil.copytree(folders / "train" / "red", folders / "train" / ".ipynb_checkpoints")
    assert opened(folders).class_names == ["blue", "green", "red"]


def test_the_error_names_what_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; give one with"):
        open_data(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="has no class folders; put the images"):
        open_data(tmp_path, "train")


def test_validation_classes_are_matched_by_name(folders: Path) -> None:
    shutil.rmtree(folders / "val" / "green")
    val = with_classes(opened(folders, "val"), ["blue", "green", "red"])
    assert [val.label(i) for i in range(len(val))] == [0, 0, 2, 2]
    (folders / "val" / "blue").rename(folders / "val" / "azure")
    with pytest.raises(
        DataError, match=r"class 'azure' is not one of .* The split has azure, red; trained are blue, green, red"
    ):
        with_classes(opened(folders, "val"), ["blue", "green", "red"])


NAMED = NetworkClasses(["negative", "positive"])
NAMELESS = NetworkClasses(["0", "1", "2"], named=False)
TEN = NetworkClasses([f"class {chr(97 + i)}" for i in range(12)])


def labelled(*names: str) -> LabelledImages:
    return LabelledImages([f"{name}.png" for name in names], list(range(len(names))), list(names), range(len(names)))


@pytest.mark.parametrize(
    ("names", "network", "outputs", "note"),
    [
        (["positive"], NAMED, [1], ""),
        (["negative ", "positive"], NAMED, [0, 1], ""),
        (sorted(map(str, range(12))), TEN, [0, 1, 10, 11, *range(2, 10)], "the data's class names are numbers"),
        ([f"{i:03}" for i in range(12)], TEN, list(range(12)), "the data's class names are numbers"),
        (["0", "1", "2"], NAMELESS, [0, 1, 2], ""),
        (["2"], NAMELESS, [2], "does not name its classes"),
        (["b10", "B2", "a"], NAMELESS, [2, 1, 0], "timm's natural order: a = 0, B2 = 1, b10 = 2"),
        (["1", "2", "3"], NAMELESS, [0, 1, 2], "timm's natural order"),
        (["b10", "B2", "a"], replace(NAMELESS, listed=True), [0, 1, 2], "their order there: b10 = 0, B2 = 1, a = 2"),
        (["07", "3"], NetworkClasses(["3", "7", "9"]), [1, 0], "matched by their value"),
        (["n01", "shark"], NetworkClasses(["fish, shark", "bird"], synonyms=[["n02", "shark"], ["n01"]]), [1, 0], ""),
    ],
)  # fmt: skip
def test_classes_are_matched_by_name(names: list[str], network: NetworkClasses, outputs: list[int], note: str) -> None:
    data = match_classes(labelled(*names), network)
    assert data.labels == outputs and data.class_names == list(network.names)
    assert len(data.notes) == bool(note) and all(note in line for line in data.notes)


@pytest.mark.parametrize(
    ("names", "network"),
    [
        (["disease", "healthy"], NAMED),
        (["Negative", "Positive"], NAMED),
        (["negative", "neutral"], NAMED),
        (["1", "2"], NAMED),
        (["0"], NAMED),
        (["0", "1", "2"], NAMED),
        (["00", "0"], NAMED),
        (["a", "b"], NAMELESS),
        (["0", "9"], NetworkClasses(["1", "2"])),
        (["crane"], NetworkClasses(["a", "b"], synonyms=[["crane"], ["crane"]])),
    ],
)
def test_a_mismatch_of_classes_is_an_error_that_lists_both_sides(names: list[str], network: NetworkClasses) -> None:
    with pytest.raises(DataError, match=r"the network has no class .*--class-map FILE") as caught:
        match_classes(labelled(*names), network)
    assert all(name in str(caught.value) for name in (*names, *network.names))


def test_a_class_map_resolves_different_names(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("no: negative\n01: positive\n")
    class_map = load_class_map(tmp_path / "map.yaml")
    assert class_map == {"no": "negative", "01": "positive"}
    assert match_classes(labelled("01", "no"), NAMED, class_map).labels == [1, 0]
    assert renamed(NAMED, class_map) == ["no", "01"]
    (tmp_path / "map.json").write_text('{"a": "2", "b": "0"}')
    data = match_classes(labelled("a", "b"), NAMELESS, load_class_map(tmp_path / "map.json"))
    assert data.labels == [2, 0] and not data.notes
    (note,) = match_classes(labelled("a", "positive"), NAMED, {"a": "positive"}).notes
    assert note == "several classes of the data are one of the network: a and positive as positive"
    with pytest.raises(DataError, match="leads to 'neutral', which the network does not have: 2 classes"):
        match_classes(labelled("a"), NAMED, {"a": "neutral"})
    with pytest.raises(DataError, match="the network has no class 'b'"):
        match_classes(labelled("a", "b"), NAMED, {"a": "negative"})
    with pytest.raises(DataError, match="calls 'negative' both 'a' and 'b'"):
        renamed(NAMED, {"a": "negative", "b": "negative"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "needs lines like"),
        ("", "needs lines like"),
        ("a: [b]\n", "needs lines like"),
        ("a: b\na: c\n", "names 'a' twice"),
        ("a: b: c\n", "is not YAML"),
        (None, "cannot read the class map"),
    ],
)
def test_an_invalid_class_map_gives_one_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_class_map(tmp_path / "map.yaml")


def test_classes_without_images_need_no_match(tmp_path: Path) -> None:
    data = LabelledImages(["a.png", "b.png"], [2, 0], ["red", "green", "blue"], range(2))
    train = without_unused(data)
    assert (train.class_names, train.labels) == (["red", "blue"], [1, 0])
    assert train.notes == ("1 class without anything to train on left out: green",)
    assert with_classes(data, train.class_names).labels == [1, 0]
    assert match_classes(data, NetworkClasses(["blue", "red"])).labels == [0, 1]


def test_csv_rows_of_no_known_split_are_counted(folders: Path) -> None:
    lines = ["Path, Label ,SPLIT", "train/red/0.png,a, Training", "val/red/0.png,b,VALID", "val/red/1.png,a,"]
    lines += ["val/green/0.png,c,holdout", "val/green/1.png,c,holdout"]
    (folders / "list.csv").write_text("\n".join(lines))
    data = opened(folders / "list.csv")
    assert data.class_names == ["a", "b"] and len(data) == 1 and len(opened(folders / "list.csv", "val")) == 1
    assert any("1 row of" in note and "without a split left out" in note for note in data.notes)
    assert any("2 rows of" in note and note.endswith("holdout (2)") for note in data.notes)
    assert opened(folders / "list.csv", "holdout").counts() == [0, 0, 2]


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        (("a.png,a,", "b.png,b,"), "train", "no row of the split train: 2 rows of .* without a split left out; write"),
        (("a.png,a,", "b.png,b, "), "val", "no row of the split val: 2 rows of .* without a split left out; write"),
        (("a.png,a,x", "b.png,b,y"), "test", r"2 rows of .* left out, of other splits .*: x \(1\), y \(1\); write"),
        (("a.png,a,val", "b.png,b,x"), "train", r"no row of the split train: 1 row of .*: x \(1\); write"),
    ],
)
def test_what_was_left_out_is_in_the_error_if_nothing_remains(
    tmp_path: Path, rows: tuple[str, ...], split: str, message: str
) -> None:
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "list.csv", split)


@pytest.mark.slow
def test_labels_with_leading_zeros_have_one_order_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"{i}.png,{i}\n" for i in ("1", "001", "01", "10", "2"))
    )
    found = set()
    for seed in (0, 4):  # a set of these labels has another order with each
        code = "import sys; from spd_zoo.data.labelled import open_data; print(open_data(*sys.argv[1:]).class_names)"
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", code, str(tmp_path / "list.csv"), "train"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert found == {"['001', '01', '1', '2', '10']\n"}
    (note,) = opened(tmp_path / "list.csv").notes
    assert note == "classes that differ only in case or zeros around a number are kept apart: 001 and 01 and 1"


def test_numbers_with_and_without_a_decimal_point_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,{i}\n" for i in ("1", "1.0", "2.5", "v1.0")))
    (note,) = opened(tmp_path / "list.csv").notes
    assert note == "classes that differ only in case or zeros around a number are kept apart: 1 and 1.0"


@pytest.mark.parametrize("address", ["https://example.org/data", "http://example.org/a.csv", "s3://bucket/data"])
def test_the_error_for_an_address_keeps_both_slashes(address: str, tmp_path: Path) -> None:
    for read in (lambda: open_data(address, "train"), lambda: find_images([address]), lambda: read_image(address)):
        with pytest.raises(ValueError, match=f"{address} is an address"):
            read()
    (tmp_path / "list.csv").write_text(f"path,label\n{address}/1.png,a\n")
    with pytest.raises(DataError, match=f"{address}/1.png is an address"):
        opened(tmp_path / "list.csv").image(0)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("pixels", "options", "largest", "note"),
    [
        ((255 * RAMP).astype("int32"), {}, 255, "values from 0 to 255"),
        ((255 * RAMP).astype("float32"), {}, 255, "values from 0 to 255"),
        (RAMP.astype("float32"), {}, 255, "values from 0 to 1"),
        ((60_000 * RAMP).astype("int32"), {}, 233, "values from 0 to 65535"),
        ((4000 * RAMP).astype("int32"), {"tiffinfo": {281: 4000}}, 249, ""),
        ((4095 * RAMP).astype("uint16"), {}, 16, "perhaps too dark"),
        ((4095 * RAMP).astype("uint16"), {"tiffinfo": {281: 4095}}, 255, ""),
        ((65535 * RAMP).astype("uint16"), {}, 255, ""),
        ((4095 * RAMP).astype("uint16"), {"format": "png"}, 16, "perhaps too dark"),
        ((65535 * RAMP).astype("uint16"), {"format": "png"}, 255, ""),
        ((255 * RAMP).astype("uint8"), {"format": "png"}, 255, ""),
    ],
)
def test_deep_images_are_scaled_by_the_declared_range_or_the_assumed_one_is_noted(
    pixels: np.ndarray, options: dict[str, Any], largest: int, note: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"format": "tiff", **options})
    with collect_notes() as notes:
        image = read_image(buffer, "L")
    assert image.getextrema() == (0, largest)
    assert len(notes) == bool(note) and all(note in text for text in notes)


def test_pixels_of_unknown_range_are_refused() -> None:
    for pixels in (RAMP - 0.5, 1e6 * RAMP, RAMP * np.nan):
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype("float32")).save(buffer, "tiff")
        with pytest.raises(
            ValueError, match=r"32 bits and values from .*, of unknown range; save it with 8 or 16 bits"
        ):
            read_image(buffer)


@pytest.mark.parametrize("form", ["tiff", "gif", "webp", "png"])
def test_only_the_first_of_several_pages_is_read_with_a_note(folders: Path, form: str) -> None:
    pages = [picture(COLOURS[name], i) for i, name in enumerate(("red", "green", "blue"))]
    pages[0].save(folders / "train" / "red" / f"pages.{form}", save_all=True, append_images=pages[1:])
    data = opened(folders)
    about = check({"train": data}, 0, ALONE)
    (note,) = about["notes"]
    assert note.startswith("1 image: several pages or frames, of which the first is read: ") and f"pages.{form}" in note
    image = data.image(next(i for i in range(len(data)) if data.name(i).endswith(f"pages.{form}")))
    red, green, blue = image.resize((1, 1)).tobytes()
    assert red > max(green, blue)


def test_a_heic_image_is_known_and_what_reads_it_is_named() -> None:
    with pytest.raises(ValueError, match="HEIC image; pip install pillow-heif"):
        read_image(io.BytesIO(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"))


def test_any_exception_of_pillow_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ValueError, match="cannot read this image: no such thing"):
        read_image(io.BytesIO(b""))


def test_images_have_one_or_three_channels() -> None:
    assert [channel_mode(channels, "net") for channels in (1, 3)] == ["L", "RGB"]
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"net takes {channels} channels; images have 1 or 3"):
            channel_mode(channels, "net")


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("48x96", (48, 96)), (" 48X96 ", (48, 96)), (32, (32, 32))]
)
def test_sizes_are_height_by_width(text: str | int, size: tuple[int, int]) -> None:
    assert parse_size(text) == size == parse_size(size_text(size))


@pytest.mark.parametrize("text", ["", "0", "32x", "x32", "32x0", "1x2x3", "-3", "3.5", "a"])
def test_an_invalid_size_gives_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is not like 64, or HEIGHTxWIDTH like 48x96"):
        parse_size(text)


def test_a_csv_file_lists_paths_and_labels(folders: Path) -> None:
    lines = ["path,label,split", "train/red/0.png,10,train", "train/red/1.png,9,train", "val/red/0.png,10,val"]
    (folders / "list.csv").write_text("\n".join(lines))
    data = opened(folders / "list.csv")
    assert (data.class_names, data.labels) == (["9", "10"], [1, 0])
    assert data.image(0) == opened(folders).subset([16]).image(0)
    assert len(opened(folders / "list.csv", "val")) == 1
    assert open_data(folders / "list.csv", "test") is None


def test_a_folder_may_have_a_csv_file_per_split(folders: Path) -> None:
    for split in ("train", "val"):
        (folders / f"{split}.csv").write_text(f"path,label\n{split}/red/0.png,cat\n")
    assert opened(folders, "val").class_names == ["cat"]
    assert open_data(folders, "test") is None


def test_a_csv_file_has_the_columns_that_are_asked_for(folders: Path) -> None:
    (folders / "list.csv").write_text("file,label,Species\ntrain/red/0.png,1,cat\ntrain/red/1.png,1,dog\n")
    data = opened(folders / "list.csv", image_column="file", label_column="Species")
    assert (data.class_names, data.labels) == (["cat", "dog"], [0, 1])
    with pytest.raises(
        DataError, match="needs a first line with the columns file and kind, got 'file, label, species'"
    ):
        open_data(folders / "list.csv", "train", image_column="file", label_column="kind")


def test_class_folders_have_no_columns(folders: Path) -> None:
    with pytest.raises(DataError, match="names of its folders are the classes"):
        open_data(folders, "train", label_column="kind")


@pytest.mark.parametrize(
    ("table", "read", "other", "classes"),
    [("train.csv", "train.csv", "train, val", ["cat"]), ("test.csv", "train, val", "test.csv", [*COLOURS])],
)
def test_of_csv_files_and_class_folders_those_with_train_are_read(
    folders: Path, table: str, read: str, other: str, classes: list[str]
) -> None:
    (folders / table).write_text("path,label\ntrain/red/0.png,cat\n")
    data = opened(folders)
    assert sorted(data.class_names) == sorted(classes)
    assert data.notes == (f"{folders} has {table} and class folders in train, val: {read} read, {other} not",)
    assert open_data(folders, "test") is None


def test_a_padded_crop_is_resized_as_asked() -> None:
    image = Image.fromarray(torch.randint(0, 256, (7, 7, 3), generator=torch.Generator().manual_seed(0)).byte().numpy())
    made = {}
    for way in ("bilinear", "bicubic"):
        torch.manual_seed(0)
        made[way] = train_transform(16, crop_padding=2, interpolation=way, hflip=0.0)(image)
    assert not torch.equal(made["bilinear"], made["bicubic"])


@pytest.mark.parametrize(("mode", "step"), [("center", 4), (None, 4), ("squash", 8), ("border", 8)])
def test_a_padded_crop_keeps_the_aspect_that_evaluation_keeps(mode: str | None, step: int) -> None:
    pixels = torch.arange(0, 240, 4).byte().expand(3, 30, 60).permute(1, 2, 0)  # each column 4 brighter than the last
    made = train_transform(30, crop_padding=1, crop_mode=mode, hflip=0.0, color_jitter=0.0)(
        Image.fromarray(pixels.numpy())
    )
    steps = made[0, 15, 2:-2].int().diff()
    assert made.shape == (3, 30, 30) and (steps == step).float().mean() > 0.8


def test_an_archive_beside_its_class_folders_is_not_read(folders: Path) -> None:
    (folders / "train.tar").write_bytes(b"archive")
    data = opened(folders)
    assert sorted(data.class_names) == sorted(COLOURS)
    assert data.notes == (f"{folders} has train.tar and class folders in train, val: the folders are read",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na,b\n", "columns path and label, got 'file, class'"),
        ("path,label\na.png,\n", "row 1 after the"),
        ("path,label,label\na.png,1,2\n", "has the column label twice"),
        ("path,label\na.png,red, blue\n", "row 1 after the header has more values than columns"),
        ("path,label\na.png,rëd\n", "list.csv is no CSV file in UTF-8: 'utf-8' codec can't decode"),
        (f"path,label\na.png,{'d' * 2**17}x\n", "list.csv is no CSV file in UTF-8: field larger than field limit"),
    ],
    ids=["columns", "short row", "column twice", "long row", "latin-1", "long field"],
)
def test_a_csv_file_that_lacks_something_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "list.csv", "train")


def dataset_of(label: Any, labels: list[Any]) -> Any:
    import datasets

    columns: Any = {"picture": datasets.Image(), "kind": label}
    features = datasets.Features(columns)
    images = [picture(COLOURS["red"], i) for i in range(len(labels))]
    return datasets.Dataset.from_dict({"picture": images, "kind": labels}, features=features)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "arrow", "saved"])
def test_a_local_hugging_face_data_set_is_read(hugging_face: Path, form: str) -> None:
    import datasets

    dataset = dataset_of(datasets.ClassLabel(names=["circle", "square"]), [0, 1, 1, 0])
    if form == "saved":
        datasets.DatasetDict({"train": dataset, "validation": dataset}).save_to_disk(hugging_face)
    else:
        hugging_face.mkdir()
        dataset.to_parquet(hugging_face / "train-00000-of-00001.parquet")
        if form == "arrow":
            (hugging_face / "train-00000-of-00001.parquet").unlink()
            dataset.save_to_disk(hugging_face / "saved")
            (hugging_face / "saved" / "data-00000-of-00001.arrow").rename(hugging_face / "train.arrow")
            shutil.rmtree(hugging_face / "saved")
    data = opened(hugging_face)
    assert (data.labels, data.class_names) == ([0, 1, 1, 0], ["circle", "square"])
    assert data.image(1) == picture(COLOURS["red"], 1)
    val = open_data(hugging_face, "val")
    assert (val is not None) == (form == "saved")


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([2, 0], "int64", ([1, 0], ["0", "2"])),
        ([10**12, 10**11], "int64", ([1, 0], [str(10**11), str(10**12)])),
        (["b", "a"], "string", ([1, 0], ["a", "b"])),
        (["cafe\u0301 ", "caf\u00e9", "a"], "string", ([1, 1, 0], ["a", "caf\u00e9"])),
        ([1, -1], "int64", ([1, 0], ["-1", "1"])),
        ([2.0, 0.0, 10.0], "float64", ([1, 0, 2], ["0", "2", "10"])),
        ([True, False], "bool", ([1, 0], ["0", "1"])),
        ([b"dog", b"cat"], "binary", ([1, 0], ["cat", "dog"])),
    ],
)
def test_labels_need_no_names(hugging_face: Path, labels: list[object], kind: str, expected: object) -> None:
    import datasets

    hugging_face.mkdir()
    dataset_of(datasets.Value(kind), labels).to_parquet(hugging_face / "train.parquet")
    data = opened(hugging_face, label_column="kind")
    assert (data.labels, data.class_names) == expected
    with pytest.raises(DataError, match="has no column 'label', but picture, kind; name one with --label-column"):
        open_data(hugging_face, "train")


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["a", None, " "], "string", "2 rows of the split train have no label"),
        ([1.0, float("nan")], "float64", "1 rows of the split train have no label"),
        ([0, -1], ["red", "blue"], "1 rows of the split train have no label"),
        ([[0, 1], [1]], None, r"holds values such as \[0, 1\]; an image needs one class"),
    ],
)
def test_rows_without_one_label_are_refused(
    hugging_face: Path, labels: list[object], kind: str | list[str] | None, message: str
) -> None:
    import datasets

    hugging_face.mkdir()
    label: Any = datasets.Value(kind) if isinstance(kind, str) else datasets.Value("int64")
    label = [label] if kind is None else datasets.ClassLabel(names=kind) if isinstance(kind, list) else label
    dataset_of(label, labels).to_parquet(hugging_face / "train.parquet")
    with pytest.raises(DataError, match=message):
        open_data(hugging_face, "train", label_column="kind")


@pytest.mark.parametrize("number", [2, -2])
def test_a_number_that_is_no_class_is_refused(hugging_face: Path, number: int) -> None:
    import datasets
    from pyarrow import parquet

    hugging_face.mkdir()
    file = hugging_face / "train.parquet"
    dataset_of(datasets.ClassLabel(names=["red", "blue"]), [0, 1]).to_parquet(file)
    with_names = parquet.read_schema(file).metadata
    dataset_of(datasets.Value("int64"), [0, number]).to_parquet(file)  # `datasets` itself does not write such a row
    parquet.write_table(parquet.read_table(file).replace_schema_metadata(with_names), file)
    with pytest.raises(DataError, match=f"row 1 of the split train has {number} .* numbered from 0 to 1; correct it"):
        open_data(hugging_face, "train")


def test_a_row_without_an_image_is_unreadable(hugging_face: Path) -> None:
    import datasets

    hugging_face.mkdir()
    kinds: Any = {"image": datasets.Image(), "label": datasets.Value("string")}
    features = datasets.Features(kinds)
    rows = {"image": [picture(COLOURS["red"], 0), None], "label": ["a", "b"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(hugging_face / "train.parquet")
    data = opened(hugging_face)
    assert check({"train": data}, 0, ALONE)["train"]["unreadable"] == {"row 1": "this row holds no image"}


def test_webdataset_shards_are_read(hugging_face: Path) -> None:
    hugging_face.mkdir()
    with tarfile.open(hugging_face / "train-0000.tar", "w") as shard:
        for i, label in enumerate((1, 0, 1)):
            for suffix, content in (("png", encoded(picture(COLOURS["red"], i))), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    data = opened(hugging_face)
    assert (data.labels, data.class_names) == ([1, 0, 1], ["0", "1"])
    assert data.image(2) == picture(COLOURS["red"], 2)


def test_a_stream_gives_every_image_once_and_the_same_ones_in_an_epoch(hugging_face: Path) -> None:
    import datasets

    hugging_face.mkdir()
    names = datasets.ClassLabel(names=["circle", "square"])
    dataset_of(names, [i % 2 for i in range(12)]).to_parquet(hugging_face / "train.parquet")
    with pytest.raises(DataError, match="does not say how many images its split train has; give --stream-length"):
        open_stream(hugging_face, "train")
    data = open_stream(hugging_face, "train", length=12)
    assert data is not None and data.class_names == ["circle", "square"]
    batches = eval_loader(data, eval_transform(16, 1.0, "bilinear"), 5, workers=0)
    assert torch.cat([labels for _, labels in batches]).tolist() == [i % 2 for i in range(12)]
    epochs = []
    for epoch in (0, 1, 0):
        training = train_loader(data, train_transform(16), Steps(12, 4), workers=0)
        training.dataset.epoch = epoch  # type: ignore[attr-defined]
        epochs.append(torch.cat([images for images, _ in training]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (None, "row 2 of the stream holds no image"),
        ({"bytes": b"no image"}, "an image of the stream after the first [01] cannot be read: cannot identify image"),
    ],
)
def test_an_image_of_a_stream_that_cannot_be_read_is_one_sentence(
    hugging_face: Path, second: object, sentence: str, workers: int
) -> None:
    import datasets

    hugging_face.mkdir()
    kinds: Any = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": [picture(COLOURS["red"], 0), second], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(hugging_face / "train.parquet")
    data = open_stream(hugging_face, "train", length=2)
    assert data is not None
    with pytest.raises(DataError, match=rf"\A{sentence}.*\Z"):
        list(read_batches(eval_loader(data, eval_transform(16, 1.0, "bilinear"), 2, workers)))


def test_held_out_images_are_the_same_share_of_every_class_and_the_same_every_time(folders: Path) -> None:
    data = opened(folders)
    train, val = train_val_split(data, 6, seed=1)
    assert val.counts() == [2, 2, 2] and train.counts() == [6, 6, 6]
    assert not set(train.rows) & set(val.rows)
    assert train_val_split(data, 6, seed=1)[1].rows == val.rows
    assert train_val_split(data, 6, seed=2)[1].rows != val.rows


def test_a_class_of_one_image_stays_in_training_and_small_ones_hold_one_out(folders: Path) -> None:
    train, val = train_val_split(opened(folders).subset([0, 8, 9, *range(16, 24)]), 2, seed=0)
    assert val.counts() == [0, 1, 1] and train.counts() == [1, 1, 7]


def test_blanks_around_a_label_are_ignored(folders: Path) -> None:
    (folders / "list.csv").write_text("path, label\ntrain/red/0.png, cat\ntrain/red/1.png,cat \n")
    assert opened(folders / "list.csv").class_names == ["cat"]


def test_too_few_images_to_hold_out_are_reported(folders: Path) -> None:
    with pytest.raises(DataError, match="no class has an image to hold out, for each has only one"):
        train_val_split(opened(folders).subset([0, 8, 16]), 1, seed=0)
    with pytest.raises(DataError, match="'blue' has 8 images, too few"):
        train_val_split(opened(folders), 24, seed=0)


def test_the_check_reads_every_kind_of_image_and_leaves_out_what_cannot_be_read(folders: Path) -> None:
    blue = folders / "train" / "blue"
    Image.new("L", (20, 10), 90).save(blue / "grey.png")
    Image.new("CMYK", (16, 16), (10, 20, 30, 40)).save(blue / "cmyk.jpg")
    Image.fromarray(torch.full((16, 16), 40_000).to(torch.uint16).numpy()).save(blue / "deep.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    picture(COLOURS["blue"], 77).resize((16, 8)).save(blue / "rotated.jpg", exif=rotated)
    (blue / "torn.png").write_bytes((blue / "0.png").read_bytes()[:200])
    (blue / "text.png").write_text("no image")
    shutil.copy(blue / "1.png", blue / "again.png")
    shutil.copy(blue / "2.png", folders / "train" / "red" / "wrong.png")
    shutil.copy(blue / "3.png", folders / "val" / "blue" / "leak.png")
    for file in (folders / "val" / "green").iterdir():
        file.unlink()
    (folders / "val" / "green").rmdir()
    train = opened(folders)
    about = check({"train": train, "val": with_classes(opened(folders, "val"), train.class_names)}, 2, ALONE)
    assert about["train"]["classes"] == {"blue": 13, "green": 8, "red": 9}
    assert about["train"]["kinds"] == {"grey": 2, "CMYK": 1, "16-bit": 1, "rotated by EXIF": 1}
    assert about["train"]["height"] == {"min": 10, "median": 16, "max": 16}
    assert [Path(name).name for name in about["train"]["unreadable"]] == ["text.png", "torn.png"]
    assert [[Path(n).name for n in names] for names in about["train"]["duplicates of another class"]] == [
        ["2.png", "wrong.png"]
    ]
    assert len(train.without(about["train"]["unreadable"])) == 30
    words = "\n".join(in_words(about))
    for expected in (
        "train: 30 images of 3 classes, 8x10 to 20x16 pixels",
        "blue 13, green 8, red 9",
        "2 images left out as unreadable:",
        "text.png (this is no image in a format that Pillow knows)",
        "2 images with copies",
        "1 of them labelled differently",
        "1 class without an image here: green",
        "1 image in both splits",
    ):
        assert expected in words, words


def test_a_split_without_a_readable_image_is_an_error(folders: Path) -> None:
    for file in (folders / "val").rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match=r"no image of the split val can be read; .*0.png: this is no image"):
        check({"val": opened(folders, "val")}, 0, ALONE)


def drawn(data: LabelledImages, steps: Steps, workers: int) -> list[torch.Tensor]:
    return [images for images, _ in train_loader(data, train_transform(12, auto_augment="rand-m6-n2"), steps, workers)]


def test_an_epoch_is_the_same_whichever_process_reads_it(folders: Path) -> None:
    data = opened(folders)
    whole = drawn(data, Steps(24, 8), workers=0)
    assert all(torch.equal(a, b) for a, b in zip(whole, drawn(data, Steps(24, 8), workers=2), strict=True))
    other = Steps(24, 8)
    other.epoch = 1
    assert not torch.equal(whole[0], drawn(data, other, workers=0)[0])
    rest = Steps(24, 8)
    rest.first = 1
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], drawn(data, rest, workers=0), strict=True))


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (1, 2), (2, 2), (3, 1)])
def test_processes_and_micro_batches_share_each_step(world: int, parts: int) -> None:
    whole = list(Steps(50, 12, drop_last=False))
    assert [len(step) for step in whole] == [12, 12, 12, 12, 2]
    ranks = [list(Steps(50, 12, parts, rank, world, drop_last=False)) for rank in range(world)]
    for step in range(4):
        shares = [share for rank in ranks for share in rank[step * parts : (step + 1) * parts]]
        assert sorted(key for share in shares for key in share) == sorted(whole[step])
    assert [len(rank) for rank in ranks] == [4 * parts] * world  # two images are too few to be shared


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [10, 10]), (False, [10, 10, 5])])
def test_the_last_images_are_left_out_or_kept(drop_last: bool, sizes: list[int]) -> None:
    steps = Steps(25, 10, drop_last=drop_last)
    assert [len(step) for step in steps] == sizes == [steps.size(i) for i in range(steps.per_epoch)]
    assert steps.images == sum(sizes)


def test_a_data_set_smaller_than_a_step_is_one_step() -> None:
    assert [len(step) for step in Steps(5, 64)] == [5]


def test_processes_evaluate_every_image_once(folders: Path) -> None:
    data = opened(folders).subset(range(11))
    ranks = [eval_loader(data, eval_transform(16, 1.0, "bilinear"), 2, 0, rank=rank, world=3) for rank in range(3)]
    labels = [torch.cat([labels for _, labels in batches]).tolist() for batches in ranks]
    assert [len(part) for part in labels] == [4, 4, 3]
    assert sorted(label for part in labels for label in part) == [0] * 8 + [1] * 3


def test_the_crop_of_a_padded_image_moves_it_over_black(folders: Path) -> None:
    transform = train_transform(16, crop_padding=4, color_jitter=0.0, hflip=0.0)
    (batch, _) = next(iter(train_loader(opened(folders), transform, Steps(24, 24), 0)))
    black = (batch == 0).all(1)
    edges = [black[:, 0].all(1), black[:, -1].all(1), black[:, :, 0].all(1), black[:, :, -1].all(1)]
    assert all(0 < edge.sum() < 24 for edge in edges)
    assert not black[:, 4:-4, 4:-4].any()


def test_a_turned_image_has_black_corners(folders: Path) -> None:
    transform = train_transform(16, crop_padding=1, color_jitter=0.0, rotation=45)
    batch, _ = next(iter(train_loader(opened(folders), transform, Steps(24, 24), 0)))
    assert (batch[:, :, 0, 0] == 0).all(1).sum() > 12


def test_normalizing_is_what_torchvision_computes(folders: Path) -> None:
    from torchvision.transforms import Compose, Normalize, ToTensor

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    data = opened(folders)
    pixels, _ = next(iter(eval_loader(data, eval_transform(16, 1.0, "bilinear"), 4, 0)))
    expected = torch.stack([Compose([ToTensor(), Normalize(mean, std)])(data.image(i)) for i in range(4)])
    assert torch.equal(normalize(pixels, mean, std, torch.device("cpu")), expected)
