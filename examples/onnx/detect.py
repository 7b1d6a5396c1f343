"""Draws what a detector finds that `spd-zoo export` wrote: `python detect.py MODEL.onnx IMAGE OUT.png`."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
meta = session.get_modelmeta().custom_metadata_map
names = json.loads(meta["class_names"])
height, width = (int(side) for side in (meta["image_size"].split("x") * 2)[:2])

image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
scaled, left, top = (width, height), 0, 0
if meta["keeps_aspect"] == "true":  # YOLO: padded with grey; SSD: stretched
    scale = min(height / image.height, width / image.width)
    scaled = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = round((width - scaled[0]) / 2 - 0.1), round((height - scaled[1]) / 2 - 0.1)
canvas = Image.new("RGB", (width, height), (114, 114, 114))
canvas.paste(image.resize(scaled, Image.Resampling.BILINEAR), (left, top))
pixels = np.asarray(canvas, np.float32)[..., :: 1 if meta["channel_order"] == "RGB" else -1] / 255
pixels = (pixels - np.float32(json.loads(meta["mean"]))) / np.float32(json.loads(meta["std"]))
batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

outputs = session.run(["num", "boxes", "scores", "classes"], {"images": batch})
num, boxes, scores, classes = (output[0] for output in outputs)
factors = np.array([image.width / scaled[0], image.height / scaled[1]] * 2)
boxes = ((boxes - [left, top] * 2) * factors).clip(0, [*image.size, *image.size])
pen = ImageDraw.Draw(image)
for box, score, label in zip(boxes[:num], scores[:num], classes[:num], strict=True):
    if (box[2:] > box[:2]).all():  # inside the image
        pen.rectangle(box.tolist(), outline="red")
        pen.text(box[:2].tolist(), f"{names[label]} {score:.2f}", fill="red")
        print(names[label], f"{score:.2f}", *box.round().astype(int))
image.save(sys.argv[3])
