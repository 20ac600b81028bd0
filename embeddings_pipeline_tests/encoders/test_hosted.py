"""A hosted model over real HTTP: what its server does wrong, and what that means for texts and runs."""

import os
import signal
import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import SecretStr

from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders import hosted
from embeddings_pipeline.encoders.outage import duration, wait_said
from embeddings_pipeline.errors import OutageError
from embeddings_pipeline_tests.support.hosted import (
    KEY,
    SMALL,
    TEXTS,
    encoding,
    expected,
    one_line,
    profile,
)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("kind", [None, "reorder", "float", "slow"])
def test_each_text_gets_its_own_vector_whatever_the_order_of_the_answer(service, kind) -> None:
    if kind:
        service.fail(kind, seconds=0.1)
    with encoding(profile(service)) as encoder:
        assert np.allclose(encoder.encode_documents(TEXTS), expected(TEXTS), atol=1e-6)
    assert service.counts()["twice"] == 0


def test_equal_texts_are_paid_for_once_and_no_text_is_no_request(service) -> None:
    with encoding(profile(service)) as encoder:
        assert np.allclose(encoder.encode_documents(["a", "b", "a"]), expected(["a", "b", "a"]), atol=1e-6)
        assert encoder.encode_documents([]).shape == (0, 64)
    assert dict(service.billed) == {"a": 1, "b": 1}


