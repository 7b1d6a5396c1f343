"""Detects objects in images, as `spd-zoo detect` does; boxes are in pixels of the original images."""

import itertools
import math
import operator
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from spd_zoo.arguments import height_and_width, positive_integer
from spd_zoo.boxes import MAX_CANDIDATES, as_float, compared_labels, labelled_nms, mostly_covered
from spd_zoo.data.boxes.tiles import view_boxes
from spd_zoo.data.classes import class_numbers, network_classes, renamed
from spd_zoo.data.notes import count, some
from spd_zoo.data.reading import MAX_PIXELS, channel_mode, per_channel, read_image, size_text, upright
from spd_zoo.data.regions import Box, Regions, open_regions, reduced
from spd_zoo.files import read_yaml
from spd_zoo.inference.exported import ExportedDetector, load_model
from spd_zoo.inference.images import ImageLike, as_html, check_colour, listed, open_image, optional_package, show
from spd_zoo.inference.loop import check_finite
from spd_zoo.inference.scores import read_scores
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.process import pick_device
from spd_zoo.weights.load import ModelError, pretrained_cfg, task_by_name

__all__ = ["Detections", "Detector", "Placement", "postprocess", "prepare"]

GREY = 114  # of 255; YOLO's authors pad with this value
_IN_REPR = 3  # classes
EDGE = 0.01  # share of a tile's shorter side: a box that ends nearer to an inner side may be cut off
SCORE = 0.25  # minimum score
COVERED = 0.5  # a cut-off box is dropped if a complete one covers at least this share of it
SAME_OBJECT = 0.5  # IoU of boxes from different views from which on they are one object


@dataclass(frozen=True)
class Placement:
    """Where an image lies in a network's input: input pixels are (pixels - corner) * scale + offset."""

    size: tuple[int, int]  # height and width of the image
    scale: tuple[float, float]  # input pixels per pixel, in x and in y
    offset: tuple[int, int] = (0, 0)  # of the left and of the top side, in input pixels
    corner: tuple[int, int] = (0, 0)  # left and top, where the image is a tile of a larger one

    def to_input(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4), x1 y1 x2 y2 in the (larger) image's pixels -> the same in input pixels."""
        boxes = as_float(boxes)
        scale, offset, corner = (boxes.new_tensor(pair * 2) for pair in (self.scale, self.offset, self.corner))
        return (boxes - corner) * scale + offset

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4), x1 y1 x2 y2 in input pixels -> in the (larger) image's pixels, clipped to the image."""
        boxes = as_float(boxes)
        scale, offset, corner = (boxes.new_tensor(pair * 2) for pair in (self.scale, self.offset, self.corner))
        return clip_boxes_to_image((boxes - offset) / scale, self.size) + corner


