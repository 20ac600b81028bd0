"""Nothing is paid for twice (rule 14): a text is asked about once, whoever asks; an answer is kept before it is used.

    answers = Answers(database, cache, terms)
    vectors, known = answers.of(texts, tokens, encode)

Of the texts that the cache does not know, those that nobody else is asking about are claimed, and `encode` is called
with them; for the others the claim's holder is waited for, unless that is a batch job (`batch_jobs.py`). A claim ends
with its holder's process, whose session lock says that it lives (rule 11); and it is a lease by the database's clock,
which a thread prolongs, so that one that was suspended keeps nobody waiting either.
"""

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.encoders.base import OnAnswer
from embeddings_pipeline.encoders.budget import (
    Terms,
    affordable,
    budget_spent,
    check_price,
    purse,
    spent_today,
)
from embeddings_pipeline.encoders.cache import EmbeddingCache, in_batch_jobs
from embeddings_pipeline.encoders.spend import record
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_lock, run_locked
from embeddings_pipeline.store.retry import OUTAGE_ATTEMPTS, is_outage, wait_for_outage
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
PROLONG_SECONDS = 10.0
LOOK_SECONDS = 0.1, 1.0  # at first and at last, while another's answer is waited for

Vectors = Mapping[bytes, NDArray[np.float32]]
Encode = Callable[[Mapping[bytes, str], OnAnswer], Vectors]
"""Gives the vectors of the texts that have one; may call `OnAnswer` for some of them before."""


