"""Saves networks as folders that other libraries load: `model.safetensors` and timm's `config.json`."""

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from spd_zoo.files import whole

__all__ = ["CONFIG", "WEIGHTS", "config_of", "save_network"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names that timm and transformers expect


def save_network(
    net: nn.Module, folder: str | Path, cfg: dict[str, Any] | None = None, model_args: dict[str, Any] | None = None
) -> None:
    """Writes a network for timm (`local-dir:FOLDER`) and the timm wrapper of transformers (`FOLDER`).

    Both need `import spd_zoo` first, which registers the network.

    Args:
        net: A network that timm created.
        folder: Created if it does not exist.
        cfg: Fields that differ from `net.pretrained_cfg`: input, normalisation, `label_names`, ...
        model_args: Arguments of `timm.create_model` for this network, if its `pretrained_cfg` does not have them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / WEIGHTS) as weights, whole(folder / CONFIG) as config:
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, weights)
        config.write_text(json.dumps(config_of(net, cfg, model_args), indent=2), encoding="utf-8")


def config_of(
    net: nn.Module, cfg: dict[str, Any] | None = None, model_args: dict[str, Any] | None = None, **extra: Any
) -> dict[str, Any]:
    """The contents of timm's `config.json`, in a form that transformers reads, too.

    Args:
        net: As in `save_network`.
        cfg: As in `save_network`.
        model_args: As in `save_network`.
        **extra: Further top-level fields.

    Returns:
        The fields.
    """
    cfg = dict(cfg or {})
    names = cfg.pop("label_names", None)
    described = vars(net)["pretrained_cfg"].get("label_descriptions") or {}
    if names and described and not described.keys() >= set(names):
        cfg["label_descriptions"] = None  # they describe the pretrained network's classes, which differ
    extra = {"pretrained_cfg": cfg} | ({"label_names": names} if names else {}) | extra
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(net, str(path), extra, model_args)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)  # transformers would pass it to timm twice
    names = config["pretrained_cfg"].pop("label_names", None)  # transformers only reads the top level
    if names:
        config.setdefault("label_names", names)
    return config
