"""What `spd-zoo detect` writes: marked images and videos, label files, crops, and all objects in COCO's format."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torchvision.ops import box_convert

from spd_zoo.data.reading import SUFFIXES
from spd_zoo.data.regions import Regions, reduced
from spd_zoo.files import whole
from spd_zoo.inference.detector import Detections
from spd_zoo.inference.sources import Source, Video, VideoFile, name_of_address

__all__ = ["CocoFile", "ImageDetections", "OutputFolder", "Saved", "new_folder"]

DRAWN = 2048  # minimum longer side, in pixels, of the marked copy of a very large image


@dataclass(frozen=True)
class ImageDetections:
    """The objects in an image or in a frame of a video, or the reason why it could not be read.

    Attributes:
        path: The file or the address.
        size: Height and width of the upright image.
        detections: The objects.
        error: Why the image could not be read.
        notes: What was guessed when it was read.
        frame: The number of the frame, from 0; None for an image.
    """

    path: Path | str
    size: tuple[int, int] = (0, 0)
    detections: Detections | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    frame: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.frame is None else f"{self.path} frame {self.frame}"


class CocoFile:
    """Detections as a data set in COCO's format, whose `annotations` have a `score` as in COCO's results.

    Categories and images are numbered from 1. A frame of a video has its number in `frame`. Rows are kept
    in temporary files, so that memory does not grow. A context manager.

    Args:
        class_names: The names of all classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
        self.images = self.annotations = 0
        with ExitStack() as files:
            temporary = partial(tempfile.TemporaryFile, "w+", encoding="utf-8")
            self._parts = [files.enter_context(temporary()) for _ in ("images", "annotations")]
            self._files = files.pop_all()

    def __enter__(self) -> "CocoFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, found: ImageDetections) -> None:
        """Adds the objects of an image; one that could not be read is left out."""
        if found.detections is None:
            return
        self.images += 1
        height, width = found.size
        image = {"id": self.images, "file_name": str(found.path), "width": width, "height": height}
        self._write(0, self.images, image | ({} if found.frame is None else {"frame": found.frame}))
        boxes = box_convert(found.detections.boxes, "xyxy", "xywh").tolist()
        for box, score, label in zip(
            boxes, found.detections.scores.tolist(), found.detections.labels.tolist(), strict=True
        ):
            self.annotations += 1
            self._write(
                1,
                self.annotations,
                {
                    "id": self.annotations,
                    "image_id": self.images,
                    "category_id": label + 1,
                    "bbox": [round(value, 2) for value in box],
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": round(score, 5),
                },
            )

    def _write(self, part: int, number: int, row: dict[str, Any]) -> None:
        self._parts[part].write((",\n" if number > 1 else "\n") + json.dumps(row))

    def write(self, file: TextIO) -> None:
        """Writes all that was added."""
        images, annotations = self._parts
        for start, part in (
            ('{"images": [', images),
            (f'],\n"categories": {json.dumps(self.categories)},\n"annotations": [', annotations),
        ):
            file.write(start)
            part.seek(0)
            shutil.copyfileobj(part, file)
        file.write("]}\n")


@dataclass(frozen=True)
class Saved:
    """What is written in addition to `detections.json`.

    Attributes:
        images: Copies of images and videos with the objects marked.
        txt: A YOLO label file (class, centre, size, as shares of the image) for each image, in `labels`.
        crops: The pixels of each object, in a folder of `crops` for each class.
    """

    images: bool = True
    txt: bool = False
    crops: bool = False


class OutputFolder:
    """The files that `detect` writes.

    Args:
        folder: Where they are written.
        sources: All images and videos.
        class_names: The names of all classes.
        saved: Which files are wanted.

    Raises:
        ValueError: If two sources would have the same label file.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], class_names: Sequence[str], saved: Saved) -> None:
        self.folder, self.saved, self.class_names = folder, saved, class_names
        self.places = _places(sources)
        if saved.txt or saved.crops:
            self.stems = _stems(self.places)
            _check_stems(self.stems)
        self.coco = CocoFile(class_names)
        self.video: tuple[Video, VideoFile] | None = None
        if saved.txt:
            (folder / "labels").mkdir()
            names = "".join(f"{' '.join(name.split())}\n" for name in class_names)
            (folder / "classes.txt").write_text(names, encoding="utf-8")

    def add(self, source: Source, found: ImageDetections, image: Regions | None, rate: float) -> None:
        """Writes the results of an image, or of a frame of a video with `rate` frames per second."""
        if self.video is not None and self.video[0] is not source:
            self._end_video()
        self.coco.add(found)
        if image is None or found.detections is None:
            return
        place = self.places[source]
        if self.saved.images and isinstance(source, Video):
            if self.video is None:
                self.video = (source, VideoFile(_with_folder(self.folder / place), image.size, rate))
            self.video[1].add(_marked(found.detections, image))
        elif self.saved.images:
            _marked(found.detections, image).save(_with_folder(self.folder / place), quality=95)
        if not (self.saved.txt or self.saved.crops):
            return
        stem = self.stems[source] if found.frame is None else self.stems[source] / _frame_name(found.frame)
        if self.saved.txt:
            lines = "".join(_yolo_lines(found.detections, image.size))
            _with_folder(self.folder / "labels" / f"{stem}.txt").write_text(lines, encoding="utf-8")
        if self.saved.crops:
            suffix = place.suffix if found.frame is None else ".png"
            for number, (label, box) in enumerate(
                zip(found.detections.labels.tolist(), found.detections.boxes, strict=True), 1
            ):
                folder = self.folder / "crops" / f"{label}_{_as_file_name(self.class_names[label])}"
                _crop(image, box.tolist()).save(_with_folder(folder / f"{stem}_{number}{suffix}"), quality=95)

    def close(self) -> None:
        """Finishes the current video, and writes `detections.json`."""
        self._end_video()
        with (self.folder / "detections.json").open("w", encoding="utf-8") as file:
            self.coco.write(file)

    def _end_video(self) -> None:
        if self.video is not None:
            self.video[1].close()
        self.video = None


@contextmanager
def new_folder(
    path: Path, sources: Sequence[Source], class_names: Sequence[str], saved: Saved
) -> Iterator[OutputFolder]:
    """An `OutputFolder` that becomes `path` when the block ends, and is deleted if the block fails.

    Raises:
        ValueError: If `path` is anything but an empty folder, two sources would have the same label file, or none
            could be read.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; choose a new folder with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.mkdir()
        output = OutputFolder(temporary, sources, class_names, saved)
        with output.coco:
            yield output
            if sources and not output.coco.images:
                raise ValueError(f"{path} is not written, because nothing could be read")
            output.close()


