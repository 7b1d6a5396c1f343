"""This process: its device and memory, the other processes of torchrun, and the signals that ask it to stop."""

import atexit
import ctypes
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from tqdm import tqdm

from spd_zoo.console import is_quiet
from spd_zoo.errors import first_line

__all__ = [
    "Process",
    "StopSignals",
    "Stopped",
    "freed_memory_kept",
    "join",
    "out_of_memory",
    "pick_device",
    "ran_out_of_memory",
    "worker_options",
]

# Messages of out-of-memory errors without their own type: CPU (Linux, Windows), MPS, CUDA's libraries, ONNX Runtime.
_NO_MEMORY = re.compile(
    "DefaultCPUAllocator|(not enough|out of|cannot allocate|failed to allocate) memory|bad[ _]alloc|ALLOC_FAILED"
    "|Invalid buffer size",
    re.IGNORECASE,
)
# Options of glibc's mallopt and their values: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
_KEEPING = {-4: 0, -1: 2**31 - 1, -2: 2**26}
_USUAL = {-4: 2**16, -1: 2**17, -2: 2**17}


class Stopped(KeyboardInterrupt):
    """The signal `number` stopped the work; the finished part of it is saved."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class StopSignals(AbstractContextManager["StopSignals"]):
    """Inside this context the first SIGINT or SIGTERM does not kill the process; a second one acts as usual.

    Outside the main thread, where Python allows no signal handlers, it does nothing.

    Args:
        interrupt: Whether the first signal raises `Stopped` at once; otherwise it is only noted in `number`.

    Attributes:
        number: The signal that came; 0 if none did.
    """

    def __init__(self, interrupt: bool = False) -> None:
        self.interrupt = interrupt
        self.number = 0
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.getsignal(number) or signal.SIG_DFL
                signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            # Loader workers get the signal, too, and die; torch's handler of SIGCHLD would raise an error.
            signal.signal(signal.SIGCHLD, lambda *_: None)
        if self.interrupt:
            raise Stopped(number)

    def __exit__(self, *_: object) -> None:
        for number, action in self._usual.items():
            signal.signal(number, action)
        self._usual.clear()


def worker_options(workers: int) -> dict[str, Any]:
    """Arguments of a `DataLoader` that reads with `workers` processes."""
    return {"num_workers": workers, "worker_init_fn": _leave_ctrl_c_to_parent}


def _leave_ctrl_c_to_parent(_: int) -> None:
    """Ignores Ctrl-C in a worker: the parent process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Process:
    """One of the `world` processes that torchrun started, or the only process.

    The collectives exchange Python objects between CPUs (gloo), so they never wait for a GPU. They are not used for
    gradients.

    Attributes:
        device: The torch device of this process.
        rank: Its number, from 0.
        world: The number of processes.
        group: torch's group of all processes, if there are several.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def print(self, text: str, result: bool = False) -> None:
        """Prints `text` in the first process only; in a quiet command only if it is a `result`."""
        if self.first and (result or not is_quiet()):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def all_gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The `value` of the first process."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, group=self.group)
        return values[0]

    def all_reduce_max(self, *numbers: float) -> list[float]:
        """Elementwise maximum of `numbers` over all processes."""
        if self.world == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, was raised because memory ran out, on the CPU or on a GPU."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError):
            if error.errno == errno.ENOMEM:
                return True
        elif not isinstance(error, ValueError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def out_of_memory(error: BaseException) -> str:
    """A message for an error that `ran_out_of_memory`, with the missing size if the error states it."""
    size = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return f"out of memory, {size[1]} could not be allocated" if size else "out of memory"


def pick_device(name: str | None = None) -> str:
    """Returns a torch device after checking that it can be used.

    Args:
        name: For example cpu, cuda, cuda:1 or mps; None: "cuda" if torch can use a GPU, otherwise "cpu".

    Returns:
        The device's name.

    Raises:
        ValueError: If the device cannot be used.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # the meta device holds no values
    except NotImplementedError as error:
        raise ValueError(f"cannot use device {name!r}: this build of torch does not compute on it") from error
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:
        raise ValueError(f"cannot use device {name!r}: {first_line(error)}") from error
    return name


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Keeps freed memory for later allocations in this context, if the device is a CPU.

    Training frees and allocates the same large tensors in every step. By default the C library returns them to the
    system, which clears every page anew. Only for glibc; numbers stay the same.
    """
    try:
        libc: Any = ctypes.CDLL(None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        set_option = None
    if set_option is None or device.type != "cpu":
        yield
        return
    for option, value in _KEEPING.items():
        set_option(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            set_option(option, value)
        trim(0)


def join(device: str | None) -> Process:
    """Joins the other processes that torchrun started, if any.

    If there are more processes than GPUs, they share the GPUs, and exchange gradients by gloo, since NCCL would refuse.

    Args:
        device: As in `pick_device`.

    Returns:
        This process.

    Raises:
        ValueError: If the device cannot be used.
    """
    name = pick_device(device)
    shares = name.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()
    try:
        placement = init_distributed_device_so("cpu" if shares else name)
        if shares:
            name = f"cuda:{placement['local_rank'] % torch.cuda.device_count()}"
            torch.cuda.set_device(name)
            placement["device"] = name
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {name!r}: {first_line(error)}") from error
    group = None
    if placement["distributed"]:
        atexit.register(dist.destroy_process_group)
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # others wait while one reads all images
    return Process(torch.device(placement["device"]), placement["global_rank"], placement["world_size"], group)
