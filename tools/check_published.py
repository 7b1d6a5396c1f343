"""Checks published figures and the recorded complexity of every network against the networks themselves.

    python tools/check_published.py [NETWORK ...] [--json | --csv] [--record]

`published.csv` has a row for every row of the authors' tables: the figures as printed (the unit may be in the table's
header), the rule that counted them (`spd_zoo.complexity.COUNTERS`) and a verdict. "match": our count by this rule,
rounded to the printed digits, equals the figures. "differs: reason": it does not, or an earlier row of the same source
states another accuracy; once they agree, the row is an error. "uncounted": neither parameters nor FLOPs are printed.
`complexity.csv` records the complexity of every network. --record writes it again; otherwise a difference is an error.
The exit status is 1 if there is an error, and 2 if a table cannot be read.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import timm

import spd_zoo  # noqa: F401  (registers the networks)
from spd_zoo import complexity
from spd_zoo.files import whole
from spd_zoo.weights import entries
from spd_zoo.weights.fit import own_networks

PUBLISHED, RECORD = (Path(__file__).parent / name for name in ("published.csv", "complexity.csv"))
COLUMNS = {  # of published.csv, and their allowed values
    "model": r"\w*",  # a name that timm knows
    "input": r"(3(x[1-9]\d*){2})?",
    "classes": r"\d*",
    **dict.fromkeys(("dataset", "table", "row"), r".*"),
    **dict.fromkeys(("params", "flops"), r"(\d+|\d+(\.\d+)?[MG])?"),
    "accuracy": r"(.*\d.*)?",
    "latency": r".*",
    "counter": "|".join(["", *complexity.COUNTERS]),
    "source": r".+",
    "verdict": r"match|differs: .+|uncounted(: .+)?",
}
RECORDED = ("network", "input", "classes", "params", "macs", "fvcore_flops", "activations")  # of complexity.csv
COUNTED = ("our_params", "our_flops", "all_params", "macs", "fvcore_flops")  # the first two by the authors' rule
SHOWN = ("model", "dataset", "params", "flops", "counter", *COUNTED, "verdict", "source")


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table; raises ValueError if it has other columns, or a row has more or fewer."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path.name} is no CSV table: {error}") from error
    for i, line in enumerate(lines or [[]]):
        if len(line) != len(columns) or (i == 0 and line != list(columns)):
            raise ValueError(f"{path.name}, row {i}: expected {', '.join(columns)}, got {', '.join(line)}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def write(rows: Sequence[dict[str, str]], columns: Sequence[str], file: TextIO) -> None:
    """Writes a table."""
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def problem(row: dict[str, str]) -> str:
    """The error in a row of `published.csv`, if there is one."""
    for column, pattern in COLUMNS.items():
        if not re.fullmatch(pattern, row[column]):
            return f"{column} cannot be {row[column]!r}"
    if row["model"] and not timm.is_model(row["model"]):
        return f"there is no network {row['model']!r}"
    figures = row["params"] or row["flops"]
    needed = ("model", "input", "classes", "counter") if figures else ("input", "classes") if row["model"] else ()
    for column in needed:
        if not row[column]:
            return f"{column} is missing"
    if row["verdict"].startswith("uncounted" if figures else "match"):
        return f"{row['verdict']!r} cannot be the verdict where figures are {'' if figures else 'not '}printed"
    return ""


@cache
def measure(network: str, input: str, classes: int) -> tuple[dict[str, str], list[complexity.Operation]]:
    """The row of `complexity.csv` for a network, and the operators that it runs."""
    channels, height, width = map(int, input.split("x"))
    cfg = timm.get_pretrained_cfg(network)
    size: dict[str, Any] = {"img_size": (height, width)} if cfg is not None and cfg.fixed_input_size else {}
    net = timm.create_model(network, num_classes=classes, device="meta", **size)
    run = complexity.trace(net, (channels, height, width))
    costs = (complexity.macs(run), complexity.fvcore(run), complexity.count_activations(run))
    values = (network, input, classes, complexity.count_params(net), *costs)
    return dict(zip(RECORDED, map(str, values), strict=True)), run


def as_printed(count: str, printed: str) -> str:
    """`count` in the unit, if any, and with the digits of a printed figure."""
    if printed.isdigit():
        return count
    unit = {"M": 10**6, "G": 10**9}[printed[-1]]
    return f"{(Decimal(count) / unit).quantize(Decimal(printed[:-1]), ROUND_HALF_UP)}{printed[-1]}"


def contradict(first: str, second: str) -> bool:
    """Whether two accuracies, like 76.0% and 74.00%, differ in the digits that both have."""
    if not all(re.fullmatch(r"\d+\.\d+%", accuracy) for accuracy in (first, second)):
        return False
    short, long = sorted((first[:-1], second[:-1]), key=len)
    return Decimal(long).quantize(Decimal(short), ROUND_HALF_UP) != Decimal(short)


def check(row: dict[str, str], above: Sequence[dict[str, str]]) -> dict[str, str]:
    """A row of `published.csv` with our counts, and with its differences from these and from the rows above it."""
    row, found = {**row, **dict.fromkeys(COUNTED, "")}, []
    if row["model"]:
        cost, run = measure(row["model"], row["input"], int(row["classes"]))
        row |= {"all_params": cost["params"], "macs": cost["macs"], "fvcore_flops": cost["fvcore_flops"]}
        if row["counter"]:
            seen = complexity.count_layer_params(run) if row["counter"].startswith("thop") else cost["params"]
            row |= {"our_params": str(seen), "our_flops": str(complexity.COUNTERS[row["counter"]](run))}
    for kind in ("params", "flops"):
        if row[kind] and (counted := as_printed(row[f"our_{kind}"], row[kind])) != row[kind]:
            found.append(f"{kind} {row[kind]} printed, {counted} counted")
    for other in above:
        same = all(row[key] == other[key] for key in ("model", "dataset", "source"))
        if same and contradict(row["accuracy"], other["accuracy"]):
            found.append(f"accuracy {row['accuracy']} printed, {other['accuracy']} above it")
    return {**row, "found": "; ".join(found)}


def check_published(networks: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of `published.csv`, of some networks or all, checked; raises ValueError if one is malformed."""
    rows = read(PUBLISHED, list(COLUMNS))
    for i, row in enumerate(rows, 1):
        if wrong := problem(row):
            raise ValueError(f"{PUBLISHED.name}, row {i}: {wrong}")
    checked = []
    for i, row in enumerate(rows, 1):
        if not networks or row["model"] in networks:
            try:
                checked.append(check(row, rows[: i - 1]))
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{PUBLISHED.name}, row {i}: {row['model']} at {row['input']}: {error}") from error
    return checked