@dataclass(frozen=True)
class Detections:
    """The objects in an image, by descending score. `detections[mask]` selects some, `detections[0]` one of them.

    Attributes:
        boxes: (M, 4), x1 y1 x2 y2 in pixels of the upright image.
        scores: (M,), 0..1.
        labels: (M,), classes from 0.
        class_names: The names of all classes.
        image: The image as it was given to the detector, for `draw` and `show`; None if it is unknown.
        limited: Whether there may be more objects: more than `max_detections`, or than an exported file can hold,
            or more than 30,000 scores of one view are high enough.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    image: ImageLike | None = field(default=None, repr=False, compare=False)
    limited: bool = field(default=False, repr=False, compare=False)

    def __repr__(self) -> str:
        counts = Counter(self.names)
        found = ", ".join(f"{number} {name}" for name, number in counts.most_common(_IN_REPR))
        more = f", and {len(counts) - _IN_REPR} more classes" if len(counts) > _IN_REPR else ""
        return f"Detections({found or 'no objects'}{more})"

    def _repr_html_(self) -> str:
        rows = [(each["name"], f"{each['score']:.2f}", *(f"{x:.0f}" for x in each["box"])) for each in self.to_dict()]
        try:
            drawn = self.draw() if self.image is not None else None
        except ValueError:  # the file is gone
            drawn = None
        return as_html(drawn, ("object", "score", "x1", "y1", "x2", "y2"), rows)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> "Detections":
        if hasattr(index, "__index__") and getattr(index, "ndim", 0) == 0:  # also a number of NumPy or torch
            index = [operator.index(index)]
        return replace(self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index])

    def __iter__(self) -> Iterator["Detections"]:
        return (self[index] for index in range(len(self)))

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def to_dict(self) -> list[dict[str, Any]]:
        """A dict per object, ready for JSON: `label`, `name`, `score`, and `box` as x1 y1 x2 y2 in pixels."""
        columns = (self.labels.tolist(), self.names, self.scores.tolist(), self.boxes.tolist())
        return [dict(zip(("label", "name", "score", "box"), each, strict=True)) for each in zip(*columns, strict=True)]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per object: `label`, `name`, `score`, `x1`, `y1`, `x2`, `y2`.

        Raises:
            ModuleNotFoundError: If the package pandas is missing.
        """
        boxes = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T.tolist(), strict=True))
        columns = {"label": self.labels.tolist(), "name": self.names, "score": self.scores.tolist()}
        return optional_package("pandas", "to_pandas").DataFrame(columns | boxes)

    def to_torchvision(self) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels` in torchvision's form, but labels count from 0 without background."""
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`, names under `class_name`.

        Raises:
            ModuleNotFoundError: If the package supervision is missing.
        """
        return optional_package("supervision", "to_supervision").Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: ImageLike | None = None) -> Image.Image:
        """A copy of the image, upright and in colour, with a box, the name and the score of every object.

        A label lies above or below its box or in it, inside the image; it is left out where it would hide another one,
        of an object with a higher score.

        Args:
            image: In any form that `Detector` takes, an array in RGB; by default the one that the detector was given.

        Raises:
            ValueError: If the image is unknown or cannot be read.
        """
        if image is None and self.image is None:
            raise ValueError("these objects do not know their image; give it to draw or show")
        drawn = open_image(self.image if image is None else image)
        pen = ImageDraw.Draw(drawn)
        width = max(1, round(max(drawn.size) / 500))
        font = ImageFont.load_default(max(10, 6 * width))
        boxes, labels = self.boxes.round().tolist(), self.labels.tolist()
        colours = [ImageColor.getrgb(f"hsv({137 * label % 360}, 60%, 100%)") for label in labels]
        for box, colour in reversed(list(zip(boxes, colours, strict=True))):  # the most certain on top
            pen.rectangle(box, outline=colour, width=width)
        taken: list[tuple[float, float, float, float]] = []
        for box, score, label, colour in zip(boxes, self.scores, labels, colours, strict=True):
            text = f"{self.class_names[label]} {score:.2f}"
            _, _, *size = font.getbbox(text)
            place = _label_place(box, (size[0] + 2, size[1] + 2), drawn.size, taken)
            if place is not None:
                taken.append(place)
                pen.rectangle(place, fill=colour)
                pen.text((place[0] + 1, place[1]), text, (0, 0, 0), font)
        return drawn

    def show(self, image: ImageLike | None = None) -> None:
        """Shows what `draw` returns, in a notebook or in the system's viewer.

        Raises:
            RuntimeError: If there is no viewer.
            ValueError: If the image is unknown or cannot be read.
        """
        show(self.draw(image))


def _label_place(
    box: Sequence[float], size: tuple[float, float], image_size: tuple[int, int], taken: Iterable[Sequence[float]]
) -> tuple[float, float, float, float] | None:
    """The area of a box's label, above it, below it or in it, that is in the image and free; None if there is none."""
    (left, top, _, bottom), (width, height) = box, size
    left = max(0, min(left, image_size[0] - width))
    for y in (top - height, bottom + 1, top, bottom - height):
        fits = y >= 0 and y + height <= image_size[1]
        if fits and all(
            left >= right or left + width <= x or y >= lower or y + height <= upper for x, upper, right, lower in taken
        ):
            return left, y, left + width, y + height
    return None


