"""Chooses the number of micro-batches per step so that a step fits into memory."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from spd_zoo.process import Process
from spd_zoo.trace import OperatorMode, meta_copy
from spd_zoo.training.preprocessing import Preprocessing

__all__ = ["bytes_per_image", "choose_micro_batches", "forward_bytes_per_image", "free_memory"]


def choose_micro_batches(weights: int, per_image: float, batch_size: int, pairs: bool, process: Process) -> int:
    """The number of micro-batches per step with which the images of a step fit into the free memory.

    Args:
        weights: Bytes of the network's parameters.
        per_image: Bytes that an image needs in the forward pass, from `bytes_per_image`.
        batch_size: Images per step, summed over all processes.
        pairs: Whether Mixup needs an even number of images in each micro-batch.
        process: This process; all agree on one number.
    """
    free = free_memory(process.device)
    if free is None:
        process.print(
            f"the free memory of {process.device} is not known, so each step is computed at once; if memory runs out, "
            "give --accumulate"
        )
        return 1
    fixed = 4 * weights  # weights, gradients, optimiser, moving average
    per_image = 1.5 * per_image  # the backward pass needs some, too
    share = math.ceil(batch_size / process.world)
    count, unit = 1, 2 if pairs else 1
    while fixed + per_image * share / count > 0.8 * free and share % (2 * count * unit) == 0 and share >= 4 * count:
        count *= 2
    count = int(process.all_reduce_max(count)[0])
    if count > 1:
        process.print(
            f"each step is computed in {count} micro-batches: {share} images need {per_image * share / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )
    if (needed := fixed + per_image * share / count) > free:
        process.print(
            f"memory may run out: even {math.ceil(share / count)} images at once need {needed / 2**30:.1f} GiB; give a "
            "smaller --image-size or --batch-size"
        )
    return count


def bytes_per_image(net: nn.Module, image_size: int | tuple[int, int], preprocessing: Preprocessing) -> float:
    """Bytes that the forward pass over one image saves for the backward pass, without the weights.

    Raises:
        RuntimeError: If the network cannot compute such images.
    """
    saved: dict[int, int] = {}  # bytes of each storage
    dtype = torch.bfloat16 if preprocessing.bf16 else torch.float32
    trial = copy.deepcopy(net).train().to("meta", dtype)

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.zeros(2, len(preprocessing.mean), *to_2tuple(image_size), device="meta", dtype=dtype)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = trial(images.to(memory_format=torch.channels_last))
    weights = {parameter.untyped_storage()._cdata for parameter in trial.parameters()}
    del outputs  # kept until here, so that no address of a freed storage is reused
    return sum(size for address, size in saved.items() if address not in weights) / 2


def forward_bytes_per_image(net: Any, image_size: tuple[int, int]) -> int:
    """Bytes that an image takes in a forward pass without gradients: inputs and outputs of the largest operator.

    Raises:
        RuntimeError: If the network cannot compute such images.
    """
    meta, largest = meta_copy(net), 0
    weights = {tensor.untyped_storage()._cdata for tensor in meta.state_dict().values()}

    def note(_: str, *used: Any) -> None:
        nonlocal largest
        storages = [tensor.untyped_storage() for tensor in tree_leaves(used) if isinstance(tensor, Tensor)]
        sizes = {storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in weights}
        largest = max(largest, sum(sizes.values()))

    with torch.no_grad(), OperatorMode(note):
        meta(torch.zeros(1, net.in_chans, *image_size, device="meta"))
    return largest


def free_memory(device: torch.device) -> float | None:
    """Bytes that this process may use on the device; None if that cannot be known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
    return 1024 * float(lines["MemAvailable"].split()[0]) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
