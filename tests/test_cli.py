import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm
import torch
from huggingface_hub import constants
from networks import config_of
from PIL import Image
from timm.models import save_for_hf

import spd_zoo
from spd_zoo.cli.main import main
from spd_zoo.data.labelled import DataError
from spd_zoo.files import whole
from spd_zoo.inference.classifier import DEFAULT_CLASSIFIER
from spd_zoo.training.config import DISTILLATION, FinetuneConfig
from spd_zoo.weights import Entry, entries, sha256_of
from spd_zoo.weights.fit import own_networks

EXAMPLES = Path(__file__).parent.parent / "examples" / "images"
NETWORKS = own_networks()
ROOT = EXAMPLES.parents[1]
ENTRY_POINT = re.findall(r'^spd-zoo = "(\w+):(\w+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    config = {"pretrained_cfg": {"input_size": (3, 32, 32)}, "label_names": ["cat", "dog", "owl"]}
    save_for_hf(timm.create_model("pyconvresnet18", num_classes=3), str(folder), config, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "grey.png"
    path.parent.mkdir()
    Image.new("L", (40, 30), 128).save(path)
    return path


@pytest.fixture
def made_up_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Entry("pyconvresnet50", "pyconvresnet", 1000, (3, 224, 224), params=24_847_720, macs=3_820_441_600)
    metrics = tuple(
        {"dataset": "Photos", "metric": metric, "value": value, "input_size": size, "measured_by": "us"}
        for metric, value, size in (("top5", 99.0, 224), ("top1", 80.0, 320), ("top1", 78.125, 224))
    )
    found = [
        base,
        dataclasses.replace(base, name="pyconvresnet50.a", source="bundled:a", sha256="0" * 64, license="mit"),
        dataclasses.replace(base, name="pyconvresnet50.b", source="hf://o/r@c:f", sha256="0" * 64, metrics=metrics),
        dataclasses.replace(base, name="pyconvresnet50.c", source="hf://o/r@c:f"),
        dataclasses.replace(base, name="pyconvresnet50.d", num_classes=9),
        dataclasses.replace(base, name="resnet18_spd"),
    ]
    monkeypatch.setattr("spd_zoo.weights.catalogue.entries", lambda: {entry.name: entry for entry in found})


def rows_of(capsys: Capture, *arguments: str) -> list[dict[str, object]]:
    assert main([*arguments, "--json"]) == 0
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


def test_the_list_has_every_network_and_every_checkpoint(capsys: Capture) -> None:
    rows = rows_of(capsys, "list")
    assert {row["network"] for row in rows} == set(NETWORKS)
    checkpoints = {name for name, entry in entries().items() if entry.tag and entry.group != "timm"}
    assert {row["name"] for row in rows if row["tag"]} == checkpoints
    assert len({row["name"] for row in rows}) == len(rows)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_is_an_aligned_table_that_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list"]) == 0
    header, *lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert len(lines) > 50 and max(map(len, lines)) <= columns
    assert re.split("  +", header) == ["name", "command", "top-1 or AP (%)", "params", "weights"]
    rows = [line for line in lines if len(line.split()) > 1]  # a name that is too long has its own line
    assert (len(rows) < len(lines)) == (columns == 80)
    for title in ("command", "top-1", "weights"):
        start = header.index(title)
        assert all(line[start - 1] == " " and line[start] != " " for line in rows)


@pytest.mark.parametrize("name", ["pyconvresnet50_spd", "pyconvresnet50.in1k"])
def test_a_name_without_wildcards_lists_that_network(name: str, capsys: Capture) -> None:
    rows = rows_of(capsys, "list", name)
    assert rows and all(name in (row["name"], row["network"]) for row in rows)


def test_filters_select_as_timms_do(capsys: Capture) -> None:
    rows = rows_of(capsys, "list", "pyconv*_spd", "resnet1*_spd")
    expected = timm.list_models(["pyconv*_spd", "resnet1*_spd"])
    assert {row["network"] for row in rows} == set(expected)
    assert {row["tag"] for row in rows_of(capsys, "list", "*.in1k")} == {"in1k"}


def test_a_filter_without_wildcards_is_a_name_or_else_a_part_of_names(capsys: Capture) -> None:
    rows = rows_of(capsys, "list", "Yolo")
    assert {row["network"] for row in rows} == {name for name in NETWORKS if "yolo" in name}
    assert {row["network"] for row in rows_of(capsys, "list", "resnet18_spd")} == {"resnet18_spd"}
    assert main(["list", "pyconvresnet50", "--pretrained"]) == 1  # and not the weights of pyconvresnet50_spd


def test_list_models_takes_filters_and_tasks() -> None:
    assert spd_zoo.list_models() == list(dict.fromkeys(spd_zoo.list_models())) and {*spd_zoo.list_models()} == {
        *NETWORKS
    }
    assert spd_zoo.list_models("*.cifar100") == ["pyconvresnet50_spd", "cifar_resnet20", "cifar_resnet20_pfd"]
    detectors = spd_zoo.list_models(task="detection")
    assert {*detectors} == {name for name in NETWORKS if name.startswith(("yolo", "ssd"))}
    assert {*detectors} | {*spd_zoo.list_models(task="classification")} == {*NETWORKS}
    backbones = [f"{name}.tiny_in200_backbone" for name in ("yolov8n", "yolov8n_spd", "yolov8n_p2", "yolov8n_spd_p2")]
    assert spd_zoo.list_models(["yolo", "ssd"], pretrained=True) == ["yolov8n_spd.bccd", *backbones]
    assert spd_zoo.list_models("vit") == []
    with pytest.raises(ValueError, match="classification and detection"):
        spd_zoo.list_models(task="segmentation")


def test_a_filter_that_fits_nothing_is_an_error(capsys: Capture) -> None:
    assert main(["list", "vit*"]) == 1
    assert capsys.readouterr().err.startswith("spd-zoo: error: there are no networks called vit*;")


@pytest.mark.usefixtures("made_up_entries")
def test_the_list_tells_the_state_of_weights(capsys: Capture) -> None:
    states = {row["name"]: row["weights"] for row in rows_of(capsys, "list")}
    assert states == {
        "pyconvresnet50.a": "bundled",
        "pyconvresnet50.b": "hub",
        "pyconvresnet50.c": "unverified",
        "pyconvresnet50.d": "unverified",
        "resnet18_spd": "none",
    }


def test_the_list_marks_the_weights_that_pretrained_true_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    cfgs = {name: config_of(name) for name in NETWORKS}
    defaults = {f"{name}.{cfg.tag}" for name, cfg in cfgs.items() if cfg.has_weights}
    assert {line.split()[0] for line in lines if line.endswith("*")} == defaults


def test_quiet_leaves_out_notes_and_verbose_shows_where_an_error_came_from(image: Path, capsys: Capture) -> None:
    assert main(["predict", str(image), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["predict", str(image)]) == 0
    assert capsys.readouterr().err.startswith("note: no network is named")
    assert main(["predict", "yolov8n_spd.bccd", str(image)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["predict", "yolov8n_spd.bccd", str(image), "-v"]) == 1
    assert "load_classifier" in capsys.readouterr().err


@pytest.mark.usefixtures("made_up_entries")
def test_the_list_can_leave_out_what_is_not_verified(capsys: Capture) -> None:
    rows = rows_of(capsys, "list", "--pretrained")
    assert [row["name"] for row in rows] == ["pyconvresnet50.a", "pyconvresnet50.b"]


@pytest.mark.usefixtures("made_up_entries")
def test_the_list_gives_top_1_at_the_input_size(capsys: Capture) -> None:
    assert main(["list", "pyconvresnet50.b"]) == 0
    assert "78.12 Photos" in capsys.readouterr().out


def test_all_of_info_is_what_the_manifest_knows(capsys: Capture) -> None:
    assert main(["info", "pyconvresnet50.in1k", "--all"]) == 0
    printed = capsys.readouterr().out
    entry = entries()["pyconvresnet50.in1k"]
    for known in (entry.name, entry.license, entry.original_link, entry.notes, "24,847,720", "77.88", "unverified"):
        assert str(known) in printed


@pytest.mark.parametrize("name", spd_zoo.list_models())
def test_info_is_a_card_whose_figures_say_who_measured_them(name: str, capsys: Capture) -> None:
    assert main(["info", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 14
    weights = [line for line in lines if line.startswith("weights ")]
    own = [entry for entry in entries().values() if entry.network == name and entry.tag]
    assert len(weights) == max(1, min(3, len(own)))
    default = next(
        (entry.name for entry in own if config_of(name).has_weights and entry.tag == config_of(name).tag), ""
    )
    assert default in weights[0] or (default and "backbone only" in weights[1])  # whole networks come first
    assert all("measured by" in line for line in weights if " % on " in line)
    (snippet,) = (line.strip() for line in lines if "timm.create_model(" in line)
    assert ("pretrained=True" in snippet) == bool(own)


def test_info_about_weights_for_one_of_timms_networks_gives_a_call_that_timm_knows(capsys: Capture) -> None:
    assert main(["info", "resnet50.pyconv_in1k"]) == 0
    printed = capsys.readouterr().out
    assert 'timm.create_model("resnet50", pretrained=True, pretrained_cfg_overlay={"file": "FILE"})' in printed
    assert "get       spd-zoo weights pull resnet50.pyconv_in1k  (prints FILE)" in printed


def test_info_as_json_has_every_field_of_the_manifest(capsys: Capture) -> None:
    assert main(["info", "pyconvresnet50.in1k", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    known = dataclasses.asdict(entries()["pyconvresnet50.in1k"])
    assert printed == json.loads(
        json.dumps(known | {"task": "classification", "weights": "unverified", "default": False})
    )


def test_info_about_a_network_describes_its_checkpoints(capsys: Capture) -> None:
    assert main(["info", "pyconvresnet50", "--json"]) == 0
    checkpoints = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["name"] for entry in checkpoints] == ["pyconvresnet50.in1k", "pyconvresnet50.aug_in1k"]


def test_info_knows_networks_of_the_zoo_only(capsys: Capture) -> None:
    assert main(["info", "resnet18"]) == 1
    assert capsys.readouterr().err.startswith("spd-zoo: error: there is no network 'resnet18'; the nearest names are ")


@pytest.mark.parametrize(
    "arguments",
    [["info", "pyconvresnet51"], ["predict", "pyconvresnet51", "a.png"], ["finetune", "pyconvresnet51"]],
    ids=lambda arguments: arguments[0],
)
def test_an_unknown_network_gives_the_nearest_names(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    if arguments[0] == "finetune":
        arguments = [*arguments, "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    what = "network, file or folder" if arguments[0] == "predict" else "network"
    assert error.startswith(f"spd-zoo: error: there is no {what} 'pyconvresnet51'; the nearest names are")
    assert "pyconvresnet50" in error


@pytest.mark.parametrize("option", ["--workers", "--tile"])
def test_numbers_of_evaluate_are_checked_before_anything_is_read(option: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "cifar_resnet20", "--data", "photos", option, "-1"])
    assert capsys.readouterr().err.startswith(f"spd-zoo: error: argument {option}: must be at least 0, got -1; see")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hugging Face libraries that nobody else uses."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What `torch.save` makes of an untrained cifar_resnet20."""
    torch.save({"state_dict": timm.create_model("cifar_resnet20").state_dict()}, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


@pytest.mark.slow
def test_weights_list_tells_where_each_checkpoint_is(own_cache: Path, checkpoint: Path, capsys: Capture) -> None:
    assert main(["weights", "import", "cifar_resnet20.mine", str(checkpoint)]) == 0
    capsys.readouterr()
    rows = {row["name"]: row for row in rows_of(capsys, "weights", "list")}
    assert {name for name, entry in entries().items() if entry.tag} | {"cifar_resnet20.mine"} == set(rows)
    assert rows["cifar_resnet20.mine"]["location"] == "imported"
    assert rows["cifar_resnet20.mine"]["from"] == checkpoint.as_uri()
    assert rows["cifar_resnet20.mine"]["sha256"] == sha256_of(Path(str(rows["cifar_resnet20.mine"]["file"])))
    assert rows["pyconvresnet50_spd.tiny_in200"]["location"] == "bundled"
    assert rows["pyconvresnet50.in1k"]["location"] == "missing"
    assert main(["weights", "list", "*.mine"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "location", "sha256", "size", "licence", "from"]
    assert line.split()[:3] == ["cifar_resnet20.mine", "imported", "pinned"]
    assert main(["weights", "list", "*.mine", "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["cifar_resnet20.mine", "imported", "verified"]


def test_imported_weights_are_used_pulled_verified_and_deleted(
    own_cache: Path, checkpoint: Path, image: Path, capsys: Capture
) -> None:
    assert main(["weights", "import", "cifar_resnet20.mine", str(checkpoint)]) == 0
    file, advice = capsys.readouterr().out.splitlines()
    assert advice == 'load it with timm.create_model("cifar_resnet20.mine", pretrained=True)'
    assert main(["predict", "cifar_resnet20.mine", str(image)]) == 0
    assert main(["weights", "verify", "*.mine"]) == 0
    capsys.readouterr()
    assert main(["weights", "pull", "cifar_resnet20.mine"]) == 0
    assert capsys.readouterr().out.strip() == file
    Path(file).write_bytes(Path(file).read_bytes()[:-1])
    assert main(["weights", "verify", "*.mine"]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["predict", "cifar_resnet20.mine", str(image)]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert main(["weights", "rm", "cifar_resnet20.mine"]) == 0
    assert not Path(file).exists()
    assert main(["weights", "rm", "cifar_resnet20.mine"]) == 1


def test_an_import_says_what_it_replaces(own_cache: Path, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("cifar_resnet20").state_dict(), other)
    for file in (checkpoint, checkpoint, other):
        assert main(["weights", "import", "cifar_resnet20.mine", str(file)]) == 0
    assert capsys.readouterr().err == f"note: this replaces cifar_resnet20.mine, imported from {checkpoint.as_uri()}\n"


@pytest.mark.slow
def test_pull_gives_the_default_weights_of_a_network(capsys: Capture) -> None:
    assert main(["weights", "pull", "pyconvresnet50_spd"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "pyconvresnet50_spd.tiny_in200.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pull", "nonsense"], "there are no weights called nonsense; `spd-zoo weights list` shows all"),
        (["pull", "pyconvresnet101"], "there are pyconvresnet101.in1k, pyconvresnet101.aug_in1k"),
        (["list", "nonsense*"], "there are no weights called nonsense*"),
        (["rm", "pyconvresnet50_spd.tiny_in200"], "belong to spd-zoo and cannot be removed"),
        (["rm", "pyconvresnet50.in1k"], "are not on this machine"),
        (["import", "cifar_resnet20", "missing.pth"], "missing.pth does not exist or is no file"),
        (["import", "cifar_resnet20", "hf://o/r:m.safetensors"], "hf://o/r:m.safetensors is no link that can be"),
        (["import", "cifar_resnet20", "file:///m.pth"], "give a path, https://..., or hf://ORG/REPO@<40-digit commit>"),
        (["import", "nonsense", "missing.pth"], "nonsense is not NETWORK or NETWORK.TAG"),
    ],
    ids=" ".join,
)
def test_errors_of_weights_commands_are_one_clear_sentence(
    arguments: list[str], message: str, own_cache: Path, capsys: Capture
) -> None:
    assert main(["weights", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spd-zoo: error: ")
    assert message in line


@pytest.mark.slow
def test_a_checkpoint_for_a_network_of_timms_is_imported_and_predicts(
    own_cache: Path, image: Path, tmp_path: Path, capsys: Capture
) -> None:
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "a.pth")
    assert main(["weights", "import", "resnet50.pyconv_in1k", str(tmp_path / "a.pth")]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("load it with ")
    assert eval(advice, {"timm": timm}).num_classes == 1000
    assert main(["predict", "resnet50.pyconv_in1k", str(image)]) == 0
    assert "%" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_for_a_network_of_timms_predicts_its_classes(
    own_cache: Path, image: Path, tmp_path: Path, capsys: Capture
) -> None:
    theirs: Any = timm.create_model("resnet50", num_classes=3, in_chans=1)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    assert main(["weights", "import", "resnet50.mine", str(tmp_path / "a.pth")]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("load it with ")
    net = eval(advice, {"timm": timm})
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in net.state_dict().items())
    assert main(["predict", "resnet50.mine", str(image), "--top-k", "3"]) == 0
    assert sorted(line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:4]) == ["0", "1", "2"]


def test_predict_prints_a_table_per_image(saved: str, image: Path, capsys: Capture) -> None:
    assert main(["predict", saved, str(image), "--top-k", "2"]) == 0
    out, err = capsys.readouterr()
    path, *lines = out.splitlines()
    assert path == str(image)
    assert len(lines) == 2
    for line in lines:
        probability, sign, name = line.split()
        assert 0 <= float(probability) <= 100 and sign == "%"
        assert name in {"cat", "dog", "owl"}
    assert err == ""


def test_predict_prints_json(saved: str, image: Path, capsys: Capture) -> None:
    (answer,) = rows_of(capsys, "predict", saved, str(image))
    top = answer["top"]
    assert answer["path"] == str(image)
    assert isinstance(top, list)
    assert {(guess["index"], guess["name"]) for guess in top} == {(0, "cat"), (1, "dog"), (2, "owl")}
    assert sum(guess["probability"] for guess in top) == pytest.approx(1)


def test_predict_names_unreadable_images_and_answers_the_others(saved: str, image: Path, capsys: Capture) -> None:
    broken = image.with_name("broken.png")
    broken.write_bytes(image.read_bytes()[:-30])
    assert main(["predict", saved, str(broken), "missing.png", str(image), "--json"]) == 1
    out, err = capsys.readouterr()
    first, second, third = json.loads(out)
    assert set(first) == set(second) == {"path", "error"}
    assert len(third["top"]) == 3
    assert [line.split(": ")[:3] for line in err.splitlines()] == [
        ["spd-zoo", "error", str(broken)],
        ["spd-zoo", "error", "missing.png"],
    ]


def test_predict_shows_no_progress_bar_without_a_terminal(saved: str, image: Path, capsys: Capture) -> None:
    assert main(["predict", saved, *[str(image)] * 3, "--batch-size", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.count(str(image)) == 3
    assert err == ""


@pytest.mark.parametrize("model", ["pyconvresnet18", "pyconvresnet50", "local-dir:missing", "nowhere:pyconvresnet50"])
def test_a_network_that_cannot_predict_is_one_clear_sentence(model: str, image: Path, capsys: Capture) -> None:
    assert main(["predict", model, str(image)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("spd-zoo: error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_without_a_network_the_default_one_is_named_and_knows_the_example_images(capsys: Capture) -> None:
    images = sorted(str(path) for path in EXAMPLES.glob("*.*"))
    assert main(["predict", *images, "--json"]) == 0
    out, err = capsys.readouterr()
    tops = {Path(answer["path"]).name: answer["top"][0]["name"] for answer in json.loads(out)}
    assert tops == {"chelsea.png": "tiger cat", "coffee.png": "espresso", "rocket.jpg": "missile"}
    assert err == f"note: no network is named, so {DEFAULT_CLASSIFIER} is used (1,000 classes of ImageNet)\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: str) -> list[tuple[str, list[str]]]:
    """The network and the images of each `predict`, which computes nothing, in a folder with images and a run."""
    found: list[tuple[str, list[str]]] = []

    def note(model: str, paths: list[Path], *rest: object) -> list[NoReturn]:
        found.append((model, [path.as_posix() for path in paths]))
        return []

    monkeypatch.setattr("spd_zoo.inference.classifier.predict", note)
    monkeypatch.chdir(tmp_path)
    for file in ("a.png", "b.jpg", "without_suffix", "resnet18", "resnet18.jpg", "photos/c.png", "vgg11/d.png"):
        Path(file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file, format="PNG")
    Path("run").symlink_to(saved.removeprefix("local-dir:"))
    for folder in ("stopped", "empty", "linked"):
        Path(folder).mkdir()
    Path("linked", "photos").symlink_to(Path("photos").resolve())
    Path("mine.pt2").write_bytes(b"PK")
    Path("stopped", "run.yaml").touch()
    torch.save({}, "mine.pth")
    return found


@pytest.mark.parametrize(
    ("words", "model", "images"),
    [
        (["a.png"], None, ["a.png"]),
        (["a.png", "b.jpg"], None, ["a.png", "b.jpg"]),
        (["without_suffix"], None, ["without_suffix"]),
        (["resnet18.jpg"], None, ["resnet18.jpg"]),
        (["missing.png"], None, ["missing.png"]),
        (["photos", "a.png"], None, ["photos/c.png", "a.png"]),
        (["[ab].*"], None, ["a.png", "b.jpg"]),
        (["./vgg11"], None, ["vgg11/d.png"]),
        (["linked"], None, ["linked/photos/c.png"]),
        (["resnet34", "a.png"], "resnet34", ["a.png"]),
        (["resnet34.a1_in1k", "a.png"], "resnet34.a1_in1k", ["a.png"]),
        (["pyconvresnet50_spd.tiny_in200", "a.png"], "pyconvresnet50_spd.tiny_in200", ["a.png"]),
        (["local-dir:run", "a.png"], "local-dir:run", ["a.png"]),
        (["run", "a.png"], "run", ["a.png"]),
        (["stopped", "a.png"], "stopped", ["a.png"]),
    ],
    ids=str,
)
def test_the_first_argument_of_predict_is_a_network_or_an_image(
    words: list[str], model: str | None, images: list[str], asked: list[tuple[str, list[str]]], capsys: Capture
) -> None:
    assert main(["predict", *words]) == 0
    assert asked == [(model or DEFAULT_CLASSIFIER, images)]
    assert (DEFAULT_CLASSIFIER in capsys.readouterr().err) == (model is None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["resnet18", "a.png"], "resnet18 is the name of a network, and of a file or folder here; write ./resnet18"),
        (["vgg11"], "vgg11 is the name of a network, and of a file or folder here"),
        (["efficientnet_lite0_spd", "a.png"], "the nearest names are tf_efficientnet_lite0_spd"),
        (["photo", "a.png"], "there is no network, file or folder 'photo'; `spd-zoo list` shows all networks"),
        (["runs/mine", "a.png"], "there is no network, file or folder 'runs/mine'"),
        (["a.png", "cifar_resnet20"], "cifar_resnet20 is a network; give it before the images"),
        (["a.png", "run"], "run is the folder of a network; give it before the images: `spd-zoo predict run IMAGES`"),
        (["empty", "a.png"], "empty is a folder without images, and without the config.json of a finished run"),
        (["mine.pth", "a.png"], "mine.pth is a file, but no network; to use a checkpoint, run `spd-zoo weights"),
        (["mine.pt2", "a.png"], "mine.pt2 is an exported file for other programs, and no network"),
        (["https://example.org/a", "a.png"], "https://example.org/a is an address, which is not read; download"),
        ([], "give IMAGES"),
        (["resnet34"], "give IMAGES"),
    ],
    ids=str,
)
def test_an_unclear_first_argument_of_predict_is_one_clear_sentence(
    words: list[str], complaint: str, asked: list[tuple[str, list[str]]], capsys: Capture
) -> None:
    assert main(["predict", *words]) == 1
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("spd-zoo: error: ") and complaint in error and asked == []
    assert all(note.startswith("note: ") for note in notes)


def test_the_help_of_predict_names_the_default_network(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])
    assert f"(default: {DEFAULT_CLASSIFIER}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--top-k", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_counts_must_be_positive(option: str, value: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "pyconvresnet50", "a.png", option, value])
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("value", ["many", "1.5"])
@pytest.mark.parametrize("words", [["predict", "net", "a.png", "--top-k"], ["finetune", "--epochs"]], ids=str)
def test_a_count_that_is_no_number_is_called_that(words: list[str], value: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words, value])
    (error,) = capsys.readouterr().err.splitlines()
    assert f"argument {words[-1]}: must be a whole number" in error
    assert error.endswith(f"got '{value}'; see `spd-zoo {words[0]} --help`")


@pytest.mark.parametrize("line", ["finetune --lr abc", "predict --nonsense", "nonsense", "weights nonsense", "weights"])
def test_a_wrong_command_line_is_an_error_of_one_line(line: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("spd-zoo: error: ") and error.endswith("--help`")


def test_without_a_command_all_commands_are_listed(capsys: Capture) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "classify images" in printed.err and "finetune" in printed.err


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    configs: list[FinetuneConfig] = []

    def finetune(config: FinetuneConfig, recipe: str | None = None) -> None:
        configs.append(config)  # returns None, as a dry run does

    monkeypatch.setattr("spd_zoo.training.finetune.finetune", finetune)
    return configs


REQUIRED = ["resnet18_spd", "--data", "photos", "--out", "run"]


def test_options_that_are_not_set_are_left_to_the_configuration(configs: list[FinetuneConfig]) -> None:
    assert main(["finetune", *REQUIRED]) == 0
    assert configs == [FinetuneConfig(model="resnet18_spd", data="photos", out=Path("run"))]


TEXTS = {
    "crop_mode": "border",
    "auto_augment": "rand-m6-n2-mstd0.5",
    "sched": "multistep",
    "decay_epochs": "1,2",
    "image_size": "32,48@1",
    "model_args": "drop_rate=0.5",
    "mean": "0.5,0.5,0.5",
    "std": "0.1",
    "hsv": "0.1,0.2,0.3",
    "interpolation": "bicubic",
    "head_init": "zero",
    "keep": "last",
    "log": "tensorboard",
    "resume": "never",
    "teacher_size": "96",
}
OPTIONAL = [field for field in dataclasses.fields(FinetuneConfig) if field.default is not dataclasses.MISSING]


@pytest.mark.parametrize("field", OPTIONAL, ids=lambda field: field.name)
def test_finetune_has_an_option_for_every_field(
    field: "dataclasses.Field[object]", configs: list[FinetuneConfig]
) -> None:
    option = f"--{field.name.replace('_', '-')}"
    kind = str(typing.get_type_hints(FinetuneConfig)[field.name]).removeprefix("<class '").partition("'")[0]
    kind = kind.partition(" | ")[0]
    value: object = {"bool": not field.default, "int": 8, "float": 0.25}.get(kind, TEXTS.get(field.name, "x"))
    if isinstance(value, bool):
        arguments = [option if value else option.replace("--", "--no-")]
    else:
        arguments = [option, str(value)]
    both = {"sched": ["--decay-epochs", "1,2"], "decay_epochs": ["--sched", "multistep"], "opt": ["--lr", "1"]}
    both |= {name: ["--teacher", "run"] for name in DISTILLATION} | {"overlap": ["--tile", "96"]}
    both |= {"mix_prob": ["--mixup", "0.2"], "decay_rate": ["--sched", "multistep", "--decay-epochs", "1,2"]}
    both |= {"stream_length": ["--stream"]}
    assert main(["finetune", *REQUIRED, *arguments, *both.get(field.name, [])]) == 0
    assert getattr(configs[0], field.name) == value


def test_finetune_takes_other_options_from_a_yaml_file(configs: list[FinetuneConfig], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: resnet18_spd\nepochs: 7\nlr: 0.5\n")
    arguments = ["finetune", "--config", str(tmp_path / "mine.yaml"), "--data", "photos", "--out", "run", "--lr", "0.1"]
    assert main(arguments) == 0
    assert (configs[0].model, configs[0].epochs, configs[0].lr) == ("resnet18_spd", 7, 0.1)


def test_the_function_finetune_takes_the_options_of_the_command(configs: list[FinetuneConfig], tmp_path: Path) -> None:
    wanted = FinetuneConfig(model="resnet18_spd", data="photos", out=Path("run"), epochs=3, image_size="32", lr=1.0)
    spd_zoo.finetune("resnet18_spd", data=Path("photos"), out="run", epochs=3, image_size=32, lr=1)
    spd_zoo.finetune(wanted)
    (tmp_path / "mine.yaml").write_text("epochs: 3\nlr: 1\nimage_size: 64\n")
    spd_zoo.finetune("resnet18_spd", config=tmp_path / "mine.yaml", data="photos", out="run", image_size="32")
    assert configs == [wanted] * 3


def test_the_function_finetune_takes_lists_and_tuples(configs: list[FinetuneConfig], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("std: [0.2, 0.2, 0.3]\ndecay_epochs: [3, 5]\nsched: multistep\n")
    options: dict[str, Any] = {"config": tmp_path / "mine.yaml", "data": "photos", "out": "run"}
    spd_zoo.finetune("resnet18_spd", image_size=(32, 48), mean=[0.5, 0.5, 0.5], **options)
    asked = configs[0]
    assert (asked.image_size, asked.mean, asked.std, asked.decay_epochs) == (
        "32x48", "0.5,0.5,0.5", "0.2,0.2,0.3", "3,5"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (32, 48, 3)}, "image_size '32x48x3' is not like 64, 32x48"),
        ({"image_size": ()}, "finetune: image_size is (), not of the type str"),
        ({"epochs": [3]}, "finetune: epochs is [3], not of the type int"),
        ({"teacher": torch.nn.Sequential(torch.nn.ReLU())}, "finetune: teacher is Sequential( (0): ReLU() ), not"),
        ({"epoch": 3}, "finetune has an unknown option 'epoch'; did you mean epochs?"),
        ({"epochs": "many"}, "finetune: epochs is 'many', not of the type int"),
        ({"data": ""}, "give --data"),
    ],
    ids=str,
)
def test_the_function_finetune_refuses_other_options(
    options: dict[str, Any], message: str, configs: list[FinetuneConfig]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spd_zoo.finetune("resnet18_spd", **{"data": "photos", "out": "run"} | options)
    with pytest.raises(ValueError, match="without other options"):
        spd_zoo.finetune(FinetuneConfig(model="resnet18_spd", data="photos", out=Path("run")), epochs=3)
    assert configs == []


def test_no_module_of_the_package_hides_a_public_name() -> None:
    modules = {file.stem for file in Path(spd_zoo.__file__).parent.iterdir()} - {"models", "__init__"}
    assert not modules & {*spd_zoo.__all__, "predict", "detect"}
    assert {*spd_zoo.__all__} <= {*dir(spd_zoo)}
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        spd_zoo.nonsense  # noqa: B018


@pytest.mark.slow
def test_importing_the_package_does_not_import_training() -> None:
    code = "import spd_zoo, sys; print([name for name in sys.modules if name.startswith('spd_zoo.training')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_finetune_names_missing_options(capsys: Capture) -> None:
    assert main(["finetune", "--data", "photos"]) == 1
    usage = "`spd-zoo finetune MODEL --data DATA --out RUN`"
    assert capsys.readouterr().err == f"spd-zoo: error: give MODEL and --out: {usage}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["detect", "IMAGE"], "give IMAGES: `spd-zoo detect MODEL IMAGES`"),
        (["export", "IMAGE", "--to", "onnx"], "is a file or folder, but no network; commands take the network first"),
        (["export", "runs/mine", "--to", "onnx"], "there is no network, file or folder 'runs/mine'"),
        (["detect", "mine.pt", "IMAGE"], "there is no network, file or folder 'mine.pt'"),
        (["detect", "yolov8n_spd.bccd", "IMAGE", "yolov8n"], "yolov8n is a network; give it before the images"),
        (["detect", "yolov8n_spd.bccd", "IMAGE", "yolov8n", "--results", "r.csv"], "yolov8n is a network; give it"),
        (["predict", "pyconvresnet18", "IMAGE"], "train it: `spd-zoo finetune pyconvresnet18 --data DIR --out RUN`"),
        (["predict", "yolov8n_spd.bccd", "IMAGE"], "run `spd-zoo detect yolov8n_spd.bccd IMAGES`"),
        (["detect", "cifar_resnet20", "IMAGE"], "run `spd-zoo predict cifar_resnet20 IMAGES`"),
        (["predict", "cifar_resnet20", "IMAGE", "--probabilities"], "add --results FILE"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_an_error_names_the_command_to_run(words: list[str], message: str, image: Path, capsys: Capture) -> None:
    assert main([str(image) if word == "IMAGE" else word for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_finetune_explains_its_options(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    short = capsys.readouterr().out
    assert "--epochs" in short and "--help-all" in short and short.count("\n  --") <= 15 and "--mixup" not in short
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help-all"])
    printed = "".join(capsys.readouterr().out.split())  # argparse breaks lines after hyphens, too
    for field in dataclasses.fields(FinetuneConfig):
        assert "".join(field.metadata["help"].split()) in printed


@pytest.mark.parametrize(
    ("raised", "printed"),
    [
        (DataError("photos is empty"), "photos is empty"),
        (ValueError("lr must be positive"), "lr must be positive"),
        (
            ModuleNotFoundError("No module named 'datasets'", name="datasets"),
            "this needs the package datasets: pip install 'spd-zoo[train]'",
        ),
    ],
    ids=["data", "option", "package"],
)
def test_errors_of_finetune_are_one_clear_sentence(
    raised: Exception, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*_: object) -> NoReturn:
        raise raised

    monkeypatch.setattr("spd_zoo.training.finetune.finetune", stop)
    assert main(["finetune", *REQUIRED]) == 1
    assert capsys.readouterr().err == f"spd-zoo: error: {printed}\n"


def test_training_code_that_lacks_a_package_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for module in ("finetune", "call"):
        monkeypatch.delitem(sys.modules, f"spd_zoo.training.{module}", raising=False)
        monkeypatch.delattr(f"spd_zoo.training.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    assert main(["finetune", *REQUIRED]) == 1
    assert capsys.readouterr().err == ("spd-zoo: error: this needs the package timm.optim: pip install 'spd-zoo'\n")


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("spd_zoo.weights.catalogue.entries", interrupt)
    assert main(["list"]) == 130


def test_sigterm_ends_with_143_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_terminated() -> None:
        with whole(tmp_path / "out") as temporary:
            temporary.mkdir()
            signal.raise_signal(signal.SIGTERM)

    usual = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("spd_zoo.weights.catalogue.entries", be_terminated)
    with pytest.raises(SystemExit, match="143"):
        main(["list"])
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == usual


def test_a_command_without_standard_output_and_error_ends_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    assert main(["list"]) == 0
    assert main(["info", "nonsense"]) == 1
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.slow
def test_a_reader_that_stops_reading_causes_no_traceback() -> None:
    command = [sys.executable, "-m", "spd_zoo", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert errors == ""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["lisst"], 2),
        (["predict", "--typo"], 2),
        (["list"], 0),
        (["list", "--pretrained", "--json"], 0),
        (["info", "pyconvresnet50"], 0),
        (["info", "pyconvresnet51"], 1),
        (["weights", "list"], 0),
        (["weights", "list", "nonsense*"], 1),
    ],
    ids=str,
)
def test_commands_that_need_no_network_start_without_torch(arguments: list[str], status: int) -> None:
    ((module, function),) = ENTRY_POINT
    code = f"""if True:
        import sys
        from {module} import {function} as start
        try:
            status = start()
        except SystemExit as exit:
            status = exit.code
        loaded = {{"torch", "timm", "huggingface_hub"}} & sys.modules.keys()
        sys.exit(f"loaded {{loaded}}" if loaded else status)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert (done.returncode, "loaded" in done.stderr) == (status, False), done.stderr


@pytest.mark.slow
def test_a_command_that_needs_networks_has_all_that_import_spd_zoo_gives(saved: str, image: Path) -> None:
    code = """if True:
        import sys
        import spd_zoo_cli
        sys.argv = ["spd-zoo", *sys.argv[1:]]
        assert spd_zoo_cli.main() == 0
        import spd_zoo, timm
        assert all(hasattr(spd_zoo, name) for name in spd_zoo.__all__) and spd_zoo.__version__
        assert timm.is_model("pyconvresnet50") and spd_zoo.weights.fetch.__name__ == "fetch"
    """
    command = [sys.executable, "-c", code, "predict", saved, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(image) in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{}, {"HF_HOME": "$ROOM/hf"}, {"HF_HUB_CACHE": "~/hub"}, {"XDG_CACHE_HOME": "/x"}]
)
def test_the_cache_is_found_where_huggingface_hub_has_it(variables: dict[str, str]) -> None:
    code = """if True:
        from huggingface_hub import constants
        import sys
        theirs = [constants.HF_HUB_CACHE, constants.HF_ASSETS_CACHE]
        del sys.modules["huggingface_hub.constants"]
        import spd_zoo_cli
        sys.argv = ["spd-zoo", "list"]
        spd_zoo_cli.main()
        from spd_zoo.weights import cache
        ours = [str(cache._hugging_face_folder(name)) for name in ("HUB_CACHE", "ASSETS_CACHE")]
        sys.exit(0 if ours == theirs else f"{ours} {theirs}")
    """
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in names} | {"ROOM": "/room"} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_names(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install 'spd-zoo[completion]'")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = f"""source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
            _shtab_spd_zoo; printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("spd-zoo", "pre") == {"predict"}
    assert "pyconvresnet50_spd.tiny_in200" in completed("spd-zoo", "predict", "pyconvresnet50_spd.")
    assert "--image-size" in completed("spd-zoo", "finetune", "--image")
    assert {"pull", "publish"} == completed("spd-zoo", "weights", "pu")


def test_completion_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'spd-zoo[completion]'" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"spd-zoo {spd_zoo.__version__}\n"


@pytest.mark.parametrize("value", ["2", "-0.1", "nan", "half"])
@pytest.mark.parametrize("command", ["detect net a.png --score", "evaluate net --iou", "export net --score"])
def test_a_threshold_beyond_0_and_1_is_named_as_it_was_typed(command: str, value: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), value])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {command.split()[-1]}: must be a number from 0 to 1, got " in error
