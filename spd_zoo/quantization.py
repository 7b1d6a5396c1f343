"""Exports a network to an ONNX file that computes in int8, and measures what that costs in accuracy."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from spd_zoo.data.boxes import open_boxes
from spd_zoo.data.labelled import DataError, open_data
from spd_zoo.data.notes import Notes
from spd_zoo.exporter import export, new_file, output_file
from spd_zoo.inference.classifier import Classifier
from spd_zoo.inference.detector import Detector
from spd_zoo.inference.exported import ExportedDetector, read_exported
from spd_zoo.training.evaluate import Evaluation, evaluate

__all__ = ["export_int8", "quantize"]

CALIBRATION = 128  # images from which the ranges of int8 are taken
# Operators in int8, for detectors and for classifiers: decoding boxes needs the precision of float32
QUANTIZED = {True: ["Conv"], False: ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]}


def export_int8(
    model: str,
    data: str | Path,
    out: str | Path | None = None,
    image_column: str = "",
    label_column: str = "",
    notes: Notes | None = None,
    workers: int = 2,
    **options: Any,
) -> tuple[Path, Evaluation, Evaluation]:
    """Writes a network into an ONNX file that computes convolutions and linear layers in int8, and measures the loss.

    ONNX Runtime's static quantisation, with scales per channel of weights; the ranges of activations are those on 128
    training images. Decoding and suppression of boxes stay in float32. The network's accuracy is measured on the
    test images (or val, or train) before and after, as ONNX Runtime computes it.

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, or the folder of a run.
        data: The data set, as `evaluate` takes it.
        out: The file; by default `model_int8.onnx` in the run's folder, or one named after the network.
        image_column: As for `evaluate`.
        label_column: As for `evaluate`.
        notes: Receives the assumptions that were made.
        workers: Processes that read images for the evaluation.
        options: Other arguments of `export`.

    Returns:
        The file, and the evaluations in float32 and in int8.

    Raises:
        DataError: If the data cannot be used, or its classes are not the network's.
        ExportError: If the network cannot be exported.
        ModelError: If there is no such network, or it cannot be used.
    """
    notes = notes if notes is not None else Notes()
    path = output_file(model, out, "_int8.onnx")
    measure = partial(
        evaluate, data=data, workers=workers, image_column=image_column, label_column=label_column, run=model
    )
    with tempfile.TemporaryDirectory() as folder, new_file(path) as temporary:
        plain = export(model, "onnx", Path(folder) / "float32.onnx", notes=notes, **options)
        before = measure(str(plain))[0]
        quantize(plain, temporary, _calibration(str(plain), data, image_column, label_column, notes))
        after = measure(str(temporary))[0]
    return path, before, after


def quantize(file: Path, out: Path, images: Iterator[Tensor]) -> None:
    """Writes an exported ONNX file again, with convolutions and linear layers in int8.

    Args:
        file: What `export` wrote.
        out: The new file.
        images: Inputs (C, H, W), from which the ranges of activations are taken.
    """
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        """The images one by one, as ONNX Runtime asks for them."""

        def get_next(self) -> Any:
            image = next(images, None)
            return None if image is None else {"images": image[None].numpy()}

    with tempfile.TemporaryDirectory() as folder:
        described = onnx.shape_inference.infer_shapes(onnx.load(file))
        # ONNX Runtime's own mark that the shapes are inferred, without which it warns
        described.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        onnx.save(described, Path(folder) / "described.onnx")
        quantization.quantize_static(
            Path(folder) / "described.onnx",
            out,
            Images(),
            op_types_to_quantize=QUANTIZED[isinstance(read_exported(file), ExportedDetector)],
            per_channel=True,
            reduce_range=True,  # 7 bits of weights: processors without VNNI add pairs of products in 16 bits
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _calibration(file: str, data: str | Path, image_column: str, label_column: str, notes: Notes) -> Iterator[Tensor]:
    """Inputs (C, H, W) of an exported file: images spread evenly over the training images."""
    net = read_exported(Path(file))
    detector = None
    if isinstance(net, ExportedDetector):
        tile, overlap = net.tiles or (None, 0.2)
        detector = Detector(net, tile=tile, overlap=overlap)
    opened = (
        open_boxes(data, split) if detector else open_data(data, split, image_column, label_column)
        for split in ("train", "val", "test")
    )
    images: Any = next((images for images in opened if images), None)
    if images is None:
        raise DataError(f"{data} has no images to take the ranges of int8 from")
    reader = Classifier(net).reader if detector is None else None
    count = min(CALIBRATION, len(images))
    for i in (i * len(images) // count for i in range(count)):
        try:
            if reader is not None:
                yield reader(images.file(i))
            elif detector is not None:
                views = list(detector.views(images.image(i)))
                yield views[i % len(views)][0]
        except ValueError as error:
            notes.add(f"left out of the calibration: {error}", images.name(i))
