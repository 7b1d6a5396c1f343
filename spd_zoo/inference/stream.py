"""`detect`: the objects in images and in the frames of videos, one after the other, in bounded memory."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from spd_zoo.data.regions import Regions
from spd_zoo.inference.detector import Detections, Detector
from spd_zoo.inference.loop import Files, Task, batches, run
from spd_zoo.inference.output import ImageDetections, Saved, new_folder
from spd_zoo.inference.sources import USUAL_RATE, Frames, Source, Video, read_source
from spd_zoo.weights.download import public

__all__ = ["detect"]


def detect(
    detector: Detector,
    sources: Sequence[Source],
    out: Path | None = None,
    saved: Saved | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[ImageDetections]:
    """Detects objects in images and videos, in order; yields those of each image as soon as its batch is computed.

    `out` appears after the last image. It has `detections.json` (see `CocoFile`) and what `saved` asks for, in the same
    subfolders as the images.

    Args:
        detector: The detector.
        sources: What `find_sources` returns; duplicates count once.
        out: A folder that does not exist or is empty; it is written atomically.
        saved: What is written to `out` in addition to `detections.json`; None: marked images and videos.
        stopped: Called for each frame of a camera or stream, which ends as soon as this returns True.

    Raises:
        ImageSizeError: If the network does not take inputs of the detector's size.
        ModelError: If the network computes numbers that are not finite.
        OSError: If a file cannot be written.
        ValueError: If `out` is not an empty folder, two sources would have the same label file, or none could be read
            although there is `out`.
    """
    sources = list(dict.fromkeys(sources))
    images = iter(_in_images(detector, [source for source in sources if not isinstance(source, Video)]))
    folder = new_folder(out, sources, detector.class_names, saved or Saved()) if out is not None else nullcontext()
    with folder as output:
        for source in sources:
            for found, image, rate in (
                _in_video(detector, source, stopped) if isinstance(source, Video) else [next(images)]
            ):
                if output is not None:
                    output.add(source, found, image, rate)
                yield found


def _in_images(
    detector: Detector, sources: list[Path | str]
) -> Iterator[tuple[ImageDetections, Regions | None, float]]:
    at_once = 1 if detector.tile else detector.batch_size  # large images are in memory one at a time

    def compute(opened: list[Regions]) -> list[tuple[Regions, Detections]]:
        return list(zip(opened, detector.find_in(opened), strict=True))

    task = Task(partial(read_source, read=detector.read), list, compute, at_once)
    for batch, outcomes in run(Files([str(source) for source in sources]), task, batches(range(len(sources)), at_once)):
        for source, outcome in zip(sources[batch.start : batch.stop], outcomes, strict=True):
            name = source if isinstance(source, Path) else public(source)
            if outcome.result is None:
                yield ImageDetections(name, error=outcome.error, notes=outcome.notes), None, 0.0
            else:
                image, found = outcome.result
                # the path instead of the pixels, to save memory
                found = replace(found, image=source if isinstance(source, Path) else None)
                notes = (*outcome.notes, *detector.limit_notes(found))
                yield ImageDetections(name, image.size[::-1], found, notes=notes), image, 0.0


def _in_video(
    detector: Detector, video: Video, stopped: Callable[[], bool]
) -> Iterator[tuple[ImageDetections, Image.Image | None, float]]:
    at_once = 1 if detector.tile or video.live else detector.batch_size
    try:
        frames = Frames(video)
    except ValueError as error:
        yield ImageDetections(video.name, error=str(error)), None, USUAL_RATE
        return
    with frames:
        numbered = enumerate(itertools.takewhile(lambda _: not (video.live and stopped()), frames))
        while batch := list(itertools.islice(numbered, at_once)):
            for (number, image), found in zip(batch, detector.find_in(image for _, image in batch), strict=True):
                size, notes = (image.height, image.width), detector.limit_notes(found)
                yield ImageDetections(video.name, size, found, notes=notes, frame=number), image, frames.rate
        if frames.note:
            yield ImageDetections(video.name, notes=(frames.note,)), None, frames.rate
