"""Exports a network to one file for other programs (ONNX, or torch.export's pt2), and checks the file's outputs."""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

import spd_zoo
from spd_zoo.arguments import height_and_width
from spd_zoo.blocks import ImageSizeError
from spd_zoo.boxes import class_nms
from spd_zoo.data.classes import network_classes
from spd_zoo.data.notes import Notes
from spd_zoo.data.reading import channel_mode, per_channel, size_text
from spd_zoo.files import exists, is_folder, whole
from spd_zoo.fold import fold_spd
from spd_zoo.inference.classifier import check_classifier
from spd_zoo.inference.detector import GREY, trained_on_tiles
from spd_zoo.inference.exported import (
    THRESHOLDS,
    start_session,
    with_threshold_inputs,
)
from spd_zoo.inference.scores import read_scores, scores_file
from spd_zoo.models._detector import DetectionNet
from spd_zoo.rewrite import ConversionError, max_difference
from spd_zoo.trace import copy_network
from spd_zoo.weights.load import class_synonyms, is_network, load_network, pretrained_cfg

__all__ = ["FORMATS", "ExportError", "export", "new_file", "output_file"]

Outputs = tuple[Tensor, ...]
# Images and a detector's minimum score -> the outputs; of a detector with NMS then also what NMS chose from
Computation = Callable[[Tensor, float], Outputs]

TOLERANCE = 1e-3  # largest difference, as a share of the outputs' standard deviation, of the image's side, or of 1
MISSED = 0.02  # share of boxes that NMS may keep differently, because their IoU is next to the threshold
CANDIDATES = ("nms_boxes", "nms_compared", "nms_scores")


class ExportError(ValueError):
    """A network that cannot be exported; the message says why."""


def export(
    model: str | os.PathLike[str] | nn.Module,
    to: str,
    out: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    fold: bool = True,
    notes: Notes | None = None,
    raw: bool = False,
    score_threshold: float = 0.25,
    iou_threshold: float | None = None,
    max_detections: int = 300,
) -> Path:
    """Writes a network to one file for any number of images, after checking the file's outputs.

    Input `images`, float32 (N, C, height, width). Outputs of a classifier: `logits`, float32 (N, classes). Outputs of a
    detector, which decodes and suppresses boxes within each class: `num`, int64 (N,); `boxes`, float32 (N,
    max_detections, 4), x1 y1 x2 y2 in pixels of the input; `scores`, float32, and `classes`, int64 (N, max_detections).
    The first `num` rows hold the detections by descending score; the rest are zeros, with the class -1. YOLO takes any
    height and width that are multiples of 32, every other network those it is exported with.

    What must be done to an image first, and what the outputs mean, is in the file's metadata: the ONNX model's
    `metadata_props`, or the extra file `metadata.json` of a pt2 file. Import torchvision before a detector's pt2 file
    is loaded.

    Args:
        model: A network, which stays as it is, or one with pretrained weights by its name, with or without a tag,
            `local-dir:FOLDER`, or the folder of a run.
        to: "onnx" or "pt2".
        out: The file; by default `model.onnx` or `model.pt2` in the run's folder, or one named after the network. An
            existing file is replaced only if it is an exported network.
        image_size: Height and width in pixels, or one number for both; by default the network's own input size.
        fold: Write the network folded by `fold_spd`, which has the same outputs with fewer and plainer operators.
        notes: Receives the assumptions that were made; the file's metadata contain them, too.
        raw: Detectors: write the raw predictions, `raw_0`, `raw_1`, ..., in place of boxes.
        score_threshold: Detectors: minimum score.
        iou_threshold: Detectors: IoU threshold of NMS; None: the authors' value.
        max_detections: Detectors: the number of rows for boxes.

    Returns:
        The file.

    Raises:
        ExportError: If the network cannot be exported, its file computes something else, or `out` must not be replaced.
        ModelError: If there is no such network, or it cannot be used.
        ValueError: If `image_size` is no size.
    """
    if to not in FORMATS:
        raise ExportError(f"the formats are {' and '.join(FORMATS)}, got {to!r}")
    name = str(pretrained_cfg(model)["architecture"]) if isinstance(model, nn.Module) else os.fspath(model)
    path = output_file(name, out, f".{to}")
    net: Any = copy_network(model).eval() if isinstance(model, nn.Module) else load_network(name, "cpu")
    if any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers())):
        raise ExportError(f'{name} has no weights to export, because it is on the "meta" device; create it on the CPU')
    notes = notes if notes is not None else Notes()
    if others := {str(parameter.dtype) for parameter in net.parameters()} - {"torch.float32"}:
        notes.add(f"{name} has weights of {' and '.join(sorted(others))}: the file computes in torch.float32")
    net = net.float().to(memory_format=torch.contiguous_format)
    if isinstance(net, DetectionNet):
        iou_threshold = net.iou_threshold if iou_threshold is None else iou_threshold
        if not (0 <= score_threshold <= 1 and 0 <= iou_threshold <= 1 and max_detections >= 1):
            raise ExportError("thresholds must be from 0 to 1, and max_detections at least 1")
    else:
        check_classifier(net, name)
        if raw or (score_threshold, iou_threshold, max_detections) != (0.25, None, 300):
            raise ExportError(f"{name} is a classifier; thresholds and raw predictions are for detectors")
    channel_mode(net.in_chans, name)
    own = get_model_input_config(net)["input_size"][1:]
    size: tuple[int, int] = height_and_width("image_size", own if image_size is None else image_size)
    if image_size is not None and hasattr(net, "set_input_size"):
        net.set_input_size(size)
    with new_file(path) as temporary:
        form = _folded(net, size, name) if fold else _of_size(net, size, name)
        part: _Part
        if not isinstance(net, DetectionNet):
            part = _Part(form, ("logits",))
        elif raw:
            count = len(net(_images(net, 1, size)))
            part = _Raw(form, tuple(f"raw_{i}" for i in range(count)), net.size_multiple)
        else:
            part = _Boxes(form, score_threshold, cast("float", iou_threshold), max_detections)
        metadata = _metadata(net, name, size, part) | _classes_metadata(net, name, notes)
        metadata["notes"] = json.dumps(notes.lines(), ensure_ascii=False)
        example = _images(net, 2, (size[0], size[1] + part.multiple))  # sides that differ are not taken for one
        compute = FORMATS[to](part, example, metadata, temporary)
        part.check(net, size, compute)
    return path


