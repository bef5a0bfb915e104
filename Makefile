PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test test-all check bench browser clean

demo: $(VENV)/.installed  ## train three methods with diagnostics, compare their conflict, write a page
	$(BIN)/gradlab demo --out $(DEMO)

test: $(VENV)/.installed browser  ## all tests but the slow ones
	$(BIN)/pytest -q -n auto -m "not slow"

test-all: $(VENV)/.installed browser
	$(BIN)/pytest -q -n auto

check: $(VENV)/.installed  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed  ## measure the costs anew (half an hour) and write docs/performance.md
	for script in tests/benchmarks/bench_*.py; do $(BIN)/python "$$script" || exit 1; done
	$(BIN)/python tests/benchmarks/report.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,peers]"
	touch $@

browser:  ## headless Chromium for the page's tests, from the system's packages
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; }

clean:
	rm -rf $(VENV)
