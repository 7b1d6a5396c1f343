"""Generates pictures of coloured squares on noise, and data sets of them in all three formats."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image

COLOURS = {"blue": (20, 40, 230), "green": (30, 220, 40), "red": (230, 30, 30)}
NAMES = list(COLOURS)
Box = tuple[int, int, int, int, int]  # label, x1, y1, x2, y2
SIZE = (96, 64)  # width and height


def scene(seed: int, size: tuple[int, int] = SIZE) -> tuple[Image.Image, list[Box]]:
    """A grey, noisy image with one to three separate squares, and their boxes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    width, height = size
    pixels = torch.randint(90, 130, (height, width, 3), generator=generator, dtype=torch.uint8)
    boxes: list[Box] = []
    for slot in range(draw(1, 4)):
        side, label = draw(14, width // 3 - 2), draw(0, 3)
        left, top = slot * (width // 3) + draw(0, width // 3 - side), draw(0, height - side)
        pixels[top : top + side, left : left + side] = torch.tensor(COLOURS[NAMES[label]], dtype=torch.uint8)
        boxes.append((label, left, top, left + side, top + side))
    return Image.fromarray(pixels.numpy()), boxes


def scenes(count: int, first: int = 0) -> list[tuple[Image.Image, list[Box]]]:
    return [scene(first + i) for i in range(count)]


def make_coco(root: Path, train: int = 8, val: int = 4) -> Path:
    """`instances_SPLIT.json` next to `images`."""
    (root / "images").mkdir(parents=True)
    for split, first, count in (("train", 0, train), ("val", 1000, val)):
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": 10 * i + 5, "name": name} for i, name in enumerate(NAMES)]
        for i, (image, boxes) in enumerate(scenes(count, first)):
            name = f"{split}_{i}.png"
            image.save(root / "images" / name)
            content["images"].append({"id": i + 7, "file_name": name, "width": image.width, "height": image.height})
            for label, x1, y1, x2, y2 in boxes:
                annotation = {"id": len(content["annotations"]) + 1, "image_id": i + 7, "category_id": 10 * label + 5}
                content["annotations"].append(annotation | {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0})
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def make_yolo(root: Path, train: int = 8, val: int = 4) -> Path:
    """`images/SPLIT`, `labels/SPLIT` and `data.yaml`."""
    for split, first, count in (("train", 0, train), ("val", 1000, val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i, (image, boxes) in enumerate(scenes(count, first)):
            image.save(root / "images" / split / f"{split}_{i}.png")
            lines = []
            for label, x1, y1, x2, y2 in boxes:
                centre = (x1 + x2) / 2 / image.width, (y1 + y2) / 2 / image.height
                sides = (x2 - x1) / image.width, (y2 - y1) / image.height
                lines.append(" ".join(map(str, (label, *centre, *sides))))
            (root / "labels" / split / f"{split}_{i}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"names: {NAMES}\n")
    return root


def make_voc(root: Path, train: int = 8, val: int = 4) -> Path:
    """`JPEGImages`, `Annotations`, `ImageSets/Main`; pixel coordinates start at 1, and the last pixel is included."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, first, count in (("train", 0, train), ("val", 1000, val)):
        for i, (image, boxes) in enumerate(scenes(count, first)):
            name = f"{split}_{i}"
            image.save(root / "JPEGImages" / f"{name}.png")
            tree = ElementTree.Element("annotation")
            ElementTree.SubElement(tree, "filename").text = f"{name}.png"
            size = ElementTree.SubElement(tree, "size")
            for side, pixels in (("width", image.width), ("height", image.height)):
                ElementTree.SubElement(size, side).text = str(pixels)
            for label, x1, y1, x2, y2 in boxes:
                item = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(item, "name").text = NAMES[label]
                box = ElementTree.SubElement(item, "bndbox")
                for side, pixels in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
                    ElementTree.SubElement(box, side).text = str(pixels)
            ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")
        names = "\n".join(f"{split}_{i}" for i in range(count))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    return root
