"""Space-to-depth layers and pyramids give exactly the outputs of the layers that they replace."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import gradient
from timm.models.efficientformer_v2 import Downsample
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from spd_zoo import blocks
from spd_zoo.blocks import (
    AttentionDownsample,
    BSConvS2d,
    BSConvU2d,
    HybridStem,
    ImageSizeError,
    PaddingFreeDownsample,
    PositionAwareCircularConv2d,
    PyConv2d,
    orthonormality,
)
from spd_zoo.spd import (
    MaxPool2d,
    PhaseMix,
    SpaceToDepth,
    SPDAvgPool2d,
    SPDConv2d,
    SPDMaxPool2d,
    phase_weight,
    space_to_depth,
    spd_weight,
)

ROOT = Path(__file__).parent.parent
SIZES = [(1, 1), (2, 3), (7, 4), (12, 13), (16, 16), (31, 26)]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def fill(module: nn.Module) -> None:
    """Weights that no initialisation gives."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(noise(*parameter.shape))


def test_channels_first_order_keeps_the_phases_of_a_channel_together() -> None:
    x = noise(2, 3, 4, 6)
    y = space_to_depth(x)
    for c in range(3):
        for dy in (0, 1):
            for dx in (0, 1):
                assert torch.equal(y[:, 4 * c + 2 * dy + dx], x[:, c, dy::2, dx::2])


def test_rows_first_order_keeps_the_channels_of_a_phase_together() -> None:
    x = noise(2, 3, 4, 6)
    y = space_to_depth(x, "rows_first")
    for c in range(3):
        for dy in (0, 1):
            for dx in (0, 1):
                assert torch.equal(y[:, (2 * dx + dy) * 3 + c], x[:, c, dy::2, dx::2])


