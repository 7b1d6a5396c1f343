import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import timm

from spd_zoo.weights.fit import own_networks

ROOT = Path(__file__).parent.parent
NETWORKS = set(own_networks())

# Runs without `site`, so that no editable installation is found; an ordinary one is hidden by the finder.
WITHOUT_INSTALLATION = """
import importlib.machinery, json, sys
packages, repo, hub = sys.argv[1:]

class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "spd_zoo":
            where = [folder for folder in sys.path if folder != packages]
            spec = importlib.machinery.PathFinder.find_spec(name, where)
            if spec is None:
                raise ModuleNotFoundError(name)
            return spec

sys.path.append(packages)
sys.meta_path.insert(0, Hide)
try:
    import spd_zoo
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("spd_zoo is installed")

import torch
torch.hub.set_dir(hub)
"""
EVERY_NETWORK = """
github = {"repo_or_dir": "owner/zoo:main", "trust_repo": True, "verbose": False}
names = torch.hub.list(github["repo_or_dir"], trust_repo=True, verbose=False)
helps = {name: torch.hub.help(github["repo_or_dir"], name, trust_repo=True) for name in names}
built = {}
for name in names:
    net = torch.hub.load(repo, name, source="local", pretrained=False, num_classes=7, device="meta")
    built[name] = [net.pretrained_cfg["architecture"], net.num_classes]
try:
    torch.hub.load(repo, "pyconvresnet18", source="local", pretrained=True)
except RuntimeError as error:
    refusal = str(error)
print(json.dumps([names, helps, built, refusal, sys.modules["spd_zoo"].__file__]))
"""
DEFAULT_WEIGHTS = """
net = torch.hub.load(repo, "tf_efficientnet_lite0_spd", source="local", pretrained=True)
print(json.dumps([net.num_classes, net.pretrained_cfg["label_names"][967]]))
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout where `torch.hub` keeps what it downloaded."""
    repo = tmp_path_factory.mktemp("hub") / "owner_zoo_main"
    shutil.copytree(ROOT / "spd_zoo", repo / "spd_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hubconf.py", "weights_manifest.json"):
        shutil.copy(ROOT / name, repo)
    return repo


def run(script: str, repo: Path) -> Any:
    """What the script prints, run from elsewhere and with no installed `spd_zoo`."""
    packages = sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", "-c", WITHOUT_INSTALLATION + script, packages, str(repo), str(repo.parent)]
    done = subprocess.run(command, cwd=repo.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive
def test_hub_lists_explains_and_builds_exactly_the_networks_from_the_checkout(repo: Path) -> None:
    names, helps, built, refusal, file = run(EVERY_NETWORK, repo)
    assert Path(file) == repo / "spd_zoo" / "__init__.py"
    assert sorted(names) == sorted(NETWORKS)
    assert helps == {name: timm.model_entrypoint(name).__doc__ for name in NETWORKS}
    assert built == {name: [name, 7] for name in NETWORKS}
    assert "no weights for pyconvresnet18" in refusal


@pytest.mark.slow
def test_hub_loads_the_default_weights(repo: Path) -> None:
    assert run(DEFAULT_WEIGHTS, repo) == [1000, "n07920052"]  # espresso
