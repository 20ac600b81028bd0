"""Changing the model: three phases, both ways, with commits, edits and kills in between."""

import json
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy
from psycopg import errors

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, OutageError, ProfileError, StaleRunError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.model_change import backfill, phases, preflight, steps
from embeddings_pipeline.model_change.phases import add_model, contract, expand, remove_model, roll_back, swap
from embeddings_pipeline.model_change.state import (
    ModelChange,
    candidate_profile,
    incomplete_batches,
    open_change,
    progress,
)
from embeddings_pipeline.pipeline import shadow
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.commit import commit_batch
from embeddings_pipeline.pipeline.embed import embed_batches
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.pipeline.shadow import backfill_batch, backfill_shadows
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination import table as own_table
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    execute,
    films,
    make_films,
    plain_role,
    run_without_shadows,
    sync_once,
)
from embeddings_pipeline_tests.support.workbench import definition as plain_definition

WIDE = {**PROFILE, "name": "wide", "dimensions": 48}
OTHER = {**PROFILE, "name": "other", "document_prompt": "passage: "}  # other vectors of the same dimension
NEXT = pytest.mark.parametrize("name", ["wide", "other"])


def definition(**attributes: Any) -> CollectionDefinition:
    return plain_definition(**{"profiles": by_name(WIDE, OTHER), **attributes})


@pytest.fixture(autouse=True)
def _fresh_encoder() -> None:
    DeterministicEncoder.reset()


@pytest.fixture
def collection(database: Database, settings: Settings) -> Collection:
    """Twenty-five films in three batches, committed."""
    make_films(database, films(25))
    return sync_once(definition(), settings)[0]


def begin(collection: Collection, name: str) -> ModelChange:
    return expand(collection, candidate_profile(collection, name))


def backfill_all(collection: Collection, *batches: int) -> int:
    backfilled = phases.backfill(collection, batches or collection.ledger.batches(), "backfill")
    return sum(one.embedded for _, one in backfilled)


@contextmanager
def written_together() -> Iterator[list[list[int]]]:
    """The batches of each transaction that a backfill writes in the block."""
    together: list[list[int]] = []

    def note(batches: list[int]) -> None:
        together.append(batches)

    with at_failpoint("backfill.group", note):
        yield together


def again(collection: Collection) -> Collection:
    return open_collection(collection.definition, collection.settings)


def commit(collection: Collection, batch: int, run: str) -> None:
    """A batch as a run does it, with the shadow models."""
    run_batch(collection, [batch], run)


def commit_all(collection: Collection, run: str = "later") -> None:
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.work():
        commit(collection, batch, run)


def assert_whole(collection: Collection) -> None:
    """Every text has the vector that its model makes of it, in each model, and the view shows the current one."""
    for model in [again(collection), *again(collection).shadow_models()]:
        query = f"""SELECT text.text, vector.embedding::real[] FROM embeddings.films_text AS text
                    LEFT JOIN embeddings.{model.model.destination.name} AS vector ON vector.text_id = text.id"""
        rows = execute(collection.database, query)
        count = f"SELECT count(*) FROM embeddings.{model.model.destination.name}"
        assert execute(collection.database, count) == [(len(rows),)]
        assert all(vector is not None for _, vector in rows), model.profile.name
        expected = model.encoder().encode_documents([text for text, _ in rows])
        assert np.allclose(np.array([vector for _, vector in rows]), expected, atol=1e-3), model.profile.name
    shown = execute(collection.database, "SELECT text, embedding::real[] FROM embeddings.films")
    expected = again(collection).encoder().encode_documents([text for text, _ in shown])
    assert np.allclose(np.array([vector for _, vector in shown]), expected, atol=1e-3)


def assert_whole_but(collection: Collection, marker: str) -> None:
    execute(collection.database, f"UPDATE films SET overview = 'mended' WHERE overview = '{marker}'")
    commit_all(again(collection))
    assert_whole(collection)


