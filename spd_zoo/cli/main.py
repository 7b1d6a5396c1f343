"""The command `spd-zoo`: parse, call one function, print."""

import argparse
import dataclasses
import fnmatch
import importlib
import io
import json
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from tqdm import tqdm

from spd_zoo import __version__
from spd_zoo.convert import ConversionError, convert_checkpoint
from spd_zoo.data.reading import find_images
from spd_zoo.demo import serve
from spd_zoo.inference.classifier import Answer, predict
from spd_zoo.inference.detector import Detector, as_coco, detect
from spd_zoo.weights import (
    Entry,
    WeightsError,
    entries,
    fetch,
    find,
    import_weights,
    imported_names,
    is_right,
    origin_of,
    original_of,
    remove,
)
from spd_zoo.weights.load import ModelError, timm_name
from spd_zoo.weights.publish import checkout_manifest, describe, prepare, publish

__all__ = ["main"]


Run = Callable[[argparse.Namespace], int]


class CommandError(Exception):
    """A command that cannot be carried out; the message is one sentence for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `spd-zoo`; returns its exit status: 0, 1 after an error, 128 + N after the signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        options = _parser("finetune" in arguments[:1]).parse_args(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stopped:
        if str(stopped):  # training that was asked to stop has saved its state
            _complain(f"{stopped}; it is saved, and the same command goes on from there")
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except (CommandError, ConversionError, ModelError, WeightsError, OSError) as error:
        _complain(str(error))
        return 1


def _complain(text: str) -> None:
    tqdm.write(f"spd-zoo: error: {text}", file=sys.stderr)


def _parser(finetune_options: bool) -> argparse.ArgumentParser:
    """The parser; `finetune_options` are left out where not needed, because they load the training code."""
    parser = argparse.ArgumentParser("spd-zoo", description="Networks for low-resolution images and small objects.")
    parser.add_argument("--version", action="version", version=f"spd-zoo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Run | None, text: str, to: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = to.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    command = add("list", _list, "list the networks and their weights")
    command.add_argument("filters", metavar="FILTER", nargs="*", help="name with wildcards, for example 'pyconv*_spd'")
    command.add_argument("--pretrained", action="store_true", help="only verified weights")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("info", _info, "print all that is known about a network or its weights")
    command.add_argument("model", metavar="MODEL", help="network, with or without a tag")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("predict", _predict, "name what images show")
    command.add_argument("model", metavar="MODEL", help="network, with or without a tag, or the folder of a run")
    command.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders or globs")
    command.add_argument("--top-k", type=_positive, default=5, metavar="K", help="classes per image (default: 5)")
    command.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="images at once (default: 32)")
    command.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_many_options(command)

    command = add("detect", _detect, "find objects in images")
    command.add_argument("model", metavar="MODEL", help="detector, with or without a tag, or the folder of a run")
    command.add_argument("images", metavar="IMAGES", nargs="*", help="image files, folders or globs")
    command.add_argument("--out", type=Path, metavar="DIR", help="new folder for marked images and detections.json")
    command.add_argument("--score", type=float, default=0.25, metavar="X", help="least score (default: 0.25)")
    command.add_argument("--iou", type=float, metavar="X", help="overlap of boxes of a class (default: the authors')")
    command.add_argument("--image-size", type=_positive, metavar="N", help="pixels (default: the network's)")
    command.add_argument("--tile", type=_positive, metavar="N", help="look at large images in squares of N pixels, too")
    command.add_argument("--overlap", type=float, default=0.2, metavar="X", help="share of a tile (default: 0.2)")
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at once (default: 8)")
    command.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    command.add_argument("--json", action="store_true", help="print JSON, as in detections.json")
    _add_many_options(command)

    command = add("convert", _convert, "make a network without strides and poolings that predicts exactly the same")
    command.add_argument(
        "model", metavar="MODEL", help="network of this zoo or of timm, with or without a tag; a folder"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, for predict and finetune")
    command.add_argument("--include", nargs="+", metavar="PATTERN", help="only these modules, for example 'layer4.*'")
    command.add_argument("--exclude", nargs="+", metavar="PATTERN", default=[], help="not these modules")

    weights = add("weights", None, "see, get, import, check, delete and publish weights").add_subparsers(
        required=True, metavar="COMMAND"
    )
    command = add("list", _weights_list, "list all weights and where they are", weights)
    command.add_argument("filters", metavar="FILTER", nargs="*", help="name with wildcards, for example '*.in1k'")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = add("pull", _weights_pull, "download weights, convert the authors' ones, and check them", weights)
    command.add_argument("names", metavar="MODEL.TAG", nargs="+", help="as `spd-zoo weights list` shows them")
    command = add("import", _weights_import, "convert a checkpoint, check it, and keep it for pretrained=True", weights)
    command.add_argument("name", metavar="MODEL[.TAG]", help="what it is, or a tag of your own")
    command.add_argument("file", metavar="FILE|URL", help="a checkpoint in any usual form; nothing in it is run")
    command = add("verify", _weights_verify, "compute the SHA-256 of all weights on this machine again", weights)
    command.add_argument("filters", metavar="FILTER", nargs="*", help="only these, for example '*.in1k'")
    command = add("rm", _weights_rm, "delete downloaded or imported weights", weights)
    command.add_argument("names", metavar="MODEL.TAG", nargs="+", help="as `spd-zoo weights list` shows them")
    command = add("publish", _publish, "upload weights and enter their address in the manifest", weights)
    command.add_argument("models", metavar="MODEL.tag", nargs="+", help="weights of the manifest")
    command.add_argument("--org", required=True, help="organisation or user on the Hub, where ORG/MODEL.tag is made")
    command.add_argument("--manifest", type=Path, metavar="FILE", help="manifest to write (default: the checkout's)")
    command.add_argument("--dry-run", action="store_true", help="only show what would be done; opens no connection")

    command = add("finetune", _finetune, "train a network on your images")
    if finetune_options:
        command.add_argument("--config", metavar="FILE", help="YAML file with options, or the name of a recipe")
        _add_fields(command, _training("finetune").FinetuneConfig)

    command = add("evaluate", _evaluate, "measure a network on labelled images")
    command.add_argument("model", metavar="MODEL", help="network, with or without a tag, or the folder of a run")
    command.add_argument("--data", required=True, help="as for finetune")
    command.add_argument("--split", default="", help="part of the data (default: test, else val)")
    command.add_argument("--image-size", type=_positive, nargs="+", default=(), metavar="N", help="pixels")
    command.add_argument("--flip", action="store_true", help="average over every image and its mirror image")
    command.add_argument("--out", type=Path, help="folder for results.csv and tables per class")
    command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images at once (default: 64)")
    command.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)")
    command.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    command.add_argument("--bf16", action="store_true", help="compute in bfloat16 where autocast allows it")
    command.add_argument("--image-column", default="", help="as for finetune")
    command.add_argument("--label-column", default="", help="as for finetune")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("export", _export, "write a network into one file for other programs")
    command.add_argument("model", metavar="MODEL", help="network, with or without a tag, or the folder of a run")
    command.add_argument("--to", choices=("onnx", "pt2"), required=True, help="ONNX, or torch.export's format")
    command.add_argument("--out", type=Path, metavar="FILE", help="the file (default: in the run, or here)")
    command.add_argument("--image-size", type=_positive, metavar="N", help="pixels (default: the network's)")
    command.add_argument("--no-fold", action="store_true", help="keep space-to-depth and BatchNorm as layers")

    command = add("demo", _demo, "open a page on this machine that shows what networks see in a picture")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen at (default: 7860)")
    command.add_argument("--models", nargs="+", default=(), metavar="MODEL", help="networks or runs to offer, too")
    return parser


def _add_many_options(command: argparse.ArgumentParser) -> None:
    """The options of predict and detect for many images."""
    many = command.add_argument_group("many images", "one file of results, in bounded memory, that can be resumed")
    many.add_argument("--results", type=Path, metavar="FILE", help="new .jsonl, .csv or .parquet file, a row per image")
    many.add_argument("--data", help="a data set in place of IMAGES, as for finetune")
    many.add_argument("--split", default="", help="part of the data set (default: the only one)")
    many.add_argument("--image-column", default="", help="as for finetune")
    many.add_argument("--label-column", default="", help="as for finetune; the labels are not used")
    many.add_argument("--workers", type=_count, default=2, metavar="N", help="processes that read images (default: 2)")
    many.add_argument(
        "--save-every", type=_positive, default=512, metavar="N", help="images that a stop may cost (default: 512)"
    )
    many.add_argument("--overwrite", action="store_true", help="replace FILE if it is there, when all is done")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _list(options: argparse.Namespace) -> int:
    found = [entry for entry in _listed(options.pretrained) if _matches(entry, options.filters)]
    if not found:
        kind = "verified weights" if options.pretrained else "networks"
        wanted = f" called {' or '.join(options.filters)}" if options.filters else ""
        raise CommandError(f"there are no {kind}{wanted}; `spd-zoo list` shows all networks")
    if options.json:
        print(json.dumps([_row(entry) for entry in found], indent=2))
        return 0
    _print_table(
        ("name", "tag", "params", "MACs", "input", "top-1", "licence", "weights"), map(_cells, found), right=(2, 3)
    )
    return 0


def _print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    """Columns as wide as needed; those at the places `right` end at the same place."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _listed(pretrained: bool) -> list[Entry]:
    """One entry per checkpoint; networks without any stand for themselves."""
    everything = [entry for entry in entries().values() if entry.group != "timm"]
    tagged = {entry.network for entry in everything if entry.tag}
    return [
        entry for entry in everything if (entry.verified if pretrained else entry.tag or entry.network not in tagged)
    ]


