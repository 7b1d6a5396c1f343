"""Publishes every checkpoint that the manifest does not pin yet on the Hub, and pins it.

    python tools/release_weights.py --org ORG [--manifest FILE] [network.tag ...]

Each is downloaded from the authors' link, checked with its network, published and pinned, as by `spd-zoo weights
publish`. After a failure run the tool again: pinned checkpoints are skipped. The exit status is 1 if a checkpoint is
missing. Checkpoints whose licence forbids publishing are only listed. Derived and replaced ones are left out, because
they have no file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spd_zoo.weights import Entry, WeightsError, entries
from spd_zoo.weights.publish import LicenseError, checkout_manifest, prepare, publish


def release(entry: Entry, org: str, manifest: Path) -> tuple[str, str]:
    """Publishes and pins one checkpoint; returns the outcome (pinned, released, refused or left) and details."""
    if entry.verified:
        return "pinned", str(entry.source)
    try:
        return "released", publish(prepare(entry, org), manifest)
    except LicenseError as error:
        return "refused", str(error)
    except WeightsError as error:
        return "left", str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="network.tag", nargs="*", help="only these (default: all)")
    parser.add_argument("--org", required=True, help="organisation or user on the Hub")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="manifest to write (default: the checkout's)")
    options = parser.parse_args(argv)
    checkpoints = {name: entry for name, entry in entries().items() if entry.tag}
    if unknown := [name for name in options.names if name not in checkpoints]:
        parser.error(f"there are no weights called {', '.join(unknown)}")
    manifest = options.manifest or checkout_manifest()
    names = options.names or [
        name for name, entry in checkpoints.items() if entry.derived_from is None and entry.replaced_by is None
    ]
    width = max(map(len, names))
    outcomes = []
    for name in names:
        outcome, details = release(checkpoints[name], options.org, manifest)
        outcomes.append(outcome)
        print(f"{name.ljust(width)}  {outcome.ljust(8)}  {details}", flush=True)
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("pinned", "released", "refused", "left")))
    return int("left" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
