"""A hosted model over real HTTP: what its server does wrong, and what that means for texts, runs and people."""

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import SecretStr

from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders import hosted, load_encoder
from embeddings_pipeline.encoders.base import PoisonTextsError
from embeddings_pipeline.encoders.hosted import HostedEncoder
from embeddings_pipeline.encoders.outage import duration, wait_said
from embeddings_pipeline.errors import OutageError, ProfileError
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, vector_of

SMALL = "text-embedding-3-small"
KEY = "sk-very-secret-0123456789"
TEXTS = [f"a film about number {n}" for n in range(300)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts, shortened."""
    monkeypatch.setattr(hosted, "FIRST_WAIT", 0.01)


def profile(service: EmbeddingServer | None, **others: Any) -> Profile:
    url = {"url": service.url} if service else {}
    defaults = {"name": "test", "provider": "openai", "model": SMALL, "dimensions": 64, "requests_per_minute": 0}
    return Profile(**{**defaults, **url, **others})


@contextlib.contextmanager
def encoding(given: Profile, **settings: Any) -> Iterator[HostedEncoder]:
    encoder = HostedEncoder(given, Settings(**settings))
    try:
        yield encoder
    finally:
        encoder.close()


def expected(texts: Sequence[str], dimensions: int = 64, model: str = SMALL) -> NDArray[np.float32]:
    return np.stack([vector_of(text, model, dimensions) for text in texts])


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- answers ----------------------------------------------------------------------------------------------------------


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


# --- outages ----------------------------------------------------------------------------------------------------------

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
        assert 0.3 <= time.monotonic() - began < 2


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


def test_an_answer_that_cannot_be_kept_fails_the_call_and_is_not_asked_for_again(service) -> None:
    def full(vectors: Mapping[bytes, NDArray[np.float32]], billed: int | None) -> None:
        raise OSError("no room")

    with encoding(profile(service)) as encoder, pytest.raises(OSError, match="no room"):
        encoder.encode_documents(["one"], full)
    assert service.billed["one"] == 1


# --- what only a person can mend -----------------------------------------------------------------------------------

QUOTA = {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}}
WORDS = {"error": {"message": "no such thing", "code": None}}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "body": WORDS}, "answered 401: no such thing; it wants a key, and none is set"),
        ({"status": 403, "body": WORDS}, "answered 403: no such thing; it wants a key"),
        ({"status": 402, "body": WORDS}, "add credit to the account"),
        ({"status": 429, "body": QUOTA}, "You exceeded your current quota; add credit to the account"),
        ({"status": 407, "body": WORDS}, "the proxy wants a user and password: see HTTP_PROXY and HTTPS_PROXY"),
        ({"status": 405, "body": WORDS}, "answered 405: no such thing; correct the profile"),
        ({"status": 400, "body": {"error": {"message": "`dimensions` is too large"}}}, "correct `dimensions:` (64)"),
        ({"status": 400, "body": {"error": {"message": "no", "param": "model"}}}, "correct the profile (text-emb"),
    ],
)
def test_what_no_other_try_can_mend_stops_at_once_with_the_remedy(service, fault, said) -> None:
    service.fail("status", times=9, **fault)
    with encoding(profile(service)) as encoder, pytest.raises(ProfileError) as error:
        encoder.encode_documents(["one", "two"])
    assert said in one_line(error.value)
    assert service.requests == 1


def test_a_model_that_does_not_exist_is_named(service) -> None:
    with encoding(profile(service, model="no-such-model")) as encoder, pytest.raises(ProfileError) as error:
        encoder.encode_documents(["one"])
    assert "The model `no-such-model` does not exist.; correct `model:` (no-such-model)" in one_line(error.value)


@pytest.mark.parametrize(
    ("model", "dimensions", "may_be"),
    [(SMALL, 1537, "1 to 1,536"), ("text-embedding-ada-002", 384, "1,536 and no other")],
)
def test_dimensions_that_the_model_cannot_give_are_refused_before_a_request(model, dimensions, may_be) -> None:
    with pytest.raises(ProfileError, match=f"cannot give .* dimensions: `dimensions:` may be {may_be}"):
        HostedEncoder(profile(None, model=model, dimensions=dimensions, url="http://127.0.0.1:9/v1"), Settings())


def test_an_address_without_v1_is_told_what_it_usually_is(service) -> None:
    given = profile(None, url=service.url.removesuffix("/v1"))
    with encoding(given) as encoder, pytest.raises(ProfileError, match=r"usually ends in /v1: http://[^ ]*/v1\)"):
        encoder.encode_documents(["one"])


def test_a_slash_at_the_end_of_the_address_changes_nothing(service) -> None:
    with encoding(profile(None, url=service.url + "/")) as encoder:
        assert np.allclose(encoder.encode_documents(["one"]), expected(["one"]), atol=1e-6)


def test_a_redirect_is_not_followed_but_told(service) -> None:
    service.fail("redirect", location="https://user:s3cret@elsewhere.example/v1/embeddings?key=s3cret")
    with encoding(profile(service)) as encoder, pytest.raises(ProfileError) as error:
        encoder.encode_documents(["one"])
    assert "it is now at https://elsewhere.example/v1: set that address" in one_line(error.value)
    assert "s3cret" not in str(error.value)


def test_a_proxy_that_wants_a_password_is_named(service, monkeypatch) -> None:
    service.fail("status", status=407, body={}, times=9)
    monkeypatch.setenv("HTTP_PROXY", service.url.removesuffix("/v1"))
    given = profile(None, url="http://embeddings.example/v1")
    with encoding(given) as encoder, pytest.raises(ProfileError, match="the proxy wants a user and password"):
        encoder.encode_documents(["one"])


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8080/v1",
        "ftp://host/v1",
        "http://",
        "http://host:x/v1",
        "http://user:s3cret@host/v1",
        "https://h/?k=s3cret",
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(url) -> None:
    for given, settings in ((profile(None, url=url), {}), (profile(None), {"openai_base_url": url})):
        with pytest.raises(ProfileError, match=r"`url:`|OPENAI_BASE_URL") as error:
            HostedEncoder(given, Settings(**settings))
        assert "https://host/v1" in one_line(error.value) and "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (KEY + "\n", "white space or a line break around it"),
        (f" {KEY}", "white space or a line break around it"),
        (KEY.replace("-", "\n", 1), "white space or a line break in it"),
        (KEY.replace("-", " ", 1), "white space or a line break in it"),
        (f'"{KEY}"', "quotes around it"),
        (KEY + "\x07", "characters that no key has"),
        (KEY + "ü", "characters that no key has"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_without_repeating_it(key, said) -> None:
    with pytest.raises(ProfileError, match=f"OPENAI_API_KEY has {said}") as error:
        HostedEncoder(BUILT_IN["openai"], Settings(openai_api_key=SecretStr(key)))
    assert "secret" not in one_line(error.value)


def test_without_a_key_openai_is_not_asked() -> None:
    with pytest.raises(ProfileError, match="OPENAI_API_KEY is not set: export it or put it in"):
        load_encoder(BUILT_IN["openai"], Settings())


def test_quotes_around_a_key_in_an_env_file_are_the_files(tmp_path, monkeypatch, service) -> None:
    (tmp_path / "dagster.yaml").touch()
    (tmp_path / ".env").write_text(f"OPENAI_API_KEY=\"{KEY}\"\nOPENAI_BASE_URL='{service.url}'\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    service.key = KEY
    settings = load_settings()
    encoder = HostedEncoder(profile(None), settings)
    assert np.allclose(encoder.encode_documents(["one"]), expected(["one"]), atol=1e-6)
    encoder.close()


def test_nothing_paid_is_asked_while_it_is_switched_off(service) -> None:
    with encoding(profile(service), embedding_enabled=False) as encoder:
        for method in (encoder.encode_documents, encoder.encode_queries):
            with pytest.raises(ProfileError, match="EMBEDDING_ENABLED=false forbids every request to http://127"):
                method(["one"])
    assert service.requests == 0


@pytest.mark.parametrize("status", [401, 500, 400])
def test_the_key_is_in_no_message_log_or_traceback(service, status, caplog) -> None:
    """Though the server repeats it."""
    caplog.set_level(logging.DEBUG)
    body = {"error": {"message": f"Bearer {KEY} is not welcome", "code": None}}
    service.fail("status", status=status, body=body, times=99)
    settings = {"openai_api_key": SecretStr(KEY), "openai_base_url": service.url}
    with encoding(profile(None), **settings) as encoder:
        with pytest.raises((ProfileError, OutageError)) as error:
            encoder.encode_documents(["one"])
        shown = "".join(traceback.format_exception(error.value)) + caplog.text + repr(encoder) + repr(vars(encoder))
    assert service.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in shown and "Bearer ***" in str(error.value)


# --- poison -----------------------------------------------------------------------------------------------------------


def test_exactly_the_texts_that_are_refused_are_poison_in_the_servers_words(service) -> None:
    texts = [f"POISON {n}" if n in (7, 150, 151) else text for n, text in enumerate(TEXTS)]
    with encoding(profile(service, batch_size=300)) as encoder, pytest.raises(PoisonTextsError) as error:
        encoder.encode_documents(texts)
    assert set(error.value.reasons) == {7, 150, 151}
    assert error.value.reasons[7].startswith("Your input was rejected by the safety system.")
    good = [n for n in range(300) if n not in error.value.reasons]
    assert np.allclose(error.value.vectors[good], expected([texts[n] for n in good]), atol=1e-6)
    assert service.counts()["twice"] == 0 and len(service.billed) == 297


def test_a_server_that_takes_fewer_texts_a_request_blames_none(service) -> None:
    service.most_inputs = 32
    with encoding(profile(service, batch_size=300)) as encoder:
        assert np.allclose(encoder.encode_documents(TEXTS), expected(TEXTS), atol=1e-6)
    assert service.counts()["twice"] == 0


def test_texts_of_300_001_tokens_are_several_requests(service) -> None:
    texts = [f"{n:3} " * 8000 for n in range(38)]  # 8,000 tokens each
    with encoding(profile(service)) as encoder:
        assert np.allclose(encoder.encode_documents(texts), expected(texts), atol=1e-6)
    assert (service.counts()["texts"], service.refused) == (38, 0)


def test_a_server_that_refuses_even_a_harmless_text_is_at_fault_itself(service) -> None:
    service.fail("status", status=400, body={"error": {"message": "I take nothing"}}, times=99)
    with encoding(profile(service)) as encoder, pytest.raises(ProfileError, match="refuses even 'a plain sentence'"):
        encoder.encode_documents(["one", "two"])


def test_a_text_over_the_limit_is_refused_with_its_length_and_the_others_go_on(service) -> None:
    texts = ["short", "x" * 40_000, "y" * 100_000, "also short"]
    with encoding(profile(service)) as encoder, pytest.raises(PoisonTextsError) as error:
        encoder.encode_documents(texts)
    assert "maximum context length is 8192 tokens" in error.value.reasons[1]
    assert "40,000 characters" in error.value.reasons[1]
    assert "100,000 characters, about 25,000 tokens (estimated)" in error.value.reasons[2]
    assert np.allclose(error.value.vectors[[0, 3]], expected(["short", "also short"]), atol=1e-6)


def test_a_text_over_the_limit_is_cut_if_the_profile_says_so(service) -> None:
    texts = ["short", "x" * 100_000]
    with encoding(profile(service, truncate=True)) as encoder:
        vectors = encoder.encode_documents(texts)
        assert encoder.max_length == 8192 and encoder.count_tokens(texts).tolist() == [2, 25_000]
    assert np.allclose(vectors, expected(["short", "x" * 8192 * 4]), atol=1e-6)


def test_a_text_that_was_cut_too_little_is_cut_again(service) -> None:
    with encoding(profile(service, truncate=True, max_length=9000)) as encoder:
        assert np.allclose(encoder.encode_documents(["x" * 40_000]), expected(["x" * 28_800]), atol=1e-6)


def test_texts_that_cannot_be_sent_are_cleaned_or_refused(service) -> None:
    with encoding(profile(service)) as encoder, pytest.raises(PoisonTextsError) as error:
        encoder.encode_documents(["lone \ud800 surrogate", " \u200b\n", ""])
    assert error.value.reasons == {1: "the text is blank", 2: "the text is blank"}
    assert service.billed["lone \ufffd surrogate"] == 1
