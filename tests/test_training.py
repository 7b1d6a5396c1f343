"""Training: data sets as users have them, runs that go on where they stopped, results that timm loads."""

import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from spd_zoo.models.bsconv_mobilenetv3 import BSConvMobileNetV3
from spd_zoo.training import finetune as training
from spd_zoo.training.data import DataError, open_data, train_val_split
from spd_zoo.training.finetune import FinetuneConfig, finetune

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-20, 20, (16, 16, 3), generator=generator)
    pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for split, count in (("train", 8), ("val", 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(colour, i).save(root / split / name / f"{i}.png")
    return root


def config(data: Path, out: Path, **changes: object) -> FinetuneConfig:
    options = {"epochs": 2, "batch_size": 8, "image_size": "16", "warmup_epochs": 0, "lr": 1e-3, "workers": 0}
    return FinetuneConfig(**{"model": "resnet18_spd", "data": data, "out": out} | options | changes)


def test_a_run_learns_and_timm_loads_its_result_with_the_class_names(folders, tmp_path):
    accuracy = finetune(config(folders, tmp_path / "run", epochs=6, batch_size=4, image_size="16,32@2"))
    assert accuracy > 60  # three colours; chance is 33
    net = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert net.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert tuple(net.pretrained_cfg["input_size"]) == (3, 32, 32)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(torch.equal(value, state["net"][key]) for key, value in net.state_dict().items())
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 7


def test_a_stopped_run_goes_on_to_the_same_weights(folders, tmp_path, monkeypatch):
    finetune(config(folders, tmp_path / "whole"))
    evaluated = 0

    def stop_in_the_second_epoch(*arguments: object) -> float:
        nonlocal evaluated
        evaluated += 1
        if evaluated == 2:
            raise KeyboardInterrupt
        return top1(*arguments)

    top1 = training.top1
    monkeypatch.setattr(training, "top1", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(folders, tmp_path / "stopped"))
    finetune(config(folders, tmp_path / "stopped"))
    whole, stopped = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_a_folder_with_another_run_is_left_alone(folders, tmp_path):
    finetune(config(folders, tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run with lr=0\.001, not 0\.5"):
        finetune(config(folders, tmp_path / "run", epochs=1, lr=0.5))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(folders, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        finetune(config(folders, tmp_path))


def test_mixup_and_arguments_of_the_network_are_used(folders, tmp_path):
    options = {"mixup": 0.2, "cutmix": 1.0, "model": "pyconvresnet50", "model_args": "zero_init_residual=true"}
    finetune(config(folders, tmp_path / "run", epochs=1, lr=1e-9, **options))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights["stages.0.0.bn3.weight"].abs().max() < 1e-3


@pytest.mark.parametrize("sizes", ["", "px", "32@1", "32,48", "32,48@5,64@3", "32,48@x"])
def test_image_sizes_without_meaning_are_refused(folders, tmp_path, sizes):
    with pytest.raises(ValueError, match="image_size"):
        finetune(config(folders, tmp_path / "run", image_size=sizes))
    assert not (tmp_path / "run").exists()


def test_arguments_without_meaning_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="model_args 'drop_rate' is not like"):
        finetune(config(folders, tmp_path / "run", model_args="drop_rate"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"crop_scale": 0.0}, "crop_scale must be above 0"),
        ({"val_size": -1}, "val_size must not be negative"),
        ({"mixup": 0.2, "batch_size": 3}, "even batch_size, got 3"),
        ({"model_args": "depth=3"}, "resnet18_spd does not take these model_args"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_without_meaning_are_refused_and_leave_no_folder(folders, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(config(folders, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_detector_is_refused_and_leaves_no_folder(folders, tmp_path):
    with pytest.raises(ValueError, match="yolov8n_spd is a detector; give a classification network"):
        finetune(config(folders, tmp_path / "run", model="yolov8n_spd"))
    assert not (tmp_path / "run").exists()


def test_a_missing_validation_split_is_said(folders, tmp_path):
    (folders / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no val split; add one or hold images out with --val-size"):
        finetune(config(folders, tmp_path / "run"))
    assert finetune(config(folders, tmp_path / "run", epochs=1, val_size=6)) >= 0


def test_an_empty_class_folder_is_named(folders):
    for file in (folders / "train" / "green").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="green holds no image"):
        open_data(folders, "train")


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_data(tmp_path / "nowhere", "train")


def test_held_out_images_are_the_same_share_of_every_class_and_the_same_every_time(folders):
    data = open_data(folders, "train")
    train, val = train_val_split(data, 6, seed=1)
    assert [val.labels.count(label) for label in range(3)] == [2, 2, 2]
    assert len(train.labels) == 18
    assert train_val_split(data, 6, seed=1)[1].images.indices == val.images.indices
    assert train_val_split(data, 6, seed=2)[1].images.indices != val.images.indices


def test_too_few_images_to_hold_out_are_said(folders):
    data = open_data(folders, "train")
    with pytest.raises(DataError, match="'blue' has 8 images, too few"):
        train_val_split(data, 24, seed=0)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_parquet_files_in_the_hugging_face_layout_are_read_with_their_class_names(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet data needs the extra `train`")
    from pyarrow import parquet

    rows = [{"bytes": encoded(picture(COLOURS["red"], i)), "path": None} for i in range(4)]
    features = {"info": {"features": {"label": {"names": ["circle", "square"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": rows, "label": [0, 1, 1, 0]})
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "train-00000-of-00001.parquet"
    )
    data = open_data(tmp_path, "train")
    assert (data.labels, data.class_names) == ([0, 1, 1, 0], ["circle", "square"])
    image, label = data.images[1]
    assert (image.mode, image.size, label) == ("RGB", (16, 16), 1)


def test_a_parquet_file_without_the_columns_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet data needs the extra `train`")
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": [1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has no column 'image'"):
        open_data(tmp_path, "train")


def test_a_multistep_schedule_divides_the_learning_rate_by_ten_at_its_epochs(folders, tmp_path):
    steps = {"sched": "multistep", "decay_epochs": "1,3", "opt": "momentum", "lr": 0.1, "decay_all": True}
    finetune(config(folders, tmp_path / "run", model="cifar_resnet20", epochs=4, crop_padding=2, **steps))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    "options", [{"sched": "multistep"}, {"decay_epochs": "1,2"}, {"sched": "linear"}, {"crop_padding": -1}]
)
def test_schedules_without_meaning_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=r"sched is cosine, or multistep with decay_epochs|crop_padding"):
        config(tmp_path, tmp_path / "run", **options)


def test_the_crop_of_a_padded_image_moves_it_over_black(folders):
    images = open_data(folders, "train")
    assert images is not None
    batches = training.loader(
        images, 16, 24, True, 0, crop_padding=4, color_jitter=0.0, hflip=0.0, mean=(0, 0, 0), std=(1, 1, 1)
    )
    torch.manual_seed(0)
    batch, _ = next(iter(batches))
    black = (batch == 0).all(1)
    edges = [black[:, 0].all(1), black[:, -1].all(1), black[:, :, 0].all(1), black[:, :, -1].all(1)]
    assert all(0 < edge.sum() < 24 for edge in edges)
    assert not black[:, 4:-4, 4:-4].any()


def test_training_adds_the_regularization_of_bsconvs_networks(folders, tmp_path, monkeypatch):
    losses = []

    def regularization_loss(net: BSConvMobileNetV3) -> torch.Tensor:
        losses.append(net.regularization)
        return next(net.parameters()).sum()

    monkeypatch.setattr(BSConvMobileNetV3, "regularization_loss", regularization_loss)
    finetune(config(folders, tmp_path / "run", model="cifar_mobilenetv3_large_w1_bsconvs", epochs=1, image_size="32"))
    assert losses == 3 * [0.1]


def test_a_network_of_one_image_size_is_trained_at_the_size_asked_for(folders, tmp_path):
    options = {"model": "cifar_parc_mobilenetv2_pfd", "epochs": 1}
    finetune(config(folders, tmp_path / "run", image_size="48", **options))
    net = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert net.stages[-2][0](torch.zeros(1, 160, 5, 5)).shape[-2:] == (5, 5)
    assert tuple(net.pretrained_cfg["input_size"]) == (3, 48, 48)
    for other in ({"image_size": "32,48@1"}, {"image_size": "48", "model_args": "img_size=32"}):
        with pytest.raises(ValueError, match="takes images of one size: give one --image-size"):
            finetune(config(folders, tmp_path / "other", **options, **other))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("epochs", ["1,x", "3,1", "2,2"])
def test_decay_epochs_that_do_not_rise_are_refused_before_anything_is_written(epochs, tmp_path):
    with pytest.raises(ValueError, match="rising whole numbers"):
        config(tmp_path, tmp_path / "run", sched="multistep", decay_epochs=epochs)