def _matches(entry: Entry, filters: list[str]) -> bool:
    """Whether a filter fits the whole name or, as in timm, the name without the tag."""
    return not filters or any(fnmatch.fnmatch(name, f) for f in filters for name in (entry.name, entry.network))


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "network": entry.network,
        "tag": entry.tag or None,
        "default": entry.name == _default(entry.network),
        "params": entry.params,
        "macs": entry.macs,
        "input_size": entry.input_size,
        "num_classes": entry.num_classes,
        "top1": _top1(entry),
        "license": entry.license,
        "weights": _state(entry),
    }


def _cells(entry: Entry) -> tuple[str, ...]:
    top1 = _top1(entry)
    default = " (default)" if entry.name == _default(entry.network) else ""
    return (
        entry.network,
        f"{entry.tag}{default}" or "-",
        f"{entry.params / 1e6:.1f} M",
        f"{entry.macs / 1e9:.2f} G",
        _size(entry.input_size),
        _sentence(top1) if top1 else "-",
        entry.license or "-",
        _state(entry),
    )


def _top1(entry: Entry) -> dict[str, Any] | None:
    """The top-1 at the checkpoint's own input size, or the first that there is."""
    found = [metric for metric in entry.metrics if metric["metric"] == "top1"]
    return next(
        (metric for metric in found if metric["input_size"] == entry.input_size[-1]), found[0] if found else None
    )


