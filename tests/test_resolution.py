"""Without its first strides a network accepts smaller images, with unchanged weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import noise, random_network
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame, LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils import prune

from spd_zoo import convert_to_spd, fold_spd, keep_resolution
from spd_zoo.spd import SPDConv2d
from spd_zoo.trace import image_size
from spd_zoo.weights import WeightsError, save_network

STEMS = {  # network -> what its first downsampling is
    "resnet18": "a 7x7 convolution, then max-pooling",
    "resnet10t": "a stem of three convolutions",
    "tf_efficientnet_lite0": "a convolution with TensorFlow's padding",
    "vgg11": "a 2x2 max-pooling",
    "convnext_atto": "a 4x4 convolution of stride 4",
    "test_nfnet": "weight-standardised convolutions",
    "resnetblur18": "a blur pooling at the second step",
    "skresnet18": "a selective-kernel network",
    "test_resnet": "a small network",
    "test_coatnet": "attention, which splits tensors of four axes",
}


def size_of(net: Any) -> tuple[int, int, int]:
    return tuple(net.pretrained_cfg["input_size"])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", STEMS)
def test_smaller_images_give_maps_of_the_same_size_as_full_ones(name: str, steps: int) -> None:
    net: Any = timm.create_model(name, device="meta").eval()
    kept: Any = keep_resolution(net, steps)
    channels, height, width = size_of(net)
    assert size_of(kept) == (channels, height // 2**steps, width // 2**steps)
    images, small = (torch.empty(1, *size_of(one), device="meta") for one in (net, kept))
    assert kept.forward_features(small).shape == net.forward_features(images).shape
    maps = kept.forward_intermediates(small, intermediates_only=True)
    for fmap, info in zip(maps, kept.feature_info, strict=True):
        assert fmap.shape[-2] == -(-small.shape[-2] // info["reduction"])
    assert kept.state_dict().keys() == net.state_dict().keys()


def test_the_first_convolution_computes_the_same_at_every_pixel() -> None:
    net = random_network("resnet18", num_classes=5)
    kept: Any = keep_resolution(net)
    x = noise(2, 3, 40, 56)
    with torch.inference_mode():
        full = F.conv2d(x, net.conv1.weight, padding=3)
        assert torch.equal(kept.conv1(x), full)
        torch.testing.assert_close(net.conv1(x), full[..., ::2, ::2])
        assert torch.equal(kept.maxpool(full), net.maxpool(full))  # steps=1 leaves the second one
    for key, tensor in kept.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[key])


def test_two_steps_also_remove_the_stride_of_the_pooling_and_three_that_of_both_branches() -> None:
    net: Any = keep_resolution(timm.create_model("resnet18", device="meta"), 3)
    strides = [net.conv1.stride, net.maxpool.stride, net.layer2[0].conv1.stride, net.layer2[0].downsample[0].stride]
    assert strides == [(1, 1), 1, (1, 1), (1, 1)]
    assert net.layer3[0].conv1.stride == (2, 2)
    dilations = {m.dilation for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert dilations == {(1, 1)}


def test_axes_that_change_places_are_no_downsampling() -> None:
    net = Plain(nn.Conv2d(3, 4, 3, 2, 1), LayerNorm2d(4), nn.Conv2d(4, 8, 3, 2, 1))  # LayerNorm2d needs channels last
    kept: Any = keep_resolution(net, 2, example_input=noise(1, 3, 32, 32))
    assert [kept[i].stride for i in (0, 2)] == [(1, 1), (1, 1)]


def test_a_copy_is_changed_unless_in_place() -> None:
    net: Any = timm.create_model("test_resnet", num_classes=3)
    before = copy.deepcopy(net)
    kept = keep_resolution(net)
    assert kept is not net and repr(net) == repr(before) and size_of(net) == size_of(before)
    assert net.feature_info == before.feature_info and net.pretrained_cfg == before.pretrained_cfg
    convs = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert keep_resolution(net, inplace=True) is net
    assert repr(net) == repr(kept)
    assert all(net.get_submodule(name) is module for name, module in convs.items())


class Plain(nn.Sequential):
    """No network of timm's."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)


