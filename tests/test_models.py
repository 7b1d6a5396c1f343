"""The networks give the same outputs as the authors' networks, and follow timm's conventions."""

import copy
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import golden
import pytest
import timm
import timm_contract
import torch
import torch.nn.functional as F
from networks import assert_close, authors_tensors, config_of, load, noise, random_network
from PIL import Image
from shared_data import shared
from timm.layers import DropPath
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import to_tensor

import spd_zoo
from spd_zoo.blocks import ImageSizeError, PositionAwareCircularConv2d
from spd_zoo.models._classifier import Classifier, HiddenLayerHead
from spd_zoo.models.pyconvresnet import Bottleneck, PyConvResNet
from spd_zoo.spd import PhaseMix, SpaceToDepth, SPDConv2d
from spd_zoo.weights import save_network
from spd_zoo.weights.fit import own_networks

NETWORKS = timm_contract.own_networks(Classifier)
ARCHITECTURES = timm_contract.one_per_architecture(NETWORKS)
CASES = [case for family in ("pyconv", "spd_resnet", "pfd_bsconv", "pfd_mobile") for case in golden.cases(family)]
PYCONV = ["pyconvresnet18", "pyconvresnet50", "pyconvhgresnet50", "pyconvresnet50_spd"]
SPD_TWINS = [("pyconvresnet50", "pyconvresnet50_spd"), ("pyconvhgresnet50", "pyconvhgresnet50_spd")]
SPD_RESNETS = ["resnet18_spd", "resnet50_spd"]
FIXED_SIZE = [name for name in NETWORKS if config_of(name).fixed_input_size]
PADDING_FREE = ("_pfd", "_down")
RESIDUAL = [name for name in ARCHITECTURES if "shufflenet" not in name]
FAST = {timm.model_entrypoint(name).__module__: name for name in reversed(ARCHITECTURES)}.values()  # one per file
SLOW: dict[str, Any] = {
    name: pytest.mark.slow if name in ARCHITECTURES else pytest.mark.exhaustive for name in NETWORKS
}
SLOW |= dict.fromkeys(FAST, ())
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.exhaustive) for name in ARCHITECTURES]
FEW = [pytest.param(name, marks=[] if "pyconv" in name else pytest.mark.exhaustive) for name in ARCHITECTURES]
IMAGE_NORM = [
    name
    for name in NETWORKS
    if isinstance(timm.create_model(name, device="meta").get_submodule("stem.0"), nn.BatchNorm2d)
]
TRACED = [  # one of every way to compute
    *("pyconvresnet18", "pyconvresnet50_spd", "resnet18_spd", "cifar_resnet20_pfd", "cifar_ghostnet_effdown"),
    *("cifar_parc_mobilenetv2_pfd", "cifar_shufflenetv2_pfd", "yolov5n_spd", "yolov8n_spd", "ssd_mobilenetv1"),
]
ALL = [pytest.param(name, marks=[] if name in FAST else pytest.mark.exhaustive) for name in NETWORKS]


def twins() -> list[Any]:
    """Every case with its network and, where there is one, the network with space-to-depth that computes the same."""
    params = []
    for case in CASES:
        for name in {case["model"], f"{case['model']}_spd"} & set(NETWORKS):
            params.append(pytest.param(case, name, marks=SLOW[name], id=f"{case['id']}-{name}"))
    return sorted(params, key=lambda param: str(param.id))


def case_of(name: str) -> dict[str, Any]:
    """The case of a network, or of its strided twin, with the smallest input."""
    own = [case for case in CASES if case["model"] == name.removesuffix("_spd") or case["model"] == name]
    return min(own, key=lambda case: case["macs"])


def image_size(name: str, *size: int) -> dict[str, Any]:
    """The argument with which a network takes images of `size`, if it needs one."""
    return {"img_size": size} if name in FIXED_SIZE else {}


def images(name: str, count: int, height: int, width: int) -> Tensor:
    """Noise of the size given, or of the one that the network takes, or not too small for it."""
    if name in FIXED_SIZE:
        return noise(count, *config_of(name).input_size)
    if name.endswith("_pfd") and not name.startswith("cifar_"):
        return noise(count, 3, 2 * height, 2 * width)
    return noise(count, 3, height, width)


# What the authors' networks compute


@pytest.mark.parametrize(("case", "name"), twins())
def test_computes_what_the_authors_code_computes(case: dict[str, Any], name: str, save: Any) -> None:
    net = load(name, save(authors_tensors(case)), **case["model_args"])
    assert sum(parameter.numel() for parameter in net.parameters()) == case["params"] or name != case["model"]
    x = torch.from_numpy(golden.make_input(**case["input"]))
    with torch.inference_mode():
        for scale, recorded in ((1, case), (case["stress"]["input_scale"], case["stress"])):
            maps = maps_of(net, case, recorded.get("features", ()))
            golden.assert_matches(net(x * scale).numpy(), recorded["outputs"][0])
            for upstream, expected in recorded.get("features", {}).items():
                golden.assert_matches(maps[upstream].numpy(), expected)
        y = net.double()(x.double())
    golden.assert_matches((y[0] - y[1]).numpy(), case["batch_difference_float64"])
    if "reg_loss" in case:
        assert net.regularization == case["reg_loss"]["alpha"]
        assert net.regularization_loss().item() == pytest.approx(case["reg_loss"]["value"], rel=1e-5)


