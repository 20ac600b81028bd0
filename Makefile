# Needs make and Python 3.11 or newer. Everything else goes into .venv; what the pipeline writes, into .state.
# Programs are run as modules: the scripts in .venv/bin may break where the project's path is long or has spaces.

PY := .venv/bin/python
CATALOGUE ?= examples/movies.csv
QUERY ?= a man ages backwards
HOST ?= 127.0.0.1
PORT ?= 3000
ARGS ?=

export DAGSTER_HOME := $(CURDIR)
export CATALOGUE QUERY HOST PORT

.PHONY: help run ui serve test test-fast coverage bench bench-gpu profile chaos migration-drill docs lint clean
.DEFAULT_GOAL := help

help:
	@echo "make run        load the sample catalogue (CATALOGUE=another.csv), embed it, search it (QUERY='…')"
	@echo "make ui         the Dagster UI on http://$(HOST):$(PORT) (PORT=…); Ctrl-C ends it"
	@echo "make serve      searches over HTTP, on http://$(HOST):8000 (PORT=…)"
	@echo "make test       the whole test suite (ARGS='-k name')"
	@echo "make test-fast  the tests that need neither Dagster nor processes of their own"
	@echo "make coverage   the whole suite, and which lines it ran"
	@echo "make bench      the benchmarks beside their peers (CATALOGUE=…, ARGS=--without-peers)"
	@echo "make bench-gpu  the encoder on a GPU beside sentence-transformers in float16 (ARGS='--texts 20000')"
	@echo "make profile    where a sync's time goes: a table and a flame graph in profile/ (CATALOGUE=…, ARGS='--changed 1')"
	@echo "make chaos      kill whatever works at 50 random moments, then compare with a clean build; then 50 times a sync"
	@echo "                on a hosted model, and count what was billed (ARGS='--rounds 5')"
	@echo "make migration-drill  change the model under load, and look at every answer (ARGS='--rows 1000000')"
	@echo "make docs       the documentation as a site in site/"
	@echo "make lint       ruff, mypy and the import contracts"
	@echo "make clean      remove .venv and caches; the data in .state stays"
	@echo "INSTALLER=pip: set up without uv. PYTHON=…: another interpreter for .venv."

# The sample, whatever else is defined.
run: export EMBEDDINGS_DEFS_DIR := embeddings_pipeline/defs
run:
	@.ci/install run
	@echo "loading $$CATALOGUE into PostgreSQL"
	@$(PY) -m embeddings_pipeline load "$$CATALOGUE" --table movies
	@echo "embedding what is new or changed: Dagster and the model start first"
	@$(PY) -m embeddings_pipeline sync --collection items
	@$(PY) -m embeddings_pipeline status --collection items
	@echo "search: $$QUERY"
	@$(PY) -m embeddings_pipeline search --collection items -k 5 -- "$$QUERY"

test:
	@.ci/install test
	@$(PY) -m pytest $(ARGS)

test-fast:
	@.ci/install test
	@$(PY) -m pytest -m "not slow" $(ARGS)

coverage:
	@.ci/install test
	@$(PY) -m pytest --cov --cov-report=term --cov-report=xml $(ARGS)

ui:
	@.ci/install run
	@exec $(PY) -m embeddings_pipeline ui --host "$$HOST" --port "$$PORT"

serve: export PORT := 8000
serve:
	@.ci/install serve
	@exec $(PY) -m embeddings_pipeline serve --host "$$HOST" --port "$$PORT"

bench:
	@.ci/install test
	@$(PY) benchmarks/bench.py "$$CATALOGUE" $(ARGS)

bench-gpu:
	@.ci/install run
	@$(PY) benchmarks/bench_gpu.py $(ARGS)

profile:
	@.ci/install bench
	@$(PY) benchmarks/profile_sync.py "$$CATALOGUE" $(ARGS)

chaos:
	@.ci/install test
	@$(PY) -m embeddings_pipeline_tests.process.chaos $(ARGS)
	@$(PY) -m embeddings_pipeline_tests.process.chaos_hosted $(ARGS)

migration-drill:
	@.ci/install test
	@$(PY) benchmarks/drill_migration.py $(ARGS)

docs:
	@.ci/install docs
	@$(PY) docs/generate_reference.py
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint:
	@.ci/install dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@if grep -qs '^\[tool.importlinter\]' pyproject.toml || [ -e .importlinter ]; then \
		$(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-cache; \
	fi

clean:
	rm -rf .venv dist site coverage.xml .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.tmp_dagster_home_* .logs_queue .telemetry
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
