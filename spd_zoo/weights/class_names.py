"""Names of a network's classes: those of its configuration, or of the data set that it was trained on."""

from typing import Any

from timm.data import CustomDatasetInfo, DatasetInfo, ImageNetInfo
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from spd_zoo.weights.manifest import entries

__all__ = ["class_names", "class_synonyms"]


def class_names(cfg: dict[str, Any]) -> list[str]:
    """The name of every class of a network with this `pretrained_cfg`, or its index if no name is known."""
    names, info = [str(index) for index in range(cfg["num_classes"])], _class_info(cfg)
    if info is None:
        return names
    return [info.index_to_description(i) if info.has_label(i) else number for i, number in enumerate(names)]


def class_synonyms(cfg: dict[str, Any]) -> list[list[str]] | None:
    """Other names of every class, such as the WordNet ids of ImageNet; None if the network's classes have no names."""
    info = _class_info(cfg)
    if info is None:
        return None
    return [
        [info.index_to_label_name(i), *info.index_to_description(i).split(", ")] if info.has_label(i) else []
        for i in range(cfg["num_classes"])
    ]


def _class_info(cfg: dict[str, Any]) -> DatasetInfo | None:
    if cfg.get("label_names"):
        return CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
    if _is_imagenet(cfg):
        return ImageNetInfo()
    return CustomDatasetInfo(_coco_names()) if _is_coco(cfg) else None


def _is_imagenet(cfg: dict[str, Any]) -> bool:
    """Whether the classes are those of ImageNet-1k, by the manifest for our weights and by the tag for timm's."""
    tag = cfg.get("tag") or ""
    entry = entries().get(f"{cfg['architecture']}.{tag}")
    dataset = tag if entry is None else entry.dataset or ""
    return cfg["num_classes"] == 1000 and ("in1k" in dataset or dataset.startswith("ImageNet-1k"))


def _is_coco(cfg: dict[str, Any]) -> bool:
    """Whether the classes are COCO's 80, by the manifest."""
    entry = entries().get(f"{cfg['architecture']}.{cfg.get('tag') or ''}")
    return cfg["num_classes"] == 80 and entry is not None and (entry.dataset or "").startswith("COCO")


def _coco_names() -> list[str]:
    """COCO's 80 classes in the order of its annotations; torchvision's list has gaps for ids that COCO never used."""
    names = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    return [name for name in names if name not in ("__background__", "N/A")]
