"""What is not as it is committed becomes dirty again (rule 12)."""

from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.store.locks import lock_batch


class Repair(LedgerBase):
    """The part of the ledger that looks whether texts and vectors are what is committed."""

    def damaged_batches(self) -> list[int]:
        """The batches in which `repair` would make an item dirty."""
        model = self.current()
        if model is None:
            return []
        with self.database.connect(autocommit=True) as connection:
            statement, parameters = model.destination.statement("repair/damaged_batches"), {"collection": self.name}
            return [row[0] for row in connection.execute(statement, parameters)]

    def repair(self) -> int:
        """Make items dirty whose texts or vectors are not what is committed, and remove orphans; how many both were."""
        model = self.current()
        if model is None:
            return 0
        repaired, parameters = 0, {"collection": self.name}
        with self.database.connect(autocommit=True) as connection:
            for batch in self.damaged_batches():
                with connection.transaction():
                    lock_batch(connection, self.name, batch)
                    suspect = model.destination.statement("repair/suspect")
                    repaired += connection.execute(suspect, {**parameters, "batch": batch}).rowcount
            repaired += connection.execute(model.destination.statement("repair/orphans")).rowcount
            connection.execute(self.tables.statement("quarantine/sweep"), parameters)
        return repaired
