"""Writing vectors into a column of the user's table, and the setting under which many of them are written.

A vector that does not fit into its row's page beside what else is there would make each update a row elsewhere, with an
entry in every index. So meanwhile new vectors go out of line, by the table's `toast_tuple_target`: low enough for a
vector, and too high for whatever else is in a row now. What it was is kept in `embeddings.model`, should the process be
killed. It stays as it is if nothing is won.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors, sql

from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.copy_binary import Column, copy_in, copy_statement
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.destination.column_checks import VECTOR_TYPES
from embeddings_pipeline.store.locks import giving_way
from embeddings_pipeline.store.sql import load_sql

if TYPE_CHECKING:
    from embeddings_pipeline.store.destination.column import ColumnDestination

ROW_LOCK_TIMEOUT_MS = 500  # for rows that the user's own programs hold: below deadlock_timeout, so that we give way
ALTER_TIMEOUT_MS = 2000
TOAST_BYTES = 2032  # a longer row has its longest values elsewhere (TOAST_TUPLE_TARGET in PostgreSQL's heaptoast.h)
LEAST_TOAST_BYTES = 128  # that toast_tuple_target may be
ROW_HEADER_BYTES = 32
POINTER_BYTES = 18  # to a value that lies elsewhere
DEFAULT = "default"  # as what `toast_tuple_target` was, if the table had none of its own
STAGED = sql.Identifier("backfill_vector")
OF_THE_SESSION = "none: a table of this session alone"


# --- vectors -----------------------------------------------------------------------------------------------------


def change_vectors(
    connection: psycopg.Connection, destination: "ColumnDestination", name: str, **others: sql.Composable
) -> int:
    """Run `column/write` or `column/delete` in the open transaction; how many vectors. ConfigurationError if the
    table refuses.
    """
    try:
        # Until the transaction ends nobody renames the column, so its name is the one that is written to.
        connection.execute(lock_change(destination).statement)
        column = sql.Identifier(destination.column(connection))
        row = connection.execute(destination.column_statement(name, column=column, **others)).fetchone()
    except (errors.IntegrityError, errors.RaiseException, errors.InsufficientPrivilege) as error:
        remedy = "; GRANT SELECT, UPDATE ON it" if isinstance(error, errors.InsufficientPrivilege) else ""
        # Without the row, which the error's other lines have in them.
        raise ConfigurationError(
            f"collection {destination.collection!r}: a vector cannot be written to {destination.place}: "
            f"{error.diag.message_primary}{remedy}"
        ) from error
    return row[0] if row else 0


def stage_commit(
    connection: psycopg.Connection, destination: "ColumnDestination", vectors: Mapping[str, Column]
) -> None:
    """Put a commit's vectors where `column/committed` finds them."""
    connection.execute(f"SET LOCAL lock_timeout = {ROW_LOCK_TIMEOUT_MS}")
    connection.execute(destination.column_statement("column/stage_commit"))
    staged = {name: vectors[name] for name in ("text_id", "content_hash", "encoded", "embedding")}
    copy_in(connection, sql.Identifier("commit_vector"), staged, storage=destination.storage)


def put(connection: psycopg.Connection, destination: "ColumnDestination", columns: Mapping[str, Column]) -> None:
    """As `Destination.put`."""
    connection.execute(f"SET LOCAL lock_timeout = {ROW_LOCK_TIMEOUT_MS}")
    connection.execute(stage_change(destination, "DROP").statement)
    copy_in(connection, STAGED, columns, storage=destination.storage)
    change_vectors(connection, destination, "column/write", made=destination.column_statement("column/backfilled"))


def put_ahead(
    destination: "ColumnDestination",
    connection: psycopg.Connection,
    columns: Mapping[str, Column],
    kept: Callable[[psycopg.Connection], Any],
) -> None:
    """As `Destination.put_ahead`: in layers, each of about one row of each page."""
    connection.execute(stage_change(destination, "PRESERVE ROWS").statement)
    try:
        copy_in(connection, STAGED, columns, storage=destination.storage)
        for change in layer_changes(destination):
            connection.execute(change.statement)
        [(last,)] = connection.execute("SELECT coalesce(max(layer), -1) FROM backfill_layer").fetchall()
        for layer in range(last + 1):
            giving_way(partial(_put_layer, connection, destination, layer, kept))
    finally:
        if not connection.closed:
            connection.execute(unstage_change().statement)


def _put_layer(
    connection: psycopg.Connection,
    destination: "ColumnDestination",
    layer: int,
    kept: Callable[[psycopg.Connection], Any],
) -> None:
    with connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = {ROW_LOCK_TIMEOUT_MS}")
        connection.execute("SET LOCAL synchronous_commit = off")  # what marks the batch as complete comes after it
        kept(connection)
        change_vectors(connection, destination, "column/write", made=_layer(destination, sql.Literal(layer)))


def put_changes(destination: "ColumnDestination", columns: tuple[str, ...]) -> list[Change]:
    """What `put_ahead` executes, into the column of a candidate."""
    column, made = sql.Identifier(destination.candidate_column), _layer(destination, sql.SQL(":layer"))
    write = destination.column_statement("column/write", column=column, made=made)
    rows = f"ROW EXCLUSIVE of {destination.place}, and its rows, a layer of them at a time"
    return [
        stage_change(destination, "PRESERVE ROWS"),
        Change(copy_statement(STAGED, columns), OF_THE_SESSION),
        *layer_changes(destination),
        lock_change(destination),
        Change(write, rows, grows=True),
        unstage_change(),
    ]


