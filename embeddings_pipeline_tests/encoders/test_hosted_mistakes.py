"""Mistakes of people and texts with a hosted model: one line with the remedy, and no text blamed for another's."""

import contextlib
import logging
import socket
import threading
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pydantic import SecretStr

from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.base import PoisonTextsError
from embeddings_pipeline.encoders.hosted import HostedEncoder
from embeddings_pipeline.errors import OutageError, ProfileError
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

QUOTA = {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}}
HTML = b"<html><body>Access denied</body></html>"
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


def test_an_address_with_the_path_of_requests_is_told_what_it_usually_is(service) -> None:
    with encoding(profile(None, url=f"{service.url}/embeddings")) as encoder, pytest.raises(ProfileError) as error:
        encoder.encode_documents(["one"])
    assert one_line(error.value).endswith(f"correct the address (it usually ends in /v1: {service.url})")


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_a_slash_at_the_end_of_the_address_changes_nothing(service, slashes) -> None:
    with encoding(profile(None, url=service.url + slashes)) as encoder:
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


@pytest.fixture
def proxy() -> Iterator[Callable[[str], str]]:
    """The address, with a password, of a proxy that answers everything with this status and a page."""
    with contextlib.ExitStack() as listening:

        def start(status: str) -> str:
            server = listening.enter_context(socket.create_server(("127.0.0.1", 0)))
            threading.Thread(target=answer_each, args=(server, status), daemon=True).start()
            return f"http://user:s3cret@127.0.0.1:{server.getsockname()[1]}"

        yield start


def answer_each(server: socket.socket, status: str) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(HTML)}\r\nConnection: close\r\n\r\n"
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(head.encode() + HTML)


@pytest.mark.parametrize(
    ("scheme", "status", "kind", "said"),
    [
        ("http", "407 Proxy Authentication Required", ProfileError, "the proxy wants a user and password"),
        ("https", "407 Proxy Authentication Required", ProfileError, "the proxy wants a user and password"),
        ("http", "200 OK", OutageError, "answered with text/html where JSON is due"),
        ("https", "200 OK", OutageError, "does not answer"),
        ("http", "403 Forbidden", ProfileError, "answered 403: a page of HTML, which may be a proxy's"),
        ("https", "403 Forbidden", OutageError, "does not answer (ProxyError: 403 Forbidden)"),
        ("http", "400 Bad Request", ProfileError, "refuses even 'a plain sentence': a page of HTML"),
        ("http", "502 Bad Gateway", OutageError, "answered 502: a page of HTML"),
    ],
)
def test_what_a_proxy_answers_blames_no_text_and_tells_no_password(
    proxy, monkeypatch, caplog, scheme, status, kind, said
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy(status))
    given = profile(None, url=f"{scheme}://embeddings.example/v1", timeout_seconds=5)
    with encoding(given) as encoder, pytest.raises(kind) as error:
        encoder.encode_documents(["one"])
    assert said in one_line(error.value)
    assert "s3cret" not in "".join(traceback.format_exception(error.value)) + caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "gopher://user:s3cret@host"),
        ("HTTPS_PROXY", "http://user:s3cret@host:x"),
        ("ALL_PROXY", "socks5://user:s3cret@host:1080"),  # for which a package is missing
        ("SSL_CERT_FILE", "/nowhere/s3cret.pem"),
    ],
)
def test_a_proxy_or_certificate_that_is_none_is_refused_in_one_line(service, monkeypatch, name, value) -> None:
    monkeypatch.setenv(name, value)
    with encoding(profile(service)) as encoder, pytest.raises(ProfileError) as error:
        encoder.encode_documents(["one"])
    assert name in one_line(error.value)
    assert "s3cret" not in "".join(traceback.format_exception(error.value))
    assert service.requests == 0


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
    texts = [f"{n:3} " * 8000 for n in range(37)] + ["one " * 4001]  # a token is four bytes
    with encoding(profile(service)) as encoder:
        assert encoder.count_tokens(texts).sum() == 300_001
        assert np.allclose(encoder.encode_documents(texts), expected(texts), atol=1e-6)
    assert (service.counts()["texts"], service.refused) == (38, 0)
    assert service.requests > 1


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
