"""The demo page: its functions, and the page itself in a browser."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from shared_data import shared

from spd_zoo import demo
from spd_zoo.cli.main import main
from spd_zoo.inference.detector import Detections
from spd_zoo.weights.catalogue import local_checkpoints
from spd_zoo.weights.load import ModelError

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
ROCKET = str(EXAMPLES / "rocket.jpg")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STRIDED, PADDING_FREE = "cifar_resnet20.cifar100", "cifar_resnet20_pfd.cifar100"
Capture = pytest.CaptureFixture[str]


def cells(table: str) -> list[str]:
    return re.findall(r"<td>(.*?)</td>", table)


def test_the_bundled_weights_are_offered() -> None:
    assert {STRIDED, PADDING_FREE, "pyconvresnet50_spd.tiny_in200", "yolov8n_spd.bccd"} <= {*local_checkpoints()}


def test_the_default_classifier_comes_first_unless_others_are_named() -> None:
    assert demo.offered()[0] == "tf_efficientnet_lite0_spd.in1k" and {*demo.offered()} == {*local_checkpoints()}
    assert demo.offered([STRIDED])[:2] == [STRIDED, "tf_efficientnet_lite0_spd.in1k"]


def test_the_page_predicts_like_the_command(capsys: Capture) -> None:
    _, table = demo.predict_html(demo.load(STRIDED), demo.read_picture(ROCKET))
    assert main(["predict", STRIDED, ROCKET, "--json"]) == 0
    top = json.loads(capsys.readouterr().out)[0]["top"]
    assert cells(table)[2::2] == [guess["name"] for guess in top]
    assert cells(table)[3] == f"{100 * top[0]['probability']:.2f} %"


def test_a_smaller_input_is_shown_pixel_by_pixel_and_has_an_answer_of_its_own() -> None:
    net, picture = demo.load(STRIDED), demo.read_picture(ROCKET)
    tables = []
    for size in demo.SIZES:
        seen, table = demo.predict_html(net, picture, size)
        tables.append(table)
        assert seen.size == (256, 256)
        blocks = np.asarray(seen).reshape(size, 256 // size, size, 256 // size, 3)
        assert (blocks == blocks[:, :1, :, :1]).all() and len(np.unique(blocks)) > 50
    assert len({*tables}) == 3


def test_a_size_that_a_network_does_not_take_is_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"no prediction at 48 pixels: .* multiples of 32, got 48x48"):
        demo.predict_html(demo.load("yolov8n_spd.bccd"), demo.read_picture(ROCKET), 48)


def test_the_other_network_of_a_pair_is_compared_with_its_own_predictions() -> None:
    padding_free, padded = demo.twin(STRIDED), demo.twin(PADDING_FREE)
    assert padding_free is not None and f"**{PADDING_FREE}**, the padding-free network" in padding_free.description
    assert padded is not None and "the padded network" in padded.description
    found = cells(demo.compare(demo.load(STRIDED), padding_free.net, demo.read_picture(ROCKET)))
    row = found.index("rocket")
    ours, theirs = (float(text.split()[0]) for text in found[row + 1 : row + 3])
    assert abs(ours - theirs) > 1  # per cent: a difference that one sees


@pytest.mark.parametrize("model", ["yolov8n_spd.bccd", "tf_efficientnet_lite0_spd.in1k"])
def test_a_network_without_another_one_is_not_compared(model: str) -> None:
    assert demo.twin(model) is None


@pytest.mark.parametrize(
    ("example", "right"), list(zip(demo.EXAMPLES, ["espresso", "rocket", "12 RBC, 1 WBC"], strict=True))
)
def test_the_examples_are_right(example: tuple[str, str], right: str) -> None:
    _, said = demo.predict_html(demo.load(example[1]), demo.read_picture(example[0]))
    assert right in said and (right[0].isdigit() or cells(said)[2] == right)


def test_the_picture_and_the_input_show_the_same_part() -> None:
    net, picture = demo.load(STRIDED), Image.new("RGB", (80, 40), "black")
    picture.paste("white", (20, 0, 60, 40))  # what a central crop keeps
    seen, _ = demo.predict_html(net, picture, 32)
    beside = demo._beside(net, picture, seen)
    assert beside is not None and beside[0].size == beside[1].size == (256, 256)
    assert all(np.asarray(image).mean() > 250 for image in beside)


@pytest.mark.slow
def test_a_detector_marks_and_counts_objects() -> None:
    net, picture = demo.load("yolov8n_spd.bccd"), demo.read_picture(str(shared("bccd/images/BloodImage_00000.jpg")))
    marked, said = demo.predict_html(net, picture)
    assert marked.size == picture.size and marked.tobytes() != picture.tobytes()
    assert int(re.findall(r"(\d+) RBC", said)[0]) > 3


def test_two_detectors_are_compared_by_the_objects_that_they_find(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    ours = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), ("a", "b"))
    moved = boxes.flip(0) + torch.tensor([0, 0, 0, 2.0])
    theirs = Detections(moved, torch.tensor([0.7, 0.8, 0.5]), torch.tensor([0, 0, 0]), ("a", "b"))
    net, other = (timm.create_model("yolov8n_spd", num_classes=2, device="meta") for _ in range(2))
    found = {net: ours, other: theirs}
    monkeypatch.setattr(demo, "Detector", lambda net: lambda picture: found[net])
    said = demo.compare(net, other, Image.new("RGB", (64, 64)))
    assert "Objects that both find: 2." in said  # the third is of another class
    assert cells(said)[3:] == ["a", "2", "3", "b", "1", "0"]
    found[net] = ours[:0]
    assert "Objects that both find: 0." in demo.compare(net, other, Image.new("RGB", (64, 64)))


def test_networks_of_different_classes_are_not_compared() -> None:
    net, other = (timm.create_model(name, device="meta") for name in ("cifar_resnet20", "pyconvresnet18"))
    with pytest.raises(ModelError, match="have different classes, so their predictions cannot be compared"):
        demo.compare(net, other, Image.new("RGB", (64, 64)))


def test_a_machine_without_weights_is_told_how_to_get_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "local_checkpoints", list)
    with pytest.raises(ModelError, match="no weights are on this machine; `spd-zoo weights pull` gets some"):
        demo.build()


@pytest.mark.parametrize(
    ("mode", "name"),
    [("CMYK", "a.jpg"), ("RGBA", "a.png"), ("I;16", "a.png"), ("LA", "a.png"), ("P", "a.gif"), ("1", "a.tif")],
)
def test_pictures_of_any_mode_are_read(tmp_path: Path, mode: str, name: str) -> None:
    Image.new("L", (40, 30), 200).convert(mode).save(tmp_path / name)
    assert demo.read_picture(str(tmp_path / name)).mode == "RGB"


def test_pictures_are_upright_and_not_larger_than_needed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (4096, 1024)).save(tmp_path / "a.jpg", exif=exif)
    assert demo.read_picture(str(tmp_path / "a.jpg")).size == (512, 2048)


@pytest.mark.parametrize("kind", ["none", "text", "torn", "bomb"])
def test_an_invalid_picture_gives_one_sentence(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(file)
    if kind == "text":
        file.write_text("no image")
    elif kind == "torn":
        file.write_bytes(file.read_bytes()[:80])
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^(Drop a picture|This file cannot be used: .* Try another)") as caught:
        demo.read_picture(None if kind == "none" else str(file))
    assert "\n" not in str(caught.value)


def test_names_of_classes_are_text_and_never_markup() -> None:
    names = {"label_names": ["<b>", "a"]}
    net = timm.create_model("cifar_resnet20", num_classes=2, pretrained_cfg_overlay=names).eval()
    _, said = demo.predict_html(net, Image.new("RGB", (32, 32)))
    assert "&lt;b&gt;" in said and "<b>" not in said


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_without_gradio_the_command_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(socket, "create_server", lambda *_, **__: nullcontext())
    assert main(["demo"]) == 1
    assert "pip install 'spd-zoo[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "{taken}"], "cannot serve at 127.0.0.1, port {taken}: Address already in use"),
        (["--port", "100000"], "there is no port 100000"),
        (["--host", "no.host.invalid"], "cannot serve at no.host.invalid, port 7860: "),
        (["--allow-host", "https://a.example"], "'https://a.example' is not a host name"),
        (["--host", "127.0.0.2", "--port", "{taken}", "--models", "cifar_resnet20_"], "no network 'cifar_resnet20_'"),
    ],
)
def test_errors_of_the_command_are_one_sentence(port: int, options: list[str], sentence: str, capsys: Capture) -> None:
    assert main(["demo", *(option.format(taken=port) for option in options)]) == 1
    said = capsys.readouterr().err
    assert sentence.format(taken=port) in said and said.count("\n") == 1


# With Gradio


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a page that `spd-zoo demo` serves, and a file with every other address that it turned to."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'spd-zoo[demo]'")
    folder = tmp_path_factory.mktemp("served")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    went = folder / "went.txt"
    went.touch()
    code = f"""
