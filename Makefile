# make demo          train the embedded model: .venv, the package, recipes/no_cfg_mse.toml
# make test          linters, types, import floors, tests (in two processes)
# make lint          the first three of these
# make bench         benchmarks, as JSON under benchmarks/results
# make ablation      the runs, tables and figures of docs/explanation/ablation.md
# make clean         remove .venv, caches and builds; runs stay
#
# PYTHON names the interpreter that .venv is made with, RECIPE what the demo trains:
#     make demo PYTHON=python3.12 RECIPE=recipes/fast.toml

PYTHON ?= python3
RECIPE ?= recipes/no_cfg_mse.toml
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# One thread: two are slower at the size of the embedded model, and figures compare byte for byte.
OMP_NUM_THREADS ?= 1
OMP_WAIT_POLICY ?= PASSIVE
export OMP_NUM_THREADS OMP_WAIT_POLICY

.PHONY: help demo test lint bench ablation clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/installed
	$(BIN)/unigrpo run $(RECIPE)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-autosave

ablation: $(VENV)/installed-test
	$(BIN)/python benchmarks/remake.py docs/explanation/ablation.md

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an install is repeated only when what it depends on has changed. The install is editable,
# so a change of the sources is none of that.

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "unigrpo needs Python 3.11 or newer; \"$(PYTHON)\" is:" \
	        "$$($(PYTHON) --version 2>&1 || true)"; \
	    echo "name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing unigrpo and its requirements into $(VENV)"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing unigrpo, its requirements and the test tools into $(VENV)"
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $(VENV)/installed $@
