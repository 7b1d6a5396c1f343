"""Distillation: what a teacher sees and says, which of its classes count, and runs that go on to the same bits."""

import json
import pickle
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from pictures import COLOURS, make_folders, picture
from PIL import Image
from runs import finetune_in_processes, rows_of, same_run, stop_in
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from spd_zoo.cli.main import main
from spd_zoo.data.classes import NetworkClasses, network_classes, outputs_of
from spd_zoo.data.labelled import DataError, open_data
from spd_zoo.process import Process
from spd_zoo.training import memory, planning
from spd_zoo.training.classification import distillation, report
from spd_zoo.training.classification.distillation import DistilledTraining, Teacher, load_teacher
from spd_zoo.training.classification.task import Classification, ClassifierTraining
from spd_zoo.training.config import FinetuneConfig, load_config
from spd_zoo.training.finetune import Result, Stopped, finetune
from spd_zoo.training.memory import forward_bytes_per_image
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.steps import seed_everything
from spd_zoo.weights import WeightsError, save_network
from spd_zoo.weights.load import ModelError, load_file

CPU = torch.device("cpu")
NAMES = ["red", "pink", "blue", "green"]  # the teacher's, in another order than the student's, and one more


class ColourNet(nn.Module):
    """Knows the pictures' colours, and remembers what it was shown."""

    def __init__(self, mean: float = 0.3, std: float = 0.2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]))
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.in_chans, self.num_classes = 3, 4
        self.pretrained_cfg = {
            "architecture": "colour",
            "num_classes": 4,
            "input_size": (3, 24, 24),
            "mean": (mean,) * 3,
        }
        self.pretrained_cfg |= {"std": (std,) * 3, "label_names": NAMES, "tag": ""}
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return 3 * self.norm(images).mean((2, 3)) @ self.weight.T


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than these runs; test_report looks at them."""
    monkeypatch.setattr(report, "_plots", lambda *_: {})


@pytest.fixture
def colour_net(monkeypatch: pytest.MonkeyPatch) -> ColourNet:
    """What `teacher="colour"` loads."""
    net = ColourNet().eval()
    monkeypatch.setattr(distillation, "load_network", lambda name, device: net)
    return net


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "data", train=8, val=2)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a network at random that names the pictures' classes."""
    folder = tmp_path_factory.mktemp("taught")
    return write_teacher(folder, seed=1)


def write_teacher(folder: Path, seed: int, **cfg: Any) -> str:
    torch.manual_seed(seed)
    net = timm.create_model("cifar_resnet20", num_classes=4)
    cfg = {"label_names": NAMES, "num_classes": 4, "input_size": (3, 16, 16)} | cfg
    save_network(net, folder, cfg)
    return str(folder)


def config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "image_size": "16", "warmup_epochs": 0, "lr": 1e-3}
    options |= {"workers": 0, "bf16": False, "device": "cpu", "pretrained": False, "model": "cifar_resnet20"}
    return FinetuneConfig(**options | {"data": str(data), "out": out} | changes)


def run(data: Path, out: Path, **changes: Any) -> Result:
    result = finetune(config(data, out, **changes))
    assert result is not None
    return result


def started(folders: Path, net: nn.Module, teacher: Teacher, **changes: Any) -> tuple[DistilledTraining, Preprocessing]:
    """A student with its teacher, and how pixels become the student's input."""
    asked = config(folders, folders, teacher="colour", **changes)
    data = open_data(str(folders), "train")
    assert data is not None
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), CPU)
    return DistilledTraining(ClassifierTraining(net, asked, data, CPU), teacher, asked, preprocessing), preprocessing


def student() -> Any:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", num_classes=3).eval()


# What the teacher sees, and what its word is worth


@pytest.mark.parametrize("size", [24, 8])
def test_the_teacher_sees_the_same_images_at_its_own_size_and_normalisation(
    folders: Path, colour_net: ColourNet, size: int
) -> None:
    teacher = load_teacher(config(folders, folders, teacher="colour", teacher_size=str(size)), list(COLOURS), 3, CPU)
    task, preprocessing = started(folders, student(), teacher)
    pixels = torch.stack([pil_to_tensor(picture(colour, 0)) for colour in COLOURS.values()])
    task(preprocessing.normalize(pixels), torch.tensor([0, 1, 2]))
    resized = F.interpolate(pixels / 255, (size, size), mode="bicubic", antialias=True)
    assert colour_net.seen[-1].shape == (3, 3, size, size)
    torch.testing.assert_close(colour_net.seen[-1], (resized - 0.3) / 0.2, rtol=0, atol=1e-4)


