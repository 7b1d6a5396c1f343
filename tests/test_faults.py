"""Every fault ends with the right network or one clear error; `tools/fault_report.py` lists them."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_bench import Bench, Outcome, open_bench
from fault_cases import GROUPS
from fault_entry_points import ENTRY_POINTS, FILE_TASKS
from fault_report import run

QUICK = {
    *("cut at 50 %", "one bit flipped", "one bit flipped, always", "a web page, always", "503", "404, always"),
    *("HF_HUB_OFFLINE", "truncation", "bit flip, offline"),
}


@contextmanager
def opened() -> Iterator[Bench]:
    before = dict(os.environ)
    with open_bench() as bench:
        yield bench
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with opened() as bench:
        yield bench


@pytest.mark.slow
def test_processes_of_later_tests_have_their_own_environment() -> None:  # the first test here: it opens its own bench
    with opened():
        pass
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(os.getenv, ("SPD_ZOO_MANIFEST",)) == os.getenv("SPD_ZOO_MANIFEST")


def bad(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if not outcome.good]


@pytest.mark.slow
def test_a_few_faults_at_every_entry_point_are_survived(bench: Bench) -> None:
    outcomes = run(bench, ["network", "disk"], lambda case: case.fault in QUICK)
    assert {outcome.fault for outcome in outcomes} == QUICK
    assert {outcome.entry_point for outcome in outcomes} == set(ENTRY_POINTS)
    assert bad(outcomes) == []
    assert {outcome.result for outcome in outcomes if outcome.fault == "cut at 50 %"} == {"loaded"}
    assert {outcome.result for outcome in outcomes if outcome.fault == "one bit flipped, always"} == {"error"}


def believe(file: Path) -> str:
    """An entry point that does not check the file."""
    return str(file)


@pytest.mark.slow
def test_the_report_notices_a_missing_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILE_TASKS, "timm", believe)
    outcomes = run(bench, ["headers"], lambda case: case.fault in ("nothing", "a list"))
    results = {(outcome.entry_point, outcome.result) for outcome in outcomes}
    assert results == {("timm", "BELIEVED"), ("weights import", "refused")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("group", GROUPS)
def test_every_fault_is_survived(bench: Bench, group: str) -> None:
    first = "timm" if group in ("network", "disk") else None  # the report and the tests above run the others
    outcomes = run(bench, [group], lambda case: first in (None, case.entry_point))
    assert outcomes
    assert bad(outcomes) == []
