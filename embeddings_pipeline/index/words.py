"""The words of a collection's texts in PostgreSQL, as `words:` asks for them: a table of tsvectors with a GIN index.

Triggers on the table of texts fill it, so that it is of the same commits as the texts, whoever commits. It is added and
removed without embedding anything.
"""

import time
from dataclasses import dataclass

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.errors import ModelChangeError, VectorIndexError
from embeddings_pipeline.index.pgvector_build import wait_for_turn
from embeddings_pipeline.store.database import Database, one_line
from embeddings_pipeline.store.destination.base import CollectionTables
from embeddings_pipeline.store.locks import exclusively, vacuum_lock
from embeddings_pipeline.store.sql import load_sql

DEADLINE_SECONDS = 3600.0
TEXTS_AT_A_TIME = 2_000  # about a second, for which a commit that deletes one of them waits


@dataclass(frozen=True)
class WordsState:
    """What is there: the configuration of text search that made the words, and whether every text has them."""

    configuration: str
    complete: bool


def configuration_of(words: WordsDefinition) -> str:
    """The configuration of text search, as SQL names it."""
    return f"embeddings.{words.stem}" if words.stem else "pg_catalog.simple"


def words_state(connection: psycopg.Connection, collection: str) -> WordsState | None:
    """What there is of a collection's words; None if there is nothing."""
    row = connection.execute(load_sql("words/state"), {"collection": collection}, prepare=True).fetchone()
    return WordsState(row[0] or "", row[1]) if row else None


def words_fit(connection: psycopg.Connection, definition: CollectionDefinition) -> bool:
    """Whether what is there is what the definition says."""
    words = definition.attributes.words
    return words_state(connection, definition.name) == (WordsState(configuration_of(words), True) if words else None)


def ensure_words(database: Database, definition: CollectionDefinition) -> bool:
    """Make the words in PostgreSQL what the definition says; whether there was anything to do.

    Commits go on meanwhile. What was begun and ended is gone on with. VectorIndexError if it fails.
    """
    words, name, tables = definition.attributes.words, definition.name, CollectionTables(definition.name)
    try:
        with database.connect(autocommit=True) as connection:
            if words_fit(connection, definition):
                return False
            deadline = time.monotonic() + DEADLINE_SECONDS
            wait_for_turn(connection, f"words {name}", deadline)
            limit = {"milliseconds": round(1000 * DEADLINE_SECONDS), "memory": 0}
            connection.execute(load_sql("pgvector/session"), limit)
            state = words_state(connection, name)
            if state is not None and (words is None or state.configuration != configuration_of(words)):
                _exclusively(database, tables, tables.statement("words/drop"))
                state = None
            if words is not None:
                if state is None:
                    _ensure_configuration(connection, words)
                    described = sql.Literal(configuration_of(words))
                    table = sql.Literal(f"embeddings.{name}_text")
                    _exclusively(database, tables, tables.statement("words/create", described=described, table=table))
                _fill(connection, tables, configuration_of(words), deadline)
                _ensure_index(connection, tables)
    except (psycopg.Error, ModelChangeError) as error:
        why = one_line(error) if isinstance(error, psycopg.Error) else str(error)
        raise VectorIndexError(
            f"collection {name!r}: the words of its texts in PostgreSQL: {why}; correct that and run "
            "`embeddings-pipeline sync` again"
        ) from error
    return True


def _exclusively(database: Database, tables: CollectionTables, statement: sql.Composed) -> None:
    """Statements that make or drop triggers, which exclude who writes texts."""
    exclusively(database, [tables.text], lambda session: session.execute(vacuum_lock(tables.text)), [statement])


def _ensure_configuration(connection: psycopg.Connection, words: WordsDefinition) -> None:
    language = words.stem
    if language is None:
        return
    wait_for_turn(connection, f"text search {language}", time.monotonic() + DEADLINE_SECONDS)
    if connection.execute(load_sql("words/has_configuration"), {"name": language}).fetchone() == (True,):
        return
    if connection.execute(load_sql("words/has_stemmer"), {"language": language}).fetchone() != (True,):
        raise VectorIndexError(
            f"this PostgreSQL has no stemmer for {language!r}: write `words: {{language: {language}, stemmer: "
            "false}`, or use a newer server"
        )
    own = sql.Identifier("embeddings", language)
    statement = sql.SQL(load_sql("words/configuration"))
    with connection.transaction():
        connection.execute(statement.format(dictionary=own, configuration=own, language=sql.Literal(language)))


def _fill(connection: psycopg.Connection, tables: CollectionTables, configuration: str, deadline: float) -> None:
    """Give each text its words that has none."""
    statement = tables.statement("words/fill")
    while connection.execute(tables.statement("words/lacks")).fetchone() == (True,):
        after = 0
        while True:
            parameters = {"configuration": configuration, "after": after, "texts": TEXTS_AT_A_TIME}
            [(filled, last)] = connection.execute(statement, parameters).fetchall()
            if not filled:
                break
            after = last
        if time.monotonic() > deadline:
            raise psycopg.errors.QueryCanceled("commits hold texts all the time")
        time.sleep(0.05)


def _ensure_index(connection: psycopg.Connection, tables: CollectionTables) -> None:
    state = words_state(connection, tables.collection)
    if state is not None and state.complete:
        return
    index = f"{tables.collection}_text_words_index"
    connection.execute(
        sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier("embeddings", index))
    )  # one whose build was ended
    connection.execute(tables.statement("words/create_index", index=sql.Identifier(index)))
    connection.execute(sql.SQL("ANALYZE {}").format(tables.words))
