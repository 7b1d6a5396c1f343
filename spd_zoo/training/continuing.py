"""`--epochs +10`: the options of a run that continues a finished one."""

import csv
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from spd_zoo.data.notes import count
from spd_zoo.data.reading import size_text
from spd_zoo.files import read_yaml
from spd_zoo.training.config import FinetuneConfig, completed, parse_sizes
from spd_zoo.training.run import RunError
from spd_zoo.weights.load import timm_name

__all__ = ["Continuation", "continuation"]

SHARE = 10  # the learning rate begins at no less than the peak of the finished run divided by this
_FIXED = (
    "seed",
    "pretrained",
    "model_args",
    "val_name",
    "val_split",
    "val_size",
    "image_column",
    "label_column",
    "stream",
)

_OWNERS = {
    "decay_rate": ("decay_epochs",),
    "mix_prob": ("mixup", "cutmix"),
    "overlap": ("tile",),
    "distill_weight": ("teacher",),
    "distill_temperature": ("teacher",),
}  # options that are refused without one of these


@dataclass(frozen=True)
class Continuation:
    """How a run continues a finished one.

    Attributes:
        options: The options of the new run.
        fingerprint: The digest of the finished run's data.
        in_words: What the new run does, on one line.
    """

    options: dict[str, Any]
    fingerprint: str
    in_words: str


def continuation(run: str, epochs: str, asked: dict[str, Any]) -> Continuation:
    """The options of a new run that trains the network of a finished run for longer.

    They are those of the finished run, without warmup. The learning rate falls as a cosine from the last one of the
    finished run, or from a tenth of its peak if that is higher, because nothing is learned near 0.

    Args:
        run: The folder of the finished run.
        epochs: How many epochs are added, such as "+10".
        asked: Options that the user set, which take precedence; without `out`, the new run is written into RUN+10.

    Raises:
        ModelError: If the folder holds no network.
        RunError: If its `run.yaml`, `data.json` or `metrics.csv` is missing or damaged.
        ValueError: If `epochs` is not like "+10", or an option would change the data or the network.
    """
    if not epochs[1:].isdigit() or not int(epochs):
        raise ValueError(f"epochs must be a whole number, or like +10, got {epochs}")
    folder = Path(run.removeprefix("local-dir:"))
    if not (folder / "run.yaml").is_file():
        raise ValueError(f"epochs {epochs} continues a finished run; give its folder instead of {run}")
    model = timm_name(f"local-dir:{folder}")
    changed = [name for name in _FIXED if name in asked]
    if changed:
        raise ValueError(f"a run that continues {folder} keeps its {', '.join(changed)}; leave that out")
    try:
        stored = completed(read_yaml(folder / "run.yaml"), folder)
        fingerprint = json.loads((folder / "data.json").read_text(encoding="utf-8"))["fingerprint"]
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            metrics = list(csv.DictReader(file))[-1]
        last, peak = float(metrics["lr"]), float(stored["lr"])
    except (KeyError, IndexError, TypeError, ValueError, OSError, RecursionError) as error:
        raise RunError(f"{folder} holds a run with a damaged run.yaml, data.json or metrics.csv: {error}") from error
    free = [item.name for item in fields(FinetuneConfig) if item.metadata.get("free") and item.name != "data"]
    options = {name: value for name, value in stored.items() if name not in free}
    size = size_text(parse_sizes(stored["image_size"])[-1][0])
    options |= {"model": model, "pretrained": True, "epochs": int(epochs), "image_size": size}
    classifies = "val_top1" in metrics
    options |= {"head_init": "zero"} if classifies else {"auto_anchors": False}  # zero keeps a head of the same classes
    options |= {"sched": "cosine", "decay_epochs": "", "lr": max(last, peak / SHARE), "warmup_epochs": 0}
    options |= {"warmup_lr": None, "mosaic_off": None, "head_epochs": 0}
    if "teacher" in asked:  # what was measured or chosen for the former one does not hold for it
        options |= {"teacher_digest": None, "teacher_size": None, "teacher_model": ""}
    options |= {"out": f"{folder}{epochs}"} | asked | {"model": model, "epochs": int(epochs)}
    for name, owners in _OWNERS.items():  # an option of the finished run without what it is for
        if name not in asked and not any(map(options.get, owners)):
            del options[name]
    rate = f"the last learning rate of {folder}"
    if options["lr"] > last:
        rate = f"a tenth of the peak of {folder}, whose last one was {last:.2g}"
    if "lr" in asked:
        rate = "as set"
    length = count(int(epochs), "epoch")
    words = f"continues from the network of {folder}: {length} from learning rate {options['lr']:.2g}"
    return Continuation(options, fingerprint, f"{words} ({rate}), into {options['out']}")
