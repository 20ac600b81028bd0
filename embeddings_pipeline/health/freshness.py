"""How long changes wait to be committed, and when the source was last read, from the ledger."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from embeddings_pipeline.health.activity import LIVE, under_way
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination

LIVE_PATIENCE = timedelta(minutes=1)


@dataclass(frozen=True)
class Freshness:
    """How long changes wait, and when the source was last read."""

    oldest_change: datetime | None  # seen, and not committed; None: all is committed
    full_scan_at: datetime | None
    read_at: datetime | None  # incrementally
    asked_at: datetime  # when that was so, by the database's clock, as the others are


def freshness(database: Database, collection: str, table: Destination) -> Freshness:
    """What has been waiting for longest, from the ledger."""
    with database.connect(autocommit=True) as connection:
        row = connection.execute(table.statement("coverage/freshness"), {"collection": collection}).fetchone()
    return Freshness(*row) if row else Freshness(None, None, None, datetime.now(UTC))


def left_to_live(database: Database, collection: str, table: Destination) -> bool:
    """Whether a `live` follows the collection and keeps up: then nobody else need do what it is about to."""
    if not any(each.what == LIVE for each in under_way(database, collection)):
        return False
    waits = freshness(database, collection, table)
    return waits.oldest_change is None or waits.asked_at - waits.oldest_change < LIVE_PATIENCE
