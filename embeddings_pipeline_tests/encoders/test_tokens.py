"""Tokens of a hosted model: counted by its own tokenizer where that is at hand, else estimated and said to be so."""

from dataclasses import replace
from pathlib import Path

import pytest

from embeddings_pipeline.config.profiles import MINILM, Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.limits import estimated_tokens
from embeddings_pipeline.encoders.tokens import count_tokens, counts_exactly

TEXTS = ["cat", "A plain sentence in English.", "老人在海边等待一艘再也不会回来的船。", "long " * 1000, ""]
SERVED = Profile(name="served", provider="openai", model=MINILM, dimensions=384, url="http://127.0.0.1:1/v1")
OPENAI = replace(SERVED, model="text-embedding-3-small")


def test_a_model_whose_files_are_here_is_counted_as_the_model_itself_counts(encoder_settings: Settings) -> None:
    assert counts_exactly(SERVED)
    own = load_encoder(Profile(name="minilm", provider="local", model=MINILM, dimensions=384), encoder_settings)
    assert count_tokens(SERVED, TEXTS).tolist() == own.count_tokens(TEXTS).tolist()
    prompted = replace(SERVED, document_prompt="passage: ")
    assert count_tokens(prompted, ["cat"]).tolist() == own.count_tokens(["passage: cat"]).tolist()


def test_another_is_estimated_without_asking_the_network() -> None:
    assert not counts_exactly(OPENAI)
    assert count_tokens(OPENAI, TEXTS).tolist() == estimated_tokens(TEXTS).tolist()
    assert not counts_exactly(replace(OPENAI, model="no name/of a/repository"))


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.json").write_text("no JSON")
    assert not counts_exactly(replace(SERVED, model=str(tmp_path)))
    assert "tokens of" in caplog.text and "estimated" in caplog.text
