"""A step of a network in one of many forms (precision, memory layout, compiled, folded): its seconds and its memory."""

import argparse
import copy
import itertools
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from plain_networks import plain_twin
from torch import Tensor, nn

from spd_zoo.fold import fold_batchnorm
from spd_zoo.losses import Target
from spd_zoo.models._detector import DetectionNet

__all__ = ["FORMS", "Form", "build", "hardware", "make_step", "measure_memory", "time_steps"]


@dataclass(frozen=True)
class Form:
    """How a network is run."""

    step: str = "inference"  # or train: forward, backward and SGD
    precision: str = "fp32"  # or bf16: the weights in inference, autocast in training
    layout: str = "contiguous"  # or channels_last
    mode: str = "eager"  # or compile
    folded: str = ""  # or folded: BatchNorm folded into the convolution before it

    def __str__(self) -> str:
        return "-".join(filter(None, (self.step, self.precision, self.layout, self.mode, self.folded)))


FORMS = [
    Form(*values)
    for values in itertools.product(
        ("inference", "train"), ("fp32", "bf16"), ("contiguous", "channels_last"), ("eager", "compile"), ("", "folded")
    )
    if values[0] == "inference" or not values[-1]
]


def build(network: str, way: str, folded: bool = False) -> nn.Module:
    """A network with reproducible random weights and BatchNorm statistics: "ours", or the "plain" implementation.

    The plain one is created after folding, because `fold_batchnorm` only knows our layers.
    """
    torch.manual_seed(0)
    net = timm.create_model(network)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, tensor in module.state_dict().items():
                if name in ("weight", "running_var"):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    nn.init.normal_(tensor, std=0.1)
    net = fold_batchnorm(net) if folded else net
    return plain_twin(net) if way == "plain" else net


def make_step(
    net: nn.Module, form: Form, batch: int, image_size: int, device: str = "cpu", warmup: int = 1
) -> Callable[[], None]:
    """A function, already warmed up, that runs one batch through a copy of `net` (which must be folded before)."""
    layout = torch.channels_last if form.layout == "channels_last" else torch.contiguous_format
    net = copy.deepcopy(net).train(form.step == "train").to(device).to(memory_format=layout)
    size = (image_size, image_size)
    x = torch.randn(batch, 3, *size).to(device, memory_format=layout)
    bf16 = form.precision == "bf16"
    if bf16 and form.step == "inference":
        net, x = net.bfloat16(), x.bfloat16()
    run: Callable[[Tensor], Any] = torch.compile(net) if form.mode == "compile" else net
    if form.step == "inference":

        def step() -> None:
            with torch.inference_mode():
                run(x)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5]], device=device) * image_size
        box: Target = {"boxes": boxes, "labels": labels[:1]}

        def step() -> None:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                result = run(x)
                if isinstance(net, DetectionNet):
                    loss = torch.stack(list(net.loss(result, [box] * batch, size).values())).sum()
                else:
                    loss = F.cross_entropy(result, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(warmup):
        step()
    return step


def hardware(device: str) -> str:
    """What computes: the name of the GPU, or the instruction set of the CPU."""
    on_gpu = device.startswith("cuda")
    return torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()


def time_steps(steps: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step in each round; every second round runs the steps in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name, step in reversed(steps.items()) if i % 2 else steps.items():
            seconds[name].append(_time_on(step, device))
    return seconds


def _time_on(step: Callable[[], Any], device: str) -> float:
    """Seconds of one step: on a GPU between two events in its queue, on a CPU by the clock."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def _peak_mib(network: str, way: str, form: Form, batch: int, image_size: int, threads: int) -> float:
    torch.set_num_threads(threads)
    start = _high_water_mib()
    make_step(build(network, way, bool(form.folded)), form, batch, image_size)()
    return _high_water_mib() - start


def _high_water_mib() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) / 1024 if match else float("nan")


def measure_memory(network: str, way: str, form: Form, args: argparse.Namespace) -> float:
    """Peak memory of the network and one step in MiB: on a CPU, in a fresh process, with torch's own."""
    if args.device.startswith("cuda"):
        net = build(network, way, bool(form.folded))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make_step(net, form, args.batch, args.image_size, args.device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_mib, network, way, form, args.batch, args.image_size, torch.get_num_threads()).result()
