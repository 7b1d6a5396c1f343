"""How a tool that trains ends after an error or a signal."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from spd_zoo.process import Stopped
from spd_zoo.weights import WeightsError

__all__ = ["explained"]

P = ParamSpec("P")


def explained(main: Callable[P, int]) -> Callable[P, int]:
    """Lets `main` print an error as one sentence and return 1, and return 128 + N after the signal N."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except Stopped as stopped:
            print(stopped or "stopped; the same command resumes", file=sys.stderr)
            return 128 + stopped.number
        except (ValueError, OSError, WeightsError) as error:
            print(error, file=sys.stderr)
            return 1

    return run
