"""The installer of Detectron2, on a small stand-in for the labgym wheel and for the repository.

Installing is done for real, by pip, into an environment of its own; no network is used.
"""

import base64
import csv
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"

CONFIG = "LabGym/detectron2/model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml"
LABGYM = {
    "LabGym/__init__.py": "GPL = True\n",
    "LabGym/detector.py": "from LabGym.detectron2 import model_zoo\n",
    "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
    "LabGym/detectron2/layers/__init__.py": "from LabGym.detectron2.utils import comm\n",
    "LabGym/detectron2/utils/__init__.py": "",
    "LabGym/detectron2/utils/comm.py": "SIZE = 1\n",
    "LabGym/detectron2/engine/__init__.py": (
        "import LabGym.detectron2.utils.comm as comm\nfrom LabGym import detectron2\n"
        'TARGET = {"_target_": "LabGym.detectron2.utils.comm"}\n'
        "VERSION = LabGym.detectron2.__version__ if False else detectron2.__version__\n"
    ),
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
    CONFIG: "_BASE_: ../Base-RetinaNet.yaml\n",
    "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: labgym\nVersion: 3.1.2\n",
    "labgym-3.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
    "labgym-3.1.2.dist-info/RECORD": "",
}
COMMON = "LabGym/detectron2/data/common.py"


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module, loaded anew for each test."""
    spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def write_labgym(folder: Path, **changes: str) -> Path:
    """Write the stand-in for the labgym wheel, with some files changed."""
    wheel = folder / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**LABGYM, **changes}.items():
            archive.writestr(name, text)
    return wheel


def use_labgym(tool, monkeypatch, folder: Path, **changes: str) -> None:
    """Let pip find the stand-in, and the tool expect it."""
    folder.mkdir()
    wheel = write_labgym(folder, **changes)
    monkeypatch.setattr(tool, "LABGYM_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment with pip, an empty torch and torchvision, and nothing to download from."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    metadata = Path(importlib.metadata.distribution("setuptools").locate_file("")).resolve()
    packages = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    for package in (*packages, *metadata.glob("setuptools-*.dist-info")):
        (site / Path(package).name).symlink_to(metadata / package)
    (site / "torch.py").touch()
    (site / "torchvision.py").touch()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    return python, site


def files_of(site: Path) -> list[str]:
    """Return the files below a folder, less what is linked there and compiled code."""
    return sorted(
        path.relative_to(site).as_posix()
        for path in site.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def test_strip_prefix(tool):
    text = (
        "from LabGym.detectron2.layers import cat\n"
        "from LabGym import detectron2\n"
        'logging.getLogger("LabGym.detectron2.data")\n'
        'so = importlib.util.find_spec("LabGym.detectron2._C").origin\n'
        ":class:`LabGym.detectron2.structures.Boxes`, MyLabGym.detectron2, LabGym.detector\n"
    )
    assert tool.strip_prefix(text) == (
        "from detectron2.layers import cat\n"
        "import detectron2\n"
        'logging.getLogger("detectron2.data")\n'
        'so = importlib.util.find_spec("detectron2._C").origin\n'
        ":class:`detectron2.structures.Boxes`, MyLabGym.detectron2, LabGym.detector\n"
    )


def test_pure_wheel_holds_only_detectron2(tool, tmp_path):
    files, prefixed = tool.extract_detectron2(write_labgym(tmp_path))
    wheel = tool.write_wheel(files, tool.write_notice(prefixed), tmp_path)
    info = "detectron2-0.6+labgym3.1.2.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}

    code = {name.removeprefix("LabGym/") for name in LABGYM if "/detectron2/" in name}
    own = {"LICENSE", "NOTICE", "METADATA", "WHEEL", "top_level.txt", "RECORD"}
    assert set(contents) == code | {f"{info}/{name}" for name in own}
    assert not any(b"LabGym" in contents[name] for name in code)
    assert prefixed == 2
    assert b"Apache License" in contents[f"{info}/LICENSE"]
    notice = contents[f"{info}/NOTICE"].decode()
    assert "in 2 files" in notice
    assert "detectron2/data/common.py" in notice
    metadata = contents[f"{info}/METADATA"].decode()
    assert "Requires-Dist: setuptools<80\n" in metadata
    assert "torch" not in metadata
    assert "opencv" not in metadata


def test_record_has_the_hash_and_size_of_every_file(tool, tmp_path):
    files, prefixed = tool.extract_detectron2(write_labgym(tmp_path))
    wheel = tool.write_wheel(files, tool.write_notice(prefixed), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    record = next(name for name in contents if name.endswith("RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(contents[record].decode()))}
    assert set(rows) == set(contents)
    assert rows.pop(record) == ["", ""]
    for name, (checksum, size) in rows.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest())
        assert checksum == "sha256=" + expected.decode().rstrip("=")
        assert int(size) == len(contents[name])


def test_pure_wheel_is_reproducible(tool, tmp_path):
    wheels = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files, prefixed = tool.extract_detectron2(write_labgym(tmp_path))
        wheels.append(tool.write_wheel(files, tool.write_notice(prefixed), tmp_path / name))
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def test_fallback_of_map_dataset_is_patched(tool, tmp_path):
    """Python 3.11 and later refuse to sample from a set."""
    files, _ = tool.extract_detectron2(write_labgym(tmp_path))
    namespace = {}
    exec(files["detectron2/data/common.py"], namespace)
    assert namespace["MapDataset"]({7}).fall_back() == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LabGym/detectron2/layers/nms.py": "import LabGym.tools\n"}, "nms.py still names LabGym"),
        ({COMMON: "class MapDataset:\n    pass\n"}, "does not have the line to patch"),
    ],
)
def test_unexpected_code_is_refused(tool, tmp_path, changes, message):
    with pytest.raises(tool.SourceError, match=message):
        tool.extract_detectron2(write_labgym(tmp_path, **changes))


def test_wrong_checksum_is_refused(tool, tmp_path, monkeypatch, environment):
    python, site = environment
    use_labgym(tool, monkeypatch, tmp_path / "index")
    monkeypatch.setattr(tool, "LABGYM_SHA256", "0" * 64)
    before = files_of(site)
    with pytest.raises(tool.SetupError, match="has sha256 [0-9a-f]{64}, expected 0{64}"):
        tool.ensure_detectron2(str(python), "pypi", "unused")
    assert files_of(site) == before


def test_install_report_keep_and_uninstall(tool, tmp_path, monkeypatch, environment, capsys):
    python, site = environment
    use_labgym(tool, monkeypatch, tmp_path / "index")
    before = files_of(site)
    assert tool.main(["--python", str(python), "--report"]) == 1
    assert "detectron2 is not installed" in capsys.readouterr().out

    wheels = tmp_path / "wheels"
    installed = tool.ensure_detectron2(str(python), "pypi", "unused", wheels)
    assert installed.source == "pypi"
    assert [wheel.name for wheel in wheels.iterdir()] == [
        "detectron2-0.6+labgym3.1.2-py3-none-any.whl"
    ]
    assert tool.main(["--python", str(python), "--report"]) == 0
    line = "detectron2 0.6 in pure Python, from labgym 3.1.2, without compiled operations\n"
    assert capsys.readouterr().out == line

    # Kept from now on: there is nothing left to install from.
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert tool.ensure_detectron2(str(python), "auto", "unused").source == "pypi"
    with pytest.raises(
        tool.SetupError, match="remove that first: .*python -m pip uninstall detectron2"
    ):
        tool.ensure_detectron2(str(python), "official", "unused")

    listed = installed.pip("list")
    assert "0.6+labgym3.1.2" in listed
    installed.pip("uninstall", "--yes", "detectron2")
    assert files_of(site) == before


def test_what_does_not_import_is_removed_again(tool, tmp_path, monkeypatch, environment):
    python, site = environment
    broken = {"LabGym/detectron2/engine/__init__.py": "import no_such_module\n"}
    use_labgym(tool, monkeypatch, tmp_path / "index", **broken)
    before = files_of(site)
    with pytest.raises(tool.SetupError, match="No module named 'no_such_module'"):
        tool.ensure_detectron2(str(python), "pypi", "unused")
    assert files_of(site) == before


def test_interrupted_installation_is_removed_and_redone(
    tool, tmp_path, monkeypatch, environment, caplog
):
    """The state a kill leaves: some files, a marker, and no record of pip's."""
    python, site = environment
    use_labgym(tool, monkeypatch, tmp_path / "index")
    complete = tool.ensure_detectron2(str(python), "pypi", "unused")
    after = files_of(site)
    info = next(site.glob("detectron2-*.dist-info"))
    names = [name for name in after if name.startswith("detectron2")]
    (info / "RECORD").unlink()
    (site / "detectron2" / "layers" / "__init__.py").unlink()
    (site / tool.MARKER).write_text("\n".join([*names, "detectron2/layers/__init__.py"]))

    caplog.clear()
    redone = tool.ensure_detectron2(str(python), "auto", "unused")
    assert "an earlier installation was interrupted" in caplog.text
    assert redone == complete
    assert files_of(site) == after


