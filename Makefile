# make study and make test are the only two commands anyone needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two processes: the tests are tiny work on one thread each. A file stays in one, for what its tests share.
TOGETHER := --numprocesses 2 --dist loadfile

.PHONY: study test check slow setup
.DEFAULT_GOAL := help

help:
	@echo "make study   set up, then the main job on scikit-learn's real digits: runs/digits/report.html"
	@echo "make test    set up, then all tests"
	@echo "make check   set up, then lint, types and tests: what CI runs"
	@echo "make slow    set up, then the long statistics"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c "from distillens import kernels; print('kernels:', *kernels.available())"
	touch $(READY)

study: $(READY)
	$(BIN)/distillens study --data digits --to runs/digits

test: $(READY)
	$(BIN)/python -m pytest $(TOGETHER)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(TOGETHER)

slow: $(READY)
	$(BIN)/python -m pytest -m slow
