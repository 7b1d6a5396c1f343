"""Published figures are checked against the networks, and an explained difference that disappears is an error."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_published
import pytest
import timm
from check_published import COLUMNS, PUBLISHED, RECORD, RECORDED, main, read

OFF_BY_ONE = "cifar_mobilenetv3_large_w1"  # one row of its own that differs, one of BSConv's that agrees
Rows = list[dict[str, str]]


@pytest.fixture
def change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rows]:
    """Puts one network's rows of the two tables in their place, with changes in the first of either."""

    def put(network: str, recorded: dict[str, str] | None = None, **published: str) -> Rows:
        rows = [row for row in read(PUBLISHED, list(COLUMNS)) if row["model"] == network]
        costs = [row for row in read(RECORD, RECORDED) if row["network"] == network]
        rows[0] |= published
        costs[0] |= recorded or {}
        for name, table in (("PUBLISHED", rows), ("RECORD", costs)):
            path = tmp_path / f"{name}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                check_published.write(table, list(table[0]), file)
            monkeypatch.setattr(check_published, name, path)
        return rows

    return put


@pytest.mark.exhaustive
def test_everything_printed_and_recorded_is_what_the_networks_cost() -> None:
    assert main([]) == 0


@pytest.mark.parametrize("network", ["cifar_resnet20", "cifar_ghostnet", OFF_BY_ONE, "pyconvresnet18", "resnet50"])
def test_the_rows_of_some_networks_are_as_expected(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([network]) == 0
    assert network in capsys.readouterr().out


def test_every_source_and_dataset_has_rows() -> None:
    rows = read(PUBLISHED, list(COLUMNS))
    assert {row["source"].partition("@")[0] for row in rows if "@" in row["source"]} == {
        "LabSAINT/SPD-Conv",
        "burhanmudassar/small_object_detection",
        "iduta/pyconv",
        "xiaohe725/Padding-free-Downsampling-And-Hybrid-Stem",
        "zeiss-microscopy/BSConv",
    }
    datasets = {"CIFAR-100", "COCO", "ImageNet", "Stanford Dogs", "VegFru-292"}
    assert {row["dataset"] for row in rows if row["params"]} == datasets


@pytest.mark.parametrize(
    ("column", "figure"), [("params", "0.279M"), ("params", "278331"), ("flops", "41.5M"), ("flops", "41.42G")]
)
def test_a_figure_that_differs_from_the_networks_is_an_error(
    change: Any, column: str, figure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change("cifar_resnet20", **{column: figure})
    assert main(["cifar_resnet20"]) == 1
    assert f"{column} {figure} printed" in capsys.readouterr().err


@pytest.mark.parametrize("figure", ["0.28M", "0.2783M", "0.278330M", "278330"])
def test_figures_agree_when_they_do_in_the_printed_digits(change: Any, figure: str) -> None:
    change("cifar_resnet20", params=figure)
    assert main(["cifar_resnet20"]) == 0


def test_a_row_that_no_longer_differs_is_an_error(change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change(OFF_BY_ONE, params="3.067M")
    assert main([OFF_BY_ONE]) == 1
    assert "all agrees" in capsys.readouterr().err


@pytest.mark.parametrize(("accuracy", "status"), [("76.0%", 0), ("74.0%", 1)])
def test_a_source_that_contradicts_itself_differs(change: Any, accuracy: str, status: int) -> None:
    rows = change("cifar_ghostnet")
    (row,) = [row for row in rows if row["verdict"].startswith("differs")]
    assert (row["accuracy"], rows[0]["accuracy"]) == ("76.0%", "74.00%")
    row["accuracy"] = accuracy
    with check_published.PUBLISHED.open("w", encoding="utf-8", newline="") as file:
        check_published.write(rows, list(check_published.COLUMNS), file)
    assert main(["cifar_ghostnet"]) == status


@pytest.mark.parametrize("column", ["params", "macs", "fvcore_flops", "activations"])
def test_a_network_that_costs_something_else_than_recorded_is_an_error(
    change: Any, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change("cifar_resnet20", {column: "1"})
    assert main(["cifar_resnet20"]) == 1
    assert "cifar_resnet20" in capsys.readouterr().err


def test_a_recorded_network_that_does_not_exist_is_an_error(change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change("cifar_resnet20", {"network": "cifar_resnet21"})
    assert main(["cifar_resnet20"]) == 1
    assert "cifar_resnet21, no network" in capsys.readouterr().err


def test_a_new_record_is_right(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change("cifar_resnet20", {"macs": "1"})
    monkeypatch.setattr(timm, "list_models", lambda: ["cifar_resnet20"])
    assert main(["cifar_resnet20", "--record"]) == 0
    assert main(["cifar_resnet20"]) == 0
    assert sorted(path.name for path in check_published.RECORD.parent.iterdir()) == ["PUBLISHED.csv", "RECORD.csv"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("model", "cifar_resnet21", "there is no network 'cifar_resnet21'"),
        ("input", "32x32", "input cannot be '32x32'"),
        ("classes", "", "classes is missing"),
        ("params", "278K", "params cannot be '278K'"),
        ("counter", "thop", "counter cannot be 'thop'"),
        ("counter", "", "counter is missing"),
        ("verdict", "differs", "verdict cannot be 'differs'"),
        ("verdict", "uncounted", "'uncounted' cannot be the verdict"),
    ],
)
def test_a_malformed_row_is_refused(
    change: Any, column: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change("cifar_resnet20", **{column: value})
    with pytest.raises(SystemExit) as exit:
        main(["cifar_resnet20"])
    assert exit.value.code == 2
    assert f"PUBLISHED.csv, row 1: {message}" in capsys.readouterr().err


def test_a_row_of_other_columns_is_refused(change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change("cifar_resnet20")
    with check_published.PUBLISHED.open("a", encoding="utf-8") as file:
        file.write("cifar_resnet20,3x32x32\n")
    with pytest.raises(SystemExit):
        main(["cifar_resnet20"])
    assert "row 3: expected model, input" in capsys.readouterr().err


def test_a_network_that_does_not_exist_cannot_be_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cifar_resnet21"])
    assert "there is no network cifar_resnet21" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_the_rows_can_be_read_by_programs(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar_resnet20", form]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out) if form == "--json" else list(csv.DictReader(out.splitlines()))
    assert [row["source"].partition("/")[0] for row in rows] == ["xiaohe725", "zeiss-microscopy"]
    for row in rows:
        assert list(COLUMNS) == list(row)[: len(COLUMNS)]
        assert (row["our_params"], row["our_flops"]) == ("278330", "41419108")
        assert (row["macs"], row["fvcore_flops"], row["found"]) == ("40818944", "41230592", "")


def test_the_table_has_what_was_checked_below_its_head() -> None:
    head, *lines = check_published.table(check_published.check_published(["cifar_ghostnet"]))
    assert [dict(zip(head, line, strict=True))["verdict"].partition(":")[0] for line in lines] == ["match", "differs"]


def test_a_network_of_which_nothing_is_printed_or_recorded_is_an_error() -> None:
    assert main(["resnet18"]) == 1
