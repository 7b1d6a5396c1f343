"""Conversion to space-to-depth keeps every prediction, says what it did, and can be saved, trained and undone."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_report
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models import save_for_hf
from torch import Tensor, nn

from spd_zoo import WeightsError, convert_to_spd, fold_spd
from spd_zoo.cli.main import main
from spd_zoo.convert import ConversionError, convert_checkpoint
from spd_zoo.spd import PhaseMix, SPDAvgPool2d, SPDConv2d, SPDMaxPool2d, SPDStdConv2d
from spd_zoo.weights.load import ModelError

ROOT = Path(__file__).parent.parent
RECORDED = [json.loads(line) for line in convert_report.RECORD.read_text().splitlines()]
COMPARED = [row for row in RECORDED if "left_out" not in row]
# together every kind of layer: plain, grouped, strided by 4, TensorFlow's padding, weight standardised; every pooling
AGAIN = [row["network"] for row in COMPARED if row["params"][0] < 4e6 or row["left"]]
AGAIN = [
    pytest.param(name, marks=pytest.mark.exhaustive if i % 4 else pytest.mark.slow) for i, name in enumerate(AGAIN)
]
SMALL = ["test_resnet", "test_byobnet", "test_convnext", "test_nfnet", "tf_mobilenetv3_small_minimal_100"]
FIRST_OF_SMALL = [SMALL[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in SMALL[1:])]
SIZES = [(8, 8), (13, 13), (14, 11), (15, 22), (16, 9)]


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def small_network(name: str = "test_resnet", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return convert_report.randomise(timm.create_model(name, **kwargs))


def images(*shape: int) -> Tensor:
    return noise(*shape, dtype=torch.float32)


def difference(actual: Tensor, expected: Tensor) -> float:
    return convert_report.difference(actual, expected)


def disturb(module: nn.Module) -> None:
    """What training does: no weight stays what it was."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check(layer: nn.Module, chs: int, kind: type[nn.Module]) -> None:
    """A layer, its successor, what that folds to, and the same after training give the same at every size."""
    layer = layer.double().eval()
    made = convert_to_spd(layer, example_input=noise(2, chs, 16, 22))
    assert type(made) is kind
    trained: Any = copy.deepcopy(made)
    disturb(trained)
    folded, folded_after_training = fold_spd(made), fold_spd(trained)
    computed = 0
    for size in SIZES:
        x = noise(2, chs, *size)
        try:
            expected = layer(x)
        except RuntimeError:  # too small for it, or for the reflection at its border
            continue
        computed += 1
        for same, reference in ((made(x), expected), (folded(x), expected), (folded_after_training(x), trained(x))):
            torch.testing.assert_close(same, reference, rtol=0, atol=1e-12)
    assert computed >= 2
    assert type(folded) in (type(layer), nn.Conv2d, nn.Sequential, Conv2dSame)


# Layers


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("kernel", range(1, 12))
def test_a_convolution_with_a_stride_stays_the_same_function(kernel: int, stride: int) -> None:
    for padding in sorted({0, 1, kernel // 2, kernel - 1}):
        groups, bias = ((1, True), (2, False), (4, True))[padding % 3]
        check(nn.Conv2d(4, 8, kernel, stride, padding, groups=groups, bias=bias), 4, SPDConv2d)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (1, 7), "padding": (0, 3)},
        {"kernel_size": (4, 3), "padding": (1, 0)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (2, 5), "padding": (3, 1), "dilation": (4, 1)},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 4, "padding": 1, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_any_shape_and_border_of_a_convolution_stays_the_same_function(options: dict[str, Any]) -> None:
    check(nn.Conv2d(4, 6, stride=2, **options), 4, SPDConv2d)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("kernel", range(1, 8))
def test_tensorflows_padding_stays_the_same_function(kernel: int, stride: int) -> None:
    check(Conv2dSame(4, 6, kernel, stride, dilation=1 + kernel % 2, groups=2), 4, SPDConv2d)
    check(MaxPool2dSame(kernel, stride), 4, SPDMaxPool2d)
    check(AvgPool2dSame(kernel, stride), 4, SPDAvgPool2d)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 3, 4, 7])
