# Each target alone suffices on a fresh checkout, and can be run again.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= bench/results
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test bench gpu lint format packaging clean

demo: $(VENV)/.installed
	$(BIN)/python -m pyfast demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

bench: $(VENV)/.installed
	$(BIN)/python -m bench nf4 --quick --out $(OUT)
	$(BIN)/python -m bench lora --quick --out $(OUT)
	$(BIN)/python -m bench lsh_attention --quick --out $(OUT)
	$(BIN)/python -m bench reversible --quick --out $(OUT)

# On a CUDA machine, with the torch that is there and no network: build in place, GPU tests, quick benches.
gpu:
	PYTHON=$(PYTHON) OUT=$(OUT) bash .ci/gpu

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

# torch first: everything after it is then resolved around that build of it. The .pth last: in a folder
# that holds a checkout called pyfast, Python would take the checkout itself for the package, but for a plain path to it.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet "setuptools>=64" ninja pybind11 numpy
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --editable ".[bench,test,lint]"
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pyfast-checkout.pth"
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV) pyfast/*.so demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
