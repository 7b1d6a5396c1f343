"""Whether reading and augmentation on the device keep up with training: its speed with them, and on random tensors.

    python tools/benchmark_input.py [--network pyconvresnet50_spd] [--device cuda] [--images 100000] [--batch 256]

The images lie in memory as uint8, as decoded from files once. Each step picks a batch at random, copies it to the
device, and crops, resizes, flips and normalises it there by torchvision's v2 transforms. These draw once per call, so a
batch is augmented in --groups groups, each with a crop and a flip of its own. Both runs alternate; the ratio is the
median of the ratios of each round. Goal: at least 0.9.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from benchmark_steps import hardware, time_steps
from torch import Tensor
from torchvision.transforms import v2

import spd_zoo  # noqa: F401  (registers the networks)
from spd_zoo.process import pick_device


def make_augment(size: int, groups: int) -> Callable[[Tensor], Tensor]:
    """Augmentation of a batch (N, 3, H, W) of uint8 on its device: a float batch (N, 3, size, size), channels last."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    def augment(pixels: Tensor) -> Tensor:
        augmented = torch.cat([transform(group) for group in pixels.chunk(groups)])
        return augmented.to(memory_format=torch.channels_last)

    return augment


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Images per second of both runs, and their ratio."""
    torch.manual_seed(0)
    device, size = args.device, args.image_size
    images = torch.randint(0, 256, (args.images, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (args.images,))
    net: Any = timm.create_model(args.network, num_classes=1000).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    augment = make_augment(size, args.groups)
    fixed = torch.randn(args.batch, 3, size, size).to(device, memory_format=torch.channels_last)
    fixed_labels = labels[: args.batch].to(device)

    def train(inputs: Tensor, targets: Tensor) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def with_input() -> None:
        for _ in range(args.steps):
            chosen = torch.randint(args.images, (args.batch,))
            pixels = images[chosen]
            if device != "cpu":
                pixels = pixels.pin_memory().to(device, non_blocking=True)
            train(augment(pixels), labels[chosen].to(device, non_blocking=True))

    def on_random_tensors() -> None:
        for _ in range(args.steps):
            train(fixed, fixed_labels)

    steps: dict[str, Callable[[], Any]] = {"input": with_input, "random tensors": on_random_tensors}
    seconds = {name: times[1:] for name, times in time_steps(steps, args.rounds + 1, device).items()}  # one warms up
    row = {name: args.steps * args.batch / statistics.median(times) for name, times in seconds.items()}
    return row | {"ratio": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="pyconvresnet50_spd")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=100000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--groups", type=int, default=16, help="groups of a batch with the same crop and flip")
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.device != "cpu"
    row = measure(args)
    if args.json:
        settings = {key: getattr(args, key) for key in ("network", "image_size", "images", "batch", "groups", "bf16")}
        print(json.dumps(settings | row | {"device": hardware(args.device)}))
    else:
        print(
            f"{args.network}: {row['input']:.0f} images/s with input, {row['random tensors']:.0f} on random tensors | "
            f"ratio {row['ratio']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
