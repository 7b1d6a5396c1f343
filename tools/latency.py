"""Measures latency for one image: of the padded and padding-free pairs of the authors' table, or of exported files.

    pip install '.[bench]' && python tools/latency.py [--image-size 224] [--rounds 30] [--json]
    pip install '.[bench]' openvino && python tools/latency.py --exported [NETWORK ...] [--rounds 30] [--json]

One image at a time, fp32, one thread, BatchNorm not folded; eager torch and ONNX Runtime (CPU provider). The two
networks of a pair and both runtimes alternate in one run; times are medians over the rounds, ratios are medians of the
ratios of each round. The authors print 8.5 to 11.4 ms for the padded and 9.0 to 11.7 ms for the padding-free networks
on an AMD Ryzen 5 5600H; neither image size nor runtime are stated. (`tools/published.csv` has their figures.)

With `--exported`, the contenders are the network in eager torch (channels last, for detectors with decoding and NMS),
the file that `spd-zoo export` writes in ONNX Runtime and in OpenVINO (in float32), and that file in int8, calibrated on
noise. They alternate in one run with one thread each; times are medians of the processor's time. The networks are
untrained, so detectors find nothing. The rows are in `tools/deploy_latency.jsonl`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spd_zoo.exporter import export
from spd_zoo.inference.exported import read_exported
from spd_zoo.models._detector import DetectionNet
from spd_zoo.quantization import quantize

EXPORTED = {  # network: image size
    "yolov8n": 320,
    "yolov8n_spd": 320,
    "yolov8n_spd_p2": 320,
    "pyconvresnet50_spd": 64,
    "cifar_resnet20_pfd": 32,
    "cifar_resnet20": 32,
    "tf_efficientnet_lite0_spd": 224,
    "tf_efficientnet_lite0_spd_lowres": 64,
    "tf_efficientnet_lite1_spd": 240,
    "yolov8n_p2": 640,
}
PAIRS = ("mobilenetv3_large", "parc_mobilenetv2", "ghostnet", "shufflenetv2")


def onnx_session(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A function that runs the network on `x` in ONNX Runtime with one thread."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own exporter
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert program is not None
    model: Any = program.model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    expected = net(x)
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=1e-3, atol=1e-3)
    return lambda: session.run(None, feed)


def contenders(name: str, image_size: int) -> dict[str, Callable[[], Any]]:
    """The padded and the padding-free network, in both runtimes."""
    x = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Any]] = {}
    for variant, network in (("padded", name), ("padding-free", f"{name}_pfd")):
        size: dict[str, Any] = {"img_size": image_size} if "parc" in name else {}
        net = timm.create_model(network, **size).eval()
        runs[f"eager {variant}"] = partial(net, x)
        runs[f"onnx {variant}"] = onnx_session(net, x)
    return runs


def seconds(run: Callable[[], Any]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, image_size: int, rounds: int) -> list[dict[str, Any]]:
    """One row per runtime."""
    runs = contenders(name, image_size)
    for run in runs.values():
        for _ in range(5):
            run()
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(rounds), f"{name} at {image_size} px", leave=False):
        for key, run in runs.items():
            times[key].append(seconds(run))
    rows = []
    for runtime in ("eager", "onnx"):
        padded, free = times[f"{runtime} padded"], times[f"{runtime} padding-free"]
        rows.append(
            {
                "network": name,
                "image_size": image_size,
                "runtime": runtime,
                "padded_ms": round(1000 * statistics.median(padded), 2),
                "padding_free_ms": round(1000 * statistics.median(free), 2),
                "ratio": round(statistics.median(b / a for a, b in zip(padded, free, strict=True)), 3),
            }
        )
    return rows


def runtimes(name: str, image_size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """An untrained network in every runtime; a network in torch and its file compute the same."""
    import openvino

    torch.manual_seed(0)
    net: Any = timm.create_model(name).eval()
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    file = export(net, "onnx", folder / "float32.onnx", image_size=image_size)
    quantize(file, folder / "int8.onnx", iter(images))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    plain, small = (read_exported(folder / f"{way}.onnx").session for way in ("float32", "int8"))
    net = net.to(memory_format=torch.channels_last)
    wide = images.to(memory_format=torch.channels_last)

    def in_torch() -> Any:
        raw = net(wide)
        return net.detections(raw, (image_size, image_size), 0.25) if isinstance(net, DetectionNet) else raw

    feed = {"images": images.numpy()}
    return {
        "torch": in_torch,
        "onnxruntime": lambda: plain.run(None, feed),
        "openvino": lambda: compiled(feed),
        "int8": lambda: small.run(None, feed),
    }


def measure_exported(name: str, image_size: int, rounds: int) -> dict[str, Any]:
    """The milliseconds of the processor that each runtime takes for one image."""
    with tempfile.TemporaryDirectory() as folder:
        runs = runtimes(name, image_size, Path(folder))
    times: dict[str, list[float]] = {key: [] for key in runs}
    for i in tqdm(range(rounds + 3), f"{name} at {image_size} px", leave=False):
        for key, run in runs.items():
            start = time.process_time()
            run()
            if i >= 3:  # the first rounds warm up
                times[key].append(time.process_time() - start)
    return {"network": name, "image_size": image_size} | {
        key: round(1000 * statistics.median(values), 2) for key, values in times.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per network and runtime; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, choices=range(64, 1025), metavar="N", default=224)
    parser.add_argument("--rounds", type=int, choices=range(1, 1001), metavar="N", default=30)
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument("--exported", nargs="*", metavar="NETWORK", help=f"by default {', '.join(EXPORTED)}")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.exported is not None:
        for name in options.exported or EXPORTED:
            with torch.no_grad():  # exporting takes no inference tensors
                row = measure_exported(name, EXPORTED.get(name, options.image_size), options.rounds)
            times = ", ".join(f"{key} {value:.2f} ms" for key, value in list(row.items())[2:])
            print(json.dumps(row) if options.json else f"{name:18} {row['image_size']} px: {times}", flush=True)
        return 0
    with torch.inference_mode():
        for name in PAIRS:
            for row in measure(name, options.image_size, options.rounds):
                if options.json:
                    print(json.dumps(row), flush=True)
                else:
                    print(
                        f"{row['network']:18} {row['runtime']:6} padded {row['padded_ms']:7.2f} ms, padding-free "
                        f"{row['padding_free_ms']:7.2f} ms, ratio {row['ratio']:.3f}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
