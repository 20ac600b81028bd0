"""A column of the user's own table as the destination: adopting it, and keeping it current."""

import threading
import time

import numpy as np
import pytest

from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.index.faiss_build import build as build_faiss
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.model_change.phases import expand, swap
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline.search import nearest, selectivity
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.model_change import commit, commit_all
from embeddings_pipeline_tests.support.segments import (
    assert_current,
    backfill_all,
    columns,
    definition,
    sync,
    words,
)
from embeddings_pipeline_tests.support.workbench import execute


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

    @pytest.mark.parametrize("compared_below", [50_000, 0])
    def test_they_are_filtered_like_others(self, table, settings, monkeypatch, compared_below) -> None:
        execute(table, "UPDATE segments SET video = 'v' || id % 5")
        one = definition(filters={"video": "text"}, index={"method": "hnsw"})
        collection = sync(one, settings)
        ensure_index(table, collection.model.destination, one.attributes.index, ["base"])
        build_faiss(table, collection.model.destination, settings.state_dir / "faiss")
        monkeypatch.setattr(nearest, "ALL_COMPARED_BELOW", compared_below)
        monkeypatch.setattr(selectivity, "LOOKED_UP", 1e9 if compared_below == 0 else 0.0)
        for index in ("pgvector", "faiss"):
            hits = search(one, settings, words(7), k=5, where={"video": ["v2", "v3"]}, index=index)
            assert len(hits) == 5 and {hit.item["video"] for hit in hits} <= {"v2", "v3"}
            assert hits[0].item_key == "7"
            assert len(similar(one, settings, 7, k=5, where={"video": "v1"}, index=index)) == 5
        assert hits.explanation.legs[0].answered_by == "faiss"

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
