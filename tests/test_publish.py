import copy
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import jsonschema
import pytest
import release_weights
import timm
import torch
from drive_double import drive_double
from hub_double import COMMIT, TOKEN, HubDouble, Response, fails, hub_double
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file
from timm.models import _registry
from torch import nn

import spd_zoo
from spd_zoo.cli.main import main
from spd_zoo.weights import Entry, WeightsError, default_cfgs, entries, find_entry, manifest, publish, sha256_of
from spd_zoo.weights.card import model_card
from spd_zoo.weights.manifest import manifest_path, write_manifest

# huggingface_hub's plain LFS upload calls httpx in a way that httpx has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PACKAGE = Path(spd_zoo.__file__).parent
MANIFEST = json.loads(manifest_path().read_text(encoding="utf-8"))
SCHEMA = json.loads((PACKAGE / "weights" / "manifest.schema.json").read_text(encoding="utf-8"))
NAME, NETWORK, GROUP = "cifar_resnet20.made_up", "cifar_resnet20", "bsconv_resnet"
REPO = f"org/{NAME}"
COMMAND = ["weights", "publish", "--org", "org", NAME]
FAMILIES = {group: next(iter(members)) for group, members in MANIFEST.items() if group != "timm"}
METRIC = {"dataset": "CIFAR-100 test", "metric": "top1", "value": 12.5, "input_size": 32, "measured_by": "us"}
FACTS = {
    "source": f"hf://authors/original@{COMMIT}:weights.safetensors",
    "license": "mit",
    "origin_url": "https://example.org/original",
    "dataset": "CIFAR-100",
    "class_names": [f"class {i}" for i in range(100)],
    "recipe": {"epochs": 200, "mixup": None},
    "metrics": [METRIC, METRIC | {"metric": "top5", "value": 50.25, "measured_by": "authors"}],
}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """A Hub without repositories, where this process is logged in; nobody waits before asking again."""
    with hub_double() as server, server.replace(monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))  # none that is imported here
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def forget_the_manifest() -> None:
    manifest._own.cache_clear()
    entries.cache_clear()


class Checkout:
    """A folder with a manifest of its own, and in it made-up weights of the smallest network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, hub: HubDouble) -> None:
        self.path = folder / "weights_manifest.json"
        self.monkeypatch = monkeypatch
        torch.manual_seed(0)
        self.net = timm.create_model(NETWORK).eval()
        self.file = folder / "weights.safetensors"
        save_file(self.net.state_dict(), self.file)
        hub.files["authors/original/weights.safetensors"] = self.file.read_bytes()
        monkeypatch.setattr(manifest, "PACKAGE", folder / "spd_zoo")
        self.enter()

    def enter(self, **facts: Any) -> Entry:
        """Writes the manifest with `facts`, and makes the process read it."""
        content = copy.deepcopy(MANIFEST)
        size = {"sha256": sha256_of(self.file), "size": self.file.stat().st_size}
        content[GROUP][NAME] = content[GROUP][NETWORK] | FACTS | size | facts
        self.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return self.read()

    def read(self) -> Entry:
        forget_the_manifest()
        cfg = default_cfgs(GROUP, classifier="head.fc")[NETWORK].cfgs["made_up"]
        cfg = dataclasses.replace(cfg, architecture=NETWORK, tag="made_up")
        self.monkeypatch.setitem(_registry._model_pretrained_cfgs, NAME, cfg)
        entry = find_entry(NAME)
        assert entry is not None
        return entry

    @property
    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))[GROUP][NAME]
        return found


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubDouble) -> Iterator[Checkout]:
    yield Checkout(tmp_path, monkeypatch, hub)
    forget_the_manifest()


def writes(hub: HubDouble) -> list[str]:
    return [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]


def error_of(capsys: Capture, *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert main(list(arguments) or COMMAND) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("spd-zoo: error: ")]
    assert out == "" and len(lines) == 1
    return lines[0]


# From the command to the network


@pytest.mark.slow
def test_publishing_uploads_in_one_commit_and_pins_it(hub: HubDouble, checkout: Checkout, capsys: Capture) -> None:
    before = checkout.path.read_text()
    assert main(COMMAND) == 0
    (_, (commit, files)) = hub.repos[REPO]
    assert capsys.readouterr().out == f"{NAME}: published at {commit}, manifest written\n"
    assert files.keys() == {".gitattributes", "model.safetensors", "config.json", "README.md"}
    assert files["model.safetensors"] == checkout.file.read_bytes()
    after = json.loads(checkout.path.read_text())
    jsonschema.validate(after, SCHEMA)
    pinned = {"source": f"hf://{REPO}@{commit}:model.safetensors", "size": checkout.file.stat().st_size}
    assert checkout.fields == json.loads(before)[GROUP][NAME] | pinned
    changed = [line for line in checkout.path.read_text().splitlines() if line not in before.splitlines()]
    assert changed == [f'      "source": "{pinned["source"]}",']
    assert list(checkout.path.parent.glob("*.tmp")) == []


LOAD = """
import json, sys, timm, torch, spd_zoo
image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
for name in sys.argv[1:]:
    net = timm.create_model(name, pretrained=True).eval()
    cfg = net.pretrained_cfg
    print(json.dumps([cfg["input_size"], cfg["label_names"], net(image)[0].tolist()]))
