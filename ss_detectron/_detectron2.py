"""Imported first in the Detectron2 plug-in: says what to install where Detectron2 is not there."""

import warnings

# On import, fvcore and Detectron2 use what new versions of torch warn of.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", append=True)

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "this part of ss_detectron extends Detectron2, which is not installed (and not on PyPI). "
        "tools/install_detectron2.py of the ss_detectron source installs it; or see "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    ) from error