def counted(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The checked rows that are not "uncounted"."""
    return [row for row in rows if not row["verdict"].startswith("uncounted")]


def table(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """The header, and a line for every counted row."""
    return [list(SHOWN), *([row[key] for key in SHOWN] for row in counted(rows))]


def cost(network: str) -> dict[str, str]:
    """The row of `complexity.csv` for a network, at its own input size and number of classes."""
    entry = entries()[network]
    return measure(network, "x".join(map(str, entry.input_size)), entry.num_classes)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows and the errors; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="check only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON")
    parser.add_argument("--csv", action="store_true", help="print every row as CSV")
    parser.add_argument("--record", action="store_true", help="write complexity.csv again, for all networks")
    options = parser.parse_args(argv)
    own = own_networks()
    if unknown := [name for name in options.networks if not timm.is_model(name)]:
        parser.error(f"there is no network {' and no '.join(unknown)}")
    if options.record:
        with whole(RECORD) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            write([cost(name) for name in own], RECORDED, file)
    try:
        rows, recorded = check_published(options.networks), read(RECORD, RECORDED)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    costs = [cost(name) for name in own if not options.networks or name in options.networks]
    errors = [f"{', '.join(new.values())} is not what {RECORD.name} has" for new in costs if new not in recorded]
    errors += [f"{RECORD.name} has {old['network']}, no network" for old in recorded if old["network"] not in own]
    errors += [
        f"{RECORD.name} has {name} {n} times"
        for name, n in Counter(old["network"] for old in recorded).items()
        if n > 1
    ]
    errors += [
        f"{PUBLISHED.name} and {RECORD.name} have no row of {name}"
        for name in options.networks
        if name not in own and all(row["model"] != name for row in rows)
    ]
    for row in rows:
        if bool(row["found"]) != row["verdict"].startswith("differs"):
            errors.append(f"{row['model']}, {row['table']}: {row['verdict']!r}, but {row['found'] or 'all agrees'}")
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif options.csv:
        write(rows, [*COLUMNS, *COUNTED, "found"], sys.stdout)
    else:
        lines = table(rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    verdicts = Counter(row["verdict"].partition(":")[0] for row in rows)
    print(f"{len(rows)} rows {dict(verdicts)}, {len(costs)} networks, {len(errors)} errors", file=sys.stderr)
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