def maps_of(net: nn.Module, case: dict[str, Any], upstream: Any) -> dict[str, Tensor]:
    """What the authors' modules `upstream` give, by our blocks: filled when `net` runs.

    The output of a module of theirs is that of our block, or of our stem or head, which has its last tensor.
    """
    filter_fn = sys.modules[type(net).__module__].checkpoint_filter_fn
    tensors = authors_tensors(case)
    maps: dict[str, Tensor] = {}
    for name in upstream:
        keys = [key for key in tensors if key.startswith(f"{name}.") and not key.endswith(".attention_bias_idxs")]
        place = "stem"  # of an activation or a pool, which have no tensors
        if keys:
            (ours,) = filter_fn({keys[-1]: tensors[keys[-1]]}, net)
            block = re.match(r"stages\.\d+\.\d+|stem|head\.hidden", ours)
            assert block, ours
            place = {"head.hidden": "head.act"}.get(block[0], block[0])
        if name == "backbone.data_bn":
            place = "stem.0"

        def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            maps[name] = output.clone()

        net.get_submodule(place).register_forward_hook(keep)
    return maps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyconvresnet18", "pyconvresnet50_spd", "resnet18_spd"])
def test_checkpoints_load_from_every_container(name: str, save: Any) -> None:
    tensors = authors_tensors(case_of(name))
    prefixed = {f"module.{key}": tensor for key, tensor in tensors.items()}
    plain = load(name, save(tensors))
    expected = plain.state_dict()
    containers = {
        "state_dict": save({"epoch": 3, "arch": name, "state_dict": tensors, "best_acc1": 0.5}),
        "module.": save(prefixed),
        "state_dict, module.": save({"state_dict": prefixed}),
        "safetensors": save(tensors, ".safetensors"),
        "ours": save(plain),
        "ours, safetensors": save(plain, ".safetensors"),
    }
    for container, file in containers.items():
        loaded = load(name, file).state_dict()
        assert loaded.keys() == expected.keys(), container
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items()), container


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case["model_args"] and "same_entries_as" not in case and case["params"] < 5e7 and case["macs"] < 1.3e9
    ],
    ids=lambda case: case["id"],
)
def test_a_file_brings_its_own_number_of_classes(case: dict[str, Any], save: Any) -> None:
    tensors = authors_tensors(case)
    net = load(case["model"], save(tensors))
    assert net.num_classes == case["model_args"]["num_classes"]
    classifier = [tensor for key, tensor in tensors.items() if key.endswith("weight")][-1]
    assert torch.equal(net.get_classifier().weight, classifier.flatten(1))


# Weights that do not fit


@pytest.mark.slow
def test_a_missing_tensor_is_refused_even_with_another_number_of_classes(save: Any) -> None:
    tensors = authors_tensors(case_of("pyconvresnet18"))
    del tensors["layer3.1.bn2.running_var"]
    with pytest.raises(spd_zoo.WeightsError, match=r"1 of \d+ tensors are missing.*stages\.2\.1\.bn2\.running_var"):
        load("pyconvresnet18", save(tensors), num_classes=7)


@pytest.mark.slow
def test_a_surplus_tensor_is_refused_even_with_another_number_of_classes(save: Any) -> None:
    tensors = authors_tensors(case_of("pyconvresnet18"))
    tensors["layer1.2.bn1.bias"] = torch.zeros(64)
    with pytest.raises(spd_zoo.WeightsError, match=r"1 tensors have no place.*stages\.0\.2\.bn1\.bias"):
        load("pyconvresnet18", save(tensors), num_classes=7)


@pytest.mark.slow
def test_a_tensor_of_another_shape_is_refused_even_with_another_number_of_classes(save: Any) -> None:
    tensors = authors_tensors(case_of("resnet18_spd"))
    tensors["conv5_x.1.residual_function.3.weight"] = torch.zeros(512, 512, 1, 1)
    with pytest.raises(spd_zoo.WeightsError, match=r"stages\.3\.1\.residual\.3\.weight has shape \[512, 512, 1, 1\]"):
        load("resnet18_spd", save(tensors), num_classes=7)


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [None, 7])
def test_the_error_for_another_networks_checkpoint_names_the_one_it_fits(num_classes: int | None, save: Any) -> None:
    case = next(case for case in CASES if case["id"] == "spd_resnet18_asreleased_tin200")
    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    with pytest.raises(spd_zoo.WeightsError, match=r"does not fit resnet18_spd: .*; it fits resnet50_spd$"):
        load("resnet18_spd", save(authors_tensors(case)), **kwargs)


def test_the_error_for_a_checkpoint_of_no_network_says_that_it_fits_none(save: Any) -> None:
    with pytest.raises(spd_zoo.WeightsError, match="it fits no other network of the zoo"):
        load("resnet18_spd", save({"features.0.weight": torch.zeros(8, 3, 3, 3)}))


@pytest.mark.slow
def test_absent_phase_mixes_beside_kernels_of_the_new_size_are_refused(save: Any) -> None:
    tensors = random_network("pyconvresnet50_spd").state_dict()
    mix = "stages.1.0.downsample.0.1.weight"
    del tensors[mix]
    with pytest.raises(spd_zoo.WeightsError, match=re.escape(f"the first is {mix}")):
        load("pyconvresnet50_spd", save(tensors))


