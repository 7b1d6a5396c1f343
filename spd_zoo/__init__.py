"""A model zoo for low-resolution images and small objects; importing it registers every network with timm."""

from spd_zoo import models
from spd_zoo.detect import Detections, Detector
from spd_zoo.layers import PhaseMix, PyConv2d, SpaceToDepth, SPDConv2d, space_to_depth
from spd_zoo.weights import WeightsError, use_manifest

__version__ = "0.1.0"
__all__ = [
    "Detections",
    "Detector",
    "PhaseMix",
    "PyConv2d",
    "SPDConv2d",
    "SpaceToDepth",
    "WeightsError",
    "models",
    "space_to_depth",
    "use_manifest",
]
