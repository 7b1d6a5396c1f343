"""Between a variant and timm: the configurations of the manifest, and a network whose weights were checked."""

import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timm
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from spd_zoo.weights.checkpoint import read_original
from spd_zoo.weights.download import sha256_of
from spd_zoo.weights.fetch import fetch, is_right
from spd_zoo.weights.fit import FilterFn, StateDict, cfg_of, checked_tensors, facts, misfit, own_networks, which_fits
from spd_zoo.weights.manifest import Entry, WeightsError, entries, entries_for_import, find_entry, set_private
from spd_zoo.weights.originals import UNTAGGED, find_imported, sha256_in_name

__all__ = ["build", "create", "default_cfgs", "use_manifest"]

Network = TypeVar("Network", bound=nn.Module)


def default_cfgs(
    group: str, first_conv: str | Callable[[str], str], classifier: str | tuple[str, ...]
) -> dict[str, Any]:
    """timm's configurations of all networks and checkpoints in a group of the manifest.

    `first_conv` and `classifier` name the network's first convolution, or say it for a network's name, and its last
    layer, or a detector's, one for each map.

    A checkpoint counts as pretrained weights for timm, and can be the default, only if its sha256 is known. One that
    says `"default": false` is never meant by the network's name alone.
    """
    cfgs: dict[str, Any] = {}
    for entry in entries_for_import().values():
        if entry.group != group:
            continue
        cfgs[entry.name] = _input_of(entry) | {
            "url": entry.source if entry.verified else None,
            "num_classes": entry.num_classes,
            "label_names": entry.class_names,
            "label_descriptions": entry.class_descriptions,
            "license": entry.license,
            "origin_url": entry.origin_url,
            "first_conv": first_conv if isinstance(first_conv, str) else first_conv(entry.network),
            "classifier": classifier,
        }
    verified = [entry for entry in entries_for_import().values() if entry.name in cfgs and entry.verified]
    with_default = {entry.network for entry in verified if entry.default}
    for entry in verified:
        if entry.network not in with_default and entry.network in cfgs:  # timm's default is the network without weights
            cfgs[f"{entry.network}.*"] = cfgs.pop(entry.network)
    return generate_default_cfgs(cfgs)


def _input_of(entry: Entry) -> dict[str, Any]:
    """What images the network takes, in timm's words."""
    names = ("input_size", "fixed_input_size", "pool_size", "mean", "std", "crop_pct", "interpolation")
    return {name: getattr(entry, name) for name in names}


def use_manifest(path: str | Path | None) -> None:
    """Adds the entries of a private manifest to the package's own, or puts them in their place; None: takes them away.

    The environment variable `SPD_ZOO_MANIFEST=FILE` does the same at import. `spd_zoo/weights/manifest.schema.json`
    describes the format. timm lists the new tags, and the first verified checkpoint of a network is its default.

    Raises:
        WeightsError: If `path` is no valid manifest; then nothing changes.
    """
    set_private(path)
    entrypoints = [timm.model_entrypoint(name) for name in own_networks()]
    for module_name in {entrypoint.__module__ for entrypoint in entrypoints}:
        module: Any = sys.modules[module_name]
        before: dict[str, Any] = {network: cfgs.default for network, cfgs in module.default_cfgs.items()}
        first_convs = {network: cfg.first_conv for network, cfg in before.items()}
        module.default_cfgs = default_cfgs(
            module_name.rpartition(".")[2],
            first_conv=first_convs.__getitem__,
            classifier=next(iter(before.values())).classifier,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's, that a name is registered again
        for entrypoint in entrypoints:
            register_model(entrypoint)


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
        tag = pretrained_cfg
        if overlay.get("file"):
            _check_tag(variant, tag, Path(overlay["file"]))
            described = _described(variant, tag, Path(overlay["file"]), pretrained_filter_fn)
        elif mine := _imported_by_user(variant, tag, cache_dir):
            described = _described(variant, None, mine, pretrained_filter_fn)
            described |= {"file": str(mine), "tag": tag or UNTAGGED}
            pretrained_cfg = None  # the manifest, and so timm, does not know the tag
        else:
            described = {"file": str(fetch(_entry_of(variant, tag), cache_dir))}
        if "num_classes" in described:
            kwargs.setdefault("num_classes", overlay.get("num_classes", described["num_classes"]))
            overlay["num_classes"] = described["num_classes"]
        overlay = described | overlay
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
    except (FileNotFoundError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(
            error
        ):  # torch's, for a broken zip file
            raise
        file = overlay.get("file") or (pretrained_cfg or {}).get("file")
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"timm cannot read the weights in {file} ({reason}); get them again, or convert them once: "
            f"spd-zoo weights import {variant} {file}"
        ) from error


def create(entry: Entry, file: Path) -> nn.Module:
    """The network of a checkpoint with the weights in `file`; also for the networks of timm, which do not know the tag.

    Raises:
        WeightsError: If `file` is not what the manifest pins, or does not fit.
    """
    name = entry.network if entry.group == "timm" else entry.name
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})


