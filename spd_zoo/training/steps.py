"""Which images a step trains on, and the random draws that go with them.

Every draw depends on (seed, epoch, image) only, so an epoch is the same for any number of loader workers, and a resumed
run continues as if it had never stopped.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from spd_zoo.data.labelled import DataError

__all__ = ["Batches", "Steps", "read", "seed_everything"]

Batches = DataLoader[Any]


def seed_everything(*key: int) -> None:
    """Seeds the generators of Python, NumPy and torch by the numbers in `key`."""
    seed = _hash(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.mps.is_available():
        torch.mps.manual_seed(seed)


def _hash(*key: int) -> int:
    """A 32-bit hash of `key`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


class Steps(Sampler[list[tuple[int, int]]]):
    """A batch sampler: which images this process reads, as lists of (epoch, index).

    An epoch is a permutation drawn from (seed, epoch), cut into steps of `batch_size` images. A step's images are dealt
    in turn to `world` processes times `micro_batches`. Set `epoch` and `first`, its first step, before each iteration.

    Args:
        length: Number of images.
        batch_size: Images per step, summed over all processes; `length` if that is less.
        micro_batches: Batches of each process per step.
        rank: Number of this process.
        world: Number of processes.
        drop_last: Whether images that do not fill a step are left out of the epoch.
        seed: Seed of all permutations.

    Attributes:
        per_epoch: Steps of an epoch.
        images: Images of an epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        micro_batches: int = 1,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        self.length, self.batch_size = length, min(batch_size, length)
        self.micro_batches, self.rank, self.world, self.seed = micro_batches, rank, world, seed
        self.epoch = self.first = 0
        rest = length % self.batch_size
        partial = not drop_last and rest >= 2 * micro_batches * world  # BatchNorm needs two images everywhere
        self.per_epoch = length // self.batch_size + partial
        self.images = length if partial else self.per_epoch * self.batch_size

    def size(self, step: int) -> int:
        """How many images a step has."""
        return min(self.batch_size, self.length - step * self.batch_size)

    def __len__(self) -> int:
        return (self.per_epoch - self.first) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_hash(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for step in range(self.first, self.per_epoch):
            images = order[step * self.batch_size :][: self.size(step)]
            for i in range(self.micro_batches):
                mine = images[self.rank + self.world * i :: self.world * self.micro_batches]
                yield [(self.epoch, index) for index in mine]


def read(batches: Batches) -> Iterator[Any]:
    """The batches; if an image cannot be read, the error is one sentence without the worker's traceback.

    Raises:
        DataError: If an image cannot be read.
    """
    try:
        yield from batches
    except DataError as error:
        sentence = str(error).strip().rpartition("DataError: ")[2]  # after the traceback of the worker
        raise DataError(f"{sentence}; was the data set changed while it was in use?") from error
