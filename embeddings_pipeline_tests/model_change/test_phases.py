"""Changing the model: three phases, both ways, with commits, edits and kills in between."""

from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from embeddings_pipeline.errors import ModelChangeError, OutageError, ProfileError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.model_change import backfill, phases, preflight
from embeddings_pipeline.model_change.phases import add_model, contract, roll_back, swap
from embeddings_pipeline.model_change.state import (
    candidate_profile,
    incomplete_batches,
    open_change,
    progress,
)
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.shadow import backfill_batch
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.destination import table as own_table
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.model_change import (
    NEXT,
    again,
    assert_whole,
    backfill_all,
    begin,
    definition,
    written_together,
)
from embeddings_pipeline_tests.support.workbench import (
    execute,
    films,
    make_films,
    run_without_shadows,
    sync_once,
)


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

        def gone(profile: Any, settings: Any) -> Any:
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
