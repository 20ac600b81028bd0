"""Encoding with a hosted model: texts go out in few large requests, many at once, and come back matched by index.

What happens to a text or request is decided by the kind of error (`api.py`): an outage is waited for and tried again, a
few times; inputs that are refused are halved down to those that are refused alone, which `PoisonTextsError` names. The
other texts of the call keep their vectors.

What keeps answers (`answers.py`) gives `encode_documents` an `on_answer`, which is called with each answer as it
arrives, in a thread, before it is used; an answer that cannot be kept fails the call. Contents are those of documents:
`content_hash` of a text without its prompt. Queries are not kept.
"""

import asyncio
import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import clean, content_hash, visible
from embeddings_pipeline.encoders.api import Answer, EmbeddingApi, RefusedInputsError, ServiceOutageError
from embeddings_pipeline.encoders.base import HARMLESS, OnAnswer, PoisonTextsError
from embeddings_pipeline.encoders.limits import BYTES_PER_TOKEN, KNOWN, estimated_tokens, limits_of, packed
from embeddings_pipeline.encoders.pace import Pace
from embeddings_pipeline.encoders.rate import Rate, taken
from embeddings_pipeline.encoders.tokens import count_tokens
from embeddings_pipeline.errors import OutageError, ProfileError
from embeddings_pipeline.forks import ProcessLock

LEAST_INPUTS, AT_ONCE = 64, 64  # where requests are free, the texts of a call are spread over so many of them
SURELY_TOO_LONG = 2.0  # times the limit, by the estimate: not sent at all. Below it, the server decides
CUT_AGAIN, CUTS = 0.8, 6  # what is left of a text that is still too long after it was cut, and how often
ATTEMPTS = 3
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0  # between attempts at a server that fails
BUSY_WAIT, LONGEST_BUSY_WAIT = 0.25, 1.0  # after a 429 that names no time
PATIENCE = 600.0  # seconds without a good answer after which a server that only says 429 is an outage

T = TypeVar("T")


