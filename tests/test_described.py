"""What a detector's checkpoint from elsewhere states about its network is kept, used, and refused if wrong."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import golden
import pytest
import timm
import torch
from box_pictures import make_coco
from huggingface_hub import constants
from networks import random_network
from safetensors.torch import save_file
from shared_data import shared
from torch import Tensor, nn

import spd_zoo
from spd_zoo.cli.main import main
from spd_zoo.data.boxes import open_boxes
from spd_zoo.models._detector import DetectionNet
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.finetune import finetune
from spd_zoo.weights import WeightsError, import_weights, origin_of, read_checkpoint
from spd_zoo.weights.described import check_task, described, fields_in, fields_of_metadata

TRAINED_ELSEWHERE = "checkpoints/yolov8n_bccd_trained_elsewhere.pt"
NAMES = {0: "RBC", 1: "WBC", 2: "Platelets"}
Capture = pytest.CaptureFixture[str]


def as_network(tensors: Mapping[str, Tensor], **attributes: Any) -> nn.Module:
    """A network with these tensors and attributes, to be pickled as a whole."""
    net = nn.Module()
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        module = net
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(name, tensor)
    vars(net).update(attributes)
    return net


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    net: nn.Module = random_network("yolov8n", num_classes=3)
    return net.state_dict()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, for commands, too."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checkpoint(tensors: Mapping[str, Tensor], file: Path, **attributes: Any) -> Path:
    """A checkpoint as YOLO's training programs write it."""
    known = {"names": NAMES, "nc": 3, "stride": torch.tensor([8.0, 16.0, 32.0]), "args": {"task": "detect"}}
    settings = {"task": "detect", "imgsz": 96, "names": None}
    net = as_network(tensors, **known | attributes)
    torch.save({"version": "8.4.190", "license": "X", "model": net, "ema": None, "train_args": settings}, file)
    return file


def meta(name: str = "yolov8n") -> nn.Module:
    net: nn.Module = timm.create_model(name, device="meta")
    return net


# Kept and used


@pytest.mark.slow
def test_classes_and_image_size_of_a_pickled_network_are_kept_and_used(
    tensors: dict[str, Tensor], tmp_path: Path, cache: Path, capsys: Capture
) -> None:
    assert main(["weights", "import", "yolov8n.cells", str(checkpoint(tensors, tmp_path / "best.pt"))]) == 0
    assert "classes: RBC, WBC, Platelets\nimage size: 96x96; licence: X" in capsys.readouterr().out
    (kept,) = (cache / "spd_zoo").glob("*.safetensors")
    found = {name: origin_of(kept)[name] for name in ("names", "imgsz", "nc", "task", "stride", "version", "license")}
    assert found == {
        **{"names": '["RBC", "WBC", "Platelets"]', "imgsz": "[96, 96]", "nc": "3", "stride": "[8, 16, 32]"},
        **{"task": "detect", "version": "8.4.190", "license": "X"},
    }
    assert main(["info", "yolov8n.cells"]) == 1
    assert "yolov8n.cells was imported" in capsys.readouterr().err
    detector = spd_zoo.Detector("yolov8n.cells")
    assert (detector.class_names, detector.image_size) == (("RBC", "WBC", "Platelets"), (96, 96))
    net: Any = timm.create_model("yolov8n.cells")  # its structure, with random weights
    assert (net.num_classes, net.pretrained_cfg["input_size"]) == (3, (3, 96, 96))


@pytest.mark.parametrize("names", [["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}, {2: "c", 0: "a", 1: "b"}], ids=str)
def test_names_are_a_list_or_a_dict_with_numbers_as_keys(names: Any) -> None:
    assert described({"names": names}, meta(), 3, "x").names == ("a", "b", "c")


def test_names_that_are_only_numbers_are_none() -> None:
    assert described({"names": {0: "0", 1: "1"}}, meta(), 2, "x").names is None


def test_settings_in_an_object_of_an_unknown_class_are_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"state_dict": tensors, "args": Namespace(imgsz=[64, 96], names=["a", "b", "c"])}
    torch.save(content, tmp_path / "a.pt")
    net: Any = timm.create_model("yolov8n", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "a.pt")})
    assert net.pretrained_cfg["input_size"] == (3, 64, 96)
    assert net.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_the_network_decides_before_the_settings_beside_it() -> None:
    found = fields_in([{"nc": 3, "yaml": {"nc": 80}}, {"nc": 7, "train_args": {"imgsz": 320}}])
    assert found == {"nc": 3, "imgsz": 320}


