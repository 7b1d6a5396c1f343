"""When memory runs out, on the CPU or on a GPU, one sentence says which option to lower, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pictures import make_folders
from torch import nn

from spd_zoo.cli.main import main
from spd_zoo.process import Process, ran_out_of_memory
from spd_zoo.training.memory import choose_micro_batches, free_memory
from spd_zoo.weights import save_network

Capture = pytest.CaptureFixture[str]

ERRORS = {
    "CPU of Linux": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "CPU of Windows": RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...\nmore"),
    "CUDA's libraries": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "MPS": RuntimeError("MPS backend out of memory (max allowed: 9.07 GiB). Tried to allocate 256.00 MiB on ..."),
    "MPS, one tensor": RuntimeError("Invalid buffer size: 12.50 GiB"),
    "Python": MemoryError(),
    "a system call": OSError(12, "Cannot allocate memory"),
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    net = timm.create_model("cifar_resnet20", num_classes=3)
    save_network(net, folder, {"label_names": ["blue", "green", "red"], "num_classes": 3})
    return str(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("detector")
    net = timm.create_model("yolov8n_spd", num_classes=3)
    save_network(net, folder, {"label_names": ["blue", "green", "red"], "num_classes": 3, "input_size": (3, 64, 64)})
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("pictures"), train=4, val=2)


@pytest.fixture
def network_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Lets every convolution with real numbers raise an error."""

    def fail_with(error: Exception) -> None:
        convolve = nn.Conv2d.forward

        def fail(self: nn.Conv2d, x: Any) -> Any:
            if x.device.type == "meta":  # where the need for memory is estimated
                return convolve(self, x)
            raise error

        monkeypatch.setattr(nn.Conv2d, "forward", fail)

    return fail_with


def sentence_of(capsys: Capture, *arguments: str) -> str:
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("spd-zoo: error: out of memory") and errors.count("\n") == 1
    return errors


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_predict_says_what_to_lower(
    error: Exception, classifier: str, pictures: Path, network_fails: Any, capsys: Capture
) -> None:
    network_fails(error)
    image = str(pictures / "val" / "red" / "0.png")
    assert "use a smaller --batch-size" in sentence_of(capsys, "predict", classifier, image, "--device", "cpu")


def test_the_size_that_did_not_fit_is_reported(
    classifier: str, pictures: Path, network_fails: Any, capsys: Capture
) -> None:
    network_fails(ERRORS["CUDA"])
    image = str(pictures / "val" / "red" / "0.png")
    assert "20.00 GiB could not be allocated" in sentence_of(capsys, "predict", classifier, image, "--device", "cpu")


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out_of_memory(OSError(28, "No space left on device"))
    assert not ran_out_of_memory(ValueError("there is no folder out of memory"))


def test_evaluate_says_what_to_lower(
    classifier: str, pictures: Path, network_fails: Any, capsys: Capture, tmp_path: Path
) -> None:
    network_fails(ERRORS["CUDA"])
    out = tmp_path / "out"
    arguments = ("evaluate", classifier, "--data", str(pictures), "--device", "cpu", "--workers", "0")
    assert "--batch-size or --image-size" in sentence_of(capsys, *arguments, "--out", str(out))
    assert not out.exists()


