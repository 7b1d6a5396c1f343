"""Checks of numbers that callers give in Python, where the command line has its own."""

import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["height_and_width", "positive_integer"]


def positive_integer(name: str, value: Any) -> int:
    """An argument that is a whole number of at least 1, also one of NumPy or torch.

    Args:
        name: The argument's name in the message.
        value: What was given.

    Returns:
        The number.

    Raises:
        ValueError: If it is something else.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def height_and_width(name: str, value: Any) -> tuple[int, int]:
    """An argument that is a number of pixels, or a height and a width.

    Args:
        name: The argument's name in the message.
        value: What was given.

    Returns:
        Height and width in pixels.

    Raises:
        ValueError: If it is something else.
    """
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0
    sides = tuple(value) if several else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be one number, or height and width, got {value!r}")
    return positive_integer(name, sides[0]), positive_integer(name, sides[1])
