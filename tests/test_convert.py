"""Conversion to space-to-depth keeps every prediction, reports its changes, and can be saved, trained and undone."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convert_report
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.utils import prune

from spd_zoo import WeightsError, convert_to_spd, fold_spd, keep_resolution
from spd_zoo.cli.main import main
from spd_zoo.convert import ConversionError, convert_checkpoint
from spd_zoo.fold import fold_batchnorm
from spd_zoo.rewrite import max_difference, tensors_in
from spd_zoo.spd import PhaseMix, SpaceToDepth, SPDAvgPool2d, SPDConv2d, SPDMaxPool2d, SPDStdConv2d
from spd_zoo.weights.load import ModelError

ROOT = Path(__file__).parent.parent
RECORDED = [json.loads(line) for line in convert_report.RECORD.read_text().splitlines()]
COMPARED = [row for row in RECORDED if "left_out" not in row]
# together every kind of layer: plain, grouped, strided by 4, TensorFlow's padding, weight standardised; every pooling
AGAIN = [row["network"] for row in COMPARED if row["params"][0] < 4e6 or row["unchanged"]]
AGAIN = [
    pytest.param(name, marks=pytest.mark.exhaustive if i % 4 else pytest.mark.slow) for i, name in enumerate(AGAIN)
]
FOLDED = [
    pytest.param(
        row["network"], marks=() if row["network"] in ("test_resnet", "ghostnet_050") else pytest.mark.exhaustive
    )
    for row in COMPARED
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
    """Changes every weight, as training does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def check(layer: nn.Module, chs: int, kind: type[nn.Module]) -> None:
    """A layer, its replacement and the folded replacement agree at every size; the last two also after training."""
    layer = layer.double().eval()
    made = convert_to_spd(layer, example_input=noise(2, chs, 16, 22))
    assert type(made) is kind
    trained: Any = copy.deepcopy(made)
    disturb(trained)
    example = noise(2, chs, 16, 22)
    folded, folded_after_training = fold_spd(made, example), fold_spd(trained, example)
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


def test_new_layers_have_the_attributes_of_the_replaced_ones() -> None:
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
def test_untrained_layers_fold_back_to_the_original(layer: Any, folded: type[nn.Module]) -> None:
    x = images(1, 4, 8, 8)
    back: Any = fold_spd(convert_to_spd(layer, example_input=x), x)
    assert type(back) is folded
    for name in ("kernel_size", "stride", "padding", "ceil_mode"):
        if hasattr(layer, name):
            assert torch.tensor(getattr(back, name)).float().mean() == torch.tensor(getattr(layer, name)).float().mean()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


def test_a_trained_kernel_folds_to_twice_the_kernel() -> None:
    made = convert_to_spd(nn.Conv2d(4, 6, 7, 2, 3), example_input=images(1, 4, 8, 8))
    disturb(made)
    folded: Any = fold_spd(made, images(1, 4, 8, 8))
    pad, conv = folded
    assert (type(pad), type(conv), conv.kernel_size, conv.stride) == (nn.ZeroPad2d, nn.Conv2d, (8, 8), (2, 2))


# Networks


@pytest.mark.parametrize("name", SMALL)
def test_a_converted_network_predicts_what_the_original_predicts(name: str) -> None:
    row = convert_report.compare(name)
    assert row["unchanged"] == []
    assert sum(row["replaced"].values()) >= 4
    for kind in convert_report.SIZES:
        assert row[kind]["difference"] < 1e-4
        assert row[kind]["folded"] < 1e-4
        assert row[kind]["moved"] > 0.01  # the new weights matter


@pytest.mark.parametrize(
    "features_only", [pytest.param(False, id="classifier"), pytest.param(True, id="features_only")]
)
@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_network_computes_the_same(name: str, features_only: bool) -> None:
    found = convert_report.compare_folded(name, features_only)
    print(json.dumps({"features_only": features_only, **found}))
    assert found["folded"] and max(found["folded"].values()) < 1e-4
    assert found["norms"][1] < found["norms"][0] or found["norms"][0] == 0


