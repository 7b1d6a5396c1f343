"""Figures of padded and padding-free, strided and SPD networks: accuracy, size and latency of the twins."""

import json
import re
from collections.abc import Sequence
from typing import Any

import check_published
import figures_common
from figures_common import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, WIDTH, heading
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from spd_zoo.weights import entries

SERIES = {  # part of a network's name: label and colour of its points
    "resnet20": ("ResNet-20", BLUE),
    "resnet110": ("ResNet-110, BSConv", BLUE),
    "wrn40_3": ("WideResNet-40-3", ORANGE),
    "wrn40_8": ("WideResNet-40-8, BSConv", ORANGE),
    "mobilenetv3_large_w1_bsconvs": ("MobileNetV3, BSConv", GREEN),
    "mobilenetv3": ("MobileNetV3", GREEN),
    "parc": ("ParC-MobileNetV2", PURPLE),
    "ghostnet": ("GhostNet", RED),
    "shufflenet": ("ShuffleNetV2", GREY),
    "pyconvhg": ("PyConvHGResNet", ORANGE),
    "pyconv": ("PyConvResNet", BLUE),
}
NAMED = {  # pairs with a visible name, and its position: left, right, above or below
    "cifar_resnet20": "right",
    "cifar_resnet110_bsconvu": "right",
    "cifar_wrn40_3": "left",
    "cifar_wrn40_8_bsconvu": "left",
    "cifar_mobilenetv3_large_w1": "right",
    "cifar_mobilenetv3_large_w1_bsconvs": "above",
    "cifar_parc_mobilenetv2": "right",
    "cifar_ghostnet": "right",
    "cifar_shufflenetv2": "below",
    "pyconvresnet50": "above",
    "pyconvresnet101": "below",
    "pyconvresnet152": "above",
    "pyconvhgresnet50": "right",
    "pyconvhgresnet101": "above",
    "pyconvhgresnet152": "below",
}


def published_pairs(dataset: str) -> list[dict[str, Any]]:
    """Padded and padding-free networks in tables of one source that print both: parameters, MACs, top-1 in per cent."""
    rows = check_published.read(figures_common.RECORDS / "published.csv", list(check_published.COLUMNS))
    costs = check_published.read(figures_common.RECORDS / "complexity.csv", check_published.RECORDED)
    cost = {(row["network"], row["input"], row["classes"]): row for row in costs}

    def point(row: dict[str, str]) -> dict[str, float]:
        found = cost[row["model"], row["input"], row["classes"]]
        return {"params": int(found["params"]), "macs": int(found["macs"]), "top1": float(row["accuracy"].rstrip("%"))}

    pairs = []
    for row in rows:
        if row["dataset"] == dataset and "Orig——" in row["table"]:
            twin = (f"{row['model']}_pfd", row["table"].replace("Orig——", "Ours——"), row["source"])
            (other,) = (r for r in rows if (r["model"], r["table"], r["source"]) == twin)
            pairs.append({"network": row["model"], "tag": "", "ours": False, "twins": [point(row), point(other)]})
    return pairs


def twins() -> dict[str, list[dict[str, Any]]]:
    """The pairs of both types; our test accuracies, and the authors' accuracies at 224 pixels."""
    known = entries()

    def pair(first: str, second: str, dataset: str, who: str) -> dict[str, Any]:
        points = []
        for entry in (known[first], known[second]):
            (top1,) = (
                metric["value"]
                for metric in entry.metrics
                if (metric["dataset"], metric["measured_by"]) == (dataset, who)
                and metric["input_size"] == entry.input_size[1]
            )
            points.append({"params": entry.params, "macs": entry.macs, "top1": top1})
        return {"network": known[first].network, "tag": known[first].tag, "ours": who == "us", "twins": points}

    free = published_pairs("CIFAR-100")
    for entry in known.values():
        other = f"{entry.network}_pfd.{entry.tag}"
        if entry.tag and other in known:
            free.append(pair(entry.name, other, "CIFAR-100 test", "us"))
    spd = [
        pair(entry.derived_from, entry.name, "ImageNet-1k val", "authors")
        for entry in known.values()
        if entry.derived_from
    ]
    return {"padding-free": free, "spd": spd}


