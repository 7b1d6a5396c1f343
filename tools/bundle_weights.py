"""Adds the network of a finished run to the package, measures its accuracy, and enters it in the manifest.

    python tools/bundle_weights.py RUN cifar_resnet20.cifar100 --dataset CIFAR-100 --hardware "2 CPU cores"
    python tools/bundle_weights.py RUN yolov8n_spd.tiny_in200_backbone --dataset "Tiny ImageNet" --hardware ...

The weights are stored as fp16; of a run of `backbone_classifier`, only the backbone, for its detector. The input size
is the one of `--image-sizes` with the best accuracy on the images that the run held out; the accuracy that is entered
is measured once, on the test images, with the stored weights in fp32.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from spd_zoo.complexity import count_macs, count_params
from spd_zoo.data.labelled import DataError, LabelledImages, open_data
from spd_zoo.files import whole
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import Process
from spd_zoo.training.classification.task import Classification
from spd_zoo.training.config import FinetuneConfig, load_config
from spd_zoo.training.evaluate import evaluate_network
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.weights import sha256_of
from spd_zoo.weights.cache import BUNDLED
from spd_zoo.weights.fit import BACKBONE
from spd_zoo.weights.load import load_backbone
from spd_zoo.weights.manifest import manifest_path, write_manifest


def accuracy(net: torch.nn.Module, data: LabelledImages, image_size: int, cfg: dict[str, Any]) -> float:
    """Top-1 in per cent at `image_size`."""
    cpu = torch.device("cpu")
    preprocessing = Preprocessing(tuple(cfg["mean"]), tuple(cfg["std"]), cpu, interpolation=cfg["interpolation"])
    task, process = Classification(), Process(cpu)
    batches = task.eval_batches(net, data, (image_size, image_size), 250, 2, preprocessing, process)
    return task.score(net, batches, preprocessing, process)["top1"]


def save_fp16(run: Path, target: Path, parts: tuple[str, ...] = ("",)) -> None:
    """Writes the run's weights whose names begin with one of `parts` as fp16, and integers unchanged."""
    state_dict = {key: value for key, value in load_file(run / "model.safetensors").items() if key.startswith(parts)}
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state_dict.items()}
    if not all(value.isfinite().all() for value in halves.values()):
        raise SystemExit(f"{run}: a weight does not fit into fp16")
    save_file(halves, target, metadata={"format": "pt"})


def recipe_of(run: Path) -> dict[str, Any]:
    """The options of a run; older runs store them as JSON."""
    new, old = run / "run.yaml", run / "run.json"
    return load_config(new if new.exists() else old)


def classification(
    net: torch.nn.Module, config: FinetuneConfig, options: argparse.Namespace, cfg: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float], int]:
    """Metrics on the held-out images at the best of `options.image_sizes`, those on the test images, and that size."""
    data_file = options.run / "data.json"
    recorded = json.loads(data_file.read_text(encoding="utf-8")) if data_file.exists() else None
    val = Classification().open_splits(config, net, Process(torch.device("cpu")), recorded).val
    data = options.test_data or config.data
    test = open_data(data, options.test_split, config.image_column, config.label_column)
    if test is None or not isinstance(val, LabelledImages):
        raise DataError(f"{data} has no split {options.test_split}, or was streamed")
    if test.class_names != val.class_names:
        raise DataError(f"{data} has other classes than the run")
    on_val = {size: round(accuracy(net, val, size, cfg), 2) for size in options.image_sizes}
    size = max(on_val, key=lambda pixels: on_val[pixels])
    return {"top1": on_val[size]}, {"top1": round(accuracy(net, test, size, cfg), 2)}, size


def detection(
    net: DetectionNet, config: FinetuneConfig, options: argparse.Namespace, cfg: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float], int]:
    """AP and AP50 on the splits val and test, at the image size of the run."""
    size = cfg["input_size"][-1]
    found = []
    for split in ("val", "test"):
        cpu = torch.device("cpu")
        (evaluation,) = evaluate_network(net, options.name, config.data, split, (size,), False, 8, 2, cpu)
        print(evaluation.in_words())
        found.append({metric: round(evaluation.row[metric], 2) for metric in ("ap", "ap50")})
    return found[0], found[1], size


