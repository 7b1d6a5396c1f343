"""Pretrained weights: the manifest, the files behind it, and loading them into a network only when they are right."""

from spd_zoo.weights.build import build, default_cfgs, rename
from spd_zoo.weights.fetch import WeightsError, fetch, sha256_of
from spd_zoo.weights.manifest import Entry, entries, find_entry

__all__ = [
    "Entry",
    "WeightsError",
    "build",
    "default_cfgs",
    "entries",
    "fetch",
    "find_entry",
    "rename",
    "sha256_of",
]
