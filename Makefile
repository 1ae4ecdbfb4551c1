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

# Parts that run side by side print one after the other (GNU make 4 and later).
TOGETHER := --jobs=2 --keep-going $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

.PHONY: help train test test-all check lint types unit compile simulator bounds test-gpu sanitize bench \
	bench-gpu doctor clean

help:
	@echo "make train      train the default transformer on the text inside Python itself; again: go"
	@echo "                on where that stopped, or show its result (FRESH=1: start anew)"
	@echo "make test       linter, formatter, type checker and tests; no GPU needed. Its parts:"
	@echo "                lint, types, unit, compile (GPU kernels for five architectures),"
	@echo "                simulator (GPU kernels in numba's simulator)"
	@echo "make test-all   the same, with kernels in kinds that few users meet and more examples"
	@echo "make bounds     the tests of CPU kernels with every index checked; compiles all anew"
	@echo "make test-gpu   the GPU tests on the GPU"
	@echo "make sanitize   the same, small ones, under compute-sanitizer: memcheck and racecheck"
	@echo "make check      linter, formatter and type checker alone"
	@echo "make bench      measure against PyTorch (installs it) and rewrite project/results"
	@echo "make bench-gpu  the same on the GPU"
	@echo "make doctor     what this machine offers, and what is wrong with it"
	@echo "make clean      remove the environment, caches and build products; runs/ is kept"

# A run that is there already is never lost, but for `make train FRESH=1`.
train: $(VENV)/train.stamp
	$(BIN)/python project/run_transformer.py train --out $(OUT) \
	$(if $(FRESH),--overwrite,$(if $(wildcard $(OUT)/checkpoint.safetensors),--resume))

# What `make test` leaves out, kernels in kinds that few users meet and examples of a rule that others
# show, `make test-all` runs as well.
COMMON := -m "not thorough"
test-all:
	@$(MAKE) --no-print-directory test COMMON=

# All parts run, whatever one of them says; the exit code is 0 only if all is well.
test: $(VENV)/dev.stamp
	@$(MAKE) --no-print-directory $(TOGETHER) compile unit simulator types lint

# On a machine with a GPU this runs tests/cuda on it, too.
unit: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --ignore tests/test_kernels_compile.py $(COMMON)

# Two processes, since it is the longest part; so is the simulator's.
compile: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/test_kernels_compile.py $(COMMON) --numprocesses 2 --dist worksteal

# The simulator is chosen before numba is imported: it needs a process of its own. Where numba-cuda
# is not installed (macOS) it is numba's own, in which some of the tests run once more.
SIMULATE := NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
simulator: $(VENV)/dev.stamp
	$(SIMULATE) tests/cuda $(COMMON)
	$(SIMULATE) -p tests.cuda.own_simulator \
	tests/cuda/test_simulator.py tests/cuda/test_sums_cuda.py tests/cuda/test_register_tile.py

# A cache of its own, since numba's does not tell code that checks from code that does not. What
# intrinsics read and write (kernels/cpu/simd.py) is not checked here; it is without compilation, where
# numpy does it (tests/test_without_jit.py).
BOUNDED := attention_cpu conv fast_ops functions_grad fused_checks fused_kernels optim simd
bounds: $(VENV)/dev.stamp
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/.bounds_cache $(BIN)/python -m pytest \
	$(BOUNDED:%=tests/test_%.py) --numprocesses 2 --dist worksteal

# Most of the time goes into compiling kernels: several processes, on one GPU.
test-gpu: $(VENV)/gpu.stamp
	$(BIN)/python -m pytest tests/cuda -rs --numprocesses auto --dist worksteal

# Tests without the mark `gpu` have small shapes, for the simulator's sake.
SANITIZED := $(patsubst tests/cuda/test_%.py,%,$(wildcard tests/cuda/test_*.py))
sanitize: $(VENV)/gpu.stamp
	@$(MAKE) --no-print-directory $(TOGETHER) --jobs=8 \
	$(addprefix memcheck-,$(SANITIZED)) $(addprefix racecheck-,$(SANITIZED))

# pytest exits with 5 where it finds no tests: the file has none for this.
define SANITIZE
	compute-sanitizer --tool $(firstword $(subst -, ,$@)) --error-exitcode 9 \
	$(BIN)/python -m pytest tests/cuda/test_$*.py -m "not gpu" || test $$? -eq 5
endef

memcheck-%: $(VENV)/gpu.stamp
	$(SANITIZE)

racecheck-%: $(VENV)/gpu.stamp
	$(SANITIZE)

check: lint types

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python project/code_budget.py

types: $(VENV)/dev.stamp
	$(BIN)/mypy

bench: $(VENV)/bench.stamp
	$(BIN)/python project/bench/attention_cpu.py
	$(BIN)/python project/bench/attention_variants_cpu.py
	$(BIN)/python project/bench/block_masks.py
	$(BIN)/python project/bench/transformer_cpu.py
	$(BIN)/python project/run_transformer.py train --out runs/bench --overwrite \
		--record project/results/training_cpu.md
	$(BIN)/python project/bench/results.py

# PyTorch's default build, with CUDA.
bench-gpu: $(VENV)/gpu.stamp
	$(PIP) install 'torch>=2.9'
	$(BIN)/python project/bench/ops_cuda.py
	$(BIN)/python project/bench/attention_cuda.py
	$(BIN)/python project/bench/attention_variants_cuda.py
	$(BIN)/python project/bench/training_cuda.py
	$(BIN)/python project/bench/results.py

doctor: $(VENV)/train.stamp
	$(BIN)/python -m minitorch doctor

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .bounds_cache
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

# Python compiles the modules that it imports; pip would compile all, for 20 s.
$(VENV)/train.stamp $(VENV)/dev.stamp: $(VENV)/%.stamp: $(VENV)/python.stamp setup.py pyproject.toml
	$(PIP) install --no-compile --editable '.[$*]'
	@touch $@

$(VENV)/gpu.stamp: $(VENV)/python.stamp setup.py pyproject.toml
	$(PIP) install --no-compile --editable '.[dev,cuda]'
	@touch $@

$(VENV)/bench.stamp: $(VENV)/python.stamp setup.py pyproject.toml
	$(PIP) install --extra-index-url $(TORCH_INDEX) --editable '.[train,bench]'
	@touch $@
