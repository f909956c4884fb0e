#!/usr/bin/env python3
"""Install Detectron2 into the environment of the Python that runs this.

Detectron2 is on no package index under its own name. Two sources are tried, in this order:

official  its own source at a pinned commit, built here. Needs git, a way to the repository, a C++
          compiler and a few minutes. Brings the compiled operations. Note that it also installs a
          top-level package named `tools`.
pypi      Detectron2 0.6 in pure Python, as the labgym wheel carries it. Needs the package index
          only. Detectron2's files are taken out of that wheel, the prefix `LabGym.` is taken off
          their imports, and they are installed as a distribution of their own. They are
          Apache-2.0, labgym as a whole is GPL-3.0: nothing else of it is taken. The compiled
          operations (rotated boxes, deformable convolution) are missing.

A Detectron2 that can be imported already is kept, and one that this tool did not install is never
touched. Torch, torchvision, NumPy and OpenCV are never changed. What is installed is imported once
as a test, and removed again where that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
LABGYM = "3.1.2"
LABGYM_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"

# What the installed distribution is called beyond "0.6" (but not in detectron2.__version__), so
# that one can tell later where it comes from.
OFFICIAL_SUFFIX, PYPI_SUFFIX = f"+git{COMMIT[:7]}", f"+labgym{LABGYM}"

SETUPTOOLS = "setuptools>=70.1,<80"  # builds wheels by itself, and still has pkg_resources
REQUIREMENTS = (  # of the pure-Python Detectron2: those of its own setup.py, and the last
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "packaging",
    # `black` is left out: only LazyConfig.to_py, which prints a config as Python, imports it.
    "setuptools<80",  # detectron2.model_zoo imports pkg_resources, which newer ones lack
)
# What pip must leave as it is, whatever a requirement asks for.
PROTECTED = (
    "torch",
    "torchvision",
    "torchaudio",
    "numpy",
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
# random.sample refuses a set from Python 3.11 on; Detectron2 made the same change later.
PATCHED = "detectron2/data/common.py"
PATCH = ("sample(self._fallback_candidates, k=1)", "sample(list(self._fallback_candidates), k=1)")

NOTICE = f"""Detectron2 0.6
Copyright (c) Facebook, Inc. and its affiliates.
{REPOSITORY}

Licensed under the Apache License, Version 2.0; see LICENSE.

These are Detectron2's files as labgym {LABGYM} carries them, without the compiled operations and
with nothing of labgym itself. Changed by tools/install_detectron2.py of ss_detectron:
* the prefix "LabGym." was taken off module paths
* {PATCHED}: {PATCH[1]}
"""
SETUP = f"""from setuptools import setup

setup(
    name="detectron2",
    version="0.6{PYPI_SUFFIX}",
    description="Detectron2 in pure Python, without its compiled operations",
    author="FAIR",
    url="{REPOSITORY}",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=["detectron2"],
    package_data={{"detectron2": ["**/*"]}},
    install_requires={list(REQUIREMENTS)!r},
)
"""
# The engine imports most of Detectron2; the config shows that the model zoo is there.
IMPORT_CHECK = """
import detectron2.layers, detectron2.engine
from detectron2 import model_zoo
model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
"""

log = logging.getLogger("install_detectron2")


class Failure(RuntimeError):
    """What went wrong, as the user is to read it."""


def run(*command: str | Path, timeout: float | None = None, **environment: str) -> str:
    """Run a command and return what it printed; a failure's message ends with what came last."""
    # PYTHONSAFEPATH: a `detectron2` in the working directory must not pass for an installed one.
    environment = {"PYTHONSAFEPATH": "1", "GIT_TERMINAL_PROMPT": "0", **environment}
    name = "pip" if "pip" in command else Path(command[0]).name
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{name} gave no answer within {timeout:.0f} s") from None
    if done.returncode != 0:
        last = "\n    ".join(done.stdout.strip().splitlines()[-15:])
        raise Failure(f"{name} failed ({done.returncode}):\n    {last}")
    return done.stdout