@pytest.mark.parametrize("name", AGAIN)
def test_recorded_conversions_are_reproduced(name: str) -> None:
    (recorded,) = [row for row in COMPARED if row["network"] == name]
    row = convert_report.compare(name)
    for key in ("params", "macs"):
        assert list(row[key]) == recorded[key]
    assert [row[key] for key in ("replaced", "unchanged")] == [recorded[key] for key in ("replaced", "unchanged")]
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


def test_a_converted_pyramid_network_equals_the_one_built_with_space_to_depth() -> None:
    built: Any = timm.create_model("pyconvresnet50_spd", num_classes=5, device="meta")
    converted: Any = convert_to_spd(timm.create_model("pyconvresnet50", num_classes=5, device="meta"))
    shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in (built, converted)]
    assert shapes[0] == shapes[1]
    assert converted.spd_report.unchanged == ()


def test_a_narrow_pyramid_is_computed_packed_and_right() -> None:
    net = small_network("pyconvresnet18", num_classes=5)
    x = images(2, 3, 33, 47)
    with torch.no_grad():
        assert difference(convert_to_spd(net, example_input=x)(x), net(x)) < 1e-4


@pytest.mark.slow
def test_functions_that_downsample_are_reported() -> None:
    net: Any = convert_to_spd(timm.create_model("inception_v3", device="meta"))
    assert [(layer.module, layer.layer) for layer in net.spd_report.unchanged] == [
        ("Mixed_6a", "max_pool2d"),
        ("Mixed_7a", "max_pool2d"),
    ]
    assert "called in the forward of InceptionB, not a layer of its own" in str(net.spd_report)


@dataclass
class Maps:
    """An output of a class of its own."""

    last: Tensor


class Everything(nn.Module):
    """All types of downsampling that cannot be replaced."""

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
        maps += [F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), F.fractional_max_pool2d(x, 2, 7)]
        maps += [F.grid_sample(x, x.new_zeros(len(x), 7, 7, 2), align_corners=False)]
        even = torch.arange(0, x.shape[2], 2, device=x.device)
        maps += [x[:, :, even[:, None], even], x.index_select(2, even), x[:, :, :, ::2][:, :, ::2]]
        maps += [x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))]
        return torch.cat([y.mean((2, 3)) for y in maps], 1)


def test_everything_that_cannot_be_replaced_is_reported_with_a_reason() -> None:
    net: Any = convert_to_spd(Everything(), example_input=images(2, 3, 32, 32))
    assert [row.module for row in net.spd_report.replaced] == ["good"]
    reasons = {(layer.module, layer.layer): layer.reason for layer in net.spd_report.unchanged}
    assert {key: reason for key, reason in reasons.items() if key[0]} == {
        ("lengthwise", "Conv2d 3x3/2"): "its stride differs between rows and columns: (2, 1)",
        ("kind", "Mine 3x3/2"): "a convolution of an unknown class, Mine",
        ("pool", "MyPool 2x2/2"): "a pooling of an unknown class, MyPool",
        ("indices", "MaxPool2d 2x2/2"): "it returns indices",
        ("divisor", "AvgPool2d 2x2/2"): "it has a divisor_override",
        ("shared", "MaxPool2d 1x1/2"): "called with maps that differ in their number of channels",
        ("idle", "Conv2d 3x3/2"): "not called in evaluation, so nothing could be compared",
        ("fixed", "adaptive_avg_pool2d"): "there is no replacement for AdaptiveAvgPool2d",
    }
    assert [layer for module, layer in reasons if not module] == [
        *("slice", "avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d_aa", "fractional_max_pool2d"),
        *("grid_sampler_2d", "index", "index_select", "mean"),
    ]
    assert "unchanged: the network itself, slice: called in the forward of Everything" in str(net.spd_report)


