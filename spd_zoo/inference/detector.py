"""Detects objects in images, as `spd-zoo detect` does; boxes are in pixels of the original images."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from timm.layers import to_2tuple
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from spd_zoo.boxes import as_float, labelled_nms, mostly_covered
from spd_zoo.data.boxes.tiles import view_boxes
from spd_zoo.data.classes import network_classes, renamed
from spd_zoo.data.reading import channel_mode, read_image, size_text, upright
from spd_zoo.data.regions import Box, Regions, reduced
from spd_zoo.files import read_yaml, whole
from spd_zoo.inference.exported import ExportedDetector, load_model
from spd_zoo.inference.images import ImageLike, as_html, listed, open_image, optional_package, show
from spd_zoo.inference.loop import Files, Task, batches, run
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.process import pick_device
from spd_zoo.weights.load import ModelError

__all__ = ["Detections", "Detector", "ImageDetections", "Placement", "as_coco", "detect", "postprocess", "prepare"]

GREY = 114  # of 255; YOLO's authors pad with this value
_IN_REPR = 3  # classes
EDGE = 0.01  # share of a tile's shorter side: a box that ends nearer to an inner side may be cut off
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
    """The objects in an image, by descending score. `detections[mask]` selects some of them.

    Attributes:
        boxes: (M, 4), x1 y1 x2 y2 in pixels of the upright image.
        scores: (M,), 0..1.
        labels: (M,), classes from 0.
        class_names: The names of all classes.
        image: The image as it was given to the detector, for `draw` and `show`; None if it is unknown.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    image: ImageLike | None = field(default=None, repr=False, compare=False)

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

    def __getitem__(self, index: Tensor | slice) -> "Detections":
        return Detections(self.boxes[index], self.scores[index], self.labels[index], self.class_names, self.image)

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

        Args:
            image: In any form that `Detector` takes; by default the one that the detector was given.

        Raises:
            ValueError: If the image is unknown or cannot be read.
        """
        if image is None and self.image is None:
            raise ValueError("these objects do not know their image; give it to draw or show")
        drawn = open_image(self.image if image is None else image)
        pen = ImageDraw.Draw(drawn)
        width = max(1, round(max(drawn.size) / 500))
        font = ImageFont.load_default(max(10, 6 * width))
        objects = zip(self.boxes.round().tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        for (left, top, right, bottom), score, label in reversed(list(objects)):  # the most certain on top
            colour = ImageColor.getrgb(f"hsv({137 * label % 360}, 80%, 90%)")
            pen.rectangle((left, top, right, bottom), outline=colour, width=width)
            text = f"{self.class_names[label]} {score:.2f}"
            place = (left, max(0.0, top - font.getbbox(text)[3] - 2))
            pen.rectangle(pen.textbbox(place, text, font), fill=colour)
            pen.text(place, text, (0, 0, 0), font)
        return drawn

    def show(self, image: ImageLike | None = None) -> None:
        """Shows what `draw` returns, in a notebook or in the system's viewer.

        Raises:
            RuntimeError: If there is no viewer.
            ValueError: If the image is unknown or cannot be read.
        """
        show(self.draw(image))


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
    mean, std = (_per_channel(net, name) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std, placement


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


def _per_channel(net: ObjectFinder, name: str) -> Tensor:
    """`mean` or `std` of the network's configuration, (in_chans, 1, 1)."""
    values = torch.tensor(net.pretrained_cfg[name])
    return (values if len(values) == net.in_chans else values.mean().expand(net.in_chans))[:, None, None]


