"""Small runs of an earlier version of this package, stopped or finished; `python tests/old_runs.py` records them again.

`golden_runs/NAME/stopped` is a run that got SIGTERM in epoch 2, `golden_runs/NAME/whole` the same run without a stop,
and `golden_runs/converted` a network converted by `convert_to_spd`. Their purpose is that older code has written them:
record them again only to add a case, and from an old commit.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from box_pictures import make_coco
from pictures import make_folders
from runs import stop_in
from timm.models import _registry
from torch import nn

from spd_zoo import convert_to_spd
from spd_zoo.models import bsconv_resnet, yolov5_spd
from spd_zoo.process import Stopped
from spd_zoo.training.finetune import FinetuneConfig, finetune
from spd_zoo.weights import save_network

GOLDEN = Path(__file__).parent / "golden_runs"
COMMON: dict[str, Any] = {"epochs": 3, "warmup_epochs": 0, "lr": 1e-3, "workers": 0, "bf16": False, "device": "cpu"}
COMMON |= {"clip_grad": 1.0, "accumulate": 2, "patience": 3, "ema": 0.9}
CLASSIFIER = COMMON | {"model": "local-dir:converted", "batch_size": 8, "image_size": "16,32@1", "head_epochs": 1}
CLASSIFIER |= {"mixup": 0.2, "cutmix": 1.0, "erase": 0.5, "auto_augment": "rand-m6-n2-mstd0.5", "layer_decay": 0.8}
DETECTOR = COMMON | {"model": "yolov5n_spd", "batch_size": 4, "image_size": "64,32@1", "mosaic_off": 1}
DETECTOR |= {"opt": "momentum"}
RUNS = {"classifier": CLASSIFIER, "detector": DETECTOR}
KEPT = {
    "stopped": ("run.yaml", "data.json", "environment.json", "last.pt", "metrics.csv"),
    "whole": ("model.safetensors", "config.json", "metrics.csv", "per_class.csv"),
}


def make_data(name: str, folder: Path) -> Path:
    """The images of the run `name`."""
    return make_folders(folder, train=8, val=2) if name == "classifier" else make_coco(folder, train=12, val=4)


def narrow_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes yolov5n_spd and cifar_resnet20 so narrow that their checkpoints are small."""

    def yolo(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return yolov5_spd._create("yolov5n_spd", pretrained, chs=(4, 4, 4, 4, 4), repeats=(1, 1, 1), **kwargs)

    def resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return bsconv_resnet._create("cifar_resnet20", pretrained, depth=1, chs=(16, 8, 8), **kwargs)

    monkeypatch.setitem(_registry._model_entrypoints, "yolov5n_spd", yolo)
    monkeypatch.setitem(_registry._model_entrypoints, "cifar_resnet20", resnet)


def _record() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    sys.argv = ["old_runs.py"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        os.chdir(folder)
        narrow_networks(monkeypatch)
        torch.manual_seed(0)
        net: Any = timm.create_model("cifar_resnet20", num_classes=3).eval()
        save_network(convert_to_spd(net, example_input=torch.randn(2, 3, 32, 32)), GOLDEN / "converted")
        shutil.copytree(GOLDEN / "converted", "converted")
        for name, options in RUNS.items():
            make_data(name, Path(f"{name}_data"))
            for out in ("whole", "stopped"):
                config = FinetuneConfig(data=f"{name}_data", out=Path(f"{name}_{out}"), **options)
                if out == "whole":
                    finetune(config)
                else:
                    stop_in(monkeypatch, 1, 1)
                    with pytest.raises(Stopped):
                        finetune(config)
                (GOLDEN / name / out).mkdir(parents=True)
                for file in KEPT[out]:
                    shutil.copy(config.out / file, GOLDEN / name / out / file)
            environment = GOLDEN / name / "stopped" / "environment.json"
            starts = [start | {"folder": "."} for start in json.loads(environment.read_text())]
            environment.write_text(json.dumps(starts, indent=2))


if __name__ == "__main__":
    _record()
