import pytest

from spd_zoo.errors import first_line

CASES = [
    (ValueError("no such size\nstack:\n  a.cpp"), "no such size", "ValueError: no such size"),
    (RuntimeError("\n  out of range \n"), "out of range", "RuntimeError: out of range"),
    (KeyError("stem"), "'stem'", "KeyError: 'stem'"),
    (MemoryError(), "MemoryError", "MemoryError"),
    (EOFError(" \n"), "EOFError", "EOFError"),
]


@pytest.mark.parametrize(("error", "line", "with_type"), CASES, ids=[repr(error) for error, *_ in CASES])
def test_an_error_fits_into_a_sentence(error: Exception, line: str, with_type: str) -> None:
    assert first_line(error) == line
    assert first_line(error, with_type=True) == with_type
