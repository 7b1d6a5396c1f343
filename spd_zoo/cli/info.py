"""`spd-zoo info`: a card of a network or a checkpoint, or all that the manifest says about it."""

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from spd_zoo.cli.common import Commands, add_command
from spd_zoo.weights import catalogue
from spd_zoo.weights.families import FAMILIES

__all__ = ["add"]

_METRICS = {"top1": "top-1", "ap": "AP"}
_SHOWN = 3  # checkpoints of a network
_WIDTH = 100


def add(commands: Commands) -> None:
    """Adds the command."""
    command = add_command(commands, "info", _run, "print what is known about a network or its weights", networks=False)
    command.add_argument("model", metavar="MODEL", help="NETWORK or NETWORK.TAG")
    command.add_argument("--all", action="store_true", help="print the whole manifest entry instead of a card")
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(options: argparse.Namespace) -> int:
    described = catalogue.describe(options.model)
    if options.json:
        print(json.dumps(described, indent=2))
    elif options.all:
        _print_tree(described)
    else:
        for title, text in _card(described):
            print(f"{title:<9} {text}")
    return 0


def _card(described: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of the card, each with a title: best weights first, what they are for, figures, how to use them."""
    name, network = described["name"], described["name"].partition(".")[0]
    checkpoints = sorted(described.get("checkpoints", [described] if "." in name else []), key=_rank)
    best = checkpoints[0] if checkpoints else described
    family = next(family for family in FAMILIES.values() if described["group"] in family.groups)
    detects, timms = described["task"] == "detection", described["group"] == "timm"
    trained_part = f"{best['part']} " if best["part"] else ""
    trained = f", {trained_part}trained on {best['dataset']}" if best["dataset"] else ""
    yield "name", f"{name}: {described['task']}, {best['num_classes']:,} {'classes' if detects else 'outputs'}{trained}"
    yield "family", f"{family.title}: {family.text}"
    size = "x".join(map(str, best["input_size"][1:]))
    yield "size", f"{best['params'] / 1e6:.1f} M parameters, {best['macs'] / 1e9:.2f} G MACs at {size} pixels"
    for checkpoint in checkpoints[:_SHOWN]:
        part = f"{checkpoint['part']} only, " if checkpoint["part"] else ""
        yield "weights", f"{checkpoint['name']}: {part}{_figure(checkpoint)}; {_place(checkpoint)}"
    if len(checkpoints) > _SHOWN:
        yield "", f"and {len(checkpoints) - _SHOWN} more"
    if not checkpoints:
        yield "weights", f"none; train it: spd-zoo finetune {network} --data DIR --out RUN"
    elif best["notes"]:
        yield "note", textwrap.shorten(best["notes"], _WIDTH, placeholder=" ...")
    replaced = best["weights"] == "replaced"
    if replaced:
        yield "train", best["train_again"]
    elif checkpoints:
        if best["weights"] == "unverified":
            yield "get", f"spd-zoo weights pull {best['name']}" + ("  (prints FILE)" if timms else "")
        if best["part"]:
            yield "use", f"spd-zoo finetune {best['name']} --data DIR --out RUN"
        else:
            yield "use", f"spd-zoo {'detect' if detects else 'predict'} {best['name']} IMAGES"
            yield "", f'spd_zoo.{"Detector" if detects else "Classifier"}("{best["name"]}")("IMAGE")'
    pretrained = ", pretrained=True" if checkpoints and not replaced else ""
    if timms:  # timm does not know the tag
        pretrained += ', pretrained_cfg_overlay={"file": "FILE"}'
    yield "", f'timm.create_model("{network if timms else best["name"]}"{pretrained})'
    yield "more", f"spd-zoo info {name} --all"


def _rank(checkpoint: dict[str, Any]) -> tuple[bool, bool, bool, float]:
    """The order of checkpoints: those that load at once, whole ones, the default first, then by accuracy."""
    found = _accuracy(checkpoint)
    return (
        checkpoint["weights"] in ("unverified", "replaced"),
        checkpoint["part"] is not None,
        not checkpoint["default"],
        -(found["value"] if found else 0.0),
    )


def _accuracy(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    metric = "ap" if checkpoint["task"] == "detection" and not checkpoint["part"] else "top1"
    return catalogue.accuracy(checkpoint["metrics"], checkpoint["input_size"], metric)


def _place(checkpoint: dict[str, Any]) -> str:
    place = {
        "bundled": "in this package",
        "package": f"in the extra {checkpoint['extra']}",
        "hub": "downloaded when used",
        "unverified": "from its authors, not verified",
        "replaced": f"replaced by {checkpoint['replaced_by']}",
    }[checkpoint["weights"]]
    return f"{place} ({checkpoint['license'] or 'licence unknown'})"


def _figure(checkpoint: dict[str, Any]) -> str:
    found = _accuracy(checkpoint)
    if found is None:
        return "accuracy unknown"
    words = f"{_METRICS[found['metric']]} {found['value']:.2f} % on {found['dataset']} at {found['input_size']} px"
    return f"{words}, measured by {'the authors' if found['measured_by'] == 'authors' else found['measured_by']}"


def _print_tree(fields: dict[str, Any], indent: str = "") -> None:
    """Prints a line per field that has a value; dicts and lists of dicts are indented."""
    for name, value in fields.items():
        label = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict):
            print(label)
            _print_tree(value, f"{indent}  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            for item in value:
                print(label)
                _print_tree(item, f"{indent}  ")
        elif isinstance(value, list | tuple) and value:
            print(label, ", ".join(map(str, value)))
        elif value is not None and not isinstance(value, list | tuple):
            print(label, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value)
