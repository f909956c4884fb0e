"""What `pip` makes of the project: the real one, built from a copy, without network."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ss_detectron

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
FOLDERS = ("ss_detectron", "configs")


def copy_project(copy: Path) -> Path:
    """Copy what the distribution is made of, as building leaves files in its source folder."""
    for name in PARTS:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build_wheel(source: Path, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *options, str(source)], check=True)
    return next(folder.glob("ss_detectron-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The contents of the wheel, by name."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    path = build_wheel(project, tmp_path_factory.mktemp("wheel"))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_bytes(
        next(data for name, data in wheel.items() if name.endswith(".dist-info/METADATA"))
    )


@pytest.fixture(scope="module")
def requirements(metadata):
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def test_wheel_has_the_code_and_the_configs_and_nothing_else(wheel):
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ss_detectron").rglob("*.py")}
    configs = {
        f"ss_detectron/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert any("/configs/quick/" in name for name in configs)
    assert {name for name in wheel if ".dist-info/" not in name} == {
        *code,
        *configs,
        "ss_detectron/py.typed",
    }


def test_metadata(wheel, metadata):
    assert metadata["Name"] == "ss_detectron"
    assert metadata["Version"] == ss_detectron.__version__
    (licence,) = [data for name, data in wheel.items() if name.endswith("/LICENSE")]
    assert licence == (ROOT / "LICENSE").read_bytes() and b"Apache License" in licence


def test_source_distribution_gives_the_same_wheel(wheel, tmp_path):
    (tmp_path / "project").mkdir()
    project = copy_project(tmp_path / "project")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=project, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("ss_detectron-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.glob("ss_detectron-*") if path.is_dir())
    with zipfile.ZipFile(build_wheel(source, tmp_path)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheel


# ---------------------------------------------------------------- requirements


def test_installing_leaves_an_environment_as_it_is(requirements):
    """Whatever torch it has must do, and its OpenCV and Detectron2 are not asked for."""
    assert [str(r) for r in requirements if r.marker is None] == ["torch>=2.4"]
    assert {clause.operator for r in requirements for clause in r.specifier} == {">="}


def test_what_is_imported_is_declared(requirements):
    imported = set()
    for path in (ROOT / "ss_detectron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names | {"ss_detectron", "detectron2"}
    distributions = packages_distributions() | {
        "cv2": ["opencv-python"],  # of several that bring it
        "nvidia": ["nvidia-dali-cuda130"],
    }
    needed = {canonicalize_name(distributions[module][0]) for module in imported}
    assert needed == {canonicalize_name(requirement.name) for requirement in requirements}


def test_every_requirement_is_pinned(requirements):
    pins = set()
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            line = line.partition("#")[0].strip()
            if line and not line.startswith("-r "):
                assert re.search("==[0-9.]+(post[0-9]+)?$", line), line
                pins.add(line.partition("==")[0])
    assert pins >= {canonicalize_name(r.name) for r in requirements if "dali" not in r.name}


# ---------------------------------------------------------------- make


class FakePython:
    """
    A shell script that only writes down how it is called, for `make` to do its set-up with, and is
    the Python of the environments that it makes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "fake-python"
        self.log = folder / "calls"
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        (folder / "tools").mkdir()
        for name in ("setup.py", "pyproject.toml", "tools/install_detectron2.py"):
            (folder / name).touch()
        self.behave("")

    def behave(self, body: str) -> None:
        """Set what it does: lines of shell, run with the arguments of a call."""
        make_venv = (
            'case "$*" in "-m venv "*) for folder; do :; done; mkdir -p $folder/bin\n'
            f"ln -sf {self.path} $folder/bin/python;; esac"
        )
        log = f'echo "$(basename $0) $*" >> {self.log}'
        self.path.write_text(f"#!/bin/sh\n{log}\n{body}\n{make_venv}\n")
        self.path.chmod(0o755)

    def make(self, *words: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        command = ["make", "--no-print-directory", f"PYTHON={self.path}", *words]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)

    def calls(self, part: str) -> int:
        """Count the calls in the last run of make that have a part in common."""
        return self.log.read_text().count(part)


@pytest.fixture
def python(tmp_path):
    return FakePython(tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            'case "$*" in --version) echo Python 3.9.2;; *version_info*) exit 1;; esac',
            "Python >= 3.11 is needed, .*fake-python is Python 3.9.2. Name another: make PYTHON=",
        ),
        ('case "$*" in *ensurepip*) exit 1;; esac', "lacks the modules venv or .*python3-venv"),
        ('case "$*" in "-m venv"*) exit 1;; esac', "fake-python could not make .venv"),
        (None, "fake-python is not there. Name a Python >= 3.11: make PYTHON="),
    ],
    ids=["old", "no venv module", "venv fails", "not there"],
)
def test_make_says_what_is_wrong_with_python(python, body, message):
    python.behave(body)
    if body is None:
        python.path.unlink()
    result = python.make("setup")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert python.calls("pip install") == 0


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("*install*-r*", "pip failed; see above"),
        ("*import*torch*", "torch does not load"),
        ("*import*cv2*", "libGL.so.1 .*opencv-python-headless"),
        ("*install_detectron2.py*", ""),  # says itself why
    ],
)
def test_set_up_that_fails_is_taken_up_again(python, failing, message):
    python.behave(f'case "$*" in {failing}) exit 1;; esac')
    for _ in range(2):  # it does not pass for complete the second time
        result = python.make("setup")
        assert result.returncode == 2
        assert re.search(message, result.stderr)
    python.behave("")
    assert python.make("setup").returncode == 0
    assert python.calls("tools/install_detectron2.py --source auto") == 1
    assert python.make("setup").returncode == 0
    assert python.log.read_text() == ""


def test_the_core_is_tested_with_torch_alone(python):
    for _ in range(2):
        python.behave('case "$*" in *install*torch*) exit 1;; esac')
        failed = python.make("test-core", "TORCH=2.4.1")
        assert failed.returncode == 2 and "PYTHON=python3.12" in failed.stderr
    python.behave("")
    assert python.make("test-core", "TORCH=2.4.1").returncode == 0
    assert (python.folder / ".venv-core-2.4.1-fake-python").is_dir()
    assert python.calls("install torch==2.4.1 -r requirements/core.txt") == 1
    assert python.calls("install") == python.calls("-m pytest") == 1

    (pinned,) = re.findall(r"^torch==(.+)$", (ROOT / "requirements/demo.txt").read_text(), re.M)
    assert python.make("test-core").returncode == 0
    assert python.calls(f"install torch=={pinned} ") == 1
    assert python.make("test-core").returncode == 0
    assert python.calls("install") == 0
