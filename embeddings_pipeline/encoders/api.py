"""One server that speaks OpenAI's protocol for embeddings: its address and key, one request, and what its answer means.

`EmbeddingApi.ask` sends one request once. It returns vectors that were looked at, or raises one of

| error | what failed | what the encoder does |
|---|---|---|
| ServiceOutageError | the server, the way to it, or an answer that is no good | asks again, a few times |
| RefusedInputsError | these inputs, together or one of them | halves them |
| ProfileError | key, address, model or account: nothing will help but a person | stops |

No message, and no error that it came from, holds the key: servers repeat what they were sent.
"""

import asyncio
import base64
import binascii
import json
import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings, environment_value, revealed
from embeddings_pipeline.encoders.limits import KNOWN
from embeddings_pipeline.encoders.outage import is_outage, is_outage_status, wait_said
from embeddings_pipeline.errors import OutageError, ProfileError

if TYPE_CHECKING:
    import httpx2
    from openai import APIStatusError, AsyncOpenAI, Omit

OPENAI_URL = "https://api.openai.com/v1"
CONNECT_SECONDS = 10
LONGEST_WORDS = 300  # of a server, in a message
MOST_BILLED = 10**9  # tokens of an answer; more is no bill
PAGE = "a page of HTML, which may be a proxy's"

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_OF_THE_REQUEST = {"model", "dimensions", "encoding_format", "user"}  # a 400 about these concerns no input


class Answer(NamedTuple):
    """Vectors (float32, a row a text, in the order of the texts), the tokens billed if it says so, and its headers."""

    vectors: NDArray[np.float32]
    tokens: int | None
    headers: Mapping[str, str]


class ServiceOutageError(OutageError):
    """The server cannot answer now. `busy`: it says so itself (429); `wait`: how many seconds it says to wait;
    `billed`: tokens of an answer that is of no use.
    """

    def __init__(
        self,
        message: str,
        *,
        busy: bool = False,
        wait: float | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        billed: int | None = None,
    ) -> None:
        super().__init__(message)
        self.busy, self.wait, self.headers, self.billed = busy, wait, headers, billed


class RefusedInputsError(Exception):
    """The server refuses these inputs; `str()` is what it says."""


