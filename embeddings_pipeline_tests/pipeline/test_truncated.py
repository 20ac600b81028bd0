"""Texts that are longer than the model reads are noted when they are embedded, and counted while they are there."""

from typing import Any

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.health.truncation import in_words, truncation
from embeddings_pipeline.ledger.truncated import Truncation
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.sql import schema_versions
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    definition,
    edit,
    execute,
    films,
    make_films,
    prepare_batch,
    run_batch,
    sync_once,
)

SHORT = {**PROFILE, "max_length": 12}  # tokens are words; a film has "Film N | A story about number N and its friends"


@pytest.fixture
def long_films(database: Database) -> Database:
    """Ten films, of which 3 and 7 are longer than twelve words, 7 the longest with 33."""
    make_films(database, films(10))
    edit(database, 3, "word " * 20)
    edit(database, 7, "word " * 30)
    return database


def counted(collection: Collection) -> tuple[int, int, int]:
    found = collection.ledger.truncation(collection.fingerprint)
    assert found.known
    return found.texts, found.truncated, found.longest


def short_films(**attributes: Any) -> Any:
    return definition(profile=SHORT, **attributes)


def test_they_are_counted_with_the_longest_in_status_and_the_check(long_films: Database, settings: Settings) -> None:
    collection, _ = sync_once(short_films(), settings)
    assert counted(collection) == (10, 2, 33)
    said = in_words(truncation(collection))
    assert said.startswith("2 of 10 texts (20.00 %) longer than the model reads, the longest 33 tokens")
    status = collection_status(short_films(), long_films, settings)
    assert (status["truncated"], status["longest_tokens"]) == (2, 33)


def test_none_is_too_long_for_a_model_that_reads_all(long_films: Database, settings: Settings) -> None:
    collection, _ = sync_once(definition(), settings)
    assert counted(collection) == (10, 0, 0)
    assert in_words(truncation(collection)) == "none of 10 texts is longer than the model reads"


def test_a_text_that_a_killed_run_embedded_counts_once_another_run_commits_it(
    long_films: Database, settings: Settings
) -> None:
    collection, _ = sync_once(short_films(), settings, limit=1)
    execute(long_films, "DELETE FROM embeddings.truncated")
    prepare_batch(collection, 0, "killed")
    assert counted(collection)[1] <= 1  # what is not committed is no text yet
    assert run_batch(collection, 0, "resumed").embedded == 0
    assert counted(collection) == (10, 2, 33)


def test_a_text_that_is_shortened_or_deleted_counts_no_longer_and_is_forgotten_in_the_end(
    long_films: Database, settings: Settings
) -> None:
    sync_once(short_films(), settings)
    edit(long_films, 7, "short")
    collection, _ = sync_once(short_films(), settings, run="second")
    assert counted(collection) == (10, 1, 23)
    audit(collection)
    assert execute(long_films, "SELECT count(*) FROM embeddings.truncated") == [(2,)]
    execute(long_films, "UPDATE embeddings.truncated SET noted_at = now() - interval '31 days'")
    audit(collection)
    assert execute(long_films, "SELECT tokens FROM embeddings.truncated") == [(23,)]


def test_texts_embedded_before_they_were_noted_are_looked_at_once(long_films: Database, settings: Settings) -> None:
    collection, _ = sync_once(short_films(), settings)
    execute(long_films, "DELETE FROM embeddings.truncated")
    execute(long_films, "UPDATE embeddings.model SET lengths_known = false")
    status = collection_status(short_films(), long_films, settings)
    assert (status["truncated"], status["longest_tokens"]) == (None, None)
    assert truncation(collection) == Truncation(10, 2, 33, True)
    assert counted(collection) == (10, 2, 33)


def test_an_upgraded_database_has_looked_at_no_text_yet(long_films: Database, settings: Settings) -> None:
    sync_once(short_films(), settings)
    execute(long_films, "DROP TABLE embeddings.truncated; ALTER TABLE embeddings.model DROP COLUMN lengths_known")
    execute(long_films, dict(schema_versions())[8])  # type: ignore[arg-type]
    collection = open_collection(short_films(), settings)
    assert not collection.ledger.truncation(collection.fingerprint).known
    assert truncation(collection) == Truncation(10, 2, 33, True)


def test_a_dry_run_counts_those_that_it_would_embed_and_notes_nothing(long_films: Database, settings: Settings) -> None:
    collection, _ = sync_once(short_films(), settings)
    before = execute(long_films, "SELECT * FROM embeddings.truncated ORDER BY content_hash")
    edit(long_films, 1, "word " * 50)
    edit(long_films, 2, "another short one")
    pending = pending_texts(collection, collection.ledger.look(collection.source)[1])
    assert (pending.texts, pending.truncated, pending.longest) == (2, 1, 53)
    assert execute(long_films, "SELECT * FROM embeddings.truncated ORDER BY content_hash") == before
    assert pending_texts(collection, {0: ["1"]}, force=True).truncated == 1


def test_a_shadow_model_of_another_length_has_a_count_of_its_own(long_films: Database, settings: Settings) -> None:
    from embeddings_pipeline.model_change.phases import add_model, remove_model
    from embeddings_pipeline.model_change.state import candidate_profile
    from embeddings_pipeline.pipeline.shadow import backfill_batch

    tiny = {**PROFILE, "name": "tiny", "max_length": 5}
    attributes = {"profiles": by_name(tiny)}
    collection, _ = sync_once(short_films(**attributes), settings)
    model = add_model(collection, candidate_profile(collection, "tiny"))
    backfill_batch(collection.with_model(model), 0, "shadow")
    assert collection.ledger.truncation(model.destination.fingerprint).truncated == 10
    assert counted(collection) == (10, 2, 33)
    remove_model(collection, "tiny")
    assert execute(long_films, "SELECT count(*) FROM embeddings.truncated") == [(2,)]