def test_threads_may_call_at_once(service) -> None:
    service.latency = 0.02
    results: dict[int, NDArray[np.float32]] = {}
    with encoding(profile(service, batch_size=10)) as encoder:

        def encode(n: int) -> None:
            results[n] = encoder.encode_documents(TEXTS[50 * n : 50 * n + 50])

        threads = [threading.Thread(target=encode, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert np.allclose(np.concatenate([results[n] for n in range(6)]), expected(TEXTS), atol=1e-6)


def test_a_forked_process_encodes_as_its_parent_did(service) -> None:
    with encoding(profile(service)) as encoder:
        encoder.encode_queries(["before"])
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            good = np.allclose(encoder.encode_queries(["after"]), expected(["after"]), atol=1e-6)
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert np.allclose(encoder.encode_queries(["parent"]), expected(["parent"]), atol=1e-6)


def test_what_is_sent_is_what_the_profile_says(service, monkeypatch) -> None:
    monkeypatch.setenv("TEAM", "search")
    monkeypatch.setenv("OTHER_KEY", KEY)
    service.key = KEY
    given = profile(
        service,
        key_variable="OTHER_KEY",
        headers={"X-Team": "${TEAM}"},
        document_prompt="passage: ",
        query_prompt="query: ",
        query_model="text-embedding-3-large",
    )
    with encoding(given) as encoder:
        encoder.encode_documents(["text"])
        encoder.encode_queries(["question"])
    document, query = service.bodies
    assert document == {"model": SMALL, "input": ["passage: text"], "encoding_format": "base64", "dimensions": 64}
    assert (query["model"], query["input"]) == ("text-embedding-3-large", ["query: question"])
    assert service.headers[0]["x-team"] == "search"


def test_dimensions_are_asked_for_only_if_the_model_gives_others(service) -> None:
    with encoding(profile(service, dimensions=1536)) as encoder:
        encoder.encode_documents(["text"])
    assert "dimensions" not in service.bodies[-1]
    service.models["own-model"] = 128
    for send, dimensions in ((False, 128), (True, 32)):
        with encoding(profile(service, model="own-model", dimensions=dimensions, send_dimensions=send)) as encoder:
            assert encoder.encode_documents(["text"]).shape == (1, dimensions)
        assert ("dimensions" in service.bodies[-1]) == send


def test_the_key_of_openai_goes_to_no_other_server(service, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with encoding(profile(service), openai_api_key=SecretStr(KEY)) as encoder:
        encoder.encode_documents(["text"])
    assert "authorization" not in service.headers[-1]


MALFORMED = ["cut", "half", "html", "short", "long", "duplicate", "dimension", "nan", "zeros"]


@pytest.mark.parametrize("kind", ["close", *MALFORMED])
def test_a_bad_answer_is_asked_for_again_and_never_returned(service, kind) -> None:
    service.fail(kind)
    with encoding(profile(service)) as encoder:
        assert np.allclose(encoder.encode_documents(["one", "two"]), expected(["one", "two"]), atol=1e-6)
        assert encoder.counted["tried again"] == 1


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_status_that_passes_is_waited_for(service, status) -> None:
    service.fail("status", status=status, times=2)
    with encoding(profile(service)) as encoder:
        assert np.allclose(encoder.encode_documents(["one"]), expected(["one"]), atol=1e-6)
    assert service.requests == 3 and dict(service.billed) == {"one": 1}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("close", "does not answer (RemoteProtocolError"),
        ("cut", "does not answer (RemoteProtocolError"),
        ("half", "gave an answer that cannot be read (JSONDecodeError)"),
        ("html", "answered with text/html where JSON is due; is the address right"),
        ("short", "gave 1 vectors (1 numbers) for 2 texts"),
        ("duplicate", "gave 2 vectors (1 numbers) for 2 texts"),
        ("dimension", "gave vectors of 63 numbers; the profile says `dimensions: 64`"),
        ("zeros", "gave a vector that is not finite, or zero"),
    ],
)
def test_after_three_attempts_it_is_an_outage_of_the_server_in_one_line(service, kind, said) -> None:
    service.fail(kind, times=9)
    with encoding(profile(service)) as encoder, pytest.raises(OutageError) as error:
        encoder.encode_documents(["one", "two"])
    assert said in one_line(error.value) and "(3 attempts were made)" in str(error.value)
    assert service.requests == 3


def test_the_number_of_attempts_is_a_setting(service) -> None:
    service.fail("status", status=500, times=9)
    with encoding(profile(service), embedding_attempts=1) as encoder, pytest.raises(OutageError):
        encoder.encode_documents(["one"])
    assert service.requests == 1


def test_an_answer_that_never_comes_is_an_outage(service) -> None:
    service.fail("silent", seconds=5)
    given = profile(service, timeout_seconds=1)
    with encoding(given, embedding_attempts=1) as encoder, pytest.raises(OutageError, match="does not answer"):
        encoder.encode_documents(["one"])


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://nowhere.invalid/v1", "https://127.0.0.1:{port}/v1"])
def test_a_server_that_cannot_be_reached_is_an_outage(service, url) -> None:
    url = url.format(port=service.url.split(":")[2].split("/")[0])
    with encoding(profile(None, url=url)) as encoder, pytest.raises(OutageError, match="does not answer") as error:
        encoder.encode_documents(["one"])
    assert "is the address right, and the network up?" in one_line(error.value)


@pytest.mark.parametrize("headers", [{"retry-after-ms": "300"}, {"retry-after": "0.3"}])
def test_the_server_says_how_long_to_wait(service, headers) -> None:
    service.fail("status", status=429, headers=headers)
    with encoding(profile(service)) as encoder:
        began = time.monotonic()
        encoder.encode_documents(["one"])
        assert 0.3 <= time.monotonic() - began < 10


def test_a_wait_of_an_hour_is_not_sat_out(service) -> None:
    service.fail("status", status=429, headers={"retry-after": "3600"})
    with encoding(profile(service)) as encoder, pytest.raises(OutageError, match="says to wait for 3,600 s"):
        encoder.encode_documents(["one"])


def test_how_long_to_wait_is_read_from_any_header() -> None:
    assert [duration(text) for text in ("6m0s", "1.5s", "20ms", "12", "1h1m1s")] == [360, 1.5, 0.02, 12, 3661]
    assert [duration(text) for text in ("soon", "", None, "-1s")] == [None] * 4
    dates = {"date": "Thu, 01 Jan 2026 00:00:00 GMT", "retry-after": "Thu, 01 Jan 2026 00:00:07 GMT"}
    assert wait_said(dates) == 7
    reset = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2s", "x-ratelimit-reset-requests": "9s"}
    assert wait_said(reset) == 2
    assert wait_said({"retry-after": "tomorrow"}) is None


@pytest.mark.parametrize("headers", [{}, {"retry-after-ms": "20"}])
def test_a_storm_of_429_loses_nothing_and_bills_nothing_twice(service, headers, monkeypatch) -> None:
    monkeypatch.setattr(hosted, "LONGEST_BUSY_WAIT", 0.05)
    service.fail("status", status=429, times=200, headers=headers)
    with encoding(profile(service, batch_size=10)) as encoder:
        assert np.allclose(encoder.encode_documents(TEXTS), expected(TEXTS), atol=1e-6)
    assert (service.counts()["distinct"], service.counts()["twice"], service.faults_left()) == (300, 0, 0)


def test_a_storm_that_does_not_end_is_an_outage(service, monkeypatch) -> None:
    monkeypatch.setattr(hosted, "PATIENCE", 0.3)
    service.fail("status", status=429, times=1000)
    with encoding(profile(service)) as encoder, pytest.raises(OutageError, match="answered 429"):
        encoder.encode_documents(["one"])


def test_what_is_under_way_when_a_request_fails_is_kept(service) -> None:
    """It is paid for: `on_answer` gets it though the call fails."""
    service.latency = 0.05
    answers = Remembering()
    service.fail("status", status=500, times=1)
    with encoding(profile(service, batch_size=50), embedding_attempts=1) as encoder:
        with pytest.raises(OutageError):
            encoder.encode_documents(TEXTS, answers.on_answer)
        assert len(answers.vectors) == len(service.billed) > 0
        encoder.encode_documents(
            [text for text in TEXTS if content_hash(text) not in answers.vectors], answers.on_answer
        )
    kept = np.stack([answers.vectors[content_hash(text)] for text in TEXTS])
    assert np.allclose(kept, expected(TEXTS), atol=1e-6)
    assert service.counts()["twice"] == 0


class Remembering:
    """What keeps answers, in memory."""

    def __init__(self) -> None:
        self.vectors: dict[bytes, NDArray[np.float32]] = {}
        self.tokens = 0

    def on_answer(self, vectors: Mapping[bytes, NDArray[np.float32]], billed: int | None) -> None:
        self.vectors.update(vectors)
        self.tokens += billed or 0


def test_answers_are_handed_on_by_the_content_without_its_prompt(service) -> None:
    answers = Remembering()
    with encoding(profile(service, document_prompt="passage: ")) as encoder:
        encoder.encode_documents(["one", "two"], answers.on_answer)
    assert set(answers.vectors) == {content_hash("one"), content_hash("two")}
    assert answers.tokens == service.tokens_billed


@pytest.mark.parametrize("kind", ["short", "long", "duplicate", "dimension", "nan", "zeros"])
def test_what_an_answer_of_no_use_is_billed_is_told_too(service, kind) -> None:
    answers = Remembering()
    service.fail(kind)
    with encoding(profile(service)) as encoder:
        encoder.encode_documents(["one", "two"], answers.on_answer)
    assert answers.tokens == service.tokens_billed and set(service.billed.values()) == {2}


def test_an_answer_that_cannot_be_kept_fails_the_call_and_is_not_asked_for_again(service) -> None:
    def full(vectors: Mapping[bytes, NDArray[np.float32]], billed: int | None) -> None:
        raise OSError("no room")

    with encoding(profile(service)) as encoder, pytest.raises(OSError, match="no room"):
        encoder.encode_documents(["one"], full)
    assert service.billed["one"] == 1
