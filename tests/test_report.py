"""Evaluation and the report: metrics checked by hand, tables in timm's format, a self-contained page."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pictures import make_folders
from PIL import Image
from runs import PATIENCE
from timm.models import save_for_hf

from spd_zoo.cli.main import main
from spd_zoo.data.labelled import open_data
from spd_zoo.data.reading import parse_size
from spd_zoo.exporter import export
from spd_zoo.inference.classifier import predict
from spd_zoo.training import comments
from spd_zoo.training.classification import report
from spd_zoo.training.classification.metrics import Predictions
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.evaluate import evaluate, save
from spd_zoo.training.finetune import finetune
from spd_zoo.training.run import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
Capture = pytest.CaptureFixture[str]


def predictions_of(*probabilities: tuple[float, ...], labels: list[int]) -> Predictions:
    return Predictions(torch.tensor(probabilities).log(), torch.tensor(labels), ["a", "b", "c"])


FOUR = predictions_of((0.7, 0.2, 0.1), (0.1, 0.6, 0.3), (0.05, 0.9, 0.05), (0.2, 0.45, 0.35), labels=[0, 0, 1, 2])


def test_top_1_and_top_2_count_the_largest_logits() -> None:
    assert FOUR.top(1) == 50
    assert FOUR.top(2) == 75
    assert FOUR.top(5) == 100


def test_the_confusion_matrix_has_true_classes_down_and_guesses_across() -> None:
    assert FOUR.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_precision_recall_and_f1_are_those_of_each_class() -> None:
    a, b, c = FOUR.per_class()
    assert (a["images"], a["precision"], a["recall"]) == (2, 1.0, 0.5) and a["f1"] == pytest.approx(2 / 3)
    assert (b["images"], b["precision"], b["recall"]) == (1, pytest.approx(1 / 3), 1.0) and b["f1"] == pytest.approx(
        0.5
    )
    assert (c["images"], c["precision"], c["recall"], c["f1"]) == (1, None, 0.0, 0.0)
    assert predictions_of((0.9, 0.05, 0.05), labels=[0]).per_class()[1] == {
        "class": "b", "images": 0, "precision": None, "recall": None, "f1": None
    }  # fmt: skip


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    # in tenths: 0.45 (wrong), 0.6 (wrong), 0.7 (right), 0.9 (right)
    assert FOUR.ece(bins=10) == pytest.approx((0.45 + 0.6 + 0.3 + 0.1) / 4)
    assert FOUR.ece(bins=1) == pytest.approx(abs((0.45 + 0.6 + 0.7 + 0.9) / 4 - 0.5))
    assert [step["images"] for step in FOUR.calibration(bins=2)] == [1, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("data"), train=1, val=4, test=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    config = {"pretrained_cfg": {"input_size": (3, 32, 32), "crop_pct": 1.0}, "label_names": ["red", "green", "blue"]}
    net = timm.create_model("cifar_resnet20", num_classes=3)
    save_for_hf(net, str(folder), config, safe_serialization=True)
    return folder


def test_evaluation_gives_a_row_of_timms_table_per_image_size(saved: Path, folders: Path, tmp_path: Path) -> None:
    small, large = evaluate(str(saved), folders, image_size=[16, 32], workers=0)
    save([small, large], tmp_path)
    (row, other) = csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))
    assert list(row) == [
        *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
    ]
    assert (row["img_size"], other["img_size"], row["crop_pct"], row["param_count"]) == ("16", "32", "1.0", "0.27")
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert (tmp_path / "confusion_16.csv").read_text().startswith("class,red,green,blue")
    images = [int(line["images"]) for line in csv.DictReader(io.StringIO((tmp_path / "per_class_32.csv").read_text()))]
    assert images == [3, 3, 3]  # the split test, if there is one


def test_evaluation_sees_what_the_network_computes(saved: Path, folders: Path) -> None:
    (found,) = evaluate(str(saved), folders, split="val", workers=0, batch_size=5)
    net = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    data = open_data(folders, "val")
    assert data is not None
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    with torch.inference_mode():
        logits = net(torch.stack([transform(data.image(i)) for i in range(12)]))
        mirrored = net(torch.stack([transform(data.image(i)).flip(-1) for i in range(12)]))
    assert torch.allclose(found.predictions.logits, logits, atol=1e-4)
    assert found.predictions.labels.tolist() == [2] * 4 + [1] * 4 + [0] * 4  # the network's numbers
    (both,) = evaluate(str(saved), folders, split="val", workers=0, flip=True)
    assert torch.allclose(both.predictions.logits, (logits + mirrored) / 2, atol=1e-4)


def test_other_class_names_need_a_class_map(saved: Path, folders: Path, capsys: Capture, tmp_path: Path) -> None:
    named = evaluate(str(saved), folders, workers=0)
    data = tmp_path / "data"
    for old, new in (("red", "rot"), ("green", "gruen"), ("blue", "blau")):
        shutil.copytree(folders / "test" / old, data / "test" / new)
    command = ["evaluate", str(saved), "--data", str(data), "--workers", "0", "--json"]
    assert main(command) == 1
    assert re.search(
        r"no class 'blau'. The data has 3 classes \(blau, gruen, rot\); the network has 3", capsys.readouterr().err
    )
    (tmp_path / "map.yaml").write_text("rot: red\ngruen: green\nblau: blue\n")
    assert main([*command, "--class-map", str(tmp_path / "map.yaml")]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["top1"] == pytest.approx(named[0].row["top1"], abs=1e-3) and row["notes"] == []
    images = [str(folders / "test" / "red" / "0.png")]
    assert main(["predict", str(saved), *images, "--class-map", str(tmp_path / "map.yaml")]) == 0
    out = capsys.readouterr().out
    assert "rot" in out and "gruen" in out and "blau" in out and "red\n" not in out


def test_assumptions_of_evaluation_are_printed_and_in_the_json(folders: Path, capsys: Capture, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("cifar_resnet20", num_classes=3), str(tmp_path / "net"), safe_serialization=True)
    command = [
        "evaluate",
        str(tmp_path / "net"),
        "--data",
        str(folders),
        "--image-size",
        "16x24",
        "--workers",
        "0",
        "--json",
    ]
    assert main(command) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)
    (note,) = row["notes"]
    assert "timm's natural order: blue = 0, green = 1, red = 2" in note
    assert printed.err.count(f"note: {note}\n") == 1 and row["img_size"] == "16x24"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["32", "24x48", "48x24"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_runs_figure_is_that_of_evaluate_predict_and_its_config(
    crop_mode: str, shape: str, capsys: Capture, tmp_path: Path
) -> None:
    data = make_folders(tmp_path / "data", train=6, val=6)
    for i, file in enumerate(sorted(data.rglob("*.png"))):  # what a crop, a stretch and a border make different
        with Image.open(file) as image:
            marked = Image.new("RGB", (30 + 7 * (i % 3), 20 + 9 * (i % 2)), (128, 128, 128))
            marked.paste(image, (marked.width - 16 if i % 2 else 0, 0))
        marked.save(file)
    run = tmp_path / "run"
    options = {"workers": 0, "device": "cpu", "epochs": 2, "batch_size": 6, "crop_mode": crop_mode, "image_size": shape}
    config = FinetuneConfig("cifar_resnet20", data=str(data), out=run, crop_pct=0.875, **options)  # type: ignore[arg-type]
    result = finetune(config)
    assert result is not None
    figure = re.findall(r"top-1 ([\d.]+) %, top-5", capsys.readouterr().out)[-1]
    (found,) = evaluate(str(run), data, split="val", workers=0)
    assert f"{found.row['top1']:.2f}" == figure == f"{result.metrics['top1']:.2f}"
    assert found.predictions.summary()["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    cfg = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    size = parse_size(shape)
    assert (cfg["crop_mode"], cfg["crop_pct"], tuple(cfg["input_size"])) == (crop_mode, 0.875, (3, *size))
    assert not {"test_input_size", "test_crop_pct"} & set(cfg)
    files = sorted((data / "val").rglob("*.png"))
    tops = [prediction.top[0].name for prediction in predict(str(run), files)]
    correct = sum(name == file.parent.name for name, file in zip(tops, files, strict=True))
    assert f"{100 * correct / len(files):.2f}" == figure
    import onnx

    described = {item.key: item.value for item in onnx.load(export(str(run), "onnx")).metadata_props}
    assert (described["crop_mode"], described["image_size"]) == (crop_mode, shape)


def test_the_command_prints_a_line_per_image_size(saved: Path, folders: Path, capsys: Capture, tmp_path: Path) -> None:
    command = ["evaluate", str(saved), "--data", str(folders), "--image-size", "16", "32", "--workers", "0"]
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["16 px", "32 px"] and "9 images" in lines[0]
    assert (tmp_path / "new" / "results.csv").exists()
    assert main([*command, "--json"]) == 0
    assert [row["img_size"] for row in json.loads(capsys.readouterr().out)] == [16, 32]


def test_evaluation_leaves_out_and_names_unreadable_images(saved: Path, folders: Path, capsys: Capture) -> None:
    torn = folders / "test" / "red" / "torn.png"
    torn.write_text("no image")
    try:
        assert main(["evaluate", str(saved), "--data", str(folders), "--workers", "0"]) == 0
    finally:
        torn.unlink()
    printed = capsys.readouterr()
    assert "9 images of test" in printed.out
    assert f"left out {torn}: this is no image in a format that Pillow knows" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "extra"], "has no split extra; it has train, val, test"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
    ],
)
def test_invalid_evaluations_give_one_clear_sentence(
    saved: Path, folders: Path, capsys: Capture, options: list[str], message: str
) -> None:
    assert main(["evaluate", str(saved), "--data", str(folders), *options]) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_the_report_is_one_self_contained_page(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra `train`")
    data = open_data(folders, "val")
    assert data is not None
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    names = ["<b>lue", "gr$een", "röd 猫"]
    answers = Predictions(logits, torch.tensor(data.labels), names)
    same = {"image_size": 16, "lr": 0.1, "val_loss": 1.0, "val_top1": 50.0, "val_top5": 99.0}
    shown: list[Sequence[int]] = []
    sheet = report.contact_sheet

    def noted(*args: Any) -> Any:
        shown.append(args[2])
        return sheet(*args)

    monkeypatch.setattr(report, "contact_sheet", noted)
    history = [{"epoch": i, "train_loss": 1 / i} | same for i in (1, 2)]
    config = FinetuneConfig("cifar_resnet20", str(folders), tmp_path)
    report.write(RunFolder(tmp_path), config, history, answers, data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "&lt;b&gt;lue" in page and "<b>lue" not in page and "röd 猫" in page
    assert "model: cifar_resnet20" in page
    assert "width=device-width" in page and "prefers-color-scheme: dark" in page
    assert page.count("<table>") == page.count("<div class='wide'><table>")  # which scrolls on a narrow screen
    for comment in ("Fewer than 5 epochs", "Confused most often: ", "the mean confidence is", "classified wrongly."):
        assert comment in page
    assert sorted(index for indices in shown for index in indices) == list(range(12))  # the worst, the best: no repeats
    for name in ("curves", "confusion", "calibration", "worst", "best"):
        with Image.open(tmp_path / "figures" / f"{name}.png") as figure:
            figure.load()
    assert len(list(csv.reader(io.StringIO((tmp_path / "confusion.csv").read_text(encoding="utf-8"))))) == 4


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_without_network_shows_all_of_the_report(folders: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(FinetuneConfig("cifar_resnet20", str(folders), run, epochs=1, image_size="16", workers=0, device="cpu"))
    page = (run / "report.html").read_text(encoding="utf-8")
    count = "[...document.images].filter(image => image.complete && image.naturalWidth > 90).length"
    looked_at = tmp_path / "looked_at.html"
    title = f"document.title = 'shown ' + {count} + ' of ' + document.images.length"
    looked_at.write_text(f"{page}<script>onload = () => {{ {title} }}</script>", encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", looked_at.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "<title>shown 5 of 5</title>" in done.stdout
    assert "cifar_resnet20" in done.stdout and "calibration" in done.stdout.lower()


def curve(*losses: float, train: float = 0.0, scores: Sequence[float] = (50.0,)) -> list[dict[str, Any]]:
    rows = enumerate(losses)
    scores = [*scores, *[scores[-1]] * len(losses)]
    return [{"epoch": i + 1, "val_loss": loss, "train_loss": 1 - train * i, "val_top1": scores[i]} for i, loss in rows]


def test_curves_are_commented() -> None:
    over = comments.on_training(curve(1.0, 0.8, 0.81, 0.9, 1.0, train=0.1), "val_top1")
    assert over.startswith("Overfitting: the validation loss was lowest in epoch 2 (0.8) and rose to 1, while")
    rising = curve(1.0, 0.9, 0.8, 0.7, 0.6, train=0.1, scores=(50, 60, 70, 80, 90))
    assert comments.on_training(rising, "val_top1").startswith("No overfitting, and a gain of 20.0 points")
    flat = curve(1.0, 0.9, 0.8, 0.8, 0.81, train=0.1, scores=(50, 80))
    assert comments.on_training(flat, "val_top1").startswith("No overfitting: the validation loss stayed near")
    diverged = comments.on_training(curve(math.nan, 1.0, 0.8, 1.0, 2.0, train=-0.1), "val_top1")
    assert diverged.startswith(
        "The validation loss was lowest in epoch 3 (0.8) and rose to 2, and the training loss is"
    )
    ended = comments.on_training(curve(1.0, 0.9, 0.8, 0.8, math.nan, train=0.1), "val_top1")
    assert ended.startswith("The validation loss is not finite after the last epoch")


def test_confusion_and_calibration_are_commented() -> None:
    confusion = np.array([[8, 2, 0], [0, 10, 0], [5, 0, 5]])
    found = comments.on_confusion(confusion, ["a", "b", "c"])
    assert found == "Confused most often: c is taken for a in 5 of 10 images, a is taken for b in 2 of 10 images."
    assert comments.on_confusion(np.diag([3, 4]), ["a", "b"]) == "All 7 images are classified correctly."
    assert comments.on_calibration(0.99, 0.8, 1000).startswith("Overconfident: the mean confidence is 99.0 %, and 80.0")
    assert comments.on_calibration(0.6, 0.8, 1000).startswith("Underconfident")
    assert comments.on_calibration(0.85, 0.8, 50).startswith("Calibrated as far as 50 images can show")


def test_the_worst_and_the_best_do_not_repeat() -> None:
    assert comments.halves([5, 3, 1], 24) == ([5, 3], [1])
    assert comments.halves(range(9), 2) == ([0, 1], [8, 7])
    assert comments.halves([4], 24) == ([4], [])


def test_the_contact_sheet_shows_the_images_asked_for(folders: Path) -> None:
    data = open_data(folders, "val")
    assert data is not None
    answers = Predictions(torch.eye(3).repeat_interleave(4, 0), torch.tensor(data.labels), ["blue", "green", "red"])
    sheet = Image.open(io.BytesIO(report.contact_sheet(answers, data, [8, 0])))
    red, blue = (torch.tensor(sheet.getpixel((x, 48))) for x in (48, 48 + report.TILE + 8))
    assert red.argmax() == 0 and blue.argmax() == 2


def test_a_report_without_matplotlib_has_the_tables(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    data = open_data(folders, "val")
    assert data is not None
    answers = Predictions(torch.eye(3).repeat_interleave(4, 0), torch.tensor(data.labels), data.class_names)
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 50.0, "val_top5": 99.0}]
    report.write(RunFolder(tmp_path), FinetuneConfig("a", "b", tmp_path), history, answers, data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 and "Classes, the worst first" in page
