"""Breaks everything between the Hub and a network that can break, and prints what came of it.

    python tools/fault_report.py [--group network ...] [--json]

Every fault is met by a fresh process at each entry point: `timm.create_model`, `torch.hub.load` and
`spd-zoo predict`, with the real client over HTTP against the stand-in for the Hub in `tests/`. The network must load
and compute what it should, or end in one clear error; with the fault gone, the next run must load from the cache that
was left. Exit status 1 if anything else happens. A full disk and a read-only cache need root, to mount a small tmpfs.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors.torch import load
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import faults  # noqa: E402
import hostile  # noqa: E402
from hub_double import COMMIT, HubDouble, Request, Response, hub_double  # noqa: E402
from limited import MEMORY, out_of_memory, set_limits  # noqa: E402

NETWORK = "cifar_resnet20"
RIGHT = f"{NETWORK}.right"  # a tag that nothing goes wrong with
IMAGE = ROOT / "examples" / "rocket.jpg"
FILE = "weights.safetensors"
LONGEST = 5.0  # seconds that the answer to a bad manifest, header or checkpoint may take

Answer = tuple[str, str, float, float]  # "value", "error" or "CRASH"; text; seconds; MiB of memory


@dataclass
class Outcome:
    """What one process did: "loaded", "error", or something that must not happen."""

    fault: str
    entry_point: str
    result: str
    text: str = ""
    seconds: float = 0.0
    mebibytes: float = 0.0
    group: str = ""

    @property
    def good(self) -> bool:
        """Whether it may happen."""
        return self.result in ("loaded", "error", "recovered", "detected", "refused")


# In a process of its own


def by_timm(name: str) -> str:
    """A digest of what `timm.create_model` loads."""
    import timm

    return _digest(timm.create_model(name, pretrained=True))


def by_hub(name: str) -> str:
    """The same for `torch.hub.load`."""
    import torch

    network, _, tag = name.partition(".")
    return _digest(torch.hub.load(str(ROOT), network, source="local", pretrained=True, pretrained_cfg=tag))


def by_command(name: str) -> str:
    """What `spd-zoo predict` answers; raises if its error is not one line."""
    return _run("predict", name, str(IMAGE))


def _digest(net: Any) -> str:
    return sha256(b"".join(t.numpy().tobytes() for t in net.state_dict().values())).hexdigest()


def _run(*arguments: str) -> str:
    from spd_zoo.cli.main import main
    from spd_zoo.weights import WeightsError

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    if status == 0:
        return out.getvalue()
    lines = err.getvalue().strip().splitlines()
    assert status == 1 and lines and "error: " in lines[-1], f"status {status}: {err.getvalue()}"
    raise WeightsError(lines[-1].partition("error: ")[2])


def by_import(file: Path, name: str = f"{NETWORK}.mine") -> str:
    """Imports a checkpoint."""
    return _run("weights", "import", name, str(file))


def by_file(file: Path) -> str:
    """A digest of what a file makes of the network."""
    import timm

    return _digest(timm.create_model(NETWORK, pretrained=True, pretrained_cfg_overlay={"file": str(file)}))


def by_manifest(file: Path) -> str:
    """Takes a private manifest."""
    import spd_zoo

    spd_zoo.use_manifest(file)
    return ""


def count_detected(name: str, file: Path, count: int) -> str:
    """How many of `count` bit flips in a file of the cache are noticed."""
    from spd_zoo.weights import Entry, WeightsError, entries, fetch

    network = entries()[name.partition(".")[0]]
    entry: Entry = entries().get(name) or replace(network, name=name)
    found = 0
    content = file.read_bytes()
    for damaged in faults.byte_flips(content, count):
        file.write_bytes(damaged)
        try:
            fetch(entry)
        except WeightsError:
            found += 1
    return str(found)


ENTRY_POINTS: dict[str, Callable[[str], str]] = {"timm": by_timm, "torch.hub": by_hub, "spd-zoo": by_command}


def use_cache(cache: Path, offline: bool = False, symlinks: bool = True, endpoint: str | None = None) -> None:
    """Gives this process another Hugging Face cache, or another Hub."""
    from huggingface_hub import constants, file_download

    changes: dict[str, Any] = {
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_HUB_OFFLINE": offline,
    }
    if endpoint:
        changes |= {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        }
    for name, value in changes.items():
        setattr(constants, name, value)
    if not symlinks:
        vars(file_download)["are_symlinks_supported"] = lambda cache_dir=None: False


def _child(pipe: Connection, cache: Path, options: dict[str, Any], task: Callable[..., str], arguments: Any) -> None:
    from spd_zoo.weights import WeightsError

    use_cache(cache, **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    try:
        result = ("value", task(*arguments))
    except WeightsError as error:
        result = ("error", str(error))
    except BaseException as error:
        result = ("CRASH", f"{type(error).__name__}: {error}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pipe.send((*result, time.monotonic() - started, grown))


@dataclass
class Case:
    """A fault at an entry point; `meet` lets it happen, with a tag of the manifest that nothing else uses."""

    fault: str
    entry_point: str
    meet: Callable[["Case", str], Outcome]


class Bench:
    """A Hub, a place for caches, and fresh processes that have imported everything already."""

    def __init__(self, server: HubDouble, folder: Path, content: bytes, tags: list[str]) -> None:
        self.folder = folder
        self.content = content
        self.tags = iter(tags)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fault_report", "spd_zoo.inference.classifier"])
        self.active: dict[str, faults.NetworkFault] = {}  # by repository
        server.faults.append(self._fault)
        answers = {point: self.run(folder / "right", task, RIGHT) for point, task in ENTRY_POINTS.items()}
        assert all(kind == "value" for kind, *_ in answers.values()), answers
        self.right = {point: text for point, (_, text, *_) in answers.items()}

    def _fault(self, request: Request, answer: Callable[[], Response | None]) -> Response | None:
        repo = request.path.split("/")[2]
        fault = self.active.get(repo)
        if fault is None or request.command not in fault.command.split("|"):
            return answer()
        if not fault.always:
            del self.active[repo]
        return fault.answer(request, answer)

    def original(self) -> Path:
        """The weights as authors give them."""
        return self.folder / "original.safetensors"

    def start(self, cache: Path, task: Callable[..., str], *arguments: Any, **options: Any) -> tuple[Any, Connection]:
        """A process that runs `task`, and where its answer comes out."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(sender, cache, options, task, arguments))
        process.start()
        sender.close()
        return process, receiver

    def run(self, cache: Path, task: Callable[..., str], *arguments: Any, **options: Any) -> Answer:
        """What a process answered: "value", "error" or "CRASH", the text, seconds, MiB."""
        process, receiver = self.start(cache, task, *arguments, **options)
        try:
            answer: Answer = receiver.recv() if receiver.poll(120) else ("HANGS", "", 120.0, 0.0)
        except EOFError:
            answer = ("CRASH", "the process died", 0.0, 0.0)
        process.join(5)
        process.kill()
        return answer

    def load(self, case: Case, tag: str, **options: Any) -> Outcome:
        """What a process loads at the entry point, with a cache that belongs to the tag."""
        task = ENTRY_POINTS[case.entry_point]
        kind, text, seconds, grown = self.run(self.folder / tag, task, f"{NETWORK}.{tag}", **options)
        if kind == "value":
            kind, text = ("loaded", "") if text == self.right[case.entry_point] else ("WRONG", text)
        return Outcome(case.fault, case.entry_point, kind, text, seconds, grown)

    def recovered(self, outcome: Outcome, case: Case, tag: str) -> Outcome:
        """`outcome`, if the same loads with the fault gone."""
        again = self.load(case, tag)
        if outcome.good and again.result != "loaded":
            outcome.result, outcome.text = f"STAYS BROKEN ({again.result})", again.text
        return outcome


