"""Tables and the figure of `tools/twins.py`: means over seeds and paired differences, with 95 % intervals."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import figures_common
from figures_common import BLUE, GREY, ORANGE, WIDTH, heading
from matplotlib.figure import Figure
from readme_common import table
from scipy.special import stdtrit
from twins_config import ConfigError, find_record, read_configs, read_records

NOT_MEASURED = "not measured yet"
TITLE = "Strided networks and their twins with space-to-depth: every seed, means and 95 % intervals"


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


def tables(configs: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    """The tables of all configs that the recorded runs compare; the titles of the others."""
    measured = [config for config in configs if is_compared(config, records)]
    missing = [config["title"] for config in configs if config not in measured]
    last = [f"{NOT_MEASURED.capitalize()}: {'; '.join(missing)}."] if missing else []
    return "\n\n".join([markdown(config, records) for config in measured] + last)


def is_compared(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> bool:
    """Whether two of its networks have runs."""
    return sum(row["runs"] > 0 for row in summary(config, records)) > 1


def recorded() -> dict[str, Any]:
    """What the published figure draws: the configs and runs in `tools/`."""
    return panels(read_configs(), read_records(figures_common.RECORDS / "twins.jsonl"))


def panels(configs: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the figure draws: each measured config's title and first metric, and the values of its networks."""
    panels = {}
    for config in [config for config in configs if is_compared(config, records)] or configs:
        metric, label = next(iter(config["metrics"].items()))
        rows = [(row["network"], list(row["values"][metric].values())) for row in summary(config, records)]
        panels[config["title"]] = {"label": label, "rows": rows}
    return panels


def draw(panels: dict[str, Any]) -> Figure:
    """A panel per config: a dot per seed, means with 95 % intervals."""
    figure = Figure((WIDTH, 2.2 * len(panels)), layout="constrained")
    grid: Any = figure.subplots(len(panels), squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=True):
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
        axes.set(title=textwrap.fill(title, 44), xlabel=panel["label"])
        axes.grid(axis="x")
        if not any(values for _, values in panel["rows"]):
            axes.set_xticks([])
    heading(figure, "Every seed, and means with 95 % intervals")
    return figure
