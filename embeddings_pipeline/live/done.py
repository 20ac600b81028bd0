"""What `live` has done since it was last told: of each collection and batch the sum of what the steps report."""

import threading
from dataclasses import dataclass, field

from embeddings_pipeline.pipeline.figures import Committed, Embedded, ItemsRead, RunFigures, TextsRendered


@dataclass
class Done:
    """Of one collection. `batches`: batch → its figures; a batch that was done several times counts each time."""

    batches: dict[int, RunFigures] = field(default_factory=dict)
    commits: int = 0

    def add(self, later: "Done") -> None:
        """Add what was done later."""
        for batch, figures in later.batches.items():
            self.batches.setdefault(batch, RunFigures()).add(figures)
        self.commits += later.commits

    @property
    def total(self) -> RunFigures:
        """Over all batches."""
        total = RunFigures()
        for figures in self.batches.values():
            total.add(figures)
        return total


class Tally:
    """Gathers what several threads do."""

    def __init__(self) -> None:
        self._done: dict[str, Done] = {}
        self._mutex = threading.Lock()

    def add(self, collection: str, batch: int, step: ItemsRead | TextsRendered | Embedded | Committed) -> None:
        with self._mutex:
            done = self._done.setdefault(collection, Done())
            done.batches.setdefault(batch, RunFigures()).add(step)
            done.commits += isinstance(step, Committed)

    def take(self) -> dict[str, Done]:
        """What was done since the last time, by collection."""
        with self._mutex:
            taken, self._done = self._done, {}
        return taken
