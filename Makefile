# Every target works from nothing: it makes a virtual environment in .venv and installs what it needs there.
# Needs Python >= 3.10. Options: PYTHON=python3.12, TORCH='torch==2.13.0 --index-url …', ARGS='-k pattern'.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH  ?= torch==2.13.0
OUT    ?= tallstore-demo
ARGS   ?=

VENV := .venv
BIN  := $(VENV)/bin
# A process a core, each file of tests in one: files share what is costly to make. In the order of their names: that has the
# long ones first, and those of many short tests last.
PYTEST := $(BIN)/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# ---- environments: a stamp file each, renewed when pyproject.toml changes

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tallstore needs Python 3.10 or newer: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	@# On its own and first: the choice of build (CPU, CUDA, ROCm) is the machine's, not a resolver's.
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[dev,demo,docs,examples]'
	@touch $@ $(VENV)/demo.stamp

# ---- what people run

.PHONY: demo
demo: $(VENV)/demo.stamp ## train six experts, pack them, load and score them (OUT=folder)
	$(BIN)/tallstore demo --out '$(OUT)'

.PHONY: test
test: $(VENV)/dev.stamp ## the tests, without the slow ones
	$(PYTEST) $(ARGS)

.PHONY: test-all
test-all: $(VENV)/dev.stamp ## all tests
	$(PYTEST) -m 'slow or not slow' $(ARGS)

.PHONY: check
check: lint test ## what CI runs: lint, types, layers, vectors, tests

.PHONY: coverage
coverage: $(VENV)/dev.stamp ## the tests, and which lines they run
	$(PYTEST) --cov --cov-report=term $(ARGS)

.PHONY: lint
lint: $(VENV)/dev.stamp ## formatting, lint, types, layers, and whether vectors and schemas are current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python spec/make_vectors.py --check
	$(BIN)/python spec/make_schema.py --check

.PHONY: format
format: $(VENV)/dev.stamp ## format the code and fix what can be fixed safely
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: vectors
vectors: $(VENV)/dev.stamp ## write the specification's vectors and schemas anew
	$(BIN)/python spec/make_vectors.py
	$(BIN)/python spec/make_schema.py

.PHONY: freeze
freeze: $(VENV)/dev.stamp ## freeze the vectors and schemas of a version that is released, once
	$(BIN)/python spec/freezing.py

.PHONY: docs
docs: $(VENV)/dev.stamp ## the documentation's site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: clean
clean: ## remove the environment and everything that was made
	rm -rf $(VENV) build dist site '$(OUT)' htmlcov .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find tallstore tests spec benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
