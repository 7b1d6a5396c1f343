"""Augmentation of labelled images by timm's and torchvision's transforms, and the loaders that apply it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, create_dataset, create_transform
from timm.data.transforms import ResizeKeepRatio
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import InterpolationMode, v2

from spd_zoo.data.labelled import DataError, LabelledImages, StreamedImages
from spd_zoo.data.reading import upright
from spd_zoo.errors import first_line
from spd_zoo.process import worker_options
from spd_zoo.training.steps import Batches, Steps, seed_everything

__all__ = ["eval_loader", "eval_transform", "train_loader", "train_transform"]

Transform = Callable[[Image.Image], Tensor]


def train_transform(
    image_size: int | tuple[int, int],
    crop_scale: float = 0.5,
    crop_padding: int = 0,
    rotation: float = 0.0,
    crop_mode: str | None = None,
    **options: Any,
) -> Transform:
    """Augmentation: an image to (C, height, width) uint8.

    Args:
        image_size: Height and width in pixels, or one number for both.
        crop_scale: Smallest share of the image's area that timm's random resized crop keeps.
        crop_padding: If not 0, a random crop after padding every side with so many black pixels replaces that crop; the
            image is resized to `image_size` before, in the aspect that evaluation keeps.
        rotation: Largest random rotation in degrees; corners are filled with black.
        crop_mode: As for `eval_transform`.
        **options: Further arguments of timm's `create_transform`.
    """
    size: tuple[int, int] = to_2tuple(image_size)
    make = create_transform(size, is_training=True, use_prefetcher=True, scale=(crop_scale, 1.0), **options)
    if crop_padding:
        way = InterpolationMode.BICUBIC if options.get("interpolation") == "bicubic" else InterpolationMode.BILINEAR
        keep_ratio = ResizeKeepRatio(size, longest=float(crop_mode == "border"), interpolation=way.value)
        resize = v2.Resize(size, way) if crop_mode == "squash" else keep_ratio
        make.transforms[0] = v2.Compose([resize, v2.RandomCrop(size, padding=crop_padding, pad_if_needed=True)])
    if rotation:
        make.transforms.insert(-1, v2.RandomRotation([-rotation, rotation]))
    return make


def eval_transform(
    image_size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str,
    crop_mode: str | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
) -> Transform:
    """timm's transform for evaluation, to (C, height, width) uint8.

    Args:
        image_size: Height and width in pixels, or one number for both.
        crop_pct: Share of the resized image that is kept, along each side.
        interpolation: How the image is resized.
        crop_mode: center, squash or border; None is center.
        mean: The colour of borders, on a scale from 0 to 1.
    """
    return create_transform(
        to_2tuple(image_size),
        use_prefetcher=True,
        crop_pct=crop_pct,
        interpolation=interpolation,
        crop_mode=crop_mode,
        mean=tuple(mean),
    )


class _Images(Dataset[tuple[Tensor, int]]):
    """Transformed images; where the key is (epoch, index) the transform draws from (seed, epoch, index)."""

    def __init__(self, data: LabelledImages, transform: Transform, mode: str, seed: int = 0) -> None:
        self.data, self.transform, self.mode, self.seed = data, transform, mode, seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(key, tuple):
            seed_everything(self.seed, *key)
            key = key[1]
        return self.transform(self.data.image(key, self.mode)), self.data.label(key)


class _Stream(IterableDataset[tuple[Tensor, int]]):
    """timm's reader for streams; the transform draws from (seed, epoch, process, position in the stream)."""

    def __init__(
        self, data: StreamedImages, transform: Transform, mode: str, batch_size: int, seed: int, training: bool
    ) -> None:
        self.transform, self.mode, self.seed, self.training = transform, mode, seed, training
        self.epoch = 0
        self.classes = range(len(data.class_names))
        self.stream = create_dataset(
            f"hfids/{data.data}",
            split=data.split,
            is_training=training,
            batch_size=batch_size,
            num_samples=data.length or 1,
            seed=seed % 2**64,  # NumPy, which shuffles, takes no negative seed
            input_img_mode="",
            input_key=data.image_column,
            target_key=data.label_column,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        reader = self.stream.reader
        reader.set_epoch(self.epoch)
        worker = get_worker_info()
        process = (reader.dist_rank, worker.id if worker is not None else 0)
        done = 0
        try:
            for image, label in reader:
                if image is None:
                    raise DataError(f"row {done + 1} of the stream holds no image")
                if label not in self.classes:
                    raise DataError(f"image {done + 1} of the stream has no label of a class: {label!r}")
                if self.training:
                    seed_everything(self.seed, self.epoch, *process, done)
                yield self.transform(upright(image, self.mode)), label
                done += 1
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            # the library decodes several images at once
            reason = f"an image of the stream after the first {done} cannot be read: {first_line(error)}"
            raise DataError(reason) from error


def train_loader(
    data: LabelledImages | StreamedImages, transform: Transform, steps: Steps, workers: int, mode: str = "RGB"
) -> Batches:
    """Batches of (N, C, H, W) uint8 and (N,) int64 in the order of `steps`, read by `workers` processes."""
    options = worker_options(workers) | {"pin_memory": torch.cuda.is_available()}
    if isinstance(data, StreamedImages):
        size = steps.batch_size // (steps.world * steps.micro_batches)
        stream = _Stream(data, transform, mode, size, steps.seed, training=True)
        stream.stream.set_loader_cfg(num_workers=workers)
        return DataLoader(stream, size, drop_last=True, **options)
    images = _Images(data, transform, mode, steps.seed)
    return DataLoader(images, batch_sampler=steps, persistent_workers=workers > 0, **options)


def eval_loader(
    data: LabelledImages | StreamedImages,
    transform: Transform,
    batch_size: int,
    workers: int,
    mode: str = "RGB",
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Batches of (N, C, H, W) uint8 and (N,) int64, in order; process `rank` of `world` reads every world-th image."""
    options = worker_options(workers)
    if isinstance(data, StreamedImages):
        stream = _Stream(data, transform, mode, batch_size, 0, training=False)
        stream.stream.set_loader_cfg(num_workers=workers)
        return DataLoader(stream, batch_size, **options)
    return DataLoader(_Images(data, transform, mode), batch_size, sampler=range(rank, len(data), world), **options)
