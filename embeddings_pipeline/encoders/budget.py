"""What may be spent at most: of a collection a day (`budget:`), and of one command (`sync --max-cost`)."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import psycopg

from embeddings_pipeline.errors import BudgetError, ConfigurationError
from embeddings_pipeline.store.locks import lock_budget
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class Terms:
    """What is asked of whom, on whose account, and what it may cost."""

    collection: str
    fingerprint: str
    dimensions: int
    model: str
    account: str = ""
    paid: bool = False  # whether it is noted what is billed
    usd_per_million: float | None = 0.0  # tokens; None: not known
    usd_per_day: float | None = None  # None: no limit
    ratio: float = 1.0  # of the tokens that are billed to those that are counted here

    def usd(self, billed: float) -> float:
        """What so many tokens cost; 0 if the price is not known."""
        return (self.usd_per_million or 0.0) * billed / 1e6

    def expected_usd(self, counted: float) -> float:
        """What texts cost of which so many tokens were counted here."""
        return self.usd(counted * self.ratio)


@dataclass
class Purse:
    """What a command may spend, in US dollars, and has spent. Safe to use from several threads. A budget of a day that
    stopped it is noted here too.
    """

    most: float | None = None  # None: no limit
    spent: float = 0.0
    held: float = 0.0  # of what is being asked for
    refused: BudgetError | None = None  # why something was not asked for
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def hold(self, prices: Sequence[float]) -> int:
        """Set aside what the first texts are expected to cost; how many can be paid for."""
        with self._lock:
            left = None if self.most is None else self.most - self.spent - self.held
            number = affordable(prices, left)
            self.held += sum(prices[:number])
        return number

    def let_go(self, price: float) -> None:
        """What was set aside is not needed, or was spent."""
        with self._lock:
            self.held = max(0.0, self.held - price)

    def spend(self, price: float) -> None:
        """An answer was billed."""
        with self._lock:
            self.spent += price

    def refuse(self, error: BudgetError) -> BudgetError:
        """Note that a budget is spent: a run tells what stopped it in words alone."""
        self.refused = error
        return error

    def empty(self, price: float) -> BudgetError:
        """That the next text costs more than is left."""
        return BudgetError(
            f"--max-cost ${self.most:,g} is reached: ${self.spent:,.4f} are spent, and the next text would cost "
            f"about ${price:,.6f}; what is answered is kept, and the next sync goes on from there"
        )


def affordable(prices: Sequence[float], left: float | None) -> int:
    """How many texts can be paid for, in their order, of so many dollars; None: no limit."""
    if left is None:
        return len(prices)
    total, number = 0.0, 0
    for price in prices:
        total += price
        if total > left:
            break
        number += 1
    return number


def check_price(terms: Terms, purse: Purse) -> None:
    """ConfigurationError if a limit cannot be kept, since no price is known."""
    limited = "budget:" if terms.usd_per_day is not None else "--max-cost" if purse.most is not None else None
    if limited and terms.paid and terms.usd_per_million is None:
        raise ConfigurationError(
            f"collection {terms.collection!r}: `{limited}` cannot be kept, since no price is known for "
            f"{terms.model}: give `price:` (US dollars for a million tokens) in the profile"
        )


def spent_today(connection: psycopg.Connection, collection: str) -> tuple[float, float]:
    """What was billed or submitted today (UTC), and what is asked for; nobody else claims texts until the transaction
    ends.
    """
    lock_budget(connection, collection)
    row = connection.execute(load_sql("spend/today"), {"collection": collection}).fetchone()
    assert row is not None
    return row[0], row[1]


def budget_spent(terms: Terms, spent: float, price: float) -> BudgetError:
    """That the next text costs more than `budget:` leaves."""
    return BudgetError(
        f"collection {terms.collection!r}: `budget: {{usd_per_day: {terms.usd_per_day:g}}}` is reached: "
        f"${spent:,.4f} are spent or submitted today (UTC), and the next text would cost about ${price:,.6f}; what is "
        "answered is kept, and work goes on tomorrow, or with a larger budget"
    )


_purse: ContextVar[Purse | None] = ContextVar("purse", default=None)


def purse() -> Purse:
    """What the command that this is part of may spend; without one, no limit."""
    return _purse.get() or Purse()


@contextmanager
def spending(purse: Purse) -> Iterator[Purse]:
    """Have what is asked for within paid from this purse."""
    token = _purse.set(purse)
    try:
        yield purse
    finally:
        _purse.reset(token)
