"""The tools for a GPU, on the CPU: parts of data and checkpoints, forms of pyramids, input, stages of an epoch."""

import json
from pathlib import Path
from typing import Any

import benchmark
import benchmark_epoch
import benchmark_input
import benchmark_pyramids
import gpu_parts
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

Capture = pytest.CaptureFixture[str]


def test_a_data_set_in_parts_is_restored_in_any_order_of_arrival(tmp_path: Path, capsys: Capture) -> None:
    for i in range(30):
        file = tmp_path / "data" / "train" / f"class {i % 3}" / f"{i}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([i]) * 3000 * (1 + i % 4))
    parts, found = tmp_path / "parts", tmp_path / "found"
    assert gpu_parts.main(["split", str(tmp_path / "data"), str(parts), "--mib", "0.1"]) == 0
    files = sorted(parts.iterdir())
    assert len(files) > 1 and max(file.stat().st_size for file in files) <= 0.1 * 2**20
    (tmp_path / "later").mkdir()
    late = files[0].rename(tmp_path / "later" / files[0].name)
    gpu_parts.main(["unpack", str(parts), str(found)])
    assert sum(file.is_file() for file in found.rglob("*")) < 30
    late.rename(parts / late.name)
    gpu_parts.main(["unpack", str(parts), str(found)])
    assert "30 files" in capsys.readouterr().out

    def content(root: Path) -> dict[str, bytes]:
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    assert content(found) == content(tmp_path / "data")


def test_missing_parts_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no folder"):
        gpu_parts.main(["unpack", str(tmp_path / "parts"), str(tmp_path / "data")])
    (tmp_path / "parts").mkdir()
    with pytest.raises(SystemExit, match="has no parts"):
        gpu_parts.main(["unpack", str(tmp_path / "parts"), str(tmp_path / "data")])


def test_a_split_checkpoint_is_joined_to_the_run_s_weights_in_half_precision(tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet20", num_classes=3)
    state: dict[str, Any] = {"net": net.state_dict(), "ema": None, "class_names": ["a", "b", "c"], "history": [{}]}
    torch.save(state, tmp_path / "last.pt")
    (tmp_path / "out").mkdir()
    gpu_parts.main(["checkpoint", str(tmp_path), str(tmp_path / "out"), "--mib", "0.04"])
    pieces = sorted((tmp_path / "out").iterdir())
    assert len(pieces) > 10 and max(piece.stat().st_size for piece in pieces) <= 0.04 * 2**20
    gpu_parts.main(["join", str(tmp_path / "out"), str(tmp_path / "model.safetensors")])
    joined = load_file(tmp_path / "model.safetensors")
    assert joined.keys() == state["net"].keys()
    assert all(torch.equal(joined[name].float(), tensor.half().float()) for name, tensor in state["net"].items())


@pytest.mark.slow
@pytest.mark.parametrize("network", ["pyconvresnet18", "pyconvresnet50_spd"])
def test_every_form_of_a_pyramid_is_timed_and_the_fastest_named(network: str, capsys: Capture) -> None:
    tiny = ["--image-size", "32", "--batch", "2", "--rounds", "1", "--json"]
    assert benchmark_pyramids.main(["--network", network, *tiny]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["step"] for row in rows} == {"inference", "train"}
    assert any(row["spd"] for row in rows) == network.endswith("spd")
    assert all(row[row["fastest"]] == min(row["grouped"], row["dense"], row["packed"]) for row in rows)


def test_a_pyramid_level_without_groups_computes_the_same() -> None:
    for level, side in list(benchmark_pyramids.levels_of("pyconvresnet50_spd", 64))[:6]:
        net = level.to_empty(device="cpu")
        torch.nn.init.normal_(net.weight)
        x = torch.randn(1, benchmark_pyramids.channels_of(net), side, side)
        torch.testing.assert_close(benchmark_pyramids.dense(net)(x), net(x), rtol=1e-3, atol=1e-3)


def test_groups_of_a_batch_are_augmented_differently() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(8, -1, -1, -1)
    images: Tensor = benchmark_input.make_augment(16, groups=4)(pixels)
    assert images.shape == (8, 3, 16, 16) and images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_the_time_inside_a_stage_belongs_to_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("benchmark_epoch.time.perf_counter", lambda: next(now))
    stages = benchmark_epoch.Stages(torch.device("cpu"))
    with stages.stage("loss"), stages.stage("forward"):
        pass
    assert dict(stages.seconds) == {"rest": 1.0, "loss": 2.0 + 4.0, "forward": 3.0}


@pytest.mark.slow
def test_the_stages_of_an_epoch_are_all_of_its_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(benchmark_epoch, "SETTINGS", {True: (64, 4), False: (32, 20)})
    arguments = ["--network", "yolov8n", "cifar_resnet20", "--steps", "1", "--epochs", "1", "--workers", "0", "--json"]
    assert benchmark_epoch.main(arguments) == 0
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        assert row["overhead"] == pytest.approx(100 - row["forward"] - row["backward"] - row["optimiser"])
        assert min(row[name] for name in ("forward", "backward", "optimiser", "reading", "metrics", "saving")) > 0


def test_only_rows_of_a_gpu_are_recorded(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--record"])
    assert "--device cuda" in capsys.readouterr().err
