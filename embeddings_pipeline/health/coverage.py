"""How well the vectors cover the source, computed from the data itself (rule 12)."""

from dataclasses import dataclass

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.wording import counted


@dataclass(frozen=True)
class Coverage:
    """Counts of items (quarantined: of texts; vectors and orphans: of rows)."""

    items: int
    missing: int
    stale: int
    quarantined: int
    quarantined_items: int  # that failed as a whole, and have no texts
    vectors: int
    orphans: int
    damaged: int  # of the missing and the stale: those that are not dirty, so that no batch is about to do them

    @property
    def share(self) -> float:
        """Share of items whose every text has its current vector (or it or the item is in quarantine); 0.0 for none."""
        return 0.0 if self.items == 0 else (self.items - self.missing - self.stale) / self.items

    @property
    def complete(self) -> bool:
        """Whether nothing that is known is missing, stale or an orphan."""
        return self.missing == self.stale == self.orphans == 0

    @property
    def told(self) -> str:
        """The counts for people."""
        if self.items == self.vectors == 0:
            return "nothing is there yet"
        counts = f"{counted(self.items, 'item')}, {self.missing:,} missing, {self.stale:,} stale"
        counts += f", {counted(self.orphans, 'orphan')}"
        return f"{counts}; {self.damaged:,} of them lost what was committed" if self.damaged else counts


@dataclass(frozen=True)
class BatchCoverage:
    """A batch that is not covered, in items."""

    batch: str
    items: int
    not_covered: int
    attempts: int
    next_try: str


def coverage(database: Database, model: Model) -> Coverage:
    """Compare ledger, texts and model table."""
    table = model.destination
    with database.connect(autocommit=True) as connection:
        parameters = {"collection": table.collection}
        row = connection.execute(table.statement("coverage/items"), parameters).fetchone()
    assert row is not None
    return Coverage(*row)


def uncovered_batches(database: Database, model: Model, limit: int = 20) -> list[BatchCoverage]:
    """The batches that are not covered, the worst first."""
    table = model.destination
    parameters = {"collection": table.collection, "limit": limit}
    with database.connect(autocommit=True) as connection:
        return [BatchCoverage(*row) for row in connection.execute(table.statement("coverage/batches"), parameters)]
