"""Runs and networks of an earlier version can still be resumed, evaluated and loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import old_runs
import pytest
import timm
import torch
from runs import rows_of, same_run
from safetensors.torch import load_file

from spd_zoo.spd import SPDConv2d
from spd_zoo.training.classification import report
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.detection import report as box_report
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import finetune
from spd_zoo.training.run import environment


@pytest.fixture(autouse=True)
def as_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The narrow networks, one thread, no figures, and the converted network in the working directory."""
    old_runs.narrow_networks(monkeypatch)
    shutil.copytree(old_runs.GOLDEN / "converted", tmp_path / "converted")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_plots", lambda *_: {})
    monkeypatch.setattr(box_report, "_curves", lambda *_: b"")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def computes_alike(start: dict[str, Any]) -> bool:
    """Whether this machine has the processor and the versions of the start of a recorded run."""
    now = environment()
    versions = ("python", "torch", "torchvision", "timm", "numpy", "pillow")
    same = [start["versions"].get(name) == now["versions"].get(name) for name in versions]
    return all(same) and start["processor"] == now["processor"]


def test_processors_with_other_instructions_do_not_compute_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    start = environment()
    assert computes_alike(start)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")  # under the same model name
    assert not computes_alike(start)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(old_runs.RUNS))
def test_a_run_that_older_code_stopped_ends_as_if_it_had_not_been_stopped(name: str, tmp_path: Path) -> None:
    shutil.copytree(old_runs.GOLDEN / name / "stopped", tmp_path / "stopped")
    data, whole = old_runs.make_data(name, tmp_path / "data"), old_runs.GOLDEN / name / "whole"
    result = finetune(FinetuneConfig(data=str(data), out=tmp_path / "stopped", **old_runs.RUNS[name]))
    assert result is not None and [row["epoch"] for row in result.history] == [1, 2, 3]
    starts = json.loads((tmp_path / "stopped" / "environment.json").read_text())
    assert len(starts) == 2
    old, new = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "stopped"))
    assert old.keys() == new.keys()
    assert all(torch.allclose(new[key].float(), old[key].float(), rtol=1e-2, atol=1e-3) for key in old)
    for then, now in zip(rows_of(whole / "metrics.csv"), rows_of(tmp_path / "stopped" / "metrics.csv"), strict=True):
        assert list(then) == list(now)
        assert float(now["train_loss"]) == pytest.approx(float(then["train_loss"]), rel=1e-2)
    if computes_alike(starts[0]):
        assert same_run(whole, tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(old_runs.RUNS))
def test_a_run_writes_what_older_code_wrote(name: str, tmp_path: Path) -> None:
    data, whole = old_runs.make_data(name, tmp_path / "data"), old_runs.GOLDEN / name / "whole"
    former: dict[str, Any] = {"head_init": "zero", "crop_scale": 0.5, "crop_padding": 0} if name == "classifier" else {}
    finetune(FinetuneConfig(data=str(data), out=tmp_path / "new", **old_runs.RUNS[name], **former))
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    state, old = (
        torch.load(folder / "last.pt", weights_only=True)
        for folder in (tmp_path / "new", old_runs.GOLDEN / name / "stopped")
    )
    assert state.keys() - old.keys() == {"before", "evaluated"} and old.keys() <= state.keys()
    for part in ("net", "ema", "best"):
        assert state[part].keys() == old[part].keys()
    (start,) = json.loads((tmp_path / "new" / "environment.json").read_text())
    recorded = json.loads((old_runs.GOLDEN / name / "stopped" / "environment.json").read_text())[0]
    assert start.keys() == recorded.keys()
    rows = rows_of(tmp_path / "new" / "metrics.csv")
    assert [row["epoch"] for row in rows][-3:] == ["1", "2", "3"]
    if computes_alike(recorded) and state["best"] and not state["before"]:
        assert same_run(whole, tmp_path / "new")


@pytest.mark.parametrize("name", sorted(old_runs.RUNS))
def test_a_run_that_older_code_finished_is_evaluated(name: str, tmp_path: Path) -> None:
    whole, data = old_runs.GOLDEN / name / "whole", old_runs.make_data(name, tmp_path / "data")
    (evaluation,) = evaluate(str(whole), data, split="val", batch_size=2, device="cpu", workers=0)
    metric = "top1" if name == "classifier" else "ap"
    best = max(rows_of(whole / "metrics.csv"), key=lambda row: float(row[f"val_{metric}"]))  # the network that was kept
    assert evaluation.row[metric] == pytest.approx(float(best[f"val_{metric}"]), abs=1e-3)
    assert evaluation.row["img_size"] == int(best["image_size"])
    assert evaluation.predictions.summary()["loss"] == pytest.approx(float(best["val_loss"]), rel=1e-3)
    classes = [row["class"] for row in rows_of(whole / "per_class.csv")]
    assert [row["class"] for row in evaluation.predictions.per_class()] == classes == ["blue", "green", "red"]


def test_a_network_that_older_code_converted_is_loaded() -> None:
    net: Any = timm.create_model("local-dir:converted", pretrained=True).eval()
    assert any(isinstance(module, SPDConv2d) for module in net.modules())
    saved = load_file(old_runs.GOLDEN / "converted" / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in net.state_dict().items())
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