def test_excluded_layers_stay_and_are_reported() -> None:
    net = small_network()
    converted: Any = convert_to_spd(net, include=["layer*", "conv1.*"], exclude="*.downsample.*")
    assert type(converted.maxpool) is nn.MaxPool2d
    assert {row.module for row in converted.spd_report.replaced} == {
        *("conv1.0", "layer2.0.conv1", "layer3.0.conv2", "layer4.0.conv1")
    }
    unchanged = {row.module for row in converted.spd_report.unchanged}
    assert unchanged == {"maxpool", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    assert {row.reason for row in converted.spd_report.unchanged} == {"left out by include or exclude"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_names_nothing_is_refused(option: str) -> None:
    message = rf"{option}='layer9\*' names nothing that downsamples; there are: conv1\.0, "
    patterns: Any = {option: ["layer4.*", "layer9*"]}
    with pytest.raises(ValueError, match=message):
        convert_to_spd(small_network(), **patterns)


def test_a_network_of_unknown_image_size_needs_an_example() -> None:
    with pytest.raises(ValueError, match=r"size of the images is unknown.*give example_input="):
        convert_to_spd(nn.Sequential(nn.Conv2d(3, 4, 3, 2)))
    with pytest.raises(ValueError, match=r"a batch of images \(N, C, H, W\), got shape \[3, 8, 8\]"):
        convert_to_spd(nn.Conv2d(3, 4, 3, 2), example_input=images(3, 8, 8))


@pytest.mark.parametrize("function", [convert_to_spd, fold_spd])
@pytest.mark.parametrize(
    ("example", "why"),
    [
        (torch.zeros(0, 3, 8, 8), r"example_input holds no images, its shape is \[0, 3, 8, 8\]; give at least one"),
        (
            torch.zeros(1, 1, 8, 8),
            r"Conv2d cannot compute example_input, torch.float32 \[1, 1, 8, 8\] on cpu: .*channels",
        ),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"cannot compute example_input, torch.uint8 .*Give preprocessed"),
    ],
    ids=["empty", "channels", "uint8"],
)
def test_an_example_that_the_network_cannot_compute_is_refused(
    function: Callable[..., nn.Module], example: Tensor, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        function(nn.Conv2d(3, 4, 3, 2), example_input=example)


def test_missing_memory_for_the_example_stays_an_error_of_memory() -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise torch.OutOfMemoryError

    net = nn.Conv2d(3, 4, 3, 2)
    net.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        convert_to_spd(net, example_input=images(1, 3, 8, 8))


class Branches(nn.Module):
    """Computes something else if its layer has another class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if type(self.conv) is nn.Conv2d else 2 * y


def test_a_network_that_would_compute_something_else_is_refused_and_stays_as_it_was() -> None:
    net, x = Branches(), images(2, 3, 8, 8)
    calls: list[str] = []
    net.conv.register_forward_hook(lambda *args: calls.append("hook"))
    expected = net(x)
    with pytest.raises(ConversionError, match=r"differs by .* find the layer by converting a few modules at a time"):
        convert_to_spd(net, example_input=x, inplace=True)
    assert type(net.conv) is nn.Conv2d and net.training
    calls.clear()
    assert torch.equal(net(x), expected)
    assert calls == ["hook"]


class Scaled(nn.Module):
    """Reads the weights of a layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.square().mean()


class Tied(nn.Sequential):
    """Two convolutions with one kernel."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, 2, 1))
        self[2].weight = self[0].weight


class Listed(nn.Module):
    """Calls its layers by a list that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3)
        self.layers = [self.conv, self.norm]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def attached(attach: Callable[[nn.Conv2d], Any]) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3))
    conv: Any = net[0]
    attach(conv)
    return net


