SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
# uv does not read pip's configuration: hand it pip's own find-links, where a CPU build of torch may lie.
FIND_LINKS = $(addprefix --find-links ,$(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)))
SWEEP ?= pareto
OUTPUT ?= outputs/$(SWEEP)

# Directories with rows, and where their figures go (results/engineering has notes only).
STUDIES ?= $(sort $(dir $(wildcard results/*/*.jsonl)))
FIGURES ?= outputs/figures

.PHONY: install pareto figures docs test test-all test-crash test-gpu lint lock

install: .venv/.installed

# The first frontier: train, evaluate, table and figure. Again: finishes what is missing.
pareto: install
	$(PY) -m experiments.sweep sweep=$(SWEEP) output_dir=$(OUTPUT)
	$(PY) -m experiments.figures.pareto $(OUTPUT)

# All figures and tables of evaluated studies, and a page that holds them; from rows alone, without a GPU.
figures: install
	$(PY) -m experiments.figures $(FIGURES) $(STUDIES)

# The documentation as a site: outputs/docs/site/index.html.
docs: install
	rm -rf outputs/docs
	$(PY) -m docs.build outputs/docs/pages
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo outputs/docs/site/index.html

test: install lint
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

# The tests that take minutes, too.
test-all: install lint
	$(PY) -m pytest -n 2 --dist worksteal

# For the night: a run is killed a hundred times, a preparation thirty times, a sweep five times.
test-crash: install
	$(PY) -m pytest -k killed tests/experiments/training/test_crash.py tests/data/test_prepared.py

# The kernels at real sizes, on a machine with a GPU; elsewhere its tests are skipped.
test-gpu: install
	$(PY) -m pytest tests/gpu tests/ops/test_dash_attention_triton.py

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	.venv/bin/uv pip install --quiet --python $(PY) $(FIND_LINKS) -r requirements.lock
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	touch $@

# The lock names no build of torch, nor the CUDA libraries that its GPU build brings along itself: with a GPU that one is
# installed, without one what find-links offers.
lock: install
	.venv/bin/uv pip compile --quiet --upgrade --python-version 3.11 $(FIND_LINKS) --extra train --extra dev --extra docs \
		--no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.lock
	sed -i -e 's/^\(torch==[0-9.]*\)+cpu/\1/' -e '/^\(nvidia\|cuda\)-/d' requirements.lock
