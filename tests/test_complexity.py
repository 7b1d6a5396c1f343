"""What networks cost: the manifest says what is measured, and what is measured is what recorded counts say."""

import json
from typing import Any

import pytest
import timm
from golden import FOLDER, cases
from torch import nn

import spd_zoo  # noqa: F401 - registers the networks
from spd_zoo.complexity import count_macs, count_params
from spd_zoo.weights import entries

RECORDED = cases("pyconv") + cases("spd_resnet") + json.loads((FOLDER / "costs.json").read_text())


@pytest.mark.parametrize("name", entries())
def test_the_manifest_states_the_measured_parameters_and_macs(name: str) -> None:
    entry = entries()[name]
    net = timm.create_model(entry.network, num_classes=entry.num_classes, device="meta")
    assert (entry.params, entry.macs) == (count_params(net), count_macs(net, entry.input_size))


@pytest.mark.parametrize(
    "case", RECORDED, ids=lambda case: case.get("id", "-".join(map(str, [case["model"], *case["model_args"].values()])))
)
def test_parameters_and_macs_are_those_recorded(case: dict[str, Any]) -> None:
    net = timm.create_model(case["model"], device="meta", **case["model_args"])
    assert (count_params(net), count_macs(net, tuple(case["macs_input"][1:]))) == (case["params"], case["macs"])


@pytest.mark.parametrize(
    ("conv", "macs"),
    [
        (nn.Conv2d(6, 8, 3, padding=1, device="meta"), 8 * 6 * 9 * 10 * 14),
        (nn.Conv2d(6, 8, 3, padding=1, groups=2, device="meta"), 8 * 3 * 9 * 10 * 14),
        (nn.Conv2d(6, 8, 3, stride=2, device="meta"), 8 * 6 * 9 * 4 * 6),
    ],
    ids=["plain", "groups", "stride"],
)
def test_a_convolution_costs_its_kernel_for_every_output_pixel(conv: nn.Conv2d, macs: int) -> None:
    assert count_macs(conv, (6, 10, 14)) == macs


def test_a_linear_layer_costs_its_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7, device="meta"))
    assert count_macs(net, (3, 4, 5)) == 3 * 4 * 5 * 7


def test_normalisation_activation_and_pooling_cost_nothing() -> None:
    assert count_macs(nn.Sequential(nn.BatchNorm2d(3, device="meta"), nn.ReLU(), nn.MaxPool2d(2)), (3, 8, 8)) == 0


def test_frozen_parameters_are_not_counted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False))
    net[0].requires_grad_(False)
    assert count_params(net) == 20


def test_counting_needs_the_meta_device() -> None:
    with pytest.raises(ValueError, match='"meta" device'):
        count_macs(nn.Conv2d(3, 4, 1), (3, 8, 8))


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_in_its_mode(training: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to("meta").train(training)
    count_macs(net, (3, 8, 8))
    assert [module.training for module in net.modules()] == [training] * 3
