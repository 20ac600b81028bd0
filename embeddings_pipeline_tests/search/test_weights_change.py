"""The files of a model change under a process that has it loaded: no query is encoded with what they were."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertModel

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.search import encoding
from embeddings_pipeline.search.query import encode_query, search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.tiny_models import sentence_model
from embeddings_pipeline_tests.support.workbench import definition, make_films, sync_once

TEXTS = [(n, word, "", n) for n, word in enumerate(["one", "two", "three", "four"], 1)]


def other_weights(folder: Path) -> None:
    """Train the model further, in its place."""
    model = BertModel.from_pretrained(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


def test_a_loaded_model_whose_files_change_is_not_asked_with_what_they_were(
    database: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentence_model(tmp_path / "made", Pooling(32, "mean"))
    first = tmp_path / "first"
    shutil.copytree(folder, first)
    profile = {"name": "tiny", "provider": "local", "model": str(folder), "dimensions": 32}
    one = definition(profile=profile, vectors={"base": "{title}"})
    make_films(database, TEXTS)
    collection, _ = sync_once(one, settings)
    monkeypatch.setattr(encoding, "LOOK_AGAIN_SECONDS", 0.0)
    for _ in range(3):
        assert search(one, settings, "three", k=1)[0].score > 0.999
    before = load_encoder(collection.model.profile, settings).encode_queries(["three"])
    other_weights(folder)
    with pytest.raises(ProfileError, match="the weights here are others"):
        search(one, settings, "three", k=1)
    after = load_encoder(collection.model.profile, settings).encode_queries(["three"])
    assert (before @ after.T).item() < 0.999
    shutil.rmtree(folder)
    shutil.copytree(first, folder)
    assert search(one, settings, "three", k=1)[0].score > 0.999


def test_files_that_change_after_they_were_looked_at_do_not_answer(
    database: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentence_model(tmp_path / "made", Pooling(32, "mean"))
    one = definition(
        profile={"name": "tiny", "provider": "local", "model": str(folder), "dimensions": 32},
        vectors={"base": "{title}"},
    )
    make_films(database, TEXTS)
    sync_once(one, settings)
    monkeypatch.setattr(encoding, "LOOK_AGAIN_SECONDS", 0.0)

    def encode(*given: Any) -> Any:
        other_weights(folder)
        return encode_query(*given)

    with pytest.raises(ProfileError, match="the weights here are others"):
        search(one, settings, "three", k=1, encode=encode)


def test_a_worker_that_stays_embeds_nothing_with_other_weights(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    folder = sentence_model(tmp_path / "made", Pooling(32, "mean"))
    one = definition(
        profile={"name": "tiny", "provider": "local", "model": str(folder), "dimensions": 32},
        vectors={"base": "{title}"},
    )
    make_films(database, TEXTS)
    collection, _ = sync_once(one, settings)
    first = collection.encoder()
    assert collection.encoder() is first
    other_weights(folder)
    with pytest.raises(ProfileError, match="are not the ones its vectors were made with"):
        collection.encoder()
    assert load_encoder(collection.profile, settings) is not first
