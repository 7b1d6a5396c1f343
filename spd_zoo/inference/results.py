"""Writes one file of results for any number of images, in bounded memory: `--results` of predict and detect.

The images are cut into parts of `save_every`. The rows of a finished part are written atomically to the folder
`<results>.parts`. Whatever ends the command, even SIGKILL, the same command resumes after the finished parts. Of N
processes (torchrun) each computes every Nth part, and the one that finds all parts finished merges them into one file.
The first process holds a lock against other commands until all processes are done.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from spd_zoo.console import bar_disabled
from spd_zoo.data.boxes import BoxImages
from spd_zoo.data.boxes.opening import find_source
from spd_zoo.data.boxes.opening import open_split as open_box_split
from spd_zoo.data.labelled import DataError, LabelledImages, open_data
from spd_zoo.data.notes import Notes
from spd_zoo.data.reading import MAX_PIXELS
from spd_zoo.data.regions import Regions
from spd_zoo.data.splits import no_split
from spd_zoo.errors import first_line
from spd_zoo.files import is_leftover, remove_leftovers, whole
from spd_zoo.inference.classifier import Classification, Classifier, transform_errors
from spd_zoo.inference.detector import Detections, Detector, Placement
from spd_zoo.inference.loop import ImageFile, Images, Task, batches, run
from spd_zoo.inference.sources import read_source
from spd_zoo.process import Process, Stopped, StopSignals, freed_memory_kept
from spd_zoo.version import __version__

__all__ = ["FORMATS", "Job", "ResultsError", "Summary", "classification", "detection", "open_split", "write_results"]

FORMATS = (".jsonl", ".csv", ".parquet")

Row: TypeAlias = "dict[str, Any]"
Detected: TypeAlias = "tuple[tuple[int, int], Detections]"  # width and height of the image, and its objects

_RESUMES = "finished parts are kept, and the same command resumes"


class ResultsError(ValueError):
    """Results that cannot be written; the message says why and what to do. Finished parts are kept."""


def open_split(
    data: str, split: str = "", image_column: str = "", label_column: str = "", boxes: bool = False
) -> LabelledImages | BoxImages:
    """Opens a split of a data set that `spd_zoo.data.labelled.open_data` reads, or of one with boxes.

    Args:
        data: The data set, as for `open_data`, or for `spd_zoo.data.boxes.open_boxes`.
        split: The split; by default the only one.
        image_column: The column with the images, as for `open_data`.
        label_column: The column with the labels, as for `open_data`.
        boxes: Whether the data set may have boxes instead of labels.

    Returns:
        The images of the split.

    Raises:
        DataError: If there is no such data set or split, or there are several and none is asked for.
    """
    names = (split,) if split else ("train", "val", "test")
    opening, refused = _opening(data, image_column, label_column, boxes)
    try:
        found = {name: images for name in names if (images := opening(name))}
    except DataError as error:
        raise DataError(
            f"{refused}; nor can it be read as images with labels: {error}" if refused else error
        ) from error
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise DataError(f"{data} has the splits {', '.join(found)}; choose one with --split")
    raise DataError(no_split(data, " or ".join(names), opening))


def _opening(
    data: str, image_column: str, label_column: str, boxes: bool
) -> tuple[Callable[[str], LabelledImages | BoxImages | None], DataError | None]:
    """What opens a split, and why it is none with boxes although those were looked for."""
    refused = None
    if boxes and not (image_column or label_column):
        try:
            return partial(open_box_split, find_source(data), data), None
        except DataError as error:
            refused = error
    return partial(open_data, data, image_column=image_column, label_column=label_column), refused


@dataclass(frozen=True)
class Job:
    """The computation for every image, and the format of its row in a results file.

    Attributes:
        task: The task for the loop over images.
        row: Creates the row of an image from its result: a dict with the keys of `columns`.
        columns: The types of a row's values; for a list, the type of its elements.
        settings: Everything that the results depend on in addition to the images, as JSON.
        notes: What a result leaves out.
    """

    task: Task[Any]
    row: Callable[[Any], Row]
    columns: dict[str, Any]
    settings: dict[str, Any]
    notes: Callable[[Any], Sequence[str]] = lambda result: ()


def classification(
    model: str,
    top_k: int = 5,
    batch_size: int = 32,
    device: str | None = None,
    class_map: Mapping[str, str] | None = None,
    probabilities: bool = False,
) -> Job:
    """The most probable class of every image in the columns `class` and `probability`, and the best ones in `top`.

    Args:
        model: As for `Classifier`.
        top_k: Classes in `top`.
        batch_size: Images per batch.
        device: torch device; a GPU by default if there is one.
        class_map: As for `Classifier`.
        probabilities: Whether the column `probabilities` has the probability of every class, in the network's order.

    Raises:
        DataError: If `class_map` names a class that the network does not have.
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights are unavailable or must not be used.
    """
    classifier = Classifier(model, device=device, batch_size=batch_size, class_map=class_map)

    def row(found: Classification) -> Row:
        top = [asdict(each) | {"probability": round(each.probability, 6)} for each in found.top(top_k)]
        every = {"probabilities": [round(each, 6) for each in found.probabilities.tolist()]} if probabilities else {}
        return {"class": top[0]["name"], "probability": top[0]["probability"], "top": top} | every

    columns: dict[str, Any] = {"class": str, "probability": float}
    columns |= {"top": [{"index": int, "name": str, "probability": float}]}
    columns |= {"probabilities": [float]} if probabilities else {}
    settings = _settings(classifier.net, model, batch_size) | {"top_k": top_k, "columns": list(columns)}
    if class_map:
        settings |= {"class_map": dict(class_map)}
    return Job(classifier.task, row, columns, settings)


def detection(detector: Detector, model: str) -> Job:
    """The objects in every image, in the column `objects`, and the upright image's `width` and `height`.

    Args:
        detector: The detector; if it has tiles, each reading process has two whole images in memory.
        model: The name of the detector in the settings.
    """
    columns = {"width": int, "height": int, "objects": [{"label": int, "name": str, "score": float, "box": [float]}]}
    options = ("score_threshold", "iou_threshold", "max_detections", "image_size", "tile", "overlap", "whole_image")
    settings = _settings(detector.net, model, detector.batch_size) | {name: getattr(detector, name) for name in options}
    if detector.class_map:
        settings |= {"class_map": dict(detector.class_map)}
    if isinstance(detector.thresholds, Tensor):
        settings |= {"thresholds": repr(detector.thresholds.tolist())}
    if detector.agnostic:
        settings |= {"agnostic": True}
    if detector.max_pixels != MAX_PIXELS:
        settings |= {"max_pixels": detector.max_pixels}

    def notes(detected: Detected) -> Sequence[str]:
        return detector.limit_notes(detected[1])

    def of_images(images: list[Regions]) -> list[Detected]:
        return [(image.size, found) for image, found in zip(images, detector.find_in(images), strict=True)]

    def of_views(inputs: tuple[Tensor, list[Placement]]) -> list[Detected]:
        found = detector.find(zip(itertools.count(), *inputs, strict=False))
        return [((place.size[1], place.size[0]), each) for place, each in zip(inputs[1], found, strict=True)]

    reader = copy.copy(detector)
    reader.net = copy.deepcopy(detector.net).to("meta")  # the network's properties without its weights
    if detector.tile:  # all tiles of an image at once would need too much memory
        task = Task(partial(read_source, read=reader.read), list, of_images, 1)
        return Job(task, _objects_row, columns, settings, notes)
    task = Task(partial(_read_view, reader), _collate_views, of_views, detector.batch_size)
    return Job(task, _objects_row, columns, settings, notes)


def _objects_row(detected: Detected) -> Row:
    (width, height), found = detected
    each = zip(found.labels.tolist(), found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
    objects = [
        {"label": label, "name": name, "score": round(score, 5), "box": [round(x, 2) for x in box]}
        for label, name, score, box in each
    ]
    return {"width": width, "height": height, "objects": objects}


def _read_view(detector: Detector, file: ImageFile) -> tuple[Tensor, Placement]:
    image = read_source(file, read=detector.read)
    with transform_errors(image):
        (view,) = detector.views(image)
    return view


def _collate_views(views: list[tuple[Tensor, Placement]]) -> tuple[Tensor, list[Placement]]:
    return torch.stack([pixels for pixels, _ in views]), [placement for _, placement in views]


def _settings(net: nn.Module, model: str, batch_size: int) -> dict[str, Any]:
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
    """The summary of a finished file.

    Attributes:
        images: The number of images.
        failed: How many of them could not be read.
        notes: What was guessed or left out by this process, a line for each.
    """

    images: int
    failed: int
    notes: tuple[str, ...] = ()


def write_results(
    images: Images,
    job: Job,
    results: Path,
    process: Process,
    workers: int = 2,
    save_every: int = 512,
    overwrite: bool = False,
) -> Summary | None:
    """Writes a row per image, in the order of the images, to a new file; resumes where the same call was interrupted.

    A row has the columns `path`, `error` and those of the job. `error` is None, or the reason why the image could not
    be read; then the job's columns are None. CSV has lists as JSON; parquet has `save_every` rows in a group.

    Args:
        images: The images.
        job: What is computed.
        results: The file; its suffix is one of `FORMATS`.
        process: This process; all processes call this function with the same arguments.
        workers: Processes that read images for this one; 0: it reads them itself.
        save_every: Images per part: an interruption loses at most so many.
        overwrite: Whether to replace an existing file at the end.

    Returns:
        The number of images; None if another process, the last one to finish its parts, wrote the file.

    Raises:
        ResultsError: If the file exists, something else is in its way, it cannot be written, or a process died.
        Stopped: If SIGINT or SIGTERM came; finished parts are kept.
    """
    parts = _Parts(results, len(images), save_every, job.columns, overwrite)
    settings = {"images": _digest(images), "save_every": save_every, "version": __version__} | job.settings
    settings = json.loads(json.dumps(settings))  # as they will be read again
    notes = Notes(images.notes if isinstance(images, LabelledImages | BoxImages) else ())
    lock = FileLock(parts.folder.with_name(f".{results.name}.lock"))
    try:
        todo = [part for part in _begin(parts, settings, lock, process) if part % process.world == process.rank]
        share = range(process.rank, parts.count, process.world)
        total = sum(len(parts.rows(part)) for part in share)
        done = total - sum(len(parts.rows(part)) for part in todo)
        with (
            freed_memory_kept(process.device),
            StopSignals(interrupt=True) as signals,
            tqdm(
                total=total,
                initial=done,
                unit="image",
                leave=False,
                disable=bar_disabled(not process.first),
            ) as bar,
        ):
            try:
                for part, rows in _finished(images, job, parts, todo, workers, bar, notes):
                    parts.save(part, rows)
                    done += len(rows)
                summary = parts.merge()
                _wait_for_all(process)
                return summary and replace(summary, notes=tuple(notes.lines()))
            except (Stopped, RuntimeError) as error:
                if signals.number:  # loader workers may have got the signal, too; then torch raises RuntimeError
                    raise Stopped(signals.number, f"stopped with {done:,} of {total:,} images done") from error
                reason = first_line(error)
                if not reason.startswith("DataLoader worker (pid"):
                    raise
                raise ResultsError(
                    f"a process that reads images ended: {reason}; if memory ran out, use fewer --workers; " + _RESUMES
                ) from error
    finally:
        lock.release()  # never delete the lock file: a newcomer would lock a different inode


def _begin(parts: "_Parts", settings: dict[str, Any], lock: FileLock, process: Process) -> list[int]:
    """The missing parts of all processes, after the first one has made or checked the folder."""
    complaint, missing = "", []
    if process.first:
        try:
            parts.begin(settings, lock)
            missing = parts.missing()
        except (ResultsError, OSError) as error:
            complaint = str(error)
    complaint, missing, settings_of_first = process.broadcast((complaint, missing, settings))
    if complaint:
        raise ResultsError(complaint)
    if settings != settings_of_first:
        difference = _differences(settings, settings_of_first)
        raise ResultsError(f"the processes differ in {difference}; start all with the same command")
    return missing


def _wait_for_all(process: Process) -> None:
    """Waits for all processes, so that the first one holds the lock until then."""
    try:
        process.all_gather(None)
    except RuntimeError as error:  # torch raises it as soon as one of them has ended
        raise ResultsError(f"another of the {process.world} processes ended before it was done; {_RESUMES}") from error


def _finished(
    images: Images, job: Job, parts: "_Parts", todo: Sequence[int], workers: int, bar: Any, notes: Notes
) -> Iterator[tuple[int, list[Row]]]:
    """Computes the parts in `todo`; yields each with its rows."""
    todo_batches = [batch for part in todo for batch in batches(parts.rows(part), job.task.batch_size)]
    empty = dict.fromkeys(job.columns)
    rows: list[Row] = []
    for batch, outcomes in run(images, job.task, todo_batches, workers):
        for index, outcome in zip(batch, outcomes, strict=True):
            path = images.name(index).encode(errors="backslashreplace").decode()  # may not be valid Unicode
            values = empty if outcome.error is not None else job.row(outcome.result)
            rows.append({"path": path, "error": outcome.error} | values)
            for note in (*outcome.notes, *(() if outcome.error is not None else job.notes(outcome.result))):
                notes.add(note, path)
        bar.update(len(batch))
        part = batch[0] // parts.size
        if batch.stop == parts.rows(part).stop:
            yield part, rows
            rows = []


def _digest(images: Images) -> str:
    """The number of images and a digest of their names, and of their labels if they have any."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(images)):
        digest.update(f"{images.name(i)}\0".encode(errors="backslashreplace"))
    if isinstance(images, LabelledImages | BoxImages):
        digest.update(images.fingerprint().encode())
    return f"{len(images)} {digest.hexdigest()}"


