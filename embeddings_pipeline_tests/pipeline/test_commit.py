"""Rules 1 to 4 on the real code: what is committed, what is left alone, and every interleaving that the rules are made
for.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import (
    OutageError,
    OutOfMemoryError,
    PipelineError,
    ProfileError,
    RefusedError,
    StaleRunError,
)
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.health.integrity import integrity
from embeddings_pipeline.ledger.ledger import Ledger, contiguous_ranges
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.commit import commit_batch
from embeddings_pipeline.pipeline.embed import EmbedOptions, embed_batches
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source import Source, SourceRow
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    make_films,
    run_batch,
    sync_once,
)


@pytest.fixture(autouse=True)
def _fresh_encoder() -> None:
    DeterministicEncoder.reset()


def overview(database: Database, film: int) -> str | None:
    """The overview in the vectors' text of a film; None where it has no vector."""
    found = committed(database).get(str(film))
    return found[0].split(" | ", 1)[1] if found else None


def edit(database: Database, film: int, text: str | None) -> None:
    if text is None:
        execute(database, "DELETE FROM films WHERE id = %s", [film])
    else:
        execute(
            database,
            "INSERT INTO films VALUES (%s, %s, %s, 0) ON CONFLICT (id) DO UPDATE SET overview = excluded.overview",
            [film, f"Film {film}", text],
        )


def prepare(collection: Collection, batch: int, run: str) -> None:
    """The first three steps of a run: it has read and encoded, and not committed yet."""
    read_items(collection, batch, run)
    render_texts(collection, batch, run)
    list(embed_batches(collection, [batch], run))


