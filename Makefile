# Needs Python 3.11 or later and nothing else: everything is installed into .venv.
#
#   make quickstart    install and train the small model of configs/quickstart.yaml
#   make test          install for development, then lint, types and tests (CI=1: slow ones too)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := $(CURDIR)/.venv/bin
STAGE  ?= $(CURDIR)/build/stage

PLUGINS := modalities tasks configs demos
SOURCES := unified $(PLUGINS) tests examples $(wildcard benchmarks)

.PHONY: quickstart test lint types tests stage format

quickstart: .venv/installed
	$(BIN)/python -m unified.demos.quickstart

test: lint types tests

lint: .venv/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: .venv/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: .venv/installed-dev stage
	cd $(STAGE) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p unified

# one thread a test process: more would only wait for each other
tests: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(if $(CI),,-m "not slow")

# A type checker cannot follow an installation that keeps unified.modalities in ./modalities and
# passes over what it does not find, so it is shown the packages where an installed one has them.
stage:
	rm -rf $(STAGE)
	mkdir -p $(STAGE)
	cp -R unified $(STAGE)/unified
	cp -R $(PLUGINS) $(STAGE)/unified/

# torch and torchvision first: the resolver then settles on one pair of them before all the rest.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install torch torchvision
	$(BIN)/pip install -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -e '.[dev]'
	touch $@
