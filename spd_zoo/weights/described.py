"""What a detector's checkpoint states besides tensors: task, classes, image size, strides, the program's version.

The fields have the names that YOLO's training programs give them. The file may come from anybody: each field is
checked before it is used, and text is cleaned before it is printed.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spd_zoo.console import cleaned
from spd_zoo.weights.manifest import WeightsError
from spd_zoo.weights.unpickle import Unknown

__all__ = ["Described", "check_task", "described", "fields_in", "fields_of_metadata"]

_FIELDS = ("task", "names", "nc", "imgsz", "stride", "activation", "version", "license")
_SETTINGS = ("args", "train_args", "opt", "yaml")  # settings, which may contain the fields, too
_IN_JSON = ("names", "nc", "imgsz", "stride")  # fields that the metadata of an imported file holds as JSON
_DETECTION = ("detect", "detection", "object-detection")
_LONGEST = 200  # maximum number of characters of a class name or another text
_LARGEST_IMAGE = 2**24  # pixels
_MOST_STRIDES = 16
_ADVICE = "To import the weights without these fields, save only the state dict: torch.save(net.state_dict(), FILE)"


@dataclass(frozen=True)
class Described:
    """What a checkpoint states about its network.

    Attributes:
        num_classes: The number of classes, from the shapes of the tensors.
        names: The name of each class; None if the classes are only numbered.
        image_size: Height and width in pixels of the images that it was trained on.
        strides: The strides of the feature maps.
        texts: `task`, `version` and `license`, as far as they are known.
    """

    num_classes: int
    names: tuple[str, ...] | None
    image_size: tuple[int, int] | None
    strides: tuple[int, ...] | None
    texts: Mapping[str, str]

    def metadata(self) -> dict[str, str]:
        """The fields as metadata of a safetensors file, from which `fields_of_metadata` reads them."""
        values = {"names": self.names, "nc": self.num_classes, "imgsz": self.image_size, "stride": self.strides}
        known = {name: json.dumps(value) for name, value in values.items() if value is not None}
        return known | dict(self.texts)

    def cfg(self, in_chans: int) -> dict[str, Any]:
        """The fields of timm's configuration that are known."""
        found: dict[str, Any] = {}
        if self.names is not None:
            found |= {"label_names": list(self.names), "label_descriptions": None}
        return found | ({"input_size": (in_chans, *self.image_size)} if self.image_size else {})


