"""Augmentation of images with boxes as the authors of YOLO and SSD do it, and the loaders that apply it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from spd_zoo.data.boxes import BoxImages
from spd_zoo.data.boxes.tiles import objects_inside, views
from spd_zoo.data.labelled import DataError
from spd_zoo.data.regions import Box
from spd_zoo.inference.detector import GREY, Placement, prepare_part
from spd_zoo.losses import Target
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import worker_options
from spd_zoo.training.config import FinetuneConfig, parse_numbers
from spd_zoo.training.steps import Batches, Steps, seed_everything

__all__ = [
    "Augmentation",
    "box_eval_loader",
    "box_train_loader",
    "mosaic",
    "scaled_to",
    "ssd_augment",
    "window",
    "yolo_augment",
]

SMALLEST, VISIBLE = 2, 0.5  # minimum side in pixels, as the authors; minimum share of a shorter side
CACHE = 2**28  # bytes of scaled images that each loader worker keeps
# image: tv_tensors.Image; boxes: tv_tensors.BoundingBoxes, x1 y1 x2 y2; labels: (M,); ignored: (M,), as in `Objects`;
# a mosaic also has sides: width and height (M, 2) of the boxes before clipping
Sample = dict[str, Any]


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the augmentation; options of YOLO are 0 for other networks.

    Attributes:
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        mosaic: YOLO: probability of a mosaic.
        mosaic_epochs: YOLO: the first epoch without any mosaic.
        zoom: YOLO: largest change of size, as `window` takes it.
        shift: YOLO: largest shift as a share of the image.
        hsv: YOLO: largest change of hue, saturation and brightness.
        keep_tiny: Whether to keep objects that become tiny, which the authors drop.
    """

    hflip: float
    vflip: float
    mosaic: float
    mosaic_epochs: int
    zoom: float
    shift: float
    hsv: tuple[float, ...]
    keep_tiny: bool

    @classmethod
    def of(cls, config: FinetuneConfig) -> "Augmentation":
        """The augmentation of a configuration."""
        return cls(
            config.hflip,
            config.vflip,
            config.mosaic or 0.0,
            config.epochs - (config.mosaic_off or 0),
            config.zoom or 0.0,
            config.shift or 0.0,
            parse_numbers(config.hsv or "0,0,0"),
            bool(config.keep_tiny),
        )


def read_sample(data: BoxImages, index: int, mode: str) -> Sample:
    """The image at `index`, uint8, with its boxes."""
    image = tv_tensors.Image(data.image(index, mode))
    objects = data.objects_in(index)
    return _sample(image, objects.boxes, objects.labels, objects.ignored)


def _sample(image: Tensor, boxes: Tensor, labels: Tensor, ignored: Tensor) -> Sample:
    size = (image.shape[-2], image.shape[-1])
    pixels = tv_tensors.Image(image)
    return {
        "image": pixels,
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": labels,
        "ignored": ignored,
    }


def _target(boxes: Tensor, labels: Tensor, ignored: Tensor) -> Target:
    """What the loss takes: objects, and apart from them what is ignored."""
    return {
        "boxes": boxes[~ignored],
        "labels": labels[~ignored],
        "ignored": boxes[ignored],
        "ignored_labels": labels[ignored],
    }


def scaled_to(sample: Sample, size: int | tuple[int, int]) -> Sample:
    """`sample` scaled so that it just fits into the height and width `size`, or a square of that side."""
    height, width = sample["image"].shape[-2:]
    rows, columns = to_2tuple(size)
    scale = min(rows / height, columns / width)
    sides = [max(1, round(height * scale)), max(1, round(width * scale))]
    return sample if sides == [height, width] else v2.Resize(sides)(sample)


