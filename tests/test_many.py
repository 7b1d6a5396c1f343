"""Results for many images: in order, in every format, unaffected by interruptions, and computed only once."""

import csv
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from networks import random_network
from PIL import Image
from runs import PATIENCE

from spd_zoo import Detector
from spd_zoo.cli.main import main
from spd_zoo.data.labelled import DataError
from spd_zoo.data.reading import read_image
from spd_zoo.inference import results as many
from spd_zoo.inference.classifier import Classifier, ImageReader, predict
from spd_zoo.inference.loop import Files, Task
from spd_zoo.inference.results import Job, ResultsError, Summary, open_split, write_results
from spd_zoo.process import Process, Stopped

ROOT = Path(__file__).parent.parent
MODEL = "cifar_resnet20.cifar100"
COUNT, BROKEN = 11, 4  # images, and which of them is none
ALONE = Process(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        noise.resize((40, 48), Image.Resampling.BILINEAR).save(folder / f"{i:02}.png")
    (folder / f"{BROKEN:02}.png").write_text("no image")
    return folder


@pytest.fixture
def images(folder: Path) -> Files:
    return files_in(folder)


def files_in(folder: Path) -> Files:
    return Files([str(path) for path in sorted(folder.glob("*.png"))])


class Colours:
    """Gives the mean of every image's red, and notes which sums it has computed in a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, pictures: list[Image.Image]) -> list[dict[str, Any]]:
        means = [round(float(np.asarray(picture)[..., 0].mean()), 3) for picture in pictures]
        with self.log.open("a") as file:
            file.writelines(f"{mean}\n" for mean in means)
        return [{"red": mean} for mean in means]

    def computed(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


def colours(log: Path, **settings: Any) -> Job:
    task = Task(read_image, list, Colours(log), 2)
    return Job(task, dict, {"red": float}, {"model": "colours"} | settings)


def changed_task(job: Job, **changes: Any) -> Job:
    return dataclasses.replace(job, task=dataclasses.replace(job.task, **changes))


def run(images: Files, job: Job, results: Path, process: Process = ALONE, **options: Any) -> Summary | None:
    return write_results(images, job, results, process, **{"workers": 0, "save_every": 3} | options)


def rows_of(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with spd-zoo[train]")
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        return rows
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            {
                name: json.loads(cell) if name in ("top", "probabilities", "probability") and cell else cell or None
                for name, cell in row.items()
            }
            for row in csv.DictReader(lines)
        ]


@pytest.mark.parametrize("suffix", many.FORMATS)
def test_every_format_has_what_predict_answers_in_the_order_of_the_images(
    images: Files, suffix: str, tmp_path: Path
) -> None:
    results = tmp_path / f"results{suffix}"
    summary = run(images, many.classification(MODEL, top_k=2, batch_size=3, device="cpu"), results, workers=1)
    assert summary == Summary(COUNT, failed=1)
    rows = rows_of(results)
    answers = list(predict(MODEL, [Path(path) for path in images.paths], top_k=2, batch_size=3, device="cpu"))
    assert [row["path"] for row in rows] == images.paths
    assert [row["error"] for row in rows] == [answer.error for answer in answers]
    for row, answer in zip(rows, answers, strict=True):
        expected = [dataclasses.asdict(guess) for guess in answer.top]
        for guess in expected:
            guess["probability"] = pytest.approx(guess["probability"], abs=2e-6)
        assert row["top"] == (expected or None)
        best = answer.top[0] if answer.top else None
        assert row["class"] == (best and best.name)
        assert row["probability"] == (best and pytest.approx(best.probability, abs=2e-6))
    assert {file.name for file in tmp_path.iterdir()} == {results.name, f".{results.name}.lock"}


@pytest.mark.parametrize("suffix", many.FORMATS)
def test_the_probabilities_of_all_classes_are_a_column_in_their_order(
    images: Files, suffix: str, tmp_path: Path
) -> None:
    run(images, many.classification(MODEL, 1, device="cpu", probabilities=True), tmp_path / f"results{suffix}")
    for row, path in zip(rows_of(tmp_path / f"results{suffix}"), images.paths, strict=True):
        if row["error"]:
            assert row["probabilities"] is None
        else:
            expected = Classifier(MODEL, device="cpu")(path).probabilities.tolist()
            assert row["probabilities"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tile", [None, 24], ids=["whole", "tiles"])
def test_objects_are_those_that_the_detector_finds(folder: Path, tmp_path: Path, tile: int | None) -> None:
    images = Files([str(folder / "00.png"), str(folder / f"{BROKEN:02}.png"), str(folder / "01.png")])
    net = random_network("yolov8n", num_classes=3)
    detector = Detector(net, image_size=64, score_threshold=0.001, max_detections=5, batch_size=1, tile=tile)
    run(images, many.detection(detector, "net"), tmp_path / "found.jsonl", workers=1)
    first, broken, last = rows_of(tmp_path / "found.jsonl")
    assert broken["objects"] is None and "no image" in broken["error"]
    for row in (first, last):
        found = detector(row["path"])
        assert len(found) > 1
        assert (row["width"], row["height"]) == (40, 48)
        assert [one["label"] for one in row["objects"]] == found.labels.tolist()
        assert [one["name"] for one in row["objects"]] == found.names
        assert [one["score"] for one in row["objects"]] == pytest.approx(found.scores.tolist(), abs=1e-5)
        assert np.array([one["box"] for one in row["objects"]]) == pytest.approx(found.boxes.numpy(), abs=0.01)


def test_a_stopped_command_resumes_after_the_finished_chunks(
    images: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, colours(tmp_path / "whole.log"), tmp_path / "whole.jsonl")
    job, save = colours(tmp_path / "log"), many._Parts.save

    def save_and_stop(self: Any, part: int, rows: Any) -> None:
        save(self, part, rows)
        if part == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(many._Parts, "save", save_and_stop)
    with pytest.raises(Stopped, match=f"stopped with [36] of {COUNT} images done") as stopped:
        run(images, job, tmp_path / "results.jsonl")
    assert stopped.value.number == signal.SIGTERM
    assert not (tmp_path / "results.jsonl").exists()
    before = Colours(tmp_path / "log").computed()
    run(images, job, tmp_path / "results.jsonl")
    assert (tmp_path / "results.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    after = Colours(tmp_path / "log").computed()
    assert len(before) == 5 and len(after) == COUNT - 1  # without the broken one, each once


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["spd_zoo.inference.results"])


def _killed(folder: Path, results: Path, log: Path, at: str) -> None:
    """Writes results; kills its process when the file `at` is about to appear."""
    replace, rename, rmtree = Path.replace, Path.rename, shutil.rmtree

    def die(name: str) -> None:
        if name == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def die_or_delete(path: Path, **options: Any) -> None:
        die(f"{path.name} deleted")
        rmtree(path, **options)

    def die_or_replace(path: Path, target: Any) -> Path:
        die(Path(target).name)
        return replace(path, target)

    def die_or_rename(path: Path, target: Any) -> Path:
        die(Path(target).name)
        return rename(path, target)

    patch = pytest.MonkeyPatch()
    patch.setattr(Path, "replace", die_or_replace)
    patch.setattr(Path, "rename", die_or_rename)
    patch.setattr(shutil, "rmtree", die_or_delete)
    run(files_in(folder), colours(log), results)


@pytest.mark.slow
def test_kill_9_at_any_moment_neither_loses_nor_repeats_a_finished_chunk(
    folder: Path, images: Files, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    run(images, colours(whole / "log"), whole / "whole.csv")
    results, log = tmp_path / "results.csv", tmp_path / "log"
    computed = []
    for at in ("job.json", "00000000.jsonl", "00000002.jsonl", "results.csv.merging", "results.csv"):
        process = FORKS.Process(target=_killed, args=(folder, results, log, at))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, f"it was not stopped at {at}"
        assert not results.exists()
        computed.append(len(Colours(log).computed()))
    assert computed == [0, 3, 3 + 3 + 2 + 3, 11 + 3 + 2, 16]  # images 0-2; 0-8 but the broken one; 6-10; none
    assert run(images, colours(log), results) == Summary(COUNT, failed=1)
    assert len(Colours(log).computed()) == 16
    assert results.read_bytes() == (whole / "whole.csv").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"log", "results.csv", ".results.csv.lock"}


@pytest.mark.slow
def test_kill_9_after_the_last_step_leaves_complete_results(
    folder: Path, images: Files, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    run(images, colours(whole / "log"), whole / "whole.csv")
    results = tmp_path / "results.csv"
    process = FORKS.Process(target=_killed, args=(folder, results, tmp_path / "log", "results.csv.merging deleted"))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert results.read_bytes() == (whole / "whole.csv").read_bytes()
    with pytest.raises(ResultsError, match="exists already"):
        run(images, colours(tmp_path / "log"), results)
    assert {file.name for file in tmp_path.iterdir()} == {"log", "results.csv", ".results.csv.lock"}


def stop_after_a_part(images: Files, job: Job, results: Path) -> None:
    """Leaves unfinished results."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(many._Parts, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            run(images, job, results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overwrite"], "--overwrite goes with --results FILE"),
        (["--workers", "9"], "--workers goes with --results FILE"),
        (["--split", "test"], "--split goes with --results FILE"),
        (["--split", "test", "--results", "r.csv"], "--split goes with --data DATA"),
    ],
)
def test_options_without_what_they_go_with_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", MODEL, "a.png", *options]) == 1
    assert capsys.readouterr().err == f"spd-zoo: error: {message}; add that, or leave it out\n"


