"""Pretrained weights: the manifest, its files, and loading them into a network after verifying them.

`manifest` says what there is, `families` how it is grouped, `cache` where it is on this machine, `catalogue` what the
user is shown of these; they need no torch. `download` gets files, `checkpoint` reads those of others (by `archive` and
`unpickle`), `fit` compares them with a network, `imported` converts and keeps them, `fetch` makes a verified file of an
entry, `build` stands between a variant and timm, `folder` writes a network for others, `publish` and `card` put weights
on the Hub.
"""

from spd_zoo.weights.build import (
    BackboneWarning,
    build,
    create,
    default_cfgs,
    loads_backbone_only,
    use_manifest,
)
from spd_zoo.weights.cache import find, imported_names, is_right, origin_of, original_of, sha256_of
from spd_zoo.weights.checkpoint import read_checkpoint
from spd_zoo.weights.fetch import fetch, import_weights, remove
from spd_zoo.weights.fit import rename
from spd_zoo.weights.folder import save_network
from spd_zoo.weights.manifest import Entry, WeightsError, entries, find_entry

__all__ = [
    "BackboneWarning",
    "Entry",
    "WeightsError",
    "build",
    "create",
    "default_cfgs",
    "entries",
    "fetch",
    "find",
    "find_entry",
    "import_weights",
    "imported_names",
    "is_right",
    "loads_backbone_only",
    "origin_of",
    "original_of",
    "read_checkpoint",
    "remove",
    "rename",
    "save_network",
    "sha256_of",
    "use_manifest",
]