def _differences(now: dict[str, Any], before: dict[str, Any]) -> str:
    names = [name for name in now | before if now.get(name) != before.get(name)]
    return ", ".join(f"{name} ({before.get(name)}, now {now.get(name)})" for name in names)


class _Parts:
    """The folder of finished parts, `<results>.parts`; while they are merged it is called `<results>.merging`.

    Every file in it is written atomically. `job.json` comes first; a folder without it counts as empty. `whole.json`
    comes last, with the size and time of the results file that is renamed next.
    """

    def __init__(self, results: Path, images: int, size: int, columns: dict[str, Any], overwrite: bool) -> None:
        if results.suffix not in FORMATS:
            raise ResultsError(f"{results} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        if results.suffix == ".parquet":
            import pyarrow.parquet  # noqa: F401  (if it is missing, fail now and not at the end)
        self.results, self.images, self.size = results, images, size
        self.columns, self.overwrite = columns, overwrite
        self.folder = results.with_name(f"{results.name}.parts")
        self.merging = results.with_name(f"{results.name}.merging")
        self.count = math.ceil(images / size)

    def rows(self, part: int) -> range:
        """The numbers of the part's images."""
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def begin(self, settings: dict[str, Any], lock: FileLock) -> None:
        """Makes the folder, or checks that its contents belong to a job with the same settings."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResultsError(
                f"another command is writing {self.results}; wait for it or choose another file"
            ) from None
        self._refuse_foreign_files()
        if self.merging.exists():
            if self.folder.exists():
                raise ResultsError(
                    f"{self.merging} has all results of an earlier command, and {self.folder} those of another; delete "
                    "the folder that you do not need"
                )
            self.merging.rename(self.folder)
        begun = self._begun()
        if begun is not None and self._is_whole():  # killed between the last rename and this removal
            shutil.rmtree(self.folder)
            begun = None
        self._refuse_results()
        if begun is not None and begun != settings and len(self.missing()) == self.count:
            begun = None  # nothing is finished, so that other settings lose nothing
        if begun is None:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            self._write("job.json", lambda file: file.write(json.dumps(settings, indent=1).encode()))
            return
        if begun != settings:
            raise ResultsError(
                f"{self.folder} holds unfinished results that differ in {_differences(settings, begun)}; finish them "
                "with the command that began them, delete that folder, or choose another file"
            )
        remove_leftovers(self.folder)

    def _refuse_foreign_files(self) -> None:
        """Raises ResultsError if a folder of parts holds anything that is not ours."""
        ours = re.compile(r"(job|whole)\.json|\d{8}\.jsonl")
        for folder in (self.folder, self.merging):
            files = sorted(folder.iterdir()) if folder.exists() else []
            foreign = next(
                (file.name for file in files if not ours.fullmatch(file.name) and not is_leftover(file)), None
            )
            if foreign is not None:
                raise ResultsError(
                    f"{folder} is for unfinished results, but it holds {foreign}; move that away or choose another file"
                )

    def _refuse_results(self) -> None:
        """Raises ResultsError if there are results that must not be replaced, or a folder, which cannot be."""
        if self.results.is_dir():
            raise ResultsError(f"{self.results} is a folder; choose another file")
        if self.results.exists() and not self.overwrite:
            raise ResultsError(f"{self.results} exists already; choose another file, or --overwrite to replace it")

    def _is_whole(self) -> bool:
        """Whether the existing results are those of this folder."""
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
            raise ResultsError(f"{self.folder}/job.json is damaged; delete that folder to begin again") from error
        return begun

    def missing(self) -> list[int]:
        """The parts that are not finished."""
        finished = {file.name for file in self.folder.iterdir()}
        return [part for part in range(self.count) if f"{part:08}.jsonl" not in finished]

    def save(self, part: int, rows: list[Row]) -> None:
        """Writes the rows of a finished part."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self._write(f"{part:08}.jsonl", lambda file: file.write(text))

    def merge(self) -> Summary | None:
        """Merges the parts into the results file if all are finished and no other process does it."""
        try:
            if self.missing():
                return None
            self._refuse_results()  # another command may have written some meanwhile
            self.folder.rename(self.merging)  # succeeds in one process only
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
        """Writes the file `name` of the folder, or `target`, atomically.

        Args:
            name: The name of the file in the folder.
            write_to: Writes its content.
            target: Where it goes, if not into the folder.
            before: Called with the finished file before it is renamed.
        """
        target = target or self.folder / name
        try:
            with whole(target, within=self.folder) as temporary:
                with temporary.open("wb") as file:
                    write_to(file)
                if before is not None:
                    before(temporary)
        except OSError as error:
            raise ResultsError(f"cannot write {target}: {error.strerror or error}; {_RESUMES}") from error


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
    text.detach()  # flushes; the file stays open


def _write_parquet(file: BinaryIO, parts: Iterator[list[Row]], columns: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    def arrow(type_: Any) -> Any:
        if isinstance(type_, list):
            return pyarrow.list_(arrow(type_[0]))
        if isinstance(type_, dict):
            return pyarrow.struct([(name, arrow(inner)) for name, inner in type_.items()])
        return {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}[type_]

    schema = pyarrow.schema([(name, arrow(type_)) for name, type_ in columns.items()])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for rows in parts:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
