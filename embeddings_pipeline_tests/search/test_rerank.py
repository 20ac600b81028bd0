"""Searches whose first hits a cross-encoder puts into order; whatever becomes of it, there is an answer."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import cross_encoder
from embeddings_pipeline.encoders.cross_encoder import OpenVinoCrossEncoder
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.search import rerank
from embeddings_pipeline.search.hits import Hits
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support import tiny_models
from embeddings_pipeline_tests.support.tiny_models import WORDS
from embeddings_pipeline_tests.support.workbench import definition, make_films, sync_once

FILMS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.cross_encoder(tmp_path_factory.mktemp("reranker") / "tiny")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.cross_encoder(tmp_path_factory.mktemp("reranker") / "smaller", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rerank.forget_rerankers()
    monkeypatch.setattr(cross_encoder, "_loaded", {})
    yield
    rerank.forget_rerankers()


@pytest.fixture
def collection(database: Database) -> CollectionDefinition:
    """Thirty films, some of which have one text."""
    texts = [" ".join(WORDS[n % 10 :] + WORDS[: n % 10][: n // 10]) for n in range(FILMS - 1)]
    make_films(database, [(n, "same", text, n) for n, text in enumerate([*texts, texts[-1]])])
    return definition(vectors={"base": "{overview}"})


@pytest.fixture
def ask(collection: CollectionDefinition, settings: Settings, model: Path) -> Any:
    """A search that is reranked by the tiny model; settings by name."""
    sync_once(collection, settings)

    def ask(query: str = "one two", one: CollectionDefinition = collection, **others: Any) -> Hits:
        given = {name: others.pop(name) for name in list(others) if name in Settings.model_fields}
        here = settings.model_copy(update={"rerank_model": str(model), "embedding_device": "cpu", **given})
        return search(one, here, query, **{"rerank": True, **others})

    return ask


def keys(hits: Sequence[Any]) -> list[str]:
    return [hit.item_key for hit in hits]


def told(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


def test_hits_come_in_the_order_of_the_cross_encoders_scores(ask: Any, model: Path) -> None:
    found, hits = ask(rerank=False, k=FILMS), ask(k=FILMS)
    scores = CrossEncoder(str(model), device="cpu").predict([("one two", hit.text) for hit in found])
    expected = [found[n] for n in sorted(range(FILMS), key=lambda n: (-scores[n], n))]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(scores, reverse=True), atol=1e-3)
    near = {hit.item_key: score for hit, score in zip(found, scores, strict=True)}
    for ours, theirs in zip(hits, expected, strict=True):  # scores that are nearly equal may change places
        assert ours.item_key == theirs.item_key or abs(near[ours.item_key] - near[theirs.item_key]) < 1e-3
    done = hits.explanation.rerank
    assert (done.model, done.candidates, done.scored) == (str(model), FILMS, FILMS)
    assert done.how.startswith("OpenVINO") and not done.fell_back
    assert done.ranks[found[2].item_key] == (3, found[2].score)
    assert keys(found) != keys(hits) and found.explanation.rerank is None


def test_it_is_off_unless_the_environment_or_the_call_says_otherwise(ask: Any) -> None:
    assert ask(rerank=None).explanation.rerank is None
    assert ask(rerank=None, enable_reranker=True).explanation.rerank is not None
    assert ask(rerank=False, enable_reranker=True).explanation.rerank is None
    with pytest.raises(ConfigurationError, match=r"^rerank cannot be 'yes': it may be True, False, or None"):
        ask(rerank="yes")


def test_k_goes_before_what_the_environment_says(ask: Any) -> None:
    assert [len(ask()), len(ask(k=3)), len(ask(return_top_k=5)), len(ask(rerank=False))] == [20, 3, 5, 10]
    assert len(ask(k=25, rerank_top_k=4)) == 25


def test_only_the_first_hits_are_scored_and_the_others_follow(ask: Any) -> None:
    found, hits = ask(rerank=False, k=FILMS), ask(k=FILMS, rerank_top_k=7)
    assert sorted(keys(hits)[:7]) == sorted(keys(found)[:7]) and keys(hits)[7:] == keys(found)[7:]
    assert hits[7] == found[7]


def test_equal_texts_are_scored_once(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    score = OpenVinoCrossEncoder.score

    def counted(self: Any, query: str, texts: Sequence[str]) -> Any:
        asked.append(len(texts))
        return score(self, query, texts)

    monkeypatch.setattr(OpenVinoCrossEncoder, "score", counted)
    hits = ask(k=FILMS)
    assert hits.explanation.rerank.scored == FILMS
    assert asked == [len({hit.text for hit in hits})] and asked[0] < FILMS
    assert ask(rerank_top_k=1).explanation.rerank.how == "there are no two texts to choose between"
    assert len(asked) == 1


def test_a_sure_search_is_not_reranked(ask: Any, collection: CollectionDefinition) -> None:
    sure = definition(vectors={"base": "{overview}"}, rerank={"sure_margin": 0.1})
    exact = "ten"  # of one film
    assert ask(exact, sure).explanation.rerank.how.startswith("the search is sure: 1.0000 before 0.")
    assert keys(ask(exact, sure, k=5)) == keys(ask(exact, rerank=False, k=5))
    assert ask(exact).explanation.rerank.model is not None, "off unless it is declared"


def test_when_time_runs_out_the_rest_keeps_its_order(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    score = OpenVinoCrossEncoder.score

    def slow(self: Any, query: str, texts: Sequence[str]) -> Any:
        time.sleep(0.02 * len(texts))
        return score(self, query, texts)

    monkeypatch.setattr(OpenVinoCrossEncoder, "score", slow)
    found = ask(rerank=False, k=FILMS)
    began = time.perf_counter()
    hits = ask(k=FILMS, rerank_milliseconds=300)
    done = hits.explanation.rerank
    assert 4 <= done.scored < 20
    assert done.fell_back == (f"time ran out after {done.scored} of {FILMS}: the rest keeps its order",)
    assert sorted(keys(hits)[: done.scored]) == sorted(keys(found)[: done.scored])
    assert keys(hits)[done.scored :] == keys(found)[done.scored :]
    assert done.milliseconds < 1000 * (time.perf_counter() - began)
    assert ask(k=FILMS, rerank_milliseconds=60_000).explanation.rerank.scored == FILMS


def test_without_weights_a_search_goes_on_and_says_so_once(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = ask(rerank=False)
    for name in ("BAAI/bge-reranker-large", "/nowhere/at-all"):
        caplog.clear()
        for _ in range(3):
            hits = ask(k=10, rerank_model=name)
            assert hits == found
            done = hits.explanation.rerank
            assert (done.model, done.how, done.scored) == (None, "not reranked", 0)
            assert "set RERANK_MODEL=/path/to/" in done.fell_back[0] and "\n" not in done.fell_back[0]
        assert told(caplog, "set RERANK_MODEL=/path/to/") == 1
    assert told(caplog, "hits keep the order in which they were found") <= 1


def test_weights_that_come_later_are_found(
    ask: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path / "later"
    assert ask(rerank_model=str(later)).explanation.rerank.model is None
    later.symlink_to(model)
    assert ask(rerank_model=str(later)).explanation.rerank.model is None
    monkeypatch.setattr(rerank, "AGAIN_SECONDS", 0)
    assert ask(rerank_model=str(later)).explanation.rerank.model == str(later)


def test_a_model_of_three_labels_is_told_and_the_order_stays(ask: Any, tmp_path: Path) -> None:
    three = tiny_models.cross_encoder(tmp_path / "three", labels=3)
    hits = ask(rerank_model=str(three))
    assert "gives each pair 3 scores" in hits.explanation.rerank.fell_back[0]
    assert keys(hits)[:10] == keys(ask(rerank=False))


def test_out_of_memory_the_batch_is_halved_then_a_smaller_model_takes_over_then_the_order_stays(
    ask: Any, smaller: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "SMALLER_RERANKER", str(smaller))
    expected = ask(k=FILMS)
    most = {"rows": 4, "smaller": 100}
    start = OpenVinoCrossEncoder._start

    def little_memory(self: Any, texts: list[str], *others: Any) -> Any:
        if len(texts) > (most["smaller"] if self.profile.model == str(smaller) else most["rows"]):
            return lambda: np.empty(1 << 55)
        return start(self, texts, *others)

    monkeypatch.setattr(OpenVinoCrossEncoder, "_start", little_memory)
    for _ in range(2):
        assert keys(ask(k=FILMS)) == keys(expected)
    assert told(caplog, "fewer pairs are scored at once") == 1
    most["rows"] = 0
    for _ in range(2):
        done = ask(k=FILMS).explanation.rerank
        assert done.model == str(smaller) and "memory ran out for" in done.fell_back[0]
    assert told(caplog, "warning: memory ran out for reranker") == 2
    most["smaller"] = 0
    for _ in range(2):
        hits = ask(k=FILMS)
        assert keys(hits) == keys(ask(k=FILMS, rerank=False)) and hits.explanation.rerank.model is None
    assert told(caplog, "hits keep the order in which they were found") == 1


def test_scores_that_are_no_numbers_leave_the_order(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVinoCrossEncoder, "score", lambda self, query, texts: np.full(len(texts), np.nan))
    hits = ask(k=10)
    assert keys(hits) == keys(ask(rerank=False)) and "no finite numbers" in hits.explanation.rerank.fell_back[0]