def prepare(image: Image.Image, net: ObjectFinder, image_size: tuple[int, int]) -> tuple[Tensor, Placement]:
    """Preprocesses an image as the authors of the detector do, but always with bilinear scaling and antialiasing.

    YOLO: letterboxed in grey, RGB from 0 to 1. SSD: stretched, BGR, mean subtracted. The colours' mean and
    deviation are those of `net.pretrained_cfg`.

    Args:
        image: Of any mode and size; turned upright if its EXIF says so.
        net: The detector.
        image_size: Height and width of the network's input.

    Returns:
        The input (in_chans, H, W), and where the upright image lies in it.

    Raises:
        ModelError: If the network takes neither grey nor colour images.
        ValueError: If the image has 32-bit pixels of unknown range.
    """
    image = upright(image, channel_mode(net.in_chans, "the network"))
    height, width = image_size
    scaled, offset = (width, height), (0, 0)
    if net.keeps_aspect:
        scale = min(height / image.height, width / image.width)
        scaled = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        offset = (round((width - scaled[0]) / 2 - 0.1), round((height - scaled[1]) / 2 - 0.1))
    placement = Placement((image.height, image.width), (scaled[0] / image.width, scaled[1] / image.height), offset)
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    if scaled != (width, height):
        canvas = Image.new(image.mode, (width, height), (GREY,) * net.in_chans)
        canvas.paste(image, offset)
        image = canvas
    pixels = torch.from_numpy(np.array(image)).reshape(height, width, net.in_chans).permute(2, 0, 1)
    if net.in_chans == 3 and net.channel_order == "BGR":
        pixels = pixels.flip(0)
    mean, std = (torch.tensor(per_channel(net.pretrained_cfg[name], net.in_chans)) for name in ("mean", "std"))
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None], placement


def prepare_part(
    image: Regions, box: Box | None, net: ObjectFinder, image_size: tuple[int, int]
) -> tuple[Tensor, Placement]:
    """As `prepare`, for the pixels in a box of an upright image; without a `box`, for the whole image.

    Raises:
        ValueError: If a part of the image cannot be read.
    """
    if box is not None:
        pixels, placement = prepare(image.crop(box), net, image_size)
        return pixels, replace(placement, corner=box[:2])
    small, (width, height) = reduced(image, (image_size[1], image_size[0])), image.size
    pixels, placement = prepare(small, net, image_size)
    scale = (placement.scale[0] * small.width / width, placement.scale[1] * small.height / height)
    return pixels, replace(placement, size=(height, width), scale=scale)


def postprocess(
    net: ObjectFinder,
    raw: Any,
    placements: Sequence[Placement],
    image_size: tuple[int, int],
    score_threshold: float | Tensor = SCORE,
    iou_threshold: float | None = None,
    max_detections: int | None = 300,
    agnostic: bool = False,
) -> list[Detections]:
    """Raw predictions of a batch -> the objects in each image, on the CPU.

    Unless it is `agnostic`, NMS runs per class, and a box counts for every class above the score threshold, as in the
    authors' evaluation. Boxes are clipped to the image; those outside it are dropped.

    Args:
        net: The detector.
        raw: What its `forward` returned.
        placements: What `prepare` returned with each input.
        image_size: Height and width of the inputs.
        score_threshold: Minimum score, or one for each class (classes,); evaluation takes 0.001, or 0.01 for SSD.
        iou_threshold: IoU threshold of NMS; None: the authors' value.
        max_detections: Maximum number of objects per image; None: no limit.
        agnostic: Whether boxes of different classes suppress each other, too.
    """
    names = tuple(network_classes(net.pretrained_cfg, net.num_classes).names)
    found = []
    raw_found = net.detections(raw, image_size, score_threshold, iou_threshold, max_detections, agnostic=agnostic)
    for each, placement in zip(raw_found, placements, strict=True):
        boxes = placement.to_original(each["boxes"].cpu())
        columns = (boxes, each["scores"].cpu(), each["labels"].cpu())
        detections = Detections(*columns, names, limited=bool(each["limited"]))
        found.append(detections[(boxes[:, 2:] > boxes[:, :2]).all(1)])
    return found


