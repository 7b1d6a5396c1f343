import itertools
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from spd_zoo.files import is_leftover, read_yaml, remove_leftovers, whole, write_csv


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


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for path in (Path(), folder):
        with pytest.raises(ValueError, match="is the current folder, which cannot be replaced"), whole(path):
            pass
    assert [file.name for file in tmp_path.rglob("*")] == ["here"]


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


def nested_aliases(line: str) -> str:
    """Nine aliases of nine aliases of ...: 9^25 elements, too many to load, to merge or to print."""
    names = [f"k{i}" for i in range(26)]
    lines = (line.format(name, ", ".join([f"*{before}"] * 9)) for before, name in itertools.pairwise(names))
    return "\n".join(["k0: &k0 {x: 1}", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested_aliases("{0}: &{0} [{1}]"), r"repeats a list or mapping by the alias \*k0; write it out"),
        (nested_aliases("{0}: &{0} {{<<: [{1}]}}"), "repeats a list or mapping by the alias"),
        ("&a [*a]", "repeats a list or mapping by the alias"),
        ("[" * 500, "more than 20 deep"),
        ("{a: " * 500, "more than 20 deep"),
        ("? " * 500, "more than 20 deep"),
        ("a: b\n" * 300_000, "more than 1048576 bytes"),
        ("- 1\n" * 50_001, "more than 50000 values"),
        ("a: " + "1:" * 50_000 + "1", "one of more than 10000 characters"),
        ("a: " + "9" * 9000, "has a value that is not YAML"),
        ("a: " + "1:" * 4000 + "1.5", "has a value that is not YAML"),
        ("a: 2024-13-13", "has a value that is not YAML: month must be in 1..12"),
        ("!!python/object/apply:os.getcwd []", "has a value that is not YAML"),
        ("[a]: b", "has a value that is not YAML"),
        ("a: \x00", "is not YAML in UTF-8"),
    ],
    ids=range(15),
)
def test_yaml_that_would_cost_much_or_is_none_is_refused_in_one_sentence(
    tmp_path: Path, text: str, message: str
) -> None:
    if text.startswith("a: 999") and not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this Python reads a number of any length")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_yaml_is_read_with_or_without_a_byte_order_mark_and_with_aliases_of_single_values(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\ufeffa: &x 1\nb: [*x, no, {c: 0.5}]\n", encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1, "b": [1, False, {"c": 0.5}]}
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") is None
