# Two commands for a newcomer: `make demo` and `make test`. Each builds .venv itself.
# Elsewhere than on a CPU-only index a plain `pip install torch` brings CUDA; to take the CPU build:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The tools of the virtual environment go first: Biome, for one, finds node by PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Tests and jobs start many processes: without compiled bytecode each would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve test unit coverage mutants chaos e2e lint lint-python lint-javascript lint-shell lint-yaml generate s3 install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing cat-cluster into $(VENV) (a few minutes the first time)"
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

# BASE=pocket-xl for the second embedded base, a small SDXL.
BASE ?= pocket
DEMO := out/demo$(if $(filter-out pocket,$(BASE)),-$(BASE))
demo: $(STAMP)
	$(BIN)/cat-cluster demo --base $(BASE) --out $(DEMO)

# Serves the demo's adapters with the page, until Ctrl+C; PORT=8001 for another port.
PORT ?= 8000
serve: $(STAMP)
	@test -d $(DEMO)/registry || $(MAKE) demo
	$(BIN)/cat-cluster serve --base $(BASE) --storage $(DEMO)/registry --port $(PORT)

PYTEST  := $(BIN)/python -m pytest
WORKERS ?= 2
# One torch thread each: two processes with two threads each are slower on two cores.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS)
UNIT         := $(SIDE_BY_SIDE) --dist worksteal -m unit tests/unit

# The tests that start neither Ray nor the S3 server nor a browser, and are not slow.
unit: $(STAMP)
	$(UNIT)

# All tests but chaos, each once; a file is one process's, for its tests share what they start. The long ones go first.
test: $(STAMP)
	$(SIDE_BY_SIDE) --dist loadfile --no-loadscope-reorder -m "not chaos" --durations=30 tests/integration tests/unit

chaos: $(STAMP)
	$(PYTEST) -m chaos --durations=0 --durations-min=1

# On a real cluster, which it fills, breaks and empties: only the one that E2E_CONTEXT names. Each file stands on the ones
# before it. E2E_RECORD=1 makes a result file of it, which docs/operations.md shows.
e2e: $(STAMP)
	$(PYTEST) --durations=0 --durations-min=1 tests/e2e/test_install.py tests/e2e/test_network.py tests/e2e/test_jobs.py \
		tests/e2e/test_schedules.py tests/e2e/test_service.py tests/e2e/test_removal.py

# Small mistakes in core lines, made one at a time in a copy: the tests must notice each. AREA=training for one area.
AREA ?=
mutants: $(STAMP)
	$(BIN)/python -m tests.mutants $(AREA)

# The lines and branches that `make unit` runs through, and those that it does not.
coverage: $(STAMP)
	$(UNIT) --cov --cov-report=term

lint: lint-python lint-javascript lint-shell lint-yaml

lint-python: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Biome comes from npm; node and npm are in the virtual environment.
BIOME_VERSION := 2.6.8
BIOME_STAMP   := $(VENV)/.biome-$(BIOME_VERSION)

$(BIOME_STAMP): $(STAMP)
	$(BIN)/npm install --silent --no-audit --no-fund --global --prefix $(VENV) @biomejs/biome@$(BIOME_VERSION)
	@touch $@

lint-javascript: $(BIOME_STAMP)
	$(BIN)/biome check --config-path=.ci serve/page

lint-shell: $(STAMP)
	$(BIN)/shellcheck .ci/run k8s/secrets.sh

lint-yaml: $(STAMP)
	$(BIN)/yamllint --strict --config-file .ci/yamllint.yaml .

# Writes every generated file that is stale: tables in docs, metrics page, alert rules, benchmark pages and pictures.
generate: $(STAMP)
	$(BIN)/python -m jobs.generate

# A real S3 server on loopback, to try things with; the first start installs it in a place of its own.
s3: $(STAMP)
	@$(BIN)/python -m tests.support.s3_server

clean:
	rm -rf $(VENV) out build *.egg-info