def _layer(destination: "ColumnDestination", layer: sql.Composable) -> sql.Composed:
    return destination.column_statement("column/backfilled_layer", layer=layer)


def stage_change(destination: "ColumnDestination", on_commit: str) -> Change:
    return Change(destination.column_statement("column/stage_backfill", on_commit=sql.SQL(on_commit)), OF_THE_SESSION)


def layer_changes(destination: "ColumnDestination") -> list[Change]:
    names = ("column/layers", "column/layer_index")
    return [Change(destination.column_statement(name), OF_THE_SESSION) for name in names]


def unstage_change() -> Change:
    return Change(sql.SQL(load_sql("column/unstage_backfill")).format(), OF_THE_SESSION)


def lock_change(destination: "ColumnDestination") -> Change:
    return Change(
        destination.column_statement("column/lock"), f"ROW EXCLUSIVE of {destination.place}, as every writer takes"
    )


# --- the setting -------------------------------------------------------------------------------------------------


@contextmanager
def vectors_out_of_line(connection: psycopg.Connection, destination: "ColumnDestination") -> Iterator[None]:
    """Meanwhile new vectors go out of the table's pages, so that an updated row fits into its own."""
    restore(connection, destination)
    before, _ = setting_changes(connection, destination)
    _alter(connection, before)
    try:
        yield
    finally:
        if not connection.closed:
            restore(connection, destination)


def restore(connection: psycopg.Connection, destination: "ColumnDestination") -> None:
    """End what `vectors_out_of_line` began, though it was killed."""
    query = "SELECT toast_tuple_target FROM embeddings.model WHERE collection = %s AND fingerprint = %s"
    row = connection.execute(query, [destination.collection, destination.fingerprint]).fetchone()
    if row and row[0]:
        _alter(connection, _reset_changes(destination, row[0]))


def setting_changes(
    connection: psycopg.Connection, destination: "ColumnDestination"
) -> tuple[list[Change], list[Change]]:
    """What `vectors_out_of_line` changes, and how it changes it back."""
    longest = _row_bytes(connection, destination) + POINTER_BYTES
    if longest >= min(destination.bytes_per_vector, TOAST_BYTES):
        return [], []
    options = "SELECT option FROM pg_class, unnest(reloptions) AS option WHERE oid = to_regclass(%s)"
    settings = dict(row[0].split("=", 1) for row in connection.execute(options, [destination.relation.as_string(None)]))
    was = settings.get("toast_tuple_target", DEFAULT)
    changed = sql.SQL("SET (toast_tuple_target = {})").format(sql.Literal(max(longest, LEAST_TOAST_BYTES)))
    before = _setting(destination, note=sql.Literal(was), change=changed)
    return before, _reset_changes(destination, was)


def _reset_changes(destination: "ColumnDestination", was: str) -> list[Change]:
    change: sql.Composable = sql.SQL("RESET (toast_tuple_target)")
    if was != DEFAULT:
        change = sql.SQL("SET (toast_tuple_target = {})").format(sql.Literal(int(was)))
    return _setting(destination, note=sql.SQL("NULL"), change=change)


def _setting(destination: "ColumnDestination", *, note: sql.Composable, change: sql.Composable) -> list[Change]:
    lock = f"SHARE UPDATE EXCLUSIVE of {destination.place}, which only VACUUM and the like wait for"
    return [
        Change(destination.column_statement("column/note_setting", setting=note), "ROW EXCLUSIVE of embeddings.model"),
        Change(destination.column_statement("column/change_setting", change=change), lock),
    ]


def _alter(connection: psycopg.Connection, changes: list[Change]) -> None:
    """It keeps out VACUUM and the like, but neither readers nor writers. If it is not to be had, it is left."""
    with suppress(errors.LockNotAvailable, errors.InsufficientPrivilege), connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = {ALTER_TIMEOUT_MS}")
        for change in changes:
            connection.execute(change.statement)


def _row_bytes(connection: psycopg.Connection, destination: "ColumnDestination") -> int:
    """The longest row as it lies in its page with the candidate's column, in bytes, two for alignment a column; a
    vector too long for it lies elsewhere.
    """
    listed = """SELECT attname, typname FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
                WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped"""
    types: dict[str, str] = dict(connection.execute(listed, [destination.relation.as_string(connection)]).fetchall())
    sizes = []
    for name, kind in types.items():
        size = sql.SQL("coalesce(pg_column_size(destination.{}), 0)").format(sql.Identifier(name))
        if kind in VECTOR_TYPES:
            elsewhere = "CASE WHEN {size} > {most} THEN {pointer} ELSE {size} END"
            most, pointer = sql.Literal(TOAST_BYTES - 100), sql.Literal(POINTER_BYTES)
            size = sql.SQL(elsewhere).format(size=size, most=most, pointer=pointer)
        sizes.append(size)
    query = sql.SQL("SELECT max({}) FROM {} AS destination").format(sql.SQL(" + ").join(sizes), destination.relation)
    row = connection.execute(query).fetchone()
    columns = len({*types, destination.candidate_column})
    return ROW_HEADER_BYTES + 2 * columns + (row[0] if row and row[0] else 0)
