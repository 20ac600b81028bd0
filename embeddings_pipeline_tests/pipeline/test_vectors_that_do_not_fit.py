"""A vector that its column cannot hold is not stored, and not rounded; what an earlier version stored is made anew."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ModelChangeError, PipelineError, ProfileError
from embeddings_pipeline.front_door import CollectionClient
from embeddings_pipeline.health.drift import measure
from embeddings_pipeline.health.integrity import integrity
from embeddings_pipeline.index.faiss_build import build as build_faiss
from embeddings_pipeline.model_change.phases import expand
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    committed,
    definition,
    execute,
    films,
    make_films,
    run_batch,
    sync_once,
)

LENGTHS = {"LOUD": 1e6, "FAINT": 1e-9, "TINY": 1e-25, "VAST": 1e25, "NOTHING": 0.0, "BROKEN": np.nan}


class Uneven(DeterministicEncoder):
    """Not normalised: a text with one of the words above has a vector of another length."""

    def _encode(self, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        vectors = 3 * super()._encode(texts, prompt)
        lengths = [next((length for word, length in LENGTHS.items() if word in text), 1) for text in texts]
        return vectors * np.array(lengths, np.float32)[:, None]


class AllLoud(DeterministicEncoder):
    def _encode(self, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        return super()._encode(texts, prompt) * np.float32(1e6)


def profile(encoder: type, **others: Any) -> dict[str, Any]:
    model = f"{__name__}:{encoder.__name__}"
    return {**PROFILE, "name": encoder.__name__.lower(), "model": model, "normalize": False, **others}


UNEVEN = definition(profile=profile(Uneven))


@pytest.fixture(autouse=True)
def _films(database: Database) -> None:
    make_films(database, [*films(9), *((10 + n, word, "film", 1) for n, word in enumerate(LENGTHS))])


def reasons(collection: Collection) -> dict[str | None, str]:
    return {entry.item_key: f"{entry.step}: {entry.reason}" for entry in collection.ledger.quarantine_entries()}


@pytest.mark.parametrize(
    ("storage", "kept", "refused"),
    [("halfvec", set(), {"10", "11", "12", "13"}), ("vector", {"10", "11"}, {"12", "13"})],
)
def test_each_is_refused_by_name_with_the_remedy(
    database: Database, settings: Settings, storage: str, kept: set[str], refused: set[str]
) -> None:
    collection, _ = sync_once(definition(profile=profile(Uneven), storage=storage), settings)
    assert set(committed(database)) == {str(n) for n in range(1, 10)} | kept
    said = reasons(collection)
    assert set(said) == refused | {"14", "15"}
    assert all(said[key].startswith("store: its vector") and "normalize: true" in said[key] for key in refused)
    assert said["14"] == said["15"] == "encode: the model gave a vector that is not finite, or zero"
    assert collection.ledger.dirty_batches() == [] and integrity(database, collection.model).sound


def test_a_model_of_which_no_vector_fits_blames_no_text(database: Database, settings: Settings) -> None:
    with pytest.raises(ProfileError, match=r"no vector of .*AllLoud can be stored: .*`storage: vector`") as error:
        sync_once(definition(profile=profile(AllLoud)), settings)
    assert "\n" not in str(error.value)
    assert execute(database, "SELECT count(*) FROM embeddings.quarantine") == [(0,)]
    as_advised, embedded = sync_once(definition(profile=profile(AllLoud), storage="vector"), settings)
    assert as_advised.warning is None and embedded == 15 and len(committed(database)) == 15


def test_no_change_begins_to_a_model_of_which_no_vector_fits(database: Database, settings: Settings) -> None:
    collection, _ = sync_once(definition(profiles=by_name(profile(AllLoud))), settings)
    with pytest.raises((ProfileError, ModelChangeError), match="too large for float16"):
        expand(collection, candidate_profile(collection, "allloud"))


def test_what_an_earlier_version_left_in_the_lake_or_stored_is_made_anew(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        for module in ("encode", "vectors"):
            earlier.setattr(f"embeddings_pipeline.pipeline.{module}.why_not", lambda vectors, storage: {})
        earlier.setitem(LENGTHS, "LOUD", 1)
        earlier.setitem(LENGTHS, "VAST", 1)
        earlier.setitem(LENGTHS, "BROKEN", 1)
        collection, _ = sync_once(UNEVEN, settings)
    assert integrity(database, collection.model).not_finite == 3
    assert [hit for hit in search(UNEVEN, settings, "film", k=20) if not np.isfinite(hit.score)] == []
    execute(database, "UPDATE embeddings.films_item SET committed_hash = NULL")
    run_batch(collection, 0, "again")
    run_batch(collection, 1, "again")
    assert set(reasons(collection)) == {"11", "12", "14"}
    assert integrity(database, collection.model).sound and len(committed(database)) == 12


@pytest.mark.parametrize("index", ["pgvector", "faiss"])
def test_a_score_is_a_number_or_the_query_is_refused_in_one_line(
    database: Database, settings: Settings, index: Any
) -> None:
    collection, _ = sync_once(UNEVEN, settings)
    build_faiss(database, collection.model.destination, settings.state_dir / "faiss")
    client = CollectionClient(UNEVEN, settings)
    hits = {word: client.search(f"{word} film", 20, index=index) for word in ("a", "LOUD", "FAINT", "TINY")}
    assert all(len(found) == 9 and np.isfinite([hit.score for hit in found]).all() for found in hits.values())
    for word in ("NOTHING", "BROKEN"):
        with pytest.raises(PipelineError, match=f"not finite, or zero, for the query '{word} film'") as error:
            client.search(f"{word} film", index=index)
        assert "\n" not in str(error.value)


def test_a_model_that_gives_zeros_for_a_canary_has_not_drifted(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LENGTHS, "cat", 0.0)
    collection, _ = sync_once(UNEVEN, settings)
    assert measure(collection, collection.encoder()).same
