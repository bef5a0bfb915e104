PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
OPENGL := libegl1 libgl1 libglu1-mesa libgl1-mesa-dri

.PHONY: demo test test-all check bench browser rendering clean

demo: $(VENV)/.installed  ## train three methods with diagnostics, compare their conflict, write a page
	$(BIN)/gradlab demo --out $(DEMO)

test: $(VENV)/.installed browser rendering  ## all tests but the slow ones
	$(BIN)/pytest -q -n auto --dist loadgroup -m "not slow"

test-all: $(VENV)/.installed browser rendering  ## all tests, with every array's shape checked in every call
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[umap,ray]"
	$(BIN)/pytest -q -n auto --dist loadgroup \
		--jaxtyping-packages=gradlab,trainers,analyses,dashboards,strict.check

check: $(VENV)/.installed  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed  ## measure the costs anew (hours) and write docs/performance.md
	for script in tests/benchmarks/bench_*.py; do $(BIN)/python "$$script" || exit 1; done
	$(BIN)/python tests/benchmarks/report.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,peers,mamujoco,smax,pettingzoo,parquet,benchmarl,aggregate,zarr,onnx,notebook,tensorboard,wandb,mlflow]"
	touch $@

browser:  ## headless Chromium for the page's tests, from the system's packages
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; }

rendering:  ## OpenGL without a screen for the animations' tests, from the system's packages
	@dpkg -s $(OPENGL) >/dev/null 2>&1 || { apt-get update -q && apt-get install -y -q $(OPENGL); }

clean:
	rm -rf $(VENV)
