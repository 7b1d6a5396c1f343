"""Training: options, runs that resume to the same bits wherever they stopped, and results that timm loads."""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import pytest
import timm
import torch
from box_pictures import make_coco, make_yolo
from pictures import make_folders
from runs import PATIENCE, finetune_in_processes, rows_of, same_run, stop_in
from safetensors.torch import load_file
from tqdm import tqdm

from spd_zoo.cli.main import main
from spd_zoo.data.labelled import DataError, open_data
from spd_zoo.exporter import export
from spd_zoo.models.bsconv_mobilenetv3 import BSConvMobileNetV3
from spd_zoo.process import Process, StopSignals
from spd_zoo.quantization import export_int8
from spd_zoo.training import call, memory, planning
from spd_zoo.training import finetune as training
from spd_zoo.training.classification import report
from spd_zoo.training.classification.head import ridge_classifier
from spd_zoo.training.classification.task import LR, Classification, ClassifierTraining
from spd_zoo.training.config import (
    GENERAL,
    RECIPES,
    FinetuneConfig,
    Plan,
    load_config,
    load_recipe,
    make_config,
    to_yaml,
)
from spd_zoo.training.continuing import continuation
from spd_zoo.training.detection.task import Detection
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import Result, RunError, Stopped, finetune
from spd_zoo.training.layers import mostly_depthwise
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.run import RunFolder
from spd_zoo.training.steps import seed_everything
from spd_zoo.weights import save_network
from spd_zoo.weights.catalogue import ModelError


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than these runs; test_report looks at them."""
    monkeypatch.setattr(report, "_plots", lambda *_: {})


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "data", train=8, val=2)


def config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 8,
        "image_size": "16",
        "warmup_epochs": 0,
        "lr": 1e-3,
        "workers": 0,
    }
    options |= {"bf16": False, "device": "cpu", "pretrained": False}
    options |= {"model": "cifar_resnet20", "data": str(data), "out": out}
    return FinetuneConfig(**options | changes)


def run(data: Path, out: Path, **changes: Any) -> Result:
    result = finetune(config(data, out, **changes))
    assert result is not None
    return result


@pytest.mark.slow
def test_a_run_learns_and_timm_loads_its_result_with_the_class_names(folders: Path, tmp_path: Path) -> None:
    result = run(folders, tmp_path / "run", epochs=8, batch_size=4, lr=2e-3, image_size="16,32@2", keep="last")
    assert result.metrics["top1"] > 60  # three colours; chance is 33
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert net.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert tuple(net.pretrained_cfg["input_size"]) == (3, 32, 32)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(torch.equal(value, state["net"][key]) for key, value in net.state_dict().items())
    assert state["class_names"] == ["blue", "green", "red"]
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 9
    assert result.history[-1]["val_top1"] == result.metrics["top1"]


def test_a_new_classifier_on_pretrained_layers_starts_with_equal_probabilities(folders: Path, tmp_path: Path) -> None:
    still = {"epochs": 1, "lr": 1e-9, "label_smoothing": 0.0, "pretrained": True, "head_init": "zero"}
    begun = run(folders, tmp_path / "new", model="cifar_resnet20.cifar100", **still)
    assert begun.history[0]["train_loss"] == pytest.approx(math.log(3), abs=1e-3)
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)
    net.get_classifier().bias.data[0] = 9
    save_network(net, tmp_path / "known")
    kept = run(folders, tmp_path / "kept", model=f"local-dir:{tmp_path / 'known'}", **still)
    assert kept.history[0]["train_loss"] > 5


def test_a_run_is_not_called_like_a_network(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="resnet18 is the name of a network, which would be taken for the run"):
        run(folders, Path("resnet18"))
    assert not Path("resnet18").exists()


def test_outputs_without_names_are_taken_in_natural_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folders(tmp_path / "data", train=8, val=2)
    for split in ("train", "val"):
        for old, new in (("red", "c10"), ("green", "c2"), ("blue", "c1")):
            (data / split / old).rename(data / split / new)
    start: Any = timm.create_model("cifar_resnet20", num_classes=3)
    save_network(start, tmp_path / "start")
    run(data, tmp_path / "run", model=f"local-dir:{tmp_path / 'start'}", pretrained=True, epochs=1, lr=1e-9)
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert net.pretrained_cfg["label_names"] == ["c1", "c10", "c2"]
    for ours, theirs in zip(net.get_classifier().parameters(), start.get_classifier().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[[0, 2, 1]], rtol=0, atol=1e-6)
    assert "those of the data are taken in timm's natural order: c1 = 0, c2 = 1, c10 = 2\n" in capsys.readouterr().out


def test_a_new_classifier_starts_as_a_linear_probe_and_is_evaluated_before_the_first_epoch(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": "cifar_resnet20.cifar100", "pretrained": True, "epochs": 1, "lr": 1e-9}
    result = run(folders, tmp_path / "run", **options)
    assert result.before["val_top1"] == 100  # three colours
    assert result.history[0]["train_loss"] < 1  # below log 3: the first epoch is no loss
    first, second = rows_of(tmp_path / "run" / "metrics.csv")
    assert (first["epoch"], first["train_loss"], float(first["val_top1"])) == ("0", "", 100)
    assert second["epoch"] == "1" and first["val_loss"] == str(result.before["val_loss"])
    printed = capsys.readouterr().out
    assert "the classifier starts as a linear probe of 24 training images, leave-one-out accuracy 100.0 %" in printed
    assert "before the first epoch: val top-1 100.00 %" in printed
    (chosen,) = (line for line in printed.splitlines() if line.startswith("chosen: "))
    assert "weights cifar_resnet20.cifar100, 1 epoch at 16 px, batch 8, adamw" in chosen and "float32 on cpu" in chosen
    assert f"spd-zoo predict {tmp_path / 'run'} IMAGE" in printed and f"spd-zoo export {tmp_path / 'run'}" in printed


def test_the_linear_probe_finds_what_separates_classes_and_leaves_each_image_out() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(4, 20, generator=generator)
    labels = torch.arange(400) % 4
    inputs = centers[labels] + torch.randn(400, 20, generator=generator)
    for images in (slice(0, 12), slice(0, 400)):  # fewer and more than there are features
        weight, bias, right = ridge_classifier(inputs[images], labels[images], 4)
        found = (inputs @ weight.T + bias).argmax(1).eq(labels).float().mean().item()
        assert found > 0.9 and right > 0.7
        nothing = ridge_classifier(torch.randn(inputs[images].shape, generator=generator), labels[images], 4)[2]
        assert nothing < 0.6  # although it fits the images themselves


def test_the_pretrained_outputs_of_known_classes_are_used_where_they_are_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_folders(tmp_path / "data", train=8, val=2)
    options = {"pretrained": True, "epochs": 1, "lr": 1e-9}
    run(folders, tmp_path / "first", model="cifar_resnet20.cifar100", **options)
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True)
    for split in ("train", "val"):
        (folders / split / "green").rename(tmp_path / f"green_{split}")
    capsys.readouterr()
    run(folders, tmp_path / "second", model=f"local-dir:{tmp_path / 'first'}", **options)
    assert "starts as the pretrained outputs of these classes, accuracy 100.0 %" in capsys.readouterr().out
    other: Any = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True)
    assert torch.allclose(other.get_classifier().weight, net.get_classifier().weight[[0, 2]], atol=1e-6)


def test_a_pretrained_run_that_is_stopped_resumes_to_the_same_bits(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": "cifar_resnet20.cifar100", "pretrained": True, "ema": 0.9}
    run(folders, tmp_path / "whole", **options)
    stop_in(monkeypatch, 0, 1)
    with pytest.raises(Stopped):
        run(folders, tmp_path / "stopped", **options)
    result = run(folders, tmp_path / "stopped", **options)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    assert (result.before["epoch"], result.before["val_top1"]) == (0, 100)


@pytest.mark.parametrize("keep", [None, "last"])
def test_a_run_that_only_gets_worse_warns_and_keeps_the_start_by_default(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], keep: str | None
) -> None:
    scores, states, score = iter([80.0, 40.0, 60.0]), [], Classification.score

    def prescribed(task: Classification, net: Any, *arguments: Any) -> dict[str, float]:
        states.append({key: value.clone() for key, value in net.state_dict().items()})
        return score(task, net, *arguments) | {"top1": next(scores)}

    monkeypatch.setattr(Classification, "score", prescribed)
    run(folders, tmp_path / "run", model="cifar_resnet20.cifar100", pretrained=True, keep=keep)
    kept = weights_of(tmp_path / "run")
    assert all(torch.equal(kept[key], states[0 if keep is None else 2][key]) for key in kept)
    printed = capsys.readouterr().out
    assert "training ended below where it began: val top-1 60.00 %, before the first epoch val top-1 80.00 %" in printed
    assert ("the network is kept as it began" in printed) == (keep is None)


def test_small_images_are_padded_and_frozen_statistics_stay(folders: Path, tmp_path: Path) -> None:
    asked = config(folders, folders, image_size="32")
    assert (chosen_for(asked, 480).config.crop_padding, chosen_for(asked, 480).config.crop_scale) == (4, 0.5)
    assert chosen_for(replace(asked, crop_scale=0.3), 480).config.crop_padding == 0
    assert chosen_for(replace(asked, image_size="64"), 480).config.crop_padding == 0
    options = {"model": "cifar_resnet20.cifar100", "pretrained": True, "keep": "last"}
    run(folders, tmp_path / "run", freeze_bn=True, **options)
    start = timm.create_model("cifar_resnet20.cifar100", pretrained=True, num_classes=3).state_dict()
    end = weights_of(tmp_path / "run")
    assert all(torch.equal(start[key], end[key]) for key in end if "running" in key)
    assert not torch.equal(start["stem.0.weight"], end["stem.0.weight"])


def test_networks_of_depthwise_convolutions_are_recognised() -> None:
    depthwise = {name: mostly_depthwise(timm.create_model(name)) for name in ("tf_efficientnet_lite0_spd", "resnet18")}
    assert depthwise == {"tf_efficientnet_lite0_spd": True, "resnet18": False}


def test_a_run_records_how_it_was_made(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1, batch_size=None, lr=None, warmup_epochs=None)
    stored = make_config({}, tmp_path / "run" / "run.yaml")
    assert (stored.batch_size, stored.pretrained, stored.head_epochs, stored.accumulate) == (8, False, 0, 1)
    assert stored.lr == pytest.approx(6e-3 / 4) and stored.warmup_lr == pytest.approx(6e-5 / 4)
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert start["versions"]["torch"] == torch.__version__ and start["command"] == sys.argv
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["train"]["classes"] == {"blue": 8, "green": 8, "red": 8}
    assert "epoch 1/1 at 16 px: train loss" in (tmp_path / "run" / "log.txt").read_text()


EVERYTHING = {  # every option with a state or with randomness
    "ema": 0.9,
    "mixup": 0.2,
    "cutmix": 1.0,
    "erase": 0.5,
    "auto_augment": "rand-m6-n2-mstd0.5",
    "model_args": "drop_rate=0.3",
    "image_size": "16,32@1",
    "layer_decay": 0.8,
    "clip_grad": 1.0,
    "head_epochs": 1,
    "patience": 3,
    "accumulate": 2,
    "epochs": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_to_the_same_bits(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    run(folders, tmp_path / "whole", **EVERYTHING, workers=workers)
    for epoch, step in ((0, 1), (1, 2), (2, 0)):  # within an epoch, and at its end
        stop_in(monkeypatch, epoch, step)
        with pytest.raises(Stopped, match=f"stopped in epoch {epoch + 1} after step {step + 1} of 3") as stopped:
            run(folders, tmp_path / "stopped", **EVERYTHING, workers=workers)
        assert stopped.value.number == signal.SIGTERM
        torch.manual_seed(epoch)  # a new process begins with generators in another state
    capsys.readouterr()
    run(folders, tmp_path / "stopped", **EVERYTHING, workers=2 - workers)
    assert "stopped is resumed in epoch 3 after step 1 of 3" in capsys.readouterr().out
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    assert len(json.loads((tmp_path / "stopped" / "environment.json").read_text())) == 4


@pytest.mark.slow
def test_a_run_whose_weight_decay_an_earlier_version_applied_to_more_is_not_resumed(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": "cifar_mobilenetv3_large_effdown", "image_size": "32", "epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr("spd_zoo.models._classifier.Classifier.no_weight_decay", lambda net: set())
        stop_in(patch, 0, 1)
        with pytest.raises(Stopped):
            run(folders, tmp_path / "run", **options)
    with pytest.raises(
        RunError, match="begun by an earlier version of spd-zoo, in which weight decay applied to other"
    ):
        run(folders, tmp_path / "run", **options)


@pytest.mark.slow
def test_saving_within_an_epoch_changes_nothing(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "seldom")
    run(folders, tmp_path / "often", save_minutes=0)
    assert same_run(tmp_path / "seldom", tmp_path / "often")


@pytest.mark.slow
def test_deviations_from_the_options_are_reported(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes, process, name = ["a", "b", "c"], Process(torch.device("cpu")), "cifar_resnet110_bsconvu"
    for images, batch_size, said in ((24, 64, "24 training images: a step has 24, not 64"), (24, 8, "")):
        asked = config(folders, tmp_path / "run", batch_size=batch_size, pretrained=None, model=name)
        planning.plan(asked, Classification(), planning.blank(name), images, classes, process)
        printed = capsys.readouterr().out
        assert said in printed and ("a step has" in printed) == bool(said)
        assert f"{name} has no pretrained weights: all weights begin at random" in printed


def test_a_run_from_scratch_names_weights_that_are_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    asked, process = FinetuneConfig(model="resnet50_spd", data="data", out=Path("run")), Process(torch.device("cpu"))
    planning.plan(asked, Classification(), planning.blank("resnet50_spd"), 24, ["a", "b", "c"], process)
    said = capsys.readouterr().out
    assert "resnet50_spd has no default weights: all weights begin at random" in said
    assert "resnet50_spd has weights for particular data, selected by name: resnet50_spd.spd_tiny_in200 (" in said


def test_a_run_from_a_backbone_names_whole_networks(capsys: pytest.CaptureFixture[str]) -> None:
    asked, process = FinetuneConfig(model="yolov8n_spd", data="data", out=Path("run")), Process(torch.device("cpu"))
    plan = planning.plan(asked, Detection(), planning.blank("yolov8n_spd"), 24, ["a", "b", "c"], process)
    said = capsys.readouterr().out
    assert "the weights of yolov8n_spd are a backbone: neck and head begin at random; whole networks" in said
    assert "by name: yolov8n_spd.bccd (BCCD, 3 classes: RBC, WBC, Platelets, 320 px)" in said
    assert (plan.pretrained, plan.head_epochs) == (True, 0)


def test_a_network_that_knows_the_classes_gets_a_small_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["RBC", "WBC", "Platelets"]
    rates = []
    model = "yolov8n_spd.bccd"
    for classes in (own, ["RBC", "cat"]):
        asked, process = FinetuneConfig(model=model, data="data", out=Path("run")), Process(torch.device("cpu"))
        rates.append(planning.plan(asked, Detection(), planning.blank(model), 24, classes, process).lr)
        assert ("was trained for exactly these classes" in capsys.readouterr().out) == (classes is own)
    assert rates[0] == pytest.approx(rates[1] / 30)
    asked = replace(asked, lr=0.1)
    assert planning.plan(asked, Detection(), planning.blank(model), 24, own, process).lr == 0.1


def test_another_seed_is_another_run(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "one", epochs=1)
    run(folders, tmp_path / "other", epochs=1, seed=1)
    assert not same_run(tmp_path / "one", tmp_path / "other")


FORKS = multiprocessing.get_context("forkserver")  # forks a process that has imported everything already
FORKS.set_forkserver_preload(["spd_zoo.training.finetune", "torch._dynamo"])


def _train(config: FinetuneConfig, killed_at: str = "", after: int = 0) -> None:
    """Trains in a process group of its own; kills it when the file `killed_at` is about to appear, `after` others."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for the processes that read images, as elsewhere
    sys.stdout = sys.stderr = (config.out.parent / "printed.txt").open("w")
    replace, seen = Path.replace, []

    def replace_or_die(self: Path, target: Any) -> Path:
        seen.append(Path(target).name)
        if seen.count(killed_at) > after:
            os.killpg(0, signal.SIGKILL)
        return replace(self, target)

    pytest.MonkeyPatch().setattr(Path, "replace", replace_or_die)
    try:
        finetune(config)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)


