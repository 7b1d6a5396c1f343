"""Builds networks with timm: turns the manifest's entries into timm's configurations, and verifies weights first."""

import inspect
import pickle
import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
from safetensors import SafetensorError
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spd_zoo.errors import first_line
from spd_zoo.weights.cache import find, is_right, sha256_of, verified_import
from spd_zoo.weights.checkpoint import read_checkpoint, read_described
from spd_zoo.weights.described import check_task, described
from spd_zoo.weights.fetch import fetch
from spd_zoo.weights.fit import (
    FilterFn,
    StateDict,
    backbone_only,
    cfg_of,
    check_finite,
    checked_tensors,
    facts,
    first_conv_name,
    fit_image_channels,
    misfit,
    own_networks,
    own_tensors,
    which_fits,
)
from spd_zoo.weights.imported import UNTAGGED, converted
from spd_zoo.weights.manifest import (
    Entry,
    WeightsError,
    default_checkpoints,
    entries,
    entries_for_import,
    find_entry,
    set_private,
    tags_in_words,
)

__all__ = [
    "BackboneWarning",
    "build",
    "create",
    "default_cfgs",
    "loads_backbone_only",
    "timms_network",
    "use_manifest",
]

_CLASSES = ("label_names", "label_descriptions")  # fields of a configuration that describe the classes
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")  # where timm gets weights
_NOT_OF_WEIGHTS = ("num_classes", "in_chans", "features_only", "out_indices", "feature_cls")

Network = TypeVar("Network", bound=nn.Module)


class BackboneWarning(UserWarning):
    """Pretrained weights without neck and head, which stay random."""


def default_cfgs(group: str, classifier: str | tuple[str, ...]) -> dict[str, Any]:
    """timm's configurations of all networks and checkpoints in a group of the manifest.

    Only a checkpoint with a known SHA-256 counts as pretrained weights for timm, and only such a checkpoint without
    `"default": false` can be the default. `build` adds `first_conv`, which depends on arguments of the network.

    Args:
        group: The group.
        classifier: Name of the last layer; detectors have one per map.

    Returns:
        The configurations by name.
    """
    cfgs: dict[str, Any] = {}
    found = entries_for_import()
    verified = {entry.network for entry in found.values() if entry.verified}
    default = dict.fromkeys(verified) | default_checkpoints(found)
    for entry in found.values():
        if entry.group != group:
            continue
        key = entry.name
        if key == default.get(entry.network):
            key += "*"  # timm's mark of a default
        elif not entry.tag and entry.network in default and default[entry.network] is None:
            key += ".*"  # without a default checkpoint, the plain name means the network without weights
        cfgs[key] = _input_of(entry) | {
            "url": entry.source if entry.verified else None,
            "file": _bundled_file(entry),
            "num_classes": entry.num_classes,
            "label_names": entry.label_names,
            "label_descriptions": entry.label_descriptions,
            "license": entry.license,
            "origin_url": entry.origin_url,
            "classifier": classifier,
        }
    # timm takes the last of several defaults
    return generate_default_cfgs(dict(sorted(cfgs.items(), key=lambda item: item[0].endswith("*"))))


def _bundled_file(entry: Entry) -> str | None:
    """The path of bundled weights, which timm's own functions can read; None for others."""
    bundled = str(entry.source).startswith("bundled:") and entry.derived_from is None
    file = find(entry) if bundled else None
    return None if file is None else str(file)


def _input_of(entry: Entry) -> dict[str, Any]:
    """The input of a network, as fields of timm's configuration."""
    names = ("input_size", "fixed_input_size", "pool_size", "mean", "std", "crop_pct", "interpolation")
    return {name: getattr(entry, name) for name in names}


