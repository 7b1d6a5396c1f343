"""Sections of `make_readme.py` about measurements, made from what other tools recorded in `tools/`."""

import csv
import statistics
from collections import Counter, defaultdict
from typing import Any

import compare_tiles
import convert_experiment
import convert_report
import twins_report
from readme_common import ROOT, records, table
from twins_config import CONFIGS, read_configs, read_records

from spd_zoo.training.config import GENERAL, FinetuneConfig, load_recipe

_SETTINGS = ("data", "network", "training images", "input")  # columns of a sweep


def speed() -> str:
    """What `tools/benchmark.py --json` printed into `tools/speed.jsonl`."""
    record = [row for row in records("speed.jsonl") if "device" not in row]
    columns = ("ours", "/ plain", "/ plain, same form", "/ resnet50")
    rows = [[f"`{row['network']}`", row["form"], *(f"{row[column]:.2f}" for column in columns)] for row in record]
    settings = {f"batch {row['batch']}, {row['image_size']} px, {row['threads']} threads" for row in record}
    return f"{'; '.join(sorted(settings))}\n\n{table(['network', 'form', 'images/s', *columns[1:]], rows)}"


def gpu_speed() -> str:
    """What `tools/benchmark.py --device cuda --record` added to `tools/speed.jsonl`."""
    record = [row for row in records("speed.jsonl") if "ours" in row and "device" in row]
    if not record:
        return "No GPU has been measured yet."
    columns = ("ours", "/ plain", "/ plain, same form", "/ resnet50", "MiB")
    rows = [
        [
            f"`{row['network']}`",
            row["form"],
            f"{row['batch']} x {row['image_size']} px",
            *(f"{row[column]:.4g}" if column in row else "" for column in columns),
            row["device"],
        ]
        for row in record
    ]
    return table(["network", "form", "batch", "images/s", *columns[1:], "card"], rows)


def latency() -> str:
    """What `tools/latency.py --json` printed into `tools/latency.jsonl`, beside the authors' figures."""
    columns = ("network", "image_size", "runtime", "padded_ms", "padding_free_ms", "ratio")
    rows = [[str(row[column]) for column in columns] for row in records("latency.jsonl")]
    return table(("network", "pixels", "runtime", "padded (ms)", "padding-free (ms)", "ratio"), rows)


def tiles() -> str:
    """What `tools/compare_tiles.py` recorded in `tools/tiles.jsonl`."""
    return compare_tiles.table(records("tiles.jsonl"))


def sweep() -> str:
    """What `tools/finetune_sweep.py` recorded in `tools/finetune_sweep.jsonl` for six epochs."""
    rows = []
    for cells, results in _settings_of_sweep():
        ours, plain = (
            [row for row in results if (row["method"], row["epochs"]) == (name, 6)] for name in ("defaults", "timm")
        )
        tops = ([row["start"] for row in ours], [row["end"] for row in ours], [row["end"] for row in plain])
        if ours:
            rows.append([*cells, *map(_mean, tops), f"{len(ours)}, {len(plain)}"])
    return table((*_SETTINGS, "at the start", "defaults", "timm's recipe", "runs"), rows)


def recipes() -> str:
    """What it recorded for the recipes, beside the default number of epochs."""
    quick, best = (load_recipe(name)["epochs"] for name in GENERAL)
    columns = {"`quick`": ("quick", quick), "defaults": ("defaults", FinetuneConfig.epochs), "`best`": ("best", best)}
    rows = []
    for cells, results in _settings_of_sweep():
        found = [[row for row in results if (row["method"], row["epochs"]) == column] for column in columns.values()]
        if found[0]:
            tops = [[row["start"] for row in found[0]], *([row["end"] for row in runs] for runs in found)]
            rows.append([*cells, *map(_mean, tops), ", ".join(str(len(runs)) for runs in found)])
    return table((*_SETTINGS, "at the start", *columns, "runs"), rows)


def _settings_of_sweep() -> list[tuple[list[str], list[dict[str, Any]]]]:
    """The cells that name a setting, and its results."""
    found = defaultdict(list)
    for row in records("finetune_sweep.jsonl"):
        found[tuple(row[name] for name in ("data", "network", "classes", "images", "pixels"))].append(row)
    return [
        ([str(data), f"`{network}`", f"{classes} x {images}", f"{pixels} px"], results)
        for (data, network, classes, images, pixels), results in sorted(found.items())
    ]


def _mean(values: list[float]) -> str:
    """The mean and, of several values, the half of its 95 % interval."""
    if not values:
        return ""
    half = twins_report.interval(values)
    return f"{statistics.mean(values):.1f}" + ("" if half is None else f" ± {half:.1f}")


def twins() -> str:
    """What `tools/twins.py` recorded in `tools/twins.jsonl`; a figure where anything is compared."""
    configs, record = read_configs(), read_records(ROOT / "tools" / "twins.jsonl")
    compared = any(twins_report.is_compared(config, record) for config in configs)
    figure = f"![{twins_report.TITLE}](figures/seeds.svg)\n\n" if compared else ""
    return figure + twins_report.tables(configs, record)


def imported_twins() -> str:
    """The same for the configs that begin with imported weights."""
    return twins_report.tables(read_configs(CONFIGS / "imported"), read_records(ROOT / "tools" / "twins.jsonl"))