class TestStaleness:
    def test_a_second_sync_embeds_nothing_and_writes_nothing(self, database: Database, settings: Settings) -> None:
        make_films(database, films(25))
        _, first = sync_once(definition(), settings)
        tables = ("films_item", "films_text", "batch", "collection")
        before = [
            execute(database, f"SELECT array_agg(t.xmin::text ORDER BY t::text) FROM embeddings.{t} t") for t in tables
        ]
        _, second = sync_once(definition(), settings)
        after = [
            execute(database, f"SELECT array_agg(t.xmin::text ORDER BY t::text) FROM embeddings.{t} t") for t in tables
        ]
        assert (first, second) == (25, 0)
        assert before == after

    def test_a_changed_payload_is_there_without_embedding(self, database: Database, settings: Settings) -> None:
        make_films(database, films(12))
        sync_once(definition(), settings)
        execute(database, "UPDATE films SET revenue = 77 WHERE id = 3")
        collection, embedded = sync_once(definition(), settings)
        assert embedded == 0
        assert committed(database)["3"][2]["revenue"] == 77
        assert collection.ledger.dirty_batches() == []

    def test_a_column_that_no_one_asked_for_costs_nothing(self, database: Database, settings: Settings) -> None:
        make_films(database, films(12))
        collection, _ = sync_once(definition(), settings)
        execute(database, "UPDATE films SET note = 'x'")
        assert collection.ledger.full_scan(collection.source).changed == 0
        assert collection.ledger.dirty_batches() == []

    def test_a_template_column_that_becomes_payload_arrives(self, database: Database, settings: Settings) -> None:
        make_films(database, films(3))
        sync_once(definition(columns=["revenue"]), settings)
        _, embedded = sync_once(definition(columns=["revenue", "title"]), settings)
        assert embedded == 0
        assert committed(database)["1"][2] == {"revenue": 1001, "title": "Film 1"}

    def test_a_key_of_other_columns_replaces_the_items(self, database: Database, settings: Settings) -> None:
        make_films(database, films(3))
        sync_once(definition(), settings)
        one = definition(source={"table": "films", "key": ["id", "title"]})
        collection = open_collection(one, settings)
        collection.ledger.full_scan(collection.source, allow_deletes=True)
        for batch in collection.ledger.dirty_batches():
            run_batch(collection, batch, "other key")
        assert set(committed(database)) == {f'["{n}", "Film {n}"]' for n in (1, 2, 3)}
        assert collection.ledger.dirty_batches() == []

    def test_one_changed_overview_embeds_one_text(self, database: Database, settings: Settings) -> None:
        make_films(database, films(25))
        sync_once(definition(), settings)
        edit(database, 17, "Something else")
        _, embedded = sync_once(definition(), settings)
        assert embedded == 1
        assert overview(database, 17) == "Something else"

    def test_a_changed_template_is_noticed_at_once(self, database: Database, settings: Settings) -> None:
        make_films(database, films(12))
        sync_once(definition(), settings)
        _, embedded = sync_once(definition(vectors={"base": "{overview} by {title}"}), settings)
        assert embedded == 12
        assert committed(database)["1"][0] == "A story about number 1 and its friends by Film 1"

    def test_a_vector_name_that_goes_takes_its_vectors_and_leaves_the_others(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(5))
        sync_once(definition(vectors={"base": "{title} | {overview}", "title": "{title}"}), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.films") == [(10,)]
        _, embedded = sync_once(definition(), settings)
        assert embedded == 0
        assert execute(database, "SELECT DISTINCT vector_name FROM embeddings.films") == [("base",)]

    def test_equal_texts_of_two_items_are_encoded_once_and_stored_twice(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, [(1, "Same", "words", 1), (2, "Same", "words", 2)])
        sync_once(definition(), settings)
        assert DeterministicEncoder.texts_encoded["Same | words"] == 1
        assert execute(database, "SELECT count(*) FROM embeddings.films") == [(2,)]

    def test_blank_texts_have_no_vector_and_count_as_covered(self, database: Database, settings: Settings) -> None:
        make_films(database, [(1, None, None, 1), (2, "  ", "\n\t", 2), (3, "A", "b", 3)])
        collection, embedded = sync_once(definition(), settings)
        assert embedded == 1
        assert collection.ledger.dirty_batches() == []
        assert set(committed(database)) == {"3"}

    def test_force_encodes_all_anew_and_keeps_the_ids(self, database: Database, settings: Settings) -> None:
        make_films(database, films(5))
        collection, _ = sync_once(definition(), settings)
        ids = execute(database, "SELECT id FROM embeddings.films_text ORDER BY id")
        done = run_batch(collection, 0, "again", force=True)
        assert (done.embedded, done.vectors_written, done.unchanged) == (5, 5, 5)
        assert execute(database, "SELECT id FROM embeddings.films_text ORDER BY id") == ids

    def test_a_changed_text_gets_a_new_id_and_its_vector_leaves_with_the_old_one(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(3))
        sync_once(definition(), settings)
        [(old,)] = execute(database, "SELECT id FROM embeddings.films_text WHERE item_key = '2'")
        edit(database, 2, "New")
        collection, _ = sync_once(definition(), settings)
        [(new,)] = execute(database, "SELECT id FROM embeddings.films_text WHERE item_key = '2'")
        table = collection.current.table.name
        assert new > old
        assert execute(database, f"SELECT count(*) FROM embeddings.{table} WHERE text_id = {old}") == [(0,)]


class TestLimitsAndFailures:
    def test_an_item_is_committed_only_when_each_of_its_texts_is_embedded(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(6))
        two = definition(vectors={"base": "{title} | {overview}", "title": "{title}"})
        collection, _ = sync_once(two, settings, limit=5)
        whole = execute(database, "SELECT item_key FROM embeddings.films GROUP BY item_key HAVING count(*) = 2")
        assert len(whole) == 2
        assert execute(database, "SELECT count(*) FROM embeddings.films") == [(4,)]
        assert collection.ledger.dirty_batches() == [0]
        sync_once(two, settings)
        assert execute(database, "SELECT count(*) FROM embeddings.films") == [(12,)]

    def test_what_limit_encoded_is_not_encoded_again(self, database: Database, settings: Settings) -> None:
        make_films(database, films(9))
        for number in range(3):
            sync_once(definition(), settings, run=f"run{number}", limit=3)
        assert max(DeterministicEncoder.texts_encoded.values()) == 1
        assert len(committed(database)) == 9

    @pytest.mark.parametrize(("bad", "error"), [(1, ValueError), (5, PipelineError), (9, RuntimeError)])
    def test_a_bad_text_goes_to_quarantine_and_the_rest_is_committed(
        self, database: Database, settings: Settings, bad: int, error: type[Exception]
    ) -> None:
        make_films(database, films(9))
        edit(database, bad, "POISON")
        DeterministicEncoder.fail_on, DeterministicEncoder.error = "POISON", error
        collection, embedded = sync_once(definition(), settings)
        assert embedded == 8
        assert set(committed(database)) == {str(n) for n in range(1, 10) if n != bad}
        assert collection.ledger.dirty_batches() == []
        [(text, reason)] = execute(database, "SELECT text, reason FROM embeddings.quarantine")
        assert "POISON" in text and error.__name__ in reason

    @pytest.mark.parametrize("error", [OutageError, ProfileError])
    def test_an_outage_fails_the_run_and_quarantines_nothing(
        self, database: Database, settings: Settings, error: type[Exception]
    ) -> None:
        make_films(database, films(4))
        DeterministicEncoder.fail_on, DeterministicEncoder.error = "number 2", error
        with pytest.raises(error):
            sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
        assert committed(database) == {}

    @pytest.mark.parametrize("error", [OutOfMemoryError, MemoryError])
    def test_memory_that_runs_out_for_one_text_is_that_texts_fault_and_for_all_an_outage(
        self, database: Database, settings: Settings, error: type[Exception]
    ) -> None:
        make_films(database, films(9))
        DeterministicEncoder.fail_on, DeterministicEncoder.error = " ", error
        with pytest.raises(error):
            sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
        DeterministicEncoder.fail_on = "number 2 "
        _, embedded = sync_once(definition(), settings)
        assert embedded == 8
        [(reason,)] = execute(database, "SELECT reason FROM embeddings.quarantine")
        assert reason.startswith("memory ran out for this text of")

    def test_a_quarantined_text_that_was_mended_is_committed(self, database: Database, settings: Settings) -> None:
        make_films(database, films(3))
        edit(database, 2, "POISON")
        DeterministicEncoder.nan_on = "POISON"
        sync_once(definition(), settings)
        edit(database, 2, "mended")
        sync_once(definition(), settings)
        assert overview(database, 2) == "mended"

    def test_an_encoder_that_fails_on_everything_fails_the_run_and_quarantines_nothing(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(4))
        DeterministicEncoder.fail_on = " "
        with pytest.raises(ValueError, match="a text holds"):
            sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
        DeterministicEncoder.reset()
        assert sync_once(definition(), settings)[1] == 4

    def test_a_run_that_was_killed_after_encoding_costs_no_text_twice(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(8))
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "killed")
        _, embedded = sync_once(definition(), settings, run="next")
        assert embedded == 0
        assert len(committed(database)) == 8

    def test_a_model_that_became_current_meanwhile_rolls_the_commit_back(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(4))
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "late")
        execute(database, "UPDATE embeddings.collection SET fingerprint = 'another'")
        with pytest.raises(StaleRunError, match="sync again"):
            commit_batch(collection, 0, "late")
        assert execute(database, "SELECT count(*) FROM embeddings.films_text") == [(0,)]


