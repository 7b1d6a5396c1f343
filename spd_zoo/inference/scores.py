"""The minimum score of each class with the best F1 on a run's validation images: `scores.json` in the run's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spd_zoo.weights.catalogue import ModelError

__all__ = ["SCORES_FILE", "read_scores", "scores_file", "scores_text"]

SCORES_FILE = "scores.json"
_LARGEST = 2**26  # bytes


def scores_text(scores: Mapping[str, float | None]) -> str:
    """The content of `scores.json`: the minimum score of each class; None where no box was correct."""
    return json.dumps(dict(scores), indent=1, ensure_ascii=False) + "\n"


def scores_file(model: str) -> Path:
    """The file with the minimum scores of a run; the model is its folder, with or without `local-dir:`."""
    return Path(model.removeprefix("local-dir:")) / SCORES_FILE


def read_scores(model: str, class_names: Sequence[str]) -> dict[int, float]:
    """The minimum scores that were measured for a run.

    Args:
        model: The folder of the run, with or without `local-dir:`.
        class_names: The network's own names of its classes.

    Returns:
        The minimum score of each class, by its number; classes of which no box was correct are left out.

    Raises:
        ModelError: If the model has no such file, or it is not for these classes.
    """
    file = scores_file(model)
    advice = f"`spd-zoo evaluate {model} --data DATA --split val` measures them; give those with --class-scores"
    try:
        if not file.is_file():
            raise ModelError(f"{model} has no {SCORES_FILE} with the best minimum score of each class; {advice}")
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        scores = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(scores, dict) or list(scores) != list(class_names):
            raise ValueError("its classes are not the network's")
        numbers = [score for score in scores.values() if score is not None]
        if not all(type(score) in (int, float) and 0 <= score <= 1 for score in numbers):
            raise ValueError("a score is not between 0 and 1")
    except (ValueError, OSError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} cannot be used: {error}; {advice}") from error
    return {number: float(score) for number, score in enumerate(scores.values()) if score is not None}
