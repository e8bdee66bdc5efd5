# Each target sets up what it needs: a virtual environment in .venv, made once and again when pyproject.toml changes.

PYTHON ?= python3
# Everyday work is done with one torch, with which the tests' times were recorded. `make TORCH=2.11.0 check` works in an
# environment of its own, with that torch.
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SWEEP_OUT ?= build/sweep.jsonl

# Tests run in two processes, of one thread each. Their Pythons keep compiled files, whatever the environment says: a
# test run starts Python some fifty times.
PYTEST := $(BIN)/python -m pytest -n 2
export OMP_NUM_THREADS = 1
test%: export PYTHONDONTWRITEBYTECODE =

.PHONY: help venv quickstart check test test-fast test-slow test-processes test-long gpu sweep lint format viz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "graphpart needs Python 3.11 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[test]' 'torch==$(or $(TORCH),2.13.0)'
	@touch $@

venv: $(READY) ## make .venv with graphpart, its tests' needs and the examples' needs

quickstart: $(READY) ## train a small GPT-2 split over two CPU workers, with a control on one device
	$(BIN)/python examples/quickstart.py

check: lint test-fast ## ruff, mypy and the fast tests: a verdict in two minutes

test: test-fast test-processes test-slow ## all tests, the fast ones first

test-fast: $(READY) ## the tests that are not marked slow
	$(PYTEST) -m "not slow"

test-slow: $(READY) ## the slow tests of one process
	$(PYTEST) -m "slow and not processes and not long"

test-processes: $(READY) ## the slow tests of several processes
	$(PYTEST) -m "slow and processes and not long"

test-long: $(READY) ## every case, those left out of `make test` included: for a release, or a change of much
	$(PYTEST) -m "slow"

gpu: ## what needs a CUDA device, within five minutes: see docs/gpu.md. Installs nothing: name a Python that has torch
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(GPU)

sweep: ## real architectures of transformers, timm, torchvision, diffusers, torch_geometric: see docs/sweep.md. Resumes; installs nothing
	PYTHONPATH=. $(PYTHON) benchmarks/sweep.py --out $(SWEEP_OUT) $(SWEEP); found=$$?; \
		PYTHONPATH=. $(PYTHON) benchmarks/sweep.py --out $(SWEEP_OUT) --table docs/sweep.md; exit $$found

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

viz: $(READY) ## draw the pictures of the README again
	$(BIN)/python viz/gallery.py

clean: ## remove the environments and what tools left
	rm -rf .venv .venv-torch-* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
