"""Boxes come back in the pixels of the original image, with tiles or without, in Python and on the command line."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from networks import config_of, random_network
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.ops import box_convert

from spd_zoo import Detections, Detector
from spd_zoo.blocks import ImageSizeError
from spd_zoo.cli.main import main
from spd_zoo.data.labelled import DataError
from spd_zoo.data.reading import read_image
from spd_zoo.inference.detector import Placement, merge_views, postprocess, prepare
from spd_zoo.models._detector import DetectionNet
from spd_zoo.weights import save_network
from spd_zoo.weights.load import ModelError, load_network

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
EXAMPLES = Path(__file__).parent.parent / "examples" / "images"
Box = tuple[int, int, int, int]


class Finder(DetectionNet):
    """Finds the smallest boxes around all red, all green and all blue pixels; its raw predictions are the images."""

    iou_threshold = 0.7

    def __init__(self, channels: int = 3) -> None:
        stem = nn.Sequential(nn.Conv2d(channels, 8, 1))
        super().__init__(stem, nn.Sequential(), [{"num_chs": 8, "reduction": 1, "module": "stem.0"}], 3, channels)
        size = (channels, 96, 128)
        self.pretrained_cfg = {"input_size": size, "num_classes": 3, "label_names": tuple(COLOURS), "architecture": ""}
        self.pretrained_cfg |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        self.seen: list[int] = []  # how many images came at once

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x

    def decode(self, raw: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        found = torch.zeros(len(raw), 3, 4 + 3)
        for i, image in enumerate(raw):
            for label in range(3):
                rows, columns = (image[label] - image.sum(0) / 2 > 0.25).nonzero().unbind(1)  # half of a whole colour
                if len(rows):
                    corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
                    found[i, label, :4] = box_convert(corners, "xyxy", "cxcywh")
                    found[i, label, 4 + label] = 0.5 + 0.1 * label
        return found

    def get_classifier(self) -> nn.ModuleList:
        raise NotImplementedError

    def replace_classifier(self, num_classes: int) -> None:
        raise NotImplementedError

    def num_classes_of(self, outputs: int) -> int:
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def forward_head(self, maps: list[Tensor]) -> Any:
        raise NotImplementedError

    def loss(self, *args: Any) -> dict[str, Tensor]:
        raise NotImplementedError


def picture(size: tuple[int, int], **boxes: Box) -> Image.Image:
    """A dark picture, (width, height), with a rectangle of each colour."""
    image = Image.new("RGB", size, (10, 10, 10))
    for name, box in boxes.items():
        image.paste(COLOURS[name], box)
    return image


def found_in(detections: Detections) -> dict[str, list[float]]:
    assert len(set(detections.names)) == len(detections)
    return dict(zip(detections.names, detections.boxes.tolist(), strict=True))


@pytest.mark.parametrize("keeps_aspect", [True, False])
@pytest.mark.parametrize("size", [(128, 96), (400, 300), (61, 200), (200, 61), (17, 13), (1000, 40)])
def test_boxes_come_back_where_the_objects_are(size: tuple[int, int], keeps_aspect: bool) -> None:
    width, height = size
    boxes = {
        "red": (0, 0, width // 2, height // 2),
        "green": (width // 2, height // 4, width, height),
        "blue": (width // 8, height * 3 // 5, width // 3, height * 9 // 10),
    }
    net = Finder()
    net.keeps_aspect = keeps_aspect
    found = found_in(Detector(net)(picture(size, **boxes)))
    assert found.keys() == boxes.keys()
    x, y = max(1, width / 128), max(1, height / 96)  # pixels of the picture in one of the input
    if keeps_aspect:
        x = y = max(x, y)
    for name, box in boxes.items():
        assert np.abs(np.subtract(found[name], box) / (x, y, x, y)).max() <= 1, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_seen_upright(orientation: int, tmp_path: Path) -> None:
    upright = picture((80, 60), red=(8, 4, 40, 20), blue=(60, 40, 72, 52))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's number of what undoes each
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    detector = Detector(Finder())
    for given in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.open(tmp_path / "photo.png")):
        found = found_in(detector(given))
        np.testing.assert_allclose(found["red"], (8, 4, 40, 20), atol=1)
        np.testing.assert_allclose(found["blue"], (60, 40, 72, 52), atol=1)


def test_grey_transparent_and_palette_images_are_seen_in_colour() -> None:
    image = picture((64, 48), red=(8, 8, 24, 40))
    detector = Detector(Finder())
    for mode in ("RGBA", "P", "CMYK"):
        assert detector(image.convert(mode)).names == ["red"]
    for mode in ("L", "1", "LA"):
        assert len(detector(image.convert("L").convert(mode))) == 0
    with pytest.warns(UserWarning, match="16 bits, of which the highest two or more are not used"):
        assert len(detector(image.convert("L").convert("I;16"))) == 0
    net = Finder(1)
    inputs, _ = prepare(image, net, (48, 64))
    assert inputs.shape == (1, 48, 64) and inputs[0, 20, 10] == pytest.approx(76 / 255, abs=0.01)


def test_the_same_image_in_any_form_gives_the_same() -> None:
    image = picture((90, 70), red=(8, 8, 24, 40), green=(50, 10, 80, 60))
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    detector = Detector(Finder())
    expected = detector(image)
    assert len(expected) == 2
    for same in (array, tensor, tensor / 255, (tensor / 255).double(), tensor.contiguous()):
        assert torch.equal(detector(same).boxes, expected.boxes)


def test_images_of_mixed_sizes_give_the_same_in_a_batch_as_alone() -> None:
    images = [picture(size, red=(3, 3, 9, 12), blue=(20, 5, 30, 15)) for size in ((40, 30), (33, 77), (128, 96))]
    net = Finder()
    detector = Detector(net, batch_size=2)
    together = detector([*images, np.asarray(images[1])])
    assert net.seen == [2, 2]
    for one, image in zip(together, [*images, images[1]], strict=True):
        alone = detector(image)
        assert torch.equal(one.boxes, alone.boxes) and torch.equal(one.scores, alone.scores)
    assert detector([]) == []


@pytest.mark.parametrize("name", ["yolov8n_spd", "yolov5n_spd", "ssd_mobilenetv1"])
def test_real_detectors_give_boxes_inside_the_image_best_first(name: str) -> None:
    net = random_network(name, num_classes=2)
    size = 64 if name.startswith("yolo") else 300
    detector = Detector(net, image_size=size, score_threshold=0.0, max_detections=50)
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    found = detector(image)
    assert 10 < len(found) <= 50 and found.names == [str(label) for label in found.labels.tolist()]
    assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= torch.tensor([90, 40])).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all() and found.scores.diff().le(0).all()
    found.boxes.add_(1)  # an ordinary tensor
    two = detector([image, image[:, :30]])
    torch.testing.assert_close(two[0].scores, found.scores, rtol=1e-3, atol=1e-5)


def test_yolov5s_score_is_objectness_times_probability() -> None:
    net: Any = timm.create_model("yolov5n_spd", num_classes=2).eval()
    raw = [torch.full((1, 3, 64 // s, 64 // s, 7), -20.0) for s in net.strides]
    raw[1][0, 0, 1, 2] = torch.tensor([0.0, 0, 0, 0, 1.0, 2.0, -2.0])  # a box of the first anchor of stride 16
    (found,) = postprocess(net, raw, [Placement((64, 64), (1.0, 1.0))], (64, 64), score_threshold=0.05)
    objectness, first, second = torch.tensor([1.0, 2.0, -2.0]).sigmoid().tolist()
    assert found.labels.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([objectness * first, objectness * second])
    assert found.boxes[0].tolist() == pytest.approx([40 - 15, 0, 40 + 15, 24 + 30.5])  # 30x61 around (40, 24), clipped


def test_each_family_gets_its_images_as_its_authors_feed_them() -> None:
    image = picture((30, 20), red=(0, 0, 30, 20))
    yolo: Any = timm.create_model("yolov8n_spd", device="meta")
    inputs, place = prepare(image, yolo, (64, 64))
    assert place.offset == (0, 10)  # 64x43 in 64x64: 21 rows of grey, one more below than above
    assert inputs[:, 0, 5].tolist() == pytest.approx([114 / 255] * 3)
    assert inputs[:, 9, 5].tolist() == pytest.approx([114 / 255] * 3)
    assert inputs[:, 10, 5].tolist() == inputs[:, 52, 5].tolist() == [1, 0, 0]
    assert inputs[:, 53, 5].tolist() == pytest.approx([114 / 255] * 3)
    ssd: Any = timm.create_model("ssd_vgg16", device="meta")
    inputs, _ = prepare(image, ssd, (300, 300))
    expected = torch.tensor([-103.94, -116.78, 255 - 123.68])[:, None, None].expand(3, 300, 300)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-3)
    boxes = torch.tensor([[1.0, 2.0, 25.0, 19.0]])
    torch.testing.assert_close(place.to_original(place.to_input(boxes)), boxes)


def test_names_are_those_of_the_weights_or_else_numbers() -> None:
    cfg = config_of("yolov5n_spd.spd_coco").to_dict() | {"architecture": "yolov5n_spd"}
    net: Any = timm.create_model("yolov5n_spd", device="meta")
    assert Detector(net).class_names[0] == "0"
    net.pretrained_cfg = cfg | {"tag": "spd_coco"}
    names = Detector(net).class_names
    assert len(names) == 80 and names[:2] == ("person", "bicycle") and names[79] == "toothbrush"
    net.reset_classifier(4)
    assert Detector(net).class_names == ("0", "1", "2", "3")


# tiles


def test_an_object_cut_by_the_sides_of_tiles_is_found_once_and_whole() -> None:
    image = picture((300, 200), red=(90, 85, 120, 115), green=(200, 20, 212, 30), blue=(2, 180, 20, 199))
    net = Finder()
    detector = Detector(net, image_size=(100, 100), tile=100, overlap=0.4, whole_image=False, batch_size=4)
    found = found_in(detector(image))
    assert sum(net.seen) == 5 * 3 and max(net.seen) == 4  # tiles begin at 0, 50, ..., 200 and at 0, 50, 100
    assert found == {"red": [90, 85, 120, 115], "green": [200, 20, 212, 30], "blue": [2, 180, 20, 199]}


@pytest.mark.parametrize("whole_image", [True, False])
def test_an_object_larger_than_the_overlap_is_whole_in_the_view_of_the_whole_image(whole_image: bool) -> None:
    image = picture((300, 200), red=(30, 30, 270, 170))
    detector = Detector(Finder(), image_size=(200, 300), tile=100, overlap=0.2, whole_image=whole_image)
    found = detector(image)
    if whole_image:
        assert found.boxes.tolist() == [[30, 30, 270, 170]]
    else:
        assert len(found) > 1 and found.boxes[:, :2].amin(0).tolist() == [30, 30]


def test_tiles_show_what_is_too_small_in_the_whole_image() -> None:
    image = picture((960, 720), red=(500, 300, 505, 305))
    assert len(Detector(Finder())(image)) == 0
    (box,) = Detector(Finder(), tile=96, overlap=0.25)(image).boxes.tolist()
    assert box == pytest.approx([500, 300, 505, 305], abs=1)


def test_parts_and_objects_of_different_classes_do_not_suppress_each_other() -> None:
    image = picture((200, 100), red=(60, 20, 160, 80), green=(90, 40, 100, 50))
    found = found_in(Detector(Finder(), image_size=(100, 200), tile=100, overlap=0.2)(image))
    assert found == {"red": [60, 20, 160, 80], "green": [90, 40, 100, 50]}


@pytest.mark.parametrize("iou_threshold", [0.9, 0.4])
def test_objects_of_one_view_are_one_on_tiles_above_an_iou_of_a_half(iou_threshold: float) -> None:
    boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 24], [60, 60, 70, 70], [60, 60, 70, 64.5]])
    view = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.long), ("cell",))
    placements = [Placement((100, 100), (1.0, 1.0), corner=(left, 0)) for left in (0, 60)]
    merged = merge_views([view, view[:0]], placements, iou_threshold)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.7, 0.6] if iou_threshold == 0.9 else [0.9, 0.7])


@pytest.mark.parametrize("size", [(90, 40), (100, 100), (30, 100)])
def test_an_image_that_fits_into_a_tile_gives_what_it_gives_without_tiles(size: tuple[int, int]) -> None:
    image = picture(size, red=(3, 3, 9, 12))
    net = Finder()
    plain, tiled = Detector(net)(image), Detector(net, tile=100)(image)
    assert net.seen == [1, 1]
    assert torch.equal(plain.boxes, tiled.boxes) and torch.equal(plain.scores, tiled.scores)


def test_tiles_cover_an_image_with_no_less_overlap_than_asked_for() -> None:
    net, image = Finder(), picture((1000, 150))
    for tile, overlap in ((100, 0.0), (128, 0.2), (333, 0.5), (999, 0.9)):
        detector = Detector(net, tile=tile, overlap=overlap, whole_image=False)
        places = [place for _, place in detector.views(image)]
        covered = np.zeros((150, 1000), bool)
        for place in places:
            (left, top), (height, width) = place.corner, place.size
            covered[top : top + height, left : left + width] = True
            assert left + width <= 1000 and top + height <= 150 and max(height, width) == tile
        assert covered.all()
        columns = sorted({place.corner[0] for place in places})
        assert max(np.diff(columns)) <= max(1, tile * (1 - overlap)) + 1


# what is found, in other forms


def test_detections_turn_into_torchvisions_and_can_be_selected() -> None:
    found = Detector(Finder())(picture((128, 96), red=(3, 3, 9, 12), blue=(20, 5, 30, 15)))
    assert found.names == ["blue", "red"] and found.scores.tolist() == pytest.approx([0.7, 0.5])
    assert {key: value.tolist() for key, value in found.to_torchvision().items()} == {
        "boxes": [[20, 5, 30, 15], [3, 3, 9, 12]],
        "scores": found.scores.tolist(),
        "labels": [2, 0],
    }
    assert found[found.scores > 0.6].names == ["blue"] and found[1:].names == ["red"]


@pytest.mark.skipif(importlib.util.find_spec("supervision") is None, reason="needs the package supervision")
@pytest.mark.filterwarnings("ignore:OpenCV")
@pytest.mark.parametrize("boxes", [{"red": (3, 3, 9, 12), "blue": (20, 5, 30, 15)}, {}])
def test_detections_turn_into_supervisions(boxes: dict[str, Box]) -> None:
    found = Detector(Finder())(picture((128, 96), **boxes)).to_supervision()
    assert type(found).__module__.startswith("supervision") and len(found) == len(boxes)
    assert found.data["class_name"].tolist() == ["blue", "red"][: len(boxes)]
    assert found.xyxy.shape == (len(boxes), 4) and found.class_id.tolist() == [2, 0][: len(boxes)]
    assert len(found[found.confidence > 0.6]) == bool(boxes)


def test_without_supervision_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install supervision"):
        Detector(Finder())(picture((30, 30))).to_supervision()


def test_drawn_boxes_lie_around_the_objects_and_leave_the_image_as_it_was() -> None:
    image = picture((128, 96), blue=(20, 40, 60, 70))
    before = image.tobytes()
    drawn = np.asarray(Detector(Finder())(image).draw(image))
    assert image.tobytes() == before
    changed = np.argwhere((drawn != np.asarray(image)).any(2))
    assert changed.min(0)[1] == 20 and changed.max(0)[0] == 70
    assert (drawn[50, 40] == COLOURS["blue"]).all() and (drawn[80, 100] == 10).all()


def coloured(*boxes: tuple[float, float, float, float]) -> int:
    """Pixels that are not black when these objects, equal but for their boxes, are drawn on a black image."""
    number = len(boxes)
    found = Detections(torch.tensor(boxes), torch.full((number,), 0.9), torch.zeros(number).long(), ("cell",))
    return int(np.asarray(found.draw(Image.new("RGB", (200, 100)))).any(2).sum())


def test_labels_of_drawn_boxes_lie_in_the_image_and_hide_no_other_one() -> None:
    box = (80.0, 40.0, 84.0, 44.0)
    label = coloured(box) - 16  # pixels of the outline
    assert coloured((196.0, 40.0, 199.0, 44.0)) > label  # at the right edge
    assert coloured((80.0, 0.0, 84.0, 4.0)) > label
    assert coloured(box, box) > 1.9 * label
    assert coloured(*[box] * 9) <= 4 * label + 16


# errors


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"\(H, W, 3\)"),
        (torch.zeros(4, 4, 3), r"\(3, H, W\)"),
        (torch.zeros(2, 3, 4, 4), "several images as a list"),
        (torch.full((3, 4, 4), 255.0), "from 0 to 1"),
        (torch.full((3, 4, 4), float("nan")), "from 0 to 1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8"),
        (Path("missing.png"), "missing.png: there is no such file"),
        (7, "int"),
        (Image.new("F", (4, 4), -1.0), "32 bits"),
    ],
)
def test_an_invalid_image_gives_one_clear_sentence(image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Detector(Finder())(image)
    with pytest.raises(ValueError, match=words):
        Detector(Finder())([image])


@pytest.mark.parametrize(
    "options",
    [
        {"score_threshold": 1.5},
        {"iou_threshold": -0.1},
        {"max_detections": 0},
        {"batch_size": 0},
        {"tile": 0},
        {"image_size": 0},
        {"image_size": (64, -32)},
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"max_detections": 2.5},
        {"batch_size": 2.5},
        {"tile": 300.0},
        {"image_size": 320.0},
        {"image_size": "320"},
        {"image_size": (3, 320, 320)},
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        Detector(Finder(), **options)


@pytest.mark.parametrize("wrong", [True, 1.5, None], ids=str)
def test_a_class_that_is_neither_a_name_nor_a_number_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match=f"a class must be a name or a whole number, got {wrong}"):
        Detector(Finder(), classes=[wrong])
    with pytest.raises(DataError, match=f"a class must be a name or a whole number, got {wrong}"):
        Detector(Finder(), class_scores={wrong: 0.5})
    assert torch.equal(*(torch.as_tensor(Detector(Finder(), classes=[one]).thresholds) for one in (1, np.int64(1))))


def test_a_size_that_the_network_does_not_take_is_refused() -> None:
    with pytest.raises(ImageSizeError, match="multiples of 32"):
        Detector(timm.create_model("yolov8n_spd", num_classes=1), image_size=60)(picture((30, 30)))


def broken_network(run: str) -> nn.Module:
    net = load_network(run, "cpu")
    with torch.no_grad():
        next(net.parameters())[0] = 3e38  # finite, but sums of it are not
    return net


def test_a_network_that_computes_nan_is_an_error(run: str) -> None:
    message = r"YOLOv8 computes numbers that are not finite in torch\.float32: its weights are damaged, or need a wider"
    with pytest.raises(ModelError, match=message):
        Detector(broken_network(run))(picture((60, 40)))


@pytest.mark.slow
def test_a_network_that_computes_nan_is_one_error_for_all_images(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_network(broken_network(run), tmp_path / "broken")
    for name in ("a.png", "b.png"):
        picture((60, 40)).save(tmp_path / name)
    broken, images = str(tmp_path / "broken"), (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    for options in ((), ("--out", str(tmp_path / "marked")), ("--results", str(tmp_path / "found.csv"))):
        status, out, err = run_command(capsys, broken, *images, *options)
        assert status == 1 and out == "" and err.count("\n") == 1 and "broken computes numbers that are not" in err
    assert not (tmp_path / "marked").exists() and not (tmp_path / "found.csv").exists()


def test_a_classifier_is_refused_with_the_command_for_it() -> None:
    with pytest.raises(ModelError, match="spd-zoo predict"):
        Detector(timm.create_model("cifar_resnet20"))
    with pytest.raises(ModelError, match="spd-zoo predict"):
        Detector("cifar_resnet20_pfd", device="cpu")
    for name in ("resnet18", "resnet50_spd.spd_cifar10"):  # whose weights are not on this machine
        with pytest.raises(ModelError, match="is no detector; run `spd-zoo predict"):
            Detector(name)


def test_objects_know_their_image_and_show_it_in_a_notebook(tmp_path: Path) -> None:
    picture((60, 40)).save(tmp_path / "a.png")
    picture((40, 60)).save(tmp_path / "b.png")
    detector = Detector(Finder())
    folder = detector(tmp_path)
    assert [each.image for each in folder] == [tmp_path / "a.png", tmp_path / "b.png"]
    found = detector(str(tmp_path / "a.png"))
    for image in (None, tmp_path / "a.png", np.asarray(picture((60, 40))), picture((60, 40))):
        assert np.array_equal(np.asarray(found.draw(image)), np.asarray(folder[0].draw()))
    assert "<img src=" in found._repr_html_()
    assert repr(found).startswith("Detections(") and "\n" not in repr(found) + repr(detector)
    assert len(found.to_pandas()) == len(found.to_dict()) == len(found)
    with pytest.raises(ValueError, match="do not know their image"):
        dataclasses.replace(found, image=None).draw()


def test_detections_are_indexed_and_iterated_like_a_sequence() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 9, 9], [2, 2, 6, 8]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), ("cell", "nucleus"))
    assert [repr(each) for each in found] == ["Detections(1 cell)", "Detections(1 nucleus)", "Detections(1 cell)"]
    assert found[-1].to_dict() == found.to_dict()[2:] == found[2:].to_dict()
    for mask in (found.labels == 0, np.array([True, False, True]), [True, False, True], [0, 2]):
        assert found[mask].to_dict() == [found.to_dict()[0], found.to_dict()[2]]
    for one in (np.int64(1), np.array(1), torch.tensor(1), found.scores[1:].argmax() + 1):
        assert found[one].to_dict() == found.to_dict()[1:2] and repr(found[one]) == "Detections(1 nucleus)"
    assert found[torch.tensor([1])].to_dict() == found.to_dict()[1:2]
    assert found[:1][torch.tensor([False])].to_dict() == []  # a mask, not the number 0
    assert list(found[:0]) == []
    with pytest.raises(IndexError):
        found[3]


def test_an_image_without_objects_is_reported(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture((60, 40)).save(tmp_path / "a.png")
    status, out, _ = run_command(capsys, run, str(tmp_path / "a.png"), "--score", "0.99")
    assert status == 0 and out.splitlines()[1:] == ["  no objects above 0.99"]


# the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder that a run leaves, with a small detector that has learnt nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    config = {"pretrained_cfg": {"input_size": (3, 96, 96)}, "label_names": ["cat", "dog"]}
    net = timm.create_model("yolov8n_spd", num_classes=2)
    save_for_hf(net, str(folder), config, safe_serialization=True)
    return str(folder)


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["detect", *arguments])
    return status, *capsys.readouterr()


def test_a_detector_warns_of_assumptions(run: str) -> None:
    pixels = torch.linspace(0, 1, 64).reshape(8, 8).numpy()
    with pytest.warns(UserWarning, match="32 bits without a range, read as values from 0 to 1"):
        Detector(run, device="cpu")(Image.fromarray(pixels))


def test_the_command_marks_images_and_writes_coco(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    picture((60, 40)).save(tmp_path / "photos" / "a.png")
    picture((40, 60)).save(tmp_path / "photos" / "more" / "a.tif")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    status, out, err = run_command(capsys, run, "photos", "--out", "marked", "--score", "0", "--device", "cpu")
    assert status == 1 and err.startswith("spd-zoo: error: photos/broken.jpg: ") and err.count("\n") == 1
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["photos/a.png", "photos/more/a.tif"]
    written = {str(path.relative_to("marked")) for path in Path("marked").rglob("*") if path.is_file()}
    assert written == {"a.png", "more/a.tif.png", "detections.json"}
    assert read_image("marked/a.png").size == (60, 40)
    coco = json.loads(Path("marked/detections.json").read_text())
    assert [(image["file_name"], image["width"], image["height"]) for image in coco["images"]] == [
        ("photos/a.png", 60, 40),
        ("photos/more/a.tif", 40, 60),
    ]
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog"]
    found = Detector(run, device="cpu", score_threshold=0.0)("photos/a.png")
    first = [one for one in coco["annotations"] if one["image_id"] == 1]
    assert [one["category_id"] for one in first] == (found.labels + 1).tolist()
    xyxy = box_convert(torch.tensor([one["bbox"] for one in first]), "xywh", "xyxy")
    torch.testing.assert_close(xyxy, found.boxes, rtol=0, atol=0.02)

    assert run_command(capsys, run, "photos/a.png", "--out", "marked")[2].endswith("choose a new folder with --out\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marked", "photos"]


def test_marked_images_do_not_lie_among_the_images(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    picture((60, 40)).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    for images, out in (
        ("photos", "photos/marked"),
        (".", "photos/more/marked"),
        ("photos/../photos", "photos/marked"),
    ):
        error = f"spd-zoo: error: {out} lies among the images in {images}; give another --out\n"
        assert run_command(capsys, run, images, "--out", out, "--device", "cpu") == (1, "", error)
    assert [path.name for path in Path("photos").iterdir()] == ["a.png"]
    assert run_command(capsys, run, "photos/a.png", "--out", "photos/marked", "--device", "cpu")[0] == 0


def test_no_copy_leaves_the_folder(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        picture((60, 40)).save(tmp_path / folder / "a.jpg")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["detect", run, "a.jpg", "../there/a.jpg", "a.jpg", "--out", "marked", "--score", "0.9"]) == 0
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    copies = {"here/marked/here/a.jpg", "here/marked/there/a.jpg", "here/marked/detections.json"}
    assert written == {"here/a.jpg", "there/a.jpg"} | copies
    assert len(json.loads(Path("marked/detections.json").read_text())["images"]) == 2


@pytest.mark.parametrize("package", ["pycocotools", "faster_coco_eval"])
def test_the_written_file_is_a_coco_data_set(run: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    coco = importlib.import_module(f"{package}.coco" if package == "pycocotools" else package).COCO
    picture((60, 40)).save(tmp_path / "a.png")
    out = tmp_path / "marked"
    assert main(["detect", run, str(tmp_path / "a.png"), "--out", str(out), "--score", "0"]) == 0
    loaded = coco(str(out / "detections.json"))
    assert loaded.getImgIds() == [1] and len(loaded.getAnnIds(imgIds=[1])) > 0
    own = json.loads((out / "detections.json").read_text())["annotations"]
    (out / "results.json").write_text(json.dumps(own))
    assert len(loaded.loadRes(str(out / "results.json")).getAnnIds()) == len(own)


def test_the_command_prints_json_and_takes_tiles(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture((200, 100)).save(tmp_path / "a.png")
    options = ("--score", "0", "--iou", "0.5", "--tile", "96", "--overlap", "0.3", "--image-size", "64", "--json")
    status, out, err = run_command(capsys, run, str(tmp_path / "a.png"), *options)
    assert status == 0 and err == ""
    found = Detector(run, device="cpu", score_threshold=0.0, iou_threshold=0.5, tile=96, overlap=0.3, image_size=64)
    assert len(json.loads(out)["annotations"]) == len(found(tmp_path / "a.png")) > 0


def test_a_failing_command_leaves_nothing(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture((60, 40)).save(tmp_path / "a.png")
    out = str(tmp_path / "marked")
    status, _, err = run_command(capsys, run, str(tmp_path / "a.png"), "--out", out, "--image-size", "50")
    assert status == 1 and "multiples of 32" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("cifar_resnet20", "spd-zoo predict"),
        ("yolov8n_spd", "yolov8n_spd"),
        ("yolov9", "yolov8n"),
        (".", "config.json"),
    ],
)
def test_a_network_that_cannot_detect_gives_one_clear_sentence(
    model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_command(capsys, model, str(EXAMPLES / "coffee.png"))
    assert status == 1 and out == "" and err.count("\n") == 1 and words in err
