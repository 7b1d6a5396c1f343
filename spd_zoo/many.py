"""Many images in, one file of results out, in bounded memory: what `--results` of predict and detect runs.

The images are cut into parts of `save_every`. What is found in a part appears in the folder `<results>.parts` at once
and whole, so whatever ends the command, even SIGKILL, the same command goes on behind the finished parts. Of several
processes (torchrun) each computes every n-th part; they need not wait for each other, for whichever finds all parts
there makes one file of them.
"""

import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from spd_zoo import __version__
from spd_zoo.detect import Detections, Detector, Placement
from spd_zoo.images import read_image
from spd_zoo.predict import Predictor
from spd_zoo.training.data import DataError, LabelledImages, open_data
from spd_zoo.training.process import Process

__all__ = [
    "FORMATS",
    "Files",
    "ManyError",
    "Stopped",
    "Summary",
    "Task",
    "detection",
    "open_any",
    "prediction",
    "write",
]

FORMATS = (".jsonl", ".csv", ".parquet")

Row: TypeAlias = "dict[str, Any]"
File: TypeAlias = "str | BytesIO"  # a path or the bytes


class ManyError(ValueError):
    """Results that cannot be written; the message says why and what to do. Finished parts stay."""


class Stopped(KeyboardInterrupt):
    """The command was asked to stop by the signal `number`; finished parts stay."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class Images(Protocol):
    """Images that are read by number; `LabelledImages` are some."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the image is called in the results."""

    def file(self, index: int) -> File:
        """Its path or its bytes."""


