"""The families of networks, as the tables and the pages in docs/families present them."""

from typing import NamedTuple

__all__ = ["FAMILIES", "Family"]


class Family(NamedTuple):
    """Networks that one page describes.

    Attributes:
        title: Title of the page.
        text: What is special about the networks.
        groups: Groups of the manifest, which are modules of `spd_zoo.models` or "timm".
    """

    title: str
    text: str
    groups: tuple[str, ...]


FAMILIES = {  # name of the page in docs/families: family
    "pyconv": Family(
        "PyConv",
        "kernels of several sizes side by side, with strides or with space-to-depth",
        ("pyconvresnet", "timm"),
    ),
    "spd_resnet": Family(
        "SPD-ResNet",
        "space-to-depth instead of strided 3x3 convolutions and of pooling",
        ("resnet_spd",),
    ),
    "efficientnet_lite": Family(
        "EfficientNet-Lite-SPD",
        "small ImageNet networks with space-to-depth instead of every stride, and one for images of 64 pixels",
        ("efficientnet_lite_spd",),
    ),
    "padding_free": Family(
        "Padding-free downsampling",
        "MobileNetV3, GhostNet, ShuffleNetV2, ParC-MobileNetV2 and ResNets, padded and padding-free, some with BSConv",
        (
            *("bsconv_resnet", "bsconv_mobilenetv3", "pfd_mobilenetv3", "pfd_ghostnet", "pfd_shufflenetv2"),
            "pfd_parc_mobilenetv2",
        ),
    ),
    "yolov5": Family("YOLOv5-SPD", "detectors without strides, with anchors", ("yolov5_spd",)),
    "yolov8": Family(
        "YOLOv8 and YOLOv8-SPD",
        "detectors without anchors, strided and with SPD, also with a map of stride 4",
        ("yolov8_spd", "yolov8_p2"),
    ),
    "ssd": Family(
        "SSD for small objects",
        "detectors with one stride removed, and a second path for large objects",
        ("ssd_small",),
    ),
}
