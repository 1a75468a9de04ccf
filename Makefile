# Two commands for a newcomer: `make demo` and `make test`. Each builds .venv itself.
# Elsewhere than on a CPU-only index a plain `pip install torch` brings CUDA; to take the CPU build:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo serve test lint chaos generate s3 install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing cat-cluster into $(VENV) (a few minutes the first time)"
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/cat-cluster demo --out out/demo

# Serves the demo's adapters with the page, until Ctrl+C; PORT=8001 for another port.
PORT ?= 8000
serve: $(STAMP)
	@test -d out/demo/registry || $(MAKE) demo
	$(BIN)/cat-cluster serve --storage out/demo/registry --port $(PORT)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not chaos"

chaos: $(STAMP)
	$(BIN)/python -m pytest -m chaos

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Writes every generated file that is stale: tables in docs, metrics page, alert rules, benchmark pages and pictures.
generate: $(STAMP)
	$(BIN)/python -m jobs.generate

# A real S3 server on loopback, to try things with; the first start installs it in a place of its own.
s3: $(STAMP)
	@$(BIN)/python -m tests.support.s3_server

clean:
	rm -rf $(VENV) out build *.egg-info