@dataclass(frozen=True)
class Files:
    """Image files by their paths."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return self.paths[index]

    file = name


def open_any(data: str, split: str = "", image_column: str = "", label_column: str = "") -> LabelledImages:
    """A split of a data set that `spd_zoo.training.data.open_data` reads; without `split` the only one there is.

    Raises:
        DataError: If there is no such data set or split, or there are several and none is asked for.
    """
    names = (split,) if split else ("train", "val", "test")
    found = {name: images for name in names if (images := open_data(data, name, image_column, label_column))}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise DataError(f"{data} has the splits {', '.join(found)}; choose one with --split")
    raise DataError(f"{data} has no split {' or '.join(names)}")


@dataclass(frozen=True)
class Task:
    """What is computed of every image.

    Attributes:
        read: Makes the input of an image file, in a reading process; raises ValueError if it cannot be read.
        join: Makes one object, which is quick to pass on, of several inputs.
        compute: Makes a row, a dict with the keys of `columns`, of each of the inputs so joined.
        columns: The types of a row's values; in a list, of all its elements.
        at_once: Images that are computed together.
        about: All that the results depend on besides the images, as JSON has it.
    """

    read: Callable[[File], Any]
    join: Callable[[list[Any]], Any]
    compute: Callable[[Any], list[Row]]
    columns: dict[str, Any]
    at_once: int
    about: dict[str, Any]


def prediction(model: str, top_k: int = 5, batch_size: int = 32, device: str | None = None) -> Task:
    """The most probable classes, in the column `top`.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights cannot be had or must not be used.
    """
    predictor = Predictor(model, top_k, device)

    def compute(inputs: Tensor) -> list[Row]:
        return [
            {"top": [{"index": g.index, "name": g.name, "probability": round(g.probability, 6)} for g in top]}
            for top in predictor(inputs)
        ]

    columns = {"top": [{"index": int, "name": str, "probability": float}]}
    about = _about(predictor.net, model, batch_size) | {"top_k": top_k}
    return Task(predictor.reader, torch.stack, compute, columns, batch_size, about)


def detection(detector: Detector, model: str) -> Task:
    """The objects, in the column `objects`, and `width` and `height` of the upright image.

    Args:
        detector: What finds the objects; if it has tiles, each reading process has two whole images in memory.
        model: What it is called.
    """
    columns = {"width": int, "height": int, "objects": [{"label": int, "name": str, "score": float, "box": [float]}]}
    options = ("score_threshold", "iou_threshold", "max_detections", "image_size", "tile", "overlap", "whole_image")
    about = _about(detector.net, model, detector.batch_size) | {name: getattr(detector, name) for name in options}

    def in_tiles(images: list[Image.Image]) -> list[Row]:
        return [_row(image.size, one) for image, one in zip(images, detector(images), strict=True)]

    def in_views(inputs: tuple[Tensor, list[Placement]]) -> list[Row]:
        found = detector.find(zip(itertools.count(), *inputs, strict=False))
        return [_row(place.size[::-1], one) for place, one in zip(inputs[1], found, strict=True)]

    if detector.tile:  # all tiles of an image at once would be too many
        return Task(read_image, list, in_tiles, columns, 1, about)
    reader = copy.copy(detector)
    reader.net = copy.deepcopy(detector.net).to("meta")  # the network's properties without its weights
    return Task(partial(_read_view, reader), _join_views, in_views, columns, detector.batch_size, about)


def _row(size: tuple[int, ...], found: Detections) -> Row:
    each = zip(found.labels.tolist(), found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
    objects = [
        {"label": label, "name": name, "score": round(score, 5), "box": [round(x, 2) for x in box]}
        for label, name, score, box in each
    ]
    return {"width": size[0], "height": size[1], "objects": objects}


def _read_view(detector: Detector, file: File) -> tuple[Tensor, Placement]:
    (view,) = detector.views(read_image(file))
    return view


def _join_views(views: list[tuple[Tensor, Placement]]) -> tuple[Tensor, list[Placement]]:
    return torch.stack([pixels for pixels, _ in views]), [placement for _, placement in views]


def _about(net: nn.Module, model: str, batch_size: int) -> dict[str, Any]:
    cfg = vars(net)["pretrained_cfg"]
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "label_names", "label_descriptions")
    digest = hashlib.blake2b(repr([cfg.get(key) for key in keys]).encode(), digest_size=16)
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    device = next(net.parameters()).device.type
    return {"model": model, "weights": digest.hexdigest(), "batch_size": batch_size, "device": device}


@dataclass(frozen=True)
class Summary:
    """How many images a finished file has, and how many of them could not be read."""

    images: int
    failed: int


def write(
    images: Images,
    task: Task,
    results: Path,
    process: Process,
    workers: int = 2,
    save_every: int = 512,
    overwrite: bool = False,
) -> Summary | None:
    """Writes a row per image, in the order of the images, into a new file; goes on where the same call once ended.

    A row has the columns `path`, `error` (None, or why the image cannot be read, which leaves the others None) and
    those of the task. CSV has lists as JSON; parquet has `save_every` rows in a group.

    Args:
        images: What is read.
        task: What is computed.
        results: The file; its suffix is one of `FORMATS`.
        process: This process and how many there are; each calls this function with the same arguments.
        workers: Processes that read images for this one; 0: it reads them itself.
        save_every: Images whose results are saved together: what an interruption costs at most.
        overwrite: Whether a file that is there is replaced at the end.

    Returns:
        What the file has; None if other processes have yet to finish their parts, the last of which makes the file.

    Raises:
        ManyError: If the file is there, results of other images or options are in its way, or it cannot be written.
        Stopped: If SIGINT or SIGTERM came.
    """
    parts = _Parts(results, len(images), save_every, task.columns)
    job = {"images": _digest(images), "save_every": save_every, "version": __version__} | task.about
    job = json.loads(json.dumps(job))
    lock = FileLock(parts.folder.with_name(f".{results.name}.lock"))
    try:
        complaint, missing = "", []
        if process.first:
            try:
                parts.begin(job, overwrite, lock)
                missing = parts.missing()
            except (ManyError, OSError) as error:
                complaint = str(error)
        complaint, missing, firsts_job = process.from_first((complaint, missing, job))
        if complaint:
            raise ManyError(complaint)
        if job != firsts_job:
            raise ManyError(f"the processes differ in {_differences(job, firsts_job)}; give all the same command")
        todo = [part for part in missing if part % process.world == process.rank]
        share = range(process.rank, parts.count, process.world)
        total = sum(len(parts.rows(part)) for part in share)
        done = total - sum(len(parts.rows(part)) for part in todo)
        with (
            _signals_stop(),
            tqdm(total=total, initial=done, unit="image", leave=False, disable=None if process.first else True) as bar,
        ):
            try:
                for part, rows in _computed(images, task, parts, todo, workers, bar):
                    parts.save(part, rows)
                    done += len(rows)
                return parts.merge()
            except Stopped as stopped:
                raise Stopped(stopped.number, f"stopped with {done:,} of {total:,} images done") from stopped
    finally:
        if lock.is_locked:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Raises `Stopped` where SIGINT or SIGTERM comes."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    here = threading.current_thread() is threading.main_thread()  # where alone Python lets one ask for signals
    usual = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield
    finally:
        for number, action in usual.items():
            signal.signal(number, action)


def _leave_signals_to_parent(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _computed(
    images: Images, task: Task, parts: "_Parts", todo: Sequence[int], workers: int, bar: Any
) -> Iterator[tuple[int, list[Row]]]:
    """The parts in `todo` and their rows."""
    batches = [rows[i : i + task.at_once] for rows in map(parts.rows, todo) for i in range(0, len(rows), task.at_once)]
    reading = _Reading(images, task)
    loader: DataLoader[Any] = DataLoader(
        reading, batch_size=None, sampler=batches, num_workers=workers, worker_init_fn=_leave_signals_to_parent
    )
    empty = dict.fromkeys(task.columns)
    rows: list[Row] = []
    for batch, (inputs, errors) in zip(batches, _explained(loader), strict=True):
        computed = iter(task.compute(inputs) if inputs is not None else [])
        for index, error in zip(batch, errors, strict=True):
            path = images.name(index).encode(errors="backslashreplace").decode()  # file names need not be text
            rows.append({"path": path, "error": error} | (next(computed) if error is None else empty))
        bar.update(len(batch))
        part = batch[0] // parts.size
        if batch.stop == parts.rows(part).stop:
            yield part, rows
            rows = []


class _Reading(Dataset[Any]):
    """Batches of images, by their numbers: the inputs of those that can be read, and each one's error or None."""

    def __init__(self, images: Images, task: Task) -> None:
        self.images, self.read, self.join = images, task.read, task.join

    def __getitem__(self, batch: range) -> tuple[Any, list[str | None]]:
        inputs: list[Any] = []
        errors: list[str | None] = []
        for index in batch:
            try:
                inputs.append(self.read(self.images.file(index)))
                errors.append(None)
            except ValueError as error:
                errors.append(str(error))
        return (self.join(inputs) if inputs else None), errors