def test_the_loss_is_that_of_labels_and_that_of_the_renormalised_teacher(folders: Path, colour_net: ColourNet) -> None:
    teacher = load_teacher(config(folders, folders, teacher="colour"), list(COLOURS), 3, CPU)
    net = student()
    task, _ = started(folders, net, teacher, distill_weight=0.7, distill_temperature=2.0, label_smoothing=0.0)
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])
    result = task(images, labels)
    logits = net(images)
    everything = (colour_net(colour_net.seen[-1]) / 2).softmax(1)
    of_teacher = everything[:, [2, 3, 0]] / everything[:, [2, 3, 0]].sum(1, keepdim=True)  # blue, green, red
    divergence = (of_teacher * (of_teacher.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    label_loss = F.cross_entropy(logits, labels)
    assert result["loss"].shape == ()
    assert result["loss"].item() == pytest.approx((0.3 * label_loss + 0.7 * 4 * divergence).item(), rel=1e-4)
    assert result["terms"]["label_loss"].item() == pytest.approx(label_loss.item(), rel=1e-4)
    assert result["terms"]["distill_loss"].item() == pytest.approx(4 * divergence.item(), rel=1e-4)


def test_the_teacher_stays_as_it_is(folders: Path, colour_net: ColourNet) -> None:
    teacher = load_teacher(config(folders, folders, teacher="colour"), list(COLOURS), 3, CPU)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    task, _ = started(folders, student().train(), teacher)
    task.train()(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1]))["loss"].backward()
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert {id(p) for p in task.get_clip_parameters()}.isdisjoint(map(id, teacher.parameters()))


def test_a_task_that_is_compiled_again_computes_the_same(folders: Path, colour_net: ColourNet) -> None:
    task, _ = started(
        folders, student(), load_teacher(config(folders, folders, teacher="colour"), list(COLOURS), 3, CPU)
    )
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
    expected = task(images, labels)["loss"]
    net = task.trainable_module
    for _ in range(2):  # as a run does when other layers begin to train
        task.trainable_module = net
        task.compile(backend="eager")
    torch.testing.assert_close(task(images, labels)["loss"], expected)
    compiled: Any = task.teacher.model
    assert compiled._orig_mod is colour_net


def test_half_precision_compares_probabilities_in_float32(folders: Path, colour_net: ColourNet) -> None:
    teacher = load_teacher(config(folders, folders, teacher="colour"), list(COLOURS), 3, CPU)
    net = student()
    task, _ = started(folders, net, teacher, distill_weight=1.0)
    images, labels = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(images, labels)["loss"]
        logits, of_teacher = net(images), teacher(teacher.normalize_input(images, task.student_mean, task.student_std))
    assert logits.dtype == of_teacher.dtype == torch.bfloat16  # the teacher computes in it, too
    of_student, of_teacher = ((values.detach().float() / 4).log_softmax(1) for values in (logits, of_teacher))
    expected = 16 * F.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mixed", [{"mixup": 5.0}, {"cutmix": 1.0}, {"erase": 1.0}], ids=["mixup", "cutmix", "erase"])
def test_the_teacher_sees_what_the_student_sees(folders: Path, colour_net: ColourNet, mixed: dict[str, float]) -> None:
    asked = config(folders, folders, teacher="colour", teacher_size="16", **mixed)
    task, preprocessing = started(folders, student(), load_teacher(asked, list(COLOURS), 3, CPU), **mixed)
    pixels = torch.stack([pil_to_tensor(picture(colour, i)) for i in range(2) for colour in COLOURS.values()])
    seed_everything(0)
    images, targets = Classification().preparation(asked, preprocessing, 3)(pixels, torch.arange(6) % 3)
    task(images, targets)
    shown = (images * task.student_std + task.student_mean - 0.3) / 0.2
    torch.testing.assert_close(colour_net.seen[-1], shown, rtol=0, atol=1e-4)
    assert not torch.allclose(images, preprocessing.normalize(pixels))


