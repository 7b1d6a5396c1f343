"""Many images in, one file of results out, in bounded memory: what `--results` of predict and detect runs.

The images are cut into parts of `save_every`. What is found in a part appears in the folder `<results>.parts` at once
and whole, so whatever ends the command, even SIGKILL, the same command goes on behind the finished parts. Of several
processes (torchrun) each computes every n-th part, and whichever finds all parts there makes one file of them. The
first process keeps the others' commands out, by a lock, until all processes are done.
"""

import copy
import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from spd_zoo.data.labelled import DataError, LabelledImages, open_data
from spd_zoo.data.reading import read_image
from spd_zoo.files import is_leftover, remove_leftovers, whole
from spd_zoo.inference.classifier import Predictor, transform_errors
from spd_zoo.inference.detector import Detections, Detector, Placement
from spd_zoo.process import Process, Stopped, StopSignals, leave_ctrl_c_to_parent

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

_GOES_ON = "finished parts are kept, and the same command goes on from there"


class ManyError(ValueError):
    """Results that cannot be written; the message says why and what to do. Finished parts stay."""


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
    """A split of a data set that `spd_zoo.data.labelled.open_data` reads; without `split` the only one there is.

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
    image = read_image(file)
    with transform_errors(image):
        (view,) = detector.views(image)
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
        What the file has; None if another process, the last that finished its parts, made the file.

    Raises:
        ManyError: If the file is there, something else is in its way, it cannot be written, or a process died.
        Stopped: If SIGINT or SIGTERM came.
    """
    parts = _Parts(results, len(images), save_every, task.columns, overwrite)
    job = {"images": _digest(images), "save_every": save_every, "version": __version__} | task.about
    job = json.loads(json.dumps(job))
    lock = FileLock(parts.folder.with_name(f".{results.name}.lock"))
    try:
        complaint, missing = "", []
        if process.first:
            try:
                parts.begin(job, lock)
                missing = parts.missing()
            except (ManyError, OSError) as error:
                complaint = str(error)
        complaint, missing, firsts_job = process.broadcast((complaint, missing, job))
        if complaint:
            raise ManyError(complaint)
        if job != firsts_job:
            raise ManyError(f"the processes differ in {_differences(job, firsts_job)}; give all the same command")
        todo = [part for part in missing if part % process.world == process.rank]
        share = range(process.rank, parts.count, process.world)
        total = sum(len(parts.rows(part)) for part in share)
        done = total - sum(len(parts.rows(part)) for part in todo)
        with (
            StopSignals(interrupt=True) as signals,
            tqdm(total=total, initial=done, unit="image", leave=False, disable=None if process.first else True) as bar,
        ):
            try:
                for part, rows in _computed(images, task, parts, todo, workers, bar):
                    parts.save(part, rows)
                    done += len(rows)
                summary = parts.merge()
                _wait_for_all(process)
                return summary
            except (Stopped, RuntimeError) as error:
                if signals.number:  # loader workers may have got the signal, too; then torch raises RuntimeError
                    raise Stopped(signals.number, f"stopped with {done:,} of {total:,} images done") from error
                reason = str(error).strip().partition("\n")[0]
                if not reason.startswith("DataLoader worker (pid"):
                    raise
                raise ManyError(
                    f"a process that reads images ended: {reason}; where memory was short, give fewer --workers; "
                    + _GOES_ON
                ) from error
    finally:
        lock.release()  # and leave the file: who deletes it parts those that hold it from those that come


def _wait_for_all(process: Process) -> None:
    """Returns when all processes are done, so that the first one's lock holds until then."""
    try:
        process.all_gather(None)
    except RuntimeError as error:  # torch's, at once when one of them has ended
        raise ManyError(f"another of the {process.world} processes ended before it was done; {_GOES_ON}") from error