def test_an_address_is_written_without_its_password() -> None:
    address = "http://me:secret@camera/shot.jpg"
    assert (Files([address]).name(0), Files([address]).file(0)) == ("http://camera/shot.jpg", address)


@pytest.mark.parametrize("changed", ["images", "save_every", "weights"])
def test_unfinished_results_of_something_else_are_refused(images: Files, tmp_path: Path, changed: str) -> None:
    job = colours(tmp_path / "log", weights="one")
    stop_after_a_part(images, job, tmp_path / "results.jsonl")
    other = Files(images.paths[::-1]) if changed == "images" else images
    size = 4 if changed == "save_every" else 3
    job = colours(tmp_path / "log", weights="other" if changed == "weights" else "one")
    with pytest.raises(ResultsError, match=rf"differ in {changed} \("):
        run(other, job, tmp_path / "results.jsonl", save_every=size)


def test_finished_results_are_kept_without_overwrite(images: Files, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    run(images, colours(tmp_path / "log"), results)
    before = results.read_bytes()
    fewer = Files(images.paths[:2])
    with pytest.raises(ResultsError, match="--overwrite"):
        run(fewer, colours(tmp_path / "log"), results)
    assert results.read_bytes() == before
    stop_after_a_part(fewer, colours(tmp_path / "log"), tmp_path / "other.jsonl")
    run(fewer, colours(tmp_path / "log"), results, overwrite=True)
    assert results.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])


