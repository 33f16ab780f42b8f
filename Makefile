# Needs nothing but Python 3.11 or newer and make: everything else goes into $(VENV).
#
#   make demo      train three networks that differ in where credit goes, and write a page that compares them (minutes on
#                  two CPU cores; killed, it goes on where it was; SEEDS=3: three times the work, and verdicts)
#   make test      run the tests on JOBS cores (default 2) and a twelfth of the slow ones, another every day
#                  (RLT2I_SLOW=all: all of them; RLT2I_DAY=2027-01-31: those of that day)
#   make lint      style, formatting and types
#   make docs      the documentation site, into site/; the tutorials run while it is built (a few minutes)
#   make pretrain  train the embedded model's starting weights from nothing (an hour or two of CPU)
#   make release-check  build the archives and check version, changelog, tag and metadata; publishes nothing
#   make clean     remove the environment and all caches; runs stay

PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 1
PYTEST_ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed

.PHONY: demo docs test lint pretrain release-check install clean
.DEFAULT_GOAL := install

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "rlt2i needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(LOCKED): requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(INSTALLED): pyproject.toml $(LOCKED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/rlt2i bench cells-demo --jobs 2 --seeds $(SEEDS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	PYTHONPATH=. HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

pretrain: $(INSTALLED)
	$(BIN)/rlt2i pretrain shapes --out rlt2i/tasks/shapes/pipeline

release-check: $(INSTALLED)
	$(BIN)/python .ci/release.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
