"""The inputs and outputs of `spd-zoo detect`: videos, addresses, lists; labels, crops, marked videos; BGR and grey."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from box_pictures import make_coco, make_voc, make_yolo
from PIL import Image
from test_detect import COLOURS, Box, Finder, picture
from timm.models import save_for_hf

from spd_zoo import Classifier, Detector
from spd_zoo.cli.main import main
from spd_zoo.data.boxes import open_boxes
from spd_zoo.data.notes import Notes
from spd_zoo.data.reading import find_images
from spd_zoo.inference import sources
from spd_zoo.inference.images import open_image
from spd_zoo.inference.output import Saved
from spd_zoo.inference.sources import Frames, Video, find_sources, read_source
from spd_zoo.inference.stream import detect
from spd_zoo.weights import download

Capture = pytest.CaptureFixture[str]


def make_video(file: Path, frames: int = 5, size: tuple[int, int] = (128, 96)) -> Path:
    """A red square that moves to the right by 16 pixels a frame."""
    writer = cv2.VideoWriter(
        str(file), cv2.VideoWriter.fourcc(*("mp4v" if file.suffix == ".mp4" else "MJPG")), 8.0, size
    )
    for i in range(frames):
        image = picture(size, red=(16 * i, 32, 16 * i + 32, 64))
        writer.write(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
    writer.release()
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a small, untrained detector."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    config = {"pretrained_cfg": {"input_size": (3, 96, 96)}, "label_names": ["cat", "a/b"]}
    save_for_hf(timm.create_model("yolov8n_spd", num_classes=2), str(folder), config, safe_serialization=True)
    return folder


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """An address, and what it serves: bytes, a status, or a function that answers."""
    content: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = content.get(self.path.partition("?")[0], 404)
            if callable(answer):
                answer(self)
                return
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            if not isinstance(answer, int):
                self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", content
        httpd.shutdown()


def as_png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def moved(to: str) -> Any:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


# videos


def test_the_objects_of_every_frame_are_found_and_marked_in_a_video(tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.avi")
    (source,) = find_sources([str(video)], Notes())
    assert isinstance(source, Video)
    detector = Detector(Finder(), batch_size=2)
    found = list(detect(detector, [source], tmp_path / "out", Saved(txt=True, crops=True)))
    assert [each.frame for each in found] == [0, 1, 2, 3, 4] and not any(each.notes for each in found)
    for i, each in enumerate(found):
        assert each.detections is not None and each.detections.names == ["red"] and each.size == (96, 128)
        np.testing.assert_allclose(each.detections.boxes[0].tolist(), (16 * i, 32, 16 * i + 32, 64), atol=3)
    marked = list(Frames(Video("clip", str(tmp_path / "out" / "clip.avi.mp4"))))
    assert len(marked) == 5 and all(image.size == (128, 96) for image in marked)
    outlined = np.asarray(marked[2]).astype(int) - np.asarray(list(Frames(source))[2]).astype(int)
    assert np.abs(outlined[:32]).max() > 100 > np.abs(outlined[70:]).max()  # the name, above the box
    images = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [(image["file_name"], image["frame"]) for image in images] == [(str(video), i) for i in range(5)]
    labels = sorted((tmp_path / "out" / "labels" / "clip.avi").iterdir())
    assert [file.name for file in labels] == [f"{i:06}.txt" for i in range(5)]
    assert len(list((tmp_path / "out" / "crops" / "0_red" / "clip.avi").iterdir())) == 5


def test_frames_are_in_memory_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path / "clip.avi", 20)
    read, original = [0], Frames.__iter__

    def counted(self: Frames) -> Iterator[Image.Image]:
        for image in original(self):
            read[0] += 1
            yield image

    monkeypatch.setattr(Frames, "__iter__", counted)
    found = detect(Detector(Finder(), batch_size=3), find_sources([str(video)], Notes()))
    for i, _ in enumerate(found):
        assert read[0] <= i + 3
    assert read[0] == 20


@pytest.mark.parametrize("size", [(64, 48), (65, 49), (17, 33)])
def test_marked_videos_hold_frames_of_any_size(size: tuple[int, int], tmp_path: Path) -> None:
    written = sources.VideoFile(tmp_path / "a.mp4", size, 12.5)
    for grey in (0, 100, 200):
        written.add(Image.new("RGB", size, (grey,) * 3))
    written.close()
    with Frames(Video("a", str(tmp_path / "a.mp4"))) as frames:
        seen = [np.asarray(image)[: size[1], : size[0]].mean() for image in frames]
        assert frames.rate == 12.5
    assert seen == pytest.approx([0, 100, 200], abs=6)


def test_a_video_that_cannot_be_written_whole_is_an_error(tmp_path: Path) -> None:
    written = sources.VideoFile(tmp_path / "a.mp4", (64, 48), 10)
    written.add(Image.new("RGB", (64, 48)))
    written.frames += 1  # as if one had been lost
    with pytest.raises(OSError, match=r"2 frames were written to a\.mp4, but it holds 1"):
        written.close()
    with pytest.raises(OSError, match="cannot write the video"):
        sources.VideoFile(tmp_path / "missing" / "a.mp4", (64, 48), 10)


def test_a_damaged_video_says_what_is_missing(run: Path, tmp_path: Path, capsys: Capture) -> None:
    video = make_video(tmp_path / "clip.mkv", 10)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    (tmp_path / "empty.mp4").write_bytes(b"no video")
    options = ["--device", "cpu", "--no-images", "--out", str(tmp_path / "out")]
    assert main(["detect", str(run), str(video), str(tmp_path / "empty.mp4"), *options]) == 1
    errors = capsys.readouterr().err
    assert "empty.mp4: OpenCV cannot open this as a video" in errors
    assert "of the 10 frames that it declares could be read" in errors
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["detections.json"]


def test_without_opencv_one_sentence_says_what_to_install(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["detect", str(run), str(tmp_path / "clip.mp4")]) == 1
    assert capsys.readouterr().err == "spd-zoo: error: this needs the package cv2: pip install 'spd-zoo[video]'\n"
    picture((40, 30)).save(tmp_path / "a.png")  # in a folder, the images are what was asked for
    assert main(["detect", str(run), str(tmp_path), "--device", "cpu"]) == 0
    assert "the suffix is not that of an image: .mp4 (1)" in capsys.readouterr().err


def test_a_camera_ends_when_asked_to_and_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path / "clip.avi", 20)
    (camera,) = find_sources(["0"], Notes())
    assert isinstance(camera, Video) and camera.live and camera.name == "camera 0"
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: capture(str(video)))
    seen: list[int] = []
    for each in detect(Detector(Finder()), [camera], tmp_path / "out", Saved(images=False), lambda: len(seen) >= 7):
        seen.append(each.frame or 0)
    assert seen == list(range(7))
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["images"]) == 7


def test_a_stream_that_is_not_there_is_an_error_without_its_password(run: Path, capsys: Capture) -> None:
    assert main(["detect", str(run), "rtsp://me:secret@127.0.0.1:9/x", "--device", "cpu"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("spd-zoo: error: rtsp://127.0.0.1:9/x: OpenCV cannot open this camera or stream")
    assert "secret" not in errors


# sources


def test_sources_are_told_apart(tmp_path: Path) -> None:
    picture((40, 30)).save(tmp_path / "a.png")
    picture((40, 30)).save(tmp_path / "without_suffix", "PNG")
    make_video(tmp_path / "clip.AVI", 1)
    make_video(tmp_path / "clip.avi", 1).rename(tmp_path / "odd.xyz")
    (tmp_path / "notes.md").write_text("# notes")
    notes = Notes()
    found = find_sources([str(tmp_path)], notes)
    assert found == [tmp_path / "a.png", Video(*[str(tmp_path / "clip.AVI")] * 2), tmp_path / "without_suffix"]
    assert "2 files" in notes.lines()[0] and ".md (1)" in notes.lines()[0]
    (odd, page, stream, secret) = find_sources(
        [
            str(tmp_path / "odd.xyz"),
            "https://example.org/a.png?size=1",
            "https://example.org/live.m3u8",
            "rtsp://me:secret@example.org/cam",
        ],
        Notes(),
    )
    assert odd == Video(*[str(tmp_path / "odd.xyz")] * 2) and len(list(Frames(odd))) == 1
    assert page == "https://example.org/a.png?size=1"
    assert isinstance(stream, Video) and stream.live
    assert isinstance(secret, Video) and "secret" not in repr(secret) + str(secret) and secret.opened.count("secret")
    with pytest.raises(ValueError, match=r"s3://bucket/a\.png is no address of an image"):
        find_sources(["s3://bucket/a.png"], Notes())


def test_a_list_names_images_beside_it_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a b.png", "c.png"):
        picture((40, 30)).save(tmp_path / "photos" / name)
    lines = (
        "\ufeffphotos/a b.png\r\n\r\n" + f"{tmp_path / 'photos' / 'c.png'}\nhttps://example.org/d.png\nmissing.png\n"
    )
    (tmp_path / "list.txt").write_text(lines)
    found = find_sources([str(tmp_path / "list.txt")], Notes())
    photos = tmp_path / "photos"
    assert found == [photos / "a b.png", photos / "c.png", "https://example.org/d.png", Path("missing.png")]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        find_sources([str(tmp_path / "empty.txt")], Notes())
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not a list of images"):
        find_sources([str(tmp_path / "binary.txt")], Notes())


def test_images_at_addresses_are_read(run: Path, server: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    address, content = server
    image = picture((90, 70), red=(8, 8, 24, 40))
    content["/photo.png"] = as_png(image)
    content["/moved"] = moved("/photo.png")
    for path in ("photo.png?width=90", "moved"):
        assert np.array_equal(np.asarray(read_source(f"{address}/{path}")), np.asarray(image))
    content["/away"] = moved((tmp_path / "a.png").as_uri())
    picture((9, 9)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot download this image: UnsupportedProtocol"):
        read_source(f"{address}/away")
    out = str(tmp_path / "out")
    assert main(["detect", str(run), f"{address}/photo.png", "--out", out, "--device", "cpu", "--score", "0.99"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "photo.png")), np.asarray(image))
    results = tmp_path / "results.jsonl"
    options = ["--results", str(results), "--device", "cpu", "--workers", "0"]
    assert main(["detect", str(run), f"{address}/photo.png", *options]) == 0
    assert json.loads(results.read_text())["width"] == 90


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.png", "404"),
        ("page.png", "a web page"),
        ("noise.png", "no image in a format"),
        ("large.png", "more than 0 MiB"),
        ("slow.png", "more than 0 seconds"),
        ("empty.png", "no image in a format"),
    ],
)
def test_what_is_no_image_at_an_address_is_an_error_of_that_image(
    name: str, words: str, server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, content = server
    content |= {"/page.png": b"<!doctype html><p>log in</p>", "/noise.png": b"\x00" * 99, "/empty.png": b""}
    content["/large.png"] = b"\x01" * 3000

    sent: list[int] = []
    ended = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not ended.wait(0.02) and len(sent) < 3000:  # a minute, far more than a busy machine may need
            sent.append(handler.wfile.write(b"\x01"))

    content["/slow.png"] = slow
    if name == "large.png":
        monkeypatch.setattr(sources, "_LARGEST_IMAGE", 2000)
    if name == "slow.png":
        monkeypatch.setattr(sources, "_LONGEST", 0.1)
    with pytest.raises(ValueError, match=words):
        read_source(f"{address}/{name}")
    assert len(sent) < 3000  # a server that trickles does not keep anybody waiting
    ended.set()


def test_a_server_that_is_not_there_is_an_error_of_that_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TRIES", 1)
    with pytest.raises(ValueError, match="cannot download this image: ConnectError"):
        read_source("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize("address", ["http://127.0.0.1:port/a.png", "http://127.0.0.1\a/a.png"], ids=["port", "host"])
def test_what_is_no_address_is_an_error_of_that_image(address: str) -> None:
    with pytest.raises(ValueError, match="cannot download this image: InvalidURL"):
        read_source(address)


def test_an_address_that_cannot_be_parsed_is_named_without_its_password() -> None:
    with pytest.raises(ValueError, match=r"http://\[::1/a.png is no address: Invalid IPv6 URL"):
        find_sources(["http://me:secret@[::1/a.png"], Notes())


def test_the_error_of_a_server_does_not_repeat_the_password(server: tuple[str, dict[str, Any]]) -> None:
    address = f"{server[0]}/none.png"
    with pytest.raises(ValueError, match=f"404.*'{address}'") as caught:
        read_source(address.replace("://", "://me:secret@"))
    assert "secret" not in str(caught.value)


# what is written


def test_labels_and_crops_are_those_of_the_objects(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    image = picture((128, 96), red=(16, 24, 48, 72), blue=(64, 0, 128, 48))
    image.save(tmp_path / "photos" / "a.png")
    picture((128, 96)).save(tmp_path / "photos" / "b.png")
    files = find_sources([str(tmp_path / "photos")], Notes())
    list(detect(Detector(Finder()), files, tmp_path / "out", Saved(images=False, txt=True, crops=True)))
    out = tmp_path / "out"
    written = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    crops = ["crops/0_red/a_2.png", "crops/2_blue/a_1.png"]
    assert written == ["classes.txt", *crops, "detections.json", "labels/a.txt", "labels/b.txt"]
    rows = [list(map(float, line.split())) for line in (out / "labels" / "a.txt").read_text().splitlines()]
    assert rows == [[2, 0.75, 0.25, 0.5, 0.5], [0, 0.25, 0.5, 0.25, 0.5]] and not (out / "labels" / "b.txt").read_text()
    assert (out / "classes.txt").read_text().split() == list(COLOURS)
    crop = np.asarray(Image.open(out / "crops" / "0_red" / "a_2.png"))
    assert crop.shape == (48, 32, 3) and (crop == COLOURS["red"]).all()


def test_written_labels_are_a_data_set_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    picture((128, 96), red=(16, 24, 48, 72)).save(tmp_path / "data" / "images" / "a.png")
    files = find_sources([str(tmp_path / "data" / "images")], Notes())
    list(detect(Detector(Finder()), files, tmp_path / "out", Saved(images=False, txt=True)))
    (tmp_path / "out" / "labels").rename(tmp_path / "data" / "labels")
    (tmp_path / "out" / "classes.txt").rename(tmp_path / "data" / "classes.txt")
    data = open_boxes(tmp_path / "data", "train")
    assert data is not None and data.class_names == list(COLOURS)
    np.testing.assert_allclose(data.objects_in(0).boxes.tolist(), [(16, 24, 48, 72)], atol=1e-3)


@pytest.mark.parametrize("other", ["a.jpg", "a.bmp"])
def test_images_that_would_share_a_label_file_are_refused(
    other: str, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    picture((40, 30)).save(tmp_path / "a.png")
    picture((40, 30)).save(tmp_path / other)
    arguments = ["detect", str(run), str(tmp_path / "a.png"), str(tmp_path / other), "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--save-txt"]) == 1
    assert "would have the same label file" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == [other, "a.png"]


@pytest.mark.parametrize(("name", "label"), [("a.bmp", "a"), ("a.b.TIF", "a.b"), ("a.jpg.png", "a.jpg")])
def test_a_label_file_is_called_like_its_image(name: str, label: str, tmp_path: Path) -> None:
    picture((64, 64), red=(8, 8, 40, 40)).save(tmp_path / name)
    list(detect(Detector(Finder()), [tmp_path / name], tmp_path / "out", Saved(txt=True, crops=True)))
    assert [file.name for file in (tmp_path / "out" / "labels").iterdir()] == [f"{label}.txt"]
    assert [file.name for file in (tmp_path / "out" / "crops" / "0_red").iterdir()] == [f"{label}_1.png"]


@pytest.mark.parametrize("video_first", [False, True])
def test_frames_do_not_overwrite_the_labels_of_images(video_first: bool, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    picture((128, 96)).save(tmp_path / "clip" / "000001.png")
    make_video(tmp_path / "clip.mp4", 2)
    named = [str(tmp_path / "clip" / "000001.png"), str(tmp_path / "clip.mp4")]
    files = find_sources(named[::-1] if video_first else named, Notes())
    with pytest.raises(ValueError, match="would have the same label file"):
        list(detect(Detector(Finder()), files, tmp_path / "out", Saved(txt=True)))
    list(detect(Detector(Finder()), files, tmp_path / "out", Saved()))
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_crop_does_not_overwrite_the_copy_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "crops" / "0_red").mkdir(parents=True)
    files = [tmp_path / "a.png", tmp_path / "crops" / "0_red" / "a_1.png"]
    for file in files:
        picture((64, 64), red=(8, 8, 40, 40)).save(file)
    with pytest.raises(ValueError, match=r"would be written to a_1\.png"):
        list(detect(Detector(Finder()), files, tmp_path / "out", Saved(crops=True)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "crops"]


def test_an_empty_path_is_not_the_current_folder(run: Path, capsys: Capture) -> None:
    assert main(["detect", str(run), "", "--device", "cpu"]) == 1
    assert "a path is empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a path is empty"):
        find_images(["a.png", ""])


def test_class_names_never_become_paths_and_files_need_a_folder(run: Path, tmp_path: Path, capsys: Capture) -> None:
    picture((40, 30)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    options = ["--score", "0", "--device", "cpu"]
    assert main(["detect", str(run), str(tmp_path / "a.png"), "--save-crops", "--out", str(out), *options]) == 0
    assert {folder.name for folder in (out / "crops").iterdir()} == {"0_cat", "1_a_b"}
    for option in ("--save-txt", "--save-crops", "--no-images"):
        assert main(["detect", str(run), str(tmp_path / "a.png"), option]) == 1
        assert "add --out DIR" in capsys.readouterr().err


def test_a_results_file_refuses_videos(run: Path, tmp_path: Path, capsys: Capture) -> None:
    video = make_video(tmp_path / "clip.avi", 1)
    assert main(["detect", str(run), str(video), "--results", str(tmp_path / "r.csv"), "--device", "cpu"]) == 1
    assert "clip.avi is a video" in capsys.readouterr().err


# arrays


def test_arrays_of_opencv_are_seen_in_their_colours() -> None:
    boxes: dict[str, Box] = {"red": (8, 8, 24, 40), "blue": (60, 10, 90, 60)}
    image = picture((100, 70), **boxes)
    bgr = np.asarray(image)[..., ::-1]
    expected = Detector(Finder())(image)
    detector = Detector(Finder(), colour="bgr")
    for same in (bgr, np.ascontiguousarray(bgr), image):  # the order is that of arrays alone
        assert detector(same).names == expected.names == ["blue", "red"]
        assert torch.equal(detector(same).boxes, expected.boxes)
    assert np.array_equal(np.asarray(detector(bgr).draw()), np.asarray(expected.draw()))
    assert [each.names for each in detector([bgr, image])] == [expected.names] * 2
    with pytest.raises(ValueError, match="colour must be rgb or bgr, got 'hsv'"):
        Detector(Finder(), colour="hsv")


def test_a_classifier_takes_arrays_of_opencv() -> None:
    torch.manual_seed(0)
    net = timm.create_model("cifar_resnet20", num_classes=4)
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    expected = Classifier(net)(image).probabilities
    assert torch.equal(Classifier(net, colour="bgr")(image[..., ::-1]).probabilities, expected)
    assert not torch.equal(Classifier(net, colour="bgr")(image).probabilities, expected)


def test_grey_arrays_and_tensors_are_taken() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    tensor = torch.from_numpy(grey)[None]
    net = timm.create_model("cifar_resnet20", num_classes=4)
    for colour in ("rgb", "bgr"):
        classifier = Classifier(net, colour=colour)
        expected = classifier(Image.fromarray(grey)).probabilities
        for same in (grey, grey[..., None], tensor, tensor / 255):
            assert torch.equal(classifier(same).probabilities, expected)
    assert len(Detector(Finder())(grey)) == 0


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"an image must have pixels, got {size[0]} x {size[1]}"):
        open_image(Image.new("RGB", size))


def test_a_list_may_have_comments(tmp_path: Path) -> None:
    picture((40, 30)).save(tmp_path / "a.png")
    picture((40, 30)).save(tmp_path / "#1.png")
    (tmp_path / "list.txt").write_text(f"# of monday\n\n{tmp_path / 'a.png'}\n#1.png\n")
    assert find_sources([str(tmp_path / "list.txt")], Notes()) == [tmp_path / "a.png", tmp_path / "#1.png"]


def test_nothing_is_written_if_no_image_could_be_read(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    out = tmp_path / "out"
    command = ["detect", str(run), str(tmp_path / "a.png"), "--out", str(out), "--device", "cpu"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "a.png: this is no image" in error and f"{out} is not written, because nothing could be read" in error
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    picture((40, 30)).save(tmp_path / "a.png")  # and the same command works when the image is mended
    assert main(command) == 0 and (out / "detections.json").is_file()


@pytest.mark.parametrize("make", [make_coco, make_yolo, make_voc])
def test_data_of_detect_is_a_data_set_with_boxes(make: Any, run: Path, tmp_path: Path, capsys: Capture) -> None:
    root = make(tmp_path / "data")
    command = ["detect", str(run), "--data", str(root), "--workers", "0", "--device", "cpu"]
    assert main([*command, "--split", "val", "--results", str(tmp_path / "val.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).stem for row in rows] == [f"val_{i}" for i in range(4)]
    assert not any(row["error"] for row in rows)
    assert main([*command, "--results", str(tmp_path / "all.jsonl")]) == 1
    assert "has the splits train, val; choose one with --split" in capsys.readouterr().err


def test_data_of_detect_may_also_be_images_with_labels(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    picture((40, 30)).save(tmp_path / "data" / "train" / "cat" / "a.png")
    results = tmp_path / "rows.jsonl"
    command = ["detect", str(run), "--workers", "0", "--device", "cpu", "--results", str(results), "--data"]
    assert main([*command, str(tmp_path / "data")]) == 0 and len(results.read_text().splitlines()) == 1
    assert main([*command, str(tmp_path / "nothing"), "--overwrite"]) == 1
    assert f"there is no folder {tmp_path / 'nothing'}" in capsys.readouterr().err