UNSAFE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrization": (lambda: attached(torch.nn.utils.parametrizations.weight_norm), "it has a parametrization"),
    "weight_norm": (lambda: attached(torch.nn.utils.weight_norm), "it has weight_g, weight_v"),
    "spectral_norm": (lambda: attached(torch.nn.utils.spectral_norm), "it has weight_orig, weight_u, weight_v"),
    "prune": (lambda: attached(lambda conv: prune.random_unstructured(conv, "weight", 0.5)), "it has weight_mask"),
    "forward": (lambda: attached(lambda conv: setattr(conv, "forward", conv.forward)), "its forward was replaced"),
    "read elsewhere": (Scaled, "its parameters (or buffers )?are also read outside of it"),
    "shared": (Tied, "it shares a parameter with another module"),
    "list": (Listed, "by its name|through another reference than its name"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", UNSAFE)
def test_a_layer_that_cannot_be_exchanged_safely_stays(name: str) -> None:
    make, reason = UNSAFE[name]
    net, x = convert_report.randomise(make()), images(2, 3, 16, 16)
    expected = net(x)
    converted: Any = convert_to_spd(net, example_input=x, inplace=True)
    folded: Any = fold_spd(net, x)
    assert converted is net
    for report in (converted.spd_report, folded.fold_report):
        assert re.search(reason, str(report))
    for other in (converted, folded):
        assert not any(isinstance(module, SPDConv2d) for module in other.modules())
        assert difference(other(x), expected) < 1e-6
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 1


def test_a_layer_with_a_hook_on_its_weight_stays() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1))
    net[0].weight.register_hook(lambda gradient: 0 * gradient)
    convert_to_spd(net, example_input=images(2, 3, 16, 16), inplace=True)
    assert "its weight has hooks" in str(net.spd_report)
    net(images(2, 3, 16, 16)).sum().backward()
    assert not net[0].weight.grad.any()


class Named(nn.Module):
    """Calls its layers with their argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.mean = nn.Conv2d(3, 3, 3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(input=self.pool(input=self.conv(input=x)))


def test_a_layer_takes_its_argument_by_the_same_name() -> None:
    net, x = Named(), images(2, 3, 16, 16)
    converted: Any = convert_to_spd(net, example_input=x)
    assert len(converted.spd_report.replaced) == 3 and difference(converted(x), net(x)) < 1e-6


def test_hooks_of_every_type_move_to_the_new_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU())
    calls: list[str] = []
    net[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    net[0].register_forward_hook(lambda module, args, kwargs, y: calls.append("after"), with_kwargs=True)
    net[0].register_forward_hook(lambda module, args, y: calls.append("always"), always_call=True)
    net[0].register_full_backward_pre_hook(lambda module, gradients: calls.append("before backward"))
    handle = net[0].register_full_backward_hook(lambda module, given, gradients: calls.append("after backward"))
    x = images(2, 3, 16, 16).requires_grad_()
    converted: Any = convert_to_spd(net, example_input=x.detach(), inplace=True)
    assert type(converted[0]) is SPDConv2d
    calls.clear()
    converted(x).sum().backward()
    assert calls == ["before", "after", "always", "before backward", "after backward"]
    handle.remove()
    converted(x).sum().backward()
    assert calls[5:] == ["before", "after", "always", "before backward"]


class Value(nn.Module):
    """Something after a layer with a stride."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.value = nn.Conv2d(3, 3, 3, 2, 1), value

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.value(2 * y if type(self.conv) is SPDConv2d else y)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (lambda y: y.mean(), ConversionError),
        (lambda y: {"a": [y[:0]], "b": Maps(y)}, ConversionError),
        (lambda y: torch.where(y > y.median(), y, torch.nan), ValueError),
        (lambda y: (y > 0.5).long() + y[0, 0, 0, 0].double(), ConversionError),
        (lambda y: None, ValueError),
    ],
    ids=["one number", "nested", "NaN", "fp64", "none"],
)
def test_outputs_of_every_type_are_compared(value: Callable[[Tensor], Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"differs by|returns NaN for example_input|returns no tensors"):
        convert_to_spd(Value(value), example_input=images(2, 3, 8, 8))


def test_a_single_output_number_and_none_at_all_are_equal_to_themselves() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 3, 2, 1), nn.AdaptiveAvgPool2d(1))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.5)
    x = images(1, 3, 8, 8).mul(8).round()  # whole numbers and halves, whose sums no order of addition rounds
    folded: Any = fold_spd(net, x)
    converted: Any = convert_to_spd(net, example_input=x)
    assert folded.fold_report.difference == 0
    assert converted.spd_report.difference < 1e-6
    assert max_difference([torch.empty(0, 4)], [torch.empty(0, 4)]) == 0
    assert max_difference([torch.tensor([torch.nan, 1.0])], [torch.tensor([0.0, 1.0])]) == float("inf")
    assert max_difference([torch.tensor([0.0, 1.0])], [torch.tensor([0.0, torch.inf])]) == float("inf")
    assert max_difference([torch.zeros(3)], [torch.zeros(3)]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_fp32(dtype: torch.dtype) -> None:
    net, x = small_network().to(dtype), images(2, 3, 33, 47).to(dtype)
    converted: Any = convert_to_spd(net, example_input=x)
    assert converted.spd_report.difference < 1e-5
    folded: Any = fold_spd(converted, x)
    assert folded.fold_report.difference < 16 * torch.finfo(dtype).eps
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}


