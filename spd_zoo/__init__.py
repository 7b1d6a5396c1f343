"""A model zoo for low-resolution images and small objects.

Importing it registers every network with timm. The commands of `spd-zoo` are functions with the same words:

    spd_zoo.list_models("yolo")                          names of networks; pretrained=True: those with weights
    timm.create_model("cifar_resnet20", pretrained=True) a network
    spd_zoo.Classifier("cifar_resnet20")("photo.jpg")    what an image shows
    spd_zoo.Detector("yolov8n_spd.bccd")("photo.jpg")    objects and where they are
    spd_zoo.finetune("cifar_resnet20", data="photos", out="run")
    spd_zoo.evaluate("run", data="photos")
    spd_zoo.export("run", to="onnx")
    spd_zoo.convert_to_spd(net)                          any CNN without strides, with the same predictions

Layers: SpaceToDepth, SPDConv2d, PhaseMix, PyConv2d. More by `help(spd_zoo.Classifier)` and so on, and in docs/:

    docs/index.md       getting started           docs/finetuning.md   training on your own images
    docs/choosing.md    which network             docs/detectors.md    finding objects
    docs/convert.md     networks without strides  docs/command_line.md the command `spd-zoo`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spd_zoo import models
from spd_zoo.blocks import PyConv2d
from spd_zoo.convert import convert_to_spd
from spd_zoo.fold import fold_spd
from spd_zoo.inference.classifier import Classification, Classifier
from spd_zoo.inference.detector import Detections, Detector
from spd_zoo.resolution import keep_resolution
from spd_zoo.spd import PhaseMix, SpaceToDepth, SPDConv2d, space_to_depth
from spd_zoo.version import __version__ as __version__
from spd_zoo.weights import WeightsError, use_manifest
from spd_zoo.weights.catalogue import list_models

if TYPE_CHECKING:
    from spd_zoo.exporter import export
    from spd_zoo.training.call import finetune
    from spd_zoo.training.evaluate import evaluate

__all__ = [
    "Classification",
    "Classifier",
    "Detections",
    "Detector",
    "PhaseMix",
    "PyConv2d",
    "SPDConv2d",
    "SpaceToDepth",
    "WeightsError",
    "convert_to_spd",
    "evaluate",
    "export",
    "finetune",
    "fold_spd",
    "keep_resolution",
    "list_models",
    "models",
    "space_to_depth",
    "use_manifest",
]

_LATER = {  # imported when they are first used, because they would make `import spd_zoo` slow
    "evaluate": "spd_zoo.training.evaluate",
    "export": "spd_zoo.exporter",
    "finetune": "spd_zoo.training.call",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'spd_zoo' has no attribute {name!r}")
    globals()[name] = getattr(import_module(_LATER[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
