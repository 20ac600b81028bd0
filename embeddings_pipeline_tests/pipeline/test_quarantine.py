"""Poison texts are tried again after a wait, a bounded number of times, and leave when they go well."""

from typing import Any

import pytest

from embeddings_pipeline.errors import OutageError
from embeddings_pipeline.pipeline.embed import embed_batches
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    later,
    make_films,
    run_batch,
    sync_once,
)


class UnstorableError(OutageError):
    """Its message cannot be stored as it is."""

    def __init__(self, _: str) -> None:
        super().__init__("NUL \x00 and half \udcff a character")


UNSTORABLE = "NUL \ufffd and half \ufffd a character"


class PoisonError(ValueError):
    """The same, of a text."""

    def __init__(self, _: str) -> None:
        super().__init__(*UnstorableError("").args)


def test_a_reason_that_cannot_be_stored_as_it_is_costs_no_batch(database, settings) -> None:
    make_films(database, films(9))
    execute(database, "UPDATE films SET overview = 'POISON' WHERE id = 5")
    DeterministicEncoder.fail_on, DeterministicEncoder.error = "POISON", PoisonError
    collection, _ = sync_once(definition(), settings)
    assert [entry.reason for entry in collection.ledger.quarantine_entries()] == [f"PoisonError: {UNSTORABLE}"]
    assert len(committed(database)) == 8


def test_why_a_batch_waits_is_told_though_it_cannot_be_stored_as_it_is(database, settings) -> None:
    make_films(database, films(9))
    DeterministicEncoder.fail_on, DeterministicEncoder.error = "Film", UnstorableError
    with pytest.raises(OutageError):
        sync_once(definition(), settings)
    assert execute(database, "SELECT failure FROM embeddings.batch") == [(UNSTORABLE,)]


class TestQuarantine:
    @pytest.fixture
    def poisoned(self, database, settings) -> Any:
        """Nine films, the fifth of which the encoder refuses."""
        make_films(database, films(9))
        execute(database, "UPDATE films SET overview = 'POISON' WHERE id = 5")
        DeterministicEncoder.fail_on = "POISON"
        collection, _ = sync_once(definition(quarantine={"attempts": 3}), settings)
        return collection

    def test_a_text_is_tried_again_after_its_wait_and_a_bounded_number_of_times(self, database, poisoned) -> None:
        tried = []
        for n in range(6):
            tried.append(poisoned.ledger.work(due=True))
            for batch in poisoned.ledger.work():
                run_batch(poisoned, batch, f"try{n}")
            later(database, 24 * 3600)
        assert tried == [{}, {0: 1}, {0: 1}, {}, {}, {}]
        [entry] = poisoned.ledger.quarantine_entries()
        assert (entry.item_key, entry.items, entry.attempts, entry.next_try) == ("5", 1, 3, None)

    def test_a_text_that_goes_well_again_leaves_the_quarantine(self, database, poisoned) -> None:
        DeterministicEncoder.reset()
        later(database, 600)
        for batch in poisoned.ledger.work():
            run_batch(poisoned, batch, "again")
        assert poisoned.ledger.quarantine_entries() == []
        assert len(committed(database)) == 9

    def test_a_dry_look_does_not_count_what_waits(self, poisoned) -> None:
        for force, texts, reused in ((False, 0, 1), (True, 2, 0)):
            pending = pending_texts(poisoned, {0: ["5", "6"]}, force=force)
            assert (pending.texts, pending.reused) == (texts, reused)

    def test_a_retry_that_dies_before_its_commit_is_tried_again(self, database, poisoned) -> None:
        DeterministicEncoder.reset()
        later(database, 600)
        list(embed_batches(poisoned, [0], "killed"))
        later(database, 3600)
        assert poisoned.ledger.work(due=True) == {0: 1}
        run_batch(poisoned, 0, "again")
        assert len(committed(database)) == 9 and poisoned.ledger.quarantine_entries() == []

    def test_a_text_of_two_batches_leaves_when_both_have_its_vector(self, database, settings) -> None:
        make_films(database, [(n, "Same", "POISON" if n in (1, 19) else f"story {n}", 1) for n in range(1, 20)])
        DeterministicEncoder.reset()
        DeterministicEncoder.fail_on = "POISON"
        collection, _ = sync_once(definition(), settings)
        poison = "SELECT batch FROM embeddings.films_item WHERE item_key IN ('1', '19')"
        batches = {row[0] for row in execute(database, poison)}
        DeterministicEncoder.reset()
        later(database, 600)
        work = list(collection.ledger.work())
        assert set(work) == batches
        run_batch(collection, work[0], "one")
        left = collection.ledger.work()
        assert set(left) == batches - {work[0]}
        for batch in left:
            run_batch(collection, batch, "other")
        assert collection.ledger.work() == {} and len(committed(database)) == 19

    def test_an_outage_while_a_text_is_tried_again_makes_the_batch_wait(self, database, poisoned) -> None:
        later(database, 600)
        DeterministicEncoder.error = OutageError
        with pytest.raises(OutageError):
            run_batch(poisoned, 0, "outage")
        assert poisoned.ledger.work(due=True) == {} and poisoned.ledger.work() == {0: 1}

    def test_waits_grow(self, database, poisoned) -> None:
        waits = []
        for n in range(2):
            [(wait,)] = execute(
                database, "SELECT round(extract(epoch FROM next_try - last_try) / 60) FROM embeddings.quarantine"
            )
            waits.append(int(wait))
            later(database, 24 * 3600)
            run_batch(poisoned, 0, f"try{n}")
        assert waits == [10, 40]

    def test_retry_gives_new_attempts_and_clear_makes_it_a_new_text(self, database, poisoned) -> None:
        [entry] = poisoned.ledger.quarantine_entries()
        assert poisoned.ledger.quarantine_retry([bytes.fromhex(entry.content_hash)]) == 1
        assert poisoned.ledger.work() == {0: 1}
        DeterministicEncoder.reset()
        assert poisoned.ledger.quarantine_clear() == 1
        assert poisoned.ledger.quarantine_entries() == [] and poisoned.ledger.dirty_items() == {0: 1}
        run_batch(poisoned, 0, "again")
        assert len(committed(database)) == 9

    def test_an_edited_text_takes_the_old_one_out_of_every_count(self, database, poisoned) -> None:
        execute(database, "UPDATE films SET overview = 'mended' WHERE id = 5")
        poisoned.ledger.full_scan(poisoned.source)
        run_batch(poisoned, 0, "again")
        [entry] = poisoned.ledger.quarantine_entries()
        assert (entry.item_key, entry.items) == (None, 0)
        later(database, 24 * 3600)
        assert poisoned.ledger.work() == {}