def postprocess(
    net: ObjectFinder,
    raw: Any,
    placements: Sequence[Placement],
    image_size: tuple[int, int],
    score_threshold: float = 0.25,
    iou_threshold: float | None = None,
    max_detections: int = 300,
) -> list[Detections]:
    """Raw predictions of a batch -> the objects in each image, on the CPU.

    NMS runs per class, and a box counts for every class above the score threshold, as in the authors' evaluation. Boxes
    are clipped to the image; those outside it are dropped.

    Args:
        net: The detector.
        raw: What its `forward` returned.
        placements: What `prepare` returned with each input.
        image_size: Height and width of the inputs.
        score_threshold: Minimum score; evaluation takes 0.001, or 0.01 for SSD.
        iou_threshold: IoU threshold of NMS; None: the authors' value.
        max_detections: Maximum number of objects per image.
    """
    names = tuple(network_classes(net.pretrained_cfg, net.num_classes).names)
    found = []
    raw_found = net.detections(raw, image_size, score_threshold, iou_threshold, max_detections)
    for each, placement in zip(raw_found, placements, strict=True):
        boxes = placement.to_original(each["boxes"].cpu())
        detections = Detections(boxes, each["scores"].cpu(), each["labels"].cpu(), names)
        found.append(detections[(boxes[:, 2:] > boxes[:, :2]).all(1)])
    return found


class Detector:
    """Detects objects in images of any size.

    With `tile`, a larger image is cut into overlapping squares of `tile` pixels, each scaled to the network's input.
    The whole image is one more view. The detections of all views are merged:

    1. A box that ends at an inner side of its tile may be cut off. It is dropped if a box of the same class that is not
       cut off, from another view, covers at least half of it.
    2. Duplicates of one class are removed by NMS at an IoU of 0.5 (or `iou_threshold`, if that is less).

    An object no larger than the overlap is complete in some tile. A larger one may be complete only in the view of the
    whole image; without that view it may be found in several pieces.

    Args:
        model: A network, or one with pretrained weights by its name, with or without a tag, `local-dir:FOLDER`, the
            folder of a run, or an ONNX file that `spd-zoo export` wrote, which ONNX Runtime runs on the CPU.
        device: torch device; by default a network stays where it is, and a name is loaded on a GPU if there is one.
        image_size: Height and width of the network's input, or one number for both; by default those of its weights.
        score_threshold: Minimum score.
        iou_threshold: IoU threshold of NMS; None: the authors' value.
        max_detections: Maximum number of objects per image; by default 300, or what an exported file has room for.
        batch_size: Images or tiles per batch.
        tile: Side of the tiles in pixels of the image; None: no tiles.
        overlap: Minimum overlap of neighbouring tiles, as a share of their side.
        whole_image: Whether a tiled image is also a view as a whole.
        class_map: Other names for the network's classes: from the new name to the network's own.
        max_pixels: Most pixels of an image file that is decoded as a whole; with `tile`, a TIFF is not.

    Raises:
        DataError: If `class_map` names a class that the network does not have.
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
        score_threshold: float = 0.25,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float = 0.2,
        whole_image: bool = True,
        class_map: Mapping[str, str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        for name, count in (("max_detections", max_detections), ("batch_size", batch_size), ("tile", tile)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        name = type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)
        net = model if isinstance(model, nn.Module) else load_model(name, device)
        if not isinstance(net, ObjectFinder):
            raise ModelError(f"{name} is no detector; run `spd-zoo predict {name} IMAGES`, or use spd_zoo.Classifier")
        if device is not None:
            net.to(pick_device(device))
        net.eval()
        self.net, self.name = net, name
        channel_mode(net.in_chans, name)  # an error now, not at the first image
        self.class_map = dict(class_map or {})
        self.class_names = tuple(renamed(network_classes(net.pretrained_cfg, net.num_classes), self.class_map))
        height, width = to_2tuple(tuple(net.pretrained_cfg["input_size"][1:]) if image_size is None else image_size)
        if min(height, width) < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.image_size: tuple[int, int] = (height, width)
        self.score_threshold = score_threshold
        self.iou_threshold = net.iou_threshold if iou_threshold is None else iou_threshold
        room = net.max_detections if isinstance(net, ExportedDetector) else None
        if max_detections is not None and room is not None and max_detections > room:
            raise ValueError(f"{name} was exported with room for {room} objects, fewer than {max_detections}")
        self.max_detections: int = max_detections or room or 300
        self.batch_size = batch_size
        self.tile, self.overlap, self.whole_image = tile, overlap, whole_image
        self.max_pixels = max_pixels

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
            images: A file, a PIL image, an array (H, W, 3) of uint8 in RGB, a tensor (3, H, W) of uint8 or of floats
                from 0 to 1, or a list of these, of any sizes; or a folder, for the images in it, in the order of their
                paths. Files and PIL images are turned as their EXIF says.

        Returns:
            `Detections`; for a list or a folder, a list of them.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
            ValueError: If an image cannot be read or is none of these.
        """
        sources, several = listed(images)
        opened = ((i, source if isinstance(source, TiffRegions) else open_image(source, read=self.read)) for i, source in enumerate(sources))
        found = self.find((i, *view) for i, image in opened for view in self.views(image))
        found = [replace(each, image=source) for each, source in zip(found, sources, strict=True)]
        return found if several else found[0]

    def read(self, file: str | BytesIO, mode: str = "RGB") -> Regions:
        """An image file, upright; with `tile`, those parts of it that are needed, if its format allows that.

        Raises:
            ValueError: If it cannot be read.
        """
        return (open_regions if self.tile else read_image)(file, mode, self.max_pixels)

    def find(self, views: Iterable[tuple[int, Tensor, Placement]]) -> list[Detections]:
        """Merges the detections of all views of each image.

        Args:
            views: For every view the number of its image, the input and its placement; an image's views in a row.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
        """
        found = []
        for _, of_image in itertools.groupby(self._compute(views), itemgetter(0)):
            _, placements, detections = zip(*of_image, strict=True)
            merged = merge_views(detections, placements, self.iou_threshold)
            found.append(merged[: self.max_detections])
        return found

    def _compute(self, views: Iterable[tuple[int, Tensor, Placement]]) -> Iterator[tuple[int, Placement, Detections]]:
        """Computes the views in batches: the number of each view's image, its placement and its detections."""
        weight = next(self.net.parameters())  # its device and precision are those of the inputs
        views = iter(views)
        while batch := list(itertools.islice(views, self.batch_size)):
            numbers, inputs, placements = zip(*batch, strict=True)
            with torch.inference_mode():
                raw = self.net(torch.stack(inputs).to(weight, memory_format=torch.channels_last))
            thresholds = (self.score_threshold, self.iou_threshold)
            found = postprocess(self.net, raw, placements, self.image_size, *thresholds, self.max_detections)
            named = [replace(each, class_names=self.class_names) for each in found]
            yield from zip(numbers, placements, named, strict=True)

    def views(self, image: Regions) -> Iterator[tuple[Tensor, Placement]]:
        """The network's inputs (C, H, W) for an upright image, and the placement of each."""
        side = self.tile or max(image.size)
        for box in view_boxes(image.size, side, self.overlap, self.whole_image):
            yield prepare_part(image, box, self.net, self.image_size)


