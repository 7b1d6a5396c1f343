"""Checkpoints from elsewhere, imported into the user's cache: converted, checked, kept.

A converted file is named `network.tag.<sha256 of the file>.safetensors`, so that it can be verified, and is written
atomically. Its metadata says where it came from.
"""

import datetime
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from spd_zoo.files import whole
from spd_zoo.weights.cache import import_folder, imported_files, sha256_of
from spd_zoo.weights.checkpoint import read_described
from spd_zoo.weights.described import check_task, described
from spd_zoo.weights.fit import StateDict, cfg_of, check_finite, facts, filter_of, misfit, own_tensors, which_fits
from spd_zoo.weights.manifest import WeightsError, entries, find_entry

__all__ = ["UNTAGGED", "converted", "import_file", "locked", "tagged"]

_LARGEST_IMAGE = 2**25  # numbers; at 224 px that is 668 channels
UNTAGGED = "imported"  # the tag of a checkpoint that was imported without one


def tagged(name: str) -> str:
    """The name under which a checkpoint is imported: `network.tag`; without a tag it is "imported".

    Raises:
        WeightsError: If there is no such network, or the tag is none.
    """
    network, _, tag = name.partition(".")
    if network not in {entry.network for entry in entries().values()} or not re.fullmatch(r"[a-z0-9_]*", tag, re.A):
        raise WeightsError(
            f"{name} is not NETWORK or NETWORK.TAG (lower case, digits and _) of this zoo; "
            "`spd-zoo list` shows the networks"
        )
    return f"{network}.{tag or UNTAGGED}"


def import_file(name: str, file: Path, origin: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Converts a checkpoint to our keys, checks it, and keeps it in the cache for `pretrained=True` with this name.

    All keys and shapes must match, every number must be finite, and so must the network's outputs. What a detector's
    checkpoint says about its classes and images is kept in the metadata.

    Args:
        name: `network.tag`, a tag of the manifest or any other; without one it is "imported".
        file: The checkpoint, in any form that `read_checkpoint` understands.
        origin: Where it came from, if not from `file`.
        cache_dir: The user's cache (default: Hugging Face's).

    Returns:
        The converted file.

    Raises:
        WeightsError: If the checkpoint cannot be read, does not fit or is not what the manifest pins; nothing is kept.
    """
    name = tagged(name)
    network = name.partition(".")[0]
    entry = find_entry(name)
    if entry is not None and str(entry.source).startswith(("bundled:", "package:")):
        raise WeightsError(f"the weights of {name} come with a package; give yours another tag, like {network}.mine")
    label = origin or str(file)
    state_dict, fields = read_described(file, label)
    sha256 = sha256_of(file)
    if entry is not None and entry.sha256 not in (None, sha256):
        raise WeightsError(
            f"{label} has sha256 {sha256}, the weights of {name} have {entry.sha256}: it is another file. "
            f"Give it another tag to import it as your own, for example {network}.mine"
        )
    classes = {} if entry is None else {"num_classes": entry.num_classes}
    detects = entries()[network].task == "detection" if network in entries() else False
    if detects:
        check_task(fields, network, label)
    try:
        made_for, tensors = converted(network, state_dict, classes)
    except WeightsError as error:
        raise WeightsError(f"{label} does not fit {name}: {error}") from error
    check_finite(tensors, label)
    net = timm.create_model(network, **made_for).eval()
    net.load_state_dict(tensors)
    about = described(fields, net, made_for["num_classes"], label) if detects else None
    metadata = {} if about is None else about.metadata()
    own: tuple[int, int] = cfg_of(net)["input_size"][1:]
    image = (made_for["in_chans"], *min(own, (about and about.image_size) or own, key=math.prod))
    if math.prod(image) > _LARGEST_IMAGE:
        raise WeightsError(
            f"{label} is made for images of {image[0]} channels, too many to try it on an image of "
            f"{image[1]} x {image[2]} pixels; give a file for fewer channels"
        )
    with torch.inference_mode():
        outputs = tree_leaves(net(torch.zeros(1, *image)))
    if not all(output.isfinite().all() for output in outputs):
        raise WeightsError(f"{label} is damaged: {network} computes a number that is not finite with it. Get it again")
    metadata |= {
        "format": "pt",
        "name": name,
        "origin": origin or file.resolve().as_uri(),
        "original_sha256": sha256,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "license": (entry.license if entry is not None else None) or metadata.get("license", "unknown"),
    }
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    if entry is not None and entry.verified:  # then the file's own bytes are what the manifest pins
        return _keep(lambda part: shutil.copyfile(file, part), name, cache_dir)
    return _keep(lambda part: save_file(tensors, part, metadata), name, cache_dir)


def converted(network: str, state_dict: StateDict, classes: dict[str, Any]) -> tuple[dict[str, Any], StateDict]:
    """The arguments to create the network for a checkpoint, and its tensors under the network's own keys.

    Args:
        network: The network's name in timm's registry.
        state_dict: The checkpoint.
        classes: `num_classes`, if it is known; otherwise the checkpoint's tensors tell it.

    Returns:
        The arguments `num_classes` and `in_chans`, and the tensors as `own_tensors` finds them.

    Raises:
        WeightsError: If the checkpoint does not fit.
    """
    meta: nn.Module = timm.create_model(network, device="meta")
    made_for = facts(own_tensors(state_dict, meta, filter_of(meta)), meta, cfg_of(meta)["input_size"][0]) | classes
    meta = timm.create_model(network, device="meta", **made_for)
    tensors = own_tensors(state_dict, meta, filter_of(meta))
    problem = misfit(tensors, meta, with_classifier=True)
    if problem:
        raise WeightsError(f"{problem}; {which_fits(state_dict, other_than=network)}")
    return made_for, {key: tensors[key] for key in meta.state_dict()}


def _keep(write: Callable[[Path], object], name: str, cache_dir: str | Path | None) -> Path:
    """Writes the file and deletes those that were imported under this name before."""
    with locked(name, cache_dir) as folder:
        part = folder / f"{name}.part"
        try:
            write(part)
            kept = folder / f"{name}.{sha256_of(part)}.safetensors"
            with whole(kept) as temporary:
                part.rename(temporary)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"cannot write to {folder} ({error}); make room, or set HF_HOME elsewhere") from error
        finally:
            part.unlink(missing_ok=True)
        for file in imported_files(name, folder):
            if file != kept:
                file.unlink(missing_ok=True)
        return kept


@contextmanager
def locked(name: str, cache_dir: str | Path | None = None) -> Iterator[Path]:
    """The folder of imported files, locked so that no other process of this user works on `name`.

    Raises:
        WeightsError: If nothing can be written there.
    """
    folder = import_folder(cache_dir)
    lock = FileLock(folder / f"{name}.lock", is_singleton=True)  # a singleton per file is reentrant
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise WeightsError(f"cannot write to {folder} ({error}); make room, or set HF_HOME to another place") from error
    try:
        yield folder
    finally:
        lock.release()
