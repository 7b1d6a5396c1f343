"""A network by its name, its tag or its folder, with its weights."""

import difflib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import CustomDatasetInfo, DatasetInfo, ImageNetInfo
from torch import nn
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from spd_zoo.weights import WeightsError, create, entries, fetch, imported_names

__all__ = ["ModelError", "class_names", "load_network", "timm_name"]

_LOADING_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, OSError, EOFError, UnpicklingError, SafetensorError)


class ModelError(ValueError):
    """A network that there is not or that cannot be used; the message says what would work."""


def timm_name(name: str) -> str:
    """What timm calls a network given by its name, by a source such as `local-dir:`, or by the folder of a run.

    Raises:
        ModelError: If there is no such network; with the nearest names.
    """
    network = name.partition(".")[0]
    ours = {entry.network for entry in entries().values()}
    known = name in entries() or (network in ours and name in imported_names())
    if known or ":" in name or (network not in ours and timm.is_model(network)):
        return name
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json; give one that a finished run left")
        return f"local-dir:{name}"
    nearest = difflib.get_close_matches(name.lower(), entries(), n=3, cutoff=0.5)
    advice = f"the nearest names are {', '.join(nearest)}" if nearest else "`spd-zoo list` shows all networks"
    raise ModelError(f"there is no network {name!r}; {advice}")


def class_names(cfg: dict[str, Any]) -> list[str]:
    """What each output of the network with this `pretrained_cfg` means; its number where nobody says."""
    names = [str(index) for index in range(cfg["num_classes"])]
    info: DatasetInfo
    if cfg.get("label_names"):
        info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    elif _is_imagenet(cfg):
        info = ImageNetInfo()
    elif _is_coco(cfg):
        info = CustomDatasetInfo(_coco_names())
    else:
        return names
    return [info.index_to_description(i) if info.has_label(i) else number for i, number in enumerate(names)]


def _is_imagenet(cfg: dict[str, Any]) -> bool:
    """Whether the outputs are ImageNet-1k's: the manifest says so of our weights, the tag of timm's."""
    tag = cfg.get("tag") or ""
    entry = entries().get(f"{cfg['architecture']}.{tag}")
    dataset = tag if entry is None else entry.dataset or ""
    return cfg["num_classes"] == 1000 and ("in1k" in dataset or dataset.startswith("ImageNet-1k"))


def _is_coco(cfg: dict[str, Any]) -> bool:
    """Whether the outputs are COCO's 80 classes, as the manifest says."""
    entry = entries().get(f"{cfg['architecture']}.{cfg.get('tag') or ''}")
    return cfg["num_classes"] == 80 and entry is not None and (entry.dataset or "").startswith("COCO")


def _coco_names() -> list[str]:
    """COCO's classes in the order of its annotations; torchvision leaves a place for those that COCO never used."""
    names = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    return [name for name in names if name not in ("__background__", "N/A")]


def load_network(model: str, device: str) -> nn.Module:
    """A pretrained network of any kind on a torch device, channels last, ready to compute.

    Raises:
        ModelError: If there is no such network, or it cannot be loaded.
        WeightsError: If its weights cannot be had or must not be used.
    """
    name = timm_name(model)
    entry = entries().get(name)
    try:
        if entry is not None and entry.group == "timm":
            net = create(entry, fetch(entry)).eval()
        else:
            net = timm.create_model(name, pretrained=True).eval()
    except WeightsError:
        raise
    except _LOADING_ERRORS as error:
        raise ModelError(f"cannot load {model}: {_first_line(error)}") from error
    try:
        return net.to(device).to(memory_format=torch.channels_last)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot use device {device!r}: {_first_line(error)}") from error


def _cfg(net: nn.Module) -> dict[str, Any]:
    cfg: dict[str, Any] = vars(net)["pretrained_cfg"]
    return cfg


def _first_line(error: BaseException) -> str:
    return type(error).__name__ + ": " + str(error).strip().partition("\n")[0]
