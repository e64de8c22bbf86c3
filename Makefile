PYTHON ?= python3
VENV := .venv
# One thread a worker: two workers with two threads each would wait for one another's cores.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Without an NVIDIA driver the CPU build serves, instead of gigabytes of CUDA that nothing would use.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu)
# A CUDA build of torch brings the Triton that fits it; the CPU build brings none, and the kernels' tests need one.
TRITON ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,triton==3.6.0)

.PHONY: setup demo test test-slow test-gpu lint format docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("bittern needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH_INDEX) "$(TORCH)" $(TRITON)
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs,metrics]"
	@touch $@

demo: setup
	$(BIN)/bittern demo

test: setup
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup
	$(PYTEST) -m "slow and not gpu"

test-gpu: setup
	$(PYTEST) -m gpu -n 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright -p .ci/names.json --level error --pythonpath $(VENV)/bin/python
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf out docs/_build .pytest_cache .ruff_cache .hypothesis
