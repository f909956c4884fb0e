#!/usr/bin/env python3
"""Install Detectron2 into the environment of the Python that runs this.

Detectron2 is on no package index under its own name. Two sources are tried, in this order:

official  its own source at a pinned commit, built here. Needs git, a way to the repository, a C++
          compiler and a few minutes. Brings the compiled operations. Note that it also installs a
          top-level package named `tools`.
pypi      Detectron2 0.6 in pure Python, as the labgym wheel carries it. Needs the package index
          only. Detectron2's files are taken out of that wheel, the prefix `LabGym.` is taken off
          their imports, and a wheel of their own is made from them and installed. They are
          Apache-2.0, labgym as a whole is GPL-3.0: nothing else of it is taken. The compiled
          operations (rotated boxes, deformable convolution) are missing.

A Detectron2 that can be imported already is kept, and one that this tool did not install is never
touched. Torch, torchvision, NumPy and OpenCV are never changed. What is installed is imported once
as a test, and removed again where that fails.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("official", "pypi")  # in the order in which they are tried

REPOSITORY = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
# Goes into the version of the installed distribution (not into detectron2.__version__), so that
# one can tell later what is installed.
OFFICIAL_SUFFIX = f"+git{COMMIT[:7]}"

LABGYM_VERSION = "3.1.2"
LABGYM_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
LABGYM_SUFFIX = f"+labgym{LABGYM_VERSION}"

SETUPTOOLS = "setuptools>=70.1,<80"  # builds wheels by itself, and still has pkg_resources
REQUIREMENTS = (  # of the pure-Python wheel: those of Detectron2's own setup.py, and the last
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
# Changes to the code beyond the prefix: file, old text, new text, why.
PATCHES = (
    (
        "detectron2/data/common.py",
        "self._rng.sample(self._fallback_candidates, k=1)[0]",
        "self._rng.sample(list(self._fallback_candidates), k=1)[0]",
        "random.sample refuses a set from Python 3.11 on; Detectron2 made the same change later.",
    ),
)

REACH_TIMEOUT = 20.0  # seconds to hear from the repository at all
FETCH_TIMEOUT = 600.0
MARKER = "detectron2.installing"  # in site-packages while an installation is under way

PROBE = """
import importlib.metadata, importlib.util, json, pathlib, re, sysconfig
protected, version, folder, compiled = [], None, None, False
for name in NAMES:
    try:
        protected.append(name + "==" + importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
spec = importlib.util.find_spec("detectron2")
if spec is not None and spec.origin:
    folder = pathlib.Path(spec.origin).parent
    compiled = any(folder.glob("_C.*.so"))
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        match = re.search('__version__ = "(.+)"', (folder / "__init__.py").read_text())
        version = match.group(1) if match else "of unknown version"
print(json.dumps(dict(protected=protected, version=version, folder=str(folder), compiled=compiled,
    site=sysconfig.get_path("purelib"), include=sysconfig.get_path("include"))))
"""
# The engine imports most of Detectron2; the config shows that the model zoo is there.
IMPORT_CHECK = """
import detectron2.layers, detectron2.engine
from detectron2 import model_zoo
model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
"""

log = logging.getLogger("install_detectron2")


class SourceError(RuntimeError):
    """Detectron2 cannot be had from one source; the message says why."""


class SetupError(RuntimeError):
    """Detectron2 cannot be installed from any source; the message says why and what to do."""


def run(
    command: Sequence[str | Path],
    timeout: float | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Run a command to its end and return what it printed.

    The command leads a process group of its own, which is ended as a whole on a time-out or an
    interrupt: git and pip start further processes.

    Raises:
        SourceError: it failed or ran out of time. The message ends with what it printed last.
    """
    # PYTHONSAFEPATH: a `detectron2` in the working directory must not pass for an installed one.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "GIT_TERMINAL_PROMPT": "0", **(env or {})}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
        start_new_session=True,
    )
    name = "pip" if "pip" in command else Path(command[0]).name
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise SourceError(f"{name} gave no answer within {timeout:.0f} s") from None
        raise
    if process.returncode != 0:
        last = "\n    ".join(output.strip().splitlines()[-15:])
        raise SourceError(f"{name} failed ({process.returncode}):\n    {last}")
    return output


def shorten(error: SourceError) -> str:
    """Return the first and the last line of a message: what failed, and the error it ended with."""
    lines = str(error).splitlines()
    return f"{lines[0]} {lines[-1].strip()}" if len(lines) > 1 else lines[0]


