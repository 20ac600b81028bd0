"""The numbers that people are told agree with each other: before and after, here and there."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RunFailed
from embeddings_pipeline.model_change.phases import roll_back
from embeddings_pipeline.model_change.plan import price
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.orchestration.switch import switch
from embeddings_pipeline.orchestration.sync import SyncResult, sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    definition,
    execute,
    films,
    later,
    make_films,
)


@pytest.fixture
def run_sync(project: Settings, instance: dg.DagsterInstance) -> Callable[..., SyncResult]:
    return lambda **options: sync(definition(), project, instance=instance, **options)


def said_and_done(run_sync: Callable[..., SyncResult], **options: Any) -> SyncResult:
    """A sync whose dry run said the same."""
    said, done = run_sync(dry_run=True, **options), run_sync(**options)
    assert (said.scanned, said.new, said.changed, said.deleted) == (done.scanned, done.new, done.changed, done.deleted)
    assert (said.left, said.reused) == (done.embedded, done.reused)
    return done


def test_a_dry_run_says_what_the_sync_then_does(database: Database, run_sync: Callable[..., SyncResult]) -> None:
    same = [(n, "Same", "the same text", n) for n in range(26, 51)]  # equal texts, over several batches
    make_films(database, [*films(25), *same])
    first = said_and_done(run_sync)
    assert first.embedded + first.reused == 50
    assert said_and_done(run_sync).reused == 0
    execute(database, "UPDATE films SET overview = 'edited' WHERE id IN (3, 30); DELETE FROM films WHERE id = 4")
    execute(database, "UPDATE films SET revenue = 0 WHERE id = 5; INSERT INTO films VALUES (60, 'New', 'film', 1)")
    done = said_and_done(run_sync)
    assert (done.new, done.changed, done.deleted) == (1, 3, 1)
    [(table,)] = execute(database, "SELECT 'films_vector_' || fingerprint FROM embeddings.collection")
    execute(database, f"DELETE FROM embeddings.{table} WHERE text_id < 4")
    said_and_done(run_sync)
    said_and_done(run_sync, force=True)


def test_a_dry_run_counts_texts_of_the_quarantine_whose_time_has_come(
    database: Database, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(30))
    DeterministicEncoder.fail_on = "number 7 "
    assert run_sync().quarantined == 1
    said_and_done(run_sync)
    DeterministicEncoder.reset()
    later(database, 3600)
    assert said_and_done(run_sync).embedded == 1


def test_rows_that_were_never_committed_are_new_and_not_changed(
    database: Database, run_sync: Callable[..., SyncResult]
) -> None:
    make_films(database, films(15))
    DeterministicEncoder.fail_on = " "
    with pytest.raises(RunFailed):
        run_sync()
    execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3")
    looked = run_sync(dry_run=True)
    assert (looked.new, looked.changed) == (15, 0)
    DeterministicEncoder.reset()
    assert run_sync(limit=5).new == 15
    rest = run_sync()
    assert (rest.new, rest.changed, rest.embedded) == (10, 0, 10)


def test_a_switch_that_is_done_twice_has_one_price_and_pays_it_once(
    database: Database, project: Settings, instance: dg.DagsterInstance
) -> None:
    make_films(database, films(100))
    one = definition(profiles=by_name({**PROFILE, "name": "wide", "dimensions": 48}))
    sync(one, project, instance=instance)
    collection = open_collection(one, project)
    first, again = (price(collection, candidate_profile(collection, "wide")) for _ in range(2))
    assert (first.texts, first.tokens) == (again.texts, again.tokens) == (100, first.tokens)
    told: list[tuple[str, int, int]] = []
    done = switch(one, project, "wide", instance=instance, progress_of=lambda *far: told.append(far))
    assert done.embedded == 100
    embedding = [texts for phase, texts, total in told if phase == "embedding" and total == 100]
    assert embedding == sorted(embedding) and (embedding[0], embedding[-1]) == (0, 100)
    roll_back(open_collection(one, project), "rollback")
    DeterministicEncoder.reset()
    after = price(open_collection(one, project), candidate_profile(collection, "wide"))
    assert (after.texts, after.tokens) == (0, 0)
