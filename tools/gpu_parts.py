"""Moves a data set and a checkpoint through a channel that only takes small files.

    python tools/gpu_parts.py split DATA PARTS [--mib 50]   # the files of a folder -> PARTS/000.tar, 001.tar, ...
    python tools/gpu_parts.py unpack PARTS DATA             # the .tar files and folders that arrived -> one folder
    python tools/gpu_parts.py checkpoint RUN OUT [--mib 15] # a run's weights in fp16 -> OUT/model.fp16.0, .1, ...
    python tools/gpu_parts.py join OUT FILE                 # these -> one safetensors file

`unpack` takes the parts in any order, and can be repeated when more arrive; it prints how many files there are.
`checkpoint` reads `last.pt`, so it works while the run goes on; it takes the moving average if there is one. Only the
commands that need torch import it, because that takes seconds.
"""

import argparse
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

MIB = 2**20


def split(source: Path, target: Path, mib: float) -> str:
    """Distributes the files of a folder over tar files of at most `mib` MiB."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    if not files:
        raise SystemExit(f"{source} has no files")
    sizes = [1024 + -(-file.stat().st_size // 512) * 512 for file in files]
    limit = int(mib * MIB) - 4 * tarfile.RECORDSIZE
    if max(sizes) > limit:
        raise SystemExit(f"{files[sizes.index(max(sizes))]} is larger than a part; give a larger --mib")
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise SystemExit(f"{target} is not empty; give a new folder")
    count = -(-sum(sizes) // limit)
    while max(sum(sizes[i::count]) for i in range(count)) > limit:
        count += 1
    for i in range(count):
        with tarfile.open(target / f"{i:03}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for file in files[i::count]:
                archive.add(file, file.relative_to(source).as_posix())
    return f"{len(files)} files in {count} parts"


def unpack(parts: Path, target: Path, _: float) -> str:
    """Unpacks the parts that have arrived: tar files, or folders, whose content is linked."""
    if not parts.is_dir():
        raise SystemExit(f"there is no folder {parts}")
    done = 0
    for part in sorted(parts.iterdir()):
        if part.suffix == ".tar":
            with tarfile.open(part) as archive:
                # not extractall's argument `filter`, which Python 3.11.2 and 3.10.11 do not have yet
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(target)
        elif part.is_dir():
            shutil.copytree(part, target, dirs_exist_ok=True)
        else:
            continue
        done += 1
    if not done:
        raise SystemExit(f"{parts} has no parts: .tar files or folders")
    return f"{done} parts, {sum(file.is_file() for file in target.rglob('*'))} files"


def checkpoint(run: Path, out: Path, mib: float) -> str:
    """Writes the weights of a run in fp16, in files of at most `mib` MiB."""
    from safetensors.torch import save

    from spd_zoo.files import whole
    from spd_zoo.weights.checkpoint import read_saved

    if not (run / "last.pt").exists():
        return f"{run} has saved no state yet"
    state = read_saved(run / "last.pt")
    weights = {name: value.contiguous() for name, value in (state["ema"] or state["net"]).items()}
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    facts = {"class_names": json.dumps(state["class_names"]), "epochs": str(len(state["history"]))}
    content, size = save(half, facts), int(mib * MIB)
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    for i, piece in enumerate(pieces):
        with whole(out / f"model.fp16.{i}") as temporary:
            temporary.write_bytes(piece)
    return f"{len(content) / MIB:.1f} MiB in {len(pieces)} files, after {len(state['history'])} epochs"


def join(out: Path, file: Path, _: float) -> str:
    """Joins the files that `checkpoint` wrote; safetensors checks that none is missing."""
    from safetensors.torch import load

    from spd_zoo.files import whole

    pieces = sorted(out.glob("model.fp16.*"), key=lambda piece: int(piece.suffix[1:]))
    content = b"".join(piece.read_bytes() for piece in pieces)
    count = len(load(content))
    with whole(file) as temporary:
        temporary.write_bytes(content)
    return f"{count} tensors"


COMMANDS: dict[str, tuple[Callable[[Path, Path, float], str], float]] = {
    "split": (split, 50),
    "unpack": (unpack, 0),
    "checkpoint": (checkpoint, 15),
    "join": (join, 0),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and prints what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=float, help="size of the largest file (default: 50, for a checkpoint 15)")
    options = parser.parse_args(argv)
    function, mib = COMMANDS[options.command]
    print(function(options.source, options.target, options.mib or mib))
    return 0


if __name__ == "__main__":
    sys.exit(main())
