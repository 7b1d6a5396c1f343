"""Images in, objects in the images' own pixels out: what `spd-zoo detect` runs."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from timm.layers import to_2tuple
from torch import Tensor, nn
from torchvision.ops import box_area, box_convert, clip_boxes_to_image

from spd_zoo.boxes import as_float, labelled_nms
from spd_zoo.data.reading import read_image, upright
from spd_zoo.models._detector import DetectionNet
from spd_zoo.weights.load import ModelError, class_names, load_network

__all__ = ["Detections", "Detector", "Found", "Placement", "as_coco", "detect", "postprocess", "prepare"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor"

GREY = 114  # of 255: what YOLO's authors pad with
EDGE = 0.01  # of a tile's shorter side: a box that ends nearer to an inner side may be a part of an object
COVERED = 0.5  # share of a part's area in a whole object's box, from which on it belongs to the object
SAME_OBJECT = 0.5  # IoU of boxes from different views


@dataclass(frozen=True)
class Placement:
    """Where an image lies in what a network sees: input pixels are (pixels - corner) * scale + offset."""

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
    """The objects found in an image, the most certain first. `detections[mask]` selects some of them.

    Attributes:
        boxes: (M, 4), x1 y1 x2 y2 in pixels of the upright image.
        scores: (M,), 0..1.
        labels: (M,), classes from 0.
        class_names: What each class is called.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Detections":
        return Detections(self.boxes[index], self.scores[index], self.labels[index], self.class_names)

    @property
    def names(self) -> list[str]:
        """What each object is."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def to_torchvision(self) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels`, as torchvision's detectors give them, but labels from 0 and no background."""
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`, names under `class_name`.

        Raises:
            ModuleNotFoundError: If the package supervision is missing.
        """
        try:
            import supervision  # type: ignore[import-not-found, unused-ignore]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"to_supervision needs the package {error.name}: pip install {error.name}", name=error.name
            ) from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of the image, upright and in colour, with a box, the name and the score of every object."""
        image = upright(image)
        pen = ImageDraw.Draw(image)
        width = max(1, round(max(image.size) / 500))
        font = ImageFont.load_default(max(10, 6 * width))
        objects = zip(self.boxes.round().tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        for (left, top, right, bottom), score, label in reversed(list(objects)):  # the most certain on top
            colour = ImageColor.getrgb(f"hsv({137 * label % 360}, 80%, 90%)")
            pen.rectangle((left, top, right, bottom), outline=colour, width=width)
            text = f"{self.class_names[label]} {score:.2f}"
            place = (left, max(0.0, top - font.getbbox(text)[3] - 2))
            pen.rectangle(pen.textbbox(place, text, font), fill=colour)
            pen.text(place, text, (0, 0, 0), font)
        return image


def prepare(image: Image.Image, net: DetectionNet, image_size: tuple[int, int]) -> tuple[Tensor, Placement]:
    """An image as the authors of a detector feed it, but always scaled bilinearly, with antialiasing.

    YOLO: proportions kept, grey at the sides, RGB from 0 to 1. SSD: stretched, BGR, less a mean. The colours' mean and
    deviation are those of `net.pretrained_cfg`.

    Args:
        image: Of any mode and size; turned upright if its EXIF says so.
        net: The detector.
        image_size: Height and width of the network's input.

    Returns:
        The input (in_chans, H, W), and where the upright image lies in it.

    Raises:
        ValueError: If the network takes neither grey nor colour images, or the image has 32-bit pixels.
    """
    if net.in_chans not in (1, 3):
        raise ValueError(f"the network takes {net.in_chans} channels; images have 1 or 3")
    image = upright(image, "L" if net.in_chans == 1 else "RGB")
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


def _per_channel(net: DetectionNet, name: str) -> Tensor:
    """`mean` or `std` of the network's configuration, (in_chans, 1, 1)."""
    values = torch.tensor(net.pretrained_cfg[name])
    return (values if len(values) == net.in_chans else values.mean().expand(net.in_chans))[:, None, None]


def postprocess(
    net: DetectionNet,
    raw: Any,
    placements: Sequence[Placement],
    image_size: tuple[int, int],
    score_threshold: float = 0.25,
    iou_threshold: float | None = None,
    max_detections: int = 300,
) -> list[Detections]:
    """Raw predictions of a batch -> the objects in each image, on the CPU.

    Each class is suppressed by itself, and a box counts for every class whose score is large enough, as the authors
    evaluate. Boxes are clipped to the image; those that lie outside it go.

    Args:
        net: The detector.
        raw: What it gave.
        placements: What `prepare` gave with each input.
        image_size: Height and width of the inputs.
        score_threshold: Scores above it are looked at; evaluation takes 0.001, or 0.01 for SSD.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped; None: the authors' value.
        max_detections: At most so many per image.
    """
    names = _names(net)
    found = []
    raw_found = net.detections(raw, image_size, score_threshold, iou_threshold, max_detections)
    for one, placement in zip(raw_found, placements, strict=True):
        boxes = placement.to_original(one["boxes"].cpu())
        detections = Detections(boxes, one["scores"].cpu(), one["labels"].cpu(), names)
        found.append(detections[(boxes[:, 2:] > boxes[:, :2]).all(1)])
    return found


def _names(net: DetectionNet) -> tuple[str, ...]:
    """What the classes are called; their numbers where nobody says, or the network has others than its weights had."""
    cfg = net.pretrained_cfg
    return tuple(class_names(cfg) if cfg["num_classes"] == net.num_classes else map(str, range(net.num_classes)))


class Detector:
    """Finds objects in images of any kind and size.

    With `tile`, an image that is larger is seen in overlapping squares of `tile` pixels, each scaled to the network's
    input, and once more as a whole. What the views find is merged:

    1. A box that ends at a side of its tile which is no side of the image may be a part of an object. It is dropped if
       another view has a box of its class that does not, and that covers half of it or more.
    2. Of boxes of one class with an IoU above 0.5 (or `iou_threshold`, if that is less) the best one stays.

    So an object that is no larger than the overlap is found once and whole. A larger one is whole in the view of the
    whole image if in no tile; without that view it may come in parts.

    Args:
        model: A network, or what has pretrained weights: its name, with or without a tag, `local-dir:FOLDER`, or the
            folder of a run.
        device: torch device; a network stays where it is unless given, for a name a GPU is taken if there is one.
        image_size: Height and width of the network's input, or one number for both; those of its weights unless given.
        score_threshold: Objects with a score above it are found.
        iou_threshold: Boxes that overlap a better one of their class by more are dropped; None: the authors' value.
        max_detections: At most so many objects per image.
        batch_size: Images or tiles that are computed at once.
        tile: Side of the tiles in pixels of the image; None: only the whole image.
        overlap: Share of a tile's side that neighbours have in common at least.
        whole_image: Whether an image with tiles is also seen as a whole.

    Raises:
        ModelError: If there is no such network, it is no detector, or it cannot be used.
        ValueError: If an option has no meaning.
        WeightsError: If the weights cannot be had or must not be used.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        device: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        score_threshold: float = 0.25,
        iou_threshold: float | None = None,
        max_detections: int = 300,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float = 0.2,
        whole_image: bool = True,
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
        gpu = "cuda" if torch.cuda.is_available() else "cpu"
        net = model if isinstance(model, nn.Module) else load_network(name, device or gpu)
        if not isinstance(net, DetectionNet):
            raise ModelError(f"{name} is no detector; `spd-zoo predict` names what images show with it")
        if device is not None:
            net.to(device)
        net.eval()
        self.net = net
        self.class_names = _names(net)
        height, width = to_2tuple(tuple(net.pretrained_cfg["input_size"][1:]) if image_size is None else image_size)
        if min(height, width) < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.image_size: tuple[int, int] = (height, width)
        self.score_threshold = score_threshold
        self.iou_threshold = net.iou_threshold if iou_threshold is None else iou_threshold
        self.max_detections = max_detections
        self.batch_size = batch_size
        self.tile, self.overlap, self.whole_image = tile, overlap, whole_image

    @overload
    def __call__(self, images: ImageLike) -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detections]: ...

    def __call__(self, images: Any) -> Detections | list[Detections]:
        """The objects in an image, or in each image of a list.

        Args:
            images: A file, a PIL image, an array (H, W, 3) of uint8 in RGB, a tensor (3, H, W) of uint8 or of floats
                from 0 to 1, or a list of these, of any sizes. Files and PIL images are turned as their EXIF says.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
            ValueError: If an image cannot be read or is none of these.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        opened = enumerate(map(_open, images))
        return self.find((i, *view) for i, image in opened for view in self.views(image))

    def find(self, views: Iterable[tuple[int, Tensor, Placement]]) -> list[Detections]:
        """The objects in each image, of which there are the number, the input and the placement of every view.

        Raises:
            ImageSizeError: If the network does not take inputs of `image_size`.
        """
        found = []
        for _, seen in itertools.groupby(self._look(views), itemgetter(0)):
            _, placements, parts = zip(*seen, strict=True)
            merged = _merge(parts, placements, min(self.iou_threshold, SAME_OBJECT))
            found.append(merged[: self.max_detections])
        return found

    def _look(self, views: Iterable[tuple[int, Tensor, Placement]]) -> Iterator[tuple[int, Placement, Detections]]:
        """For every view, a batch of them at once: the number of its image, where it lies, and what is in it."""
        weight = next(self.net.parameters())  # whose device and precision the images take
        views = iter(views)
        while batch := list(itertools.islice(views, self.batch_size)):
            numbers, inputs, placements = zip(*batch, strict=True)
            with torch.inference_mode():
                raw = self.net(torch.stack(inputs).to(weight, memory_format=torch.channels_last))
            thresholds = (self.score_threshold, self.iou_threshold)
            found = postprocess(self.net, raw, placements, self.image_size, *thresholds, self.max_detections)
            yield from zip(numbers, placements, found, strict=True)

    def views(self, image: Image.Image) -> Iterator[tuple[Tensor, Placement]]:
        """The inputs for the network, (C, H, W), that an upright image gives, and where it lies in each."""
        side = self.tile or max(image.size)
        if max(image.size) <= side or self.whole_image:
            yield prepare(image, self.net, self.image_size)
        if max(image.size) <= side:
            return
        rows, columns = (_starts(length, side, self.overlap) for length in (image.height, image.width))
        for top, left in itertools.product(rows, columns):
            tile = image.crop((left, top, min(left + side, image.width), min(top + side, image.height)))
            pixels, placement = prepare(tile, self.net, self.image_size)
            yield pixels, replace(placement, corner=(left, top))


def _open(image: Any) -> Image.Image:
    """An upright 8-bit colour image."""
    if isinstance(image, str | os.PathLike):
        try:
            return read_image(os.fspath(image))
        except ValueError as error:
            raise ValueError(f"{os.fspath(image)}: {error}") from error
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"an array must be (H, W, 3) of uint8 in RGB, got {image.shape} of {image.dtype}")
        return Image.fromarray(image)
    if not isinstance(image, Tensor):
        kind = type(image).__name__
        raise ValueError(f"an image must be a file, a PIL image, an array or a tensor, or a list of these, got {kind}")
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"a tensor must be (3, H, W), got {tuple(image.shape)}; give several images as a list")
    image = image.detach().cpu()
    if image.is_floating_point():
        if not ((image >= 0) & (image <= 1)).all():
            raise ValueError("a tensor of floats must hold values from 0 to 1")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"a tensor must be of uint8, or of floats from 0 to 1, got {image.dtype}")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along a side of an image: the first at its beginning, the last ending at its end."""
    if length <= tile:
        return [0]
    last = length - tile
    count = math.ceil(last / max(1, math.floor(tile * (1 - overlap))))
    return [round(i * last / count) for i in range(count + 1)]


def _merge(found: Sequence[Detections], placements: Sequence[Placement], iou_threshold: float) -> Detections:
    """What the views of one image show together, by the rules of `Detector.__call__`."""
    if len(found) == 1:
        return found[0]
    width, height = (max(place.corner[i] + place.size[1 - i] for place in placements) for i in (0, 1))
    cut = torch.cat([_is_cut(one.boxes, place, width, height) for one, place in zip(found, placements, strict=True)])
    together = _join(found)
    whole, parts = _suppressed(together[~cut], iou_threshold), together[cut]
    first = torch.maximum(parts.boxes[:, None, :2], whole.boxes[:, :2])
    last = torch.minimum(parts.boxes[:, None, 2:], whole.boxes[:, 2:])
    covered = (last - first).clamp(min=0).prod(-1) >= COVERED * box_area(parts.boxes)[:, None]
    belongs = (covered & (parts.labels[:, None] == whole.labels)).any(1)
    return _suppressed(_join([whole, parts[~belongs]]), iou_threshold)


def _is_cut(boxes: Tensor, placement: Placement, width: int, height: int) -> Tensor:
    """Which boxes of a view end at a side of it that is none of the image's, (M,)."""
    left, top = placement.corner
    bottom, right = top + placement.size[0], left + placement.size[1]
    margin = EDGE * min(placement.size)
    low = boxes[:, :2] < boxes.new_tensor([left, top]) + margin
    high = boxes[:, 2:] > boxes.new_tensor([right, bottom]) - margin
    inner_low, inner_high = torch.tensor([left > 0, top > 0]), torch.tensor([right < width, bottom < height])
    return ((low & inner_low) | (high & inner_high)).any(1)


def _join(found: Sequence[Detections]) -> Detections:
    boxes, scores, labels = (torch.cat([getattr(one, name) for one in found]) for name in ("boxes", "scores", "labels"))
    return Detections(boxes, scores, labels, found[0].class_names)


def _suppressed(found: Detections, iou_threshold: float) -> Detections:
    return found[labelled_nms(found.boxes, found.scores, found.labels, iou_threshold)]


@dataclass(frozen=True)
class Found:
    """What is in an image file, and its height and width when upright; or why that is not known."""

    path: Path
    size: tuple[int, int] = (0, 0)
    detections: Detections | None = None
    error: str | None = None


def detect(detector: Detector, paths: Sequence[Path], out: Path | None = None) -> Iterator[Found]:
    """What is in image files, in order, each as soon as its batch is computed.

    Behind the last one there is `out`, with a copy of every image in which the objects are marked, in the folders that
    the images lie in below the one that they share, and with `detections.json`, which `as_coco` describes.

    Args:
        detector: What finds the objects.
        paths: Image files, as `spd_zoo.data.reading.find_images` gives them; the same one again counts once.
        out: A folder that does not exist or is empty; it appears whole or not at all.

    Raises:
        ImageSizeError: If the network does not take inputs of the detector's size.
        ValueError: If `out` is something else.
    """
    paths = list(dict.fromkeys(paths))
    with _new_folder(out) if out is not None else nullcontext() as folder:
        seen = []
        places = _places(paths)
        at_once = 1 if detector.tile else detector.batch_size  # large images are in memory one at a time
        for start in range(0, len(paths), at_once):
            images: dict[Path, Image.Image] = {}
            errors: dict[Path, str] = {}
            for path in paths[start : start + at_once]:
                try:
                    images[path] = read_image(path)
                except ValueError as error:
                    errors[path] = str(error)
            found = dict(zip(images, detector(list(images.values())), strict=True))
            for path in paths[start : start + at_once]:
                if path in errors:
                    one = Found(path, error=errors[path])
                else:
                    one = Found(path, (images[path].height, images[path].width), found[path])
                    if folder is not None:
                        _save(found[path].draw(images[path]), folder / places[path])
                seen.append(one)
                yield one
        if folder is not None:
            text = json.dumps(as_coco(seen, detector.class_names), indent=1)
            (folder / "detections.json").write_text(text + "\n", encoding="utf-8")


def as_coco(found: Sequence[Found], class_names: Sequence[str]) -> dict[str, Any]:
    """What was found as a data set in COCO's format; each of its `annotations` has a `score`, as COCO's results have.

    Categories and images are numbered from 1. Images that could not be read are left out.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for one in found:
        if one.detections is None:
            continue
        height, width = one.size
        images.append({"id": len(images) + 1, "file_name": str(one.path), "width": width, "height": height})
        boxes = box_convert(one.detections.boxes, "xyxy", "xywh").tolist()
        rows = zip(boxes, one.detections.scores.tolist(), one.detections.labels.tolist(), strict=True)
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
    """A folder to fill that becomes `path` behind the block, and is deleted if the block fails."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there and not empty; give a new folder with --out")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _places(paths: Sequence[Path]) -> dict[Path, Path]:
    """Where the copy of each image goes: below the folder that all share; as PNG unless it was JPEG."""
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
