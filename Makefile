# Every target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TRAIN  := $(VENV)/.train

.PHONY: help demo test test-train lint docs bench clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "make: $(PYTHON) is not CPython 3.11 to 3.13; say make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)  ## Compile a trained network for MARS, run it on the simulated chip, say what it cost
	@$(BIN)/python -m tvm_mars.demo

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

$(TRAIN): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,train,tensorboard]"
	@touch $@

test-train: $(TRAIN)  ## Run the tests of training, with PyTorch installed beside
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal python_tests/test_qat*.py \
	  python_tests/test_relax_torch.py python_tests/test_readme.py

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## Generate the pages of docs/ that follow from the code
	$(BIN)/python -m tvm_mars.docs

bench: $(READY)  ## Measure: the paper's VGG16, compile time, a 224x224 network
	$(BIN)/python benchmarks/vgg16.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/resnet18_224.py

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
