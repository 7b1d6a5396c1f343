"""Current releases of other libraries accept our networks as docs/integrations.md says; its Python code is run here."""

import io
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden
import pytest
import timm
import torch
from networks import assert_close, authors_tensors, load, noise, random_network
from pictures import make_folders
from PIL import Image
from shared_data import shared
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from spd_zoo import Detector, PhaseMix, PyConv2d
from spd_zoo.cli.main import main
from spd_zoo.inference.classifier import predict
from spd_zoo.weights import save_network

pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence")  # torchao's, when it is compiled

ROOT = Path(__file__).parent.parent
MISSING = "needs the extra `integrations`"


def run_section(title: str, **given: Any) -> dict[str, Any]:
    """The names that the Python of a section leaves, when all of it is run in the working directory with `given`."""
    page = (ROOT / "docs" / "integrations.md").read_text()
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert blocks
    for kind, block in blocks:
        if kind == "sh":
            assert [main(shlex.split(command)[1:]) for command in block.splitlines()] == [0]
        else:
            exec(compile(block, f"integrations.md: {title}", "exec"), given)
    return given


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all tests, with small photos in class folders."""
    folder = tmp_path_factory.mktemp("workspace")
    make_folders(folder / "photos", train=8, val=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def by_datasets(workspace: Path) -> dict[str, Any]:
    """What the section on `datasets` leaves, among it the folder of a run."""
    datasets = pytest.importorskip("datasets", reason=MISSING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", workspace / "cache")
        return run_section("datasets")


@pytest.fixture(scope="module")
def run(by_datasets: dict[str, Any]) -> Any:
    """The network of the run in the folder `run`."""
    return timm.create_model("local-dir:run", pretrained=True).eval()


def logits_of(net: Any, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(images)


@pytest.mark.slow
def test_datasets_gives_the_images_and_takes_the_predictions(by_datasets: dict[str, Any]) -> None:
    import datasets

    table = datasets.Dataset.from_parquet("predicted.parquet", cache_dir="cache")
    assert table.features["prediction"].names == ["blue", "green", "red"]
    files = sorted(Path("photos", "val").rglob("*.png"))
    assert len(table) == len(files) == 6
    by_name = {(answer.path.parent.name, answer.path.name): answer.top for answer in predict("run", files)}
    shown = [(table.features["label"].int2str(row["label"]), row) for row in table]
    for i, (label, row) in enumerate(shown):
        top = {guess.index: guess.probability for guess in by_name[label, f"{i % 2}.png"]}
        assert row["confidence"] == pytest.approx(top[row["prediction"]], abs=0.01)


@pytest.mark.slow
def test_transformers_computes_what_timm_does(run: Any) -> None:
    pytest.importorskip("transformers", reason=MISSING)
    shutil.copy(ROOT / "examples" / "images" / "rocket.jpg", "photo.jpg")
    images = noise(2, 3, 32, 32)
    left = run_section("transformers", images=images)
    assert_close(left["logits"].detach(), logits_of(run, images), rtol=1e-5)
    assert left["net"].config.id2label == {0: "blue", 1: "green", 2: "red"}
    (answer,) = predict("pyconvresnet50_spd", [Path("photo.jpg")], top_k=3)
    assert [guess["label"] for guess in left["top"]] == [
        left["bundled"].pretrained_cfg["label_names"][guess.index] for guess in answer.top
    ]
    assert left["names"] == [guess.name for guess in answer.top]
    assert [guess["score"] for guess in left["top"]] == pytest.approx([g.probability for g in answer.top], abs=1e-5)


def test_transformers_still_cannot_read_what_timm_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=MISSING)
    save_for_hf(timm.create_model("resnet10t", num_classes=3), str(tmp_path), safe_serialization=True)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'num_classes'"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_segmentation_network_is_trained_with_a_pretrained_encoder() -> None:
    pytest.importorskip("segmentation_models_pytorch", reason=MISSING)
    torch.manual_seed(0)
    masks = (noise(2, 64, 64) > 0).long()
    left = run_section("segmentation_models_pytorch", images=noise(2, 3, 64, 64), masks=masks)
    trained = dict(left["net"].encoder.model.named_parameters())
    own = timm.create_model("pyconvresnet50_spd", pretrained=True, features_only=True)
    for name, parameter in own.named_parameters():
        assert torch.equal(trained[name], parameter) and trained[name].grad.abs().max() > 0, name
    torch.optim.SGD(left["net"].parameters(), 0.01).step()
    net, images = left["net"], left["images"]
    assert left["smp"].losses.DiceLoss("multiclass")(net(images), masks) < left["loss"]


def test_a_segmentation_network_is_told_how_many_maps_there_are() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason=MISSING)
    for encoder, depth in (("tu-resnet18_spd", 4), ("tu-cifar_resnet20", 2)):
        with pytest.raises(IndexError):
            smp.Unet(encoder, encoder_weights=None)
        chs = (16,) * depth
        net = smp.Unet(encoder, encoder_weights=None, encoder_depth=depth, decoder_channels=chs, classes=2).eval()
        assert logits_of(net, noise(1, 3, 32, 32)).shape == (1, 2, 32, 32)


@pytest.mark.slow
def test_detectors_of_torchvision_are_trained_on_our_maps() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    boxes = [[4.0, 4.0, 20.0, 20.0], [8.0, 30.0, 40.0, 60.0]]
    targets = [{"boxes": torch.tensor([box]), "labels": torch.tensor([1 + i])} for i, box in enumerate(boxes)]
    left = run_section("torchvision", images=images, targets=targets)
    for net, terms in zip((left["fcos"], left["rcnn"]), left["terms"], strict=True):
        loss = sum(terms.values())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert max(p.grad.abs().max() for p in net.backbone.body.parameters()) > 0
        torch.optim.SGD(net.parameters(), 1e-3).step()
        assert sum(net(list(images), targets).values()).isfinite()
        (found, _) = net.eval()(list(images))
        assert found["boxes"].shape[1] == 4


@pytest.mark.slow
def test_onnxruntime_and_openvino_compute_what_the_network_does(run: Any) -> None:
    for library in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(library, reason=MISSING)
    images = noise(5, 3, 32, 32)
    left = run_section("ONNX Runtime and OpenVINO", images=images)
    for found in (left["by_onnxruntime"], left["by_openvino"], left["compiled"](images.numpy())["logits"]):
        assert_close(torch.from_numpy(found), logits_of(run, images))


# int8


@pytest.fixture(scope="module")
def quantized() -> Callable[..., Any]:
    """The function of the section on int8."""
    pytest.importorskip("torchao", reason=MISSING)
    function: Callable[..., Any] = run_section("int8 with torchao")["quantized"]
    return function


def cifar100(split: str, count: int, net: Any) -> tuple[Tensor, Tensor]:
    """The first images of a split, as the network takes them, and their labels."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="CIFAR-100 is in parquet files, which need pyarrow")
    rows = parquet.read_table(min(shared("cifar100").glob(f"{split}-*.parquet"))).slice(0, count).to_pylist()
    transform: Any = create_transform(**resolve_data_config(model=net))
    images = [transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    return torch.stack(images), torch.tensor([row["label"] for row in rows])


def compared(name: str, count: int, quantized: Callable[..., Any]) -> list[float]:
    """Top-1 of the network and of its int8 form if its classes are CIFAR-100's, and how often both say the same."""
    net = timm.create_model(name, pretrained=True).eval()
    images, labels = cifar100("test", count, net)
    small = quantized(net, cifar100("train", 128, net)[0].split(32))
    before, after = (torch.cat([logits_of(one, part) for part in images.split(50)]).argmax(1) for one in (net, small))
    known = [(before, labels), (after, labels)] if net.num_classes == 100 else []
    return [100 * (a == b).double().mean().item() for a, b in (*known, (before, after))]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized:UserWarning")  # then it stays in float32
@pytest.mark.parametrize("name", ["cifar_resnet20.cifar100", "pyconvresnet50_spd.tiny_in200"])
def test_the_page_has_the_accuracy_of_int8_classifiers(name: str, quantized: Callable[..., Any]) -> None:
    figures = compared(name, 1000, quantized)
    row = re.search(rf"^\| `{name}` \|(.*)\|$", (ROOT / "docs" / "integrations.md").read_text(), re.MULTILINE)
    assert row is not None
    page = [float(cell) for cell in row[1].split("|") if cell.strip()]
    assert page == pytest.approx(figures, abs=0.5)  # kernels round apart


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("yolov8_spd", "yolov8n_spd"), ("ssd_small", "ssd_mobilenetv1")])
def test_an_int8_detector_sees_the_same_in_images(
    family: str, name: str, save: Callable[..., Path], quantized: Callable[..., Any]
) -> None:
    case = next(case for case in golden.cases(family) if case["model"] == name)
    net = load(name, save(authors_tensors(case)), **case["model_args"])
    small = quantized(net, [noise(4, 3, 64, 64), noise(5, 3, 64, 64)])
    images = noise(6, 3, 64, 64)
    for raws in zip(logits_of(net, images), logits_of(small, images), strict=True):
        what_images_change = [(raw - raw.mean(0)).flatten() for raw in raws]
        assert 0.85 < torch.corrcoef(torch.stack(what_images_change))[0, 1] < 1 - 1e-5  # rounding leaves a trace


