"""Draws the figures of the README and of docs/: `python tools/make_figures.py [--check]`.

They come from the manifest, from what papers print (`published.csv`), what networks cost (`complexity.csv`), what
`tools/latency.py --json` printed (`latency.jsonl`), and what `spd-zoo evaluate` wrote of two detectors
(`detectors.csv`: AP in per cent by class and by COCO's sizes, in pixels of the image or of the network's input, and
how many boxes that is), and of what two detectors see in a drawn picture (`activations.json`). The weights of one of
them are not in the package: `--record-activations RUN` writes that record from the folder of its training run.

A figure's metadata hold the SHA-256 of this script and of the data in it; --check compares that, so that another
version of matplotlib changes nothing. Text is text, and black or white as the reader's colour scheme asks.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import check_published
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from spd_zoo.files import whole
from spd_zoo.weights import entries

ROOT = Path(__file__).parent.parent
RECORDS, FIGURES = ROOT / "tools", ROOT / "docs" / "figures"

INK = "#0b0c0d"  # stands for the colour of text, which the style below sets
STYLE = "svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }"
FONTS = "system-ui, Helvetica, Arial, sans-serif"
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spd_zoo",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = (
    "#2f81d6",
    "#c96a10",
    "#2b9461",
    "#a366d1",
    "#d64f4f",
    "#7d8590",
)  # on any ground
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
NAMED = {  # pairs that have their name beside them, and where: on their left, on their right, above or below them
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
SIZES = ("small", "medium", "large")
SIDE, SHOWN = 320, 214  # pixels of a side of the drawn picture, and of what the figure shows of it
STRIDES = (4, 8, 16)  # of the maps
LEAST_SCORE = 0.25
BUNDLED = "yolov8n_spd.bccd"
PLATELETS = (  # x, y and width
    (52, 150, 16),
    (118, 28, 12),
    (190, 146, 14),
    (300, 120, 10),
    (78, 276, 8),
    (208, 298, 13),
    (150, 196, 9),
    (262, 62, 6),
    (30, 218, 11),
)
WHITE_CELL = (226, 226)
RED_CELLS = (  # x and y
    *((32, 40), (88, 92), (170, 70), (226, 24), (288, 34), (284, 176), (228, 108), (34, 290)),
    *((20, 104), (136, 262), (148, 130), (290, 286), (96, 166), (170, 14), (96, 222)),
)


class Drawing(NamedTuple):
    """A figure: its title, the data that it shows, and what draws them."""

    title: str
    data: Callable[[], Any]
    draw: Callable[[Any], Figure]


def published_pairs(dataset: str) -> list[dict[str, Any]]:
    """Padded and padding-free networks in tables of one source that print both: parameters, MACs, top-1 in per cent."""
    rows = check_published.read(RECORDS / "published.csv", list(check_published.COLUMNS))
    costs = check_published.read(RECORDS / "complexity.csv", check_published.RECORDED)
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
    """The pairs of both kinds; of the measured ones the test accuracy, of the authors' that at 224 pixels."""
    known = entries()

    def pair(one: str, other: str, dataset: str, who: str) -> dict[str, Any]:
        points = []
        for entry in (known[one], known[other]):
            (top1,) = (
                metric["value"]
                for metric in entry.metrics
                if (metric["dataset"], metric["measured_by"]) == (dataset, who)
                and metric["input_size"] == entry.input_size[1]
            )
            points.append({"params": entry.params, "macs": entry.macs, "top1": top1})
        return {"network": known[one].network, "tag": known[one].tag, "ours": who == "us", "twins": points}

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
    """The least and the greatest of some values, or the only one."""
    return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))


def _more(pairs: Sequence[dict[str, Any]], what: str) -> list[float]:
    """By how many per cent the second twins have more of something."""
    return [100 * (twins[1][what] / twins[0][what] - 1) for twins in (pair["twins"] for pair in pairs)]