def use_manifest(path: str | Path | None) -> None:
    """Adds the entries of a private manifest; entries of the same name replace the package's own.

    The environment variable `SPD_ZOO_MANIFEST=FILE` does the same at import. `spd_zoo/weights/manifest.schema.json`
    describes the format. timm lists the new tags, and the first verified checkpoint of a network is its default.

    Args:
        path: The manifest; None removes the entries again.

    Raises:
        WeightsError: If `path` is not a valid manifest; then nothing changes.
    """
    set_private(path)
    entrypoints = [timm.model_entrypoint(name) for name in own_networks()]
    for module_name in {entrypoint.__module__ for entrypoint in entrypoints}:
        module: Any = sys.modules[module_name]
        classifier = next(iter(module.default_cfgs.values())).default.classifier
        module.default_cfgs = default_cfgs(module_name.rpartition(".")[2], classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm warns when a name is registered again
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

    The weights of a tag are fetched and their SHA-256 checked before timm reads them. All tensors except the
    classifier's must fit the network, even if the number of classes changes. With a `file` in
    `pretrained_cfg_overlay`, the number of classes is that of the file unless `num_classes` is set. Weights that are
    only a backbone leave everything else random, with a `BackboneWarning`. `features_only`
    returns every map that the network's `feature_info` describes unless `out_indices` selects some.

    Args:
        cls: The network's class.
        variant: The network's name.
        pretrained: Load weights.
        pretrained_cfg: A tag, or timm's configuration; None: the default.
        pretrained_cfg_overlay: Fields that replace those of the configuration.
        pretrained_filter_fn: Renames a checkpoint's keys to the network's.
        cache_dir: Where to keep downloads (default: the Hugging Face cache).
        **kwargs: Arguments of the network and of timm's function.

    Returns:
        The network.

    Raises:
        TypeError: If the network does not have an argument.
        WeightsError: If the weights do not exist, cannot be downloaded, differ from the manifest's, or do not fit.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    weights = _weights(variant, pretrained, pretrained_cfg, overlay, pretrained_filter_fn, kwargs, cache_dir)
    pretrained_cfg, overlay, read, partial = weights.cfg, weights.overlay, weights.read, weights.partial
    if weights.num_classes is not None:
        kwargs.setdefault("num_classes", weights.num_classes)
    if read is not None:  # timm copies a state dict instead of opening the file; `_checked` adds the tensors
        overlay["state_dict"] = {"": ""}
    feature_cfg: dict[str, Any] = {"flatten_sequential": True}
    first_conv = ""

    def make(**model_args: Any) -> Network:
        nonlocal first_conv
        _refuse_unknown(variant, cls, model_args)
        with _Undrawn() if model_args.get("num_classes") in weights.overwritten else nullcontext():
            net: Any = cls(**model_args)
        first_conv = first_conv_name(net)
        net._traits = {"first_conv": first_conv} | getattr(net, "_traits", {})
        if "out_indices" not in kwargs:  # timm reads `feature_cfg` only after this
            feature_cfg["out_indices"] = tuple(range(len(net.feature_info)))
        return cast("Network", net)

    try:
        built = build_model_with_cfg(
            make,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=_checked(pretrained_filter_fn, kwargs.get("features_only", False), read, partial),
            feature_cfg=feature_cfg,
            cache_dir=cache_dir,
            **kwargs,
        )
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        has_code = re.search("weights.only", str(error), re.IGNORECASE)  # in the advice of torch and timm to run it
        broken = "PytorchStreamReader" in str(error)  # a zip file
        if isinstance(error, WeightsError) or (isinstance(error, RuntimeError) and not (has_code or broken)):
            raise
        merged = _fields_of(pretrained_cfg) | overlay
        source = next((merged[key] for key in ("file", "hf_hub_id", "url") if merged.get(key)), "the checkpoint")
        reason = "it holds more than tensors, or is damaged" if has_code else first_line(error)[:200]
        file = merged.get("file")
        named = file if file and not Path(file).is_dir() else "FILE"  # a folder's file is timm's choice
        raise WeightsError(
            f"timm cannot read the weights in {source} ({reason}); get them again, or convert them once: "
            f"spd-zoo weights import {variant} {named}"
        ) from error
    if read is not None:
        del cfg_of(built)["state_dict"]
    cfg_of(built)["first_conv"] = first_conv
    if partial and not kwargs.get("features_only"):
        warnings.warn(
            f"the weights {variant}.{cfg_of(built)['tag']} are a backbone without neck and head, "
            "which begin at random: fine-tune the network before you use it",
            BackboneWarning,
            stacklevel=2,
        )
    return built


@dataclass(frozen=True)
class _Weights:
    """What timm is told about the weights of a network, and what is known of them before.

    Attributes:
        cfg: A tag, the caller's own configuration, or None: the default.
        overlay: Fields that replace those of the configuration.
        read: The tensors, if they are read already.
        num_classes: The number of classes to build the network with, if the weights decide it.
        overwritten: Numbers of classes with which the weights replace every tensor of the network.
        partial: Whether they are only a backbone.
    """

    cfg: Any
    overlay: dict[str, Any]
    read: StateDict | None = None
    num_classes: int | None = None
    overwritten: tuple[int, ...] = ()
    partial: bool = False


def _weights(
    variant: str,
    pretrained: bool,
    cfg: Any,
    overlay: dict[str, Any],
    filter_fn: FilterFn,
    kwargs: dict[str, Any],
    cache_dir: str | Path | None,
) -> _Weights:
    """Finds the weights that `build` was asked for, and reads those that timm must not read unverified.

    Raises:
        WeightsError: If they do not exist, cannot be downloaded, or differ from the manifest's.
    """
    given = _fields_of(cfg)
    if pretrained and (entry := _entry_of_cfg(variant, given | overlay, cache_dir)):
        cfg, overlay = entry.tag, given | overlay | dict.fromkeys(_SOURCES)
    if not (cfg is None or isinstance(cfg, str)):  # the caller's own source
        return _Weights(cfg, overlay)
    tag = cfg
    overlay = {key: value for key, value in overlay.items() if value or key not in _SOURCES}  # empty: not given
    if any(overlay.get(key) for key in ("url", "hf_hub_id", "state_dict")):
        return _Weights(tag, {"file": None} | overlay)  # timm would prefer the file of the tag
    if not pretrained:
        mine = _imported_by_user(variant, tag, cache_dir) if tag else None
        if mine is None:
            return _Weights(tag, overlay)
        fields = _cfg_of_file(variant, None, mine, *read_described(mine), filter_fn, kwargs)
        return _Weights(None, fields | {"tag": tag} | overlay)  # the structure of their network, without their numbers
    partial = loads_backbone_only(f"{variant}.{tag}" if tag or overlay.get("file") else variant)
    if overlay.get("file"):
        file = Path(overlay["file"])
        _check_tag(variant, tag, file, cache_dir)
        read, about = read_described(file)
        fields = _cfg_of_file(variant, tag, file, read, about, filter_fn, kwargs)
    elif mine := _imported_by_user(variant, tag, cache_dir):
        read, about = read_described(mine)
        fields = _cfg_of_file(variant, None, mine, read, about, filter_fn, kwargs)
        fields |= {"file": str(mine), "tag": tag or UNTAGGED}
        cfg = None  # the manifest, and so timm, does not know the tag
    else:
        entry = _entry_of(variant, tag)
        fetched = fetch(entry, cache_dir)
        read, _ = read_described(fetched)
        overwritten = () if partial else (0, entry.num_classes)
        return _Weights(tag, {"file": str(fetched)} | overlay, read, None, overwritten, partial)
    classes = fields["num_classes"]
    overwritten = () if partial else (0, classes)  # a head that the file lacks keeps its random weights
    built_with = overlay.get("num_classes", classes)
    return _Weights(cfg, fields | overlay | {"num_classes": classes}, read, built_with, overwritten, partial)


def _fields_of(cfg: Any) -> dict[str, Any]:
    """The fields of a configuration that the caller gave; none of a tag."""
    return cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg if isinstance(cfg, dict) else {}


def _refuse_unknown(variant: str, cls: type[nn.Module], model_args: dict[str, Any]) -> None:
    """Refuses arguments that a network does not have, and lists those that it has.

    Raises:
        TypeError: As Python does, with a sentence that names the network instead of a class.
    """
    known: list[str] = []
    for owner in cls.__mro__:  # a class with **kwargs passes them on to the next
        parameters = inspect.signature(owner).parameters.values()
        known += [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    unknown = [name for name in model_args if name not in known]
    if unknown:
        raise TypeError(f"{variant} has no argument {', '.join(unknown)}; it has {', '.join(dict.fromkeys(known))}")


_DRAWS = (
    *(Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_),
)


class _Undrawn(TorchFunctionMode):
    """Skips the random initialisation of tensors, a third of the time of `create_model` before a checkpoint is read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` unless it draws numbers."""
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def create(entry: Entry, file: Path) -> nn.Module:
    """Creates the network of a checkpoint with the weights in a file.

    Args:
        entry: The checkpoint; it may be of one of timm's networks, although timm does not know the tag.
        file: The weights.

    Returns:
        The network.

    Raises:
        WeightsError: If `file` is not the one that the manifest pins, or does not fit.
    """
    if entry.group != "timm":
        return timm.create_model(entry.name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    net: Any = timms_network(entry.network, file)
    net.pretrained_cfg = net.pretrained_cfg | {"tag": entry.tag, "label_names": entry.label_names}
    return cast("nn.Module", net)


def timms_network(name: str, file: Path) -> nn.Module:
    """Creates one of timm's networks with the weights in a file, for as many classes and image channels as these have.

    Args:
        name: The network. With a tag, timm's configuration describes its classes; otherwise nothing does.
        file: The weights, in any form that `read_checkpoint` understands.

    Returns:
        The network.

    Raises:
        WeightsError: If `file` cannot be read, or does not fit.
    """
    tensors = read_checkpoint(file)
    try:
        made_for, tensors = converted(name, tensors, {})
    except WeightsError as error:
        raise WeightsError(f"{file} does not fit {name}: {error}") from error
    net: Any = timm.create_model(name, **made_for)
    net.load_state_dict(tensors)
    input_size = (made_for["in_chans"], *net.pretrained_cfg["input_size"][1:])
    net.pretrained_cfg = net.pretrained_cfg | {"num_classes": net.num_classes, "input_size": input_size}
    if "." not in name:  # timm describes the classes of its default tag
        net.pretrained_cfg = net.pretrained_cfg | {"tag": None, "label_names": None}
    return cast("nn.Module", net)


def _check_tag(variant: str, tag: str | None, file: Path, cache_dir: str | Path | None) -> None:
    """Refuses a file for a tag whose SHA-256 is not the manifest's."""
    entry = find_entry(f"{variant}.{tag}") if tag else None
    if entry is None or entry.sha256 is None or not file.is_file():
        return
    if not is_right(entry, file, cache_dir):
        raise WeightsError(
            f"{file} has sha256 {sha256_of(file)}, the weights of {entry.name} have {entry.sha256}: it is truncated, "
            f"changed or another file. Get it again, or load it without the tag, as {variant}"
        )


def _imported_by_user(variant: str, tag: str | None, cache_dir: str | Path | None) -> Path | None:
    """The file that a user imported under a tag of their own, or without a tag if the network has no default.

    Raises:
        WeightsError: As `verified_import`.
    """
    known = find_entry(f"{variant}.{tag}") if tag else _default_tag(variant)
    if known is not None:
        return None
    return verified_import(f"{variant}.{tag or UNTAGGED}", cache_dir)


def _cfg_of_file(
    variant: str,
    tag: str | None,
    file: Path,
    read: StateDict,
    fields: dict[str, Any],
    filter_fn: FilterFn,
    model_args: dict[str, Any],
) -> dict[str, Any]:
    """The fields of timm's configuration that depend on a file: classes and input.

    Without a tag, the input is the network's own one, not that of the default weights. What a detector's file itself
    says goes before both.
    """
    entry = find_entry(f"{variant}.{tag}" if tag else variant)
    model_args = {name: value for name, value in model_args.items() if name not in _NOT_OF_WEIGHTS} | {"device": "meta"}
    meta = timm.create_model(f"{variant}.{tag}" if tag else variant, **model_args)
    chans, *size = entry.input_size if entry is not None else cfg_of(meta)["input_size"]
    found = facts(own_tensors(read, meta, filter_fn), meta, chans)
    cfg: dict[str, Any] = {}
    if entry is not None:
        if not tag:
            unknown = [*("tag", "url", "hf_hub_id", "hf_hub_filename", "license", "origin_url"), *_CLASSES]
            cfg = dict.fromkeys(unknown) | _input_of(entry)
        elif found["num_classes"] != entry.num_classes:
            cfg = dict.fromkeys(_CLASSES)
        cfg["input_size"] = (found["in_chans"], *size)
    if entry is not None and entry.task == "detection":
        check_task(fields, variant, str(file))
        cfg |= described(fields, meta, found["num_classes"], str(file)).cfg(found["in_chans"])
    return cfg | {"num_classes": found["num_classes"]}


def _default_tag(variant: str) -> str | None:
    cfg = get_pretrained_cfg(variant)
    return cfg.tag if cfg is not None and cfg.has_weights else None


def _entry_of_cfg(variant: str, cfg: dict[str, Any], cache_dir: str | Path | None) -> Entry | None:
    """The entry whose weights a configuration of timm's is about, as `timm.get_pretrained_cfg` returns it."""
    entry = find_entry(f"{variant}.{cfg.get('tag')}") if cfg.get("url") else None
    if entry is None or cfg["url"] != entry.source:
        return None
    if cfg.get("hf_hub_id") or cfg.get("state_dict") or cfg.get("file") not in (None, "", str(find(entry, cache_dir))):
        return None
    return entry


def _entry_of(variant: str, tag: str | None) -> Entry:
    """The entry of a tag, or of the network's default tag."""
    tag = tag or _default_tag(variant)
    entry = find_entry(f"{variant}.{tag}" if tag else variant)
    tags = [other.name for other in entries().values() if other.network == variant and other.tag]
    if entry is None and not tag:
        raise WeightsError(f"there are no weights for {variant}; create it with pretrained=False, and train it")
    if entry is None:
        raise WeightsError(f"there are no weights called {variant}.{tag}; there are: {', '.join(tags) or 'none'}")
    if not tag and not entry.verified and (tags or entry.source):
        raise WeightsError(f"{variant} has no default weights; select some by name: {tags_in_words(variant) or 'none'}")
    return entry


def loads_backbone_only(name: str) -> bool:
    """Whether `pretrained=True` gives this network, with or without a tag, a backbone and a random neck and head."""
    network, _, tag = name.partition(".")
    tag = tag if "." in name else _default_tag(network) or ""
    entry = find_entry(f"{network}.{tag}")
    return entry is not None and entry.part == "backbone"


def _checked(filter_fn: FilterFn, features_only: bool, read: StateDict | None, partial: bool) -> FilterFn:
    """Extends `filter_fn` by an error if its result does not fit the network.

    The classifier may differ if timm drops the checkpoint's one. If a file was already `read`, its tensors replace the
    state dict, because timm would read the file again with another parser. A `partial` checkpoint is a backbone.
    """

    def checked(state_dict: StateDict, model: nn.Module) -> StateDict:
        cfg = cfg_of(model)
        state_dict = state_dict if read is None else read
        name = cfg.get("file") or "the checkpoint"
        tensors = fit_image_channels(own_tensors(checked_tensors(state_dict, name), model, filter_fn), model)
        renamed = backbone_only(tensors, model) if partial else tensors
        same_classes = model.num_classes == cfg["num_classes"] and not features_only
        problem = misfit(renamed, model, with_classifier=same_classes)
        if problem:
            network = cfg["architecture"]
            raise WeightsError(f"{name} does not fit {network}: {problem}; {which_fits(state_dict, network)}")
        check_finite(tensors, name)
        return renamed

    return checked
