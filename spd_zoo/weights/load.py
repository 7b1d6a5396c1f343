"""Loads networks with their weights, by name, by tag or from a folder."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import CustomDatasetInfo, DatasetInfo, ImageNetInfo
from timm.models import adapt_input_conv, get_pretrained_cfg
from torch import nn
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from spd_zoo.errors import first_line
from spd_zoo.files import exists, is_file, is_folder
from spd_zoo.weights import (
    WeightsError,
    create,
    entries,
    fetch,
    imported_names,
    loads_backbone_only,
    read_checkpoint,
)
from spd_zoo.weights.build import timms_network
from spd_zoo.weights.cache import verified_import
from spd_zoo.weights.catalogue import ModelError, unknown_network
from spd_zoo.weights.fit import backbone_only, check_finite, filter_of, fit_image_channels, misfit, own_tensors
from spd_zoo.weights.folder import CONFIG, WEIGHTS, check_config
from spd_zoo.weights.manifest import tags_in_words

__all__ = [
    "ModelError",
    "class_names",
    "class_synonyms",
    "has_weights",
    "is_network",
    "load_backbone",
    "load_file",
    "load_network",
    "pretrained_cfg",
    "task_by_name",
    "timm_name",
]

_LOADING_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, OSError, EOFError, UnpicklingError, SafetensorError)


def is_network(name: str) -> bool:
    """Whether this names a network of the zoo or of timm, with or without a tag, or is a source such as `local-dir:`.

    timm's own tags are checked when the network is created. A path that exists is no source, even with a drive letter.
    """
    network = name.partition(".")[0]
    ours = {entry.network for entry in entries().values()}
    known = name in entries() or (network in ours and name in imported_names())
    source = ":" in name and not exists(name)
    return known or source or (network not in ours and timm.is_model(network))


def task_by_name(name: str) -> str | None:
    """The task of a network of the zoo or of timm, "classification" or "detection"; None for folders and files."""
    network = name.partition(".")[0]
    if ":" in name or name.endswith(".onnx") or not is_network(name):
        return None
    return entries()[network].task if network in entries() else "classification"


def has_weights(name: str) -> bool:
    """Whether a network has weights by default: those of its tag, imported ones too, or those in its folder."""
    if ":" in name or name in imported_names():
        return True
    known = get_pretrained_cfg(name)
    return known is not None and bool(known.has_weights)


def timm_name(name: str) -> str:
    """timm's name for a network: `name` itself, or `local-dir:FOLDER` for the folder of a run.

    Args:
        name: A network with or without a tag, one of timm's sources such as `local-dir:` or `hf-hub:`, or a run's
            folder.

    Returns:
        The name for `timm.create_model`.

    Raises:
        ModelError: If there is no such network (the message lists the nearest names), there is a run of the same name,
            or the folder has no weights in safetensors.
    """
    if name.endswith(".onnx"):
        raise ModelError(
            f"{name} is an exported file, which predict, detect and evaluate run and nothing else takes; give the "
            "network or the run that it was exported from"
        )
    if name.startswith("local-dir:"):
        _check_folder(Path(name.removeprefix("local-dir:")))
    if is_network(name):
        if any(is_file(Path(name) / file) for file in (CONFIG, "run.yaml")):
            raise ModelError(
                f"{name} is the name of a network, and of a run's folder here; write ./{name} for the run, or the "
                "network with its tag"
            )
        return name
    if is_folder(name):
        _check_folder(Path(name))
        return f"local-dir:{name}"
    raise unknown_network(name)


def _check_folder(folder: Path) -> None:
    """Checks that a folder holds a network that can be loaded.

    Raises:
        ModelError: Unless it holds safetensors: what else there is, timm reads by `torch.load`.
        WeightsError: If its `config.json` is invalid.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is a folder without {CONFIG}; choose the folder of a finished run")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {WEIGHTS}, and no other file is read from a folder; save the network as safetensors, as "
            "timm's save_for_hf does, or import its checkpoint: spd-zoo weights import NETWORK FILE"
        )
    check_config(folder)


def class_names(cfg: dict[str, Any]) -> list[str]:
    """The name of every class of a network with this `pretrained_cfg`, or its index if no name is known."""
    names, info = [str(index) for index in range(cfg["num_classes"])], _class_info(cfg)
    if info is None:
        return names
    return [info.index_to_description(i) if info.has_label(i) else number for i, number in enumerate(names)]


def class_synonyms(cfg: dict[str, Any]) -> list[list[str]] | None:
    """Other names of every class, such as the WordNet ids of ImageNet; None if the network's classes have no names."""
    info = _class_info(cfg)
    if info is None:
        return None
    return [
        [info.index_to_label_name(i), *info.index_to_description(i).split(", ")] if info.has_label(i) else []
        for i in range(cfg["num_classes"])
    ]


def _class_info(cfg: dict[str, Any]) -> DatasetInfo | None:
    if cfg.get("label_names"):
        return CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    if _is_imagenet(cfg):
        return ImageNetInfo()
    return CustomDatasetInfo(_coco_names()) if _is_coco(cfg) else None