def fields_in(places: Sequence[Any]) -> dict[str, Any]:
    """The fields in parts of a checkpoint, unchecked.

    Args:
        places: Networks and dicts; the first that has a field takes precedence.

    Returns:
        The fields that are not None.
    """
    views = []
    for place in places:
        view = _view(place)
        views += [view, *(_view(view.get(name)) for name in _SETTINGS)]
    found = {name: next((view[name] for view in views if view.get(name) is not None), None) for name in _FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def _view(value: Any) -> dict[Any, Any]:
    """The items of a dict, or the attributes of an object of another class."""
    if isinstance(value, Unknown):
        value = value.attributes or value.items
    return value if isinstance(value, dict) else {}


def fields_of_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields in the metadata of a safetensors file that this package imported, unchecked.

    Raises:
        ValueError: If they are not JSON.
    """
    if metadata is None or "original_sha256" not in metadata:  # in other files these keys may mean something else
        return {}
    try:
        return {name: json.loads(metadata[name]) for name in _IN_JSON if name in metadata}
    except RecursionError as error:
        raise ValueError("metadata that is nested too deeply") from error


def described(fields: Mapping[str, Any], net: nn.Module, num_classes: int, checkpoint: str) -> Described:
    """Checks the fields of a checkpoint.

    Args:
        fields: What `fields_in` or `fields_of_metadata` found.
        net: The detector that the checkpoint is for.
        num_classes: The number of classes, from the shapes of the tensors.
        checkpoint: The checkpoint's name in errors.

    Returns:
        The checked fields.

    Raises:
        WeightsError: If a field contradicts the tensors or the network, or is malformed.
    """
    try:
        count = fields.get("nc", num_classes)
        if type(count) is not int or count != num_classes:
            raise ValueError(f"nc is {_printable(count)}, but its tensors are those of {num_classes} classes")
        names = _names(fields["names"], checkpoint) if "names" in fields else None
        if names is not None and len(names) != num_classes:
            raise ValueError(f"it names {len(names)} classes, but its tensors are those of {num_classes}")
        if names == tuple(map(str, range(num_classes))):  # which training programs write for classes without names
            names = None
        strides = _strides(fields["stride"], net) if "stride" in fields else None
        activation = fields.get("activation")
        if activation is not None and not (isinstance(activation, str) and "SiLU" in activation):
            raise ValueError(f"its activation is {_printable(activation)}, and the network's is SiLU")
        image_size = _image_size(fields["imgsz"], net, checkpoint) if "imgsz" in fields else None
    except ValueError as error:
        raise WeightsError(f"{checkpoint} cannot be used as it is: {error}. {_ADVICE}") from error
    texts = {name: fields.get(name) for name in ("task", "version", "license")}
    return Described(
        num_classes,
        names,
        image_size,
        strides,
        {name: cleaned(text)[:_LONGEST] for name, text in texts.items() if isinstance(text, str) and text},
    )


def check_task(fields: Mapping[str, Any], network: str, checkpoint: str) -> None:
    """Refuses a checkpoint for another task than detection.

    Args:
        fields: What `fields_in` found.
        network: The detector that the checkpoint should be for.
        checkpoint: The checkpoint's name in errors.

    Raises:
        WeightsError: If the checkpoint states another task.
    """
    task = fields.get("task", "detect")
    if task not in _DETECTION:
        raise WeightsError(
            f"{checkpoint} is a checkpoint for the task {_printable(task)}, and {network} is a detector: give a "
            "checkpoint for the task 'detect'"
        )


def _printable(value: Any) -> str:
    """A value of an untrusted file, shortened and cleaned for printing."""
    if isinstance(value, str):
        return repr(cleaned(value[: _LONGEST // 4]))
    if type(value) in (int, float) and abs(value) < 1e15:
        return repr(value)
    return f"of type {type(value).__name__}"


def _names(value: Any, checkpoint: str) -> tuple[str, ...]:
    """Class names from a list, or from a dict whose keys are their numbers.

    Raises:
        ValueError: If they are neither, or one is not a name.
    """
    value = value.items if isinstance(value, Unknown) else value
    if isinstance(value, dict):
        numbers = {int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 8 else key for key in value}
        if numbers != set(range(len(value))):
            raise ValueError(f"its {len(value)} class names are not numbered from 0 to {len(value) - 1}")
        value = [name for _, name in sorted((int(key), name) for key, name in value.items())]
    if not isinstance(value, list | tuple):
        raise ValueError("its class names are neither a list nor a dict")
    names = []
    for i, name in enumerate(value):
        if type(name) is int and abs(name) < 10**18:  # YAML reads a class called 7 as a number
            name = str(name)
        if not isinstance(name, str):
            raise ValueError(f"the name of its class {i} is not text")
        if len(name) > _LONGEST:
            raise ValueError(f"the name of its class {i} has {len(name)} characters, more than {_LONGEST}")
        names.append(cleaned(name) or str(i))
    changed = [new for old, new in zip(value, names, strict=True) if isinstance(old, str) and old.strip() != new]
    if changed:
        warnings.warn(
            f"{checkpoint}: class names that are empty or hold control characters are changed to "
            f"{', '.join(map(repr, changed[:5]))}",
            stacklevel=2,
        )
    return tuple(names)


def _strides(value: Any, net: nn.Module) -> tuple[int, ...]:
    """The strides of a checkpoint's maps.

    Raises:
        ValueError: If they are not those of the network, which then computes something else.
    """
    if isinstance(value, Tensor):
        value = value.tolist() if value.ndim == 1 and len(value) <= _MOST_STRIDES else None
    own: tuple[int, ...] = tuple(getattr(net, "strides", ()))
    if not isinstance(value, list | tuple) or not all(type(stride) in (int, float) for stride in value[:_MOST_STRIDES]):
        raise ValueError("the strides of its maps are not a list of numbers")
    if own and sorted(value) != sorted(own):
        stated = ", ".join(f"{stride:g}" for stride in value[:_MOST_STRIDES])
        raise ValueError(f"its maps have the strides {stated}, and the network's have {', '.join(map(str, own))}")
    return own or tuple(int(stride) for stride in value)


def _image_size(value: Any, net: nn.Module, checkpoint: str) -> tuple[int, int] | None:
    """Height and width of a checkpoint's images; None for a network with a fixed size.

    Raises:
        ValueError: If they are not sizes, or are too large.
    """
    sides = value if isinstance(value, list | tuple) else [value]
    if not 1 <= len(sides) <= 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("its image size is neither a number of pixels nor a pair of them")
    height, width = sides[0], sides[-1]
    if max(sides) > _LARGEST_IMAGE or height * width > _LARGEST_IMAGE:
        raise ValueError(f"its image size is larger than {_LARGEST_IMAGE} pixels")
    multiple: int = getattr(net, "size_multiple", 0)
    if not multiple:
        return None
    size = height + -height % multiple, width + -width % multiple
    if size != (height, width):
        warnings.warn(
            f"{checkpoint}: the image size {height}x{width} is taken as {size[0]}x{size[1]}, multiples of {multiple}",
            stacklevel=2,
        )
    return size