def test_maps_with_infinities_stay_numbers_in_a_phase_mix() -> None:
    x = images(2, 3, 16, 16)
    x[0, 0, 2:5, 2:5] = -torch.inf  # a whole window, but none that the stride takes
    pool = nn.MaxPool2d(3, 2, 1)
    assert torch.equal(convert_to_spd(pool, example_input=x)(x), pool(x))


def test_a_detector_whose_shapes_depend_on_values_is_refused_in_a_sentence() -> None:
    net = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    x = torch.rand(1, 3, 64, 64)
    for function in (convert_to_spd, fold_spd):
        with pytest.raises(ValueError, match=r'SSD cannot run on the "meta" device .* as the backbone of a detector'):
            function(net, example_input=x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")  # of two classes, by torch's version
def test_a_network_of_torchscript_is_refused_in_a_sentence() -> None:
    layer = nn.Conv2d(3, 4, 3, 2, 1)
    x = images(1, 3, 8, 8).float()
    for net in (torch.jit.script(layer), torch.jit.trace(layer, x), nn.Sequential(torch.jit.script(layer))):
        for function in (convert_to_spd, fold_spd, keep_resolution):
            with pytest.raises(ValueError, match=r"was compiled by TorchScript, .* as it was before torch\.jit"):
                function(net, example_input=x)


@pytest.mark.parametrize("frozen", [True, False])
def test_new_layers_of_a_frozen_network_are_frozen(frozen: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(2)).requires_grad_(not frozen)
    net[0].requires_grad_(False)
    net.append(nn.Conv2d(4, 4, 1).requires_grad_(not frozen))
    converted = convert_to_spd(net, example_input=images(1, 3, 16, 16).float())
    trained = {name for name, parameter in converted.named_parameters() if parameter.requires_grad}
    assert trained == (set() if frozen else {"1.mix.weight", "2.weight", "3.weight", "3.bias"})


def test_a_pooling_that_is_reset_pools_again() -> None:
    pool, x = nn.AvgPool2d(3, 2, 1), images(2, 3, 9, 12)
    converted: Any = convert_to_spd(pool, example_input=x)
    with torch.no_grad():
        converted.weight.normal_()
    converted.reset_parameters()
    torch.testing.assert_close(converted(x), pool(x), check_dtype=False)


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
    report: Any = convert_to_spd(net, example_input=images(2, 3, 64, 64)).spd_report
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
    compiled: Any = torch.compile(net, backend="eager")
    assert compiled.spd_report is net.spd_report
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
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(convert_to_spd, id="spd", marks=pytest.mark.exhaustive),  # 40 s: a shape for every phase
        pytest.param(lambda net: fold_spd(convert_to_spd(net)), id="folded"),
    ],
)
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
    onnxruntime, _ = (
        pytest.importorskip("onnxruntime", reason="ONNX needs the extra `export`"),
        pytest.importorskip("onnxscript", reason="ONNX needs the extra `export`"),
    )
    x = images(2, 3, 65, 79)
    converted = convert_to_spd(small_network(name))
    for net in (converted, fold_spd(converted)):
        program: Any = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
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