# The groups of faults


def network(bench: Bench) -> Iterator[Case]:
    """What goes wrong between the Hub and its client."""

    def meet(case: Case, tag: str) -> Outcome:
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

    def meet_nobody(case: Case, tag: str) -> Outcome:
        outcome = bench.load(case, tag, **away[case.fault])
        if outcome.seconds > 10:
            outcome.result = f"SLOW ({outcome.seconds:.0f} s)"
        return bench.recovered(outcome, case, tag)

    for point in ENTRY_POINTS:
        yield from (Case(name, point, meet) for name in faults.NETWORK_FAULTS)
        yield from (Case(name, point, meet_nobody) for name in away)


def disk(bench: Bench) -> Iterator[Case]:
    """What happens to a cache, with the Hub there and without it."""

    def meet(case: Case, tag: str) -> Outcome:
        name, _, offline = case.fault.partition(", ")
        outcome = bench.load(case, tag)
        if outcome.result != "loaded":
            return outcome
        faults.DISK_FAULTS[name](next((bench.folder / tag / "hub").rglob(FILE)))
        outcome = bench.load(case, tag, offline=bool(offline))
        if not offline and outcome.result == "error":
            outcome.result = "NOT DOWNLOADED AGAIN"
        return bench.recovered(outcome, case, tag)

    def meet_file(case: Case, tag: str) -> Outcome:
        (bench.folder / tag).write_text("a file where the cache should be")
        outcome = bench.load(case, tag)
        (bench.folder / tag).unlink()
        return bench.recovered(outcome, case, tag)

    def meet_no_links(case: Case, tag: str) -> Outcome:
        return bench.recovered(bench.load(case, tag, symlinks=False), case, tag)

    def meet_mount(case: Case, tag: str) -> Outcome:
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
            yield Case(name, point, meet)
            yield Case(f"{name}, offline", point, meet)
        yield Case("no symbolic links", point, meet_no_links)
        yield Case("a file instead of the cache", point, meet_file)
        if os.geteuid() == 0:
            for name in ("read-only cache, cold", "read-only cache, warm", "full disk"):
                yield Case(name, point, meet_mount)


