"""Rules 2 and 3 on the real code: every interleaving of scans, edits and commits that they are made for."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source import Source
from embeddings_pipeline_tests.support.workbench import (
    OldSnapshot,
    commit_batch,
    committed,
    definition,
    edit,
    execute,
    films,
    make_films,
    overview,
    prepare_batch,
    run_batch,
    sync_once,
)


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
        old = OldSnapshot(collection.definition, database).remember()
        edit(database, 1, "two")
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 0, "two")
        collection.ledger.full_scan(old)  # suspects what it saw, though it is older
        assert collection.ledger.dirty_batches() == [0]
        self.settle(collection)
        assert overview(database, 1) == "two"

    def test_two_scans_out_of_order_lose_no_edit(self, database: Database, collection: Collection) -> None:
        edit(database, 2, "so that the older scan has something to write in this batch")
        old = OldSnapshot(collection.definition, database).remember()
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
        prepare_batch(collection, 0, "older")
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
        prepare_batch(collection, 0, "run")
        edit(database, 1, "two")
        commit_batch(collection, 0, "run")
        assert overview(database, 1) == "one"
        assert collection.ledger.dirty_batches() == [0]
        self.settle(collection)
        assert overview(database, 1) == "two"

    def test_an_edit_and_its_undoing_during_a_run(self, database: Database, collection: Collection) -> None:
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        prepare_batch(collection, 0, "run")
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
        prepare_batch(collection, 0, "run")
        scanned = beside(
            lambda: commit_batch(collection, 0, "run"),
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
        prepare_batch(collection, 0, "run")
        scanned = beside(
            lambda: commit_batch(collection, 0, "run"),
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
        prepare_batch(collection, 0, "limited", limit=2)
        run_batch(collection, 0, "whole")
        commit_batch(collection, 0, "limited")
        assert collection.ledger.dirty_batches() == []
        assert [overview(database, film) for film in range(1, 6)] == [f"edited {film}" for film in range(1, 6)]

    def test_force_with_an_older_read_does_not_undo_a_sync(self, database: Database, collection: Collection) -> None:
        prepare_batch(collection, 0, "force", force=True)
        edit(database, 1, "one")
        collection.ledger.full_scan(collection.source)
        run_batch(collection, 0, "sync")
        commit_batch(collection, 0, "force")
        assert overview(database, 1) == "one"
        assert collection.ledger.dirty_batches() == []

    def test_an_older_template_that_is_committed_late_is_rendered_again(
        self, database: Database, settings: Settings, collection: Collection
    ) -> None:
        prepare_batch(collection, 0, "old template")
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
        prepare_batch(newer, 0, "new template")
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
        prepare_batch(collection, 0, "a")
        prepare_batch(collection, 0, "b")
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


def beside(commit: Callable[[], Any], edit_then: Callable[[], None], scan: Callable[[], Any]) -> Callable[[], None]:
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

    with at_failpoint("commit.second_look", second_look):
        commit()
    return thread.join