@pytest.mark.parametrize(("teacher_size", "seen"), [(16, 16), (8, 8), (48, 48)])
def test_a_larger_teacher_sees_details_that_the_student_does_not(
    folders: Path, tmp_path: Path, colour_net: ColourNet, teacher_size: int, seen: int
) -> None:
    for file in (folders / "train").rglob("*.png"):  # lines of one pixel at 48 px, a plain grey at 16 px
        Image.fromarray(np.tile(np.array([0, 255], np.uint8), (48, 24))).convert("RGB").save(file)
    options = {"image_size": "16", "crop_scale": 1.0, "crop_padding": 0, "hflip": 0.0, "interpolation": "bicubic"}
    run(folders, tmp_path / "run", epochs=1, **options, teacher="colour", teacher_size=str(teacher_size))
    views = [images for images in colour_net.seen if images.shape[-1] == seen]
    assert views
    contrast = torch.cat([images.std((1, 2, 3)) for images in views]).min().item() * 0.2
    assert contrast > 0.4 if teacher_size == 48 else contrast < 0.1


def test_padding_keeps_its_share_of_the_image(folders: Path, tmp_path: Path, colour_net: ColourNet) -> None:
    for file in (folders / "train").rglob("*.png"):
        Image.new("RGB", (48, 48), "white").save(file)
    run(folders, tmp_path / "run", epochs=1, crop_padding=4, teacher="colour", teacher_size="48")
    views = torch.cat([images for images in colour_net.seen if images.shape[-1] == 48])
    black = (views.amax((1, 3)) < 0).sum(1)  # rows
    assert 6 < black.max().item() <= 12  # pixels of 48, as 4 of 16


def test_views_of_a_square_teacher_keep_the_aspect_of_a_student_that_is_not_square(
    folders: Path, tmp_path: Path, colour_net: ColourNet
) -> None:
    for file in (folders / "train").rglob("*.png"):  # the left half is white
        Image.fromarray(np.tile(np.repeat(np.array([255, 0], np.uint8), 32), (32, 1))).convert("RGB").save(file)
    run(folders, tmp_path / "run", epochs=1, image_size="16x32", crop_padding=1, teacher="colour", teacher_size="48")
    views = torch.cat([images for images in colour_net.seen if images.shape[-2:] == (48, 48)])
    white = views.mean((1, 2, 3)) * 0.2 + 0.3
    assert len(white) == 24
    assert white.sub(0.5).abs().max() < 0.1  # every view shows both halves


@pytest.mark.slow
def test_a_student_follows_its_teacher_where_labels_are_noise(
    folders: Path, tmp_path: Path, colour_net: ColourNet
) -> None:
    for i, name in enumerate(COLOURS):  # every training image gets each label equally often
        for j in range(8):
            file = folders / "train" / name / f"{j}.png"
            picture(list(COLOURS.values())[(i + j) % 3], j).save(file)
    options = {"epochs": 10, "batch_size": 4, "lr": 2e-3}
    misled = run(folders, tmp_path / "misled", **options)
    told = run(folders, tmp_path / "told", **options, teacher="colour", distill_weight=1.0, distill_temperature=1.0)
    assert told.metrics["top1"] == 100
    assert misled.metrics["top1"] < 100


# Which classes


IMAGENET = network_classes(
    {"architecture": "resnet50", "tag": "a1_in1k", "num_classes": 1000, "label_names": None}, 1000
)


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (["n02123159", "n02123045"], [282, 281]),  # WordNet ids
        (["tabby", "tiger cat"], [281, 282]),  # names
        (["tabby", "n02123159"], [281, 282]),
    ],
)
def test_classes_are_found_by_name_or_wordnet_id(names: list[str], outputs: list[int]) -> None:
    assert outputs_of(names, IMAGENET, "the teacher") == (outputs, "")


