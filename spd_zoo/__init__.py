"""A model zoo for low-resolution images and small objects; importing it registers every network with timm."""

from spd_zoo import models
from spd_zoo.blocks import PyConv2d
from spd_zoo.convert import convert_to_spd
from spd_zoo.fold import fold_spd
from spd_zoo.inference.detector import Detections, Detector
from spd_zoo.resolution import keep_resolution
from spd_zoo.spd import PhaseMix, SpaceToDepth, SPDConv2d, space_to_depth
from spd_zoo.version import __version__ as __version__
from spd_zoo.weights import WeightsError, use_manifest

__all__ = [
    "Detections",
    "Detector",
    "PhaseMix",
    "PyConv2d",
    "SPDConv2d",
    "SpaceToDepth",
    "WeightsError",
    "convert_to_spd",
    "fold_spd",
    "keep_resolution",
    "models",
    "space_to_depth",
    "use_manifest",
]
