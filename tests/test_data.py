"""Data sets as users have them: folders, CSV, Hugging Face data sets, WebDataset shards; and what the check finds."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from pictures import COLOURS, make_folders, picture
from PIL import Image

from spd_zoo.data.check import check, in_words
from spd_zoo.data.labelled import (
    DataError,
    LabelledImages,
    open_data,
    open_stream,
    train_val_split,
    with_classes,
)
from spd_zoo.process import Process
from spd_zoo.training.classification.augment import eval_loader, eval_transform, train_loader, train_transform
from spd_zoo.training.preprocessing import normalize
from spd_zoo.training.steps import Steps

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


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_the_split_val_has_other_names(folders: Path, name: str) -> None:
    (folders / "val").rename(folders / name)
    assert len(opened(folders, "val")) == 6


def test_class_folders_alone_are_images_to_train_on(folders: Path) -> None:
    assert len(opened(folders / "train")) == 24
    assert open_data(folders / "train", "val") is None


def test_a_folder_with_val_alone_has_nothing_to_train_on(folders: Path) -> None:
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


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; give one with"):
        open_data(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="has no class folders; put the images"):
        open_data(tmp_path, "train")


def test_validation_classes_are_matched_by_name(folders: Path) -> None:
    shutil.rmtree(folders / "val" / "green")
    val = with_classes(opened(folders, "val"), ["blue", "green", "red"])
    assert [val.label(i) for i in range(len(val))] == [0, 0, 2, 2]
    (folders / "val" / "blue").rename(folders / "val" / "azure")
    with pytest.raises(DataError, match="class 'azure' that the network does not know; it has blue, green, red"):
        with_classes(opened(folders, "val"), ["blue", "green", "red"])


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\na,b\n", "columns path and label, got 'file, class'"),
        ("path,label\na.png,\n", "row 1 behind the"),
        ("path,label\na.png,rëd\n", "list.csv is no CSV file in UTF-8: 'utf-8' codec can't decode"),
        (f"path,label\na.png,{'d' * 2**17}x\n", "list.csv is no CSV file in UTF-8: field larger than field limit"),
    ],
    ids=["columns", "short row", "latin-1", "long field"],
)
def test_a_csv_file_that_lacks_something_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "list.csv", "train")


def dataset_of(label: object, labels: list[object]) -> object:
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "kind": label})
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
    [([2, 0], "int64", ([2, 0], ["0", "1", "2"])), (["b", "a"], "string", ([1, 0], ["a", "b"]))],
)
def test_labels_need_no_names(hugging_face: Path, labels: list[object], kind: str, expected: object) -> None:
    import datasets

    hugging_face.mkdir()
    dataset_of(datasets.Value(kind), labels).to_parquet(hugging_face / "train.parquet")
    data = opened(hugging_face, label_column="kind")
    assert (data.labels, data.class_names) == expected
    with pytest.raises(DataError, match="has no column 'label', but picture, kind; name one with --label-column"):
        open_data(hugging_face, "train")


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


def test_blanks_behind_a_comma_are_no_part_of_a_label(folders: Path) -> None:
    (folders / "list.csv").write_text("path, label\ntrain/red/0.png, cat\ntrain/red/1.png,cat\n")
    assert opened(folders / "list.csv").class_names == ["cat"]


def test_too_few_images_to_hold_out_are_said(folders: Path) -> None:
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
        "2 images cannot be read and are left out:",
        "text.png (this is no image in a format that Pillow knows)",
        "2 images occur more than once",
        "1 of them labelled differently",
        "1 classes have no image here: green",
        "1 images are in both splits",
    ):
        assert expected in words, words


def test_a_split_without_a_readable_image_is_an_error(folders: Path) -> None:
    for file in (folders / "val").rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match=r"no image of the split val can be read; .*0.png: this is no image"):
        check({"val": opened(folders, "val")}, 0, ALONE)


def drawn(data: LabelledImages, steps: Steps, workers: int) -> list[torch.Tensor]:
    return [images for images, _ in train_loader(data, train_transform(12, auto_augment="rand-m6-n2"), steps, workers)]


def test_an_epoch_is_the_same_whatever_reads_it(folders: Path) -> None:
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
def test_processes_and_parts_share_each_step(world: int, parts: int) -> None:
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
