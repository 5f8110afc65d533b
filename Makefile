# Everything a fresh machine needs: Python >= 3.11 and a C++ compiler; `make test` and `make demo` do the rest.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help venv build test check lint types demo bench clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16
	@echo "Variables: PYTHON, VENV, TORCH (an exact pin), TORCH_INDEX, PYTEST_ARGS, WORKERS, FASTMETA_BUILD=auto|cpu|cuda|none"

venv: $(VENV)/.torch ## Make the virtual environment with a CPU build of torch
build: $(VENV)/.package ## Build the extension and install the package in place

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 was found; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A CPU build, never the CUDA wheel with its gigabytes: first from the package sources this machine is set up with, then
# from PyTorch's index of CPU builds. On macOS the ordinary wheel is one.
$(VENV)/.torch: $(VENV)/.python
	@if [ "$$(uname)" = Darwin ]; then $(PIP) install "$(TORCH)" numpy; \
	else $(PIP) install -q "$(TORCH)+cpu" numpy 2>/dev/null \
		|| $(PIP) install --index-url "$(TORCH_INDEX)" "$(TORCH)" numpy; fi
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q -e '.[test]'
	@touch $@

test: $(VENV)/.package ## Run the tests
	FASTMETA_REQUIRE="$${FASTMETA_REQUIRE-native}" OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		-n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: lint types ## Run the linter and the type checker

lint: $(VENV)/.package ## Check style and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.package ## Check types
	$(BIN)/mypy

demo: $(VENV)/.package ## Run the demonstration
	$(BIN)/fastmeta demo

bench: $(VENV)/.package ## Time the meta-step against its peers
	$(PIP) install -q -e '.[bench]'
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

clean: ## Remove what was built; the virtual environment stays
	rm -rf build dist *.egg-info fastmeta/_C.* fastmeta/_cuda.* fastmeta/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.package
	find fastmeta tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
