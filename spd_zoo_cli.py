"""The command `spd-zoo`, outside of the package, because importing `spd_zoo` also imports torch, which takes seconds.

`main` puts the package into `sys.modules` without running its `__init__.py`, so that `spd-zoo list` can import
`spd_zoo.cli` alone. `spd_zoo.cli.deferred` runs the `__init__.py` when a command needs the networks.
"""

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """Runs one command of `spd-zoo`; returns its exit status."""
    for name in ("spd_zoo", "spd_zoo.weights"):  # packages whose __init__.py imports torch
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None, f"{name} is not installed"
            package = sys.modules[name] = importlib.util.module_from_spec(spec)
            parent, _, child = name.rpartition(".")
            if parent:  # as an import would do
                setattr(sys.modules[parent], child, package)
    from spd_zoo.cli.main import main as run

    return run()