def _series(network: str) -> tuple[str, str]:
    return next(series for part, series in SERIES.items() if part in network)


def _span(values: Sequence[float], form: str) -> str:
    """The range of some values, or the only value."""
    return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))


def _more(pairs: Sequence[dict[str, Any]], what: str) -> list[float]:
    """The increase of a quantity from the first twin to the second, in per cent, for each pair."""
    return [100 * (twins[1][what] / twins[0][what] - 1) for twins in (pair["twins"] for pair in pairs)]


def draw_twins(data: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy against parameters and MACs, two panels for each type of twins."""
    free, spd = data["padding-free"], data["spd"]
    gains = {
        ours: [pair["twins"][1]["top1"] - pair["twins"][0]["top1"] for pair in free if pair["ours"] == ours]
        for ours in (True, False)
    }
    heads = (
        f"Padding-free: {_span([-more for more in _more(free, 'macs')], '{:.0f}')} % fewer MACs, top-1 "
        f"{_span(gains[False], '{:+.2f}')} points (authors), {_span(gains[True], '{:+.2f}')} (here, one run each)",
        f"SPD: conversion keeps the outputs, and so the authors' top-1, with "
        f"{_span(_more(spd, 'macs'), '{:.0f}')} % more MACs",
    )
    figure = Figure((WIDTH, 14), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    types = (("CIFAR-100, 32 px", "log", "padded", "padding-free"), ("ImageNet-1k, 224 px", "linear", "strided", "SPD"))
    for row, head, pairs, (data_set, scale, *names) in zip(rows, heads, (free, spd), types, strict=True):
        heading(row, head)
        panels = row.subplots(2, 1, sharey=True)
        for axes, what, label in zip(panels, ("params", "macs"), ("parameters", "MACs for one image"), strict=True):
            for pair in pairs:
                _, colour = _series(pair["network"])
                x, y = ([point[key] for point in pair["twins"]] for key in (what, "top1"))
                axes.plot(x, y, color=colour, linewidth=1.2)
                for i, marker in enumerate("o^"):
                    face = colour if pair["ours"] else "none"
                    axes.plot(x[i], y[i], marker, color=colour, markerfacecolor=face, markersize=6)
                if what == "macs" and pair["network"] in NAMED:
                    _name(axes, pair)
            axes.set(xlabel=label, xscale=scale, ylabel=f"top-1 on {data_set}, %")
            axes.grid()
            axes.xaxis.set_major_formatter(FuncFormatter(_count))
            axes.xaxis.set_minor_formatter(NullFormatter())
        handles = [
            Line2D([], [], color=INK, marker=marker, linestyle="", markerfacecolor="none", label=name)
            for marker, name in zip("o^", names, strict=True)
        ]
        who = [("none", "hollow: the authors' figures"), (INK, "filled: measured here")]
        handles += [
            Line2D([], [], color=INK, marker="s", linestyle="", markerfacecolor=face, label=name)
            for face, name in who[: len({pair["ours"] for pair in pairs})]
        ]
        panels[0].legend(handles=handles, loc="lower right")
    cifar, imagenet = rows
    cifar.axes[0].set(xticks=[3e5, 1e6, 3e6], ylim=(62, 79.8))
    cifar.axes[1].set(xticks=[3e7, 1e8, 3e8, 1e9], xlim=(2.8e7, 1e9))
    imagenet.axes[0].set(xlim=(22e6, 68e6), ylim=(77.5, 81))
    imagenet.axes[1].set(xlim=(3e9, 15.8e9))
    return figure


def _name(axes: Any, pair: dict[str, Any]) -> None:
    """Writes the name of a pair next to its markers."""
    name, colour = _series(pair["network"])
    if depth := re.fullmatch(r"pyconv\D*(\d+)", pair["network"]):
        name = f"{name}-{depth[1]}{' +augment' if pair['tag'].startswith('aug') else ''}"
    if pair["ours"]:
        name += ", measured here"
    side = NAMED[pair["network"]]
    first, last = sorted(pair["twins"], key=lambda point: point["macs"])
    top1 = [point["top1"] for point in pair["twins"]]
    at, shift, align = {
        "left": ((first["macs"], first["top1"]), (-8, -3), "right"),
        "right": ((last["macs"], last["top1"]), (8, -3), "left"),
        "above": ((first["macs"], max(top1)), (-3, 8), "left"),
        "below": ((first["macs"], min(top1)), (-3, -14), "left"),
    }[side]
    text = axes.annotate(name, at, shift, textcoords="offset points", color=colour, ha=align, fontsize=8)
    text.set_in_layout(False)


def _count(value: float, _: object = None) -> str:
    unit, name = (1e9, " G") if value >= 1e9 else (1e6, " M")
    return f"{value / unit:g}{name}"


def latency() -> dict[str, Any]:
    """The recorded times of both runtimes, and the authors' accuracies of the same networks."""
    lines = (figures_common.RECORDS / "latency.jsonl").read_text(encoding="utf-8").splitlines()
    top1 = {pair["network"]: [twin["top1"] for twin in pair["twins"]] for pair in published_pairs("VegFru-292")}
    return {"times": [json.loads(line) for line in lines], "top1": top1}


def draw_latency(data: dict[str, Any]) -> Figure:
    """Padded and padding-free networks: milliseconds in eager PyTorch and in ONNX Runtime, and accuracy."""
    figure = Figure((WIDTH, 7.2), layout="constrained")
    eager, exported, accuracy = panels = figure.subplots(3, 1, sharey=True)
    names = list(dict.fromkeys(row["network"] for row in data["times"]))
    ratios = {}
    (size,) = {row["image_size"] for row in data["times"]}
    for axes, runtime, title in ((eager, "eager", "eager PyTorch"), (exported, "onnx", "ONNX Runtime")):
        rows = {row["network"]: row for row in data["times"] if row["runtime"] == runtime}
        ratios[runtime] = [row["ratio"] for row in rows.values()]
        for y, name in enumerate(names):
            row, (_, colour) = rows[name], _series(name)
            _twins_in_row(axes, y, (row["padded_ms"], row["padding_free_ms"]), colour, colour)
            end = max(row["padded_ms"], row["padding_free_ms"])
            axes.annotate(f"x{row['ratio']:.2f}", (end, y), (8, -3), textcoords="offset points")
        axes.set(xlabel=f"ms for an image of {size} px, one thread", title=f"{title}, measured here", xlim=(0, 30))
    for y, name in enumerate(names):
        _twins_in_row(accuracy, y, data["top1"][name], _series(name)[1], "none")
    accuracy.set(xlabel="top-1, %", title="VegFru-292 (hollow: the authors' figures)")
    eager.set_ylim(len(names) - 0.5, -0.5)
    for axes in panels:
        axes.set_yticks(range(len(names)), [_series(name)[0] for name in names])
        axes.grid(axis="x")
    handles = [
        Line2D([], [], color=INK, marker=marker, linestyle="", label=name)
        for marker, name in (("o", "padded"), ("^", "padding-free"))
    ]
    exported.legend(handles=handles, loc="lower right")
    heading(
        figure,
        f"Padding-free: {_span(ratios['eager'], '{:.2f}')} times the time in eager PyTorch, "
        f"{_span(ratios['onnx'], '{:.2f}')} in ONNX Runtime",
    )
    return figure


def _twins_in_row(axes: Any, y: float, values: Sequence[float], colour: str, face: str) -> None:
    axes.plot(values, (y, y), color=colour, linewidth=1.2)
    for value, marker in zip(values, "o^", strict=True):
        axes.plot(value, y, marker, color=colour, markerfacecolor=face, markersize=6)