class TestPhases:
    @NEXT
    def test_expand_backfill_swap_roll_back_swap_contract(self, database, settings, collection, name) -> None:
        first = collection.fingerprint
        begun = begin(collection, name)
        assert (begun.phase, progress(collection, begun.candidate).backfilled) == ("expanded", 0)
        assert again(collection).fingerprint == first  # the old one serves
        assert backfill_all(collection) == 25
        assert progress(collection, begun.candidate).percent == 100.0
        done = swap(collection, "swap")
        assert done.gate is not None and done.gate.missing == 0 and done.gate.recall_at_10 == 1.0
        candidate = again(collection)
        assert candidate.profile.name == name and candidate.fingerprint == begun.candidate.destination.fingerprint
        assert search(collection.definition, settings, "Film 7 number 7")[0].item_key == "7"
        assert_whole(collection)
        assert roll_back(candidate, "back") is not None
        assert again(collection).fingerprint == first
        assert_whole(collection)
        swap(again(collection), "swap again")
        with pytest.raises(ModelChangeError, match="grace period"):
            contract(again(collection))
        contract(again(collection), now=True)
        assert open_change(collection) is None
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]
        assert execute(database, f"SELECT to_regclass('embeddings.films_vector_{first}')") == [(None,)]
        assert_whole(collection)
        assert audit(again(collection)).agree
        assert again(collection).ledger.work() == {}

    def test_a_backfill_reads_nothing_from_the_source(self, database, collection) -> None:
        begin(collection, "wide")
        execute(database, "DROP TABLE films CASCADE")
        assert backfill_all(collection) == 25

    @pytest.mark.parametrize(
        ("bounds", "expected"),
        [
            ((backfill, {}), [[0, 1, 2]]),
            ((backfill, {"BATCHES_TOGETHER": 2}), [[0, 1], [2]]),
            ((own_table, {"TABLE_TEXTS": 11}), [[0, 1], [2]]),
            ((own_table, {"TABLE_TEXTS": 10}), [[0], [1], [2]]),
            ((own_table, {"TABLE_SECONDS": 0.0}), [[0], [1], [2]]),
        ],
    )
    def test_as_many_batches_are_written_together_as_the_bounds_allow(
        self, collection, bounds, expected, monkeypatch
    ) -> None:
        begin(collection, "wide")
        module, limits = bounds
        for name, value in limits.items():
            monkeypatch.setattr(module, name, value)
        with written_together() as together:
            assert backfill_all(collection) == 25
        assert together == expected
        assert_whole(collection)

    def test_an_outage_is_tried_three_times(self, collection, monkeypatch) -> None:
        begin(collection, "wide")
        monkeypatch.setattr("embeddings_pipeline.store.retry.OUTAGE_FIRST_WAIT_SECONDS", 0)
        encode, failures = DeterministicEncoder.encode_documents, iter([1, 1, 0, 0, 1, 1, 1])  # one is the canaries'

        def fails_at_first(encoder: DeterministicEncoder, texts: list[str]) -> Any:
            if next(failures, False):
                raise OutageError("the service does not answer")
            return encode(encoder, texts)

        monkeypatch.setattr(DeterministicEncoder, "encode_documents", fails_at_first)
        with pytest.raises(OutageError):
            backfill_all(collection, 0, 1)  # the first batch at its third try; the second never
        assert incomplete_batches(collection, collection.ledger.shadow_models()[0]) == [1, 2]
        assert backfill_all(collection) == 15

    def test_what_is_committed_while_the_candidate_is_checked_does_not_stop_the_swap(
        self, database, collection, monkeypatch
    ) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        measure = phases.measure_gate

        def committed_meanwhile(current: Collection, candidate: Collection) -> Any:
            execute(database, "UPDATE films SET overview = 'new words' WHERE id IN (3, 17)")
            collection.ledger.full_scan(collection.source)
            for (
                batch
            ) in collection.ledger.work():  # what backfills the model beside it comes last, and has not come yet
                run_without_shadows(again(collection), batch, "meanwhile")
            gate = measure(current, candidate)
            assert (gate.texts, gate.missing, gate.refused) == (25, 0, [])
            return gate

        monkeypatch.setattr(phases, "measure_gate", committed_meanwhile)
        swap(collection, "swap")
        assert again(collection).profile.name == "wide"
        assert_whole(collection)

    def test_a_vector_that_is_gone_from_a_batch_that_counts_as_whole_stops_the_swap(
        self, database, collection, monkeypatch
    ) -> None:
        begun = begin(collection, "wide")
        backfill_all(collection)
        measure = phases.measure_gate

        def deleted(current: Collection, candidate: Collection) -> Any:
            execute(database, f"DELETE FROM embeddings.{begun.candidate.destination.name} WHERE text_id % 9 = 0")
            return measure(current, candidate)

        monkeypatch.setattr(phases, "measure_gate", deleted)
        with pytest.raises(ModelChangeError, match=r"of 25 texts have no vector"):
            swap(collection, "swap")

    def test_the_gate_measures_the_index_where_searches_would_do_without_it_too(self, database, settings) -> None:
        make_films(database, films(3000))
        one = definition(items_per_batch=1000, index={"method": "none"})
        collection = sync_once(one, settings)[0]
        begun = begin(collection, "wide")
        backfill_all(collection)
        candidate = collection.with_model(begun.candidate)
        table = f"embeddings.{begun.candidate.destination.name}"
        execute(database, f"ANALYZE {table}")
        assert phases.measure_gate(collection, candidate).recall_at_10 == 1.0  # without an index, exact
        execute(
            database,
            f"CREATE INDEX ON {table} USING ivfflat (embedding halfvec_cosine_ops) WITH (lists = 1500)",
        )
        gate = phases.measure_gate(collection, candidate)
        assert gate.recall_at_10 < 0.95
        assert gate.refused == [f"its index finds {gate.recall_at_10:.1%} of the nearest ten, and 95.0% are asked for"]

    def test_a_model_that_can_be_loaded_no_longer_does_not_take_over(self, database, collection, monkeypatch) -> None:
        add_model(collection, candidate_profile(collection, "wide"))
        backfilled = collection.with_model(collection.ledger.shadow_models()[0])
        for batch in collection.ledger.batches():
            backfill_batch(backfilled, batch, "added")

        def gone(profile: Any) -> Any:
            raise ProfileError("its weights are not here")

        with monkeypatch.context() as patched:
            patched.setattr(preflight, "load_encoder", gone)
            with pytest.raises(ProfileError, match="weights are not here"):
                begin(collection, "wide")
            assert open_change(collection) is None
        begin(collection, "wide")
        with monkeypatch.context() as patched:
            patched.setattr(preflight, "load_encoder", gone)
            with pytest.raises(ProfileError, match="weights are not here"):
                swap(collection, "swap")
        assert again(collection).profile.name == "test"
        swap(collection, "swap")

    @pytest.mark.parametrize(("times", "tries"), [(1, 4), (2, 5), (9, 4)])
    def test_a_database_that_ends_our_sessions_is_tried_three_times(
        self, database, collection, times, tries, monkeypatch, caplog
    ) -> None:
        begin(collection, "wide")
        monkeypatch.setattr(retry, "OUTAGE_FIRST_WAIT_SECONDS", 0)
        monkeypatch.setattr(backfill, "BATCHES_TOGETHER", 1)
        tried, endings = [], iter(range(times))

        def ended(batches: list[int]) -> None:
            tried.append(batches[0])
            if batches[0] == 1 and next(endings, None) is not None:
                execute(
                    database,
                    """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE datname = current_database() AND pid <> pg_backend_pid()""",
                )

        refused = pytest.raises(psycopg.OperationalError) if times > 2 else nullcontext()
        with at_failpoint("backfill.group", ended), refused:
            backfill_all(collection)
        if times > 2:
            assert incomplete_batches(collection, collection.ledger.shadow_models()[0]) == [1, 2]
            backfill_all(collection)
        assert len(tried) == tries and caplog.text.count("trying again in 0") == min(times, 2)
        assert_whole(collection)

    def test_before_a_swap_a_roll_back_drops_the_candidate(self, database, collection) -> None:
        begun = begin(collection, "wide")
        backfill_all(collection, 0)
        assert roll_back(collection, "back") is None
        assert open_change(collection) is None
        assert collection.ledger.shadow_models() == []
        assert execute(database, f"SELECT to_regclass('embeddings.{begun.candidate.destination.name}')") == [(None,)]
        begin(collection, "wide")
        assert backfill_all(collection) == 15  # and it can begin anew: what was encoded is in the lake

    def test_a_step_done_twice_changes_nothing(self, collection) -> None:
        assert begin(collection, "wide") == begin(collection, "wide")
        assert backfill_all(collection) == 25
        assert backfill_all(collection) == 0
        swap(collection, "swap")
        with pytest.raises(ModelChangeError, match="is the current model already"):
            swap(again(collection), "swap")


