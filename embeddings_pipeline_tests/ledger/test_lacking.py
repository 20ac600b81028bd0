"""What a model lacks, as its view says; and how long a batch that failed, and a poison text, wait."""

from datetime import timedelta
from typing import Any

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once


def lacking(database: Database, fingerprint: str) -> list[tuple[Any, ...]]:
    view = f"SELECT item_key, stale, excused FROM embeddings.films_lacking_{fingerprint} ORDER BY item_key"
    return execute(database, view)


def test_a_model_lacks_texts_without_a_vector_or_with_another_texts_and_no_blank_ones(
    database: Database, settings: Settings
) -> None:
    make_films(database, [*films(3), (4, "Blank", None, 1)])
    collection, _ = sync_once(definition(vectors={"base": "{overview}"}), settings)
    model = collection.model.destination.identifier.as_string(None)
    assert lacking(database, collection.fingerprint) == []
    text = "SELECT id FROM embeddings.films_text WHERE item_key"
    execute(database, f"DELETE FROM {model} WHERE text_id = ({text} = '1')")
    execute(database, f"UPDATE {model} SET content_hash = '' WHERE text_id = ({text} = '2')")
    assert lacking(database, collection.fingerprint) == [("1", False, False), ("2", True, False)]
    [(digest,)] = execute(database, "SELECT content_hash FROM embeddings.films_text WHERE item_key = '1'")
    collection.ledger.quarantine(collection.fingerprint, {digest: ("a text", "too odd")}, step="encode")
    assert lacking(database, collection.fingerprint) == [("1", False, True), ("2", True, False)]
    assert collection.ledger.repair() == 1 and collection.ledger.dirty_items() == {0: 1}


def test_the_view_goes_with_its_model_and_comes_back_with_it(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    collection, _ = sync_once(definition(), settings)
    execute(database, f"DROP VIEW embeddings.films_lacking_{collection.fingerprint}")
    open_collection(definition(), settings)
    assert lacking(database, collection.fingerprint) == []
    with database.connect() as connection:
        connection.execute("DROP VIEW embeddings.films")
        collection.model.destination.release(connection)
    left = "SELECT relname FROM pg_class WHERE relname LIKE %s"
    assert execute(database, left, [f"films_%{collection.fingerprint}"]) == [
        (f"films_current_{collection.fingerprint}",)
    ]


def minutes(waits: list[timedelta]) -> list[int]:
    return [round(wait.total_seconds() / 60) for wait in waits]


def test_a_batch_that_failed_waits_twice_as_long_each_time(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    collection = open_collection(definition(), settings)
    collection.ledger.full_scan(collection.source)
    waits = []
    for _ in range(8):
        collection.ledger.note_attempts([0])
        collection.ledger.note_attempts([0])  # while it waits, that is the same attempt
        waits += [row[0] for row in execute(database, "SELECT next_try - now() FROM embeddings.batch")]
        execute(database, "UPDATE embeddings.batch SET next_try = now()")
    assert minutes(waits) == [1, 2, 4, 8, 16, 32, 64, 64]


def test_a_poison_text_waits_four_times_as_long_each_time(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    collection = open_collection(definition(), settings)
    waits = []
    for _ in range(6):
        collection.ledger.quarantine(collection.fingerprint, {b"digest": ("a text", "too odd")}, step="encode")
        waits += [row[0] for row in execute(database, "SELECT next_try - now() FROM embeddings.quarantine")]
    assert minutes(waits) == [10, 40, 160, 640, 1440, 1440]