@pytest.mark.parametrize(
    ("layer", "small"),
    [
        (nn.Conv2d(3, 4, 3, 2, 1), 1),
        (nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"), 1),
        (nn.Conv2d(3, 4, 5, 2, 4, dilation=2), 1),
        (nn.Conv2d(3, 4, 2, 2), 1),
        (nn.Conv2d(3, 4, 8, 8), 4),
        (nn.Conv2d(3, 4, 1, 2), 1),
        (nn.MaxPool2d(3, 2, 1), 1),
        (nn.MaxPool2d(3, 2, ceil_mode=True), 1),
        (nn.AvgPool2d(2, 2), 1),
        (nn.AvgPool2d(4, 4), 2),
    ],
    ids=str,
)
def test_every_convolution_and_pooling_keeps_the_size_of_its_map(layer: Any, small: int) -> None:
    net = Plain(layer, nn.Conv2d(3 if not isinstance(layer, nn.Conv2d) else 4, 2, 3, 2, 1))
    kept: Any = keep_resolution(net, example_input=noise(1, 3, 64, 48))
    expected = net(noise(1, 3, 64, 48)).shape
    assert kept(noise(1, 3, 32, 24)).shape == expected
    assert kept[0].stride in (small, (small, small))


def test_a_layer_that_is_replaced_keeps_its_hooks() -> None:
    net = Plain(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 2, 3, 2, 1))
    calls: list[str] = []
    handles = [
        net[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True),
        net[0].register_forward_hook(lambda module, args, kwargs, output: calls.append("after"), with_kwargs=True),
    ]
    kept: Any = keep_resolution(net, inplace=True, example_input=noise(1, 3, 32, 32))
    assert type(kept[0]) is Conv2dSame
    calls.clear()
    kept(noise(1, 3, 16, 16))
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    kept(noise(1, 3, 16, 16))
    assert calls == ["before", "after"]


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.max_pool2d(x, 2))


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Sliced(), "Sliced downsamples first, by max_pool2d_with_indices; only the stride of a convolution"),
        (
            Plain(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3, 2, 1)),
            r"PixelUnshuffle \(0\) downsamples first, by pixel_unshuffle",
        ),
        (Plain(nn.Conv2d(3, 4, 3, (2, 1), 1)), r"0 has stride \(2, 1\), which cannot be halved"),
        (Plain(nn.Conv2d(3, 4, 3, 3, 1)), r"0 has stride \(3, 3\), which cannot be halved"),
        (
            Plain(nn.Conv2d(3, 4, 3, 1, 1)),
            "there is no stride to remove",
        ),
        (Plain(SPDConv2d(3, 4, 3)), r"call keep_resolution before convert_to_spd, or, .*, on spd_zoo\.fold_spd"),
    ],
    ids=["function", "space-to-depth", "rows", "three", "none", "converted"],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(net: nn.Module, why: str) -> None:
    before = repr(net)
    with pytest.raises(ValueError, match=why):
        keep_resolution(net, inplace=True, example_input=noise(1, 3, 36, 36))
    assert repr(net) == before


def test_what_depends_on_the_size_of_the_images_is_refused() -> None:
    net = timm.create_model("vit_tiny_patch16_224", device="meta")
    with pytest.raises(ValueError, match="VisionTransformer does not accept images of 112x112 pixels"):
        keep_resolution(net)
    with pytest.raises(ValueError, match="VisionTransformer counts its maps in patches of a fixed size"):
        keep_resolution(timm.create_model("test_vit", device="meta"))  # takes images of any size
    with pytest.raises(ValueError, match="places its boxes by the strides of its maps"):
        keep_resolution(timm.create_model("yolov8n", device="meta"))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        keep_resolution(net, 0)
    with pytest.raises(ValueError, match="example_input"):
        keep_resolution(Plain(nn.Conv2d(3, 4, 3, 2, 1)))


