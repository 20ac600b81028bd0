"""A text is tokenised once: what counts its tokens for reports is what the model reads."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batches import BatchEncoder
from embeddings_pipeline.encoders.token_rows import TokenRows, Tokens
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.tiny_models import sentence_model
from embeddings_pipeline_tests.support.workbench import definition, edit, films, make_films, sync_once


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = sentence_model(tmp_path_factory.mktemp("tiny"), Pooling(32), max_length=16)
    return {"name": "tiny", "provider": "local", "model": str(model), "dimensions": 32, "device": "cpu"}


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text of a film was."""
    times: Counter[str] = Counter()
    read, count = TokenRows.read, TokenRows.count

    def noted_read(self: TokenRows, texts: list[str]) -> Tokens:
        times.update(text for text in texts if text.startswith("Film"))
        return read(self, texts)

    def noted_count(self: TokenRows, texts: list[str]) -> list[int]:
        times.update(text for text in texts if text.startswith("Film"))
        return count(self, texts)

    monkeypatch.setattr(TokenRows, "read", noted_read)
    monkeypatch.setattr(TokenRows, "count", noted_count)
    return times


@pytest.mark.parametrize("cache", [False, True])
def test_a_sync_tokenises_each_text_once_and_says_which_were_cut(
    cache: bool, profile: dict[str, Any], database: Database, settings: Settings, tokenised: Counter[str]
) -> None:
    make_films(database, films(30))
    edit(database, 3, "one " * 40)
    edit(database, 7, "one " * 4000)
    collection, _ = sync_once(definition(profile={**profile, "cache": cache}), settings)
    assert len(tokenised) == 30 and set(tokenised.values()) == {1}
    found = collection.ledger.truncation(collection.fingerprint)
    assert (found.texts, found.truncated, found.longest) == (30, 2, 4005)
    [longest] = [text for text in tokenised if len(text) > 10_000]
    encoder = collection.encoder()
    assert isinstance(encoder, BatchEncoder)
    vectors, tokens = encoder.encode_counted([longest, longest[:200]])
    assert tokens.tolist() == [4005, encoder.count_tokens([longest[:200]])[0]]
    np.testing.assert_allclose(vectors[0], encoder.encode_documents([longest])[0], atol=1e-5)