_EARLIER = re.compile(rb"made_by.{2,6}spd-zoo ", re.DOTALL)  # in the metadata of every file that `export` wrote


def output_file(name: str, out: str | Path | None, suffix: str) -> Path:
    """The file to export a network to: `out`, or one in the folder of a run or named after the network.

    Raises:
        ExportError: If it is a folder, or a file that was not exported.
    """
    folder = Path(name) if not is_network(name) and is_folder(name) else None  # of a run
    file = f"{name.replace('/', '_').replace(':', '_')}{suffix}" if folder is None else f"model{suffix}"
    path = Path(out) if out is not None else (folder or Path()) / file
    if is_folder(path):
        raise ExportError(f"{path} is a folder; give the name of a file, such as {path / file}")
    if exists(path) and not _EARLIER.search(path.read_bytes()):
        raise ExportError(f"{path} exists already and is no exported network; remove it, or give another file")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Like `whole`, but makes the folders of `path` once the file is complete."""
    with whole(path, within=next((folder for folder in path.parents if exists(folder)), path.parent)) as temporary:
        yield temporary
        path.parent.mkdir(parents=True, exist_ok=True)


class _Part(nn.Module):
    """The module that is exported: here a classifier, with its logits.

    Attributes:
        net: The network.
        outputs: The names of the outputs.
        multiple: Height and width may be any multiples of this; 0: they are those of the example.
    """

    words = "logits, one per class; softmax makes them probabilities"

    def __init__(self, net: nn.Module, outputs: tuple[str, ...], multiple: int = 0) -> None:
        super().__init__()
        self.net: Any = net
        self.outputs, self.multiple = outputs, multiple

    def forward(self, images: Tensor) -> Any:
        """(N, C, H, W) -> the outputs."""
        return self.net(images)

    def traced(self) -> tuple[nn.Module, tuple[str, ...]]:
        """What torch writes as ONNX, and the names of its outputs."""
        return self, self.outputs

    def finish(self, model: Any) -> None:
        """Adds what torch cannot write to an ONNX model."""

    def check(self, net: Any, size: tuple[int, int], compute: Computation) -> None:
        """Raises ExportError unless `compute` gives what the network does for one image and for several."""
        for images in _noise(net, size, self.multiple):
            with torch.inference_mode():
                expected = net(images)
                expected = [expected] if isinstance(expected, Tensor) else list(expected)
                found = compute(images, 0.0)
            if any(tensor.isnan().any() for tensor in expected):
                raise ExportError("the network computes NaN for noise, so its file cannot be checked; train it again")
            worst = max_difference(list(found), expected)
            if worst > TOLERANCE:
                what = "logits" if self.outputs == ("logits",) else "raw predictions"
                raise ExportError(
                    f"the exported network computes something else: {what} differ by {worst:.2g} of their std"
                )


def _noise(net: Any, size: tuple[int, int], multiple: int) -> Iterator[Tensor]:
    yield _images(net, 1, size)
    yield _images(net, 3, (size[0] + multiple, size[1]))


class _Raw(_Part):
    """A detector's raw predictions."""

    words = "raw predictions as the detector's decode takes them"

    def forward(self, images: Tensor) -> Outputs:
        """(N, C, H, W) -> raw predictions."""
        return tuple(self.net(_in_multiples(images, self.multiple)))