# What other libraries attach to layers


def test_dora_attaches_to_a_converted_network_trains_and_merges() -> None:
    pytest.importorskip("peft", reason=MISSING)
    torch.manual_seed(0)
    left = run_section("peft and accelerate")
    adapted, images = left["adapted"].eval(), noise(2, 3, 64, 64)
    assert any(type(module).__name__ == "SPDConv2d" for module in adapted.modules())
    before = adapted(images)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(images).logsumexp(1).sum().backward()
        optimizer.step()
    after = logits_of(adapted, images)
    assert (after - before).abs().max() > 0.01
    assert_close(logits_of(adapted.merge_and_unload(), images), after)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_of_pyramids_act_and_merge(dora: bool) -> None:
    peft = pytest.importorskip("peft", reason=MISSING)
    torch.manual_seed(0)
    net, images = PyConv2d(8, [8, 8, 8], (3, 5, 7), (1, 1, 8), 2, spd=True).eval(), noise(2, 8, 16, 16)
    before = net(images)
    config = peft.LoraConfig(r=8, use_dora=dora, target_modules=["conv2_1", "conv2_2"], init_lora_weights=False)
    adapted = peft.get_peft_model(net, config).eval()
    after = logits_of(adapted, images)
    assert all((after - before)[:, i : i + 8].abs().max() > 0.01 for i in (0, 8))
    assert torch.equal(after[:, 16:], before[:, 16:])
    assert_close(logits_of(adapted.merge_and_unload(), images), after)


