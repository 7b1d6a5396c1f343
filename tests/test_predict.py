import copy
import errno
import json
import os
import re
import shutil
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from networks import config_of
from PIL import Image
from timm.models import save_for_hf

from spd_zoo import Detector
from spd_zoo.cli.main import main
from spd_zoo.data.labelled import open_data
from spd_zoo.data.notes import Notes
from spd_zoo.data.reading import files_in, find_images, read_image
from spd_zoo.exporter import export
from spd_zoo.inference.classifier import Classifier, predict
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.finetune import finetune
from spd_zoo.weights import WeightsError, save_network
from spd_zoo.weights.load import ModelError, class_names, timm_name

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    net: Any = timm.create_model("pyconvresnet18", num_classes=3).eval()
    with torch.inference_mode():  # a classifier that gives different images different answers
        features = net.forward_head(net.forward_features(torch.randn(8, 3, 32, 32)), pre_logits=True)
        weight = torch.randn(3, features.shape[1]) / features.sub(features.mean(0)).norm(dim=1).mean()
        net.head.fc.load_state_dict({"weight": weight, "bias": -weight @ features.mean(0)})
    return net


@pytest.fixture(scope="module")
def saved(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    config = {"pretrained_cfg": {"input_size": (3, 32, 32)}, "label_names": NAMES}
    save_for_hf(net, str(folder), config, safe_serialization=True)
    return f"local-dir:{folder}"


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR).save(path)
    return path


def test_predictions_are_those_of_the_network_in_the_order_of_the_images(net: Any, saved: str, tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    answers = list(predict(saved, paths, top_k=3, batch_size=2, device="cpu"))
    assert [answer.path for answer in answers] == paths
    cfg = dict(net.pretrained_cfg, input_size=(3, 32, 32))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    for path, answer in zip(paths, answers, strict=True):
        with torch.inference_mode():
            expected = net(transform(Image.open(path))[None]).softmax(1)[0]
        assert [guess.index for guess in answer.top] == expected.argsort(descending=True).tolist()
        for guess in answer.top:
            assert guess.probability == pytest.approx(expected[guess.index].item(), abs=1e-4)
            assert guess.name == NAMES[guess.index]
    assert len({round(answer.top[0].probability, 3) for answer in answers}) > 1


def test_a_classifier_gives_for_images_in_any_form_what_predict_gives(net: Any, saved: str, tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    answers = list(predict(saved, paths, top_k=3, device="cpu"))
    classifier = Classifier(saved, device="cpu", batch_size=2)
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    forms: list[Any] = [
        paths,
        [str(path) for path in paths],
        pictures,
        arrays,
        tensors,
        [tensor / 255 for tensor in tensors],
    ]
    for images in [*forms, tuple(paths), tmp_path, str(tmp_path), f"{tmp_path}/*.png"]:
        found = classifier(images)
        assert [each.name for each in found] == [answer.top[0].name for answer in answers]
        for each, answer in zip(found, answers, strict=True):
            expected = [one.probability for one in answer.top]  # of a batch of another size
            assert [one.probability for one in each.top(3)] == pytest.approx(expected, abs=1e-4)
    alone = classifier(paths[0])
    assert alone.name == answers[0].top[0].name and alone.image == paths[0]
    assert classifier([]) == []
    again = Classifier(classifier.net)(arrays[0])
    torch.testing.assert_close(again.probabilities, alone.probabilities)


def test_a_classification_is_a_small_object(saved: str, tmp_path: Path) -> None:
    classifier = Classifier(saved, device="cpu", class_map={"kitten": "cat"})
    path = write_image(tmp_path / "a.png")
    found = classifier(path)
    assert found.names == classifier.names == ("kitten", "dog", "owl")
    assert found.probabilities.sum().item() == pytest.approx(1)
    best = found.top(1)[0]
    assert (
        (best.name, best.probability)
        == (found.name, found.probability)
        == (found.names[best.index], max(found.probabilities))
    )
    assert json.loads(json.dumps(found.to_dict(2)))["top"][0] == {
        "index": best.index,
        "name": best.name,
        "probability": best.probability,
    }
    assert len(found.to_dict(2)["top"]) == 2
    table = found.to_pandas()
    assert list(table["class"]) == list(found.names)
    assert table["probability"].tolist() == found.probabilities.tolist()
    assert repr(found).startswith(f"Classification({found.name} ") and "\n" not in repr(found)
    assert "3 classes, 32 pixels, on cpu" in repr(classifier) and "\n" not in repr(classifier)
    assert "<img src=" in found._repr_html_() and found.name in found._repr_html_()
    path.unlink()
    assert "<img" not in found._repr_html_() and found.name in found._repr_html_()
    with pytest.raises(ValueError, match="k must be at least 1"):
        found.top(0)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("missing.png", "missing.png: there is no such file"),
        (["."], "is a folder; give it alone"),
        (["*.png"], r"\*\.png is a pattern; give it alone"),
        ("*.png", r"\*\.png: there is no such file, nor does a file match it as a pattern"),
        ("https://example.org/a.png", r"^https://example\.org/a\.png is an address, which is not read"),
        ("empty", "this folder holds no image"),
        (np.zeros((4, 4, 2), np.uint8), "an array must be"),
        (None, "got NoneType"),
    ],
    ids=str,
)
def test_an_image_that_no_classifier_takes_is_one_sentence(
    image: Any, words: str, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=words):
        Classifier(saved, device="cpu")(image)


