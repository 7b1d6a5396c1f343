"""Reads checkpoints in processes that are limited to 200 MiB of additional memory and 20 s of CPU time.

Run as a program, it reads lists of paths as lines of JSON, and prints a line for each path.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

MEMORY, SECONDS = 200, 20  # MiB, and seconds of CPU time


@dataclass
class Reading:
    """The result for a file.

    Attributes:
        result: "read", "refused", "ENDED" by a limit, or "CRASH".
        text: The error, if any.
    """

    result: str
    text: str = ""


def set_limits() -> None:
    """Applies the limits to this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY * 2**20,) * 2)
    seconds = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the memory limit caused an error, even if a reader took it for a damaged file."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def opened(folder: Path) -> Iterator[Callable[..., Iterator[Reading]]]:
    """Starts a server for the time of the context, and yields a function that reads files with given contents.

    Its arguments are the contents, and `together`, the number of files that one process reads (default: 1).
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    with subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe) as server:
        assert server.stdin and server.stdout
        answers = iter(server.stdout.readline, "")

        def read_all(contents: Iterable[bytes], together: int = 1) -> Iterator[Reading]:
            waiting = iter(contents)
            while batch := list(islice(waiting, together)):
                files = [folder / f"checkpoint{i}" for i in range(len(batch))]
                for file, content in zip(files, batch, strict=True):
                    file.write_bytes(content)
                print(json.dumps([str(file) for file in files]), file=server.stdin, flush=True)
                for _ in batch:
                    yield Reading(**json.loads(next(answers)))

        yield read_all
        server.stdin.close()


def _read(file: Path) -> Reading:
    from spd_zoo.weights import WeightsError, read_checkpoint

    try:
        tensors = read_checkpoint(file)
    except WeightsError as error:
        if out_of_memory(error):
            return Reading("ENDED", str(error))
        one_line = str(error).isprintable() and len(str(error)) < 1000
        return Reading("refused" if one_line else "CRASH", str(error)[:1000])
    except BaseException as error:
        return Reading("CRASH", f"{type(error).__name__}: {error}"[:1000])
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(storages.values()) > file.stat().st_size:
        return Reading("CRASH", "numbers that are not in the file")
    return Reading("read")


def _answers(files: list[str]) -> Iterator[str]:
    """The lines that a new process prints for the files; fewer than files if it was killed."""
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(receive)
        try:
            set_limits()
            for file in files:
                os.write(send, json.dumps(vars(_read(Path(file)))).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answers = pipe.read().decode().splitlines()
    _, status = os.waitpid(process, 0)
    yield from answers
    if len(answers) < len(files):
        by = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
        yield json.dumps({"result": "ENDED" if by in ("SIGXCPU", "SIGKILL") else "CRASH", "text": by})


def main() -> None:
    import spd_zoo.weights  # noqa: F401 (imported once, before processes are forked)

    for line in sys.stdin:
        files = json.loads(line)
        while files:
            answers = list(_answers(files))
            print("\n".join(answers), flush=True)
            files = files[len(answers) :]


if __name__ == "__main__":
    main()