def mosaic(samples: Sequence[Sample], size: int | tuple[int, int]) -> Sample:
    """Four images that meet at a random point of a grey canvas of twice the height and width `size`.

    Bochkovskiy et al., YOLOv4, https://arxiv.org/abs/2004.10934, section 3.3. The canvas clips them.
    """
    samples = [samples[i] for i in torch.randperm(4).tolist()]
    rows, columns = to_2tuple(size)
    x, y = (int(torch.randint(side // 2, side + side // 2 + 1, ())) for side in (columns, rows))
    canvas = torch.full((samples[0]["image"].shape[0], 2 * rows, 2 * columns), GREY, dtype=torch.uint8)
    boxes = []
    for i, sample in enumerate(samples):
        height, width = sample["image"].shape[-2:]
        left, top = x - width * (i % 2 == 0), y - height * (i < 2)
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, 2 * columns), min(top + height, 2 * rows)
        canvas[:, y1:y2, x1:x2] = sample["image"][:, y1 - top : y2 - top, x1 - left : x2 - left]
        boxes.append(sample["boxes"].as_subclass(Tensor) + torch.tensor([left, top, left, top]))
    labels, ignored = (torch.cat([sample[name] for sample in samples]) for name in ("labels", "ignored"))
    flat = torch.cat(boxes)
    made = _sample(canvas, flat, labels, ignored)
    clipped = F.clamp_bounding_boxes(made["boxes"]).as_subclass(Tensor)
    seen = _have_area(clipped)
    return _kept(clipped, made, seen) | {"sides": (flat[:, 2:] - flat[:, :2])[seen]}


def _have_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def _kept(boxes: Tensor, sample: Sample, keep: Tensor) -> Sample:
    """`sample` with those of its new `boxes` for which `keep` (M,) holds and which have an area."""
    flat = boxes.as_subclass(Tensor)
    keep = keep & _have_area(flat)
    return _sample(sample["image"], flat[keep], sample["labels"][keep], sample["ignored"][keep])


def window(sample: Sample, size: int | tuple[int, int], zoom: float, shift: float, keep_tiny: bool = False) -> Sample:
    """`sample` scaled about its centre by 1 +- `zoom`, shifted by up to `shift` of `size`, cropped to `size`.

    A box stays if both sides are above 2 pixels, their ratio is below 100, and more than a tenth of its area is left.
    With `keep_tiny`, a shorter side is also enough if more than half of it is left: objects that were cut off are
    dropped, small ones are not. Ignored regions always stay.
    """
    scale = 1 + zoom * (2 * torch.rand(()).item() - 1)
    rows, columns = to_2tuple(size)
    draws = 2 * torch.rand(2) - 1
    across, down = (columns * shift * draws[0]).item(), (rows * shift * draws[1]).item()
    height, width = sample["image"].shape[-2:]
    high, wide = max(1, round(rows / scale)), max(1, round(columns / scale))
    left, top = round((width - columns / scale) / 2 - across / scale), round((height - rows / scale) / 2 - down / scale)
    margins = [max(0, -left), max(0, -top), max(0, left + wide - width), max(0, top + high - height)]
    whole = sample["boxes"].as_subclass(Tensor)
    image = F.pad(sample["image"], margins, fill=[GREY])
    image = F.resized_crop(image, top + margins[1], left + margins[0], high, wide, [rows, columns])
    factors = torch.tensor([columns / wide, rows / high])
    moved = (whole - torch.tensor([left, top, left, top])) * factors.repeat(2)
    cut = moved.clamp(torch.zeros(4), torch.tensor([columns, rows] * 2))
    sides = cut[:, 2:] - cut[:, :2]
    area = (moved[:, 2:] - moved[:, :2]).prod(1)
    visible = sides > SMALLEST
    if keep_tiny:
        visible |= sides > VISIBLE * factors * sample.get("sides", whole[:, 2:] - whole[:, :2])
    keep = visible.all(1) & (sides.amax(1) < 100 * sides.amin(1)) & (sides.prod(1) > 0.1 * area)
    return _kept(cut, sample | {"image": image}, keep | sample["ignored"])


def yolo_augment(
    scaled: Callable[[int], Sample],
    index: int,
    others: Sequence[int],
    size: tuple[int, int],
    augmentation: Augmentation,
) -> Sample:
    """YOLO's augmentation: mosaic or grey padding, zoom and shift, colours, flips.

    Colours are changed by torchvision's ColorJitter, whose brightness and saturation are not quite those of HSV.

    Args:
        scaled: Returns the image of an index, which just fits into `size`.
        index: The image.
        others: Three more images for a mosaic, or none.
        size: Height and width of the result in pixels.
        augmentation: How strongly the image is changed.
    """
    sample = mosaic([scaled(i) for i in (index, *others)], size) if others else scaled(index)
    sample = window(sample, size, augmentation.zoom, augmentation.shift, augmentation.keep_tiny)
    hue, saturation, brightness = augmentation.hsv
    jitter = v2.ColorJitter(brightness, saturation=saturation, hue=hue)
    flips = v2.Compose([v2.RandomHorizontalFlip(augmentation.hflip), v2.RandomVerticalFlip(augmentation.vflip)])
    return flips(sample | {"image": jitter(sample["image"])})


def ssd_augment(original: Sample, size: tuple[int, int], fill: list[float], augmentation: Augmentation) -> Sample:
    """SSD's augmentation: crop, colours, expansion, flips; then stretched to `size`.

    Liu et al., https://arxiv.org/abs/1512.02325, section 2.2, with the numbers of the small-object SSD. The crop keeps
    boxes whose centres lie in it. Unless `augmentation.keep_tiny`, boxes with a side of at most a hundredth of the
    image are dropped then. If none is left, the original image is used.
    """
    stretch = v2.Resize(list(size))
    if bool(original["ignored"].all()):  # no object
        return stretch(original)
    jitters = (
        v2.ColorJitter(0.125),
        v2.ColorJitter(contrast=0.5),
        v2.ColorJitter(hue=0.1),
        v2.ColorJitter(saturation=0.5),
    )
    colours = v2.Compose([v2.RandomApply([jitter], 0.5) for jitter in jitters])
    sample = v2.RandomIoUCrop()(original)
    sample = colours(sample["image"]), sample["boxes"], sample["labels"], sample["ignored"]
    expand = v2.RandomZoomOut(fill, (1.0, 4.0), p=0.6)
    flips = [v2.RandomHorizontalFlip(augmentation.hflip), v2.RandomVerticalFlip(augmentation.vflip)]
    image, boxes, labels, ignored = v2.Compose([expand, *flips])(*sample)
    height, width = image.shape[-2:]
    flat = boxes.as_subclass(Tensor)
    fractions = (flat[:, 2:] - flat[:, :2]) / torch.tensor([width, height])
    keep = (fractions > 0.01).all(1) | ignored | augmentation.keep_tiny
    sample = _kept(boxes, _sample(image, flat, labels, ignored), keep)
    return stretch(original if bool(sample["ignored"].all()) else sample)


class _TrainImages(Dataset[tuple[Tensor, Target]]):
    """Augmented images (C, height, width) uint8 in the network's channel order, and their objects in input pixels."""

    def __init__(
        self, data: BoxImages, net: DetectionNet, size: tuple[int, int], mode: str, seed: int, config: FinetuneConfig
    ) -> None:
        self.data, self.size, self.mode, self.seed = data, size, mode, seed
        self.augmentation = Augmentation.of(config)
        self.keeps_aspect, self.flipped = net.keeps_aspect, net.channel_order == "BGR" and mode == "RGB"
        mean = [float(int(255 * value)) for value in net.pretrained_cfg["mean"]]
        self.cache: dict[int, Sample] = {}  # scaled images
        self.fill = (mean[::-1] if self.flipped else mean) if mode == "RGB" else [float(int(sum(mean) / len(mean)))]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key
        seed_everything(self.seed, epoch, index)
        if self.keeps_aspect:
            others = [self.data.in_epoch(i, epoch) for i in self.others(epoch)]
            sample = yolo_augment(self.scaled, self.data.in_epoch(index, epoch), others, self.size, self.augmentation)
        else:
            original = read_sample(self.data, self.data.in_epoch(index, epoch), self.mode)
            sample = ssd_augment(original, self.size, self.fill, self.augmentation)
        image = sample["image"].as_subclass(Tensor)
        target = _target(sample["boxes"].as_subclass(Tensor), sample["labels"], sample["ignored"])
        return image.flip(0) if self.flipped else image, target

    def scaled(self, index: int) -> Sample:
        """An image that just fits into `size`; cached because a mosaic reads four."""
        sample = self.cache.get(index)
        if sample is None:
            sample = scaled_to(read_sample(self.data, index, self.mode), self.size)
            if len(self.cache) * sample["image"].nbytes < CACHE:
                self.cache[index] = sample
        return sample

    def others(self, epoch: int) -> list[int]:
        """Three random images for a mosaic, which is drawn with its probability; otherwise none."""
        has_mosaic = epoch < self.augmentation.mosaic_epochs and torch.rand(()) < self.augmentation.mosaic
        return torch.randint(len(self.data), (3,)).tolist() if has_mosaic else []


class _EvalViews(Dataset[tuple[Tensor, Placement, Target, int, float]]):
    """The views of all images (one per image without tiles), preprocessed for the network.

    They are the input, its placement, the objects in input pixels, the image's index, and the seconds for reading.
    """

    def __init__(self, data: BoxImages, net: DetectionNet, size: tuple[int, int]) -> None:
        self.data, self.net, self.size = data, net, size

    def __getitem__(self, key: tuple[int, Box | None]) -> tuple[Tensor, Placement, Target, int, float]:
        index, box = key
        began = time.perf_counter()
        try:
            inputs, placement = prepare_part(self.data.regions(index), box, self.net, self.size)
        except ValueError as error:
            raise error if isinstance(error, DataError) else DataError(f"{self.data.name(index)}: {error}") from error
        seconds = time.perf_counter() - began
        objects = self.data.objects_in(index)
        if box is not None:
            objects = objects_inside(objects, box)
            objects = objects._replace(boxes=objects.boxes + torch.tensor([*box[:2], *box[:2]]))
        target = _target(placement.to_input(objects.boxes), objects.labels, objects.ignored)
        return inputs, placement, target, index, seconds


def _collate(samples: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Images as one tensor, everything else as lists."""
    images, *rest = zip(*samples, strict=True)
    return torch.stack(images), *map(list, rest)


def box_train_loader(
    data: BoxImages, net: DetectionNet, size: int | tuple[int, int], steps: Steps, mode: str, config: FinetuneConfig
) -> Batches:
    """Batches of (N, C, height, width) uint8 and a list of N targets, in the order of `steps`."""
    images = _TrainImages(data, net, to_2tuple(size), mode, steps.seed, config)
    options = worker_options(config.workers) | {"pin_memory": torch.cuda.is_available(), "collate_fn": _collate}
    return DataLoader(images, batch_sampler=steps, persistent_workers=config.workers > 0, **options)


def box_eval_loader(
    data: BoxImages,
    net: DetectionNet,
    size: int | tuple[int, int],
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Batches of (N, C, height, width) float, placements, targets, indices and seconds, in order.

    Process `rank` of `world` reads every world-th image; the views of an image with tiles follow each other.
    """
    images, options = _EvalViews(data, net, to_2tuple(size)), worker_options(workers) | {"collate_fn": _collate}
    mine = [(index, box) for index in range(rank, len(data), world) for box in views(data, index)]
    return DataLoader(images, batch_size, sampler=mine, **options)
