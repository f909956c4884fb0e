"""The installer of Detectron2, on a small stand-in for the labgym wheel and for the repository.

Installing is done for real, by pip, into an environment of its own; no network is used.
"""

import hashlib
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"

LABGYM = {
    "LabGym/__init__.py": "GPL = True\n",
    "LabGym/detector.py": "from LabGym.detectron2 import model_zoo\n",
    "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
    "LabGym/detectron2/layers/__init__.py": "from LabGym.detectron2.utils import comm\n",
    "LabGym/detectron2/utils/__init__.py": "from LabGym import detectron2\n",
    "LabGym/detectron2/utils/comm.py": '"""In :mod:`LabGym.detectron2.utils`."""\n',
    "LabGym/detectron2/engine/__init__.py": "import LabGym.detectron2.utils.comm as comm\n",
    "LabGym/detectron2/data/__init__.py": "",
    "LabGym/detectron2/data/common.py": (
        "import random\n\n\nclass MapDataset:\n    def __init__(self, candidates):\n"
        "        self._rng = random.Random(0)\n        self._fallback_candidates = candidates\n\n"
        "    def fall_back(self):\n"
        "        return self._rng.sample(self._fallback_candidates, k=1)[0]\n"
    ),
    "LabGym/detectron2/model_zoo/__init__.py": (
        "from pathlib import Path\n\n\ndef get_config_file(name):\n"
        '    path = Path(__file__).parent / "configs" / name\n'
        "    if not path.is_file():\n        raise RuntimeError(name)\n    return path\n"
    ),
    "LabGym/detectron2/model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml": "A: 1\n",
    "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: labgym\nVersion: 3.1.2\n",
    "labgym-3.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
    "labgym-3.1.2.dist-info/RECORD": "",
}
DETECTRON2 = {
    name.removeprefix("LabGym/"): text.replace("LabGym.", "").replace("from LabGym ", "")
    for name, text in LABGYM.items()
    if "/detectron2/" in name
}
PURE = "detectron2 0.6 in pure Python, from labgym 3.1.2, without compiled operations"