@pytest.mark.slow
def test_kernels_of_the_old_size_beside_new_ones_are_refused(save: Any) -> None:
    tensors = random_network("pyconvresnet50_spd").state_dict()
    tensors["stages.3.0.conv2.weight"] = torch.zeros(512, 512, 3, 3)
    with pytest.raises(spd_zoo.WeightsError, match=r"stages\.3\.0\.conv2\.weight has shape \[512, 512, 3, 3\]"):
        load("pyconvresnet50_spd", save(tensors))


@pytest.mark.slow
def test_the_import_refuses_to_take_a_name_from_timm() -> None:
    script = (
        "import sys, types, timm\n"
        "def resnet50_spd(pretrained=False, **kwargs): ...\n"
        "resnet50_spd.__module__ = 'timm.models.other'\n"
        "sys.modules['timm.models.other'] = types.ModuleType('timm.models.other')\n"
        "timm.models.register_model(resnet50_spd)\n"
        "import spd_zoo\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot register resnet50_spd: timm.models.other has a network of that name" in done.stderr


# Any image


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_any_image_size_works(name: str) -> None:
    smallest = ((61, 97), (64, 63)) if name.endswith(PADDING_FREE) or name in FIXED_SIZE else ((1, 1), (17, 9))
    with torch.inference_mode():
        for size in (*smallest, (65, 63)):
            net = timm.create_model(name, num_classes=5, **image_size(name, *size)).eval()
            output = net(noise(2, 3, *size))
            assert output.shape == (2, 5)
            assert output.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith("_pfd") and name not in FIXED_SIZE])
def test_images_too_small_for_padding_free_downsampling_are_refused(name: str) -> None:
    with pytest.raises(ImageSizeError, match=r"at least 3x3 pixels, got 2x\d: give larger images"):
        timm.create_model(name)(torch.zeros(2, 3, 5, 9) if name.startswith("cifar_") else torch.zeros(2, 3, 9, 20))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED_SIZE)
def test_images_of_another_size_than_the_network_was_created_for_are_refused(name: str) -> None:
    variants: tuple[dict[str, Any], ...] = ({}, {"features_only": True})
    for kwargs in variants:
        net = timm.create_model(name, device="meta", **kwargs)
        with pytest.raises(ImageSizeError, match=r"of one size; create it with img_size=\.\.\., or call"):
            net(torch.empty(2, 3, 48, 80, device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in FIXED_SIZE])
def test_a_network_of_one_image_size_can_be_given_another(name: str, save: Any, tmp_path: Path) -> None:
    net = random_network(name, num_classes=5)
    before = copy.deepcopy(net)
    x = noise(2, 3, 48, 80)
    with torch.inference_mode():
        expected = load(name, save(before), img_size=(48, 80))(x)
        net.set_input_size((48, 80))
        assert not net.training
        assert_close(net(x), expected)
        save_for_hf(net, str(tmp_path), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(x), net(x))
        for size, why in ((12, "3x3"), (0, "img_size must be at least 1, got 0")):
            if size == 0 or "_pfd" in name:
                with pytest.raises(ValueError, match=why):
                    net.set_input_size(size)
        assert torch.equal(again(x), net(x))
        net.set_input_size(32)
        for actual, old in zip(net.parameters(), before.parameters(), strict=True):
            assert actual.shape == old.shape


def test_the_size_of_any_other_network_needs_no_setting() -> None:
    net = random_network("cifar_resnet20_pfd")
    before = net.state_dict()
    net.set_input_size(48)
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_networks_are_not_created_for_images_too_small_for_them() -> None:
    with pytest.raises(ImageSizeError, match="img_size is too small: a map of 1x1 pixels cannot be halved"):
        timm.create_model("cifar_parc_mobilenetv2_pfd", img_size=8)


@pytest.mark.parametrize("name", ["cifar_parc_mobilenetv2", "cifar_shufflenetv2_effdown"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (48.0, r"img_size must be a whole number, got 48\.0"),
        ("64", "img_size must be a whole number, got '64'"),
        ((3, 64, 64), r"img_size must be one number, or height and width, got \(3, 64, 64\)"),
        (0, "img_size must be at least 1, got 0"),
    ],
)
def test_an_image_size_that_is_none_is_refused(name: str, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, img_size=size, device="meta")
    with pytest.raises(ValueError, match=message):
        cast("Any", timm.create_model(name, device="meta")).set_input_size(size)


def test_a_resampled_circular_convolution_treats_a_constant_map_as_before() -> None:
    torch.manual_seed(0)
    layer = PositionAwareCircularConv2d(4, (8, 6), axis=0)
    with torch.inference_mode():
        expected = layer(torch.ones(1, 4, 8, 6))[:, :, 0, 0]
        layer.set_size((13, 11))
        assert_close(layer(torch.ones(1, 4, 13, 11))[:, :, 5, 3], expected)


