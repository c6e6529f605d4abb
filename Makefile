# Two commands do everything, set-up included: `make quickstart` and `make test`.
# Needed: Python 3.10-3.13 with its C headers, g++ and make. Everything is kept in .venv.

PYTHON ?=
PY := .venv/bin/python
BUILT := .venv/.built
TOOLS := .venv/.tools

BOOTSTRAP = $(or $(PYTHON),python3) .ci/bootstrap.py $(if $(PYTHON),--python $(PYTHON))
PACKAGING := pyproject.toml setup.py constraints.txt .ci/bootstrap.py
PYTEST_ALL := -m pytest -q -n 2 --dist loadfile
ROUNDS ?= 20
NATIVE_SOURCES := $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.py')
CPP_SOURCES = $(filter %.cpp %.h,$(NATIVE_SOURCES)) $(wildcard gemini/heap/*.cpp tests/support/async_device/*.[ch]*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-all test-newest stress constraints check check-format lint typecheck docstrings docs check-native sanitize format gpu gpu-wheels bench clean

help:  ## say what can be made (this text)
	@echo "Gemini: train models far larger than the device's memory. Start with: make quickstart"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "The first call makes .venv; name another interpreter with PYTHON=/path/to/python3."

setup: $(BUILT)  ## make .venv and build the native module; keeps a torch that is already installed

quickstart: $(BUILT)  ## train a model larger than its memory budget, in a few minutes
	$(PY) examples/quickstart.py

test: $(BUILT)  ## run the quick tests, which touch every part, in about six minutes
	$(PY) $(PYTEST_ALL) -m "not slow"

test-all: $(BUILT)  ## run all tests; those that need a GPU say so and are skipped without one
	$(PY) $(PYTEST_ALL)

test-newest:  ## run all tests with the newest version of everything, in .venv-newest
	@$(BOOTSTRAP) --newest
	.venv-newest/bin/python $(PYTEST_ALL)

stress: $(BUILT)  ## run what uses several processes 20 times: as it is, on one processor, under load; ROUNDS=N
	$(PY) tests/stress.py --rounds $(ROUNDS)

constraints: $(TOOLS)  ## write constraints.txt: the versions that .venv has now, after its tests were green
	$(PY) .ci/constraints.py

check: check-format lint typecheck docstrings docs check-native  ## everything that must hold before a commit, tests last
	@$(MAKE) --no-print-directory test-all

check-format: $(TOOLS)
	$(PY) -m ruff format --check .

lint: $(TOOLS)
	$(PY) -m ruff check .

typecheck: $(TOOLS)
	$(PY) -m mypy

docstrings: $(TOOLS)
	.venv/bin/pydoclint --quiet gemini zero

docs: $(BUILT) $(TOOLS)  ## write the documentation as a site to build/docs, and stop at any warning
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "Open build/docs/index.html"

check-native: $(TOOLS)
	.venv/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

sanitize: $(BUILT)  ## run the native library's own test program under sanitizers, about a minute
	$(PY) native/sanitize.py

format: $(TOOLS)  ## rewrite the sources in the project's form
	$(PY) -m ruff check --fix --select I .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $(CPP_SOURCES)

gpu:  ## run the GPU tests and measure, in nine minutes and without a network; WHEELS=DIR, OUT=DIR
	@$(or $(PYTHON),python3) .ci/gpu_run.py --out $(or $(OUT),build/gpu) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(PYTHON),--python $(PYTHON))

gpu-wheels:  ## fetch what a GPU machine without a network may lack, into WHEELS=build/wheels; PEERS=1, ALSO="NAME ..."
	@$(or $(PYTHON),python3) .ci/gpu_run.py --download $(or $(WHEELS),build/wheels) $(if $(PEERS),--peers) $(if $(ALSO),--also $(ALSO)) $(if $(GPU_PYTHON),--for-python $(GPU_PYTHON))

bench: $(BUILT)  ## measure what this machine without a GPU can measure
	$(PY) benchmarks/cpu.py --out benchmarks/results

clean:  ## remove .venv and everything built
	rm -rf .venv .venv-newest build dist *.egg-info gemini/_native* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# All of it when the packaging changed, only the native module when its sources did.
$(BUILT): $(PACKAGING) $(NATIVE_SOURCES)
	@$(BOOTSTRAP) $(if $(filter $(PACKAGING),$?),,--native)
	@touch $@

$(TOOLS): $(PACKAGING) | $(BUILT)
	@$(BOOTSTRAP) --tools
	@touch $@