@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
def test_a_standardised_convolution_stays_the_same_function_and_standardised(kind: Any, kernel: int) -> None:
    padding = {} if kind.__name__.endswith("Same") else {"padding": kernel // 2}
    layer = kind(4, 6, kernel, 2, groups=2, bias=True, eps=1e-2, **padding)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(noise(*parameter.shape))
    check(layer, 4, SPDStdConv2d)
    made: Any = convert_to_spd(layer.float(), example_input=images(1, 4, 9, 9))
    before = made.spd_kernel()
    with torch.no_grad():
        made.weight.add_(3)  # which standardisation takes away again
    torch.testing.assert_close(made.spd_kernel(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (2, 2), (3, 2), (5, 2), (3, 3), (2, 4), ((2, 3), 2)])
def test_a_pooling_with_a_stride_stays_the_same_function(kernel: Any, stride: int, ceil_mode: bool) -> None:
    smallest = kernel if isinstance(kernel, int) else min(kernel)
    for padding in range(smallest // 2 + 1):
        check(nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode), 3, SPDMaxPool2d)
        for include in (False, True):
            check(nn.AvgPool2d(kernel, stride, padding, ceil_mode, include), 3, SPDAvgPool2d)


def test_a_dilated_pooling_stays_the_same_function_even_where_windows_lie_in_the_padding() -> None:
    check(nn.MaxPool2d(3, 2, 1, dilation=2), 3, SPDMaxPool2d)
    pool = nn.MaxPool2d(2, 2, 1, dilation=3)
    x = images(1, 3, 4, 4)
    assert torch.equal(convert_to_spd(pool, example_input=x)(x), pool(x))


@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_a_blur_stays_the_same_function(size: int, mode: str) -> None:
    check(BlurPool2d(4, size, 2, mode), 4, SPDConv2d)
    check(BlurPool2d(None, size, 2, mode), 4, SPDConv2d)


def test_an_average_of_four_pixels_is_a_phase_mix_of_a_quarter_each() -> None:
    made: Any = convert_to_spd(nn.AvgPool2d(2), example_input=images(1, 3, 8, 8))
    assert torch.equal(made.weight, torch.full((3, 4, 1, 1), 0.25))


def test_the_layers_look_like_what_they_stand_for() -> None:
    for layer in (nn.Conv2d(4, 6, 3, 2, 1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)):
        made: Any = convert_to_spd(layer, example_input=images(1, 4, 8, 8))
        for name in ("kernel_size", "stride", "padding"):
            assert tuple(torch.tensor(getattr(made, name)).expand(2)) == tuple(
                torch.tensor(getattr(layer, name)).expand(2)
            )
    assert repr(made).startswith("SPDAvgPool2d(4, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)")


@pytest.mark.parametrize(
    ("layer", "folded"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d),
        (nn.Conv2d(4, 6, 1, 2), nn.Conv2d),
        (Conv2dSame(4, 6, 5, 2), Conv2dSame),
        (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d),
        (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.AvgPool2d),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_what_was_not_trained_folds_to_what_it_was(layer: Any, folded: type[nn.Module]) -> None:
    back: Any = fold_spd(convert_to_spd(layer, example_input=images(1, 4, 8, 8)))
    assert type(back) is folded
    for name in ("kernel_size", "stride", "padding", "ceil_mode"):
        if hasattr(layer, name):
            assert torch.tensor(getattr(back, name)).float().mean() == torch.tensor(getattr(layer, name)).float().mean()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


def test_a_trained_kernel_folds_to_twice_the_kernel() -> None:
    made = convert_to_spd(nn.Conv2d(4, 6, 7, 2, 3), example_input=images(1, 4, 8, 8))
    disturb(made)
    pad, conv = fold_spd(made)
    assert (type(pad), type(conv), conv.kernel_size, conv.stride) == (nn.ZeroPad2d, nn.Conv2d, (8, 8), (2, 2))


# Networks


@pytest.mark.parametrize("name", SMALL)
def test_a_converted_network_predicts_what_the_original_predicts(name: str) -> None:
    row = convert_report.compare(name)
    assert row["left"] == []
    assert sum(row["replaced"].values()) >= 4
    for kind in convert_report.SIZES:
        assert row[kind]["difference"] < 1e-4
        assert row[kind]["folded"] < 1e-4
        assert row[kind]["moved"] > 0.01  # the new weights matter


@pytest.mark.parametrize("name", AGAIN)
def test_what_was_recorded_comes_out_again(name: str) -> None:
    (recorded,) = [row for row in COMPARED if row["network"] == name]
    row = convert_report.compare(name)
    for key in ("params", "macs"):
        assert list(row[key]) == recorded[key]
    assert [row[key] for key in ("replaced", "left")] == [recorded[key] for key in ("replaced", "left")]
    assert [row[kind]["size"] for kind in row.keys() & convert_report.SIZES.keys()] == [
        recorded[kind]["size"] for kind in row.keys() & convert_report.SIZES.keys()
    ]
    assert (
        max(row[kind][what] for kind in row.keys() & convert_report.SIZES for what in ("difference", "folded")) < 1e-4
    )


def test_the_record_is_of_many_families_and_all_agree() -> None:
    assert len(COMPARED) >= 60
    assert len({row["module"] for row in COMPARED}) >= 20
    assert {row["module"] for row in RECORDED} == set(convert_report.timms_modules())
    still = []  # networks whose outputs noise in the new weights hardly moved, so that folding them shows little
    for row in COMPARED:
        kinds = row.keys() & convert_report.SIZES.keys()
        assert "even" in kinds
        assert all(row[kind][what] < 1e-4 for kind in kinds for what in ("difference", "folded"))
        still += [row["network"]] if min(row[kind]["moved"] for kind in kinds) < 1e-3 else []
    assert len(still) <= 6, still


def test_each_family_is_represented_by_its_smallest_network() -> None:
    assert convert_report.smallest_of_each_family("vovnet") == ["eca_vovnet39b", "ese_vovnet19b_slim_dw", "vovnet39a"]
    assert convert_report.smallest_of_each_family("swin_transformer") == []


def test_a_converted_pyramid_network_is_the_one_that_was_built_so() -> None:
    built: Any = timm.create_model("pyconvresnet50_spd", num_classes=5, device="meta")
    converted: Any = convert_to_spd(timm.create_model("pyconvresnet50", num_classes=5, device="meta"))
    shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in (built, converted)]
    assert shapes[0] == shapes[1]
    assert converted.spd_report.left == ()


def test_a_narrow_pyramid_is_computed_packed_and_right() -> None:
    net = small_network("pyconvresnet18", num_classes=5)
    x = images(2, 3, 33, 47)
    with torch.no_grad():
        assert difference(convert_to_spd(net, example_input=x)(x), net(x)) < 1e-4


@pytest.mark.slow
def test_functions_that_downsample_are_reported() -> None:
    net: Any = convert_to_spd(timm.create_model("inception_v3", device="meta"))
    assert [(left.module, left.what) for left in net.spd_report.left] == [
        ("Mixed_6a", "max_pool2d"),
        ("Mixed_7a", "max_pool2d"),
    ]
    assert "called in the forward of InceptionB, not a layer of its own" in str(net.spd_report)


class Everything(nn.Module):
    """What cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.lengthwise = nn.Conv2d(3, 3, 3, (2, 1), 1)
        self.kind = type("Mine", (nn.Conv2d,), {})(3, 3, 3, 2, 1)
        self.pool = type("MyPool", (nn.MaxPool2d,), {})(2)
        self.indices = nn.MaxPool2d(2, return_indices=True)
        self.divisor = nn.AvgPool2d(2, divisor_override=3)
        self.shared = nn.MaxPool2d(1, 2)
        self.idle = nn.Conv2d(3, 3, 3, 2)
        self.fixed = nn.AdaptiveAvgPool2d(7)
        self.good = nn.Conv2d(6, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        twice = torch.cat([x, x], 1)
        maps = [self.lengthwise(x), self.kind(x), self.pool(x), self.indices(x)[0], self.divisor(x), self.fixed(x)]
        maps += [self.shared(x), self.shared(twice), self.good(twice)]
        maps += [x[..., ::2, ::2], F.avg_pool2d(x, 2), F.interpolate(x, scale_factor=0.5)]
        return torch.cat([y.mean((2, 3)) for y in maps], 1)


def test_everything_that_cannot_be_replaced_is_reported_with_a_reason() -> None:
    net: Any = convert_to_spd(Everything(), example_input=images(2, 3, 32, 32))
    assert [row.module for row in net.spd_report.replaced] == ["good"]
    reasons = {(left.module, left.what): left.reason for left in net.spd_report.left}
    assert {key: reason for key, reason in reasons.items() if key[0]} == {
        ("lengthwise", "Conv2d 3x3/2"): "its stride differs between rows and columns: (2, 1)",
        ("kind", "Mine 3x3/2"): "a convolution of a kind of its own, Mine",
        ("pool", "MyPool 2x2/2"): "a pooling of a kind of its own, MyPool",
        ("indices", "MaxPool2d 2x2/2"): "it returns indices",
        ("divisor", "AvgPool2d 2x2/2"): "it has a divisor_override",
        ("shared", "MaxPool2d 1x1/2"): "called with maps of different numbers of channels",
        ("idle", "Conv2d 3x3/2"): "not called in evaluation, so nothing could be compared",
        ("fixed", "adaptive_avg_pool2d"): "there is nothing to put in the place of AdaptiveAvgPool2d",
    }
    assert [what for module, what in reasons if not module] == ["slice", "avg_pool2d", "upsample_nearest2d"]
    assert "left: the network itself, slice: called in the forward of Everything" in str(net.spd_report)


def test_what_is_excluded_stays_and_is_reported() -> None:
    net = small_network()
    converted: Any = convert_to_spd(net, include=["layer*", "conv1.*"], exclude="*.downsample.*")
    assert type(converted.maxpool) is nn.MaxPool2d
    assert {row.module for row in converted.spd_report.replaced} == {
        *("conv1.0", "layer2.0.conv1", "layer3.0.conv2", "layer4.0.conv1")
    }
    left = {row.module for row in converted.spd_report.left}
    assert left == {"maxpool", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    assert {row.reason for row in converted.spd_report.left} == {"left out by include or exclude"}


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"include='layer9\*' names nothing that downsamples; there are: conv1\.0, "):
        convert_to_spd(small_network(), include="layer9*")


def test_a_network_of_unknown_image_size_needs_an_example() -> None:
    with pytest.raises(ValueError, match=r"size of the images is unknown.*give example_input="):
        convert_to_spd(nn.Sequential(nn.Conv2d(3, 4, 3, 2)))
    with pytest.raises(ValueError, match=r"a batch of images \(N, C, H, W\), got shape \[3, 8, 8\]"):
        convert_to_spd(nn.Conv2d(3, 4, 3, 2), example_input=images(3, 8, 8))


class Peeks(nn.Module):
    """Reads the weights of a layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv.weight.square().mean()


def test_a_network_that_would_compute_something_else_is_refused_and_stays_as_it_was() -> None:
    net, x = Peeks(), images(2, 3, 8, 8)
    expected = net(x)
    with pytest.raises(ConversionError, match=r"differs by .* find the layer by converting a part at a time"):
        convert_to_spd(net, example_input=x, inplace=True)
    assert type(net.conv) is nn.Conv2d
    assert torch.equal(net(x), expected)


def test_the_original_stays_as_it_is_unless_asked_otherwise() -> None:
    net = small_network()
    x = images(2, 3, 65, 63)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    converted = convert_to_spd(net, example_input=x)
    assert converted is not net
    assert not hasattr(net, "spd_report")
    assert net.pretrained_cfg["architecture"] == "test_resnet"
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    assert convert_to_spd(net, inplace=True) is net
    assert type(net.maxpool) is SPDMaxPool2d


def test_the_report_counts_and_is_a_table() -> None:
    net = small_network()
    report = convert_to_spd(net, example_input=images(2, 3, 64, 64)).spd_report
    assert [row.module for row in report.replaced][:3] == ["conv1.0", "maxpool", "layer2.0.conv1"]
    stem, pool = report.replaced[:2]
    assert (stem.old, stem.new, stem.params) == ("Conv2d 3x3/2", "SPDConv2d 2x2", (16 * 27, 16 * 48))
    assert stem.macs == (16 * 27 * 32**2, 16 * 48 * 32**2)
    assert (pool.old, pool.new, pool.params) == ("MaxPool2d 3x3/2", "SPDMaxPool2d 3x3", (0, 4 * 32))
    assert pool.macs == (0, 4 * 32 * 16**2)
    added = [sum(row.params[1] - row.params[0] for row in report.replaced), report.params[1] - report.params[0]]
    assert added[0] == added[1] > 0
    assert sum(row.macs[1] - row.macs[0] for row in report.replaced) == report.macs[1] - report.macs[0]
    head, *lines = str(report).splitlines()
    assert head.split() == ["module", "was", "is", "parameters", "MACs"]
    assert all("->" in line for line in lines[:-1])
    assert len({line.index("->") for line in lines[:-1]}) == 1
    assert report.difference is not None and report.difference < 1e-4
    assert "of their standard deviation" in lines[-1]


@pytest.mark.slow
def test_the_report_stays_with_copies_and_compiled_networks() -> None:
    net = convert_to_spd(small_network())
    assert copy.deepcopy(net).spd_report == net.spd_report
    assert torch.compile(net, backend="eager").spd_report is net.spd_report
    assert not any("report" in key for key in net.state_dict())


def test_modes_types_frozen_weights_and_hooks_stay() -> None:
    net = small_network().double().train()
    net.maxpool.eval()
    net.conv1[0].weight.requires_grad_(False)
    calls: list[str] = []
    net.maxpool.register_forward_hook(lambda *args: calls.append("after"))
    net.maxpool.register_forward_pre_hook(lambda *args: calls.append("before"))
    converted: Any = convert_to_spd(net, example_input=noise(2, 3, 33, 33))
    calls.clear()
    assert converted.training and converted.conv1[0].training and not converted.maxpool.training
    assert [name for name, p in converted.named_parameters() if not p.requires_grad] == ["conv1.0.weight"]
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    converted(noise(2, 3, 33, 33))
    assert calls == ["before", "after"]


def test_a_layer_under_two_names_is_one_layer_afterwards() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU())
    net.add_module("again", net[0])
    x = images(2, 3, 32, 31)
    converted: Any = convert_to_spd(net, example_input=x)
    assert converted[0] is converted.again
    with torch.no_grad():
        assert difference(converted(x), net(x)) < 1e-4