@dataclass(frozen=True)
class Environment:
    """What is installed for one Python, as far as it matters here.

    protected holds requirement lines; version is None where there is no Detectron2.
    """

    python: str
    protected: tuple[str, ...]
    site: Path
    include: Path
    version: str | None
    folder: Path
    compiled: bool

    @classmethod
    def of(cls, python: str) -> Environment:
        """Look at an environment, importing neither torch nor Detectron2.

        Raises:
            SourceError: the Python does not run.
        """
        output = run([python, "-c", f"NAMES = {PROTECTED!r}\n{PROBE}"])
        found = json.loads(output.splitlines()[-1])
        return cls(
            python=python,
            protected=tuple(found["protected"]),
            site=Path(found["site"]),
            include=Path(found["include"]),
            version=found["version"],
            folder=Path(found["folder"]),
            compiled=found["compiled"],
        )

    @property
    def source(self) -> str:
        """Where the installed Detectron2 comes from: official, pypi, other or none."""
        if self.version is None:
            return "none"
        if self.version.endswith(OFFICIAL_SUFFIX):
            return "official"
        return "pypi" if self.version.endswith(LABGYM_SUFFIX) else "other"

    def describe(self) -> str:
        """Return one line on the installed Detectron2."""
        if self.version is None:
            return "detectron2 is not installed; tools/install_detectron2.py installs it"
        operations = "with" if self.compiled else "without"
        origin = {
            "official": f"from official source {COMMIT[:7]}",
            "pypi": f"in pure Python, from labgym {LABGYM_VERSION}",
            "other": f"found in {self.folder}",
        }[self.source]
        version = self.version.partition("+")[0]
        return f"detectron2 {version} {origin}, {operations} compiled operations"

    def pip(self, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
        """Run pip in this environment; see `run`."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        return run([*pip, *arguments], env=env)


def why_not_importable(python: str) -> str | None:
    """Return the error that importing Detectron2 ends with, None where it imports."""
    try:
        run([python, "-W", "ignore", "-c", IMPORT_CHECK])
    except SourceError as error:
        return str(error).splitlines()[-1].strip()
    return None


# ---------------------------------------------------------------- official source


def build_official(environment: Environment, work: Path, repository: str) -> Path:
    """Build a wheel from Detectron2's own source, at the pinned commit, and return its path.

    What the build needs is looked for first, as it would otherwise fail after minutes.

    Raises:
        SourceError: something the build needs is missing, or the build failed.
    """
    if shutil.which("git") is None:
        raise SourceError("git is not installed")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SourceError(f"there is no C++ compiler: no {compiler} (CXX names another)")
    if not (environment.include / "Python.h").is_file():
        raise SourceError(f"there is no Python.h in {environment.include} (python3-dev brings it)")
    try:
        run(["git", "ls-remote", "--exit-code", repository, "HEAD"], timeout=REACH_TIMEOUT)
    except SourceError as error:
        raise SourceError(f"{repository} cannot be reached: {error}") from None

    if Path(repository).exists():
        repository = str(Path(repository).resolve())
    source = work / "source"
    run(["git", "init", "--quiet", source])
    git = ["git", "-C", source]
    try:
        run([*git, "fetch", "--quiet", "--depth=1", repository, COMMIT], timeout=FETCH_TIMEOUT)
    except SourceError:  # not every server hands out a single commit
        run([*git, "fetch", "--quiet", repository, "refs/*:refs/*"], timeout=FETCH_TIMEOUT)
    run([*git, "checkout", "--quiet", "--detach", COMMIT])

    log.info("building Detectron2 from %s; this takes minutes", repository)
    # Without isolation the build sees the torch it is to run with.
    environment.pip("install", SETUPTOOLS)
    environment.pip(
        *("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", work, source),
        env={"D2_VERSION_SUFFIX": OFFICIAL_SUFFIX},
    )
    return next(work.glob("detectron2-*.whl"))


# ---------------------------------------------------------------- the labgym wheel


def download_labgym(environment: Environment, work: Path) -> Path:
    """Download the labgym wheel and return its path.

    Raises:
        SourceError: it cannot be had, or is not the file that was pinned.
    """
    # labgym asks for an older Python; Detectron2's files in it do not.
    environment.pip(
        *("download", "--no-deps", "--only-binary=:all:", "--python-version=3.10"),
        *("--dest", work, f"labgym=={LABGYM_VERSION}"),
    )
    wheel = next(work.glob("labgym-*.whl"))
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if checksum != LABGYM_SHA256:
        raise SourceError(f"{wheel.name} has sha256 {checksum}, expected {LABGYM_SHA256}")
    return wheel


def strip_prefix(text: str) -> str:
    """Take the prefix off every module path: LabGym.detectron2.x becomes detectron2.x."""
    text = re.sub(r"\bfrom LabGym import detectron2\b", "import detectron2", text)
    return re.sub(r"\bLabGym\.(?=detectron2\b)", "", text)


def extract_detectron2(labgym: Path) -> tuple[dict[str, bytes], int]:
    """Return Detectron2's files in the labgym wheel, put right, and how many had the prefix.

    Raises:
        SourceError: a file still speaks of LabGym afterwards, or a patch does not apply.
    """
    files: dict[str, bytes] = {}
    prefixed = 0
    with zipfile.ZipFile(labgym) as archive:
        for name in archive.namelist():
            if not name.startswith("LabGym/detectron2/") or name.endswith("/"):
                continue
            original = archive.read(name).decode()
            text = strip_prefix(original)
            if "labgym" in text.lower():
                raise SourceError(f"{name} still names LabGym once the prefix is off")
            prefixed += text != original
            files[name.removeprefix("LabGym/")] = text.encode()
    for name, old, new, _ in PATCHES:
        text = files.get(name, b"").decode()
        if text.count(old) != 1:
            raise SourceError(f"{name} does not have the line to patch: {old}")
        files[name] = text.replace(old, new).encode()
    return files, prefixed


def write_notice(prefixed: int) -> str:
    """Return the NOTICE of the pure-Python wheel: what it is, and what was changed."""
    patches = "\n".join(f"* {name}: {new}\n  {why}" for name, _, new, why in PATCHES)
    return f"""Detectron2 0.6
Copyright (c) Facebook, Inc. and its affiliates.
{REPOSITORY}

Licensed under the Apache License, Version 2.0; see LICENSE.

These are Detectron2's files as labgym {LABGYM_VERSION} carries them, without the compiled
operations and with nothing of labgym itself. Changed by tools/install_detectron2.py of
ss_detectron:
* the prefix "LabGym." was taken off module paths, in {prefixed} files
{patches}
"""


def write_wheel(files: dict[str, bytes], notice: str, folder: Path) -> Path:
    """Write the files as a wheel of the distribution detectron2 and return its path.

    The same files always give the same wheel, byte for byte.
    """
    version = f"0.6{LABGYM_SUFFIX}"
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {version}",
        "Summary: Detectron2 in pure Python, without its compiled operations",
        f"Home-page: {REPOSITORY}",
        "Author: FAIR",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "License-File: NOTICE",
        "Requires-Python: >=3.8",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
    ]
    tags = ["Wheel-Version: 1.0", "Generator: install_detectron2", "Root-Is-Purelib: true"]
    info = f"detectron2-{version}.dist-info"
    licence = Path(__file__).resolve().parent.parent / "LICENSE"  # Apache-2.0, as Detectron2's
    contents = {
        **dict(sorted(files.items())),
        f"{info}/LICENSE": licence.read_bytes(),
        f"{info}/NOTICE": notice.encode(),
        f"{info}/METADATA": "\n".join([*metadata, ""]).encode(),
        f"{info}/WHEEL": "\n".join([*tags, "Tag: py3-none-any", ""]).encode(),
        f"{info}/top_level.txt": b"detectron2\n",
    }
    record = [f"{name},{digest(data)},{len(data)}" for name, data in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()

    wheel = folder / f"detectron2-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return wheel


def digest(data: bytes) -> str:
    """Return the hash of a file as a wheel's RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def build_pure(environment: Environment, work: Path) -> Path:
    """Make the pure-Python wheel from what the package index has, and return its path.

    Raises:
        SourceError: see `download_labgym` and `extract_detectron2`.
    """
    files, prefixed = extract_detectron2(download_labgym(environment, work))
    return write_wheel(files, write_notice(prefixed), work)


# ---------------------------------------------------------------- installing


def remove_remains(environment: Environment) -> None:
    """Remove what an installation put there that did not get to its end.

    The marker lists the wheel's files, as pip knows none of them before it has finished.
    """
    marker = environment.site / MARKER
    names = [Path(name) for name in marker.read_text().splitlines()]
    try:
        environment.pip("uninstall", "--yes", "detectron2")
    except SourceError as error:
        log.debug("pip could not uninstall: %s", error)
    for name in names:
        (environment.site / name).unlink(missing_ok=True)
    folders = {parent for name in names for parent in name.parents if parent.name}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        path = environment.site / folder
        if folder.suffix == ".dist-info":  # pip adds files to this one
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            shutil.rmtree(path / "__pycache__", ignore_errors=True)
            if not any(path.iterdir()):
                path.rmdir()
    marker.unlink()


@contextmanager
def all_or_nothing(environment: Environment, names: Iterable[str]) -> Iterator[None]:
    """Remove the files named where the body fails, and at the next start where it was killed."""
    marker = environment.site / MARKER
    marker.write_text("\n".join(names))
    try:
        yield
    except BaseException:
        log.warning("removing what was installed")
        remove_remains(environment)
        raise
    marker.unlink()


def install(environment: Environment, wheel: Path, work: Path) -> None:
    """Install a wheel of Detectron2 and its dependencies, and see that it imports.

    Raises:
        SourceError: pip failed or it does not import. Nothing of the wheel is left then.
    """
    constraints = work / "constraints.txt"
    constraints.write_text("\n".join(environment.protected))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    with all_or_nothing(environment, names):
        # The official wheel does not say that it needs pkg_resources.
        environment.pip("install", "--constraint", constraints, wheel, SETUPTOOLS)
        reason = why_not_importable(environment.python)
        if reason is not None:
            raise SourceError(f"it was installed but does not import: {reason}")


def check_found(environment: Environment, source: str) -> bool:
    """Return whether the Detectron2 found is to be kept.

    Raises:
        SetupError: it is neither what was asked for nor this tool's to replace.
    """
    if environment.source == "none":
        return False
    reason = why_not_importable(environment.python)
    if reason is None and source in ("auto", environment.source):
        return True
    if reason is None:
        raise SetupError(
            f"there is {environment.describe()}. To have it from the source {source}, "
            f"remove that first: {environment.python} -m pip uninstall detectron2"
        )
    if environment.source == "other":
        raise SetupError(
            f"{environment.describe()}, does not import: {reason}\nRepair or remove it first."
        )
    log.warning("%s, does not import (%s) and is replaced", environment.describe(), reason)
    return False


def ensure_detectron2(
    python: str, source: str, repository: str, wheel_dir: Path | None = None
) -> Environment:
    """Install Detectron2 unless it is there, and return the environment as it is then.

    Raises:
        SetupError: no source could be used, or what is there stands in the way.
    """
    environment = Environment.of(python)
    if (environment.site / MARKER).exists():
        log.warning("an earlier installation was interrupted; removing what it left")
        remove_remains(environment)
        environment = Environment.of(python)
    if check_found(environment, source):
        log.info("kept: %s", environment.describe())
        if wheel_dir is not None:
            log.warning("no wheel was made, so there is none to keep")
        return environment
    try:
        run([python, "-c", "import torch, torchvision"])
    except SourceError as error:
        reason = str(error).splitlines()[-1].strip()
        raise SetupError(
            f"torch and torchvision must be installed first, and import ({reason}): "
            "pip install -r requirements/demo.txt"
        ) from None

    failures = []
    for name in SOURCES if source == "auto" else (source,):
        log.info("trying the source %s", name)
        with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
            work = Path(folder)
            try:
                if name == "official":
                    wheel = build_official(environment, work, repository)
                else:
                    wheel = build_pure(environment, work)
                install(environment, wheel, work)
            except SourceError as error:
                log.warning("the source %s cannot be used: %s", name, error)
                failures.append(f"{name}: {shorten(error)}")
                continue
            if wheel_dir is not None:
                wheel_dir.mkdir(parents=True, exist_ok=True)
                log.info("kept the wheel: %s", shutil.copy(wheel, wheel_dir))
        environment = Environment.of(python)
        log.info("installed: %s", environment.describe())
        return environment
    raise SetupError(
        "no Detectron2 was installed (" + "; ".join(failures) + "). Make one of the sources "
        "usable as said above, name a copy of the repository with --repository, or install "
        "Detectron2 by hand; this tool keeps one that imports."
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        choices=("auto", *SOURCES),
        default="auto",
        help="the only source to use; auto tries both (default: %(default)s)",
    )
    parser.add_argument(
        "--repository",
        default=os.environ.get("DETECTRON2_REPOSITORY", REPOSITORY),
        help="git URL or local path of the official source "
        "(default: DETECTRON2_REPOSITORY, else %(default)s)",
    )
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="keep the wheel made there; the pure-Python one can be carried to any machine",
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the Python of the environment to install into (default: the one that runs this)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="only print in one line what is installed; fail where nothing is",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if args.report:
        environment = Environment.of(args.python)
        print(environment.describe())
        return 1 if environment.source == "none" else 0
    try:
        ensure_detectron2(args.python, args.source, args.repository, args.wheel_dir)
    except (SetupError, SourceError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    # End the processes started, and clean up, on these too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
