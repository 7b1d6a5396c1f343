"""The manifest: one entry per network and checkpoint, read from `weights_manifest.json`."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Entry", "entries", "find_entry", "manifest_path"]

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Entry:
    """A network, or a checkpoint of it; `manifest.schema.json` describes the fields."""

    name: str  # network, or network.tag
    group: str  # the model file it belongs to
    num_classes: int
    input_size: tuple[int, int, int]
    params: int  # of the network with num_classes outputs
    macs: int  # convolutions and linear layers, one image of input_size
    pool_size: tuple[int, int] | None = None  # of the last map at input_size; detectors pool none
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    fixed_input_size: bool = False  # whether the network takes images of the size alone that it was created for
    source: str | None = None
    sha256: str | None = None
    size: int | None = None
    license: str | None = None
    origin_url: str | None = None
    original_link: str | None = None
    original_file: str | None = None  # if original_link is a folder
    dataset: str | None = None
    class_names: tuple[str, ...] | None = None
    recipe: dict[str, Any] | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    notes: str | None = None

    @property
    def network(self) -> str:
        """The registered name, without the tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """What stands behind the network's name; empty for the network itself."""
        return self.name.partition(".")[2]

    @property
    def verified(self) -> bool:
        """Whether there is a file whose sha256 is known."""
        return self.source is not None and self.sha256 is not None


def manifest_path() -> Path:
    """The manifest in the installed package, or at the top of the checkout."""
    installed = PACKAGE / "weights_manifest.json"
    return installed if installed.exists() else PACKAGE.parent / "weights_manifest.json"


@cache
def entries() -> dict[str, Entry]:
    """All entries by name.

    Raises:
        ValueError: If a name stands in two groups.
        TypeError: If an entry has a field that there is not, or lacks one.
    """
    groups = json.loads(manifest_path().read_text(encoding="utf-8"))
    found: dict[str, Entry] = {}
    for group, members in groups.items():
        for name, fields in members.items():
            if name in found:
                raise ValueError(f"{manifest_path()} has {name} twice, in {found[name].group} and in {group}")
            found[name] = Entry(name=name, group=group, **{key: _tuple(value) for key, value in fields.items()})
    return found


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def find_entry(name: str) -> Entry | None:
    """The entry of `network.tag` or `network`, if the manifest has one."""
    return entries().get(name)
