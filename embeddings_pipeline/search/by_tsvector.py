"""The items with any word of a query, by PostgreSQL's text search."""

import time
from collections.abc import Sequence

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.index.searching import texts_per_item
from embeddings_pipeline.index.words import configuration_of
from embeddings_pipeline.search.hits import Hit, Leg, exact_cursor
from embeddings_pipeline.search.nearest import GROWTH, leg_of
from embeddings_pipeline.search.selectivity import Filter
from embeddings_pipeline.store.condition import Condition, parts_of
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.store.sql import load_sql

EVERY = Condition(sql.SQL("true"))


def tsquery_of(connection: psycopg.Connection, definition: CollectionDefinition, words: Sequence[str]) -> str:
    """Any of these words, as PostgreSQL's text search asks for it; empty if it takes none of them for a word."""
    declared = definition.attributes.words or WordsDefinition()
    parameters = {"configuration": configuration_of(declared), "words": " ".join(words)}
    lexemes = [row[0] for row in connection.execute(load_sql("search/lexemes"), parameters)]
    return " | ".join("'" + lexeme.replace("\\", "\\\\").replace("'", "''") + "'" for lexeme in lexemes)


def tsvector_leg(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    model: Model,
    names: Sequence[str],
    words: Sequence[str],
    k: int,
    *,
    filtered: Filter | None = None,
    fell_back: Sequence[str] = (),
) -> tuple[list[Hit], Leg]:
    """The `k` best items that have any of the words (`query_words`), each with its best text; fewer only if no more
    match. `names`: of the vectors whose texts are looked at. `filtered`: of items that meet its condition.
    `fell_back`: what was tried before, and why that did not do.
    """
    began, table, texts = time.perf_counter(), model.destination, k * texts_per_item(definition) + 10
    condition = filtered.condition if filtered else None
    ranked = table.statement("search/by_words", **parts_of(condition, table.tables))
    parameters: dict[str, object] = {"words": tsquery_of(connection, definition, words), "names": list(names)}
    parameters |= condition.parameters if condition else {}
    while True:
        hits, given = ranked_hits(connection, model, ranked, {**parameters, "texts": texts}, k)
        if len(hits) >= k or given < texts:
            break
        texts *= GROWTH
    how = f"ts_rank of {len(words)} words"
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
