"""`spd-zoo weights`: list, get, import, verify, delete and publish weights."""

import argparse
import json
from pathlib import Path
from typing import Any

from spd_zoo.cli.common import Commands, add_command, complain, print_notes, print_table
from spd_zoo.console import bar_disabled
from spd_zoo.data.notes import some
from spd_zoo.weights import catalogue
from spd_zoo.weights.cache import find, import_folder, is_right, origin_of
from spd_zoo.weights.manifest import WeightsError, entries

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Adds the commands."""
    text = "list, download, import, verify, delete and publish weights"
    group = commands.add_parser("weights", help=text, description=f"{text[0].upper()}{text[1:]}.")
    below = group.add_subparsers(required=True, metavar="COMMAND")
    command = add_command(below, "list", _list, "list all weights and where they are", networks=False)
    command.add_argument("filters", metavar="FILTER", nargs="*", help="name with wildcards, for example '*.in1k'")
    command.add_argument("--verify", action="store_true", help="compute the SHA-256 of every file")
    command.add_argument("--json", action="store_true", help="print JSON")
    command = add_command(below, "pull", _pull, "download weights, convert the authors' files, and check them")
    command.add_argument("names", metavar="MODEL.TAG", nargs="+", help="as `spd-zoo weights list` shows them")
    command = add_command(below, "import", _import, "convert a checkpoint, check it, and keep it for pretrained=True")
    command.add_argument("name", metavar="MODEL[.TAG]", help="the network, and a known tag or one of your own")
    command.add_argument("file", metavar="FILE|URL", help="a checkpoint in any usual format; no code in it is run")
    command = add_command(below, "verify", _verify, "verify the SHA-256 of all weights on this machine", networks=False)
    command.add_argument("filters", metavar="FILTER", nargs="*", help="only these, for example '*.in1k'")
    command = add_command(below, "rm", _remove, "delete downloaded or imported weights")
    command.add_argument("names", metavar="MODEL.TAG", nargs="+", help="as `spd-zoo weights list` shows them")
    command = add_command(below, "publish", _publish, "upload weights and enter their address in the manifest")
    command.add_argument("models", metavar="MODEL.TAG", nargs="+", help="weights of the manifest")
    command.add_argument("--org", required=True, help="organisation or user on the Hub; creates ORG/MODEL.TAG there")
    command.add_argument("--manifest", type=Path, metavar="FILE", help="manifest to write (default: the checkout's)")
    command.add_argument("--dry-run", action="store_true", help="only print what would be done; opens no connection")


def _list(options: argparse.Namespace) -> int:
    rows = [catalogue.locate(entry, options.verify) for entry in catalogue.checkpoints(options.filters)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    header = ("name", "location", "sha256", "size", "licence", "from")
    print_table(header, [tuple(row[name] or "-" for name in header) for row in map(_readable, rows)], right=(3,))
    return 0


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    size = f"{row['size'] / 2**20:.1f} MiB" if row["size"] else None
    unchecked = "pinned" if row["sha256"] else "unknown"
    return row | {"sha256": {True: "verified", False: "DAMAGED"}.get(row["verified"], unchecked), "size": size}


def _pull(options: argparse.Namespace) -> int:
    from spd_zoo.weights.fetch import fetch

    for entry in [catalogue.checkpoint(name) for name in options.names]:
        print(fetch(entry))
    return 0


def _import(options: argparse.Namespace) -> int:
    from spd_zoo.weights.fetch import import_weights

    before = {each: origin_of(each) for each in import_folder().glob("*.safetensors")}
    file = import_weights(options.name, options.file)
    name = file.name.rsplit(".", 2)[0]
    print(file)
    digest = origin_of(file).get("original_sha256")
    replaced = [about for each, about in before.items() if not each.exists() and about.get("original_sha256") != digest]
    print_notes([f"this replaces {name}, imported from {about.get('origin', 'another file')}" for about in replaced])
    network = name.partition(".")[0]
    if network not in entries():  # one of timm's, which does not know our tags
        call = f'"{network}", pretrained=True, pretrained_cfg_overlay={_timms_overlay(network, file)}'
    else:
        call = f'"{name}", pretrained=True'
    print(f"load it with timm.create_model({call})")
    if "nc" in (about := origin_of(file)):  # a detector
        classes = json.loads(about.get("names", "[]"))
        print(f"classes: {some(classes, 20) if classes else 'numbers, because the file does not name them'}")
        size = "x".join(map(str, json.loads(about["imgsz"]))) if "imgsz" in about else "the network's own"
        print(f"image size: {size}; licence: {about['license']}")
    return 0


def _timms_overlay(network: str, file: Path) -> str:
    """The fields with which timm loads a file into one of its networks: the file, and what differs from the network."""
    import timm

    from spd_zoo.weights.build import timms_network
    from spd_zoo.weights.fit import cfg_of

    cfg, own = cfg_of(timms_network(network, file)), cfg_of(timm.create_model(network, device="meta"))
    other = [name for name in ("num_classes", "input_size") if cfg[name] != own[name]]
    path = json.dumps(str(file), ensure_ascii=False)  # with quotes, and two backslashes for each
    fields = ", ".join([f'"file": {path}', *(f'"{name}": {cfg[name]}' for name in other)])
    return f"{{{fields}}}"


def _verify(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    damaged = False
    rows = []
    for entry in tqdm(catalogue.checkpoints(options.filters), unit="file", leave=False, disable=bar_disabled()):
        file = find(entry)
        right = None if file is None else is_right(entry, file)
        damaged |= right is False
        unknown = "not on this machine" if file is None else "sha256 unknown"
        verdict = {True: "verified", False: "DAMAGED", None: unknown}[right]
        rows.append((entry.name, verdict, str(file or "-")))
    print_table(("name", "sha256", "file"), rows)
    if damaged:
        complain("a file is damaged; `spd-zoo weights pull NAME` gets it again, or says how you can")
    return int(damaged)


def _remove(options: argparse.Namespace) -> int:
    from spd_zoo.weights.fetch import remove

    for entry in [catalogue.checkpoint(name) for name in options.names]:
        file = remove(entry)
        if file is None:
            raise WeightsError(f"the weights of {entry.name} are not on this machine")
        print(f"deleted {file}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from spd_zoo.weights.publish import checkout_manifest, describe, prepare, publish

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
            complain(str(error))
    return int(failed)
