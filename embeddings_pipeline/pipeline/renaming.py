"""Giving a collection another name: first, in one transaction, in the database, which notes it; then its files.

Until the renaming has ended, neither name can be synced; a renaming that was killed is repeated to its end.
"""

import contextlib
from collections.abc import Iterator

import psycopg
import pyarrow.fs as pafs
from psycopg import errors, sql

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.index.pgvector import describe_indexes
from embeddings_pipeline.pipeline.inventory import Inventory, faiss_folder
from embeddings_pipeline.pipeline.removal import check_idle
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.indexes import index_name
from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline.store.lake import Lake, open_lake
from embeddings_pipeline.store.locks import exclusively, lock_collection, vacuum_lock
from embeddings_pipeline.store.sql import load_sql

KINDS = {"r": "TABLE", "v": "VIEW", "i": "INDEX", "S": "SEQUENCE"}


def check_not_being_renamed(connection: psycopg.Connection, name: str) -> None:
    """RefusedError if the collection is in a renaming that has not ended."""
    row = connection.execute(load_sql("collection/being_renamed"), {"collection": name}).fetchone()
    if row:
        old, new = row
        raise RefusedError(
            f"collection {old!r} is being renamed to {new!r}: finish it with `embeddings-pipeline collection rename "
            f"{old} {new}`"
        )


def rename_in_database(database: Database, kept: Inventory, new: str) -> None:
    """Rename tables, views, markers, indexes and rows, and note that the renaming has begun.

    RefusedError while the collection is being written, or its model is being changed.
    """
    old = kept.name
    relations = [sql.Identifier("embeddings", name) for name in (*kept.tables, *kept.views)]
    with database.connect(autocommit=True) as connection:
        check_idle(connection, old)
        names = {name: new + name.removeprefix(old) for name in (*kept.tables, *kept.views)}
        kinds = {name: "r" if name in kept.tables else "v" for name in names}
        parts = connection.execute(load_sql("collection/parts"), {"tables": list(kept.tables)}).fetchall()
        for name, kind in parts:
            kinds[name] = kind
            names[name] = new + name.removeprefix(old) if name.startswith(f"{old}_") else name
        names |= dict(_ann_indexes(connection, kept, new))
        views = list(_lacking_views(connection, kept, new))
    statements = [
        sql.SQL("ALTER {} {} RENAME TO {}").format(
            sql.SQL(KINDS[kinds[name]]), sql.Identifier("embeddings", name), sql.Identifier(renamed)
        )
        for name, renamed in names.items()
        if name != renamed
    ]
    row = sql.SQL(load_sql("collection/rename")).format(old=sql.Literal(old), new=sql.Literal(new))

    def prepare(connection: psycopg.Connection) -> None:
        for table in kept.tables:
            connection.execute(vacuum_lock(sql.Identifier("embeddings", table)))
        for name in sorted((old, new)):
            lock_collection(connection, name)
        check_idle(connection, old)

    try:
        exclusively(database, relations, prepare, [*statements, row, *views])
    except (errors.UndefinedTable, errors.DuplicateTable, errors.UniqueViolation) as error:
        raise RefusedError(
            f"collection {old!r}: somebody else has renamed or removed it meanwhile, or called another {new!r}; see "
            f"`embeddings-pipeline collection list`"
        ) from error


def _ann_indexes(connection: psycopg.Connection, kept: Inventory, new: str) -> Iterator[tuple[str, str]]:
    """The ANN indexes of the collection's own tables, whose names have a digest of the table's in them."""
    for fingerprint, dimension, storage in connection.execute(
        load_sql("collection/models"), {"collection": kept.name}
    ).fetchall():
        table = TableDestination(kept.name, fingerprint, dimension, storage)
        if table.name not in kept.tables:
            continue  # a column of the user's table, whose indexes stay as they are
        renamed = TableDestination(new, fingerprint, dimension, storage)
        for index in describe_indexes(connection, table):
            if index.name == index_name(table, index.vector_name):
                yield index.name, index_name(renamed, index.vector_name)


def _lacking_views(connection: psycopg.Connection, kept: Inventory, new: str) -> Iterator[sql.Composed]:
    """What makes the views anew that ask the quarantine for the collection's name."""
    for fingerprint, dimension, storage in connection.execute(
        load_sql("collection/models"), {"collection": kept.name}
    ).fetchall():
        renamed = TableDestination(new, fingerprint, dimension, storage)
        kind = "written" if f"{kept.name}_written_{fingerprint}" in kept.views else "vector"
        written = sql.Identifier("embeddings", f"{new}_{kind}_{fingerprint}")
        yield renamed.lacking_change(written=written).statement


def rename_files(settings: Settings, old: str, new: str) -> None:
    """Move the folder in the lake and the FAISS generations. What was moved already is left."""
    _rename_in_lake(open_lake(settings), old, new)
    failpoint("rename.lake")
    before, after = faiss_folder(settings, old), faiss_folder(settings, new)
    if before.is_dir():
        before.rename(after)
    failpoint("rename.faiss")


def _rename_in_lake(lake: Lake, old: str, new: str) -> None:
    before, after = f"{lake.root}/{old}", f"{lake.root}/{new}"
    infos = lake.filesystem.get_file_info([before, after])
    is_before, is_after = (info.type == pafs.FileType.Directory for info in infos)
    if not is_before:
        return
    if isinstance(lake.filesystem, pafs.LocalFileSystem) and not is_after:
        with contextlib.suppress(PermissionError):  # a folder that nothing may be moved from is copied
            lake.filesystem.move(before, after)
            return
    # An object store has no folders to move: every file is copied, those too that a killed copy has brought over.
    pafs.copy_files(before, after, source_filesystem=lake.filesystem, destination_filesystem=lake.filesystem)
    lake.delete_folder(before)


def end_renaming(database: Database, new: str) -> None:
    """Let the collection be synced again, under its new name."""
    with database.connect(autocommit=True) as connection:
        connection.execute(load_sql("collection/renamed"), {"collection": new})