class EmbeddingApi:
    """The server of a profile. `ask` is called in one event loop only."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        """ProfileError if address, key or headers are no such things."""
        self.profile = profile
        self._who = f"Profile {profile.name}"
        self._timeout = profile.timeout_seconds
        self.url = self._address(settings)
        self._key = self._read_key(settings)
        self._headers = {name: self._expanded(value, f"header {name}") for name, value in profile.headers}
        secrets = [value for value in (self._key, *self._headers.values()) if value]
        self._secrets = sorted(secrets, key=len, reverse=True)
        parts = urlsplit(self.url)
        self.place = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._client: AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # whose connections the client has

    @property
    def secret(self) -> str:
        """What makes the account, to be hashed with the address; never to be shown."""
        return self._key

    async def ask(self, model: str, texts: Sequence[str]) -> Answer:
        """The vectors of these texts from one request, sent once."""
        import httpx2
        import openai
        from openai._types import RequestOptions

        client, options = self.connected(), RequestOptions(headers=self.headers)
        # `client.embeddings.create` looks at each text's type for longer than all else takes.
        body = self.body(model, texts)
        try:
            response = await client.post("/embeddings", body=body, cast_to=httpx2.Response, options=options)
        except openai.APIStatusError as error:
            raise self.refusal(error, model) from None
        except openai.APIConnectionError as error:
            raise self.unreachable(error) from None
        return self._read(response, len(texts))

    def body(self, model: str, texts: Sequence[str]) -> dict[str, Any]:
        """What is asked about these texts."""
        body: dict[str, Any] = {"model": model, "input": list(texts), "encoding_format": "base64"}
        if self._asks_dimensions(model):
            body["dimensions"] = self.profile.dimensions
        return body

    @property
    def headers(self) -> "dict[str, str | Omit]":
        """What each request has beside the client's own headers."""
        import openai

        is_told = self._key or "authorization" in {name.lower() for name in self._headers}
        return {} if is_told else {"Authorization": openai.Omit()}

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    # --- address, key, headers ------------------------------------------------------------------------------------

    def _address(self, settings: Settings) -> str:
        where = "`url:`" if self.profile.url else "OPENAI_BASE_URL"
        url = (
            self._expanded(self.profile.url or revealed(settings.openai_base_url) or OPENAI_URL, where)
            .strip()
            .rstrip("/")
        )
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            usable = False
        remedy = "write it as https://host/v1"
        if not usable or re.search(r"\s", url):
            raise ProfileError(f"{self._who}: {where} is no address of a server: {remedy}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ProfileError(
                f"{self._who}: {where} may hold no user, password, ? or #: {remedy}, a key in OPENAI_API_KEY or in the "
                "variable that `key_variable:` names, and anything else in `headers:`"
            )
        return url

    def _read_key(self, settings: Settings) -> str:
        name = self.profile.key_variable or ("" if self.profile.url else "OPENAI_API_KEY")
        if name == "OPENAI_API_KEY":
            key = revealed(settings.openai_api_key)
        else:
            key = environment_value(name) if name else None
        if not key:
            if self.url == OPENAI_URL or self.profile.key_variable:
                raise ProfileError(
                    f"{self._who}: {name or 'the key of OpenAI'} is not set: export it or put it in .env, or set "
                    "another `key_variable:` in the profile"
                )
            return ""
        if wrong := _wrong_with(key):
            raise ProfileError(f"{self._who}: {name} {wrong}: set it to the key and nothing else")
        return key

    def _expanded(self, text: str, where: str) -> str:
        def value(match: re.Match[str]) -> str:
            found = environment_value(match[1])
            if found is None:
                raise ProfileError(f"{self._who}: {where} names ${{{match[1]}}}, which is not set; export it")
            if where.startswith("header") and (wrong := _wrong_with(found, inside=" ")):
                raise ProfileError(f"{self._who}: {match[1]} {wrong}: correct it")
            return found

        return _VARIABLE.sub(value, text)

    def _asks_dimensions(self, model: str) -> bool:
        known = KNOWN.get(model)
        return self.profile.send_dimensions or (known is not None and self.profile.dimensions != known.dimensions)

    def connected(self) -> "AsyncOpenAI":
        """The client; a new one if there is another event loop than before: after a fork. ProfileError if it cannot be
        made of what the environment says of proxies and certificates.
        """
        import httpx2
        import openai

        loop = asyncio.get_running_loop()
        if self._client is not None and self._loop is loop:
            return self._client
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request
        try:
            client = openai.DefaultAsyncHttpxClient(follow_redirects=False)
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:  # whose words may hold a password
            raise ProfileError(
                f"{self._who}: {self.place} cannot be asked with these proxies and certificates "
                f"({type(error).__name__}): a proxy is http://host:port in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, and "
                "SSL_CERT_FILE and SSL_CERT_DIR name what is there"
            ) from None
        self._loop, self._client = (
            loop,
            openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self.url,
                max_retries=0,
                timeout=httpx2.Timeout(self._timeout, connect=CONNECT_SECONDS),
                default_headers=self._headers,
                http_client=client,
                _enforce_credentials=False,
            ),
        )
        return self._client

    # --- what went wrong ------------------------------------------------------------------------------------------

    def refusal(self, error: "APIStatusError", model: str) -> Exception:
        """What an answer with another status than 200 means."""
        status, headers = error.status_code, error.response.headers
        words = self._words(error)
        said = f"{self._who}: {self.place} answered {status}{f': {words}' if words else ''}"
        if error.code == "insufficient_quota" or error.type == "insufficient_quota" or status == 402:
            return ProfileError(f"{said}; add credit to the account, or use another key")
        if is_outage_status(status):
            return ServiceOutageError(said, busy=status == 429, wait=wait_said(headers), headers=headers)
        match status:
            case 401 | 403:
                key = "the key may not be used for this" if self._key else "it wants a key, and none is set"
                return ProfileError(f"{said}; {key}: see {self.profile.key_variable or 'OPENAI_API_KEY'}")
            case 404 if error.code == "model_not_found" or "model" in words.lower():
                return ProfileError(f"{said}; correct `model:` ({model}), or the address")
            case 404:
                usual = f"{self.place.removesuffix('/embeddings').removesuffix('/v1')}/v1"
                ending = "" if usual == self.place else f" (it usually ends in /v1: {usual})"
                return ProfileError(f"{said}; no embeddings are served there: correct the address{ending}")
            case 407:
                return ProfileError(f"{said}; the proxy wants a user and password: see HTTP_PROXY and HTTPS_PROXY")
            case 400 | 413 | 422 if not self._concerns_request(error, words):
                return RefusedInputsError(words or f"the server answered {status}")
        if 300 <= status < 400:
            target = urlsplit(headers.get("location", ""))
            return ProfileError(
                f"{said}; it is now at {target.scheme}://{target.hostname}{target.path.removesuffix('/embeddings')}: "
                "set that address"
            )
        if "dimension" in words.lower():
            return ProfileError(f"{said}; correct `dimensions:` ({self.profile.dimensions}) of the profile")
        return ProfileError(f"{said}; correct the profile ({model}, {self.profile.dimensions} dimensions)")

    @staticmethod
    def _concerns_request(error: "APIStatusError", words: str) -> bool:
        return error.param in _OF_THE_REQUEST or error.code == "model_not_found" or "dimensions" in words.lower()

    def unreachable(self, error: Exception) -> Exception:
        """What it means that no answer came."""
        cause = error.__cause__ or error
        said = f"{self._who}: {self.place} does not answer ({type(cause).__name__}: {self.clean(str(cause))})"
        if re.search(r"\b407\b", str(cause)):
            return ProfileError(f"{said}; the proxy wants a user and password: see HTTP_PROXY and HTTPS_PROXY")
        assert is_outage(error)
        return ServiceOutageError(f"{said}; is the address right, and the network up?")

    def _words(self, error: "APIStatusError") -> str:
        """What the server says, in one line; of a page only that it is one."""
        body = error.body
        if isinstance(body, Mapping):
            body = body.get("message") or body.get("error") or body.get("detail") or json.dumps(body)
        text = body if isinstance(body, str) else json.dumps(body or "")
        return PAGE if "<html" in text.lower() else self.clean(text.strip('"'))

    def clean(self, text: str) -> str:
        """Words of a server on one line, without the key."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:LONGEST_WORDS]

    # --- what it answered -----------------------------------------------------------------------------------------

    def _read(self, response: "httpx2.Response", texts: int) -> Answer:
        kind = response.headers.get("content-type", "")
        if "json" not in kind:
            raise self._useless(f"answered with {kind or 'nothing'} where JSON is due; is the address right (…/v1)?")
        try:
            body = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise self._useless(f"gave an answer that cannot be read ({type(error).__name__})") from None
        return self.answer_of(body, texts, response.headers)

    def answer_of(self, body: Any, texts: int, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        """The vectors of an answer to so many texts; ServiceOutageError if it is no good one."""
        tokens = _billed(body)
        try:
            data = body["data"]
            numbers = [entry["index"] for entry in data]
            given = {entry["index"]: _decoded(entry["embedding"]) for entry in data}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, binascii.Error) as error:
            raise self._useless(f"gave an answer that cannot be read ({type(error).__name__})", tokens) from None
        if len(numbers) != texts or set(numbers) != set(range(texts)):
            raise self._useless(f"gave {len(numbers)} vectors ({len(given)} numbers) for {texts} texts", tokens)
        lengths = {len(vector) for vector in given.values()}
        if lengths != {self.profile.dimensions}:
            raise self._useless(
                f"gave vectors of {', '.join(map(str, sorted(lengths)))} numbers; the profile says `dimensions: "
                f"{self.profile.dimensions}`",
                tokens,
            )
        vectors = np.stack([given[n] for n in range(texts)])
        with np.errstate(all="ignore"):
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and (norms > 0).all()):
            raise self._useless("gave a vector that is not finite, or zero", tokens)
        if self.profile.normalize:
            vectors = vectors / norms
        return Answer(vectors, tokens, headers)

    def _useless(self, what: str, billed: int | None = None) -> ServiceOutageError:
        return ServiceOutageError(f"{self._who}: {self.place} {what}", billed=billed)


def _billed(body: Any) -> int | None:
    """The tokens that an answer says it is billed; None if it does not."""
    usage = body.get("usage") if isinstance(body, Mapping) else None
    if not isinstance(usage, Mapping):
        return None
    tokens = usage.get("total_tokens", usage.get("prompt_tokens"))
    return tokens if type(tokens) is int and 0 <= tokens <= MOST_BILLED else None


def _decoded(embedding: Any) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    with np.errstate(over="ignore"):
        return np.array(embedding, dtype=np.float32).reshape(-1)


def _wrong_with(secret: str, inside: str = "") -> str | None:
    """Why a text cannot be sent as a key or in a header."""
    if secret != secret.strip():
        return "has white space or a line break around it"
    if re.search(r"\s", secret.replace(inside, "") if inside else secret):
        return "has white space or a line break in it"
    if secret[0] in "\"'" or secret[-1] in "\"'":
        return "has quotes around it"
    return None if secret.isascii() and secret.isprintable() else "has characters that no key has"
