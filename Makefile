# Two commands: `make train` and `make test`. Each makes its own environment in .venv; nothing
# outside this folder is touched. Another interpreter: `make test PYTHON=python3.13`.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
OUT ?= runs/train
# The CPU build of torch: the default one of Linux brings 3 GB of CUDA libraries along.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# The first interpreter that is new enough.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

.PHONY: help train test check lint types unit bench doctor clean

help:
	@echo "make train    train the default transformer on the text inside Python itself"
	@echo "make test     linter, formatter, type checker and tests"
	@echo "make check    linter, formatter and type checker alone"
	@echo "make bench    measure against PyTorch (installs it) and rewrite project/results"
	@echo "make doctor   what this machine offers, and what is wrong with it"
	@echo "make clean    remove the environment, caches and build products; runs/ is kept"

train: $(VENV)/train.stamp
	$(BIN)/python project/run_transformer.py train --out $(OUT)

# All three run, whatever one of them says; the exit code is 0 only if all is well.
test: $(VENV)/dev.stamp
	@failed=; for part in lint types unit; do \
	$(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

unit: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

check: lint types

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

bench: $(VENV)/bench.stamp
	$(BIN)/python project/bench_attention.py
	$(BIN)/python project/bench_transformer.py
	$(BIN)/python project/run_transformer.py train --out runs/bench \
		--record project/results/training_cpu.md
	$(BIN)/python project/readme_tables.py

doctor: $(VENV)/train.stamp
	$(BIN)/python -m minitorch doctor

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment -------------------------------------------------------------------------

$(VENV)/python.stamp:
	@test -n "$(PYTHON)" || { \
	echo "Python 3.11 or later was not found: install one, or name it: make PYTHON=/path/to/python"; \
	exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) cannot make environments (no ensurepip)." \
	"On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/train.stamp $(VENV)/dev.stamp: $(VENV)/%.stamp: $(VENV)/python.stamp setup.py pyproject.toml
	$(PIP) install --editable '.[$*]'
	@touch $@

$(VENV)/bench.stamp: $(VENV)/python.stamp setup.py pyproject.toml
	$(PIP) install --extra-index-url $(TORCH_INDEX) --editable '.[train,bench]'
	@touch $@
