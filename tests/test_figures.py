"""The committed figures agree with the records, follow the colour scheme, and are self-contained."""

import base64
import io
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import figures_common
import figures_detectors
import make_figures
import numpy as np
import pytest
from PIL import Image

from spd_zoo.weights import entries
from spd_zoo.weights.load import load_network

SVG = "{http://www.w3.org/2000/svg}"
FILES = sorted(figures_common.FIGURES.glob("*.svg"))
CHANGES = [  # a figure that a record holds, another, and what it is drawn in
    ("published.csv", "75.37%", "75.38%", ["twins"]),
    ("published.csv", "89.20%", "89.30%", ["latency"]),
    ("complexity.csv", "cifar_ghostnet,3x32x32,100,4029080", "cifar_ghostnet,3x32x32,100,4029081", ["twins"]),
    ("latency.jsonl", '"padded_ms": 15.54', '"padded_ms": 15.55', ["latency"]),
    ("detectors.csv", "Platelets,69,39.34", "Platelets,69,39.35", ["detectors"]),
    ("activations.json", '["WBC", 0.897', '["WBC", 0.898', ["activations"]),
]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the records that is read in their place."""
    for file in figures_common.RECORDS.iterdir():
        if file.suffix in (".csv", ".json", ".jsonl"):
            shutil.copy(file, tmp_path)
    monkeypatch.setattr(figures_common, "RECORDS", tmp_path)
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
    shutil.copytree(figures_common.FIGURES, tmp_path / "figures")
    monkeypatch.setattr(figures_common, "FIGURES", tmp_path / "figures")
    (tmp_path / "figures" / "latency.svg").unlink()
    assert make_figures.main(["--check"]) == 1
    script = tmp_path / "figures_common.py"
    script.write_text(Path(figures_common.__file__).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    before = figures_common.digest(make_figures.DRAWINGS["twins"])
    monkeypatch.setattr(figures_common, "__file__", str(script))
    assert figures_common.digest(make_figures.DRAWINGS["twins"]) != before


def test_drawing_writes_the_committed_title_texts_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = (figures_common.FIGURES / "latency.svg").read_text(encoding="utf-8")
    drawing = make_figures.DRAWINGS["latency"]
    monkeypatch.setattr(make_figures, "DRAWINGS", {"latency": drawing})
    monkeypatch.setattr(figures_common, "FIGURES", tmp_path)
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
    assert "prefers-color-scheme: dark" in text and figures_common.INK not in text
    assert any("currentColor" in (part.get("style") or "") for part in root.iter(f"{SVG}text"))
    addresses = [value for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")]
    addresses += re.findall(r"url\(([^)]*)\)", text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert "@import" not in text and not list(root.iter(f"{SVG}script"))


def test_the_recorded_detector_is_the_one_whose_weights_are_in_the_package() -> None:
    ours = [
        row for row in figures_detectors.detectors()["ours"] if row["network"] == "yolov8n_spd" and row["size"] == "all"
    ]
    entry = entries()["yolov8n_spd.bccd"]
    (ap,) = (m["value"] for m in entry.metrics if (m["dataset"], m["metric"]) == (ours[0]["data"], "ap"))
    assert sum(float(row["ap"]) for row in ours) / len(ours) == pytest.approx(ap, abs=0.02)


def test_the_recorded_picture_and_maps_are_those_of_the_script_and_of_the_bundled_detector() -> None:
    record = figures_detectors.activations()
    assert (figures_common.RECORDS / "activations.json").stat().st_size < 60_000
    picture = Image.open(io.BytesIO(base64.b64decode(record["picture"])))
    assert np.abs(np.asarray(picture, float) - np.asarray(figures_detectors.draw_cells(), float)).mean() < 3  # JPEG
    recorded = record["networks"]["yolov8n_spd"]
    assert recorded["weights_sha256"] == entries()[figures_detectors.BUNDLED].sha256
    seen = figures_detectors.seen(load_network(figures_detectors.BUNDLED, "cpu"), picture)
    assert seen["found"] == recorded["found"]
    for stride in map(str, figures_detectors.STRIDES):
        one, other = (
            np.frombuffer(base64.b64decode(maps[stride]["values"]), np.uint8).astype(float)
            for maps in (seen["maps"], recorded["maps"])
        )
        assert np.abs(one - other).max() <= 5  # other decoders and kernels


def test_the_recorded_boxes_are_what_the_page_says() -> None:
    found = {}
    for name, sight in figures_detectors.activations()["networks"].items():
        boxes = [box for kind, _, *box in sight["boxes"] if kind == "Platelets"]
        found[name] = [
            width
            for x, y, width in figures_detectors.PLATELETS
            if any(left < x < right and top < y < bottom for left, top, right, bottom in boxes)
        ]
    smallest = min(width for *_, width in figures_detectors.PLATELETS)
    assert len(found["yolov8n"]) == len(figures_detectors.PLATELETS) == 9
    assert sorted([*found["yolov8n_spd"], smallest]) == sorted(found["yolov8n"])


def test_a_run_that_is_not_there_records_nothing(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (records / "activations.json").read_bytes()
    assert make_figures.main(["--record-activations", str(records / "none")]) == 1
    assert "activations.json cannot be written" in capsys.readouterr().err
    assert (records / "activations.json").read_bytes() == before
