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

.PHONY: help setup demo miyawaki2008 test test-slow test-object-store object-store test-slurm slurm lint format bench \
  clean

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

# data/demo and runs/demo are links to the folders of the chosen world, so that every configuration
# below configs/ names the same paths for every SEED. Each command returns at once when its work is
# done, and goes on where it stopped when it was interrupted.
demo: $(INSTALLED)  ## fabricated datasets -> store -> shards -> training -> report, in minutes
	@for folder in data runs; do \
	  if [ -e $$folder/demo ] && [ ! -L $$folder/demo ]; then \
	    echo "$$folder/demo was not made by 'make demo': move it away first" >&2; exit 2; \
	  fi; \
	  mkdir -p $$folder/demo-seed$(SEED); ln -sfn demo-seed$(SEED) $$folder/demo; \
	done
	for verb in fabricate ingest split embed synthesise shard; do \
	  $(DATA_TOOLS) $$verb configs/data/demo.yaml seed=$(SEED); \
	done
	$(LAUNCH) ranks=2 -- dist-decoder train configs/train/demo.yaml seed=$(SEED)
	$(MAKE) --jobs=2 --output-sync=target --no-print-directory demo-others SEED=$(SEED)
	$(DECODER) evaluate configs/evaluate/demo.yaml seed=$(SEED)
	$(DECODER) report configs/report/demo.yaml
	@echo "report: runs/demo/report/report.html"

# What the joint model is compared with: the same decoder on one dataset alone, and the new subject
# adapted and from scratch. One rank each, two at a time.
SINGLES := single-nsd single-bold5000 single-god
.PHONY: demo-others $(SINGLES) adapted scratch
demo-others: $(SINGLES) adapted scratch
$(SINGLES): single-%:
	$(DECODER) train configs/train/demo.yaml seed=$(SEED) run=runs/demo/$@ data.datasets="[$*]" \
	  checkpoint.every_steps=100
adapted:
	$(DECODER) adapt configs/adapt/demo.yaml seed=$(SEED)
scratch:
	$(DECODER) adapt configs/adapt/scratch.yaml seed=$(SEED)

miyawaki2008: $(INSTALLED)  ## the same path on measured fMRI: five figures, leave one run out
	for verb in ingest split embed; do \
	  $(DATA_TOOLS) $$verb configs/data/miyawaki2008.yaml; \
	done
	for fold in 1 2 3 4; do \
	  shards=data/miyawaki2008/shards-run$$fold; run=runs/miyawaki2008/run$$fold; \
	  $(DATA_TOOLS) split configs/data/miyawaki2008.yaml split.test_run=$$fold; \
	  $(DATA_TOOLS) shard configs/data/miyawaki2008.yaml split.test_run=$$fold \
	    shards_name=shards-run$$fold; \
	  $(DECODER) train configs/train/miyawaki2008.yaml run=$$run data.shards=$$shards; \
	  $(DECODER) evaluate configs/evaluate/miyawaki2008.yaml shards=$$shards \
	    output=runs/miyawaki2008/evaluation-run$$fold "models=[{model: joint, run: $$run}]"; \
	done
	$(DECODER) report configs/report/miyawaki2008.yaml
	@echo "report: runs/miyawaki2008/report/report.html"

test: lint  ## lint, then the tests; those that take long have targets of their own
	$(PYTHON) -m pytest -m "not slow and not s3 and not slurm"

test-slow: $(INSTALLED)  ## the long proofs: many kills, every ZeRO stage and world size (an hour or so)
	$(PYTHON) -m pytest -m "slow and not s3 and not slurm"

object-store:  ## install a real S3 server (Ceph's radosgw; Debian, root) for the next target
	sh tests/object_store/install.sh

test-object-store: $(INSTALLED)  ## loader and shard writer against that server, with planted faults
	$(PYTHON) -m pytest -m s3

slurm:  ## install a real SLURM (Debian, root) for the next target
	sh tests/slurm/install.sh

test-slurm: $(INSTALLED)  ## jobs on that SLURM: requeue, preemption, dead nodes (a quarter of an hour)
	$(PYTHON) -m pytest -m slurm tests/slurm

lint: $(INSTALLED)  ## ruff (rules and format) and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(INSTALLED)  ## let ruff mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Some need a folder, a run, or a server, which their --help names; and some files are their parts.
BENCHMARKS := $(addprefix benchmarks/, fit_table.py ingest_nsd_session.py shard_layout.py loader.py \
  peak_memory.py loss_memory.py rank_memory.py accumulate_memory.py replicated_step.py train_step.py \
  checkpoint_stall.py write_speed.py)
bench: $(INSTALLED)  ## run the benchmarks; figures go to stdout
	for benchmark in $(BENCHMARKS); do PYTHONPATH=. $(PYTHON) "$$benchmark"; done

clean:  ## remove caches and what `make demo` wrote; .venv stays
	rm -rf data/demo data/demo-seed* runs/demo runs/demo-seed* build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
