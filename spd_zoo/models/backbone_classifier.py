"""The backbone of a YOLO detector with a linear classifier, to train it on images with one label each.

A detector that begins with such a backbone needs fewer boxes. In YOLOv8, the backbone is layers 0 to 9.
"""

from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs

from spd_zoo import weights
from spd_zoo.models._classifier import Classifier
from spd_zoo.models._detector import YoloNet
from spd_zoo.models._registry import register_unlisted_model

__all__ = ["BackboneClassifier"]  # register_unlisted_model adds the entry point


class BackboneClassifier(Classifier):
    """Stem and stages of a detector, under the same state-dict keys, then average pooling and a linear classifier.

    Args:
        detector: Name of the detector.
        num_classes: Number of classes.
        in_chans: Image channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout rate before the classifier.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If `detector` is no YOLO.
    """

    def __init__(
        self,
        detector: str = "yolov8n",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not timm.is_model(detector):
            raise ValueError(f"there is no network {detector!r}; give the name of a YOLO detector, such as yolov8n_spd")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        net = timm.create_model(detector, in_chans=in_chans, **dd)
        if not isinstance(net, YoloNet):
            raise ValueError(f"{detector} is no YOLO detector; give the name of one, such as yolov8n_spd")
        super().__init__(
            net.stem, net.stages, net.feature_info, num_classes, in_chans, global_pool, drop_rate, None, **dd
        )


default_cfgs = generate_default_cfgs(
    {
        "backbone_classifier": {
            "input_size": (3, 64, 64),
            "num_classes": 1000,
            "mean": (0.0, 0.0, 0.0),  # as detectors
            "std": (1.0, 1.0, 1.0),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "classifier": "head.fc",
        }
    }
)


@register_unlisted_model
def backbone_classifier(pretrained: bool = False, **kwargs: Any) -> BackboneClassifier:
    """The backbone of the YOLO detector named by `detector`, as a classifier."""
    return weights.build(BackboneClassifier, "backbone_classifier", pretrained, **kwargs)