def _in_multiples(images: Tensor, multiple: int) -> Tensor:
    """The same images, of sides that torch knows to be multiples while it records a graph.

    It then halves them exactly. Otherwise it carries a remainder along for each halving inside of the next, which takes
    minutes. A recorded graph refuses images of other sides here. With a multiple of 0, nothing changes.
    """
    if not multiple:
        return images
    height, width = (side // multiple * multiple for side in images.shape[2:])
    return images.expand(images.shape[0], images.shape[1], height, width)


class _Candidates(nn.Module):
    """All boxes of a detector, those that NMS compares, and the scores of each class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W) -> (N, boxes, 4) twice, and (N, classes, boxes)."""
        images = _in_multiples(images, self.net.size_multiple)
        size = (images.shape[-2], images.shape[-1])
        decoded = self.net.decode(self.net(images), size)
        boxes = box_convert(decoded[..., :4], "cxcywh", "xyxy")
        compared = self.net.overlap_boxes(boxes, size)
        return boxes, boxes.clone() if compared is boxes else compared, self.net.class_scores(decoded).mT


class _Boxes(_Part):
    """A detector's boxes after non-maximum suppression."""

    words = (
        "num: boxes of each image; boxes: x1 y1 x2 y2 in pixels of the input; scores from 0 to 1; classes from 0. The "
        "first num rows count, by descending score"
    )

    def __init__(self, net: Any, score_threshold: float, iou_threshold: float, max_detections: int) -> None:
        super().__init__(_Candidates(net), ("num", "boxes", "scores", "classes"), net.size_multiple)
        self.score_threshold: Tensor
        self.register_buffer("score_threshold", torch.tensor(score_threshold))
        self.iou_threshold, self.max_detections = iou_threshold, max_detections

    def forward(self, images: Tensor) -> Outputs:
        """(N, C, H, W) -> `num`, `boxes`, `scores` and `classes`."""
        boxes, compared, scores = self.net(images)
        image, label, box = (scores > self.score_threshold).nonzero().unbind(1)
        # one NMS for all images and classes, which are moved apart; in float64, where that costs no accuracy
        compared = compared.double().clamp(-1e6, 1e6)
        apart = (image * scores.shape[1] + label) * (compared.amax() - compared.amin() + 1)
        kept = nms(compared[image, box] + apart[:, None], scores[image, label, box].double(), self.iou_threshold)
        image, label, box = image[kept], label[kept], box[kept]
        of_image = image == torch.arange(images.shape[0], device=images.device)[:, None]
        per_image = torch.where(of_image, scores[image, label, box], -1.0)
        best, rank = F.pad(per_image, [0, self.max_detections], value=-1.0).topk(self.max_detections)
        found = best >= 0
        image, label, box = (F.pad(values, [0, self.max_detections])[rank] for values in (image, label, box))
        boxes = torch.where(found[..., None], boxes[image, box], 0.0)
        return found.sum(1), boxes, torch.where(found, best, 0.0), torch.where(found, label, -1)

    def traced(self) -> tuple[nn.Module, tuple[str, ...]]:
        """What torch writes as ONNX: all candidates."""
        return self.net, CANDIDATES

    def finish(self, model: Any) -> None:
        """Adds NMS to an ONNX model of `_Candidates`."""
        from onnx import TensorProto, helper, numpy_helper, parser

        graph, most = model.graph, self.max_detections
        selection = parser.parse_graph(SELECTION.replace("MOST", str(most)))
        graph.node.extend(selection.node)
        graph.initializer.extend(selection.initializer)
        thresholds = (self.score_threshold, torch.tensor(self.iou_threshold))
        for name, value in zip(THRESHOLDS, thresholds, strict=True):
            graph.initializer.append(numpy_helper.from_array(value.reshape(1).numpy(), name))
        del graph.output[:]
        rows: list[str | int] = ["batch", most]
        shapes = {"num": rows[:1], "boxes": [*rows, 4], "scores": rows, "classes": rows}
        for name, shape in shapes.items():
            number = TensorProto.INT64 if name in ("num", "classes") else TensorProto.FLOAT
            graph.output.append(helper.make_tensor_value_info(name, number, shape))

    def check(self, net: Any, size: tuple[int, int], compute: Computation) -> None:
        """Raises ExportError unless all boxes are the network's, and those that NMS kept are what its own NMS keeps.

        NMS is compared on the file's own boxes: among many that overlap, rounding decides which are kept.
        """
        for images in _noise(net, size, self.multiple):
            with torch.inference_mode():
                expected = _Candidates(net)(images)
                score = _between(expected[2], self.max_detections)
                *kept, boxes, compared, scores = compute(images, score)
            near = [
                ((found - own).abs() <= TOLERANCE * own.abs().clamp(min=least)).all()
                for found, own, least in zip((boxes, scores), expected[::2], (max(images.shape[-2:]), 1), strict=True)
            ]
            if not all(near):
                raise ExportError("the exported network computes something else: other boxes or scores")
            wrong = total = 0
            for i, (number, *mine) in enumerate(zip(*kept, strict=True)):
                rows, labels = class_nms(compared[i], scores[i].mT, score, self.iou_threshold)
                rows, labels = rows[: self.max_detections], labels[: self.max_detections]
                passing = scores[i][scores[i] > score]
                if len(passing.unique()) < len(passing):
                    continue  # equal scores, as of an untrained network, leave the order open
                kept_boxes, kept_scores, kept_labels = (values[: int(number), None] for values in mine)
                same = (kept_boxes == boxes[i, rows]).all(-1)
                same &= (kept_scores == scores[i, labels, rows]) & (kept_labels == labels)
                wrong += int((~same.any(0)).sum() + (~same.any(1)).sum())
                total += len(rows)
            if wrong > MISSED * 2 * total:
                raise ExportError(
                    f"the exported network computes something else: NMS differs in {wrong} of {total} boxes"
                )


def _between(scores: Tensor, wanted: int) -> float:
    """A minimum score that about `wanted` scores pass, in the widest gap there, so that rounding changes none."""
    best = scores.flatten().sort(descending=True).values[: max(2, wanted)]
    start = len(best) // 2
    at = start - 1 + int((best[start - 1 : -1] - best[start:]).argmax())
    return ((best[at] + best[at + 1]) / 2).item()


# Of (N, boxes, 4) and (N, classes, boxes), the best of each image: NMS selects rows (image, class, box) of all images,
# and of each image's scores among them the best MOST are taken.
SELECTION = """
select (float[n, p, 4] nms_boxes) => (int64[n] num) <
  int64[1] nms_most = {MOST}, int64 nms_zero = {0}, int64 nms_one = {1}, int64 nms_none = {-1},
  float nms_minus = {-1}, float nms_nil = {0}, int64[1] nms_second = {1}, int64[1] nms_third = {2},
  int64[2] nms_ends = {0, 2}, int64[4] nms_more_columns = {0, 0, 0, MOST}, int64[4] nms_more_rows = {0, 0, MOST, 0}
> {
  nms_selected = NonMaxSuppression (nms_compared, nms_scores, nms_most, iou_threshold, score_threshold)
  nms_score = GatherND (nms_scores, nms_selected)
  nms_image = Gather <axis = 1> (nms_selected, nms_zero)
  nms_shape = Shape <start = 0, end = 1> (nms_boxes)
  nms_images = Squeeze (nms_shape)
  nms_numbers = Range (nms_zero, nms_images, nms_one)
  nms_column = Unsqueeze (nms_numbers, nms_second)
  nms_own = Equal (nms_image, nms_column)
  nms_of_image = Where (nms_own, nms_score, nms_minus)
  nms_padded = Pad (nms_of_image, nms_more_columns, nms_minus)
  nms_best, nms_rank = TopK <axis = -1> (nms_padded, nms_most)
  nms_found = GreaterOrEqual (nms_best, nms_nil)
  nms_counted = Cast <to = 7> (nms_found)
  num = ReduceSum <keepdims = 0> (nms_counted, nms_second)
  nms_rows = Pad (nms_selected, nms_more_rows)
  nms_ranked = Gather <axis = 0> (nms_rows, nms_rank)
  nms_places = Gather <axis = 2> (nms_ranked, nms_ends)
  nms_kept = GatherND (nms_boxes, nms_places)
  nms_mask = Unsqueeze (nms_found, nms_third)
  boxes = Where (nms_mask, nms_kept, nms_nil)
  scores = Where (nms_found, nms_best, nms_nil)
  nms_label = Gather <axis = 2> (nms_ranked, nms_one)
  classes = Where (nms_found, nms_label, nms_none)
}
"""


def _folded(net: nn.Module, size: tuple[int, int], model: str) -> nn.Module:
    """`fold_spd`, whose errors name the network and what the command can do."""
    try:
        return fold_spd(net, _images(net, 1, size))
    except ImageSizeError as error:  # nor would it export without folding
        raise ExportError(f"{model}: {error}") from error
    except (ConversionError, ValueError) as error:
        raise ExportError(f"{model} cannot be folded: {error}. --no-fold exports it as it is") from error


def _of_size(net: nn.Module, size: tuple[int, int], model: str) -> nn.Module:
    """The network, after one image: torch's exporters answer sizes that it does not take with errors of their own."""
    try:
        with torch.inference_mode():
            net(_images(net, 1, size))
    except ImageSizeError as error:
        raise ExportError(f"{model}: {error}") from error
    return net


def _metadata(net: Any, name: str, size: tuple[int, int], part: _Part) -> dict[str, str]:
    """How to use the file, in words and numbers."""
    config = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
    detects = isinstance(net, DetectionNet)
    described = _boxes_metadata(net, name, size, part) if detects else _crop_metadata(net, size, config)
    return {
        "architecture": str(net.pretrained_cfg["architecture"]),
        "parameters": str(sum(parameter.numel() for parameter in net.parameters())),  # also frozen ones
        "channels": str(net.in_chans),
        "image_size": size_text(size),
        "mean": json.dumps(per_channel(config["mean"], net.in_chans)),
        "std": json.dumps(per_channel(config["std"], net.in_chans)),
        **described,
        "output": part.words,
        "made_by": f"spd-zoo {spd_zoo.__version__}, torch {torch.__version__}",
    }


def _classes_metadata(net: Any, name: str, notes: Notes) -> dict[str, str]:
    """The names of the classes; a note if they are only numbers."""
    classes = network_classes(net.pretrained_cfg, net.num_classes)
    found = {"class_names": json.dumps(list(classes.names), ensure_ascii=False)}
    if not classes.named:
        last = len(classes.names) - 1
        notes.add(f"{name} does not name its classes: the file calls them by their numbers, 0 to {last}")
        return found
    labels = [names[0] for names in class_synonyms(net.pretrained_cfg) or ()]
    return found | {"label_names": json.dumps(labels, ensure_ascii=False)}


_NORMALISED = (
    "divide by 255, subtract mean, divide by std, channel by channel; order (image, channel, row, column), float32."
)


def _crop_metadata(net: Any, size: tuple[int, int], config: dict[str, Any]) -> dict[str, str]:
    """How a classifier's images are resized and cropped."""
    crop_mode = config["crop_mode"] or "center"
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in size)
    square = size[0] == size[1]
    pixels, cut = (f"{height}x{width}" for height, width in (scaled, size))
    covers = f"its shorter side has {scaled[0]} pixels" if square else f"it just covers {pixels} pixels"
    ways = {
        "center": f"so that {covers}; cut out the {cut} pixels in the middle",
        "squash": f"to {pixels} pixels, whatever its shape; cut out the {cut} pixels in the middle",
        "border": f"so that it just fits into {pixels} pixels; pad or cut all sides alike to {cut} pixels, in `mean`",
    }
    colours = "RGB" if net.in_chans == 3 else "grey"
    shorter_side = {"resize_shorter_side": str(scaled[0])} if crop_mode == "center" and square else {}
    return {
        "preprocessing": (
            f"Turn the image upright, make it {colours} with 8 bits; resize it ({config['interpolation']}) "
            f"{ways[crop_mode]} (sizes are height x width); {_NORMALISED}"
        ),
        "crop_mode": crop_mode,
        "crop_pct": repr(float(config["crop_pct"])),
        "resize_to": size_text(scaled),
        **shorter_side,
        "interpolation": str(config["interpolation"]),
    }


