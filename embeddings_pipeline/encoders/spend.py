"""What a collection's hosted model has cost, by day (UTC), and what its servers count as a token."""

from dataclasses import dataclass
from datetime import date, datetime

import psycopg

from embeddings_pipeline.encoders.budget import Terms
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.sql import load_sql

DAYS = 30
RATIO_DAYS = 30


@dataclass(frozen=True)
class DaySpend:
    """What was billed on one day."""

    day: date
    answers: int
    texts: int
    tokens: int
    unpriced: int  # of the tokens, those for which no price was known
    usd: float  # of the others
    models: list[str]


@dataclass(frozen=True)
class Spend:
    """What was billed lately: the last days on which anything was, the newest first."""

    today: date
    days: list[DaySpend]

    @property
    def usd_today(self) -> float:
        return sum(day.usd for day in self.days if day.day == self.today)

    @property
    def usd(self) -> float:
        return sum(day.usd for day in self.days)

    @property
    def unpriced_models(self) -> list[str]:
        return sorted({model for day in self.days if day.unpriced for model in day.models})

    def told(self, usd_per_day: float | None) -> str:
        """One line for people."""
        words = f"${self.usd_today:,.4f} today (UTC)"
        words += "" if usd_per_day is None else f" of ${usd_per_day:,.2f}"
        words += f", ${self.usd:,.4f} on the last {len(self.days)} days with answers"
        if self.unpriced_models:
            tokens = sum(day.unpriced for day in self.days)
            words += f"; {tokens:,} tokens more have no known price (of {', '.join(self.unpriced_models)})"
        return words


def record(
    connection: psycopg.Connection,
    terms: Terms,
    texts: int,
    tokens: int,
    *,
    told: int,
    counted: int,
    moment: datetime | None = None,
) -> None:
    """Note what was billed for an answer: so many tokens, of which the server told so many where so many were counted
    here. moment: of which day it is, if not of today.
    """
    parameters = {
        "collection": terms.collection,
        "account": terms.account,
        "model": terms.model,
        "fingerprint": terms.fingerprint,
        "texts": texts,
        "tokens": tokens,
        "unpriced": tokens if terms.usd_per_million is None else 0,
        "usd": terms.usd(tokens),
        "told": told,
        "counted": counted,
        "moment": moment,
    }
    connection.execute(load_sql("spend/record"), parameters)


def spend(database: Database, collection: str) -> Spend:
    """What the collection's model has cost on the last days with answers."""
    with database.session() as connection:
        parameters = {"collection": collection, "days": DAYS}
        rows = connection.execute(load_sql("spend/days"), parameters).fetchall()
        today = connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date").fetchone()
    assert today is not None
    return Spend(today[0], [DaySpend(*row) for row in rows])


def token_ratio(database: Database, fingerprint: str) -> float | None:
    """Tokens that a model's servers have billed lately to those that were counted here; None if nothing is known."""
    with database.session() as connection:
        row = connection.execute(load_sql("spend/ratio"), {"fingerprint": fingerprint, "days": RATIO_DAYS}).fetchone()
    return row[0] if row else None
