"""Loads what `spd_zoo_cli.main` put off, because most of a command's start would be spent on it."""

import sys

__all__ = ["load_networks"]


def load_networks() -> None:
    """Does what `import spd_zoo` does, unless it is done: registers every network with timm."""
    for name in ("spd_zoo.weights", "spd_zoo"):
        package = sys.modules[name]
        if not hasattr(package, "__all__"):  # its __init__.py has not run
            assert package.__spec__ is not None and package.__spec__.loader is not None
            package.__spec__.loader.exec_module(package)