def test_an_image_size_that_is_not_a_multiple_is_rounded_up_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="image size 300x300 is taken as 320x320, multiples of 32"):
        assert described({"imgsz": 300}, meta(), 3, "x").image_size == (320, 320)


def test_metadata_of_other_programs_are_ignored() -> None:
    assert fields_of_metadata({"names": "{0: 'a'}"}) == {}


# Refused


@pytest.mark.parametrize(
    ("task", "printed"),
    [("segment", "'segment'"), ("classify", "'classify'"), (5, "5"), ({}, "of type dict"), ("\x1b[2J", r"'\[2J'")],
)
def test_a_checkpoint_for_another_task_is_refused_in_a_sentence(task: Any, printed: str) -> None:
    with pytest.raises(WeightsError, match=rf"x is a checkpoint for the task {printed}.*, and yolov8n is a detector: "):
        check_task({"task": task}, "yolov8n", "x")


def test_the_task_is_checked_before_the_tensors(tmp_path: Path) -> None:
    torch.save({"model": as_network({"a": torch.zeros(1)}, task="pose")}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="checkpoint for the task 'pose'"):
        import_weights("yolov8n.a", tmp_path / "a.pt", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ["a", "b"]}, "it names 2 classes, but its tensors are those of 3"),
        ({"nc": 80, "names": NAMES}, "nc is 80, but its tensors are those of 3 classes"),
        ({"nc": "3"}, "nc is '3'"),
        ({"nc": True}, r"nc is of type bool"),
        ({"names": "abc"}, "its class names are neither a list nor a dict"),
        ({"names": {1: "a", 2: "b", 3: "c"}}, "its 3 class names are not numbered from 0 to 2"),
        ({"names": {0: "a", None: "b", 2: "c"}}, "its 3 class names are not numbered from 0 to 2"),
        ({"names": ["a", "b", ["c"]]}, "the name of its class 2 is not text"),
        ({"names": ["a", "b" * 10**6, "c"]}, "the name of its class 1 has 1000000 characters, more than 200"),
        ({"imgsz": "320"}, "its image size is neither a number of pixels nor a pair of them"),
        ({"imgsz": [320, 320, 3]}, "its image size is neither"),
        ({"imgsz": -32}, "its image size is neither"),
        ({"imgsz": 2**70}, "its image size is larger than"),
        (
            {"stride": torch.tensor([4.0, 8.0, 16.0])},
            "its maps have the strides 4, 8, 16, and the network's have 8, 16",
        ),
        ({"stride": torch.zeros(2, 2)}, "the strides of its maps are not a list of numbers"),
        ({"stride": "8"}, "the strides of its maps are not a list of numbers"),
        ({"activation": "nn.ReLU()"}, r"its activation is 'nn.ReLU\(\)', and the network's is SiLU"),
    ],
)
def test_fields_that_contradict_the_tensors_or_are_malformed_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=f"x cannot be used as it is: {message}.*save only the state dict"):
        described(fields, meta(), 3, "x")


def test_characters_that_control_a_terminal_do_not_get_into_names() -> None:
    with pytest.warns(UserWarning, match=r"class names .* are changed to '\[31mred', '1', 'nogard'"):
        found = described({"names": ["\x1b[31mred", "\n", "\u202enogard", "ok"], "version": "8\x07"}, meta(), 4, "x")
    assert found.names == ("[31mred", "1", "nogard", "ok")
    assert found.texts == {"version": "8"}


@pytest.mark.slow
def test_what_an_import_guesses_is_a_note(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = checkpoint(tensors, tmp_path / "best.pt", args={"imgsz": 100})
    command = [sys.executable, "-m", "spd_zoo", "weights", "import", "yolov8n.cells", str(file)]
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    printed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stderr
    assert printed == f"note: {file}: the image size 100x100 is taken as 128x128, multiples of 32\n"
    printed = subprocess.run([*command, "--quiet"], check=True, env=environment, capture_output=True, text=True).stderr
    assert not printed


def test_metadata_of_an_imported_file_that_was_changed_are_checked_like_those_of_a_checkpoint(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    metadata = {"original_sha256": "0" * 64, "names": json.dumps(["a"])}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(WeightsError, match="it names 1 classes"):
        timm.create_model("yolov8n", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "a.safetensors")})
    save_file(tensors, tmp_path / "a.safetensors", metadata | {"names": "[" * 10**6})
    with pytest.raises(WeightsError, match="no checkpoint that can be read safely"):
        read_checkpoint(tmp_path / "a.safetensors")


