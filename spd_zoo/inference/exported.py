"""ONNX files that `spd-zoo export` wrote, run by ONNX Runtime, with the interface of the network they came from.

Such a file may come from a stranger. It is parsed before ONNX Runtime sees it, and refused if it refers to other files,
or holds what no exported network needs and what could compute without end: loops, branches, functions, operators of
other libraries.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spd_zoo.blocks import ImageSizeError
from spd_zoo.boxes import compared_labels, labelled_nms
from spd_zoo.data.reading import parse_size, size_text
from spd_zoo.errors import first_line
from spd_zoo.inference.scores import SCORES_FILE
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.process import pick_device, ran_out_of_memory
from spd_zoo.weights.catalogue import ModelError
from spd_zoo.weights.download import page_or_pointer
from spd_zoo.weights.load import load_network

__all__ = [
    "THRESHOLDS",
    "Exported",
    "ExportedClassifier",
    "ExportedDetector",
    "load_model",
    "read_exported",
    "start_session",
    "with_threshold_inputs",
]

THRESHOLDS = ("score_threshold", "iou_threshold")  # names of the constants for NMS in a detector's file

_LARGEST_FILE = 2**31 - 1  # bytes; protobuf, the container of ONNX, allows no more
_MOST_PIXELS = 100_000_000  # of an input
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_MOST_CLASSES = 1_000_000
_MOST_DETECTIONS = _LARGEST_TILE = 1_000_000


def load_model(model: str, device: str | None = None) -> nn.Module:
    """A network as `load_network` returns it, or an exported file.

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, the folder of a run, or an
            ONNX file that `spd-zoo export` wrote.
        device: torch device; by default a GPU if there is one. A file is run on the CPU.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        ModuleNotFoundError: If a file needs onnx or onnxruntime, and it is missing.
        ValueError: If there is no such device, or it is not the CPU for a file.
        WeightsError: If its weights are unavailable or must not be used.
    """
    if not model.endswith(".onnx"):
        return load_network(model, pick_device(device))
    if device not in (None, "cpu"):
        raise ValueError(f"ONNX Runtime runs {model} on the CPU; leave the device {device} out")
    return read_exported(Path(model))


class Exported(nn.Module):
    """An exported file.

    Attributes:
        pretrained_cfg: timm's configuration of the network it was exported from.
        num_classes: Number of classes.
        in_chans: Image channels.
        param_count: Parameters of the network.
        fixed_size: The only height and width of its input; None if they are free.
    """

    def __init__(self, model: Any, metadata: dict[str, str], content: bytes, name: str) -> None:
        super().__init__()
        self.name = name
        self.pretrained_cfg = _pretrained_cfg(metadata)
        self.num_classes: int = self.pretrained_cfg["num_classes"]
        self.in_chans: int = self.pretrained_cfg["input_size"][0]
        self.param_count = int(metadata["parameters"])
        self.session: Any = start_session(model, name)
        self.fixed_size = _fixed_size(model, self.pretrained_cfg["input_size"])
        # callers read a network's device and precision from its parameters, and compare networks by their tensors
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("digest", torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8))

    def __getstate__(self) -> dict[str, Any]:
        """For copies that only preprocess images, in other processes: without the session."""
        return self.__dict__ | {"session": None}

    def compute(self, images: Tensor, outputs: list[str], **inputs: float) -> list[Tensor]:
        """(N, C, H, W) and numbers -> the outputs of these names.

        Raises:
            ImageSizeError: If the file does not take images of this size.
            ModelError: If it cannot be run.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.fixed_size is not None and self.fixed_size != size:
            only = size_text(self.fixed_size)
            raise ImageSizeError(f"{self.name} takes images of {only} pixels only, got {size_text(size)}")
        feeds = {"images": np.ascontiguousarray(images.cpu().numpy(), np.float32)}
        feeds |= {name: np.array([value], np.float32) for name, value in inputs.items()}
        try:
            return [torch.from_numpy(array) for array in self.session.run(outputs, feeds)]
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            if ran_out_of_memory(error):
                raise
            raise ModelError(f"ONNX Runtime cannot run {self.name}: {first_line(error)}") from error