def test_two_commands_do_not_write_one_file(images: Files, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".results.jsonl.lock"), pytest.raises(ResultsError, match="another command"):
        run(images, colours(tmp_path / "log"), tmp_path / "results.jsonl")


@pytest.mark.parametrize("limit", [100, 400], ids=["a part", "the results"])
def test_a_full_disk_is_one_sentence_and_the_same_command_resumes(images: Files, tmp_path: Path, limit: int) -> None:
    run(images, colours(tmp_path / "whole.log"), tmp_path / "whole.jsonl")
    results, limits = tmp_path / "results.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    stop_after_a_part(Files(images.paths), colours(tmp_path / "log"), results)
    if limit == 100:
        (tmp_path / "results.jsonl.parts" / "00000001.jsonl").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(ResultsError, match=r"cannot write .* the same command resumes"):
            run(images, colours(tmp_path / "log"), results)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not results.exists()
    run(images, colours(tmp_path / "log"), results)
    assert results.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_results_that_are_a_folder_are_refused_before_anything_is_computed(images: Files, tmp_path: Path) -> None:
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(ResultsError, match=r"results\.csv is a folder; choose another file"):
        run(images, colours(tmp_path / "log"), tmp_path / "results.csv", overwrite=True)
    assert Colours(tmp_path / "log").computed() == []