def _state(entry: Entry) -> str:
    if entry.verified:
        place = str(entry.source).partition(":")[0]
        return place if place in ("bundled", "package") else "hub"
    return "unverified" if entry.tag else "none"


def _default(network: str) -> str | None:
    """The checkpoint that `pretrained=True` loads."""
    cfg = timm.get_pretrained_cfg(network)
    return f"{network}.{cfg.tag}" if cfg is not None and cfg.has_weights else None


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _sentence(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.2f} % {metric['dataset']} at {metric['input_size']} px ({metric['measured_by']})"


def _info(options: argparse.Namespace) -> int:
    timm_name(options.model)
    entry = entries().get(options.model)
    if entry is None:
        raise CommandError(f"{options.model} is no network of the zoo; `spd-zoo list` shows them")
    checkpoints = [other for other in entries().values() if other.tag and other.network == entry.network]
    described = _described(entry)
    if not entry.tag:
        described["checkpoints"] = [_described(checkpoint) for checkpoint in checkpoints]
    if options.json:
        print(json.dumps(described, indent=2))
    else:
        _print_tree(described)
    return 0


def _described(entry: Entry) -> dict[str, Any]:
    """The manifest's fields and what follows from them."""
    row = _row(entry)
    return dataclasses.asdict(entry) | {key: row[key] for key in ("weights", "default")}


