# These commands do everything on a machine with Python 3.11, make and pip:
#   make demo        set up .venv, run the quickstart, print where the report is
#   make check       set up .venv, check style, types and import rules, run the tests of the parts that start no process
#   make test        the same with all tests but the slow ones
#   make test-slow   the slow tests
#   make test-numerics   the tests that compare numbers, under several settings of the numerical libraries
#   make test-oldest     the tests with the oldest versions of the dependencies
#   make docs        the documentation as a site, build/site/index.html, with all links checked
#   make notebooks   execute all notebooks in examples
#   make test-pythons    types, and the tests that need no torch, on Python 3.12 and 3.13

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
check test test-slow test-numerics test-oldest benchmarks: export OMP_NUM_THREADS ?= 1
# The tests write thousands of files durably. In memory, none of them waits for a disk. See tmp_path in pytest's manual.
MEMORY := $(shell df --output=avail /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 4194304 { print "/dev/shm" }')
ifneq ($(MEMORY),)
check test test-numerics test-oldest tests tests-of-rooms: export PYTEST_DEBUG_TEMPROOT ?= $(MEMORY)
endif
# Otherwise, every process of a test would compile all modules that it imports, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
OLDEST := .venv-oldest
# What the tests of the other Pythons need: everything but torch and ray, which are installed for $(PYTHON) only.
define WITHOUT_TORCH
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["cloud"] + extras["s3"] + extras["fast"] + extras["test"]:
    if not line.startswith(("torch", "ray[", "tensorboard", project["name"])):
        print(line)
endef
export WITHOUT_TORCH
TESTS_OF_ROOMS := $(filter-out tests/end_to_end/ tests/benchmarks/ tests/data/ tests/__pycache__/,$(wildcard tests/*/)) \
    $(wildcard tests/test_*.py)
TORCH_FREE := tests/query tests/reports tests/runs tests/statistics tests/storage tests/store

.PHONY: demo check test tests tests-of-rooms test-slow test-numerics test-oldest test-pythons lint docs notebooks benchmarks clean

demo: $(VENV)/installed
	$(BIN)/npeff demo

# Style, types, import rules, and the tests that start no process, but those of whole runs.
check: $(VENV)/installed-dev
	$(MAKE) --jobs 2 lint tests-of-rooms

test: $(VENV)/installed-dev
	$(MAKE) --jobs 2 lint tests

tests-of-rooms: $(VENV)/installed-dev
	$(PYTEST) -m "not process and not ray and not slow" $(TESTS_OF_ROOMS)

tests: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

test-numerics: $(VENV)/installed-dev
	$(BIN)/python tests/numerics.py --numprocesses 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lower bounds of pyproject.toml, in an environment of their own.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	    -m "not slow and not ray" $(TESTS_OF_ROOMS)

# Types for, and the tests that need no torch on, the other Pythons of this machine (found on PATH or under pyenv).
test-pythons: $(VENV)/installed-dev
	@for version in 3.12 3.13; do \
	    $(BIN)/mypy --python-version $$version || exit 1; \
	    found=; \
	    for python in python$$version "$$(pyenv root 2>/dev/null)"/versions/$$version.*/bin/python; do \
	        if "$$python" --version >/dev/null 2>&1; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then echo "skipped: Python $$version is not installed on this machine"; continue; fi; \
	    echo "Python $$version: $$found"; \
	    bin=$(CURDIR)/.venv-$$version/bin; \
	    "$$found" -m venv .venv-$$version || exit 1; \
	    $(BIN)/python -c "$$WITHOUT_TORCH" > .venv-$$version/requirements.txt || exit 1; \
	    $$bin/pip install --quiet --no-compile --constraint constraints.txt --requirement .venv-$$version/requirements.txt || exit 1; \
	    $$bin/pip install --quiet --no-deps --editable . || exit 1; \
	    $$bin/python -m pytest $(TORCH_FREE) || exit 1; \
	done

# The pages are staged, because MkDocs and its successor Zensical read a folder of pages, and these have links to others.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/site/stage.py
	$(BIN)/zensical build --strict
	$(BIN)/python docs/site/links.py

# `make test` executes the first one.
notebooks: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/examples

benchmarks: $(VENV)/installed-dev
	for script in tests/benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Without --no-compile, pip compiles every module of every package, which takes longer than installing them.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,quantization]'
	touch $(VENV)/installed $@

$(VENV)/installed-docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --no-compile --constraint constraints-oldest.txt --editable '.[test,quantization]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache
