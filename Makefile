# `make` lists the targets. Everything is installed into .venv, once, and again when the pins change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH = $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint bench clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

quickstart: $(VENV)/.installed ## Run the whole method on handwritten digits, on a CPU.
	$(BIN)/mpo quickstart

test: $(VENV)/.installed ## Run the tests.
	$(BIN)/pytest

lint: $(VENV)/.installed ## Check style and format.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench: $(VENV)/.installed ## Run the benchmarks.
	@for name in step packing sampling pipeline; do \
		echo "== benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py" || exit 1; \
	done

clean: ## Remove what was installed, built and cached; runs/ stays.
	rm -rf $(VENV) dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and exactly pinned: see the head of constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mpo needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@