def pip(*arguments: str | Path, **environment: str) -> str:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    return run(*command, *arguments, **environment)


# What is installed ------------------------------------------------------------------------------


class Found(NamedTuple):
    """An installed Detectron2."""

    version: str
    folder: Path

    @property
    def source(self) -> str:
        """Where it comes from: official, pypi or other."""
        suffixes = {OFFICIAL_SUFFIX: "official", PYPI_SUFFIX: "pypi"}
        return suffixes.get("+" + self.version.partition("+")[2], "other")

    def __str__(self) -> str:
        origin = {
            "official": f"from official source {COMMIT[:7]}",
            "pypi": f"in pure Python, from labgym {LABGYM}",
            "other": f"found in {self.folder}",
        }[self.source]
        operations = "with" if any(self.folder.glob("_C.*.so")) else "without"
        version = self.version.partition("+")[0]
        return f"detectron2 {version} {origin}, {operations} compiled operations"


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find() -> Found | None:
    """Look for Detectron2, importing neither it nor torch."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or not spec.origin:
        return None
    version = version_of("detectron2")
    if version is None:  # a folder that somebody put on Python's path
        stated = re.search('__version__ = "(.+)"', Path(spec.origin).read_text())
        version = stated.group(1) if stated else "of unknown version"
    return Found(version, Path(spec.origin).parent)


def import_error(code: str) -> str | None:
    """Return the error that imports end with, None where they succeed."""
    try:
        run(sys.executable, "-W", "ignore", "-c", code)
    except Failure as error:
        return str(error).splitlines()[-1].strip()
    return None


# Sources ----------------------------------------------------------------------------------------


def fetch_official(work: Path, repository: str) -> Path:
    """Check out Detectron2's own source at the pinned commit and return its folder."""
    # What the build needs is looked for first, as it would otherwise fail after minutes.
    if shutil.which("git") is None:
        raise Failure("git is not installed")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise Failure(f"there is no C++ compiler: no {compiler} (CXX names another)")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise Failure(f"there is no Python.h in {include} (python3-dev brings it)")
    if Path(repository).exists():
        repository = str(Path(repository).resolve())
    try:
        run("git", "ls-remote", "--exit-code", repository, "HEAD", timeout=20)
    except Failure as error:
        raise Failure(f"{repository} cannot be reached: {error}") from None

    source = work / "source"
    run("git", "init", "--quiet", source)
    run("git", "-C", source, "fetch", "--quiet", "--depth=1", repository, COMMIT, timeout=600)
    run("git", "-C", source, "checkout", "--quiet", "--detach", COMMIT)
    return source


def fetch_pypi(work: Path) -> Path:
    """Write Detectron2's files out of the labgym wheel, put right, and return their folder."""
    # labgym asks for an older Python; Detectron2's files in it do not.
    options = ("--no-deps", "--only-binary=:all:", "--python-version=3.10", "--dest", work)
    pip("download", *options, f"labgym=={LABGYM}")
    wheel = next(work.glob("labgym-*.whl"))
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if checksum != LABGYM_SHA256:
        raise Failure(f"{wheel.name} has sha256 {checksum}, expected {LABGYM_SHA256}")

    source = work / "source"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("LabGym/detectron2/") and not name.endswith("/"):
                path = source / name.removeprefix("LabGym/")
                path.parent.mkdir(parents=True, exist_ok=True)
                text = archive.read(name).decode()
                text = re.sub(r"\bfrom LabGym import detectron2\b", "import detectron2", text)
                path.write_text(re.sub(r"\bLabGym\.(?=detectron2\b)", "", text))
    patched = source / PATCHED
    patched.write_text(patched.read_text().replace(*PATCH))
    licence = Path(__file__).resolve().parents[1] / "LICENSE"  # Apache-2.0, as Detectron2's
    shutil.copy(licence, source / "LICENSE")
    (source / "NOTICE").write_text(NOTICE)
    (source / "setup.py").write_text(SETUP)
    return source