def _boxes_metadata(net: DetectionNet, name: str, size: tuple[int, int], part: _Part) -> dict[str, str]:
    """How a detector's images are cut and resized, and its thresholds."""
    cut = f"{size[0]}x{size[1]}"
    way = f"to {cut} pixels (height x width), whatever its shape"
    if net.keeps_aspect:
        way = (
            f"so that it just fits into {cut} pixels (height x width); put it in the middle of such an image of grey "
            f"{GREY}, if the space is odd one pixel nearer to the top and to the left"
        )
    colours = "RGB" if net.in_chans == 3 else "grey"
    order = "; reverse the channels to BGR" if net.in_chans == 3 and net.channel_order == "BGR" else ""
    own: dict[str, str] = {}
    if (tiles := trained_on_tiles(name)) is not None:
        own |= {"tile": str(tiles[0]), "overlap": repr(tiles[1])}
    if isinstance(part, _Boxes):
        own |= {
            "score_threshold": repr(round(part.score_threshold.item(), 6)),
            "iou_threshold": repr(part.iou_threshold),
            "max_detections": str(part.max_detections),
        }
        if scores_file(name).is_file():
            measured = read_scores(name, network_classes(net.pretrained_cfg, net.num_classes).names)
            own["class_scores"] = json.dumps([measured.get(i) for i in range(net.num_classes)])
    return {
        "preprocessing": (
            f"Turn the image upright, make it {colours} with 8 bits; resize it (bilinear, antialiased) {way}{order}; "
            f"{_NORMALISED}"
        ),
        "interpolation": "bilinear",
        "keeps_aspect": json.dumps(net.keeps_aspect),
        "channel_order": net.channel_order,
        "size_multiple": str(net.size_multiple),
        "evaluation_score": repr(net.evaluation_score),
        "evaluation_boxes": str(net.evaluation_boxes),
        **own,
    }