def _print_tree(fields: dict[str, Any], indent: str = "") -> None:
    """A line per field that has a value; dicts and lists of dicts are indented."""
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


def _checkpoints(filters: Sequence[str] = ()) -> list[Entry]:
    """The checkpoints of the manifest, then those that the user imported under tags of their own."""
    networks = {name: entry for name, entry in entries().items() if not entry.tag}
    mine = [name for name in imported_names() if name not in entries() and name.partition(".")[0] in networks]
    found = [entry for entry in entries().values() if entry.tag]
    found += [dataclasses.replace(networks[name.partition(".")[0]], name=name) for name in mine]
    found = [entry for entry in found if _matches(entry, list(filters))]
    if filters and not found:
        raise CommandError(f"there are no weights called {' or '.join(filters)}; `spd-zoo weights list` shows all")
    return found


def _checkpoint(name: str) -> Entry:
    """The checkpoint of this name; for the name of a network alone, its default."""
    default = None if "." in name or not timm.is_model(name) else _default(name)
    found = next((entry for entry in _checkpoints() if entry.name == (default or name)), None)
    if found is None:
        tags = [entry.name for entry in _checkpoints() if entry.network == name]
        advice = f"there are {', '.join(tags)}" if tags else "`spd-zoo weights list` shows all"
        raise CommandError(f"there are no weights called {name}; {advice}")
    return found


