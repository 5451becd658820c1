# make demo    install, then train the shipped job cifar-cnn on all cores
# make test    install with the development tools, then run the tests
# make check   lint, types, tests
# make bench   every speed claim, with its peers (long)
# make clean   take away what make made; runs/ stays
#
# Another Python: make test PYTHON=/path/to/python3.12

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt scripts/install.py
# A version manager may put a python3.11 on the PATH that only prints an error, so every candidate is run, not just found.
IN_RANGE := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
ifndef PYTHON
PYTHON := $(shell for python in $$(type -ap python3.11 python3 python3.12 python3.13 python3.10); do \
	"$$python" -c '$(IN_RANGE)' 2>/dev/null && { echo "$$python"; break; }; done)
endif

.PHONY: demo test check lint types bench clean python
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/shoal train cifar-cnn

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: lint types test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy shoal

# Run one after the other: two benchmarks at once would measure each other.
bench: $(VENV)/.installed-dev
	@set -e; for file in $(wildcard benchmarks/train.py benchmarks/layers.py benchmarks/reduce.py benchmarks/collectives.py benchmarks/memory.py \
		benchmarks/model_parallel.py benchmarks/start.py benchmarks/faults.py \
		benchmarks/parameter_server.py benchmarks/parameter_server_sparse.py benchmarks/serve.py); do echo "== $$file"; $(BIN)/python $$file; done

# The install script writes both stamps where --dev holds the plain installation too.
$(VENV)/.installed: $(INPUTS) | python
	@$(PYTHON) scripts/install.py --venv $(VENV)

$(VENV)/.installed-dev: $(INPUTS) | python
	@$(PYTHON) scripts/install.py --venv $(VENV) --dev

python:
	@test -n "$(PYTHON)" || { echo "shoal needs Python 3.10 to 3.13 and found none on the PATH; install Python 3.11, or name one with: make PYTHON=/path/to/python3.11" >&2; exit 2; }

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
