"""Breaks everything between the Hub and a network that can break, and prints what came of it.

    python tools/fault_report.py [--group network ...] [--json]

Every fault is met by a fresh process at each entry point: `timm.create_model`, `torch.hub.load` and
`spd-zoo predict`, with the real client over HTTP against the stand-in for the Hub in `tests/`. The network must load
and compute what it should, or end in one clear error; with the fault gone, the next run must load from the cache that
was left. Exit status 1 if anything else happens. A full disk and a read-only cache need root, to mount a small tmpfs.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the stand-in for the Hub, and lists of faults

from fault_bench import Bench, Case, Outcome, open_bench
from fault_cases import GROUPS


def run(bench: Bench, groups: Sequence[str], wanted: Callable[[Case], bool] = lambda case: True) -> list[Outcome]:
    """What came of every fault of these groups that is wanted."""
    with ThreadPoolExecutor(4) as pool:
        waiting = {}
        for group in groups:
            for case in filter(wanted, GROUPS[group](bench)):
                waiting[pool.submit(case.inject, case, next(bench.tags))] = group
        for done in tqdm(as_completed(waiting), total=len(waiting), unit="fault", disable=None):
            done.result()
        return [replace(done.result(), group=group) for done, group in waiting.items()]


def totals(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per group and entry point: how many faults there were and what came of them."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        result = outcome.result if outcome.good else "BAD"
        rows.setdefault((outcome.group, outcome.entry_point), Counter())[result] += 1
    return [
        {"group": group, "entry point": point, "faults": counts.total(), **counts}
        for (group, point), counts in rows.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the groups, prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS), help="only these")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per group and entry point instead")
    options = parser.parse_args(argv)
    with open_bench() as bench:
        outcomes = run(bench, options.group)
    if options.json:
        print("\n".join(map(json.dumps, totals(outcomes))))
    else:
        for outcome in outcomes:
            row = (outcome.group, outcome.fault[:40], outcome.entry_point, outcome.result)
            print("{:10} {:40} {:15} {:12} {}".format(*row, outcome.text[:160]))
        for total in totals(outcomes):
            print(", ".join(f"{key} {value}" for key, value in total.items()))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in bad:
        print(
            f"{outcome.group}, {outcome.fault}, {outcome.entry_point}: {outcome.result}: {outcome.text}",
            file=sys.stderr,
        )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
