"""The loop over images that predict, detect and files of results share: read a batch, compute it, name what failed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from torch.utils.data import DataLoader, Dataset

from spd_zoo.data.reading import collect_notes, is_url
from spd_zoo.data.regions import PartError
from spd_zoo.process import worker_options
from spd_zoo.rewrite import tensors_in
from spd_zoo.weights.catalogue import ModelError
from spd_zoo.weights.download import public

__all__ = ["Files", "ImageFile", "Images", "Outcome", "Task", "batches", "check_finite", "run"]

ImageFile: TypeAlias = "str | BytesIO"  # a path or the bytes
T = TypeVar("T")


class Images(Protocol):
    """Images that are read by index, such as `LabelledImages`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in the results."""

    def file(self, index: int) -> ImageFile:
        """Its path or its bytes."""


@dataclass(frozen=True)
class Files:
    """Image files by their paths."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path, or the address without user and password."""
        path = self.paths[index]
        return public(path) if is_url(path) else path

    def file(self, index: int) -> str:
        """The path or address."""
        return self.paths[index]


@dataclass(frozen=True)
class Task(Generic[T]):
    """The computation for every image.

    Attributes:
        read: Creates the input from an image file, in a worker process; raises ValueError if it cannot be read.
        collate: Combines several inputs into one object that is quick to send between processes.
        compute: Computes a result for each of the collated inputs.
        batch_size: Images that are computed together.
    """

    read: Callable[[ImageFile], Any]
    collate: Callable[[list[Any]], Any]
    compute: Callable[[Any], list[T]]
    batch_size: int


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result for an image, or the reason why it could not be read; and what was guessed when it was read."""

    result: T | None
    error: str | None = None
    notes: tuple[str, ...] = ()


def batches(images: range, size: int) -> list[range]:
    """`images` cut into ranges of at most `size`."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def check_finite(outputs: Any, name: str) -> None:
    """Checks what the network `name` computed for a batch.

    Raises:
        ModelError: If a number is NaN or infinite.
    """
    for tensor in tensors_in(outputs):
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name} computes numbers that are not finite in {tensor.dtype}: its weights are damaged, or need a "
                "wider type; get or train it again, or call .float()"
            )


def run(
    images: Images, task: Task[T], todo: Sequence[range], workers: int = 0
) -> Iterator[tuple[range, list[Outcome[T]]]]:
    """Computes batches of images, in order.

    Args:
        images: The images.
        task: What is computed.
        todo: The numbers of the images of each batch, at most `task.batch_size`.
        workers: Processes that read images; 0: this process reads them.

    Yields:
        A batch and the outcome for each of its images.
    """
    loader: DataLoader[Any] = DataLoader(_Batches(images, task), None, sampler=todo, **worker_options(workers))
    for batch, (inputs, errors, notes) in zip(todo, loader, strict=True):
        try:
            results = iter(task.compute(inputs) if inputs is not None else [])
        except PartError as error:  # images of which parts are read while they are computed come one by one
            results, errors = iter(()), [str(error)]
        yield (
            batch,
            [
                Outcome(next(results) if error is None else None, error, of_image)
                for error, of_image in zip(errors, notes, strict=True)
            ],
        )


class _Batches(Dataset[Any]):
    """The collated inputs of a batch's readable images, and for every image an error or None, and notes."""

    def __init__(self, images: Images, task: Task[Any]) -> None:
        self.images, self.read, self.collate = images, task.read, task.collate  # `compute` stays in the main process

    def __getitem__(self, batch: range) -> tuple[Any, list[str | None], list[tuple[str, ...]]]:
        inputs: list[Any] = []
        errors: list[str | None] = []
        notes: list[tuple[str, ...]] = []
        for index in batch:
            with collect_notes() as of_image:
                try:
                    inputs.append(self.read(self.images.file(index)))
                    errors.append(None)
                except ValueError as error:
                    errors.append(str(error))
            notes.append(tuple(of_image))
        return (self.collate(inputs) if inputs else None), errors, notes
