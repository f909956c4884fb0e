"""What importing the package brings with it, and what it does without Detectron2."""

import subprocess
import sys

import pytest

import ss_detectron

CORE = "import sys; sys.modules['detectron2'] = None\nimport ss_detectron\n"


def _python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_brings_torch_alone():
    script = """
import sys, torch
before = set(sys.modules)
import ss_detectron, ss_detectron.alignment, ss_detectron.learners, ss_detectron.solver
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
"""
    assert _python(script) == "ss_detectron"


def test_the_plug_ins_names_say_what_is_missing():
    script = CORE + (
        "for name in ('add_ss_config', 'find_config'):\n"
        "    assert name in dir(ss_detectron)\n"
        "    try: getattr(ss_detectron, name)\n"
        "    except ImportError as error: print('install_detectron2.py' in str(error))\n"
        "assert not hasattr(ss_detectron, 'nothing_of_the_kind')\n"
    )
    assert _python(script).split() == ["True", "True"]


def test_modules_of_the_plug_in_say_what_to_install():
    script = CORE + (
        "import importlib\n"
        "for name in ('config', 'data', 'engine', 'experiments.runs', 'export'):\n"
        "    try: importlib.import_module(f'ss_detectron.{name}')\n"
        "    except ImportError as error: print('install_detectron2.py' in str(error))\n"
    )
    assert _python(script).split() == 5 * ["True"]


@pytest.mark.parametrize("name", ss_detectron.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ss_detectron, name) is not None
