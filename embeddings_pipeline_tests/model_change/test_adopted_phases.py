"""Changing the model of a column of the user's own table."""

import re
import shutil

import psycopg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, PipelineError, StaleRunError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.model_change import phases
from embeddings_pipeline.model_change.phases import add_model, contract, expand, roll_back, swap
from embeddings_pipeline.model_change.state import candidate_profile, open_change
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.destination import column
from embeddings_pipeline.store.destination import table as own_table
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.model_change import WIDE, written_together
from embeddings_pipeline_tests.support.segments import (
    assert_current,
    backfill_all,
    columns,
    definition,
    indexes,
    sync,
    words,
)
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    execute,
    plain_role,
    run_without_shadows,
    wait_until,
)


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
