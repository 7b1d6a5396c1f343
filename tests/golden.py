"""Recorded cases: outputs and costs of the authors' networks, and the weights and inputs they were recorded with.

`golden/<family>.json` holds one case per line: `entries` (every tensor of the authors' state dict), `kept` (those with
recorded values), `input`, and digests of the results: `outputs`, `features` of the stages, `stress` (outputs for the
scaled input) and `batch_difference_float64` (y[0] - y[1] in float64, which is more sensitive than the logits).
Detectors have `box_outputs` and `level_outputs` (selected outputs), and for generated predictions `loss` and
`postprocess`.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"


def cases(family: str) -> list[dict[str, Any]]:
    """The cases of `golden/<family>.json`, each with its own `entries` and `kept`."""
    found = json.loads((FOLDER / f"{family}.json").read_text())
    by_id = {case["id"]: case for case in found}
    shared = {"entries": "same_entries_as", "kept": "same_kept_as"}
    for case in found:
        for field, other in shared.items():
            if other in case:
                case[field] = by_id[case[other]][field]
    return found


def fill_tensor(key: str, shape: Sequence[int]) -> np.ndarray:
    """The array of shape `shape` for the tensor `key`: float32, or int64 for counters."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if key.endswith(("running_mean", "bias")):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if len(shape) < 2:  # the scale of a normalisation layer
        return rng.uniform(0.5, 1.0, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * np.sqrt(1.5 / fan_in)).astype(np.float32)


def fill_state_dict(
    entries: list[tuple[str, list[int]]], kept: dict[str, dict[str, Any]] | None = None
) -> dict[str, np.ndarray]:
    """{key: array} for `entries`, under the authors' keys and in their order; `kept` has recorded values."""
    kept = kept or {}
    return {
        key: np.asarray(kept[key]["values"], kept[key]["dtype"]).reshape(shape)
        if key in kept
        else fill_tensor(key, shape)
        for key, shape in entries
    }


def make_input(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """A float32 standard-normal array of `shape` (N, C, H, W)."""
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)


def assert_matches(array: np.ndarray, expected: dict[str, Any], rtol: float = 2e-4) -> None:
    """Raises AssertionError unless `array` has the digest `expected`; errors are relative to the output's std."""
    assert list(array.shape) == expected["shape"], f"shape {list(array.shape)}, expected {expected['shape']}"
    flat = array.astype(np.float64).reshape(-1)
    index = np.linspace(0, flat.size - 1, len(expected["samples"])).astype(np.int64)
    scale = max(expected["std"], 1e-6)
    worst = float(np.max(np.abs(flat[index] - expected["samples"]))) / scale
    assert worst <= rtol, f"largest difference is {worst:.3g} of the output's standard deviation (limit {rtol:.3g})"
    assert abs(flat.mean() - expected["mean"]) <= rtol * scale, "means differ"