class Environment:
    """An environment with pip, an empty torch and torchvision, and a folder to install from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        self.site = next((folder / "env" / "lib").glob("python*")) / "site-packages"
        metadata = Path(importlib.metadata.distribution("setuptools").locate_file("")).resolve()
        packages = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
        for package in (*packages, *metadata.glob("setuptools-*.dist-info")):
            (self.site / Path(package).name).symlink_to(metadata / package)
        write(self.site, {"torch.py": "", "torchvision.py": ""})
        self.constants: dict[str, object] = {}
        self.index = folder / "index"
        self.index.mkdir()
        self.variables = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_NO_DEPS": "1",
            "CXX": "no-such-compiler",
        }

    def offer_labgym(self, **changes: str) -> None:
        """Let pip find the stand-in, some files of it changed, and the tool expect it."""
        wheel = self.index / "labgym-3.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in {**LABGYM, **changes}.items():
                archive.writestr(name, text)
        self.constants["LABGYM_SHA256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def install(self, *words: str) -> str:
        """Run the tool there and return what it says, with its exit status first."""
        script = (
            f"import sys; sys.path.append({str(TOOL.parent)!r})\n"
            "import install_detectron2 as tool\n"
            f"vars(tool).update({self.constants!r})\nsys.exit(tool.main({list(words)!r}))"
        )
        done = subprocess.run(
            [self.python, "-c", script],
            cwd=self.folder,
            env={**os.environ, **self.variables, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        return f"{done.returncode} {done.stdout}{done.stderr}"

    def files(self) -> set[str]:
        """Return what lies in site-packages, less what is linked there and compiled code."""
        found = (path for path in self.site.rglob("*") if path.is_file())
        return {p.relative_to(self.site).as_posix() for p in found if "__pycache__" not in p.parts}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


def test_the_pure_detectron2_is_installed_and_kept(environment):
    before = environment.files()
    assert environment.install("--report").startswith("1 detectron2 is not installed")

    environment.offer_labgym()
    assert f"installed: {PURE}" in environment.install("--source", "pypi")
    assert environment.install("--report") == f"0 {PURE}\n"
    info = "detectron2-0.6+labgym3.1.2.dist-info"
    new = environment.files() - before
    assert {name for name in new if info not in name} == set(DETECTRON2)
    for name in DETECTRON2:
        assert "LabGym" not in (environment.site / name).read_text()
    metadata = (environment.site / info / "METADATA").read_text()
    assert "Requires-Dist: setuptools<80\n" in metadata
    assert "torch" not in metadata and "opencv" not in metadata
    licences = {Path(name).name: environment.site / name for name in new if "licenses" in name}
    assert "Apache License" in licences["LICENSE"].read_text()
    assert "detectron2/data/common.py" in licences["NOTICE"].read_text()
    # Python 3.11 and later refuse to sample from a set.
    common = runpy.run_path(str(environment.site / "detectron2/data/common.py"))
    assert common["MapDataset"]({7}).fall_back() == 7

    # Kept from now on: there is nothing left to install from.
    environment.variables["PIP_FIND_LINKS"] = ""
    assert f"kept: {PURE}" in environment.install()
    refused = environment.install("--source", "official")
    assert refused.startswith("1 ")
    assert re.search("remove that first: .*python -m pip uninstall detectron2", refused)
    # One that this tool installed and that broke is replaced.
    environment.variables["PIP_FIND_LINKS"] = str(environment.index)
    (environment.site / "detectron2" / "engine" / "__init__.py").write_text("import nothing_there")
    assert "is replaced" in environment.install("--source", "pypi")
    assert environment.files() - before == new


def test_what_cannot_be_used_leaves_no_trace(environment):
    before = environment.files()
    environment.offer_labgym(**{"LabGym/detectron2/engine/__init__.py": "import no_such_module\n"})
    said = environment.install()
    assert said.startswith("1 ") and environment.files() == before
    official, pure = (said.index(f"trying the source {name}") for name in ("official", "pypi"))
    assert official < said.index("cannot be used: there is no C++ compiler") < pure
    assert "does not import: ModuleNotFoundError: No module named 'no_such_module'" in said
    assert "name a copy of the repository with --repository" in said

    environment.constants["LABGYM_SHA256"] = "0" * 64
    said = environment.install("--source", "pypi")
    assert re.search("has sha256 [0-9a-f]{64}, expected 0{64}", said)
    assert environment.files() == before


def test_a_foreign_detectron2_is_kept_or_refused_never_replaced(environment):
    environment.offer_labgym()
    broken = '__version__ = "0.5"\nraise ValueError("x")\n'
    write(environment.site, {"detectron2/__init__.py": broken})
    said = environment.install()
    assert said.startswith("1 ")
    assert re.search("0.5 found in .* does not import: ValueError: x\nRepair it, or remove", said)

    write(environment.site, DETECTRON2)
    before = environment.files()
    said = environment.install()
    assert said.startswith("0 ") and "kept: detectron2 0.6 found in" in said
    assert environment.files() == before


def test_torch_comes_first(environment):
    (environment.site / "torch.py").unlink()
    assert re.search("No module named 'torch'.*pip install -r", environment.install())


def test_protected_packages_are_pinned_to_what_is_there(tool, tmp_path, monkeypatch):
    constraints = []

    def pip(command, *words, **environment):
        if command == "wheel":
            (tmp_path / "detectron2-0.6.whl").touch()
        if "--constraint" in words:
            constraints.extend(Path(words[1]).read_text().splitlines())

    monkeypatch.setitem(tool["install"].__globals__, "pip", pip)
    monkeypatch.setitem(tool["install"].__globals__, "import_error", lambda code: None)
    tool["install"](tmp_path, tmp_path)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    assert {f"{name}=={version}" for name, version in versions.items()} <= set(constraints)


def test_what_the_official_source_needs_is_looked_for_first(tool, tmp_path, monkeypatch):
    fetch, failure = tool["fetch_official"], tool["Failure"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(failure, match="no C\\+\\+ compiler: no no-such-compiler"):
        fetch(tmp_path, "unused")
    monkeypatch.setenv("CXX", "git")  # any program that is there
    monkeypatch.setattr(tool["sysconfig"], "get_path", lambda name: str(tmp_path))
    with pytest.raises(failure, match="there is no Python.h"):
        fetch(tmp_path, "unused")
    (tmp_path / "Python.h").touch()
    with pytest.raises(failure, match="nowhere cannot be reached: git failed"):
        fetch(tmp_path, str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(failure, match="git is not installed"):
        fetch(tmp_path, "unused")


def test_the_official_source_is_built_from_the_pinned_commit(environment, tmp_path):
    """On a repository that has gone on since, and with a setup.py in place of Detectron2's."""
    repository = tmp_path / "repository"
    setup = (
        "import os\nfrom setuptools import find_packages, setup\n"
        "import torch\n"
        'setup(name="detectron2", version="0.6" + os.environ["D2_VERSION_SUFFIX"],\n'
        '      packages=find_packages(), package_data={"": ["**/*.yaml"]})\n'
    )
    write(repository, {**DETECTRON2, "setup.py": setup})
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    git = ["git", "-C", str(repository), *identity]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "pinned"], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    write(repository, {"detectron2/__init__.py": '__version__ = "0.7"\n'})
    subprocess.run([*git, "commit", "--quiet", "-a", "-m", "later"], check=True)

    include = Path(sys.base_prefix, "include", f"python3.{sys.version_info.minor}", "Python.h")
    if not include.is_file():
        pytest.skip("needs Python.h")
    environment.constants |= {"COMMIT": commit, "OFFICIAL_SUFFIX": f"+git{commit[:7]}"}
    environment.variables["CXX"] = "git"  # nothing is compiled here
    said = environment.install("--repository", os.path.relpath(repository, environment.folder))
    assert f"installed: detectron2 0.6 from official source {commit[:7]}, without" in said