def test_training_reaches_every_new_tap() -> None:
    net = convert_to_spd(small_network(drop_rate=0)).train()
    F.cross_entropy(net(images(4, 3, 64, 64)), torch.arange(4)).backward()
    for name, module in net.named_modules():
        if isinstance(module, SPDConv2d | PhaseMix):
            assert module.weight.grad is not None
            zero = module.weight == 0
            assert zero.any() or isinstance(module, SPDAvgPool2d), name
            assert (module.weight.grad[zero] != 0).float().mean() > 0.9 or not zero.any(), name


# What timm does with a network


def test_features_are_those_of_the_original() -> None:
    x = images(2, 3, 65, 63)
    for name in ("test_resnet", "test_convnext", "tf_mobilenetv3_small_minimal_100"):  # three wrappers of timm's
        net = small_network(name, features_only=True)
        converted: Any = convert_to_spd(net, example_input=x)
        assert type(converted) is type(net)
        assert converted.feature_info.channels() == net.feature_info.channels()
        assert converted.spd_report.replaced
        with torch.no_grad():
            for actual, expected in zip(converted(x), net(x), strict=True):
                assert difference(actual, expected) < 1e-4


def test_the_classifier_can_be_replaced_and_gradients_checkpointed() -> None:
    net: Any = convert_to_spd(small_network(drop_rate=0)).train()
    net.reset_classifier(7)
    x, target = images(4, 3, 64, 64), torch.arange(4)
    gradients = []
    for enable in (False, True):
        other = copy.deepcopy(net)
        other.set_grad_checkpointing(enable)
        output = other(x)
        assert output.shape == (4, 7)
        F.cross_entropy(output, target).backward()
        gradients.append([parameter.grad for parameter in other.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
    assert net.get_submodule(net.pretrained_cfg["classifier"]).out_features == 7
    assert isinstance(net.get_submodule(net.pretrained_cfg["first_conv"]), SPDConv2d)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_OF_SMALL)
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    net = convert_to_spd(small_network(name))
    x = images(2, 3, 65, 63)
    with torch.no_grad():
        assert difference(torch.compile(net, fullgraph=True, backend="eager")(x), net(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_OF_SMALL)
@pytest.mark.parametrize("form", [convert_to_spd, lambda net: fold_spd(convert_to_spd(net))], ids=["spd", "folded"])
def test_exports_for_any_image_size(name: str, form: Callable[[nn.Module], nn.Module]) -> None:
    net = form(small_network(name))
    shapes: Any = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    sizes = [(65, 79), (64, 96), (97, 70)]
    if any(isinstance(module, Conv2dSame) for module in net.modules()):  # timm's: with any size it takes many minutes
        shapes, sizes = ({2: None, 3: None},), sizes[:1]
    exported = torch.export.export(net, (images(2, 3, 65, 79),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for height, width in sizes:
            x = images(2, 3, height, width)
            assert difference(exported(x), net(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch about its own exporter
@pytest.mark.parametrize("name", FIRST_OF_SMALL)
def test_becomes_onnx_that_computes_the_same(name: str) -> None:
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    x = images(2, 3, 65, 79)
    converted = convert_to_spd(small_network(name))
    for net in (converted, fold_spd(converted)):
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert difference(torch.from_numpy(output), net(x)) < 1e-4


# Saving and loading


def saved(net: nn.Module, folder: Path) -> str:
    save_for_hf(net, str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_saved_network_loads_without_the_original(name: str, tmp_path: Path) -> None:
    net: Any = convert_to_spd(small_network(name, num_classes=5))
    disturb(net)
    again: Any = timm.create_model(saved(net, tmp_path), pretrained=True).eval()
    x = images(2, 3, 65, 63)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert again.spd_report == net.spd_report
    for key in ("architecture", "first_conv", "classifier"):
        assert again.pretrained_cfg[key] == net.pretrained_cfg[key]
    assert again.pretrained_cfg["architecture"] == "spd_converted"
    other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9).eval()
    with torch.no_grad():
        assert other(x).shape == (2, 9)
        assert torch.equal(other.forward_features(x), net.forward_features(x))


def test_what_was_saved_can_be_saved_again_and_converted_further(tmp_path: Path) -> None:
    net = small_network()
    part: Any = convert_to_spd(net, exclude=["layer*"])
    part = timm.create_model(saved(part, tmp_path / "part"), pretrained=True).eval()
    assert len(part.spd_report.replaced) == 2
    assert len(part.spd_report.left) == 6
    whole: Any = timm.create_model(saved(convert_to_spd(part), tmp_path / "whole"), pretrained=True).eval()
    assert whole.spd_report.left == ()
    x = images(2, 3, 65, 63)
    with torch.no_grad():
        assert difference(whole(x), net(x)) < 1e-4
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["model_args"]["base"] == "test_resnet"
    assert len(config["model_args"]["include"]) == len(part.spd_report.replaced) + len(part.spd_report.left)


def test_arguments_of_the_original_are_saved_too(tmp_path: Path) -> None:
    net = small_network(output_stride=8, num_classes=5)
    converted = convert_to_spd(net)
    again = timm.create_model(saved(converted, tmp_path), pretrained=True).eval()
    x = images(2, 3, 65, 63)
    with torch.no_grad():
        assert difference(again(x), net(x)) < 1e-4


@pytest.mark.slow
def test_a_detector_is_converted_saved_and_folded(tmp_path: Path) -> None:
    net = small_network("yolov8n", num_classes=3)
    x = images(1, 3, 64, 96)
    converted: Any = convert_to_spd(net, example_input=x)
    assert len(converted.spd_report.replaced) == 7 and converted.spd_report.left == ()
    again: Any = timm.create_model(saved(converted, tmp_path), pretrained=True).eval()
    folded: Any = fold_spd(converted)
    assert type(again) is type(folded) is type(net)
    assert not any(isinstance(module, nn.BatchNorm2d | SPDConv2d) for module in folded.modules())
    with torch.no_grad():
        expected = net.decode(net(x), image_size=(64, 96))
        for other in (converted, again, folded):
            assert difference(other.decode(other(x), image_size=(64, 96)), expected) < 1e-4


@pytest.mark.parametrize("chans", [1, 4])
def test_a_saved_network_is_adapted_to_other_image_channels_as_the_original_is(chans: int, tmp_path: Path) -> None:
    net = small_network(num_classes=5)
    strided = saved(net, tmp_path / "strided")
    converted = saved(convert_to_spd(net), tmp_path / "converted")
    nets: list[Any] = [timm.create_model(name, pretrained=True, in_chans=chans).eval() for name in (strided, converted)]
    x = images(2, chans, 65, 63)
    with torch.no_grad():
        assert difference(nets[1](x), nets[0](x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "tf_mobilenetv3_small_minimal_100", "test_nfnet"])
def test_a_saved_network_gives_features(name: str, tmp_path: Path) -> None:
    net = small_network(name)
    x = images(2, 3, 65, 63)
    for indices in ({}, {"out_indices": (1, 2)}):
        original = timm.create_model(saved(net, tmp_path / "a"), pretrained=True, features_only=True, **indices).eval()
        name = saved(convert_to_spd(net), tmp_path / "b")
        converted = timm.create_model(name, pretrained=True, features_only=True, **indices).eval()
        with torch.no_grad():
            assert converted.feature_info.channels() == original.feature_info.channels()
            for actual, expected in zip(converted(x), original(x), strict=True):
                assert difference(actual, expected) < 1e-4


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    net = small_network()
    name = saved(convert_to_spd(net), tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for classes in ({}, {"num_classes": 3}):
        with pytest.raises(WeightsError, match=r"does not fit the converted test_resnet: conv1\.0\.weight has shape"):
            timm.create_model(name, pretrained=True, **classes)


def test_a_converted_network_cannot_be_made_from_nothing() -> None:
    with pytest.raises(ValueError, match="spd_converted is made from a saved network alone"):
        timm.create_model("spd_converted", pretrained=True)


def test_a_checkpoint_is_converted_into_a_folder(tmp_path: Path) -> None:
    report = convert_checkpoint("cifar_resnet20", tmp_path / "new" / "folder", exclude=["*.projection.*"])
    assert len(report.replaced) == len(report.left) == 2
    original = timm.create_model("cifar_resnet20", pretrained=True).eval()
    converted: Any = timm.create_model(f"local-dir:{tmp_path / 'new' / 'folder'}", pretrained=True).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        assert difference(converted(x), original(x)) < 1e-4
    assert converted.pretrained_cfg["label_names"] == list(original.pretrained_cfg["label_names"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_the_command_converts_and_predicts_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "cifar_resnet20", "--out", str(tmp_path / "spd"), "--exclude", "stages.2.*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["stages.1.0.conv1.conv", "stages.1.0.projection.conv"]
    assert lines[-1] == f'saved: timm.create_model("local-dir:{tmp_path / "spd"}", pretrained=True)'
    said = []
    for model in ("cifar_resnet20", str(tmp_path / "spd")):
        assert main(["predict", model, str(ROOT / "examples"), "--json"]) == 0
        said.append([[top["name"] for top in row["top"]] for row in json.loads(capsys.readouterr().out)])
    assert said[0] == said[1]
    assert main(["convert", "cifar_resnet20", "--out", str(tmp_path / "spd")]) == 1
    assert f"error: {tmp_path / 'spd'} exists already; give a new folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_converts_detectors_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = {"input_size": (3, 64, 64)}
    name = saved(small_network("yolov8n", num_classes=3, pretrained_cfg_overlay=cfg), tmp_path / "run")
    assert main(["convert", name, "--out", str(tmp_path / "spd")]) == 0
    answers = []
    for model in (name, str(tmp_path / "spd")):
        assert main(["detect", model, str(ROOT / "examples" / "coffee.png"), "--score", "0.01", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""])))
    assert answers[0] == answers[1] and answers[0]["annotations"]


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(blocks[0], "convert.md", "exec"), {})
    assert capsys.readouterr().out == blocks[1]


def test_nothing_is_written_where_nothing_can_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} exists already")):
        convert_checkpoint("cifar_resnet20", tmp_path)
    with pytest.raises(ValueError, match="include='conv9' names nothing that downsamples"):
        convert_checkpoint("cifar_resnet20", tmp_path / "a", include=["conv9"])
    with pytest.raises(ModelError, match="there is no network 'cifar_resnet21'; the nearest names are"):
        convert_checkpoint("cifar_resnet21", tmp_path / "b")
    convert_checkpoint("cifar_resnet20", tmp_path / "c")
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_checkpoint(str(tmp_path / "c"), tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# Folding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyconvresnet50_spd", "resnet18_spd", "pyconvhgresnet50_spd"])
def test_networks_that_were_built_with_space_to_depth_fold_too(name: str) -> None:
    net = small_network(name, num_classes=5)
    disturb(net.stem)
    folded = fold_spd(net)
    assert not [m for m in folded.modules() if isinstance(m, SPDConv2d | PhaseMix)]
    with torch.no_grad():
        for size in ((33, 47), (64, 64)):
            x = images(2, 3, *size)
            assert difference(folded(x), net(x)) < 1e-4


def test_folding_takes_batchnorm_in() -> None:
    net = small_network()
    folded = fold_spd(convert_to_spd(net))
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in other.modules()) for other in (net, folded)]
    assert norms[0] > 10
    assert norms[1] == 0
    weights = [sum(p.numel() for p in other.parameters()) for other in (net, folded)]
    assert weights[1] < weights[0]  # not trained since, it has the strided kernels again


def test_a_convolution_that_runs_twice_keeps_its_batchnorms_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[0](self.conv(x)) + self.norms[1](self.conv(x))

    net = convert_report.randomise(Shared())
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        assert difference(fold_spd(net, x)(x), net(x)) < 1e-4
    with pytest.raises(ValueError, match="the size of the images is unknown"):
        fold_spd(net)


def test_a_map_that_something_else_reads_too_keeps_its_batchnorm() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    net = convert_report.randomise(Both())
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        assert difference(fold_spd(net, x)(x), net(x)) < 1e-4


def test_folding_leaves_the_network_alone() -> None:
    net = convert_to_spd(small_network()).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert not fold_spd(net).training
    assert net.training
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
