"""Writes the generated sections of the README and of docs/: `python tools/make_readme.py [--check]`.

They come from the manifest, from records of speeds, latencies, faults, conversions and an experiment, from counting
what papers print, from the recipes, and from the parser of the command `spd-zoo`. `readme_networks.py`,
`readme_measurements.py` and `readme_command_line.py` hold a function for every section.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import readme_measurements
import readme_networks
from readme_command_line import command_line
from readme_common import ROOT

from spd_zoo.files import whole
from spd_zoo.training.config import GENERAL
from spd_zoo.weights.families import FAMILIES

RECIPES = {  # page: recipes of its published figures
    "pyconv": ("imagenet_pyconv", "imagenet_pyconv_augment"),
    "spd_resnet": ("tiny_imagenet_spd", "cifar10_spd"),
    "padding_free": ("cifar100_first", "cifar100_second"),
}


def _family(page: str) -> Mapping[str, Callable[[], str]]:
    """The generated sections of the page of a family."""
    groups = FAMILIES[page].groups
    return {
        "networks": partial(readme_networks.networks, groups),
        "checkpoints": partial(readme_networks.checkpoints, groups),
        "counted": partial(readme_networks.counted, groups),
        "printed": partial(readme_networks.printed, groups),
        **{name: partial(readme_networks.recipe, name) for name in RECIPES.get(page, ())},
    }


SECTIONS: dict[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"overview": readme_networks.overview, "families": partial(readme_networks.families, "docs/families")},
    "docs/choosing.md": {
        "families": partial(readme_networks.families, "families"),
        "recommended": readme_networks.recommended,
        "trained": readme_networks.trained,
        "twins": readme_measurements.twins,
    },
    **{f"docs/families/{page}.md": _family(page) for page in FAMILIES},
    "docs/finetuning.md": {
        **{name: partial(readme_networks.recipe, name) for name in GENERAL},
        "linear_probe": readme_measurements.linear_probe,
        "starts": readme_measurements.starts,
        "training_speed": readme_measurements.training_speed,
        "sweep": readme_measurements.sweep,
        "recipes": readme_measurements.recipes,
        "tiles": readme_measurements.tiles,
    },
    "docs/weights.md": {"bundled": readme_networks.bundled},
    "docs/reliability.md": {"faults": readme_measurements.faults},
    "docs/many_images.md": {"many_images": readme_measurements.many_images},
    "docs/speed.md": {
        "latency": readme_measurements.latency,
        "speed": readme_measurements.speed,
        "gpu_speed": readme_measurements.gpu_speed,
    },
    "docs/command_line.md": {"command_line": command_line},
    "docs/deploy.md": {"deploy_latency": readme_measurements.deploy_latency},
    "docs/convert.md": {
        "converted_speed": readme_measurements.converted_speed,
        "conversions": readme_measurements.conversions,
        "kept_resolution": readme_measurements.kept_resolution,
        "conversion_experiment": readme_measurements.conversion_experiment,
        "conversion_detectors": readme_measurements.conversion_detectors,
        "imported_twins": readme_measurements.imported_twins,
    },
}


def render(file: str, text: str) -> str:
    """The text with every section generated again; raises SystemExit unless each section occurs once."""
    for name, make in SECTIONS[file].items():
        pattern = rf"(<!-- {name}: tools/make_readme.py -->\n).*?(<!-- end -->)"
        made = make()
        escaped = made.replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{escaped}\n\g<2>", text, flags=re.S)
        if count != bool(made):
            raise SystemExit(f"{file} has {count} sections called {name}, expected {int(bool(made))}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files, or with --check says whether they are current; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file is not current")
    options = parser.parse_args(argv)
    stale = False
    for file in SECTIONS:
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
            current = render(file, text)
            if options.check and text != current:
                stale = True
                print(f"{file} is not current: run python tools/make_readme.py", file=sys.stderr)
            elif not options.check:
                with whole(ROOT / file) as temporary:
                    temporary.write_text(current, encoding="utf-8")
        except (OSError, ValueError) as error:
            print(f"{file} cannot be written: {error}", file=sys.stderr)
            return 1
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