"""


@pytest.mark.slow
def test_what_is_published_loads_by_hf_hub_and_by_its_tag(hub: HubDouble, checkout: Checkout, tmp_path: Path) -> None:
    assert main(COMMAND) == 0
    hub.requests.clear()
    del hub.files["authors/original/weights.safetensors"]
    added = {"PYTHONPATH": str(PACKAGE.parent), "HF_HOME": str(tmp_path / "hf"), "SPD_ZOO_MANIFEST": str(checkout.path)}
    environment = hub.environment | added
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", LOAD, NAME, f"hf-hub:{REPO}"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        logits = checkout.net(torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))[0]
    for line in done.stdout.splitlines():
        size, names, found = json.loads(line)
        assert (size, names) == ([3, 32, 32], FACTS["class_names"])
        torch.testing.assert_close(torch.tensor(found), logits)
    assert len(done.stdout.splitlines()) == 2
    commit = hub.repos[REPO][-1][0]
    for revision in (commit, "main"):
        assert f"HEAD /{REPO}/resolve/{revision}/model.safetensors" in hub.requests


def test_a_second_run_changes_nothing(hub: HubDouble, checkout: Checkout, capsys: Capture) -> None:
    assert main(COMMAND) == 0
    history, text, stat = copy.deepcopy(hub.repos), checkout.path.read_text(), checkout.path.stat()
    checkout.read()
    hub.requests.clear()
    capsys.readouterr()
    assert main(COMMAND) == 0
    assert capsys.readouterr().out == f"{NAME}: unchanged at {history[REPO][-1][0]}, manifest unchanged\n"
    assert (hub.repos, checkout.path.read_text(), checkout.path.stat().st_ino) == (history, text, stat.st_ino)
    assert writes(hub) == []


@pytest.mark.slow
def test_what_has_changed_is_committed_and_pinned_again(hub: HubDouble, checkout: Checkout) -> None:
    assert main(COMMAND) == 0
    checkout.enter(metrics=[METRIC])
    assert main(COMMAND) == 0
    first, second = hub.repos[REPO][1:]
    assert first[1]["model.safetensors"] == second[1]["model.safetensors"]
    assert first[1]["README.md"] != second[1]["README.md"]
    assert second[0] in checkout.fields["source"]
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1


def test_several_weights_are_published_and_the_refused_are_named(
    hub: HubDouble, checkout: Checkout, capsys: Capture
) -> None:
    names = ["pyconvresnet50", "resnet50_spd.nonsense", NAME]
    assert main(["weights", "publish", "--org", "org", *names]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{NAME}: published")
    assert [line.partition(";")[0] for line in err.splitlines() if "error" in line] == [
        f"spd-zoo: error: there are no weights called {name}" for name in names[:2]
    ]


@pytest.mark.slow
def test_weights_of_the_package_stay_there_and_get_a_mirror(hub: HubDouble, checkout: Checkout) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["spd_zoo.weights.cache"], "BUNDLED", checkout.file.parent)
        checkout.enter(source=f"bundled:{checkout.file.name}")
        for _ in range(2):
            assert main(COMMAND) == 0
            checkout.read()
    assert checkout.fields["source"] == f"bundled:{checkout.file.name}"
    assert checkout.fields["mirror"] == f"hf://{REPO}@{hub.repos[REPO][-1][0]}:model.safetensors"
    assert len(hub.repos[REPO]) == 2
    jsonschema.validate(json.loads(checkout.path.read_text()), SCHEMA)


@pytest.mark.slow
def test_a_note_that_publishing_makes_untrue_is_removed(hub: HubDouble, checkout: Checkout) -> None:
    for notes, left in (
        (publish.UNSEEN, None),
        (f"File a.pth of that folder. {publish.UNSEEN}", "File a.pth of that folder."),
    ):
        checkout.enter(notes=notes)
        assert main(COMMAND) == 0
        assert checkout.fields.get("notes") == left
        assert publish.UNSEEN not in hub.repos[REPO][-1][1]["README.md"].decode()


def test_the_manifest_notes_every_file_that_was_never_seen() -> None:
    checkpoints = [fields for members in MANIFEST.values() for fields in members.values() if "sha256" in fields]
    assert checkpoints
    unseen = [fields for fields in checkpoints if fields["sha256"] is None and "replaced_by" not in fields]
    assert unseen and all(publish.UNSEEN in fields["notes"] for fields in unseen)


# Failures


ROUTES = {
    "look": f"GET /api/models/{REPO}.*",
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": f"POST /api/models/{REPO}/preupload/main",
    "batch": rf"POST /{REPO}\.git/info/lfs/objects/batch",
    "upload": "PUT /lfs/.*",
    "verify": rf"POST /{REPO}\.git/info/lfs/verify",
    "commit": f"POST /api/models/{REPO}/commit/main",
    "check": f"HEAD /{REPO}/resolve/.*",
}
RETRIED = ("preupload", "batch", "upload", "verify")  # by the Hub's client


@pytest.mark.slow
@pytest.mark.parametrize(("status", "late"), [(403, False), (None, False), (None, True)], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_after_a_failure_the_next_run_does_the_rest(
    hub: HubDouble, checkout: Checkout, capsys: Capture, route: str, status: int | None, late: bool
) -> None:
    """The Hub refuses, the connection breaks, or it breaks after the Hub did what was asked."""
    before = checkout.path.read_bytes()
    hub.faults.append(fails(ROUTES[route], status, None, late))
    error = error_of(capsys)
    assert f"cannot publish {NAME} as {REPO} (" in error and "What to do: " in error
    assert checkout.path.read_bytes() == before
    hub.faults.clear()
    there = len(hub.repos.get(REPO, ())) == 2
    assert there == (route == "check" or (route == "commit" and late))
    uploaded = len(hub.objects)
    hub.requests.clear()
    assert main(COMMAND) == 0
    assert f": {'unchanged' if there else 'published'} at " in capsys.readouterr().out
    assert len(hub.repos[REPO]) == 2
    assert checkout.fields["source"] == f"hf://{REPO}@{hub.repos[REPO][1][0]}:model.safetensors"
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1 - uploaded


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503, None], ids=str)
@pytest.mark.parametrize("route", RETRIED)
def test_temporary_errors_do_not_stop_an_upload(
    hub: HubDouble, checkout: Checkout, route: str, status: int | None
) -> None:
    fault = fails(ROUTES[route], status, times=2)
    if status == 429:
        fault = fails(ROUTES[route], status, times=2, Retry_After="1")
    hub.faults.append(fault)
    assert main(COMMAND) == 0
    assert len(hub.repos[REPO]) == 2


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "hf auth login"), (403, "a token with write access to org"), (404, "the Hub has org"), (503, "again later")],
)
def test_an_error_says_what_to_do(
    hub: HubDouble, checkout: Checkout, capsys: Capture, status: int, advice: str
) -> None:
    hub.faults.append(fails(ROUTES["create"], status))
    error = error_of(capsys)
    assert str(status) in error and advice in error
    assert hub.repos == {}


@pytest.mark.parametrize("problem", ["no token", "wrong token", "no network", "offline"])
def test_without_a_token_or_a_network_nothing_happens(
    hub: HubDouble, checkout: Checkout, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: str
) -> None:
    before = checkout.path.read_bytes()
    entry = find_entry(NAME)
    assert entry is not None
    file = publish.prepare(entry, "org").file  # now in the cache
    if problem == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    elif problem == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    elif problem == "no network":
        hub.shutdown()
        hub.server_close()
        huggingface_hub.close_session()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
    expected = {
        "no token": "there is no token",
        "wrong token": "401",
        "no network": "refused",
        "offline": "OfflineMode",
    }
    assert expected[problem] in error_of(capsys)
    assert (hub.repos, checkout.path.read_bytes(), file.is_file()) == ({}, before, True)


@pytest.mark.parametrize("header", ["ETag", "Content-Length", "X-Repo-Commit"])
def test_a_hub_that_serves_something_else_is_not_pinned(
    hub: HubDouble, checkout: Checkout, capsys: Capture, header: str
) -> None:
    def another(request: Any, answer: Any) -> Response:
        response: Response = answer()
        if request.command == "HEAD" and request.path.startswith(f"/{REPO}/"):
            response.headers[header] = {"ETag": f'"{"0" * 64}"', "Content-Length": "7", "X-Repo-Commit": COMMIT}[header]
        return response

    before = checkout.path.read_bytes()
    hub.faults.append(another)
    assert "serves a model.safetensors of sha256 and size" in error_of(capsys)
    assert checkout.path.read_bytes() == before


# What is refused


@pytest.mark.parametrize(
    ("license", "reason"),
    [
        ("gpl-3.0", "has them under gpl-3.0, and this Apache-2.0 project redistributes no GPL weights"),
        ("AGPL-3.0-only", "redistributes no GPL weights"),
        ("none", "https://example.org/original gives no licence for them, so only the authors"),
        (None, "gives no licence"),
        ("unknown", "gives no licence"),
        ("cc-by-nc-4.0", "under cc-by-nc-4.0; weights are only redistributed under apache-2.0, mit,"),
    ],
)
def test_weights_that_may_not_be_redistributed_are_refused_before_any_request(
    hub: HubDouble, checkout: Checkout, capsys: Capture, license: str | None, reason: str
) -> None:
    checkout.enter(license=license)
    error = error_of(capsys)
    assert error.startswith(f"spd-zoo: error: the weights of {NAME} are not published: ") and reason in error
    assert hub.requests == []


@pytest.mark.parametrize("license", publish.FREE)
def test_weights_that_may_be_redistributed_are_published_under_their_licence(checkout: Checkout, license: str) -> None:
    entry = checkout.enter(license=license.upper())
    publication = publish.prepare(entry, "org", checkout.file)
    card: Any = ModelCard(publication.texts["README.md"].decode())
    assert license in (card.data.license, card.data.get("license_name"))


def test_weights_trained_on_imagenet_are_published_with_its_terms(checkout: Checkout) -> None:
    entry = checkout.enter(license="imagenet-research")
    text = publish.prepare(entry, "org", checkout.file).texts["README.md"].decode()
    data: Any = ModelCard(text).data
    assert (data.license, data.license_name) == ("other", "imagenet-research")
    assert data.license_link == "https://www.image-net.org/download" and "non-commercial research" in text


def original(net: nn.Module, path: Path) -> Path:
    torch.save(net.state_dict(), path)
    return path


def changed(net: nn.Module, path: Path, **tensors: torch.Tensor) -> Path:
    save_file(dict(net.state_dict()) | tensors, path)
    return path


def test_weights_that_are_not_the_networks_are_refused(hub: HubDouble, checkout: Checkout, tmp_path: Path) -> None:
    net, entry = checkout.net, checkout.enter(sha256=None, notes=publish.UNSEEN)
    authors = {f"module.{key}": tensor for key, tensor in net.state_dict().items()}
    save_file(authors, tmp_path / "authors.safetensors")
    nan = torch.full_like(net.get_parameter("head.fc.bias"), float("nan")).detach()
    large = torch.full_like(net.get_parameter("head.fc.weight"), 3e38).detach()
    classes = {"head.fc.weight": torch.zeros(7, 64), "head.fc.bias": torch.zeros(7)}
    files = {
        r"no safetensors file .* import the weights of cifar_resnet20\.made_up first": original(
            net, tmp_path / "a.pth"
        ),
        "does not exist|No such file": tmp_path / "missing.safetensors",
        "does not have the keys of cifar_resnet20; import the weights": tmp_path / "authors.safetensors",
        "holds a number that is not finite": changed(net, tmp_path / "c.safetensors", **{"head.fc.bias": nan}),
        "the outputs .* are not finite": changed(net, tmp_path / "e.safetensors", **{"head.fc.weight": large}),
        "has classes and image": changed(net, tmp_path / "d.safetensors", **classes),
    }
    for reason, file in files.items():
        with pytest.raises(WeightsError, match=reason):
            publish.prepare(entry, "org", file)
    assert writes(hub) == []


@pytest.mark.slow
def test_a_manifest_that_cannot_take_the_address_is_refused_before_anything_is_sent(
    hub: HubDouble, checkout: Checkout, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.json"
    invalid = {
        "{": "cannot be read as a manifest",
        "[]": f"the manifest {other} is invalid at top level: [] is not of type 'object'. Correct it, or name another",
        '{"bsconv_resnet": 3}': "is invalid at bsconv_resnet",
        json.dumps({GROUP: {NAME: {}}}): f"is invalid at {GROUP}/{NAME}",
        json.dumps({GROUP: {NAME: "x"}}): f"is invalid at {GROUP}/{NAME}",
        "{}": f"has no entry {NAME}",
    }
    for text, reason in invalid.items():
        other.write_text(text)
        assert reason in error_of(capsys, *COMMAND, "--manifest", str(other))
    assert "No such file" in error_of(capsys, *COMMAND, "--manifest", str(tmp_path / "missing.json"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert "cannot be written" in error_of(capsys)
    monkeypatch.setattr(publish, "PACKAGE", checkout.path.parent)
    assert "is the installed package's; name that of your checkout: --manifest FILE" in error_of(capsys)
    assert writes(hub) == []
    shutil.copy(checkout.path, other)
    assert main([*COMMAND, "--manifest", str(other)]) == 0
    assert REPO in other.read_text() and REPO not in checkout.path.read_text()


@pytest.mark.parametrize("org", ["a/b", "", "a b", "../x"])
def test_an_organisation_that_the_hub_cannot_have_is_refused(
    hub: HubDouble, checkout: Checkout, capsys: Capture, org: str
) -> None:
    text = f"the Hub allows no repository '{org}/{NAME}'; give the name of an organisation or user: --org"
    assert text in error_of(capsys, "weights", "publish", "--org", org, NAME, "--dry-run")
    assert hub.requests == []


def test_writing_an_unchanged_manifest_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights_manifest.json"
    shutil.copy(manifest_path(), path)
    assert not write_manifest(path, MANIFEST)
    path.unlink()
    assert write_manifest(path, MANIFEST)
    assert path.read_bytes() == manifest_path().read_bytes()


# Dry runs


@pytest.mark.slow
def test_a_dry_run_shows_all_and_opens_no_connection(
    hub: HubDouble, checkout: Checkout, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, before = checkout.enter(), checkout.path.read_bytes()
    publication = publish.prepare(entry, "org")  # the weights are now in the cache
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")

    def refuse(*args: object) -> None:
        raise AssertionError("a dry run opened a socket")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        assert main([*COMMAND, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert (hub.requests, checkout.path.read_bytes()) == ([], before)
    assert f"{NAME} -> {hub.url}/{REPO}" in shown and "licence: mit" in shown
    assert f"model.safetensors: {publication.file.stat().st_size:,} bytes, sha256 {publication.sha256}" in shown
    assert all(text.decode() in shown for text in publication.texts.values())
    assert f'+      "source": "hf://{REPO}@<commit>:model.safetensors",' in shown
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(COMMAND) == 0
    committed = hub.repos[REPO][-1][1]
    assert all(committed[name] == text for name, text in publication.texts.items())
    checkout.read()
    assert main([*COMMAND, "--dry-run"]) == 1  # the pinned file was never loaded here
    huggingface_hub.hf_hub_download(REPO, "model.safetensors", revision=hub.repos[REPO][-1][0])
    capsys.readouterr()
    assert main([*COMMAND, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(f"{checkout.path}\nunchanged\n")


def test_a_dry_run_needs_the_weights_here_and_leaves_the_process_online(
    hub: HubDouble, checkout: Checkout, capsys: Capture
) -> None:
    error = error_of(capsys, *COMMAND, "--dry-run")
    assert "a dry run opens no connection and needs the weights on this machine" in error
    assert hub.requests == []
    assert main(COMMAND) == 0


# The files beside the weights


def made(group: str, **facts: Any) -> tuple[Entry, nn.Module]:
    """An entry of a family's first network, as if it were published, and the network."""
    fields = MANIFEST[group][FAMILIES[group]] | FACTS | {"sha256": "0" * 64} | facts
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Entry(f"{FAMILIES[group]}.made_up", group, **fields), timm.create_model(FAMILIES[group])


