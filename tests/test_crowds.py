"""Many objects, some classes, minimum scores of classes, suppression across classes; every limit is reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from box_pictures import make_coco
from test_detect import Box, Finder, picture
from test_detection_training import found, predictions_of, truth
from test_exported import TINY, make_detector
from torch import Tensor
from torchvision.ops import box_convert

from spd_zoo import Detector, finetune
from spd_zoo.cli.main import main
from spd_zoo.data.labelled import DataError
from spd_zoo.training.detection.metrics import Suppression, coco_precision
from spd_zoo.training.evaluate import evaluate

Scripted = tuple[int, float, Box]  # label, score, x1 y1 x2 y2 in the input


class Script(Finder):
    """Returns prescribed objects for each view in turn."""

    def __init__(self, *views: list[Scripted]) -> None:
        super().__init__()
        self.views = views

    def decode(self, raw: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        out = torch.zeros(len(raw), max(map(len, self.views)), 4 + 3)
        for i, view in enumerate(self.views[: len(raw)]):
            for j, (label, score, box) in enumerate(view):
                out[i, j, :4] = box_convert(torch.tensor(box).float(), "xyxy", "cxcywh")
                out[i, j, 4 + label] = score
        self.views = self.views[len(raw) :] or self.views
        return out


def grid(number: int) -> list[Scripted]:
    """This many boxes that do not touch, in 96 x 128 pixels, by descending score."""
    return [
        (j % 3, 0.9 - j / 10 / number, (3 * (j % 40), 3 * (j // 40), 3 * (j % 40) + 2, 3 * (j // 40) + 2))
        for j in range(number)
    ]


COLOURED = {"red": (3, 3, 9, 12), "green": (50, 50, 90, 70), "blue": (20, 5, 30, 15)}  # with scores 0.5, 0.6, 0.7
FRAMED = {"red": (10, 10, 60, 60), "green": (12, 12, 58, 58)}  # the green box covers 85 % of the red one


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"classes": ["red", "blue"]}, ["blue", "red"]),
        ({"classes": [1]}, ["green"]),
        ({"classes": ["2", " red"]}, ["blue", "red"]),
        ({"classes": ["red"], "max_detections": 1}, ["red"]),  # the others do not count
        ({"class_scores": {"blue": 0.75}}, ["green", "red"]),
        ({"score_threshold": 0.65, "class_scores": {0: 0.4}}, ["blue", "red"]),
        ({"score_threshold": 0.65, "classes": ["red", "green"], "class_scores": {"red": 0.4}}, ["red"]),
    ],
)
def test_only_chosen_classes_with_their_minimum_scores_are_found(options: dict[str, Any], names: list[str]) -> None:
    assert Detector(Finder(), **options)(picture((128, 96), **COLOURED)).names == names


def test_a_text_is_a_number_only_if_no_class_has_that_name() -> None:
    net = Finder()
    net.pretrained_cfg |= {"label_names": ("1", "0", "x")}
    image = picture((128, 96), **COLOURED)
    assert Detector(net, classes=["1"])(image).labels.tolist() == [0]
    assert Detector(net, classes=[1])(image).labels.tolist() == [1]
    assert Detector(net, classes=["2"])(image).labels.tolist() == [2]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"classes": ["rd"]}, DataError, r"no class 'rd' among the 3 classes \(red, green, blue\); did you mean 'red'"),
        ({"classes": [3]}, DataError, "no class 3 among the 3 classes"),
        ({"classes": [-1]}, DataError, "no class -1 among"),
        ({"classes": "red"}, ValueError, "must be a list of names or numbers, got the text 'red'"),
        ({"classes": []}, ValueError, "must name at least one class"),
        ({"class_scores": {"rose": 0.5}}, DataError, "no class 'rose'"),
        ({"class_scores": {"red": 1.5}}, ValueError, "class_scores must be from 0 to 1, got 1.5"),
        ({"class_scores": {0: 0.5, "red": 0.9}}, ValueError, "class_scores names class 0 twice, as 0 and 'red'"),
        ({"classes": ["blue"], "class_scores": {"red": 0.5}}, ValueError, "must not name 'red', which classes leaves"),
    ],
)
def test_classes_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Detector(Finder(), **options)


def test_boxes_of_different_classes_suppress_each_other_if_that_is_asked_for() -> None:
    image = picture((128, 96), **FRAMED)
    assert Detector(Finder())(image).names == ["green", "red"]
    assert Detector(Finder(), agnostic=True)(image).names == ["green"]
    assert Detector(Finder(), agnostic=True, iou_threshold=0.9)(image).names == ["green", "red"]
    # a class that is left out, or whose score is too low, suppresses nothing
    assert Detector(Finder(), agnostic=True, classes=["red", "blue"])(image).names == ["red"]
    assert Detector(Finder(), agnostic=True, class_scores={"green": 0.65})(image).names == ["red"]


def test_boxes_of_different_classes_from_different_tiles_suppress_each_other_too() -> None:
    # the left tile sees a red object that ends at its side, the right one the whole object, which it calls green
    views: tuple[list[Scripted], ...] = ([(0, 0.9, (80, 20, 100, 60))], [(1, 0.8, (30, 20, 60, 60))])
    options: dict[str, Any] = {"image_size": (100, 100), "tile": 100, "overlap": 0.5, "whole_image": False}
    image = picture((150, 100))
    both, one = (Detector(Script(*views), **options, agnostic=agnostic)(image) for agnostic in (False, True))
    assert both.names == ["red", "green"]
    assert one.names == ["green"] and one.boxes.tolist() == [[80, 20, 110, 60]]


def test_the_limit_counts_merged_boxes_and_not_those_of_a_tile() -> None:
    # in the left tile two parts of a long object have better scores than a small one
    left: list[Scripted] = [(0, 0.9, (55, 20, 100, 60)), (0, 0.8, (70, 22, 100, 60)), (1, 0.7, (10, 10, 20, 20))]
    right: list[Scripted] = [(0, 0.6, (5, 20, 80, 60))]
    options: dict[str, Any] = {"image_size": (100, 100), "tile": 100, "overlap": 0.5, "whole_image": False}
    objects = Detector(Script(left, right), **options, max_detections=2)(picture((150, 100)))
    assert objects.names == ["green", "red"] and not objects.limited


def test_a_default_limit_warns_and_one_that_was_asked_for_is_recorded() -> None:
    image = picture((128, 96))
    with pytest.warns(UserWarning, match=r"^1 image: more than 300 objects \(max_detections\), .* the best are kept$"):
        crowd = Detector(Script(grid(301)))(image)
    assert len(crowd) == 300 and crowd.limited and crowd[:5].limited
    few = Detector(Script(grid(301)), max_detections=5)(image)
    assert few.limited and torch.equal(few.scores, crowd.scores[:5])
    all_of_them = Detector(Script(grid(301)), max_detections=301)(image)
    assert len(all_of_them) == 301 and not all_of_them.limited
    (two, none) = Detector(Script(grid(2), []), max_detections=2)([image, image])
    assert not two.limited and not none.limited


def test_a_limit_of_tiled_images_is_recorded() -> None:
    options: dict[str, Any] = {"image_size": (96, 128), "tile": 128, "overlap": 0.1, "whole_image": False}
    net = Script(grid(200), grid(200))
    assert Detector(net, **options, max_detections=150)(picture((250, 96))).limited
    assert not Detector(net, **options, max_detections=400)(picture((250, 96))).limited


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random detector that finds many objects."""
    folder = tmp_path_factory.mktemp("run")
    make_detector(folder, **TINY)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> str:
    file = tmp_path / "photo.png"
    picture((64, 64), **{"red": (3, 3, 9, 12)}).save(file)
    return str(file)


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[list[str], str]:
    """The objects that `spd-zoo detect` prints as score, name and box, and what it prints beside them."""
    assert main(["detect", *command, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    return [line.split()[1] for line in out.splitlines() if line.startswith("  ")], err


def test_detect_takes_classes_scores_and_a_limit(run: Path, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    names, err = printed(capsys, str(run), photo, "--score", "0")
    assert set(names) == {"blue", "green", "red"} and err == ""
    only, _ = printed(capsys, str(run), photo, "--score", "0", "--classes", "blue,2")
    assert set(only) == {"blue", "red"} and only == [name for name in names if name != "green"]
    none, _ = printed(capsys, str(run), photo, "--score", "0", "--class-scores", "blue=1,red=1")
    assert set(none) == {"green"}
    apart, _ = printed(capsys, str(run), photo, "--score", "0", "--agnostic")
    assert 0 < len(apart) < len(names)
    few, err = printed(capsys, str(run), photo, "--score", "0", "--max-detections", "4")
    assert few == names[:4] and err.startswith("note: 1 image: more than 4 objects (max_detections), or 30,000 scores")
    assert printed(capsys, str(run), photo, "--score", "0", "--max-detections", "4", "--quiet")[1] == ""
    wrong = dict.fromkeys(("blue", "=0.3", "blue=0.1,blue=0.2"), "must be like cell=0.4,platelet=0.1")
    wrong |= dict.fromkeys(("blue=x", "red=0.1,blue=2"), "the minimum score of blue must be a number from 0 to 1")
    for option, message in wrong.items():
        with pytest.raises(SystemExit):
            main(["detect", str(run), photo, "--class-scores", option])
        assert message in capsys.readouterr().err
    assert main(["detect", str(run), photo, "--classes", "cell"]) == 1
    assert "there is no class 'cell' among the 3 classes (blue, green, red)" in capsys.readouterr().err


def test_a_results_file_notes_that_a_limit_was_reached(
    run: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detect", str(run), photo, "--score", "0", "--workers", "0", "--device", "cpu", "--max-detections", "4"]
    for options in ((), ("--tile", "48")):
        results = tmp_path / f"{len(options)}.jsonl"
        assert main([*command, *options, "--results", str(results)]) == 0
        assert len(json.loads(results.read_text())["objects"]) == 4
        assert "note: 1 image: more than 4 objects (max_detections)" in capsys.readouterr().err


# evaluation


def test_more_than_a_hundred_boxes_of_a_class_count_if_that_is_asked_for() -> None:
    boxes = [(0, 4.0 * j, 0.0, 4.0 * j + 3, 3.0) for j in range(150)]
    detections = found(*((0, 0.9 - j / 1000, *box[1:]) for j, box in enumerate(boxes)))
    data = truth(boxes)
    assert coco_precision(data, [detections])[0, :, 0, 0].mean() == pytest.approx(67 / 101)  # recall up to 100 / 150
    assert coco_precision(data, [detections], max_boxes=150)[0, :, 0, 0].mean() == pytest.approx(1)
    usual = predictions_of(data, detections)
    assert usual.notes() == [
        "1 image with up to 150 objects, of which AP counts only the best 100 per class and image by COCO's rules: "
        "0.png; evaluate --max-detections 150 counts all"
    ]


def make_crowd(root: Path) -> Path:
    """Data whose first image of the split val has 200 objects of one class."""
    file = make_coco(root, 4, 2) / "instances_val.json"
    content = json.loads(file.read_text())
    first = content["annotations"][0]
    content["annotations"] = [
        first | {"id": i + 1, "bbox": [5 * (i % 19), 5 * (i // 19), 4, 4], "area": 16} for i in range(200)
    ]
    file.write_text(json.dumps(content))
    return root


@pytest.mark.slow
def test_a_run_notes_images_with_more_objects_than_ap_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "image_size": "64", "device": "cpu", "workers": 0}
    finetune("yolov8n_spd", data=make_crowd(tmp_path / "data"), out=tmp_path / "run", **options)
    note = "1 image with up to 200 objects, of which AP counts only the best"
    assert f"note: {note}" in capsys.readouterr().out and note in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_evaluate_takes_a_limit_and_suppression_across_classes_and_reports_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_crowd(tmp_path / "data")
    command = ["evaluate", str(run), "--data", str(data), "--split", "val", "--workers", "0", "--device", "cpu"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "count in an image" not in out and "other classes" not in out
    assert "note: 1 image with up to 200 objects, of which AP counts only the best 300 per image" in err
    assert main([*command, "--max-detections", "400", "--agnostic", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "up to 400 boxes count in an image; boxes suppress boxes of other classes" in out and "note: 1 im" not in err
    header, row = (line.split(",") for line in (tmp_path / "out" / "results.csv").read_text().splitlines())
    assert dict(zip(header, row, strict=True))["max_detections"] == "400"
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        evaluate(str(run), data, max_detections=0)
    with pytest.raises(ValueError, match="max_detections, agnostic and iou_threshold are options for detectors"):
        evaluate("cifar_resnet20_pfd", data, agnostic=True, device="cpu")


def test_settings_that_differ_from_the_usual_rules_are_reported() -> None:
    assert Suppression().columns() == {} and Suppression().in_words() == ""
    assert Suppression(7, True).columns() == {"max_detections": 7, "agnostic": True}
