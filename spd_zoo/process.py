"""The processes that train together, started by torchrun or accelerate; or one alone."""

import atexit
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from tqdm import tqdm

__all__ = ["Process", "join"]


@dataclass(frozen=True)
class Process:
    """This process: its device and its number `rank` among `world`.

    What the methods pass on goes from CPU to CPU, so that no GPU waits for it; tensors of the network do not.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    group: Any = None  # torch's group of all processes

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints `text`, once for all processes."""
        if self.first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def together(self, value: Any) -> list[Any]:
        """What each process gives for `value`, by rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process gives for `value`."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, group=self.group)
        return values[0]

    def largest(self, *numbers: float) -> list[float]:
        """Of each number the largest that any process gives."""
        if self.world == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()


def join(device: str | None) -> Process:
    """Joins the processes that torchrun has started, if it has; `device` is a GPU if there is one, unless given.

    Raises:
        ValueError: If there is no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        place = init_distributed_device_so(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {name!r}: {str(error).strip().partition(chr(10))[0]}") from error
    group = None
    if place["distributed"]:
        atexit.register(dist.destroy_process_group)
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # one may read images while others wait
    return Process(torch.device(place["device"]), place["global_rank"], place["world_size"], group)
