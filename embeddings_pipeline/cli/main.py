"""The command line. Each command prints for people, with --json for programs; errors are one line and exit 1."""

import logging
import os
import sys

import click
import psycopg
import typer

from embeddings_pipeline.cli import collection, init, load, profile, psql, quarantine, search, status, sync, ui
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.store.retry import what_it_says

app = typer.Typer(
    help="Keeps the embeddings of a table up to date, in PostgreSQL (pgvector) and in FAISS.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does that itself
    pretty_exceptions_enable=False,
)
for command in (load.load, sync.sync, status.status, search.search, ui.ui, init.init):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(psql.psql)
app.add_typer(profile.app, name="profile")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(collection.app, name="collection")


def main() -> None:
    """Entry point: errors that a user can cause are one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for noisy in ("sentence_transformers", "transformers", "dagster", "alembic", "stamina"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("embeddings_pipeline.health.alerts").setLevel(logging.CRITICAL)  # whoever types sees what fails
    try:
        raise SystemExit(app(prog_name="embeddings-pipeline", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        print(f"error: {error.format_message()}{_help_of(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        print("aborted: nothing more was done", file=sys.stderr)
        raise SystemExit(1) from None
    except (PipelineError, psycopg.Error) as error:
        print(one_line(error), file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # the reader of our output has left: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _help_of(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f" (see `{context.command_path} --help`)" if context else ""


def one_line(error: BaseException) -> str | None:
    """What a user is told of an error that a user can cause; None for any other."""
    if isinstance(error, PipelineError):
        return f"error: {error}"
    return f"error: {what_it_says(error)}" if isinstance(error, psycopg.Error) else None
