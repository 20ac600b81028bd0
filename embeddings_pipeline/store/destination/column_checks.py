"""What has to hold of a user's table before a column of it can be adopted, stand beside another, or be swapped."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, profile_command
from embeddings_pipeline.store.sql import load_sql

if TYPE_CHECKING:
    from embeddings_pipeline.store.destination.column import ColumnDestination

LONGEST_NAME = 63  # bytes, of an identifier
OUR_VIEW = "view embeddings."  # as PostgreSQL describes it
VECTOR_TYPES = ("vector", "halfvec")


def look(connection: psycopg.Connection, destination: "ColumnDestination", column: str) -> Mapping[str, Any]:
    """What `look` of sql/column.sql says of the table and one of its columns. ConfigurationError without the table."""
    table = destination.relation.as_string(connection)
    keys = list(destination.key)
    cursor = connection.execute(load_sql("column/look"), {"table": table, "column": column, "keys": keys})
    row = cursor.fetchone()
    if row is None:
        raise ConfigurationError(
            f"collection {destination.collection!r}: `destination.table:` names {destination.place!r}, which is not in "
            f"the pipeline's database; create it, or correct the name in its defs.yaml"
        )
    return dict(zip((field.name for field in cursor.description or ()), row, strict=True))


def check_adoption(connection: psycopg.Connection, destination: "ColumnDestination") -> None:
    """ConfigurationError if the declared column cannot hold this model's vectors."""
    table, column = destination.place, destination.declared.column
    seen, name = look(connection, destination, column), f"{table}.{column}"
    if not seen["is_table"]:
        problem = f"{table} is not a plain table; name the table that holds the column"
    elif seen["type"] is None:
        problem = f"{table} has no column {column!r}; correct it in its defs.yaml"
    elif seen["type"] not in VECTOR_TYPES or seen["generated"]:
        problem = f"{name} is of type {seen['type']}; it has to be a plain vector(n) or halfvec(n)"
    elif seen["dimension"] < 0:
        problem = f"{name} has no dimension: ALTER TABLE … ALTER COLUMN … TYPE {seen['type']}({destination.dimension})"
    elif (seen["type"], seen["dimension"]) != (destination.storage, destination.dimension):
        problem = (
            f"{name} is a {seen['type']}({seen['dimension']}), and the profile makes {destination.storage}"
            f"({destination.dimension}); `destination.profile:` names the profile that made the vectors that are there"
        )
    elif seen["not_null"]:
        problem = f"{name} is NOT NULL, and a row waits there for its vector: ALTER TABLE … DROP NOT NULL"
    elif not seen["key_is_unique"]:
        problem = f"{table} has no unique index on ({', '.join(destination.key)}), by which rows are found"
    elif not seen["may_write"]:
        problem = f"the role may not read and update {table}: GRANT SELECT, UPDATE ON it"
    elif seen["hides_rows"]:
        problem = (
            f"row-level security may hide rows of {table} from the role, which then get no vector: an administrator "
            "runs ALTER ROLE … BYPASSRLS"
        )
    elif others := [other for other in dependants(connection, destination, column, [destination]) if OUR_VIEW in other]:
        problem = f"{name} is the destination of another collection already ({others[0]})"
    else:
        return
    raise ConfigurationError(f"collection {destination.collection!r}: `destination:` {problem}")


def dependants(
    connection: psycopg.Connection, destination: "ColumnDestination", column: str, ours: Sequence["ColumnDestination"]
) -> list[str]:
    """What would go on following a column through its renaming, as PostgreSQL describes it; the views of `ours` may."""
    views = [view.as_string(connection) for each in ours for view in (each.identifier, each.written)]
    names = {"table": destination.relation.as_string(connection), "column": column, "ours": views}
    return [row[0] for row in connection.execute(load_sql("column/dependants"), names)]


def check_dependants(
    connection: psycopg.Connection, destination: "ColumnDestination", column: str, ours: Sequence["ColumnDestination"]
) -> None:
    """ModelChangeError if something would go on following a column that is renamed or dropped."""
    if others := dependants(connection, destination, column, ours):
        raise ModelChangeError(
            f"collection {destination.collection!r}: {'; '.join(others)}: would go on following {column!r} when it is "
            f"renamed; drop that first, and make it again afterwards"
        )


def check_candidate(
    connection: psycopg.Connection, current: "ColumnDestination", candidate: "ColumnDestination", *, is_kept: bool
) -> None:
    """ModelChangeError if the candidate's column cannot stand beside the current one's. is_kept: it does already."""
    column = current.column(connection)
    if not look(connection, current, column)["is_owner"]:
        raise ModelChangeError(
            f"collection {candidate.collection!r}: only the owner of {candidate.place} can add and rename its columns, "
            f"and the pipeline's role is not: ALTER TABLE … OWNER TO it, or GRANT it the owner's role"
        )
    check_dependants(connection, current, column, [current, candidate] if is_kept else [current])
    _check_names(connection, current, candidate, column)
    for name in (candidate.previous_column,) if is_kept else (candidate.candidate_column, candidate.previous_column):
        _check_free(connection, candidate, name)
    if is_kept:
        return
    row = connection.execute("SELECT to_regclass(%s)", [candidate.identifier.as_string(connection)]).fetchone()
    if row and row[0] is not None:
        raise ModelChangeError(
            f"there is a view {row[0]} that the pipeline has not made: rename or drop it, then try again"
        )


def _check_names(
    connection: psycopg.Connection, current: "ColumnDestination", candidate: "ColumnDestination", column: str
) -> None:
    """The names that the column and its indexes get in a swap are short enough, and not taken."""
    names = [index.name for index in current.indexes(connection, column)]
    endings = (candidate.suffix(candidate.candidate_column), candidate.suffix(candidate.previous_column))
    for name in (column, *names):
        if max(len((name + ending).encode()) for ending in endings) > LONGEST_NAME:
            raise ModelChangeError(
                f"collection {candidate.collection!r}: the name {name!r} is too long to be told apart from the next "
                f"one: shorten it"
            )
        previous = name + candidate.suffix(candidate.previous_column)
        if name in names and current.is_relation(connection, previous):
            raise ModelChangeError(
                f"collection {candidate.collection!r}: there is a relation {previous!r} already, and {name!r} is to be "
                f"called so"
            )


def _check_free(connection: psycopg.Connection, candidate: "ColumnDestination", name: str) -> None:
    """The table has no column of that name, or an empty one of the very type that the candidate needs."""
    there = look(connection, candidate, name)
    if there["type"] is None:
        return
    if name == candidate.candidate_column and (there["type"], there["dimension"]) == (
        candidate.storage,
        candidate.dimension,
    ):
        filled = sql.SQL("SELECT FROM {} WHERE {} IS NOT NULL LIMIT 1").format(candidate.relation, sql.Identifier(name))
        if not dependants(connection, candidate, name, []) and connection.execute(filled).fetchone() is None:
            return  # of a try by hand, perhaps; it is what we need
    raise ModelChangeError(
        f"collection {candidate.collection!r}: {candidate.place} has a column {name!r} already: if another model has "
        f"it, end that first (`{profile_command('status', candidate.collection)}`); else rename it, or drop it"
    )