def _no_detector(name: str) -> ModelError:
    return ModelError(f"{name} is no detector; run `spd-zoo predict {name} IMAGES`, or use spd_zoo.Classifier")


def _load(name: str, device: str | None) -> nn.Module:
    if task_by_name(name) == "classification":
        raise _no_detector(name)
    return load_model(name, device)


class Detector:
    """Detects objects in images of any size.

    With `tile`, a larger image is cut into overlapping squares of `tile` pixels, each scaled to the network's input.
    The whole image is one more view. The detections of all views are merged:

    1. A box that ends at an inner side of its tile may be cut off. It is dropped if a box of the same class that is not
       cut off, from another view, covers at least half of it.
    2. Duplicates of one class, also those from one view, are removed by NMS at an IoU of 0.5 (or `iou_threshold`, if
       that is less).

    With `agnostic` both rules compare boxes of all classes. `max_detections` counts merged boxes, not those of a tile.

    An object no larger than the overlap is complete in some tile. A larger one may be complete only in the view of the
    whole image; without that view it may be found in several pieces.

    Args:
        model: A network, or one with pretrained weights by its name, with or without a tag, `local-dir:FOLDER`, the
            folder of a run, or an ONNX file that `spd-zoo export` wrote, which ONNX Runtime runs on the CPU.
        device: torch device; by default a network stays where it is, and a name is loaded on a GPU if there is one.
        image_size: Height and width of the network's input, or one number for both; by default those of its weights.
        score_threshold: Minimum score. "auto": of each class the one with the best F1 on the validation images of the
            run, as `scores.json` in its folder says; of classes without such a score 0.25.
        iou_threshold: IoU threshold of NMS, for images in tiles no more than 0.5; None: the authors' value.
        max_detections: Maximum number of objects per image; by default 300, or the limit of an exported file.
            Where the default leaves objects out, a warning says so; `Detections.limited` always does.
        batch_size: Images or tiles per batch.
        tile: Side of the tiles in pixels of the image; None: no tiles.
        overlap: Minimum overlap of neighbouring tiles, as a share of their side.
        whole_image: Whether a tiled image is also a view as a whole.
        class_map: Other names for the network's classes: from the new name to the network's own.
        classes: The classes to detect, by name or number; None: all.
        class_scores: Minimum scores of single classes, by name or number; others have `score_threshold`.
        agnostic: Whether a box suppresses boxes of other classes, too, so that every object has one class. An exported
            file suppresses boxes within each class first.
        colour: The order of the channels of arrays: "rgb", or "bgr" as OpenCV reads them.
        max_pixels: Maximum number of pixels of an image file that is decoded as a whole; with `tile`, a TIFF is not.

    Raises:
        DataError: If `class_map`, `classes` or `class_scores` names a class that the network does not have.
        ModelError: If there is no such network, it is no detector, or it cannot be used.
        ValueError: If an option is out of range, or there is no such device.
        WeightsError: If the weights are unavailable or must not be used.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        device: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        score_threshold: float | str = SCORE,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float = 0.2,
        whole_image: bool = True,
        class_map: Mapping[str, str] | None = None,
        classes: Sequence[str | int] | None = None,
        class_scores: Mapping[str | int, float] | None = None,
        agnostic: bool = False,
        colour: str = "rgb",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_colour(colour)
        self.colour = colour
        scores = [("class_scores", value) for value in (class_scores or {}).values()]
        if isinstance(score_threshold, str) and score_threshold != "auto":
            raise ValueError(f"score_threshold must be a number or 'auto', got {score_threshold!r}")
        self.score_threshold = SCORE if isinstance(score_threshold, str) else score_threshold
        for name, value in (("score_threshold", self.score_threshold), ("iou_threshold", iou_threshold), *scores):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        max_detections = None if max_detections is None else positive_integer("max_detections", max_detections)
        self.batch_size = positive_integer("batch_size", batch_size)
        self.tile = None if tile is None else positive_integer("tile", tile)
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        name = type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)
        net = model if isinstance(model, nn.Module) else _load(name, device)
        if not isinstance(net, ObjectFinder):
            pretrained_cfg(net)  # an error that says more, if it has none
            raise _no_detector(name)
        if device is not None:
            net.to(pick_device(device))
        net.eval()
        self.net, self.name = net, name
        channel_mode(net.in_chans, name)  # an error now, not at the first image
        self.class_map = dict(class_map or {})
        self.class_names = tuple(renamed(network_classes(net.pretrained_cfg, net.num_classes), self.class_map))
        own = net.pretrained_cfg["input_size"][1:]
        self.image_size = height_and_width("image_size", own if image_size is None else image_size)
        self.iou_threshold = net.iou_threshold if iou_threshold is None else iou_threshold
        net.check_limit(max_detections, name)
        self.max_detections: int = max_detections or net.max_detections or 300
        self.warns = max_detections is None
        self.agnostic = agnostic
        self.measured = self._measured() if score_threshold == "auto" else {}
        self.thresholds = self._thresholds(classes, class_scores or {})
        self.overlap, self.whole_image = overlap, whole_image
        self.max_pixels = max_pixels

    def _measured(self) -> dict[int, float]:
        """The best minimum score of each class by its number, as it was measured for the run or the exported file."""
        if isinstance(self.net, ExportedDetector):
            return self.net.scores_of_classes()
        return read_scores(self.name, network_classes(self.net.pretrained_cfg, self.net.num_classes).names)

    def _thresholds(
        self, classes: Sequence[str | int] | None, class_scores: Mapping[str | int, float]
    ) -> float | Tensor:
        """The minimum score of all classes, or of each (classes,), which is infinite for those that are left out."""
        if isinstance(classes, str):
            raise ValueError(f"classes must be a list of names or numbers, got the text {classes!r}")
        if classes is None and not class_scores and not self.measured:
            return self.score_threshold
        names = self.class_names
        chosen = range(len(names)) if classes is None else class_numbers(classes, names)
        if not chosen:
            raise ValueError("classes must name at least one class")
        thresholds = torch.full((len(names),), math.inf)
        for number in chosen:
            thresholds[number] = self.measured.get(number, self.score_threshold)
        scored: dict[int, str | int] = {}
        for each, score in class_scores.items():
            for number in class_numbers([each], names):
                if number in scored:
                    raise ValueError(f"class_scores names class {number} twice, as {scored[number]!r} and {each!r}")
                scored[number] = each
                if number not in chosen:
                    raise ValueError(f"class_scores must not name {each!r}, which classes leaves out")
                thresholds[number] = score
        return thresholds

    def scores_in_words(self) -> str:
        """The minimum scores with `score_threshold="auto"`, on one line, of the classes that are detected."""
        scores = torch.as_tensor(self.thresholds).expand(len(self.class_names)).tolist()
        used = {i: score for i, score in enumerate(scores) if math.isfinite(score)}
        others = [i for i, score in used.items() if i not in self.measured and score == self.score_threshold]
        names = [f"{self.class_names[i]} {score:.2f}" for i, score in used.items() if i not in others]
        words = [some(names, 10)] if names else []
        if others:
            unmeasured = some([self.class_names[i] for i in others])
            words.append(
                f"{self.score_threshold:g} for {unmeasured}, of which no box was correct when the run was validated"
            )
        settings = ", ".join(self._other_settings())
        words += [f"they were measured with other settings: this detection runs {settings}"] if settings else []
        return f"minimum scores: {'; '.join(words)}"

    def _other_settings(self) -> Iterator[str]:
        """The settings that differ from those with which the minimum scores of the run were measured."""
        tile, _ = trained_on_tiles(self.name, self.net) or (None, 0.2)
        if self.tile != tile:
            yield f"on tiles of {self.tile} px" if self.tile else "without tiles"
        if self.image_size != tuple(self.net.pretrained_cfg["input_size"][1:]):
            yield f"at {size_text(self.image_size)} px"
        if self.iou_threshold != self.net.iou_threshold:
            yield f"with an IoU threshold of {self.iou_threshold:g}"

    def __repr__(self) -> str:
        device = next(self.net.parameters()).device
        classes = f"{len(self.class_names)} classes"
        return f"Detector({self.name}, {classes}, {size_text(self.image_size)} pixels, on {device})"

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detections]: ...

    @overload
    def __call__(self, images: ImageLike) -> Any: ...

    def __call__(self, images: Any) -> Any:
        """The objects in an image, or in each image of a list or folder.

        Args:
            images: A file, a PIL image, an array of uint8, (H, W, 3) in the order `colour` or grey (H, W), a tensor
                (3, H, W) or grey (1, H, W) of uint8 or of floats from 0 to 1, or a list of these, of any sizes; or a
                folder or a pattern such as photos/*.png, for its images in the order of their paths. Files and PIL
                images are turned as their EXIF says.

        Returns:
            `Detections`; for a list, a folder or a pattern, a list of them.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
            ModelError: If the network computes numbers that are not finite.
            ValueError: If an image cannot be read or is none of these.
        """
        sources, several = listed(images, self.colour)
        found = self.find_in(open_image(source, read=self.read) for source in sources)
        found = [replace(each, image=source) for each, source in zip(found, sources, strict=True)]
        limited = sum(each.limited for each in found)
        if limited and self.warns:
            warnings.warn(f"{count(limited, 'image')}: {self.limit_in_words()}", stacklevel=2)
        return found if several else found[0]

    def read(self, file: str | BytesIO, mode: str = "RGB") -> Regions:
        """An image file, upright; with `tile`, those parts of it that are needed, if its format allows that.

        Raises:
            ValueError: If it cannot be read.
        """
        return (open_regions if self.tile else read_image)(file, mode, self.max_pixels)

    def find_in(self, images: Iterable[Regions]) -> list[Detections]:
        """The objects in each upright image; whoever calls this says what `limited` means.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
            ModelError: If the network computes numbers that are not finite.
        """
        return self.find((i, *view) for i, image in enumerate(images) for view in self.views(image))

    def find(self, views: Iterable[tuple[int, Tensor, Placement]]) -> list[Detections]:
        """Merges the detections of all views of each image.

        Args:
            views: For every view the number of its image, the input and its placement; an image's views in a row.

        Returns:
            The detections of each image, in order.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
            ModelError: If the network computes numbers that are not finite.
        """
        found = []
        for _, of_image in itertools.groupby(self._compute(views), operator.itemgetter(0)):
            _, placements, detections = zip(*of_image, strict=True)
            merged = merge_views(detections, placements, self.iou_threshold, self.agnostic)
            limited = any(each.limited for each in detections) or len(merged) > self.max_detections
            found.append(replace(merged[: self.max_detections], limited=limited))
        return found

    def limit_notes(self, found: Detections) -> tuple[str, ...]:
        """A note if a limit may have left out objects."""
        return (self.limit_in_words(),) if found.limited else ()

    def limit_in_words(self) -> str:
        """What it means that `Detections.limited` is true."""
        limit = self.net.max_detections
        if limit is not None:
            full = f"the exported file's limit of {limit} objects was reached, so some may be missing"
            if self.max_detections == limit:
                return f"{full}; export it again with a larger --max-detections"
            return f"more than {self.max_detections} objects (max_detections), or {full}"
        limits = f"{self.max_detections} objects (max_detections), or {MAX_CANDIDATES:,} scores before suppression"
        return f"more than {limits}, of which the best are kept"

    def _compute(self, views: Iterable[tuple[int, Tensor, Placement]]) -> Iterator[tuple[int, Placement, Detections]]:
        """Computes the views in batches: the number of each view's image, its placement and its detections."""
        weight = next(self.net.parameters())  # its device and precision are those of the inputs
        views = iter(views)
        while batch := list(itertools.islice(views, self.batch_size)):
            numbers, inputs, placements = zip(*batch, strict=True)
            with torch.inference_mode():
                raw = self.net(torch.stack(inputs).to(weight, memory_format=torch.channels_last))
            check_finite(raw, self.name)
            options = (self.thresholds, self.iou_threshold, None if self.tile else self.max_detections, self.agnostic)
            found = postprocess(self.net, raw, placements, self.image_size, *options)
            named = [replace(each, class_names=self.class_names) for each in found]
            yield from zip(numbers, placements, named, strict=True)

    def views(self, image: Regions) -> Iterator[tuple[Tensor, Placement]]:
        """The network's inputs (C, H, W) for an upright image, and the placement of each."""
        side = self.tile or max(image.size)
        for box in view_boxes(image.size, side, self.overlap, self.whole_image):
            yield prepare_part(image, box, self.net, self.image_size)


def trained_on_tiles(model: str, net: Any = None) -> tuple[int, float] | None:
    """The side and the overlap of the tiles on which a run was trained; None for other networks.

    Args:
        model: The folder of the run, also as `local-dir:FOLDER`, or an exported file in it.
        net: The network, which knows it if it comes from an exported file.
    """
    if (tiles := getattr(net, "tiles", None)) is not None:
        return cast("tuple[int, float]", tiles)
    path = Path(model.removeprefix("local-dir:"))
    file = (path.parent if path.suffix == ".onnx" else path) / "run.yaml"
    options = read_yaml(file) if file.is_file() else None
    tile, overlap = (options.get(name) for name in ("tile", "overlap")) if isinstance(options, dict) else (None, None)
    if isinstance(tile, int) and tile > 0 and isinstance(overlap, int | float) and 0 <= overlap < 1:
        return tile, overlap
    return None


def merge_views(
    found: Sequence[Detections], placements: Sequence[Placement], iou_threshold: float, agnostic: bool = False
) -> Detections:
    """Merges the detections of one image's views by the rules of `Detector`."""
    if len(found) == 1:
        return found[0]
    iou_threshold = min(iou_threshold, SAME_OBJECT)
    width, height = (max(place.corner[i] + place.size[1 - i] for place in placements) for i in (0, 1))
    cut = torch.cat([_is_cut(each.boxes, place, width, height) for each, place in zip(found, placements, strict=True)])
    merged = _concatenate(found)
    complete, cut_off = _nms(merged[~cut], iou_threshold, agnostic), merged[cut]
    labels, others = (compared_labels(each.labels, agnostic) for each in (cut_off, complete))
    dropped = mostly_covered(cut_off.boxes, labels, complete.boxes, others, COVERED)
    return _nms(_concatenate([complete, cut_off[~dropped]]), iou_threshold, agnostic)


def _is_cut(boxes: Tensor, placement: Placement, width: int, height: int) -> Tensor:
    """Which boxes of a view end at one of its sides that is not a side of the image, (M,)."""
    left, top = placement.corner
    bottom, right = top + placement.size[0], left + placement.size[1]
    margin = EDGE * min(placement.size)
    low = boxes[:, :2] < boxes.new_tensor([left, top]) + margin
    high = boxes[:, 2:] > boxes.new_tensor([right, bottom]) - margin
    inner_low, inner_high = torch.tensor([left > 0, top > 0]), torch.tensor([right < width, bottom < height])
    return ((low & inner_low) | (high & inner_high)).any(1)


def _concatenate(found: Sequence[Detections]) -> Detections:
    columns = ([getattr(each, name) for each in found] for name in ("boxes", "scores", "labels"))
    boxes, scores, labels = map(torch.cat, columns)
    return Detections(boxes, scores, labels, found[0].class_names)


def _nms(found: Detections, iou_threshold: float, agnostic: bool) -> Detections:
    return found[labelled_nms(found.boxes, found.scores, compared_labels(found.labels, agnostic), iou_threshold)]
