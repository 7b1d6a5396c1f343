"""Do tiles help with small objects in large images? Trains and evaluates on whole images and on tiles, on aerial-cars.

    python tools/compare_tiles.py --data AERIAL_CARS --out RUNS [--seeds 3] [--image-size 320] [--tile 320]
        [--images 8000] [--model yolov8n_spd] [--records tools/tiles.jsonl]

AERIAL_CARS is a checkout of https://github.com/jekhor/aerial-cars-dataset. Frames of one video or flight stay together:
for each seed whole sources are drawn for validation, until they have a fifth of the images. Both runs of a seed see
--images inputs of --image-size, augmented, so that they train on the same number of pixels, and end with their last
epoch. Three combinations of training and evaluation become lines of --records. After a stop, repeat the command:
runs resume, and seeds that are recorded are not repeated. The table is printed and written to RUNS/tiles.md.
"""

import argparse
import json
import random
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from exit_status import explained
from twins_config import read_records

from spd_zoo.data.boxes import Tiling, open_boxes
from spd_zoo.data.boxes.tiles import cut
from spd_zoo.data.labelled import DataError
from spd_zoo.files import whole
from spd_zoo.training.config import FinetuneConfig
from spd_zoo.training.evaluate import evaluate
from spd_zoo.training.finetune import finetune

SOURCES = (  # frames of one video or flight, by file name; the two crops of MOS74 to MOS93 show the same flight
    r"(MunichStreet02-)?MOS[789]\d\.",
    r"MOS1\d\d\.",
    r"harlem-",
    r"DJI-00760-",
    r"DJI_0005-",
    r"DJI_0013-",
    r"DJI_0762-",
    r"DJI_\d+\.",
)
COMBINATIONS = (("whole", "whole"), ("whole", "tiles"), ("tiles", "tiles"))  # training, evaluation
_FIELDS = ("seed", "trained", "evaluated", "inputs", "metrics")  # of a record
BATCH = 16
VALIDATION = 0.2  # minimum share of the images


def split(images: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Training and validation images, each source in only one of them.

    Raises:
        DataError: If an image is of no known source, or there is only one source.
    """
    sources: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        source = next((pattern for pattern in SOURCES if re.match(pattern, image.name)), None)
        if source is None:
            raise DataError(f"{image} is of no source that SOURCES names")
        sources[source].append(image)
    order = sorted(sources)
    random.Random(seed).shuffle(order)
    val: list[Path] = []
    while order and len(val) < VALIDATION * len(images):
        val += sources[order.pop()]
    if not order:
        raise DataError("the images are of too few sources: validation needs one that is not trained on")
    return [image for source in order for image in sources[source]], val


def write_data(data: Path, folder: Path, seed: int) -> Path:
    """The data.yaml of a seed, in a folder with its lists of images.

    Raises:
        DataError: If the data set is not there.
    """
    found = sorted(path for path in data.glob("*") if path.suffix.lower() in (".jpg", ".png"))
    if not found or not (data / "aerial.names").is_file():
        raise DataError(f"{data} is no checkout of aerial-cars-dataset: it has no images and aerial.names")
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in zip(("train", "val"), split(found, seed), strict=True):
        text = "".join(f"{image.resolve()}\n" for image in images)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    names = (data / "aerial.names").read_text(encoding="utf-8").split()
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"train": "train.txt", "val": "val.txt", "names": names}), encoding="utf-8")
    return file


def run_seed(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Trains on whole images and on tiles, or resumes the runs; returns a record for each combination.

    Raises:
        Stopped: After a signal, when the state of the run is saved.
    """
    folder = options.out / f"{options.model}_{options.image_size}_{options.tile}_{options.images}_{seed}"
    data = write_data(options.data, folder, seed)
    train = open_boxes(data, "train")
    assert train is not None
    tiled = replace(train, tiling=Tiling(options.tile, 0.2))
    tiles = cut(tiled, (options.image_size, options.image_size), seed)
    numbers = {"whole": len(train), "tiles": len(tiles)}
    if len(train) < BATCH:
        raise DataError(f"{data} has {len(train)} training images; a batch needs {BATCH}")
    for training, number in numbers.items():
        config = FinetuneConfig(
            options.model,
            str(data),
            folder / training,
            tile=options.tile if training == "tiles" else 0,
            epochs=max(1, round(options.images / (number - number % BATCH))),
            batch_size=BATCH,
            image_size=str(options.image_size),
            keep="last",
            pretrained=False,
            seed=seed,
            workers=options.workers,
        )
        finetune(config)
    records = []
    for trained, evaluated in COMBINATIONS:
        tile = options.tile if evaluated == "tiles" else 0
        (found,) = evaluate(str(folder / trained), data, "val", batch_size=BATCH, workers=options.workers, tile=tile)
        rows = len((folder / trained / "metrics.csv").read_text(encoding="utf-8").splitlines()) - 1
        inputs = rows * (numbers[trained] - numbers[trained] % BATCH)
        record = {"seed": seed, "trained": trained, "evaluated": evaluated, "inputs": inputs, **key(options)}
        records.append(record | {"metrics": found.predictions.summary()})
    return records


def key(options: argparse.Namespace) -> dict[str, Any]:
    """The options that all records of a comparison share."""
    return {name: getattr(options, name) for name in ("model", "image_size", "tile", "images")}


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: for each combination, mean and single values of AP, AP50 and AP of small objects."""
    lines = ["| trained on | evaluated on | inputs | AP | AP50 | AP small |", "| --- | --- | --- | --- | --- | --- |"]
    for trained, evaluated in COMBINATIONS:
        rows = [each for each in records if (each["trained"], each["evaluated"]) == (trained, evaluated)]
        cells = []
        for name in ("ap", "ap50", "ap_small"):
            values = [each["metrics"][name] for each in rows if each["metrics"][name] is not None]
            each = ", ".join(f"{value:.1f}" for value in values)
            mean = statistics.mean(values) if values else None
            cells.append("-" if mean is None else f"{mean:.1f} ({each})" if len(values) > 1 else each)
        inputs = ", ".join(str(each["inputs"]) for each in rows)
        lines.append(f"| {trained} | {evaluated} | {inputs} | {' | '.join(cells)} |")
    return "\n".join(lines)


@explained
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the seeds without a record and writes the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=Path, help="default: tiles.jsonl in --out")
    parser.add_argument("--model", default="yolov8n_spd")
    for name, default in (("seeds", 3), ("image-size", 320), ("tile", 320), ("images", 8000), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    file = options.records or options.out / "tiles.jsonl"
    records = [each for each in read_records(file, _FIELDS) if key(options).items() <= each.items()]
    for seed in range(options.seeds):
        if not any(each["seed"] == seed for each in records):
            found = run_seed(options, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as records_file:
                records_file.write("".join(f"{json.dumps(record)}\n" for record in found))
            records += found
    text = table(records)
    with whole(options.out / "tiles.md") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