class TestDeletes:
    def test_a_deleted_row_loses_its_vectors_and_comes_back_embedded(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(10))
        sync_once(definition(), settings)
        edit(database, 4, None)
        sync_once(definition(), settings)
        assert "4" not in committed(database)
        assert execute(database, "SELECT count(*) FROM embeddings.films_item WHERE item_key = '4'") == [(0,)]
        edit(database, 4, "back")
        sync_once(definition(), settings)
        assert overview(database, 4) == "back"

    def test_a_scan_that_misses_a_fifth_is_refused_and_deletes_nothing(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(10))
        collection, _ = sync_once(definition(), settings)
        execute(database, "DELETE FROM films WHERE id > 7")
        with pytest.raises(RefusedError, match=r"3 of 10 items.*--allow-deletes"):
            collection.ledger.full_scan(collection.source)
        assert collection.ledger.dirty_batches() == []
        assert len(committed(database)) == 10
        collection.ledger.full_scan(collection.source, allow_deletes=True)
        run_batch(collection, 0, "allowed")
        assert len(committed(database)) == 7

    def test_a_commit_deletes_nothing_that_no_scan_has_missed(self, database: Database, settings: Settings) -> None:
        make_films(database, films(6))
        collection, _ = sync_once(definition(), settings)
        execute(database, "DELETE FROM films")
        done = run_batch(collection, 0, "emptied", force=True)
        assert done.deleted == 0
        assert len(committed(database)) == 6

    def test_a_batch_whose_every_item_is_gone_is_clean_afterwards(self, database: Database, settings: Settings) -> None:
        make_films(database, films(60))
        collection, _ = sync_once(definition(), settings)
        execute(database, "DELETE FROM films WHERE id <= 10")
        collection, _ = sync_once(definition(), settings)
        assert collection.ledger.dirty_batches() == []
        assert len(committed(database)) == 50

    def test_an_item_that_vanished_before_it_committed_leaves_no_trace(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(3))
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "run")
        edit(database, 2, None)
        commit_batch(collection, 0, "run")
        assert set(committed(database)) == {"1", "3"}
        assert collection.ledger.dirty_batches() == []

    def test_a_deleted_row_leaves_the_lake_too(self, database: Database, settings: Settings) -> None:
        make_films(database, films(10))
        sync_once(definition(), settings)
        edit(database, 4, None)
        collection, _ = sync_once(definition(), settings, run="later")
        for asset in ("raw_items", "item_texts", "embeddings"):
            _, rows = collection.newest(asset, 0, "later")
            assert "4" not in rows["item_key"].to_pylist() and rows.num_rows == 9

    def test_a_batch_of_blank_texts_and_one_without_items_are_covered(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, [(n, " ", None, n) for n in range(1, 11)] + films(100)[10:])
        collection, _ = sync_once(definition(), settings)
        execute(
            database, "DELETE FROM films WHERE id IN (SELECT item_key::int FROM embeddings.films_item WHERE batch = 3)"
        )
        collection, _ = sync_once(definition(), settings)
        assert collection.ledger.dirty_batches() == []
        found = coverage(collection.database, collection.current)
        assert (found.items, found.missing, found.stale, found.orphans) == (90, 0, 0, 0)
        assert set(committed(database)).isdisjoint(map(str, range(1, 11)))

    def test_a_row_inserted_between_a_scans_snapshot_and_its_end_is_found_by_the_next(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(5))
        collection = open_collection(definition(), settings)
        source = _OldSnapshot(collection.source.definition, collection.source.database).remember()
        execute(database, "INSERT INTO films VALUES (6, 'Late', 'row', 1)")
        assert collection.ledger.full_scan(source).new == 5
        assert collection.ledger.full_scan(collection.source).new == 1