def _to_onnx(part: _Part, example: Tensor, metadata: dict[str, str], file: Path) -> Computation:
    """Writes an ONNX file; returns what ONNX Runtime computes with it."""
    import onnx
    import onnxscript  # noqa: F401  (torch's exporter needs it)

    traced, outputs = part.traced()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own exporter
        program = torch.onnx.export(
            traced,
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=(_dynamic(part),),
            input_names=["images"],
            output_names=list(outputs),
        )
    assert program is not None
    model: Any = program.model_proto
    sides = model.graph.input[0].type.tensor_type.shape.dim
    if part.multiple and any(side.dim_value for side in sides[2:]):
        raise ExportError("torch's exporter fixed the size of the images, which should be free")
    for side, name in zip(sides, ("batch", "channels", "height", "width"), strict=True):
        if side.dim_param:
            side.dim_param = name
    del model.graph.value_info[:]  # it has torch's names of the sizes
    part.finish(model)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    names = list(part.outputs)
    if isinstance(part, _Boxes):
        model = with_threshold_inputs(model)
        names += CANDIDATES
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in CANDIDATES)
    session = start_session(model, str(file))

    def compute(images: Tensor, score: float) -> Outputs:
        feeds = {"images": images.numpy()}
        if isinstance(part, _Boxes):
            feeds["score_threshold"] = torch.tensor([score]).numpy()
        return tuple(map(torch.from_numpy, session.run(names, feeds)))

    return compute


def _dynamic(part: _Part) -> dict[int, Any]:
    """The free dimensions of the input."""
    free = {0: torch.export.Dim("batch")}
    return free | ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if part.multiple else {})


def _to_pt2(part: _Part, example: Tensor, metadata: dict[str, str], file: Path) -> Computation:
    """Writes a file of torch.export; returns what torch computes with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's NMS warns about itself
        program = torch.export.export(part, (example,), dynamic_shapes=(_dynamic(part),))
    content = BytesIO()  # on a full disk, torch would end the process
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata, ensure_ascii=False)})
    file.write_bytes(content.getbuffer())
    loaded: Any = torch.export.load(file).module()

    def compute(images: Tensor, score: float) -> Outputs:
        if isinstance(part, _Boxes):
            loaded.score_threshold.fill_(score)
            return *loaded(images), *part.net(images)
        found = loaded(images)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return compute


FORMATS: dict[str, Callable[[_Part, Tensor, dict[str, str], Path], Computation]] = {"onnx": _to_onnx, "pt2": _to_pt2}


def _images(net: Any, count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, net.in_chans, *size, generator=torch.Generator().manual_seed(count))
