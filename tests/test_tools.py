"""The maintainers' tools: the benchmark compares equal networks, timm's tests see one network of each architecture."""

import json
from pathlib import Path
from typing import Any

import benchmark
import benchmark_finetune
import benchmark_merge
import benchmark_steps
import bundle_weights
import compare_starts
import convert_experiment
import example_picture
import finetune_sweep
import latency
import linear_probe
import plain_networks
import pytest
import timm
import timm_contract
import torch
from networks import config_of
from pictures import COLOURS, make_folders
from PIL import Image
from timm.models import save_for_hf

from spd_zoo.data.reading import read_image
from spd_zoo.fold import fold_batchnorm
from spd_zoo.models._classifier import Classifier
from spd_zoo.training.config import FinetuneConfig, to_yaml
from spd_zoo.weights import save_network
from spd_zoo.weights.manifest import manifest_path

EVERY = timm_contract.own_networks(Classifier)
STEPS = ("inference", "train")
NETWORKS = plain_networks.with_plain_version(timm_contract.one_per_architecture(EVERY))


def test_the_help_of_the_picture_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_picture, "cells", None)  # cannot be called
    for option in ("--help", "--bogus"):
        with pytest.raises(SystemExit):
            example_picture.main([option])


@pytest.mark.slow
def test_one_per_architecture_has_every_layer_and_no_depth_twice() -> None:
    def layers(names: list[str]) -> set[type]:
        return {type(module) for name in names for module in timm.create_model(name, device="meta").modules()}

    assert layers(timm_contract.one_per_architecture(EVERY)) == layers(EVERY)
    assert timm_contract.one_per_architecture(["pyconvresnet101", "pyconvresnet50"]) == ["pyconvresnet50"]
    assert len(timm_contract.one_per_architecture(["pyconvresnet18", "pyconvresnet50"])) == 2


def test_only_networks_with_our_layers_have_a_plain_version() -> None:
    names = ["cifar_ghostnet_pfd", "pyconvresnet18", "resnet18_spd", "cifar_resnet20", "yolov5n_spd"]
    assert plain_networks.with_plain_version(names) == ["pyconvresnet18", "resnet18_spd"]


@pytest.mark.parametrize("network", ["cifar_resnet20_pfd", "cifar_mobilenetv3_large", "cifar_shufflenetv2_pfd"])
def test_folding_keeps_the_activations_and_the_function_of_padding_free_networks(network: str) -> None:
    net = benchmark_steps.build(network, "ours")
    folded = fold_batchnorm(net)
    plain_networks.check_agreement({"ours": net, "folded": folded}, image_size=49)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in other.modules()) for other in (net, folded)]
    assert norms[1] < norms[0] // 2


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_plain_twin_and_the_folded_networks_compute_the_same(network: str) -> None:
    nets = {"ours": benchmark_steps.build(network, "ours"), "plain": benchmark_steps.build(network, "plain")}
    folded = {f"{way}, folded": benchmark_steps.build(network, way, folded=True) for way in nets}
    plain_networks.check_agreement({**nets, **folded}, image_size=49)
    norms = [
        [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)] for net in (nets["ours"], *folded.values())
    ]
    assert len(norms[1]) == len(norms[2]) < len(norms[0]) // 4


def test_the_plain_twin_holds_none_of_our_layers() -> None:
    for network in NETWORKS:
        twin = plain_networks.plain_twin(timm.create_model(network, device="meta"))
        assert not [name for name, m in twin.named_modules() if type(m).__module__ == "spd_zoo.spd"]


def test_networks_that_differ_are_not_timed() -> None:
    net = timm.create_model("resnet18_spd")
    twin: Any = plain_networks.plain_twin(net)
    with torch.no_grad():
        twin.stem[1].weight.mul_(1.1)
    with pytest.raises(AssertionError, match="twin differs from ours"):
        plain_networks.check_agreement({"ours": net, "twin": twin}, image_size=32)


