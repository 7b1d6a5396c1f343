"""Between a variant and timm: the configurations of the manifest, and a network whose weights were checked."""

import pickle
import re
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
from safetensors import SafetensorError
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_model_traits,
    get_pretrained_cfg,
    load_state_dict,
)
from torch import Tensor, nn

from spd_zoo.weights.fetch import WeightsError, fetch
from spd_zoo.weights.manifest import entries, find_entry

__all__ = ["build", "default_cfgs", "rename"]

Network = TypeVar("Network", bound=nn.Module)
StateDict = dict[str, Tensor]
FilterFn = Callable[[StateDict, Any], StateDict]
Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

_UNREADABLE = (  # what broken files have been seen to raise in torch's and safetensors' readers
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    OSError,
    pickle.UnpicklingError,
    struct.error,
    SafetensorError,
)


def default_cfgs(group: str, first_conv: str, classifier: str) -> dict[str, Any]:
    """timm's configurations of all networks and checkpoints in a group of the manifest.

    A checkpoint counts as pretrained weights for timm, and can be the default, only if its sha256 is known.
    """
    cfgs: dict[str, Any] = {}
    for entry in entries().values():
        if entry.group != group:
            continue
        cfgs[entry.name] = {
            "url": entry.source if entry.verified else None,
            "num_classes": entry.num_classes,
            "input_size": entry.input_size,
            "pool_size": entry.pool_size,
            "mean": entry.mean,
            "std": entry.std,
            "crop_pct": entry.crop_pct,
            "interpolation": entry.interpolation,
            "label_names": entry.class_names,
            "license": entry.license,
            "origin_url": entry.origin_url,
            "first_conv": first_conv,
            "classifier": classifier,
        }
    return generate_default_cfgs(cfgs)


def rename(state_dict: StateDict, renames: Renames) -> StateDict:
    """The tensors under new keys: every pattern that matches a key is replaced, in order."""
    renamed = {}
    for key, tensor in state_dict.items():
        new = key
        for pattern, replacement in renames:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