def test_attention_biases_loaded_after_a_prediction_are_used() -> None:
    net = random_network("cifar_ghostnet_effdown", num_classes=5)
    other = copy.deepcopy(net)
    x = noise(2, 3, 32, 32)
    with torch.inference_mode():
        net(x)
        for key, parameter in other.named_parameters():
            if key.endswith("attention_biases"):
                nn.init.normal_(parameter)
        assert not torch.allclose(other(x), net(x))
        net.load_state_dict(other.state_dict())
        assert torch.equal(other(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_parameter_trains(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, drop_rate=0).train()
    before = {key: parameter.detach().clone() for key, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(images(name, 4, 48, 48)), torch.arange(4)).backward()
    optimizer.step()
    unchanged = 0
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.isfinite().all(), key
        unchanged += torch.equal(parameter, before[key])
    # a scale or bias that a BatchNorm further on takes away again has no gradient, nor has what the authors never call
    assert unchanged == 0 or ("pyconv" not in name and unchanged < 0.1 * len(before))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_pretrained_weights_are_adapted_to_other_image_channels(name: str, save: Any) -> None:
    size = image_size(name, 65, 63)
    coloured = random_network(name, num_classes=5, **size)
    if isinstance(coloured.stem[0], nn.BatchNorm2d):  # on the image: with equal colours the adaptation is exact
        for parameter in (*coloured.stem[0].parameters(), *coloured.stem[0].buffers()):
            nn.init.constant_(parameter, parameter.flatten()[0].item())
        nn.init.zeros_(coloured.get_buffer("stem.0.running_mean"))
        nn.init.zeros_(coloured.get_parameter("stem.0.bias"))
    file = save(coloured)
    x = noise(2, 4, 65, 63)
    with torch.inference_mode():
        grey = load(name, file, in_chans=1, **size)(x[:, :1])
        assert_close(grey, coloured(x[:, :1].repeat(1, 3, 1, 1)))
        # timm repeats the kernels of the three colours and scales them by 3/4
        expected = coloured(torch.stack([x[:, 0] + x[:, 3], x[:, 1], x[:, 2]], 1) * 0.75)
        assert_close(load(name, file, in_chans=4, **size)(x), expected)


def shallow(name: str) -> dict[str, Any]:
    """Arguments of a network with a BatchNorm on the image that leave it few layers."""
    return {} if "mobilenet" in name else {"depth": 1}


@pytest.mark.parametrize("name", IMAGE_NORM)
def test_grey_images_give_what_three_equal_colours_give_away_from_the_border(name: str, save: Any) -> None:
    coloured = random_network(name, num_classes=5, **shallow(name))
    for key, parameter in coloured.stem[0].named_parameters():
        assert len(set(parameter.tolist())) == 3, key
    x = noise(1, 1, 48, 48)
    with torch.inference_mode():
        grey = load(name, save(coloured), in_chans=1, **shallow(name))
        given = {"indices": [0], "stop_early": True, "intermediates_only": True}
        (actual,), (expected,) = (
            grey.forward_intermediates(x, **given),
            coloured.forward_intermediates(x.repeat(1, 3, 1, 1), **given),
        )
        middle = actual.shape[-1] // 2
        inner = slice(middle - 1, middle + 1)
        assert_close(actual[..., inner, inner], expected[..., inner, inner])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv3_large_w1_pfd"])
def test_a_saved_converted_network_takes_grey_images_as_the_original_does(name: str, save: Any, tmp_path: Path) -> None:
    net = random_network(name, num_classes=5, **shallow(name))
    save_network(spd_zoo.convert_to_spd(net), tmp_path)
    converted = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    x = noise(2, 1, 96, 96)
    with torch.inference_mode():
        assert_close(converted(x), load(name, save(net), in_chans=1, **shallow(name))(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20.cifar100", "cifar_resnet20_pfd.cifar100"])
def test_trained_networks_see_the_same_in_grey_images_with_one_channel_and_with_three(name: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="CIFAR-100 is in parquet files, which need pyarrow")
    rows = parquet.read_table(shared("cifar100/test-00000-of-00001.parquet")).slice(0, 500)["image"].to_pylist()
    x = torch.stack([to_tensor(Image.open(io.BytesIO(row["bytes"])).convert("L")) for row in rows])
    coloured, grey = timm.create_model(name, pretrained=True), timm.create_model(name, pretrained=True, in_chans=1)
    with torch.inference_mode():
        same = coloured.eval()(x.repeat(1, 3, 1, 1)).argmax(1) == grey.eval()(x).argmax(1)
    assert same.double().mean() >= 0.94


@pytest.mark.slow
def test_strided_weights_are_adapted_to_grey_images_in_space_to_depth_networks(save: Any) -> None:
    for strided, spd in SPD_TWINS:
        net = random_network(strided, num_classes=5)
        x = noise(2, 1, 33, 31)
        with torch.inference_mode():
            assert_close(load(spd, save(net), in_chans=1)(x), net(x.repeat(1, 3, 1, 1)))


def test_an_odd_map_of_resnet_spd_gets_zeros_after_the_3x3_convolution() -> None:
    for name in SPD_RESNETS:
        branch = random_network(name).stages[1][0].residual
        at = next(i for i, module in enumerate(branch) if isinstance(module, SpaceToDepth))
        x = noise(2, branch[0].in_channels, 7, 5)
        with torch.inference_mode():
            inner = F.pad(branch[:at](x), (0, 1, 0, 1))
            phases = [inner[..., dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
            assert_close(branch(x), branch[at + 1 :](torch.cat(phases, 1)))


def test_an_odd_image_of_resnet_spd_is_the_image_with_zeros_at_the_bottom_and_right() -> None:
    for name in SPD_RESNETS:
        net = random_network(name)
        x = noise(2, 3, 31, 45)
        with torch.inference_mode():
            assert_close(net(x), net(F.pad(x, (0, 1, 0, 1))))


def test_the_shortcut_of_pyconv_spd_pools_before_an_odd_map_gets_zeros() -> None:
    for _, name in SPD_TWINS:
        pool = random_network(name).stages[0][0].downsample[0]
        x = noise(2, 64, 7, 5).abs()
        with torch.inference_mode():
            maxima = F.pad(F.max_pool2d(x, 3, 1, 1), (0, 1, 0, 1))
            weights = pool[1].weight[None, :, :, :, 0]  # (1, chs, 4, 1)
            phases = [maxima[..., dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]
            expected = sum(phase * weights[:, :, i : i + 1] for i, phase in enumerate(phases))
            assert_close(pool(x), expected)


# timm's arguments and methods


@pytest.mark.parametrize("name", own_networks())
def test_every_argument_that_a_variant_sets_can_be_overridden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entrypoint: Any = timm.model_entrypoint(name)
    monkeypatch.setattr(f"{entrypoint.__module__}._create", lambda variant, pretrained, **kwargs: kwargs)
    own = entrypoint()
    for keyword in own:
        kwargs = entrypoint(**{keyword: "another"})
        assert kwargs.keys() == own.keys() and kwargs[keyword] == "another"


@pytest.mark.parametrize(
    ("name", "other", "override"),
    [
        ("resnet50_spd", "resnet101_spd", {"depths": (3, 4, 23, 3)}),
        ("pyconvresnet50", "pyconvhgresnet50_spd", {"hg": True, "spd": True}),
        ("cifar_ghostnet", "cifar_ghostnet_pfd", {"hybrid_stem": True, "downsampling": "pfd"}),
        ("cifar_wrn40_3", "cifar_wrn40_3_pfd", {"pfd": True}),
        ("yolov8s_spd", "yolov8s", {"spd": False}),
        ("yolov8s_spd_p2", "yolov8s_p2", {"spd": False}),
        ("ssd_mobilenetv1_s1l0", "ssd_mobilenetv1_s1l0_dualpath", {"dual": True, "extras": "SSSS"}),
    ],
)
def test_a_variant_with_the_arguments_of_another_is_the_other(name: str, other: str, override: dict[str, Any]) -> None:
    nets: Any = [timm.create_model(name, device="meta", **override), timm.create_model(other, device="meta")]
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in nets]
    assert shapes[0] == shapes[1]
    assert nets[0].pretrained_cfg["first_conv"] == nets[1].pretrained_cfg["first_conv"]


def test_every_network_that_timm_lists_can_be_created() -> None:
    listed = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("spd_zoo")]
    assert listed == own_networks()
    assert timm.is_model("spd_converted")  # to load a saved network


@pytest.mark.parametrize("name", own_networks())
def test_the_first_convolution_is_the_one_that_depends_on_the_image_channels(name: str) -> None:
    nets: Any = [timm.create_model(name, device="meta", in_chans=chans) for chans in (3, 5)]
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in nets]
    differing = [key for key, shape in shapes[0].items() if shape != shapes[1][key] and len(shape) == 4]
    assert differing == [f"{nets[0].pretrained_cfg['first_conv']}.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_another_number_of_classes_keeps_everything_but_the_classifier(name: str, save: Any) -> None:
    source = random_network(name, num_classes=5)
    file, expected = save(source), source.state_dict()
    for num_classes in (7, 0):
        net = load(name, file, num_classes=num_classes)
        loaded = net.state_dict()
        body = [key for key in expected if not key.startswith("head.fc.")]
        assert [key for key in loaded if not key.startswith("head.fc.")] == body
        assert all(torch.equal(loaded[key], expected[key]) for key in body)
        with torch.inference_mode():
            x = noise(2, 3, *net.pretrained_cfg["input_size"][1:])
            output = net(x)
            assert output.shape == (2, num_classes or net.head_hidden_size)
            if num_classes == 0:
                assert_close(output, source.forward_head(source.forward_features(x), pre_logits=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_global_pool_chooses_what_the_classifier_reads(name: str) -> None:
    x = noise(2, 3, 64, 80)
    net = random_network(name, num_classes=0, global_pool="", **image_size(name, 64, 80))
    with torch.inference_mode():
        last = net.forward_features(x)
        assert net(x).shape == (2, net.head_hidden_size, *last.shape[2:])
        for pool, pooled in (
            ("max", last.amax((2, 3))),
            ("catavgmax", torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1)),
        ):
            if isinstance(net.head, HiddenLayerHead):
                featureless = timm.create_model(name, num_classes=0, global_pool=pool, device="meta")
                assert featureless.get_submodule("head.hidden").in_channels == pooled.shape[1]
                if pool == "max":
                    net.reset_classifier(5, pool)
                    head = net.head
                    assert_close(net(x), head.fc(head.act(head.hidden(pooled[:, :, None, None])).flatten(1)))
            else:
                net.reset_classifier(5, pool)
                assert net.head_hidden_size == pooled.shape[1]
                assert_close(net(x), net.get_classifier()(pooled))
                fresh: Any = timm.create_model(name, num_classes=5, global_pool=pool, device="meta")
                assert fresh.get_classifier().weight.shape == (5, pooled.shape[1])


def test_a_hidden_layer_is_not_silently_replaced_by_another_pooling() -> None:
    net: Any = timm.create_model("cifar_ghostnet", device="meta")
    with pytest.raises(AssertionError, match="cannot read pooling 'catavgmax'; give global_pool at creation"):
        net.reset_classifier(5, "catavgmax")
    with pytest.raises(AssertionError, match='global_pool="" works with num_classes=0 only'):
        net.reset_classifier(5, "")


@pytest.mark.parametrize("name", EACH)
def test_reset_classifier_changes_only_the_classifier(name: str) -> None:
    net = random_network(name, num_classes=5)
    x = images(name, 2, 32, 32)
    with torch.inference_mode():
        pooled = net.forward_head(net.forward_features(x), pre_logits=True)
        net.reset_classifier(9)
        assert net.num_classes == 9
        assert net.get_classifier().out_features == 9
        assert_close(net(x), net.get_classifier()(pooled))
        net.reset_classifier(0)
        assert_close(net(x), pooled)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate"])
def test_dropout_and_drop_path_act_only_in_training(name: str, rate: str) -> None:
    if rate == "drop_path_rate" and name not in RESIDUAL:
        with pytest.raises(TypeError, match="drop_path_rate"):
            timm.create_model(name, drop_path_rate=0.5)
        return
    net = random_network(name, num_classes=5, **{"drop_rate": 0, rate: 0.5})
    plain = random_network(name, num_classes=5, drop_rate=0)
    plain.load_state_dict(net.state_dict())
    x = images(name, 4, 32, 32)
    with torch.inference_mode():
        assert torch.equal(net(x), plain(x))
        net.train(), plain.train()
        assert torch.equal(plain(x), plain(x))
        assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("name", RESIDUAL)
def test_drop_path_grows_to_its_rate(name: str) -> None:
    net: Any = timm.create_model(name, drop_path_rate=0.3, device="meta")
    rates = [module.drop_prob for module in net.stages.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates)
    assert 0 < rates[0] < 0.05
    assert rates[-1] == pytest.approx(0.3, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    net = random_network(name, num_classes=5, drop_rate=0).train()
    x, target = images(name, 4, 32, 32), torch.arange(4)
    gradients = []
    for enable in (False, True):
        other = copy.deepcopy(net)
        other.set_grad_checkpointing(enable)
        calls: list[str] = []
        other.stages[0][0].register_forward_pre_hook(lambda module, args, calls=calls: calls.append("forward"))
        F.cross_entropy(other(x), target).backward()
        assert len(calls) == 1 + enable
        gradients.append([parameter.grad for parameter in other.parameters()])
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ALL)
def test_parameter_groups_cover_the_network_from_input_to_output(name: str) -> None:
    net: Any = timm.create_model(name, device="meta")
    names = [key for key, _ in net.named_parameters()]
    for coarse, count in ((True, 1 + len(net.stages) + 1), (False, 1 + sum(map(len, net.stages)) + 1)):
        groups = [group for _, group in sorted(group_parameters(net, net.group_matcher(coarse)).items())]
        assert len(groups) == count
        assert [key for group in groups for key in group] == names
        assert {key.partition(".")[0] for key in groups[-1]} == {"head"}


@pytest.mark.parametrize(
    ("name", "count"), [("cifar_resnet20", 0), ("cifar_ghostnet_effdown", 2), ("cifar_parc_mobilenetv2", 6)]
)
def test_attention_biases_and_position_embeddings_are_not_decayed(name: str, count: int) -> None:
    net: Any = timm.create_model(name, device="meta")
    exempt = net.no_weight_decay()
    assert len(exempt) == count
    for key in dict(net.named_parameters()):
        assert (key in exempt) == (key.rpartition(".")[2] in ("attention_biases", "pe")), key
    optimizer: Any = create_optimizer_v2(net, "sgd", 0.1, 0.01)
    decayed = {id(each) for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}
    assert decayed == {id(each) for key, each in net.named_parameters() if each.ndim > 1 and key not in exempt}


@pytest.mark.parametrize("name", ALL)
def test_feature_maps_have_the_declared_channels_and_sizes(name: str) -> None:
    variants: list[dict[str, Any]] = [{}, {"output_stride": 16}, {"output_stride": 8}]
    for kwargs in variants if "pyconv" in name else variants[:1]:
        net: Any = timm.create_model(name, features_only=True, device="meta", **kwargs)
        size = config_of(name).input_size[1:] if name in FIXED_SIZE else (64, 96)
        maps = net(torch.empty(1, 3, *size, device="meta"))
        described: Any = timm.create_model(name, device="meta", **kwargs).feature_info
        channels = [info["num_chs"] for info in described]
        assert [fmap.shape[1] for fmap in maps] == net.feature_info.channels() == channels
        reductions = net.feature_info.reduction()
        assert reductions == sorted(set(reductions) if not kwargs else reductions)
        for fmap, reduction in zip(maps, reductions, strict=True):
            for pixels, side in zip(fmap.shape[2:], size, strict=True):
                # a padding-free downsampling loses a pixel
                assert pixels == side // reduction or (side // reduction - pixels == 1 and name.endswith(PADDING_FREE))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_features_only_gives_the_maps_asked_for(name: str, save: Any) -> None:
    net = random_network(name)
    file = save(net)
    x = images(name, 2, 33, 47)
    count = len(net.feature_info)
    with torch.inference_mode():
        last, maps = net.forward_intermediates(x)
        assert torch.equal(last, maps[-1])
        assert torch.equal(last, net.forward_features(x))
        for indices in (tuple(range(count)), (0, 2), (-2, -1), (1,)):
            chosen = [maps[i] for i in sorted(i % count for i in indices)]
            backbone = load(name, file, features_only=True, out_indices=indices)
            for actual, expected in zip(backbone(x), chosen, strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_forward_intermediates_gives_the_maps_asked_for(name: str) -> None:
    net = random_network(name)
    x = images(name, 2, 33, 47)
    count = len(net.feature_info)
    with torch.inference_mode():
        _, maps = net.forward_intermediates(x)
        for indices in ([0], [1, 2], [-1], 2):
            chosen = maps[-indices:] if isinstance(indices, int) else [maps[i] for i in indices]
            for stop_early in (False, True):
                given = net.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
                assert len(given) == len(chosen)
                assert all(torch.equal(a, b) for a, b in zip(given, chosen, strict=True))
        assert net.prune_intermediate_layers([count - 2]) == [count - 2]
        pruned = net(x)
        assert torch.equal(pruned, maps[count - 2])
        assert net.num_features == maps[count - 2].shape[1]
    with pytest.raises(ValueError, match="NCHW"):
        net.forward_intermediates(x, output_fmt="NLC")


# Output strides


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", PYCONV)
def test_output_stride_sets_the_size_of_the_last_map(name: str, output_stride: int) -> None:
    net: Any = timm.create_model(name, output_stride=output_stride, device="meta")
    size = 224 // output_stride
    assert net.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[-2:] == (size, size)


@pytest.mark.parametrize("name", PYCONV)
@pytest.mark.parametrize(("output_stride", "dilations"), [(32, (1, 1, 1, 1)), (16, (1, 1, 1, 2)), (8, (1, 1, 2, 4))])
def test_every_kernel_of_a_dilated_stage_is_dilated(name: str, output_stride: int, dilations: tuple[int, ...]) -> None:
    net: Any = timm.create_model(name, output_stride=output_stride, device="meta")
    for stage, dilation in zip(net.stages, dilations, strict=True):
        for key, module in stage.named_modules():
            if isinstance(module, nn.Conv2d) and not isinstance(module, SPDConv2d) and module.kernel_size[0] > 1:
                half = module.kernel_size[0] // 2
                assert (module.dilation, module.padding) == (2 * (dilation,), 2 * (dilation * half,)), key
            if isinstance(module, nn.Conv2d | nn.MaxPool2d) and dilation > 1:
                assert module.stride in (1, (1, 1)), key
            if isinstance(module, nn.MaxPool2d):
                assert (module.kernel_size, module.padding, module.dilation) == (3, 1, 1), key
            assert not (dilation > 1 and isinstance(module, SPDConv2d | PhaseMix)), key


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(("strided", "spd"), SPD_TWINS)
def test_space_to_depth_keeps_the_function_at_every_output_stride(
    strided: str, spd: str, output_stride: int, save: Any
) -> None:
    native = random_network(strided, num_classes=5)
    file = save(native)
    x = noise(2, 3, 65, 47)
    with torch.inference_mode():
        expected = load(strided, file, output_stride=output_stride)(x)
        assert_close(load(spd, file, output_stride=output_stride)(x), expected)
        assert not torch.allclose(native(x), expected)


@pytest.mark.parametrize(("name", "output_stride"), [(PYCONV[0], 4), (SPD_TWINS[0][1], 24)])
def test_output_strides_that_do_not_exist_are_refused(name: str, output_stride: int) -> None:
    with pytest.raises(ValueError, match=f"8, 16 or 32, got {output_stride}"):
        timm.create_model(name, output_stride=output_stride)


@pytest.mark.parametrize("name", SPD_RESNETS)
def test_resnet_spd_refuses_any_output_stride_but_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="output_stride=16 only, got 8"):
        timm.create_model(name, output_stride=8)
    timm.create_model(name, output_stride=16, device="meta")


# Graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    net = random_network(name, num_classes=5)
    x = images(name, 2, 33, 32)
    with torch.inference_mode():
        compiled: Any = torch.compile(net, fullgraph=True, backend="eager")
        assert_close(compiled(x), net(x))


@pytest.mark.exhaustive
def test_compiles_to_machine_code_that_trains() -> None:
    torch.compiler.reset()
    net = random_network("pyconvresnet18", num_classes=5).train()
    x = noise(4, 3, 64, 64)
    losses = []
    runs: list[Any] = [copy.deepcopy(net), torch.compile(copy.deepcopy(net), fullgraph=True)]
    for run in runs:
        loss = run(x).square().sum()
        loss.backward()
        losses.append((loss, next(run.parameters()).grad))
    assert_close(losses[1][0], losses[0][0])
    assert_close(losses[1][1], losses[0][1], 1e-3)


@pytest.mark.exhaustive
def test_trains_compiled_in_bf16() -> None:
    torch.compiler.reset()
    net = random_network("pyconvresnet50_spd", num_classes=5).train()
    with torch.autocast("cpu", torch.bfloat16):
        compiled: Any = torch.compile(net, fullgraph=True, backend="aot_eager")
        compiled(noise(2, 3, 32, 32)).float().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_exports_for_any_batch_and_image_size_above_32(name: str) -> None:
    net = random_network(name, num_classes=5)
    x = images(name, 2, 65, 79)
    sizes: dict[int, Any] = {0: torch.export.Dim.AUTO}
    if name not in FIXED_SIZE:
        sizes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(net, (x,), dynamic_shapes=(sizes,)).module()
    with torch.inference_mode():
        for count, height, width in ((2, 65, 79), (3, 64, 66), (1, 97, 70)):
            x = images(name, count, height, width)
            assert_close(exported(x), net(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, or in Python 3.14 not supported, says torch
@pytest.mark.parametrize("name", EACH)
def test_scripts(name: str) -> None:
    net = random_network(name, num_classes=5)
    scripted = torch.jit.script(net)
    with torch.inference_mode():
        for height, width in ((33, 32), (65, 79)):
            x = images(name, 2, height, width)
            assert_close(scripted(x), net(x))


@pytest.mark.parametrize("name", TRACED)
def test_torch_fx_and_torchvision_extract_maps_at_any_image_size(name: str) -> None:
    net = random_network(name, num_classes=5)
    traced = torch.fx.symbolic_trace(net)
    extractor = create_feature_extractor(net, ["stages.0", "stages.2"])
    with torch.inference_mode():
        for height, width in ((64, 96), (64, 64)):
            x = images(name, 2, height, width)
            for actual, expected in zip(tree_leaves(traced(x)), tree_leaves(net(x)), strict=True):
                assert_close(actual, expected)
            if isinstance(net, Classifier):
                named = {f"stages.{i}": fmap for i, fmap in enumerate(net.pyramid(net.stem(x)))}
                for key, fmap in extractor(x).items():
                    assert_close(fmap, named[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", own_networks())
def test_torch_fx_traces_every_network(name: str) -> None:
    net: Any = timm.create_model(name, device="meta").eval()
    x = torch.empty(2, *net.pretrained_cfg["input_size"], device="meta")
    shapes = [[fmap.shape for fmap in tree_leaves(run(x))] for run in (net, torch.fx.symbolic_trace(net))]
    assert shapes[0] == shapes[1]


def test_a_traced_network_of_one_image_size_refuses_another() -> None:
    net = timm.create_model("cifar_parc_mobilenetv2", device="meta").eval()
    for traced in (torch.fx.symbolic_trace(net), create_feature_extractor(net, ["stages.6"])):
        with pytest.raises(ImageSizeError, match="takes images of one size"):
            traced(torch.empty(1, 3, 48, 48, device="meta"))


# Initialisation


def old_taps(conv: SPDConv2d) -> Tensor:
    """Which taps of an SPD kernel the strided kernel has, (4, K, K): phase d of cell m reads offset 2m + d."""
    half = conv.kernel_size[0] // 2
    cells = torch.arange(conv.weight.shape[-1]) - (half + 1) // 2
    inside = [(2 * cells + d).abs() <= half for d in (0, 1)]
    return torch.stack([inside[dy][:, None] & inside[dx][None, :] for dy in (0, 1) for dx in (0, 1)])


@pytest.mark.parametrize("name", [spd for _, spd in SPD_TWINS])
def test_a_fresh_space_to_depth_network_starts_as_a_strided_one(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name)
    convs = [module for module in net.modules() if isinstance(module, SPDConv2d)]
    mixes = [module for module in net.modules() if isinstance(module, PhaseMix)]
    assert len(convs) == 1 + 4 + 3 + 2 + 1
    assert len(mixes) == 4
    for conv in convs:
        mask = old_taps(conv)
        weight = conv.weight.detach().unflatten(1, (-1, 4))
        assert mask.sum() == conv.kernel_size[0] ** 2
        assert not weight[:, :, ~mask].any()
        taps = weight[:, :, mask]
        std = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert taps.std().item() == pytest.approx(std, rel=5 / (2 * taps.numel()) ** 0.5)
    for mix in mixes:
        assert torch.equal(mix.weight.flatten(1), torch.tensor([1.0, 0, 0, 0]).expand(len(mix.weight), 4))


@pytest.mark.parametrize("name", [name for name in PYCONV if not name.endswith("_spd")])
def test_a_fresh_network_draws_each_level_by_its_own_channels(name: str) -> None:
    torch.manual_seed(0)
    for key, module in timm.create_model(name).named_modules():
        if isinstance(module, nn.Conv2d):
            std = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=5 / (2 * module.weight.numel()) ** 0.5), key
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), key
            assert not module.bias.any(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", PYCONV)
@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_residual_zeroes_the_last_norm_of_bottlenecks(name: str, zero: bool) -> None:
    net = timm.create_model(name, zero_init_residual=zero)
    assert isinstance(net, PyConvResNet)
    zeroed = {
        key for key, module in net.named_modules() if isinstance(module, nn.BatchNorm2d) and not module.weight.any()
    }
    bottlenecks = {f"{key}.bn3" for key, module in net.named_modules() if isinstance(module, Bottleneck)}
    assert zeroed == (bottlenecks if zero else set())


def test_pruning_leaves_the_stages_that_a_map_needs() -> None:
    net: Any = timm.create_model("pyconvresnet18", device="meta")
    x = torch.empty(1, 3, 64, 64, device="meta")
    expected = net.forward_intermediates(x, indices=[2], intermediates_only=True)[0].shape
    assert net.prune_intermediate_layers([2]) == [2]
    assert net.forward_features(x).shape == expected
    assert (net.num_classes, net.num_features) == (0, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", {timm.model_entrypoint(name).__module__: name for name in own_networks()}.values())
def test_a_network_takes_timms_usual_arguments_or_names_those_that_it_does_not_have(name: str) -> None:
    usual: dict[str, Any] = {
        "output_stride": 16,
        "norm_layer": nn.BatchNorm2d,
        "act_layer": nn.ReLU,
        "img_size": 64,
        "bn_eps": 1e-3,
    }
    usual |= {"drop_rate": 0.1, "drop_path_rate": 0.1, "global_pool": "max", "depths": (1, 1, 1, 1)}
    for argument, value in usual.items():
        try:
            timm.create_model(name, device="meta", **{argument: value})
        except TypeError as error:
            assert str(error).startswith(f"{name} has no argument {argument}; it has "), error
        except ValueError as error:
            assert argument in str(error), error
