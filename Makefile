# These commands do everything on a machine with Python 3.11, make and pip:
#   make demo        set up .venv, run the quickstart, print where the report is
#   make check       set up .venv, check style, types and import rules, run the tests that start no process
#   make test        the same with all tests but the slow ones
#   make test-slow   the slow tests
#   make test-numerics   the tests that compare numbers, under several settings of the numerical libraries

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo check test test-slow test-numerics lint benchmarks clean

demo: $(VENV)/installed
	$(BIN)/npeff run jobs/quickstart.yaml

# Style, types, import rules, and the tests that start no process: under three minutes on two cores.
check: $(VENV)/installed-dev lint
	$(PYTEST) -m "not process and not ray and not slow"

test: $(VENV)/installed-dev lint
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

test-numerics: $(VENV)/installed-dev
	$(BIN)/python tests/numerics.py --numprocesses 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: $(VENV)/installed-dev
	for script in tests/benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