class TestRefused:
    def test_the_wrong_order_is_refused_in_one_line_and_changes_nothing(self, collection) -> None:
        for step in (
            lambda: backfill_all(collection),
            lambda: swap(collection, "x"),
            lambda: roll_back(collection, "x"),
        ):
            with pytest.raises(ModelChangeError, match="no change of its model is open"):
                step()
        with pytest.raises(ModelChangeError, match="nothing has been swapped"):
            contract(collection)
        begin(collection, "wide")
        backfill_all(collection, 0)
        with pytest.raises(ModelChangeError, match="2 of 3 batches are not backfilled"):
            swap(collection, "x")
        with pytest.raises(ModelChangeError, match="nothing has been swapped"):
            contract(collection)
        with pytest.raises(ModelChangeError, match=r"a change from test .* to wide .* is open"):
            begin(collection, "other")
        assert again(collection).profile.name == "test"

    def test_the_current_model_an_unknown_and_an_unloadable_one(self, database, collection) -> None:
        with pytest.raises(ModelChangeError, match="is its current model already"):
            begin(collection, "test")
        with pytest.raises(ProfileError, match="There is no profile 'nope'"):
            begin(collection, "nope")
        broken = {**PROFILE, "name": "broken", "model": "no_such_module:Encoder"}
        other = Collection(**{**vars(collection), "definition": definition(profiles=by_name(broken))})
        with pytest.raises(ProfileError, match="cannot be loaded"):
            begin(other, "broken")
        assert execute(database, "SELECT count(*) FROM embeddings.model_change") == [(0,)]
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    def test_what_was_the_current_model_when_it_was_looked_at(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        swap(collection, "swap")
        contract(again(collection), now=True)
        with pytest.raises(ModelChangeError, match="its models have just been changed"):
            begin(collection, "other")  # `collection` is of before
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    def test_a_collection_without_vectors(self, database, settings) -> None:
        make_films(database, films(3))
        with pytest.raises(ModelChangeError, match="nothing to migrate"):
            begin(open_collection(definition(), settings), "wide")

    def test_a_strangers_table_of_that_name(self, database, settings, collection) -> None:
        begun = begin(collection, "wide")
        roll_back(collection, "x")
        execute(database, f"CREATE TABLE embeddings.{begun.candidate.destination.name} (mine int)")
        with pytest.raises(ModelChangeError, match="rename or drop it"):
            begin(collection, "wide")

    @pytest.mark.usefixtures("superuser")
    def test_too_small_a_disk(self, collection, monkeypatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(ModelChangeError, match="GB free; make room first"):
            begin(collection, "wide")
        assert collection.ledger.shadow_models() == []

    def test_more_dimensions_than_an_index_takes(self, collection) -> None:
        huge = {**PROFILE, "name": "huge", "dimensions": 5000}
        other = Collection(**{**vars(collection), "definition": definition(profiles=by_name(huge))})
        with pytest.raises(ModelChangeError, match="up to 4000 dimensions"):
            begin(other, "huge")

    def test_a_text_that_the_candidate_cannot_encode_is_excused_and_no_other(
        self, database, settings, collection
    ) -> None:
        collection = open_collection(definition(quarantine={"error_percent": 5}), settings)
        execute(database, "UPDATE films SET overview = 'POISON' WHERE id = 3")
        commit_all(collection)
        begin(collection, "wide")
        DeterministicEncoder.fail_on = "POISON"
        assert backfill_all(collection) == 24
        assert collection.ledger.quarantine_entries() == []
        [entry] = collection.ledger.quarantine_entries(every_model=True)
        assert (entry.item_key, entry.items, entry.profile) == ("3", 1, "wide")
        done = swap(collection, "swap")
        assert done.gate is not None and (done.gate.missing, done.gate.quarantined) == (0, 1)
        execute(database, f"DELETE FROM embeddings.{again(collection).model.destination.name} WHERE text_id = 5")
        roll_back(again(collection), "back")
        DeterministicEncoder.reset()
        swap(again(collection), "swap")  # what was deleted by hand is backfilled first
        assert_whole_but(collection, "POISON")

    def test_a_model_that_encodes_too_few_texts_does_not_take_over(self, collection) -> None:
        begin(collection, "wide")
        DeterministicEncoder.nan_on = "number 1"
        assert backfill_all(collection) == 14
        with pytest.raises(ModelChangeError, match=r"11 of 25 texts are in quarantine under it, more than 1 %"):
            swap(collection, "swap")

    def test_a_model_that_gives_no_numbers_is_refused_at_once(self, database, collection) -> None:
        DeterministicEncoder.nan_on = "plain sentence"
        with pytest.raises(ProfileError, match="not finite, or zero"):
            begin(collection, "wide")
        assert execute(database, "SELECT count(*) FROM embeddings.model") == [(1,)]

    def test_vectors_that_somebody_deleted_are_backfilled_before_a_swap_and_before_a_roll_back(
        self, database, collection
    ) -> None:
        begun = begin(collection, "wide")
        backfill_all(collection)
        execute(database, f"DELETE FROM embeddings.{begun.candidate.destination.name} WHERE text_id IN (5, 6)")
        swap(collection, "swap")
        assert_whole(collection)
        execute(database, f"DELETE FROM embeddings.{begun.current.destination.name} WHERE text_id IN (7, 8)")
        roll_back(again(collection), "back")
        assert_whole(collection)

    def test_steps_that_meet_end_in_one_line(self, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        before = open_change(collection)
        assert before is not None
        swap(collection, "swap")
        stale = collection.with_model(before.candidate)
        with pytest.raises(StaleRunError, match="has become the current model"):
            backfill_batch(stale, 0, "late")
        ended = steps.Transaction([steps.end_step()], [])
        with pytest.raises(ModelChangeError, match="somebody else has gone on"):
            phases._run(collection, ended, {"id": before.id}, phases._not_meanwhile(before))
        roll_back(again(collection), "back")
        assert_whole(collection)

    def test_an_index_that_finds_too_little(self, collection, monkeypatch) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        monkeypatch.setattr("embeddings_pipeline.model_change.gate.nearest_texts", lambda *_: [])
        with pytest.raises(ModelChangeError, match=r"its index finds 0\.0% .* goes on serving"):
            swap(collection, "swap")
        assert again(collection).profile.name == "test"

    def test_golden_queries_decide(self, database, settings, tmp_path) -> None:
        make_films(database, films(25))
        one = CollectionDefinition(definition().attributes, tmp_path / "defs.yaml")
        collection = sync_once(one, settings)[0]
        golden = [{"query": f"Film {n} number {n}", "relevant": [n]} for n in range(1, 6)]
        (tmp_path / "golden_queries.jsonl").write_text("\n".join(map(json.dumps, golden)))
        begin(collection, "wide")
        backfill_all(collection)
        execute(
            database,
            f"""UPDATE embeddings.{collection.ledger.shadow_models()[0].destination.name} SET embedding =
                ('[1' || repeat(',0', 47) || ']')::halfvec""",
        )
        with pytest.raises(ModelChangeError, match="nDCG@10 of 5 golden queries drops from 1"):
            swap(collection, "swap")
        (tmp_path / "golden_queries.jsonl").write_text('{"query": "no items"}')
        for wrong in ('{"query": "no items"}', '{"query": "a", "relevant": "12"}', '{"query": "a", "relevant": []}'):
            (tmp_path / "golden_queries.jsonl").write_text(wrong)
            with pytest.raises(ConfigurationError, match=r"golden_queries\.jsonl, line 1"):
                swap(collection, "swap")
        roll_back(collection, "back")
        with pytest.raises(ConfigurationError, match="line 1"):
            begin(collection, "wide")


class TestShadowModelsInCommits:
    """While a change is open, and after the swap until contract, both models are current."""

    @NEXT
    @pytest.mark.parametrize("swapped", [False, True])
    def test_new_edited_and_deleted_rows_reach_both_models(self, database, collection, name, swapped) -> None:
        begin(collection, name)
        backfill_all(collection)
        if swapped:
            swap(collection, "swap")
        execute(database, "UPDATE films SET overview = 'edited' WHERE id IN (2, 24)")
        execute(database, "DELETE FROM films WHERE id = 5")
        execute(database, "INSERT INTO films SELECT n, 'Film ' || n, 'new ' || n FROM generate_series(26, 40) AS n")
        commit_all(again(collection))
        assert again(collection).ledger.work() == {}
        assert_whole(collection)
        if swapped:
            roll_back(again(collection), "back")
        else:
            swap(again(collection), "swap")
        assert_whole(collection)
        assert audit(again(collection)).agree

    def test_a_batch_that_the_backfill_has_not_come_to_is_its_alone(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection, 0)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id IN (2, 24)")
        commit_all(collection)
        assert collection.ledger.work() == {}
        assert incomplete_batches(collection, collection.ledger.shadow_models()[0]) == [1, 2]
        assert backfill_all(collection) == 15
        assert_whole(collection)

    def test_what_the_second_model_could_not_encode_stays_marked_and_is_done_later(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        [model] = collection.shadow_models()
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 1")
        collection.ledger.full_scan(collection.source)
        run_without_shadows(collection, 0, "without the second model")
        assert incomplete_batches(collection, model.model) == [0]
        assert collection.ledger.work() == {0: 10}
        backfill_shadows([model], 0, "still without")
        assert collection.ledger.work(due=True) == {}  # it waits before it is tried again
        commit_all(collection)
        assert collection.ledger.work() == {}
        assert_whole(collection)

    def test_what_is_committed_between_the_check_and_the_swap_is_backfilled_before_it(
        self, database, collection, monkeypatch
    ) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        measured = phases.measure_gate

        def then_an_edit(*arguments: Any) -> Any:
            gate = measured(*arguments)
            execute(database, "UPDATE films SET overview = 'just now' WHERE id = 1")
            collection.ledger.full_scan(collection.source)
            run_without_shadows(collection, 0, "just now")
            return gate

        monkeypatch.setattr(phases, "measure_gate", then_an_edit)
        swap(collection, "swap")
        assert again(collection).profile.name == "wide"
        assert_whole(collection)

    def test_a_commit_that_encoded_with_the_previous_model_is_rolled_back(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 1")
        collection.ledger.full_scan(collection.source)
        with pytest.raises(StaleRunError):
            read_items(collection, 0, "late")
            render_texts(collection, 0, "late")
            list(embed_batches(collection, [0], "late"))
            with at_failpoint("commit.second_look", lambda: swap(collection, "swap")):
                commit_batch(collection, 0, "late")
        commit_all(again(collection))
        assert_whole(collection)

    def test_a_backfill_that_comes_late_and_writes_nothing_leaves_the_newer_file(self, database, collection) -> None:
        model = collection.with_model(begin(collection, "wide").candidate)
        backfill_all(collection)

        def edited(number: int) -> None:
            execute(database, "UPDATE films SET overview = 'edited' WHERE id = %s", [number])
            collection.ledger.full_scan(collection.source)
            run_without_shadows(collection, 0, f"edit {number}")

        edited(1)
        with database.connect(autocommit=True) as connection:
            late = shadow.prepare_batch(model, connection, 0, "late", encode=True)
            shadow.write_to_lake(model, late, "late")
            edited(2)
            backfill_batch(model, 0, "newer")
            shadow.write_batches(model, connection, [late])
        query = "SELECT file FROM embeddings.backfill WHERE batch = 0 AND fingerprint = %s"
        assert execute(database, query, [model.fingerprint]) == [("newer.parquet",)]
        swap(collection, "swap")
        assert audit(again(collection)).agree

    def test_a_commit_whose_own_commit_comes_first_is_seen_by_the_swap(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 1")
        collection.ledger.full_scan(collection.source)
        run_without_shadows(collection, 0, "early")
        swap(collection, "swap")
        assert_whole(collection)


class TestTwoModels:
    def test_a_second_model_is_kept_current_and_searched_by_name(self, database, settings, collection) -> None:
        add_model(collection, candidate_profile(collection, "wide"))
        assert collection.ledger.work() == {0: 10, 1: 10, 2: 10}
        commit_all(collection)
        assert collection.ledger.work() == {}
        assert_whole(collection)
        execute(database, "UPDATE films SET overview = 'dragons everywhere' WHERE id = 2")
        commit_all(collection)
        for profile in ("wide", "test", None):
            assert (
                search(collection.definition, settings, "Film 2 dragons everywhere", profile=profile)[0].item_key == "2"
            )
        with pytest.raises(Exception, match="has no vectors of profile 'other', but of test, wide"):
            search(collection.definition, settings, "dragons", profile="other")
        assert progress(collection, begin(collection, "wide").candidate).percent == 100.0  # nothing left to backfill
        with pytest.raises(ModelChangeError, match="part of a change that is under way"):
            remove_model(collection, "wide")
        roll_back(collection, "back")
        assert [model.profile.name for model in collection.ledger.shadow_models()] == ["wide"]  # `profile add` keeps it
        begin(collection, "wide")
        swap(collection, "swap")
        assert_whole(collection)

    def test_it_can_be_removed(self, collection) -> None:
        add_model(collection, candidate_profile(collection, "wide"))
        with pytest.raises(ModelChangeError, match="no profile 'other' is kept"):
            remove_model(collection, "other")
        remove_model(collection, "wide")
        assert collection.ledger.shadow_models() == []

    def test_a_backfill_of_a_model_that_is_gone_says_so(self, collection) -> None:
        begun = begin(collection, "wide")
        roll_back(collection, "back")
        with pytest.raises(StaleRunError, match="kept no longer"):
            backfill_batch(collection.with_model(begun.candidate), 0, "late")


class TestOtherPrograms:
    def test_the_current_model_is_told_and_asserted(self, database, collection) -> None:
        current = "SELECT * FROM embeddings.current_model('films')"
        first = collection.fingerprint
        assert execute(database, current) == [("test", first, 32)]
        begin(collection, "wide")
        backfill_all(collection)
        swap(collection, "swap")
        second = again(collection).fingerprint
        assert execute(database, current) == [("wide", second, 48)]
        asserted = "SELECT item_key FROM embeddings.films WHERE (SELECT embeddings.assert_model('films', %s)) LIMIT 1"
        assert len(execute(database, asserted, [second])) == 1
        with pytest.raises(psycopg.Error, match="is not the current one") as error:
            execute(database, asserted, [first])
        assert error.value.sqlstate == "EMB01"
        roll_back(again(collection), "back")
        assert len(execute(database, asserted, [first])) == 1

    def test_a_long_transaction_on_the_view_is_waited_for_and_nobody_waits_behind_the_swap(
        self, database, collection, monkeypatch
    ) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        with database.connect() as reader:
            reader.execute("SELECT count(*) FROM embeddings.films")
            monkeypatch.setattr("embeddings_pipeline.store.locks.LOCK_SECONDS", 1)
            with pytest.raises(ModelChangeError, match="could not be locked"):
                swap(collection, "swap")
            assert reader.execute("SELECT count(*) FROM embeddings.films").fetchone() == (25,)
        assert again(collection).profile.name == "test"
        swap(collection, "swap")

    @pytest.mark.parametrize("plain", [False, True], ids=["superuser", "plain role"])
    def test_slow_queries_that_follow_one_another_without_end_do_not_keep_the_swap_out(
        self, database, settings, collection, plain, monkeypatch
    ) -> None:
        """A plain role does not see how long another's transactions have been open."""
        begin(collection, "wide")
        backfill_all(collection)
        monkeypatch.setattr("embeddings_pipeline.store.locks.PATIENCE_SECONDS", 0.5)
        monkeypatch.setattr("embeddings_pipeline.store.locks.LOCK_SECONDS", 20)
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
                swap(open_collection(collection.definition, settings.model_copy(update={"database_url": url})), "swap")
            finally:
                done.set()
            assert all(one.result() > 5 for one in asked)
        assert again(collection).profile.name == "wide"

    def test_the_view_uses_the_index_of_the_new_model(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        swap(collection, "swap")
        with database.connect() as connection:
            connection.execute("SET enable_seqscan = off; SET enable_sort = off")
            plan = connection.execute(
                "EXPLAIN SELECT item_key FROM embeddings.films WHERE vector_name = 'base' "
                "ORDER BY embedding <=> ('[1' || repeat(',0', 47) || ']')::halfvec(48) LIMIT 3"
            ).fetchall()
        assert "films_base_" in str(plan)

    def test_the_documented_queries_find_their_way_to_the_candidate(self, database, collection) -> None:
        """docs/how-to/query-from-sql.md: in Python as it stands there, and with SQLAlchemy."""
        page = (Path(__file__).parents[2] / "docs" / "how-to" / "query-from-sql.md").read_text(encoding="utf-8")
        code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
        assert code is not None
        there: dict[str, Any] = {"psycopg": psycopg}
        exec(code[1].replace("embeddings.items", "embeddings.films").replace("'items'", "'films'"), there)
        encoders = {"test": collection.encoder(), "wide": DeterministicEncoder(candidate_profile(collection, "wide"))}
        swapped: list[Any] = []

        def encode(profile: str, text: str) -> list[float]:
            vector = encoders[profile].encode_queries([text])[0].tolist()
            if not swapped:  # the model changes between the encoding of the query and the query
                begin(collection, "wide")
                backfill_all(collection)
                swapped.append(swap(collection, "swap"))
            return vector

        with database.connect(autocommit=True) as connection:
            assert there["nearest"](connection, encode, "Film 7 number 7")[0] == ("7",)
        films_view = sqlalchemy.table("films", sqlalchemy.column("item_key"), schema="embeddings")
        asserted = sqlalchemy.select(sqlalchemy.func.embeddings.assert_model("films", collection.fingerprint))
        query = sqlalchemy.select(films_view).where(asserted.scalar_subquery())
        engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=database.parts)
        with engine.connect() as connection, pytest.raises(sqlalchemy.exc.DBAPIError) as error:
            connection.execute(query)
        assert error.value.orig.sqlstate == "EMB01"

    def test_a_role_without_the_right_to_set_deadlock_timeout_swaps_too(self, database, collection) -> None:
        begin(collection, "wide")
        backfill_all(collection)
        with plain_role(database, "plain_owner") as url:
            execute(database, "GRANT SELECT ON films TO plain_owner")
            own = open_collection(
                collection.definition, Settings(database_url=url, embeddings_state_dir=collection.settings.state_dir)
            )
            with own.database.connect() as connection, pytest.raises(errors.InsufficientPrivilege):
                connection.execute("SET deadlock_timeout = 50")
            swap(own, "swap")
            assert again(collection).profile.name == "wide"
