# Every target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TRAIN  := $(VENV)/.train
RAY    := $(VENV)/.ray
DOCS   := $(VENV)/.docs
BROWSER := $(VENV)/.browser
SPHINX := $(BIN)/python -m sphinx -q -d build/doctrees

# TVM with Relay exists for CPython 3.10 alone.
RELAY_VENV  ?= .venv-relay
RELAY_BIN   := $(RELAY_VENV)/bin
RELAY_READY := $(RELAY_VENV)/.ready
PYTHON310   ?= $(firstword $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null) \
                 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.10*/bin/python3.10))

.PHONY: help demo test test-train test-ray test-browser has-browser lint docs site linkcheck bench bench-train \
        relay test-relay has-python310 clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "make: $(PYTHON) is not CPython 3.11 to 3.13; say make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(RELAY_READY): pyproject.toml constraints-relay.txt
	@test -n "$(PYTHON310)" && "$(PYTHON310)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' \
	  || { echo "make: TVM with Relay needs CPython 3.10, and $(or $(PYTHON310),none) was found on PATH or" \
	       "in pyenv; install it (pyenv install 3.10) or say make PYTHON310=/path/to/python3.10 ..." >&2; exit 1; }
	"$(PYTHON310)" -m venv $(RELAY_VENV)
	$(RELAY_BIN)/python -m pip install -q --disable-pip-version-check -c constraints-relay.txt -e ".[relay,demo]" pytest pytest-xdist
	@touch $@

demo: $(READY)  ## Compile a trained network for MARS, run it on the simulated chip, say what it cost
	@$(BIN)/python -m tvm_mars.demo

test: $(READY)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

$(TRAIN): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,train,tensorboard,brevitas]"
	@touch $@

test-train: $(TRAIN)  ## Run the tests of training, with PyTorch installed beside
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal python_tests/test_qat*.py \
	  python_tests/test_port_brevitas.py python_tests/test_relax_torch.py python_tests/test_readme.py \
	  python_tests/test_tutorials.py python_tests/test_examples.py

$(RAY): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,ray]"
	@touch $@

test-ray: $(RAY)  ## Run the tests of tuning on a cluster, with Ray installed beside (240 MB)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest python_tests/test_ray.py

$(BROWSER): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,browser]"
	@touch $@

has-browser: $(BROWSER)
	@$(BIN)/python -m python_tests.browsers

test-browser: has-browser  ## Run the tests of the report's page in a Chromium or Chrome that is installed
	$(BIN)/python -m pytest python_tests/test_report_browser.py

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## Generate the pages of docs/ that follow from the code
	$(BIN)/python -m tvm_mars.docs

$(DOCS): $(TRAIN)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

# sphinx-gallery executes a tutorial again if its own text has changed; what it shows changes with
# any source.
docs/tutorials/.made: $(shell find tvm_mars runtime tutorials -name '*.py')
	@rm -rf $(@D) && mkdir -p $(@D) && touch $@

site: $(DOCS) docs/tutorials/.made  ## Build the site: docs/, the docstrings, the tutorials executed: build/site/index.html
	@rm -rf build/site
	$(SPHINX) -E -W --keep-going -b html docs build/site
	$(BIN)/python docs/links.py build/site

linkcheck: $(DOCS)  ## Ask the network for every link that leads out of the site
	$(SPHINX) -b linkcheck -D plot_gallery=0 docs build/linkcheck

bench: $(READY)  ## Measure: the paper's VGG16, compile time, a 224x224 network, tuning, channel order, the exact engine
	$(BIN)/python benchmarks/vgg16.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/resnet18_224.py
	$(BIN)/python benchmarks/tuning.py
	$(BIN)/python benchmarks/channel_order.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/one_image.py
	$(BIN)/python benchmarks/layer_times.py

bench-train: $(TRAIN)  ## Measure: a step of quantization-aware training over the float32 step
	$(BIN)/python benchmarks/qat_step.py

relay: $(RELAY_READY)  ## The demo through Relay (needs CPython 3.10)
	@$(RELAY_BIN)/python -m tvm_mars.demo

has-python310:
	@test -n "$(PYTHON310)"

test-relay: $(RELAY_READY)  ## Run the tests that concern Relay (needs CPython 3.10)
	$(RELAY_BIN)/python -m pytest -n auto --dist worksteal python_tests/test_relay*.py \
	  python_tests/test_frontends.py python_tests/test_quantization.py \
	  python_tests/test_rescale.py python_tests/test_tuner.py python_tests/test_tvmc.py \
	  python_tests/test_tutorials.py

clean:  ## Remove the virtual environments and caches
	rm -rf $(VENV) $(RELAY_VENV) .pytest_cache .mypy_cache .ruff_cache
