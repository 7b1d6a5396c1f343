"""Complexity of networks: the manifest has the measured numbers, which agree with recorded ones."""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from golden import FOLDER, cases
from torch import Tensor, nn

import spd_zoo  # noqa: F401 - registers the networks
from spd_zoo.complexity import (
    COUNTERS,
    Operation,
    count_activations,
    count_layer_params,
    count_macs,
    count_params,
    fvcore,
    trace,
)
from spd_zoo.trace import TraceError
from spd_zoo.weights import entries


def some(recorded: list[dict[str, Any]], step: int) -> list[Any]:
    """The cases, of which every `step`-th is fast."""
    ids = [case.get("id", "-".join(map(str, [case["model"], *case["model_args"].values()]))) for case in recorded]
    marks = [pytest.mark.exhaustive if i % step else () for i in range(len(recorded))]
    return [pytest.param(case, id=ids[i], marks=marks[i]) for i, case in enumerate(recorded)]


BSCONV, THOP_2020 = cases("pfd_bsconv"), cases("pfd_mobile")
RECORDED = cases("pyconv") + cases("spd_resnet") + BSCONV + THOP_2020 + json.loads((FOLDER / "costs.json").read_text())
FAST = {entry.group: name for name, entry in entries().items()}.values()  # one of each model file
ENTRIES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in entries()]
COUNTED = [  # by fvcore 0.1.5 and by thop 0.0.22 on the authors' networks: network, classes, pixels, counts
    ("pyconvresnet18", 1000, 224, 868130304, 876030232),
    ("pyconvresnet34", 1000, 224, 1742296576, 1753332504),
    ("pyconvresnet50", 1000, 224, 3843974144, 3877433368),
    ("pyconvresnet101", 1000, 224, 7266178048, 7313285144),
    ("pyconvhgresnet50", 1000, 224, 4565254144, 4606490648),
    ("pyconvhgresnet152", 1000, 224, 12214484992, 12293855256),
    ("pyconvresnet18_basicblock1", 1000, 224, 1538883072, 1546783000),
    ("resnet18_spd", 200, 64, 1065725952, None),
    ("resnet50_spd", 200, 64, 1795211264, None),
    ("resnet152_spd", 100, 32, 1056849920, None),
]


def run(case: dict[str, Any]) -> list[Operation]:
    net = timm.create_model(case["model"], device="meta", **case["model_args"])
    return trace(net, tuple(case["macs_input"][1:]))


@pytest.mark.parametrize("name", ENTRIES)
def test_the_manifest_states_the_measured_parameters_and_macs(name: str) -> None:
    entry = entries()[name]
    net = timm.create_model(entry.network, num_classes=entry.num_classes, device="meta")
    assert (entry.params, entry.macs) == (count_params(net), count_macs(net, entry.input_size))


@pytest.mark.parametrize("case", some(RECORDED, 8))
def test_parameters_and_macs_are_those_recorded(case: dict[str, Any]) -> None:
    net = timm.create_model(case["model"], device="meta", **case["model_args"])
    assert (count_params(net), count_macs(net, tuple(case["macs_input"][1:]))) == (case["params"], case["macs"])


@pytest.mark.slow
@pytest.mark.parametrize(("network", "num_classes", "size", "by_fvcore", "by_thop"), COUNTED)
def test_fvcore_and_thop_of_2019_count_as_recorded(
    network: str, num_classes: int, size: int, by_fvcore: int, by_thop: int | None
) -> None:
    operations = trace(timm.create_model(network, num_classes=num_classes, device="meta"), (3, size, size))
    assert COUNTERS["fvcore"](operations) == by_fvcore
    assert by_thop is None or COUNTERS["thop_2019"](operations) == by_thop


@pytest.mark.parametrize("case", some(BSCONV, 4))
def test_the_profiler_of_bsconv_counts_as_recorded(case: dict[str, Any]) -> None:
    assert COUNTERS["bsconv"](run(case)) == case["repo_profiler"]["flops"]


