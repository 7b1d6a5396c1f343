"""The entry points of `fault_report.py`: what a fresh process runs while something is broken, and what it answers."""

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faults
from limited import MEMORY, out_of_memory, set_limits

ROOT = Path(__file__).parent.parent
NETWORK = "cifar_resnet20"
IMAGE = ROOT / "examples" / "images" / "rocket.jpg"

Answer = tuple[str, str, float, float]  # "value", "error" or "CRASH"; text; seconds; seconds of processor time


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


def limited(task: Callable[..., str], file: Path) -> str:
    """What a task answers in a process that the system ends at a limit."""
    set_limits()
    try:
        return task(file)
    except Exception as error:
        if out_of_memory(error):
            raise MemoryError(f"it took {MEMORY} MiB") from error
        raise


ENTRY_POINTS: dict[str, Callable[[str], str]] = {"timm": by_timm, "torch.hub": by_hub, "spd-zoo": by_command}
FILE_TASKS: dict[str, Callable[..., str]] = {"timm": by_file, "weights import": by_import}


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


def run_in_child(
    pipe: Connection, cache: Path, options: dict[str, Any], task: Callable[..., str], arguments: Any
) -> None:
    """Runs `task` with the cache, and sends its `Answer` through the pipe."""
    from spd_zoo.weights import WeightsError

    use_cache(cache, **options)
    started, cpu_started = time.monotonic(), time.process_time()
    try:
        result = ("value", task(*arguments))
    except WeightsError as error:
        result = ("error", str(error))
    except BaseException as error:
        result = ("CRASH", f"{type(error).__name__}: {error}")
    pipe.send((*result, time.monotonic() - started, time.process_time() - cpu_started))
