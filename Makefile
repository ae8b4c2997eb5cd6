# make demo       makes data and a small model, trains it, shows what it learned (2 to 5 minutes on 2 cores, after the install)
# make test       every test that needs no GPU and takes less than a minute
# make test-layouts  every pair of layouts against one process; writes docs/layouts.md
# make test-long  the slow ones as well
# make crash-test  200 kills of runs, in every phase, and what came of them (an hour on 2 cores)
# make fuzz       1,000 damaged configs, 1,000 rows, 300 checkpoints: each is read or refused in words
# make gpu-test   the tests that need a CUDA device (says so and passes where there is none)
# make gpu-bench  benchmarks/gpu_session.sh: its next part (GPU_PART, default: first); results in GPU_OUT
# make lint       ruff and mypy

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Distributed tests start up to four processes: one thread each, and no more than two test files at a time.
WORKERS ?= 2
# The interpreter of the two gpu targets. Another one than .venv's is taken as it is and gets nothing installed:
#   make gpu-test GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
GPU_STAMP := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))
GPU_OUT ?= benchmarks/results/gpu
GPU_PART ?= first
GPU_HERE = $(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
# Tests start some hundred processes that import the package: it is compiled once, whatever the environment says of that.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-layouts test-long crash-test fuzz gpu-test gpu-bench lint clean

# pip is given constraints, so torch is the version named there and never just the newest. The second file's lines are for
# Python 3.13.
$(STAMP): setup.py constraints.txt constraints-py313.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt -c constraints-py313.txt
	touch $@

.venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not layouts"

test-layouts: $(STAMP)
	$(PYTEST) --dist load -p tests.layouts.plugin --write-layouts -m layouts tests/layouts/test_whole.py

test-long: $(STAMP)
	$(PYTEST) -m "not gpu and not layouts"

crash-test: $(STAMP)
	$(BIN)/python -m tests.crash $(CRASH)

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz $(FUZZ)

gpu-test: $(GPU_STAMP)
	@if $(GPU_HERE); then $(GPU_PYTHON) -m pytest -m gpu; \
	else echo "gpu-test: skipped, this machine has no CUDA device"; fi

gpu-bench: $(GPU_STAMP)
	@if $(GPU_HERE); then PYTHON=$(GPU_PYTHON) benchmarks/gpu_session.sh --out $(GPU_OUT) $(GPU_PART); \
	else echo "gpu-bench: skipped, this machine has no CUDA device"; fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megadpo

clean:
	rm -rf .venv build demo_run *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