def test_a_saved_network_can_be_saved_again_and_converted_further(tmp_path: Path) -> None:
    net = small_network()
    part: Any = convert_to_spd(net, exclude=["layer*"])
    part = timm.create_model(saved(part, tmp_path / "part"), pretrained=True).eval()
    assert len(part.spd_report.replaced) == 2
    assert len(part.spd_report.unchanged) == 6
    whole: Any = timm.create_model(saved(convert_to_spd(part), tmp_path / "whole"), pretrained=True).eval()
    assert whole.spd_report.unchanged == ()
    x = images(2, 3, 65, 63)
    with torch.no_grad():
        assert difference(whole(x), net(x)) < 1e-4
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["model_args"]["base"] == "test_resnet"
    assert len(config["model_args"]["include"]) == len(part.spd_report.replaced) + len(part.spd_report.unchanged)


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
    assert len(converted.spd_report.replaced) == 7 and converted.spd_report.unchanged == ()
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
    choices: tuple[dict[str, Any], ...] = ({}, {"out_indices": (1, 2)})
    for indices in choices:
        original: Any = timm.create_model(
            saved(net, tmp_path / "a"), pretrained=True, features_only=True, **indices
        ).eval()
        name = saved(convert_to_spd(net), tmp_path / "b")
        converted: Any = timm.create_model(name, pretrained=True, features_only=True, **indices).eval()
        with torch.no_grad():
            assert converted.feature_info.channels() == original.feature_info.channels()
            for actual, expected in zip(converted(x), original(x), strict=True):
                assert difference(actual, expected) < 1e-4


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    net = small_network()
    name = saved(convert_to_spd(net), tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    choices: tuple[dict[str, Any], ...] = ({}, {"num_classes": 3})
    for classes in choices:
        with pytest.raises(WeightsError, match=r"does not fit the converted test_resnet: conv1\.0\.weight has shape"):
            timm.create_model(name, pretrained=True, **classes)


def test_a_converted_network_cannot_be_made_from_nothing() -> None:
    with pytest.raises(ValueError, match="spd_converted needs a saved network"):
        timm.create_model("spd_converted", pretrained=True)
    assert "spd_converted" not in timm.list_models()
    assert all(timm.list_models(module=module) for module in timm.list_modules())


def test_a_checkpoint_is_converted_into_a_folder(tmp_path: Path) -> None:
    report = convert_checkpoint("cifar_resnet20", tmp_path / "new" / "folder", exclude=["*.projection.*"])
    assert len(report.replaced) == len(report.unchanged) == 2
    original: Any = timm.create_model("cifar_resnet20", pretrained=True).eval()
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
        assert main(["predict", model, str(ROOT / "examples" / "images"), "--json"]) == 0
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
        assert (
            main(["detect", model, str(ROOT / "examples" / "images" / "coffee.png"), "--score", "0.01", "--json"]) == 0
        )
        answers.append(json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""])))
    assert answers[0] == answers[1] and answers[0]["annotations"]


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(blocks[0], "convert.md", "exec"), {})
    assert capsys.readouterr().out == blocks[1]


def test_nothing_is_written_if_nothing_can_be_converted(tmp_path: Path) -> None:
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
def test_networks_built_with_space_to_depth_fold_too(name: str) -> None:
    net = small_network(name, num_classes=5)
    disturb(net.stem)
    folded = fold_spd(net)
    assert not [m for m in folded.modules() if isinstance(m, SPDConv2d | PhaseMix)]
    with torch.no_grad():
        for size in ((33, 47), (64, 64)):
            x = images(2, 3, *size)
            assert difference(folded(x), net(x)) < 1e-4


def test_folding_includes_batchnorm() -> None:
    net = small_network()
    folded = fold_spd(convert_to_spd(net))
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in other.modules()) for other in (net, folded)]
    assert norms[0] > 10
    assert norms[1] == 0
    weights = [sum(p.numel() for p in other.parameters()) for other in (net, folded)]
    assert weights[1] < weights[0]  # not trained since, it has the strided kernels again


