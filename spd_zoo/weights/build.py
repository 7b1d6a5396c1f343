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

from spd_zoo.weights.fetch import WeightsError, fetch, sha256_of
from spd_zoo.weights.manifest import Entry, entries, find_entry

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


def default_cfgs(
    group: str, first_conv: str | Callable[[str], str], classifier: str | tuple[str, ...]
) -> dict[str, Any]:
    """timm's configurations of all networks and checkpoints in a group of the manifest.

    `first_conv` and `classifier` name the network's first convolution, or say it for a network's name, and its last
    layer, or a detector's, one for each map.

    A checkpoint counts as pretrained weights for timm, and can be the default, only if its sha256 is known.
    """
    cfgs: dict[str, Any] = {}
    for entry in entries().values():
        if entry.group != group:
            continue
        cfgs[entry.name] = _input_of(entry) | {
            "url": entry.source if entry.verified else None,
            "num_classes": entry.num_classes,
            "label_names": entry.class_names,
            "license": entry.license,
            "origin_url": entry.origin_url,
            "first_conv": first_conv if isinstance(first_conv, str) else first_conv(entry.network),
            "classifier": classifier,
        }
    return generate_default_cfgs(cfgs)


def _input_of(entry: Entry) -> dict[str, Any]:
    """What images the network takes, in timm's words."""
    names = ("input_size", "fixed_input_size", "pool_size", "mean", "std", "crop_pct", "interpolation")
    return {name: getattr(entry, name) for name in names}


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
            _check_tag(variant, pretrained_cfg, Path(overlay["file"]))
            facts = _facts_about(variant, pretrained_cfg, overlay["file"], pretrained_filter_fn)
            kwargs.setdefault("num_classes", overlay.get("num_classes", facts["num_classes"]))
            overlay = facts | overlay | {"num_classes": facts["num_classes"]}
        else:
            overlay["file"] = str(_fetch_tag(variant, pretrained_cfg, cache_dir))
    try:
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
    except (FileNotFoundError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        file = overlay.get("file") or (pretrained_cfg or {}).get("file")
        raise WeightsError(f"cannot read the weights in {file} ({_first_line(error)}); get them again") from error


def _check_tag(variant: str, tag: str | None, file: Path) -> None:
    """Refuses a file that is given for a tag but is not the one that the manifest pins."""
    entry = find_entry(f"{variant}.{tag}") if tag else None
    if entry is not None and entry.sha256 is not None and file.is_file():
        actual = sha256_of(file)
        if actual != entry.sha256:
            raise WeightsError(
                f"{file} has sha256 {actual}, the weights of {entry.name} have {entry.sha256}: it is truncated, "
                f"changed or another file. Get it again, or load it without the tag, as {variant}"
            )


def _facts_about(variant: str, tag: str | None, file: str | Path, filter_fn: FilterFn) -> dict[str, Any]:
    """What timm's configuration must say about a checkpoint of the caller's: its classes, and what images it takes.

    Without a tag that is the network's own input, not that of the default weights.
    """
    meta = timm.create_model(f"{variant}.{tag}" if tag else variant, device="meta")
    state_dict = filter_fn(_read(file), meta)
    classifier, stem = (state_dict.get(f"{name}.weight") for name in (_classifiers(meta)[0], _cfg(meta)["first_conv"]))
    facts: dict[str, Any] = {"num_classes": _num_classes(classifier, meta)}
    entry = find_entry(f"{variant}.{tag}" if tag else variant)
    if entry is None:
        return facts
    own = meta.get_submodule(_cfg(meta)["first_conv"]).weight
    chans = entry.input_size[0]
    if isinstance(own, Tensor) and stem is not None and stem.ndim == 4:
        chans = stem.shape[1] * entry.input_size[0] // own.shape[1]
    facts["input_size"] = (chans, *entry.input_size[1:])
    if not tag:
        unknown = dict.fromkeys(("tag", "url", "hf_hub_id", "hf_hub_filename", "license", "origin_url"))
        facts |= unknown | {"label_names": None} | _input_of(entry) | {"input_size": facts["input_size"]}
    elif facts["num_classes"] != entry.num_classes:
        facts["label_names"] = None
    return facts


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that depend on the number of classes; empty if there are none."""
    names = _cfg(model)["classifier"] or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _num_classes(weight: Tensor | None, model: nn.Module) -> int:
    """How many classes a checkpoint of a network like `model` tells apart, by its first classifier's weight, if any."""
    of_outputs: Callable[[int], int] | None = getattr(model, "num_classes_of", None)  # detectors' layers say more
    if of_outputs is None:
        return 0 if weight is None else weight.shape[:1].numel()
    return cast("int", model.num_classes) if weight is None else of_outputs(weight.shape[:1].numel())


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
    file = fetch(entry, cache_dir)
    if entry.sha256 is None:
        _read(file)
    return file


def _read(file: str | Path) -> StateDict:
    """The tensors of a checkpoint, read by timm; nothing in it is executed."""
    if not Path(file).is_file():
        raise WeightsError(f"{file} does not exist or is no file; give the path of a checkpoint file")
    try:
        state_dict = load_state_dict(str(file))
    except _UNREADABLE as error:
        raise WeightsError(
            f"{file} is no checkpoint that can be read safely ({_first_line(error)}); it must be a file of tensors: "
            "NAME.safetensors, or one of torch.save's. Get it again, or convert it where you trust it"
        ) from error
    return _tensors(state_dict, str(file))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _tensors(state_dict: StateDict, name: str) -> StateDict:
    """`state_dict`, if it is what its type says."""
    if not state_dict or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise WeightsError(f"{name} holds no network weights: neither a dict of tensors, nor one under 'state_dict'")
    return state_dict


def _cfg(model: nn.Module) -> dict[str, Any]:
    return cast("dict[str, Any]", model.pretrained_cfg)


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
    other = () if with_classifier else tuple(f"{name}." for name in _classifiers(model))
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
