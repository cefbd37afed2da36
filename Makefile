# Two commands do everything on a machine with Python, make and a C++ compiler: `make demo` and `make test`.
# The first run makes a virtual environment and installs what is missing (minutes); the next ones are quick.

PYTHON ?= python3
VENV ?= .venv
# Named on its own and installed first: a bare `torch` pulls gigabytes of CUDA packages on a machine without a GPU.
TORCH ?= torch==2.13.0
DEEPSPEED ?= deepspeed==0.19.8
# 1: the extension must compile; auto: go on without it; 0: leave it out
GRASS_BUILD_NATIVE ?= 1
# More arguments for pytest, for example ARGS="-k sampler -x"
ARGS ?=

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
WANTED := $(VENV)/.wanted
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := setup.py $(wildcard csrc/*)

# ninja and the deepspeed launcher are looked up on the PATH
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
# DeepSpeed compiles some of its kernels when they are first used; those of another version must not be found then.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
export GRASS_BUILD_NATIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-full sanitize lint format clean FORCE

help:  ## show this help
	@echo "make TARGET [VENV=.venv] [PYTHON=python3] [DEEPSPEED=\"deepspeed==0.18.9\"] [ARGS=\"pytest arguments\"]"
	@echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(BUILT)  ## fine-tune a small model with GRASS on two processes and compare
	$(PY) examples/demo.py

test: lint $(BUILT)  ## lint, compile and test; at most 15 minutes
	rm -f .coverage .coverage.*
	$(PY) -m coverage run -m pytest -m "not slow" $(or $(ARGS),--ignore=tests/unit)
	$(if $(ARGS),,$(PY) -m coverage run -m pytest -m "not slow" -n 2 tests/unit)
	$(PY) -m coverage combine --quiet
	@rm -f .coverage.*  # what a killed process had half written
	$(PY) -m coverage report --include="*/ds_grass/*" --fail-under=90

test-full: lint $(BUILT)  ## every cell of every product; goes on where it was interrupted
	$(PY) -m pytest -m "slow or not slow" --resume=.test-full $(ARGS)

sanitize: $(BUILT)  ## the C++ kernels under AddressSanitizer and UBSan; needs gcc
	$(PY) -m tests.sanitized $(ARGS)

lint: $(INSTALLED)  ## check the style
	$(PY) -m ruff check .

format: $(INSTALLED)  ## put the style right
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## remove what was built and measured; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .test-full .coverage .coverage.* htmlcov
	rm -f ds_grass/_C*.so $(BUILT)
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Rewritten only when other versions or another checkout are asked for, so that the stamps below notice.
$(WANTED): FORCE
	@mkdir -p $(VENV)
	@echo "$(CURDIR) $(TORCH) $(DEEPSPEED)" | cmp -s - $@ || echo "$(CURDIR) $(TORCH) $(DEEPSPEED)" > $@

$(INSTALLED): $(WANTED) pyproject.toml
	@echo "installing into $(VENV); the first time takes some minutes"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	    { echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv python3-dev"; exit 1; }
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) "$(TORCH)"
	$(PIP) "$(DEEPSPEED)"
	GRASS_BUILD_NATIVE=0 $(PIP) --no-build-isolation -e ".[test,demo]"
	@rm -f $(BUILT)
	@touch $@

# Without isolation, so that the extension is compiled against the torch that will load it.
$(BUILT): $(INSTALLED) $(SOURCES)
	@echo "compiling ds_grass._C"
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@
