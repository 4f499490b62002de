.RECIPEPREFIX := >
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# uv does not read pip's configuration: hand it pip's own find-links, where a CPU build of torch may lie.
FIND_LINKS = $(foreach dir,$(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)),--find-links $(dir))

.PHONY: install lock

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
> $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed, found " + sys.version'
> test -x $(PY) || $(PYTHON) -m venv $(VENV)
> $(VENV)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
> $(VENV)/bin/uv pip install --quiet --python $(PY) $(FIND_LINKS) -r requirements.lock
> touch $@

# The lock names no build of torch: a machine with a GPU gets the CUDA build, others what find-links offers.
lock:
> $(VENV)/bin/uv pip compile --quiet --upgrade --python-version 3.11 $(FIND_LINKS) --extra train --extra dev --no-emit-package dashattn pyproject.toml -o requirements.lock
> sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock
