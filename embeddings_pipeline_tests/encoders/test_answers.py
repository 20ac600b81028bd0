"""Rule 14: a text is asked about once, whoever asks; what is billed is noted; a budget stops before it is spent."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embeddings_pipeline.encoders import answers as module
from embeddings_pipeline.encoders.answers import Answers, OnAnswer
from embeddings_pipeline.encoders.budget import Purse, Terms, spending
from embeddings_pipeline.encoders.cache import PostgresCache
from embeddings_pipeline.errors import BudgetError, ConfigurationError, OutageError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import run_lock
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once, wait_until

TERMS = Terms("films", "0123456789ab", 4, "model", "account", paid=True, usd_per_million=1.0)
TEXTS = {bytes([n]) * 16: f"text {n}" for n in range(20)}
TOKENS = dict.fromkeys(TEXTS, 1000)  # a tenth of a cent each


class Service:
    """Answers in requests of five texts, and counts what it is asked."""

    def __init__(self, seconds: float = 0.0, billed: int | None = 1000) -> None:
        self.asked: Counter[str] = Counter()
        self.seconds, self.billed = seconds, billed
        self.fails_after: int | None = None

    def encode(self, texts: Mapping[bytes, str], on_answer: OnAnswer) -> dict[bytes, NDArray[np.float32]]:
        given: dict[bytes, NDArray[np.float32]] = {}
        for start in range(0, len(texts), 5):
            if self.fails_after is not None and self.asked.total() >= self.fails_after:
                raise OutageError("the service is down")
            part = list(texts)[start : start + 5]
            self.asked.update(texts[digest] for digest in part)
            time.sleep(self.seconds)
            answer = {digest: np.full(4, 0.5, np.float32) for digest in part}
            on_answer(answer, None if self.billed is None else self.billed * len(part))
            given |= answer
        return given


@pytest.fixture
def known(database: Database, settings: Any) -> Database:
    """A database that knows the collection `films`."""
    make_films(database, films(1))
    sync_once(definition(), settings)
    return database


def ask(database: Database, service: Service, **options: Any) -> tuple[int, int]:
    """How many vectors came, and how many of them the cache knew."""
    terms = replace(TERMS, **options.pop("terms", {}))
    answers = Answers(database, PostgresCache(database), terms, **options)
    vectors, cached = answers.of(TEXTS, TOKENS, service.encode)
    return len(vectors), len(cached)


def spent(database: Database) -> list[tuple[Any, ...]]:
    return execute(
        database, "SELECT answers, texts, tokens, unpriced, round(usd::numeric, 6) FROM embeddings.embedding_spend"
    )


class TestOnce:
    def test_what_was_answered_is_not_asked_again(self, known: Database) -> None:
        service = Service()
        assert ask(known, service) == (20, 0)
        assert ask(known, service) == (20, 20)
        assert set(service.asked.values()) == {1}
        assert execute(known, "SELECT count(*) FROM embeddings.embedding_claim") == [(0,)]

    def test_force_asks_anew_and_writes_it(self, known: Database) -> None:
        service = Service()
        ask(known, service)
        execute(known, "UPDATE embeddings.embedding_cache SET embedding = 'broken'")
        assert ask(known, service, force=True) == (20, 0)
        assert ask(known, service) == (20, 20)
        assert set(service.asked.values()) == {2}

    def test_without_a_cache_it_is_asked_each_time_and_noted(self, known: Database) -> None:
        service = Service()
        for _ in range(2):
            assert len(Answers(known, None, TERMS).of(TEXTS, TOKENS, service.encode)[0]) == 20
        assert set(service.asked.values()) == {2}
        assert spent(known)[0][:3] == (8, 40, 40_000)

    def test_two_at_once_never_ask_about_one_text_twice(self, known: Database) -> None:
        service, results = Service(seconds=0.05), []
        threads = [threading.Thread(target=lambda: results.append(ask(known, service))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [vectors for vectors, _ in results] == [20] * 4
        assert sum(20 - cached for _, cached in results) == 20
        assert set(service.asked.values()) == {1}

    def test_an_answer_is_kept_before_the_next_one_fails(self, known: Database) -> None:
        service = Service()
        service.fails_after = 10
        with pytest.raises(OutageError):
            ask(known, service)
        assert execute(known, "SELECT count(*) FROM embeddings.embedding_cache") == [(10,)]
        assert execute(known, "SELECT count(*) FROM embeddings.embedding_claim") == [(0,)]
        service.fails_after = None
        assert ask(known, service) == (20, 10)
        assert set(service.asked.values()) == {1}

    def test_a_text_without_an_answer_is_let_go(self, known: Database) -> None:
        def encode(texts: Mapping[bytes, str], on_answer: OnAnswer) -> dict[bytes, NDArray[np.float32]]:
            return {digest: np.ones(4, np.float32) for digest in texts if texts[digest] != "text 7"}

        vectors, _ = Answers(known, PostgresCache(known), TERMS).of(TEXTS, TOKENS, encode)
        assert len(vectors) == 19
        assert execute(known, "SELECT count(*) FROM embeddings.embedding_claim") == [(0,)]


class TestClaims:
    def test_the_claim_of_a_process_that_died_keeps_nobody_waiting(self, known: Database) -> None:
        dead = Answers(known, PostgresCache(known), TERMS)
        assert len(dead._claim(list(TEXTS), TOKENS)) == 20  # as a process that is killed leaves it
        began = time.monotonic()
        assert ask(known, Service()) == (20, 0)
        assert time.monotonic() - began < 5

    def test_the_claim_of_one_that_is_suspended_ends_with_its_lease(
        self, known: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEASE_SECONDS", 1.0)
        suspended = Answers(known, PostgresCache(known), TERMS)
        with run_lock(known, suspended._holder):
            suspended._claim(list(TEXTS), TOKENS)
            began = time.monotonic()
            assert ask(known, Service()) == (20, 0)
        assert 0.5 < time.monotonic() - began < 5

    def test_a_claim_is_prolonged_as_long_as_its_holder_asks(
        self, known: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEASE_SECONDS", 0.6)
        monkeypatch.setattr(module, "PROLONG_SECONDS", 0.1)
        service = Service(seconds=0.5)
        first = threading.Thread(target=ask, args=[known, service])
        first.start()
        wait_until(lambda: bool(service.asked))
        assert ask(known, service) == (20, 20)
        first.join()
        assert set(service.asked.values()) == {1}

    @pytest.mark.parametrize("hours", [1, -1])
    def test_a_clock_that_jumps_an_hour_keeps_nobody_waiting(self, known: Database, hours: int) -> None:
        suspended = Answers(known, PostgresCache(known), TERMS)
        with run_lock(known, suspended._holder):
            suspended._claim(list(TEXTS), TOKENS)
            execute(known, f"UPDATE embeddings.embedding_claim SET until = until + interval '{hours} hours'")
            assert ask(known, Service()) == (20, 0)


class TestWhatIsBilled:
    def test_each_answer_is_noted_with_what_the_server_says(self, known: Database) -> None:
        ask(known, Service(billed=1100))
        assert spent(known) == [(4, 20, 22_000, 0, Decimal("0.022"))]
        # What is counted stays what is counted here, however far from the bills it is known to be.
        ask(known, Service(billed=1100), force=True, terms={"ratio": 1.1})
        assert execute(known, "SELECT sum(told), sum(counted) FROM embeddings.embedding_spend") == [(44_000, 40_000)]

    def test_what_the_server_does_not_say_is_what_was_counted(self, known: Database) -> None:
        ask(known, Service(billed=None))
        [(answers, texts, tokens, _, usd)] = spent(known)
        assert (answers, texts, tokens, float(usd)) == (4, 20, 20_000, 0.02)
        assert execute(known, "SELECT sum(told), sum(counted) FROM embeddings.embedding_spend") == [(0, 0)]

    def test_an_answer_of_no_use_is_spent_too(self, known: Database) -> None:
        answers = Answers(known, PostgresCache(known), TERMS)
        answers.on_answer({}, 1100)
        assert spent(known) == [(1, 0, 1_100, 0, Decimal("0.0011"))] and answers.usd == pytest.approx(0.0011)
        assert execute(known, "SELECT sum(told), sum(counted) FROM embeddings.embedding_spend") == [(0, 0)]

    def test_a_price_that_is_not_known_is_said_and_not_zero(self, known: Database) -> None:
        ask(known, Service(), terms={"usd_per_million": None})
        assert spent(known)[0][2:4] == (20_000, 20_000)

    def test_days_are_the_databases(self, known: Database) -> None:
        ask(known, Service())
        assert execute(known, "SELECT day = (now() AT TIME ZONE 'UTC')::date FROM embeddings.embedding_spend") == [
            (True,)
        ]


class TestBudget:
    def test_a_days_budget_stops_before_it_is_spent_and_the_next_day_goes_on(self, known: Database) -> None:
        service, terms = Service(), {"usd_per_day": 0.0125}
        with pytest.raises(BudgetError, match="usd_per_day"):
            ask(known, service, terms=terms)
        assert service.asked.total() == 12
        assert float(spent(known)[0][4]) == 0.012
        with pytest.raises(BudgetError, match="usd_per_day"):
            ask(known, service, terms=terms)
        execute(known, "UPDATE embeddings.embedding_spend SET day = day - 1")
        assert ask(known, service, terms=terms) == (20, 12)
        assert set(service.asked.values()) == {1}

    def test_two_at_once_do_not_spend_more_than_the_budget(self, known: Database) -> None:
        services = [Service(seconds=0.02), Service(seconds=0.02)]
        refused: list[Exception] = []

        def run(service: Service, part: dict[bytes, str]) -> None:
            terms = replace(TERMS, usd_per_day=0.0125)
            try:
                Answers(known, PostgresCache(known), terms).of(part, TOKENS, service.encode)
            except BudgetError as error:
                refused.append(error)

        items = list(TEXTS.items())
        parts = [dict(items[:10]), dict(items[10:])]
        threads = [threading.Thread(target=run, args=each) for each in zip(services, parts, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(service.asked.total() for service in services) == 12
        assert len(refused) == 1

    def test_a_purse_stops_before_it_is_empty(self, known: Database) -> None:
        service = Service()
        with spending(Purse(most=0.0075)) as purse, pytest.raises(BudgetError, match="max-cost"):
            ask(known, service)
        assert service.asked.total() == 7
        assert purse.spent == pytest.approx(0.007)
        assert purse.held == 0.0
        with spending(Purse(most=0.1)):
            assert ask(known, service) == (20, 7)

    def test_a_free_model_has_no_end(self, known: Database) -> None:
        with spending(Purse(most=0.0)):
            assert ask(known, Service(), terms={"usd_per_million": 0.0, "usd_per_day": 0.0}) == (20, 0)

    def test_a_budget_cannot_be_kept_without_a_price(self, known: Database) -> None:
        unknown = {"usd_per_million": None}
        with pytest.raises(ConfigurationError, match="no price is known for model"):
            ask(known, Service(), terms={**unknown, "usd_per_day": 1.0})
        with spending(Purse(most=1.0)), pytest.raises(ConfigurationError, match="--max-cost"):
            ask(known, Service(), terms=unknown)
