"""A column of the user's own table as the destination: adopting it, keeping it current, and changing its model."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, PipelineError, StaleRunError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.index.faiss_build import build as build_faiss
from embeddings_pipeline.model_change import phases
from embeddings_pipeline.model_change.phases import add_model, contract, expand, roll_back, swap
from embeddings_pipeline.model_change.state import candidate_profile, open_change
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.embed import pending_texts
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination import column
from embeddings_pipeline.store.destination import table as own_table
from embeddings_pipeline_tests.model_change.test_phases import (
    OTHER,
    WIDE,
    by_name,
    commit,
    commit_all,
    written_together,
)
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import PROFILE, execute, plain_role, run_without_shadows, wait_until
from embeddings_pipeline_tests.support.workbench import definition as plain_definition

PROJECT = Path(__file__).resolve().parents[2]
WIDEST = {**PROFILE, "name": "widest", "dimensions": 320}


def definition(**attributes: Any) -> CollectionDefinition:
    defaults = {
        "name": "segments",
        "source": {"table": "segments", "key": ["id"]},
        "columns": ["video"],
        "vectors": {"base": "{words}"},
        "profile": None,
        "profiles": by_name(PROFILE, WIDE, WIDEST, OTHER),
        "destination": {"table": "segments", "profile": "wide"},
    }
    return plain_definition(**{**defaults, **attributes})


@pytest.fixture(autouse=True)
def _fresh_encoder() -> None:
    DeterministicEncoder.reset()


def words(number: int) -> str:
    return f"segment {number} says something about topic {number % 7}"


def as_text(vector: Any) -> str:
    return "[" + ",".join(map(str, vector.tolist())) + "]"


@pytest.fixture
def table(database: Database, settings: Settings) -> Database:
    """Twenty-five segments, twenty of them with vectors of the model `wide`, and an IVFFlat index."""
    execute(
        database,
        "CREATE TABLE segments (id bigint PRIMARY KEY, video text, words text, embedding vector(48), note text)",
    )
    encoder = load_encoder(resolve_profile(WIDE, settings))
    with database.connect() as connection:
        for n in range(1, 26):
            vector = as_text(encoder.encode_documents([words(n)])[0]) if n <= 20 else None
            connection.execute("INSERT INTO segments VALUES (%s, 'a', %s, %s, 'mine')", [n, words(n), vector])
    execute(
        database,
        "CREATE INDEX segments_embedding ON segments USING ivfflat (embedding vector_cosine_ops) WITH (lists = 2)",
    )
    DeterministicEncoder.reset()
    return database


@pytest.fixture
def restless_autovacuum(superuser: None, server: Database) -> Iterator[None]:
    """Autovacuum looks for work every second, in every database of the tests' server."""

    def configure(change: str) -> None:
        with server.connect(autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM {change}")  # type: ignore[arg-type]
            connection.execute("SELECT pg_reload_conf()")

    configure("SET autovacuum_naptime = '1s'")
    yield
    configure("RESET autovacuum_naptime")


def sync(one: CollectionDefinition, settings: Settings, run: str = "run") -> Collection:
    collection = open_collection(one, settings)
    commit_all(collection, run)
    return open_collection(one, settings)


def columns(database: Database) -> list[str]:
    query = """SELECT attname || ' ' || format_type(atttypid, atttypmod) FROM pg_attribute
               WHERE attrelid = 'segments'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY 1"""
    return [row[0] for row in execute(database, query)]


def indexes(database: Database) -> list[str]:
    query = "SELECT indexdef FROM pg_indexes WHERE tablename = 'segments' AND indexdef NOT LIKE '%UNIQUE%' ORDER BY 1"
    return [row[0] for row in execute(database, query)]


def assert_current(collection: Collection) -> None:
    """Each row's column has what the current model makes of its words, and each model's view what that one makes."""
    encoder = collection.encoder()
    for text, vector in execute(collection.database, "SELECT words, embedding::real[] FROM segments"):
        assert vector is not None, text
        assert np.allclose(vector, encoder.encode_documents([text])[0], atol=1e-3)
    for model in [collection, *collection.shadow_models()]:
        view = model.model.destination.name
        rows = execute(
            collection.database,
            f"SELECT text, vector.embedding::real[] FROM embeddings.segments_text JOIN embeddings.{view} AS vector "
            "ON text_id = id",
        )
        assert len(rows) == execute(collection.database, "SELECT count(*) FROM segments")[0][0]
        made = model.encoder().encode_documents([text for text, _ in rows])
        assert np.allclose([vector for _, vector in rows], made, atol=1e-3)
    found = coverage(collection.database, collection.model)
    assert (found.missing, found.stale, found.orphans) == (0, 0, 0)
    assert audit(collection).agree


class TestAdoption:
    def test_vectors_that_are_there_are_taken_and_the_others_made(self, table, settings) -> None:
        before = execute(table, "SELECT id, xmin::text, embedding::text FROM segments WHERE id <= 20 ORDER BY id")
        collection = open_collection(definition(), settings)
        pending = pending_texts(collection, collection.ledger.look(collection.source)[1])  # as a dry run says
        assert (pending.texts, pending.reused) == (5, 20)
        collection = sync(definition(), settings)
        assert sum(DeterministicEncoder.texts_encoded.values()) - 20 == 5  # and the canaries
        after = execute(table, "SELECT id, xmin::text, embedding::text FROM segments WHERE id <= 20 ORDER BY id")
        assert before == after  # not even written
        assert execute(table, "SELECT DISTINCT note FROM segments") == [("mine",)]
        assert columns(table) == [
            "embedding vector(48)", "id bigint", "note text", "video text", "words text",
        ]  # fmt: skip
        assert_current(collection)
        assert search(collection.definition, settings, words(7))[0].item_key == "7"
        build_faiss(table, collection.model.destination, settings.state_dir / "faiss")
        assert search(collection.definition, settings, words(8), index="faiss")[0].item_key == "8"
        DeterministicEncoder.reset()
        sync(definition(), settings, "again")
        assert DeterministicEncoder.texts_encoded == {}

    def test_edits_inserts_deletes_and_emptied_columns_reach_the_column(self, table, settings) -> None:
        sync(definition(), settings)
        execute(table, "UPDATE segments SET words = 'quite another text' WHERE id = 3")
        execute(table, "INSERT INTO segments (id, words) VALUES (99, 'a newcomer')")
        execute(table, "DELETE FROM segments WHERE id = 4")
        execute(table, "UPDATE segments SET embedding = NULL WHERE id = 5")
        DeterministicEncoder.reset()
        collection = sync(definition(), settings, "later")
        assert {"quite another text", "a newcomer"} == set(DeterministicEncoder.texts_encoded)  # 5 comes from the lake
        assert_current(collection)
        assert execute(table, f"SELECT count(*) FROM embeddings.segments_hash_{collection.fingerprint}") == [(25,)]

    def test_a_row_that_no_longer_meets_where_or_has_a_blank_text_loses_its_vector(self, table, settings) -> None:
        one = definition(source={"table": "segments", "key": ["id"], "where": "note = 'mine'"})
        sync(one, settings)
        execute(table, "UPDATE segments SET note = 'theirs' WHERE id = 3")
        execute(table, "UPDATE segments SET words = '' WHERE id = 4")
        sync(one, settings, "later")
        assert execute(table, "SELECT id FROM segments WHERE embedding IS NULL ORDER BY id") == [(3,), (4,)]

    def test_a_row_that_is_edited_before_it_is_committed_is_encoded(self, table, settings) -> None:
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        execute(table, "UPDATE segments SET words = 'edited' WHERE id IN (1, 2)")
        collection.ledger.full_scan(collection.source)
        execute(table, "UPDATE segments SET words = 'edited again' WHERE id = 2")
        commit_all(collection)
        assert_current(sync(definition(), settings, "later"))

    def test_rows_of_one_text_keep_their_own_vectors(self, table, settings) -> None:
        execute(table, "UPDATE segments SET words = 'the same' WHERE id IN (1, 10, 20)")
        before = execute(table, "SELECT id, embedding::text FROM segments WHERE id <= 20 ORDER BY id")
        sync(definition(), settings)
        assert execute(table, "SELECT id, embedding::text FROM segments WHERE id <= 20 ORDER BY id") == before
        execute(table, "INSERT INTO segments SELECT 99, 'a', words, embedding + embedding FROM segments WHERE id = 1")
        sync(definition(), settings, "later")
        kept = "SELECT twice.embedding = one.embedding + one.embedding FROM segments AS one, segments AS twice"
        assert execute(table, kept + " WHERE one.id = 1 AND twice.id = 99") == [(True,)]

    def test_a_zero_vector_is_not_taken(self, table, settings) -> None:
        execute(table, "UPDATE segments SET embedding = array_fill(0, ARRAY[48])::vector WHERE id IN (1, 2)")
        assert_current(sync(definition(), settings))

    @pytest.mark.parametrize(
        ("before", "changed"),
        [
            ("ALTER TABLE segments ADD num bigint UNIQUE; UPDATE segments SET num = 26 - id", {"key": ["num"]}),
            ("ALTER TABLE segments ADD num text UNIQUE; UPDATE segments SET num = 'n' || id", {"key": ["num"]}),
            ("", {"vectors": {"line": "{words}"}}),
            ("ALTER TABLE segments ADD other vector(48)", {"column": "other"}),
            ("CREATE TABLE copy AS TABLE segments; ALTER TABLE copy ADD PRIMARY KEY (id)", {"table": "copy"}),
        ],
    )
    def test_another_key_name_column_or_table_is_adopted_anew(self, table, settings, before, changed) -> None:
        if before:
            execute(table, before)
        sync(definition(), settings)
        execute(table, "UPDATE segments SET embedding = NULL WHERE id = 3")
        where = {"table": changed.get("table", "segments"), "column": changed.get("column", "embedding")}
        one = definition(
            source={"table": "segments", "key": changed.get("key", ["id"])},
            destination={**where, "profile": "wide"},
            vectors=changed.get("vectors", {"base": "{words}"}),
        )
        for run in ("once", "twice"):
            collection = open_collection(one, settings)
            collection.ledger.full_scan(collection.source, allow_deletes=True)
            for batch in collection.ledger.work():
                commit(collection, batch, run)
        encoder = collection.encoder()
        for text, vector in execute(table, f"SELECT words, {where['column']}::real[] FROM {where['table']}"):
            assert np.allclose(vector, encoder.encode_documents([text])[0], atol=1e-3)
        for text, vector in execute(table, "SELECT text, embedding::real[] FROM embeddings.segments"):
            assert np.allclose(vector, encoder.encode_documents([text])[0], atol=1e-3)
        found = coverage(table, collection.model)
        assert (found.items, found.missing, found.stale, found.orphans) == (25, 0, 0, 0)
        key = "19" if "26" in before else "n7" if before.startswith("ALTER TABLE segments ADD num text") else "7"
        assert search(one, settings, words(7))[0].item_key == key

    def test_a_column_belongs_to_one_collection(self, table, settings) -> None:
        sync(definition(), settings)
        with pytest.raises(ConfigurationError, match="destination of another collection"):
            open_collection(definition(name="second"), settings)

    @pytest.mark.parametrize("name", ["line", "100% odd {name}", 'in "quotes"'])
    def test_odd_names_and_domains(self, database, settings, name) -> None:
        quoted = '"' + name.replace('"', '""') + '"'
        execute(database, "CREATE DOMAIN lang AS text NOT NULL CHECK (VALUE <> '')")
        # One statement at a time, without parameters: `%` is meant as it is.
        for statement in (
            f"CREATE TABLE {quoted} ({quoted} text PRIMARY KEY, words text, spoken lang, vec vector(32))",
            f"INSERT INTO {quoted} VALUES ('a%s', 'one', 'en', NULL), ('b''c', 'two', 'en', NULL)",
        ):
            execute(database, statement)
        destination = {"table": quoted, "key": [name], "column": "vec", "profile": "test"}
        one = definition(source={"table": quoted, "key": [name]}, columns=[], destination=destination)
        collection = sync(one, settings)
        expand(collection, candidate_profile(collection, "wide"))
        backfill_all(collection)
        swap(collection, "swap")
        execute(database, f"UPDATE {quoted} SET words = 'three' WHERE words = 'one'")
        current = sync(one, settings, "later")
        for text, vector in execute(database, f"SELECT words, vec::real[] FROM {quoted}"):
            assert np.allclose(vector, current.encoder().encode_documents([text])[0], atol=1e-3)

    def test_a_transaction_that_holds_rows_is_given_way_to(self, table, settings) -> None:
        collection = open_collection(definition(), settings)
        with table.connect() as holding:
            holding.execute("SELECT FROM segments WHERE id = 21 FOR UPDATE")
            commit = threading.Thread(target=commit_all, args=(collection,))
            commit.start()
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            deadline = time.monotonic() + 60
            while execute(table, waiting) == [(0,)] and time.monotonic() < deadline:
                time.sleep(0.02)
            holding.execute("UPDATE segments SET words = 'from the other side' WHERE id = 22")  # a deadlock otherwise
            holding.commit()
        commit.join()
        assert_current(sync(definition(), settings, "later"))

    def test_a_time_that_our_own_writing_moves_ends_nowhere(self, table, settings) -> None:
        execute(table, "ALTER TABLE segments ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now()")
        execute(
            table,
            "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN NEW.updated_at = clock_timestamp(); RETURN NEW; END $$",
        )
        execute(table, "CREATE TRIGGER touch BEFORE UPDATE ON segments FOR EACH ROW EXECUTE FUNCTION touch()")
        source = {"table": "segments", "key": ["id"], "updated_at": "updated_at"}
        one = definition(source=source, columns=["video", "updated_at"])  # in the payload even
        sync(one, settings)
        for run in ("second", "third"):
            collection = sync(one, settings, run)
        assert collection.ledger.incremental_scan(collection.source).changed == 0 and collection.ledger.work() == {}
        assert_current(collection)

    def test_composite_keys_another_schema_and_other_key_names(self, database, settings) -> None:
        execute(database, "CREATE SCHEMA app")
        execute(
            database,
            'CREATE TABLE app."Clips" ("Tmdb" int, kind text, words text, vec halfvec(32), UNIQUE (kind, "Tmdb"))',
        )
        execute(database, "INSERT INTO app.\"Clips\" VALUES (1, 'tv', 'one', NULL), (1, 'film', 'two', NULL)")
        execute(database, 'CREATE VIEW clips AS SELECT "Tmdb" AS id, kind, words FROM app."Clips"')
        one = definition(
            name="clips",
            source={"table": "clips", "key": ["id", "kind"]},
            columns=[],
            destination={"table": "app.Clips", "key": ["Tmdb", "kind"], "column": "vec", "profile": "test"},
        )
        sync(one, settings)
        rows = execute(database, 'SELECT words, vec::real[] FROM app."Clips"')
        encoder = open_collection(one, settings).encoder()
        for text, vector in rows:
            assert np.allclose(vector, encoder.encode_documents([text])[0], atol=1e-3)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("ALTER TABLE segments RENAME TO gone", "'segments', which is not in"),
            ("ALTER TABLE segments RENAME COLUMN embedding TO other", "has no column 'embedding'"),
            ("ALTER TABLE segments ALTER COLUMN embedding TYPE real[] USING NULL", "is of type _float4"),
            ("ALTER TABLE segments ALTER COLUMN embedding TYPE vector", "has no dimension"),
            ("ALTER TABLE segments ALTER COLUMN embedding TYPE vector(3) USING NULL", "is a vector(3)"),
            ("DELETE FROM segments WHERE id > 20; ALTER TABLE segments ALTER embedding SET NOT NULL", "is NOT NULL"),
            ("ALTER TABLE segments DROP CONSTRAINT segments_pkey", "no unique index on (id)"),
        ],
    )
    def test_a_column_that_does_not_do_is_one_line(self, table, settings, change, said) -> None:
        execute(table, "DROP INDEX segments_embedding")
        execute(table, change)
        with pytest.raises(ConfigurationError) as caught:
            open_collection(definition(), settings)
        assert said in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("attributes", "said"),
        [
            ({"profile": "wide"}, "leave `profile:` out"),
            ({"storage": "vector"}, "leave `storage:` out"),
            ({"vectors": {"a": "{words}", "b": "{words}"}}, "one vector name"),
            ({"chunk": {"characters": 100}}, "no `chunk:`"),
            ({"source": {"table": "segments", "key": ["id"], "url": "postgresql://x"}}, "no `source.url:`"),
            ({"destination": {"table": "segments", "key": ["a", "b"], "profile": "wide"}}, "a column for each"),
        ],
    )
    def test_a_definition_that_contradicts_itself_is_refused(self, attributes, said) -> None:
        with pytest.raises(ValueError, match=said):
            definition(**attributes)