def flips(bench: Bench) -> Iterator[Case]:
    """1,000 flipped bits in a downloaded file and 1,000 in an imported one, without a Hub to get it again."""

    def meet(case: Case, tag: str) -> Outcome:
        cache = bench.folder / tag
        if "imported" in case.fault:
            name = f"{NETWORK}.mine"
            bench.run(cache, by_import, bench.original(), name)
        else:
            name = f"{NETWORK}.{tag}"
            bench.run(cache, by_timm, name)
        file = next(cache.rglob("*.safetensors"))
        answer, text, seconds, grown = bench.run(cache, count_detected, name, file, 1000, offline=True)
        result = "detected" if (answer, text) == ("value", "1000") else f"MISSED ({answer} {text})"
        return Outcome(case.fault, case.entry_point, result, text, seconds, grown)

    yield Case("1,000 flips in a downloaded file", "fetch", meet)
    yield Case("1,000 flips in an imported file", "fetch", meet)


def together(bench: Bench) -> Iterator[Case]:
    """Eight processes that start with an empty cache at the same time."""

    def meet(case: Case, tag: str) -> Outcome:
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda _: bench.load(case, tag), range(8)))
        worst = next((outcome for outcome in outcomes if outcome.result != "loaded"), outcomes[0])
        found = (bench.folder / tag / "hub").rglob("*")
        files = {file.resolve() for file in found if file.is_file() and file.stat().st_size > 10_000}
        if len(files) != 1:
            worst.result = f"LEFT {len(files)} FILES"
        return worst

    for point in ENTRY_POINTS:
        yield Case("8 processes together", point, meet)


def kill(bench: Bench) -> Iterator[Case]:
    """A process that is killed at 25 moments of a download and 25 of an import."""

    def meet(case: Case, tag: str) -> Outcome:
        cache = bench.folder / tag
        moment = int(case.fault.rpartition(" ")[2].removesuffix("/25")) / 25
        if "download" in case.fault:
            bench.active[tag] = faults.NetworkFault(faults.slowly, always=True)
            task, seconds = partial(by_timm, f"{NETWORK}.{tag}"), 1.6
        else:
            task, seconds = partial(by_import, bench.original(), f"{NETWORK}.{tag}"), 1.0
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

    for kind in ("download", "import"):
        for moment in range(1, 26):
            yield Case(f"killed during the {kind}, moment {moment}/25", "timm", meet)


def manifests(bench: Bench) -> Iterator[Case]:
    """Private manifests that are wrong."""
    texts = faults.bad_manifests(manifest(["right"], bench.content))

    def meet(case: Case, tag: str) -> Outcome:
        text = texts[case.fault]
        file = bench.folder / f"{tag}.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return _refused(bench, case, tag, by_manifest, file)

    yield from (Case(name, "use_manifest", meet) for name in texts)


FILE_TASKS: dict[str, Callable[..., str]] = {"timm": by_file, "weights import": by_import}


def headers(bench: Bench) -> Iterator[Case]:
    """safetensors files with a wrong header, given as a file and imported."""
    contents = faults.bad_safetensors(bench.content)

    def meet(case: Case, tag: str) -> Outcome:
        file = bench.folder / f"{tag}.safetensors"
        file.write_bytes(contents[case.fault])
        return _refused(bench, case, tag, FILE_TASKS[case.entry_point], file)

    yield from (Case(name, point, meet) for name in contents for point in FILE_TASKS)


