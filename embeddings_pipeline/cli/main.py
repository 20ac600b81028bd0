"""The command line. Each command prints for people, with --json for programs; errors are one line and exit 1, or 3 if a
budget is spent.
"""

import errno
import io
import logging
import os
import sys
from contextlib import nullcontext

import click
import psycopg
import typer

from embeddings_pipeline.cli import (
    batch_job,
    cache,
    collection,
    evaluate,
    init,
    live,
    load,
    profile,
    psql,
    quarantine,
    search,
    serve,
    status,
    sync,
    ui,
)
from embeddings_pipeline.cli.console import LineFormatter, printable, sign_of_life, tell
from embeddings_pipeline.errors import BudgetError, InterruptedRunError, PipelineError
from embeddings_pipeline.store.retry import what_it_says

app = typer.Typer(
    help="Keeps the embeddings of a table up to date, in PostgreSQL (pgvector) and in FAISS.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does that itself
    pretty_exceptions_enable=False,
)
for command in (
    load.load,
    sync.sync,
    status.status,
    search.search,
    search.similar,
    search.recommend,
    evaluate.evaluate,
    serve.serve,
    live.live,
    ui.ui,
    init.init,
):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(psql.psql)
app.add_typer(profile.app, name="profile")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(collection.app, name="collection")
app.add_typer(cache.app, name="cache")
app.add_typer(batch_job.app, name="batch-job")


GROUPS = ("profile", "quarantine", "collection", "cache", "batch-job")
BUDGET_SPENT = 3  # the exit code, so that who waits for a budget can tell it from a failure
INTERRUPTED = 130  # the exit code, as shells have it: 128 and the number of SIGINT
# What a folder or disk does to a user, rather than a mistake of ours.
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


def main() -> None:
    """Entry point: errors that a user can cause are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets `?`
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for noisy in ("sentence_transformers", "transformers", "dagster", "alembic", "stamina"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("embeddings_pipeline.health.alerts").setLevel(logging.CRITICAL)  # whoever types sees what fails
    try:
        with sign_of_life(name) if (name := _long_work(sys.argv[1:])) else nullcontext():
            code = app(prog_name="embeddings-pipeline", standalone_mode=False)
        sys.stdout.flush()  # what cannot be written is said here, and not at the interpreter's end
        raise SystemExit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        tell(f"error: {' '.join(error.format_message().split())}{_help_of(error)}")
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        tell("aborted: nothing more was done")
        raise SystemExit(1) from None
    except BrokenPipeError:  # the reader of our output has left: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (PipelineError, psycopg.Error, OSError) as error:
        if (line := one_line(error)) is None:
            raise
        print(line, file=sys.stderr)
        if isinstance(error, OSError) and not error.filename:  # what is not written yet cannot be either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_exit_code(error)) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, InterruptedRunError):
        return INTERRUPTED
    return BUDGET_SPENT if isinstance(error, BudgetError) else 1


def _long_work(arguments: list[str]) -> str | None:
    """The command's name, if it is one that comes to an end without a person and is no program's."""
    name = " ".join(arguments[: 2 if arguments[:1] and arguments[0] in GROUPS else 1])
    return None if name in ("", "ui", "psql", "init", "live", "serve") or "--json" in arguments else name


def _help_of(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f" (see `{context.command_path} --help`)" if context else ""


def one_line(error: BaseException) -> str | None:
    """What a user is told of an error that a user can cause; None for any other."""
    if isinstance(error, PipelineError):
        return printable(f"error: {error}")
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return printable(
            f"error: {error.filename}: {error.strerror}; make room there or let this user read and write it, or set "
            "EMBEDDINGS_STATE_DIR to a folder where it may"
        )
    if isinstance(error, OSError) and error.errno in REFUSED:
        return f"error: the output cannot be written: {error.strerror}; make room where it goes"
    return printable(f"error: {what_it_says(error)}") if isinstance(error, psycopg.Error) else None