class TestPhases:
    @pytest.mark.parametrize("name", ["test", "widest", "other"])
    def test_expand_backfill_swap_roll_back_swap_contract(self, table, settings, name) -> None:
        one = definition() if name != "other" else definition(destination={"table": "segments", "profile": "wide"})
        collection = sync(one, settings)
        dimension = collection.definition.attributes.profiles[name].dimensions
        begun = expand(collection, candidate_profile(collection, name))
        assert f"embedding_{dimension} vector({dimension})" in columns(table)
        assert len(indexes(table)) == 1  # the old one stays and serves
        assert search(one, settings, words(7))[0].item_key == "7"
        backfill_all(collection)
        done = swap(collection, "swap")
        assert done.gate is not None and (done.gate.missing, done.gate.recall_at_10) == (0, 1.0)
        current = open_collection(one, settings)
        assert current.fingerprint == begun.candidate.destination.fingerprint
        assert {f"embedding vector({dimension})", "embedding_previous vector(48)"} < set(columns(table))
        assert [line.split(" ON ")[0].split()[-1] for line in indexes(table)] == [
            "segments_embedding", "segments_embedding_previous",
        ]  # fmt: skip
        assert "(embedding vector_cosine_ops) WITH (lists='2')" in indexes(table)[0]
        assert_current(current)
        assert search(one, settings, words(7))[0].item_key == "7"
        execute(table, "UPDATE segments SET words = 'written after the swap' WHERE id = 2")
        execute(table, "INSERT INTO segments (id, words) VALUES (77, 'inserted after the swap')")
        current = sync(one, settings, "after")
        assert_current(current)

        assert roll_back(current, "back") is not None
        assert {"embedding vector(48)", f"embedding_{dimension} vector({dimension})"} < set(columns(table))
        assert_current(open_collection(one, settings))
        assert "lists='2'" in indexes(table)[0] and len(indexes(table)) == 2

        swap(open_collection(one, settings), "again")
        with pytest.raises(ModelChangeError, match="grace period"):
            contract(open_collection(one, settings))
        contract(open_collection(one, settings), now=True)
        assert open_change(open_collection(one, settings)) is None
        assert columns(table) == [
            f"embedding vector({dimension})", "id bigint", "note text", "video text", "words text",
        ]  # fmt: skip
        assert len(indexes(table)) == 1
        assert_current(open_collection(one, settings))

    def test_roll_back_before_the_swap_drops_only_the_new_column(self, table, settings) -> None:
        collection = sync(definition(), settings)
        before = execute(table, "SELECT * FROM segments ORDER BY id"), columns(table), indexes(table)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        assert roll_back(collection, "back") is None
        assert (execute(table, "SELECT * FROM segments ORDER BY id"), columns(table), indexes(table)) == before

    def test_rows_that_change_while_a_migration_is_open_are_right_under_both(self, table, settings) -> None:
        one = definition()
        collection = sync(one, settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        execute(table, "UPDATE segments SET words = 'changed meanwhile' WHERE id = 2")
        execute(table, "DELETE FROM segments WHERE id = 3")
        execute(table, "INSERT INTO segments (id, words) VALUES (77, 'inserted meanwhile')")
        execute(table, "DELETE FROM segments WHERE id = 11")
        collection = sync(one, settings, "meanwhile")
        execute(table, "DELETE FROM segments WHERE id = 12")  # not seen by a scan yet: the swap does not wait for it
        swap(collection, "swap")
        assert_current(sync(one, settings, "after"))

    def test_a_backfill_killed_before_it_marks_its_batches_finds_their_files(self, table, settings) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))

        def killed() -> None:
            raise RuntimeError("killed")

        with at_failpoint("backfill.write", killed), pytest.raises(RuntimeError, match="killed"):
            backfill_all(collection)
        DeterministicEncoder.reset()
        backfill_all(collection)
        assert DeterministicEncoder.texts_encoded == {}
        swap(collection, "swap")
        collection = open_collection(definition(), settings)
        assert audit(collection).agree
        shutil.rmtree(settings.state_dir / "lake" / collection.folder("embeddings"))
        assert audit(collection).batches_without_lake_file == len(collection.ledger.batches())

    def test_a_backfill_that_is_tried_again_notes_the_file_that_it_wrote(self, table, settings, monkeypatch) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        execute(table, "UPDATE segments SET words = 'edited since' WHERE id = 2")
        collection.ledger.full_scan(collection.source)
        [batch] = collection.ledger.work()
        run_without_shadows(collection, batch, "edit")  # without what backfills the model beside it
        endings = iter([True])

        def ended() -> None:
            if next(endings, False):
                raise psycopg.OperationalError("the server ended it")

        monkeypatch.setattr(retry, "OUTAGE_FIRST_WAIT_SECONDS", 0)
        with at_failpoint("backfill.write", ended):
            assert len(list(phases.backfill(collection, collection.ledger.batches(), "second"))) == 3
        files = "SELECT file FROM embeddings.backfill WHERE batch = %s AND fingerprint = %s"
        shadows = collection.ledger.shadow_models()[0].destination.fingerprint
        assert execute(table, files, [batch, shadows]) == [("second.parquet",)]
        swap(collection, "swap")
        assert audit(open_collection(definition(), settings)).agree

    def test_a_model_that_is_dropped_during_its_backfill_is_said_to_be_gone(self, table, settings) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        dropped_before = at_failpoint("backfill.group", lambda batches: roll_back(collection, "dropped"))
        with dropped_before, pytest.raises(StaleRunError, match="kept no longer"):
            backfill_all(collection)

    @pytest.mark.usefixtures("restless_autovacuum")
    def test_an_autovacuum_of_the_table_gives_way_to_the_swap(self, table, settings) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        execute(
            table,
            """ALTER TABLE segments ALTER note SET STORAGE PLAIN;
               ALTER TABLE segments SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1,
                   autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1);
               UPDATE segments SET note = repeat('a row of a page', 400)""",
        )
        at_work = """SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                     AND backend_type = 'autovacuum worker' AND query ~ 'VACUUM (ANALYZE )?public.segments'"""
        wait_until(lambda: bool(execute(table, at_work)), 90)
        worker = execute(table, at_work)  # busy for half a minute
        swap(collection, "swap")
        assert worker and execute(table, at_work) != worker
        assert_current(open_collection(definition(), settings))

    def test_the_tables_settings_and_other_values_are_as_before(self, table, settings) -> None:
        execute(table, "ALTER TABLE segments SET (toast_tuple_target = 2000, fillfactor = 90)")
        execute(table, "UPDATE segments SET note = repeat('mine', 250) WHERE id < 9")
        collection = sync(definition(), settings)
        begun = expand(collection, candidate_profile(collection, "widest"))
        candidate = collection.with_model(begun.candidate).model.destination
        options = "SELECT array_to_string(reloptions, ',') FROM pg_class WHERE oid = 'segments'::regclass"
        with table.connect(autocommit=True) as connection, candidate.prepared(connection):
            assert execute(table, options) == [("toast_tuple_target=2000,fillfactor=90",)]  # nothing is won
        execute(table, "UPDATE segments SET note = NULL")
        with table.connect(autocommit=True) as connection:
            killed = candidate.prepared(connection)
            killed.__enter__()
            [(lowered,)] = execute(table, options)
            destination = int(re.findall(r"toast_tuple_target=(\d+)", lowered)[0])
            assert 128 <= destination < 4 * 320
        backfill_all(collection)
        [(after,)] = execute(table, options)
        assert set(after.split(",")) == {"fillfactor=90", "toast_tuple_target=2000"}

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            ("CREATE VIEW near AS SELECT id FROM segments ORDER BY embedding <=> '[1]' LIMIT 1", "view near"),
            ("ALTER TABLE segments ADD COLUMN dims int GENERATED ALWAYS AS (vector_dims(embedding)) STORED", "dims"),
            (
                "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC "
                "SELECT count(embedding) FROM segments; END",
                "function f()",
            ),
            ("CREATE PUBLICATION p FOR TABLE segments (id, embedding)", "publication"),
            ("CREATE INDEX ON segments USING hnsw ((embedding::halfvec(48)) halfvec_l2_ops)", "index"),
            ("ALTER TABLE segments ADD COLUMN embedding_32 text", "'embedding_32' already"),
            ("ALTER TABLE segments ADD COLUMN embedding_previous int", "'embedding_previous' already"),
        ],
    )
    def test_what_would_follow_the_old_column_is_named_before_anything_starts(
        self, table, settings, made, said
    ) -> None:
        collection = sync(definition(), settings)
        execute(table, made)
        before = columns(table)
        with pytest.raises(ModelChangeError) as caught:
            expand(collection, candidate_profile(collection, "test"))
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert columns(table) == before and open_change(collection) is None

    def test_two_models_of_one_dimension_never_share_a_column(self, table, settings) -> None:
        narrow = {**PROFILE, "name": "narrow", "document_prompt": "passage: "}
        one = definition(profiles=by_name(PROFILE, WIDE, narrow))
        collection = sync(one, settings)
        add_model(collection, candidate_profile(collection, "test"))
        with pytest.raises(ModelChangeError, match="if another model has it"):
            add_model(collection, candidate_profile(collection, "narrow"))
        with pytest.raises(ModelChangeError, match="if another model has it"):
            expand(collection, candidate_profile(collection, "narrow"))
        assert_current(sync(one, settings, "later"))

    def test_a_view_made_meanwhile_stops_the_swap_and_the_way_back(self, table, settings) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        execute(table, "CREATE VIEW near AS SELECT id, embedding FROM segments")
        with pytest.raises(ModelChangeError, match="view near"):
            swap(collection, "swap")
        execute(table, "DROP VIEW near")
        swap(collection, "swap")
        execute(table, "CREATE VIEW near AS SELECT id, embedding FROM segments")
        with pytest.raises(ModelChangeError, match="view near"):
            roll_back(open_collection(definition(), settings), "back")
        execute(table, "CREATE VIEW former AS SELECT id, embedding_previous FROM segments")
        with pytest.raises(ModelChangeError, match="view former"):
            contract(open_collection(definition(), settings), now=True)
        assert_current(open_collection(definition(), settings))

    def test_a_previous_column_that_somebody_dropped_is_forgotten_by_contract(self, table, settings) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        swap(collection, "swap")
        execute(table, "ALTER TABLE segments DROP COLUMN embedding_previous CASCADE")
        execute(table, "UPDATE segments SET words = 'edited since' WHERE id = 2")
        with pytest.raises(PipelineError, match="profile contract --now"):
            sync(definition(), settings, "later")
        contract(open_collection(definition(), settings), now=True)
        assert_current(sync(definition(), settings, "later"))

    def test_vectors_outside_the_collection_are_not_dropped_unasked(self, table, settings) -> None:
        one = definition(
            source={"table": "segments", "key": ["id"], "where": "id > 5"},
            model_change={"grace_hours": 0},
        )
        collection = sync(one, settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        swap(collection, "swap")
        with pytest.raises(ModelChangeError, match="5 rows of segments have a vector in 'embedding_previous'"):
            contract(open_collection(one, settings))
        contract(open_collection(one, settings), now=True)

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            ("ALTER INDEX segments_embedding RENAME TO " + "x" * 60, "too long"),
            ("CREATE TABLE segments_embedding_previous ()", "'segments_embedding_previous' already"),
            ("CREATE INDEX other ON segments (embedding)", "index other"),
        ],
    )
    def test_names_that_would_stop_the_swap_are_named_at_once(self, table, settings, made, said) -> None:
        collection = sync(definition(), settings)
        execute(table, made)
        with pytest.raises(ModelChangeError, match=said):
            expand(collection, candidate_profile(collection, "test"))

    def test_more_dimensions_than_an_index_like_theirs_takes_are_refused_at_once(self, table, settings) -> None:
        huge = {**PROFILE, "name": "huge", "dimensions": 2100}
        one = definition(profiles=by_name(PROFILE, WIDE, huge))
        collection = sync(one, settings)
        with pytest.raises(ModelChangeError, match="ivfflat takes up to 2000 dimensions of a vector"):
            expand(collection, candidate_profile(collection, "huge"))
        assert "embedding_2100" not in " ".join(columns(table))
        execute(table, "DROP INDEX segments_embedding")
        expand(collection, candidate_profile(collection, "huge"))

    @pytest.mark.usefixtures("superuser")
    def test_an_invalid_index_of_a_killed_build_is_made_again(self, table, settings) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        execute(
            table,
            "CREATE INDEX segments_embedding_32 ON segments USING ivfflat (embedding_32 vector_cosine_ops) "
            "WITH (lists = 2)",
        )
        execute(table, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'segments_embedding_32'::regclass")
        swap(collection, "swap")
        valid = "SELECT bool_and(indisvalid), count(*) FROM pg_index WHERE indrelid = 'segments'::regclass"
        assert execute(table, valid) == [(True, 3)]

    def test_a_role_that_may_not_write_or_does_not_own_the_table(self, table, settings) -> None:
        sync(definition(), settings)
        with plain_role(table, "guest") as url:
            execute(table, "GRANT SELECT ON segments TO guest")
            theirs = Settings(database_url=url, embeddings_state_dir=settings.embeddings_state_dir)
            execute(table, "UPDATE segments SET words = 'edited' WHERE id = 2")
            with pytest.raises(PipelineError, match="GRANT SELECT, UPDATE ON it"):
                sync(definition(), theirs, "later")
            execute(table, "GRANT UPDATE ON segments TO guest")
            collection = sync(definition(), theirs, "later")
            assert_current(collection)
            with pytest.raises(ModelChangeError, match="only the owner of segments"):
                expand(collection, candidate_profile(collection, "test"))
            assert "embedding_32" not in " ".join(columns(table))

    def test_a_role_from_which_row_level_security_hides_rows(self, table, settings) -> None:
        with plain_role(table, "tenant") as url:
            execute(table, "GRANT SELECT, UPDATE ON segments TO tenant")
            execute(table, "ALTER TABLE segments ENABLE ROW LEVEL SECURITY")
            execute(table, "CREATE POLICY own ON segments USING (id < 10)")
            theirs = Settings(database_url=url, embeddings_state_dir=settings.embeddings_state_dir)
            shown = {"table": "segments", "key": ["id"], "row_security": True}
            with pytest.raises(ConfigurationError, match=r"row-level security may hide rows of segments .* BYPASSRLS"):
                open_collection(definition(source=shown), theirs)

    def test_an_empty_column_of_a_failed_try_is_taken(self, table, settings) -> None:
        collection = sync(definition(), settings)
        execute(table, "ALTER TABLE segments ADD COLUMN embedding_32 vector(32)")
        expand(collection, candidate_profile(collection, "test"))
        backfill_all(collection)
        swap(collection, "swap")
        assert_current(open_collection(definition(), settings))

    @pytest.mark.parametrize(
        ("bounds", "expected"),
        [
            ((own_table, {"TABLE_TEXTS": 1, "TABLE_SECONDS": 0.0}), [[0, 1, 2]]),  # what bounds our own tables
            ((column, {"COLUMN_TEXTS": 1}), [[0], [1], [2]]),
            ((column, {"COLUMN_SECONDS": 0.0}), [[0], [1], [2]]),
        ],
    )
    def test_as_many_batches_are_written_together_as_the_bounds_allow(
        self, table, settings, bounds, expected, monkeypatch
    ) -> None:
        collection = sync(definition(), settings)
        expand(collection, candidate_profile(collection, "test"))
        module, limits = bounds
        for name, value in limits.items():
            monkeypatch.setattr(module, name, value)
        with written_together() as together:
            backfill_all(collection)
        assert together == expected
        assert swap(collection, "swap").gate is not None


@pytest.mark.slow
class TestExample:
    @pytest.mark.timeout(900)  # eight commands, most of which load a model
    def test_1536_to_384_as_the_page_says(self, settings, tmp_path) -> None:
        """The commands of docs/how-to/your-own-column.md, on the example's own table."""
        defs = tmp_path / "segments"
        shutil.copytree(PROJECT / "examples" / "segments", defs)
        environment = {
            **os.environ,
            "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
            "EMBEDDINGS_DEFS_DIR": str(defs),
            "DATABASE_URL": revealed(settings.database_url) or "",
        }
        page = (PROJECT / "docs" / "how-to" / "your-own-column.md").read_text(encoding="utf-8")
        commands = re.findall(r"^\.venv/bin/python (.+?)(?: +#.*)?$", page, re.MULTILINE)
        said = {}
        for command in commands:
            command_line = [sys.executable, *shlex.split(command)]
            done = subprocess.run(
                command_line, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said[command.removeprefix("-m embeddings_pipeline ")] = done.stdout + done.stderr
        assert "1,160 items scanned: 1,160 new" in said["sync"]
        assert "50 texts embedded, 1,110 reused" in said["sync"]
        assert "RENAME COLUMN" in said["profile plan minilm"]
        assert "former → minilm: 1,160 texts embedded" in said["profile switch minilm --yes --write"]
        assert "profile: minilm " in (defs / "defs.yaml").read_text(encoding="utf-8")
        assert "Apollo 13" in said['search "a journey to the moon by rocket"'].splitlines()[0]
        assert re.search(r"embedding +\| vector\(384\)", said['psql -c "\\d segments"'])


def backfill_all(collection: Collection) -> None:
    for _, backfilled in phases.backfill(collection, collection.ledger.batches(), "backfill"):
        assert backfilled.complete
