"""The comparison of twins: intervals, tables, runs that begin alike, and a sweep that resumes."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import twins
import twins_config
import twins_report
import twins_run
import yaml
from pictures import make_folders

from spd_zoo.data.labelled import open_data
from spd_zoo.process import Stopped, StopSignals
from spd_zoo.weights import entries, save_network

# there, os.kill and Process.terminate end a process at once, so no handler of a signal can run
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to a process")
CONFIGS = twins_config.read_configs() + twins_config.read_configs(twins_config.CONFIGS / "imported")
NETWORKS: list[dict[str, Any]] = [
    {"name": "strided", "model": "resnet10t"},
    {"name": "SPD", "model": "resnet10t", "convert": True},
]
OPTIONS: dict[str, Any] = {"epochs": 1, "image_size": "32", "batch_size": 8, "opt": "adamw", "check": False}


def config(**fields: Any) -> dict[str, Any]:
    """A config as in a file."""
    content = {"title": "Colours", "data": "colours", "seeds": 3, "metrics": {"top1": "top-1"}, "networks": NETWORKS}
    return content | {"options": OPTIONS} | fields


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Writes a config and reads it."""

    def read(**fields: Any) -> dict[str, Any]:
        file = tmp_path / "colours.yaml"
        file.write_text(yaml.safe_dump(config(**fields)))
        return twins_config.read_config(file)

    return read


def record(config: dict[str, Any], network: int, seed: int, **fields: Any) -> dict[str, Any]:
    """A recorded run with an accuracy that depends on both."""
    digest = twins_config.digest(config, config["networks"][network])
    found = {"digest": digest, "seed": seed, "data": "abc", "split": "test", "images": 9, "ms_per_image": 2.0 + network}
    return found | {"metrics": {"top1": 50.0 + 10 * seed + network * (1 + seed)}} | fields


def test_the_interval_is_that_of_students_t() -> None:
    half = twins_report.interval([1.0, 2.0, 3.0])
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom, from a printed table
    assert twins_report.interval([1.0, 3.0]) == pytest.approx(12.7062, rel=1e-5)
    assert twins_report.interval([1.0]) is None


def test_the_table_has_means_and_paired_differences(read: Any) -> None:
    found = read()
    records = [record(found, network, seed) for seed in (2, 0, 1) for network in (1, 0)]
    first, second = twins_report.markdown(found, records).splitlines()[-2:]
    assert first == "| strided | 3 of 3 | 60.00 ± 24.84 | 2.00 |"
    # the seeds vary by 10, the differences 1, 2 and 3 of equal seeds by 1 alone
    assert second == "| SPD | 3 of 3 | 62.00 ± 27.33; +2.00 ± 2.48 to strided | 3.00 |"


def test_only_equal_seeds_are_compared_and_what_is_missing_is_named(read: Any) -> None:
    found = read()
    records = [record(found, 0, 0), record(found, 0, 1), record(found, 1, 1)]
    lines = twins_report.markdown(found, records).splitlines()
    assert lines[-1] == "| SPD | 1 of 3 | 62.00 (one seed); +2.00 (one seed) to strided | 3.00 |"
    nothing = "| 0 of 3 | not measured yet | not measured yet |"
    assert twins_report.markdown(found, []).splitlines()[-2:] == [f"| strided {nothing}", f"| SPD {nothing}"]


def test_configs_of_which_no_two_networks_ran_are_named_and_have_no_table_and_no_panel(read: Any) -> None:
    measured, other = read(), read(title="Later", options=OPTIONS | {"epochs": 2})
    records = [record(measured, 0, 0), record(measured, 1, 0), record(other, 1, 0)]
    text = twins_report.tables([other, measured], records)
    assert text.startswith(f"{measured['title']}:\n") and text.endswith("\n\nNot measured yet: Later.")
    assert list(twins_report.panels([other, measured], records)) == [measured["title"]]
    assert twins_report.tables([other], []) == "Not measured yet: Later."
    assert list(twins_report.panels([other], [])) == ["Later"]