def test_a_folder_with_other_files_is_left_alone(images: Files, tmp_path: Path) -> None:
    for name in ("results.jsonl.parts", "results.jsonl.merging"):
        precious = tmp_path / name / "precious.txt"
        precious.parent.mkdir()
        precious.write_text("mine")
        with pytest.raises(ResultsError, match=r"holds precious\.txt"):
            run(images, colours(tmp_path / "log"), tmp_path / "results.jsonl", overwrite=True)
        assert precious.read_text() == "mine"
        shutil.rmtree(precious.parent)


def test_results_that_appear_meanwhile_and_finished_chunks_are_kept(images: Files, tmp_path: Path) -> None:
    results, job = tmp_path / "results.jsonl", colours(tmp_path / "log")
    stop_after_a_part(images, job, results)
    results.write_text("of others")
    with pytest.raises(ResultsError, match="exists already"):
        run(images, job, results)
    results.unlink()

    def compute(pictures: list[Any]) -> list[Any]:
        results.write_text("of others")
        return colours(tmp_path / "log").task.compute(pictures)

    (tmp_path / "results.jsonl.parts" / "00000003.jsonl").unlink()
    with pytest.raises(ResultsError, match="exists already"):
        run(images, changed_task(job, compute=compute), results)
    assert results.read_text() == "of others"
    results.unlink()
    computed = len(Colours(tmp_path / "log").computed())
    assert run(images, job, results) == Summary(COUNT, failed=1)
    assert len(Colours(tmp_path / "log").computed()) == computed == COUNT - 1 + 2


@pytest.mark.parametrize("size", [(80_000_000, 1), (3_000_000, 1), (1, 3_000_000)])
def test_an_image_too_long_for_its_width_is_a_row_with_its_error(
    images: Files, tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "spd_zoo.inference.classifier.read_image",
        lambda file, mode: _Sized(size) if file == "long" else read_image(file),
    )
    run(Files(["long", images.paths[0]]), many.classification(MODEL, device="cpu"), tmp_path / "results.jsonl")
    long, usual = rows_of(tmp_path / "results.jsonl")
    assert "too long and narrow" in long["error"] and long["top"] is None
    assert usual["error"] is None


