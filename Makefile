# Each target works alone on a fresh checkout, and can be run again.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PEERS ?= torchao==0.18.0 memcnn==1.5.2 termcolor hqq==0.2.8.post1 gemlite==0.6.0.post2
VENV ?= .venv
JOBS ?= $(shell nproc)
OUT ?= bench/results/here
BUDGET ?= 240
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test bench figures gpu gpu-check lint format packaging clean

demo: $(VENV)/.installed
	$(BIN)/python -m pyfast demo

# One process a core, with two threads each, so that the kernels' parallel paths are tested. Threads wait
# asleep, so that they do not slow the other processes.
test: $(VENV)/.installed
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations 10

# Measure every op, quickly; then write the page and list the goals, met and missed.
bench: $(VENV)/.installed $(VENV)/peers/.installed
	$(BIN)/python -m bench --quick --budget $(BUDGET) --out $(OUT)
	$(BIN)/python -m bench page $(OUT) --redraw
	$(BIN)/python -m bench goals $(OUT)

# Write the README's table, docs/benchmarks.md and all plots from the committed results.
figures: $(VENV)/.installed
	$(BIN)/python -m bench readme
	$(BIN)/python -m bench page bench/results --out docs/benchmarks.md --redraw

# On a CUDA machine, with the torch that is there and no network: build in place, then run GPU tests
# and benches.
gpu:
	PYTHON=$(PYTHON) OUT=$(OUT)/gpu bash .ci/gpu

# On a CUDA machine: run every kernel on small cases under compute-sanitizer.
gpu-check:
	PYTHON=$(PYTHON) OUT=$(OUT)/gpu bash .ci/gpu-check

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES))

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(SOURCES))

packaging:
	PYTHON=$(PYTHON) TORCH="$(TORCH)" bash .ci/packaging

# torch comes first, so that pip resolves everything else around this build of it. The .pth file comes last:
# in a folder that holds a checkout called pyfast, Python would take that folder for the package.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet "setuptools>=64" ninja pybind11 numpy
	PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --editable ".[bench,test,lint]"
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pyfast-checkout.pth"
	touch $@

# Peers of the benches whose dependencies conflict with ours are installed beside them, and searched last.
# One that cannot be installed becomes a note in the tables.
$(VENV)/peers/.installed: $(VENV)/.installed
	mkdir -p $(VENV)/peers
	for package in $(PEERS); do \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/peers $$package || echo "no $$package"; \
	done
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV) pyfast/*.so demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
