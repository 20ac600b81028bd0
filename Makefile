# Needs make and Python 3.11 or newer. Everything else goes into .venv; what the pipeline writes, into .state.
# Programs are run as modules: the scripts in .venv/bin break where the project's path is long or has spaces.

PY := .venv/bin/python
CATALOGUE ?= examples/movies.csv
QUERY ?= a man ages backwards
HOST ?= 127.0.0.1
PORT ?= 3000
ARGS ?=

export DAGSTER_HOME := $(CURDIR)
export CATALOGUE QUERY HOST PORT

.PHONY: help run test ui bench chaos migration-drill lint clean
.DEFAULT_GOAL := help

help:
	@echo "make run     load the sample catalogue (CATALOGUE=another.csv), embed it, search it (QUERY='…')"
	@echo "make ui      the Dagster UI on http://$(HOST):$(PORT) (PORT=…); Ctrl-C ends it"
	@echo "make test    the whole test suite (ARGS='-k name')"
	@echo "make bench   the benchmarks beside their peers (CATALOGUE=…, ARGS=--without-peers)"
	@echo "make chaos   kill whatever works at 50 random moments, then compare with a clean build (ARGS='--rounds 5')"
	@echo "make migration-drill  change the model under load, and look at every answer (ARGS='--rows 1000000')"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove .venv and caches; the data in .state stays"

run:
	@.ci/install run
	@$(PY) -m embeddings_pipeline load "$$CATALOGUE"
	@$(PY) -m embeddings_pipeline sync
	@$(PY) -m embeddings_pipeline status
	@echo "search: $$QUERY"
	@$(PY) -m embeddings_pipeline search -k 5 -- "$$QUERY"

test:
	@.ci/install test
	@$(PY) -m pytest $(ARGS)

ui:
	@.ci/install test
	@exec $(PY) -m embeddings_pipeline ui --host "$$HOST" --port "$$PORT"

bench:
	@.ci/install test
	@$(PY) benchmarks/bench.py "$$CATALOGUE" $(ARGS)

chaos:
	@.ci/install test
	@$(PY) -m embeddings_pipeline_tests.process.chaos $(ARGS)

migration-drill:
	@.ci/install test
	@$(PY) benchmarks/drill_migration.py $(ARGS)

lint:
	@.ci/install dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .tmp_dagster_home_* .logs_queue .telemetry
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