def draw_twins(data: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy against parameters and MACs, a row of panels for each kind of twins."""
    free, spd = data["padding-free"], data["spd"]
    gains = {
        ours: [pair["twins"][1]["top1"] - pair["twins"][0]["top1"] for pair in free if pair["ours"] == ours]
        for ours in (True, False)
    }
    heads = (
        f"Padding-free: {_span([-more for more in _more(free, 'macs')], '{:.0f}')} % fewer MACs, top-1 "
        f"{_span(gains[False], '{:+.2f}')} points (authors), {_span(gains[True], '{:+.2f}')} (here, one run each)",
        f"SPD: converted weights compute the same, so the authors' top-1 stays, with "
        f"{_span(_more(spd, 'macs'), '{:.0f}')} % more MACs",
    )
    figure = Figure((9, 7.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    kinds = (("CIFAR-100, 32 px", "log", "padded", "padding-free"), ("ImageNet-1k, 224 px", "linear", "strided", "SPD"))
    for part, head, pairs, (data_set, scale, *names) in zip(parts, heads, (free, spd), kinds, strict=True):
        part.suptitle(head, x=0.01, ha="left", weight="bold", fontsize=10)
        panels = part.subplots(1, 2, sharey=True)
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
            axes.set(xlabel=label, xscale=scale)
            axes.grid()
            axes.xaxis.set_major_formatter(FuncFormatter(_count))
            axes.xaxis.set_minor_formatter(NullFormatter())
        panels[0].set_ylabel(f"top-1 on {data_set}, %")
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
    cifar, imagenet = parts
    cifar.axes[0].set(xticks=[3e5, 1e6, 3e6], ylim=(62, 79.8))
    cifar.axes[1].set(xticks=[3e7, 1e8, 3e8, 1e9], xlim=(2.8e7, 1e9))
    imagenet.axes[0].set(xlim=(22e6, 68e6), ylim=(77.5, 81))
    imagenet.axes[1].set(xlim=(3e9, 15.8e9))
    return figure


def _name(axes: Any, pair: dict[str, Any]) -> None:
    """Writes the name of a pair beside its markers."""
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
    """The recorded times of both runtimes, and the accuracies that the authors print for the same networks."""
    lines = (RECORDS / "latency.jsonl").read_text(encoding="utf-8").splitlines()
    top1 = {pair["network"]: [twin["top1"] for twin in pair["twins"]] for pair in published_pairs("VegFru-292")}
    return {"times": [json.loads(line) for line in lines], "top1": top1}


def draw_latency(data: dict[str, Any]) -> Figure:
    """Padded and padding-free networks: milliseconds in eager PyTorch and in ONNX Runtime, and accuracy."""
    figure = Figure((9, 3.4), layout="constrained")
    left, middle, right = panels = figure.subplots(1, 3, sharey=True)
    names = list(dict.fromkeys(row["network"] for row in data["times"]))
    ratios = {}
    (size,) = {row["image_size"] for row in data["times"]}
    for axes, runtime, title in ((left, "eager", "eager PyTorch"), (middle, "onnx", "ONNX Runtime")):
        rows = {row["network"]: row for row in data["times"] if row["runtime"] == runtime}
        ratios[runtime] = [row["ratio"] for row in rows.values()]
        for y, name in enumerate(names):
            row, (_, colour) = rows[name], _series(name)
            _twins_in_row(axes, y, (row["padded_ms"], row["padding_free_ms"]), colour, colour)
            end = max(row["padded_ms"], row["padding_free_ms"])
            axes.annotate(f"x{row['ratio']:.2f}", (end, y), (8, -3), textcoords="offset points")
        axes.set(xlabel=f"ms for an image of {size} px, one thread", title=f"{title}, measured here", xlim=(0, 56))
    for y, name in enumerate(names):
        _twins_in_row(right, y, data["top1"][name], _series(name)[1], "none")
    right.set(xlabel="top-1, %", title="VegFru-292 (hollow: the authors' figures)")
    left.set_yticks(range(len(names)), [_series(name)[0] for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    for axes in panels:
        axes.grid(axis="x")
    handles = [
        Line2D([], [], color=INK, marker=marker, linestyle="", label=name)
        for marker, name in (("o", "padded"), ("^", "padding-free"))
    ]
    middle.legend(handles=handles, loc="lower right")
    figure.suptitle(
        f"Padding-free: {_span(ratios['eager'], '{:.2f}')} times the time in eager PyTorch, "
        f"{_span(ratios['onnx'], '{:.2f}')} in ONNX Runtime",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10,
    )
    return figure


def _twins_in_row(axes: Any, y: float, values: Sequence[float], colour: str, face: str) -> None:
    axes.plot(values, (y, y), color=colour, linewidth=1.2)
    for value, marker in zip(values, "o^", strict=True):
        axes.plot(value, y, marker, color=colour, markerfacecolor=face, markersize=6)


def detectors() -> dict[str, Any]:
    """AP in per cent: of our two detectors as recorded, of others as their authors print it."""
    columns = ("network", "data", "image_size", "pixels", "size", "class", "boxes", "ap")
    theirs = {
        entry.network: {metric["metric"]: metric["value"] for metric in entry.metrics}
        for entry in entries().values()
        if any((metric["dataset"], metric["measured_by"]) == ("COCO val2017", "authors") for metric in entry.metrics)
    }
    return {"ours": check_published.read(RECORDS / "detectors.csv", columns), "theirs": theirs}


def draw_detectors(data: dict[str, Any]) -> Figure:
    """AP by size: a row of panels for those measured here, one for the authors' figures."""
    figure = Figure((9, 6.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    (size,) = {row["image_size"] for row in data["ours"]}
    parts[0].suptitle(
        f"Measured here: blood cells (BCCD test) at {size} px, one run each",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=10,
    )
    panels = parts[0].subplots(1, 3, sharey=True)
    titles = {"": "of all sizes", "image": "by size in the image", "input": "by size as the network sees it"}
    for axes, (pixels, title) in zip(panels, titles.items(), strict=True):
        rows = [row for row in data["ours"] if row["pixels"] == pixels]
        key = "size" if pixels else "class"
        bars: dict[str, list[float]] = {}
        groups: dict[str, str] = {}
        for network in dict.fromkeys(row["network"] for row in rows):
            bars[network] = []
            for group in dict.fromkeys(row[key] for row in rows):
                alike = [row for row in rows if (row["network"], row[key]) == (network, group)]
                bars[network].append(statistics.mean(float(row["ap"]) for row in alike))  # of classes, as COCO does
                counts = [f"{row['class'] if pixels else 'boxes'}: {row['boxes']}" for row in alike]
                groups[group] = "\n".join([group, *counts])
        _bars(axes, list(groups.values()), bars, (GREY, BLUE), filled=True)
        axes.set_title(title)
    panels[0].set(ylabel="AP, %", ylim=(0, 100))
    _legend(panels[0])

    parts[1].suptitle("The authors' figures: COCO val2017", x=0.01, ha="left", weight="bold", fontsize=10)
    panels = parts[1].subplots(1, 3, sharey=True)
    for axes, title, base, more in (
        (panels[0], "VGG16", "vgg16", "s1l2"),
        (panels[1], "MobileNetV1", "mobilenetv1", "s1l0"),
    ):
        names = (f"ssd_{base}", f"ssd_{base}_{more}", f"ssd_{base}_{more}_dualpath")
        values = [[data["theirs"][name][f"ap_{size}"] for size in SIZES] for name in names]
        kinds = ("as it was", "a stride removed", "and a dual path")
        _bars(axes, SIZES, dict(zip(kinds, values, strict=True)), (GREY, BLUE, PURPLE), filled=False)
        axes.set_title(f"SSD-{title}, 300 px")
    yolo = {name: figures for name, figures in data["theirs"].items() if name.startswith("yolov5")}
    bars = {"small objects": [figures["ap_small"] for figures in yolo.values()]}
    bars["all objects"] = [figures["ap"] for figures in yolo.values()]
    _bars(panels[2], [name.removesuffix("_spd") for name in yolo], bars, (BLUE, GREEN), filled=False)
    panels[2].set_title("YOLOv5-SPD, 640 px")
    panels[0].set(ylabel="AP, %", ylim=(0, 60))
    _legend(panels[0])
    _legend(panels[2])
    return figure


def _bars(
    axes: Any, groups: Sequence[str], bars: dict[str, list[float]], colours: Sequence[str], *, filled: bool
) -> None:
    """Groups of bars side by side with their values above them."""
    width = 0.84 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        x = [group + (i - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        face = colours[i] if filled else "none"
        axes.bar(x, values, 0.85 * width, facecolor=face, edgecolor=colours[i], linewidth=1.2, label=name)
        for at, value in zip(x, values, strict=True):
            axes.annotate(f"{value:.1f}", (at, value), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", fontsize=8, handlelength=1).set_in_layout(False)


def draw_cells() -> Image.Image:
    """A picture like those of BCCD: red cells, a white one, and platelets of 6 to 16 pixels."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    picture = np.full((SIDE, SIDE, 3), (206.0, 213.0, 212.0)) + ((x - y) / SIDE * 6)[..., None]

    def blob(
        at: Sequence[float], size: Sequence[float], colour: Sequence[float], edge: float, strength: float = 1
    ) -> None:
        """An ellipse somehow turned, with a soft edge."""
        angle = rng.uniform(0, np.pi)
        right, down = x - at[0], y - at[1]
        across = (right * np.cos(angle) + down * np.sin(angle)) / size[0] * 2
        along = (down * np.cos(angle) - right * np.sin(angle)) / size[1] * 2
        inside = (1 - np.hypot(across, along)) * min(size) / 2
        share = strength * np.clip(inside / edge + 0.5, 0, 1)[..., None]
        picture[:] = picture * (1 - share) + np.array(colour) * share

    for cell in RED_CELLS:
        width, height = map(float, rng.uniform(45, 56, 2))
        shade = rng.uniform(-10, 10)
        blob(cell, (width, height), (186 + shade, 140 + shade, 130 + shade), 2.5)
        blob(cell, (0.86 * width, 0.86 * height), (196 + shade, 152 + shade, 143 + shade), 6)
        if rng.random() < 0.5:
            blob(cell, (width / 2, height / 2), (212, 196, 194), 12, 0.7)
    left, top = WHITE_CELL
    blob(WHITE_CELL, (84, 78), (186, 150, 214), 6)
    for to_right, to_bottom in ((-15, -12), (14, -14), (17, 12), (-8, 16)):
        blob((left + to_right, top + to_bottom), (38, 30), (88, 58, 196), 4)
    for *at, width in PLATELETS:
        blob(at, (width, width * rng.uniform(0.8, 1)), (132, 122, 208), 3, 0.95)
        blob(at, (width / 2, width / 2), (104, 84, 198), 3, 0.8)
    picture += rng.normal(0, 2, picture.shape)
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


def seen(net: Any, picture: Image.Image) -> dict[str, Any]:
    """What a detector finds in a picture, and the mean over the channels of its maps, each from 0 to 255."""
    import torch

    from spd_zoo.inference.detector import Detector, prepare

    found = Detector(net, score_threshold=LEAST_SCORE)(picture)
    x, _ = prepare(picture, net, (SIDE, SIDE))
    with torch.inference_mode():
        maps = net.forward_intermediates(x[None], intermediates_only=True)
    levels = {}
    for values in (one[0].double().mean(0).numpy() for one in maps):
        stride, low, high = SIDE // len(values), values.min(), values.max()
        if stride in STRIDES:
            pixels = ((values - low) / (high - low) * 255).round().astype(np.uint8)
            whole = base64.b64encode(pixels.tobytes()).decode()
            levels[str(stride)] = {"low": round(float(low), 4), "high": round(float(high), 4), "values": whole}
    boxes = zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
    return {
        "found": {name: found.names.count(name) for name in found.class_names},
        "boxes": [[name, round(score, 3), *(round(side, 1) for side in box)] for name, score, box in boxes],
        "maps": levels,
    }


def record_activations(run: Path) -> None:
    """Writes `activations.json`: the drawn picture, and what a strided detector and the bundled SPD one see in it."""
    from spd_zoo.weights.load import load_network

    buffer = io.BytesIO()
    draw_cells().save(buffer, "JPEG", quality=85)
    picture = Image.open(buffer)
    weights = {"yolov8n": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()}
    weights["yolov8n_spd"] = str(entries()[BUNDLED].sha256)
    record = {
        "picture": base64.b64encode(buffer.getvalue()).decode(),
        "drawn": {"RBC": len(RED_CELLS), "WBC": 1, "Platelets": len(PLATELETS)},
        "least_score": LEAST_SCORE,
        "networks": {
            name: {"weights_sha256": sha256, **seen(load_network(model, "cpu"), picture)}
            for (name, sha256), model in zip(weights.items(), (str(run), BUNDLED), strict=True)
        },
    }
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[\s+([^][]*?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)  # a box in a line
    (RECORDS / "activations.json").write_text(text + "\n", encoding="utf-8")


def activations() -> dict[str, Any]:
    """The recorded picture, and what two detectors see in it."""
    return json.loads((RECORDS / "activations.json").read_text(encoding="utf-8"))


def draw_activations(data: dict[str, Any]) -> Figure:
    """A row for each detector: the picture with what it finds, and its maps."""
    picture = Image.open(io.BytesIO(base64.b64decode(data["picture"])))
    shown = np.asarray(picture.resize((SHOWN, SHOWN))) // 8 * 8 + 4  # fewer colours: a smaller file
    colours = {"RBC": RED, "WBC": PURPLE, "Platelets": BLUE}
    kinds = {"yolov8n": "strided, not in the package", "yolov8n_spd": "SPD, in the package"}
    figure = Figure((9, 5.2), layout="constrained")
    rows = figure.subplots(len(data["networks"]), 1 + len(STRIDES))
    for axes, (name, sight) in zip(rows, data["networks"].items(), strict=True):
        axes[0].imshow(shown, interpolation="none", extent=(0, SIDE, SIDE, 0))
        for kind, _, left, top, right, bottom in sight["boxes"]:
            sides = (left, top), right - left, bottom - top
            axes[0].add_patch(Rectangle(*sides, fill=False, edgecolor=colours[kind], linewidth=1))
        counts = [f"{sight['found'][kind]} {kind}" for kind in colours]
        axes[0].set_title(f"boxes: {', '.join(counts)}", fontsize=8)
        axes[0].set_ylabel(f"{name}\n{kinds[name]}")
        for panel, stride in zip(axes[1:], STRIDES, strict=True):
            side = SIDE // stride
            values = np.frombuffer(base64.b64decode(sight["maps"][str(stride)]["values"]), np.uint8)
            panel.imshow(values.reshape(side, side), interpolation="none", cmap="viridis")
            panel.set_title(f"stride {stride}: {side} x {side}")
        for panel in axes:
            panel.set(xticks=[], yticks=[])
    drawn = ", ".join(f"{count} {kind}" for kind, count in data["drawn"].items())
    figure.suptitle(
        f"A picture drawn by a program ({drawn}), what two detectors find with a score above "
        f"{data['least_score']},\nand their maps, as the mean of the channels. Both were trained alike here, on "
        "photographs of blood cells (BCCD)",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=9,
    )
    return figure


DRAWINGS = {
    "twins": Drawing(
        "Accuracy against parameters and multiply-accumulates of networks and their padding-free or SPD twins",
        twins,
        draw_twins,
    ),
    "latency": Drawing("Latency and accuracy of padded and padding-free networks", latency, draw_latency),
    "detectors": Drawing("Average precision of detectors by the size of objects", detectors, draw_detectors),
    "activations": Drawing(
        "Mean activations of yolov8n and yolov8n_spd at strides 4, 8 and 16, for one drawn picture of blood cells",
        activations,
        draw_activations,
    ),
}


def digest(drawing: Drawing) -> str:
    """The SHA-256 of what a figure is made from: its data and this script."""
    script = Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256((json.dumps(drawing.data(), sort_keys=True) + script).encode()).hexdigest()


def render(drawing: Drawing) -> str:
    """The figure as SVG without a background."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.draw(drawing.data()).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("'DejaVu Sans'", FONTS)
    head = (
        f"<title>{escape(drawing.title)}</title>\n <metadata>sha256 of data and script: {digest(drawing)}</metadata>\n"
        f" <style>{STYLE}</style>"
    )
    text, count = re.subn(r"<svg\b[^>]*>", lambda tag: f'{tag[0][:-1]} role="img">\n {head}', text, count=1)
    assert count == 1
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures, or with --check says which are not current; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing, exit 1 if a figure is not current")
    what.add_argument(
        "--record-activations",
        type=Path,
        metavar="RUN",
        help="first write tools/activations.json: RUN is the folder of a yolov8n trained as yolov8n_spd.bccd was",
    )
    options = parser.parse_args(argv)
    if options.record_activations:
        try:
            record_activations(options.record_activations)
        except (OSError, ValueError) as error:
            print(f"tools/activations.json cannot be written: {error}", file=sys.stderr)
            return 1
    stale = False
    for name, drawing in DRAWINGS.items():
        file = FIGURES / f"{name}.svg"
        try:
            if not options.check:
                FIGURES.mkdir(exist_ok=True)
                with whole(file) as temporary:
                    temporary.write_text(render(drawing), encoding="utf-8")
            elif not file.exists() or digest(drawing) not in file.read_text(encoding="utf-8"):
                stale = True
                print(f"docs/figures/{file.name} is not current: run python tools/make_figures.py", file=sys.stderr)
        except (OSError, ValueError) as error:
            print(f"docs/figures/{file.name} cannot be drawn: {error}", file=sys.stderr)
            return 1
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
