"""What this folder's conftest.py draws: the tests that CI runs of many, and the random numbers of each test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("other", "ab")
def test_of_many_cases(case, other): pass

@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_of_a_fast_and_a_slow_case(case): pass

def test_of_one_case(): pass

@pytest.mark.exhaustive
@pytest.mark.parametrize("case", range(64))
def test_every_network(case): pass
"""

DRAWS = """
import json, random, numpy, pytest, torch

def draw(): return [random.random(), numpy.random.rand(), torch.rand(1).item()]

@pytest.fixture(scope="module")
def before(): return draw()

def test_before(before): draw()

def test_that_draws(before):
    with open("drawn", "a") as file:
        print(json.dumps([before, draw()]), file=file)
"""


@pytest.fixture
def drawn(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\nmarkers =\n    slow\n    exhaustive\n")
    pytester.makepyfile(TESTS)
    return pytester


def run(pytester: pytest.Pytester, *options: str) -> list[str]:
    """The tests that pass with these options."""
    passed, skipped, failed = pytester.inline_run(*options).listoutcomes()
    assert not skipped and not failed
    return [report.nodeid.partition("::")[2] for report in passed]


def test_one_case_of_each_test_is_drawn_by_the_seed(drawn: pytest.Pytester) -> None:
    fast = ("-m", "not slow and not exhaustive", "--one-case")
    found = {seed: run(drawn, *fast, seed) for seed in "abcd"}
    for names in found.values():
        assert [name.partition("[")[0] for name in names] == [
            *("test_of_many_cases", "test_of_a_fast_and_a_slow_case", "test_of_one_case"),
        ]
        assert names[1] == "test_of_a_fast_and_a_slow_case[0]"
    assert run(drawn, *fast, "a") == found["a"]
    assert len({names[0] for names in found.values()}) > 1


def test_a_sixteenth_of_the_exhaustive_tests_is_drawn_by_the_seed(drawn: pytest.Pytester) -> None:
    first, again, other = (run(drawn, "--sixteenth", seed) for seed in ("a", "a", "b"))
    assert first == again != other
    assert 1 <= sum("every_network" in name for name in first) <= 20
    assert sum("every_network" not in name for name in first) == 11


def test_a_test_draws_the_same_numbers_after_others_and_no_numbers_of_its_fixtures(drawn: pytest.Pytester) -> None:
    drawn.makepyfile(DRAWS)
    run(drawn, "-k", "draws")
    run(drawn, "-k", "draw or before")
    alone, after = (json.loads(line) for line in (drawn.path / "drawn").read_text().splitlines())
    assert alone == after
    np.random.seed(0)
    torch.manual_seed(0)
    numbers = [*alone[0], *alone[1], np.random.rand(), torch.rand(1).item()]
    assert len(set(numbers)) == len(numbers)
