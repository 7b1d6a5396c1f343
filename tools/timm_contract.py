"""Runs timm's own tests/test_models.py, of the installed timm, against our classification networks.

    python tools/timm_contract.py [--all] [-m MARKERS] [any other option of pytest's]

Without --all only the fewest networks that together contain all layers are tested. The tests come from timm's source
distribution on the package registry and are kept in the user's cache directory. Exit status: pytest's; also 1 if a test
of one of our networks was skipped; 2 if timm's tests cannot be downloaded.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import EfficientNet
from torch import nn

from spd_zoo.models._classifier import Classifier
from spd_zoo.weights import fit

# Tests that timm runs on a fixed list of its own networks, but that apply to any: here they run on ours. The values are
# their arguments other than the network's name. test_feature_getter_stage_ends_torchscript is missing: it scripts
# forward_intermediates, which fails for timm's own ResNet, too; torch deprecates TorchScript.
ANY_NETWORK: dict[str, tuple[Any, ...]] = {
    "test_reset_classifier_keeps_pool": (),
    "test_features_only_grad_checkpointing_backward": (),
    "test_head_hidden_size": ({},),
    "test_headless_checkpoint_reload": ({},),
    "test_model_features_output_stride": (),
    "test_prune_intermediate_layers_params_used": (),
    "test_features_only_feature_cls_class": (),
    "test_forward_after_prune_intermediate_layers": (),
    "test_prune_intermediate_layers_last_feature": (True,),
    "test_prune_to_stem_feature": (),
    "test_forward_intermediates_stop_early_final_norm": ({},),
    "test_resnetv2_stem_feature_odd_size": ({},),
}

# Tests that cannot apply to some of our networks: pattern of the test's id -> reason. The other tests that are left out
# test timm's own networks or layers; their names are printed.
NOT_APPLICABLE = {
    r"test_model_features_output_stride\[(?!.*(pyconv|efficientnet)).*": (
        "only PyConvResNet and EfficientNet-Lite have dilated versions, others refuse output_stride"
    ),
    r"test_resnetv2_stem_feature_odd_size\[(cifar_|shufflenet|\w+_lowres).*": (
        "it expects a stem of stride 2, not 1 or 4"
    ),
    r"test_reset_classifier_keeps_pool\[(?!cifar_)\w+_pfd\]": "with its images the last map has one pixel",
    r"test_reset_classifier_keeps_pool\[(cifar_)?mobilenetv3_large(_stem)?\]": (
        "before training, features are smaller than its tolerance"
    ),
    r"(?!test_model_).*\[(?:\w+-)?(?:\w*parc_\w+|\w+_effdown)(?:-\w+)?\]": (
        "its images have a fixed size, but these networks only accept the size that they were created for"
    ),
}


@cache
def _on_meta(name: str) -> nn.Module:
    """A network on the "meta" device, to inspect its modules."""
    net: nn.Module = timm.create_model(name, device="meta")
    return net


@cache
def own_networks(cls: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    """The names of our networks of some classes; within an architecture from shallow to deep."""
    return [name for name in fit.own_networks() if isinstance(_on_meta(name), cls)]


def one_per_architecture(names: Sequence[str]) -> list[str]:
    """The fewest and shallowest networks of each class that together contain all its modules."""
    pairs: dict[str, set[Any]] = {}  # classes of a module and of its child
    depth: dict[str, int] = {}
    for name in names:
        modules = list(_on_meta(name).modules())
        pairs[name] = {(type(modules[0]), type(m), type(child)) for m in modules for child in m.children()}
        depth[name] = len(modules)
    chosen: list[str] = []
    while missing := set().union(*pairs.values()) - set().union(*(pairs[name] for name in chosen)):
        chosen.append(max(pairs, key=lambda name: (len(pairs[name] & missing), -depth[name])))
    return [name for name in names if name in chosen]


def get_timms_tests(cache: Path) -> Path:
    """timm's test file in `cache`, with timm's pytest configuration; downloaded if it is missing.

    Raises:
        RuntimeError: If the registry does not give timm's source distribution.
    """
    folder = cache / f"timm-{timm.__version__}"
    tests = folder / "tests" / "test_models.py"
    if tests.exists():
        return tests
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", tmp]
        done = subprocess.run([*pip, f"timm=={timm.__version__}"], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip cannot download the source distribution of timm {timm.__version__}: {done.stderr}")
        with tarfile.open(next(Path(tmp).glob("timm-*.tar.gz"))) as archive:
            for name in ("pyproject.toml", "tests/conftest.py", "tests/test_models.py"):  # the last one marks the end
                member = archive.extractfile(f"{folder.name}/{name}")
                if member is None:
                    raise RuntimeError(f"the source distribution of timm {timm.__version__} has no file {name}")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(member.read())
    return tests


class OnlyOurs:
    """A pytest plugin that runs timm's tests with our networks only."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.generic = dict(ANY_NETWORK)  # those not collected yet
        self.left_out: dict[str, set[str]] = {}  # reason -> tests
        self.skipped: list[str] = []

    def patch(self) -> None:
        """Replaces timm's lists of networks by ours, before timm's tests import them."""
        list_models = timm.list_models

        def list_ours(filter: Any = "", module: Any = "", exclude_filters: Any = "", **kwargs: Any) -> list[str]:
            names = list_models(filter, **kwargs)  # modules and exclusions of timm's would not match our networks
            return [name for name in names if name.partition(".")[0] in self.names]

        def list_our_pretrained(filter: Any = "", exclude_filters: Any = "") -> list[str]:
            return list_ours(filter, pretrained=True, include_tags=True)

        vars(timm).update(list_models=list_ours, list_pretrained=list_our_pretrained)

    def pytest_pycollect_makeitem(self, name: str, obj: Any) -> None:
        """Parametrizes the tests of ANY_NETWORK with our networks."""
        if name in self.generic:
            others = self.generic.pop(name)
            values = [(network, *others) if others else network for network in self.names]
            marks = obj.pytestmark
            for i, mark in enumerate(marks):
                if mark.name == "parametrize" and mark.args[0].startswith("model_name"):
                    marks[i] = pytest.mark.parametrize(mark.args[0], values).mark

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselects the tests of timm's own networks, and those that cannot apply to ours."""
        if self.generic:
            raise pytest.UsageError(f"timm {timm.__version__} has no tests called {', '.join(self.generic)} any more")
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if str(params.get("model_name")).partition(".")[0] in self.names:
                reasons = [why for pattern, why in NOT_APPLICABLE.items() if re.fullmatch(pattern, item.name)]
                test = item.name
            else:
                reasons, test = ["they test timm's own networks or layers"], item.name.partition("[")[0]
            for reason in reasons:
                self.left_out.setdefault(reason, set()).add(test)
            (dropped if reasons else kept).append(item)
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records skipped tests."""
        if report.skipped:
            self.skipped.append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints which tests were left out, and why."""
        terminalreporter.write_line(f"\nnetworks: {', '.join(self.names)}")
        for reason, tests in self.left_out.items():
            terminalreporter.write_line(f"left out, {reason}: {', '.join(sorted(tests))}")
        for test in self.skipped:
            terminalreporter.write_line(f"SKIPPED, which counts as a failure: {test}")


def main(argv: list[str]) -> int:
    """Runs the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="test all networks instead of one per architecture")
    args, pytest_args = parser.parse_known_args(argv)
    os.environ.pop("GITHUB_ACTIONS", None)  # timm would skip tests and networks there
    try:
        tests = get_timms_tests(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spd-zoo")
    except RuntimeError as error:
        print(f"nothing was tested: {error}", file=sys.stderr)
        return 2
    names = own_networks((Classifier, EfficientNet))
    plugin = OnlyOurs(names if args.all else one_per_architecture(names))
    plugin.patch()
    own = ["-c", str(tests.parent.parent / "pyproject.toml"), "-p", "no:cacheprovider", "--disable-warnings", "-q"]
    return int(pytest.main([str(tests), *own, *pytest_args], plugins=[plugin])) or int(bool(plugin.skipped))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
