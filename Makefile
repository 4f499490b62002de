SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
# uv does not read pip's configuration: hand it pip's own find-links, where a CPU build of torch may lie.
FIND_LINKS = $(addprefix --find-links ,$(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)))
SWEEP ?= pareto
OUTPUT ?= outputs/$(SWEEP)
# Where it is set, every process compiles all that it imports: half a minute of a fresh clone's tests.
unexport PYTHONDONTWRITEBYTECODE

# Directories with rows, and where their figures go (results/engineering has notes only).
STUDIES ?= $(sort $(dir $(wildcard results/*/*.jsonl)))
FIGURES ?= outputs/figures

.PHONY: help install pareto figures docs test test-all test-crash test-gpu lint lock

help:  ## what can be made
	@awk '/^[a-z-]+:.*  ## / {name = $$0; sub(/:.*/, "", name); sub(/.*  ## /, ""); printf "%-11s %s\n", name, $$0}' Makefile

install: .venv/.installed  ## all that is needed, into .venv

pareto: install  ## the first frontier: train, evaluate, table and figure; again: finishes what is missing
	$(PY) -m experiments.sweep sweep=$(SWEEP) output_dir=$(OUTPUT)
	$(PY) -m experiments.figures.pareto $(OUTPUT)

figures: install  ## all figures and tables that the committed rows allow, and a page that holds them
	$(PY) -m experiments.figures $(FIGURES) $(STUDIES)

docs: install  ## the documentation as a site, outputs/docs/site/index.html
	rm -rf outputs/docs
	$(PY) -m docs.build outputs/docs/pages
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo outputs/docs/site/index.html

test: install lint  ## ruff, and the tests that need neither a GPU nor the network; some minutes
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

test-all: install lint  ## those that take minutes each, too; some ask for Slurm
	$(PY) -m pytest -n 2 --dist worksteal

test-crash: install  ## for the night: a run is killed a hundred times, a preparation thirty times, a sweep five times
	$(PY) -m pytest -k killed tests/experiments/training/test_crash.py tests/data/test_prepared.py

test-gpu: install  ## the kernels at real sizes, on a machine with a GPU; elsewhere its tests are skipped
	$(PY) -m pytest tests/gpu tests/ops/test_dash_attention_triton.py

lint: install  ## ruff, rules and format
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
lock: install  ## requirements.lock anew, from pyproject.toml
	.venv/bin/uv pip compile --quiet --upgrade --python-version 3.11 $(FIND_LINKS) --extra train --extra dev --extra docs \
		--no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.lock
	sed -i -e 's/^\(torch==[0-9.]*\)+cpu/\1/' -e '/^\(nvidia\|cuda\)-/d' requirements.lock