class ExportedClassifier(Exported):
    """An exported classifier."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes).

        Raises:
            ImageSizeError: If the file does not take images of this size.
            ModelError: If it cannot be run, or computes something else than logits.
        """
        (logits,) = self.compute(images, ["logits"])
        if logits.shape != (len(images), self.num_classes):
            raise ModelError(f"{self.name} computes {list(logits.shape)} logits for {self.num_classes} classes")
        return logits


class ExportedDetector(Exported, ObjectFinder):
    """An exported detector, which decodes and suppresses boxes itself.

    Attributes:
        score_threshold: The file's own minimum score.
        max_detections: Its maximum number of detections per image.
        tiles: The side and the overlap of the tiles on which the network was trained; None without tiles.
    """

    max_detections: int

    def __init__(self, model: Any, metadata: dict[str, str], content: bytes, name: str) -> None:
        super().__init__(with_threshold_inputs(model), metadata, content, name)
        self.channel_order = _choice(metadata["channel_order"], "RGB", "BGR")
        self.keeps_aspect = _choice(metadata["keeps_aspect"], "true", "false") == "true"
        self.score_threshold, self.iou_threshold, self.evaluation_score = (
            _number(metadata[name], 0, 1) for name in ("score_threshold", "iou_threshold", "evaluation_score")
        )
        self.max_detections = int(_number(metadata["max_detections"], 1, _MOST_DETECTIONS))
        authors = int(_number(metadata.get("evaluation_boxes", str(self.max_detections)), 1, _MOST_DETECTIONS))
        self.evaluation_boxes = min(authors, self.max_detections)
        self.holds_all_boxes = authors <= self.max_detections
        self.size_multiple = int(_number(metadata["size_multiple"], 0, 1024))
        self.class_scores = _class_scores(metadata["class_scores"]) if "class_scores" in metadata else None
        if self.class_scores is not None and len(self.class_scores) != self.num_classes:
            raise ValueError("class_scores and class_names differ in number")
        self.tiles: tuple[int, float] | None = None
        if "tile" in metadata:
            self.tiles = int(_number(metadata["tile"], 1, _LARGEST_TILE)), _number(metadata["overlap"], 0, 0.99)

    def scores_of_classes(self) -> dict[int, float]:
        """The best minimum score of each class by its number, where it is known.

        Raises:
            ModelError: If the file has no such scores.
        """
        if self.class_scores is None:
            raise ModelError(
                f"{self.name} does not hold the best minimum score of each class; export a run that has {SCORES_FILE}"
            )
        return {number: score for number, score in enumerate(self.class_scores) if score is not None}

    def forward(self, images: Tensor) -> Tensor:
        """The images, unchanged: only `detections` knows the thresholds, with which the file computes all at once."""
        return images

    def detections(
        self,
        raw: Any,
        image_size: tuple[int, int],
        score_threshold: float | Tensor,
        iou_threshold: float | None = None,
        max_detections: int | None = 300,
        max_candidates: int | None = None,
        agnostic: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Images -> the best detections of each; see `DetectionNet.detections`.

        The file has one minimum score and suppresses boxes within each class. Scores of each class are compared
        afterwards, which leaves the same boxes unless the file's limit is reached. Boxes of different classes
        suppress each other after those of one class have done so, while a network compares all boxes at once.
        `limited` says whether the limit was reached, so that there may be more boxes.

        Raises:
            ImageSizeError: If the file does not take images of this size.
            ModelError: If it cannot be run, or computes something else than boxes.
        """
        self.check_size(*raw.shape[-2:])
        iou_threshold = self.iou_threshold if iou_threshold is None else iou_threshold
        least = score_threshold.min().item() if isinstance(score_threshold, Tensor) else score_threshold
        thresholds = {"score_threshold": least, "iou_threshold": iou_threshold}
        counts, boxes, scores, classes = self.compute(raw, ["num", "boxes", "scores", "classes"], **thresholds)
        shape = (len(raw), self.max_detections)
        right = (counts.shape, boxes.shape, scores.shape, classes.shape) == (shape[:1], (*shape, 4), shape, shape)
        if not right or not ((counts >= 0) & (counts <= self.max_detections)).all():
            raise ModelError(f"{self.name} computes something else than {self.max_detections} boxes an image")
        found = []
        for i, number in enumerate(counts.tolist()):
            labels = classes[i, :number].long()
            if not ((labels >= 0) & (labels < self.num_classes)).all():
                raise ModelError(f"{self.name} finds classes beyond its {self.num_classes}")
            each = {"boxes": boxes[i, :number].float(), "scores": scores[i, :number].float(), "labels": labels}
            each = _rows(each, each["boxes"].isfinite().all(1))  # as `labelled_nms` of a network
            if isinstance(score_threshold, Tensor):
                each = _rows(each, each["scores"] > score_threshold[labels])
            if agnostic:
                same = compared_labels(each["labels"], agnostic)
                each = _rows(each, labelled_nms(each["boxes"], each["scores"], same, iou_threshold))
            limited = number == self.max_detections or (
                max_detections is not None and len(each["labels"]) > max_detections
            )
            found.append(_rows(each, slice(max_detections)) | {"limited": torch.tensor(limited)})
        return found


def _rows(found: dict[str, Tensor], index: Tensor | slice) -> dict[str, Tensor]:
    return {name: column[index] for name, column in found.items()}


def read_exported(file: Path) -> Exported:
    """The network in an ONNX file; nothing but the file itself is read.

    Raises:
        ModelError: If the file is not one that `spd-zoo export` writes.
        ModuleNotFoundError: If onnx or onnxruntime is missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  (if it is missing, fail before anything is read)
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an exported file needs the package {error.name}: pip install 'spd-zoo[export]'", name=error.name
        ) from error

    name = str(file)
    content = _content(file)
    model: Any = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"{name} is no ONNX file, or damaged; export it again") from error
    metadata = {item.key: item.value for item in model.metadata_props}
    if "made_by" not in metadata or "class_names" not in metadata:
        raise ModelError(
            f"{name} does not say how images are prepared for it and what its outputs mean; only files of `spd-zoo "
            "export` do"
        )
    outputs = [output.name for output in model.graph.output]
    forms = {("logits",): ExportedClassifier, ("num", "boxes", "scores", "classes"): ExportedDetector}
    form = forms.get(tuple(outputs))
    if form is None:
        raise ModelError(
            f"{name} has the outputs {', '.join(outputs)[:100]}, but logits, or num, boxes, scores and classes are "
            "needed; export it again, without --raw"
        )
    problem = _problem(model)
    if problem:
        raise ModelError(f"{name} {problem}, as no exported network does; it is not run")
    try:
        return form(model, metadata, content, name)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the metadata of {name} is incomplete or damaged ({first_line(error, with_type=True)}); "
            "export it again with this version of spd-zoo"
        ) from error