def card_of(entry: Entry, net: nn.Module, notes: str = "") -> ModelCard:
    return ModelCard(model_card(entry, net, f"org/{entry.name}", "0" * 64, notes))


@pytest.mark.parametrize("group", FAMILIES)
def test_a_model_card_names_the_papers_and_describes_the_network(group: str) -> None:
    entry, net = made(group)
    text = card_of(entry, net).text
    citation = text[text.index("## Citation") :]
    assert re.search(r"(arxiv\.org/abs/|BMVC 2019)", citation)
    assert "Original code: https://github.com/" in citation or "Written from a verbal specification" in citation
    assert "@software{spd_zoo" in citation
    assert " ".join((sys.modules[type(net).__module__].__doc__ or "").split("\n\n")[0].split()) in " ".join(
        text.split()
    )
    assert f"{entry.num_classes} classes" in text


def test_a_model_card_has_metrics_their_source_usage_and_limits() -> None:
    entry, net = made(GROUP)
    card = card_of(entry, net, "Ran on one core.")
    data: dict[str, Any] = card.data.to_dict()
    assert (data["license"], data["library_name"], data["datasets"]) == ("mit", "timm", ["cifar-100"])
    (index,) = data["model-index"]
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert [metric["value"] for metric in metrics] == [12.5, 50.25]
    assert "measured by the authors of spd_zoo" in metrics[0]["name"]
    assert "reported by the authors, not verified" in metrics[1]["name"]
    for part in (
        "| CIFAR-100 test | top-1 | 12.5 | 32 | measured by the authors of spd_zoo |",
        "| CIFAR-100 test | top-5 | 50.25 | 32 | reported by the authors, not verified |",
        "`import spd_zoo` first",
        f'timm.create_model("hf-hub:org/{entry.name}", pretrained=True)',
        f'AutoModelForImageClassification.from_pretrained("org/{entry.name}")',
        f'torch.hub.load("path/to/spd_zoo", "{entry.network}"',
        "- epochs: 200",
        "mit, the licence of https://example.org/original",
        "Ran on one core.",
        "0" * 64,
    ):
        assert part in card.text
    assert "mixup" not in card.text