@pytest.mark.parametrize("case", some(THOP_2020, 5))
def test_thop_of_2020_counts_as_recorded(case: dict[str, Any]) -> None:
    pools = {"ghostnet": "thop_2020_pools", "mobilenetv3": "thop_2020_head"}
    counter = pools.get(case["model"].removeprefix("cifar_").partition("_")[0], "thop_2020")
    operations, recorded = run(case), case["published_counter"]
    assert (count_layer_params(operations), COUNTERS[counter](operations)) == (recorded["params"], recorded["flops"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # fvcore's: torch.jit is deprecated
@pytest.mark.parametrize("network", ["cifar_shufflenetv2_effdown", "cifar_ghostnet_pfd", "resnet18_spd"])
def test_flops_and_activations_are_fvcores(network: str) -> None:
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

    images = torch.zeros(1, 3, 32, 32)
    net = timm.create_model(network).eval()
    by_fvcore = [analysis(net, images).total() for analysis in (FlopCountAnalysis, ActivationCountAnalysis)]
    operations = trace(net.to("meta"), (3, 32, 32))
    assert [fvcore(operations), count_activations(operations)] == by_fvcore


@pytest.mark.parametrize(
    ("conv", "macs"),
    [
        (nn.Conv2d(6, 8, 3, padding=1, device="meta"), 8 * 6 * 9 * 10 * 14),
        (nn.Conv2d(6, 8, 3, padding=1, groups=2, device="meta"), 8 * 3 * 9 * 10 * 14),
        (nn.Conv2d(6, 8, 3, stride=2, device="meta"), 8 * 6 * 9 * 4 * 6),
        (nn.ConvTranspose2d(6, 8, 2, stride=2, device="meta"), 8 * 6 * 4 * 10 * 14),
    ],
    ids=["plain", "groups", "stride", "transposed"],
)
def test_a_convolution_costs_its_kernel_for_every_output_pixel(conv: nn.Conv2d, macs: int) -> None:
    assert count_macs(conv, (6, 10, 14)) == macs


def test_a_linear_layer_costs_its_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7, device="meta"))
    assert count_macs(net, (3, 4, 5)) == 3 * 4 * 5 * 7


def test_normalisation_activation_and_pooling_cost_nothing() -> None:
    assert count_macs(nn.Sequential(nn.BatchNorm2d(3, device="meta"), nn.ReLU(), nn.MaxPool2d(2)), (3, 8, 8)) == 0


class Untidy(nn.Module):
    """A layer called twice, one that is not called, and a parameter that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused = nn.Linear(5, 5), nn.Linear(5, 7)
        self.position = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x.flatten(1) + self.position))


def test_parameters_of_layers_are_counted_once_and_only_where_they_are_read() -> None:
    net = Untidy().to("meta")
    assert count_layer_params(trace(net, (5, 1, 1))) == 30
    assert count_params(net) == 30 + 42 + 5
    assert count_macs(net, (5, 1, 1)) == 50


def test_frozen_parameters_are_not_counted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False))
    net[0].requires_grad_(False)
    assert count_params(net) == 20


@pytest.mark.parametrize("channels", [3, 4], ids=["runs", "fails"])
def test_counting_leaves_every_module_in_its_mode(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()).to("meta")
    with nullcontext() if channels == 3 else pytest.raises(TraceError):
        trace(net, (channels, 8, 8))
    assert [module.training for module in net.modules()] == [True, True, False]


def test_counting_needs_the_meta_device() -> None:
    with pytest.raises(ValueError, match='"meta" device'):
        count_macs(nn.Conv2d(3, 4, 1), (3, 8, 8))


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_in_its_mode(training: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to("meta").train(training)
    count_macs(net, (3, 8, 8))
    assert [module.training for module in net.modules()] == [training] * 3


def test_thop_of_2019_counts_the_last_call_of_a_shared_relu() -> None:
    def operation(kind: str, macs: int = 0) -> Operation:
        return Operation(kind, inputs=10, outputs=10, macs=macs, biased=0, params=0)

    operations = [operation("conv", 100), operation("batch_norm"), operation("relu")]  # the stem
    assert COUNTERS["thop_2019"](operations) == 100 + 4 * 10 + 10
    operations += [operation("relu"), operation("add"), operation("relu")]  # a block, whose relus are one module
    assert COUNTERS["thop_2019"](operations) == 100 + 4 * 10 + 10 + 10
