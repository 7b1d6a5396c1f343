"""Finds the network's weights in what a checkpoint holds: under which key, averaged or not, or in a pickled network."""

import re
import warnings
from itertools import chain
from typing import Any

from torch import Tensor

from spd_zoo.weights.archive import FormatError
from spd_zoo.weights.described import fields_in
from spd_zoo.weights.fit import StateDict
from spd_zoo.weights.unpickle import Unknown

__all__ = ["weights_in"]

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")  # keys of averaged weights, in order of priority
_KEYS = ("state_dict", "model", "model_state_dict", "net", "module")  # of others, which count if there are no averages
_LARGEST_NETWORK = 10_000_000  # characters in the names of its modules and tensors, plus 50 for each
_DEEPEST = 10  # dicts inside of each other, on the way to the weights


def weights_in(content: Any) -> tuple[Any, dict[str, Any]]:
    """Finds the weights in the content of a checkpoint.

    Args:
        content: Tensors, numbers and strings, in dicts, lists and tuples, and objects as `Unknown`.

    Returns:
        What should be the state dict, which the caller checks; and the fields beside it that describe its network.

    Raises:
        FormatError: If it is in a network that is not one: without an end, or with names that are not strings.
    """
    places = [content]  # from the whole file to the weights in it
    while len(places) <= _DEEPEST and not _is_network(places[-1]):
        last: Any = places[-1].items if isinstance(places[-1], Unknown) else places[-1]
        inner = _weights_among(last) if isinstance(last, dict) else None
        if inner is None:
            return last, fields_in(places[-2::-1])  # a state dict has names of tensors only
        places.append(inner)
    found = _tensors_of_module(places[-1]) if _is_network(places[-1]) else places[-1]
    return found, fields_in(places[::-1])


def _weights_among(values: dict[Any, Any]) -> Any:
    """The value that holds the weights: averaged ones, those under a usual key, or the only ones; None if unclear."""
    swapped = "steps" in _items(values.get("ema_state_dict"))  # by mmengine, which averages into `state_dict`
    for key in () if swapped else _AVERAGED:
        if _may_hold_weights(values.get(key)):
            return values[key]
    averages = [
        value for key, value in values.items() if key not in _AVERAGED and _is_averaged(key) and _holds_tensors(value)
    ]
    if averages:
        return averages[0] if len(averages) == 1 else None
    nameless = next((key for key, value in values.items() if _is_averaged(key) and _holds_list(value)), None)
    if nameless is not None:
        warnings.warn(f"the averaged weights under {nameless!r} have no names, so others are read", stacklevel=2)
    known = next((values[key] for key in _KEYS if _may_hold_weights(values.get(key))), None)
    return _only_weights(values) if known is None else known


def _may_hold_weights(value: Any) -> bool:
    """Whether a value is an object, or a dict with a tensor, a dict or an object in it, and not only with settings."""
    inner = value.values() if isinstance(value, dict) else ()
    return isinstance(value, Unknown) or any(isinstance(each, Tensor | dict | Unknown) for each in inner)


def _is_averaged(key: Any) -> bool:
    """Whether "ema" is a word of a key, as in `ema_net` or `params_ema`."""
    return isinstance(key, str) and "ema" in re.split("[^a-z]+", key.lower())


def _only_weights(values: dict[Any, Any]) -> Any:
    """The network or dict with tensors among the values, whatever its key; None if there are several, or none.

    Values with weights under a usual key count, too. Beside tensors of a state dict, with dotted names, there are none.
    """
    if any(isinstance(value, Tensor) and "." in str(key) for key, value in values.items()):
        return None
    found = []
    for value in values.values():
        inner = _items(value)
        if _holds_tensors(value) or any(_holds_tensors(inner.get(key)) for key in (*_AVERAGED, *_KEYS)):
            found.append(value)
    return found[0] if len(found) == 1 else None


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a network, or a dict with one or with a tensor that has a layer's name (`conv.weight`)."""
    return _is_network(value) or any(
        _is_network(each) or (isinstance(each, Tensor) and "." in str(key)) for key, each in _items(value).items()
    )


def _holds_list(value: Any) -> bool:
    """Whether a value is a dict with a list of tensors in it."""
    lists = [each for each in _items(value).values() if isinstance(each, list)]
    return any(isinstance(each, Tensor) for each in chain.from_iterable(lists))


def _items(value: Any) -> dict[Any, Any]:
    """A dict, also one whose class is not known; an empty one for others."""
    items = value.items if isinstance(value, Unknown) else value
    return items if isinstance(items, dict) else {}


def _is_network(value: Any) -> bool:
    return isinstance(value, Unknown) and value.attributes is not None and "_modules" in value.attributes


def _tensors_of_module(module: Unknown) -> StateDict:
    """The result that `module.state_dict()` would have, from parameters, persistent buffers and submodules."""
    tensors: StateDict = {}
    stack: list[tuple[str, Any]] = [("", module)]
    budget = _LARGEST_NETWORK
    while stack:
        prefix, item = stack.pop()
        if isinstance(item, Tensor):
            tensors[prefix.removesuffix(".")] = item
        attributes = item.attributes if isinstance(item, Unknown) else None
        if attributes is None:
            continue
        transient = attributes.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, dict) else {}
        for group in ("_modules", "_buffers", "_parameters"):  # in reverse, because the stack is read from its end
            inner = attributes.get(group)
            inner = inner.items if isinstance(inner, Unknown) else inner
            if not isinstance(inner, dict):
                continue
            for name in reversed(inner):
                if not isinstance(name, str):
                    raise FormatError("a network with a module or tensor whose name is not a string")
                budget -= 50 + len(prefix) + len(name)
                if budget < 0:
                    raise FormatError("a network without an end: its modules contain each other")
                if name not in transient:
                    stack.append((f"{prefix}{name}.", inner[name]))
    return tensors
