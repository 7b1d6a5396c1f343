"""Publishes weights in a repository on the Hugging Face Hub, and enters its address in the manifest."""

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the Hub's client
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not marked as such
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._pytree import tree_leaves

from spd_zoo.weights.build import create
from spd_zoo.weights.cache import sha256_of
from spd_zoo.weights.card import TERMS, model_card
from spd_zoo.weights.fetch import fetch
from spd_zoo.weights.folder import CONFIG, WEIGHTS, config_of
from spd_zoo.weights.manifest import PACKAGE, Entry, WeightsError, manifest_path, schema_problem, write_manifest

__all__ = [
    "LicenseError",
    "Publication",
    "check_license",
    "checkout_manifest",
    "describe",
    "prepare",
    "publish",
]

UNSEEN = "sha256 is unknown because the bytes were never seen here; nothing about this file is verified."  # a note
NOTE = "import spd_zoo before loading this: it registers the network, which timm does not have"
FREE = (  # licences (SPDX, or with terms of their own) that permit redistribution with their notice
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "cc0-1.0",
    "cc-by-3.0",
    "cc-by-4.0",
    *TERMS,
)


class LicenseError(WeightsError):
    """Weights that may not be redistributed; the message states their licence."""


@dataclass(frozen=True)
class Publication:
    """The files to publish for an entry.

    Attributes:
        entry: The entry.
        repo: The repository, ORG/network.tag.
        file: The weights, published as model.safetensors.
        sha256: The SHA-256 of `file`.
        texts: Contents of the other files, by name.
    """

    entry: Entry
    repo: str
    file: Path
    sha256: str
    texts: dict[str, bytes]


def check_license(entry: Entry) -> None:
    """Checks that anybody may redistribute the weights.

    Raises:
        LicenseError: If not.
    """
    name, origin = (entry.license or "none").lower(), entry.origin_url or "their source"
    if name in FREE:
        return
    if name in ("none", "unknown", "noassertion"):
        why = f"{origin} gives no licence for them, so only the authors may redistribute them"
    elif re.match(r"[al]?gpl\b", name):
        why = f"{origin} has them under {name}, and this Apache-2.0 project redistributes no GPL weights"
    else:
        why = f"{origin} has them under {name}; weights are only redistributed under {', '.join(FREE)}"
    raise LicenseError(f"the weights of {entry.name} are not published: {why}")


def checkout_manifest() -> Path:
    """The manifest in use, which must be writable.

    Raises:
        WeightsError: If it is that of the installed package, where an address would be lost with the next installation.
    """
    path = manifest_path()
    if path.parent == PACKAGE:
        raise WeightsError(f"{path} is the installed package's; name that of your checkout: --manifest FILE")
    return path


def prepare(entry: Entry, org: str, file: Path | None = None, offline: bool = False) -> Publication:
    """Prepares the files that `publish` uploads, without sending anything.

    Args:
        entry: The weights.
        org: Organisation or user on the Hub.
        file: The weights under the network's own keys (default: the entry's file, fetched).
        offline: Only use files on this machine.

    Returns:
        The files.

    Raises:
        LicenseError: If they may not be redistributed.
        WeightsError: If they are derived from others, a backbone only, unavailable, do not fit the network, or give
            outputs that are not finite; or if the Hub has no such names as `org`.
    """
    if entry.derived_from is not None:
        raise WeightsError(
            f"{entry.name} has no file of its own: loading it converts {entry.derived_from}; publish that"
        )
    if entry.part is not None:
        raise WeightsError(
            f"{entry.name} is a {entry.part} only, which timm cannot load from the Hub; publish a fine-tuned network"
        )
    if file is None and str(entry.source).startswith("package:"):
        raise WeightsError(f"{entry.name} is published already, as a package: {entry.source}; publish your own file")
    check_license(entry)
    repo = f"{org}/{entry.name}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise WeightsError(
            f"the Hub allows no repository {repo!r}; give the name of an organisation or user: --org"
        ) from error
    if file is None:
        file = _fetch_offline(entry) if offline else fetch(entry)
    net, sha256 = _network(entry, file), sha256_of(file)
    card = model_card(entry, net, repo, sha256, _still_true(entry.notes))
    return Publication(entry, repo, file, sha256, {"README.md": card.encode(), CONFIG: _config(entry, net)})


