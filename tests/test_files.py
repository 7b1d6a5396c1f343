import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

from spd_zoo.files import is_leftover, remove_leftovers, whole, write_csv


def test_a_file_appears_whole_with_the_mode_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with whole(tmp_path / "a.safetensors") as temporary:
            save_file({}, temporary)
            assert temporary.suffix == ".safetensors" and not (tmp_path / "a.safetensors").exists()
        (tmp_path / "plain").touch()
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"a.safetensors", "plain"}


def test_the_old_file_stays_if_the_block_fails(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    write_csv(file, ["name", "n"], [["a, b", 1]])
    before = file.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_csv(file, ["name", "n"], ([i, 1 / i] for i in (1, 0)))
    assert file.read_bytes() == before == b'name,n\r\n"a, b",1\r\n'
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_complete_and_replaces_an_empty_one_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with whole(target) as temporary:
        temporary.mkdir()
        (temporary / "a").touch()
    assert [file.name for file in target.iterdir()] == ["a"]
    with pytest.raises(OSError), whole(target) as temporary:
        temporary.mkdir()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "a"]


def test_leftovers_of_killed_processes_are_recognised_and_deleted(tmp_path: Path) -> None:
    with whole(tmp_path / "a") as temporary:
        temporary.touch()
        (left,) = tmp_path.iterdir()
        assert is_leftover(left) and not is_leftover(tmp_path / "a.tmp")
        remove_leftovers(tmp_path)
        assert not left.exists()
        left.mkdir()
        temporary.touch()
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