def trained_on_tiles(model: str) -> tuple[int, float] | None:
    """The side and the overlap of the tiles on which a run was trained; None for other networks.

    Args:
        model: The folder of the run, also as `local-dir:FOLDER`, or an exported file in it.
    """
    path = Path(model.removeprefix("local-dir:"))
    file = (path.parent if path.suffix == ".onnx" else path) / "run.yaml"
    options = read_yaml(file) if file.is_file() else None
    tile, overlap = (options.get(name) for name in ("tile", "overlap")) if isinstance(options, dict) else (None, None)
    if isinstance(tile, int) and tile > 0 and isinstance(overlap, int | float) and 0 <= overlap < 1:
        return tile, overlap
    return None


def merge_views(found: Sequence[Detections], placements: Sequence[Placement], iou_threshold: float) -> Detections:
    """Merges the detections of one image's views by the rules of `Detector`."""
    if len(found) == 1:
        return found[0]
    iou_threshold = min(iou_threshold, SAME_OBJECT)
    width, height = (max(place.corner[i] + place.size[1 - i] for place in placements) for i in (0, 1))
    cut = torch.cat([_is_cut(each.boxes, place, width, height) for each, place in zip(found, placements, strict=True)])
    merged = _concatenate(found)
    complete, cut_off = _nms(merged[~cut], iou_threshold), merged[cut]
    dropped = mostly_covered(cut_off.boxes, cut_off.labels, complete.boxes, complete.labels, COVERED)
    return _nms(_concatenate([complete, cut_off[~dropped]]), iou_threshold)


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