class Answers:
    """Asks a model about each text once. `cache` None: nothing is kept; `force`: what is kept is not looked at."""

    def __init__(self, database: Database, cache: EmbeddingCache | None, terms: Terms, *, force: bool = False) -> None:
        self._database, self._cache, self.terms, self._force = database, cache, terms, force
        self.usd = 0.0  # billed, through this object
        self.in_jobs: set[bytes] = set()  # texts that were asked for, and whose vectors are to come from a batch job
        self._holder = uuid.uuid4().hex
        self._counted: dict[bytes, int] = {}  # tokens, of the texts that are claimed
        self._answered: set[bytes] = set()
        self._mutex = threading.Lock()
        self._purse = purse()

    def of(
        self, texts: Mapping[bytes, str], tokens: Mapping[bytes, int], encode: Encode
    ) -> tuple[dict[bytes, NDArray[np.float32]], set[bytes]]:
        """Content hash → vector, of the texts (by content hash) that have one; and which of them were known already.

        tokens: how many were counted of each text. A text that a batch job has is left, and noted in `in_jobs`. Raises
        BudgetError if the budget is spent: what was answered until then is kept. Else what `encode` raises.
        """
        check_price(self.terms, self._purse)
        vectors = {} if self._force else self.known(list(texts))
        known = set(vectors)
        left = {digest: text for digest, text in texts.items() if digest not in known}
        if not left:
            return vectors, known
        wait = LOOK_SECONDS[0]
        with run_lock(self._database, self._holder):
            while left := self._not_in_jobs(left):
                claimed = self._claim(list(left), tokens)
                with self._held(claimed):
                    # It may have been answered before we claimed it, or since we looked.
                    there = {} if self._force else self.known(list(left))
                    wanted = {digest: left[digest] for digest in claimed if digest not in there}
                    answered = self._ask(wanted, encode) if wanted else {}
                vectors |= {**there, **answered}
                known |= there.keys()
                for digest in [*there, *wanted]:
                    del left[digest]
                if left and not claimed and not there:
                    self._forget_dead(list(left))
                    time.sleep(wait)
                    wait = min(2 * wait, LOOK_SECONDS[1])
        return vectors, known

    def known(self, hashes: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Content hash → vector, of the answers that are kept."""
        if self._cache is None:
            return {}
        return self._cache.known(self.terms.fingerprint, self.terms.dimensions, hashes)

    def on_answer(self, vectors: Vectors, billed: int | None = None) -> None:
        """Keep an answer and note its price, before it is used. billed: tokens, as the server says; also of an answer
        that is of no use, and has no vectors.
        """
        failpoint("answer.arrived", texts=len(vectors))
        with self._mutex:
            counted = sum(self._counted.get(digest, 0) for digest in vectors)
        tokens = round(counted * self.terms.ratio) if billed is None else billed
        self._surely(lambda: self._keep(vectors, tokens, billed, counted))
        failpoint("answer.kept", texts=len(vectors))
        usd = self.terms.usd(tokens) if self.terms.paid else 0.0
        with self._mutex:
            self._answered.update(vectors)
            self.usd += usd
            held = sum(self._counted.pop(digest, 0) for digest in vectors)
        self._purse.let_go(self.terms.expected_usd(held))
        self._purse.spend(usd)

    def _ask(self, texts: Mapping[bytes, str], encode: Encode) -> Vectors:
        answered = encode(texts, self.on_answer)
        if rest := {digest: vector for digest, vector in answered.items() if digest not in self._answered}:
            self.on_answer(rest)
        return answered

    def _not_in_jobs(self, texts: dict[bytes, str]) -> dict[bytes, str]:
        """The texts that no batch job has."""
        if not (texts and self.terms.paid):
            return texts
        there = in_batch_jobs(self._database, self.terms.fingerprint, list(texts))
        self.in_jobs |= there
        return {digest: text for digest, text in texts.items() if digest not in there} if there else texts

    # --- claims ---------------------------------------------------------------------------------------------------

    def _claim(self, hashes: list[bytes], tokens: Mapping[bytes, int]) -> list[bytes]:
        """Those that are ours to ask about now, as far as the budget goes. BudgetError if it goes to none."""
        prices = [self.terms.expected_usd(tokens.get(digest, 0)) for digest in hashes]
        number = self._purse.hold(prices)
        if not number:
            raise self._purse.refuse(self._purse.empty(prices[0]))
        held = sum(prices[:number])
        try:
            claimed = self._claim_affordable(hashes[:number], prices[:number])
        except BaseException:
            self._purse.let_go(held)
            raise
        counted = {digest: tokens.get(digest, 0) for digest in claimed}
        self._purse.let_go(held - self.terms.expected_usd(sum(counted.values())))
        with self._mutex:
            self._counted |= counted
        return claimed

    def _claim_affordable(self, hashes: list[bytes], prices: list[float]) -> list[bytes]:
        limit, number = self.terms.usd_per_day, len(hashes)
        with self._database.session() as connection, connection.transaction():
            if limit is not None:
                spent, held = spent_today(connection, self.terms.collection)
                number = affordable(prices, limit - spent - held)
                if not number and not held:
                    raise self._purse.refuse(budget_spent(self.terms, spent, prices[0]))
            parameters = {
                "fingerprint": self.terms.fingerprint,
                "collection": self.terms.collection,
                "holder": self._holder,
                "hashes": hashes[:number],
                "usd": prices[:number],
                "seconds": LEASE_SECONDS,
            }
            return [row[0] for row in connection.execute(load_sql("cache/claim"), parameters)] if number else []

    def _forget_dead(self, hashes: list[bytes]) -> None:
        """Drop the claims on these texts whose holder's process has ended."""
        parameters = {"fingerprint": self.terms.fingerprint, "hashes": hashes}
        with self._database.session() as connection:
            for (holder,) in connection.execute(load_sql("cache/holders"), parameters).fetchall():
                if not run_locked(connection, holder):
                    connection.execute(load_sql("cache/release_all"), {"holder": holder})

    @contextmanager
    def _held(self, claimed: list[bytes]) -> Iterator[None]:
        """Prolong the claims until the block ends, then let go of those that were not answered."""
        if not claimed:
            yield
            return
        ended = threading.Event()

        def prolong() -> None:
            parameters = {"holder": self._holder, "seconds": LEASE_SECONDS}
            while not ended.wait(PROLONG_SECONDS):
                with contextlib.suppress(PipelineError, psycopg.Error), self._database.session() as connection:
                    connection.execute(load_sql("cache/prolong"), parameters)

        threading.Thread(target=prolong, name="claims", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            self._let_go()

    def _let_go(self) -> None:
        with self._mutex:
            unanswered, self._counted = sum(self._counted.values()), {}
            self._answered = set()
        self._purse.let_go(self.terms.expected_usd(unanswered))
        with contextlib.suppress(PipelineError, psycopg.Error), self._database.session() as connection:
            connection.execute(load_sql("cache/release_all"), {"holder": self._holder})

    # --- what was answered ----------------------------------------------------------------------------------------

    def _keep(self, vectors: Vectors, tokens: int, billed: int | None, counted: int) -> None:
        """Keep an answer, note what it cost, and let go of its texts: all or nothing, but for a cache elsewhere."""
        terms = self.terms
        with self._database.session() as connection, connection.transaction():
            if self._cache is not None:
                self._cache.put(terms.fingerprint, vectors, connection)
            released = {"holder": self._holder, "fingerprint": terms.fingerprint, "hashes": list(vectors)}
            connection.execute(load_sql("cache/release"), released)
            if terms.paid:  # last: all that ask write this row
                told, known = (billed, counted) if billed and vectors else (0, 0)
                record(connection, terms, len(vectors), tokens, told=told, counted=known)

    def _surely(self, write: Callable[[], None]) -> None:
        """What was paid for is written though the database goes away for a moment."""
        for attempt in range(1, OUTAGE_ATTEMPTS + 1):
            try:
                write()
                return
            except (psycopg.OperationalError, PipelineError) as error:
                if attempt == OUTAGE_ATTEMPTS or not is_outage(error):
                    raise
                wait_for_outage(self.terms.collection, attempt, error)
