"""The faults of `fault_report.py` in groups: what is broken at which entry point, and what may come of it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import faults
import hostile
from fault_bench import FILE, Bench, Case, Outcome, manifest
from fault_entry_points import (
    ENTRY_POINTS,
    FILE_TASKS,
    NETWORK,
    by_import,
    by_manifest,
    by_timm,
    count_detected,
    limited,
)
from safetensors.torch import load

LONGEST = 5.0  # seconds of processor time that the answer to a bad manifest, header or checkpoint may take


def network(bench: Bench) -> Iterator[Case]:
    """What goes wrong between the Hub and its client."""

    def inject(case: Case, tag: str) -> Outcome:
        fault = faults.NETWORK_FAULTS[case.fault]
        bench.active[tag] = fault
        outcome = bench.load(case, tag)
        bench.active.pop(tag, None)
        if not fault.always and outcome.result == "error":
            outcome.result = "NOT TRIED AGAIN"
        return bench.recovered(outcome, case, tag)

    away: dict[str, dict[str, Any]] = {
        "an unknown host": {"endpoint": "http://hub.invalid"},
        "nobody listens": {"endpoint": "http://127.0.0.1:9"},
        "HF_HUB_OFFLINE": {"offline": True},
    }

    def inject_nobody(case: Case, tag: str) -> Outcome:
        usual = bench.load(case, next(bench.tags))  # shows how busy the machine is
        outcome = bench.load(case, tag, **away[case.fault])
        if outcome.seconds > usual.seconds + 10:
            outcome.result = f"SLOW ({outcome.seconds:.0f} s)"
        return bench.recovered(outcome, case, tag)

    for point in ENTRY_POINTS:
        yield from (Case(name, point, inject) for name in faults.NETWORK_FAULTS)
        yield from (Case(name, point, inject_nobody) for name in away)


def disk(bench: Bench) -> Iterator[Case]:
    """What happens to a cache, with the Hub there and without it."""

    def inject(case: Case, tag: str) -> Outcome:
        name, _, offline = case.fault.partition(", ")
        outcome = bench.load(case, tag)
        if outcome.result != "loaded":
            return outcome
        faults.DISK_FAULTS[name](next((bench.folder / tag / "hub").rglob(FILE)))
        outcome = bench.load(case, tag, offline=bool(offline))
        if not offline and outcome.result == "error":
            outcome.result = "NOT DOWNLOADED AGAIN"
        return bench.recovered(outcome, case, tag)

    def inject_file(case: Case, tag: str) -> Outcome:
        (bench.folder / tag).write_text("a file where the cache should be")
        outcome = bench.load(case, tag)
        (bench.folder / tag).unlink()
        return bench.recovered(outcome, case, tag)

    def inject_no_links(case: Case, tag: str) -> Outcome:
        return bench.recovered(bench.load(case, tag, symlinks=False), case, tag)

    def inject_mount(case: Case, tag: str) -> Outcome:
        cache = bench.folder / tag
        cache.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", cache], check=True)
        try:
            if case.fault == "read-only cache, warm":
                bench.load(case, tag)
            if case.fault == "full disk":
                (cache / "filler").write_bytes(bytes(8 * 2**20 - len(bench.content) // 2))
            else:
                subprocess.run(["mount", "-o", "remount,ro", cache], check=True)
            outcome = bench.load(case, tag)
            if case.fault == "read-only cache, warm" and outcome.result == "error":
                outcome.result = "NOT LOADED FROM THE CACHE"
            subprocess.run(["mount", "-o", "remount,rw", cache], check=True)
            (cache / "filler").unlink(missing_ok=True)
            return bench.recovered(outcome, case, tag)
        finally:
            subprocess.run(["umount", cache], check=True)

    for point in ENTRY_POINTS:
        for name in faults.DISK_FAULTS:
            yield Case(name, point, inject)
            yield Case(f"{name}, offline", point, inject)
        yield Case("no symbolic links", point, inject_no_links)
        yield Case("a file instead of the cache", point, inject_file)
        if os.geteuid() == 0:
            for name in ("read-only cache, cold", "read-only cache, warm", "full disk"):
                yield Case(name, point, inject_mount)


def flips(bench: Bench) -> Iterator[Case]:
    """1,000 flipped bits in a downloaded file and 1,000 in an imported one, without a Hub to get it again."""

    def inject(case: Case, tag: str) -> Outcome:
        cache = bench.folder / tag
        if "imported" in case.fault:
            name = f"{NETWORK}.mine"
            bench.run(cache, by_import, bench.checkpoint, name)
        else:
            name = f"{NETWORK}.{tag}"
            bench.run(cache, by_timm, name)
        file = next(cache.rglob("*.safetensors"))
        answer, text, seconds, cpu_seconds = bench.run(cache, count_detected, name, file, 1000, offline=True)
        result = "detected" if (answer, text) == ("value", "1000") else f"MISSED ({answer} {text})"
        return Outcome(case.fault, case.entry_point, result, text, seconds, cpu_seconds)

    yield Case("1,000 flips in a downloaded file", "fetch", inject)
    yield Case("1,000 flips in an imported file", "fetch", inject)


def together(bench: Bench) -> Iterator[Case]:
    """Eight processes that start with an empty cache at the same time."""

    def inject(case: Case, tag: str) -> Outcome:
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda _: bench.load(case, tag), range(8)))
        worst = next((outcome for outcome in outcomes if outcome.result != "loaded"), outcomes[0])
        found = (bench.folder / tag / "hub").rglob("*")
        files = {file.resolve() for file in found if file.is_file() and file.stat().st_size > 10_000}
        if len(files) != 1:
            worst.result = f"LEFT {len(files)} FILES"
        return worst

    for point in ENTRY_POINTS:
        yield Case("8 processes together", point, inject)


def kill(bench: Bench) -> Iterator[Case]:
    """A process that is killed at 25 moments of a download and 25 of an import."""

    def inject(case: Case, tag: str) -> Outcome:
        cache = bench.folder / tag
        moment = int(case.fault.rpartition(" ")[2].removesuffix("/25")) / 25
        if "download" in case.fault:
            bench.active[tag] = faults.NetworkFault(faults.slowly, always=True)
            task, seconds = partial(by_timm, f"{NETWORK}.{tag}"), 1.6
        else:
            task, seconds = partial(by_import, bench.checkpoint, f"{NETWORK}.{tag}"), 1.0
        process, _ = bench.start(cache, task)
        process.join(0.1 + moment * seconds)
        process.kill()
        process.join()
        bench.active.pop(tag, None)
        bench.run(cache, task)
        outcome = bench.load(case, tag, offline=True)
        left = [file.name for file in cache.rglob("*") if file.name.endswith((".part", ".original"))]
        if outcome.result != "loaded":
            outcome.result = f"STAYS BROKEN ({outcome.result})"
        elif left:
            outcome.result = f"LEFT {left}"
        return outcome

    for work in ("download", "import"):
        for moment in range(1, 26):
            yield Case(f"killed during the {work}, moment {moment}/25", "timm", inject)


def manifests(bench: Bench) -> Iterator[Case]:
    """Private manifests that are wrong."""
    texts = faults.bad_manifests(manifest(["right"], bench.content))

    def inject(case: Case, tag: str) -> Outcome:
        text = texts[case.fault]
        file = bench.folder / f"{tag}.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return _refused(bench, case, tag, by_manifest, file)

    yield from (Case(name, "use_manifest", inject) for name in texts)


def headers(bench: Bench) -> Iterator[Case]:
    """safetensors files with a wrong header, given as a file and imported."""
    contents = faults.bad_safetensors(bench.content)

    def inject(case: Case, tag: str) -> Outcome:
        file = bench.folder / f"{tag}.safetensors"
        file.write_bytes(contents[case.fault])
        return _refused(bench, case, tag, FILE_TASKS[case.entry_point], file)

    yield from (Case(name, point, inject) for name in contents for point in FILE_TASKS)


def pickles(bench: Bench) -> Iterator[Case]:
    """Checkpoints that would run something, or use up memory or time; a few of them hold the right weights, too."""
    trace = bench.folder / "outside" / "trace"
    trace.parent.mkdir(exist_ok=True)
    tensors = load(bench.content)
    harmless = hostile.harmless(trace, tensors)
    contents = hostile.malicious(trace, tensors) | harmless

    def inject(case: Case, tag: str) -> Outcome:
        file = bench.folder / f"{tag}.pth"
        file.write_bytes(contents[case.fault])
        outcome = _refused(bench, case, tag, FILE_TASKS[case.entry_point], file)
        if case.fault in harmless and outcome.result == "BELIEVED":
            right = case.entry_point != "timm" or outcome.text == bench.right["timm"]
            outcome.result = "loaded" if right else "WRONG"
        if any(trace.parent.iterdir()):
            outcome.result = "RUN"
        return outcome

    yield from (Case(name, point, inject) for name in contents for point in FILE_TASKS)


def _refused(bench: Bench, case: Case, tag: str, task: Callable[..., str], file: Path) -> Outcome:
    status, text, seconds, cpu_seconds = bench.run(bench.folder / tag, partial(limited, task), file)
    result = {"error": "refused", "value": "BELIEVED"}.get(status, status)
    if cpu_seconds > LONGEST:
        result = f"SLOW ({cpu_seconds:.1f} s)"
    return Outcome(case.fault, case.entry_point, result, text, seconds, cpu_seconds)


GROUPS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    make.__name__: make for make in (network, disk, flips, together, kill, manifests, headers, pickles)
}
