"""Checkpoints from others are read without running code in them, and without much time or memory."""

import re
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from limited import Reading, opened
from torch import Tensor

from spd_zoo.weights import WeightsError, read_checkpoint
from spd_zoo.weights.archive import Archive

linux = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
NUMBERS = torch.arange(12.0)


def write(content: bytes, folder: Path) -> Path:
    (folder / "a.pth").write_bytes(content)
    return folder / "a.pth"


# Reading


@pytest.mark.parametrize("options", [{}, hostile.OLD], ids=["zip", "old"])
@pytest.mark.parametrize(
    "tensor",
    [
        NUMBERS.view(3, 4).t(),
        NUMBERS[2:9:3],
        NUMBERS.view(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.zeros(0, 3),
        torch.tensor(7),
        *(
            NUMBERS.to(getattr(torch, name))
            for name in ("bfloat16", "half", "double", "int8", "bool", "complex64", "uint16")
        ),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}",
)
def test_types_and_strides_are_those_that_were_saved(tmp_path: Path, tensor: Tensor, options: dict[str, Any]) -> None:
    found = read_checkpoint(write(hostile.saved({"a": tensor}, **options), tmp_path))["a"]
    assert torch.equal(found, tensor)
    assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride())


@pytest.mark.parametrize("options", [{}, hostile.OLD], ids=["zip", "old"])
def test_tensors_that_share_numbers_still_share_them(tmp_path: Path, options: dict[str, Any]) -> None:
    shared = {"a": NUMBERS, "b": NUMBERS[4:]}
    found = read_checkpoint(write(hostile.saved(shared, **options), tmp_path))
    found["a"][4] = -1
    assert found["b"][0] == -1


def test_an_old_storage_that_is_a_part_of_another_is_read(tmp_path: Path) -> None:
    part = b"(" + hostile.text("1") + b"K\x01K\x02t"  # two numbers from the second on
    content = hostile.stream(part, size=b"K\x00K\x02\x85K\x01\x85")
    assert read_checkpoint(write(content, tmp_path))["a"].tolist() == [2, 3]


def test_numbers_of_the_other_byte_order_are_swapped(tmp_path: Path) -> None:
    parts = hostile.records(hostile.saved({"a": NUMBERS}))
    order, data = "archive/byteorder", "archive/data/0"
    assert parts[order] == sys.byteorder.encode()
    parts |= {order: b"big" if sys.byteorder == "little" else b"little"}
    parts |= {data: struct.pack(">12f" if sys.byteorder == "little" else "<12f", *NUMBERS.tolist())}
    assert torch.equal(read_checkpoint(write(hostile.zipped(parts), tmp_path))["a"], NUMBERS)


@pytest.mark.slow
def test_the_directory_of_a_file_of_more_than_4_gib_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    with torch.serialization.skip_data():  # leaves holes instead of numbers
        torch.save({"a": torch.empty(1_200_000_000), "b": torch.empty(3)}, file)
    with file.open("rb") as content:
        archive = Archive(content, file.stat().st_size)
        assert (archive.size("data/0"), archive.size("data/1")) == (4_800_000_000, 12)
        assert archive.read("data/1") == bytes(12)


def test_a_damaged_number_is_noticed(tmp_path: Path) -> None:
    content = hostile.saved({"a": NUMBERS})
    with zipfile.ZipFile(write(content, tmp_path)) as archive:
        place = content.index(NUMBERS.numpy().tobytes(), archive.getinfo("archive/data/0").header_offset)
    write(content[:place] + b"\1" + content[place + 1 :], tmp_path)
    with pytest.raises(WeightsError, match="a damaged file: the checksum of a record is wrong"):
        read_checkpoint(tmp_path / "a.pth")


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    file = write(hostile.saved({"module.a": NUMBERS, "a": NUMBERS}), tmp_path)
    with pytest.raises(WeightsError, match=r"two tensors of one name, with and without `module\.`"):
        read_checkpoint(file)


def test_a_tar_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(WeightsError, match=r"safely: a tar file, which only torch before 0\.1\.10 wrote"):
        read_checkpoint(tmp_path / "a.pth")


def test_an_unreadable_file_gives_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = write(hostile.saved({"a": NUMBERS}), tmp_path)
    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(WeightsError, match=f"{re.escape(str(file))} cannot be read: Permission denied"):
        read_checkpoint(file)


# Malicious checkpoints, read in processes with limits


@pytest.fixture(scope="module")
def read_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Iterator[Reading]]]:
    with opened(tmp_path_factory.mktemp("checkpoints")) as read_all:
        yield read_all


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The path of a file that no checkpoint may create."""
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside" / "trace"


@linux
@pytest.mark.slow
def test_malicious_checkpoints_are_refused(read_all: Callable[..., Iterator[Reading]], trace: Path) -> None:
    contents = hostile.malicious(trace, {"a": NUMBERS})
    found = dict(zip(contents, read_all(contents.values()), strict=True))
    assert {name: reading for name, reading in found.items() if reading.result != "refused"} == {}
    assert list(trace.parent.iterdir()) == []


@linux
@pytest.mark.slow
def test_weights_are_read_and_nothing_else_in_the_file_runs(
    read_all: Callable[..., Iterator[Reading]], trace: Path
) -> None:
    contents = hostile.sound(trace) | hostile.harmless(trace, {"a": NUMBERS})
    found = dict(zip(contents, read_all(contents.values()), strict=True))
    assert {name: reading for name, reading in found.items() if reading.result != "read"} == {}
    assert list(trace.parent.iterdir()) == []


@linux
@pytest.mark.parametrize(
    "count", [pytest.param(500, marks=pytest.mark.slow), pytest.param(20_000, marks=pytest.mark.exhaustive)]
)
@pytest.mark.timeout(3600)
def test_changed_checkpoints_are_read_or_refused(
    read_all: Callable[..., Iterator[Reading]], trace: Path, count: int
) -> None:
    malicious = [content for content in hostile.malicious(trace, {"a": NUMBERS}).values() if len(content) < 20_000]
    changed = hostile.mutated(list(hostile.sound(trace).values()), malicious, count)
    results = results_of(read_all(changed, together=25))
    print(dict(results))
    assert set(results) == {"read", "refused"}, results
    assert results.total() == count
    assert list(trace.parent.iterdir()) == []


def results_of(readings: Iterable[Reading]) -> Counter[str]:
    """The number of each result; and the texts of results that must not occur."""
    return Counter(
        reading.result if reading.result in ("read", "refused") else f"{reading.result} {reading.text}"
        for reading in readings
    )


@linux
@pytest.mark.slow
def test_the_limits_end_a_reader_without_checks(read_all: Callable[..., Iterator[Reading]]) -> None:
    """A valid checkpoint of 300 MB cannot be read within 200 MiB."""
    (reading,) = read_all([hostile.saved({"a": torch.zeros(75_000_000)})])
    assert reading.result == "ENDED"