def deploy_latency() -> str:
    """What `tools/latency.py --exported --json` printed into `tools/deploy_latency.jsonl`."""
    columns = ("torch", "onnxruntime", "openvino", "int8")
    rows = [
        [f"`{row['network']}`", str(row["image_size"]), *(f"{row[column]:.2f}" for column in columns)]
        for row in records("deploy_latency.jsonl")
    ]
    return table(("network", "pixels", "torch (ms)", "ONNX Runtime (ms)", "OpenVINO (ms)", "int8 (ms)"), rows)


def faults() -> str:
    """What `tools/fault_report.py --json` printed into `tools/faults.jsonl`."""
    record = records("faults.jsonl")
    results = ("loaded", "error", "refused", "detected", "BAD")
    columns = ("faults", *results)
    rows = [[row["group"], row["entry point"], *(str(row.get(name, 0)) for name in columns)] for row in record]
    sums = [str(sum(row.get(name, 0) for row in record)) for name in columns]
    heads = ("faults", "right network", "clear error", "refused", "all noticed", "anything else")
    return table(("", "entry point", *heads), [*rows, ["sum", "", *sums]])


def linear_probe() -> str:
    """What `tools/linear_probe.py` recorded in `tools/linear_probe.jsonl`, a row for each draw."""
    found: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for row in records("linear_probe.jsonl"):
        found[row["pixels"], row["seed"]] |= {name: value for name, value in row.items() if name in _PROBES}
    rows = [
        [str(seed), f"{pixels} px", *(f"{results[name]:.1f} %" if name in results else "" for name in _PROBES)]
        for (pixels, seed), results in sorted(found.items())
    ]
    return table(("seed", "image size", *_PROBES), rows)


_PROBES = ("fine-tuned", "ridge probe", "logistic probe")


def starts() -> str:
    """What `tools/compare_starts.py --json` printed into `tools/starts.jsonl`."""
    rows = [
        [
            str(row["train_images"]),
            row["start"],
            f"{row['top1']:.2f} % " + ("(one seed)" if row["top1_std"] is None else f"± {row['top1_std']:.2f}"),
            f"{row['macro_f1']:.3f}",
        ]
        for row in records("starts.jsonl")
    ]
    return table(("training images", "network and start", "top-1 on the test boxes", "mean F1"), rows)


def training_speed() -> str:
    """What `tools/benchmark_finetune.py --json` printed into `tools/training_speed.jsonl`."""
    rows = [
        [
            f"`{row['model']}`, {row['image_size']} px, batch {row['batch_size']}, {row['threads']} threads",
            *(f"{row[who][key]:.4g}" for key in ("epochs_per_hour", "MiB") for who in ("ours", "timm")),
            f"{row['epochs_per_hour, ours / timm']:.2f}",
            f"{row['MiB, ours / timm']:.2f}",
        ]
        for row in records("training_speed.jsonl")
    ]
    heads = ("epochs/hour, ours", "timm loop", "MiB, ours", "timm loop", "ratio of speeds", "ratio of memory")
    return table(("", *heads), rows)


def converted_speed() -> str:
    """What `tools/benchmark.py --convert --json` printed into `tools/convert_speed.jsonl`."""
    record = records("convert_speed.jsonl")
    rows = [[f"`{row['network']}`", row["form"], f"{row['/ as it was']:.2f}"] for row in record]
    settings = {f"batch {row['batch']}, {row['image_size']} px, {row['threads']} threads" for row in record}
    head = ("network", "form", "speed, converted / original")
    return f"{'; '.join(sorted(settings))}\n\n{table(head, rows)}"


def conversions() -> str:
    """What `tools/convert_report.py --json` printed into `tools/conversions.jsonl`."""
    record = records("conversions.jsonl")
    compared = [row for row in record if "left_out" not in row]
    rows = []
    for row in compared:
        found = [row[size] for size in convert_report.SIZES if size in row]
        worst = [f"{max(size[what] for size in found):.0e}" for what in ("difference", "folded")]
        sizes = ", ".join("x".join(map(str, size["size"])) for size in found)
        reasons = Counter(what.partition(", ")[2] for what in row["unchanged"])
        unchanged = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "nothing"
        more = [f"{100 * (after / before - 1):.0f} %" for before, after in (row["params"], row["macs"])]
        rows.append(
            [row["module"], f"`{row['network']}`", str(sum(row["replaced"].values())), unchanged, sizes, *worst, *more]
        )
    differences = ("difference, converted", "difference, folded")
    head = ("file", "network", "replaced", "unchanged", "sizes", *differences, "more parameters", "more MACs")
    count = f"{len(compared)} networks of {len({row['module'] for row in compared})} files"
    return f"{count}:\n\n{table(head, rows)}"


def kept_resolution() -> str:
    """What `tools/keep_resolution.py` printed into `tools/keep_resolution.jsonl`."""
    ways = ("as it is", "enlarged", "without the stem's stride")
    rows = [
        [
            f"`{row['network']}`, {row['photos']} photos",
            str(row["pixels"]),
            *(f"{row[f'{way}, top1']:.1f} %, {row[f'{way}, ms']:.0f} ms" for way in ways),
        ]
        for row in records("keep_resolution.jsonl")
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
        for row in records("many_images.jsonl")
    ]
    heads = ("CPU ms per image", "/ plain", "peak memory (MiB)", "/ plain", "images/s", "seconds / plain")
    return table(("images", "", *heads), rows)
