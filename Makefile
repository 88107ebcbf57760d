# `make quickstart` and `make test` install what they need first. `make install EXTRAS="rollout-cpu"` adds optional
# parts: rollout-cpu or rollout-gpu (vLLM, one of the two), gpu (Transformer Engine, compiled here: see docs), trackers.
EXTRAS ?=
SHELL := /bin/sh
PYTHON := .venv/bin/python
SITE_PACKAGES := $(CURDIR)/.venv/lib/python3.12/site-packages
# Which tests stay together: tests/conftest.py.
# Long groups first (ranks, whole runs, then units), as the folders are named: no process waits for the other at the end.
PARALLEL := --numprocesses 2 --no-loadscope-reorder
export PYTHONUNBUFFERED := 1

.PHONY: help install quickstart quickstart-grpo compare test test-fast test-long lint format clean

help:
	@echo "make install [EXTRAS=\"rollout-cpu\"]  .venv with everything (extras: rollout-cpu, rollout-gpu, gpu, trackers)"
	@echo "make quickstart                      LoRA SFT of a small model at TP=2, on a CPU, with export and checks"
	@echo "make quickstart-grpo                 the same with GRPO and vLLM rollouts"
	@echo "make compare                         one recipe on both backends, side by side"
	@echo "make test                            the test suite (CPU)"
	@echo "make test-fast                       unit tests and some cases of two ranks, a few minutes"
	@echo "make test-long                       whole DPO and GRPO runs, cases of more ranks"
	@echo "make lint, make format               ruff and pyright; ruff's formatter"
	@echo "make clean                           remove caches and quickstart-output/"

# --inexact: an extra that is there already stays. The gpu extra's torch half is compiled against the torch in .venv
# (about 10 minutes on 2 cores) with CUDA_HOME set to a CUDA toolkit. nvidia-cudnn-frontend is left out of the
# resolution because two packages pin different versions of it; --no-config, since uv pip reads that override too.
install:
	@uv="$$(tools/ensure_uv.sh)" && echo "installing with $$uv" && \
	$$uv sync --python 3.12 --inexact $(foreach extra,$(filter-out gpu,$(EXTRAS)),--extra $(extra)) && \
	$(if $(filter gpu,$(EXTRAS)),$(MAKE) --no-print-directory .install-gpu UV="$$uv" &&) \
	touch .venv/.installed $(foreach extra,$(EXTRAS),.venv/.installed-$(extra))

.PHONY: .install-gpu
.install-gpu: export CPLUS_INCLUDE_PATH := $(SITE_PACKAGES)/nvidia/cudnn/include:$(SITE_PACKAGES)/nvidia/nccl/include:$(SITE_PACKAGES)/nvidia/cu13/include
.install-gpu:
	$(UV) pip install setuptools wheel pybind11 ninja
	$(UV) sync --python 3.12 --inexact $(foreach extra,$(EXTRAS),--extra $(extra)) \
		--no-build-isolation-package transformer-engine-torch
	$(UV) pip install --no-config --no-deps nvidia-cudnn-frontend==1.29.0

.venv/.installed: pyproject.toml
	@$(MAKE) --no-print-directory install

.venv/.installed-%: pyproject.toml
	@$(MAKE) --no-print-directory install EXTRAS="$*"

quickstart: .venv/.installed
	$(PYTHON) -m tools.quickstart

quickstart-grpo: .venv/.installed-rollout-cpu
	$(PYTHON) -m tools.quickstart grpo

compare: .venv/.installed
	$(PYTHON) -m tools.compare

# A core for each of the two: threads that wait by spinning would take it from the ranks.
test test-fast test-long: export OMP_NUM_THREADS := 1
test test-fast test-long: export OMP_WAIT_POLICY := PASSIVE

# Two at a time: half of the suite is one process's work, and a group of ranks waits for its reference.
test: .venv/.installed-rollout-cpu
	$(PYTHON) -m pytest -m "not gpu and not long" $(PARALLEL)

test-fast: .venv/.installed
	$(PYTHON) -m pytest -m "fast and not gpu and not long" $(PARALLEL) --ignore tests/end_to_end --ignore tests/gpu

test-long: .venv/.installed-rollout-cpu
	$(PYTHON) -m pytest -m "long and not gpu"

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf quickstart-output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -not -path "./.uv-env/*" -prune -exec rm -rf {} +
