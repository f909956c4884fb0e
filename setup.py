"""Packaging of ss_detectron. Tool configuration is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """Return the version that ss_detectron/__init__.py states, without importing it.

    Importing the package needs torch, which a build need not have.

    Raises:
        RuntimeError: no version is stated.
    """
    text = (HERE / "ss_detectron" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("ss_detectron/__init__.py states no __version__")
    return match.group(1)


setup(
    name="ss_detectron",
    version=read_version(),
    description="Sign-symmetry, feedback alignment and their relatives, for PyTorch and Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["ss_detectron", "ss_detectron.*"]), "ss_detectron.configs"],
    # The configs stand at the top of the repository, where a Detectron2 project has them, and are
    # installed inside the package, where an installed copy can find them.
    package_dir={"ss_detectron.configs": "configs"},
    package_data={"ss_detectron": ["py.typed"], "ss_detectron.configs": ["*.yaml", "*/*.yaml"]},
    # The code uses no syntax newer than 3.10. The versions pinned in requirements/ ask for 3.11,
    # but an environment that has its own torch and Detectron2 needs none of them.
    python_requires=">=3.10",
    # Installing must not change the torch, torchvision, OpenCV or Detectron2 that are there: hence
    # lower bounds only, and extras.
    install_requires=["torch>=2.4"],
    extras_require={
        # What the plug-in imports. Two names are left out:
        #   detectron2  is not published under that name; see tools/install_detectron2.py.
        #   opencv      comes as one of several distributions that overwrite each other's cv2
        #               (opencv-python, opencv-python-headless, conda's); pip cannot tell that one
        #               of them is already there. Where there is none, ask for the extra `opencv`.
        "detectron2": [
            "torchvision>=0.19",
            "numpy",
            "pycocotools>=2.0.2",
            "fvcore>=0.1.5",
            "iopath>=0.1.7",
            "matplotlib",
            "Pillow",
            "pyyaml",
            "tabulate",
            "tqdm",
        ],
        "opencv": ["opencv-python"],
        # TEST.COCO_API hotcoco.
        "hotcoco": ["hotcoco>=1.3"],
        # DATALOADER.DECODER dali. For a torch with CUDA 12, install nvidia-dali-cuda120 instead.
        "dali": ["nvidia-dali-cuda130"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
