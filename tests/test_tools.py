"""The maintainers' tools: the benchmark compares equal networks, timm's tests see one network of each architecture."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import benchmark
import timm_contract

from spd_zoo.fold import fold_batchnorm

EVERY = timm_contract.classification_networks()
NETWORKS = benchmark.with_a_plain_way(timm_contract.one_per_architecture(EVERY))


def test_one_per_architecture_has_every_layer_and_no_depth_twice() -> None:
    def layers(names: list[str]) -> set[type]:
        return {type(module) for name in names for module in timm.create_model(name, device="meta").modules()}

    assert layers(timm_contract.one_per_architecture(EVERY)) == layers(EVERY)
    assert timm_contract.one_per_architecture(["pyconvresnet101", "pyconvresnet50"]) == ["pyconvresnet50"]
    assert len(timm_contract.one_per_architecture(["pyconvresnet18", "pyconvresnet50"])) == 2


def test_networks_without_layers_of_ours_to_write_otherwise_have_no_plain_way() -> None:
    names = ["cifar_ghostnet_pfd", "pyconvresnet18", "resnet18_spd", "cifar_resnet20"]
    assert benchmark.with_a_plain_way(names) == ["pyconvresnet18", "resnet18_spd"]


@pytest.mark.parametrize("network", ["cifar_resnet20_pfd", "cifar_mobilenetv3_large", "cifar_shufflenetv2_pfd"])
def test_folding_keeps_the_activations_and_the_function_of_padding_free_networks(network: str) -> None:
    net = benchmark.build(network, "ours")
    folded = fold_batchnorm(net)
    benchmark.check_agreement({"ours": net, "folded": folded}, image_size=49)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in other.modules()) for other in (net, folded)]
    assert norms[1] < norms[0] // 2


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plain_twin_and_the_folded_networks_compute_the_same(network: str) -> None:
    nets = {"ours": benchmark.build(network, "ours"), "plain": benchmark.build(network, "plain")}
    folded = {f"{way}, folded": fold_batchnorm(net) for way, net in nets.items()}
    benchmark.check_agreement({**nets, **folded}, image_size=49)
    norms = [
        [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)] for net in (nets["ours"], *folded.values())
    ]
    assert len(norms[1]) == len(norms[2]) < len(norms[0]) // 4


def test_the_plain_twin_holds_none_of_our_layers() -> None:
    for network in NETWORKS:
        twin = benchmark.plain_twin(timm.create_model(network, device="meta"))
        assert not [name for name, m in twin.named_modules() if type(m).__module__ == "spd_zoo.layers"]


def test_networks_that_differ_are_not_timed() -> None:
    net = timm.create_model("resnet18_spd")
    twin = benchmark.plain_twin(net)
    with torch.no_grad():
        twin.stem[1].weight.mul_(1.1)
    with pytest.raises(AssertionError, match="twin differs from ours"):
        benchmark.check_agreement({"ours": net, "twin": twin}, image_size=32)


def run(capsys: pytest.CaptureFixture[str], *forms: str, memory: str = "--no-memory") -> list[dict[str, float]]:
    tiny = ["--image-size", "16", "--batch", "2", "--rounds", "1", "--threads", str(torch.get_num_threads())]
    assert benchmark.main(["--network", "pyconvresnet18", *tiny, "--json", memory, "--forms", *forms]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_eager_form_prints_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, "*-eager", "*-eager-folded")
    assert [row["form"] for row in rows] == [str(form) for form in benchmark.FORMS if form.mode == "eager"]
    for row in rows:
        assert row["/ plain"] == pytest.approx(row["ours"] / row["plain"])
        assert row["/ resnet50"] == pytest.approx(row["ours"] / row["resnet50"])
        assert row["ours"] > 0 and row["/ plain, same form"] > 0


@pytest.mark.slow
def test_memory_of_a_step_counts_its_weights_and_maps(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    (row,) = run(capsys, "inference-fp32-contiguous-eager", memory="--memory")
    weights = 4 * sum(p.numel() for p in timm.create_model("pyconvresnet18", device="meta").parameters()) / 2**20
    assert weights < row["MiB"] < 2000
    assert weights < row["MiB plain"] < 2000


def test_a_form_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--forms", "inference-fp64-*"])
    assert "inference-fp32-contiguous-eager" in capsys.readouterr().err
