"""The README and the pages of docs/: every code block is run, in the order of its page, and what it shows is compared.

Python runs in one namespace for each page, `sh` through the command's `main`, in a folder with small data. A `text`
block is what the block before it printed. A block with the name of a file is a quotation of that file. What is not run
is in `NOT_RUN`, with the reason, and at least parsed; a block that is neither run nor listed is an error, and so is a
listed one that is gone.
"""

import ast
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from box_pictures import NAMES, make_coco
from huggingface_hub import constants
from networks import random_network
from pictures import make_folders
from safetensors.torch import save_file
from shared_data import shared
from sybil.document import Document
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from test_sources import make_video
from timm.models import save_for_hf

from spd_zoo.cli.main import main, make_parser

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"docs/integrations.md": "test_integrations.py"}  # pages, and the test that runs them section by section
NOT_RUN = {  # the first line of a block, or a command: why it is not run
    "here = Path.cwd()  # of the command: relative image paths in the file start there": "needs MongoDB",
    "tracked = found.to_supervision()  # needs the package supervision": "supervision",  # a package: run where it is
    "photos/train/apple/1.png   photos/train/bicycle/1.png   ...": "shows folders, not what is printed",
    "spd-zoo finetune yolov8n_spd --no-pretrained --data BCCD --out RUN --image-size 320 --epochs 60": "takes 20 min",
    "spd-zoo convert STRIDED --out CONVERTED": "belongs to the next",
    "spd-zoo finetune local-dir:STRIDED": "takes an hour",
    "spd-zoo finetune local-dir:CONVERTED": "takes an hour",
    "spd-zoo evaluate RUN --data BCCD --split test": "belongs to those before",
    "spd-zoo finetune cifar_resnet20_pfd --no-pretrained": "takes hours",
    "spd-zoo finetune pyconvresnet50_spd --no-pretrained --data CIFAR100": "takes a night",
    "spd-zoo finetune RUN --data TINY --val-size 5000 --out RUN2": "takes a night",
    "spd-zoo export yolov8n_spd.bccd --to onnx --int8": "needs BCCD, and takes minutes",
    "spd-zoo weights pull pyconvresnet50.in1k": "needs the authors' servers",
    "spd-zoo weights import pyconvresnet50.in1k FILE": "needs the authors' file",
    "spd-zoo weights import cifar_resnet20.mine FILE": "writes into this machine's cache",
    "spd-zoo weights verify": "reads this machine's cache",
    "spd-zoo weights rm pyconvresnet50.in1k": "deletes from this machine's cache",
    "spd-zoo weights publish --org ORG MODEL.tag": "needs the Hub",
    "spd-zoo demo": "serves until Ctrl-C",
    "spd-zoo finetune yolov8n_p2 --data DIR --tile 640 --out RUN": "takes hours",
    "spd-zoo detect RUN PHOTOS --tile 640 --out FOUND": "belongs to the one before",
}
PROGRAMS = {  # other programs than spd-zoo, which are never run here
    "pip": "changes what is installed",
    "pytest": "is what runs this",
    "mkdocs": "waits for a browser",
    "python": "a tool that measures for long or writes into the checkout",
    "torchrun": "starts several processes",
    ".ci/run": "takes long",
    "tools/gpu_report.sh": "needs a GPU",
    **dict.fromkeys(("git", "cd", "hf", "twine"), "is for releases"),
    "accelerate": "starts several processes",
}


class Block(NamedTuple):
    """A code block: its page, the line it begins in, its language, the file that it quotes, and its text."""

    page: str
    line: int
    language: str
    file: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"

    def reason(self) -> str:
        """Why it is not run; empty if it is."""
        return NOT_RUN.get(self.text.partition("\n")[0], "")

    def commands(self) -> Iterator[list[str]]:
        """The words of every command."""
        for line in self.text.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    yield words


