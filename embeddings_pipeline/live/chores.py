"""What keeps a collection whole beside the changes that are seen at once: scans and indexes, in a thread of their own.

A sensor or a `sync` does these too. Here they are done where nobody else has for a while.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import psycopg

from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.failures import failure_kept
from embeddings_pipeline.health.lag import indexes_due, map_due
from embeddings_pipeline.index.faiss_build import build as build_faiss
from embeddings_pipeline.index.filters import ensure_filters
from embeddings_pipeline.index.map_build import ensure_map
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.locks import INDEXING, SCANNING, claim, let_go
from embeddings_pipeline.store.retry import comes_of_outage, what_it_says
from embeddings_pipeline.store.session import TICK_LIMITS

log = logging.getLogger(__name__)

RECENT_SECONDS = 30.0  # between two reads of what was updated in the last ten minutes
RECENT_SHARE = 0.05  # of the time
SCAN_SHARE = 0.1
OTHERS_SECONDS = 300.0  # by so much a full scan is overdue before it is ours
INDEX_SECONDS, INDEX_PATIENCE = 30.0, 120.0  # between two looks at the indexes; how long it is left to others
FAILED_SECONDS = 300.0  # what failed is tried again after so long


class Chores:
    """At most one at a time; `collection` is the one that is open now."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._doing: threading.Thread | None = None
        now = time.monotonic()
        self._recent_at, self._index_at, self._scan_at = 0.0, now + INDEX_SECONDS, 0.0
        self._due_since: float | None = None
        self._told: dict[str, str] = {}  # chore → what kind of failure was told last
        self.scan_wanted = False  # something may have changed that only a full scan finds

    @property
    def busy(self) -> bool:
        return self._doing is not None and self._doing.is_alive()

    def do(self, collection: Collection, since_scan: float | None, behind: bool) -> None:
        """Begin what is due. since_scan: seconds since the last full scan; behind: many batches are to be done."""
        if self.busy:
            return
        now, config = time.monotonic(), collection.definition.attributes
        overdue = since_scan is None or since_scan > 60 * config.automation.full_scan_minutes + OTHERS_SECONDS
        if now >= self._scan_at and (overdue or self.scan_wanted):
            self._begin(self._scan, collection)
        elif config.source.updated_at and now >= self._recent_at and since_scan is not None:
            self._begin(self._read_recent, collection)
        elif now >= self._index_at and not behind:
            self._begin(self._index, collection)

    def _begin(self, chore: Callable[[Collection], None], collection: Collection) -> None:
        self._doing = threading.Thread(target=self._do, args=(chore, collection), daemon=True)
        self._doing.start()

    def _do(self, chore: Callable[[Collection], None], collection: Collection) -> None:
        name = chore.__name__
        try:
            chore(collection)
            self._told.pop(name, None)
        except (PipelineError, psycopg.Error, OSError) as error:
            if comes_of_outage(error):
                return  # who watches the source has noticed, and tells
            said = what_it_says(error) if isinstance(error, psycopg.Error) else str(error)
            if self._told.get(name) != type(error).__name__:  # once: `status` has it too
                self._say(f"warning: {said}")
            self._told[name] = type(error).__name__
        except Exception:
            log.exception("collection %r: %s failed", collection.definition.name, name)

    def _scan(self, collection: Collection) -> None:
        began = time.monotonic()
        self._scan_at = began + FAILED_SECONDS
        name, wanted = collection.definition.name, self.scan_wanted
        with collection.database.connect(autocommit=True) as connection:
            if not claim(connection, name, SCANNING):
                return
            self.scan_wanted = False
            try:
                with failure_kept(collection.database, name, "scan"):
                    collection.ledger.full_scan(collection.source)
            except BaseException:
                self.scan_wanted = wanted
                raise
            finally:
                let_go(connection, name, SCANNING)
        self._scan_at = time.monotonic() + (time.monotonic() - began) / SCAN_SHARE

    def _read_recent(self, collection: Collection) -> None:
        began = time.monotonic()
        self._recent_at = began + RECENT_SECONDS
        source = replace(collection.source, limits=TICK_LIMITS)
        with failure_kept(collection.database, collection.definition.name, "incremental_scan"):
            collection.ledger.incremental_scan(source)
        self._recent_at = began + max(RECENT_SECONDS, (time.monotonic() - began) / RECENT_SHARE)

    def _index(self, collection: Collection) -> None:
        now, name = time.monotonic(), collection.definition.name
        self._index_at = now + INDEX_SECONDS
        due = indexes_due(collection)
        if not due and not map_due(collection):
            self._due_since = None
            return
        self._due_since = self._due_since or now
        if now - self._due_since < INDEX_PATIENCE:
            return
        with collection.database.connect(autocommit=True) as connection:
            if not claim(connection, name, INDEXING):
                return
            self._index_at = now + FAILED_SECONDS
            try:
                if due:
                    _build_indexes(collection)
                if collection.definition.attributes.map.method != "none":
                    folder = collection.settings.state_dir / "faiss"
                    with failure_kept(collection.database, name, "map"):
                        ensure_map(collection.database, collection.model.destination, folder, collection.definition)
            finally:
                let_go(connection, name, INDEXING)
        self._due_since, self._index_at = None, time.monotonic() + INDEX_SECONDS


def _build_indexes(collection: Collection) -> None:
    table, definition, database = collection.model.destination, collection.definition, collection.database
    config = definition.attributes
    with failure_kept(database, definition.name, "pgvector_index"):
        ensure_index(database, table, config.index, list(config.vectors))
        ensure_filters(database, definition)
        ensure_words(database, definition)
    with failure_kept(database, definition.name, "faiss_index"):
        build_faiss(database, table, collection.settings.state_dir / "faiss", config.words)
