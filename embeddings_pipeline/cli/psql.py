"""`psql`: the pipeline's database by hand."""

import signal
import subprocess

import typer

from embeddings_pipeline.cli.console import pipeline_database
from embeddings_pipeline.config.settings import load_settings


def psql(context: typer.Context) -> None:
    """psql on the pipeline's database; arguments are passed on: `psql -c 'select …'`."""
    from embeddings_pipeline.store.database import psql_command

    path, arguments, environment = psql_command(pipeline_database(load_settings()), context.args)
    with subprocess.Popen(arguments, executable=path, env=environment) as process:
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for psql's own prompt
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, former)
    raise SystemExit(code)