def test_other_settings_are_not_measured_yet_and_equal_ones_are_shared(read: Any) -> None:
    found = read()
    records = [record(found, network, 0) for network in (0, 1)]
    other = read(options=OPTIONS | {"epochs": 2})
    assert "62" not in twins_report.markdown(other, records)
    renamed = read(title="Same", networks=[NETWORKS[0] | {"name": "first"}, NETWORKS[1] | {"against": "first"}])
    assert "+1.00 (one seed) to first" in twins_report.markdown(renamed, records)


def test_a_metric_that_does_not_exist_is_none_not_missing(read: Any) -> None:
    found = read()
    assert "| strided | 1 of 3 | none |" in twins_report.markdown(found, [record(found, 0, 0, metrics={"top1": None})])


def test_runs_on_other_images_are_not_averaged(read: Any) -> None:
    found = read()
    with pytest.raises(twins_config.ConfigError, match="other images"):
        twins_report.summary(found, [record(found, 0, 0), record(found, 0, 1, data="def")])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"network": []}, "unknown field network"),
        ({"seeds": "3"}, "seeds is '3', not of the type int"),
        ({"networks": NETWORKS[:1]}, "at least two networks"),
        ({"networks": [NETWORKS[0], NETWORKS[0]]}, "each by another name"),
        ({"networks": [NETWORKS[0], NETWORKS[1] | {"against": "SPD"}]}, "not one before it"),
        ({"networks": [NETWORKS[0], NETWORKS[1] | {"spd": True}]}, "unknown field spd"),
        ({"options": {"epochs": 1}}, "must give batch_size and image_size"),
        ({"options": OPTIONS | {"seed": 1}}, "the tool itself sets the options seed"),
        ({"networks": [NETWORKS[0], NETWORKS[1] | {"options": {"seed": 1}}]}, "the tool itself sets the options seed"),
        ({"networks": [NETWORKS[0], NETWORKS[1] | {"options": {"bf16": True}}]}, "bf16 is an option of all networks"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_a_wrong_config_is_refused(read: Any, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(twins_config.ConfigError, match=problem):
        read(**fields)


@pytest.mark.parametrize("found", CONFIGS, ids=lambda found: found["name"])
def test_the_configs_of_the_repository_have_options_of_finetune(found: dict[str, Any], tmp_path: Path) -> None:
    for spec in found["networks"]:
        request = twins_run.request(found, spec, spec["model"], tmp_path, tmp_path, seed=1)
        wanted = found["options"] | spec.get("options", {})
        assert (request.seed, request.bf16, request.batch_size) == (1, wanted["bf16"], wanted["batch_size"])
        assert request.lr == wanted["lr"]


def test_converted_twins_compute_the_same_before_training() -> None:
    names = ["a", "b"]
    strided, spd = (twins_run.build(spec, names, seed=1).eval() for spec in NETWORKS)
    images = torch.randn(2, 3, 32, 32)
    assert [type(module) for module in strided.modules()] != [type(module) for module in spd.modules()]
    torch.testing.assert_close(strided(images), spd(images))
    other = twins_run.build(NETWORKS[0], names, seed=2).eval()
    assert not torch.allclose(strided(images), other(images))


@pytest.mark.slow
@pytest.mark.parametrize("found", twins_config.read_configs(), ids=lambda found: found["name"])
def test_the_networks_of_the_configs_are_saved_and_loaded_again(found: dict[str, Any], tmp_path: Path) -> None:
    published = [spec for spec in found["networks"] if spec.get("backbone", "yolov8n_spd.bccd") in entries()]
    for spec in published:
        net = twins_run.build(spec, ["a", "b", "c"], seed=1)
        save_network(net, tmp_path / spec["name"])
        again = timm.create_model(f"local-dir:{tmp_path / spec['name']}", pretrained=True)
        for key, tensor in net.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], tensor, msg=f"{spec['name']}: {key}")
        other = timm.create_model(f"local-dir:{tmp_path / spec['name']}", pretrained=True, num_classes=5)
        assert other.num_classes == 5


def test_a_subset_has_equally_many_images_of_every_class(tmp_path: Path) -> None:
    data = make_folders(tmp_path / "colours", train=4, val=2)
    twins_run.write_subset(data, 6, tmp_path / "subset.csv")
    splits = {split: open_data(tmp_path / "subset.csv", split) for split in ("train", "val")}
    assert {split: images and images.counts() for split, images in splits.items()} == {
        "train": [2, 2, 2],
        "val": [2, 2, 2],
    }