@cache
def blocks(page: str) -> list[Block]:
    info = re.compile(r'(?P<language>\w*)( title="(?P<file>[^"]*)")?\n')
    document = Document.parse(str(ROOT / page))
    for region in RawFencedCodeBlockLexer(info)(document):
        document.add(region)
    return [
        Block(page, example.line, found["language"], found["file"] or "", str(found["source"]))
        for example in document.examples()
        for found in [example.region.lexemes]
    ]


def every_block() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def is_run(words: list[str]) -> bool:
    return words[0] == "spd-zoo" and not any(shlex.join(words).startswith(command) for command in listed_commands())


@cache
def listed_commands() -> list[str]:
    return [shlex.join(shlex.split(line)) for line in NOT_RUN if line.startswith("spd-zoo ")]


def parse(words: list[str], where: str) -> None:
    """Fails unless the command's parser accepts the words after `spd-zoo`."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            make_parser("finetune" in words[:1]).parse_args(words)
    except SystemExit:
        pytest.fail(f"{where}: {shlex.join(words)}: {complaint.getvalue()}")


# What needs no data


def test_the_parsers_accept_every_command() -> None:
    for block in every_block():
        for words in block.commands() if block.language == "sh" else ():
            program, *rest = words
            if program == "spd-zoo":
                parse(rest, block.where)
                continue
            assert program in PROGRAMS, f"{block.where}: {program} is neither run nor listed"
            if "-m" in rest and "spd_zoo" in rest and "..." not in rest:  # after python -m
                parse(rest[rest.index("spd_zoo") + 1 :], block.where)
            elif program == "python" and rest[0] != "-m":
                tool = (ROOT / rest[0]).read_text()
                assert all(f'"{word}"' in tool for word in rest if word.startswith("--")), f"{block.where}: {words}"


def test_every_block_is_run_quoted_or_listed() -> None:
    for block in every_block():
        if block.language == "py" or (block.language == "text" and block.page in ELSEWHERE):
            assert block.reason(), f"{block.where} is neither run nor listed"
            ast.parse(block.text if block.language == "py" else "")
        known = ("python", "sh", "text", "py", "mermaid")
        assert block.file or block.language in known, f"{block.where} is in no known language"


def test_every_listed_block_is_on_a_page() -> None:
    first_lines = [block.text.partition("\n")[0] for block in every_block()]
    commands = [shlex.join(words) for block in every_block() if block.language == "sh" for words in block.commands()]
    for line in NOT_RUN:
        found = shlex.join(shlex.split(line)) if line.startswith("spd-zoo ") else line
        assert any(text.startswith(found) for text in [*first_lines, *commands]), line


def test_quotations_are_in_the_files_they_name() -> None:
    quotations = [block for block in every_block() if block.file]
    assert quotations
    for block in quotations:
        quoted, file = (re.sub(r"^ +", "", text, flags=re.M) for text in (block.text, (ROOT / block.file).read_text()))
        assert quoted in file, f"{block.where} is not in {block.file}"


def test_sections_that_another_test_runs_are_all_run_there() -> None:
    for page, test in ELSEWHERE.items():
        code = (ROOT / "tests" / test).read_text()
        for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]:
            title = section.partition("\n")[0]
            assert not re.search(r"^```(sh|python)$", section, re.MULTILINE) or f'run_section("{title}"' in code, title


def test_the_pages_name_commands_and_options_that_there_are() -> None:
    sources = [*(ROOT / "tools").glob("*.py"), ROOT / "docs" / "command_line.md"]
    known = set(re.findall(r"--[a-z][a-z0-9-]*", "".join(path.read_text() for path in sources)))
    others = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--multi_gpu"}
    others |= {"--num_processes", "--device", "--no-deps", "--check", "--version"}  # of launchers, pip, and ruff
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", span):
                assert option in known | others, f"{page}: {option}"
            if span.startswith("spd-zoo ") and (command := re.match(r"spd-zoo (weights )?[a-z]+", span)):
                assert f"## {command[0]}" in (ROOT / "docs" / "command_line.md").read_text(), f"{page}: {span}"


def test_the_links_of_the_readme_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / target).is_file(), target


def test_every_extra_is_explained() -> None:
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "index.md").read_text().splitlines() if line[:3] == "| `"]
    explained = [name for row in rows for name in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(explained) == sorted(metadata("spd_zoo").get_all("Provides-Extra") or ())


def test_every_recipe_is_on_a_page() -> None:
    quoted = {block.file for block in every_block()}
    for recipe in (ROOT / "spd_zoo" / "training" / "recipes").glob("*.yaml"):
        assert str(recipe.relative_to(ROOT)) in quoted


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|link rel=\"?stylesheet)[^>]*(?:src|href)=\"?(?:https?:)?//", page.read_text()
        )
        assert not loaded, f"{page} needs the network"


# Pages


def examples(here: Path) -> None:
    shutil.copytree(ROOT / "examples", here / "examples")
    (here / "path" / "to").mkdir(parents=True)
    (here / "path" / "to" / "spd_zoo").symlink_to(ROOT)
    make_folders(here / "DIR", train=2, val=1)
    shutil.copy(ROOT / "examples" / "images" / "rocket.jpg", here / "IMAGE")


def conversions(here: Path) -> None:
    examples(here)
    net = random_network("yolov8n", num_classes=len(NAMES))
    net.names, net.args = dict(enumerate(NAMES)), {"task": "detect", "imgsz": 64}
    torch.save({"model": net}, here / "best.pt")
    make_coco(here / "cells", train=8, val=2)


def tutorial(here: Path) -> None:
    make_folders(here / "photos", train=14, val=6)
    for split in (here / "photos").iterdir():
        for colour, name in (("blue", "apple"), ("green", "bicycle"), ("red", "rocket")):
            (split / colour).rename(split / name)
    make_coco(here / "cells", train=16, val=4)


def detector(here: Path) -> None:
    torch.manual_seed(0)
    config = {"pretrained_cfg": {"input_size": (3, 64, 64)}, "label_names": ["blue", "green", "red"]}
    net: Any = timm.create_model("yolov8n_spd", num_classes=3)
    for conv in net.get_classifier():
        torch.nn.init.constant_(conv.bias, 1.0)  # it finds objects everywhere
    save_for_hf(net, str(here / "run"), config, safe_serialization=True)
    shutil.copytree(ROOT / "examples" / "images", here / "photos")


def detector_and_cells(here: Path) -> None:
    detector(here)
    (here / "run" / "scores.json").write_text('{"blue": 0.4, "green": 0.3, "red": null}')
    make_video(here / "clip.mp4", 2)
    (here / "list.txt").write_text("photos/coffee.png\n")
    make_coco(here / "cells", train=2, val=1)


def deployed(here: Path) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"chs": (4, 8, 8, 8, 8), "repeats": (0, 0)}
    config = {"pretrained_cfg": {"input_size": (3, 64, 64)}, "label_names": ["blue", "green", "red"]}
    net: Any = timm.create_model("yolov8n", num_classes=3, **small)
    for conv in net.get_classifier():
        torch.nn.init.normal_(conv.bias)
    save_for_hf(net, str(here / "run"), config | {"model_args": small}, safe_serialization=True)
    shutil.copytree(ROOT / "examples" / "images", here / "photos")
    make_coco(here / "cells", train=2, val=2)


def many(here: Path) -> None:
    detector(here)
    make_folders(here / "cifar100", train=1, val=1)
    (here / "cifar100" / "val").rename(here / "cifar100" / "test")


def blood(here: Path) -> None:
    shutil.copy(shared("bccd/images/BloodImage_00007.jpg"), here)


def weights(here: Path) -> None:
    for name, file in (("cifar_resnet20", "mine"), ("resnet50", "resnet50.pyconv_in1k")):
        save_file(timm.create_model(name).state_dict(), here / f"{file}.safetensors")


PREPARE: dict[str, Callable[[Path], None]] = {
    "README.md": examples,
    "docs/choosing.md": examples,
    "docs/index.md": examples,
    "docs/convert.md": conversions,
    "docs/finetuning.md": tutorial,
    "docs/detectors.md": detector_and_cells,
    "docs/deploy.md": deployed,
    "docs/many_images.md": many,
    "docs/families/efficientnet_lite.md": examples,
    "docs/families/yolov8.md": blood,
    "docs/weights.md": weights,
}


def check_examples(here: Path) -> None:
    assert (here / "RUN" / "model.onnx").is_file()


def check_tutorial(here: Path) -> None:
    files = ("report.html", "metrics.csv", "evaluation/results.csv", "last.pt")
    for file in (*files, "model.onnx", "figures/curves.png"):
        assert (here / "run" / file).is_file()
    for file in (*files, "figures/worst.png"):
        assert (here / "found" / file).is_file()


def check_detector(here: Path) -> None:
    names = {"detections.json", *(file.name for file in (ROOT / "examples" / "images").glob("*.*"))}
    for folder in ("found", "tiles"):
        assert {file.name for file in (here / folder).iterdir()} == names
        assert json.loads((here / folder / "detections.json").read_text())["annotations"]
    assert (here / "coffee_marked.png").is_file()


def check_deployed(here: Path) -> None:
    for file in ("run/model.onnx", "run/model_int8.onnx", "found/detections.json"):
        assert (here / file).is_file()


CHECK: dict[str, Callable[[Path], None]] = {
    "docs/deploy.md": check_deployed,
    "README.md": check_examples,
    "docs/index.md": check_examples,
    "docs/convert.md": check_examples,
    "docs/finetuning.md": check_tutorial,
    "docs/detectors.md": check_detector,
}


def same(shown: str, printed: str) -> bool:
    """Whether two texts have the same words; numbers may differ as much as processors make them differ."""
    ours, theirs = (re.findall(r"\d+(?:\.\d+)?|[^\s\d]+", text) for text in (shown, printed))
    return len(ours) == len(theirs) and all(
        float(one) == pytest.approx(float(other), abs=0.05, rel=0.01)
        if one[0].isdigit() and other[0].isdigit()
        else one == other
        for one, other in zip(ours, theirs, strict=True)
    )


def run_python(block: Block, names: dict[str, Any]) -> None:
    if block.reason() and importlib.util.find_spec(block.reason()) is None:
        return
    exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), names)


def shortened(words: list[str]) -> list[str]:
    """The arguments of `spd-zoo`, with one epoch and one process where the page sets none."""
    short = [] if words[1] != "finetune" or "--epochs" in words or "--config" in words else ["--epochs", "1"]
    return words[1:] + short + (["--workers", "0"] if words[1] in ("finetune", "evaluate") else [])


def run_commands(block: Block) -> None:
    for words in block.commands():
        if is_run(words):
            arguments = [
                path
                for word in shortened(words)
                for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
            ]
            there = set(Path().iterdir())
            complaint = io.StringIO()
            with redirect_stderr(complaint):
                status = main(arguments)
            assert status == 0, f"{block.where}: {shlex.join(words)}: {complaint.getvalue()}"
            assert "--dry-run" not in words or set(Path().iterdir()) == there, f"{block.where} wrote files"


SLOW = {
    "README.md",
    *(f"docs/{page}.md" for page in ("choosing", "index", "finetuning", "convert", "detectors", "deploy")),
}  # they train


def runs(page: str) -> bool:
    return page not in ELSEWHERE and any(
        block.language == "python" or (block.language == "sh" and any(map(is_run, block.commands())))
        for block in blocks(page)
        if not block.file
    )


@pytest.mark.filterwarnings("ignore:OpenCV")  # supervision's, which does without
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else []) for page in PAGES if runs(page)]
)
def test_the_code_blocks_of_a_page_give_their_output(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page in PREPARE:
        PREPARE[page](tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))  # imported weights
    names: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for block in blocks(page):
        if block.file:
            continue
        if block.language == "text":
            assert block.reason() or same(block.text, printed), f"{block.where} shows what is not printed:\n{printed}"
            continue
        with redirect_stdout(io.StringIO()) as out:
            if block.language == "python":
                run_python(block, names)
            elif block.language == "sh":
                run_commands(block)
        printed = out.getvalue()
    if page in CHECK:
        CHECK[page](tmp_path)
