# What a fresh clone needs: Python 3.11 or newer, and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench docs gallery clean

demo: $(VENV)/.core ## install, examine a small network on embedded real images, say where the report is
	$(BIN)/assay examine --demo --budget 2m --no-resume --output runs/demo

test: $(VENV)/.test ## the whole test suite, what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.lint ## style, import rules, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/.test ## time Assay against its peers
	$(BIN)/assay bench

docs: $(VENV)/.docs ## build the site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gallery: $(VENV)/.core ## static site over results/ and runs/
	$(BIN)/assay gallery

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(VENV)/.core
	$(PIP) -e '.[$*]'
	@touch $@

$(VENV)/.test: tests/parity/requirements.txt $(VENV)/.core
	$(PIP) -e '.[test]'
	$(PIP) --no-deps -r tests/parity/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) site runs .pytest_cache .ruff_cache .import_linter_cache
