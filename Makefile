# `make demo` and `make test` need only make and Python 3.11: each sets up a virtual environment in .venv by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Options for the command, as in: make demo ARGS=--keep-serving, or make test ARGS="-k codec -x"
ARGS ?=

.PHONY: help setup demo test test-slow test-faults check format golden constraints clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(VENV)/ready  ## make .venv; again only when pyproject.toml or constraints.txt have changed

$(VENV)/ready: pyproject.toml constraints.txt
	@.ci/setup $(VENV)
	@touch $@

demo: setup  ## the whole pipeline on embedded data: prepare, train, evaluate, tune, promote, serve, report
	@$(BIN)/i2i demo $(ARGS)

test: setup  ## the tests that fit in minutes
	@$(BIN)/python -m pytest -m "not slow and not faults and not browser" $(ARGS)

# Status 5 of pytest: no test carries the marker.
test-slow: setup  ## long tests, faults, the browser
	@$(BIN)/python -m pytest -m "slow or faults or browser" $(ARGS) || test $$? = 5

test-faults: setup  ## only the tests that kill, corrupt and delay
	@$(BIN)/python -m pytest -m faults $(ARGS) || test $$? = 5

check: setup  ## format, lint, types, who imports whom, spelling
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports
	@$(BIN)/codespell

format: setup  ## apply ruff's format and its safe corrections
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

golden: setup  ## rewrite the golden numbers and curves; the changelog says why, under **(numerics)**
	@I2I_WRITE_GOLDEN=1 $(BIN)/python -m pytest tests/numerics $(ARGS)

constraints:  ## choose versions anew within pyproject's ranges and write constraints.txt; run `make test` after it
	@rm -rf build/constraints
	@mkdir -p build
	@.ci/setup build/constraints --resolve
	@{ grep '^#' constraints.txt; build/constraints/bin/python -m pip freeze --all --exclude-editable \
	  | grep -vE '^(pip|torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)=='; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt
	@rm -rf build/constraints

clean:  ## remove .venv, caches and build products; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
