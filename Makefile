# make demo: convert a real BERT and show what happened.  make check: at every save.  make test: everything that must hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := install --quiet --disable-pip-version-check

.PHONY: demo check test test-oldest conformance census audit format notebooks site figures benchmarks gpu clean

demo: $(VENV)/demo.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.demo

# One to two minutes on two idle cores
check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

# About six minutes on two cores: a quarter of it trains, converts and runs what README, pages and notebooks show
test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-oldest: .venv-oldest/test.stamp
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal

# Transformers' own tests, dense beside low-rank: about ten minutes on two cores
conformance: $(VENV)/test.stamp
	$(BIN)/python -m conformance

# Every model class of Transformers there and back: about twenty minutes on two cores; a broken run goes on
census: $(VENV)/test.stamp
	$(BIN)/python -m census

# Known vulnerabilities of the pinned versions; asks a database on the net
audit: $(VENV)/bin/python
	$(BIN)/python -m pip $(PIP) pip-audit
	$(BIN)/pip-audit --requirement .ci/constraints.txt --no-deps --disable-pip

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Run the notebooks and store what they show
notebooks: $(VENV)/test.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/run.py notebooks/*.ipynb

# What benchmarks stored, into the tables of README and pages
figures: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.figures

# README, docs and notebooks as a site, in build/site
site: $(VENV)/test.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site
	@echo "open build/site/index.html"

benchmarks: $(VENV)/benchmark.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.foundation
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.speed
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.memory

# On a machine with a GPU: its tests, and what low rank is worth there; eight minutes
gpu: $(VENV)/test.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu

clean:
	rm -rf $(VENV) .venv-oldest .conformance .census .mypy_cache .ruff_cache .pytest_cache build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip $(PIP) --constraint .ci/constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/test.stamp: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip $(PIP) --constraint .ci/constraints.txt --editable '.[demo,test]'
	touch $@

$(VENV)/benchmark.stamp: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip $(PIP) --constraint .ci/constraints.txt --editable '.[benchmark]'
	touch $@

.venv-oldest/test.stamp: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip $(PIP) --constraint .ci/oldest.txt --editable '.[demo,test]'
	touch $@