def start(*arguments: Any) -> Any:
    process = FORKS.Process(target=_train, args=arguments)
    process.start()
    return process


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(folders: Path, tmp_path: Path) -> None:
    options = {"epochs": 3, "save_minutes": 0.0, "workers": 1}
    run(folders, tmp_path / "whole", **options)
    killed = config(folders, tmp_path / "killed", **options)
    moments = [("data.json", 0), ("run.yaml", 0), ("last.pt", 1), ("metrics.csv", 0), ("last.pt", 4)]
    for name, after in [*moments, ("model.safetensors", 0), ("report.html", 0)]:
        process = start(killed, name, after)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, f"it was not stopped at {name}"
    run(folders, killed.out, **options)
    assert same_run(tmp_path / "whole", killed.out)
    assert not [file.name for file in killed.out.iterdir() if file.suffix == ".tmp"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "scheduler"])
def test_a_signal_to_the_whole_group_saves_and_ends(folders: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    options = {"epochs": 500, "workers": 2}
    for _ in range(3):
        process = start(config(folders, out, **options))
        epochs = lines_of(out / "metrics.csv")
        deadline = time.monotonic() + PATIENCE
        while process.is_alive() and lines_of(out / "metrics.csv") == epochs and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal or a job scheduler does: all processes get it
        process.join(PATIENCE)
        assert process.exitcode == 128 + number, (tmp_path / "printed.txt").read_text()
    assert "Traceback" not in (tmp_path / "printed.txt").read_text()
    state = torch.load(out / "last.pt", weights_only=True)
    with pytest.MonkeyPatch.context() as monkeypatch:  # the same steps, all in one go
        stop_in(monkeypatch, len(state["history"]) - (not state["step"]), state["step"] - 1 if state["step"] else 2)
        with pytest.raises(Stopped):
            run(folders, tmp_path / "whole", **options)
    whole = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert all(torch.equal(value, state["net"][key]) for key, value in whole["net"].items())


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_two_processes_train_as_one(folders: Path, tmp_path: Path) -> None:
    (folders / "val" / "red" / "1.png").unlink()  # five images: they cannot be shared evenly
    shared = {"epochs": 3, "head_epochs": 1, "opt": "momentum", "lr": 0.05, "workers": 1}
    one, two = config(folders, tmp_path / "one", **shared, accumulate=2), config(folders, tmp_path / "two", **shared)
    finetune_in_processes(two)
    finetune(one)
    alone, together = (rows_of(run / "metrics.csv") for run in (one.out, two.out))
    for epoch, (a, b) in enumerate(zip(alone, together, strict=True)):
        # BatchNorm sees the same images in a part as in a process; what it remembers for evaluation, two parts teach it
        # twice a step, and two processes once. While the classifier learns alone, it does not change.
        columns = ["train_loss", "lr"] + ([] if epoch else ["val_loss", "val_top1"])
        assert [float(b[name]) for name in columns] == pytest.approx([float(a[name]) for name in columns], rel=1e-4)
    assert sum(int(row["images"]) for row in rows_of(two.out / "per_class.csv")) == 5


def test_a_second_signal_is_not_held_back(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.Optimizer.zero_grad

    def impatient(*arguments: Any, **more: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        step(*arguments, **more)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", impatient)
    usual = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell that runs this in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(folders, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not isinstance(stopped.value, Stopped)


def test_training_works_outside_the_main_thread(folders: Path, tmp_path: Path) -> None:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(run(folders, tmp_path / "run", epochs=1)))
    thread.start()
    thread.join()
    assert results


@pytest.mark.slow
def test_a_full_disk_is_reported_and_leaves_the_checkpoint(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(folders, out, epochs=1)
    (out / "run.yaml").write_text((out / "run.yaml").read_text().replace("epochs: 1\n", "epochs: 2\n", 1))
    before = (out / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*last\.pt: File too large; the last checkpoint is intact"):
            run(folders, out, epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    run(folders, out, epochs=2)


@pytest.mark.slow
def test_data_that_vanishes_is_reported_and_leaves_the_checkpoint(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Classification.score

    def then_unmount(*arguments: Any) -> dict[str, float]:
        figures = score(*arguments)
        folders.rename(tmp_path / "elsewhere")
        return figures

    monkeypatch.setattr(Classification, "score", then_unmount)
    with pytest.raises(DataError, match=r"png: there is no such file.*; was the data set changed") as error:
        run(folders, tmp_path / "run", workers=1)
    assert "Traceback" not in str(error.value)
    assert len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["history"]) == 1
    (tmp_path / "elsewhere").rename(folders)
    monkeypatch.undo()
    run(folders, tmp_path / "run", workers=1)
    run(folders, tmp_path / "whole")
    assert same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_does_not_resume_with_other_data(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1)
    (folders / "train" / "red" / "7.png").unlink()
    with pytest.raises(DataError, match="is not what it was when the run"):
        run(folders, tmp_path / "run", epochs=1)


@pytest.mark.slow
def test_a_run_resumes_if_its_data_has_moved(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1)
    run(folders.rename(tmp_path / "elsewhere"), tmp_path / "run", epochs=1)
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 2


def test_a_folder_with_another_run_is_left_alone(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run with lr=0\.001, not 0\.5"):
        run(folders, tmp_path / "run", epochs=1, lr=0.5)
    with pytest.raises(ValueError, match="holds a run; give another folder with --out, or --resume auto"):
        run(folders, tmp_path / "run", epochs=1, resume="never")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_run_among_the_class_folders_is_refused(folders: Path) -> None:
    for data, place in ((folders, "train"), (folders / "train", "train"), (folders, "val")):
        with pytest.raises(ValueError, match=r"run lies among the images of .*; give another --out"):
            run(data, folders / place / "run")
    run(folders, folders / "run", epochs=1)
    run(folders, folders / "run", epochs=1)


def test_evaluate_measures_on_the_images_that_a_run_held_out(tmp_path: Path) -> None:
    data = make_folders(tmp_path / "data", train=10)
    result = run(data, tmp_path / "run", epochs=1, val_size=6)
    (measured,) = evaluate(tmp_path / "run", data, workers=0, device="cpu")
    assert measured.in_words().endswith("; 6 images of val")
    assert measured.row["top1"] == pytest.approx(result.metrics["top1"])
    assert measured.notes[-1].endswith(f"evaluated on the 6 images that {tmp_path / 'run'} held out for validation")
    (other,) = evaluate(tmp_path / "run", make_folders(tmp_path / "other", train=4), workers=0, device="cpu")
    assert other.in_words().endswith("; 12 images of train")


@pytest.mark.slow
def test_an_exported_file_is_evaluated_like_its_run(tmp_path: Path) -> None:
    data = make_folders(tmp_path / "data", train=10)
    run(data, tmp_path / "run", epochs=1, val_size=6)
    file, *measured = export_int8(str(tmp_path / "run"), data, tmp_path / "elsewhere.onnx", workers=0)
    inside = export(str(tmp_path / "run"), "onnx")
    for evaluation in (*measured, *evaluate(inside, data, workers=0)):
        assert evaluation.in_words().endswith("; 6 images of val")
    (alone,) = evaluate(file, data, workers=0)
    assert alone.in_words().endswith("; 30 images of train")
    assert alone.notes[-1] == f"{data} has no split test or val; evaluated on train"


def test_a_run_with_unreadable_images_is_resumed_where_the_data_was_moved(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders / "train" / "red" / "0.png").write_bytes(b"no image")
    stop_in(monkeypatch, 0, 1)
    with pytest.raises(Stopped):
        run(folders, tmp_path / "run", epochs=1)
    folders.rename(tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "run", epochs=1).history


def test_a_damaged_run_is_named(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1)
    whole = (tmp_path / "run" / "last.pt").read_bytes()
    program = hostile.script(tmp_path / "trace")
    for content in (b"junk", b"", whole[:5000], whole + b"PK\5\6", program, program + b"PK\5\6"):
        (tmp_path / "run" / "last.pt").write_bytes(content)
        with pytest.raises(RunError, match=r"(?s)cannot read .*last\.pt: .*; if it is damaged, begin a run in another"):
            run(folders, tmp_path / "run", epochs=1)
    torch.save({"net": {}, "step": Path("a")}, tmp_path / "run" / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt does not hold the state of a run; begin a run in another --out"):
        run(folders, tmp_path / "run", epochs=1)
    assert not (tmp_path / "trace").exists()
    (tmp_path / "run" / "run.yaml").write_text("junk: [")
    with pytest.raises(RunError, match=r"holds a run with a damaged run\.yaml or data\.json"):
        run(folders, tmp_path / "run", epochs=1)


def test_one_class_is_nothing_to_learn(folders: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("blue", "green"):
            (folders / split / name).rename(tmp_path / f"{split}_{name}")
    with pytest.raises(DataError, match="has one class only, 'red'"):
        run(folders, tmp_path / "run")


def test_a_folder_with_other_files_is_left_alone(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(folders, tmp_path)


def test_a_loss_of_nan_ends_the_run(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loss is not finite any more; begin another run with a smaller --lr"):
        run(folders, tmp_path / "run", opt="momentum", lr=1e30)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_network_that_is_not_finite_is_never_the_result(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: str
) -> None:
    options = {"epochs": 1, "batch_size": 24, "opt": "momentum", "lr": 1e30, "keep": keep}  # one step
    with pytest.raises(RunError, match="is not finite after epoch 1: there is no network to write; begin another"):
        run(folders, tmp_path / "scratch", **options)
    assert not (tmp_path / "scratch" / "model.safetensors").exists()
    if keep == "best":
        run(folders, tmp_path / "run", **options, model="cifar_resnet20.cifar100", pretrained=True)
        assert all(bool(tensor.isfinite().all()) for tensor in weights_of(tmp_path / "run").values())
        assert "is not finite after epoch 1, the last one; try a smaller learning rate" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "train" / "red" / "torn.png").write_text("no image")
    assert finetune(config(folders, tmp_path / "run", dry_run=True)) is None
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "train: 24 images of 3 classes" in printed and "torn.png (this is no image" in printed


def test_a_quiet_training_prints_its_result_only(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(config(folders, tmp_path / "run")))
    assert main(["finetune", "--config", str(tmp_path / "run.yaml"), "--quiet"]) == 0
    printed = capsys.readouterr()
    result, *findings = printed.out.splitlines()
    assert result.startswith("top-1 ") and result.endswith("report.html") and not printed.err
    assert all(line.startswith(("kept: ", "note: training ended below")) for line in findings)
    assert "epoch 2/2" in (tmp_path / "run" / "log.txt").read_text()


def test_unreadable_images_are_left_out(folders: Path, tmp_path: Path) -> None:
    for name in ("train/red/torn.png", "val/blue/torn.png"):
        (folders / name).write_text("no image")
    assert run(folders, tmp_path / "run", epochs=1).metrics["images"] == 6
    with pytest.raises(DataError, match=r"torn\.png: this is no image in a format that Pillow knows"):
        run(folders, tmp_path / "other", epochs=1, check=False)


def test_a_class_without_a_readable_image_is_an_error(folders: Path, tmp_path: Path) -> None:
    for file in (folders / "train" / "green").iterdir():
        file.write_text("no image")
    with pytest.raises(DataError, match="class 'green' has no image to train on"):
        run(folders, tmp_path / "run")


@pytest.mark.slow
def test_images_are_held_out_if_there_is_no_val_split(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a split val; leave --val-split and --val-size out"):
        run(folders, tmp_path / "run", val_split=0.2)
    (folders / "val").rename(folders / "test")
    assert run(folders, tmp_path / "default", epochs=1).metrics["images"] == 6
    assert run(folders, tmp_path / "share", epochs=1, val_split=0.5).metrics["images"] == 12
    assert run(folders, tmp_path / "count", epochs=1, val_size=3).metrics["images"] == 3
    assert run(folders, tmp_path / "named", epochs=1, val_name="test").metrics["images"] == 6


def test_how_many_images_are_held_out_by_which_seed_is_printed(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "val").rename(folders / "test")
    for check in (True, False):
        finetune(config(folders, tmp_path / "run", dry_run=True, seed=7, check=check))
        note = "has no split val: 6 of 24 training images are held out for validation, drawn by the seed 7"
        assert capsys.readouterr().out.count(note) == 1


def test_missing_plots_are_a_note_before_training(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="few"):
        finetune(config(folders, tmp_path / "run", batch_size=None, accumulate=30))
    assert "no plots, because matplotlib is not installed: pip install 'spd-zoo[train]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [("run.yaml", "- 1"), ("run.yaml", "epochs: [1]"), ("data.json", "[1]"), ("data.json", "[" * 100_000)],
)
def test_a_damaged_file_of_a_run_is_named(folders: Path, tmp_path: Path, name: str, text: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.yaml").write_text(to_yaml(config(folders, out)))
    (out / "data.json").write_text('{"fingerprint": ""}')
    (out / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(out))):
        finetune(config(folders, out))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def changed(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the network that learnt or whose statistics moved."""
    keys = [key for key in start if not key.endswith("num_batches_tracked")]
    return {".".join(key.split(".")[:2]) for key in keys if not torch.equal(start[key], end[key])}


@pytest.mark.slow
def test_frozen_modules_stay_and_the_head_learns_first(folders: Path, tmp_path: Path) -> None:
    start = weights_of_untrained()
    run(folders, tmp_path / "frozen", epochs=1, freeze="stem,stages.0")
    parts = changed(start, weights_of(tmp_path / "frozen"))
    assert not {part for part in parts if part.startswith("stem") or part == "stages.0"}
    assert {"stages.1", "stages.2", "head.fc"} <= parts
    run(folders, tmp_path / "head", epochs=1, head_epochs=1)
    assert changed(start, weights_of(tmp_path / "head")) == {"head.fc"}
    run(folders, tmp_path / "both", epochs=2, head_epochs=1, keep="last")
    assert {"stages.0", "head.fc"} <= changed(start, weights_of(tmp_path / "both"))
    with pytest.raises(ValueError, match="freeze names 'layer1', which the network does not have; its modules are"):
        run(folders, tmp_path / "wrong", freeze="layer1")


def weights_of_untrained() -> dict[str, torch.Tensor]:
    seed_everything(0)
    return timm.create_model("cifar_resnet20", num_classes=3).state_dict()


@pytest.mark.slow
def test_early_stopping_keeps_the_best_network(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([20.0, 40.0, 30.0, 40.0, 35.0])
    score = Classification.score
    states = []

    def prescribed(task: Classification, net: Any, *arguments: Any) -> dict[str, float]:
        states.append({key: value.clone() for key, value in net.state_dict().items()})
        return score(task, net, *arguments) | {"top1": next(scores)}

    monkeypatch.setattr(Classification, "score", prescribed)
    result = run(folders, tmp_path / "run", epochs=20, patience=3)
    assert [row["val_top1"] for row in result.history] == [20, 40, 30, 40, 35]
    kept = weights_of(tmp_path / "run")
    assert all(torch.equal(kept[key], states[1][key]) for key in kept)


@pytest.mark.slow
def test_micro_batches_add_up_to_one_step(folders: Path, tmp_path: Path) -> None:
    still = {"model": "test_convnext", "opt": "sgd", "lr": 0.1, "epochs": 1, "image_size": "32"}  # no BatchNorm
    losses = {}
    for parts in (1, 4):
        losses[parts] = run(folders, tmp_path / str(parts), **still, accumulate=parts, drop_last=False, batch_size=16)
    one, four = (weights_of(tmp_path / name) for name in ("1", "4"))
    assert all(torch.allclose(one[key], four[key], atol=1e-6) for key in one)
    assert losses[1].history[0]["train_loss"] == pytest.approx(losses[4].history[0]["train_loss"], rel=1e-5)


def test_micro_batches_are_used_if_memory_is_short(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 8 * 2.0**20)
    run(folders, tmp_path / "run", epochs=1, batch_size=16, image_size="32")
    assert load_config(tmp_path / "run" / "run.yaml")["accumulate"] > 1
    assert "each step is computed in" in capsys.readouterr().out


def test_a_step_of_few_images_has_no_empty_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 2.0**20)
    asked, net = config(tmp_path, tmp_path / "run", batch_size=64), timm.create_model("cifar_resnet20", device="meta")
    plan = planning.plan(asked, Classification(), net, 6, ["a", "b", "c"], Process(torch.device("cpu")))
    assert plan.micro_batches == 2


def test_the_memory_of_a_step_is_about_what_is_measured() -> None:
    net = timm.create_model("cifar_resnet20")
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    kept = memory.bytes_per_image(net, 32, preprocessing)
    maps = (
        3 * 32 * 32 * (1 + 1) + 16 * 32 * 32 * 7 * 2 + 32 * 16 * 16 * 6 * 2 + 64 * 8 * 8 * 6 * 2
    )  # in and out of convs
    assert 0.8 < kept / (4 * maps) < 2
    assert memory.bytes_per_image(net, 32, replace(preprocessing, bf16=True)) == pytest.approx(kept / 2, rel=0.01)
    assert next(net.parameters()).device.type == "cpu"


def make_stream(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images as parquet files."""
    datasets = pytest.importorskip("datasets", reason="streams need the extra `train`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "stream").mkdir()
    for split in ("train", "val"):
        found = open_data(str(folders), split)
        assert found is not None
        names = datasets.ClassLabel(names=found.class_names)
        features = datasets.Features({"image": datasets.Image(), "label": names})
        columns = {"image": [found.image(i) for i in range(len(found))], "label": found.labels}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "stream" / f"{split}.parquet")
    return tmp_path / "stream"


def test_a_step_of_a_stream_is_split_into_equal_parts(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 7, "accumulate": 2}
    process = Process(torch.device("cpu"))
    assert planning._batch_size(config(tmp_path, tmp_path, **options), 24, process) == 7
    with pytest.raises(
        ValueError, match="a step of a stream has 2 equal micro-batches, which batch_size 7 cannot be divided"
    ):
        planning._batch_size(config(tmp_path, tmp_path, stream=True, **options), 24, process)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "accumulate"), [(24, 1), (5, 2)])
def test_the_images_of_a_stream_have_a_weight_of_one_in_all(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, accumulate: int
) -> None:
    stream = {"stream": True, "stream_length": length, "accumulate": accumulate, "seed": -1}
    run = started(make_stream(folders, tmp_path, monkeypatch), tmp_path / "run", lr=1e-12, **stream)
    torch.nn.init.zeros_(run.net.head.fc.weight)
    torch.nn.init.zeros_(run.net.head.fc.bias)
    training.train_epoch(run, StopSignals(), tqdm(disable=True))
    assert run.gathered_losses()[0]["loss"] / run.steps.per_epoch == pytest.approx(math.log(3), abs=1e-4)


@pytest.mark.slow
def test_a_stopped_stream_resumes_to_the_same_bits(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stream(folders, tmp_path, monkeypatch)
    options = {"stream": True, "stream_length": 24, "workers": 1, "auto_augment": "rand-m6-n2"}
    run(tmp_path / "stream", tmp_path / "whole", **options)
    stop_in(monkeypatch, 1, 1)
    with pytest.raises(Stopped):
        run(tmp_path / "stream", tmp_path / "stopped", **options)
    with pytest.raises(ValueError, match="holds a run with workers=1, not 0"):
        run(tmp_path / "stream", tmp_path / "stopped", **options | {"workers": 0})
    result = run(tmp_path / "stream", tmp_path / "stopped", **options)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    assert result.metrics["images"] == 6


def test_class_weights_count_the_same_in_every_batch(folders: Path) -> None:
    data = open_data(str(folders), "train")
    assert data is not None
    few = data.subset([*range(8), 8, 16])
    net = timm.create_model("cifar_resnet20", num_classes=3)
    cpu = torch.device("cpu")
    task = ClassifierTraining(net, config(folders, folders, class_weights="inv_freq"), few, cpu)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    weights = torch.tensor([0.125, 1.0, 1.0]) / 2.125 * 3
    smooth = torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
    expected = -(smooth * weights * logits.log_softmax(1)).sum(1).mean()
    assert task.criterion(logits, labels) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="class_weights must be 3 numbers"):
        ClassifierTraining(net, config(folders, folders, class_weights="1,2"), few, cpu)


@pytest.mark.slow
def test_the_moving_average_is_the_result(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "plain", epochs=1)
    run(folders, tmp_path / "ema", epochs=1, ema=0.5)
    state = torch.load(tmp_path / "ema" / "last.pt", weights_only=True)
    kept, plain = weights_of(tmp_path / "ema"), weights_of(tmp_path / "plain")
    assert all(torch.equal(kept[key], state["ema"][key]) for key in kept)
    assert all(torch.equal(plain[key], state["net"][key]) for key in plain)
    assert not torch.equal(kept["head.fc.weight"], plain["head.fc.weight"])


@pytest.mark.slow
def test_a_run_may_start_from_another_one(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "first", epochs=1)
    still = {"pretrained": None, "epochs": 1, "lr": 1e-12, "weight_decay": 0.0, "head_init": "random"}
    run(folders, tmp_path / "second", model=f"local-dir:{tmp_path / 'first'}", **still)
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert all(torch.allclose(first[key], second[key]) for key in first if "running" not in key and "num" not in key)


@pytest.mark.slow
def test_earlier_layers_learn_more_slowly(folders: Path, tmp_path: Path) -> None:
    start, slow = weights_of_untrained(), {"opt": "momentum", "momentum": 0.0, "weight_decay": 0.0, "epochs": 1}
    run(folders, tmp_path / "even", **slow, lr=1e-4)
    run(folders, tmp_path / "decayed", **slow, lr=1e-4, layer_decay=0.5)
    even, decayed = weights_of(tmp_path / "even"), weights_of(tmp_path / "decayed")
    ratios = [
        ((decayed[key] - start[key]).norm() / (even[key] - start[key]).norm()).item()
        for key in ("stem.0.weight", "stages.1.0.conv1.conv.weight", "head.fc.weight")
        if key in start
    ]
    assert ratios == sorted(ratios) and ratios[0] < 0.01 and ratios[-1] == pytest.approx(1, rel=0.1)


def test_gradients_are_clipped(folders: Path, tmp_path: Path) -> None:
    start = weights_of_untrained()
    run(folders, tmp_path / "run", epochs=1, opt="momentum", momentum=0.0, lr=1.0, weight_decay=0.0, clip_grad=1e-4)
    learnt = [key for key in start if key.endswith(("weight", "bias"))]
    moved = torch.stack([(weights_of(tmp_path / "run")[key] - start[key]).norm() for key in learnt]).norm()
    assert 0 < moved <= 3.1e-4  # three steps


@pytest.mark.slow
def test_mixup_and_arguments_of_the_network_are_used(folders: Path, tmp_path: Path) -> None:
    options = {"mixup": 0.2, "cutmix": 1.0, "model": "pyconvresnet50", "model_args": "zero_init_residual=true"}
    run(folders, tmp_path / "run", epochs=1, lr=1e-9, **options)
    assert weights_of(tmp_path / "run")["stages.0.0.bn3.weight"].abs().max() < 1e-3


def test_a_network_for_grey_images_is_trained_on_grey_images(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1, model_args="in_chans=1")
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert net.in_chans == 1 and len(net.pretrained_cfg["mean"]) == 1


def test_mean_and_std_can_be_set(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=1, mean="0.1,0.2,0.3", std="0.4,0.5,0.6", crop_pct=0.875)
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.875)


def lr_of(run: Path) -> list[float]:
    return [float(row["lr"]) for row in rows_of(run / "metrics.csv")]


@pytest.mark.slow
def test_a_multistep_schedule_divides_the_learning_rate_at_its_epochs(folders: Path, tmp_path: Path) -> None:
    steps = {"sched": "multistep", "decay_epochs": "1,3", "opt": "momentum", "lr": 0.1, "decay_all": True}
    run(folders, tmp_path / "tenth", epochs=4, crop_padding=2, **steps)
    assert lr_of(tmp_path / "tenth") == pytest.approx([0.1, 0.01, 0.01, 0.001])
    run(folders, tmp_path / "fifth", epochs=4, decay_rate=0.2, sched_epochs=True, **steps)
    assert lr_of(tmp_path / "fifth") == pytest.approx([0.1, 0.02, 0.02, 0.004])


@pytest.mark.slow
def test_a_cosine_between_epochs_ends_above_its_floor(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "run", epochs=4, opt="sgd", lr=1.0, min_lr=0.1, sched_epochs=True)
    expected = [0.1 + 0.9 * (1 + torch.tensor(epoch * torch.pi / 4).cos().item()) / 2 for epoch in range(4)]
    assert lr_of(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


def test_a_rate_that_never_falls_is_noted(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"sched": "multistep", "decay_epochs": "1,5", "opt": "sgd", "lr": 0.1, "dry_run": True}
    finetune(config(folders, tmp_path / "run", epochs=2, **options))
    assert "note: 2 epochs end before the learning rate falls after epoch 5\n" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["", "0", "px", "32@1", "32,48", "32,48@5,64@3", "32,48@x"])
def test_image_sizes_without_meaning_are_refused(sizes: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size"):
        config(tmp_path, tmp_path / "run", image_size=sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": None, "opt": "sgd"}, "default learning rates are for lamb and adamw; give lr with opt sgd"),
        ({"crop_scale": 0.0}, "crop_scale must be above 0"),
        ({"val_size": -1}, "val_size must not be negative"),
        ({"val_split": 0.1, "val_size": 5}, "give only one"),
        ({"mixup": 0.2, "batch_size": 3}, "even batch_size, got 3"),
        ({"mixup": 0.2, "drop_last": False}, "they need drop_last"),
        ({"sched": "multistep"}, "sched is cosine, or multistep with decay_epochs"),
        ({"decay_epochs": "1,2"}, "sched is cosine, or multistep with decay_epochs"),
        ({"sched": "linear"}, "sched is cosine, or multistep with decay_epochs"),
        ({"sched": "multistep", "decay_epochs": "1,x"}, "rising whole numbers"),
        ({"sched": "multistep", "decay_epochs": "2,2"}, "rising whole numbers"),
        ({"crop_padding": -1}, "crop_padding must not be negative"),
        ({"hflip": 2.0}, "hflip must be from 0 to 1"),
        ({"seed": 2**64}, "seed must be a number of 64 bits, got 18446744073709551616"),
        ({"zoom": 1.0}, "zoom must be from 0 to 0.9, which shrinks images to a tenth, got 1.0"),
        ({"ema": 1.0}, "ema must be from 0 to below 1"),
        ({"resume": "maybe"}, "resume is auto or never"),
        ({"model_args": "drop_rate"}, "model_args 'drop_rate' is not like"),
        ({"mean": "a,b"}, "is not like 0.5,0.5,0.5"),
        ({"std": "0,1,1"}, "std must be positive"),
        ({"auto_augment": "nonsense"}, "auto_augment 'nonsense' is no policy of timm's"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0"),
        ({"mix_prob": 0.5}, "mix_prob is for Mixup and CutMix; give mixup or cutmix, too"),
        ({"decay_rate": 0.5}, "decay_rate is for sched multistep; give it, too"),
        ({"stream_length": 5}, "stream_length is for a streamed data set; give stream, too"),
        ({"stream": True, "drop_last": False}, "a stream fills every step; leave --no-drop-last out"),
        ({"model_args": "num_classes=7"}, "num_classes follows from the data; leave it out of model_args"),
        ({"epochs": 2, "image_size": "32,48@2"}, "the 2 epochs of the run end before image size 48@2 begins"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_without_meaning_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_args": "widths=3"}, "cifar_resnet20 does not take these model_args"),
        ({"model_args": "in_chans=4"}, "takes 4 channels; images have 1 or 3"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
        ({"mean": "0.5,0.5"}, "mean has 2 numbers, but cifar_resnet20 takes 3 channels"),
        ({"accumulate": 5}, "batch_size 8 is too small for 5 micro-batches: each needs two images"),
        ({"class_weights": "many"}, "class_weights must be 3 numbers from 0 up, inv_freq or effective_num, got 'many'"),
        ({"freeze": "head.fc", "head_epochs": 1}, "the classifier cannot train alone, it is frozen or unknown"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_leaves_no_folder(
    folders: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(folders, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [make_coco, make_yolo], ids=["coco", "yolo"])
def test_data_of_the_other_task_is_answered_with_the_command_that_takes_it(
    folders: Path, tmp_path: Path, make: Any
) -> None:
    boxes = make(tmp_path / "boxes", train=2, val=1)
    options: dict[str, Any] = {"out": tmp_path / "run", "dry_run": True}
    with pytest.raises(DataError, match="it has boxes, which detectors take, as in `spd-zoo finetune yolov8n_spd --da"):
        call.finetune("cifar_resnet20", data=boxes, **options)
    with pytest.raises(DataError, match="it has class folders, which classifiers take, as in `spd-zoo finetune tf_eff"):
        call.finetune("yolov8n_spd", data=folders, **options)
    with pytest.raises(DataError, match="it has boxes, which detectors take, as in `spd-zoo evaluate RUN --data"):
        evaluate("cifar_resnet20.cifar100", boxes, workers=0)


def test_a_yaml_file_holds_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nlr: 1e-3\nimage_size: 32\nbf16: true\nauto_augment: null\n")
    made = make_config({"model": "resnet18_spd", "data": "d", "out": "o", "epochs": 5}, file)
    assert (made.epochs, made.lr, made.image_size, made.bf16, made.auto_augment) == (5, 1e-3, "32", True, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"has an unknown option 'epoch'; did you mean epochs\?"),
        ("epochs: many", "epochs is 'many', not of the type int"),
        ("epochs: 2.5", r"epochs is 2\.5, not of the type int"),
        ("bf16: 1", "bf16 is 1, not of the type bool"),
        ("- 1", "must hold lines like"),
        ("a: [", "is not YAML"),
        ("momentum: unknown", "the publication behind .* leaves some settings out: give --momentum"),
    ],
)
def test_a_yaml_file_without_meaning_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        make_config({"model": "resnet18_spd", "data": "d", "out": "o"}, tmp_path / "mine.yaml")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_have_options_that_there_are_and_say_what_is_unknown(recipe: Path) -> None:
    given: dict[str, Any] = {"model": "cifar_resnet20", "data": "d", "out": "o"}
    unknown = [name for name, value in load_recipe(recipe.stem).items() if value == "unknown"]
    if unknown:
        with pytest.raises(ValueError, match=f"give .*{unknown[-1].replace('_', '-')}"):
            make_config(given, recipe=recipe.stem)
    made = make_config(given | dict.fromkeys(unknown, 1), recipe=recipe.stem)
    published = recipe.stem not in GENERAL
    assert (made.pretrained is False and made.lr is not None and made.warmup_epochs is not None) == published
    assert unknown == (["weight_decay", "warmup_epochs", "cutmix", "mix_prob"] if "augment" in recipe.stem else [])


def test_spds_recipe_begins_at_zero_and_falls_where_the_authors_count_from_one(folders: Path, tmp_path: Path) -> None:
    values = load_recipe("tiny_imagenet_spd") | {"model": "cifar_resnet20", "image_size": "16", "batch_size": 12}
    values |= {"data": str(folders), "out": tmp_path / "run", "epochs": 4, "decay_epochs": "2,3", "workers": 0}
    finetune(make_config(values))
    assert lr_of(tmp_path / "run") == pytest.approx([0.01793 / 2, 0.01793, 0.2 * 0.01793, 0.04 * 0.01793])  # of 2 steps


def test_missing_options_are_named() -> None:
    with pytest.raises(ValueError, match="give MODEL and --out"):
        make_config({"data": "d"})
    with pytest.raises(ValueError, match=r"there is no file mine$"):
        make_config({}, "mine")
    with pytest.raises(ValueError, match="there is no file best; the recipe of this name is --recipe best"):
        make_config({}, "best")


@pytest.mark.slow
def test_training_adds_the_regularization_of_bsconvs_networks(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []

    def regularization_loss(net: BSConvMobileNetV3) -> torch.Tensor:
        losses.append(net.regularization)
        return next(net.parameters()).sum()

    monkeypatch.setattr(BSConvMobileNetV3, "regularization_loss", regularization_loss)
    run(folders, tmp_path / "run", model="cifar_mobilenetv3_large_w1_bsconvs", epochs=1, image_size="32")
    assert losses == 3 * [0.1]


@pytest.mark.slow
def test_a_network_of_one_image_size_is_trained_at_the_size_asked_for(folders: Path, tmp_path: Path) -> None:
    options = {"model": "cifar_parc_mobilenetv2_pfd", "epochs": 1}
    run(folders, tmp_path / "run", image_size="48", **options)
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert net.stages[-2][0](torch.zeros(1, 160, 5, 5)).shape[-2:] == (5, 5)
    assert tuple(net.pretrained_cfg["input_size"]) == (3, 48, 48)
    for other in ({"image_size": "32,48@1", "epochs": 2}, {"image_size": "48", "model_args": "img_size=32"}):
        with pytest.raises(ValueError, match="takes images of one size: give one --image-size"):
            run(folders, tmp_path / "other", **options | other)
    assert not (tmp_path / "other").exists()


def chosen_for(asked: FinetuneConfig, images: int) -> Plan:
    net = timm.create_model(asked.model, device="meta")
    return planning.plan(asked, Classification(), net, images, ["a", "b", "c"], Process(torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opt": "adamww", "lr": 0.1}, "there is no optimiser 'adamww'; did you mean adamw?"),
        ({"opt": "step_adamw", "lr": 0.1}, "there is no optimiser 'step_adamw'; did you mean adamw?"),
        ({"freeze": "stm"}, "freeze names 'stm', which the network does not have; its modules are stem, stages, head"),
        ({"freeze": "stem,stages,head"}, "freeze stem,stages,head leaves nothing to train; name fewer modules"),
        ({"freeze": "head.fc", "head_epochs": 1}, "the classifier cannot train alone, it is frozen or unknown"),
        ({"model": "resnet18_spd", "pretrained": True}, "resnet18_spd has no pretrained weights; leave --pre"),
        ({"model": "resnet50_spd", "pretrained": True}, "no default weights; select some by name: resnet50_spd.spd_"),
        ({"model": "resnet50_spd.spd_cifar10"}, "the weights resnet50_spd.spd_cifar10 are not verified: give --pretra"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(options: dict[str, Any], said: str) -> None:
    asked = FinetuneConfig(**{"model": "cifar_resnet20", "data": "data", "out": Path("run"), "lr": None, **options})
    with pytest.raises(ValueError, match=re.escape(said)):
        chosen_for(asked, 24)


def test_a_lookahead_optimizer_and_unverified_weights_that_are_asked_for_are_planned() -> None:
    options: dict[str, Any] = {"data": "data", "out": Path("run"), "opt": "lookahead_sgd", "lr": 0.1}
    assert chosen_for(FinetuneConfig(model="resnet50_spd.spd_cifar10", pretrained=True, **options), 24).pretrained


def test_class_weights_are_checked_with_the_data(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_weights must be 3 numbers from 0 up, inv_freq or effective_num"):
        run(folders, tmp_path / "run", class_weights="1,2", dry_run=True)


def test_networks_with_weights_start_from_them_and_the_others_from_scratch(folders: Path) -> None:
    for name, expected in (("pyconvresnet50_spd", True), ("pyconvresnet50", False)):
        asked = config(folders, folders, model=name, lr=None, pretrained=None)
        chosen = chosen_for(asked, 480)
        assert chosen.pretrained is expected
        assert (chosen.head_epochs, chosen.config.head_init) == (0, "probe" if expected else "random")
        assert chosen.opt == ("adamw" if expected else "lamb")
        assert chosen.lr == pytest.approx(LR[chosen.opt] / 4)


@pytest.mark.parametrize(("images", "batch_size"), [(12, 8), (480, 16), (2_000, 64), (47_500, 128)])
def test_small_data_sets_have_small_steps(folders: Path, images: int, batch_size: int) -> None:
    asked = config(folders, folders, batch_size=None)
    assert chosen_for(asked, images).batch_size == batch_size


# plan(), start(), train_epoch(), end_epoch() and finish(), each alone


def test_a_plan_has_a_value_for_every_option(folders: Path) -> None:
    asked = config(folders, folders, batch_size=None, lr=None, image_size=None, warmup_epochs=None, bf16=None)
    plan = chosen_for(replace(asked, pretrained=None, opt=None), images=480)
    assert all(value is not None for value in vars(plan).values())
    assert (plan.sizes, plan.batch_size, plan.micro_batches) == ([((64, 64), 0)], 16, 1)
    assert Plan.of(plan.config) == plan
    with pytest.raises(ValueError, match="does not set lr"):
        Plan.of(replace(plan.config, lr=None))


def started(folders: Path, out: Path, **changes: Any) -> training.Run:
    asked, process = config(folders, out, **changes), Process(torch.device("cpu"))
    task = Classification()
    splits = task.open_splits(asked, timm.create_model(asked.model, device="meta"), process, None)
    images = len(splits.train)
    plan = planning.plan(asked, task, timm.create_model(asked.model, device="meta"), images, ["a", "b", "c"], process)
    return training.start(plan, task, splits, RunFolder(out), process)


def test_an_epoch_is_trained_evaluated_and_finished_alone(folders: Path, tmp_path: Path) -> None:
    run = started(folders, tmp_path / "run", epochs=1)
    before = {key: value.clone() for key, value in run.net.state_dict().items()}
    signals = StopSignals()
    training.train_epoch(run, signals, tqdm(disable=True))
    assert run.done == run.steps.per_epoch == 3 and not run.history
    assert {"stages.0", "head.fc"} <= changed(before, run.net.state_dict())
    training.end_epoch(run, signals)
    assert run.done == 0 and run.history[0]["epoch"] == 1 and run.history[0]["train_loss"] > 0
    assert started(folders, tmp_path / "run", epochs=1).history == run.history  # resumed
    result = training.finish(run)
    assert result.metrics["images"] == 6 and (tmp_path / "run" / "report.html").exists()


def test_speed_and_time_left_count_what_was_trained_since_the_run_was_resumed(folders: Path, tmp_path: Path) -> None:
    run = started(folders, tmp_path / "run", epochs=3, batch_size=10, drop_last=False)
    run.history.append({"epoch": 1})
    run.began, run.saved = 0.0, 150.0  # 120 s for training and 30 s for the rest
    assert run.steps.per_epoch == 3 and training._pace(run, 120.0) == ", 0 images/s, 5 min left"
    assert training._pace(run, 2.0).startswith(", 12 images/s")  # 24 images, of which the last step has 4
    run.began_at = 1
    assert training._pace(run, 120.0) == ", 0 images/s, 7 min left"  # an epoch takes 180 s and 30 s
    run.began_at = 3
    assert training._pace(run, 0.001) == ""


def test_a_process_without_a_step_in_an_epoch_adds_nothing_to_its_loss(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(folders, tmp_path / "run", epochs=1)
    training.train_epoch(run, StopSignals(), tqdm(disable=True))
    mine = run.gathered_losses()
    monkeypatch.setattr(run, "gathered_losses", lambda: [*mine, {}])  # the second was resumed after the last step
    run.began_at = 4  # with one step fewer
    training.end_epoch(run, StopSignals())
    assert run.history[0]["train_loss"] == mine[0]["loss"] / 4


def test_a_signal_before_the_first_step_saves_the_untrained_network(folders: Path, tmp_path: Path) -> None:
    run = started(folders, tmp_path / "run")
    signals = StopSignals()
    signals.number = signal.SIGTERM
    with pytest.raises(Stopped, match="stopped in epoch 1 after step 0 of 3"):
        training.train_epoch(run, signals, tqdm(disable=True))
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 0


def test_the_error_for_a_full_disk_says_which_checkpoint_is_left(tmp_path: Path) -> None:
    full, folder = OSError(28, "No space left on device"), RunFolder(tmp_path)
    for advice in ("there is no checkpoint yet", "the last checkpoint is intact, and the same command resumes from it"):
        with pytest.raises(RunError, match=rf"last\.pt: No space left on device; {advice}$"), folder.writing("last.pt"):
            raise full
        (tmp_path / "last.pt").touch()
    with pytest.raises(RuntimeError, match="no error of the disk"), folder.writing("last.pt"):
        raise RuntimeError("no error of the disk")


@pytest.mark.slow
def test_a_continued_run_starts_from_the_kept_network_and_resumes_to_the_same_bits(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = {"model": "cifar_resnet20.cifar100", "pretrained": True, "lr": 4e-3, "image_size": "16,20@1"}
    run(folders, Path("run"), **first)
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["finetune", "run", "--epochs", "+2", "--workers", "0", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "continues from the network of run: 2 epochs from learning rate 0.0004 (a tenth of the peak" in printed
    assert "into run+2" in printed and (tmp_path / "run" / "model.safetensors").read_bytes() == kept
    assert main(["finetune", "run", "--epochs", "+2", "--workers", "0", "--device", "cpu"]) == 0
    assert "run+2 is trained already, for 2 epochs" in capsys.readouterr().out and "already" not in printed
    result = call.finetune("run", epochs="+2", out="last", lr=1e-12, workers=0, device="cpu", keep="last")
    assert result is not None
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "last")
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before if "running" not in key)
    assert result.before["val_top1"] == max(float(row["val_top1"]) for row in rows_of(tmp_path / "run" / "metrics.csv"))
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "run+2" / "metrics.csv")[1:]]
    assert rates[0] > rates[1] and rates[0] < 4e-4
    stop_in(monkeypatch, 0, 1)
    with pytest.raises(Stopped):
        call.finetune("run", epochs="+2", out="stopped", workers=0, device="cpu")
    call.finetune("run", epochs="+2", out="stopped", workers=0, device="cpu")
    assert same_run(tmp_path / "run+2", tmp_path / "stopped")
    shutil.copytree(folders / "val", folders / "train", dirs_exist_ok=True)
    (folders / "train" / "red" / "0.png").unlink()
    with pytest.raises(DataError, match="is not what run was trained on"):
        call.finetune("run", epochs="+2", out="other")


@pytest.mark.parametrize(
    ("model", "epochs", "options", "message"),
    [
        ("cifar_resnet20", "+3", {}, r"epochs \+3 continues a finished run; give its folder instead of cifar_resn"),
        ("run", "+0", {}, r"epochs must be a whole number, or like \+10, got \+0"),
        ("run", "+1.5", {}, r"epochs must be a whole number, or like \+10, got \+1.5"),
        ("run", "+3", {"seed": 2}, "a run that continues .*run keeps its seed; leave that out"),
        ("run", "+3", {"pretrained": False}, "keeps its pretrained; leave that out"),
        ("run", "+3", {"recipe": "best"}, r"epochs \+3 continues a finished run with its options: give its folder"),
        ("run", "+3", {"epoch": 2}, "did you mean epochs"),
    ],
)
def test_what_a_run_cannot_continue_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, epochs: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("lr: 0.1\n")
    save_network(timm.create_model("cifar_resnet20"), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        call.finetune(model, epochs=epochs, **options)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ({"sched": "multistep", "decay_epochs": "1", "decay_rate": 0.5}, {}),
        ({"mixup": 0.2, "mix_prob": 0.5}, {"mixup": 0.0}),
        ({"teacher": "cifar_resnet20", "distill_weight": 0.5, "distill_temperature": 2.0}, {"teacher": ""}),
    ],
    ids=lambda value: "-".join(value),
)
def test_a_run_is_continued_without_options_that_only_others_gave_a_meaning(
    tmp_path: Path, stored: dict[str, Any], asked: dict[str, Any]
) -> None:
    finished = config(tmp_path, tmp_path / "run", **stored)
    save_network(timm.create_model("cifar_resnet20"), finished.out)
    (finished.out / "run.yaml").write_text(to_yaml(finished))
    (finished.out / "data.json").write_text('{"fingerprint": "f"}')
    (finished.out / "metrics.csv").write_text("epoch,lr,val_top1\n1,0.001,50\n")
    options = continuation(str(finished.out), "+1", {"data": str(tmp_path), **asked}).options
    made = make_config(options)
    assert (made.decay_rate, made.mix_prob, made.distill_weight, made.distill_temperature) == (0.1, 1.0, 0.9, 4.0)


def test_an_unfinished_or_damaged_run_cannot_be_continued(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 0.1\n")
    with pytest.raises(ModelError, match="choose the folder of a finished run"):
        call.finetune(tmp_path, epochs="+3")
    save_network(timm.create_model("cifar_resnet20"), tmp_path)
    with pytest.raises(RunError, match=r"damaged run\.yaml, data\.json or metrics\.csv"):
        call.finetune(tmp_path, epochs="+3")


def test_a_recipe_is_named_and_options_override_it(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("ema: 0.5\nlr: 1e-3\nlog: ''\n")
    options = {"data": folders, "out": tmp_path / "run", "image_size": "16", "workers": 0, "device": "cpu"}
    call.finetune("cifar_resnet20", recipe="best", config=tmp_path / "mine.yaml", epochs=1, **options)
    printed = capsys.readouterr().out
    assert "chosen: recipe best, weights cifar_resnet20.cifar100, 1 epoch at 16 px" in printed
    assert "moving average 0.5" in printed
    assert load_recipe("best")["epochs"] > 20 > load_recipe("quick")["epochs"]
    with pytest.raises(ValueError, match="there is no recipe 'bst'; recipes: quick, best, cifar100_first"):
        call.finetune("cifar_resnet20", recipe="bst")


@pytest.mark.slow
def test_tensorboard_gets_the_metrics_of_each_epoch(folders: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(folders, tmp_path / "run", log="tensorboard", model="cifar_resnet20.cifar100", pretrained=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("val_loss")]
    rows = [result.before, *result.history]
    assert logged == [(row["epoch"], pytest.approx(row["val_loss"], rel=1e-6)) for row in rows]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]


@pytest.mark.slow
def test_wandb_gets_the_metrics_of_each_epoch_offline(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run(folders, tmp_path / "run", log="wandb")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    logged = file.read_bytes()  # numbers are text in it
    assert all(
        json.dumps(row[name]).encode() in logged for row in result.history for name in ("train_loss", "val_loss")
    )
    assert b"cifar_resnet20" in logged and str(folders).encode() in logged
