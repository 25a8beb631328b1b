# What people do in this repository. `make` lists it.
PYTHON ?= python

.PHONY: help
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: setup
setup: ## install the tested versions and this tree into the environment that is active
	$(PYTHON) -m pip install -c constraints.txt -e '.[test]'

.PHONY: lint
lint: ## style, format, and the order of the rooms
	ruff check
	ruff format --check
	lint-imports

.PHONY: types
types: ## mypy
	mypy

.PHONY: test
test: ## the fast tests, of every room: under two minutes on two cores
	$(PYTHON) -m pytest -n 2 -m 'not (slow or sweep or real_model or server or browser or node or gpu or docker or ray)'

.PHONY: test-all
test-all: ## all tests
	$(PYTHON) -m pytest -n 2

.PHONY: smoke
smoke: ## what every user does, once: it has to work with any versions that the bounds admit
	scripts/smoke.sh

.PHONY: docs
docs: ## write docs/cli.md, docs/recipe.md and docs/api.md from the code
	$(PYTHON) scripts/reference.py

.PHONY: architectures
architectures: ## write the table of supported model types, of the transformers that is installed
	PYTHONPATH=tests $(PYTHON) -m base_model.support_table

.PHONY: constraints
constraints: ## write the sets of versions that are tested, within the bounds of pyproject.toml
	scripts/constraints.sh

.PHONY: compat
compat: ## try the newest releases beyond the bounds, and print what passes
	$(PYTHON) scripts/compat.py
