"""Whether a command prints more than results and errors: notes, progress, progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["bar_disabled", "is_quiet", "quiet_if"]

_quiet = False


@contextmanager
def quiet_if(quiet: bool) -> Iterator[None]:
    """Prints only results and errors in this context, if it is `quiet`."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether only results and errors are printed."""
    return _quiet


def bar_disabled(unwanted: bool = False) -> bool | None:
    """The argument `disable` of tqdm: no bar in a quiet command, where it is unwanted, or outside a terminal."""
    return True if unwanted or _quiet else None