def publish(publication: Publication, manifest: Path) -> str:
    """Creates the repository, uploads the files in one commit, and enters the address in a manifest.

    Steps that are already done are skipped. The address is entered only after the Hub has confirmed that it serves the
    same bytes.

    Args:
        publication: The files.
        manifest: The manifest to write.

    Returns:
        A summary of what was done.

    Raises:
        WeightsError: If the manifest cannot be written, or the Hub cannot be reached, refuses or serves other bytes.
            The next call continues with what was uploaded until then.
    """
    entry, repo = publication.entry, publication.repo
    content = _read(manifest, entry)
    token = get_token()
    if token is None:
        raise WeightsError(
            f"cannot publish {entry.name}: there is no token for the Hub. "
            "What to do: run `hf auth login`, or set HF_TOKEN, with a token that has write access"
        )
    with _explained(publication):
        commit, new = _upload(publication, HfApi(token=token))
        served = get_hf_file_metadata(hf_hub_url(repo, WEIGHTS, revision=commit), token=token)
    has, expected = (served.etag, served.size), (publication.sha256, publication.file.stat().st_size)
    if (served.commit_hash, *has) != (commit, *expected):
        raise WeightsError(
            f"{repo} at {commit} serves a {WEIGHTS} of sha256 and size {has}, not {expected}; the manifest is "
            "unchanged. What to do: look at the repository, then run the same command again"
        )
    written = write_manifest(manifest, _pinned(content, publication, commit))
    return f"{'published' if new else 'unchanged'} at {commit}, manifest {'written' if written else 'unchanged'}"


def describe(publication: Publication, manifest: Path) -> str:
    """Describes everything that `publish` would do, for a dry run.

    Args:
        publication: The files.
        manifest: The manifest that would be written.

    Returns:
        The address, licence, files, texts, and the change to the manifest.

    Raises:
        WeightsError: If the manifest cannot be written.
    """
    entry, file = publication.entry, publication.file
    before = _read(manifest, entry)
    known = re.search(rf"hf://{re.escape(publication.repo)}@([0-9a-f]+):", f"{entry.source} {entry.mirror}")
    after = _pinned(before, publication, known[1] if known else "<commit>")
    old, new = (json.dumps(content, indent=2).splitlines() for content in (before, after))
    change = "\n".join(difflib.unified_diff(old, new, str(manifest), str(manifest), lineterm=""))
    sizes = [f"{WEIGHTS}: {file.stat().st_size:,} bytes, sha256 {publication.sha256}"]
    sizes += [f"{name}: {len(text):,} bytes, git {git_hash(text)}" for name, text in publication.texts.items()]
    return "\n\n".join(
        [
            f"{entry.name} -> {constants.ENDPOINT}/{publication.repo}",
            f"licence: {entry.license}, which permits redistribution",
            "\n".join(sizes),
            *(f"===== {name}\n{text.decode()}" for name, text in publication.texts.items()),
            f"===== {manifest}\n{change or 'unchanged'}",
        ]
    )


def _fetch_offline(entry: Entry) -> Path:
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        return fetch(entry)
    except WeightsError as error:
        raise WeightsError(f"a dry run opens no connection and needs the weights on this machine: {error}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _upload(publication: Publication, api: HfApi) -> tuple[str, bool]:
    """Uploads the files unless the Hub has them; returns the commit, and whether it is new."""
    repo, texts = publication.repo, publication.texts
    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo, exist_ok=True)
    else:
        existing = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
        expected = {name: git_hash(text) for name, text in texts.items()} | {WEIGHTS: publication.sha256}
        if info.sha and expected.items() <= existing.items():
            return info.sha, False
    contents: dict[str, Path | bytes] = {WEIGHTS: publication.file, **texts}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    return api.create_commit(repo, operations, commit_message=f"Publish {publication.entry.name}").oid, True


