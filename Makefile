# All targets do their set-up themselves: in .venv, test-core in an environment of its own.
# Needed: make, Python 3.11 or newer with its venv module, and a reachable package index.
#
#   make test PYTHON=python3.12            another Python than python3, for a new .venv
#   make test DETECTRON2_SOURCE=official   where Detectron2 comes from: auto, official or pypi
#   make test-core TORCH=2.4.1             another torch than the one in requirements/demo.txt

PYTHON ?= python3
DETECTRON2_SOURCE ?= auto
TORCH ?= $(shell sed -n 's/^torch==//p' requirements/demo.txt)

# Two tests at a time, those of a file one after the other.
PARALLEL := -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One stamp per finished step, written last: a step that was interrupted has none and is redone.
STAMPS := $(VENV)/.stamps
READY := $(STAMPS)/package $(STAMPS)/detectron2-$(DETECTRON2_SOURCE)

CORE := .venv-core-$(TORCH)-$(notdir $(PYTHON))

.PHONY: help demo test test-all test-core lint setup clean distclean

# Two steps at once, under make -j, would be two pips in one environment.
.NOTPARALLEL:

help:
	@echo "make demo       train a small RetinaNet with sign-symmetry on the CPU and report on it"
	@echo "make test       run the tests"
	@echo "make test-all   and the long ones: resumed runs of every rule, thousands of steps"
	@echo "make test-core  the core's tests, with torch alone: TORCH=2.4.1 or any other version"
	@echo "make lint       check style, the direction of imports, and the core's types"
	@echo "make setup      only what demo and test need, in $(VENV)"
	@echo "make clean      remove build leftovers, caches and the demo's output"
	@echo "make distclean  the same, $(VENV) and the environments of test-core"

demo: $(READY)
	@$(BIN)/python tools/install_detectron2.py --report
	$(BIN)/python tools/train_net.py --config-file quick/shapes_retinanet_ss.yaml OUTPUT_DIR output/demo
	$(BIN)/python tools/report_run.py output/demo

test: $(READY)
	@$(BIN)/python tools/install_detectron2.py --report
	$(BIN)/python -m pytest tests $(PARALLEL)

test-all: $(READY)
	@$(BIN)/python tools/install_detectron2.py --report
	$(BIN)/python -m pytest tests $(PARALLEL) -m "slow or not slow"

# A file there that needs Detectron2 skips itself (pytest.importorskip), and -rs says so.
test-core: $(CORE)/.ready
	$(CORE)/bin/python -m pytest $(PARALLEL) -rs \
	  tests/layers tests/learners tests/solver tests/test_alignment.py tests/test_import.py

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

setup: $(READY)

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there." \
	  "Name a Python >= 3.11: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python >= 3.11 is needed, $(PYTHON) is `$(PYTHON) --version 2>&1`." \
	  "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "error: $(PYTHON) lacks the modules venv or" \
	  "ensurepip. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@# An interrupted .venv is completed, and made anew only where that leaves it without pip.
	@{ $(PYTHON) -m venv $(VENV) && $(PIP) --version >/dev/null 2>&1; } \
	  || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "error: $(PYTHON) could not make $(VENV); see above" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# mypy reads torch's types.
$(STAMPS)/lint: requirements/lint.txt $(STAMPS)/requirements
	@$(PIP) install -q -r $< || { $(PIP_FAILED) }
	@touch $@

$(STAMPS)/requirements: requirements/demo.txt requirements/core.txt requirements/test.txt \
  | $(STAMPS)/venv
	@echo "Installing torch and the other requirements into $(VENV): minutes, and several GB."
	@$(PIP) install -r requirements/test.txt || { $(PIP_FAILED) }
	@$(BIN)/python -c 'import torch, torchvision' || { echo "error: torch does not load; see above." \
	  "Remove $(VENV) and try again." >&2; exit 1; }
	@$(BIN)/python -c 'import cv2' || { echo "error: OpenCV does not load; see above. If it misses" \
	  "libGL.so.1 or libgthread: apt-get install libgl1 libglib2.0-0, or write" \
	  "opencv-python-headless for opencv-python in requirements/demo.txt." >&2; exit 1; }
	@touch $@

$(STAMPS)/package: setup.py pyproject.toml $(STAMPS)/requirements
	@$(PIP) install -q --no-deps --no-build-isolation -e . || { $(PIP_FAILED) }
	@touch $@

$(STAMPS)/detectron2-$(DETECTRON2_SOURCE): tools/install_detectron2.py $(STAMPS)/requirements
	$(BIN)/python tools/install_detectron2.py --source $(DETECTRON2_SOURCE)
	@touch $@

$(CORE)/.ready: requirements/core.txt
	@$(PYTHON) -m venv $(CORE)
	@$(CORE)/bin/python -m pip install torch==$(TORCH) -r $< || { echo "error: pip failed; see" \
	  "above. Is there a torch $(TORCH) for `$(PYTHON) --version`? (2.4 has wheels for Python 3.8" \
	  "to 3.12, 2.14 for 3.10 to 3.14; the tests need 3.10.) Name another Python:" \
	  "make test-core TORCH=$(TORCH) PYTHON=python3.12" >&2; exit 1; }
	@touch $@

PIP_FAILED = echo "error: pip failed; see above. Is the package index reachable, and does it have" \
  "these versions for `$(BIN)/python --version`? After an interrupted set-up: make distclean." \
  >&2; exit 1;

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache output/demo
	find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV)-core-*