class _OldSnapshot(Source):
    """A source whose scan returns what it saw at an earlier moment."""

    def remember(self) -> "_OldSnapshot":
        with self.connect() as connection:
            object.__setattr__(self, "_seen", [row for rows in super().scan(connection) for row in rows])
        return self

    def scan(self, connection: Any) -> Any:
        seen: list[SourceRow] = self._seen  # type: ignore[attr-defined]
        return iter([seen])


class TestInterleavings:
    """Forced one by one. Each ends quiet: a fresh scan and the commits it asks for must give what the source holds."""

    @pytest.fixture
    def collection(self, database: Database, settings: Settings) -> Collection:
        make_films(database, films(10))
        edit(database, 1, "zero")
        return sync_once(definition(), settings)[0]

    def settle(self, collection: Collection) -> None:
        collection.ledger.full_scan(collection.source)
        for number, batch in enumerate(collection.ledger.dirty_batches()):
            run_batch(collection, batch, f"settle{number}")
        assert collection.ledger.dirty_batches() == []

    def test_a_scan_older_than_a_commit_makes_nothing_clean(self, database: Database, collection: Collection) -> None:
        edit(database, 1, "one")
        old = _OldSnapshot(collection.definition, database).remember()
        edit(database, 1, "two")
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 0, "two")
        collection.ledger.full_scan(old)  # suspects what it saw, though it is older
        assert collection.ledger.dirty_batches() == [0]
        self.settle(collection)
        assert overview(database, 1) == "two"

    def test_two_scans_out_of_order_lose_no_edit(self, database: Database, collection: Collection) -> None:
        edit(database, 2, "so that the older scan has something to write in this batch")
        old = _OldSnapshot(collection.definition, database).remember()
        edit(database, 1, "one")
        edit(database, 2, "zero")
        collection.ledger.full_scan(collection.source)
        collection.ledger.full_scan(old)
        [(dirty,)] = execute(
            database, "SELECT seen_hash <> committed_hash FROM embeddings.films_item WHERE item_key = '1'"
        )
        assert dirty, "the older scan saw what is committed, and cleaned the item"
        self.settle(collection)
        assert overview(database, 1) == "one"

    def test_an_older_run_never_replaces_what_is_current(self, database: Database, collection: Collection) -> None:
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "older")
        edit(database, 1, "two")
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 0, "newer")
        done = commit_batch(collection, 0, "older")
        assert overview(database, 1) == "two"
        assert done.left == 1
        assert collection.ledger.dirty_batches() == []

    def test_an_edit_during_a_run_is_dirty_at_once(self, database: Database, collection: Collection) -> None:
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "run")
        edit(database, 1, "two")
        commit_batch(collection, 0, "run")
        assert overview(database, 1) == "one"
        assert collection.ledger.dirty_batches() == [0]
        self.settle(collection)
        assert overview(database, 1) == "two"

    def test_an_edit_and_its_undoing_during_a_run(self, database: Database, collection: Collection) -> None:
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "run")
        edit(database, 1, "zero")
        commit_batch(collection, 0, "run")  # what is committed is what the source holds again: left alone
        assert overview(database, 1) == "zero"
        self.settle(collection)
        assert overview(database, 1) == "zero"

    @pytest.mark.parametrize("undo", [True, False])
    def test_a_scan_while_a_commit_holds_its_lock_loses_no_edit(
        self, database: Database, collection: Collection, undo: bool
    ) -> None:
        # The commit sees "one", the edit comes, the scan sees it and compares before the commit commits.
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "run")
        scanned = beside(
            lambda second_look: commit_batch(collection, 0, "run", at_second_look=second_look),
            lambda: edit(database, 1, "zero" if undo else "two"),
            lambda: collection.ledger.full_scan(collection.source),
        )
        scanned()
        assert collection.ledger.dirty_batches() == [0]
        self.settle(collection)
        assert overview(database, 1) == ("zero" if undo else "two")

    def test_a_row_that_is_back_before_its_deletion_commits_is_found(
        self, database: Database, collection: Collection
    ) -> None:
        edit(database, 1, None)
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "run")
        scanned = beside(
            lambda second_look: commit_batch(collection, 0, "run", at_second_look=second_look),
            lambda: edit(database, 1, "back"),
            lambda: collection.ledger.full_scan(collection.source),
        )
        scanned()
        assert collection.ledger.dirty_batches() != []
        self.settle(collection)
        assert overview(database, 1) == "back"

    def test_limit_beside_a_whole_run_leaves_nothing_undone(self, database: Database, collection: Collection) -> None:
        for film in range(1, 6):
            edit(database, film, f"edited {film}")
        collection.ledger.full_scan(collection.source)
        read_items(collection, 0, "limited")
        render_texts(collection, 0, "limited")
        list(embed_batches(collection, [0], "limited", EmbedOptions(limit=2)))
        run_batch(collection, 0, "whole")
        commit_batch(collection, 0, "limited")
        assert collection.ledger.dirty_batches() == []
        assert [overview(database, film) for film in range(1, 6)] == [f"edited {film}" for film in range(1, 6)]

    def test_force_with_an_older_read_does_not_undo_a_sync(self, database: Database, collection: Collection) -> None:
        read_items(collection, 0, "force")
        render_texts(collection, 0, "force")
        list(embed_batches(collection, [0], "force", EmbedOptions(force=True)))
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 0, "sync")
        commit_batch(collection, 0, "force")
        assert overview(database, 1) == "one"
        assert collection.ledger.dirty_batches() == []

    def test_an_older_template_that_is_committed_late_is_rendered_again(
        self, database: Database, settings: Settings, collection: Collection
    ) -> None:
        prepare(collection, 0, "old template")
        newer = definition(vectors={"base": "{title}: {overview}"})
        renewed, _ = sync_once(newer, settings, run="new template")
        commit_batch(collection, 0, "old template")
        assert renewed.ledger.dirty_batches() == [0]
        sync_once(newer, settings, run="settle")
        assert committed(database)["1"][0] == "Film 1: zero"

    def test_texts_of_an_older_template_that_are_committed_alone_leave_the_batch_dirty(
        self, database: Database, settings: Settings, collection: Collection
    ) -> None:
        newer = open_collection(definition(vectors={"base": "{title}: {overview}"}), settings)
        commit_batch(newer, 0, "only the last step, on the files of a former run")
        assert newer.ledger.dirty_batches() == [0]

    def test_a_new_template_that_leaves_an_item_alone_is_not_done_with_its_batch(
        self, database: Database, settings: Settings, collection: Collection
    ) -> None:
        newer = open_collection(definition(vectors={"base": "{title}: {overview}"}), settings)
        edit(database, 1, "passing")
        prepare(newer, 0, "new template")
        edit(database, 1, "zero")
        done = commit_batch(newer, 0, "new template")
        assert done.left == 1
        assert newer.ledger.dirty_batches() == [0]
        sync_once(newer.definition, settings, run="settle")
        assert committed(database)["1"][0] == "Film 1: zero"

    def test_two_runs_that_commit_one_batch_at_once_leave_each_vector_once(
        self, database: Database, collection: Collection
    ) -> None:
        for film in range(1, 11):
            edit(database, film, f"edited {film}")
        collection.ledger.full_scan(collection.source)
        prepare(collection, 0, "a")
        prepare(collection, 0, "b")
        threads = [threading.Thread(target=commit_batch, args=(collection, 0, run)) for run in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert execute(database, "SELECT count(*), count(DISTINCT item_key) FROM embeddings.films") == [(10, 10)]
        assert collection.ledger.dirty_batches() == []

    def test_two_first_scans_at_once_give_each_item_one_batch(self, database: Database, settings: Settings) -> None:
        execute(database, "CREATE TABLE many AS SELECT n AS id, 'Film ' || n AS title FROM generate_series(1, 5000) n")
        one = definition("many", source={"table": "many", "key": "id"}, columns=[], vectors={"base": "{title}"})
        ledger = Ledger(one, database)
        ledger.register()
        threads = [threading.Thread(target=ledger.full_scan, args=(Source(one, database),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sizes = execute(database, "SELECT batch, count(*) FROM embeddings.many_item GROUP BY 1 ORDER BY 1")
        assert sizes == [(batch, 10) for batch in range(500)]
        assert ledger.batches() == list(range(500))


def beside(
    commit: Callable[[Callable[[], None]], Any], edit_then: Callable[[], None], scan: Callable[[], Any]
) -> Callable[[], None]:
    """Run a commit that, after its second look, lets an edit and a scan begin, and commits while the scan is at it.

    Returns what waits for both to end.
    """
    started = threading.Event()

    def scanning() -> None:
        started.wait()
        scan()

    thread = threading.Thread(target=scanning)
    thread.start()

    def second_look() -> None:
        edit_then()
        started.set()
        thread.join(timeout=1.5)  # it waits for the lock of this commit
        assert thread.is_alive(), "the scan did not wait for the commit that is under way"

    commit(second_look)
    return thread.join


class TestRepair:
    def test_vectors_that_somebody_deleted_come_back(self, database: Database, settings: Settings) -> None:
        make_films(database, films(12))
        collection, _ = sync_once(definition(), settings)
        table = f"embeddings.{collection.current.table.name}"
        execute(database, f"DELETE FROM {table} WHERE text_id % 3 = 0")
        assert collection.ledger.dirty_batches() == []
        assert collection.ledger.repair() == 4
        sync_once(definition(), settings, run="repair")
        assert len(committed(database)) == 12

    @pytest.mark.parametrize("dropped", ["VIEW films", "TABLE films_text", "TABLE films_item", "TABLE {vector}"])
    def test_what_somebody_dropped_is_made_anew(self, database: Database, settings: Settings, dropped: str) -> None:
        make_films(database, films(12))
        collection, _ = sync_once(definition(), settings)
        before = committed(database)
        [(epoch,)] = execute(database, "SELECT epoch FROM embeddings.collection")
        kind, name = dropped.format(vector=collection.current.table.name).split()
        execute(database, f"DROP {kind} embeddings.{name} CASCADE")
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        collection.ledger.repair()
        for batch in collection.ledger.dirty_batches():
            run_batch(collection, batch, "again")
        assert committed(database) == before
        assert execute(database, "SELECT epoch <> %s FROM embeddings.collection", [epoch]) == [(True,)]
        assert collection.ledger.dirty_batches() == []

    def test_orphans_are_removed(self, database: Database, settings: Settings) -> None:
        make_films(database, films(3))
        collection, _ = sync_once(definition(), settings)
        table = f"embeddings.{collection.current.table.name}"
        execute(database, f"INSERT INTO {table} SELECT 999, vector_name, content_hash, embedding FROM {table} LIMIT 1")
        assert collection.ledger.repair() == 1
        assert execute(database, f"SELECT count(*) FROM {table}") == [(3,)]


def test_float32_storage_keeps_the_vectors_to_the_bit(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    sync_once(definition(storage="vector"), settings)
    [(stored,)] = execute(database, "SELECT embedding::real[] FROM embeddings.films WHERE item_key = '2'")
    encoder = DeterministicEncoder(open_collection(definition(storage="vector"), settings).profile)
    exact = encoder.encode_documents(["Film 2 | A story about number 2 and its friends"])[0]
    assert np.array_equal(np.asarray(stored, np.float32), exact)
    assert integrity(database, open_collection(definition(storage="vector"), settings).current).sound


def test_ranges_have_no_gap_and_are_not_too_long() -> None:
    existing = list(range(12))
    items = dict.fromkeys([0, 1, 5, 7, 8, 9, 10], 10)
    ranges = contiguous_ranges(items, existing, most_batches=3, most_items=1000)
    assert ranges == [(0, 1), (5, 5), (7, 9), (10, 10)]
    assert contiguous_ranges({4: 1, 9: 1}, [4, 9, 11], most_batches=10, most_items=1000) == [(4, 9)]


def test_a_run_takes_many_batches_with_little_to_do_and_few_full_ones() -> None:
    items = {0: 1000, 1: 1000, 2: 1000, 3: 5, 4: 5, 5: 990, 6: 1, 7: 5000, 8: 1}
    ranges = contiguous_ranges(items, list(range(9)), most_batches=100, most_items=2000)
    assert ranges == [(0, 1), (2, 5), (6, 6), (7, 7), (8, 8)]


def test_old_files_of_a_batch_are_swept_and_the_committed_one_stays(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    collection, _ = sync_once(definition(), settings, run="first")
    folder = settings.state_dir / "lake" / collection.folder("embeddings") / "000000"
    for run in ("second", "third"):
        run_batch(collection, 0, run)
        for file in folder.iterdir():
            os.utime(file, (1, 1))
    run_batch(collection, 0, "fourth")
    assert [file.name for file in folder.iterdir()] == ["fourth.parquet"]
