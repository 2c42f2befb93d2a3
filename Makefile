# Thin on purpose: every target is one command that can be typed instead. `make` lists them.
PACKAGES := tokenize model optim train monitor
UV ?= uv

.DEFAULT_GOAL := help
.PHONY: help setup test test-package isolated lint format types lock check build wheels bench clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-14s %s\n", $$1, $$2 }'

setup: ## Create .venv with all packages and tools, and install the commit hooks
	$(UV) sync --all-packages
	$(UV) run pre-commit install

test: ## Run all tests
	$(UV) run pytest

test-package: ## Run the tests of one part: make test-package P=optim
	$(UV) run pytest tests/$(P)

isolated: ## Test each package alone, with nothing but what it declares
	set -e; for part in $(PACKAGES); do \
	  $(UV) run --isolated --package anarcho-$$part --group test pytest tests/$$part; done
	$(UV) run --isolated --package anarcho-cli --group test pytest tests/cli

lint: ## Check style and layout of the code
	$(UV) run ruff check
	$(UV) run ruff format --check

format: ## Rewrite the code in the common style
	$(UV) run ruff check --fix
	$(UV) run ruff format

types: ## Check types
	$(UV) run pyright

lock: ## Check that uv.lock fits the pyproject files
	$(UV) lock --check

check: lock lint types test ## Everything that a change must pass

build: ## Build wheels and source archives of all packages into dist/
	rm -rf dist
	$(UV) build --all-packages --no-sources

wheels: build ## Import every built wheel in an environment of its own
	set -e; for part in $(PACKAGES) cli; do \
	  $(UV) run --isolated --no-project --find-links dist --with anarcho-$$part python -c "import anarcho_$$part"; done
	$(UV) run --isolated --no-project --find-links dist --with anarcho-cli anarcho --help

bench: ## List the measurements; each is a script of its own
	@for script in benchmarks/*.py; do printf '  uv run python %s\n' "$$script"; done

clean: ## Remove what the tools wrote (never runs/)
	rm -rf dist .pytest_cache .ruff_cache .hypothesis
