"""Changing the model: three phases, both ways, with landings, edits and kills in between."""

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy
from psycopg import errors

from embeddings_pipeline.config.definition import Collection
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, MigrationError, OutageError, ProfileError, StaleRunError
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.model_change import backfill as fill
from embeddings_pipeline.model_change import phases as migration
from embeddings_pipeline.model_change.backfill import embed_beside, fill_batch, fill_beside
from embeddings_pipeline.model_change.phases import (
    Migration,
    add_model,
    contract,
    expand,
    open_migration,
    progress,
    remove_model,
    roll_back,
    swap,
    target_profile,
    unfilled_batches,
)
from embeddings_pipeline.pipeline.collection import OpenCollection, open_collection
from embeddings_pipeline.pipeline.commit import land_batch
from embeddings_pipeline.pipeline.steps import embed_batches, read_items, render_texts
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    execute,
    films,
    make_films,
    plain_role,
    run_batch,
    sync_once,
)
from embeddings_pipeline_tests.support.workbench import collection as plain_collection

WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
OTHER = {**PROFILE, "name": "other", "document_prompt": "passage: "}  # other vectors of the same dimension
NEXT = pytest.mark.parametrize("name", ["wide", "other"])


def collection(**attributes: Any) -> Collection:
    return plain_collection(**{"profiles": {"wide": WIDE, "other": OTHER}, **attributes})


@pytest.fixture(autouse=True)
def _fresh_encoder() -> None:
    DeterministicEncoder.reset()


@pytest.fixture
def opened(database: Database, settings: Settings) -> OpenCollection:
    """Twenty-five films in three batches, landed."""
    make_films(database, films(25))
    return sync_once(collection(), settings)[0]


def begin(opened: OpenCollection, name: str) -> Migration:
    return expand(opened, target_profile(opened, name))


def backfill(opened: OpenCollection, *batches: int) -> int:
    filled = migration.backfill(opened, batches or opened.ledger.batches(), "backfill")
    return sum(one.embedded for _, one in filled)