def measured(
    file: Path, network: str, members: dict[str, Any], recipe: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Writes the weights of the run to `file`, and measures them; returns their entry.

    Args:
        file: The file to write.
        network: The network.
        members: The group of the network in the manifest.
        recipe: The options of the run.
        options: The arguments of the command.
    """
    stored = json.loads((options.run / "config.json").read_text(encoding="utf-8"))
    cfg = stored["pretrained_cfg"] | {"label_names": stored["label_names"]}
    config = FinetuneConfig(**recipe | {"check": False})
    is_backbone = config.model == "backbone_classifier"
    save_fp16(options.run, file, BACKBONE if is_backbone else ("",))
    net: Any
    if is_backbone:
        net = timm.create_model(f"local-dir:{options.run}", pretrained=True)
        load_backbone(net, file)  # in fp16, as it is stored
    else:
        overlay = {"file": str(file), "label_names": cfg["label_names"], "input_size": tuple(cfg["input_size"])}
        net = timm.create_model(network, pretrained=True, pretrained_cfg_overlay=overlay)
    net = net.to(memory_format=torch.channels_last)
    score = detection if isinstance(net, DetectionNet) else classification
    on_val, on_test, size = score(net, config, options, cfg)
    print(f"at {size} px, held-out: {on_val}; test: {on_test}")

    free = {field.name for field in fields(FinetuneConfig) if field.metadata.get("free")}
    entry: dict[str, Any]
    if is_backbone:
        entry = members[network] | {"part": "backbone"}
    else:
        meta: Any = timm.create_model(network, num_classes=net.num_classes, device="meta")
        entry = {
            "num_classes": net.num_classes,
            "input_size": [net.in_chans, size, size],
            "params": count_params(net),
            "macs": count_macs(meta, (3, size, size)),
            "mean": cfg["mean"],
            "std": cfg["std"],
            "crop_pct": cfg["crop_pct"],
            "interpolation": cfg["interpolation"],
            "class_names": cfg["label_names"],
        }
        if not isinstance(net, DetectionNet):
            last_map = meta.forward_features(torch.empty(1, *cfg["input_size"][:1], size, size, device="meta"))
            entry["pool_size"] = list(last_map.shape[-2:])
    metrics = [
        {
            "dataset": f"{options.dataset} {split}",
            "metric": metric,
            "value": value,
            "input_size": size,
            "measured_by": "us",
        }
        for split, found in ((options.test_split, on_test), (options.held_out, on_val))
        for metric, value in found.items()
    ]
    notes = {"notes": options.notes} if options.notes else {}
    return entry | {
        "source": f"bundled:{file.name}",
        "sha256": sha256_of(file),
        "size": file.stat().st_size,
        "license": options.license,
        "dataset": options.dataset,
        "recipe": {key: value for key, value in recipe.items() if key not in free}
        | {"hardware": options.hardware, "torch": torch.__version__},
        "metrics": metrics,
        **notes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Bundles one run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help="network.tag of the new entry")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--notes")
    parser.add_argument("--held-out", default="held-out train", help="name of the validation images in the manifest")
    parser.add_argument("--test-data", help="the data set of a classifier's test images; by default that of the run")
    parser.add_argument("--test-split", default="test", help="the split of a classifier's test images")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[48, 56, 64])
    options = parser.parse_args(argv)

    recipe = recipe_of(options.run)
    network = options.name.partition(".")[0]
    manifest = json.loads(manifest_path().read_text(encoding="utf-8"))
    group = next((group for group, members in manifest.items() if network in members), None)
    if group is None:
        raise SystemExit(f"{manifest_path()} has no network {network}; add its entry first, or correct the name")
    BUNDLED.mkdir(exist_ok=True)
    file = BUNDLED / f"{options.name}.safetensors"
    with whole(file) as new:  # replaces `file` at the end, so that an error before it changes nothing
        manifest[group][options.name] = measured(new, network, manifest[group], recipe, options)
    write_manifest(manifest_path(), manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
