"""Whether a command prints more than results and errors: notes, progress, progress bars; and text that is safe."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["bar_disabled", "cleaned", "is_quiet", "quiet_if"]

_quiet = False
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reverse the text after them


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


def cleaned(text: str) -> str:
    """Text without characters that control a terminal or reverse what follows, and without surrounding blanks."""
    unsafe = (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _BIDI for char in text)
    return "".join(" " if bad else char for char, bad in zip(text, unsafe, strict=True)).strip()
