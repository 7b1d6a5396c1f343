"""Signals that stop a process, and the choice of the device."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from spd_zoo.process import Process, Stopped, StopSignals, join, pick_device


def test_the_first_signal_is_noted_and_handlers_are_restored() -> None:
    usual = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == usual  # a second one acts as usual
    assert signal.getsignal(signal.SIGTERM) == usual


def test_a_signal_may_interrupt_at_once() -> None:
    with pytest.raises(Stopped) as stopped, StopSignals(interrupt=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM


def test_systems_without_sigchld_stop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGCHLD")
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.number == signal.SIGTERM


def test_a_gpu_is_picked_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == "cuda" and pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == "cpu"


def test_a_single_process_exchanges_values_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    process = join("cpu")
    assert process == Process(torch.device("cpu")) and process.first
    assert (process.all_gather(3), process.broadcast(3), process.all_reduce_max(3, 4)) == ([3], 3, [3, 4])
    process.print("once")
    Process(torch.device("cpu"), rank=1, world=2).print("never")
    assert capsys.readouterr().out == "once\n"


def test_a_device_without_numbers_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="cannot use device 'meta': ") as refused:
        pick_device("meta")
    assert "\n" not in str(refused.value)


def test_a_device_that_this_torch_was_not_built_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, **__: object) -> None:
        raise NotImplementedError("Could not run 'aten::empty.memory_format' with arguments from the 'XLA' backend.")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"^cannot use device 'xla': this build of torch does not compute on it$"):
        pick_device("xla")


FILLING = """
import resource, sys, torch
from spd_zoo.process import freed_memory_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident()
with freed_memory_kept(torch.device(sys.argv[1])):
    for _ in range(5):  # the first ones find their place between what else is allocated
        torch.ones(2**24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(faults, resident() - before)
"""


def faults_and_memory(device: str) -> tuple[int, int]:
    """Page faults when five tensors of 64 MiB are made one after another, and the bytes that stay afterwards."""
    command = [sys.executable, "-c", FILLING, device]
    faults, stays = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(faults), int(stays)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="freed memory is kept by options of glibc, which Linux has")
def test_freed_memory_is_kept_for_the_next_step_on_a_cpu_and_returned_at_the_end() -> None:
    (usual, _), (kept, stays) = faults_and_memory("meta"), faults_and_memory("cpu")
    if usual < 64:
        pytest.skip("this system counts no page faults, or keeps freed memory anyway")
    assert kept < usual / 2
    assert stays < 2**25