@contextmanager
def _explained(publication: Publication) -> Iterator[None]:
    """Turns exceptions of the Hub's client into one sentence that says what to do."""
    try:
        yield
    except (HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        cause = error.__cause__ or error if type(error) is RuntimeError else error  # uploads wrap their errors in it
        org = publication.repo.partition("/")[0]
        advice = {
            401: "log in with a token that has write access: `hf auth login`, or HF_TOKEN",
            403: f"use a token with write access to {org}",
            404: f"check that the Hub has {org} and that the token has write access to it",
        }.get(getattr(getattr(cause, "response", None), "status_code", 0), "run the same command again later")
        reason = " ".join(str(cause).partition("(Request ID")[0].split())[:300].rstrip(". ")
        raise WeightsError(
            f"cannot publish {publication.entry.name} as {publication.repo} ({type(cause).__name__}: {reason}); the "
            f"manifest is unchanged. What to do: {advice}; files that the Hub already has are not uploaded again"
        ) from error


def _read(manifest: Path, entry: Entry) -> dict[str, Any]:
    """The content of `manifest`, after checking that it is valid, has the entry and is writable."""
    try:
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{manifest} cannot be read as a manifest ({error})") from error
    problem = schema_problem(content)
    if problem is not None:
        raise WeightsError(f"the manifest {manifest} {problem}. Correct it, or name another one: --manifest FILE")
    if entry.name not in content.get(entry.group, {}):
        raise WeightsError(f"{manifest} has no entry {entry.name} in {entry.group}; add it first")
    if not os.access(manifest.parent, os.W_OK):
        raise WeightsError(f"{manifest.parent} cannot be written; name another manifest: --manifest FILE")
    return content


def _pinned(content: dict[str, Any], publication: Publication, commit: str) -> dict[str, Any]:
    """The manifest's `content` with the address, size and sha256; a bundled file remains the source."""
    group, name = publication.entry.group, publication.entry.name
    fields = dict(content[group][name])
    bundled = str(fields["source"]).startswith("bundled:")
    fields["mirror" if bundled else "source"] = f"hf://{publication.repo}@{commit}:{WEIGHTS}"
    fields |= {"sha256": publication.sha256, "size": publication.file.stat().st_size}
    if "notes" in fields:
        fields["notes"] = _still_true(fields["notes"])
    return content | {group: content[group] | {name: {key: value for key, value in fields.items() if value != ""}}}


def _still_true(notes: str | None) -> str:
    """`notes` without the remark that the bytes were never seen, which publishing makes untrue."""
    return (notes or "").replace(UNSEEN, "").strip()


def _network(entry: Entry, file: Path) -> nn.Module:
    """The network with the weights of `file`, after checking that they fit and that its outputs are finite."""
    advice = f"import the weights of {entry.name} first"
    try:
        with safe_open(file, "pt") as tensors:
            keys = set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is no safetensors file ({error}); {advice}") from error
    net = create(entry, file).eval()
    if keys != net.state_dict().keys():
        raise WeightsError(f"{file} does not have the keys of {entry.network}; {advice}")
    cfg = cast("dict[str, Any]", net.pretrained_cfg)
    has, expected = (cfg["num_classes"], cfg["input_size"]), (entry.num_classes, entry.input_size)
    if has != expected:
        raise WeightsError(f"{file} has classes and image size {has}, but the entry {entry.name} has {expected}")
    with torch.inference_mode():
        outputs = net(torch.rand(1, *entry.input_size, generator=torch.Generator().manual_seed(0)))
    if not all(output.isfinite().all() for output in tree_leaves(outputs)):
        raise WeightsError(f"the outputs of {entry.network} with {file} are not finite")
    return net


def _config(entry: Entry, net: nn.Module) -> bytes:
    """The contents of `config.json`."""
    return json.dumps(config_of(net, {"label_names": entry.label_names}, note=NOTE), indent=2).encode()
