"""Does space-to-depth help? Trains networks that differ only in their downsampling, with several seeds each.

    python tools/twins.py tools/twins/*.yaml --data-root DATA --out RUNS [--jobs 2] [--records tools/twins.jsonl]

A config names a data set (a folder of DATA, as `spd-zoo finetune` takes it), the options of `finetune`, and networks:
`model` with random weights, with the `weights` of a checkpoint (`network.tag`, perhaps imported), or with those of a
`backbone` (another such tag); then `keep_resolution: N` removes strides, and `convert: true` makes space-to-depth of
the others. Its own `options` replace those of the config. Each is compared with the first, or with the one named by
`against`. Equal seeds have equal held-out images, order and augmentation.

Each of --jobs processes trains one network on one thread. A finished run is evaluated on the split test, or val if
there is none, and becomes a line of --records (default: RUNS/twins.jsonl). After a stop the same command resumes the
runs in RUNS and repeats none that is recorded. RUNS gets `twins.md`, with means and paired differences and their 95 %
intervals, and `twins.svg`.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import twins_report
from exit_status import explained
from figures_common import Drawing, render
from twins_config import ConfigError, digest, find_record, read_config, read_records
from twins_run import files_of, request, run, write_subset

from spd_zoo.files import whole
from spd_zoo.process import Stopped, StopSignals
from spd_zoo.weights import WeightsError


def append(record: dict[str, Any], file: Path) -> None:
    """Adds a line to the records, in one write, so that several processes can do it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as lines:
        lines.write(f"{json.dumps(record)}\n".encode())


def work(arguments: tuple[Any, ...], file: Path, quiet: bool) -> None:
    """Does a run in this process, on one thread, and records it; with `quiet`, output goes into the run's folder."""
    out: Path = arguments[-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            if quiet:
                out.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context((out / "output.txt").open("a", encoding="utf-8"))
                stack.enter_context(redirect_stdout(output))
                stack.enter_context(redirect_stderr(output))
            try:
                append(run(*arguments), file)
            except (ValueError, RuntimeError, OSError) as error:
                if not quiet:
                    raise
                print(error, file=sys.stderr)
                sys.exit(1)
    except Stopped as stopped:
        if quiet:
            sys.exit(128 + stopped.number)
        raise
    finally:
        torch.set_num_threads(threads)


def _in_process(do: Callable[..., None], *arguments: Any) -> None:
    """Calls `do` in a process of `run_all`, which alone tells it to stop: Ctrl-C in a terminal goes to all of them."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    do(*arguments)


def run_all(runs: Sequence[tuple[Any, ...]], jobs: int, file: Path) -> int:
    """Does all runs, `jobs` at once; returns how many failed.

    Raises:
        Stopped: After a signal, when all runs in progress are saved.
    """
    if jobs == 1:
        for arguments in runs:
            work(arguments, file, quiet=False)
        return 0
    waiting, failed, told = list(runs), 0, False
    running: dict[Any, tuple[Any, Any]] = {}
    processes = multiprocessing.get_context("spawn")
    with StopSignals() as signals:
        while running or (waiting and not signals.number):
            while waiting and len(running) < jobs and not signals.number:
                arguments = waiting.pop(0)
                process = processes.Process(target=_in_process, args=(work, arguments, file, True))
                process.start()
                running[process.sentinel] = (process, arguments)
            for sentinel in wait(list(running), timeout=1):
                process, arguments = running.pop(sentinel)
                process.join()
                if process.exitcode and not signals.number:
                    failed += 1
                    print(f"failed, see {arguments[-1] / 'output.txt'}", file=sys.stderr)
                elif not process.exitcode:
                    print(f"{len(waiting) + len(running)} runs left, finished {arguments[-1].name}", flush=True)
            if signals.number and not told:
                told = True
                for process, _ in running.values():
                    process.terminate()  # SIGTERM, after which a run saves its state; a second one would end it at once
    if signals.number:
        raise Stopped(signals.number, "stopped; the same command resumes")
    return failed


def missing(config: dict[str, Any], records: Sequence[dict[str, Any]], data: Path, out: Path) -> list[tuple[Any, ...]]:
    """The runs of a config that are not recorded, as arguments of `run`, seed by seed."""
    for spec in config["networks"]:
        request(config, spec, spec["model"], data, out, 0)
    if config["train_images"]:
        subset = out / f"{config['data']}_{config['train_images']}.csv"
        if not subset.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_subset(data, config["train_images"], subset)
        data = subset
    runs = []
    files = [files_of(spec) for spec in config["networks"]]
    for seed in range(config["seeds"]):
        for spec, used in zip(config["networks"], files, strict=True):
            record = find_record(records, config, spec, seed)
            if record is None or record.get("files", used) != used:  # another file has the name now
                folder = "_".join([spec["model"], digest(config, spec), *(sha[:8] for sha in used.values()), str(seed)])
                runs.append((config, spec, seed, data, out / folder))
    return runs


@explained
def main(argv: Sequence[str] | None = None) -> int:
    """Does the missing runs and writes the tables and the figure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--records", type=Path, help="file of finished runs (default: twins.jsonl in --out)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    file = options.records or options.out / "twins.jsonl"
    runs: list[tuple[Any, ...]] = []
    folders: set[Path] = set()
    status = 0
    configs = [read_config(path) for path in options.configs]
    records = read_records(file)
    for config in configs:
        data = options.data_root / config["data"]
        try:
            if not data.exists():
                raise ConfigError(f"there is no {data}; put the data set there")
            for spec in config["networks"]:
                files_of(spec)
        except (ConfigError, WeightsError) as error:
            print(f"skipped {config['name']}: {error}", file=sys.stderr)
            status = 1
            continue
        runs += [arguments for arguments in missing(config, records, data, options.out) if arguments[-1] not in folders]
        folders |= {arguments[-1] for arguments in runs}
    print(f"{len(runs)} runs to do, {options.jobs} at once", flush=True)
    status |= int(run_all(runs, options.jobs, file) > 0)
    records = read_records(file)
    options.out.mkdir(parents=True, exist_ok=True)
    text = twins_report.tables(configs, records)
    panels = twins_report.panels(configs, records)
    with whole(options.out / "twins.md") as table, whole(options.out / "twins.svg") as figure:
        table.write_text(f"{text}\n", encoding="utf-8")
        figure.write_text(render(Drawing(twins_report.TITLE, lambda: panels, twins_report.draw)), encoding="utf-8")
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