def _is_imagenet(cfg: dict[str, Any]) -> bool:
    """Whether the classes are those of ImageNet-1k, by the manifest for our weights and by the tag for timm's."""
    tag = cfg.get("tag") or ""
    entry = entries().get(f"{cfg['architecture']}.{tag}")
    dataset = tag if entry is None else entry.dataset or ""
    return cfg["num_classes"] == 1000 and ("in1k" in dataset or dataset.startswith("ImageNet-1k"))


def _is_coco(cfg: dict[str, Any]) -> bool:
    """Whether the classes are COCO's 80, by the manifest."""
    entry = entries().get(f"{cfg['architecture']}.{cfg.get('tag') or ''}")
    return cfg["num_classes"] == 80 and entry is not None and (entry.dataset or "").startswith("COCO")


def _coco_names() -> list[str]:
    """COCO's 80 classes in the order of its annotations; torchvision's list has gaps for ids that COCO never used."""
    names = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    return [name for name in names if name not in ("__background__", "N/A")]


def load_network(model: str, device: str) -> nn.Module:
    """Loads a pretrained network onto a device, in channels-last memory format and evaluation mode.

    Args:
        model: As for `timm_name`.
        device: torch device, as `pick_device` returns it.

    Returns:
        The network.

    Raises:
        ModelError: If there is no such network, or it cannot be loaded.
        WeightsError: If its weights cannot be downloaded or must not be used.
    """
    name = timm_name(model)
    if ":" not in name and loads_backbone_only(name):
        others = tags_in_words(name.partition(".")[0])
        raise ModelError(
            f"the weights of {model} are a backbone without neck and head; fine-tune the network first: "
            f"spd-zoo finetune {model} --data DATA --out RUN" + (f"; or use, by name: {others}" if others else "")
        )
    entry, network = entries().get(name), name.partition(".")[0]
    try:
        if entry is not None and entry.group == "timm":
            net = create(entry, fetch(entry)).eval()
        elif ":" not in name and network not in entries() and (file := verified_import(name)):  # a tag of the user's
            net = timms_network(network, file).eval()
        else:
            net = timm.create_model(name, pretrained=True).eval()
    except WeightsError:
        raise
    except _LOADING_ERRORS as error:
        raise ModelError(f"cannot load {model}: {first_line(error, with_type=True)}") from error
    return net.to(device).to(memory_format=torch.channels_last)


def load_backbone(net: nn.Module, source: str | Path) -> None:
    """Gives a detector the stem and the stages of a checkpoint; its neck and head stay as they are.

    A stem for three image channels is adapted to others as in timm.

    Args:
        net: A detector of this zoo.
        source: A file that `read_checkpoint` understands, or the folder of a run, for example of `backbone_classifier`.

    Raises:
        WeightsError: If the file cannot be read, or its backbone does not fit the network; `net` is then unchanged.
    """
    file = Path(source) / WEIGHTS if Path(source).is_dir() else Path(source)
    tensors = backbone_only(fit_image_channels(own_tensors(read_checkpoint(file), net, filter_of(net)), net), net)
    problem = misfit(tensors, net, with_classifier=True)
    if problem:
        raise WeightsError(f"the backbone in {file} does not fit {pretrained_cfg(net)['architecture']}: {problem}")
    check_finite(tensors, str(file))
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    for key in [key for key, tensor in tensors.items() if tensor.shape != shapes[key]]:  # of other image channels
        tensors[key] = adapt_input_conv(shapes[key][1], tensors[key])
    net.load_state_dict(tensors)


def load_file(network: str, file: str | Path, device: str) -> nn.Module:
    """A network with the weights of a checkpoint, in evaluation mode; no code in the file runs.

    Args:
        network: A network of this zoo or of timm. With a tag, its outputs are taken for the classes of the tag, if the
            file has as many; otherwise nobody says what they are.
        file: The checkpoint, in any form that `read_checkpoint` understands.
        device: torch device, as `pick_device` returns it.

    Raises:
        ModelError: If there is no such network, or it is one by its folder.
        WeightsError: If the file cannot be read, or does not fit the network.
    """
    name = timm_name(network)
    if ":" in name:
        raise ModelError(f"{network} has weights of its own; give a network's name for the file {file}")
    entry = entries().get(name.partition(".")[0])
    net: Any
    if entry is not None and entry.group != "timm":
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    else:
        net = timms_network(name, Path(file))
    return net.eval().to(device).to(memory_format=torch.channels_last)


def pretrained_cfg(net: nn.Module) -> dict[str, Any]:
    """timm's configuration of a network's weights and input.

    Raises:
        ModelError: If it has none, because it is none of timm's networks, or another module around one.
    """
    cfg: dict[str, Any] | None = vars(net).get("pretrained_cfg")
    if cfg is not None:
        return cfg
    name = type(net).__name__
    for inner in ("_orig_mod", "module"):  # of torch.compile, and of modules that train in parallel
        if isinstance(getattr(net, inner, None), nn.Module):
            raise ModelError(f"{name} is a module around a network; give the network in its attribute {inner}")
    raise ModelError(
        f"{name} has no pretrained_cfg, which says how its images are prepared; use one of timm's networks"
    )