def _content(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if file.is_file() and 0 < size <= _LARGEST_FILE:
            content = file.read_bytes()
            if not (what := page_or_pointer(content[:512])):
                return content
            raise ModelError(f"{file} is {what}, not an ONNX file. Open the link in a browser and get the file itself")
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    if not file.is_file():
        raise ModelError(f"{file} is no file; give an ONNX file or the folder of a run")
    raise ModelError(f"{file} is empty" if not size else f"{file} has {size:,} bytes, more than an ONNX file can have")


def _problem(model: Any) -> str:
    """What a model contains that no exported network does; empty without such a thing."""
    if model.functions or model.training_info:
        return "defines functions of its own"
    if model.graph.sparse_initializer:
        return "holds sparse tensors"
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            return f"uses the operator {node.op_type[:50]} of another library"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"has a loop or a branch ({node.op_type[:50]})"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                return "holds sparse tensors"
    if any(tensor.external_data or tensor.data_location for tensor in _tensors(model.graph)):
        return "keeps weights in other files"
    return ""


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors


def with_threshold_inputs(model: Any) -> Any:
    """A copy of a detector's ONNX model whose `THRESHOLDS` become inputs, which a run may set.

    Raises:
        ValueError: If it has no such thresholds.
    """
    from onnx import ModelProto, TensorProto, helper

    names = {tensor.name for tensor in model.graph.initializer}
    if not names.issuperset(THRESHOLDS):
        raise ValueError("no thresholds for NMS")
    copied: Any = ModelProto()
    copied.CopyFrom(model)
    copied.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in THRESHOLDS)
    return copied