@pytest.mark.parametrize(
    ("names", "network", "message"),
    [
        (["cat", "crane"], NetworkClasses(["crane", "cat", "crane"]), "the teacher has several classes 'crane'. The"),
        (["crane", "tabby"], IMAGENET, "the teacher has several classes 'crane'. The data has 2 classes"),
        (
            ["cat", "yak"],
            NetworkClasses(["dog", "cat", "cow"]),
            "has no class 'yak'. The data has 2 classes (cat, yak); the teacher has 3 classes (dog, cat, cow)",
        ),
        (["tabby", "n02123045", "tiger cat"], IMAGENET, "'tabby' and 'n02123045' are one class of the teacher"),
        (["cat", "dog"], NetworkClasses(["0", "1", "2"], named=False), "the teacher has no class 'cat'"),
    ],
    ids=["two-of-a-name", "two-of-imagenet", "unknown", "one-class", "unnamed"],
)
def test_classes_that_the_teacher_does_not_tell_apart_are_refused(
    names: list[str], network: NetworkClasses, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        outputs_of(names, network, "the teacher")


# What a teacher may be


def test_a_dry_run_tells_about_the_teacher(
    folders: Path, tmp_path: Path, taught: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size", "16", "--device", "cpu", "--workers", "0", "--dry-run", "--distill-weight", "0.5"]
    command = [
        "finetune",
        "cifar_resnet20",
        "--data",
        str(folders),
        "--out",
        str(tmp_path / "run"),
        "--teacher",
        taught,
    ]
    assert main([*command, *options]) == 0
    line = f"teacher: {taught} at 16 px, 3 of its 4 classes, weight 0.5, temperature 4\n"
    assert line in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("network", ["cifar_resnet20", "test_resnet"])
def test_a_file_is_a_teacher_with_the_name_of_its_network(save: Any, network: str, suffix: str) -> None:
    net: Any = timm.create_model(network, num_classes=3).eval()
    loaded: Any = load_file(network, save(net, suffix), "cpu")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(images), net(images))
    assert not loaded.training and not network_classes(loaded.pretrained_cfg, 3).named


def test_a_file_has_class_names_only_with_a_tag(save: Any) -> None:
    file = save(timm.create_model("test_resnet"))
    named, nameless = (load_file(name, file, "cpu") for name in ("test_resnet.r160_in1k", "test_resnet"))
    for net, expected in ((named, True), (nameless, False)):
        cfg: Any = net.pretrained_cfg
        assert network_classes(cfg, 1000).named is expected


class Trap:
    def __reduce__(self) -> Any:
        return print, ("the file ran something",)


@pytest.mark.parametrize("network", ["cifar_resnet20", "test_resnet"])
def test_nothing_in_a_teachers_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], network: str) -> None:
    file = tmp_path / "trap.pth"
    torch.save({"state_dict": timm.create_model(network).state_dict(), "trap": Trap()}, file)
    load_file(network, file, "cpu")
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(WeightsError):
        load_file(network, file, "cpu")
    assert "the file ran" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("network", ["test_resnet", "cifar_resnet110_bsconvu"])