@pytest.mark.parametrize("convert", [False, True], ids=["kept", "then converted"])
def test_a_saved_network_is_what_it_was(convert: bool, tmp_path: Path) -> None:
    net: Any = keep_resolution(keep_resolution(random_network("test_resnet", num_classes=3)), 1)
    if convert:
        net = convert_to_spd(net)
    save_network(net, tmp_path)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = noise(2, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(again(x), net(x))
        maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()(x)
        assert torch.equal(maps[-1], net.forward_intermediates(x, intermediates_only=True)[-1])
    assert size_of(again) == size_of(net) and again._model_args["sizes"] == net._model_args["sizes"]
    assert len(net._model_args["sizes"]) == 2


def test_a_network_that_could_not_be_loaded_again_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    folded = fold_spd(convert_to_spd(random_network("test_resnet", num_classes=3)))
    for net in (timm.create_model("test_resnet", features_only=True), nn.DataParallel(random_network("test_resnet"))):
        with pytest.raises(WeightsError, match="is not a whole network of timm"):
            save_network(net, tmp_path / "folded")
    changed: Any = random_network("test_resnet")
    changed.fc = nn.Linear(changed.num_features, 5)
    with pytest.raises(WeightsError, match="the classifier fc has 5 outputs, but the network's num_classes is 1000"):
        save_network(changed, tmp_path / "folded")
    for net in (folded, keep_resolution(folded)):
        with pytest.raises(WeightsError, match="a folded network cannot be loaded again, and so is not saved"):
            save_network(net, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_saved_network_keeps_the_size_that_it_was_changed_for(tmp_path: Path) -> None:
    net: Any = random_network("convnext_atto", num_classes=3)
    kept: Any = keep_resolution(net, example_input=noise(1, 3, 227, 227))
    save_network(kept, tmp_path)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = noise(2, 3, 114, 114)
    with torch.inference_mode():
        assert torch.equal(again(x), kept(x))
    assert size_of(again) == (3, 114, 114)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_parc_mobilenetv2", "cifar_ghostnet_effdown"])
def test_a_network_made_for_one_size_is_then_made_for_the_smaller_one(name: str, tmp_path: Path) -> None:
    kept: Any = keep_resolution(random_network(name, num_classes=3))
    assert image_size(kept, None) == size_of(kept) == (3, 16, 16)
    for saved in (kept, convert_to_spd(kept)):
        save_network(saved, tmp_path)
        again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = noise(2, 3, 16, 16)
        with torch.inference_mode():
            assert torch.equal(again(x), saved(x))
        assert image_size(again, None) == size_of(again) == (3, 16, 16)


@pytest.mark.slow
def test_a_network_made_for_one_size_can_be_halved_again_or_made_for_another_size(tmp_path: Path) -> None:
    kept: Any = keep_resolution(random_network("cifar_parc_mobilenetv2", num_classes=3))
    changed: Any = copy.deepcopy(kept)
    changed.set_input_size(24)
    for net, side in ((keep_resolution(kept), 8), (changed, 24)):
        save_network(net, tmp_path)
        again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert image_size(again, None) == size_of(again) == (3, side, side)
        x = noise(2, 3, side, side)
        with torch.inference_mode():
            assert torch.equal(again(x), net(x))


@pytest.mark.slow
def test_a_network_that_cannot_be_made_for_another_size_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("timm.models.maxxvit.MaxxVit.set_input_size")
    save_network(keep_resolution(random_network("test_coatnet", num_classes=3)), tmp_path)
    with pytest.raises(
        ValueError, match=r"test_coatnet cannot be changed to img_size=\(96, 96\); create it with another"
    ):
        timm.create_model(f"local-dir:{tmp_path}", img_size=(96, 96))


@pytest.mark.slow
def test_a_saved_network_is_adapted_to_other_image_channels_as_its_original(tmp_path: Path) -> None:
    net: Any = random_network("cifar_resnet20", num_classes=3)
    save_network(net, tmp_path / "original")
    save_network(keep_resolution(net), tmp_path / "kept")
    original, kept = (
        timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True, in_chans=1).eval()
        for folder in ("original", "kept")
    )
    x = noise(2, 1, *(side // 2 for side in size_of(net)[1:]))
    with torch.inference_mode():
        assert torch.equal(kept(x), keep_resolution(original)(x))


@pytest.mark.slow
def test_damaged_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    save_network(keep_resolution(random_network("test_resnet", num_classes=3)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"conv1.0.weight": noise(2, 3, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"does not fit test_resnet after keep_resolution: conv1\.0\.weight has shape"
    ):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_half_a_step_is_refused() -> None:
    half: Any = 1.5
    with pytest.raises(ValueError, match=r"^steps, the number of times .*, must be a whole number, got 1\.5$"):
        keep_resolution(timm.create_model("cifar_resnet20", device="meta"), half)


def test_a_config_that_only_counts_steps_is_read(tmp_path: Path) -> None:
    net: Any = keep_resolution(random_network("test_resnet", num_classes=3), 2)
    save_network(net, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["sizes"]
    config["model_args"]["steps"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = noise(2, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(again(x), net(x))


def test_the_name_of_saved_networks_cannot_be_created_directly() -> None:
    with pytest.raises(ValueError, match="resolution_kept needs a saved network"):
        timm.create_model("resolution_kept")


def test_a_network_without_strides_has_none_to_take_away() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    with pytest.raises(ValueError, match=r"no convolution and no pooling of Sequential .* no stride to remove"):
        keep_resolution(net, example_input=torch.zeros(1, 3, 32, 32))


class LargeImages(nn.Module):
    """A network that takes no images below 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 32:
            raise RuntimeError("images of 32 pixels at least\nC++ stack trace")
        return self.conv(x)


def test_a_network_that_takes_no_smaller_images_stays_as_it_was() -> None:
    net = LargeImages()
    reason = r"does not accept images of 16x16 pixels without the stride of conv: images of 32 pixels at least$"
    with pytest.raises(ValueError, match=reason):
        keep_resolution(net, inplace=True, example_input=torch.zeros(1, 3, 32, 32))
    assert net.conv.stride == (2, 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("attach", "message"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
        (lambda conv: prune.identity(conv, "weight"), r"prune\.remove"),
    ],
    ids=["weight_norm", "parametrization", "prune"],
)
def test_an_even_kernel_that_is_computed_is_refused(attach: Callable[[nn.Module], object], message: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2)).eval()
    attach(net[0])
    images = torch.randn(1, 3, 8, 8)
    before = net(images)
    with pytest.raises(ValueError, match=rf"0 has an even kernel .*make (it|the weight) permanent first .*{message}"):
        keep_resolution(net, example_input=images, inplace=True)
    assert torch.equal(net(images), before)