import sys
def watch(event, args):
    host = {{"socket.connect": lambda: args[1], "socket.getaddrinfo": lambda: args[0]}}.get(event, lambda: None)()
    host = host[0] if isinstance(host, tuple) else host
    if host not in (None, "127.0.0.1", "localhost"):
        open({str(went)!r}, "a").write(f"{{event}} {{host}}\\n")
sys.addaudithook(watch)
from spd_zoo.cli.main import main
sys.exit(main(["demo", "--port", "{port}", "--models", "{STRIDED}", "--allow-host", "demo.example.org"]))
"""
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder), "PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", code]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as page:
        try:
            while "Running on" not in (folder / "log").read_text():
                assert page.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", went
            assert "Traceback" not in (folder / "log").read_text()
        finally:
            page.terminate()


@pytest.mark.slow
def test_uploads_are_limited_by_the_server(served: tuple[str, Path]) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    statuses = []
    for size in (10, 11 * 10**6):
        request = urllib.request.Request(f"{served[0]}/gradio_api/upload", head + bytes(size) + b"\r\n--x--\r\n")
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        try:
            statuses.append(urllib.request.urlopen(request).status)
        except urllib.error.HTTPError as error:
            with error:
                statuses.append(error.code)
    assert statuses == [200, 413]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "{address}"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "demo.example.org", "Origin": "https://demo.example.org", "X-Forwarded-Proto": "https"}, 200),
        ({"X-Forwarded-Host": "demo.example.org", "Origin": "https://demo.example.org"}, 200),
    ],
    ids=str,
)
def test_uploads_come_from_the_pages_own_hosts(served: tuple[str, Path], headers: dict[str, str], status: int) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nab\r\n--x--\r\n'
    request = urllib.request.Request(f"{served[0]}/gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    for name, value in headers.items():
        request.add_header(name, value.format(address=served[0]))
    try:
        found = urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        with error:
            found = error.code
    assert found == status


def test_the_settings_of_the_space_are_yaml_that_names_the_app() -> None:
    folder = Path(__file__).parents[1] / "docs" / "space"
    start, settings, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert start == ""
    config = yaml.safe_load(settings)
    assert config["sdk"] == "gradio" and (folder / config["app_file"]).is_file()


def test_the_space_allows_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(demo, "serve", lambda **options: served.append(options))
    monkeypatch.setenv("SPACE_HOST", "org-name.hf.space")
    runpy.run_path(str(Path(__file__).parents[1] / "docs" / "space" / "app.py"))
    assert served == [{"host": "0.0.0.0", "allow_hosts": ["org-name.hf.space"]}]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_answers_twins_and_sentences_and_asks_no_other_machine(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    """With SPD_ZOO_SCREENSHOT=FILE the page is saved as it looks."""
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    address, went = served
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(ROCKET).read_bytes()[:200])
    complaints, asked = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(120_000)
        playwright.expect.set_options(timeout=120_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        file = page.locator("input[type=file]")
        message = page.locator("#message")
        playwright.expect(message).to_contain_text("Drop a picture")

        page.get_by_text("rocket.jpg").or_(page.locator("img[src*='rocket']")).first.click()
        playwright.expect(page.locator(".answer table").first).to_contain_text("rocket")
        playwright.expect(page.locator("body")).to_contain_text("Against its twin")
        if "SPD_ZOO_SCREENSHOT" in os.environ:
            page.screenshot(path=os.environ["SPD_ZOO_SCREENSHOT"], full_page=True)
        assert page.locator(".answer table").count() == 5 and "traceback" not in page.content().lower()

        def choose(name: str) -> None:
            page.get_by_label("Network").click()
            page.get_by_role("option", name=name).click()
            playwright.expect(message).to_contain_text(name)

        choose("pyconvresnet50_spd.tiny_in200")
        playwright.expect(page.locator("body")).not_to_contain_text("Against its twin")
        choose("yolov8n_spd.bccd")
        playwright.expect(page.locator("body")).to_contain_text("Found:")

        page.get_by_label("Clear").click()
        playwright.expect(message).to_contain_text("Drop a picture")
        file.set_input_files(broken)
        playwright.expect(message).to_contain_text("This file cannot be used")
        assert page.locator(".answer table").count() == 0
        large = tmp_path / "large.png"
        large.write_bytes(bytes(11 * 10**6))
        page.get_by_label("Clear").click()
        file.set_input_files(large)
        playwright.expect(page.locator("body")).to_contain_text("exceed the maximum allowed size of 10.0 Mb")
        browser.close()
    assert complaints == []
    assert asked and {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))} == set()
    assert went.read_text() == ""
