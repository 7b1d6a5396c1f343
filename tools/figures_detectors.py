"""Figures of detectors: average precision by size, and two detectors' maps and boxes for a drawn picture."""

import base64
import hashlib
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check_published
import figures_common
import numpy as np
from figures_common import BLUE, GREEN, GREY, PURPLE, RED, WIDTH, heading
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from spd_zoo.weights import entries

SIZES = ("small", "medium", "large")
SIDE, SHOWN = 320, 214  # side of the drawn picture in pixels, and in the figure
STRIDES = (4, 8, 16)  # of the maps that are shown
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


def detectors() -> dict[str, Any]:
    """AP in per cent: our recorded measurements of two detectors, and the authors' figures of others."""
    columns = ("network", "data", "image_size", "pixels", "size", "class", "boxes", "ap")
    theirs = {
        entry.network: {metric["metric"]: metric["value"] for metric in entry.metrics}
        for entry in entries().values()
        if any((metric["dataset"], metric["measured_by"]) == ("COCO val2017", "authors") for metric in entry.metrics)
    }
    return {"ours": check_published.read(figures_common.RECORDS / "detectors.csv", columns), "theirs": theirs}


def draw_detectors(data: dict[str, Any]) -> Figure:
    """AP by size: panels for our measurements, and others for the authors' figures."""
    figure = Figure((WIDTH, 13), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = halves
    (size,) = {row["image_size"] for row in data["ours"]}
    heading(top, f"Measured here: blood cells (BCCD test) at {size} px, one run each")
    panels: Any = top.subplots(3, 1, sharey=True)
    titles = {"": "of all sizes", "image": "by size in the image", "input": "by size in the network's input"}
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
        axes.set_ylabel("AP, %")
    panels[0].set_ylim(0, 100)
    _legend(panels[0], "upper right")

    heading(bottom, "The authors' figures: COCO val2017")
    panels = bottom.subplots(3, 1, sharey=True)
    for axes, title, base, more in (
        (panels[0], "VGG16", "vgg16", "s1l2"),
        (panels[1], "MobileNetV1", "mobilenetv1", "s1l0"),
    ):
        names = (f"ssd_{base}", f"ssd_{base}_{more}", f"ssd_{base}_{more}_dualpath")
        values = [[data["theirs"][name][f"ap_{size}"] for size in SIZES] for name in names]
        labels = ("original", "a stride removed", "and a dual path")
        _bars(axes, SIZES, dict(zip(labels, values, strict=True)), (GREY, BLUE, PURPLE), filled=False)
        axes.set_title(f"SSD-{title}, 300 px")
    yolo = {name: figures for name, figures in data["theirs"].items() if name.startswith("yolov5")}
    bars = {"small objects": [figures["ap_small"] for figures in yolo.values()]}
    bars["all objects"] = [figures["ap"] for figures in yolo.values()]
    _bars(panels[2], [name.removesuffix("_spd") for name in yolo], bars, (BLUE, GREEN), filled=False)
    panels[2].set_title("YOLOv5-SPD, 640 px")
    for axes in panels:
        axes.set_ylabel("AP, %")
    panels[0].set_ylim(0, 60)
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


def _legend(axes: Any, where: str = "upper left") -> None:
    axes.legend(loc=where, fontsize=8, handlelength=1).set_in_layout(False)


def draw_cells() -> Image.Image:
    """A picture like those of BCCD: red cells, a white one, and platelets of 6 to 16 pixels."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    picture = np.full((SIDE, SIDE, 3), (206.0, 213.0, 212.0)) + ((x - y) / SIDE * 6)[..., None]

    def blob(
        at: Sequence[float], size: Sequence[float], colour: Sequence[float], edge: float, strength: float = 1
    ) -> None:
        """Draws an ellipse with a random rotation and a soft edge."""
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
    """A detector's boxes in a picture, and the channel means of its maps, each scaled to 0 to 255."""
    import torch

    from spd_zoo.inference.detector import Detector, prepare

    found = Detector(net, score_threshold=LEAST_SCORE)(picture)
    x, _ = prepare(picture, net, (SIDE, SIDE))
    with torch.inference_mode():
        maps = net.forward_intermediates(x[None], intermediates_only=True)
    levels = {}
    for values in (fmap[0].double().mean(0).numpy() for fmap in maps):
        stride, low, high = SIDE // len(values), values.min(), values.max()
        if stride in STRIDES:
            pixels = ((values - low) / (high - low) * 255).round().astype(np.uint8)
            encoded = base64.b64encode(pixels.tobytes()).decode()
            levels[str(stride)] = {"low": round(float(low), 4), "high": round(float(high), 4), "values": encoded}
    boxes = zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
    return {
        "found": {name: found.names.count(name) for name in found.class_names},
        "boxes": [[name, round(score, 3), *(round(side, 1) for side in box)] for name, score, box in boxes],
        "maps": levels,
    }


def record_activations(run: Path) -> None:
    """Writes `activations.json`: the drawn picture, with maps and boxes of a strided and of the bundled detector."""
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
    text = re.sub(r"\[\s+([^][]*?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)  # one box per line
    (figures_common.RECORDS / "activations.json").write_text(text + "\n", encoding="utf-8")


def activations() -> dict[str, Any]:
    """The recorded picture, with maps and boxes of two detectors."""
    return json.loads((figures_common.RECORDS / "activations.json").read_text(encoding="utf-8"))


def draw_activations(data: dict[str, Any]) -> Figure:
    """Two rows for each detector: the picture with its boxes, and its maps."""
    picture = Image.open(io.BytesIO(base64.b64decode(data["picture"])))
    shown = np.asarray(picture.resize((SHOWN, SHOWN))) // 8 * 8 + 4  # fewer colours: a smaller file
    colours = {"RBC": RED, "WBC": PURPLE, "Platelets": BLUE}
    descriptions = {"yolov8n": "strided, not in the package", "yolov8n_spd": "SPD, in the package"}
    figure = Figure((WIDTH, 11.6), layout="constrained")
    rows = figure.subplots(2 * len(data["networks"]), 2).reshape(len(data["networks"]), 1 + len(STRIDES))
    for axes, (name, record) in zip(rows, data["networks"].items(), strict=True):
        axes[0].imshow(shown, interpolation="none", extent=(0, SIDE, SIDE, 0))
        for label, _, left, top, right, bottom in record["boxes"]:
            sides = (left, top), right - left, bottom - top
            axes[0].add_patch(Rectangle(*sides, fill=False, edgecolor=colours[label], linewidth=1))
        counts = [f"{record['found'][label]} {label}" for label in colours]
        axes[0].set_title(f"boxes: {', '.join(counts)}", fontsize=8)
        axes[0].set_ylabel(f"{name}\n{descriptions[name]}")
        for panel, stride in zip(axes[1:], STRIDES, strict=True):
            side = SIDE // stride
            values = np.frombuffer(base64.b64decode(record["maps"][str(stride)]["values"]), np.uint8)
            panel.imshow(values.reshape(side, side), interpolation="none", cmap="viridis")
            panel.set_title(f"stride {stride}: {side} x {side}")
        for panel in axes:
            panel.set(xticks=[], yticks=[])
    drawn = ", ".join(f"{count} {label}" for label, count in data["drawn"].items())
    heading(
        figure,
        f"A generated picture ({drawn}), the boxes of two detectors with scores above {data['least_score']}, and the "
        "channel means of their maps. We trained both with the same settings on photographs of blood cells (BCCD)",
    )
    return figure
