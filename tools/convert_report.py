"""Converts one network of every family in timm with `convert_to_spd` and compares the outputs.

    python tools/convert_report.py [--json] [MODULE ...]

A family is all networks in a file of timm/models whose names begin with the same letters, such as `resnet`, `seresnet`
and `resnetblur` in resnet.py. The report converts the smallest network of each family, by parameters, that accepts
several image sizes. Families are left out if this network has fewer than two layers that downsample by a stride or
pooling: transformers and mixers, which only cut the image into patches. Values that are zero or one in an untrained
network are random: statistics, scales and shifts of normalisation layers, layer scales, gains. The images are noise of
even, odd and non-square sizes; if a network refuses the smallest ones, they are twice or four times as large.

Then noise is added to every weight of the new layers, which changes the outputs ("moved"), and that network is compared
with its folded form ("folded"). All differences are the largest ones, in standard deviations of the outputs, in fp32.
Exit status 1 if one is above 1e-4.
"""

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spd_zoo import convert_to_spd, fold_spd
from spd_zoo.convert import SPDReport
from spd_zoo.rewrite import TOLERANCE, max_difference, tensors_in

RECORD = Path(__file__).parent / "conversions.jsonl"  # what --json printed
SIZES = {"even": (64, 64), "not square": (64, 96), "odd": (65, 63)}  # of images


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every scale, shift and statistic a random value, so that no branch is zero and all channels differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith("running_var") or (tensor.ndim < 2 and name.endswith(("weight", "gamma", "gain"))):
                tensor.uniform_(0.5, 1.0, generator=generator)
            elif tensor.ndim < 2 and tensor.is_floating_point():
                tensor.normal_(0, 0.1, generator=generator)
    return net.eval()


def timms_modules() -> list[str]:
    """The files in timm/models that hold networks."""
    entrypoints = {module: timm.model_entrypoint(timm.list_models(module=module)[0]) for module in timm.list_modules()}
    return [module for module, entrypoint in entrypoints.items() if entrypoint.__module__.startswith("timm.")]


def smallest_of_each_family(module: str) -> list[str]:
    """The smallest network of every family in one of timm's model files that accepts images of any size."""
    families: dict[str, list[tuple[int, str]]] = {}
    for name in timm.list_models(module=module):
        cfg = timm.get_pretrained_cfg(name)
        if cfg is None or not cfg.fixed_input_size:
            net = timm.create_model(name, device="meta")
            size = sum(parameter.numel() for parameter in net.parameters())
            families.setdefault(re.match("[a-z]*", name)[0], []).append((size, name))  # type: ignore[index]
    return [min(networks)[1] for networks in families.values()]


def downsampling_layers(name: str) -> int:
    """The number of layers or operators of a network that downsample."""
    report = report_of(convert_to_spd(timm.create_model(name, device="meta")))
    return len(report.replaced) + len(report.unchanged)


def report_of(net: Any) -> SPDReport:
    """The report of a converted network."""
    report: SPDReport = net.spd_report
    return report


def noise(*shape: int) -> Tensor:
    """Reproducible images."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return max_difference([actual], [expected])


@torch.no_grad()
def images_for(net: nn.Module) -> dict[str, Tensor]:
    """Two images of each size, enlarged by 1, 2 or 4 if the network needs it; without sizes that it refuses."""
    for factor in (1, 2, 4):
        images = {}
        for shape, (height, width) in SIZES.items():
            odd = factor - 1 if shape == "odd" else 0
            x = noise(2, 3, factor * height - odd, factor * width + odd)
            try:
                net(x)
            except (RuntimeError, ValueError, AssertionError):
                continue
            images[shape] = x
        if images:
            return images
    return {}


@torch.no_grad()
def train_a_little(converted: nn.Module) -> None:
    """Adds noise to every weight of the new layers."""
    for replaced in report_of(converted).replaced:
        for parameter in converted.get_submodule(replaced.module).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.square().mean().sqrt())


@torch.no_grad()
def compare(name: str) -> dict[str, Any]:
    """Converts and folds a network; returns the replaced and unchanged layers, and the largest differences."""
    torch.manual_seed(0)
    net = randomise(timm.create_model(name))
    images = images_for(net)
    if not images:
        return {"network": name, "left_out": "it accepts none of the sizes"}
    expected = {shape: net(x) for shape, x in images.items()}
    converted = convert_to_spd(net, inplace=True)
    report = report_of(converted)
    row: dict[str, Any] = {
        "network": name,
        "params": report.params,
        "macs": report.macs,
        "replaced": dict(Counter(f"{row.old} -> {row.new}" for row in report.replaced)),
        "unchanged": [f"{layer.module}, {layer.layer}: {layer.reason}" for layer in report.unchanged],
    }
    for shape, x in images.items():
        row[shape] = {"size": list(x.shape[2:]), "difference": difference(converted(x), expected[shape])}
    train_a_little(converted)
    folded = fold_spd(converted)
    for shape, x in images.items():
        trained = converted(x)
        row[shape] |= {"moved": difference(trained, expected[shape]), "folded": difference(folded(x), trained)}
    return row


@torch.no_grad()
def compare_folded(name: str, features_only: bool) -> dict[str, Any]:
    """Folds a network as timm makes it: the numbers of BatchNorms, and the largest difference at each size.

    Args:
        name: The network.
        features_only: Take its maps instead of its classes.

    Returns:
        "norms": BatchNorms before and after; "folded": of each size, the largest difference between the outputs.
    """
    torch.manual_seed(0)
    net = randomise(timm.create_model(name, features_only=features_only))
    images = images_for(net)
    folded = fold_spd(net, next(iter(images.values())))
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in other.modules()) for other in (net, folded)]
    differences = {size: max_difference(tensors_in(folded(x)), tensors_in(net(x))) for size, x in images.items()}
    return {"network": name, "norms": norms, "folded": differences}


def rows(modules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row per family, or per model file without any."""
    for module in tqdm(modules, unit="file", disable=None):
        names = smallest_of_each_family(module)
        if not names:
            yield {"module": module, "left_out": "its networks take images of one size"}
        for name in tqdm(names, module, leave=False, disable=None):
            count = downsampling_layers(name)
            why = {"network": name, "left_out": f"layers that downsample: {count}"}
            yield {"module": module} | (compare(name) if count > 1 else why)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per model file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", metavar="MODULE", nargs="*", help="model files (default: all of timm's)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    options = parser.parse_args(argv)
    if unknown := set(options.modules) - set(timms_modules()):
        parser.error(f"timm has no model file called {', '.join(sorted(unknown))}")
    worst = 0.0
    for row in rows(options.modules or timms_modules()):
        measured = [row[shape] for shape in SIZES if shape in row]
        worst = max([worst, *(size[what] for size in measured for what in ("difference", "folded"))])
        if options.json:
            tqdm.write(json.dumps(row))
        elif "left_out" in row:
            tqdm.write(f"{row['module']:20} {row.get('network', ''):26} left out: {row['left_out']}")
        else:
            found = ", ".join(
                f"{height}x{width} {values['difference']:.0e} moved {values['moved']:.0e} folded {values['folded']:.0e}"
                for values in measured
                for height, width in [values["size"]]
            )
            counts = f"replaced {sum(row['replaced'].values()):3}, unchanged {len(row['unchanged']):2}"
            tqdm.write(f"{row['module']:20} {row['network']:26} {counts}; {found}")
    print(f"largest difference: {worst:.1e} of the outputs' standard deviation", file=sys.stderr)
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of timm about itself
    sys.exit(main())
