"""The ANN indexes of a model's vectors in PostgreSQL: one for each vector name, built concurrently.

report = ensure_index(database, destination, collection.config.index, ["base", "title"])

Neither building nor replacing one locks the table against readers or writers, and an old index serves until the new
one is valid. A killed build leaves an invalid index, which the next call removes. Queries use an index if they name
the vector as a constant: `WHERE vector_name = 'base' ORDER BY embedding <=> … LIMIT 10`.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import psycopg
from psycopg import errors, sql

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index.pgvector_build import IndexBuilder, wait_for_turn
from embeddings_pipeline.store.database import Database, one_line
from embeddings_pipeline.store.destination.base import MOST_DIMENSIONS, Destination
from embeddings_pipeline.store.destination.indexes import AnnIndex, IndexChange
from embeddings_pipeline.store.sql import load_sql

DEADLINE_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class BuiltIndex:
    """An index after `ensure_index`, and what that did for it."""

    vector_name: str
    name: str
    method: str
    parameters: dict[str, int]
    rows: int
    bytes: int
    build_seconds: float  # 0 if there was nothing to do
    reason: str  # why it was built; empty if it was not


@dataclass(frozen=True)
class IndexReport:
    """Every vector name's index (none under method `none`), and the names of the indexes that were removed."""

    indexes: tuple[BuiltIndex, ...]
    dropped: tuple[str, ...]

    @property
    def build_seconds(self) -> float:
        return sum(index.build_seconds for index in self.indexes)

    @property
    def bytes(self) -> int:
        return sum(index.bytes for index in self.indexes)


def describe_indexes(connection: psycopg.Connection, destination: Destination) -> list[AnnIndex]:
    """The ANN indexes on a model's vectors, by name, those that are invalid or being built included."""
    destination.check_exists(connection)
    return list(destination.layout(connection).indexes)


def indexes_fit(
    connection: psycopg.Connection, destination: Destination, config: IndexDefinition, vector_names: Iterable[str]
) -> bool:
    """Whether each index is there and valid, of the method and with the parameters that `config` says. How many rows
    there are is not asked.
    """
    destination.check_exists(connection)
    layout = destination.layout(connection)
    valid = tuple(index for index in layout.indexes if index.valid and destination.manages(index))
    current = destination.current_layout(connection)
    rows = dict.fromkeys(vector_names, 0)
    return not destination.index_changes(config, rows, replace(layout, indexes=valid), current, sizes_known=False)


def ensure_index(
    database: Database,
    destination: Destination,
    config: IndexDefinition,
    vector_names: Iterable[str],
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> IndexReport:
    """Make the ANN indexes what `config` says: one valid index for each vector name, and none for any other name.

    If all is well nothing is done. An index is replaced if its method, `m` or `ef_construction` changed, and an
    IVFFlat one if its rows have become four times as many, or a fourth. One process at a time works on a table;
    others wait. Indexes of other names than ours are somebody else's and stay.

    On the column of a user's own table it makes one of the declared method if there is none; if none is declared
    (`config` has nothing set), a shadow model's column gets indexes like those on the current one.

    Raises VectorIndexError if pgvector cannot index so many dimensions, the table is missing, or it was not done by
    the deadline; what serves queries stays.
    """
    _check_dimensions(destination, config)
    deadline = time.monotonic() + deadline_seconds
    with _explained(destination, deadline_seconds), database.connect(autocommit=True) as connection:
        # A server that has such a setting stops a build whose client is gone.
        with contextlib.suppress(errors.InvalidParameterValue, errors.UndefinedObject):
            connection.execute("SET client_connection_check_interval = '1s'")
        wait_for_turn(connection, destination.name, deadline)
        destination.check_exists(connection)
        rows = _rows(connection, destination, vector_names)
        changes = planned_changes(connection, destination, config, rows)
        seconds = IndexBuilder(database, connection, destination, deadline).apply(changes)
        return _report(connection, destination, config, changes, rows, seconds)


def build_progress(database: Database, collection: str) -> tuple[int, int] | None:
    """How many vectors are in the index that is being built on a model table, and how many there are; None without."""
    with database.session() as connection:
        row = connection.execute(load_sql("pgvector/progress"), {"collection": collection}).fetchone()
    return (row[0], row[1]) if row else None


def planned_changes(
    connection: psycopg.Connection, destination: Destination, config: IndexDefinition, rows: Mapping[str, int]
) -> list[IndexChange]:
    """What `ensure_index` would do now. rows: of each vector name."""
    return destination.index_changes(
        config, rows, destination.layout(connection), destination.current_layout(connection)
    )


def _check_dimensions(destination: Destination, config: IndexDefinition) -> None:
    most = MOST_DIMENSIONS[destination.storage]
    if destination.wants_index(config) and destination.dimension > most:
        remedy = "`storage: halfvec` (up to 4000) or " if destination.dimension <= MOST_DIMENSIONS["halfvec"] else ""
        raise VectorIndexError(
            f"collection {destination.collection!r}: pgvector's {config.method} takes up to {most} dimensions of a "
            f"{destination.storage}, and the model has {destination.dimension}; set {remedy}`index: {{method: none}}` "
            f"in its defs.yaml"
        )


def _rows(connection: psycopg.Connection, destination: Destination, vector_names: Iterable[str]) -> dict[str, int]:
    query = sql.SQL("SELECT vector_name, count(*) FROM {} GROUP BY 1").format(destination.identifier)
    counted: dict[str, int] = dict(connection.execute(query).fetchall())
    return {name: counted.get(name, 0) for name in vector_names}


def _report(
    connection: psycopg.Connection,
    destination: Destination,
    config: IndexDefinition,
    changes: list[IndexChange],
    rows: Mapping[str, int],
    seconds: Mapping[str, float],
) -> IndexReport:
    reasons = {change.index.name: change.reason for change in changes if change.action != "drop"}
    reported = [index for index in destination.layout(connection).indexes if destination.manages(index)]
    built = [
        BuiltIndex(
            index.vector_name,
            index.name,
            index.method,
            index.parameters,
            rows.get(index.vector_name, 0),
            index.bytes,
            seconds.get(index.name, 0.0),
            reasons.get(index.name, ""),
        )
        for index in reported
    ]
    order = list(rows)
    built.sort(key=lambda index: order.index(index.vector_name) if index.vector_name in rows else len(order))
    return IndexReport(tuple(built), tuple(change.index.name for change in changes if change.action == "drop"))


@contextlib.contextmanager
def _explained(destination: Destination, deadline_seconds: float) -> Iterator[None]:
    where = f"ANN index on embeddings.{destination.name}"
    try:
        yield
    except errors.UndefinedTable as error:
        raise VectorIndexError(f"{where}: there is no such table; run `embeddings-pipeline sync`") from error
    except errors.QueryCanceled as error:
        raise VectorIndexError(
            f"{where}: not done within {deadline_seconds:.0f} s ({one_line(error)}); an older transaction may hold it "
            "up: see pg_stat_activity, end it, and run `embeddings-pipeline sync` again"
        ) from error
    except psycopg.Error as error:
        raise VectorIndexError(
            f"{where}: {one_line(error)}; correct that and run `embeddings-pipeline sync` again"
        ) from error