def test_a_file_of_another_network_is_refused(save: Any, network: str) -> None:
    file = save(timm.create_model("cifar_resnet20"))
    with pytest.raises(WeightsError, match=rf"does not fit {network}.*it fits cifar_resnet20"):
        load_file(network, file, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "no_such_network"}, "the teacher: there is no network 'no_such_network'"),
        ({"teacher": "cifar_resnet110_bsconvu"}, "the teacher cifar_resnet110_bsconvu has no pretrained weights"),
        ({"teacher": "resnet50_spd"}, "resnet50_spd has no default weights; select some by name: resnet50_spd.spd_"),
        ({"teacher": "detector"}, "the teacher detector is a detector; choose a classifier"),
        ({"teacher": "taught/model.safetensors"}, "does not say of which network it is: give --teacher-model NETWORK"),
        ({"teacher": "x" * 300}, "the teacher: there is no network 'xxx"),
        ({"teacher": "taught.onnx"}, "the teacher: taught.onnx is an exported file, which predict"),
        ({"teacher": "damaged"}, "the teacher damaged is damaged: fc.weight holds a number that is not finite"),
        ({"teacher": "taught", "teacher_model": "cifar_resnet20"}, "teacher_model is for a teacher that is a file"),
        ({"teacher": "taught", "model_args": "in_chans=1"}, "takes images of 3 channels, cifar_resnet20 of 1"),
        ({"teacher": "taught", "teacher_digest": "00"}, "is not what it was when the run began"),
        (
            {"teacher": "vit.pth", "teacher_model": "test_vit", "teacher_size": "50"},
            "cannot compute images of 50 pixels",
        ),
        ({"teacher": "other"}, "has no class 'blue'. The data has 3 classes (blue, green, red); the teacher"),
        (
            {"model": "yolov8n_spd", "teacher": "taught"},
            "teacher is an option for classifiers, and yolov8n_spd is none",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_teach_is_refused_in_one_sentence(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path / "taught", seed=1)
    write_teacher(tmp_path / "other", seed=1, label_names=["a", "b", "c", "d"])
    Path("taught.onnx").touch()
    if options["teacher"] == "damaged":
        net: Any = timm.create_model("test_resnet", num_classes=4)
        net.fc.weight.data[0] = float("nan")
        save_network(net, tmp_path / "damaged", {"label_names": NAMES, "num_classes": 4})
    if options["teacher"] == "vit.pth":
        torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), "vit.pth")
    if options["teacher"] == "detector":
        detector = timm.create_model("yolov8n_spd", num_classes=3)
        save_network(detector, tmp_path / "detector", {"num_classes": 3, "input_size": (3, 64, 64)})
    if "model" in options:  # refused before its data is read
        folders = tmp_path
    with pytest.raises((ValueError, WeightsError), match=re.escape(message)) as refused:
        run(folders, tmp_path / "run", **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill_weight": 0.5}, "distill_weight is for a teacher; give --teacher, too"),
        ({"teacher_size": "32"}, "teacher_size is for a teacher; give --teacher, too"),
        ({"teacher": "x", "distill_weight": 1.5}, "distill_weight must be above 0 and at most 1, got 1.5"),
        ({"teacher": "x", "distill_temperature": 0.0}, "distill_temperature must be positive and finite, got 0.0"),
        ({"teacher": "x", "distill_temperature": float("inf")}, "distill_temperature must be positive and finite, got"),
        ({"teacher": "x", "teacher_size": "big"}, "image size 'big' is not like 64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_without_meaning_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path / "run", **options)


def test_the_own_size_of_a_teacher_is_the_one_that_it_was_made_for(folders: Path, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=4, img_size=64)  # timm's config of it says 160
    save_network(net, tmp_path / "taught", {"label_names": NAMES, "num_classes": 4})
    teacher = load_teacher(config(folders, folders, teacher=str(tmp_path / "taught")), list(COLOURS), 3, CPU)
    assert teacher.size == (64, 64)


def test_a_missing_teacher_file_is_an_error(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the teacher: there is no network, file or folder 'gone\.pth'"):
        run(folders, tmp_path / "run", teacher="gone.pth")


# Runs


def test_a_run_records_its_teacher_and_assumptions(
    folders: Path, tmp_path: Path, save: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(timm.create_model("cifar_resnet20", num_classes=3))
    run(folders, tmp_path / "run", epochs=1, teacher=file, teacher_model="cifar_resnet20")
    note = f"the teacher {file}: the network does not name its classes; those of the data are taken in timm's natural"
    assert f"note: {note} order: blue = 0, green = 1, red = 2\n" in capsys.readouterr().out
    assert note in json.loads((tmp_path / "run" / "data.json").read_text())["notes"][0]
    stored = load_config(tmp_path / "run" / "run.yaml")
    assert (stored["teacher"], stored["teacher_model"], stored["teacher_size"]) == (str(file), "cifar_resnet20", "32")
    assert re.fullmatch("[0-9a-f]{64}", stored["teacher_digest"])
    (row,) = rows_of(tmp_path / "run" / "metrics.csv")
    terms = 0.1 * float(row["train_label_loss"]) + 0.9 * float(row["train_distill_loss"])
    assert terms == pytest.approx(float(row["train_loss"]), rel=1e-4)


def test_a_run_is_not_resumed_with_another_teacher(folders: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "taught", seed=1)
    run(folders, tmp_path / "run", epochs=1, teacher=teacher)
    kept = (tmp_path / "run" / "last.pt").read_bytes()
    write_teacher(tmp_path / "taught", seed=2)
    with pytest.raises(ValueError, match=f"the teacher {teacher} is not what it was when the run began"):
        run(folders, tmp_path / "run", epochs=1, teacher=teacher)
    for other in (write_teacher(tmp_path / "elsewhere", seed=1), ""):
        with pytest.raises(ValueError, match="holds a run with teacher="):
            run(folders, tmp_path / "run", epochs=1, teacher=other)
    with pytest.raises(ValueError, match=r"holds a run with distill_weight=0\.9, not 0\.5"):
        run(folders, tmp_path / "run", epochs=1, teacher=teacher, distill_weight=0.5)
    assert (tmp_path / "run" / "last.pt").read_bytes() == kept


def test_a_teacher_is_known_by_its_weights_normalisation_and_classes(folders: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "taught", seed=1)
    asked = config(folders, folders, teacher=teacher)
    asked = replace(asked, **load_teacher(asked, list(COLOURS), 3, CPU).settings())
    for changed in ({"seed": 2}, {"seed": 1, "mean": (0.1, 0.1, 0.1)}, {"seed": 1, "label_names": NAMES[::-1]}):
        write_teacher(tmp_path / "taught", **changed)
        with pytest.raises(ValueError, match="is not what it was when the run began"):
            load_teacher(asked, list(COLOURS), 3, CPU)
    write_teacher(tmp_path / "taught", seed=1)
    assert load_teacher(asked, list(COLOURS), 3, CPU).digest == asked.teacher_digest


@pytest.mark.slow
def test_a_stopped_run_with_a_teacher_resumes_to_the_same_bits(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: str
) -> None:
    options = {"teacher": taught, "teacher_size": "24", "ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "accumulate": 2}
    options |= {"model_args": "drop_rate=0.3", "image_size": "16,32@1", "head_epochs": 1, "epochs": 3, "clip_grad": 1.0}
    run(folders, tmp_path / "whole", **options)
    for epoch, step in ((0, 1), (1, 2)):
        stop_in(monkeypatch, epoch, step)
        with pytest.raises(Stopped) as stopped:
            run(folders, tmp_path / "stopped", **options)
        assert stopped.value.number == signal.SIGTERM
        torch.manual_seed(epoch)
    run(folders, tmp_path / "stopped", **options)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_with_a_teacher_train_as_one(folders: Path, tmp_path: Path, taught: str) -> None:
    shared = {"epochs": 2, "opt": "momentum", "lr": 0.05, "teacher": taught, "head_epochs": 1}
    one, two = config(folders, tmp_path / "one", **shared, accumulate=2), config(folders, tmp_path / "two", **shared)
    finetune_in_processes(two)
    finetune(one)
    alone, together = (rows_of(folder / "metrics.csv") for folder in (one.out, two.out))
    for a, b in zip(alone, together, strict=True):
        for name in ("train_loss", "train_distill_loss", "lr"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4)


@pytest.mark.slow
def test_a_run_with_a_teacher_computes_in_bfloat16(folders: Path, tmp_path: Path, taught: str) -> None:
    result = run(folders, tmp_path / "half", epochs=1, teacher=taught, bf16=True)
    whole = run(folders, tmp_path / "whole", epochs=1, teacher=taught)
    one, other = (r.history[0]["train_distill_loss"] for r in (result, whole))
    assert one != other and one == pytest.approx(other, rel=0.05)


def test_the_memory_of_a_step_counts_the_teacher(folders: Path, monkeypatch: pytest.MonkeyPatch, taught: str) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 16 * 2.0**20)
    asked = config(folders, folders, teacher=taught, teacher_size="128", batch_size=16)
    net = timm.create_model(asked.model, device="meta")
    parts = [
        planning.plan(asked, Classification(), net, 24, ["a", "b", "c"], Process(CPU), teacher).micro_batches
        for teacher in (None, load_teacher(asked, list(COLOURS), 3, CPU))
    ]
    assert parts[0] < parts[1]


def test_the_memory_of_a_forward_pass_is_that_of_its_largest_operator() -> None:
    net = timm.create_model("cifar_resnet20")
    map_size = 4 * 16 * 32 * 32  # bytes of a map of the first stage, the largest
    assert 2 * map_size <= forward_bytes_per_image(net, (32, 32)) <= 3 * map_size  # an addition has two inputs
