"""Rules 1, 4 and 8 on the real code: what is committed, what is left alone and what is deleted."""

import os

import numpy as np
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RefusedError, SourceError
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.health.integrity import integrity
from embeddings_pipeline.ledger.work import contiguous_ranges
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
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
        table = collection.model.destination.name
        assert new > old
        assert execute(database, f"SELECT count(*) FROM embeddings.{table} WHERE text_id = {old}") == [(0,)]


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
        prepare_batch(collection, 0, "run")
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
        found = coverage(collection.database, collection.model)
        assert (found.items, found.missing, found.stale, found.orphans) == (90, 0, 0, 0)
        assert set(committed(database)).isdisjoint(map(str, range(1, 11)))

    def test_a_row_inserted_between_a_scans_snapshot_and_its_end_is_found_by_the_next(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(5))
        collection = open_collection(definition(), settings)
        source = OldSnapshot(collection.source.definition, collection.source.database).remember()
        execute(database, "INSERT INTO films VALUES (6, 'Late', 'row', 1)")
        assert collection.ledger.full_scan(source).new == 5
        assert execute(database, "SELECT count(*) FROM embeddings.films_item") == [(5,)]
        assert collection.ledger.full_scan(collection.source).new == 6  # none of them is committed yet
        assert execute(database, "SELECT count(*) FROM embeddings.films_item") == [(6,)]


class TestRepair:
    def test_vectors_that_somebody_deleted_come_back(self, database: Database, settings: Settings) -> None:
        make_films(database, films(12))
        collection, _ = sync_once(definition(), settings)
        table = f"embeddings.{collection.model.destination.name}"
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
        kind, name = dropped.format(vector=collection.model.destination.name).split()
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
        table = f"embeddings.{collection.model.destination.name}"
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
    assert integrity(database, open_collection(definition(storage="vector"), settings).model).sound


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


def test_a_key_that_comes_twice_by_the_second_look_is_refused(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    collection = open_collection(definition(), settings)
    collection.ledger.full_scan(collection.source)
    prepare_batch(collection, 0, "run")
    execute(database, "ALTER TABLE films DROP CONSTRAINT films_pkey")
    execute(database, "INSERT INTO films SELECT * FROM films WHERE id = 2")
    with pytest.raises(SourceError, match=r"the key \(2\) more than once"):
        commit_batch(collection, 0, "run")
    assert committed(database) == {}
