"""CPU seconds of the commands that need no torch, next to those of `python -c pass`: `tools/benchmark.py --cli`."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["report"]

ROOT = Path(__file__).parent.parent
LIMIT = 0.45  # CPU seconds in addition to those of `python -c pass`
COMMANDS = ("--help", "--version", "lisst", "list", "info pyconvresnet50", "info pyconvresnet51", "weights list")
_START = "import sys, spd_zoo_cli; sys.exit(spd_zoo_cli.main())"


def report(rounds: int, as_json: bool) -> int:
    """Prints the median CPU seconds of every command; returns 1 if one exceeds the limit, otherwise 0."""
    slow = False
    for command, ours, python in _measure(rounds):
        slow |= ours - python > LIMIT
        row = {
            "command": f"spd-zoo {command}",
            "seconds": ours,
            "python": python,
            "more": ours - python,
            "limit": LIMIT,
        }
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"spd-zoo {command:20} {ours:.3f} s | python -c pass {python:.3f} s | {ours - python:+.3f} s of "
                f"{LIMIT} s | x{ours / python:.1f}",
                flush=True,
            )
    return int(slow)


def _measure(rounds: int) -> Iterator[tuple[str, float, float]]:
    """Yields each command, its median of CPU seconds, and the median of `python -c pass` in the same rounds."""
    for command in COMMANDS:
        seconds: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            seconds.append((_cpu_seconds(_START, *command.split()), _cpu_seconds("pass")))
        ours, python = zip(*seconds[1:], strict=True)  # the first round reads the files from the disk
        yield command, statistics.median(ours), statistics.median(python)


def _cpu_seconds(code: str, *arguments: str) -> float:
    """User and system time of a Python process."""
    before = os.times()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
