"""How far a sync or a switch is, in texts, put together from what its runs report."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.index.pgvector import build_progress
from embeddings_pipeline.orchestration.names import step_of
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.progress import Progress

STEPS = {  # what goes on once a batch has this asset; the texts of all batches are rendered in a moment
    "raw_items": "reading",
    "item_texts": "embedding",
    "embeddings": "embedding",
    "pgvector_table": "commit",
    "backfill": "embedding",
}
ENCODED = ("embedded", "cached", "quarantined", "left_to_embed")  # figures of a batch: the texts that had no vector
HANDLED = (*ENCODED, "reused")
INDEX_SECONDS = 1.0  # between two looks at an index that is being built


def both(first: Progress, second: Progress) -> Progress:
    """Tells two listeners."""

    def tell(phase: str, done: int, total: int) -> None:
        first(phase, done, total)
        second(phase, done, total)

    return tell


class TextMeter:
    """Counts texts over many batches: of a sync, those without a vector. How many there are is known of batches that
    are embedded, and guessed of others: by their texts, or if they are not rendered yet, by those of others.
    """

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._phase = "starting"
        self._batches = 0  # to be done in all
        self._texts: dict[int, int] = {}  # of batches that are rendered
        self._handled: dict[int, int] = {}  # of batches that are embedded
        self._rendered = self._open = self._wanted = 0  # their sums: texts, those not embedded yet, handled
        self._within = 0  # encoded since, of batches that are not
        self._before = self._total = 0

    def expect(self, batches: int) -> None:
        """So many batches more are to be done."""
        self._batches += batches

    def set_total(self, done: int, total: int) -> None:
        """How many texts are done and how many there are, if that is known from the start."""
        self._before, self._total = done, total

    @property
    def done(self) -> int:
        done = self._before + self._wanted + self._within
        return min(done, self._total) if self._total else done

    @property
    def total(self) -> int:
        """0: not known yet."""
        if self._total or not self._texts:
            return self._total
        embedded = self._rendered - self._open
        guessed = self._rendered / len(self._texts) * max(0, self._batches - len(self._texts))
        share = self._wanted / embedded if embedded else 1.0
        return max(self.done, self._wanted + round((self._open + guessed) * share))

    def tell(self, phase: str) -> None:
        self._phase = phase
        self._tell(phase, self.done, self.total)

    def batch_done(self, asset: str, batch: int, figures: Mapping[str, Any]) -> None:
        """A run has done a step of a batch."""
        step = step_of(asset)
        if step == "item_texts":
            more = figures["texts"] - self._texts.get(batch, 0)
            self._texts[batch] = figures["texts"]
            self._rendered += more
            self._open += more if batch not in self._handled else 0
        elif step in ("embeddings", "backfill"):
            names = ENCODED if step == "embeddings" else HANDLED
            self._open -= self._texts.get(batch, 0) if batch not in self._handled else 0
            wanted = sum(figures.get(name, 0) for name in names)
            self._wanted += wanted - self._handled.get(batch, 0)
            self._handled[batch] = wanted
            self._within = max(0, self._within - figures["embedded"] - figures.get("cached", 0))
        self.tell(STEPS.get(step, self._phase))

    def count(self, texts: int) -> None:
        """So many texts more are encoded."""
        self._within += texts
        self.tell("embedding")


@contextmanager
def index_watched(collection: Collection, tell: Progress) -> Iterator[None]:
    """Tell how far PostgreSQL is with an ANN index, in vectors, while it builds one."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INDEX_SECONDS):
            with suppress(PipelineError, psycopg.Error):
                if built := build_progress(collection.database, collection.definition.name):
                    tell("indexing", *built)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
