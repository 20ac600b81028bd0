"""Shadow models: kept by the commits, beside another one, and in the sight of other programs."""

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg import errors

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ModelChangeError, StaleRunError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.model_change import phases
from embeddings_pipeline.model_change.phases import add_model, remove_model, roll_back, swap
from embeddings_pipeline.model_change.state import (
    candidate_profile,
    incomplete_batches,
    progress,
)
from embeddings_pipeline.pipeline import shadow
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.embed import embed_batches
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.pipeline.shadow import backfill_batch, backfill_shadows
from embeddings_pipeline.search.query import search
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.model_change import (
    NEXT,
    again,
    assert_whole,
    backfill_all,
    begin,
    commit_all,
)
from embeddings_pipeline_tests.support.workbench import (
    commit_batch,
    execute,
    plain_role,
    run_without_shadows,
)


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
            read_items(collection, [0], "late")
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
            late = shadow.read_batch(model, connection, 0, "late", encode=True)
            shadow.encode_batch(model, late)
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