def test_offloaded_weights_compute_the_same() -> None:
    accelerate = pytest.importorskip("accelerate", reason=MISSING)
    net, images = PyConv2d(16, [16, 16], (3, 5), (1, 16)).eval(), noise(2, 16, 16, 16)
    expected = logits_of(net, images)
    accelerate.cpu_offload(net, torch.device("cpu"))
    assert next(net.parameters()).is_meta
    assert_close(logits_of(net, images), expected)


@pytest.mark.filterwarnings("ignore:distutils Version classes are deprecated:DeprecationWarning")
def test_thop_counts_what_we_count_with_the_rule_of_the_page() -> None:
    thop = pytest.importorskip("thop", reason="thop is not in the extra")
    rules = run_section("Counting operations")["custom_ops"]
    net = nn.Sequential(PyConv2d(16, [16, 16], (3, 5), (1, 16), 2, spd=True), PhaseMix(32))
    macs, params = thop.profile(net, (noise(1, 16, 16, 16),), custom_ops=rules, verbose=False)
    assert macs == 8 * 8 * (16 * 64 * 4 + 16 * 4 * 9) + 4 * 4 * 32 * 4
    assert params == sum(parameter.numel() for parameter in net.parameters())


# Looking at answers


def test_captum_explains_a_network() -> None:
    pytest.importorskip("captum", reason=MISSING)
    net: Any = timm.create_model("cifar_resnet20", pretrained=True).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    left = run_section("captum", net=net, images=images)
    fmap = net.forward_features(images)
    (weights,) = torch.autograd.grad(net.forward_head(fmap)[0, left["best"]].sum(), fmap)
    expected = (weights.mean((2, 3), keepdim=True) * fmap).sum(1, keepdim=True)
    assert_close(left["cam"].detach(), expected.detach())
    assert left["heat"].shape == (1, 1, 32, 32)
    difference = (logits_of(net, images) - logits_of(net, torch.zeros_like(images)))[0, left["best"]].item()
    assert left["each_pixel"].sum().item() == pytest.approx(difference, rel=0.1)  # completeness


@pytest.fixture(scope="module")
def detector(workspace: Path) -> str:
    """The folder of a detector of random weights that finds objects in anything."""
    net = random_network("yolov8n_spd", num_classes=3)
    with torch.no_grad():
        for classifier in net.get_classifier():
            classifier.bias.fill_(-2.0)  # a score of 0.12
    save_network(net, "detector", {"input_size": (3, 64, 64), "label_names": ["blue", "green", "red"]})
    return "detector"


