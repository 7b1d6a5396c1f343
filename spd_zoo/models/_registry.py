"""timm's `register_model`, which here never takes a name away from timm."""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model as timm_register_model

__all__ = ["register_model"]


def register_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the function with timm under its name.

    Raises:
        RuntimeError: If timm knows that name from elsewhere; timm itself would only warn and replace its network.
    """
    if timm.is_model(fn.__name__):
        owner = timm.model_entrypoint(fn.__name__).__module__
        if owner != fn.__module__:
            raise RuntimeError(f"{fn.__module__} cannot register {fn.__name__}: {owner} has a network of that name")
    return timm_register_model(fn)
