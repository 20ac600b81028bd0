"""The indexes that filters use: one for each column of `filters:`, on the expression that searches ask.

They are on the table of items, beside the payload that commits write: nothing is embedded or copied for them. Built
concurrently, like ANN indexes; without one a search is slower, and finds the same.
"""

import time
from hashlib import blake2b

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.filters import FilterDefinition
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index.pgvector_build import wait_for_turn
from embeddings_pipeline.store.database import Database, one_line
from embeddings_pipeline.store.destination.base import CollectionTables
from embeddings_pipeline.store.sql import load_sql

DEADLINE_SECONDS = 3600.0
# Of a text's index equality alone is asked, and no text is too long for it.
METHODS = {"number": "btree", "timestamp": "btree", "boolean": "btree", "text": "hash", "texts": "gin"}


def expression_of(
    kind: FilterDefinition, payload: sql.Composable, column: sql.Composable, separator: sql.Composable
) -> sql.Composed:
    """What a filter compares: the column's value, of its type. payload: the payload's column; the others: texts."""
    function = sql.Identifier("embeddings", f"filter_{kind.type}")
    others = sql.SQL(", {}").format(separator) if kind.type == "texts" else sql.SQL("")
    return sql.SQL("{}({} -> {}{})").format(function, payload, column, others)


def index_names(definition: CollectionDefinition) -> dict[str, str]:
    """Column → name of its index, which says column, type and separator."""
    names = {}
    for column, kind in definition.attributes.filters.items():
        digest = blake2b(f"{column}\0{kind.type}\0{kind.separator}".encode(), digest_size=6).hexdigest()
        names[column] = f"{definition.name}_filter_{digest}"
    return names


def filters_fit(connection: psycopg.Connection, definition: CollectionDefinition) -> bool:
    """Whether each declared filter has its index, and no other is there."""
    there = _there(connection, definition)
    return set(there) == set(index_names(definition).values()) and all(there.values())


def ensure_filters(database: Database, definition: CollectionDefinition) -> list[str]:
    """Make the indexes of filters what the definition says, and have the planner know their values; the columns whose
    index was built. VectorIndexError if that fails; what is there stays.
    """
    tables, names = CollectionTables(definition.name), index_names(definition)
    built = []
    try:
        with database.connect(autocommit=True) as connection:
            if filters_fit(connection, definition):
                return []
            wait_for_turn(connection, f"filters {definition.name}", time.monotonic() + DEADLINE_SECONDS)
            limit = {"milliseconds": round(1000 * DEADLINE_SECONDS), "memory": 0}
            connection.execute(load_sql("pgvector/session"), limit)
            there = _there(connection, definition)
            for name, valid in there.items():
                if not valid or name not in names.values():
                    drop = sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}")
                    connection.execute(drop.format(sql.Identifier("embeddings", name)))
            for column, kind in definition.attributes.filters.items():
                if not there.get(names[column]):
                    connection.execute(_create(tables, names[column], column, kind))
                    built.append(column)
            if built:
                connection.execute(sql.SQL("ANALYZE {}").format(tables.item))
    except psycopg.Error as error:
        raise VectorIndexError(
            f"collection {definition.name!r}: the indexes of its filters: {one_line(error)}; correct that and run "
            "`embeddings-pipeline sync` again"
        ) from error
    return built


def _there(connection: psycopg.Connection, definition: CollectionDefinition) -> dict[str, bool]:
    """The names of the indexes of filters, and whether each is valid."""
    return dict(connection.execute(load_sql("pgvector/filters"), {"collection": definition.name}).fetchall())


def _create(tables: CollectionTables, name: str, column: str, kind: FilterDefinition) -> sql.Composed:
    expression = expression_of(kind, sql.Identifier("payload"), sql.Literal(column), sql.Literal(kind.separator))
    return sql.SQL("CREATE INDEX CONCURRENTLY {name} ON {item} USING {method} ({expression})").format(
        name=sql.Identifier(name), item=tables.item, method=sql.SQL(METHODS[kind.type]), expression=expression
    )
