"""Tables and the figure of `tools/twins.py`: means over seeds and paired differences, with 95 % intervals."""

import hashlib
import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import figures_common
import yaml
from figures_common import BLUE, GREY, ORANGE
from matplotlib.figure import Figure
from readme_common import table
from scipy.special import stdtrit

CONFIGS = Path(__file__).with_name("twins")
NOT_MEASURED = "not measured yet"
TITLE = "Strided networks and their twins with space-to-depth: every seed, means and 95 % intervals"
SPEC = {  # fields of a network in a config; see `twins.build`
    "name": str,
    "model": str,
    "weights": str,
    "backbone": str,
    "keep_resolution": int,
    "convert": bool,
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
    if own := {"model", "data", "out", "seed", "pretrained", "workers", "device"} & config["options"].keys():
        raise ConfigError(f"{file}: the tool itself sets the options {', '.join(sorted(own))}")
    config["options"] = SETTINGS | config["options"]
    return {"name": file.stem, "train_images": 0} | config


def configs(folder: Path = CONFIGS) -> list[dict[str, Any]]:
    """All configs of a folder, in the order of their names."""
    return [read_config(file) for file in sorted(folder.glob("*.yaml"))]


def digest(config: dict[str, Any], network: dict[str, Any]) -> str:
    """The digest of all that a run depends on, except its seed; configs with equal settings share runs."""
    begins = {name: value for name, value in network.items() if name not in OF_TABLES}
    parts = [config["data"], config["train_images"], config["options"], begins]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_records(file: Path) -> list[dict[str, Any]]:
    """The runs that a file of JSON lines records; none without a file.

    Raises:
        ConfigError: If a line is no JSON.
    """
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is no JSON ({error}); remove it to repeat its run") from error
    return records


def find_record(
    records: Sequence[dict[str, Any]], config: dict[str, Any], network: dict[str, Any], seed: int
) -> dict[str, Any] | None:
    """The record of a run with the settings of the config; None if there is none."""
    wanted = (digest(config, network), seed)
    return next((record for record in records if (record["digest"], record["seed"]) == wanted), None)


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean, by Student's t; None for less than two values."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    return float(stdtrit(len(values) - 1, 0.975)) * error


def summary(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per network: for each metric its `values`, and the `differences` to the one it is compared with, by seed.

    Args:
        config: A config.
        records: Recorded runs, of any config.

    Returns:
        The rows, also with the median `ms` per image and `runs`, the number of recorded runs.

    Raises:
        ConfigError: If runs saw different images.
    """
    rows: list[dict[str, Any]] = []
    images = set()
    for network in config["networks"]:
        found = {seed: find_record(records, config, network, seed) for seed in range(config["seeds"])}
        runs = {seed: record for seed, record in found.items() if record is not None}
        images |= {(record["data"], record["split"], record["images"]) for record in runs.values()}
        values: dict[str, dict[int, float]] = {}
        for metric in config["metrics"]:
            if any(metric not in record["metrics"] for record in runs.values()):
                raise ConfigError(f"the recorded runs of {config['name']} have no metric {metric}")
            measured = {seed: record["metrics"][metric] for seed, record in runs.items()}
            values[metric] = {seed: value for seed, value in measured.items() if value is not None}
        against = network.get("against", config["networks"][0]["name"]) if rows else ""
        other: dict[str, dict[int, float]] = next((row["values"] for row in rows if row["network"] == against), {})
        differences = {
            metric: {seed: value - other[metric][seed] for seed, value in of.items() if seed in other[metric]}
            for metric, of in values.items()
            if other
        }
        times = [record["ms_per_image"] for record in runs.values()]
        rows.append(
            {
                "network": network["name"],
                "against": against,
                "runs": len(runs),
                "values": values,
                "differences": differences,
                "ms": statistics.median(times) if times else None,
            }
        )
    if len(images) > 1:
        raise ConfigError(f"the recorded runs of {config['name']} have other images: {sorted(images)}; repeat some")
    return rows


def _mean(values: Mapping[int, float], runs: int, form: str) -> str:
    """A mean with its interval; a metric may not exist, such as AP of small objects where there are none."""
    if not values:
        return "none" if runs else NOT_MEASURED
    found = list(values.values())
    half = interval(found)
    return f"{statistics.mean(found):{form}} " + (f"± {half:.2f}" if half is not None else "(one seed)")


def markdown(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The table of a config; what is not measured says so."""
    lines = []
    for row in summary(config, records):
        line = [row["network"], f"{row['runs']} of {config['seeds']}"]
        for metric in config["metrics"]:
            cell = _mean(row["values"][metric], row["runs"], ".2f")
            if row["differences"].get(metric):
                cell += f"; {_mean(row['differences'][metric], 0, '+.2f')} to {row['against']}"
            line.append(cell)
        lines.append([*line, NOT_MEASURED if row["ms"] is None else f"{row['ms']:.2f}"])
    return f"{config['title']}:\n\n{table(('', 'runs', *config['metrics'].values(), 'ms per image'), lines)}"


def recorded() -> dict[str, Any]:
    """What the published figure draws: the configs and runs in `tools/`."""
    return panels(configs(), read_records(figures_common.RECORDS / "twins.jsonl"))


def panels(configs: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the figure draws: each config's title and first metric, and the values of its networks."""
    panels = {}
    for config in configs:
        metric, label = next(iter(config["metrics"].items()))
        rows = [(row["network"], list(row["values"][metric].values())) for row in summary(config, records)]
        panels[config["title"]] = {"label": label, "rows": rows}
    return panels


def draw(panels: dict[str, Any]) -> Figure:
    """A panel per config: a dot per seed, means with 95 % intervals."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((9, 2.6 * lines), layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        for y, (_, values) in enumerate(panel["rows"]):
            colour = BLUE if y == 0 else ORANGE
            if not values:
                across = axes.get_yaxis_transform()
                axes.text(0.5, y, NOT_MEASURED, color=GREY, ha="center", va="center", transform=across)
                continue
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.5, markersize=4)
            half = interval(values)
            axes.errorbar(
                statistics.mean(values), y - 0.2, xerr=half or 0, fmt="D", color=colour, markersize=5, capsize=3
            )
        names = [name for name, _ in panel["rows"]]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(title=textwrap.fill(title, 40), xlabel=panel["label"])
        axes.grid(axis="x")
        if not any(values for _, values in panel["rows"]):
            axes.set_xticks([])
    figure.suptitle("Every seed, and means with 95 % intervals", x=0.01, ha="left", weight="bold", fontsize=10)
    return figure
