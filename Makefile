# Each target makes .venv if there is none, installs what constraints.txt pins, and runs.
# PYTHON chooses the interpreter (3.11 to 3.13): make test PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Two test processes of one thread each: faster on two cores than one process of two threads.
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-layouts test-oracle test-slow test-guides test-wheel test-npu-schemas test-gpu test-mindspore lint format bench install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python %d.%d: tessel needs 3.11 to 3.13; choose one: make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/tessel demo $(ARGS)

test: $(STAMP)
	$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

# The table goes to the terminal; ARGS='--layouts-table docs/LAYOUTS.md' writes it there, too.
test-layouts: $(STAMP)
	$(PYTEST) -n $(JOBS) --dist worksteal tests/layouts -m 'layouts or not layouts' $(ARGS)

test-oracle: $(STAMP)
	$(PYTEST) -n $(JOBS) --dist worksteal -m oracle $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -n $(JOBS) --dist worksteal -m slow $(ARGS)

test-guides: $(STAMP)
	$(PYTEST) -m 'slow or not slow' tests/drop_in/test_guides.py tests/drop_in/test_evaluation.py $(ARGS)

test-wheel: $(STAMP)
	$(PYTEST) -m slow tests/test_wheel.py $(ARGS)

# Downloads torch_npu's wheel (44 MB) once; no NPU is needed, and none is used.
test-npu-schemas: $(STAMP)
	$(BIN)/python tests/npu/package.py $(VENV)/torch_npu
	TESSEL_TORCH_NPU=$(abspath $(VENV))/torch_npu $(PYTEST) -m 'oracle or not oracle' tests/npu tests/model/test_vendor.py $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# MindSpore is 2.7 GB and wants a NumPy before 2: an environment of its own, made when this is asked for.
MINDSPORE      ?= 2.8.0
MINDSPORE_VENV ?= .venv-mindspore

test-mindspore: $(MINDSPORE_VENV)/.installed
	OMP_NUM_THREADS=1 $(MINDSPORE_VENV)/bin/python -m pytest tests/mindspore -m 'oracle or not oracle' $(ARGS)

$(MINDSPORE_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(MINDSPORE_VENV)/bin/python || $(PYTHON) -m venv $(MINDSPORE_VENV)
	grep -v '^numpy==' constraints.txt > $(MINDSPORE_VENV)/constraints.txt
	$(MINDSPORE_VENV)/bin/python -m pip install --quiet --constraint $(MINDSPORE_VENV)/constraints.txt \
		--editable '.[mindspore]' 'mindspore==$(MINDSPORE)' pytest pytest-timeout pytest-xdist
	touch $(MINDSPORE_VENV)/.installed

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/train_speed.py $(ARGS)

clean:
	rm -rf $(VENV) $(MINDSPORE_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