class _Sized(Image.Image):
    """An image that has a size, but no pixels."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size = size


@pytest.mark.parametrize("kind", [OverflowError, MemoryError, RuntimeError])
def test_an_image_that_the_transform_cannot_resize_is_an_error_of_that_image(
    images: Files, kind: type[Exception]
) -> None:
    def transform(_: Image.Image) -> Any:
        raise kind("too much")

    with pytest.raises(ValueError, match=rf"cannot resize this image of 40 x 48 pixels: {kind.__name__}: too much"):
        ImageReader(transform, "RGB")(images.paths[0])


def test_file_names_with_line_ends_are_csv(tmp_path: Path) -> None:
    names = ["a\rb.png", "a\nb.png", 'a",b.png', "=1+1"]
    run(Files(names), colours(tmp_path / "log"), tmp_path / "results.csv")
    assert [row["path"] for row in rows_of(tmp_path / "results.csv")] == names
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        assert '"a\rb.png"' in file.read()


def _die(_: Any) -> Any:
    os._exit(1)


def test_a_worker_that_dies_gives_one_sentence(images: Files, tmp_path: Path) -> None:
    job = changed_task(colours(tmp_path / "log"), read=_die)
    with pytest.raises(ResultsError, match="a process that reads images ended"):
        run(images, job, tmp_path / "results.jsonl", workers=1)


def test_a_worker_that_dies_while_others_compute_gives_one_sentence(images: Files, tmp_path: Path) -> None:
    def compute(_: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")  # torch does so wherever it is

    job = colours(tmp_path / "log")
    with pytest.raises(ResultsError, match="a process that reads images ended"):
        run(images, changed_task(job, compute=compute), tmp_path / "results.jsonl")

    def fail(_: Any) -> Any:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(images, changed_task(job, compute=fail), tmp_path / "results.jsonl")


def _read_for_ever(file: Any) -> Any:
    if Path(file).name == "05.png":
        os.kill(os.getppid(), signal.SIGTERM)
        threading.Event().wait()
    return read_image(file)


def _stopped_in_the_middle(folder: Path, results: Path, log: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)  # so that the reading process is a child of this one
    try:
        run(files_in(folder), changed_task(colours(log), read=_read_for_ever), results, workers=1)
    except Stopped:
        sys.exit(7)


@pytest.mark.slow
def test_a_signal_ends_a_process_that_cannot_finish_an_image(folder: Path, tmp_path: Path) -> None:
    process = FORKS.Process(target=_stopped_in_the_middle, args=(folder, tmp_path / "results.jsonl", tmp_path / "log"))
    process.start()
    process.join(PATIENCE)
    code = process.exitcode
    process.kill()
    assert code == 7


@dataclasses.dataclass(frozen=True)
class OneOf(Process):
    """One of two processes in the same Python process, whose collectives return prepared values."""

    told: Any = ()
    meanwhile: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        if self.meanwhile:
            self.meanwhile()
        return [value] * self.world

    def broadcast(self, value: Any) -> Any:
        if self.first:
            self.told.append(value)
        return self.told[0]


def test_the_last_of_several_processes_makes_the_same_file(images: Files, tmp_path: Path) -> None:
    run(images, colours(tmp_path / "whole.log"), tmp_path / "whole.jsonl")
    told: list[Any] = []
    first, second = (OneOf(torch.device("cpu"), rank, 2, told=told) for rank in (0, 1))
    job, results = colours(tmp_path / "log"), tmp_path / "results.jsonl"
    assert run(images, job, results, first) is None
    assert not results.exists()
    assert run(images, job, results, second) == Summary(COUNT, failed=1)
    assert results.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(Colours(tmp_path / "log").computed()) == COUNT - 1


def test_the_first_of_several_processes_keeps_others_out_until_all_are_done(images: Files, tmp_path: Path) -> None:
    job, results = colours(tmp_path / "log"), tmp_path / "results.jsonl"
    told: list[Any] = []
    second = OneOf(torch.device("cpu"), 1, 2, told=told)
    summaries = []

    def meanwhile() -> None:
        with pytest.raises(ResultsError, match="another command"):
            run(images, job, results)
        summaries.append(run(images, job, results, second))
        with pytest.raises(ResultsError, match="another command"):
            run(images, job, results)

    assert run(images, job, results, OneOf(torch.device("cpu"), 0, 2, told=told, meanwhile=meanwhile)) is None
    assert summaries == [Summary(COUNT, failed=1)]


def test_a_dead_process_among_several_is_one_sentence(images: Files, tmp_path: Path) -> None:
    def meanwhile() -> None:
        raise RuntimeError("Connection closed by peer")

    first = OneOf(torch.device("cpu"), 0, 2, told=[], meanwhile=meanwhile)
    with pytest.raises(ResultsError, match="another of the 2 processes ended"):
        run(images, colours(tmp_path / "log"), tmp_path / "results.jsonl", first)


def test_processes_with_other_images_are_refused(images: Files, tmp_path: Path) -> None:
    told: list[Any] = []
    first, second = (OneOf(torch.device("cpu"), rank, 2, told=told) for rank in (0, 1))
    run(images, colours(tmp_path / "log"), tmp_path / "results.jsonl", first)
    with pytest.raises(ResultsError, match="the processes differ in images"):
        run(Files(images.paths[1:]), colours(tmp_path / "log"), tmp_path / "results.jsonl", second)


@pytest.mark.slow
def test_torchrun_gives_the_bytes_that_one_process_gives(folder: Path, tmp_path: Path) -> None:
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        command: list[str | Path] = [
            sys.executable,
            *start,
            "-m",
            "spd_zoo",
            "predict",
            MODEL,
            folder,
            "--results",
            tmp_path / f"{name}.jsonl",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        options = ["--batch-size", "2", "--save-every", "3", "--workers", "1", "--device", "cpu"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 1  # of the broken image
        assert f"1 of {COUNT} images could not be read" in done.stderr
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert len(rows_of(tmp_path / "one.jsonl")) == COUNT


def test_the_command_says_how_many_images_failed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = str(tmp_path / "results.csv")
    assert main(["predict", MODEL, str(folder), "--results", results, "--workers", "0", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == f"{results}: {COUNT} images\n"
    assert err == f"spd-zoo: error: 1 of {COUNT} images could not be read; the column error of {results} says why\n"


def test_the_stopped_command_says_how_to_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(many._Parts, "merge", lambda _: os.kill(os.getpid(), signal.SIGINT))
    results = str(tmp_path / "results.csv")
    assert main(["predict", MODEL, str(folder), "--results", results, "--workers", "0", "--device", "cpu"]) == 130
    assert (
        f"stopped with {COUNT} of {COUNT} images done; the state is saved, and the same command"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["predict", MODEL], "give IMAGES"),
        (["predict", MODEL, "--data", "d"], "needs --results"),
        (["predict", MODEL, "--results", "r.csv"], "either IMAGES or a data set"),
        (["predict", MODEL, "a.png", "--data", "d", "--results", "r.csv"], "either IMAGES or a data set"),
        (["predict", MODEL, "a.png", "--results", "r.csv", "--json"], "give one of them"),
        (["detect", "yolov8n", "a.png", "--results", "r.csv", "--out", "o"], "give one of them"),
        (["predict", MODEL, "a.png", "--results", "r.txt"], "must end in .jsonl, .csv or .parquet"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_a_data_set_is_read_by_its_only_split_or_the_one_asked_for(folder: Path, tmp_path: Path) -> None:
    lines = [f"{folder}/{i:02}.png,{i % 2},{'val' if i > 5 else 'train'}" for i in range(COUNT)]
    (tmp_path / "images.csv").write_text("\n".join(["path,label,split", *lines]))
    with pytest.raises(DataError, match="train, val; choose one with --split"):
        open_split(str(tmp_path / "images.csv"))
    with pytest.raises(DataError, match=r"images.csv has no split tset; it has train, val$"):
        open_split(str(tmp_path / "images.csv"), "tset")
    images = open_split(str(tmp_path / "images.csv"), "val")
    write_results(images, colours(tmp_path / "log"), tmp_path / "results.jsonl", ALONE, workers=0)
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "results.jsonl")] == [
        f"{i:02}.png" for i in range(6, COUNT)
    ]


def test_images_inside_parquet_files_are_named_by_their_rows(folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow comes with spd-zoo[train]")
    import pyarrow.parquet as parquet

    (tmp_path / "data").mkdir()
    contents = [{"bytes": (folder / f"{i:02}.png").read_bytes(), "path": None} for i in (0, BROKEN)]
    parquet.write_table(pyarrow.table({"image": contents, "label": [0, 1]}), tmp_path / "data" / "train.parquet")
    images = open_split(str(tmp_path / "data"), image_column="image")
    write_results(images, colours(tmp_path / "log"), tmp_path / "results.jsonl", ALONE, workers=0)
    good, broken = rows_of(tmp_path / "results.jsonl")
    assert (good["path"], good["error"]) == ("row 0", None) and good["red"] > 0
    assert broken["path"] == "row 1" and "no image" in broken["error"]


@pytest.mark.slow
def test_the_example_for_ray_gives_the_same_answers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is large and no dependency; pip install 'ray[data]' to run its example")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with spd-zoo[train]")
    command: list[str | Path] = [sys.executable, ROOT / "examples" / "ray" / "predict.py", MODEL]
    command += [folder, tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    subprocess.run(command, env=environment, check=True, timeout=PATIENCE)
    rows = sorted(parquet.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["path"])
    answers = list(predict(MODEL, sorted(folder.glob("*.png")), top_k=1, device="cpu"))
    for row, answer in zip(rows, answers, strict=True):
        assert Path(row["path"]).name == answer.path.name
        assert row["error"] == answer.error
        assert row["class"] == (answer.top[0].name if answer.top else None)