def test_fiftyone_reads_what_detect_writes(detector: str, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("fiftyone.utils.coco", reason="FiftyOne is not in the extra: docs/integrations.md")
    run_section("FiftyOne")
    capsys.readouterr()
    here = Path.cwd()
    importer = coco.COCODetectionDatasetImporter(
        data_path=str(here), labels_path=str(here / "found" / "detections.json"), label_types="detections"
    )
    with importer:
        read = {Path(path).relative_to(here): (metadata, objects) for path, metadata, objects in importer}
    assert set(read) == {path.relative_to(here) for path in (here / "photos" / "val").rglob("*.png")}
    found = Detector(detector, score_threshold=0.1)(list(read))
    for expected, (metadata, objects) in zip(found, read.values(), strict=True):
        assert len(expected) > 0 and [one.label for one in objects.detections] == expected.names
        boxes = torch.tensor([one.bounding_box for one in objects.detections])  # x y width height, of the image's
        boxes[:, 2:] += boxes[:, :2]
        pixels = boxes * torch.tensor([metadata.width, metadata.height] * 2)
        torch.testing.assert_close(pixels, expected.boxes, rtol=0, atol=0.02)
        assert [one.confidence for one in objects.detections] == pytest.approx(expected.scores.tolist(), abs=1e-4)


@pytest.mark.filterwarnings("ignore:OpenCV .* is not installed:UserWarning")  # which supervision says at import
def test_supervision_draws_what_a_detector_found(detector: str) -> None:
    pytest.importorskip("supervision", reason="supervision is not in the extra: docs/integrations.md")
    shutil.copy(ROOT / "examples" / "images" / "rocket.jpg", "photo.jpg")
    left = run_section("supervision")
    assert len(left["found"]) > 0
    assert left["picture"].size == left["image"].size and left["picture"].tobytes() != left["image"].tobytes()


def test_pytorch_grad_cam_shows_where_a_network_looks() -> None:
    pytest.importorskip("pytorch_grad_cam", reason=MISSING)
    net: Any = timm.create_model("cifar_resnet20", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    heat = run_section("pytorch-grad-cam", net=net, images=images)["heat"]
    fmap = net.forward_features(images)
    (weights,) = torch.autograd.grad(net.forward_head(fmap)[:, 69].sum(), fmap)
    expected = (weights.mean((2, 3), keepdim=True) * fmap).sum(1).relu()
    assert heat.shape == (2, 32, 32)
    best = [int(each.argmax()) for each in expected.detach()]
    centres = [(i // expected.shape[2], i % expected.shape[2]) for i in best]
    scale = 32 // expected.shape[1]
    assert all(
        each[y * scale : (y + 1) * scale + 1, x * scale : (x + 1) * scale + 1].max() > 0.9
        for each, (y, x) in zip(heat, centres, strict=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning about workers and loggers
def test_lightning_trains_a_network() -> None:
    pytest.importorskip("lightning", reason=MISSING)
    left = run_section("Lightning")
    start = timm.create_model("cifar_resnet20_pfd", pretrained=True).state_dict()["stem.0.weight"]
    assert left["trainer"].global_step == 2
    assert not torch.equal(left["training"].net.state_dict()["stem.0.weight"], start)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of ExecuTorch about its own deprecations
def test_executorch_computes_what_the_network_computes() -> None:
    runtime = pytest.importorskip("executorch.runtime", reason=MISSING)
    net = run_section("ExecuTorch")["net"]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method = runtime.Runtime.get().load_program("net.pte").load_method("forward")
    assert_close(method.execute([images])[0], logits_of(net, images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of coremltools about releases of torch and scikit-learn
def test_core_ml_takes_a_network() -> None:
    pytest.importorskip("coremltools", reason=MISSING)
    spec = run_section("Core ML")["converted"].get_spec()
    (taken,) = spec.description.input
    assert list(taken.type.multiArrayType.shape) == [1, 3, 32, 32]
    assert Path("net.mlpackage").is_dir()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of anomalib about its own deprecations
def test_anomalib_finds_what_differs_from_the_images_it_knows() -> None:
    pytest.importorskip("anomalib", reason="anomalib is not in the extra: docs/integrations.md")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    left = run_section("anomalib", images=images)
    assert left["found"].anomaly_map.shape == (4, 1, 64, 64)
    other = left["model"](images + torch.linspace(0, 1, 64))
    assert (other.pred_score > left["found"].pred_score).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of SAHI about optional packages
def test_sahi_has_the_boxes_of_the_detector(detector: str) -> None:
    pytest.importorskip("sahi", reason="SAHI is not in the extra: docs/integrations.md")
    shutil.copy(ROOT / "examples" / "images" / "rocket.jpg", "photo.jpg")
    left = run_section("SAHI")
    found = Detector(detector, score_threshold=0.1, device="cpu")("photo.jpg")
    boxes = torch.tensor([each.bbox.to_xyxy() for each in left["whole"]])
    assert len(found) > 0 and torch.equal(boxes, found.boxes)
    assert [each.score.value for each in left["whole"]] == found.scores.tolist()
    assert [each.category.name for each in left["whole"]] == [*found.names]
    assert len(left["sliced"]) > 0
