# Lightbox. `make` lists what there is.

PYTHON := .venv/bin/python
LOCK := $(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --upgrade

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test check bench format lock clean

help: ## this list
	@echo 'Lightbox: make <target>'
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what the demo needs (Debian or Ubuntu)
	@sh app/demo/bootstrap.sh run

setup-test: ## install what the tests need, too
	@sh app/demo/bootstrap.sh test

demo: setup ## Orthanc, viewer, API and example patients on this machine
	@exec $(PYTHON) -m app demo

test: setup-test ## all tests, with the real Orthanc, PostgreSQL and browser
	@exec $(PYTHON) -m pytest -ra

check: setup-test ## format, lint, types, layers and the fast tests
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports
	$(PYTHON) -m pytest -q tests/unit tests/contract

bench: setup-test ## how fast it is against direct Orthanc: docs/performance.md
	@exec $(PYTHON) -m tests.bench

format: setup-test ## put the code into shape
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lock: setup-test ## pin the newest versions that pyproject.toml allows
	$(LOCK) pyproject.toml --output-file app/requirements.txt
	$(LOCK) pyproject.toml --group dev --constraint app/requirements.txt --output-file tests/requirements.txt
	@! grep -nE '://|index-url|find-links|trusted-host' app/requirements.txt tests/requirements.txt

clean: ## remove what was built here, and the demo's data
	rm -rf .venv .lightbox .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find app tests -name __pycache__ -type d -prune -exec rm -rf {} +