def test_detect_says_what_to_lower_and_writes_nothing(
    detector: str, pictures: Path, network_fails: Any, capsys: Capture, tmp_path: Path
) -> None:
    network_fails(ERRORS["CPU of Linux"])
    image = str(pictures / "val" / "red" / "0.png")
    said = sentence_of(capsys, "detect", detector, image, "--device", "cpu", "--out", str(tmp_path / "out"))
    assert "4000000 bytes" in said and "--batch-size" in said and "--image-size" in said and "--tile" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_export_says_what_to_lower_and_writes_nothing(
    to: str, classifier: str, network_fails: Any, capsys: Capture, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export`")
    network_fails(ERRORS["CPU of Linux"])
    out = tmp_path / f"model.{to}"
    for fold in ((), ("--no-fold",)):
        said = sentence_of(capsys, "export", classifier, "--to", to, "--out", str(out), *fold)
        assert "--image-size" in said
    assert list(tmp_path.iterdir()) == []


def test_results_can_be_started_again_with_a_smaller_batch(
    classifier: str,
    pictures: Path,
    network_fails: Any,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "results.jsonl"
    command = ["predict", classifier, str(pictures / "val"), "--results", str(file), "--workers", "0", "--device"]
    network_fails(ERRORS["CUDA"])
    assert "--batch-size" in sentence_of(capsys, *command, "cpu")
    assert not file.exists()
    monkeypatch.undo()
    assert main([*command, "cpu", "--batch-size", "1"]) == 0
    assert len(file.read_text().splitlines()) == 6


def test_a_run_without_a_checkpoint_can_be_started_again_with_smaller_steps(
    pictures: Path, network_fails: Any, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spd_zoo.training.classification.report._plots", lambda *_: {})
    command = ["finetune", "cifar_resnet20", "--data", str(pictures), "--out", str(tmp_path / "run")]
    command += ["--no-pretrained", "--epochs", "1", "--image-size", "16", "--device", "cpu", "--workers", "0"]
    network_fails(ERRORS["CUDA"])
    said = sentence_of(capsys, *command, "--batch-size", "8")
    assert "smaller --batch-size or --image-size" in said and "--accumulate" in said
    monkeypatch.undo()
    monkeypatch.setattr("spd_zoo.training.classification.report._plots", lambda *_: {})
    assert main([*command, "--batch-size", "4"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_run_with_a_checkpoint_keeps_it(
    pictures: Path, network_fails: Any, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["finetune", "cifar_resnet20", "--data", str(pictures), "--out", str(tmp_path / "run")]
    command += ["--no-pretrained", "--epochs", "2", "--image-size", "16", "--device", "cpu", "--workers", "0"]
    command += ["--batch-size", "4"]

    def run_out_of_memory(*_: Any) -> None:
        raise ERRORS["CUDA"]

    monkeypatch.setattr("spd_zoo.training.finetune.finish", run_out_of_memory)
    assert "another --out" in sentence_of(capsys, *command)
    assert (tmp_path / "run" / "last.pt").is_file() and (tmp_path / "run" / "run.yaml").is_file()


def test_a_killed_worker_gives_one_sentence(
    classifier: str, pictures: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")

    monkeypatch.setattr("spd_zoo.training.evaluate.check", end)
    assert main(["evaluate", classifier, "--data", str(pictures), "--device", "cpu"]) == 1
    errors = capsys.readouterr().err
    assert "worker (pid 7) is killed" in errors and "fewer --workers" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("device", ["mps", "meta", "abacus", "hpu", "cuda:99", " "])
def test_a_missing_device_gives_one_sentence(
    device: str, classifier: str, detector: str, pictures: Path, capsys: Capture, tmp_path: Path
) -> None:
    if device == "mps" and torch.mps.is_available():
        pytest.skip("it is there")
    image, data = str(pictures / "val" / "red" / "0.png"), str(pictures)
    for command in (
        ["predict", classifier, image],
        ["predict", classifier, image, "--results", str(tmp_path / "results.csv")],
        ["detect", detector, image, "--out", str(tmp_path / "out")],
        ["evaluate", classifier, "--data", data],
        ["finetune", classifier, "--data", data, "--out", str(tmp_path / "run")],
    ):
        assert main([*command, "--device", device]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith(f"spd-zoo: error: cannot use device {device!r}: ") and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_not_split_if_free_memory_is_unknown(capsys: Capture) -> None:
    process = Process(torch.device("meta"))
    assert free_memory(process.device) is None
    assert choose_micro_batches(2**20, 2.0**30, 64, False, process) == 1
    assert "the free memory of meta is not known" in capsys.readouterr().out


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    found = []
    for count in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        found.append(free_memory(torch.device("cpu")))
    assert found == [8_000_000 * 1024, 2_000_000 * 1024]


@pytest.mark.parametrize(
    ("free", "batch_size", "pairs", "count"),
    [
        (1000, 16, False, 1),  # 16 images of 30 bytes, and half as much again, in four fifths of it
        (600, 16, False, 2),
        (150, 16, False, 8),
        (10, 16, False, 8),  # not less than two images in each
        (10, 16, True, 8),
        (10, 12, True, 2),  # 12 images in four parts would be three, of which Mixup makes no pairs
        (10, 15, False, 1),  # no two equal parts
    ],
)
def test_a_step_is_split_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, free: float, batch_size: int, pairs: bool, count: int
) -> None:
    monkeypatch.setattr("spd_zoo.training.memory.free_memory", lambda _: free)
    assert choose_micro_batches(0, 30, batch_size, pairs, Process(torch.device("cpu"))) == count
    assert ("memory may run out: even " in capsys.readouterr().out) == (free == 10)