def test_foreign_detectron2_is_kept_or_refused_never_replaced(
    tool, tmp_path, monkeypatch, environment
):
    python, site = environment
    use_labgym(tool, monkeypatch, tmp_path / "index")
    (site / "detectron2").mkdir()
    (site / "detectron2" / "__init__.py").write_text('__version__ = "0.5"\nraise ValueError("x")\n')
    with pytest.raises(tool.SetupError, match="found in .* does not import: ValueError: x"):
        tool.ensure_detectron2(str(python), "auto", "unused")

    for name, text in LABGYM.items():
        if "/detectron2/" in name:
            path = site / name.removeprefix("LabGym/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tool.strip_prefix(text))
    before = files_of(site)
    kept = tool.ensure_detectron2(str(python), "auto", "unused")
    assert kept.source == "other"
    assert "detectron2 0.6 found in" in kept.describe()
    assert files_of(site) == before


def test_torch_comes_first(tool, monkeypatch, environment):
    python, site = environment
    (site / "torch.py").unlink()
    with pytest.raises(tool.SetupError, match="No module named 'torch'.*pip install -r"):
        tool.ensure_detectron2(str(python), "auto", "unused")


def test_protected_packages_are_pinned_to_what_is_there(tool, environment):
    python, site = environment
    info = site / "torch-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9+local\n")
    assert tool.Environment.of(str(python)).protected == ("torch==9.9+local",)