@pytest.mark.parametrize("change", [convert_to_spd, fold_spd, keep_resolution])
def test_a_name_in_place_of_a_network_is_refused_in_a_sentence(change: Any) -> None:
    with pytest.raises(ValueError, match=r"give a network, such as timm.create_model returns, got str"):
        change("cifar_resnet20")


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


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm; what is done with the map between them is the test's."""

    def __init__(self, forward: Callable[..., Any], conv: nn.Module | None = None, norm: Any = None) -> None:
        super().__init__()
        self.conv: nn.Module = conv or nn.Conv2d(3, 3, 3, padding=1)
        self.norm: nn.Module = norm or nn.BatchNorm2d(3)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def both(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return y + net.norm(y)


def view(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    flat = y.flatten(1)
    return net.norm(y).flatten(1) + flat


def returned(net: Any, x: Tensor) -> Any:
    y = net.conv(x)
    return {"maps": [Maps(y)], "out": net.norm(y)}


def kept(net: Any, x: Tensor) -> Tensor:
    net.last = [net.conv(x)]
    return net.norm(net.last[0])


def without_hooks(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv.forward(x))


def twice(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.norm(net.conv(x)))


class DoubledNorm(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def plainly(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


NOT_FOLDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "read": (lambda: ConvNorm(both), "the output of conv is also read by something else"),
    "view": (lambda: ConvNorm(view), "the output of conv is also read by something else"),
    "returned": (lambda: ConvNorm(returned), "the output of conv is also returned or kept"),
    "kept": (lambda: ConvNorm(kept), "the output of conv is also returned or kept"),
    "forward": (lambda: ConvNorm(without_hooks), "its input is not the output of a convolution|read outside of it"),
    "twice": (lambda: ConvNorm(twice), "called 2 times in evaluation"),
    "subclass": (lambda: ConvNorm(plainly, norm=DoubledNorm(3)), "DoubledNorm is not one of the classes"),
    "batch's own": (
        lambda: ConvNorm(plainly, norm=nn.BatchNorm2d(3, track_running_stats=False)),
        "it normalises by the statistics of each batch",
    ),
    "own convolution": (
        lambda: ConvNorm(plainly, conv=type("Mine", (nn.Conv2d,), {})(3, 3, 1)),
        "the convolution before it, conv, is left unchanged: Mine is not one of the classes that can be folded",
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_a_batchnorm_stays_where_folding_would_change_something(name: str) -> None:
    make, reason = NOT_FOLDED[name]
    net, x = convert_report.randomise(make()), images(2, 3, 8, 8)
    folded: Any = fold_spd(net, x)
    assert re.search(reason, str(folded.fold_report)) and folded.fold_report.folded == ()
    with torch.no_grad():
        assert max_difference(tensors_in(folded(x)), tensors_in(net(x))) == 0


@pytest.mark.parametrize("module", ["conv", "norm"])
def test_a_hook_between_two_layers_keeps_them_apart(module: str) -> None:
    net, x = convert_report.randomise(ConvNorm(plainly)), images(2, 3, 8, 8)
    maps: list[Tensor] = []
    net.get_submodule(module).register_forward_hook(lambda module, args, y: maps.append(args[0]))
    folded: Any = fold_spd(net, x)
    assert "it has hooks" in str(folded.fold_report)
    maps.clear()
    with torch.no_grad():
        assert torch.equal(folded(x), net(x))
    assert torch.equal(maps[0], maps[1])


def test_maps_of_a_network_with_features_only_are_right() -> None:
    net, x = small_network("ghostnet_050", features_only=True), images(2, 3, 64, 64)
    folded: Any = fold_spd(net)
    assert [(layer.module, layer.reason) for layer in folded.fold_report.unchanged] == [
        ("bn1", "the output of conv_stem is also returned or kept")
    ]
    with torch.no_grad():
        assert max_difference(tensors_in(folded(x)), tensors_in(net(x))) < 1e-4


def test_a_batchnorm_under_two_names_is_applied_once() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3)
            self.layer0 = nn.Sequential(self.conv1, self.bn1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer0(x)

    net, x = convert_report.randomise(TwoNames()), images(2, 3, 8, 8)
    folded: Any = fold_spd(convert_to_spd(net, example_input=x), x)
    assert folded.layer0[0] is folded.conv1 and type(folded.bn1) is type(folded.layer0[1]) is nn.Identity
    with torch.no_grad():
        assert difference(folded(x), net(x)) < 1e-5


def test_small_trained_taps_of_half_precision_stay() -> None:
    conv: Any = convert_to_spd(nn.Conv2d(3, 4, 3, 2, 1).bfloat16(), example_input=images(1, 3, 8, 8).bfloat16())
    with torch.no_grad():
        conv.weight[conv.weight == 0] = 1e-3
    x = images(2, 3, 16, 16).bfloat16()
    folded: Any = fold_spd(conv, x)
    assert folded.fold_report.difference < 1e-5
    assert [tuple(m.kernel_size) for m in folded.modules() if isinstance(m, nn.Conv2d)] == [(4, 4)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("order", ["channels_first", "rows_first"])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (0, 2)])
@pytest.mark.parametrize("kernel", [2, 3])
def test_space_to_depth_joins_a_convolution_of_any_padding(kernel: int, padding: Any, order: str) -> None:
    layers = (SpaceToDepth(order), nn.Conv2d(12, 4, kernel, padding=padding), nn.BatchNorm2d(4))
    net = convert_report.randomise(nn.Sequential(*layers))
    folded: Any = fold_spd(net, images(1, 3, 16, 16))
    assert folded.fold_report.unchanged == () and not any(isinstance(m, SpaceToDepth) for m in folded.modules())
    for size in ((16, 16), (13, 18), (9, 11)):
        x = images(2, 3, *size)
        with torch.no_grad():
            assert difference(folded(x), net(x)) < 1e-5


def test_a_sequence_with_its_own_forward_stays_whole() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y) + y[:, :3]

    net, x = Residual(SpaceToDepth(), nn.Conv2d(12, 3, 3, padding=1)), images(2, 3, 8, 8)
    folded: Any = fold_spd(net, x)
    assert type(folded[0]) is SpaceToDepth
    assert "the output of 0 is also read by something else" in str(folded.fold_report)
    with torch.no_grad():
        assert torch.equal(folded(x), net(x))


def test_folding_compares_the_outputs_and_needs_weights() -> None:
    def branches(net: Any, x: Tensor) -> Tensor:
        y = net.norm(net.conv(x))
        return y if type(net.norm) is nn.BatchNorm2d else 2 * y

    with pytest.raises(ConversionError, match=r"the rewritten network differs by .*; fold its modules"):
        fold_spd(convert_report.randomise(ConvNorm(branches)), images(2, 3, 8, 8))
    with pytest.raises(ValueError, match='folding needs weights, but those of this network are on the "meta" device'):
        fold_spd(timm.create_model("test_resnet", device="meta"))


class Reads(nn.Module):
    """Reads an attribute of its BatchNorm in addition to calling it."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.conv, self.norm, self.attribute = nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3), attribute

    def forward(self, x: Tensor) -> Tensor:
        value = getattr(self.norm, self.attribute)
        return self.norm(self.conv(x)) * (value.sum() if isinstance(value, Tensor) else value)


def test_a_batchnorm_whose_statistics_are_read_stays() -> None:
    net, x = convert_report.randomise(Reads("running_var")), images(2, 3, 16, 16)
    folded: Any = fold_spd(net, x)
    assert type(folded.norm) is nn.BatchNorm2d and torch.equal(folded(x), net(x))
    assert "its parameters or buffers are also read outside of it" in str(folded.fold_report)


@pytest.mark.parametrize("attribute", ["eps", "num_features"])
def test_a_network_that_misses_a_folded_layer_is_not_returned(attribute: str) -> None:
    net: Any = convert_report.randomise(Reads(attribute))
    net.pretrained_cfg = {"input_size": (3, 16, 16)}
    for example in (None, images(2, 3, 16, 16)):
        with pytest.raises(ConversionError, match=f"the folded network cannot run.*no attribute '{attribute}'"):
            fold_spd(net, example)


def test_folding_does_not_change_the_network() -> None:
    net = convert_to_spd(small_network()).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert not fold_spd(net).training
    assert net.training
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_batchnorm_can_be_folded_without_the_rest() -> None:
    net, x = small_network("resnet18_spd", num_classes=5), images(2, 3, 32, 32)
    folded: Any = fold_batchnorm(net, x)
    assert folded.fold_report.difference < 1e-4
    counts = [
        [sum(isinstance(m, k) for m in n.modules()) for k in (SpaceToDepth, nn.BatchNorm2d)] for n in (net, folded)
    ]
    assert counts[0][0] == counts[1][0] > 0 and counts[1][1] < counts[0][1]