def _check_tag(variant: str, tag: str | None, file: Path) -> None:
    """Refuses a file that is given for a tag but is not the one that the manifest pins."""
    entry = find_entry(f"{variant}.{tag}") if tag else None
    if entry is not None and entry.sha256 is not None and file.is_file() and not is_right(entry, file):
        raise WeightsError(
            f"{file} has sha256 {sha256_of(file)}, the weights of {entry.name} have {entry.sha256}: it is truncated, "
            f"changed or another file. Get it again, or load it without the tag, as {variant}"
        )


def _imported_by_user(variant: str, tag: str | None, cache_dir: str | Path | None) -> Path | None:
    """The file that a user imported under a tag of their own, or without one where the network has no default.

    Raises:
        WeightsError: If it is damaged.
    """
    known = find_entry(f"{variant}.{tag}") if tag else _default_tag(variant)
    if known is not None:
        return None
    found = find_imported(f"{variant}.{tag or UNTAGGED}", cache_dir)
    if found is not None and sha256_of(found) != sha256_in_name(found):
        raise WeightsError(f"{found} is damaged, its sha256 is not that of its name; import the weights again")
    return found


def _described(variant: str, tag: str | None, file: Path, filter_fn: FilterFn) -> dict[str, Any]:
    """What timm's configuration must say about a file: its classes, and what images it takes.

    Without a tag that is the network's own input, not that of the default weights.
    """
    entry = find_entry(f"{variant}.{tag}" if tag else variant)
    meta = timm.create_model(f"{variant}.{tag}" if tag else variant, device="meta")
    chans, *size = entry.input_size if entry is not None else cfg_of(meta)["input_size"]
    found = facts(filter_fn(read_original(file), meta), meta, chans)
    described: dict[str, Any] = {}
    if entry is not None:
        if not tag:
            unknown = ("tag", "url", "hf_hub_id", "hf_hub_filename", "license", "origin_url")
            unknown += ("label_names", "label_descriptions")
            described = dict.fromkeys(unknown) | _input_of(entry)
        elif found["num_classes"] != entry.num_classes:
            described = {"label_names": None}
        described["input_size"] = (found["in_chans"], *size)
    return described | {"num_classes": found["num_classes"]}


def _default_tag(variant: str) -> str | None:
    cfg = get_pretrained_cfg(variant)
    return cfg.tag if cfg is not None and cfg.has_weights else None


def _entry_of(variant: str, tag: str | None) -> Entry:
    """The entry of a tag, or of the network's default tag."""
    tag = tag or _default_tag(variant)
    entry = find_entry(f"{variant}.{tag}" if tag else variant)
    tags = [other.name for other in entries().values() if other.network == variant and other.tag]
    if entry is None:
        raise WeightsError(f"there are no weights called {variant}.{tag}; there are: {', '.join(tags) or 'none'}")
    if not tag and not entry.verified and (tags or entry.source):
        raise WeightsError(f"{variant} has no default weights; to be asked for by name: {', '.join(tags) or 'none'}")
    return entry


def _checked(filter_fn: FilterFn, features_only: bool) -> FilterFn:
    """`filter_fn`, and an error if what it returns does not fit the network.

    The classifier may differ where timm leaves the checkpoint's out.
    """

    def checked(state_dict: StateDict, model: nn.Module) -> StateDict:
        cfg = cfg_of(model)
        name = cfg.get("file") or "the checkpoint"
        renamed = filter_fn(checked_tensors(state_dict, name), model)
        same_classes = model.num_classes == cfg["num_classes"] and not features_only
        problem = misfit(renamed, model, with_classifier=same_classes)
        if problem:
            network = cfg["architecture"]
            raise WeightsError(f"{name} does not fit {network}: {problem}; {which_fits(state_dict, network)}")
        return renamed

    return checked