def _places(sources: Sequence[Source]) -> dict[Source, Path]:
    """Where the copy of each source goes, relative to the common folder of all files.

    Images become PNG unless they are JPEG, and videos MP4.
    """
    files = {source: _full(source) for source in sources if isinstance(source, Path) or _is_video_file(source)}
    shared = os.path.commonpath([path.parent for path in files.values()]) if files else ""
    places: dict[Source, Path] = {}
    taken: set[Path] = set()
    for source in sources:
        place = files[source].relative_to(shared) if source in files else Path(name_of_address(str(source)))
        suffixes, suffix = ((".mp4",), ".mp4") if isinstance(source, Video) else ((".jpg", ".jpeg", ".png"), ".png")
        if place.suffix.lower() not in suffixes:
            place = place.with_name(f"{place.name}{suffix}")
        number, free = 2, place
        while free in taken:
            free, number = place.with_name(f"{place.stem}_{number}{place.suffix}"), number + 1
        places[source] = free
        taken.add(free)
    return places


def _is_video_file(source: Source) -> bool:
    return isinstance(source, Video) and not source.live


def _full(source: Source) -> Path:
    return Path(os.path.normpath(Path(str(source)).absolute()))  # ".." would lead out of the folder


def _stems(places: dict[Source, Path]) -> dict[Source, Path]:
    """The names of an image's label file and crops, without suffix, or the folder for those of a video's frames.

    The suffix of an image is left out, because a label file is found by the rest of its image's name.
    """
    stems = {}
    for source, place in places.items():
        stem = stems[source] = place.with_suffix("")
        own = source.suffix if isinstance(source, Path) else Path(name_of_address(str(source))).suffix
        if stem.suffix == own and own.lower() in SUFFIXES:  # the copy of b.bmp is b.bmp.png
            stems[source] = stem.with_suffix("")
    return stems


def _check_stems(stems: dict[Source, Path]) -> None:
    """Raises ValueError if two sources have the same stem, or an image that of a video's frame."""
    owners: dict[Path, Source] = {}
    videos = {stem: source for source, stem in stems.items() if isinstance(source, Video)}
    for source, stem in stems.items():
        other = owners.setdefault(stem, source)
        if stem.name.isdecimal() and stem.name == _frame_name(int(stem.name)):
            other = videos.get(stem.parent, other)
        if other is not source:
            raise ValueError(
                f"{other} and {source} would have the same label file and crops; rename one, or run them one by one"
            )


def _frame_name(frame: int) -> str:
    return f"{frame:06}"


def _yolo_lines(found: Detections, size: tuple[int, int]) -> Iterator[str]:
    """A line for each object of an image of this width and height: class, centre and size, as shares of the image."""
    width, height = size
    for (x, y, w, h), label in zip(
        box_convert(found.boxes, "xyxy", "cxcywh").tolist(), found.labels.tolist(), strict=True
    ):
        yield f"{label} {x / width:.6f} {y / height:.6f} {w / width:.6f} {h / height:.6f}\n"


def _marked(found: Detections, image: Regions) -> Image.Image:
    """A copy with the objects drawn; an image that is read by regions is shrunk first if it is very large."""
    small = reduced(image, (DRAWN, DRAWN))
    x, y = small.width / image.size[0], small.height / image.size[1]
    return replace(found, boxes=found.boxes * torch.tensor([x, y, x, y])).draw(small)


def _crop(image: Regions, box: Sequence[float]) -> Image.Image:
    """The whole pixels of a box, at least one."""
    left, top = min(int(box[0]), image.size[0] - 1), min(int(box[1]), image.size[1] - 1)
    return image.crop((left, top, max(left + 1, -int(-box[2] // 1)), max(top + 1, -int(-box[3] // 1))))


def _as_file_name(name: str) -> str:
    """A class name without the characters that are special in paths."""
    return re.sub(r"[^\w-]+", "_", name)[:80]


def _with_folder(file: Path) -> Path:
    """A new file, whose folder is created.

    Raises:
        ValueError: If the file exists, written for another image.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        raise ValueError(f"two images or objects would be written to {file.name}; rename one, or run them one by one")
    return file