@pytest.mark.parametrize("name", [NETWORK, "cifar_parc_mobilenetv2"])
def test_timm_and_transformers_create_the_network_from_the_configuration(name: str, tmp_path: Path) -> None:
    """transformers calls `timm.create_model(architecture, num_classes=num_labels, **model_args)`."""
    group = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    entry = dataclasses.replace(made(group)[0], name=name, class_names=tuple(map(str, range(100))))
    net: Any = timm.create_model(name)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = json.loads(publish.prepare(entry, "org", tmp_path / "model.safetensors").texts["config.json"])
    assert "import spd_zoo" in config["note"]
    assert config["label_names"] == list(map(str, range(100)))
    made_again = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    made_again.load_state_dict(net.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_timm: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(by_timm.get_classifier().weight, net.get_classifier().weight)
    assert by_timm.pretrained_cfg["input_size"] == net.pretrained_cfg["input_size"]


@pytest.mark.slow
def test_the_repository_has_no_path_of_this_machine(hub: HubDouble, checkout: Checkout) -> None:
    assert main(COMMAND) == 0
    for name in ("README.md", "config.json"):
        text = hub.repos[REPO][-1][1][name].decode()
        assert str(checkout.path.parent) not in text
        assert not re.search(r"(?<![\w.:/-])/(root|home|tmp|usr|opt)/", text)


# All at once


def test_a_release_pins_what_is_not_pinned_and_leaves_it_the_next_time(
    hub: HubDouble, checkout: Checkout, capsys: Capture
) -> None:
    checkout.enter(sha256=None, size=None, notes=publish.UNSEEN)
    with pytest.warns(UserWarning, match="not verified"):
        assert release_weights.main(["--org", "org", NAME]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 pinned, 1 released, 0 refused, 0 left"
    jsonschema.validate(json.loads(checkout.path.read_text()), SCHEMA)
    assert (checkout.fields["sha256"], "notes" in checkout.fields) == (sha256_of(checkout.file), False)
    assert checkout.read().verified
    hub.requests.clear()
    assert release_weights.main(["--org", "org", NAME]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 pinned, 0 released, 0 refused, 0 left"
    assert hub.requests == []


@pytest.mark.slow
def test_a_release_goes_from_the_authors_link_to_a_pinned_manifest(
    hub: HubDouble, checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Their file is a pickle on Google Drive, with names of its own; what is pinned is ours, and loads."""
    link = f"https://drive.google.com/uc?export=download&id={'1' * 30}"
    checkout.enter(source=None, sha256=None, size=None, original_link=link, notes=publish.UNSEEN)
    with drive_double(monkeypatch) as drive:
        theirs = io.BytesIO()
        torch.save({"state_dict": {f"module.{k}": v for k, v in checkout.net.state_dict().items()}}, theirs)
        drive.files["1" * 30] = theirs.getvalue()
        with pytest.warns(UserWarning, match="no sha256 is known for the file"):
            assert release_weights.main(["--org", "org", NAME]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 pinned, 1 released, 0 refused, 0 left"
    fields = checkout.fields
    jsonschema.validate(json.loads(checkout.path.read_text()), SCHEMA)
    assert fields["source"].startswith(f"hf://{REPO}@")
    assert fields["sha256"] == sha256(hub.repos[REPO][-1][1]["model.safetensors"]).hexdigest()
    shutil.rmtree(tmp_path / "assets")
    checkout.read()
    net = timm.create_model(NAME, pretrained=True)
    for key, tensor in checkout.net.state_dict().items():
        assert torch.equal(net.state_dict()[key], tensor)


def test_a_release_lists_every_checkpoint_and_fails_while_one_is_left(
    hub: HubDouble, checkout: Checkout, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the authors' files cannot be had; and the made-up weights may not be passed on."""
    checkout.enter(sha256=None, notes=publish.UNSEEN, license="gpl-3.0")
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert release_weights.main(["--org", "org"]) == 1
    *lines, total = capsys.readouterr().out.splitlines()
    outcomes = {line.split()[0]: line.split()[1] for line in lines}
    own = {name for name, entry in entries().items() if entry.tag and not entry.derived_from}
    assert outcomes.keys() == {name for name in own if entries()[name].replaced_by is None}
    assert outcomes[NAME] == "refused"
    assert {name for name, outcome in outcomes.items() if outcome == "pinned"} == {
        name for name, entry in entries().items() if entry.verified
    }
    assert set(outcomes.values()) == {"pinned", "refused", "left"}
    refused = {name for name, entry in entries().items() if entry.tag and entry.license not in publish.FREE}
    assert {name for name, outcome in outcomes.items() if outcome == "refused"} == refused
    assert total.endswith(f"{len(refused)} refused, {list(outcomes.values()).count('left')} left")
    assert release_weights.main(["--org", "org", NAME]) == 0
    assert hub.requests == []
