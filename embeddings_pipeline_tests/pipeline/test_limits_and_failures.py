"""Rules 4 and 7: what `limit`, a poison text, an outage or a killed run leaves for the next run."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import (
    OutageError,
    OutOfMemoryError,
    PipelineError,
    ProfileError,
    StaleRunError,
)
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    commit_batch,
    committed,
    definition,
    edit,
    execute,
    films,
    make_films,
    overview,
    prepare_batch,
    sync_once,
)


class TestLimitsAndFailures:
    def test_an_item_is_committed_only_when_each_of_its_texts_is_embedded(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(6))
        two = definition(vectors={"base": "{title} | {overview}", "title": "{title}"})
        collection, _ = sync_once(two, settings, limit=5)
        whole = execute(database, "SELECT item_key FROM embeddings.films GROUP BY item_key HAVING count(*) = 2")
        assert len(whole) == 2
        assert execute(database, "SELECT count(*) FROM embeddings.films") == [(4,)]
        assert collection.ledger.dirty_batches() == [0]
        sync_once(two, settings)
        assert execute(database, "SELECT count(*) FROM embeddings.films") == [(12,)]

    def test_what_limit_encoded_is_not_encoded_again(self, database: Database, settings: Settings) -> None:
        make_films(database, films(9))
        for number in range(3):
            sync_once(definition(), settings, run=f"run{number}", limit=3)
        assert max(DeterministicEncoder.texts_encoded.values()) == 1
        assert len(committed(database)) == 9

    @pytest.mark.parametrize(("bad", "error"), [(1, ValueError), (5, PipelineError), (9, RuntimeError)])
    def test_a_bad_text_goes_to_quarantine_and_the_rest_is_committed(
        self, database: Database, settings: Settings, bad: int, error: type[Exception]
    ) -> None:
        make_films(database, films(9))
        edit(database, bad, "POISON")
        DeterministicEncoder.fail_on, DeterministicEncoder.error = "POISON", error
        collection, embedded = sync_once(definition(), settings)
        assert embedded == 8
        assert set(committed(database)) == {str(n) for n in range(1, 10) if n != bad}
        assert collection.ledger.dirty_batches() == []
        [(text, reason)] = execute(database, "SELECT text, reason FROM embeddings.quarantine")
        assert "POISON" in text and error.__name__ in reason

    @pytest.mark.parametrize("error", [OutageError, ProfileError])
    def test_an_outage_fails_the_run_and_quarantines_nothing(
        self, database: Database, settings: Settings, error: type[Exception]
    ) -> None:
        make_films(database, films(4))
        DeterministicEncoder.fail_on, DeterministicEncoder.error = "number 2", error
        with pytest.raises(error):
            sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
        assert committed(database) == {}

    @pytest.mark.parametrize("error", [OutOfMemoryError, MemoryError])
    def test_memory_that_runs_out_for_one_text_is_that_texts_fault_and_for_all_an_outage(
        self, database: Database, settings: Settings, error: type[Exception]
    ) -> None:
        make_films(database, films(9))
        DeterministicEncoder.fail_on, DeterministicEncoder.error = " ", error
        with pytest.raises(OutOfMemoryError):
            sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
        DeterministicEncoder.fail_on = "number 2 "
        _, embedded = sync_once(definition(), settings)
        assert embedded == 8
        [(reason,)] = execute(database, "SELECT reason FROM embeddings.quarantine")
        assert reason.startswith("memory ran out for this text of")

    def test_a_quarantined_text_that_was_mended_is_committed(self, database: Database, settings: Settings) -> None:
        make_films(database, films(3))
        edit(database, 2, "POISON")
        DeterministicEncoder.nan_on = "POISON"
        sync_once(definition(), settings)
        edit(database, 2, "mended")
        sync_once(definition(), settings)
        assert overview(database, 2) == "mended"

    def test_an_encoder_that_fails_on_everything_fails_the_run_and_quarantines_nothing(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(4))
        DeterministicEncoder.fail_on = " "
        with pytest.raises(PipelineError, match="encode_documents failed: ValueError: a text holds"):
            sync_once(definition(), settings)
        assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
        DeterministicEncoder.reset()
        assert sync_once(definition(), settings)[1] == 4

    def test_a_run_that_was_killed_after_encoding_costs_no_text_twice(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(8))
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        prepare_batch(collection, 0, "killed")
        _, embedded = sync_once(definition(), settings, run="next")
        assert embedded == 0
        assert len(committed(database)) == 8

    def test_a_model_that_became_current_meanwhile_rolls_the_commit_back(
        self, database: Database, settings: Settings
    ) -> None:
        make_films(database, films(4))
        collection = open_collection(definition(), settings)
        collection.ledger.full_scan(collection.source)
        prepare_batch(collection, 0, "late")
        execute(database, "UPDATE embeddings.collection SET fingerprint = 'another'")
        with pytest.raises(StaleRunError, match="sync again"):
            commit_batch(collection, 0, "late")
        assert execute(database, "SELECT count(*) FROM embeddings.films_text") == [(0,)]


class NotBesideLongerTexts(DeterministicEncoder):
    """Gives NaN for the shortest of several texts, as padding makes some models do."""

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = super().encode_documents(texts)
        if len(texts) > 1:
            vectors[int(np.argmin([len(text) for text in texts]))] = np.nan
        return vectors


def test_a_text_that_has_no_vector_beside_others_alone_is_encoded_alone(database, settings) -> None:
    make_films(database, films(12))
    profile = {**PROFILE, "model": f"{__name__}:NotBesideLongerTexts"}
    collection, _ = sync_once(definition(profile=profile), settings)
    assert collection.ledger.quarantine_entries() == [] and len(committed(database)) == 12