def _nms(found: Detections, iou_threshold: float) -> Detections:
    return found[labelled_nms(found.boxes, found.scores, found.labels, iou_threshold)]


@dataclass(frozen=True)
class ImageDetections:
    """The objects in an image file and its upright size, or the reason why it could not be read."""

    path: Path
    size: tuple[int, int] = (0, 0)  # height and width
    detections: Detections | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()  # what was guessed when it was read


def detect(detector: Detector, paths: Sequence[Path], out: Path | None = None) -> Iterator[ImageDetections]:
    """Detects objects in image files, in order; yields those of each image as soon as its batch is computed.

    `out` appears after the last image. It has a copy of every image with the objects marked, in the subfolders that the
    images have below their common folder, and `detections.json`, which `as_coco` describes.

    Args:
        detector: The detector.
        paths: Image files, as `spd_zoo.data.reading.find_images` returns them; duplicates count once.
        out: A folder that does not exist or is empty; it is written atomically.

    Raises:
        ImageSizeError: If the network does not take inputs of the detector's size.
        ValueError: If `out` is something else.
    """
    paths = list(dict.fromkeys(paths))
    images = Files([str(path) for path in paths])
    at_once = 1 if detector.tile else detector.batch_size  # large images are in memory one at a time

    def compute(opened: list[Any]) -> list[tuple[Any, Detections | str]]:
        try:
            return list(zip(opened, detector(opened), strict=True))
        except PartError as error:  # of an image that is read by its parts, one at a time
            return [(opened[0], str(error))]

    task = Task(detector.read, list, compute, at_once)
    with _new_folder(out) if out is not None else nullcontext() as folder:
        done = []
        places = _places(paths)
        for batch, outcomes in run(images, task, batches(range(len(paths)), at_once)):
            for path, outcome in zip(paths[batch.start : batch.stop], outcomes, strict=True):
                if outcome.result is None:
                    done.append(ImageDetections(path, error=outcome.error, notes=outcome.notes))
                else:
                    image, found = outcome.result
                    found = replace(found, image=path)  # the file, so that its pixels do not stay in memory
                    done.append(ImageDetections(path, (image.height, image.width), found, notes=outcome.notes))
                    if folder is not None:
                        _save(found.draw(image), folder / places[path])
                yield done[-1]
        if folder is not None:
            text = json.dumps(as_coco(done, detector.class_names), indent=1)
            (folder / "detections.json").write_text(text + "\n", encoding="utf-8")


def as_coco(found: Sequence[ImageDetections], class_names: Sequence[str]) -> dict[str, Any]:
    """Detections as a data set in COCO's format, whose `annotations` have a `score` as in COCO's results.

    Categories and images are numbered from 1. Images that could not be read are left out.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for each in found:
        if each.detections is None:
            continue
        height, width = each.size
        images.append({"id": len(images) + 1, "file_name": str(each.path), "width": width, "height": height})
        boxes = box_convert(each.detections.boxes, "xyxy", "xywh").tolist()
        rows = zip(boxes, each.detections.scores.tolist(), each.detections.labels.tolist(), strict=True)
        for box, score, label in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": label + 1,
                    "bbox": [round(value, 2) for value in box],
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": round(score, 5),
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
    return {"images": images, "categories": categories, "annotations": annotations}


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, and is deleted if the block fails."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; choose a new folder with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.mkdir()
        yield temporary


def _places(paths: Sequence[Path]) -> dict[Path, Path]:
    """Where the copy of each image goes, relative to their common folder; as PNG unless it was JPEG."""
    full = [Path(os.path.normpath(path.absolute())) for path in paths]  # ".." would lead out of the folder
    shared = os.path.commonpath([path.parent for path in full]) if full else ""
    places = {}
    for path, place in zip(paths, full, strict=True):
        name = place.name if place.suffix.lower() in (".jpg", ".jpeg", ".png") else f"{place.name}.png"
        places[path] = place.relative_to(shared).with_name(name)
    return places


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=95)