def test_a_network_made_for_other_channels_reads_images_with_its_own() -> None:
    grey: Any = timm.create_model("cifar_resnet20", num_classes=3, in_chans=1)
    image = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    assert grey.pretrained_cfg["input_size"][0] == 3  # as in timm, which describes the weights
    found = Classifier(grey, device="cpu")(np.stack([image] * 3, 2))
    torch.testing.assert_close(found.probabilities, Classifier(grey, device="cpu")(image).probabilities)
    normalize: Any = Classifier(grey, device="cpu").reader.transform
    assert normalize.transforms[-1].mean.tolist() == [pytest.approx(sum(grey.pretrained_cfg["mean"]) / 3)]
    with pytest.raises(ModelError, match="takes 4 channels; images have 1 or 3"):
        Classifier(timm.create_model("cifar_resnet20", in_chans=4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_ghostnet_effdown", "test_vit"])
def test_a_network_reads_images_at_the_size_that_it_was_created_with_or_set_to(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    created = timm.create_model(name, num_classes=3, img_size=64)
    changed: Any = timm.create_model(name, num_classes=3)
    changed.set_input_size(64)
    for net in (created, changed):
        classifier = Classifier(net, device="cpu")
        assert classifier.image_size == (64, 64)
        assert len(classifier(image).probabilities) == 3


def test_networks_that_cannot_classify_are_refused() -> None:
    with pytest.raises(ModelError, match=r"spd_zoo\.Detector"):
        Classifier(timm.create_model("yolov8n_spd"))
    with pytest.raises(ModelError, match="only features"):
        Classifier(timm.create_model("cifar_resnet20", num_classes=0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Classifier("cifar_resnet20", batch_size=0)
    no_integer: Any = 2.5
    with pytest.raises(ValueError, match=r"batch_size must be a whole number, got 2\.5"):
        Classifier("cifar_resnet20", batch_size=no_integer)


WRAPPERS = [
    pytest.param(torch.nn.DataParallel, "DataParallel is a module around a network; .* its attribute module$"),
    pytest.param(torch.compile, "OptimizedModule is .*; .* attribute _orig_mod$", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("wrapper", "message"), WRAPPERS, ids=["parallel", "compiled"])
@pytest.mark.parametrize("use", [Classifier, Detector, partial(export, to="pt2")], ids=["classify", "detect", "export"])
def test_a_module_around_a_network_is_refused(use: Any, wrapper: Any, message: str) -> None:
    network = "yolov8n_spd" if use is Detector else "cifar_resnet20"
    with pytest.raises(ModelError, match=message):
        use(wrapper(timm.create_model(network, num_classes=3)))


@pytest.mark.parametrize("use", [Classifier, Detector, partial(export, to="pt2")], ids=["classify", "detect", "export"])
def test_a_module_of_unknown_images_is_refused(use: Any) -> None:
    with pytest.raises(ModelError, match=r"Linear has no pretrained_cfg, which .*; use one of timm's networks"):
        use(torch.nn.Linear(3, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_computes_no_finite_numbers_is_an_error(value: float, net: Any) -> None:
    broken = copy.deepcopy(net)
    broken.head.fc.bias.data[1] = value
    message = r"PyConvResNet computes numbers that are not finite in torch\.float32: its weights are damaged, or need a"
    with pytest.raises(ModelError, match=message):
        Classifier(broken)(np.zeros((48, 48, 3), np.uint8))


def test_more_classes_than_there_are_give_all_of_them(saved: str, tmp_path: Path) -> None:
    (answer,) = predict(saved, [write_image(tmp_path / "a.png")], top_k=9, device="cpu")
    assert sum(guess.probability for guess in answer.top) == pytest.approx(1)
    assert len(answer.top) == 3


def test_a_broken_image_does_not_stop_the_others(saved: str, tmp_path: Path) -> None:
    paths = [tmp_path / "missing.png", write_image(tmp_path / "a.png"), tmp_path / "text.png"]
    paths[2].write_text("no image")
    missing, good, text = predict(saved, paths, batch_size=2, device="cpu")
    assert missing.top == () and "no such file" in str(missing.error)
    assert len(good.top) == 3 and good.error is None
    assert text.top == () and "no image" in str(text.error)


def spider(path: Path) -> Path:
    """A SPIDER file, whatever its name says, with a header in which Pillow itself raises an AttributeError."""
    header = np.zeros(64, ">f4")
    for index, value in ((1, 1), (2, 8), (5, 1), (12, 8), (13, 8), (22, 256), (23, 32), (27, 1)):
        header[index - 1] = value
    path.write_bytes(header.tobytes() + bytes(256))
    return path


def test_any_exception_of_pillow_is_the_error_of_one_image(saved: str, tmp_path: Path) -> None:
    odd, good = spider(tmp_path / "a.png"), write_image(tmp_path / "b.png")
    with pytest.raises(AttributeError), Image.open(odd) as image:
        image.load()
    first, second = predict(saved, [odd, good], device="cpu")
    assert first.top == () and first.error is not None and "cannot read this image" in first.error
    assert len(second.top) == 3


def test_no_more_images_are_read_than_a_batch_holds(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_image(tmp_path / f"{i}.png") for i in range(4)]
    read = []

    def noted(path: str, mode: str) -> Image.Image:
        read.append(Path(path))
        return read_image(path, mode)

    monkeypatch.setattr("spd_zoo.inference.classifier.read_image", noted)
    next(predict(saved, paths, batch_size=2, device="cpu"))
    assert read == paths[:2]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_images_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.jpg" if mode == "YCbCr" else "image.tif")  # Pillow < 13 cannot read its YCbCr TIFFs
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_a_palette_with_transparency_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image = Image.new("RGB", (4, 4), (200, 30, 10)).quantize(4)
    image.save(path, transparency=bytes([128, 255, 255, 255]))
    assert read_image(path).getpixel((0, 0)) == (200, 30, 10)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], np.uint16)).save(path)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_are_refused(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    Image.fromarray(np.full((4, 4), 70000, dtype)).save(path)
    with pytest.raises(ValueError, match="32 bits"):
        read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_an_image_is_turned_upright(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image = Image.new(mode, (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(path, exif=exif)
    assert read_image(path).size == (2, 6)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="truncated"):
        read_image(path)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(ValueError, match="decompression bomb"):
        read_image(path)


def test_folders_and_globs_name_the_images_in_them(tmp_path: Path) -> None:
    first, second = write_image(tmp_path / "b.PNG"), write_image(tmp_path / "deeper" / "a.jpg")
    write_image(tmp_path / ".hidden" / "a.jpg")
    (tmp_path / "notes.txt").write_text("not to be answered")
    assert find_images([str(tmp_path)]) == [first, second]
    assert find_images([str(tmp_path / "*.PNG"), str(tmp_path / "**" / "*.jpg")]) == [first, second]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write_image(tmp_path / "a1.png")
    odd = write_image(tmp_path / "a[1].png")
    assert find_images([str(odd)]) == [odd]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (folder,) = find_images([str(tmp_path)])
    with pytest.raises(ValueError, match="folder holds no image"):
        read_image(folder)


def test_a_folder_without_images_beside_others_is_left_out(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    image = write_image(tmp_path / "full" / "a.png")
    notes = Notes()
    assert find_images([str(tmp_path / "empty"), str(tmp_path / "full")], notes) == [image]
    assert notes.lines() == [f"the folder {tmp_path / 'empty'} holds no image"]


def test_an_exported_file_in_upper_case_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.ONNX").write_bytes(b"\x08")
    with pytest.raises(ModelError, match=r"a\.ONNX is no network; .* rename it to end in \.onnx"):
        timm_name(str(tmp_path / "a.ONNX"))


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "secret", ".Trash"):
        (tmp_path / name).mkdir()
    image, scandir = write_image(tmp_path / "open" / "a.png"), os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name in ("secret", ".Trash"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_images([str(tmp_path)]) == [image, tmp_path / "secret"]
    with pytest.raises(ValueError, match="this folder cannot be read: Permission denied"):
        read_image(tmp_path / "secret")
    with pytest.raises(PermissionError, match="secret"):
        list(files_in(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("[" * 100_000, "is no JSON that can be read"),
        ("[1]", "is invalid at top level"),
        ({"architecture": 3}, "is invalid at architecture: 3 is not of type 'string'"),
        ({"num_classes": "2"}, "is invalid at num_classes"),
        ({"model_args": [1]}, "is invalid at model_args"),
        ({"pretrained_cfg": None}, "is invalid at pretrained_cfg"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "1000000 is greater than the maximum"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "is invalid at std/0"),
        ({"pretrained_cfg": {"crop_mode": "middle"}}, "is invalid at crop_mode: 'middle' is not one of"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5]}}, "other numbers of channels"),
        ({"label_names": ["a"]}, "names 1 classes, but num_classes is 2"),
    ],
    ids=range(11),
)
def test_a_config_that_no_network_has_is_one_sentence(tmp_path: Path, changes: Any, message: str) -> None:
    good = {"architecture": "cifar_resnet20", "num_classes": 2, "pretrained_cfg": {}}
    text = changes if isinstance(changes, str) else json.dumps(good | changes)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").touch()
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "config.json")) + f".*{message}"):
            timm_name(name)
    with pytest.raises(WeightsError, match=message):
        finetune(FinetuneConfig(f"local-dir:{tmp_path}", "data", tmp_path / "run"))


def test_linked_folders_are_read_once_around_a_circle_and_broken_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "1.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a" / "2.png")
    try:
        (tmp_path / "in" / "a" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in" / "a", target_is_directory=True)
        (tmp_path / "in" / "a" / "3.png").symlink_to(tmp_path / "nowhere.png")
    except (OSError, NotImplementedError):
        pytest.skip("this system or user makes no symbolic links")
    found = [file.relative_to(tmp_path / "in" / "a").as_posix() for file in find_images([str(tmp_path / "in")])]
    assert found == ["2.png", "3.png", "link/1.png"]
    data = open_data(tmp_path / "in", "train")
    assert data is not None and len(data) == 3
    with pytest.raises(ValueError, match="this link leads to no file"):
        read_image(tmp_path / "in" / "a" / "3.png")


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    (pattern,) = find_images([str(tmp_path / "*.png")])
    with pytest.raises(ValueError, match="no such file"):
        read_image(pattern)


def test_classes_of_imagenet_weights_have_names() -> None:
    cfg = config_of("pyconvresnet50.in1k").to_dict()
    assert class_names(cfg)[1] == "goldfish, Carassius auratus"


def test_classes_of_timms_imagenet_weights_have_names() -> None:
    cfg = config_of("resnet18.a1_in1k").to_dict()
    assert class_names(cfg)[1] == "goldfish, Carassius auratus"


@pytest.mark.parametrize("name", ["pyconvresnet18", "resnet50_spd"])
def test_classes_without_names_are_numbers(name: str) -> None:
    cfg = config_of(name).to_dict()
    assert class_names(cfg) == [str(i) for i in range(cfg["num_classes"])]


def test_named_and_unnamed_classes_can_mix() -> None:
    assert class_names({"num_classes": 3, "label_names": {"0": "cat", "2": "owl"}}) == ["cat", "1", "owl"]


@pytest.mark.parametrize("name", ["pyconvresnet50.in1k", "pyconvresnet50", "resnet18"])
def test_networks_of_the_zoo_and_of_timm_are_known(name: str) -> None:
    assert timm_name(name) == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pyconvresnet51", "pyconvresnet50"),
        ("PyConvResNet50_SPD", "pyconvresnet50_spd"),
        ("pyconvresnet50.in1", "pyconvresnet50.in1k"),
    ],
)
def test_an_unknown_network_gives_the_nearest_names(name: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=rf"no network '{name}'; the nearest names are .*\b{nearest}\b"):
        timm_name(name)


def test_an_unknown_network_like_no_other_gives_the_command_that_lists_all() -> None:
    with pytest.raises(ModelError, match="`spd-zoo list`"):
        timm_name("qqqqqq")


def test_the_folder_of_a_run_is_a_network(saved: str, tmp_path: Path) -> None:
    assert timm_name(saved.removeprefix("local-dir:")) == saved
    with pytest.raises(ModelError, match=r"is a folder without config\.json"):
        timm_name(str(tmp_path))


def test_class_names_do_not_control_the_terminal(
    net: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["\x1b[2Jcat\x07", "d\nog", "o\u202ewl 👩\u200d🔬"]
    save_network(net, tmp_path / "net", {"input_size": (3, 32, 32), "label_names": names})
    assert main(["predict", str(tmp_path / "net"), str(write_image(tmp_path / "a.png"))]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition("%  ")[2] for line in lines) == ["[2Jcat", "d og", "o wl 👩\u200d🔬"]


def test_a_name_that_is_a_network_and_a_run_is_refused(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resnet18").mkdir()
    assert timm_name("resnet18") == "resnet18"  # some folder
    shutil.copytree(saved.removeprefix("local-dir:"), "cifar_resnet20")
    with pytest.raises(ModelError, match=r"name of a network, and of a run's folder here; write \./cifar_resnet20 for"):
        timm_name("cifar_resnet20")
    assert timm_name("./cifar_resnet20") == "local-dir:./cifar_resnet20"


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "other.pth.tar"])
def test_a_folder_without_safetensors_is_refused_unread(saved: str, tmp_path: Path, file: str) -> None:
    folder = Path(saved.removeprefix("local-dir:"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / file).write_bytes(b"what timm would hand to torch.load")
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        with pytest.raises(ModelError, match=r"has no model\.safetensors, and no other file is read from a folder"):
            next(predict(name, [tmp_path]))


def test_a_network_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights"):
        next(predict("pyconvresnet18", [write_image(tmp_path / "a.png")]))


def test_a_saved_folder_with_broken_weights_is_refused(saved: str, tmp_path: Path) -> None:
    folder = Path(saved.removeprefix("local-dir:"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(WeightsError, match=f"cannot read the weights in {tmp_path}"):
        next(predict(f"local-dir:{tmp_path}", [tmp_path]))


@pytest.mark.slow
def test_a_saved_folder_with_another_networks_name_is_refused(saved: str, tmp_path: Path) -> None:
    folder = Path(saved.removeprefix("local-dir:"))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "pyconvresnet34"}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="it fits pyconvresnet18"):
        next(predict(f"local-dir:{tmp_path}", [tmp_path]))


def test_a_detector_is_refused(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("yolov8n_spd", num_classes=3), str(tmp_path), safe_serialization=True)
    with pytest.raises(ModelError, match=r"is a detector; run `spd-zoo detect .* IMAGES`"):
        next(predict(str(tmp_path), [write_image(tmp_path / "a.png")], device="cpu"))
    with pytest.raises(ModelError, match=r"is a detector; run `spd-zoo detect .* IMAGES`"):
        next(predict("yolov5n_spd", [tmp_path / "a.png"]))  # whose weights are not on this machine


def test_an_impossible_device_is_refused(saved: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot use device 'nonsense'"):
        next(predict(saved, [tmp_path], device="nonsense"))
