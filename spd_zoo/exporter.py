"""Exports a network to one file for other programs (ONNX, or torch.export's pt2), and checks the file's outputs."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

import spd_zoo
from spd_zoo.convert import ConversionError
from spd_zoo.data.classes import network_classes
from spd_zoo.data.notes import Notes
from spd_zoo.data.reading import channel_mode, size_text
from spd_zoo.files import whole
from spd_zoo.fold import fold_spd
from spd_zoo.inference.classifier import load_classifier

__all__ = ["FORMATS", "ExportError", "export"]

Computation = Callable[[Tensor], Tensor]

TOLERANCE = 1e-3  # largest difference of a logit, as a share of the logits' standard deviation


class ExportError(ValueError):
    """A network that cannot be exported; the message says why."""


def export(
    model: str,
    to: str,
    out: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    fold: bool = True,
    notes: Notes | None = None,
) -> Path:
    """Writes a network to one file for any number of images, after checking the file's outputs.

    Input `images`, float32 (N, C, height, width); output `logits`, float32 (N, classes). The file's metadata describe
    the preprocessing and the outputs: the ONNX model's `metadata_props`, or the extra file `metadata.json` of a pt2
    file.

    Args:
        model: A network with pretrained weights, with or without a tag, `local-dir:FOLDER`, or the folder of a run.
        to: "onnx" or "pt2".
        out: The file; by default `model.onnx` or `model.pt2` in the run's folder, or one named after the network.
        image_size: Height and width in pixels, or one number for both; by default the network's own input size.
        fold: Write the network folded by `fold_spd`, which has the same outputs with fewer and plainer operators.
        notes: Receives the assumptions that were made; the file's metadata contain them, too.

    Returns:
        The file.

    Raises:
        ExportError: If the network cannot be exported, or its file computes something else.
        ModelError: If there is no such network, or it cannot be used.
    """
    if to not in FORMATS:
        raise ExportError(f"the formats are {' and '.join(FORMATS)}, got {to!r}")
    net: Any = load_classifier(model, "cpu").to(memory_format=torch.contiguous_format)
    channel_mode(net.in_chans, model)
    own = resolve_data_config(pretrained_cfg=net.pretrained_cfg)["input_size"][1:]
    size: tuple[int, int] = to_2tuple(image_size or tuple(own))
    if image_size and hasattr(net, "set_input_size"):
        net.set_input_size(size)
    classes = network_classes(net.pretrained_cfg, net.pretrained_cfg["num_classes"])
    notes = notes if notes is not None else Notes()
    if not classes.named:
        last = len(classes.names) - 1
        notes.add(f"{model} does not name its classes: the file calls them by their numbers, 0 to {last}")
    folder = Path(model)
    name = f"model.{to}" if folder.is_dir() else f"{model.replace('/', '_').replace(':', '_')}.{to}"
    path = Path(out) if out is not None else (folder if folder.is_dir() else Path()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        form = _folded(net, size, model) if fold else net
        metadata = _metadata(net, size) | {
            "class_names": json.dumps(list(classes.names), ensure_ascii=False),
            "notes": json.dumps(notes.lines(), ensure_ascii=False),
        }
        compute = FORMATS[to](form, size, metadata, temporary)
        _check(net, size, compute)
    return path


def _folded(net: nn.Module, size: tuple[int, int], model: str) -> nn.Module:
    """`fold_spd`, whose errors name the network and what the command can do."""
    try:
        return fold_spd(net, _images(net, 1, size))
    except (ConversionError, ValueError) as error:
        raise ExportError(f"{model} cannot be folded: {error}. --no-fold exports it as it is") from error


def _metadata(net: Any, size: tuple[int, int]) -> dict[str, str]:
    """How to use the file, in words and numbers."""
    config = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
    crop_mode = config["crop_mode"] or "center"
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in size)
    square = size[0] == size[1]
    pixels, cut = (f"{height}x{width}" for height, width in (scaled, size))
    covers = f"its shorter side has {scaled[0]} pixels" if square else f"it just covers {pixels} pixels"
    ways = {
        "center": f"so that {covers}; cut out the {cut} pixels in the middle",
        "squash": f"to {pixels} pixels, whatever its shape; cut out the {cut} pixels in the middle",
        "border": f"so that it just fits into {pixels} pixels; pad or cut all sides alike to {cut} pixels, in `mean`",
    }
    colours = "RGB" if net.in_chans == 3 else "grey"
    shorter_side = {"resize_shorter_side": str(scaled[0])} if crop_mode == "center" and square else {}
    return {
        "architecture": str(net.pretrained_cfg["architecture"]),
        "preprocessing": (
            f"Turn the image upright, make it {colours} with 8 bits; resize it ({config['interpolation']}) "
            f"{ways[crop_mode]} (sizes are height x width); divide by 255, subtract mean, divide by std, channel by "
            "channel; order (image, channel, row, column), float32."
        ),
        "image_size": size_text(size),
        "crop_mode": crop_mode,
        "resize_to": size_text(scaled),
        **shorter_side,
        "interpolation": str(config["interpolation"]),
        "mean": json.dumps(list(config["mean"])),
        "std": json.dumps(list(config["std"])),
        "output": "logits, one per class; softmax makes them probabilities",
        "made_by": f"spd-zoo {spd_zoo.__version__}, torch {torch.__version__}",
    }


def _to_onnx(net: nn.Module, size: tuple[int, int], metadata: dict[str, str], file: Path) -> Computation:
    """Writes an ONNX file; returns what ONNX Runtime computes with it."""
    import onnxruntime
    import onnxscript  # noqa: F401  (torch's exporter needs it)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own exporter
        program = torch.onnx.export(
            net,
            (_images(net, 2, size),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    model = program.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _to_pt2(net: nn.Module, size: tuple[int, int], metadata: dict[str, str], file: Path) -> Computation:
    """Writes a file of torch.export; returns what torch computes with it."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (_images(net, 2, size),), dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata, ensure_ascii=False)})
    return torch.export.load(file).module()


FORMATS: dict[str, Callable[[nn.Module, tuple[int, int], dict[str, str], Path], Computation]] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
}


def _images(net: Any, count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, net.in_chans, *size, generator=torch.Generator().manual_seed(count))


def _check(net: nn.Module, size: tuple[int, int], compute: Computation) -> None:
    """Raises ExportError unless `compute` gives the network's logits for one image and for several."""
    for count in (1, 3):
        images = _images(net, count, size)
        with torch.inference_mode():
            expected, found = net(images), compute(images)
        worst = ((found - expected).abs().max() / expected.std()).item() if found.shape == expected.shape else math.inf
        if not worst <= TOLERANCE:
            raise ExportError(
                f"the exported network computes something else: logits differ by {worst:.2g} of their std"
            )
