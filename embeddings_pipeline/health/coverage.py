"""How well the vectors cover the source, computed from the data itself (rule 12), and whether they are sound."""

from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import NORM, Destination
from embeddings_pipeline.store.models import Model

UNIT_TOLERANCE = 5e-3  # float16 keeps a unit vector's length to about 5e-4


@dataclass(frozen=True)
class Coverage:
    """Counts of items (quarantined: of texts; vectors and orphans: of rows)."""

    items: int
    missing: int
    stale: int
    quarantined: int
    vectors: int
    orphans: int

    @property
    def share(self) -> float:
        """Share of items whose every text has its current vector (or is in quarantine); 1.0 for no items."""
        return 1.0 if self.items == 0 else (self.items - self.missing - self.stale) / self.items


@dataclass(frozen=True)
class BatchCoverage:
    """A batch that is not covered, in items."""

    batch: str
    items: int
    not_covered: int
    attempts: int
    next_try: str


@dataclass(frozen=True)
class Freshness:
    """How long changes wait, and when the source was last read."""

    oldest_change: datetime | None  # seen, and not committed; None: all is committed
    full_scan_at: datetime | None
    read_at: datetime | None  # incrementally


@dataclass(frozen=True)
class Integrity:
    """Counts of vectors that cannot be right."""

    vectors: int
    wrong_dimension: int
    not_finite: int
    not_unit: int  # 0 where the profile does not normalise
    all_equal: bool  # every vector is the same, though texts differ

    @property
    def sound(self) -> bool:
        return not (self.wrong_dimension or self.not_finite or self.not_unit or self.all_equal)


def coverage(database: Database, model: Model) -> Coverage:
    """Compare ledger, texts and model table."""
    table = model.table
    with database.connect(autocommit=True) as connection:
        parameters = {"collection": table.collection}
        row = connection.execute(table.statement("coverage/items"), parameters).fetchone()
    assert row is not None
    return Coverage(*row)


def uncovered_batches(database: Database, model: Model, limit: int = 20) -> list[BatchCoverage]:
    """The batches that are not covered, the worst first."""
    table = model.table
    parameters = {"collection": table.collection, "limit": limit}
    with database.connect(autocommit=True) as connection:
        return [BatchCoverage(*row) for row in connection.execute(table.statement("coverage/batches"), parameters)]


def freshness(database: Database, collection: str, table: Destination) -> Freshness:
    """What has been waiting for longest, from the ledger."""
    with database.connect(autocommit=True) as connection:
        row = connection.execute(table.statement("coverage/freshness"), {"collection": collection}).fetchone()
    return Freshness(*row) if row else Freshness(None, None, None)


def integrity(database: Database, model: Model) -> Integrity:
    """Look at every vector, in the database."""
    with database.connect(autocommit=True) as connection:
        row = connection.execute(
            model.table.statement("coverage/integrity", norm=sql.SQL(NORM[model.table.storage])),
            {
                "dimension": model.table.dimension,
                "normalized": model.profile.normalize,
                "tolerance": UNIT_TOLERANCE,
            },
        ).fetchone()
    assert row is not None
    return Integrity(*row)
