# make help        what can be made
# make test        works from a fresh clone: it makes its own environment in .venv first
#
# VENV=DIR         install into, and use, this virtual environment instead of .venv
# PYTHON=FILE      use this interpreter as it is and install nothing
# PIP_ARGS=...     passed to pip, for example to choose an index with another build of torch
# SEED=N           the fabricated world of `make demo`

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SEED ?= 0
VENV ?= .venv
BASE_PYTHON ?= python3
PIP_ARGS ?=

# Only the command line counts: an exported PYTHON of another project must not switch setup off.
ifeq ($(origin PYTHON),command line)
INSTALLED :=
else
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.dist-decoder-installed
endif

DATA_TOOLS := $(PYTHON) -m data_tools
DECODER := $(PYTHON) -m dist_decoder
LAUNCH := $(PYTHON) -m launchers local

# One thread a process: two ranks share two cores, and sums come out in the same order anywhere.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test lint format bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 12

setup: $(INSTALLED)  ## make the virtual environment (a second call is quick)

$(VENV)/.dist-decoder-installed: setup.cfg pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "dist-decoder needs Python 3.11 or newer; set BASE_PYTHON" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about a minute and 2 GB with a CPU build of torch"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(PIP_ARGS) -c constraints.txt -e '.[all]'
	touch $@

demo: $(INSTALLED)  ## fabricated datasets -> store -> shards -> training -> report, in minutes
	$(DATA_TOOLS) fabricate configs/data/demo.yaml seed=$(SEED)
	$(DATA_TOOLS) ingest configs/data/demo.yaml seed=$(SEED)
	$(DATA_TOOLS) split configs/data/demo.yaml seed=$(SEED)
	$(DATA_TOOLS) embed configs/data/demo.yaml seed=$(SEED)
	$(DATA_TOOLS) synthesise configs/data/demo.yaml seed=$(SEED)
	$(DATA_TOOLS) shard configs/data/demo.yaml seed=$(SEED)
	$(LAUNCH) ranks=2 -- dist-decoder train configs/train/demo.yaml seed=$(SEED)
	for dataset in nsd bold5000 god; do \
	  $(LAUNCH) ranks=2 -- dist-decoder train configs/train/demo.yaml seed=$(SEED) \
	    run=runs/demo/single-$$dataset data.datasets="[$$dataset]"; \
	done
	$(DECODER) adapt configs/adapt/demo.yaml seed=$(SEED)
	$(DECODER) adapt configs/adapt/demo.yaml seed=$(SEED) start=scratch run=runs/demo/scratch
	$(DECODER) evaluate configs/evaluate/demo.yaml
	$(DECODER) report configs/report/demo.yaml

test: lint  ## lint, then every test that this machine can run
	$(PYTHON) -m pytest

lint: $(INSTALLED)  ## ruff (rules and format) and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(INSTALLED)  ## let ruff mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(INSTALLED)  ## run every benchmark; figures go to stdout
	for benchmark in benchmarks/*.py; do PYTHONPATH=. $(PYTHON) "$$benchmark"; done

clean:  ## remove caches and what `make demo` wrote; .venv stays
	rm -rf data/demo runs/demo build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