def pickles(bench: Bench) -> Iterator[Case]:
    """Checkpoints that would run something, or use up memory or time; a few of them hold the right weights, too."""
    trace = bench.folder / "outside" / "trace"
    trace.parent.mkdir(exist_ok=True)
    tensors = load(bench.content)
    harmless = hostile.harmless(trace, tensors)
    contents = hostile.malicious(trace, tensors) | harmless

    def meet(case: Case, tag: str) -> Outcome:
        file = bench.folder / f"{tag}.pth"
        file.write_bytes(contents[case.fault])
        outcome = _refused(bench, case, tag, FILE_TASKS[case.entry_point], file)
        if case.fault in harmless and outcome.result == "BELIEVED":
            right = case.entry_point != "timm" or outcome.text == bench.right["timm"]
            outcome.result = "loaded" if right else "WRONG"
        if any(trace.parent.iterdir()):
            outcome.result = "RUN"
        return outcome

    yield from (Case(name, point, meet) for name in contents for point in FILE_TASKS)


def _limited(task: Callable[..., str], file: Path) -> str:
    """What a task answers in a process that the system ends at a limit."""
    set_limits()
    try:
        return task(file)
    except Exception as error:
        if out_of_memory(error):
            raise MemoryError(f"it took {MEMORY} MiB") from error
        raise


def _refused(bench: Bench, case: Case, tag: str, task: Callable[..., str], file: Path) -> Outcome:
    kind, text, seconds, grown = bench.run(bench.folder / tag, partial(_limited, task), file)
    result = {"error": "refused", "value": "BELIEVED"}.get(kind, kind)
    if seconds > LONGEST:
        result = f"SLOW ({seconds:.1f} s)"
    return Outcome(case.fault, case.entry_point, result, text, seconds, grown)


GROUPS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    make.__name__: make for make in (network, disk, flips, together, kill, manifests, headers, pickles)
}


# The run


def manifest(tags: Sequence[str], content: bytes) -> dict[str, Any]:
    """A private manifest whose tags lie in one repository each."""
    own = json.loads((ROOT / "weights_manifest.json").read_text(encoding="utf-8"))
    group, entry = next((group, members[NETWORK]) for group, members in own.items() if NETWORK in members)
    facts = {"sha256": sha256(content).hexdigest(), "size": len(content), "license": "apache-2.0", "dataset": "none"}
    metric = {"dataset": "none", "metric": "top1", "value": 0, "input_size": 32, "measured_by": "us"}
    checkpoint = entry | facts | {"recipe": {"none": True}, "metrics": [metric]}
    sources = {tag: {"source": f"hf://org/{tag}@{COMMIT}:{FILE}"} for tag in tags}
    return {group: {f"{NETWORK}.{tag}": checkpoint | source for tag, source in sources.items()}}


@contextlib.contextmanager
def open_bench() -> Iterator[Bench]:
    """A bench with a running Hub; one per process, because its processes inherit where the first Hub is."""
    import timm
    import torch
    from safetensors.torch import save

    import spd_zoo  # noqa: F401 (registers the network)

    torch.manual_seed(0)
    content = save(timm.create_model(NETWORK).state_dict())
    tags = ["right", *(f"t{i}" for i in range(600))]
    with hub_double() as server, tempfile.TemporaryDirectory(prefix="faults") as name:
        folder = Path(name)
        (folder / "original.safetensors").write_bytes(content)
        (folder / "private.json").write_text(json.dumps(manifest(tags, content)))
        server.files.update({f"org/{tag}/{FILE}": content for tag in tags})
        added = {
            "SPD_ZOO_MANIFEST": str(folder / "private.json"),
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "hf"),
        }
        os.environ.update(server.environment | added)
        os.environ.pop("HF_HUB_CACHE", None)
        yield Bench(server, folder, content, tags[1:])


def run(bench: Bench, groups: Sequence[str], wanted: Callable[[Case], bool] = lambda case: True) -> list[Outcome]:
    """What came of every fault of these groups that is wanted."""
    with ThreadPoolExecutor(4) as pool:
        waiting = {}
        for group in groups:
            for case in filter(wanted, GROUPS[group](bench)):
                waiting[pool.submit(case.meet, case, next(bench.tags))] = group
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
