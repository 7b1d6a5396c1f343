"""The package on other systems than Linux: features of POSIX and Linux are hidden, and the commands still work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from box_pictures import make_coco
from pictures import make_folders

from spd_zoo.files import whole

ROOT = Path(__file__).parent.parent

# Python runs sitecustomize at every start, so that the processes which read images lack the same
WITHOUT_POSIX = """
import builtins, errno, multiprocessing, os, pathlib, signal, sys

for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
multiprocessing.set_start_method("spawn")

POSIX = {
    "signal": "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm setitimer",
    "os": "chown fchmod fchown fork forkpty fwalk getgid geteuid getloadavg getpgid getuid kill killpg link lchown "
    "mkfifo nice pread pwrite sched_getaffinity sched_setaffinity setsid statvfs sync sysconf uname O_DIRECTORY "
    "O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_SYNC",
}


class Hiding(type(os)):  # from the package alone: torch and Python go by sys.platform, and need what Linux has
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("spd_zoo") and name in POSIX[super().__getattribute__("__name__")].split():
            raise AttributeError(f"this system has no {name}")
        return found


signal.__class__ = os.__class__ = Hiding


def symlink(*_, **__):
    raise OSError(errno.EPERM, "A required privilege is not held by the client")


def replace(source, target, replaced=os.replace):
    if os.path.isdir(target):
        raise PermissionError(errno.EACCES, "Access is denied", str(target))
    replaced(source, target)


def hides_proc(function):
    def call(path, *arguments, **options):
        if isinstance(path, (str, pathlib.Path)) and str(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return function(path, *arguments, **options)

    return call


os.symlink, os.replace = symlink, replace
os.stat, builtins.open = hides_proc(os.stat), hides_proc(open)
import io
io.open = builtins.open
accessor = getattr(pathlib, "_NormalAccessor", None)  # of Python 3.10, which has taken these functions already
if accessor is not None:
    for name, function in {"stat": os.stat, "open": io.open, "replace": replace, "symlink": symlink}.items():
        setattr(accessor, name, staticmethod(function))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process on such a system."""
    folder = tmp_path_factory.mktemp("system")
    (folder / "sitecustomize.py").write_text(WITHOUT_POSIX)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "spd_zoo", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stand_in_hides_what_it_should(elsewhere: dict[str, str]) -> None:
    code = (
        "import multiprocessing, os, signal; from pathlib import Path\n"
        "__name__ = 'spd_zoo.somewhere'\n"
        "assert not any(hasattr(os, name) for name in ('fork', 'getuid', 'sched_getaffinity', 'O_DIRECTORY'))\n"
        "assert not hasattr(signal, 'SIGCHLD') and multiprocessing.get_start_method() == 'spawn'\n"
        "assert not Path('/proc/meminfo').exists()\n"
        "try:\n    import fcntl\n"
        "except ImportError:\n    print('hidden')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=elsewhere, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("hidden\n", "")


@pytest.mark.slow
def test_import_and_list_work(elsewhere: dict[str, str]) -> None:
    assert "resnet50_spd" in run(elsewhere, "list", "resnet50*")
    done = subprocess.run([sys.executable, "-c", "import spd_zoo"], env=elsewhere, check=False)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_a_network_is_trained_evaluated_and_used(elsewhere: dict[str, str], tmp_path: Path, workers: str) -> None:
    data, out = make_folders(tmp_path / "data", train=4, val=2), tmp_path / "run"
    one_step = ("--epochs", "1", "--batch-size", "12", "--image-size", "16", "--no-pretrained")
    read = ("--data", str(data), "--workers", workers)
    said = run(elsewhere, "finetune", "cifar_resnet20", "--out", str(out), *read, *one_step)
    assert "the free memory of cpu is not known" in said
    assert (out / "model.safetensors").is_file() and (out / "last.pt").is_file()
    assert run(elsewhere, "finetune", "cifar_resnet20", "--out", str(out), *read, *one_step)  # resumes
    assert "6 images of val" in run(elsewhere, "evaluate", str(out), *read)
    image = str(data / "val" / "red" / "0.png")
    assert "%" in run(elsewhere, "predict", str(out), image)
    results = tmp_path / "results.jsonl"
    run(elsewhere, "predict", str(out), str(data / "val"), "--results", str(results), "--workers", workers)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == 6 and all(row["error"] is None for row in rows)


@pytest.mark.exhaustive
def test_a_detector_is_trained_and_used(elsewhere: dict[str, str], tmp_path: Path) -> None:
    data, out = make_coco(tmp_path / "data", train=4, val=2), tmp_path / "run"
    one_step = ("--epochs", "1", "--batch-size", "4", "--image-size", "64", "--no-pretrained", "--workers", "1")
    run(elsewhere, "finetune", "yolov8n_spd", "--data", str(data), "--out", str(out), *one_step)
    marked = tmp_path / "marked"
    marked.mkdir()
    run(elsewhere, "detect", str(out), str(data / "images"), "--out", str(marked))
    assert len(json.loads((marked / "detections.json").read_text())["images"]) == 6


def test_a_folder_replaces_an_empty_one_where_that_needs_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def as_on_windows(source: str | Path, target: str | Path) -> None:
        if Path(target).is_dir():
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", as_on_windows)
    (tmp_path / "out").mkdir()
    with whole(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    with pytest.raises(OSError, match="out"), whole(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert (tmp_path / "out" / "file").read_text() == "new"  # it was not empty