def run(capsys: pytest.CaptureFixture[str], *forms: str, memory: str = "--no-memory") -> list[dict[str, Any]]:
    tiny = ["--image-size", "16", "--batch", "2", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    assert benchmark.main(["--network", "pyconvresnet18", *tiny, "--json", memory, "--forms", *forms]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.exhaustive
def test_every_eager_form_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, "*-eager", "*-eager-folded")
    assert [row["form"] for row in rows] == [str(form) for form in benchmark_steps.FORMS if form.mode == "eager"]
    for row in rows:
        assert row["/ plain"] == pytest.approx(row["ours"] / row["plain"])
        assert row["/ resnet50"] == pytest.approx(row["ours"] / row["resnet50"])
        assert row["ours"] > 0 and row["/ plain, same form"] > 0


def test_converting_and_folding_are_timed_against_the_network_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--image-size", "64", "--batch", "2", "--rounds", "1", "--threads", str(torch.get_num_threads()), "--json"]
    forms = ["inference-fp32-contiguous-eager*", "train-fp32-contiguous-eager"]
    assert benchmark.main(["--network", "test_resnet", "--convert", *tiny, "--forms", *forms]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["form"].rpartition("-")[2] for row in rows] == ["eager", "folded", "eager"]
    for row in rows:
        assert row["/ as it was"] == pytest.approx(row["ours"] / row["as it was"])


@pytest.mark.exhaustive
def test_memory_of_a_step_counts_its_weights_and_maps(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    (row,) = run(capsys, "inference-fp32-contiguous-eager", memory="--memory")
    weights = 4 * sum(p.numel() for p in timm.create_model("pyconvresnet18", device="meta").parameters()) / 2**20
    assert weights < row["MiB"] < 2000
    assert weights < row["MiB plain"] < 2000


@pytest.mark.slow
@pytest.mark.parametrize("network", ["yolov5n_spd", "yolov8n_spd"])
def test_a_detector_is_timed_with_its_suppression(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--image-size", "64", "--batch", "2", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    forms = ["--forms", "*-fp32-channels_last-eager", "*-fp32-channels_last-eager-folded"]
    assert benchmark.main(["--network", network, *tiny, "--json", "--no-memory", *forms]) == 0
    inference, train, suppression = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["form"] for row in (inference, train)] == [f"{step}-fp32-channels_last-eager" for step in STEPS]
    for row in (inference, train):
        assert row["/ plain"] == pytest.approx(row["ours"] / row["plain"]) and "resnet50" not in row
    assert suppression["form"] == "suppression" and suppression["ms, 300 scores"] > 0


@pytest.mark.slow
def test_merging_tiles_is_measured_against_comparing_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_merge.main(["--tiles", "3", "--per-tile", "20", "--rounds", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["boxes"] == 180 and 0 < row["left"] <= 180
    assert row["s ours"] > 0 and row["s every pair"] > 0


def test_a_form_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--forms", "inference-fp64-*"])
    assert "inference-fp32-contiguous-eager" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_fine_tuning_is_timed_against_timms_components(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folders(tmp_path / "data", train=8, val=2)
    tiny = ["--model", "cifar_resnet20", "--image-size", "16", "--batch-size", "8", "--workers", "0", "--rounds", "1"]
    command = ["--data", str(data), *tiny, "--epochs", "2", "--threads", "1", "--json"]
    assert benchmark_finetune.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("ours", "timm"):
        assert result[name]["epochs_per_hour"] > 0 and 100 < result[name]["MiB"] < 4000
    speed = result["ours"]["epochs_per_hour"] / result["timm"]["epochs_per_hour"]
    assert result["epochs_per_hour, ours / timm"] == pytest.approx(speed, abs=0.01)


@pytest.mark.parametrize("old", [False, True], ids=["run.yaml", "run.json"])
def test_the_options_of_new_and_old_runs_are_read(tmp_path: Path, old: bool) -> None:
    stored: dict[str, Any] = {"model": "resnet18_spd", "data": "d", "out": "o", "lr": 0.006}
    stored |= {"auto_augment": None, "val_size": 2500}
    if old:
        (tmp_path / "run.json").write_text(json.dumps(stored))
    else:
        (tmp_path / "run.yaml").write_text(to_yaml(FinetuneConfig(**stored)))
    found = bundle_weights.recipe_of(tmp_path)
    assert {key: str(found[key]) for key in stored} == {key: str(value) for key, value in stored.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [("cifar_resnet20.cifar100", "cannot be evaluated"), ("no_network.a", "no_network; add its entry first")],
)
def test_weights_that_cannot_be_bundled_leave_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "bundled").mkdir()
    before = {tmp_path / "bundled" / f"{name}.safetensors": b"those before", tmp_path / "manifest.json": b""}
    before[tmp_path / "manifest.json"] = manifest_path().read_bytes()
    for path, content in before.items():
        path.write_bytes(content)
    monkeypatch.setattr(bundle_weights, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(bundle_weights, "manifest_path", lambda: tmp_path / "manifest.json")

    def fail(*_: object) -> None:
        raise ValueError("cannot be evaluated")

    monkeypatch.setattr(bundle_weights, "classification", fail)
    save_network(timm.create_model("cifar_resnet20", num_classes=2), tmp_path / "run", {"label_names": ["a", "b"]})
    (tmp_path / "run" / "run.yaml").write_text(to_yaml(FinetuneConfig("cifar_resnet20", "data", tmp_path / "run")))
    with pytest.raises((ValueError, SystemExit), match=message):
        bundle_weights.main([str(tmp_path / "run"), name, "--dataset", "A", "--hardware", "B"])
    assert {path: path.read_bytes() for path in before} == before
    assert list((tmp_path / "bundled").iterdir()) == [tmp_path / "bundled" / f"{name}.safetensors"]


def test_every_box_becomes_an_image_of_its_class(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / "a.png")
    boxes = [{"id": i, "image_id": 7, "category_id": 1, "bbox": [i, 0, 4, 5]} for i in range(3)]
    found = {"categories": [{"id": 1, "name": "cell"}], "images": [{"id": 7, "file_name": "a.png"}]}
    for split in ("train", "val", "test"):
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(found | {"annotations": boxes}))
    compare_starts.crop_boxes(tmp_path, tmp_path / "out", largest_class=2)
    images = sorted((tmp_path / "out").rglob("*.png"))
    assert [image.parent.relative_to(tmp_path / "out").as_posix() for image in images] == [
        *["test/cell"] * 3, *["train/cell"] * 2, *["val/cell"] * 2
    ]  # fmt: skip
    assert {read_image(image).size for image in images} == {(4, 5)}


LOG = (
    "2026-01-01T00:00:00.000+00:00 before the first epoch: val top-1 50.00 %\n",
    "2026-01-01T00:02:00.000+00:00 epoch 1/2 at 48 px: train loss 1.0\n",
    "2026-01-01T00:04:00.000+00:00 epoch 2/2 at 48 px: train loss 0.9\n",
    "2026-01-01T00:04:00.001+00:00 note: a note\n",
)


@pytest.mark.parametrize("first", [0, 1])
def test_the_minutes_of_a_run_are_those_of_its_epochs(tmp_path: Path, first: int) -> None:
    (tmp_path / "log.txt").write_text("".join(LOG[first:]))
    starts = [{"time": f"2026-01-01T00:0{minute}:00.000+00:00"} for minute in (0, 3, 5)]
    for again, minutes in ((), 4), ((starts[2],), 4), ((starts[1],), None):  # in between, it was stopped
        (tmp_path / "environment.json").write_text(json.dumps([starts[0], *again]))
        assert compare_starts.minutes_of(tmp_path) == minutes
    (tmp_path / "log.txt").write_text("".join(LOG[first:2]))  # one epoch, whose beginning is unknown
    assert compare_starts.minutes_of(tmp_path) is None


def test_starts_without_data_or_seeds_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "runs"), "--workers", "0"]
    assert compare_starts.main([*command, "--coco", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert "No such file" in error and "instances_train.json" in error and len(error.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        compare_starts.main([*command, "--data", str(tmp_path), "--seeds", "0"])
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_starts_are_compared_on_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []

    def train(config: FinetuneConfig) -> None:
        configs.append(config)
        torch.manual_seed(0)
        save_for_hf(
            timm.create_model("cifar_resnet20", num_classes=3),
            str(config.out),
            {"label_names": list(COLOURS)},
            safe_serialization=True,
        )
        (config.out / "data.json").write_text('{"train": {"images": 3}}')
        (config.out / "log.txt").write_text("".join(LOG))
        (config.out / "environment.json").write_text("[{}]")

    monkeypatch.setattr(compare_starts, "finetune", train)
    data = make_folders(tmp_path / "data", train=1, val=1, test=2)
    command = ["--data", str(data), "--out", str(tmp_path), "--seeds", "2", "--workers", "0", "--epochs", "4"]
    assert compare_starts.main([*command, "--json"]) == 0
    assert [(config.model, config.pretrained, config.seed) for config in configs] == [
        (model, pretrained, seed)
        for model, pretrained in (("pyconvresnet50_spd", True), ("pyconvresnet50_spd", False), ("resnet50", False))
        for seed in (0, 1)
    ]
    assert {(config.epochs, config.image_size) for config in configs} == {(4, "48")}


def test_the_experiment_compares_runs_of_equal_seeds() -> None:
    rows = [
        {
            "image_size": 32,
            "start": start,
            "lr": lr,
            "epochs": epochs,
            "train_images": 9,
            "seed": seed,
            "test_top1": top1,
        }
        for start, lr, epochs, seed, top1 in (
            *(("as it was", "", 0, "", 20.0), ("converted", "", 0, "", 20.0)),
            *(("as it was", 0.1, 2, 0, 50.0), ("converted", 0.1, 2, 0, 51.0)),
            *(("as it was", 0.1, 2, 1, 54.0), ("converted", 0.1, 2, 1, 57.0)),
            ("as it was", 0.1, 2, 2, 90.0),  # whose other half is not there yet
        )
    ]
    for row in rows:
        row["train_images"] = 9 if row["epochs"] else 0
    (line,) = convert_experiment.summary(rows)
    assert (line["seeds"], line["as it was, before"], line["as it was"], line["converted"]) == (2, 20, 52, 54)
    assert line["as it was, std"] == pytest.approx(8**0.5)
    assert (line["gain"], line["gain, standard error"]) == (2, pytest.approx(1))


def test_the_experiment_with_detectors_compares_runs_of_equal_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_experiment, "DETECTORS", tmp_path / "detectors.csv")
    rows = ["as it was,,60", "as it was,1,54", "as it was,0,50", "converted,,60", "converted,0,51", "converted,1,57"]
    (tmp_path / "detectors.csv").write_text("\n".join(["start,seed,ap", *rows]), encoding="utf-8")
    (line,) = convert_experiment.detectors()
    assert (line["seeds"], line["before"], line["as it was"], line["converted"]) == (2, 60, 52, 54)
    assert (line["gain"], line["gain, standard error"]) == (2, pytest.approx(1))


@pytest.mark.exhaustive
def test_the_experiment_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    names = config_of("cifar_resnet20.cifar100").label_names
    assert names
    for i, name in enumerate(names):
        for split, count in (("train", 4), ("test", 1)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for j in range(count):
                Image.new("RGB", (32, 32), (i, 60 * j, 99)).save(tmp_path / "data" / split / name / f"{j}.png")
    command = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--train-images", "200"]
    command += ["--held-out", "100", "--image-sizes", "16", "--epochs", "1"]
    results = tmp_path / "out" / "results.csv"
    assert convert_experiment.main([*command, "--seeds", "2"]) == 0
    first = results.read_text()
    assert len(first.splitlines()) == 1 + 2 + 2 * 2
    assert convert_experiment.main([*command, "--seeds", "3"]) == 0
    assert results.read_text().startswith(first) and len(results.read_text().splitlines()) == 1 + 2 + 3 * 2
    assert (tmp_path / "out" / "results.svg").stat().st_size > 1000
    before = [line.split(",")[-2:] for line in first.splitlines()[1:3]]
    assert before[0] == before[1]  # converting alone changes nothing


@pytest.mark.slow
def test_latency_compares_the_runtimes_of_an_exported_file() -> None:
    for library in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(library)
    row = latency.measure_exported("cifar_resnet20_pfd", 32, rounds=2)
    assert list(row) == ["network", "image_size", "torch", "onnxruntime", "openvino", "int8"]
    assert all(row[runtime] > 0 for runtime in list(row)[2:])


@pytest.mark.slow
def test_probes_of_other_classes_are_of_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(options: Any, data: Path, pixels: int, seed: int) -> dict[str, float]:
        return {"ridge probe": 10.0 * len(list((data / "train").iterdir()))}

    monkeypatch.setattr(linear_probe, "probe", probe)
    data = make_folders(tmp_path / "data", train=2, val=1)
    command = ["--train", str(data / "train"), "--test", str(data / "val"), "--out", str(tmp_path), "--seeds", "1"]
    command += ["--sizes", "--probe-sizes", "16", "--images", "1", "--record", str(tmp_path / "record")]
    tables: list[Any] = []
    monkeypatch.setattr(linear_probe, "print_table", lambda _, rows: tables.append(rows))
    for classes in ("2", "3"):
        linear_probe.main([*command, "--classes", classes])
    assert [[row[2] for row in rows] for rows in tables] == [["20.0 %"], ["30.0 %"]]


def test_sizes_of_a_sweep_are_not_averaged() -> None:
    row = {"data": "d", "network": "n", "classes": 2, "images": 5, "epochs": 1, "method": "defaults"}
    rows = [row | {"pixels": pixels, "end": float(pixels)} for pixels in (32, 64)]
    assert [line[-2:] for line in finetune_sweep.summary(rows)] == [("32.0", "1"), ("64.0", "1")]


def test_linear_probes_choose_a_penalty_and_classify_features_that_they_have_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(4, 200, generator=generator), torch.arange(480) % 4
    features = centres[labels] + 3 * torch.randn(480, 200, generator=generator)
    noise = torch.randn(480, 200, generator=generator)
    for probe in (linear_probe.ridge_probe, linear_probe.logistic_probe):
        hits = probe(features[:80], labels[:80], features[80:]).eq(labels[80:])
        chance = probe(noise[:80], labels[:80], noise[80:]).eq(labels[80:])
        assert hits.double().mean() > 0.7 and abs(chance.double().mean() - 0.25) < 0.1


def test_images_of_a_seed_are_drawn_once_and_alike(tmp_path: Path) -> None:
    data = make_folders(tmp_path / "data", train=5, val=2)
    draws = [linear_probe.draw(data / "train", data / "val", tmp_path / name, 1, 2, 3) for name in ("a", "b")]
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) for folder in draws]
    assert files[0] == files[1] and len(files[0]) == 2 * (3 + 2)
