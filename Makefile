# `make demo` and `make test` do everything on a bare machine. A second run installs nothing and needs no
# network; one that was cut off is repaired by the next.

PYTHON ?= python3
BIN := .venv/bin

# The base that `make demo` answers with. Left out, it is the default one or, where that can't be had, this:
BASE ?=
SMALL_BASE := smollm2-135m-instruct

.PHONY: demo test test-slow docs base
.DELETE_ON_ERROR:

demo: .venv/installed
	@base=$$($(BIN)/llama-adapter fetch $(or $(BASE),--else $(SMALL_BASE))) && exec $(BIN)/python -m demo --base "$$base"

# Two workers with one thread each: more threads than cores makes torch many times slower. Files keep the order
# that tests/conftest.py gives them, the longest first.
test: base .venv/chromium
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy llama_adapter train eval demo benchmarks
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes minutes each.
test-slow: base .venv/chromium
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

docs: .venv/installed
	$(BIN)/python -m sphinx -W docs build/site

# What the tests need. Where the default base can't be had, its tests skip and say so.
base: .venv/installed
	$(BIN)/llama-adapter fetch $(SMALL_BASE)
	$(BIN)/llama-adapter fetch efficientnet-lite0-imagenet
	-$(BIN)/llama-adapter fetch

# Empty files in .venv say what has been done.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is not Python 3.10 or newer: use make PYTHON=/path/to/python" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

.venv/chromium: | .venv/installed
	@command -v chromium >/dev/null \
	  || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing chromium" \
	    && apt-get update -qq >/dev/null \
	    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
	  || echo "chromium can't be installed from here: without it the browser tests skip"
	@touch $@
