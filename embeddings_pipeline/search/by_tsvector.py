"""The items with any word of a query, by PostgreSQL's text search."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.index.words import configuration_of
from embeddings_pipeline.search.hits import Hit, Leg, exact_cursor
from embeddings_pipeline.search.nearest import GROWTH, leg_of, texts_per_item
from embeddings_pipeline.search.selectivity import Filter
from embeddings_pipeline.store.condition import Condition, parts_of
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.store.sql import load_sql

EVERY = Condition(sql.SQL("true"))


@dataclass(frozen=True)
class WordsQuery:
    """What a query asks of words: as they are typed, and as PostgreSQL's text search has them ("": it has none)."""

    words: tuple[str, ...]
    tsquery: str


def words_query(connection: psycopg.Connection, definition: WordsDefinition, words: Sequence[str]) -> WordsQuery:
    """Any of these words."""
    parameters = {"configuration": configuration_of(definition), "words": " ".join(words)}
    lexemes = [row[0] for row in connection.execute(load_sql("search/lexemes"), parameters)]
    quoted = ("'" + lexeme.replace("\\", "\\\\").replace("'", "''") + "'" for lexeme in lexemes)
    return WordsQuery(tuple(words), " | ".join(quoted))


def tsvector_leg(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    model: Model,
    names: Sequence[str],
    query: WordsQuery,
    k: int,
    *,
    filtered: Filter | None = None,
    fell_back: Sequence[str] = (),
) -> tuple[list[Hit], Leg]:
    """The `k` best items, each with its best text; fewer only if no more match. `names`: of the vectors whose texts
    are looked at. `filtered`: of items that meet its condition. `fell_back`: what was tried before, and why not.
    """
    began, table, texts = time.perf_counter(), model.destination, k * texts_per_item(definition) + 10
    condition = filtered.condition if filtered else None
    ranked = table.statement("search/by_words", **parts_of(condition, table.tables))
    parameters: dict[str, object] = {"words": query.tsquery, "names": list(names)}
    parameters |= condition.parameters if condition else {}
    while True:
        hits, given = ranked_hits(connection, model, ranked, {**parameters, "texts": texts}, k)
        if len(hits) >= k or given < texts:
            break
        texts *= GROWTH
    how = f"ts_rank of {len(query.words)} words"
    return hits, leg_of(hits, ", ".join(names), "tsvector", how, given, began, list(fell_back))


def ranked_hits(
    connection: psycopg.Connection,
    model: Model,
    ranked: sql.Composed,
    parameters: dict[str, object],
    k: int,
    condition: Condition = EVERY,
) -> tuple[list[Hit], int]:
    """The best `k` items of the texts that a statement gives, and how many texts it gives. condition: of the items."""
    statement = model.destination.statement("search/ranked_hits", ranked=ranked, condition=condition.statement)
    with exact_cursor(connection) as cursor:
        cursor.execute(statement, {**parameters, **condition.parameters, "k": k})
        rows = cursor.fetchall()
    return [Hit(*row[1:]) for row in rows if row[1] is not None], rows[0][0]
