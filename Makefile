# Everything runs in .venv, which `make` fills on first use and again only when one of its two inputs changes.
PYTHON  ?= python3
# The GPU targets run in whatever Python has a torch for the GPU already. Peers are found in .peers (benchmarks/peers.py).
PYTHON_GPU ?= python3
WORKERS ?= 2

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help demo test lint bench gpu-bench gpu-test wheel clean distclean

help:
	@echo 'make demo       a tour of the library in a minute'
	@echo 'make test       every test, and the doctests of the package   (WORKERS=$(WORKERS), ARGS= for pytest)'
	@echo 'make lint       ruff, ruff format --check, mypy'
	@echo 'make bench      the CPU benchmark                             (ARGS= for the script)'
	@echo 'make gpu-bench  the GPU benchmark, with PYTHON_GPU=$(PYTHON_GPU)    (ARGS= for the script)'
	@echo 'make gpu-test   the tests that need a GPU, likewise         (ARGS= for pytest)'
	@echo 'make wheel      dist/*.whl'
	@echo 'make clean      remove what the other targets leave, .venv excepted'
	@echo 'make distclean  remove .venv too'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ssdops needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/ssdops demo $(ARGS)

# One thread each: workers that all use every core slow one another down.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --doctest-modules tests ssdops $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu.py $(ARGS)

gpu-bench:
	PYTHONPATH=.:.peers:$$PYTHONPATH $(PYTHON_GPU) benchmarks/gpu.py $(ARGS)

gpu-test:
	$(PYTHON_GPU) -m pytest tests/test_cuda*.py $(ARGS)

# setuptools puts whatever an earlier build left in build/ into the next wheel.
wheel: $(STAMP)
	rm -rf build
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
