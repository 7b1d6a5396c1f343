"""The committed figures show what the records say, in any colour scheme, and need nothing but themselves."""

import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import make_figures

from spd_zoo.weights import entries

SVG = "{http://www.w3.org/2000/svg}"
FILES = sorted(make_figures.FIGURES.iterdir())
CHANGES = [  # a figure that a record holds, another, and what it is drawn in
    ("published.csv", "75.37%", "75.38%", ["twins"]),
    ("published.csv", "89.20%", "89.30%", ["latency"]),
    ("complexity.csv", "cifar_ghostnet,3x32x32,100,4029080", "cifar_ghostnet,3x32x32,100,4029081", ["twins"]),
    ("latency.jsonl", '"padded_ms": 15.02', '"padded_ms": 15.03', ["latency"]),
    ("detectors.csv", "Platelets,69,39.34", "Platelets,69,39.35", ["detectors"]),
]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the records that is read in their place."""
    for file in make_figures.RECORDS.iterdir():
        if file.suffix in (".csv", ".jsonl"):
            shutil.copy(file, tmp_path)
    monkeypatch.setattr(make_figures, "RECORDS", tmp_path)
    return tmp_path


def test_the_committed_figures_are_current(records: Path) -> None:
    assert make_figures.main(["--check"]) == 0
    assert [file.stem for file in FILES] == sorted(make_figures.DRAWINGS)


@pytest.mark.parametrize(("record", "old", "new", "stale"), CHANGES, ids=lambda value: str(value)[:20])
def test_a_changed_record_makes_its_figures_stale(
    records: Path, capsys: pytest.CaptureFixture[str], record: str, old: str, new: str, stale: list[str]
) -> None:
    text = (records / record).read_text(encoding="utf-8")
    assert old in text
    (records / record).write_text(text.replace(old, new), encoding="utf-8")
    assert make_figures.main(["--check"]) == 1
    assert re.findall(r"docs/figures/(\w+)\.svg is not current: run", capsys.readouterr().err) == stale


def test_a_figure_that_is_missing_or_of_another_script_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(make_figures.FIGURES, tmp_path / "figures")
    monkeypatch.setattr(make_figures, "FIGURES", tmp_path / "figures")
    (tmp_path / "figures" / "latency.svg").unlink()
    assert make_figures.main(["--check"]) == 1
    script = tmp_path / "make_figures.py"
    script.write_text(Path(make_figures.__file__).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    before = make_figures.digest(make_figures.DRAWINGS["twins"])
    monkeypatch.setattr(make_figures, "__file__", str(script))
    assert make_figures.digest(make_figures.DRAWINGS["twins"]) != before


def test_drawing_writes_the_committed_title_texts_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = (make_figures.FIGURES / "latency.svg").read_text(encoding="utf-8")
    drawing = make_figures.DRAWINGS["latency"]
    monkeypatch.setattr(make_figures, "DRAWINGS", {"latency": drawing})
    monkeypatch.setattr(make_figures, "FIGURES", tmp_path)
    assert make_figures.main([]) == 0
    assert make_figures.main(["--check"]) == 0
    (file,) = tmp_path.iterdir()

    def words(text: str) -> list[str]:
        return [part.text for part in ElementTree.fromstring(text).iter() if part.text and part.text.strip()]

    assert set(words(file.read_text(encoding="utf-8"))) == set(words(committed))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_figure_has_a_title_follows_the_colour_scheme_and_refers_to_nothing_outside(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg" and len(text) < 150_000 and "<!DOCTYPE" not in text
    assert len((root.findtext(f"{SVG}title") or "").split()) > 5
    assert "prefers-color-scheme: dark" in text and make_figures.INK not in text
    assert any("currentColor" in (part.get("style") or "") for part in root.iter(f"{SVG}text"))
    addresses = [value for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")]
    addresses += re.findall(r"url\(([^)]*)\)", text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert "@import" not in text and not list(root.iter(f"{SVG}script"))


def test_the_recorded_detector_is_the_one_whose_weights_are_in_the_package() -> None:
    ours = [row for row in make_figures.detectors()["ours"] if row["network"] == "yolov8n_spd" and row["size"] == "all"]
    entry = entries()["yolov8n_spd.bccd"]
    (ap,) = (m["value"] for m in entry.metrics if (m["dataset"], m["metric"]) == (ours[0]["data"], "ap"))
    assert sum(float(row["ap"]) for row in ours) / len(ours) == pytest.approx(ap, abs=0.02)