@pytest.mark.parametrize("order", ["channels_first", "rows_first"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_odd_sizes_get_zeros_at_the_bottom_and_right(order: str, size: tuple[int, int]) -> None:
    height, width = size
    x = noise(2, 3, height, width)
    padded = torch.zeros(2, 3, height + height % 2, width + width % 2, dtype=x.dtype)
    padded[..., :height, :width] = x
    assert torch.equal(SpaceToDepth(order)(x), space_to_depth(padded, order))


def test_space_to_depth_refuses_an_unknown_order() -> None:
    with pytest.raises(ValueError, match="columns_first"):
        SpaceToDepth("columns_first")(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("kernel", range(1, 10))
def test_a_strided_convolution_is_space_to_depth_and_a_plain_one_exactly(kernel: int) -> None:
    for padding in range(min(kernel, 5)):
        for groups in (1, 2, 4):
            weight, x = noise(8, 4 // groups, kernel, kernel), noise(2, 4, 19, 26)
            expected = F.conv2d(x, weight, stride=2, padding=padding, groups=groups)
            before, after = (padding + 1) // 2, (kernel - 1 - padding) // 2
            cells = F.pad(space_to_depth(x), [before, after, before, after])
            actual = F.conv2d(cells, spd_weight(weight, padding), groups=groups)
            height, width = (min(a, b) for a, b in zip(actual.shape[2:], expected.shape[2:], strict=True))
            assert height > 4 and width > 8
            torch.testing.assert_close(actual[..., :height, :width], expected[..., :height, :width], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "cells"), [(3, 2), (5, 3), (7, 4), (9, 5)])
def test_space_to_depth_kernels_have_the_smallest_size(kernel: int, cells: int) -> None:
    assert spd_weight(noise(2, 3, kernel, kernel), padding=kernel // 2).shape == (2, 12, cells, cells)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", range(1, 10))
def test_four_output_pixels_at_once_are_those_of_the_convolution_exactly(kernel: int, stride: int) -> None:
    weight, x = noise(8, 2, kernel, kernel), noise(2, 4, 2 * stride + kernel, 4 * stride + kernel)
    expected = F.conv2d(x, weight, stride=stride, groups=2)[..., :2, :4]
    phases = F.conv2d(x, phase_weight(weight, stride), stride=2 * stride, groups=2)
    torch.testing.assert_close(F.pixel_shuffle(phases, 2)[..., :2, :4], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
def test_an_spd_convolution_equals_a_strided_one(kernel: int, groups: int, size: tuple[int, int]) -> None:
    strided = nn.Conv2d(8, 12, kernel, 2, kernel // 2, groups=groups, dtype=torch.float64)
    layer = SPDConv2d(8, 12, kernel, groups=groups, bias=True, dtype=torch.float64)
    layer.load_state_dict({"weight": layer.from_strided(strided.weight), "bias": strided.bias})
    x = noise(2, 8, *size)
    torch.testing.assert_close(layer(x), strided(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kernel", "before", "after"), [(1, 0, 0), (3, 1, 0), (5, 1, 1), (7, 2, 1), (9, 2, 2)])
def test_an_spd_convolution_is_a_plain_one_after_space_to_depth(
    kernel: int, before: int, after: int, size: tuple[int, int]
) -> None:
    layer = SPDConv2d(4, 6, kernel, groups=2, dtype=torch.float64)
    fill(layer)
    x = noise(2, 4, *size)
    expected = F.conv2d(F.pad(space_to_depth(x), [before, after, before, after]), layer.weight, groups=2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_an_spd_convolution_knows_kernels_of_the_old_size() -> None:
    layer = SPDConv2d(4, 6, 7, groups=2)
    assert layer.is_strided_weight(layer.new_strided_weight())
    assert layer.new_strided_weight().shape == (6, 2, 7, 7)
    assert not layer.is_strided_weight(layer.weight)
    assert not layer.is_strided_weight(None)


def test_an_spd_convolution_refuses_an_even_kernel() -> None:
    with pytest.raises(ValueError, match="odd kernel size, got 4"):
        SPDConv2d(3, 8, 4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_phase_mix_starts_as_a_stride(size: tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    assert torch.equal(PhaseMix(3, dtype=torch.float64)(x), x[..., ::2, ::2])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_phase_mix_weighs_the_four_phases_of_each_channel(size: tuple[int, int]) -> None:
    mix = PhaseMix(3, dtype=torch.float64)
    fill(mix)
    x = noise(2, 3, *size)
    expected = F.conv2d(space_to_depth(x), mix.weight, groups=3)
    torch.testing.assert_close(mix(x), expected, rtol=0, atol=1e-12)


def test_a_phase_mix_trains_in_bfloat16() -> None:
    mix = PhaseMix(3)
    fill(mix)
    x = noise(2, 3, 6, 9).float()
    expected = mix(x)
    expected.square().sum().backward()
    expected_grad = gradient(mix.weight)
    mix.weight.grad = None
    mix.to(torch.bfloat16)
    output = mix(x.bfloat16())
    output.square().sum().backward()
    assert output.dtype == gradient(mix.weight).dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(gradient(mix.weight).float(), expected_grad, rtol=0.05, atol=0.05)


# Levels of which some are packed and some are not, as in the networks.
PYRAMIDS = {
    "four levels": ((3, 5, 7, 9), (1, 4, 8, 16)),
    "three levels": ((3, 5, 7), (1, 4, 8)),
    "all packed": ((7, 9), (16, 16)),
    "none packed": ((3, 5), (16, 16)),
}


def pyramid(name: str, stride: int, spd: bool = False, dilation: int = 1) -> PyConv2d:
    kernels, groups = PYRAMIDS[name]
    layer = PyConv2d(16, [16] * len(kernels), kernels, groups, stride, dilation, spd, dtype=torch.float64)
    fill(layer)
    return layer


def plainly(layer: PyConv2d, x: Tensor) -> Tensor:
    """The levels one by one, each as an ordinary convolution."""
    levels: Any = layer.values()
    return torch.cat([F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups) for c in levels], 1)


def gradients(output: Tensor, x: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    weights = noise(*output.shape)
    return torch.autograd.grad((output * weights).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_packed_pyramid_equals_plain_convolutions(name: str, stride: int, size: tuple[int, int]) -> None:
    layer = pyramid(name, stride)
    x = noise(2, 16, *size).requires_grad_()
    output, expected = layer(x), plainly(layer, x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for actual, wanted in zip(gradients(output, x, layer), gradients(expected, x, layer), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_with_space_to_depth_equals_a_strided_one(name: str, size: tuple[int, int]) -> None:
    strided, layer = pyramid(name, 2), pyramid(name, 2, spd=True)
    levels: Any = layer.items()
    layer.load_state_dict({f"{key}.weight": level.from_strided(strided[key].weight) for key, level in levels})
    x = noise(2, 16, *size)
    torch.testing.assert_close(layer(x), plainly(strided, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_packed_pyramid_with_space_to_depth_equals_its_levels(name: str, size: tuple[int, int]) -> None:
    layer = pyramid(name, 2, spd=True)
    x = noise(2, 16, *size).requires_grad_()
    output, expected = layer(x), torch.cat([level(x) for level in layer.values()], 1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for actual, wanted in zip(gradients(output, x, layer), gradients(expected, x, layer), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dilation", [2, 4])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_dilated_pyramid_keeps_the_size_and_equals_plain_convolutions(name: str, dilation: int) -> None:
    layer = pyramid(name, 1, dilation=dilation)
    x = noise(2, 16, 13, 16)
    assert layer(x).shape[-2:] == x.shape[-2:]
    torch.testing.assert_close(layer(x), plainly(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("spd", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pyramid_follows_autocast(stride: int, spd: bool) -> None:
    layer = pyramid("four levels", stride, spd).float()
    x = noise(2, 16, 15, 18).float()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert {gradient(parameter).dtype for parameter in layer.parameters()} == {torch.float32}
    assert (output.float() - expected).std() < 0.01 * expected.std()


def test_a_pyramid_keeps_channels_last_maps_correct() -> None:
    layer = pyramid("four levels", 1)
    x = noise(2, 16, 15, 18)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), plainly(layer, x), rtol=0, atol=1e-10)


def test_a_pyramid_refuses_levels_of_different_number() -> None:
    with pytest.raises(ValueError, match="longer"):
        PyConv2d(16, [8, 8], (3, 5, 7), (1, 1, 1))


# What is attached to a level acts, as on any module


def narrow_levels(layer: PyConv2d, x: Tensor) -> list[str]:
    """The levels that are not called, because they are computed four pixels at a time."""
    with pytest.MonkeyPatch.context() as patch:
        packed: list[str] = []
        real = blocks._four_at_a_time
        names = {id(level): name for name, level in layer.items()}

        def noted(level: nn.Conv2d, x: Tensor) -> Tensor:
            packed.append(names[id(level)])
            return real(level, x)

        patch.setattr(blocks, "_four_at_a_time", noted)
        layer(x)
    return packed


FORMS = [(1, False), (2, False), (2, True)]


@pytest.fixture(params=FORMS, ids=["stride 1", "stride 2", "space-to-depth"])
def packed_pyramid(request: pytest.FixtureRequest) -> PyConv2d:
    """A pyramid some of whose levels are computed four pixels at a time."""
    layer = pyramid("four levels", *request.param)
    assert "conv2_4" in narrow_levels(layer, noise(1, 16, 8, 8))
    return layer


def test_every_kind_of_hook_on_a_level_runs(packed_pyramid: PyConv2d) -> None:
    ran: list[str] = []
    for name, level in packed_pyramid.items():
        level.register_forward_hook(lambda *_, name=name: ran.append(f"forward {name}"))
        level.register_forward_pre_hook(lambda *_, name=name: ran.append(f"before {name}"), with_kwargs=False)
        level.register_full_backward_hook(lambda *_, name=name: ran.append(f"backward {name}"))
        level.register_full_backward_pre_hook(lambda *_, name=name: ran.append(f"before backward {name}"))
    packed_pyramid(noise(1, 16, 9, 8).requires_grad_()).sum().backward()
    events = ("forward", "before", "backward", "before backward")
    assert sorted(ran) == sorted(f"{event} {name}" for event in events for name in packed_pyramid)


@pytest.mark.parametrize(
    "register",
    [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook],
    ids=["forward", "before"],
)
def test_hooks_on_all_modules_see_every_level(
    packed_pyramid: PyConv2d, register: Callable[..., torch.utils.hooks.RemovableHandle]
) -> None:
    seen = []
    handle = register(lambda module, *_: seen.append(module))
    packed_pyramid(noise(1, 16, 9, 8))
    handle.remove()
    assert all(any(level is module for module in seen) for level in packed_pyramid.values())


def test_what_a_hook_returns_replaces_the_output(packed_pyramid: PyConv2d) -> None:
    x = noise(1, 16, 9, 8)
    expected = packed_pyramid(x)
    handle = packed_pyramid["conv2_4"].register_forward_hook(lambda module, args, output: -output)
    expected[:, -16:].neg_()
    torch.testing.assert_close(packed_pyramid(x), expected, rtol=0, atol=1e-10)
    handle.remove()
    expected[:, -16:].neg_()
    torch.testing.assert_close(packed_pyramid(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("patched", ["forward", "_conv_forward"])
def test_a_patched_forward_is_run(patched: str) -> None:
    layer, x = pyramid("four levels", 1), noise(1, 16, 9, 8)
    level = layer["conv2_4"]
    real = getattr(level, patched)
    setattr(level, patched, lambda *args: real(*args) + 1)
    torch.testing.assert_close(layer(x)[:, -16:], plainly(layer, x)[:, -16:] + 1, rtol=0, atol=1e-10)


def test_a_patched_class_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = pyramid("four levels", 1), noise(1, 16, 9, 8)
    real = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda level, x: real(level, x) + 1)
    torch.testing.assert_close(layer(x), plainly(layer, x) + 1, rtol=0, atol=1e-10)


def halve(weight: Tensor) -> Tensor:
    return weight / 2


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return halve(weight)


def test_pruned_and_parametrized_weights_act_and_train(packed_pyramid: PyConv2d) -> None:
    x = noise(1, 16, 9, 8)
    level: Any = packed_pyramid["conv2_4"]
    parametrize.register_parametrization(packed_pyramid["conv2_3"], "weight", Halved())
    prune.l1_unstructured(level, "weight", amount=0.5)
    for _ in range(3):
        expected = torch.cat([level(x) for level in packed_pyramid.values()], 1)
        output = packed_pyramid(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        output.square().sum().backward()
        torch.optim.SGD(packed_pyramid.parameters(), 1e-3).step()
    assert (level.weight == 0).double().mean() >= 0.5
    prune.remove(level, "weight")
    expected = torch.cat([level(x) for level in packed_pyramid.values()], 1)
    torch.testing.assert_close(packed_pyramid(x), expected, rtol=0, atol=1e-10)
    assert narrow_levels(packed_pyramid, x).count("conv2_4") == 1  # nothing is attached to it any more


def test_weights_of_functional_call_and_new_weights_act(packed_pyramid: PyConv2d) -> None:
    x = noise(1, 16, 9, 8)
    expected = packed_pyramid.eval()(x)
    doubled = {name: 2 * weight for name, weight in packed_pyramid.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(packed_pyramid, doubled, x), 2 * expected)
    level: Any = packed_pyramid["conv2_4"]
    with torch.no_grad():
        level.weight.mul_(3)
        torch.testing.assert_close(packed_pyramid(x)[:, -16:], 3 * expected[:, -16:])


def test_a_level_whose_attributes_were_changed_follows_them() -> None:
    layer, x = PyConv2d(16, [16], [9], [16], dtype=torch.float64), noise(1, 16, 9, 8)
    fill(layer)
    assert narrow_levels(layer, x)
    level: Any = layer["conv2_1"]
    level.padding_mode = "circular"
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x, [4] * 4, "circular"), level.weight, groups=16))
    level.padding_mode, level.padding = "zeros", (3, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, level.weight, padding=(3, 5), groups=16))
    level.stride = (1, 2)
    torch.testing.assert_close(layer(x), F.conv2d(x, level.weight, None, (1, 2), (3, 5), groups=16))


def test_operator_counters_see_the_convolutions_as_they_are_written(packed_pyramid: PyConv2d) -> None:
    x = noise(1, 16, 16, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = packed_pyramid(x)
    pixels = output.shape[-2:].numel()
    assert counter.get_total_flops() == 2 * pixels * sum(weight.numel() for weight in packed_pyramid.parameters())


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_torch_compile_takes_a_pyramid_whole_and_packed(packed_pyramid: PyConv2d) -> None:
    x, graphs = noise(1, 16, 9, 8), []
    torch._dynamo.reset()

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(packed_pyramid, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x), packed_pyramid(x), rtol=0, atol=1e-10)
    assert "pixel_shuffle(phases" in graphs[0].code


# Recorded computations are right at every size

RECORDED: dict[str, Any] = {
    "pyramid": lambda: PyConv2d(4, [8, 8], (3, 5), (1, 4)),
    "pyramid, stride 2": lambda: PyConv2d(4, [8, 8], (3, 5), (1, 4), 2),
    "pyramid, space-to-depth": lambda: PyConv2d(4, [8, 8], (3, 5), (1, 4), 2, spd=True),
    "space-to-depth": SpaceToDepth,
    "SPDConv2d": lambda: SPDConv2d(4, 8, 3),
    "SPDConv2d, same": lambda: SPDConv2d(4, 8, 3, padding="same"),
    "SPDConv2d, same, 1x1": lambda: SPDConv2d(4, 8, 1, padding="same"),
    "SPDConv2d, reflect": lambda: SPDConv2d(4, 8, 3, padding=1, padding_mode="reflect"),
    "PhaseMix": lambda: PhaseMix(4),
    "average": lambda: SPDAvgPool2d(4, 3, padding=1, count_include_pad=False),
    "average, ceil_mode": lambda: SPDAvgPool2d(4, 3, ceil_mode=True),
    "MaxPool2d": lambda: MaxPool2d(3, 2, 1),
    "maximum": lambda: SPDMaxPool2d(4, 3, padding=1),
    "maximum, same": lambda: SPDMaxPool2d(4, 3, padding="same"),
    "maximum, ceil_mode": lambda: SPDMaxPool2d(4, 3, ceil_mode=True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("chs", [4, 40])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (3, 2, 1), (5, 2, 1), ((3, 2), 2, (0, 1))]
)
def test_max_pooling_is_torchs(kernel: Any, stride: Any, padding: Any, chs: int, layout: torch.memory_format) -> None:
    ours, torchs = MaxPool2d(kernel, stride, padding), nn.MaxPool2d(kernel, stride, padding)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, chs, 13, 10).relu().to(dtype)  # with ties
        x[0, 1, 5, 5], x[1, 2, 3, 3] = math.nan, -math.inf
        x = x.to(memory_format=layout)
        expected = torchs(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0, equal_nan=True)
        assert ours(x).stride() == expected.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (5, 2, 1)])
def test_max_pooling_has_torchs_gradients(kernel: int, stride: int, padding: int, layout: torch.memory_format) -> None:
    gradients = []
    x = torch.randn(2, 4, 13, 10).relu()  # with ties: the gradient goes to the first maximum
    weight = torch.randn(nn.MaxPool2d(kernel, stride, padding)(x).shape)
    for pool in (MaxPool2d(kernel, stride, padding), nn.MaxPool2d(kernel, stride, padding)):
        leaf = x.clone(memory_format=layout).requires_grad_()
        (pool(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_max_pooling_refuses_a_map_smaller_than_its_window() -> None:
    with pytest.raises(RuntimeError, match="too small"):
        MaxPool2d(3)(torch.zeros(1, 2, 2, 5))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated")  # of two classes, by torch's version
@pytest.mark.parametrize("make", RECORDED.values(), ids=list(RECORDED))
def test_a_traced_layer_is_right_at_other_sizes_than_the_traced_one(make: Callable[[], nn.Module]) -> None:
    layer = make().eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(1, 4, 16, 16), check_trace=False)
        for size in ((16, 16), (9, 8), (7, 11), (5, 6)):
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECORDED.keys() - {"space-to-depth", "average, ceil_mode"}))
def test_an_exported_layer_is_right_at_other_sizes_than_the_exported_one(name: str) -> None:
    # torch refuses to export the two layers that are left out with a free height and width
    layer = RECORDED[name]().eval()
    sizes = ({2: torch.export.Dim("height", min=6), 3: torch.export.Dim("width", min=6)},)
    exported = torch.export.export(layer, (torch.randn(2, 4, 16, 16),), dynamic_shapes=sizes).module()
    with torch.no_grad():
        for size in ((16, 16), (9, 8), (7, 11)):
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(exported(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        SPDConv2d(4, 8, 1, padding="same"),
        SPDMaxPool2d(4, 3, padding=1),
        SPDMaxPool2d(4, 2, ceil_mode=True),
        SPDMaxPool2d(4, 3, padding="same"),
        SPDAvgPool2d(4, 2),
        SPDAvgPool2d(4, 3, padding="same"),
        SPDAvgPool2d(4, 3, padding=1, count_include_pad=False),
        SPDAvgPool2d(4, 2, ceil_mode=True),
    ],
    ids=str,
)
def test_a_scripted_layer_is_right_where_padding_depends_on_the_size(layer: nn.Module) -> None:
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):  # by torch's version
        scripted = torch.jit.script(layer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(2, 4, 9, 8).to(dtype)
        torch.testing.assert_close(scripted.to(dtype)(x), layer.to(dtype)(x))


# SPDConv2d instead of nn.Conv2d


def test_an_spd_convolution_takes_the_arguments_of_a_convolution_in_their_order() -> None:
    plain = nn.Conv2d(8, 12, (3, 5), (2, 2), (1, 2), (1, 1), 4, False, "zeros", dtype=torch.float64)
    layer = SPDConv2d(8, 12, (3, 5), (2, 2), (1, 2), (1, 1), 4, False, "zeros", dtype=torch.float64)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(plain, name), name
    with torch.no_grad():
        layer.weight.copy_(layer.from_strided(plain.weight))
    x = noise(1, 8, 9, 12)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"the same for both axes, got \(2, 1\)"):
        SPDConv2d(3, 8, 3, (2, 1))


@pytest.mark.parametrize("padding", [1, (0, 2), "same"], ids=str)
def test_a_layer_made_from_the_attributes_of_another_has_its_output_size(padding: Any) -> None:
    conv: Any = SPDConv2d(8, 12, 3, padding=padding)
    twin = type(conv)(conv.in_channels, 4, conv.kernel_size, conv.stride, conv.padding, bias=False)
    for size in SIZES[2:]:
        assert twin(torch.zeros(1, 8, *size)).shape[2:] == conv(torch.zeros(1, 8, *size)).shape[2:]
    assert type(conv)(4, 12, (1, 1), (1, 1), groups=2, bias=True)(torch.zeros(1, 4, 5, 6)).shape == (1, 12, 5, 6)


# Padding-free downsampling and what comes with it


@pytest.mark.parametrize(("kernel_size", "pool_size"), [(3, 3), (5, 3), (5, 5)])
def test_padding_free_downsampling_adds_a_pool_of_the_same_windows(kernel_size: int, pool_size: int) -> None:
    torch.manual_seed(0)
    layer: Any = PaddingFreeDownsample(6, 6, kernel_size, groups=6, act_layer=nn.ReLU, pool_size=pool_size).eval()
    x = torch.randn(2, 6, 32, 15)
    with torch.inference_mode():
        conv = F.conv2d(x, layer.conv.weight, None, 2, kernel_size // 2 - 1, groups=6)
        expected = F.relu(layer.bn(conv)) + F.max_pool2d(x, pool_size, 2, pool_size // 2 - 1)
        assert expected.shape == (2, 6, 15, 7)
        torch.testing.assert_close(layer(x), expected)


def test_padding_free_downsampling_refuses_what_it_cannot_add() -> None:
    with pytest.raises(ValueError, match="6 pooled channels cannot be added to 8 without project=True"):
        PaddingFreeDownsample(6, 8)
    with pytest.raises(ValueError, match="must be 3 or 5, got 7 and 3"):
        PaddingFreeDownsample(6, 6, 7)
    with pytest.raises(ImageSizeError, match="at least 3x3 pixels, got 2x9: give larger images"):
        PaddingFreeDownsample(6, 6)(torch.zeros(1, 6, 2, 9))


@pytest.mark.parametrize("pre_activation", [False, True])
@pytest.mark.parametrize(("stride", "inner_stride"), [(1, 1), (2, 1), (2, 2)])
def test_the_hybrid_stem_divides_the_size_by_its_strides(pre_activation: bool, stride: int, inner_stride: int) -> None:
    stem = HybridStem(3, 8, stride, inner_stride, pre_activation=pre_activation)
    height, width = (math.ceil(math.ceil(side / stride) / inner_stride) for side in (33, 30))
    assert stem(torch.randn(2, 3, 33, 30)).shape == (2, 8, height, width)


def test_a_residual_hybrid_stem_adds_its_first_convolution() -> None:
    torch.manual_seed(0)
    stem = HybridStem(3, 8, residual=True).eval()
    plain = HybridStem(3, 8).eval()
    plain.load_state_dict(stem.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(stem(x), plain(x) + stem.conv(x))
    with pytest.raises(ValueError, match="inner_stride=1, got 2"):
        HybridStem(3, 8, inner_stride=2, residual=True)


@pytest.mark.parametrize("layer", [BSConvU2d, BSConvS2d])
def test_blueprint_separable_convolutions_are_products_of_matrices_and_one_kernel_per_channel(layer: type) -> None:
    torch.manual_seed(0)
    conv = layer(16, 24, 3, stride=2, padding=1)
    mix = conv.pw.weight if layer is BSConvU2d else torch.einsum("omij,mcij->ocij", conv.pw2.weight, conv.pw1.weight)
    whole = mix * conv.dw.weight  # (out, in, 1, 1) * (out, 1, 3, 3)
    x = torch.randn(2, 16, 9, 8)
    torch.testing.assert_close(conv(x), F.conv2d(x, whole, None, 2, 1))
    assert layer is BSConvU2d or conv.pw1.weight.shape == (4, 16, 1, 1)


def test_orthonormality_is_zero_only_for_orthonormal_kernels() -> None:
    rows = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))[0].T[:, :, None, None]
    assert orthonormality(rows).item() == pytest.approx(0, abs=1e-5)
    assert orthonormality(2 * rows).item() == pytest.approx(3 * 4**0.5, rel=1e-5)  # |4 I - I|


@pytest.mark.parametrize("axis", [0, 1])
def test_the_circular_convolution_reads_the_whole_axis_and_wraps_around(axis: int) -> None:
    torch.manual_seed(0)
    layer: Any = PositionAwareCircularConv2d(4, (6, 5), axis, position=True)
    nn.init.normal_(layer.pe)
    x = torch.randn(2, 4, 6, 5)
    with torch.inference_mode():
        actual = layer(x)
        kernel = layer.conv.weight.flatten(1)
        for i in range(x.shape[2 + axis]):
            window = (x + layer.pe).roll(-i, 2 + axis).movedim(2 + axis, -1)  # starts at place i
            expected = torch.einsum("nckt,ct->nck", window, kernel) + layer.conv.bias[:, None]
            torch.testing.assert_close(actual.select(2 + axis, i), expected)
    with pytest.raises(ImageSizeError, match="built for maps of 6x5 pixels and got 6x6"):
        layer(torch.zeros(1, 4, 6, 6))


def test_attention_downsampling_is_timms() -> None:
    torch.manual_seed(0)
    ours, theirs = AttentionDownsample(16, 24, (7, 10)).eval(), Downsample(16, 24, resolution=(7, 10), use_attn=True)
    nn.init.normal_(ours.attn.attention_biases)
    theirs.load_state_dict(ours.state_dict())
    theirs.attn.eval(), theirs.conv.eval()
    x = torch.randn(2, 16, 7, 10)
    with torch.inference_mode():
        assert ours(x).shape == (2, 24, 4, 5)
        torch.testing.assert_close(ours(x), theirs(x))


def test_attention_is_resampled_to_maps_of_another_size() -> None:
    layer: Any = AttentionDownsample(16, 24, (7, 10)).eval()
    nn.init.constant_(layer.attn.attention_biases, 0.5)
    layer.set_size((5, 8))
    assert layer.attn.attention_biases.shape[-1] == 5 * 8
    torch.testing.assert_close(layer.attn.attention_biases, torch.full_like(layer.attn.attention_biases, 0.5))
    with torch.inference_mode():
        assert layer(torch.randn(1, 16, 5, 8)).shape == (1, 24, 3, 4)
        with pytest.raises(ImageSizeError, match="built for maps of 5x8 pixels and got 7x10"):
            layer(torch.randn(1, 16, 7, 10))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_circular_kernel_keeps_its_answer_to_a_constant_map_at_another_size(axis: int) -> None:
    torch.manual_seed(0)
    layer = PositionAwareCircularConv2d(4, (6, 5), axis, position=False)
    with torch.inference_mode():
        before = layer(torch.ones(1, 4, 6, 5))
        layer.set_size((9, 8))
        after = layer(torch.ones(1, 4, 9, 8))
    assert after.shape == (1, 4, 9, 8)
    torch.testing.assert_close(after[:, :, :6, :5], before)


def test_the_form_of_a_level_is_the_faster_one_of_those_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX-512 and on one without; up to three tenths, by which measurements of a level may differ."""
    rows = [json.loads(line) for line in (ROOT / "tools" / "pyramids.jsonl").read_text(encoding="utf-8").splitlines()]
    times: defaultdict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        level = [row[key] for key in ("device", "in", "out", "kernel", "groups", "stride", "spd", "step")]
        times[tuple(level)].update({form: row[form] for form in ("grouped", "packed")})
    assert {device for device, *_ in times} == {"AVX512", "AVX2"}
    for (device, inputs, outputs, kernel, groups, stride, spd, step), milliseconds in times.items():
        monkeypatch.setattr(blocks, "_HAS_AVX512", device == "AVX512")
        strided_kernel = 2 * kernel - 1 if spd else kernel
        layer = PyConv2d(inputs, [outputs], [strided_kernel], [groups], stride, spd=spd).double()
        packed = narrow_levels(layer.train(step == "train"), noise(1, inputs, 4 * stride, 4 * stride))
        chosen = milliseconds["packed" if packed else "grouped"]
        assert chosen <= 1.3 * min(milliseconds.values()), (device, inputs, outputs, kernel, groups, stride, spd, step)
