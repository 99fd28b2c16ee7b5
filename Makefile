# `make demo` shows what it does, `make test` checks everything; each makes the virtual environment it needs.
PYTHON ?= python3
# Processes that run tests side by side.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TESTS := $(VENV)/installed-test
DEMO := $(VENV)/installed-demo

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format unit labs benchmark coverage packages clean

help:
	@echo 'make demo       run notebooks/00-first-array.ipynb on this machine; the page and the picture go to demo/'
	@echo 'make test       all checks: lint, types, tests, tests on a real Slurm, benchmarks'
	@echo 'make lint       ruff and mypy           make format     rewrite the code as ruff wants it'
	@echo 'make unit       tests without Slurm     make labs       tests on a real Slurm'
	@echo 'make benchmark  ratios to their floors  make coverage   lines and branches that the tests reach'
	@echo 'make packages   Slurm from the system   make clean      remove all that make made'

demo: $(DEMO)
	$(BIN)/python .ci/demo.py notebooks/00-first-array.ipynb demo

# The benchmarks come last and alone: they measure.
test: lint packages
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not benchmark' --durations 15
	$(PYTEST) -m benchmark tests/benchmarks

lint: $(TESTS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(TESTS)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

unit: $(TESTS)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not benchmark' --ignore tests/labs

labs: packages
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not benchmark' tests/labs

benchmark: packages
	$(PYTEST) -m benchmark tests/benchmarks

coverage: packages
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS) --dist worksteal -m 'not benchmark'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

packages: $(TESTS)
	$(BIN)/python .ci/packages.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo '$(PYTHON) is missing or older than 3.10; choose another: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo 'no virtual environment can be made; on Debian: apt-get install python3-venv' >&2; exit 1; }

$(DEMO): pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[demo]'
	@touch $@

$(TESTS): pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[test]'
	@touch $@ $(DEMO)

clean:
	rm -rf $(VENV) build dist demo .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache test-artefacts
