"""What is refused before anything is changed, and why."""

import json

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, ProfileError, StaleRunError
from embeddings_pipeline.model_change import phases, steps
from embeddings_pipeline.model_change.phases import contract, roll_back, swap
from embeddings_pipeline.model_change.state import (
    open_change,
)
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.shadow import backfill_batch
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.model_change import (
    again,
    assert_whole,
    assert_whole_but,
    backfill_all,
    begin,
    commit_all,
    definition,
)
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    execute,
    films,
    make_films,
    sync_once,
)


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
        (tmp_path / "golden_queries.jsonl").write_text('{"query": "a", "relevant": ["tt0111161"]}')
        with pytest.raises(ConfigurationError, match="has none of the 1 item that it names, such as 'tt0111161'"):
            begin(collection, "wide")

    def test_the_queries_of_the_evaluation_decide_too_and_missing_items_are_told(
        self, database, settings, tmp_path, caplog
    ) -> None:
        make_films(database, films(25))
        attributes = definition(evaluation={"queries": "judged.jsonl"}).attributes
        collection = sync_once(CollectionDefinition(attributes, tmp_path / "defs.yaml"), settings)[0]
        judged = [{"query": f"Film {n} number {n}", "relevant": {n: 2, "gone": 1}} for n in range(1, 6)]
        (tmp_path / "judged.jsonl").write_text("\n".join(map(json.dumps, judged)))
        begin(collection, "wide")
        backfill_all(collection)
        gate = swap(collection, "swap").gate
        assert gate.golden_queries == 5 and gate.ndcg_current == gate.ndcg_candidate > 0.7
        assert "1 of 6 relevant items is not in the collection" in caplog.text
