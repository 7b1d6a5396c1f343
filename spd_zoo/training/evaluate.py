"""Evaluation of a classifier or a detector on the images of a data set."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple

from spd_zoo.complexity import count_params
from spd_zoo.data.boxes import Tiling
from spd_zoo.data.check import check
from spd_zoo.data.classes import match_classes, network_classes
from spd_zoo.data.labelled import DataError
from spd_zoo.data.notes import count
from spd_zoo.data.reading import channel_mode, refuse_among, size_value
from spd_zoo.data.splits import no_split
from spd_zoo.files import is_file, read_yaml, write_csv
from spd_zoo.inference.detector import trained_on_tiles
from spd_zoo.inference.exported import Exported, load_model
from spd_zoo.inference.images import as_html
from spd_zoo.models._detector import ObjectFinder
from spd_zoo.process import Process, freed_memory_kept
from spd_zoo.training.config import FinetuneConfig, completed
from spd_zoo.training.detection.metrics import Suppression
from spd_zoo.training.preprocessing import Preprocessing
from spd_zoo.training.task import Predictions, names_other_task, task_of
from spd_zoo.weights.load import timm_name

__all__ = ["Evaluation", "evaluate", "evaluate_network", "save"]


@dataclass(frozen=True)
class Evaluation:
    """One network at one image size.

    Attributes:
        row: Its row of the results table; for classifiers with timm's columns.
        predictions: What it predicts.
        split: The split of the data set.
        warnings: What was left out of the data, and why.
        notes: What was guessed, a line for each.
    """

    row: dict[str, Any]
    predictions: Any  # `Predictions` of classification or of detection
    split: str
    warnings: list[str]
    notes: list[str]

    def __repr__(self) -> str:
        return f"Evaluation({self.row['model']} at {self.in_words()})"

    def _repr_html_(self) -> str:
        return as_html(None, ("measure", "value"), self.row.items())

    def in_words(self) -> str:
        """The line to print."""
        predictions: Predictions = self.predictions
        images = predictions.summary()["images"]
        return f"{self.row['img_size']} px: {predictions.in_words()}; {images} images of {self.split}"


def evaluate(
    model: str | os.PathLike[str],
    data: str | Path,
    split: str = "",
    image_size: int | tuple[int, int] | list[int | tuple[int, int]] | None = None,
    flip: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    bf16: bool = False,
    image_column: str = "",
    label_column: str = "",
    class_map: Mapping[str, str] | None = None,
    max_detections: int | None = None,
    agnostic: bool = False,
    iou_threshold: float | None = None,
    tile: int | None = None,
    overlap: float | None = None,
    max_pixels: int | None = None,
    out: str | Path | None = None,
    run: str = "",
) -> list[Evaluation]:
    """Evaluates a classifier or a detector on the readable images of a data set, at one image size or several.

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, the folder of a run, or an
            ONNX file that `spd-zoo export` wrote, which ONNX Runtime runs on the CPU.
        data: As `open_data` takes it, or for a detector `open_boxes`.
        split: The split to evaluate on; by default the first that exists of test and val, else for a run the images
            that it held out, else train.
        image_size: Height and width, or one number for both, or a list of these; by default the network's own input
            size.
        flip: Whether to average the logits of every image and its mirror image; not for detectors.
        batch_size: Images in memory at once.
        workers: Worker processes that read images.
        device: torch device; by default a GPU if there is one.
        bf16: Whether autocast computes in bfloat16.
        image_column: As `open_data` takes it; not for detectors.
        label_column: As `open_data` takes it; not for detectors.
        class_map: The network's names of classes that have other names in the data.
        max_detections: Detectors: maximum number of boxes per image, all of which count; by default the authors' limit,
            of which COCO's rules count 100 of each class.
        agnostic: Detectors: whether boxes of different classes suppress each other, too.
        iou_threshold: Detectors: IoU threshold of NMS; None: the authors' value.
        tile: For a detector: the side of the tiles into which larger images are cut, as `Detector` does; 0: no tiles;
            None: as the run that trained it.
        overlap: Minimum overlap of tiles, as a share of their side; None: that of the run, or else 0.2.
        max_pixels: For a detector: maximum number of pixels of an image that is read as a whole; None: Pillow's limit.
        out: The folder that `save` will write the results to, which is refused before anything is computed if it is no
            folder or lies among the images.
        run: The run that an exported file comes from, if it lies in another folder.

    Returns:
        An evaluation for each image size.

    Raises:
        DataError: If the data set cannot be used, or its classes are not the network's.
        ModelError: If there is no such network, or it cannot be used.
        ValueError: If an option has no meaning for the network, or there is no such device.
        WeightsError: If the weights are unavailable or must not be used.
    """
    out = None if out is None else Path(out)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder; give another --out")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    model = os.fspath(model)
    net: Any = load_model(model, device)
    if bf16 and isinstance(net, Exported):
        raise ValueError(f"bf16 is for torch; {model} computes as it was exported")
    if iou_threshold is not None and not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be from 0 to 1, got {iou_threshold}")
    asked = Suppression(max_detections, agnostic, iou_threshold)
    suppression = None if asked == Suppression() else asked
    task_of(net).check_evaluation(net, model, bool(flip or image_column or label_column), suppression)
    sizes = image_size if isinstance(image_size, list) else [] if image_size is None else [image_size]
    place: torch.device = next(net.parameters()).device
    with freed_memory_kept(place):
        return evaluate_network(
            net,
            model,
            data,
            split,
            sizes,
            flip,
            batch_size,
            workers,
            place,
            bf16=bf16,
            columns=(image_column, label_column),
            class_map=class_map,
            suppression=suppression,
            reading=_reading(net, model, tile, overlap, max_pixels),
            out=out,
            run=run,
        )


def _held_out(task: Any, model: str, data: str | Path, process: Process) -> tuple[str, Any] | None:
    """The validation images of a run on `data`, and the name of their split; None for other networks and data."""
    run = Path(model.removeprefix("local-dir:"))
    run = run.parent if run.suffix == ".onnx" else run
    if not all(is_file(run / name) for name in ("run.yaml", "data.json")):
        return None
    with torch.device("meta"):
        net = timm.create_model(timm_name(f"local-dir:{run}"))
    try:
        config = FinetuneConfig(**completed(read_yaml(run / "run.yaml"), run) | {"data": str(data), "out": run})
        if config.stream:
            return None
        images = task.open_splits(config, net, process, json.loads((run / "data.json").read_text(encoding="utf-8"))).val
    except ValueError:  # it is another data set, or an earlier version began the run with options of then
        return None
    return config.val_name, images


def _reading(net: Any, model: str, tile: int | None, overlap: float | None, max_pixels: int | None) -> dict[str, Any]:
    """Fields of `BoxImages` that say how a detector reads images.

    Raises:
        ValueError: If an option has no meaning.
    """
    if not isinstance(net, ObjectFinder):
        if tile is not None or overlap is not None or max_pixels is not None:
            raise ValueError(f"tile, overlap and max_pixels are options for detectors, and {model} is not a detector")
        return {}
    known = trained_on_tiles(model, net)
    trained = known if tile is None else None
    side = trained[0] if trained is not None else tile or 0
    own_overlap = known[1] if known is not None and known[0] == side else 0.2
    overlap = own_overlap if overlap is None else overlap
    if side < 0 or not 0 <= overlap < 1:
        raise ValueError(f"tile must not be negative and overlap from 0 to below 1, got {side} and {overlap}")
    if not side and overlap != own_overlap:
        raise ValueError("overlap is for tiles; give tile, too")
    fields: dict[str, Any] = {"tiling": Tiling(side, overlap) if side else None}
    if max_pixels is not None:
        fields["max_pixels"] = max_pixels
    if trained is not None:
        tiles = f"tiles of {side} px that overlap by {overlap:g}"
        note = f"evaluated on {tiles}, as {model} was trained; --tile 0 turns tiles off"
        fields["notes"] = (note,)
    return fields


def evaluate_network(
    net: Any,
    model: str,
    data: str | Path,
    split: str,
    image_sizes: Sequence[int | tuple[int, int]],
    flip: bool,
    batch_size: int,
    workers: int,
    device: torch.device,
    bf16: bool = False,
    columns: tuple[str, str] = ("", ""),
    class_map: Mapping[str, str] | None = None,
    suppression: Suppression | None = None,
    reading: Mapping[str, Any] | None = None,
    out: Path | None = None,
    run: str = "",
) -> list[Evaluation]:
    """Evaluates a network that is loaded already; see `evaluate`.

    Args:
        net: The network, on `device`.
        model: Its name in the results.
        data: As in `evaluate`.
        split: The split to evaluate on.
        image_sizes: Pixels.
        flip: Whether to average over mirror images.
        batch_size: Images in memory at once.
        workers: Worker processes that read images.
        device: Where the network computes.
        bf16: Whether autocast computes in bfloat16.
        columns: The columns with images and labels.
        class_map: The network's names of classes that have other names in the data.
        suppression: Settings of a detector's evaluation that differ from the usual rules.
        reading: Fields of `BoxImages` that differ from those of the data; its notes are added to theirs.
        out: As in `evaluate`.
        run: As in `evaluate`.

    Raises:
        DataError: If the data set cannot be used, or its classes are not the network's.
    """
    task, process = task_of(net), Process(device)
    channel_mode(net.in_chans, model)
    splits = (split,) if split else ("test", "val", "train")
    opened = ((name, task.open_split(data, name, *columns)) for name in splits)
    with names_other_task(task, data, "evaluate"):
        split, images = next(((name, found) for name, found in opened if found), ("", None))
        if images is None:
            raise DataError(no_split(data, " or ".join(splits), lambda name: task.open_split(data, name, *columns)))
        if split == "train" and len(splits) > 1:
            split, images = _held_out(task, run or model, data, process) or (split, images)
            which = f"the {count(len(images), 'image')} that {run or model} held out for validation"
            which = "train" if split == "train" else which
            images = replace(images, notes=(*images.notes, f"{data} has no split test or val; evaluated on {which}"))
        if out is not None:
            refuse_among(out, images.folders(), data)
        if reading:
            images = replace(images, **{**reading, "notes": (*images.notes, *reading.get("notes", ()))})
        known = network_classes(net.pretrained_cfg, net.num_classes, listed=isinstance(net, ObjectFinder))
        images = match_classes(images, known, class_map)
    about = check({split: images}, workers, process)
    unreadable = about[split]["unreadable"]
    images = images.without(unreadable)
    warnings = [f"left out {name}: {error}" for name, error in unreadable.items()] + task.warnings(images)
    config = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
    crop = (config["crop_pct"], config["interpolation"], config["crop_mode"])
    preprocessing = Preprocessing(config["mean"], config["std"], device, bf16, *crop)
    evaluations = []
    for image_size in image_sizes or (tuple(config["input_size"][1:]),):
        size: tuple[int, int] = to_2tuple(image_size)
        if hasattr(net, "set_input_size"):
            net.set_input_size(size)
        batches = task.eval_batches(net, images, size, batch_size, workers, preprocessing, process)
        predictions = task.predict(net, batches, images, size, preprocessing, process, flip, suppression)
        row = {
            "model": model,
            **predictions.columns(),
            "param_count": round((net.param_count if isinstance(net, Exported) else count_params(net)) / 1e6, 2),
            "img_size": size_value(size),
            **task.result_columns(preprocessing),
        }
        evaluations.append(Evaluation(row, predictions, split, warnings, [*about["notes"], *predictions.notes()]))
    return evaluations


def save(evaluations: Sequence[Evaluation], folder: Path) -> None:
    """Writes `results.csv` and the tables of each image size.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [evaluation.row for evaluation in evaluations]
    write_csv(folder / "results.csv", rows[0], [row.values() for row in rows])
    for evaluation in evaluations:
        evaluation.predictions.write_tables(folder, f"_{evaluation.row['img_size']}")
