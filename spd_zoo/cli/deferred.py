"""Loads the networks, which `spd_zoo_cli.main` postpones because they take most of a command's start."""

import sys

__all__ = ["load_networks"]


def load_networks() -> None:
    """Completes `import spd_zoo`, which registers every network with timm, unless it is already complete."""
    for name in ("spd_zoo.weights", "spd_zoo"):
        package = sys.modules[name]
        if not hasattr(package, "__all__"):  # its __init__.py has not run
            assert package.__spec__ is not None and package.__spec__.loader is not None
            package.__spec__.loader.exec_module(package)