def start_session(model: Any, name: str) -> Any:
    """ONNX Runtime's session for an ONNX model, with as many threads as torch uses.

    Raises:
        ModelError: If ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        if ran_out_of_memory(error):
            raise
        raise ModelError(f"ONNX Runtime cannot load {name}: {first_line(error)[:300]}") from error


def _fixed_size(model: Any, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The height and width that a model takes; None if it takes any.

    Raises:
        ValueError: If its input is something else than images.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    dims: Any = inputs[0].type.tensor_type.shape.dim if [value.name for value in inputs] == ["images"] else ()
    if len(dims) != 4 or dims[1].dim_value != input_size[0]:
        raise ValueError(f"the input is not `images` of {input_size[0]} channels")
    height, width = (dim.dim_value for dim in dims[2:])
    if bool(height) != bool(width) or (height and (height, width) != input_size[1:]):
        raise ValueError("the input has another size")
    return (height, width) if height else None


def _pretrained_cfg(metadata: dict[str, str]) -> dict[str, Any]:
    """timm's configuration, from a file's metadata.

    Raises:
        KeyError, TypeError, ValueError: If something is missing, or is not what it should be.
    """
    mean, std = (_numbers(metadata[name]) for name in ("mean", "std"))
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise ValueError("mean and std are not those of 1 or 3 channels")
    height, width = size = parse_size(metadata["image_size"])
    crop_pct = _number(metadata.get("crop_pct", "1"), 1e-3, 1e3)
    if not 1 <= height * width <= min(1, crop_pct**2) * _MOST_PIXELS:
        raise ValueError(f"an input of {size_text(size)} pixels")
    names = _names(metadata["class_names"])
    cfg: dict[str, Any] = {
        "architecture": metadata["architecture"],
        "tag": "",
        "num_classes": len(names),
        "input_size": (int(_choice(metadata["channels"], "1", "3")), height, width),
        "mean": mean,
        "std": std,
        "interpolation": _choice(metadata["interpolation"], *_INTERPOLATIONS),
        "crop_pct": crop_pct,
        "crop_mode": _choice(metadata.get("crop_mode", "center"), "center", "squash", "border"),
        "label_names": None,
        "label_descriptions": None,
    }
    if "label_names" in metadata:  # the network names its classes
        labels = _names(metadata["label_names"])
        if len(labels) != len(names):
            raise ValueError("label_names and class_names differ in number")
        cfg |= {"label_names": labels, "label_descriptions": dict(zip(labels, names, strict=True))}
    return cfg


def _names(text: str) -> list[str]:
    names = json.loads(text)
    if not isinstance(names, list) or not 1 <= len(names) <= _MOST_CLASSES or not all(type(n) is str for n in names):
        raise ValueError("the class names are no list of names")
    return names


def _numbers(text: str) -> tuple[float, ...]:
    numbers = json.loads(text)
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"no list of numbers: {text[:50]}")
    return tuple(map(float, numbers))


def _class_scores(text: str) -> list[float | None]:
    scores = json.loads(text)
    if not isinstance(scores, list):
        raise ValueError(f"no list of scores: {text[:50]}")
    return [None if score is None else _number(str(score), 0, 1) for score in scores]


def _number(text: str, low: float, high: float) -> float:
    number = float(text)
    if not low <= number <= high:
        raise ValueError(f"{text[:50]} is not from {low} to {high}")
    return number


def _choice(text: str, *choices: str) -> str:
    if text not in choices:
        raise ValueError(f"{text[:50]!r} is none of {', '.join(choices)}")
    return text
