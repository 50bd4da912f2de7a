# Needs Python 3.10 or newer with pip (the pinned versions are for 3.11) and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
EXTRAS := cpu,serve,train,dev
# The stamp carries what was installed, so that only a change of these files installs again.
READY := $(VENV)/.ready-$(shell cat pyproject.toml setup.py constraints.txt | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint docs glyphs env clean

help:  ## show these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "  PYTHON=python3.11 and VENV=.venv choose the interpreter and the place of the environment"

demo: $(READY)  ## run the whole chain on embedded real data
	$(BIN)/synthkit demo

test: $(READY)  ## run all tests, over the cores
	$(BIN)/python -m pytest

quick: $(READY)  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)  ## run ruff, mypy and the tests that hold the layout together
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_layers.py tests/test_repository.py

docs: $(READY)  ## build the pages into site/
	$(BIN)/python -m mkdocs build --strict

glyphs: $(READY)  ## train the bundled generator glyphs-32 from nothing (long; goes on after an interruption)
	$(BIN)/python -m synthkit.recipes.glyphs32 --out toolkit/models/glyphs-32

env: $(READY)  ## make the environment and nothing else

# An interrupted venv has no working pip and is begun anew. An interrupted pip leaves packages without
# INSTALLER, which it would take for whole: they are forgotten, and pip goes on with them and the rest.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 or newer; name another: make PYTHON=python3.11" >&2; exit 1; }
	@if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "error: $(VENV) exists and is no Python environment; remove it or name another: make VENV=.venv-synthkit" >&2; \
	  exit 1; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear "$(VENV)"
	@for package in $(VENV)/lib/python*/site-packages/*.dist-info; do \
	  [ ! -d "$$package" ] || [ -f "$$package/INSTALLER" ] || rm -rf "$$package"; done
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  --config-settings editable_mode=lenient -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.ready-*
	@touch $@

clean:  ## remove caches and build leftovers; the environment and the workspace stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path '*/.venv*' -prune -exec rm -rf {} +
