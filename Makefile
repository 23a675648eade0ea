# `make demo` and `make test` need git, make and Python 3.10 or newer; each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
STUDY ?= trade_off
CORES ?= 2
SECONDS_IN_ALL ?= 480
GPU_OUT ?= runs/gpu
GPU_DATA ?=
BIN := $(VENV)/bin
# Decides about threads from the machine and its load, before torch is loaded.
RUN := $(BIN)/python -m dat_lightning.threads
# One process per core, each with one thread; the tests of a file share its fixtures.
WORKERS ?= auto
TESTS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo study test test-all lint types bench gpu docs format clean

demo: $(VENV)/.installed-demo  ## train both stages on digits, and write $(OUT)/report.html
	$(RUN) -m dat_lightning.demo --out $(OUT)

study: $(VENV)/.installed-studies  ## run, or go on with, a study of configs/studies: STUDY=trade_off, CORES=2
	$(BIN)/snakemake -s configs/studies/Snakefile --cores $(CORES) --config study=$(STUDY)

test: lint types  ## what CI runs
	$(TESTS)

test-all: lint types  ## the slow tests as well
	$(TESTS) -m ''

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test  ## speed against a plain implementation, also as bench.json
	$(RUN) -m tests.benchmarks.bench --json bench.json

gpu: $(VENV)/.installed-test  ## what only a GPU shows, in $(SECONDS_IN_ALL) s: tests, speed, training; tests/benchmarks/gpu.sh
	tests/benchmarks/gpu.sh $(BIN)/python $(SECONDS_IN_ALL) $(GPU_OUT) $(GPU_DATA)

docs: $(VENV)/.installed-docs  ## the pages, into site/
	$(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

# The stamps keep a second run from installing again, until the requirements change.
$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (the first time takes a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) site
