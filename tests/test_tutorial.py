"""The tutorial's commands, in its order, on a small real data set."""

import importlib.util
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from box_pictures import make_coco
from timm.models import save_for_hf

from spd_zoo.cli import main

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = DOCS.parent / "examples"
CIFAR100 = Path(__file__).parents[2] / "shared" / "data" / "cifar100"


def sections() -> dict[str, str]:
    """The tutorial's sections by their titles."""
    _, *found = re.split(r"^##? ", (DOCS / "finetuning.md").read_text(), flags=re.MULTILINE)
    return {section.partition("\n")[0]: section for section in found}


def blocks_of(section: str) -> list[tuple[str, str]]:
    """The kind, `sh` or `python`, and the text of every block."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def commands_of(blocks: list[tuple[str, str]]) -> list[str]:
    return [line for kind, block in blocks if kind == "sh" for line in block.splitlines() if "pip" not in line]


def test_the_tutorial_trains_a_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_coco(tmp_path / "cells", train=16, val=4)
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(sections()["Detectors"])
    commands = commands_of(blocks)
    assert [shlex.split(command)[1] for command in commands] == ["finetune", "finetune", "evaluate"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        assert (tmp_path / "found").exists() != ("--dry-run" in command)
    printed = capsys.readouterr().out
    assert "train: 16 images of 3 classes, 96x64 to 96x64 pixels" in printed and "64 px: AP" in printed
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "finetuning.md", "exec"), {})
    assert "['blue', 'green', 'red'] torch.Size([1, 84, 7])" in capsys.readouterr().out
    for file in ("report.html", "metrics.csv", "evaluation/results.csv", "figures/worst.png", "last.pt"):
        assert (tmp_path / "found" / file).is_file()


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the images are in parquet files, which need pyarrow")
    pytest.importorskip("onnxruntime", reason="the tutorial exports ONNX, which needs the extra `export`")
    if not CIFAR100.is_dir():
        pytest.skip(f"CIFAR-100 is not in {CIFAR100}")
    from PIL import Image

    rows = parquet.read_table(next(CIFAR100.glob("test*.parquet"))).slice(0, 4000).to_pylist()
    for label, name in ((0, "apple"), (8, "bicycle"), (69, "rocket")):
        images = [row["image"]["bytes"] for row in rows if row["label"] == label][:20]
        for i, image in enumerate(images):
            file = tmp_path / "photos" / ("train" if i < 14 else "val") / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(image)).save(file)
    monkeypatch.chdir(tmp_path)

    blocks = [block for title, section in sections().items() if title != "Detectors" for block in blocks_of(section)]
    commands = commands_of(blocks)
    assert [shlex.split(command)[1] for command in commands] == [
        *("finetune", "finetune", "finetune", "predict", "evaluate", "export")
    ]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        assert (tmp_path / "run").exists() != ("--dry-run" in command)
    printed = capsys.readouterr().out
    assert "train: 42 images of 3 classes, 32x32 to 32x32 pixels" in printed and "48 px: top-1" in printed
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "finetuning.md", "exec"), {})
    assert "['apple', 'bicycle', 'rocket'] (3, 32, 32)" in capsys.readouterr().out
    for file in ("report.html", "metrics.csv", "model.onnx", "evaluation/results.csv", "figures/curves.png", "last.pt"):
        assert (tmp_path / "run" / file).is_file()


def test_the_tutorial_names_options_and_recipes_that_there_are() -> None:
    from spd_zoo.training.config import RECIPES, FinetuneConfig

    text = (DOCS / "finetuning.md").read_text()
    own = {f"--{name.replace('_', '-')}" for name in FinetuneConfig.__dataclass_fields__}
    elsewhere = {"--help", "--config", "--to", "--flip", "--no-pretrained", "--dry-run", "--no-auto-anchors", "--split"}
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)):
        assert option in own | elsewhere or option.startswith(("--nproc", "--nnodes", "--rdzv")), option
    for recipe in RECIPES.glob("*.yaml"):
        assert f"`{recipe.stem}`" in text


@pytest.mark.filterwarnings("ignore:OpenCV")  # supervision's, which does without
def test_the_page_on_detectors_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = {"pretrained_cfg": {"input_size": (3, 64, 64)}, "label_names": ["cell"]}
    net = timm.create_model("yolov8n_spd", num_classes=1)
    for conv in net.get_classifier():
        torch.nn.init.constant_(conv.bias, 1.0)  # it finds cells everywhere
    save_for_hf(net, str(tmp_path / "run"), config, safe_serialization=True)
    shutil.copytree(EXAMPLES, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, block in blocks_of((DOCS / "detectors.md").read_text()):
        if kind == "python" and ("to_supervision" not in block or importlib.util.find_spec("supervision")):
            exec(compile(block, "detectors.md", "exec"), names)
            assert "print" not in block or capsys.readouterr().out.startswith("cell 0.")
        for command in block.splitlines() if kind == "sh" else ():
            assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
            out = capsys.readouterr().out
            assert "cell" in out and ("--json" not in command or json.loads(out)["annotations"])
    for folder in ("found", "tiles"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == {
            "detections.json",
            *(file.name for file in EXAMPLES.iterdir()),
        }
    assert (tmp_path / "coffee_marked.png").is_file()
