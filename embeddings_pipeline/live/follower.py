"""One collection that `live` follows: watch, derive what is to be done, claim it, do it, again."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg

from embeddings_pipeline.config.changed import check_as_read
from embeddings_pipeline.config.definition import CollectionDefinition, batch_key
from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import (
    ConfigurationError,
    PipelineError,
    SourceError,
    StaleDefinitionError,
    StaleRunError,
)
from embeddings_pipeline.ledger.work import LONGEST_BATCH_WAIT
from embeddings_pipeline.live.chores import Chores
from embeddings_pipeline.live.done import Tally
from embeddings_pipeline.live.watch import ToldChanges, UpdatedRows, Watch
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.store.change_stream import NotFollowedError
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.destination.base import CollectionTables
from embeddings_pipeline.store.locks import claim, let_go
from embeddings_pipeline.store.retry import comes_of_outage, what_it_says
from embeddings_pipeline.store.source_sql import Position
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

WORK_SECONDS = 10.0  # texts of the quarantine, and what shadow models lack, are asked for so often
MOST_BATCHES, MOST_ITEMS = 8, 500  # at once; a larger batch goes alone
FIRST_WAIT, LONGEST_WAIT = 1.0, 15.0  # seconds, until something that failed is tried again
BEHIND_BATCHES = 20


class Gone(Exception):
    """The collection was removed or renamed: there is nothing to follow."""


class Follower:
    """Follows a collection until `ended` is set or the collection is gone."""

    def __init__(
        self,
        definition: CollectionDefinition,
        settings: Settings,
        tally: Tally,
        say: Callable[[str], None],
        ended: threading.Event,
        *,
        use_log: bool = True,
    ) -> None:
        self.definition, self.settings = definition, settings
        self._tally, self._ended, self._use_log = tally, ended, use_log
        self._say = say
        self._chores = Chores(self.say)
        self._collection: Collection | None = None
        self._connection: psycopg.Connection | None = None
        self._watch: Watch | None = None
        self._watched_by = "nothing yet, since the database or the source is away"
        self.told_how = False  # people know how it is watched
        self._position: Position | None = None  # how far it has come by `updated_at`
        self._opened_as: tuple[Any, ...] = ()
        self._file: tuple[int, int] | None = None
        self._work_at = 0.0
        # In turns: batches with the least to do, so that a new row does not wait for a new definition; and those that
        # have waited for longest, so that none waits for ever.
        self._turn, self._done_at = 0, dict[int, float]()
        self._again: set[int] = set()  # batches whose run was cut short by no fault of theirs
        self._former: dict[int, str] = {}  # batch → the last run of ours, whose files nobody needs after the next
        self._trouble: str | None = None
        self._told_of_batches: str | None = None
        self._trouble_since = self._wait = 0.0

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def words(self) -> str:
        """How the collection is watched, for people."""
        return self._watched_by

    def say(self, line: str) -> None:
        """A line for people, about this collection."""
        self._say(line if repr(self.name) in line else f"{line} (collection {self.name!r})")

    def open(self) -> None:
        """Open the collection, load its model, and begin to watch. PipelineError if it cannot be followed."""
        self.close()
        if self._opened_as:  # it was there: to open what is gone would make it anew
            with open_database(self.settings).connect(autocommit=True) as connection:
                self._state(connection)
        self._file = self._stat()
        collection = open_collection(self.definition, self.settings)
        collection.lake.check_writable()
        for warning in collection.warnings:
            log.warning("warning: %s", warning)
        collection.encoder()
        self._connection = collection.database.connect(autocommit=True)
        collection.ledger.make_stage(self._connection)
        before, self._watch = self._watched_by, self._watched(collection)
        self._watched_by = self._watch.words
        if self.told_how and before != self._watched_by:
            self.say(f"it is watched now by {self._watched_by}")
        self._collection = collection
        self._opened_as = tuple(self._state(self._connection)[:3])

    def _watched(self, collection: Collection) -> Watch:
        reason = "as --no-slot asks"
        if self._use_log:
            try:
                return ToldChanges(collection)
            except NotFollowedError as error:
                reason = str(error)
        if self.definition.attributes.source.updated_at is None:
            raise ConfigurationError(
                f"collection {self.name!r} cannot be followed: it declares no `source.updated_at:`, and the log of its "
                f"server cannot be followed ({reason.removeprefix(f'collection {self.name!r}: ')}); declare a column "
                "that every insert and update sets to now, or leave it to the sensor's full scans"
            )
        return UpdatedRows(collection, self._position)

    def close(self) -> None:
        """Let go of every session."""
        watch, connection = self._watch, self._connection
        if isinstance(watch, UpdatedRows):
            self._position = watch.position
        self._watch = self._connection = self._collection = None
        with suppress(PipelineError, psycopg.Error, OSError):
            if watch is not None:
                watch.close()
        if connection is not None:
            connection.close()

    def run(self) -> None:
        """Go on and on; what fails is told once, and tried again."""
        try:
            while not self._ended.is_set():
                try:
                    self._round()
                    self._well()
                except Gone:
                    return self.say("it was removed or renamed, and is followed no longer")
                except Exception as error:
                    self._ill(error)
        finally:
            self.close()

    def _round(self) -> None:
        if self._collection is None or self._connection is None or self._watch is None:
            self.open()
        collection, connection, watch = self._collection, self._connection, self._watch
        assert collection is not None and connection is not None and watch is not None
        if self._stat() != self._file:
            self._file = self._stat()
            check_as_read(self.definition)
        *state, dirty, since_scan = self._state(connection)
        if tuple(state) != self._opened_as:
            return self.close()  # another model, definition or life of it: opened anew in the next round
        too_slow: SourceError | None = None
        try:
            seen, everything = watch.look(connection)
            dirty |= bool(seen.new or seen.changed or seen.gone)
            self._chores.scan_wanted |= everything
        except SourceError as error:
            if not isinstance(error.__cause__, psycopg.errors.QueryCanceled):
                raise
            too_slow = error  # what others find to be dirty can be done all the same
        behind = 0
        if dirty or time.monotonic() >= self._work_at or self._again:
            behind = self._work(collection, connection)
        if too_slow is not None:
            raise too_slow
        self._chores.do(collection, since_scan, behind > BEHIND_BATCHES)
        if not behind:
            watch.wait(1.0)

    def _state(self, connection: psycopg.Connection) -> list[Any]:
        statement = CollectionTables(self.name).statement("live/state")
        try:
            row = connection.execute(statement, {"collection": self.name, "longest": LONGEST_BATCH_WAIT}).fetchone()
        except psycopg.errors.UndefinedTable:
            raise Gone from None
        if row is None:
            raise Gone
        return list(row)

    # --- work ---

    def _work(self, collection: Collection, connection: psycopg.Connection) -> int:
        """Do a part of what there is to do; how many batches are left."""
        self._work_at = time.monotonic() + WORK_SECONDS
        work = self._due(collection)
        self._turn += 1
        order = sorted(work, key=lambda batch: (work[batch] if self._turn % 2 else self._done_at.get(batch, 0), batch))
        for group in _groups(order, work):
            claimed = [batch for batch in group if claim(connection, self.name, batch)]
            try:
                if claimed:
                    self._do(collection, [batch for batch in self._due(collection) if batch in claimed])
                    left = len(work) - len(group)
                    self._work_at = 0.0 if left else self._work_at
                    return left
            finally:
                for batch in claimed if not connection.closed else ():
                    let_go(connection, self.name, batch)
        return 0

    def _due(self, collection: Collection) -> dict[int, int]:
        work = collection.ledger.work(due=True)
        if self._again:
            again = {batch: items for batch, items in collection.ledger.work().items() if batch in self._again}
            self._again.intersection_update(again)
            work |= again
        return work

    def _do(self, collection: Collection, batches: list[int]) -> None:
        if not batches:
            return
        run = f"live-{uuid.uuid4()}"
        self._done_at.update(dict.fromkeys(batches, time.monotonic()))
        self._again.update(batches)
        try:
            run_batch(collection, batches, run, report=lambda batch, step: self._tally.add(self.name, batch, step))
        except Exception as error:
            if comes_of_outage(error) or isinstance(error, StaleRunError | StaleDefinitionError):
                raise
            self._again.difference_update(batches)  # they wait for their next try
            if not isinstance(error, PipelineError | psycopg.Error):
                log.exception("collection %r: something unexpected failed", self.name)
            keys = ", ".join(map(batch_key, batches))
            self._tell(f"warning: batches {keys}: {_said(error)}; what failed waits for its next try")
        else:
            self._told_of_batches = None
            self._again.difference_update(batches)
            self._sweep(collection, batches, run)

    def _tell(self, line: str) -> None:
        """Of batches that failed, unless it is what was told last."""
        reason = line.partition(": ")[2].partition(": ")[2]
        if reason != self._told_of_batches:
            self.say(line)
        self._told_of_batches = reason

    def _sweep(self, collection: Collection, batches: list[int], run: str) -> None:
        """Remove the files of our last runs of these batches: nobody needs them, and there is a run each second."""
        former = {batch: self._former.pop(batch, None) for batch in batches}
        self._former.update(dict.fromkeys(batches, run))
        wanted = {batch: name for batch, name in former.items() if name is not None}
        if not wanted:
            return
        with collection.database.session() as connection:
            parameters = {"collection": self.name, "batches": list(wanted)}
            kept = {row[0] for row in connection.execute(load_sql("live/files"), parameters)}
        folders = [collection.folder("raw_items"), collection.folder("item_texts"), collection.folder("embeddings")]
        folders += [model.folder("embeddings") for model in collection.shadow_models()]
        for batch, name in wanted.items():
            for folder in folders:
                collection.lake.forget(folder, batch, name, kept)

    # --- trouble ---

    def _well(self) -> None:
        if self._trouble is not None:
            away = time.monotonic() - self._trouble_since
            self.say(f"it is followed again, after {away:.0f} s")
        self._trouble, self._wait = None, 0.0

    def _ill(self, error: Exception) -> None:
        """Tell what failed, if it is something else than before, and wait."""
        if isinstance(error, StaleDefinitionError) and self._reload():
            return
        if isinstance(error, StaleRunError):
            return self.close()
        if not isinstance(error, PipelineError | psycopg.Error | OSError):
            log.exception("collection %r: something unexpected failed", self.name)
        kind = "outage" if comes_of_outage(error) else type(error).__name__
        if self._trouble is None:
            self._trouble_since, self._wait = time.monotonic(), FIRST_WAIT
        if kind != self._trouble:
            self.say(f"warning: {_said(error)}; it waits, and tries again until it works")
        self._trouble = kind
        self.close()
        self._ended.wait(self._wait)
        self._wait = min(LONGEST_WAIT, 2 * self._wait)

    def _reload(self) -> bool:
        """Take the definition that the file has now; whether that is another one."""
        path = self.definition.path
        if path is None:
            return False
        try:
            definition = read_collections(path.parent).collections[self.name]
        except (KeyError, ConfigurationError):
            return False
        if definition.reading.content == self.definition.reading.content:
            return False
        self.definition, self._position = definition, None
        self.say("defs.yaml has changed: its new definition is followed")
        self.close()
        return True

    def _stat(self) -> tuple[int, int] | None:
        try:
            stat = self.definition.path.stat() if self.definition.path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size) if stat else None


def _said(error: Exception) -> str:
    return what_it_says(error) if isinstance(error, psycopg.Error) else str(error) or type(error).__name__


def _groups(order: list[int], work: dict[int, int]) -> Iterator[list[int]]:
    """Batches to be done together, in this order; `work`: how many items each has to do."""
    group: list[int] = []
    items = 0
    for batch in order:
        if group and (len(group) == MOST_BATCHES or items + work[batch] > MOST_ITEMS):
            yield group
            group, items = [], 0
        group.append(batch)
        items += work[batch]
    if group:
        yield group
