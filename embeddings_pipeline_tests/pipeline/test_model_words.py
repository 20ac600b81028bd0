"""A collection whose model's files carry prompts: used from the start, and never mixed with vectors made without."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.model_change.phases import expand
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.tiny_models import WORDS, sentence_model
from embeddings_pipeline_tests.support.workbench import definition, edit, execute, films, make_films, sync_once

PROMPTS = {"query": "one two ", "document": "seven "}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return sentence_model(tmp_path / "tiny", Pooling(32), Normalize(), prompts=PROMPTS)


@pytest.fixture
def some_films(database: Database) -> Database:
    make_films(database, films(4))
    for film in range(1, 5):
        edit(database, film, " ".join(WORDS[film : film + 3]))
    return database


def mine(model: Path, **settings: Any) -> CollectionDefinition:
    profile = {"name": "mine", "provider": "local", "model": str(model), "dimensions": 32, "device": "cpu", **settings}
    return definition(profile=profile, vectors={"base": "{overview}"})


def stored(database: Database) -> np.ndarray:
    rows = execute(database, "SELECT embedding::text FROM embeddings.films ORDER BY item_key")
    return np.array([json.loads(row[0]) for row in rows])


def before_prompts_were_used(database: Database) -> None:
    """What a version that knew neither prompts of the model's own nor measures has stored of its model."""
    execute(database, "UPDATE embeddings.model SET profile = profile - 'similarity'")


def test_texts_and_queries_get_the_models_own_prompts(some_films: Database, settings: Settings, model: Path) -> None:
    collection, _ = sync_once(mine(model), settings)
    reference = SentenceTransformer(str(model), device="cpu")
    texts = [" ".join(WORDS[film : film + 3]) for film in range(1, 5)]
    theirs = reference.encode_document(texts)
    assert (stored(some_films) * theirs).sum(axis=1).min() >= 0.9999
    assert collection.warnings == []
    [hit, *_] = search(mine(model), settings, "five six")
    assert abs(hit.score - float((theirs @ reference.encode_query("five six")).max())) < 1e-3
    [(profile,)] = execute(some_films, "SELECT profile FROM embeddings.model")
    assert (profile["document_prompt"], profile["query_prompt"]) == ("seven ", "one two ")


def test_vectors_made_without_the_models_prompts_stay_and_a_warning_names_the_way(
    some_films: Database, settings: Settings, model: Path
) -> None:
    sync_once(mine(model, document_prompt="", query_prompt=""), settings)
    before_prompts_were_used(some_films)
    before = stored(some_films)
    edit(some_films, 1, "ten nine eight")
    collection, encoded = sync_once(mine(model), settings, run="upgraded")
    assert encoded == 1  # with the prompt that the others were made with
    assert (stored(some_films)[1:] == before[1:]).all()
    plain = SentenceTransformer(str(model), device="cpu").encode("ten nine eight", prompt="")
    assert float(stored(some_films)[0] @ plain) >= 0.999
    assert collection.warning is not None and "\n" not in collection.warning
    for word in ("'mine'", 'document_prompt "seven ", not ""', "profile switch mine"):
        assert word in collection.warning
    assert search(mine(model), settings, "ten nine eight")[0].item_key == "1"
    change = expand(collection, candidate_profile(collection, "mine"))  # the switch that the warning names is possible
    assert change.candidate.profile.document_prompt == "seven "
    assert sync_once(mine(model, document_prompt=""), settings)[0].warning is None


def test_a_prompt_of_the_models_for_queries_alone_changes_no_vector(
    some_films: Database, settings: Settings, tmp_path: Path
) -> None:
    model = sentence_model(tmp_path / "query", Pooling(32), Normalize(), prompts={"query": "one two "})
    collection, _ = sync_once(mine(model), settings)
    before_prompts_were_used(some_films)
    execute(some_films, """UPDATE embeddings.model SET profile = profile || '{"query_prompt": ""}'""")
    again, encoded = sync_once(mine(model), settings, run="upgraded")
    assert (encoded, again.fingerprint, again.warnings) == (0, collection.fingerprint, [])


def test_a_model_of_another_measure_is_refused_before_anything_is_made(
    some_films: Database, settings: Settings, tmp_path: Path
) -> None:
    model = sentence_model(tmp_path / "dot", Pooling(32), similarity_fn_name="dot")
    with pytest.raises(ProfileError, match="compared by dot"):
        open_collection(mine(model), settings)
    assert execute(some_films, "SELECT count(*) FROM embeddings.model") == [(0,)]
    collection, _ = sync_once(mine(model, similarity="cosine"), settings)
    assert "similarity is cosine, the model's own is dot" in collection.warnings[0]
    before_prompts_were_used(some_films)
    collection, _ = sync_once(mine(model), settings, run="upgraded")  # as it was searched until now
    assert collection.warning is not None and "compared by dot" in collection.warning
    assert search(mine(model), settings, "two three four")[0].item_key == "1"
