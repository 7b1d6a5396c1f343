"""Saves networks as folders that other libraries load: `model.safetensors` and timm's `config.json`."""

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

from spd_zoo.files import whole
from spd_zoo.weights.fit import classifiers
from spd_zoo.weights.manifest import WeightsError

__all__ = ["CONFIG", "WEIGHTS", "check_config", "config_of", "save_network"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names that timm and transformers expect

_NUMBERS: dict[str, Any] = {"type": ["array", "null"], "items": {"type": "number"}}
_FACTS: dict[str, Any] = {  # what is read of config.json, and in it of pretrained_cfg, by timm or by us
    "type": "object",
    "properties": {
        "architecture": {"type": "string"},
        "num_classes": {"type": ["integer", "null"], "minimum": 0},
        "model_args": {"type": ["object", "null"]},
        "label_names": {"type": ["array", "null"], "items": {"type": "string"}},
        "pretrained_cfg": {"type": "object"},
        "input_size": {
            "type": ["array", "null"],
            "items": {"type": "integer", "minimum": 1, "maximum": 2**14},
            "minItems": 3,
            "maxItems": 3,
        },
        "mean": _NUMBERS,
        "std": _NUMBERS | {"items": {"type": "number", "exclusiveMinimum": 0}},
        "crop_pct": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "crop_mode": {"enum": ["center", "squash", "border", None]},
        "interpolation": {"enum": ["nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random", "", None]},
    },
}


def check_config(folder: Path) -> None:
    """Checks what `config.json` of a saved network says, before timm or a command relies on it.

    Args:
        folder: The network's folder.

    Raises:
        WeightsError: If the file cannot be read, or says something that no network has.
    """
    import jsonschema  # here, because importing it takes long

    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} is no JSON that can be read ({str(error)[:150]}); save the network again"
        ) from error
    inner = config.get("pretrained_cfg", {}) if isinstance(config, dict) else {}
    for part, schema in ((config, _FACTS | {"required": ["architecture"]}), (inner, _FACTS)):
        problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(part))
        if problem is not None:
            where = "/".join(map(str, problem.absolute_path)) or "top level"
            raise WeightsError(f"{path} is invalid at {where}: {problem.message[:150]}; save the network again")
        counts = {name: len(part[name]) for name in ("mean", "std") if part.get(name)}
        channels = part["input_size"][0] if part.get("input_size") else next(iter(counts.values()), 0)
        if any(count != channels for count in counts.values()):
            raise WeightsError(
                f"{path} has other numbers of channels in input_size, mean and std; save the network again"
            )
    names, classes = config.get("label_names"), config.get("num_classes")
    if names and classes is not None and len(names) != classes:
        raise WeightsError(f"{path} names {len(names)} classes, but num_classes is {classes}; save the network again")


def save_network(
    net: nn.Module, folder: str | Path, cfg: dict[str, Any] | None = None, model_args: dict[str, Any] | None = None
) -> None:
    """Writes a network for timm (`local-dir:FOLDER`) and the timm wrapper of transformers (`FOLDER`).

    Both need `import spd_zoo` first, which registers the network.

    Args:
        net: A network that timm created; not one that `fold_spd` changed, which timm could not create again.
        folder: Created if it does not exist.
        cfg: Fields that differ from `net.pretrained_cfg`: input, normalisation, `label_names`, ...
        model_args: Arguments of `timm.create_model` for this network, if its `pretrained_cfg` does not have them.

    Raises:
        OSError: If a file cannot be written.
        WeightsError: If the network is folded, was created with `features_only`, is a module around one, or has
            another number of outputs than its `num_classes`.
    """
    if "pretrained_cfg" not in vars(net) or not hasattr(net, "num_classes"):
        raise WeightsError(
            f"{type(net).__name__} is not a whole network of timm.create_model, and so is not saved; give the network "
            "itself: without features_only, and of torch.compile its _orig_mod, of parallel training its module"
        )
    if getattr(getattr(net, "fold_report", None), "folded", None):
        raise WeightsError(
            "a folded network cannot be loaded again, and so is not saved; save the network as it was before fold_spd, "
            "and fold it after it is loaded, or export it with spd_zoo.export"
        )
    layers, classes = dict(net.named_modules()), net.num_classes
    for name in classifiers(net):
        outputs = getattr(layers.get(name), "out_features", classes)
        if outputs != classes:
            raise WeightsError(
                f"the classifier {name} has {outputs} outputs, but the network's num_classes is {classes}, so it would "
                f"be loaded without its classifier; set num_classes of the network to {outputs}"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / WEIGHTS) as weights, whole(folder / CONFIG) as config:
        tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
        weights.write_bytes(save(tensors))  # an OSError on a full disk, unlike `save_file`
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