def written_together(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The batches of each transaction that a backfill will write."""
    write, together = fill._write_group, list[list[int]]()

    def watched(model: OpenCollection, connection: psycopg.Connection, group: Any, *lake: Any) -> Any:
        if group:
            together.append([made.batch for made in group])
        return write(model, connection, group, *lake)

    monkeypatch.setattr(fill, "_write_group", watched)
    return together


def again(opened: OpenCollection) -> OpenCollection:
    return open_collection(opened.collection, opened.settings)


def land(opened: OpenCollection, batch: int, run: str) -> None:
    """The four steps as a run does them, with the models beside the active one."""
    read_items(opened, batch, run)
    render_texts(opened, batch, run)
    for _ in embed_batches(opened, [batch], run):
        pass
    embed_beside(opened.beside(), [batch], run)
    land_batch(opened, batch, run)
    fill_beside(opened.beside(), batch, run)


def land_all(opened: OpenCollection, run: str = "later") -> None:
    opened.ledger.scan(opened.source)
    for batch in opened.ledger.work():
        land(opened, batch, run)


def assert_whole(opened: OpenCollection) -> None:
    """Every text has the vector that its model makes of it, in each model, and the view shows the active one."""
    for model in [again(opened), *again(opened).beside()]:
        query = f"""SELECT text.text, vector.embedding::real[] FROM embeddings.films_text AS text
                    LEFT JOIN embeddings.{model.active.table.name} AS vector ON vector.text_id = text.id"""
        rows = execute(opened.database, query)
        count = f"SELECT count(*) FROM embeddings.{model.active.table.name}"
        assert execute(opened.database, count) == [(len(rows),)]
        assert all(vector is not None for _, vector in rows), model.profile.name
        expected = model.encoder().encode_documents([text for text, _ in rows])
        assert np.allclose(np.array([vector for _, vector in rows]), expected, atol=1e-3), model.profile.name
    shown = execute(opened.database, "SELECT text, embedding::real[] FROM embeddings.films")
    expected = again(opened).encoder().encode_documents([text for text, _ in shown])
    assert np.allclose(np.array([vector for _, vector in shown]), expected, atol=1e-3)


def assert_whole_but(opened: OpenCollection, marker: str) -> None:
    execute(opened.database, f"UPDATE films SET overview = 'mended' WHERE overview = '{marker}'")
    land_all(again(opened))
    assert_whole(opened)


class TestPhases:
    @NEXT
    def test_expand_backfill_swap_roll_back_swap_contract(self, database, settings, opened, name) -> None:
        former = opened.fingerprint
        begun = begin(opened, name)
        assert (begun.phase, progress(opened, begun.next).filled) == ("expanded", 0)
        assert again(opened).fingerprint == former  # the old one serves
        assert backfill(opened) == 25
        assert progress(opened, begun.next).percent == 100.0
        done = swap(opened, "swap")
        assert done.gate is not None and done.gate.missing == 0 and done.gate.recall_at_10 == 1.0
        following = again(opened)
        assert following.profile.name == name and following.fingerprint == begun.next.table.fingerprint
        assert search(opened.collection, settings, "Film 7 number 7")[0].item_key == "7"
        assert_whole(opened)
        assert roll_back(following, "back") is not None
        assert again(opened).fingerprint == former
        assert_whole(opened)
        swap(again(opened), "swap again")
        with pytest.raises(MigrationError, match="grace period"):
            contract(again(opened))
        contract(again(opened), now=True)
        assert open_migration(opened) is None
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]
        assert execute(database, f"SELECT to_regclass('embeddings.films_vector_{former}')") == [(None,)]
        assert_whole(opened)
        assert audit(again(opened)).agree
        assert again(opened).ledger.work() == {}

    def test_a_backfill_reads_nothing_from_the_source(self, database, opened) -> None:
        begin(opened, "wide")
        execute(database, "DROP TABLE films CASCADE")
        assert backfill(opened) == 25

    @pytest.mark.parametrize(
        ("bounds", "expected"),
        [
            ({}, [[0, 1, 2]]),
            ({"BATCHES_TOGETHER": 2}, [[0, 1], [2]]),
            ({"TEXTS_TOGETHER": 11}, [[0, 1], [2]]),
            ({"TEXTS_TOGETHER": 10}, [[0], [1], [2]]),
            ({"SECONDS_TOGETHER": 0.0}, [[0], [1], [2]]),
        ],
    )
    def test_as_many_batches_are_written_together_as_the_bounds_allow(
        self, opened, bounds, expected, monkeypatch
    ) -> None:
        begin(opened, "wide")
        for name, value in bounds.items():
            monkeypatch.setattr(fill, name, value)
        together = written_together(monkeypatch)
        assert backfill(opened) == 25
        assert together == expected
        assert_whole(opened)

    def test_an_outage_is_tried_three_times(self, opened, monkeypatch) -> None:
        begin(opened, "wide")
        monkeypatch.setattr("embeddings_pipeline.model_change.backfill.FIRST_WAIT_SECONDS", 0)
        encode, failures = DeterministicEncoder.encode_documents, iter([1, 1, 0, 0, 1, 1, 1])  # one is the canaries'

        def fails_at_first(encoder: DeterministicEncoder, texts: list[str]) -> Any:
            if next(failures, False):
                raise OutageError("the service does not answer")
            return encode(encoder, texts)

        monkeypatch.setattr(DeterministicEncoder, "encode_documents", fails_at_first)
        with pytest.raises(OutageError):
            backfill(opened, 0, 1)  # the first batch at its third try; the second never
        assert unfilled_batches(opened, opened.ledger.beside()[0]) == [1, 2]
        assert backfill(opened) == 15

    def test_what_lands_while_the_next_model_is_checked_does_not_stop_the_swap(
        self, database, opened, monkeypatch
    ) -> None:
        begin(opened, "wide")
        backfill(opened)
        measure = migration.measure_gate

        def landed_meanwhile(former: OpenCollection, following: OpenCollection) -> Any:
            execute(database, "UPDATE films SET overview = 'new words' WHERE id IN (3, 17)")
            opened.ledger.scan(opened.source)
            for batch in opened.ledger.work():  # what fills the model beside it comes last, and has not come yet
                run_batch(again(opened), batch, "meanwhile")
            gate = measure(former, following)
            assert (gate.texts, gate.missing, gate.refused) == (25, 0, [])
            return gate

        monkeypatch.setattr(migration, "measure_gate", landed_meanwhile)
        swap(opened, "swap")
        assert again(opened).profile.name == "wide"
        assert_whole(opened)

    def test_a_vector_that_is_gone_from_a_batch_that_counts_as_whole_stops_the_swap(
        self, database, opened, monkeypatch
    ) -> None:
        begun = begin(opened, "wide")
        backfill(opened)
        measure = migration.measure_gate

        def deleted(former: OpenCollection, following: OpenCollection) -> Any:
            execute(database, f"DELETE FROM embeddings.{begun.next.table.name} WHERE text_id % 9 = 0")
            return measure(former, following)

        monkeypatch.setattr(migration, "measure_gate", deleted)
        with pytest.raises(MigrationError, match=r"of 25 texts have no vector"):
            swap(opened, "swap")

    def test_the_gate_measures_the_index_where_searches_would_do_without_it_too(self, database, settings) -> None:
        make_films(database, films(3000))
        one = collection(items_per_batch=1000, index={"method": "none"})
        opened = sync_once(one, settings)[0]
        begun = begin(opened, "wide")
        backfill(opened)
        following = opened.with_model(begun.next)
        table = f"embeddings.{begun.next.table.name}"
        execute(database, f"ANALYZE {table}")
        assert migration.measure_gate(opened, following).recall_at_10 == 1.0  # without an index, exact
        execute(
            database,
            f"CREATE INDEX ON {table} USING ivfflat (embedding halfvec_cosine_ops) WITH (lists = 1500)",
        )
        gate = migration.measure_gate(opened, following)
        assert gate.recall_at_10 < 0.95
        assert gate.refused == [f"its index finds {gate.recall_at_10:.1%} of the nearest ten, and 95.0% are asked for"]

    def test_a_model_that_can_be_loaded_no_longer_does_not_take_over(self, database, opened, monkeypatch) -> None:
        add_model(opened, target_profile(opened, "wide"))
        backfilled = opened.with_model(opened.ledger.beside()[0])
        for batch in opened.ledger.batches():
            fill_batch(backfilled, batch, "added")

        def gone(profile: Any) -> Any:
            raise ProfileError("its weights are not here")

        with monkeypatch.context() as patched:
            patched.setattr(migration, "load_encoder", gone)
            with pytest.raises(ProfileError, match="weights are not here"):
                begin(opened, "wide")
            assert open_migration(opened) is None
        begin(opened, "wide")
        with monkeypatch.context() as patched:
            patched.setattr(migration, "load_encoder", gone)
            with pytest.raises(ProfileError, match="weights are not here"):
                swap(opened, "swap")
        assert again(opened).profile.name == "test"
        swap(opened, "swap")

    @pytest.mark.parametrize(("times", "tries"), [(1, 4), (2, 5), (9, 4)])
    def test_a_database_that_ends_our_sessions_is_tried_three_times(
        self, database, opened, times, tries, monkeypatch, caplog
    ) -> None:
        begin(opened, "wide")
        monkeypatch.setattr(fill, "FIRST_WAIT_SECONDS", 0)
        monkeypatch.setattr(fill, "BATCHES_TOGETHER", 1)
        write, tried, endings = fill._write_group, [], iter(range(times))

        def ended(model: OpenCollection, connection: psycopg.Connection, group: Any, *lake: Any) -> Any:
            if group:
                tried.append(group[0].batch)
            if group and group[0].batch == 1 and next(endings, None) is not None:
                execute(
                    database,
                    """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE datname = current_database() AND pid <> pg_backend_pid()""",
                )
            return write(model, connection, group, *lake)

        monkeypatch.setattr(fill, "_write_group", ended)
        if times > 2:
            with pytest.raises(psycopg.OperationalError):
                backfill(opened)
            monkeypatch.setattr(fill, "_write_group", write)
            assert unfilled_batches(opened, opened.ledger.beside()[0]) == [1, 2]
        backfill(opened)
        assert len(tried) == tries and caplog.text.count("trying again in 0") == min(times, 2)
        assert_whole(opened)

    def test_before_a_swap_a_roll_back_drops_the_next_model(self, database, opened) -> None:
        begun = begin(opened, "wide")
        backfill(opened, 0)
        assert roll_back(opened, "back") is None
        assert open_migration(opened) is None
        assert opened.ledger.beside() == []
        assert execute(database, f"SELECT to_regclass('embeddings.{begun.next.table.name}')") == [(None,)]
        begin(opened, "wide")
        assert backfill(opened) == 15  # and it can begin anew: what was encoded is in the lake

    def test_a_step_done_twice_changes_nothing(self, opened) -> None:
        assert begin(opened, "wide") == begin(opened, "wide")
        assert backfill(opened) == 25
        assert backfill(opened) == 0
        swap(opened, "swap")
        with pytest.raises(MigrationError, match="is the active model already"):
            swap(again(opened), "swap")


class TestRefused:
    def test_the_wrong_order_is_refused_in_one_line_and_changes_nothing(self, opened) -> None:
        for step in (lambda: backfill(opened), lambda: swap(opened, "x"), lambda: roll_back(opened, "x")):
            with pytest.raises(MigrationError, match="no change of its model is open"):
                step()
        with pytest.raises(MigrationError, match="nothing has been swapped"):
            contract(opened)
        begin(opened, "wide")
        backfill(opened, 0)
        with pytest.raises(MigrationError, match="2 of 3 batches are not backfilled"):
            swap(opened, "x")
        with pytest.raises(MigrationError, match="nothing has been swapped"):
            contract(opened)
        with pytest.raises(MigrationError, match=r"a change from test .* to wide .* is open"):
            begin(opened, "other")
        assert again(opened).profile.name == "test"

    def test_the_active_model_an_unknown_and_an_unloadable_one(self, database, opened) -> None:
        with pytest.raises(MigrationError, match="is its active model already"):
            begin(opened, "test")
        with pytest.raises(ProfileError, match="There is no profile 'nope'"):
            begin(opened, "nope")
        broken = {**PROFILE, "name": "broken", "model": "no_such_module:Encoder"}
        other = OpenCollection(**{**vars(opened), "collection": collection(profiles={"broken": broken})})
        with pytest.raises(ProfileError, match="cannot be loaded"):
            begin(other, "broken")
        assert execute(database, "SELECT count(*) FROM embeddings.migration") == [(0,)]
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    def test_what_was_the_active_model_when_it_was_looked_at(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        swap(opened, "swap")
        contract(again(opened), now=True)
        with pytest.raises(MigrationError, match="its models have just been changed"):
            begin(opened, "other")  # `opened` is of before
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    def test_a_collection_without_vectors(self, database, settings) -> None:
        make_films(database, films(3))
        with pytest.raises(MigrationError, match="nothing to migrate"):
            begin(open_collection(collection(), settings), "wide")

    def test_a_strangers_table_of_that_name(self, database, settings, opened) -> None:
        begun = begin(opened, "wide")
        roll_back(opened, "x")
        execute(database, f"CREATE TABLE embeddings.{begun.next.table.name} (mine int)")
        with pytest.raises(MigrationError, match="rename or drop it"):
            begin(opened, "wide")

    def test_too_small_a_disk(self, opened, monkeypatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(MigrationError, match="GB free; make room first"):
            begin(opened, "wide")
        assert opened.ledger.beside() == []

    def test_more_dimensions_than_an_index_takes(self, opened) -> None:
        huge = {**PROFILE, "name": "huge", "dimensions": 5000}
        other = OpenCollection(**{**vars(opened), "collection": collection(profiles={"huge": huge})})
        with pytest.raises(MigrationError, match="up to 4000 dimensions"):
            begin(other, "huge")

    def test_a_text_that_the_next_model_cannot_encode_is_excused_and_no_other(self, database, settings, opened) -> None:
        opened = open_collection(collection(quarantine={"error_percent": 5}), settings)
        execute(database, "UPDATE films SET overview = 'POISON' WHERE id = 3")
        land_all(opened)
        begin(opened, "wide")
        DeterministicEncoder.fail_on = "POISON"
        assert backfill(opened) == 24
        assert opened.ledger.quarantine_entries() == []
        [entry] = opened.ledger.quarantine_entries(every_model=True)
        assert (entry.item_key, entry.items, entry.profile) == ("3", 1, "wide")
        done = swap(opened, "swap")
        assert done.gate is not None and (done.gate.missing, done.gate.quarantined) == (0, 1)
        execute(database, f"DELETE FROM embeddings.{again(opened).active.table.name} WHERE text_id = 5")
        roll_back(again(opened), "back")
        DeterministicEncoder.reset()
        swap(again(opened), "swap")  # what was deleted by hand is filled first
        assert_whole_but(opened, "POISON")

    def test_a_model_that_encodes_too_few_texts_does_not_take_over(self, opened) -> None:
        begin(opened, "wide")
        DeterministicEncoder.nan_on = "number 1"
        assert backfill(opened) == 14
        with pytest.raises(MigrationError, match=r"11 of 25 texts are in quarantine under it, more than 1 %"):
            swap(opened, "swap")

    def test_a_model_that_gives_no_numbers_is_refused_at_once(self, database, opened) -> None:
        DeterministicEncoder.nan_on = "plain sentence"
        with pytest.raises(ProfileError, match="not finite, or zero"):
            begin(opened, "wide")
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    def test_vectors_that_somebody_deleted_are_filled_before_a_swap_and_before_a_roll_back(
        self, database, opened
    ) -> None:
        begun = begin(opened, "wide")
        backfill(opened)
        execute(database, f"DELETE FROM embeddings.{begun.next.table.name} WHERE text_id IN (5, 6)")
        swap(opened, "swap")
        assert_whole(opened)
        execute(database, f"DELETE FROM embeddings.{begun.former.table.name} WHERE text_id IN (7, 8)")
        roll_back(again(opened), "back")
        assert_whole(opened)

    def test_steps_that_meet_end_in_one_line(self, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        before = open_migration(opened)
        swap(opened, "swap")
        stale = opened.with_model(before.next)
        with pytest.raises(StaleRunError, match="has become the active model"):
            fill_batch(stale, 0, "late")
        with opened.database.connect() as connection, pytest.raises(MigrationError, match="somebody else has gone on"):
            migration._enter(connection, before, "abandoned")
        roll_back(again(opened), "back")
        assert_whole(opened)

    def test_an_index_that_finds_too_little(self, opened, monkeypatch) -> None:
        begin(opened, "wide")
        backfill(opened)
        monkeypatch.setattr("embeddings_pipeline.model_change.gate.nearest_texts", lambda *_: [])
        with pytest.raises(MigrationError, match=r"its index finds 0\.0% .* goes on serving"):
            swap(opened, "swap")
        assert again(opened).profile.name == "test"

    def test_golden_queries_decide(self, database, settings, tmp_path) -> None:
        make_films(database, films(25))
        one = Collection(collection().config, tmp_path / "defs.yaml")
        opened = sync_once(one, settings)[0]
        golden = [{"query": f"Film {n} number {n}", "relevant": [n]} for n in range(1, 6)]
        (tmp_path / "golden_queries.jsonl").write_text("\n".join(map(json.dumps, golden)))
        begin(opened, "wide")
        backfill(opened)
        execute(
            database,
            f"""UPDATE embeddings.{opened.ledger.beside()[0].table.name} SET embedding =
                ('[1' || repeat(',0', 47) || ']')::halfvec""",
        )
        with pytest.raises(MigrationError, match="nDCG@10 of 5 golden queries drops from 1"):
            swap(opened, "swap")
        (tmp_path / "golden_queries.jsonl").write_text('{"query": "no items"}')
        for wrong in ('{"query": "no items"}', '{"query": "a", "relevant": "12"}', '{"query": "a", "relevant": []}'):
            (tmp_path / "golden_queries.jsonl").write_text(wrong)
            with pytest.raises(ConfigurationError, match=r"golden_queries\.jsonl, line 1"):
                swap(opened, "swap")
        roll_back(opened, "back")
        with pytest.raises(ConfigurationError, match="line 1"):
            begin(opened, "wide")


class TestBesideLandings:
    """While a migration is open, and after the swap until contract, both models are current."""

    @NEXT
    @pytest.mark.parametrize("swapped", [False, True])
    def test_new_edited_and_deleted_rows_reach_both_models(self, database, opened, name, swapped) -> None:
        begin(opened, name)
        backfill(opened)
        if swapped:
            swap(opened, "swap")
        execute(database, "UPDATE films SET overview = 'edited' WHERE id IN (2, 24)")
        execute(database, "DELETE FROM films WHERE id = 5")
        execute(database, "INSERT INTO films SELECT n, 'Film ' || n, 'new ' || n FROM generate_series(26, 40) AS n")
        land_all(again(opened))
        assert again(opened).ledger.work() == {}
        assert_whole(opened)
        if swapped:
            roll_back(again(opened), "back")
        else:
            swap(again(opened), "swap")
        assert_whole(opened)
        assert audit(again(opened)).agree

    def test_a_batch_that_the_backfill_has_not_come_to_is_its_alone(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened, 0)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id IN (2, 24)")
        land_all(opened)
        assert opened.ledger.work() == {}
        assert unfilled_batches(opened, opened.ledger.beside()[0]) == [1, 2]
        assert backfill(opened) == 15
        assert_whole(opened)

    def test_what_the_second_model_could_not_encode_stays_marked_and_is_done_later(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        [model] = opened.beside()
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 1")
        opened.ledger.scan(opened.source)
        run_batch(opened, 0, "without the second model")
        assert unfilled_batches(opened, model.active) == [0]
        assert opened.ledger.work() == {0: 10}
        fill_beside([model], 0, "still without")
        assert opened.ledger.work(due=True) == {}  # it waits before it is tried again
        land_all(opened)
        assert opened.ledger.work() == {}
        assert_whole(opened)

    def test_what_lands_between_the_check_and_the_swap_is_filled_before_it(self, database, opened, monkeypatch) -> None:
        begin(opened, "wide")
        backfill(opened)
        measured = migration.measure_gate

        def then_an_edit(*arguments: Any) -> Any:
            gate = measured(*arguments)
            execute(database, "UPDATE films SET overview = 'just now' WHERE id = 1")
            opened.ledger.scan(opened.source)
            run_batch(opened, 0, "just now")
            return gate

        monkeypatch.setattr(migration, "measure_gate", then_an_edit)
        swap(opened, "swap")
        assert again(opened).profile.name == "wide"
        assert_whole(opened)

    def test_a_landing_that_encoded_with_the_former_model_is_rolled_back(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 1")
        opened.ledger.scan(opened.source)
        with pytest.raises(StaleRunError):
            read_items(opened, 0, "late")
            render_texts(opened, 0, "late")
            list(embed_batches(opened, [0], "late"))
            land_batch(opened, 0, "late", at_second_look=lambda: swap(opened, "swap"))
        land_all(again(opened))
        assert_whole(opened)

    def test_a_fill_that_comes_late_and_writes_nothing_leaves_the_newer_file(self, database, opened) -> None:
        model = opened.with_model(begin(opened, "wide").next)
        backfill(opened)

        def edited(number: int) -> None:
            execute(database, "UPDATE films SET overview = 'edited' WHERE id = %s", [number])
            opened.ledger.scan(opened.source)
            run_batch(opened, 0, f"edit {number}")

        edited(1)
        with database.connect(autocommit=True) as connection:
            late = fill._make_batch(model, connection, 0, "late", encode=True)
            fill._to_lake(model, late, "late")
            edited(2)
            fill_batch(model, 0, "newer")
            fill._write_group(model, connection, [late])
        query = "SELECT file FROM embeddings.fill WHERE batch = 0 AND fingerprint = %s"
        assert execute(database, query, [model.fingerprint]) == [("newer.parquet",)]
        swap(opened, "swap")
        assert audit(again(opened)).agree

    def test_a_landing_whose_own_commit_comes_first_is_seen_by_the_swap(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 1")
        opened.ledger.scan(opened.source)
        run_batch(opened, 0, "early")
        swap(opened, "swap")
        assert_whole(opened)


class TestTwoModels:
    def test_a_second_model_is_kept_current_and_searched_by_name(self, database, settings, opened) -> None:
        add_model(opened, target_profile(opened, "wide"))
        assert opened.ledger.work() == {0: 10, 1: 10, 2: 10}
        land_all(opened)
        assert opened.ledger.work() == {}
        assert_whole(opened)
        execute(database, "UPDATE films SET overview = 'dragons everywhere' WHERE id = 2")
        land_all(opened)
        for profile in ("wide", "test", None):
            assert search(opened.collection, settings, "Film 2 dragons everywhere", profile=profile)[0].item_key == "2"
        with pytest.raises(Exception, match="has no vectors of profile 'other', but of test, wide"):
            search(opened.collection, settings, "dragons", profile="other")
        assert progress(opened, begin(opened, "wide").next).percent == 100.0  # nothing left to backfill
        with pytest.raises(MigrationError, match="part of a change that is under way"):
            remove_model(opened, "wide")
        roll_back(opened, "back")
        assert [model.profile.name for model in opened.ledger.beside()] == ["wide"]  # `profile add` keeps it
        begin(opened, "wide")
        swap(opened, "swap")
        assert_whole(opened)

    def test_it_can_be_removed(self, opened) -> None:
        add_model(opened, target_profile(opened, "wide"))
        with pytest.raises(MigrationError, match="no profile 'other' is kept"):
            remove_model(opened, "other")
        remove_model(opened, "wide")
        assert opened.ledger.beside() == []

    def test_a_fill_of_a_model_that_is_gone_says_so(self, opened) -> None:
        begun = begin(opened, "wide")
        roll_back(opened, "back")
        with pytest.raises(StaleRunError, match="kept no longer"):
            fill_batch(opened.with_model(begun.next), 0, "late")


class TestOtherPrograms:
    def test_the_active_model_is_told_and_asserted(self, database, opened) -> None:
        active = "SELECT * FROM embeddings.active_model('films')"
        former = opened.fingerprint
        assert execute(database, active) == [("test", former, 32)]
        begin(opened, "wide")
        backfill(opened)
        swap(opened, "swap")
        following = again(opened).fingerprint
        assert execute(database, active) == [("wide", following, 48)]
        asserted = "SELECT item_key FROM embeddings.films WHERE (SELECT embeddings.assert_model('films', %s)) LIMIT 1"
        assert len(execute(database, asserted, [following])) == 1
        with pytest.raises(psycopg.Error, match="is not the active one") as error:
            execute(database, asserted, [former])
        assert error.value.sqlstate == "EMB01"
        roll_back(again(opened), "back")
        assert len(execute(database, asserted, [former])) == 1

    def test_a_long_transaction_on_the_view_is_waited_for_and_nobody_waits_behind_the_swap(
        self, database, opened, monkeypatch
    ) -> None:
        begin(opened, "wide")
        backfill(opened)
        with database.connect() as reader:
            reader.execute("SELECT count(*) FROM embeddings.films")
            monkeypatch.setattr("embeddings_pipeline.model_change.phases.LOCK_SECONDS", 1)
            with pytest.raises(MigrationError, match="could not be locked"):
                swap(opened, "swap")
            assert reader.execute("SELECT count(*) FROM embeddings.films").fetchone() == (25,)
        assert again(opened).profile.name == "test"
        swap(opened, "swap")

    @pytest.mark.parametrize("plain", [False, True], ids=["superuser", "plain role"])
    def test_slow_queries_that_follow_one_another_without_end_do_not_keep_the_swap_out(
        self, database, settings, opened, plain, monkeypatch
    ) -> None:
        """A plain role does not see how long another's transactions have been open."""
        begin(opened, "wide")
        backfill(opened)
        monkeypatch.setattr("embeddings_pipeline.model_change.phases.PATIENCE_SECONDS", 0.5)
        monkeypatch.setattr("embeddings_pipeline.model_change.phases.LOCK_SECONDS", 20)
        done = threading.Event()

        def ask(number: int) -> int:
            asked, chance = 0, random.Random(number)
            with database.connect(autocommit=True) as connection:
                while not done.is_set():
                    seconds = chance.uniform(0.05, 0.09)
                    connection.execute("SELECT pg_sleep(%s) FROM embeddings.films LIMIT 1", [seconds])
                    asked += 1
            return asked

        whose = plain_role(database, "plain_swapper") if plain else nullcontext(database.url)
        with whose as url, ThreadPoolExecutor(24) as threads:  # one of them is always more than 40 ms old
            asked = [threads.submit(ask, n) for n in range(24)]
            try:
                swap(open_collection(opened.collection, settings.model_copy(update={"database_url": url})), "swap")
            finally:
                done.set()
            assert all(one.result() > 5 for one in asked)
        assert again(opened).profile.name == "wide"

    def test_the_view_uses_the_index_of_the_new_model(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        swap(opened, "swap")
        with database.connect() as connection:
            connection.execute("SET enable_seqscan = off; SET enable_sort = off")
            plan = connection.execute(
                "EXPLAIN SELECT item_key FROM embeddings.films WHERE vector_name = 'base' "
                "ORDER BY embedding <=> ('[1' || repeat(',0', 47) || ']')::halfvec(48) LIMIT 3"
            ).fetchall()
        assert "films_base_" in str(plan)

    def test_the_documented_queries_find_their_way_to_the_next_model(self, database, opened) -> None:
        """docs/changing-the-model.md: in Python as it stands there, and with SQLAlchemy."""
        page = (Path(__file__).parents[2] / "docs" / "changing-the-model.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
        assert code is not None
        there: dict[str, Any] = {"psycopg": psycopg}
        exec(code[1].replace("embeddings.items", "embeddings.films").replace("'items'", "'films'"), there)
        encoders = {"test": opened.encoder(), "wide": DeterministicEncoder(target_profile(opened, "wide"))}
        swapped = []

        def encode(profile: str, text: str) -> list[float]:
            vector = encoders[profile].encode_queries([text])[0].tolist()
            if not swapped:  # the model changes between the encoding of the query and the query
                begin(opened, "wide")
                backfill(opened)
                swapped.append(swap(opened, "swap"))
            return vector

        with database.connect(autocommit=True) as connection:
            assert there["nearest"](connection, encode, "Film 7 number 7")[0] == ("7",)
        films_view = sqlalchemy.table("films", sqlalchemy.column("item_key"), schema="embeddings")
        asserted = sqlalchemy.select(sqlalchemy.func.embeddings.assert_model("films", opened.fingerprint))
        query = sqlalchemy.select(films_view).where(asserted.scalar_subquery())
        engine = sqlalchemy.create_engine(database.sqlalchemy_url)
        with engine.connect() as connection, pytest.raises(sqlalchemy.exc.DBAPIError) as error:
            connection.execute(query)
        assert error.value.orig.sqlstate == "EMB01"

    def test_a_role_without_the_right_to_set_deadlock_timeout_swaps_too(self, database, opened) -> None:
        begin(opened, "wide")
        backfill(opened)
        with plain_role(database, "plain_owner") as url:
            execute(database, "GRANT SELECT ON films TO plain_owner")
            own = open_collection(
                opened.collection, Settings(database_url=url, embeddings_state_dir=opened.settings.state_dir)
            )
            with own.database.connect() as connection, pytest.raises(errors.InsufficientPrivilege):
                connection.execute("SET deadlock_timeout = 50")
            swap(own, "swap")
            assert again(opened).profile.name == "wide"
