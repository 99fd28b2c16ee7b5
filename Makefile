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
FRONT_END := $(VENV)/installed-front-end
# What the front end is made of, and how its tools are called.
SOURCES := $(shell find labextension/src labextension/style labextension/schema -type f) labextension/package.json
MODULES := labextension/node_modules/.yarn-state.yml
JLPM := cd labextension && PATH="$(CURDIR)/$(BIN):$$PATH" jlpm
INSTALLED := $(VENV)/share/jupyter/labextensions/jupyter-hybrid

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format unit labs browser jest front-end benchmark coverage packages clean

help:
	@echo 'make demo       run notebooks/00-first-array.ipynb on this machine; the page and the picture go to demo/'
	@echo 'make test       all checks: lint, types, tests, tests on a real Slurm, benchmarks'
	@echo 'make lint       ruff, mypy, tsc, eslint make format     rewrite the code as ruff and prettier want it'
	@echo 'make unit       tests without Slurm     make labs       tests on a real Slurm'
	@echo 'make jest       tests of the panel model make browser    tests of the panel in a real browser'
	@echo 'make front-end  build the panel for the JupyterLab in .venv'
	@echo 'make benchmark  ratios to their floors  make coverage   lines and branches that the tests reach'
	@echo 'make packages   Slurm from the system   make clean      remove all that make made'

demo: $(DEMO)
	$(BIN)/python .ci/demo.py notebooks/00-first-array.ipynb demo

# The benchmarks come last and alone: they measure.
test: lint packages jest front-end
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not benchmark' --durations 15
	$(PYTEST) -m benchmark tests/benchmarks

lint: $(TESTS) $(MODULES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(JLPM) lint

format: $(TESTS) $(MODULES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(JLPM) format

unit: $(TESTS) jest
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not benchmark' --ignore tests/labs --ignore tests/ui

jest: $(MODULES)
	$(JLPM) test

# The pages are kept in test-artefacts/ui.
browser: packages front-end
	$(PYTEST) -n 0 tests/ui

front-end: $(FRONT_END)

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

$(MODULES): labextension/yarn.lock | $(TESTS)
	$(JLPM) install --immutable
	@touch $@

# The JupyterLab in .venv sees each build at once.
$(FRONT_END): $(SOURCES) $(MODULES) labextension/hatch_build.py
	$(BIN)/python labextension/hatch_build.py
	@rm -rf $(INSTALLED) && mkdir -p $(dir $(INSTALLED)) && ln -s $(CURDIR)/jupyter_hybrid/labextension $(INSTALLED)
	@touch $@

clean:
	rm -rf labextension/lib labextension/node_modules jupyter_hybrid/labextension
	rm -rf $(VENV) build dist demo .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache test-artefacts