# Installing -------------------------------------------------------------------------------------


def install(source: Path, work: Path) -> None:
    """Build Detectron2, install it with what it needs, and remove it if it does not import."""
    log.info("building Detectron2; from the official source this takes minutes")
    pip("install", SETUPTOOLS)
    # Without isolation the build sees the torch it is to run with.
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", work)
    pip("wheel", *options, source, D2_VERSION_SUFFIX=OFFICIAL_SUFFIX)
    constraints = work / "constraints.txt"
    there = {name: version_of(name) for name in PROTECTED}
    constraints.write_text("".join(f"{name}=={v}\n" for name, v in there.items() if v))
    # The official wheel does not say that it needs pkg_resources.
    wheel = next(work.glob("detectron2-*.whl"))
    pip("install", "--constraint", constraints, wheel, SETUPTOOLS)
    reason = import_error(IMPORT_CHECK)
    if reason is not None:
        pip("uninstall", "--yes", "detectron2")
        raise Failure(f"it was installed but does not import: {reason}")


def keeps(found: Found, source: str) -> bool:
    """Return whether the Detectron2 found is kept, else remove what is ours and does not import."""
    reason = import_error(IMPORT_CHECK)
    if reason is None and source in ("auto", found.source):
        log.info("kept: %s", found)
        return True
    if reason is None:
        raise Failure(
            f"there is {found}. To have it from the source {source}, remove that first: "
            f"{sys.executable} -m pip uninstall detectron2"
        )
    if found.source == "other":
        raise Failure(
            f"{found}, does not import: {reason}\nRepair it, or remove it (what an interrupted "
            f"installation left, too): rm -r {found.folder}"
        )
    log.warning("%s, does not import (%s) and is replaced", found, reason)
    pip("uninstall", "--yes", "detectron2")
    return False


def ensure_detectron2(source: str, repository: str) -> None:
    """Install Detectron2 from ``source``, or the first that works for auto, unless it is there."""
    found = find()
    if found is not None and keeps(found, source):
        return
    reason = import_error("import torch, torchvision")
    if reason is not None:
        raise Failure(
            f"torch and torchvision must be installed first, and import ({reason}): "
            "pip install -r requirements/demo.txt"
        )
    failures = []
    for name in ("official", "pypi") if source == "auto" else (source,):
        log.info("trying the source %s", name)
        with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
            work = Path(folder)
            try:
                official = name == "official"
                install(fetch_official(work, repository) if official else fetch_pypi(work), work)
            except Failure as error:
                log.warning("the source %s cannot be used: %s", name, error)
                lines = str(error).splitlines()  # what failed, and the error it ended with
                failures.append(" ".join([f"{name}:", lines[0], *map(str.strip, lines[1:][-1:])]))
                continue
        log.info("installed: %s", find())
        return
    raise Failure(
        f"no Detectron2 was installed ({'; '.join(failures)}). Make one of the sources usable as "
        "said above, name a copy of the repository with --repository, or install Detectron2 by "
        "hand; this tool keeps one that imports."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", choices=("auto", "official", "pypi"), default="auto", help="auto tries both")
    repository = os.environ.get("DETECTRON2_REPOSITORY", REPOSITORY)
    what = "git URL or local path of the official source (default: DETECTRON2_REPOSITORY, else {})"
    add("--repository", default=repository, help=what.format(REPOSITORY))
    add("--report", action="store_true", help="print what is installed; fail where nothing is")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if args.report:
        found = find()
        print(found or "detectron2 is not installed; tools/install_detectron2.py installs it")
        return 1 if found is None else 0
    try:
        ensure_detectron2(args.source, args.repository)
    except Failure as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