def _explained(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:  # torch's, where a reading process died
        reason = str(error).strip().partition("\n")[0]
        raise ManyError(
            f"a process that reads images ended: {reason}; where memory was short, give fewer --workers; "
            "finished parts are kept, and the same command goes on from there"
        ) from error


def _digest(images: Images) -> str:
    """How many images there are, and a digest of their names, and labels if they have any."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(images)):
        digest.update(f"{images.name(i)}\0".encode(errors="backslashreplace"))
    if isinstance(images, LabelledImages):
        digest.update(images.fingerprint().encode())
    return f"{len(images)} {digest.hexdigest()}"


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in one | other if one.get(name) != other.get(name)]
    return ", ".join(f"{name} ({other.get(name)}, now {one.get(name)})" for name in names)


class _Parts:
    """The folder of finished parts, `<results>.parts`; while they are merged it is called `<results>.merging`.

    Every file appears in it whole: it is written under another name, flushed to the disk, and renamed. `job.json` is
    the first one; nothing in a folder without it counts.
    """

    def __init__(self, results: Path, images: int, size: int, columns: dict[str, Any]) -> None:
        if results.suffix not in FORMATS:
            raise ManyError(f"{results} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        if results.suffix == ".parquet":
            import pyarrow.parquet  # noqa: F401  (where it is missing, this says so now and not at the end)
        self.results, self.images, self.size, self.columns = results, images, size, columns
        self.folder = results.with_name(f"{results.name}.parts")
        self.merging = results.with_name(f"{results.name}.merging")
        self.count = math.ceil(images / size)

    def rows(self, part: int) -> range:
        """The numbers of the part's images."""
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def begin(self, job: dict[str, Any], overwrite: bool, lock: FileLock) -> None:
        """Makes the folder, or makes sure that what is in it belongs to the same `job`."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ManyError(f"another command is writing {self.results}; wait for it, or give another file") from None
        if self.merging.exists() and not self.folder.exists():
            self.merging.rename(self.folder)
        begun = self._begun()
        if self.results.exists():
            if begun is not None and not begun["replaces"]:  # stopped when the results were whole
                shutil.rmtree(self.folder)
                begun = None
            if not overwrite:
                raise ManyError(f"{self.results} is there already; give another file, or --overwrite to replace it")
        if begun is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            text = json.dumps(job | {"replaces": self.results.exists()}, indent=1).encode()
            self._write("job.json", lambda file: file.write(text))
            return
        del begun["replaces"]
        if begun != job:
            raise ManyError(
                f"{self.folder} holds unfinished results that differ in {_differences(job, begun)}; finish them with "
                "the command that began them, delete that folder, or give another file"
            )

    def _begun(self) -> dict[str, Any] | None:
        try:
            begun: dict[str, Any] = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ManyError(f"{self.folder}/job.json is damaged; delete that folder to begin again") from error
        return begun

    def missing(self) -> list[int]:
        """The parts that are not finished."""
        finished = {file.name for file in self.folder.iterdir()}
        return [part for part in range(self.count) if f"{part:08}.jsonl" not in finished]

    def save(self, part: int, rows: list[Row]) -> None:
        """Finishes a part."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self._write(f"{part:08}.jsonl", lambda file: file.write(text))

    def merge(self) -> Summary | None:
        """Makes the file of results if all parts are there and no other process is about to."""
        try:
            if self.missing():
                return None
            self.folder.rename(self.merging)  # only one process can
        except FileNotFoundError:
            return None
        self.folder = self.merging
        failed = 0

        def rows_of(part: int) -> list[Row]:
            nonlocal failed
            with (self.folder / f"{part:08}.jsonl").open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            failed += sum(row["error"] is not None for row in rows)
            return rows

        form = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}[self.results.suffix]
        columns = {"path": str, "error": str} | self.columns
        self._write(self.results.name, lambda file: form(file, map(rows_of, range(self.count)), columns), self.results)
        shutil.rmtree(self.folder)
        return Summary(self.images, failed)

    def _write(self, name: str, write_to: Callable[[BinaryIO], Any], target: Path | None = None) -> None:
        """Writes the file `name` of the folder, or `target`, whole or not at all."""
        temporary = self.folder / f"{name}.tmp"
        target = target or self.folder / name
        try:
            with temporary.open("wb") as file:
                write_to(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ManyError(
                f"cannot write {target}: {error.strerror or error}; finished parts are kept, and the same command goes "
                "on from there"
            ) from error
        if os.name == "posix":  # the new name, too, outlives a power failure
            folder = os.open(target.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def _write_jsonl(file: BinaryIO, parts: Iterator[list[Row]], _: dict[str, Any]) -> None:
    for rows in parts:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _write_csv(file: BinaryIO, parts: Iterator[list[Row]], columns: dict[str, Any]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for rows in parts:
        for row in rows:
            lists = {name: json.dumps(row[name], ensure_ascii=False) for name in row if isinstance(row[name], list)}
            writer.writerow(row | lists)
    text.detach()  # written out; the file stays open


def _write_parquet(file: BinaryIO, parts: Iterator[list[Row]], columns: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    def arrow(kind: Any) -> Any:
        if isinstance(kind, list):
            return pyarrow.list_(arrow(kind[0]))
        if isinstance(kind, dict):
            return pyarrow.struct([(name, arrow(inner)) for name, inner in kind.items()])
        return {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}[kind]

    schema = pyarrow.schema([(name, arrow(kind)) for name, kind in columns.items()])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for rows in parts:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
