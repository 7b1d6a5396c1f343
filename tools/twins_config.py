"""The configs of `tools/twins.py`, the settings that a run depends on, and the file of finished runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ConfigError", "digest", "find_record", "read_config", "read_configs", "read_records"]

CONFIGS = Path(__file__).with_name("twins")
SPEC = {  # fields of a network in a config; see `twins_run.build`
    "name": str,
    "model": str,
    "weights": str,
    "backbone": str,
    "keep_resolution": int,
    "convert": bool,
    "options": dict,
    "against": str,
}
OF_TABLES = ("name", "against")  # those on which no run depends
FIELDS = {  # fields of a config that every run depends on, with their types
    "title": str,
    "data": str,
    "train_images": int,
    "seeds": int,
    "metrics": dict,
    "networks": list,
    "options": dict,
}
# options of all runs unless the config has others, so that none depends on the machine
SETTINGS = {"bf16": False, "accumulate": 1, "head_epochs": 0, "layer_decay": 1.0}


class ConfigError(ValueError):
    """A config that `tools/twins.py` cannot use."""


def read_config(file: Path) -> dict[str, Any]:
    """A config, checked, under the file's name as `name`.

    Raises:
        ConfigError: If it is not of the form that `tools/twins.py` describes.
    """

    def check(fields: Any, known: Mapping[str, type], required: Sequence[str], where: str) -> None:
        if not isinstance(fields, dict):
            raise ConfigError(f"{where} must hold lines like `name: value`")
        if unknown := fields.keys() - known.keys():
            raise ConfigError(f"{where} has an unknown field {', '.join(map(str, unknown))}; known: {', '.join(known)}")
        if missing := [name for name in required if name not in fields]:
            raise ConfigError(f"{where} lacks {', '.join(missing)}")
        for name, value in fields.items():
            if type(value) is not known[name]:
                raise ConfigError(f"{where}: {name} is {value!r}, not of the type {known[name].__name__}")

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    check(config, FIELDS, [name for name in FIELDS if name != "train_images"], str(file))
    if "batch_size" not in config["options"] or "image_size" not in config["options"]:
        raise ConfigError(f"{file} must give batch_size and image_size, which otherwise depend on the network")
    for network in config["networks"]:
        check(network, SPEC, ("name", "model"), f"{file}, networks")
        if "weights" in network and "backbone" in network:
            raise ConfigError(f"{file}: {network['name']} has weights and a backbone; give one of them")
    names = [network["name"] for network in config["networks"]]
    for i, network in enumerate(config["networks"]):
        if network.get("against", names[0]) not in names[:i] + names[:1]:
            raise ConfigError(f"{file}: {network['name']} is compared with {network['against']}, not one before it")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"{file} must name at least two networks, each by another name, got {', '.join(names)}")
    if config["seeds"] < 1 or not config["metrics"] or config.get("train_images", 1) < 1:
        raise ConfigError(f"{file} needs at least one seed, one metric, and one image")
    given = config["options"].keys() | {name for network in config["networks"] for name in network.get("options", {})}
    if own := {"model", "data", "out", "seed", "pretrained", "workers", "device"} & given:
        raise ConfigError(f"{file}: the tool itself sets the options {', '.join(sorted(own))}")
    if any("bf16" in network.get("options", {}) for network in config["networks"]):
        raise ConfigError(f"{file}: bf16 is an option of all networks, or of none")
    config["options"] = SETTINGS | config["options"]
    return {"name": file.stem, "train_images": 0} | config


def read_configs(folder: Path = CONFIGS) -> list[dict[str, Any]]:
    """All configs of a folder, in the order of their names."""
    return [read_config(file) for file in sorted(folder.glob("*.yaml"))]


def digest(config: dict[str, Any], network: dict[str, Any]) -> str:
    """The digest of all that a run depends on, except its seed; configs with equal settings share runs."""
    begins = {name: value for name, value in network.items() if name not in OF_TABLES}
    parts = [config["data"], config["train_images"], config["options"], begins]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_records(file: Path, fields: Sequence[str] = ("digest", "seed", "metrics")) -> list[dict[str, Any]]:
    """The runs that a file of JSON lines records, each with these fields; none without a file.

    Raises:
        ConfigError: If a line is no JSON, or records something else.
    """
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is no JSON ({error}); remove it to repeat its run") from error
        if not isinstance(record, dict) or not record.keys() >= set(fields):
            raise ConfigError(f"{file}, line {number} records no run with {', '.join(fields)}; give another file")
        records.append(record)
    return records


def find_record(
    records: Sequence[dict[str, Any]], config: dict[str, Any], network: dict[str, Any], seed: int
) -> dict[str, Any] | None:
    """The last record of a run with the settings of the config; None if there is none."""
    wanted = (digest(config, network), seed)
    return next((record for record in reversed(records) if (record["digest"], record["seed"]) == wanted), None)