def _computed(
    images: Images, task: Task, parts: "_Parts", todo: Sequence[int], workers: int, bar: Any
) -> Iterator[tuple[int, list[Row]]]:
    """The parts in `todo` and their rows."""
    batches = [rows[i : i + task.at_once] for rows in map(parts.rows, todo) for i in range(0, len(rows), task.at_once)]
    reading = _Reading(images, task)
    loader: DataLoader[Any] = DataLoader(
        reading, batch_size=None, sampler=batches, num_workers=workers, worker_init_fn=leave_ctrl_c_to_parent
    )
    empty = dict.fromkeys(task.columns)
    rows: list[Row] = []
    for batch, (inputs, errors) in zip(batches, loader, strict=True):
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
    the first one; nothing in a folder without it counts. `whole.json` is the last one, and says how large and how old
    the file of results will be that is about to appear.
    """

    def __init__(self, results: Path, images: int, size: int, columns: dict[str, Any], overwrite: bool) -> None:
        if results.suffix not in FORMATS:
            raise ManyError(f"{results} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        if results.suffix == ".parquet":
            import pyarrow.parquet  # noqa: F401  (where it is missing, this says so now and not at the end)
        self.results, self.images, self.size = results, images, size
        self.columns, self.overwrite = columns, overwrite
        self.folder = results.with_name(f"{results.name}.parts")
        self.merging = results.with_name(f"{results.name}.merging")
        self.count = math.ceil(images / size)

    def rows(self, part: int) -> range:
        """The numbers of the part's images."""
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def begin(self, job: dict[str, Any], lock: FileLock) -> None:
        """Makes the folder, or makes sure that what is in it belongs to the same `job`."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ManyError(f"another command is writing {self.results}; wait for it, or give another file") from None
        self._refuse_foreign_files()
        if self.merging.exists():
            if self.folder.exists():
                raise ManyError(f"{self.merging} and {self.folder} are both there; delete one of them")
            self.merging.rename(self.folder)
        begun = self._begun()
        if begun is not None and self._is_whole():  # stopped when the results were whole
            shutil.rmtree(self.folder)
            begun = None
        self._refuse_results()
        if begun is None:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            self._write("job.json", lambda file: file.write(json.dumps(job, indent=1).encode()))
            return
        if begun != job:
            raise ManyError(
                f"{self.folder} holds unfinished results that differ in {_differences(job, begun)}; finish them with "
                "the command that began them, delete that folder, or give another file"
            )
        remove_leftovers(self.folder)

    def _refuse_foreign_files(self) -> None:
        """Raises ManyError if a folder of parts holds anything that is not written here."""
        ours = re.compile(r"(job|whole)\.json|\d{8}\.jsonl")
        for folder in (self.folder, self.merging):
            files = sorted(folder.iterdir()) if folder.exists() else []
            foreign = next(
                (file.name for file in files if not ours.fullmatch(file.name) and not is_leftover(file)), None
            )
            if foreign is not None:
                raise ManyError(
                    f"{folder} is where unfinished results go, but it holds {foreign}, which is none; move that away, "
                    "or give another file"
                )

    def _refuse_results(self) -> None:
        """Raises ManyError if there are results that must stay."""
        if self.results.exists() and not self.overwrite:
            raise ManyError(f"{self.results} is there already; give another file, or --overwrite to replace it")

    def _is_whole(self) -> bool:
        """Whether the results that are there are those of the folder."""
        try:
            expected = json.loads((self.folder / "whole.json").read_text(encoding="utf-8"))
            found = self.results.stat()
        except FileNotFoundError:
            return False
        return bool(expected == {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns})

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
            self._refuse_results()  # others may have made some meanwhile
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

        def note(temporary: Path) -> None:
            self._refuse_results()
            found = temporary.stat()
            text = json.dumps({"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}).encode()
            self._write("whole.json", lambda file: file.write(text))

        parts = map(rows_of, range(self.count))
        self._write(self.results.name, lambda file: form(file, parts, columns), self.results, note)
        shutil.rmtree(self.folder)
        return Summary(self.images, failed)

    def _write(
        self,
        name: str,
        write_to: Callable[[BinaryIO], Any],
        target: Path | None = None,
        before: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes the file `name` of the folder, or `target`, whole or not at all.

        Args:
            name: What the file is called in the folder.
            write_to: Writes its content.
            target: Where it goes, if not into the folder.
            before: Is called with the finished file before it goes there.
        """
        target = target or self.folder / name
        try:
            with whole(target, within=self.folder) as temporary:
                with temporary.open("wb") as file:
                    write_to(file)
                if before is not None:
                    before(temporary)
        except OSError as error:
            raise ManyError(f"cannot write {target}: {error.strerror or error}; {_GOES_ON}") from error


def _write_jsonl(file: BinaryIO, parts: Iterator[list[Row]], _: dict[str, Any]) -> None:
    for rows in parts:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _write_csv(file: BinaryIO, parts: Iterator[list[Row]], columns: dict[str, Any]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # "\r" needs quotes
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
