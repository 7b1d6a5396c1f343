"""Registers networks with timm, where a used name is an error, and what those rebuilt from a saved config share."""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model as timm_register_model
from timm.models._registry import _deprecated_models, _module_to_models

__all__ = ["all_maps", "register_model", "register_unlisted_model"]


def register_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a function that builds a network with timm, under the function's name.

    Args:
        fn: Builds the network.

    Returns:
        The function.

    Raises:
        RuntimeError: If timm has another network of that name, which timm itself would replace with a warning.
    """
    if timm.is_model(fn.__name__):
        owner = timm.model_entrypoint(fn.__name__).__module__
        if owner != fn.__module__:
            raise RuntimeError(f"{fn.__module__} cannot register {fn.__name__}: {owner} has a network of that name")
    return timm_register_model(fn)


def register_unlisted_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a function that loads saved networks and needs their saved arguments.

    `timm.list_models` leaves it out, so that every listed name can be created by its name alone; `timm.list_modules`
    leaves out a module without listed networks.

    Args:
        fn: Builds the network from its saved config.

    Returns:
        The function.

    Raises:
        RuntimeError: As `register_model`.
    """
    register_model(fn)
    _deprecated_models[fn.__name__] = None  # timm's only way to keep a name out of its lists
    module = fn.__module__.rpartition(".")[2]
    _module_to_models[module].discard(fn.__name__)
    if not _module_to_models[module]:
        del _module_to_models[module]
    return fn


def all_maps(like: Any) -> dict[str, Any]:
    """timm's `feature_cfg` with which `features_only` gives every map of a network that is rebuilt from its config.

    Args:
        like: The network that it is made of.
    """
    return {
        "out_indices": tuple(range(len(like.feature_info))),
        "feature_cls": "getter" if hasattr(like, "forward_intermediates") else "fx",
    }
