# `make demo` and `make test` do everything on a bare machine. A second run installs nothing and needs no
# network; one that was cut off is repaired by the next.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow docs base
.DELETE_ON_ERROR:

demo: base
	$(BIN)/python -m demo

# Two workers with one thread each: more threads than cores makes torch many times slower.
test: base .venv/chromium
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy llama_adapter train eval demo benchmarks
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What takes minutes each.
test-slow: base .venv/chromium
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

docs: .venv/installed
	$(BIN)/python -m sphinx -W docs build/site

base: .venv/installed
	$(BIN)/llama-adapter fetch smollm2-135m-instruct
	$(BIN)/llama-adapter fetch efficientnet-lite0-imagenet

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