class HostedEncoder:
    """See `Encoder` for the methods. Made by `load_encoder` for `provider: openai`."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        """Nothing is sent yet. ProfileError if the profile cannot be what it says."""
        _check(profile)
        self.profile = profile
        self.api = EmbeddingApi(profile, settings)
        self.limits = limits_of(profile)
        self.counted: Counter[str] = Counter()  # requests, good answers, tries again, tokens, texts refused or cut
        self._enabled, self._attempts = settings.embedding_enabled is not False, settings.embedding_attempts or ATTEMPTS
        self._rate = Rate(profile, settings, self.api.url, self.api.secret)
        self._estimate = _Estimate()
        self._loop = _Loop()

    @property
    def dimensions(self) -> int:
        return self.profile.dimensions

    @property
    def account(self) -> str:
        """Whom the server bills: a hash of its address and the key."""
        return self._rate.account

    @property
    def max_length(self) -> int | None:
        """Tokens after which a text is cut; None if none is: a longer one is refused, by itself."""
        return self.limits.tokens_per_input if self.profile.truncate else None

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """By the model's own tokenizer if it is here, else an estimate; see `tokens.py`."""
        return count_tokens(self.profile, list(map(clean, texts)))

    def encode_documents(self, texts: Sequence[str], on_answer: OnAnswer | None = None) -> NDArray[np.float32]:
        return self._answered(texts, self.profile.model, self.profile.document_prompt, on_answer)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._answered(texts, self.profile.query_model or self.profile.model, self.profile.query_prompt)

    def close(self) -> None:
        """Close connections and the thread. A later call opens them again."""
        self._loop.end(self.api.close)

    def _answered(
        self, texts: Sequence[str], model: str, prompt: str | None, on_answer: OnAnswer | None = None
    ) -> NDArray[np.float32]:
        cleaned = list(map(clean, texts))
        digests = list(map(content_hash, cleaned))
        call = _Call(model, prompt or "", dict(zip(digests, cleaned, strict=True)), on_answer)
        if texts:
            self._run(call)
        return self._result(digests, call.vectors, call.reasons)

    def _run(self, call: "_Call") -> None:
        if not self._enabled:
            raise ProfileError(
                f"Profile {self.profile.name}: EMBEDDING_ENABLED=false forbids every request to {self.api.place}; "
                "unset it to go on"
            )
        self._loop.run(self._encode(call))

    def _result(
        self, digests: list[bytes], vectors: Mapping[bytes, NDArray[np.float32]], reasons: Mapping[bytes, str]
    ) -> NDArray[np.float32]:
        nothing = np.full(self.dimensions, np.nan, np.float32)
        rows = [vectors.get(digest, nothing) for digest in digests]
        result = np.stack(rows) if rows else np.empty((0, self.dimensions), np.float32)
        refused = {place: reasons[digest] for place, digest in enumerate(digests) if digest in reasons}
        if refused:
            first = next(iter(refused.values()))
            message = f"Profile {self.profile.name}: {len(refused)} of {len(digests)} texts are refused: {first}"
            raise PoisonTextsError(message, refused, result)
        return result

    # --- in the loop's thread -------------------------------------------------------------------------------------

    async def _encode(self, call: "_Call") -> None:
        """Every text of the call gets its vector or its reason. Raises the first error that concerns all of them; what
        is under way then is waited for, since it is paid for."""
        digests = list(self._sendable(call))
        tokens = self._estimate.of([call.prompted[digest] for digest in digests])
        most = min(self.limits.tokens or float("inf"), self._rate.most_tokens)
        inputs = self.limits.inputs
        if not self._rate.limits_requests:
            inputs = min(inputs, max(LEAST_INPUTS, len(digests) // AT_ONCE))
        requests = packed(tokens, inputs, most)
        tasks = [self._try_request(call, [digests[place] for place in request]) for request in requests]
        await asyncio.gather(*tasks)
        if call.failure is None and call.reasons and not call.vectors and call.asked:
            await self._try_harmless(call)
        if call.failure is not None:
            raise call.failure

    def _sendable(self, call: "_Call") -> list[bytes]:
        """The contents that are sent, with their prompt; those that surely are too long are cut, or have a reason."""
        most = self.limits.tokens_per_input
        for digest, text in call.texts.items():
            prompted = call.prompt + text
            tokens = int(estimated_tokens([prompted])[0])
            if not visible(text):
                call.reasons[digest] = "the text is blank"
            elif most and tokens > most and self.profile.truncate:
                call.prompted[digest] = _cut(prompted, most * BYTES_PER_TOKEN)
                self.counted["cut"] += 1
            elif most and tokens > SURELY_TOO_LONG * most:
                call.reasons[digest] = _too_long(len(text), tokens, most)
            else:
                call.prompted[digest] = prompted
        return list(call.prompted)

    async def _try_request(self, call: "_Call", digests: list[bytes]) -> None:
        try:
            await self._request(call, digests)
        except Exception as error:  # raised by `_encode`, once the others have ended
            call.failure = call.failure or error

    async def _request(self, call: "_Call", digests: list[bytes]) -> None:
        """One request, halved for as long as its inputs are refused."""
        texts = [call.prompted[digest] for digest in digests]
        try:
            answer = await self._ask(call, texts, digests)
        except RefusedInputsError as error:
            if len(digests) == 1:
                await self._refused_alone(call, digests[0], str(error))
                return
            half = len(digests) // 2
            for part in (digests[:half], digests[half:]):
                await self._request(call, part)
            return
        if answer is None:
            return
        call.vectors.update(zip(digests, answer.vectors, strict=True))

    async def _refused_alone(self, call: "_Call", digest: bytes, words: str) -> None:
        """A text that the server refuses by itself; one that may be cut is cut again."""
        text, most = call.prompted[digest], self.limits.tokens_per_input
        tokens = int(estimated_tokens([text])[0])
        if self.profile.truncate and most and tokens > most * CUT_AGAIN**CUTS:
            call.prompted[digest] = _cut(text, int(len(text.encode()) * CUT_AGAIN))
            await self._request(call, [digest])
            return
        self.counted["refused"] += 1
        length = f" (the text has {len(text):,} characters, about {tokens:,} tokens)"
        call.reasons[digest] = f"{words}{length}"

    async def _try_harmless(self, call: "_Call") -> None:
        """ProfileError if the server refuses a harmless text as well: then it is not the texts (rule 7)."""
        try:
            await self._ask(call, [call.prompt + HARMLESS])
        except RefusedInputsError as error:
            call.failure = ProfileError(
                f"Profile {self.profile.name}: {self.api.place} refuses even {HARMLESS!r}: {error}; correct the profile"
            )
        except Exception as error:
            call.failure = error

    async def _ask(self, call: "_Call", texts: list[str], digests: Sequence[bytes] = ()) -> Answer | None:
        """One request's answer, tried again through outages; None once another request of the call has failed.

        `digests`: of the texts, if the answer is to be kept.
        """
        failures = 0
        while True:
            async with self._loop.pace.slot():
                if call.failure is not None:
                    return None
                try:
                    return await self._ask_once(call, texts, digests)
                except ServiceOutageError as error:
                    failures += not error.busy
                    wait = self._wait(call, error, failures)
            self.counted["tried again"] += 1
            await asyncio.sleep(wait)

    async def _ask_once(self, call: "_Call", texts: list[str], digests: Sequence[bytes]) -> Answer | None:
        """One request, when the rate has room for it. Its answer is kept before anything else is done with it."""
        tokens = sum(self._estimate.of(texts))
        await taken(self._rate, self._loop.pace.turn, call.model, tokens)
        if call.failure is not None:
            return None
        began = time.monotonic()
        self.counted["requests"] += 1
        call.asked = True
        try:
            answer = await self.api.ask(call.model, texts)
        except ServiceOutageError as error:
            if error.busy:
                self._loop.pace.too_many(began)
                await asyncio.to_thread(self._rate.settle, call.model, -tokens, error.headers, error.wait)
            if error.billed and digests and call.on_answer is not None:
                await asyncio.to_thread(call.on_answer, {}, error.billed)
            raise
        except RefusedInputsError:
            await asyncio.to_thread(self._rate.settle, call.model, -tokens, {})
            raise
        self._loop.pace.quick(time.monotonic() - began)
        if digests and call.on_answer is not None:
            vectors = dict(zip(digests, answer.vectors, strict=True))
            await asyncio.to_thread(call.on_answer, vectors, answer.tokens)
        self.counted["answers"] += 1
        if answer.tokens is not None:
            self.counted["tokens"] += answer.tokens
            self._estimate.learn(texts, answer.tokens)
        more = 0 if answer.tokens is None else answer.tokens - tokens
        with contextlib.suppress(ServiceOutageError):  # of the database: what was answered is not asked for again
            await asyncio.to_thread(self._rate.settle, call.model, more, answer.headers)
        call.busy, call.good = 0, time.monotonic()
        return answer

    def _wait(self, call: "_Call", error: ServiceOutageError, failures: int) -> float:
        """How long to wait before the next attempt; raises the error if there is none."""
        if error.wait is not None and error.wait > PATIENCE:
            raise OutageError(f"{error}; it says to wait for {error.wait:,.0f} s: try again then") from None
        if error.busy:
            call.busy += 1
            if time.monotonic() - call.good > PATIENCE:
                raise OutageError(f"{error}; it has said so for {PATIENCE:.0f} s") from None
            wait = error.wait or min(BUSY_WAIT * 2 ** min(call.busy, 10), LONGEST_BUSY_WAIT)
        else:
            if failures >= self._attempts:
                raise OutageError(f"{error} ({failures} attempts were made)") from None
            wait = error.wait or min(FIRST_WAIT * 4 ** (failures - 1), LONGEST_WAIT)
        return wait * random.uniform(1.0, 1.25)  # not all at the same moment


@dataclass
class _Call:
    """The texts of one call, and what has become of them; all by content hash."""

    model: str
    prompt: str
    texts: Mapping[bytes, str]
    on_answer: OnAnswer | None
    prompted: dict[bytes, str] = field(default_factory=dict)  # as they are sent
    vectors: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)
    reasons: dict[bytes, str] = field(default_factory=dict)
    failure: Exception | None = None  # of a request; no other is sent after it
    asked: bool = False
    busy: int = 0  # answers of 429 since the last good one
    good: float = field(default_factory=time.monotonic)  # when that came


class _Estimate:
    """How many tokens texts have, as the server's bills have shown."""

    def __init__(self) -> None:
        self._estimated, self._billed = 1.0, 1.3  # high until more is known

    def of(self, texts: Sequence[str]) -> list[float]:
        tokens: list[float] = (estimated_tokens(texts) * (self._billed / self._estimated)).tolist()
        return tokens

    def learn(self, texts: Sequence[str], billed: int) -> None:
        """These texts were billed as so many tokens; later bills count for more than earlier ones."""
        self._estimated = 0.9 * self._estimated + float(estimated_tokens(texts).sum())
        self._billed = 0.9 * self._billed + billed


class _Loop:
    """An event loop in a thread of its own, for calls from any thread; a forked process gets another."""

    def __init__(self) -> None:
        self._lock = ProcessLock()
        self._process: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.pace = Pace()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; it is cancelled if the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end(self, last: Any) -> None:
        """Run a last coroutine function there, and end the thread."""
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                return
            asyncio.run_coroutine_threadsafe(last(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self._thread is not None:
                self._thread.join(5)
            self._loop.close()
            self._loop = None

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._loop, self._process, self.pace = asyncio.new_event_loop(), os.getpid(), Pace()
                self._thread = threading.Thread(target=self._loop.run_forever, name="hosted encoder", daemon=True)
                self._thread.start()
            return self._loop


def _check(profile: Profile) -> None:
    """ProfileError if a model that is known gives no such dimensions."""
    for model in {profile.model, profile.query_model or profile.model}:
        known = KNOWN.get(model)
        if known is None or profile.dimensions == known.dimensions:
            continue
        if profile.dimensions > known.dimensions or not known.shortens:
            may_be = f"1 to {known.dimensions:,}" if known.shortens else f"{known.dimensions:,} and no other"
            raise ProfileError(
                f"Profile {profile.name}: {model} cannot give {profile.dimensions:,} dimensions: `dimensions:` may be "
                f"{may_be}"
            )


def _cut(text: str, size: int) -> str:
    """The beginning of a text, of at most so many bytes."""
    return text.encode()[:size].decode(errors="ignore")


def _too_long(characters: int, tokens: int, most: int) -> str:
    return (
        f"the text has {characters:,} characters, about {tokens:,} tokens (estimated), and the model reads {most:,}: "
        "`chunk:` splits long texts, `truncate: true` in the profile cuts them"
    )
