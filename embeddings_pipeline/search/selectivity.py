"""How much a filter lets through, as PostgreSQL's planner estimates it, and what way of searching that speaks for."""

from dataclasses import dataclass

import psycopg
from psycopg import sql

from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.condition import Condition
from embeddings_pipeline.store.destination.base import CollectionTables

# Microseconds, by benchmarks/bench_search.py: for each text that matches and is looked up, and for each text that an
# index gives and is asked whether its item matches. A filter that this process has not asked before (see matching.py)
# takes three times as long.
LOOKED_UP, ASKED = 3.5, 20.0


@dataclass(frozen=True)
class Filter:
    """A condition, the items that are expected to meet it, and their share of all."""

    condition: Condition
    items: int
    share: float

    def prefers_lookup(
        self,
        texts: int,
        texts_per_item: int,
        *,
        asked: float = ASKED,
        cheaper: float = 1.0,
        beforehand: float = 0.0,
    ) -> bool:
        """Whether to compare all that matches, rather than to ask an index until so many of its texts match. asked:
        what each of these costs; cheaper: by what factor those that match are compared faster than PostgreSQL does it;
        beforehand: what the index costs before it gives any.
        """
        return LOOKED_UP / cheaper * self.items * texts_per_item <= beforehand + asked * texts / self.share


def filter_of(connection: psycopg.Connection, tables: CollectionTables, condition: Condition) -> Filter:
    """The condition with what is expected of it; nothing is read but statistics."""
    matching = _expected_rows(connection, tables, condition)
    everything = _expected_rows(connection, tables, Condition(sql.SQL("true")))
    return Filter(condition, matching, min(1.0, max(matching, 1) / max(everything, 1)))


def _expected_rows(connection: psycopg.Connection, tables: CollectionTables, condition: Condition) -> int:
    statement = tables.statement("search/matching", condition=condition.statement)
    explained = sql.SQL("EXPLAIN (FORMAT JSON) {}").format(statement)
    try:
        [([described],)] = connection.execute(explained, condition.parameters).fetchall()
    except psycopg.errors.UndefinedFunction as error:
        raise DatabaseError(
            f"collection {tables.collection!r}: the database has no filters yet: `embeddings-pipeline sync` brings its "
            "schema up to date"
        ) from error
    return int(described["Plan"]["Plan Rows"])