# Training


@pytest.mark.slow
def test_the_outputs_of_imported_weights_go_to_the_classes_of_their_names(
    tensors: dict[str, Tensor], tmp_path: Path, cache: Path
) -> None:
    data = open_boxes(make_coco(tmp_path / "data", train=8, val=4), "train")
    assert data is not None
    classes = data.class_names
    turned = dict(enumerate(reversed(classes)))
    import_weights("yolov8n.mine", checkpoint(random_network("yolov8n", num_classes=len(classes)).state_dict(),
                                              tmp_path / "a.pt", names=turned, nc=len(classes)), cache)  # fmt: skip
    config = FinetuneConfig(model="yolov8n.mine", data=str(tmp_path / "data"), out=tmp_path / "run", epochs=1,
                            lr=1e-12, warmup_epochs=0, batch_size=8, workers=0)  # fmt: skip
    finetune(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 96, 96]
    names = ("yolov8n.mine", f"local-dir:{tmp_path / 'run'}")
    nets: list[Any] = [timm.create_model(name, pretrained=True) for name in names]
    old, new = (net.head.cv3[0][-1].bias for net in nets)
    torch.testing.assert_close(new, old.flip(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolov5n_spd", "ssd_mobilenetv1"])
def test_classes_in_another_order_have_the_same_scores(name: str) -> None:
    net: DetectionNet = random_network(name, num_classes=3).eval()
    images = torch.randn(1, 3, *net.pretrained_cfg["input_size"][1:])[..., :320, :320]
    size = (images.shape[2], images.shape[3])
    with torch.inference_mode():
        before = net.class_scores(net.decode(net(images), size))
        net.reorder_classes([2, 0, 1])
        after = net.class_scores(net.decode(net(images), size))
    torch.testing.assert_close(after, before[..., [2, 0, 1]])


# Weights that others trained


@pytest.mark.slow
@pytest.mark.parametrize("case", golden.cases("yolov8_p2"), ids=lambda case: case["id"])
def test_a_checkpoint_that_others_trained_with_a_map_of_stride_4_loads(case: dict[str, Any], tmp_path: Path) -> None:
    arrays = golden.fill_state_dict(case["entries"], case["kept"])
    theirs = {f"model.{key}" if not key.startswith("model.") else key: torch.from_numpy(a) for key, a in arrays.items()}
    names = {i: f"class {i}" for i in range(80)}
    strides = torch.tensor([4.0, 8.0, 16.0, 32.0])
    file = checkpoint(theirs, tmp_path / "best.pt", names=names, nc=80, stride=strides)
    import_weights(f"{case['model']}.mine", file, tmp_path)
    net: Any = timm.create_model(f"{case['model']}.mine", pretrained=True, cache_dir=tmp_path).eval()
    assert net.pretrained_cfg["label_names"] == list(names.values())
    with torch.inference_mode():
        boxes = net.decode(net(torch.from_numpy(golden.make_input(**case["input"]))))
    golden.assert_matches(boxes.mT.numpy(), case["outputs"][0])


def test_weights_with_and_without_a_map_of_stride_4_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="its maps have the strides 4, 8, 16, 32, and the network's have 8, 16, 32"):
        described({"stride": torch.tensor([4.0, 8.0, 16.0, 32.0])}, meta(), 80, "x")


@pytest.mark.slow
def test_weights_trained_elsewhere_are_imported_and_converted_exactly(cache: Path, capsys: Capture) -> None:
    import_weights("yolov8n.cells", shared(TRAINED_ELSEWHERE), cache)
    net: Any = timm.create_model("yolov8n.cells", pretrained=True).eval()
    assert net.pretrained_cfg["label_names"] == list(NAMES.values())
    assert net.pretrained_cfg["input_size"] == (3, 320, 320)
    converted: Any = spd_zoo.convert_to_spd(net)
    assert len(converted.spd_report.replaced) == 7
    for size in ((96, 64), (64, 64)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            for old, new in zip(net(images), converted(images), strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=1e-5 * old.std().item())
    with torch.inference_mode():
        found = spd_zoo.Detector(converted)(shared("bccd/images/BloodImage_00000.jpg"))
    assert set(found.names) == {"RBC", "WBC"}