def test_missing_data_is_skipped_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "colours.yaml"
    file.write_text(yaml.safe_dump(config()))
    command = [str(file), "--data-root", str(tmp_path), "--out", str(tmp_path / "runs"), "--jobs", "1"]
    assert twins.main(command) == 1
    assert f"skipped colours: there is no {tmp_path / 'colours'}" in capsys.readouterr().err
    assert "Not measured yet: " in (tmp_path / "runs" / "twins.md").read_text()


def test_a_stopped_sweep_repeats_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path / "colours", train=2, val=2)
    file = tmp_path / "colours.yaml"
    file.write_text(yaml.safe_dump(config(seeds=2)))
    command = [str(file), "--data-root", str(tmp_path), "--out", str(tmp_path / "runs"), "--jobs", "1"]
    done: list[tuple[str, int]] = []
    limit = 3

    def run(config: dict[str, Any], spec: dict[str, Any], seed: int, data: Path, out: Path) -> dict[str, Any]:
        if len(done) == limit:
            raise Stopped(15, "stopped")
        done.append((spec["name"], seed))
        return record(config, config["networks"].index(spec), seed)

    monkeypatch.setattr(twins, "run", run)
    assert twins.main(command) == 128 + 15
    limit = 9
    assert twins.main(command) == 0
    assert done == [("strided", 0), ("SPD", 0), ("strided", 1), ("SPD", 1)]
    assert "+1.50 ± 6.35 to strided" in (tmp_path / "runs" / "twins.md").read_text()
    assert "<svg" in (tmp_path / "runs" / "twins.svg").read_text()


@pytest.mark.slow
def test_twins_are_trained_evaluated_and_recorded(tmp_path: Path) -> None:
    data = make_folders(tmp_path / "colours", train=6, val=2)
    file = tmp_path / "colours.yaml"
    file.write_text(yaml.safe_dump(config(seeds=1, train_images=12)))
    command = [str(file), "--data-root", str(data.parent), "--out", str(tmp_path / "runs"), "--jobs", "1"]
    threads = torch.get_num_threads()
    assert twins.main(command) == 0
    assert torch.get_num_threads() == threads
    records = [json.loads(line) for line in (tmp_path / "runs" / "twins.jsonl").read_text().splitlines()]
    assert [record["network"] for record in records] == ["strided", "SPD"]
    for found in records:
        assert (found["split"], found["images"]) == ("val", 6)
        assert 0 <= found["metrics"]["top1"] <= 100
        assert found["seconds"] > 0 < found["ms_per_image"]
    assert records[1]["params"] > records[0]["params"]
    assert records[0]["data"] == records[1]["data"]
    runs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "runs").glob("*/run/run.yaml")]
    paired = [{key: value for key, value in run.items() if key not in ("model", "out")} for run in runs]
    assert len(paired) == 2
    assert paired[0] == paired[1]


@pytest.mark.slow
@needs_signals
def test_several_processes_report_a_failed_run(read: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = (read(), NETWORKS[0], 0, tmp_path / "missing", tmp_path / "run")
    assert twins.run_all([cell], 2, tmp_path / "twins.jsonl") == 1
    assert "failed, see" in capsys.readouterr().err
    assert "missing" in (tmp_path / "run" / "output.txt").read_text()
    assert not (tmp_path / "twins.jsonl").exists()


def _saves_slowly(arguments: tuple[Path], file: Path, quiet: bool) -> None:
    """Like `work`, a run that stops its sweep, as Ctrl-C does, and takes long to save its state."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getppid(), signal.SIGINT)
        while not signals.number:
            time.sleep(0.01)
        time.sleep(2.5)  # `run_all` looks every second
        file.write_text("saved")
    sys.exit(128 + signals.number)


@pytest.mark.slow
@needs_signals
def test_a_stopped_run_has_the_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "work", _saves_slowly)
    with pytest.raises(Stopped):
        twins.run_all([(tmp_path / "run",)], 2, tmp_path / "state")
    assert (tmp_path / "state").read_text() == "saved"
