# One target for each thing a person does; `make help` lists them.
#
# Needs make, git and Python 3.10 or newer with its venv module. All else goes into .venv, at the versions of
# constraints.txt. Nothing is written outside this folder but pip's cache.
#
# torch: pip takes whatever build of the pinned version its index offers. On Linux, PyPI's build carries CUDA and
# serves GPU and CPU alike; it is a few GB. Another build is chosen by its index, for example
#     CPU only, much smaller:    make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#     another CUDA version:      make setup TORCH_INDEX=https://download.pytorch.org/whl/cu126
# A build for your GPU that is already installed elsewhere: activate that environment and use
# `pip install -e ".[ocr]"` instead of make.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
# Further arguments of the command behind a target: make demo ARGS="--seed 1", make test ARGS="-k centering".
ARGS ?=
# Runs at a time of make results and make results-quick, and processes of make test; one CPU thread each. A debugger needs
# one process of tests: make test JOBS=0 ARGS="--pdb -k centering".
JOBS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt

# The first free name among runs/NAME, runs/NAME-2, runs/NAME-3, ...: an earlier run is never overwritten.
fresh = out=runs/$(1); n=2; while [ -e "$$out" ]; do out=runs/$(1)-$$n; n=$$((n+1)); done

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo train-ocr train-geneval results-quick results pretrain test test-slow lint format bench-scripts clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.dev ## install everything into .venv, once

demo: $(VENV)/.runtime ## train the bundled model on its OCR reward; a new folder runs/demo*
	@$(call fresh,demo); set -x; $(BIN)/crd train ocr-demo --output_dir "$$out" $(ARGS)

train-ocr: $(VENV)/.runtime ## the longer OCR recipe; a new folder runs/ocr-tiny*
	@$(call fresh,ocr-tiny); set -x; $(BIN)/crd train ocr-tiny --output_dir "$$out" $(ARGS)

train-geneval: $(VENV)/.runtime ## train it on its GenEval reward; a new folder runs/geneval-tiny*
	@$(call fresh,geneval-tiny); set -x; $(BIN)/crd train geneval-tiny --output_dir "$$out" $(ARGS)

results-quick: $(VENV)/.bench ## compare the objectives on small runs, under an hour on 2 cores; resumable, in runs/bench-quick
	$(BIN)/crd bench quick --output_dir runs/bench-quick --jobs $(JOBS) $(ARGS)

results: $(VENV)/.bench ## the full comparison and the ablations, 14 to 42 hours on 2 cores; resumable, in runs/bench-*
	$(BIN)/crd bench head-to-head --output_dir runs/bench-head-to-head --jobs $(JOBS) $(ARGS)
	$(BIN)/crd bench ablations --output_dir runs/bench-ablations --jobs $(JOBS) $(ARGS)

pretrain: $(VENV)/.dev ## train the bundled model itself from scratch (hours); resumable, state in pretrain/
	$(BIN)/python -m crd.tiny.pretrain $(ARGS)

test: $(VENV)/.dev ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff mend and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-scripts: $(VENV)/.dev ## measure single parts: every script of benchmarks/; not `crd bench`
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean: ## remove .venv, caches and build output; runs/ and pretrain/ stay
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: no $(PYTHON); install Python 3.10 or newer, or name yours: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: Python 3.10 or newer is needed, got `$(PYTHON) --version`; make setup PYTHON=python3.11" >&2; exit 2; }
	@# Debian ships `venv` without `ensurepip`, and then leaves half an environment behind.
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make environments; on Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# What running a model takes; make demo needs no more.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[ocr]"
	@touch $@

# With the figures of a benchmark.
$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[ocr,bench]"
	@touch $(VENV)/.runtime $@

# And what working on the code takes; it contains the above.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.runtime $(VENV)/.bench $@
