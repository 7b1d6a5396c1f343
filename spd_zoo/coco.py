"""Found objects as a COCO file, which other programs read: FiftyOne, Label Studio, pycocotools, `spd-zoo` itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_zoo.detect import Detections
from spd_zoo.images import read_image

__all__ = ["write_coco"]


def write_coco(
    file: str | Path, folder: str | Path, found: Mapping[str, Detections], class_names: Sequence[str]
) -> None:
    """Writes what was found in images as a data set in COCO's form, with a `score` from 0 to 1 for each box.

    The form is that of https://cocodataset.org/#format-data: `bbox` is x, y, width and height in pixels of the upright
    image, from 0 at its left and upper edge; `area` is in square pixels; ids count from 1.

    Args:
        file: Where to; written as a whole or not at all.
        folder: Where the images are.
        found: Of each image, named by its path in `folder`, the objects. An image without any belongs in it, too.
        class_names: What the labels mean.

    Raises:
        ValueError: If an image cannot be read, or a label has no name.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, objects) in enumerate(found.items(), 1):
        try:
            width, height = read_image(Path(folder, name)).size
        except ValueError as error:
            raise ValueError(f"{Path(folder, name)}: {error}") from error
        images.append({"id": number, "file_name": Path(name).as_posix(), "width": width, "height": height})
        labels = objects.labels.tolist()
        unnamed = next((label for label in labels if not 0 <= label < len(class_names)), None)
        if unnamed is not None:
            raise ValueError(
                f"{name} has the label {unnamed}, but there are {len(class_names)} class names, counted from 0; give "
                "all names of the network"
            )
        for (x1, y1, x2, y2), score, label in zip(objects.boxes.tolist(), objects.scores.tolist(), labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
