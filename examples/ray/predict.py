"""Classifies the images of a folder on all machines of a Ray cluster.

Run it as `python predict.py MODEL FOLDER OUT [ACTORS] [GPUS]`.

Needs spd-zoo and ray[data]. FOLDER and OUT are paths that all machines see, or addresses such as s3://bucket/folder.
OUT gets parquet files. ACTORS is the number of networks that compute at once (default: 1), GPUS the number of GPUs of
each of them (default: 0).
"""

import sys
from io import BytesIO

import ray
import torch

from spd_zoo import Classifier
from spd_zoo.data.reading import SUFFIXES


class Namer:
    def __init__(self, model):
        self.predictor = Classifier(model)

    def __call__(self, batch):
        inputs, errors = [], []
        for content in batch["bytes"]:
            try:
                inputs.append(self.predictor.reader(BytesIO(content)))
                errors.append(None)
            except ValueError as error:
                errors.append(str(error))
        found = iter(self.predictor.compute(torch.stack(inputs)) if inputs else [])
        best = [next(found).top(1)[0] if error is None else None for error in errors]
        rows = {"class": [guess and guess.name for guess in best], "probability": [g and g.probability for g in best]}
        return {"path": batch["path"], "error": errors} | rows


if __name__ == "__main__":
    model, folder, out, actors, gpus = [*sys.argv[1:], *("1", "0")[len(sys.argv) - 4 :]]
    images = ray.data.read_binary_files(folder, include_paths=True, file_extensions=[s[1:] for s in SUFFIXES])
    options = {"compute": ray.data.ActorPoolStrategy(size=int(actors)), "batch_size": 32, "num_gpus": float(gpus)}
    images.map_batches(Namer, fn_constructor_args=(model,), **options).write_parquet(out)