def _weights_list(options: argparse.Namespace) -> int:
    rows = [_weights_row(entry) for entry in _checkpoints(options.filters)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    header = ("name", "here", "sha256", "size", "licence", "from")
    _print_table(header, [tuple(row[name] or "-" for name in header) for row in map(_readable, rows)], right=(3,))
    return 0


def _weights_row(entry: Entry) -> dict[str, Any]:
    file = find(entry)
    if file is None:
        here, origin = "missing", entry.source or " ".join(filter(None, (entry.original_link, entry.original_file)))
    elif str(entry.source).startswith("bundled:"):
        here, origin = "bundled", "spd-zoo"
    elif str(entry.source).startswith("package:"):
        here, origin = "package", str(entry.source).split(":")[1]
    elif original_of(entry).name in imported_names():
        here, origin = "imported", origin_of(file).get("origin", "")
    else:
        here, origin = "cached", str(entry.source)
    return {
        "name": entry.name,
        "here": here,
        "sha256": entry.sha256,
        "verified": None if file is None else is_right(entry, file),
        "size": entry.size if file is None else file.stat().st_size,
        "licence": entry.license,
        "from": entry.derived_from or origin,
        "file": None if file is None else str(file),
    }


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    size = f"{row['size'] / 2**20:.1f} MiB" if row["size"] else None
    unchecked = "pinned" if row["sha256"] else "unknown"
    return row | {"sha256": {True: "verified", False: "DAMAGED"}.get(row["verified"], unchecked), "size": size}


def _weights_pull(options: argparse.Namespace) -> int:
    for entry in [_checkpoint(name) for name in options.names]:
        print(fetch(entry))
    return 0


def _weights_import(options: argparse.Namespace) -> int:
    file = import_weights(options.name, options.file)
    name = file.name.rsplit(".", 2)[0]
    print(file)
    network = name.partition(".")[0]
    if network not in entries():  # one of timm's, which knows no tags of ours
        call = f'"{network}", pretrained=True, pretrained_cfg_overlay={{"file": "{file}"}}'
    else:
        call = f'"{name}", pretrained=True'
    print(f"load it with timm.create_model({call})")
    return 0


def _weights_verify(options: argparse.Namespace) -> int:
    damaged = False
    rows = []
    for entry in tqdm(_checkpoints(options.filters), unit="file", leave=False, disable=None):
        file = find(entry)
        right = None if file is None else is_right(entry, file)
        damaged |= right is False
        verdict = {True: "right", False: "DAMAGED", None: "not here" if file is None else "sha256 unknown"}[right]
        rows.append((entry.name, verdict, str(file or "-")))
    _print_table(("name", "sha256", "file"), rows)
    if damaged:
        _complain("a file is damaged; `spd-zoo weights pull NAME` gets it again, `spd-zoo weights rm NAME` deletes it")
    return int(damaged)


def _weights_rm(options: argparse.Namespace) -> int:
    for entry in [_checkpoint(name) for name in options.names]:
        file = remove(entry)
        if file is None:
            raise CommandError(f"the weights of {entry.name} are not on this machine")
        print(f"deleted {file}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    if options.results is not None:
        return _many(
            options, lambda many, device: many.prediction(options.model, options.top_k, options.batch_size, device)
        )
    paths = _images(options)
    answers = predict(options.model, paths, options.top_k, options.batch_size, options.device)
    few = len(paths) <= options.batch_size
    failed = False
    separator = "[\n"
    for answer in tqdm(answers, total=len(paths), unit="image", leave=False, disable=True if few else None):
        if answer.error is not None:
            failed = True
            _complain(f"{answer.path}: {answer.error}")
        if options.json:
            tqdm.write(separator + json.dumps(_as_json(answer)), end="")
            separator = ",\n"
        elif answer.error is None:
            lines = (f"  {100 * guess.probability:6.2f} %  {guess.name}" for guess in answer.top)
            tqdm.write("\n".join((str(answer.path), *lines)))
    if options.json:
        print("\n]")
    return int(failed)


def _images(options: argparse.Namespace) -> list[Path]:
    if options.data or not options.images:
        raise CommandError("give IMAGES; a data set, given with --data, needs --results")
    return find_images(options.images)


def _many(options: argparse.Namespace, task_of: Callable[[Any, str], Any]) -> int:
    """Writes the results of the task that the module `many` makes for a device."""
    if options.json:
        raise CommandError("--json prints, --results writes a file; give one of them")
    if bool(options.data) == bool(options.images):
        raise CommandError("give either IMAGES or a data set with --data")
    with _explained():
        many, joining = importlib.import_module("spd_zoo.inference.results"), importlib.import_module("spd_zoo.process")
        process = joining.join(options.device)
        if options.data:
            images = many.open_any(options.data, options.split, options.image_column, options.label_column)
        else:
            images = many.Files([str(path) for path in find_images(options.images)])
        how = (options.workers, options.save_every, options.overwrite)
        summary = many.write(images, task_of(many, str(process.device)), options.results, process, *how)
    if summary is None:
        return 0  # another process writes the file, and says so
    print(f"{options.results}: {summary.images:,} images")
    if summary.failed:
        total = f"{summary.failed:,} of {summary.images:,} images"
        _complain(f"{total} could not be read; the column error of {options.results} says why")
    return int(summary.failed > 0)


def _as_json(answer: Answer) -> dict[str, Any]:
    path = str(answer.path)
    if answer.error is not None:
        return {"path": path, "error": answer.error}
    return {"path": path, "top": [dataclasses.asdict(guess) for guess in answer.top]}


def _convert(options: argparse.Namespace) -> int:
    try:
        print(convert_checkpoint(options.model, options.out, options.include, options.exclude))
    except ValueError as error:  # of the folder or the patterns
        raise CommandError(str(error)) from error
    print(f'saved: timm.create_model("local-dir:{options.out}", pretrained=True)')
    return 0


def _publish(options: argparse.Namespace) -> int:
    manifest = options.manifest or checkout_manifest()
    failed = False
    for model in options.models:
        try:
            entry = entries().get(model)
            if entry is None or not entry.tag:
                raise WeightsError(f"there are no weights called {model}; `spd-zoo list` shows all")
            publication = prepare(entry, options.org, offline=options.dry_run)
            if options.dry_run:
                print(describe(publication, manifest))
            else:
                print(f"{model}: {publish(publication, manifest)}", flush=True)
        except WeightsError as error:
            failed = True
            _complain(str(error))
    return int(failed)


def _detector(options: argparse.Namespace, device: str | None) -> Detector:
    return Detector(
        options.model,
        device=device,
        image_size=options.image_size,
        score_threshold=options.score,
        iou_threshold=options.iou,
        batch_size=options.batch_size,
        tile=options.tile,
        overlap=options.overlap,
    )


def _detect(options: argparse.Namespace) -> int:
    if options.results is not None:
        if options.out is not None:
            raise CommandError("--out draws into every image, --results writes one file; give one of them")
        return _many(options, lambda many, device: many.detection(_detector(options, device), options.model))
    paths = _images(options)
    seen = []
    with _explained():
        detector = _detector(options, options.device)
        few = len(paths) <= options.batch_size
        found = detect(detector, paths, options.out)
        for one in tqdm(found, total=len(paths), unit="image", leave=False, disable=True if few else None):
            seen.append(one)
            if one.error is not None:
                _complain(f"{one.path}: {one.error}")
            elif one.detections is not None and not options.json:
                objects = zip(one.detections.names, one.detections.scores, one.detections.boxes.tolist(), strict=True)
                lines = (f"  {score:.2f}  {name}  {' '.join(f'{x:.0f}' for x in box)}" for name, score, box in objects)
                tqdm.write("\n".join((str(one.path), *lines)))
    if options.json:
        print(json.dumps(as_coco(seen, detector.class_names), indent=2))
    return int(any(one.error is not None for one in seen))


def _finetune(options: argparse.Namespace) -> int:
    training, config = _training("finetune"), _training("config")
    given = {key: value for key, value in vars(options).items() if key not in ("run", "config")}
    with _explained():
        made = config.make_config(given, options.config)
        training.finetune(dataclasses.replace(made, model=timm_name(made.model)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    module = _training("evaluate")
    given = {key: value for key, value in vars(options).items() if key not in ("run", "out", "json", "image_size")}
    with _explained():
        evaluations = module.evaluate(image_sizes=options.image_size, **given)
        if options.out:
            module.save(evaluations, options.out)
    for line in evaluations[0].complaints():
        _complain(line)
    if options.json:
        rows = [
            evaluation.row | evaluation.predictions.summary() | {"split": evaluation.split}
            for evaluation in evaluations
        ]
        print(json.dumps(rows, indent=2))
        return 0
    for evaluation in evaluations:
        print(evaluation.in_words())
    return 0


def _export(options: argparse.Namespace) -> int:
    with _explained():
        export = importlib.import_module("spd_zoo.exporter").export
        print(export(options.model, options.to, options.out, options.image_size, not options.no_fold))
    return 0


def _demo(options: argparse.Namespace) -> int:
    with _explained():
        serve(options.models, options.host, options.port)
    return 0


@contextmanager
def _explained() -> Iterator[None]:
    """What stops training code, as one sentence."""
    try:
        yield
    except ValueError as error:  # a DataError, a RunError, or an option without meaning
        raise CommandError(str(error)) from error
    except ModuleNotFoundError as error:
        raise _lacks(error) from error


def _training(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(f"spd_zoo.training.{module}")
    except ModuleNotFoundError as error:
        raise _lacks(error) from error


def _lacks(error: ModuleNotFoundError) -> CommandError:
    extras = {
        "datasets": "[train]",
        "pyarrow": "[train]",
        "faster_coco_eval": "[train]",
        "gradio": "[demo]",
        "onnx": "[export]",
        "onnxscript": "[export]",
        "onnxruntime": "[export]",
    }
    package = (error.name or "").partition(".")[0]
    own = "spd-zoo" + extras.get(package, "")
    return CommandError(
        f"this needs the package {error.name}: pip install '{own if package != 'tensorboard' else package}'"
    )


def _add_fields(command: argparse.ArgumentParser, config: type) -> None:
    """An option per field of a dataclass, `model` by its place; what is not given is left to the dataclass."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
        default = "" if field.default in (dataclasses.MISSING, None, "") else f" (default: {field.default})"
        text = (field.metadata.get("help", "") + default).replace("%", "%%")
        if field.name == "model":
            command.add_argument(field.name, metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=text)
            continue
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        command.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **how)