def build(
    cls: type[Network],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: FilterFn = lambda state_dict, model: state_dict,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Network:
    """timm's `build_model_with_cfg` for the networks of the manifest.

    The weights of a tag are fetched and their SHA-256 checked before timm reads them. Whatever is loaded must fit the
    network outside the classifier, also when the number of classes changes. A `file` of the caller's, given by
    `pretrained_cfg_overlay`, brings its own number of classes unless `num_classes` says otherwise.

    Raises:
        WeightsError: If there are no such weights, they cannot be had, are not what the manifest pins or do not fit.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    ours = pretrained_cfg is None or isinstance(pretrained_cfg, str)  # a tag; anything else is the caller's own source
    if pretrained and ours and not any(overlay.get(key) for key in ("url", "hf_hub_id", "state_dict")):
        if overlay.get("file"):
            meta = timm.create_model(f"{variant}.{pretrained_cfg}" if pretrained_cfg else variant, device="meta")
            classes = _classes_in(pretrained_filter_fn(_read(overlay["file"]), meta), meta)
            if not (pretrained_cfg and classes == meta.num_classes):
                overlay.setdefault("label_names", None)
            kwargs.setdefault("num_classes", overlay.get("num_classes", classes))
            overlay["num_classes"] = classes
        else:
            overlay["file"] = str(_fetch_tag(variant, pretrained_cfg, cache_dir))
            _read(overlay["file"])
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_checked(pretrained_filter_fn, kwargs.get("features_only", False)),
        cache_dir=cache_dir,
        **kwargs,
    )


def _fetch_tag(variant: str, tag: str | None, cache_dir: str | Path | None) -> Path:
    """The file of a tag, or of the network's default tag."""
    if not tag:
        cfg = get_pretrained_cfg(variant)
        tag = cfg.tag if cfg is not None and cfg.has_weights else None
    name = f"{variant}.{tag}" if tag else variant
    entry = find_entry(name)
    tags = [other.name for other in entries().values() if other.network == variant and other.tag]
    if entry is None:
        raise WeightsError(f"there are no weights called {name}; there are: {', '.join(tags) or 'none'}")
    if not tag and not entry.verified and (tags or entry.source):
        raise WeightsError(
            f"{variant} has no verified weights; unverified ones, to be asked for by name: {', '.join(tags) or 'none'}"
        )
    return fetch(entry, cache_dir)


def _read(file: str | Path) -> StateDict:
    """The tensors of a checkpoint, read by timm; nothing in it is executed."""
    if not Path(file).is_file():
        raise WeightsError(f"{file} does not exist or is no file; give the path of a checkpoint file")
    try:
        state_dict = load_state_dict(str(file))
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise WeightsError(
            f"{file} is no checkpoint that can be read safely ({reason}); it must be a file of tensors: "
            "NAME.safetensors, or one of torch.save's. Get it again, or convert it where you trust it"
        ) from error
    return _tensors(state_dict, str(file))


def _tensors(state_dict: StateDict, name: str) -> StateDict:
    """`state_dict`, if it is what its type says."""
    if not state_dict or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise WeightsError(f"{name} holds no network weights: neither a dict of tensors, nor one under 'state_dict'")
    return state_dict


def _cfg(model: nn.Module) -> dict[str, Any]:
    return cast("dict[str, Any]", model.pretrained_cfg)


def _classes_in(state_dict: StateDict, model: nn.Module) -> int:
    """How many classes the classifier of a checkpoint has; 0 if it has no classifier."""
    weight = state_dict.get(f"{_cfg(model)['classifier']}.weight")
    return 0 if weight is None else weight.shape[:1].numel()


def _checked(filter_fn: FilterFn, features_only: bool) -> FilterFn:
    """`filter_fn`, and an error if what it returns does not fit the network.

    The classifier may differ where timm leaves the checkpoint's out.
    """

    def checked(state_dict: StateDict, model: nn.Module) -> StateDict:
        cfg = _cfg(model)
        name = cfg.get("file") or "the checkpoint"
        renamed = filter_fn(_tensors(state_dict, name), model)
        same_classes = model.num_classes == cfg["num_classes"] and not features_only
        misfit = _misfit(renamed, model, with_classifier=same_classes)
        if misfit:
            fitting = [name for name in _own_networks() if _fits(state_dict, name)]
            advice = f"it fits {' and '.join(fitting)}" if fitting else "it fits no network of the zoo"
            raise WeightsError(f"{name} does not fit {cfg['architecture']}: {misfit}; {advice}")
        return renamed

    return checked


def _misfit(state_dict: StateDict, model: nn.Module, with_classifier: bool = False) -> str | None:
    """The first difference between a checkpoint and a network; None if there is none."""
    cfg = _cfg(model)
    other = () if with_classifier or not cfg["classifier"] else (f"{cfg['classifier']}.",)
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items() if not key.startswith(other)}
    given = {key: list(tensor.shape) for key, tensor in state_dict.items() if not key.startswith(other)}
    adapted = f"{get_model_traits(model).get('first_conv')}.weight"  # by timm, to the image's channels
    for key, shape in expected.items():
        if key not in given:
            missing = len(expected.keys() - given.keys())
            return f"{missing} of {len(expected)} tensors are missing, the first is {key}"
        if given[key] != shape and not (key == adapted and given[key] == [shape[0], cfg["input_size"][0], *shape[2:]]):
            return f"{key} has shape {given[key]}, the network's has {shape}"
    surplus = [key for key in given if key not in expected]
    return f"{len(surplus)} tensors have no place, the first is {surplus[0]}" if surplus else None


def _own_networks() -> list[str]:
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("spd_zoo.")]


def _fits(state_dict: StateDict, name: str) -> bool:
    meta = timm.create_model(name, device="meta")
    renamed = sys.modules[type(meta).__module__].checkpoint_filter_fn(state_dict, meta)
    return _misfit(renamed, meta) is None
