"""Removing what is kept of a collection: files first (and before them Dagster's partition keys,
`orchestration/collections.py`), and the database last, whose row says that it exists.

A user's own tables stay as they are, columns with vectors included. What a killed removal left, the next one removes.
"""

import shutil

import psycopg
from psycopg import sql

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError, profile_command
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.pipeline.inventory import Inventory
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.lake import open_lake
from embeddings_pipeline.store.locks import batches_in_commit, exclusively, lock_collection, vacuum_lock
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.wording import counted, many


def remove_collection(database: Database, settings: Settings, kept: Inventory) -> None:
    """Remove all that an inventory lists. RefusedError while it is being written, or its model is being changed."""
    with database.connect(autocommit=True) as connection:
        check_idle(connection, kept.name)
        check_no_batch_jobs(connection, kept.name)
    if kept.faiss is not None:
        shutil.rmtree(kept.faiss)
    failpoint("remove.faiss")
    if kept.lake is not None:
        open_lake(settings).delete_folder(kept.lake)
    failpoint("remove.lake")
    _remove_from_database(database, kept)


def check_idle(connection: psycopg.Connection, name: str) -> None:
    """RefusedError if a commit or a model change of the collection is under way."""
    row = connection.execute(load_sql("collection/open_change"), {"collection": name}).fetchone()
    if row:
        words = "rollback" if row[0] == "expanded" else "contract"
        remedy = f"`{profile_command(words, name)}`"
        raise RefusedError(f"collection {name!r}: a change of its model is under way ({row[0]}); end it with {remedy}")
    if batches := batches_in_commit(connection, name):
        raise RefusedError(
            f"collection {name!r}: {counted(len(batches), 'batch')} {many(len(batches), 'is')} being committed; wait "
            "for that run to end"
        )


def check_no_batch_jobs(connection: psycopg.Connection, name: str) -> None:
    """RefusedError while batch jobs of the collection are at work: their answers are paid for."""
    [(jobs,)] = connection.execute(load_sql("collection/batch_jobs"), {"collection": name}).fetchall()
    if jobs:
        raise RefusedError(
            f"collection {name!r}: {counted(jobs, 'batch job')} {many(jobs, 'is')} at work, and paid for: wait for "
            "them (`embeddings-pipeline batch-job list`), end them with `batch-job cancel`, then `batch-job fetch`, "
            "or give them up with `batch-job forget`"
        )


def _remove_from_database(database: Database, kept: Inventory) -> None:
    relations = [sql.Identifier("embeddings", name) for name in (*kept.views, *kept.tables)]
    views = sql.SQL(", ").join(relations[: len(kept.views)])
    tables = sql.SQL(", ").join(relations[len(kept.views) :])
    statements = [sql.SQL("DROP VIEW {}").format(views)] if kept.views else []
    statements += [sql.SQL("DROP TABLE {}").format(tables)] if kept.tables else []
    forget = sql.SQL(load_sql("collection/forget")).format(collection=sql.Literal(kept.name))

    def prepare(connection: psycopg.Connection) -> None:
        for table in kept.tables:
            connection.execute(vacuum_lock(sql.Identifier("embeddings", table)))
        lock_collection(connection, kept.name)
        check_idle(connection, kept.name)

    exclusively(database, relations, prepare, [*statements, forget])