def test_official_source_says_what_is_missing(tool, tmp_path, monkeypatch, environment):
    found = tool.Environment.of(str(environment[0]))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(tool.SourceError, match="no C\\+\\+ compiler: no no-such-compiler"):
        tool.build_official(found, tmp_path, "unused")

    (tmp_path / "Python.h").touch()
    found = dataclasses.replace(found, include=tmp_path)
    monkeypatch.setenv("CXX", "git")  # any program that is there
    with pytest.raises(tool.SourceError, match="nowhere cannot be reached: git failed"):
        tool.build_official(found, tmp_path, str(tmp_path / "nowhere"))

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tool.SourceError, match="git is not installed"):
        tool.build_official(found, tmp_path, "unused")


def test_official_source_is_built_from_the_pinned_commit(tool, tmp_path, monkeypatch, environment):
    """On a repository that has gone on since, and with a setup.py in place of Detectron2's."""
    python, site = environment
    repository = tmp_path / "repository"
    for name, text in LABGYM.items():
        if "/detectron2/" in name:
            path = repository / name.removeprefix("LabGym/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tool.strip_prefix(text))
    (repository / "setup.py").write_text(
        "import os\nfrom setuptools import find_packages, setup\n"
        "import torch\n"
        'setup(name="detectron2", version="0.6" + os.environ["D2_VERSION_SUFFIX"],\n'
        '      packages=find_packages(), package_data={"": ["**/*.yaml"]})\n'
    )
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    git = ["git", "-C", str(repository), *identity]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "pinned"], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    (repository / "detectron2" / "__init__.py").write_text('__version__ = "0.7"\n')
    subprocess.run([*git, "commit", "--quiet", "-a", "-m", "later"], check=True)

    monkeypatch.setattr(tool, "COMMIT", commit)
    monkeypatch.setattr(tool, "OFFICIAL_SUFFIX", f"+git{commit[:7]}")
    (tmp_path / "Python.h").touch()
    found = dataclasses.replace(tool.Environment.of(str(python)), include=tmp_path)
    monkeypatch.setattr(
        tool.Environment,
        "of",
        lambda python, of=tool.Environment.of: dataclasses.replace(
            of(python), include=found.include
        ),
    )
    monkeypatch.setenv("CXX", "git")  # nothing is compiled here
    installed = tool.ensure_detectron2(str(python), "auto", os.path.relpath(repository))
    assert installed.source == "official"
    assert installed.describe() == (
        f"detectron2 0.6 from official source {commit[:7]}, without compiled operations"
    )


def test_auto_says_why_and_goes_on(tool, tmp_path, monkeypatch, environment, caplog):
    python, _ = environment
    use_labgym(tool, monkeypatch, tmp_path / "index")
    monkeypatch.setenv("CXX", "no-such-compiler")
    caplog.set_level("INFO")
    assert tool.ensure_detectron2(str(python), "auto", "unused").source == "pypi"
    official, pure = (caplog.text.index(f"trying the source {name}") for name in tool.SOURCES)
    reason = caplog.text.index("the source official cannot be used: there is no C++ compiler")
    assert official < reason < pure


def test_no_source_left_is_an_error_with_a_remedy(tool, tmp_path, monkeypatch, environment, caplog):
    python, site = environment
    use_labgym(tool, monkeypatch, tmp_path / "index")
    (tmp_path / "index" / "labgym-3.1.2-py3-none-any.whl").unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert tool.main(["--python", str(python)]) == 1
    assert "official: there is no C++ compiler" in caplog.text
    assert "pypi: pip failed (1): ERROR: No matching distribution found for labgym" in caplog.text
    assert "name a copy of the repository with --repository" in caplog.text
    assert not (site / "detectron2").exists()


def test_unreachable_repository_ends_with_its_children(tool, tmp_path, monkeypatch):
    """A command that hangs is ended in time, and so is what it started."""
    alive = tmp_path / "alive"
    script = tmp_path / "hang"
    script.write_text(f"#!/bin/sh\n(sleep 1; touch {alive}) &\nwait\n")
    script.chmod(0o755)
    with pytest.raises(tool.SourceError, match="hang gave no answer within 0 s"):
        tool.run([script], timeout=0.3)
    subprocess.run(["sleep", "1"], check=True)
    assert not alive.exists()
