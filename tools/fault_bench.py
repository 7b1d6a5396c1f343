"""The bench of `fault_report.py`: a stand-in for the Hub, an empty cache for every fault, and fresh processes."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fault_entry_points import ENTRY_POINTS, NETWORK, ROOT, Answer, run_in_child
from faults import NetworkFault
from hub_double import COMMIT, HubDouble, Request, Response, hub_double

RIGHT = f"{NETWORK}.right"  # a tag that nothing goes wrong with
FILE = "weights.safetensors"
PATIENCE = 500.0  # seconds; more than any case takes on a busy machine, so only one that waits for ever hangs


@dataclass
class Outcome:
    """What one process did: "loaded", "error", or something that must not happen."""

    fault: str
    entry_point: str
    result: str
    text: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    group: str = ""

    @property
    def good(self) -> bool:
        """Whether it may happen."""
        return self.result in ("loaded", "error", "recovered", "detected", "refused")


@dataclass
class Case:
    """A fault at an entry point; `inject` causes it, with a tag of the manifest that nothing else uses."""

    fault: str
    entry_point: str
    inject: Callable[["Case", str], Outcome]


def stop_forkserver() -> None:
    """Ends the process from which others are forked; the next one begins with the environment of that moment.

    Otherwise it would keep the first one as long as this process runs. Only its private `_stop` ends it, which typeshed
    does not list.
    """
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


class Bench:
    """A Hub, a place for caches, and fresh processes that have imported everything already."""

    def __init__(self, server: HubDouble, folder: Path, content: bytes, tags: list[str]) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.safetensors"  # to import
        self.checkpoint.write_bytes(content)
        self.content = content
        self.tags = iter(tags)
        stop_forkserver()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fault_entry_points", "spd_zoo.inference.classifier"])
        self.active: dict[str, NetworkFault] = {}  # by repository
        server.faults.append(self._fault)
        answers = {point: self.run(folder / "right", task, RIGHT) for point, task in ENTRY_POINTS.items()}
        assert all(status == "value" for status, *_ in answers.values()), answers
        self.right = {point: text for point, (_, text, *_) in answers.items()}

    def _fault(self, request: Request, answer: Callable[[], Response | None]) -> Response | None:
        repo = request.path.split("/")[2]
        fault = self.active.get(repo)
        if fault is None or request.command not in fault.command.split("|"):
            return answer()
        if not fault.always:
            del self.active[repo]
        return fault.answer(request, answer)

    def start(self, cache: Path, task: Callable[..., str], *arguments: Any, **options: Any) -> tuple[Any, Connection]:
        """A process that runs `task`, and where its answer comes out."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=run_in_child, args=(sender, cache, options, task, arguments))
        process.start()
        sender.close()
        return process, receiver

    def run(self, cache: Path, task: Callable[..., str], *arguments: Any, **options: Any) -> Answer:
        """What a process answered: "value", "error" or "CRASH", the text, seconds, seconds of processor time."""
        process, receiver = self.start(cache, task, *arguments, **options)
        try:
            answer: Answer = receiver.recv() if receiver.poll(PATIENCE) else ("HANGS", "", PATIENCE, 0.0)
        except EOFError:
            answer = ("CRASH", "the process died", 0.0, 0.0)
        process.join(5)
        process.kill()
        return answer

    def load(self, case: Case, tag: str, **options: Any) -> Outcome:
        """What a process loads at the entry point, with a cache that belongs to the tag."""
        task = ENTRY_POINTS[case.entry_point]
        status, text, seconds, cpu_seconds = self.run(self.folder / tag, task, f"{NETWORK}.{tag}", **options)
        if status == "value":
            status, text = ("loaded", "") if text == self.right[case.entry_point] else ("WRONG", text)
        return Outcome(case.fault, case.entry_point, status, text, seconds, cpu_seconds)

    def recovered(self, outcome: Outcome, case: Case, tag: str) -> Outcome:
        """`outcome`, if the same loads with the fault gone."""
        again = self.load(case, tag)
        if outcome.good and again.result != "loaded":
            outcome.result, outcome.text = f"STAYS BROKEN ({again.result})", again.text
        return outcome


def manifest(tags: Sequence[str], content: bytes) -> dict[str, Any]:
    """A private manifest whose tags lie in one repository each."""
    own = json.loads((ROOT / "weights_manifest.json").read_text(encoding="utf-8"))
    group, entry = next((group, members[NETWORK]) for group, members in own.items() if NETWORK in members)
    facts = {"sha256": sha256(content).hexdigest(), "size": len(content), "license": "apache-2.0", "dataset": "none"}
    metric = {"dataset": "none", "metric": "top1", "value": 0, "input_size": 32, "measured_by": "us"}
    checkpoint = entry | facts | {"recipe": {"none": True}, "metrics": [metric]}
    sources = {tag: {"source": f"hf://org/{tag}@{COMMIT}:{FILE}"} for tag in tags}
    return {group: {f"{NETWORK}.{tag}": checkpoint | source for tag, source in sources.items()}}


@contextmanager
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
        (folder / "private.json").write_text(json.dumps(manifest(tags, content)))
        server.files.update({f"org/{tag}/{FILE}": content for tag in tags})
        added = {
            "SPD_ZOO_MANIFEST": str(folder / "private.json"),
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "hf"),
        }
        os.environ.update(server.environment | added)
        os.environ.pop("HF_HUB_CACHE", None)
        try:
            yield Bench(server, folder, content, tags[1:])
        finally:  # or else what is started later would use this Hub and this manifest, which are gone then
            stop_forkserver()
