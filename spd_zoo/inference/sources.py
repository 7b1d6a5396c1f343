"""The inputs of `spd-zoo detect`: image files, addresses of images, and videos and cameras, which OpenCV reads."""

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from spd_zoo.data.notes import Notes
from spd_zoo.data.reading import SUFFIXES, find_images, is_comment, is_identified, is_url, read_image
from spd_zoo.files import exists, is_file
from spd_zoo.weights.download import DownloadError, download_bytes, public

__all__ = [
    "USUAL_RATE",
    "Frames",
    "Source",
    "Video",
    "VideoFile",
    "find_sources",
    "name_of_address",
    "read_source",
]

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mjpeg", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
_STREAM_SUFFIXES = (*VIDEO_SUFFIXES, ".m3u8", ".mpd", ".sdp")  # of addresses
_LARGEST_IMAGE = 2**28  # bytes of an image at an address
_LONGEST = 120.0  # seconds that its download may take
_PATIENCE = 10_000  # milliseconds to wait for a stream to open, and for each of its frames
USUAL_RATE = 25.0  # frames per second of a marked video if the source does not state them


@dataclass(frozen=True)
class Video:
    """A video file, a stream, or a camera.

    Attributes:
        name: The file, the address without a password, or the camera's number.
        opened: What OpenCV opens.
    """

    name: str
    opened: str = field(repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def live(self) -> bool:
        """Whether it is a camera or a stream, which may never end."""
        return self.opened.isdecimal() or is_url(self.opened)


Source: TypeAlias = "Path | str | Video"  # an image file, the address of an image, or a video


def find_sources(patterns: Iterable[str], notes: Notes) -> list[Source]:
    """The images and videos named by files, folders, globs, text files that list these, addresses and camera numbers.

    A file is recognised as an image by its suffix or its content, and otherwise taken for a video. In a folder, videos
    are recognised by their suffix. Paths in a list are relative to the current folder, or else to the list's.

    Args:
        patterns: Files, folders, globs, lists, addresses and numbers.
        notes: Receives a note for each folder that is empty or has files of other types.

    Returns:
        The sources, in order.

    Raises:
        ModuleNotFoundError: If there is a video, and OpenCV is missing.
        ValueError: If a list is empty or not a text file, or the type of an address cannot be read.
    """
    found: list[Source] = []
    videos = VIDEO_SUFFIXES if _has_opencv() else ()  # in folders; without OpenCV they are left out, with a note
    for pattern in patterns:
        is_list = Path(pattern).suffix.lower() == ".txt" and is_file(pattern)
        entries = _listed(Path(pattern)) if is_list else [pattern]
        for entry in entries:
            if is_url(entry):
                found.append(_at_address(entry))
            elif entry.isdecimal() and not exists(entry):
                found.append(Video(f"camera {int(entry)}", entry))
            else:
                found += map(_image_or_video, find_images([entry], notes, videos))
    if any(isinstance(source, Video) for source in found):
        _opencv()  # if it is missing, fail before anything is computed
    return found


def _listed(file: Path) -> list[str]:
    """The entries of a list file."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a list of images: it is not UTF-8 text") from error
    entries = [line for line in lines if line and not is_comment(line)]
    if not entries:
        raise ValueError(f"{file} lists no image: it needs a path or an address on each line")
    beside = [str(file.parent / entry) for entry in entries]
    return [
        there if not is_url(entry) and not exists(entry) and exists(there) else entry
        for entry, there in zip(entries, beside, strict=True)
    ]


def _at_address(address: str) -> Source:
    shown, parts = public(address), urlsplit(address)
    if parts.scheme.lower() not in ("http", "https", "rtsp", "rtsps", "rtmp", "udp", "tcp", "srt"):
        raise ValueError(f"{shown} is no address of an image (http, https) or of a stream (rtsp, rtmp, ...)")
    if parts.scheme.lower() in ("http", "https") and not parts.path.lower().endswith(_STREAM_SUFFIXES):
        return address
    return Video(shown, address)


def _image_or_video(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return Video(str(path), str(path))
    if suffix in SUFFIXES or not is_file(path) or is_identified(path):
        return path
    return Video(str(path), str(path)) if _has_opencv() else path  # reading it reports that it is not an image


def _has_opencv() -> bool:
    return importlib.util.find_spec("cv2") is not None


def name_of_address(address: str) -> str:
    """A file name for the image or video at an address, or for a camera."""
    name = unquote(urlsplit(address).path).replace("\\", "/").rstrip("/").rpartition("/")[2]
    kept = "".join(each if each.isalnum() or each in "-_." else "_" for each in name).lstrip(".")
    return kept[-100:] or "image"


def read_source(source: Path | str | BytesIO, mode: str = "RGB", read: Callable[..., Any] = read_image) -> Any:
    """An image file, the image at an address, or the bytes of one, as `read` returns it.

    Args:
        source: The image.
        mode: PIL's mode of the result.
        read: Takes a file or bytes, and a mode.

    Raises:
        ValueError: If it is no image that can be read, or cannot be downloaded.
    """
    if not isinstance(source, str) or not is_url(source):
        return read(source, mode)
    try:
        return read(BytesIO(download_bytes(source, _LARGEST_IMAGE, _LONGEST)), mode)
    except DownloadError as error:
        raise ValueError(f"cannot download this image: {error}") from error


class Frames:
    """The frames of a video as images, read one by one; a context manager.

    Args:
        video: The video.

    Attributes:
        rate: Frames per second, as the video declares it, or else 25.
        note: After the last frame: what may be missing.

    Raises:
        ValueError: If OpenCV cannot open it.
    """

    def __init__(self, video: Video) -> None:
        cv2 = _opencv()
        self.video, self.note = video, ""
        if video.opened.isdecimal():
            self.capture = cv2.VideoCapture(int(video.opened))
        elif video.live:
            patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE]
            self.capture = cv2.VideoCapture(video.opened, cv2.CAP_FFMPEG, patience)
        else:
            self.capture = cv2.VideoCapture(video.opened)
        if not self.capture.isOpened():
            self.capture.release()
            if video.live:
                raise ValueError("OpenCV cannot open this camera or stream; is it connected, and not in use?")
            raise ValueError("OpenCV cannot open this as a video, and it is no image in a format that Pillow knows")
        rate = float(self.capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else USUAL_RATE
        self.expected = 0 if video.live else int(max(0, self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __enter__(self) -> "Frames":
        return self

    def __exit__(self, *_: object) -> None:
        self.capture.release()

    def __iter__(self) -> Iterator[Image.Image]:
        number = 0
        while True:
            there, frame = self.capture.read()
            if not there:
                break
            number += 1
            yield Image.fromarray(np.ascontiguousarray(frame[..., ::-1] if frame.ndim == 3 else frame)).convert("RGB")
        if number < self.expected:
            self.note = f"only {number} of the {self.expected} frames that it declares could be read"


class VideoFile:
    """An MP4 file that is written frame by frame.

    Args:
        file: The file.
        size: Width and height of the frames. Odd ones are padded by a black line, because the codec needs even ones.
        rate: Frames per second.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, file: Path, size: tuple[int, int], rate: float) -> None:
        cv2 = _opencv()
        self.file, self.size, self.frames = file, size, 0
        self.even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        self.writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), rate, self.even)
        if not self.writer.isOpened():
            raise OSError(f"OpenCV cannot write the video {file.name} of {size[0]}x{size[1]} pixels")

    def add(self, frame: Image.Image) -> None:
        """Adds a frame; one of another size is scaled to that of the first."""
        if frame.size != self.size:
            frame = frame.resize(self.size)
        canvas = Image.new("RGB", self.even)
        canvas.paste(frame)
        self.writer.write(np.ascontiguousarray(np.asarray(canvas)[..., ::-1]))
        self.frames += 1

    def close(self) -> None:
        """Finishes the file.

        Raises:
            OSError: If it does not hold all frames, for example because the disk is full.
        """
        self.writer.release()  # which does not report failures
        cv2 = _opencv()
        capture = cv2.VideoCapture(str(self.file))
        written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        if written != self.frames:
            raise OSError(f"{self.frames} frames were written to {self.file.name}, but it holds {max(0, written)}")


def _opencv() -> Any:
    """Imports OpenCV with its log messages turned off.

    Raises:
        ModuleNotFoundError: If it is missing.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a video needs OpenCV: pip install 'spd-zoo[video]'", name="cv2") from error
    return cv2
