"""The fastest form of every pyramid level of a network: grouped, dense or packed convolution.

    python tools/benchmark_pyramids.py [--network pyconvresnet50] [--device cuda] [--batch 64] [--bf16] [--json]
    for network in pyconvresnet50 pyconvresnet50_spd pyconvhgresnet50; do  # the table that `spd_zoo/blocks.py` follows
        python tools/benchmark_pyramids.py --network $network --batch 8 --threads 1 --json
        ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python tools/benchmark_pyramids.py (the same options)
    done > tools/pyramids.jsonl

"grouped" is the library's grouped convolution; "dense" the same weights with zeros between the groups, in one group;
"packed" computes four output pixels at a time (`spd_zoo.spd.phase_weight`). Levels of equal shape are measured once, in
channels_last, in inference and in training (forward and backward). The outputs of all forms must agree. The two
environment variables make a CPU with AVX-512 compute as one without.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from benchmark_steps import hardware, time_steps
from torch import Tensor, nn

from spd_zoo.blocks import PyConv2d, _four_at_a_time
from spd_zoo.process import pick_device
from spd_zoo.spd import SPDConv2d

STEPS = ("inference", "train")


def levels_of(network: str, image_size: int) -> Iterator[tuple[Any, int]]:
    """Each level of a network on torch's meta device that differs from the others, with the side of its input."""
    net: Any = timm.create_model(network, device="meta").eval()
    found: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        for level in module.children():
            side = inputs[0].shape[-1]
            found.setdefault((type(level), level.weight.shape, level.stride, level.groups, side), (level, side))

    for module in net.modules():
        if isinstance(module, PyConv2d):
            module.register_forward_pre_hook(note)
    net(torch.zeros(1, net.in_chans, image_size, image_size, device="meta"))
    yield from found.values()


def channels_of(level: Any) -> int:
    """Input channels of a level."""
    return level.weight.shape[1] * level.groups // (4 if isinstance(level, SPDConv2d) else 1)


def dense(level: Any) -> Callable[[Tensor], Tensor]:
    """The level as one convolution without groups; the zeros are a part of its weight, as training would have them."""
    weight, stride, before = level.weight, level.stride[0], level.padding[0]
    if isinstance(level, SPDConv2d):
        weight, stride, before = F.pixel_shuffle(weight, 2), 2, level.pad_before[0]
    blocks = weight.detach().chunk(level.groups)
    width = blocks[0].shape[1]
    spread = [F.pad(block, (0, 0, 0, 0, i * width, (level.groups - 1 - i) * width)) for i, block in enumerate(blocks)]
    merged = torch.cat(spread).to(memory_format=torch.channels_last).requires_grad_()
    kernel = merged.shape[-1]

    def convolve(x: Tensor) -> Tensor:
        after = stride * (-(-x.shape[-1] // stride) - 1) + kernel - before - x.shape[-1]
        if after == before:
            return F.conv2d(x, merged, None, stride, before)
        return F.conv2d(F.pad(x, (before, after, before, after)), merged, None, stride)

    return convolve


def measure(level: Any, side: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per step: milliseconds of each form, and the name of the fastest."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    torch.manual_seed(0)
    level = level.to_empty(device=args.device).to(dtype)
    nn.init.normal_(level.weight, std=0.1)
    level.weight.data = level.weight.data.to(memory_format=torch.channels_last)
    channels = channels_of(level)
    x = torch.randn(args.batch, channels, side, side, dtype=dtype, device=args.device)
    x = x.to(memory_format=torch.channels_last)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "grouped": level,
        "dense": dense(level),
        "packed": partial(_four_at_a_time, level),
    }
    with torch.inference_mode():
        outputs = {name: form(x[:2]).float() for name, form in forms.items()}
    for name, output in outputs.items():
        difference = (output - outputs["grouped"]).norm() / outputs["grouped"].norm()
        if not difference < (2e-2 if args.bf16 else 1e-3):
            raise AssertionError(f"{name} differs from grouped by {difference:.2g} of the output")
    for step in STEPS:
        steps = {name: _repeated(form, x, step) for name, form in forms.items()}
        seconds = time_steps(steps, args.rounds + 3, args.device)
        row: dict[str, Any] = {"in": channels, "out": level.out_channels, "kernel": level.weight.shape[-1]}
        row |= {"groups": level.groups, "stride": 2 if isinstance(level, SPDConv2d) else level.stride[0]}
        row |= {"spd": isinstance(level, SPDConv2d), "side": side, "step": step}
        row |= {name: 1000 * statistics.median(times[3:]) for name, times in seconds.items()}  # three warm up
        yield row | {"fastest": min(forms, key=lambda name: row[name])}


def _repeated(form: Callable[[Tensor], Tensor], x: Tensor, step: str) -> Callable[[], None]:
    """A step of a form: forward, in training also backward."""
    if step == "inference":

        def run() -> None:
            with torch.inference_mode():
                form(x)
    else:
        images = x.clone().requires_grad_()

        def run() -> None:
            images.grad = None
            output = form(images)
            output.backward(torch.ones_like(output))

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per level and step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="pyconvresnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    torch.backends.cudnn.benchmark = on_gpu
    machine = hardware(args.device)
    for level, side in levels_of(args.network, args.image_size):
        for row in measure(level, side, args):
            if args.json:
                settings = {"network": args.network, "batch": args.batch, "bf16": args.bf16, "device": machine}
                print(json.dumps(settings | row), flush=True)
            else:
                shape = "{in} -> {out}, {kernel}x{kernel}, groups {groups}, stride {stride}, {side} px".format(**row)
                times = " | ".join(f"{name} {row[name]:.3f} ms" for name in ("grouped", "dense", "packed"))
                kind = "space-to-depth, " if row["spd"] else ""
                print(f"{kind}{shape}, {row['step']}: {times} | fastest: {row['fastest']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
