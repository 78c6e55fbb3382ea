# `make train` and `make test` need Python 3.11 or newer, make and git; the rest they install.

PYTHON ?= python3
VENV := .venv
CUDA_VENV := .venv-cuda
BIN := $(VENV)/bin
CORPUS := data/python-stdlib
# A larger model where there is a GPU.
RECIPE ?= configs/quickstart$(if $(shell nvidia-smi -L 2>/dev/null),-gpu).toml

.PHONY: train test test-all faults fuzz lint bench cuda-rehearsal clean
.DELETE_ON_ERROR:

train: $(CORPUS)/manifest.json
	$(BIN)/fastllama train $(RECIPE)

# Two processes with a thread each finish sooner than one with two.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow"

# What takes too long for every change: slow tests, those that need an extra, damaged files for a
# minute, and some killed trainings.
test-all: test $(VENV)/installed-all
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "extra or slow"
	$(BIN)/python -m tests.fuzz --seconds 60
	$(BIN)/python -m tests.faults --kills 8

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.fuzz --seconds 600

faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(CORPUS)/manifest.json
	$(BIN)/python benchmarks/cpu_profile.py
	$(BIN)/python benchmarks/cpu_throughput.py

# The CUDA step on a machine without a GPU: docs/rehearsal.md. Needs gcc and binutils.
cuda-rehearsal: $(CUDA_VENV)/installed
	$(CUDA_VENV)/bin/python -m benchmarks.rehearsal $(if $(EVERY),--every) $(if $(UPDATE),--update)

# The wheel of PyPI is the CUDA build. Its version is this one because budgets count its kernels.
$(CUDA_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -Ev '^(torch|triton)==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/python -m pip install --quiet --constraint $(CUDA_VENV)/constraints.txt \
		torch==2.14.1 --editable .
	touch $@

# What these rules made. Never runs, or data of the user's own: both may have taken weeks.
clean:
	rm -rf $(VENV) $(CUDA_VENV) $(CORPUS) $(CORPUS).jsonl $(CORPUS)-tokenizer.json

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastllama needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/installed-all: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

$(CORPUS).jsonl: | $(VENV)/installed
	$(BIN)/python -m fastllama.data.python_corpus --output $@

$(CORPUS)-tokenizer.json: | $(CORPUS).jsonl
	$(BIN)/fastllama tokenizer train --input $(CORPUS).jsonl --output $@

$(CORPUS)/manifest.json: | $(CORPUS)-tokenizer.json
	$(BIN)/fastllama prepare --input $(CORPUS).jsonl --tokenizer $(CORPUS)-tokenizer.json \
		--output $(CORPUS) --validation-fraction 0.01
