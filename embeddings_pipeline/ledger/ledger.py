"""The pipeline's own record of which items exist, what was last seen of them, and what is committed."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import ConfigurationError, RefusedError, SourceError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.column import ColumnDestination, declared_storage, model_table
from embeddings_pipeline.store.destination.table import CollectionTables, TableDestination
from embeddings_pipeline.store.locks import batches_in_commit, lock_batch, lock_collection
from embeddings_pipeline.store.models import Model, current_model
from embeddings_pipeline.store.source import OVERLAP, Position, Source, UpdatedRow
from embeddings_pipeline.store.sql import load_sql

log = logging.getLogger(__name__)

ROWS_PER_TRANSACTION = 2000  # of an incremental scan: each may lie in another batch, and take its lock
ANALYZE_FROM = 1000  # new items
GONE_SHARE = 0.2  # a scan that misses more than this share of what is committed is refused


@dataclass(frozen=True)
class FullScan:
    """What a full scan found, in items, compared with what is committed."""

    scanned: int
    new: int
    changed: int
    gone: int
    unchanged: int


@dataclass(frozen=True)
class IncrementalScan:
    """What an incremental scan found, in items that were not yet known to be so."""

    read: int  # rows
    new: int
    changed: int
    gone: int  # no longer meet the collection's `where:`
    refused: int  # as gone, and left for a full scan to judge because they are too many
    caught_up: bool


@dataclass(frozen=True)
class QuarantineEntry:
    """A text that failed by itself, and an item that has it (None: no longer any)."""

    content_hash: str  # hexadecimal
    item_key: str | None
    items: int  # that lack a vector because of it
    reason: str
    attempts: int
    last_try: datetime
    next_try: datetime | None  # None: given up
    text: str
    profile: str  # of the model that it failed with


@dataclass(frozen=True)
class Watermark:
    """How far incremental scans have come. Stored as JSON in the transaction that writes what they saw.

    Once a scan has caught up, the next goes back to `settled`, so that a row that was committed late is still seen.
    """

    column: str  # `updated_at:` as it was declared
    cursor: Position | None  # the next read begins after it
    settled: Position | None  # where a scan had caught up at least an overlap ago
    noted: Position | None  # becomes `settled` when an overlap has passed since `noted_at`
    noted_at: float  # seconds since 1970, by this machine's clock
    gone: int = 0  # items found gone since the full scan that ended at `gone_since`
    gone_since: str = ""

    def caught_up(self, now: float) -> "Watermark":
        """The watermark after a scan that has read all there is, at `now`."""
        settled, noted, noted_at = self.settled, self.noted, self.noted_at
        if now - noted_at >= OVERLAP.total_seconds() or now < noted_at:  # or the clock was set back
            # Every row of that time that was committed within the overlap has been read, whatever its key.
            settled = Position(noted.updated_at, None) if noted else None
            noted, noted_at = self.cursor, now
        return replace(self, cursor=settled, settled=settled, noted=noted, noted_at=noted_at)

    @classmethod
    def parse(cls, stored: dict[str, Any]) -> "Watermark":
        positions = {n: Position(*stored[n]) if stored[n] else None for n in ("cursor", "settled", "noted")}
        return cls(**{**stored, **positions})


@dataclass(frozen=True)
class Ledger:
    """The ledger of one collection."""

    definition: CollectionDefinition
    database: Database

    @property
    def tables(self) -> CollectionTables:
        return CollectionTables(self.definition.name)

    def register(self) -> None:
        """Make the collection's tables where they are missing, and note its definition: what differs becomes dirty."""
        name = self.definition.name
        with self.database.connect(autocommit=True) as connection:
            made = "SELECT to_regclass(%s) IS NOT NULL AND to_regclass(%s) IS NOT NULL"
            names = [self.tables.item.as_string(connection), self.tables.text.as_string(connection)]
            if connection.execute(made, names).fetchone() != (True,):
                # By itself, and only where needed: even IF NOT EXISTS waits for commits, which wait for the row below.
                with connection.transaction():
                    lock_collection(connection, self.definition.name)
                    self.tables.create(connection)
            connection.execute(
                load_sql("register/register"), {"collection": name, "definition_hash": self.definition.definition_hash}
            )
            model = current_model(connection, self.definition)
            if model is None:
                return
            if isinstance(model.table, ColumnDestination) and not model.table.is_adopted(connection):
                self._adopt_again(connection, model.table)
            names = [model.table.identifier.as_string(connection), self.tables.view.as_string(connection)]
            if connection.execute(made, names).fetchone() != (True,):  # somebody dropped one; a new epoch begins
                with connection.transaction():
                    lock_collection(connection, self.definition.name)
                    model.table.create(connection)
                    model.table.show(connection)
                    model.table.mark(connection)
                    connection.execute(load_sql("register/new_epoch"), {"collection": name})

    def _adopt_again(self, connection: psycopg.Connection, table: ColumnDestination) -> None:
        """Where the definition of the destination has changed, or its table was made anew: what we made for it, too."""
        with connection.transaction():
            lock_collection(connection, self.definition.name)
            if table.is_adopted(connection):  # by another process, for which we waited
                return
            if self.shadow_models():
                raise ConfigurationError(
                    f"collection {self.definition.name!r}: its key, its vector's name or its `destination:` is not "
                    "what it "
                    f"was when a change of its model began; put it back, and end that first, with "
                    f"`embeddings-pipeline profile contract` or `profile rollback`"
                )
            connection.execute(sql.SQL("DROP VIEW IF EXISTS {}").format(self.tables.view))
            table.release(connection)
            table.create(connection)
            table.show(connection)
            connection.execute(load_sql("register/new_epoch"), {"collection": self.definition.name})

    def activate(self, profile: Profile, fingerprint: str) -> Model:
        """Make this model the collection's current one if no vector is committed yet; the current one, whichever it
        is.
        """
        name = self.definition.name
        with self.database.connect() as connection:
            lock_collection(connection, self.definition.name)
            current = connection.execute(
                "SELECT fingerprint, version FROM embeddings.collection WHERE name = %s", [name]
            ).fetchone()
            if current and current[1] == 0 and current[0] != fingerprint:  # no vector is committed
                connection.execute(sql.SQL("DROP VIEW IF EXISTS {}").format(self.tables.view))
                for unused in self.model_tables(connection):
                    unused.release(connection)
                    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(unused.marker))
                connection.execute("DELETE FROM embeddings.model WHERE collection = %s", [name])
                storage = declared_storage(connection, self.definition)
                table = model_table(self.definition, fingerprint, profile.dimensions, storage)
                table.create(connection)
                table.show(connection)
                table.mark(connection)
                connection.execute(
                    load_sql("register/activate"),
                    {
                        "collection": name,
                        "fingerprint": fingerprint,
                        "profile": Jsonb(asdict(profile)),
                        "dimension": profile.dimensions,
                        "storage": storage,
                    },
                )
            found = current_model(connection, self.definition)
        assert found is not None
        return found

    def full_scan(self, source: Source, *, allow_deletes: bool = False) -> FullScan:
        """Compare the whole source with the ledger, and note every item that differs from what is committed.

        Only notes: nothing is committed or is deleted here, and no item becomes clean (design rule 2). RefusedError if
        more than 20 % of what is committed is gone, SourceError for a key that is NULL or comes twice.
        """
        with self._staged(source) as connection:
            found = self._compare(connection, allow_deletes)
            self._insert_new(connection)
            # A commit that looked at the source before our snapshot and commits after the comparison would hide a
            # change from it. It holds its batch's lock now, so such batches are compared again, under that lock.
            in_flight = batches_in_commit(connection, self.definition.name)
            differing = {row[0] for row in connection.execute(self.tables.statement("scan/batches"))}
            suspect = self.tables.statement("scan/suspect")
            for batch in sorted(differing | in_flight):
                with connection.transaction():
                    lock_batch(connection, self.definition.name, batch)
                    connection.execute(suspect, {"batch": batch})
            if in_flight:  # such a commit may also have deleted an item that is back
                self._insert_new(connection)
            connection.execute(
                load_sql("scan/finished"), {"collection": self.definition.name, "scanned": found.scanned}
            )
        if self.definition.attributes.destination is not None:
            self.repair()  # other programs may have emptied the column of a row
        return found

    def incremental_scan(self, source: Source, *, seconds: float = 5.0, rows_at_once: int = 20_000) -> IncrementalScan:
        """Read what was updated since the last time, for at most about `seconds`, and note what differs.

        Only notes, as `scan` does. Needs `source.updated_at:`. Rows that no longer meet `where:` are gone; where those
        are more than 20 % of what is committed, that is left to a full scan, which refuses.
        """
        column = self.definition.attributes.source.updated_at
        assert column is not None
        started = time.monotonic()
        found = IncrementalScan(0, 0, 0, 0, 0, False)
        with source.connect() as reading, self.database.connect(autocommit=True) as connection:
            connection.execute(load_sql("scan/stage"))
            mark = self._watermark(connection)
            if mark is None or mark.column != column:
                newest = source.newest(reading)
                mark = Watermark(column, newest, newest, newest, time.time())
            while True:
                rows = source.updated_after(reading, mark.cursor, rows_at_once)
                last = max((n for n, row in enumerate(rows) if not row.ahead), default=-1)
                whole = len(rows) < rows_at_once or last < 0
                for start in range(0, max(1, len(rows)), ROWS_PER_TRANSACTION):
                    part = rows[start : start + ROWS_PER_TRANSACTION]
                    passed = min(start + len(part) - 1, last)
                    if passed >= 0:
                        mark = replace(mark, cursor=rows[passed].position)
                    at_end = whole and start + ROWS_PER_TRANSACTION >= len(rows)
                    mark = mark.caught_up(time.time()) if at_end else mark
                    seen = self._seen(source, reading, part)
                    new, changed, gone, refused, mark = self._note_updated(connection, seen, mark)
                    found = IncrementalScan(
                        found.read + len(part),
                        found.new + new,
                        found.changed + changed,
                        found.gone + gone,
                        found.refused + refused,
                        at_end,
                    )
                if found.caught_up or time.monotonic() - started > seconds:
                    return found

    def _watermark(self, connection: psycopg.Connection) -> Watermark | None:
        query = "SELECT watermark FROM embeddings.scan WHERE collection = %s"
        row = connection.execute(query, [self.definition.name]).fetchone()
        return Watermark.parse(row[0]) if row and row[0] else None

    def _note_updated(
        self, connection: psycopg.Connection, seen: Mapping[str, bytes | None], mark: Watermark
    ) -> tuple[int, int, int, int, Watermark]:
        """Write what was seen, and how far we have come. Items new, changed, gone and refused; the watermark written.

        A commit holds its batch's lock and then wants the collection's, so never is one taken here under the other.
        """
        with connection.transaction():
            connection.execute("TRUNCATE scan_row")
            with connection.cursor() as cursor, cursor.copy("COPY scan_row FROM STDIN (FORMAT binary)") as copy:
                copy.set_types(["text", "bytea"])
                for row in seen.items():
                    copy.write_row(row)
            connection.execute("ANALYZE scan_row")
        new = self._insert_new(connection)
        refused = 0
        if None in seen.values():
            mark, refused = self._judge_gone(connection, mark)
        # As in `scan`: batches that a commit works on are compared under their lock, after it has ended.
        in_flight = batches_in_commit(connection, self.definition.name)
        with connection.transaction():
            parameters: dict[str, Any] = {"in_flight": list(in_flight)}
            batches = [row[0] for row in connection.execute(self.tables.statement("incremental/batches"), parameters)]
            for batch in batches:
                lock_batch(connection, self.definition.name, batch)
            suspected = connection.execute(
                self.tables.statement("incremental/suspect"), {"batches": batches}
            ).fetchall()
            if not in_flight:
                self._write_watermark(connection, mark)
        if in_flight:  # such a commit may also have deleted an item that is back
            with connection.transaction():
                new += self._insert_new(connection)
                self._write_watermark(connection, mark)
        vanished = sum(hash_seen is None for (hash_seen,) in suspected)
        return new, len(suspected) - vanished, vanished, refused, mark

    def _write_watermark(self, connection: psycopg.Connection, mark: Watermark) -> None:
        values = {"collection": self.definition.name, "watermark": Jsonb(asdict(mark))}
        connection.execute(load_sql("incremental/watermark"), values)

    def _judge_gone(self, connection: psycopg.Connection, mark: Watermark) -> tuple[Watermark, int]:
        """Leave gone items to a full scan where they are too many since the last one; the watermark that counts them,
        and how many were refused.
        """
        parameters = {"collection": self.definition.name}
        row = connection.execute(self.tables.statement("incremental/gone"), parameters).fetchone()
        gone, scanned, scanned_at = row or (0, 0, "")
        before = mark.gone if mark.gone_since == scanned_at else 0
        if before + gone > GONE_SHARE * scanned:
            connection.execute("DELETE FROM scan_row WHERE row_hash IS NULL")
            return mark, gone
        return replace(mark, gone=before + gone, gone_since=scanned_at), 0

    def _seen(self, source: Source, reading: psycopg.Connection, rows: Sequence[UpdatedRow]) -> dict[str, bytes | None]:
        """Item key → row hash; None for items that no row of the source has any more that meets `where:`."""
        seen: dict[str, bytes | None] = {}
        for row in rows:
            if seen.get(row.item_key) is not None and row.row_hash is not None:
                raise self._twice(row.item_key)
            seen[row.item_key] = row.row_hash or seen.get(row.item_key)
        # Another row of that key, an older or a newer one, may still meet it.
        doubtful = [item_key for item_key, row_hash in seen.items() if row_hash is None]
        return {**seen, **{row.item_key: row.row_hash for row in source.read(reading, doubtful)}}

    def look(self, source: Source, *, everything: bool = False) -> tuple[FullScan, list[str]]:
        """What `scan` would find, and the keys of the items that a sync would work on (or of all). Writes nothing."""
        with self._staged(source) as connection:
            found = self._compare(connection, allow_deletes=True)
            parameters = {"collection": self.definition.name, "everything": everything}
            keys = connection.execute(self.tables.statement("scan/pending"), parameters)
            return found, [row[0] for row in keys]

    def dirty_batches(self) -> list[int]:
        """The batches that have something to do, derived from state (design rule 1), in order."""
        return list(self.dirty_items())

    def dirty_items(self, *, due: bool = False) -> dict[int, int]:
        """Batch → how many of its items are dirty, for the batches that have any, in order.

        `due`: without the batches that were tried and wait for their next try.
        """
        with self.database.connect(autocommit=True) as connection:
            statement = self.tables.statement("work/dirty_batches")
            parameters = {"collection": self.definition.name, "due": due}
            return dict(connection.execute(statement, parameters).fetchall())

    def work(self, *, due: bool = False) -> dict[int, int]:
        """As `dirty_items`, and batches with a text whose time in quarantine is over, or in which a model beside the
        current one lacks vectors.
        """
        name, found = self.definition.name, self.dirty_items(due=due)
        current, shadows = self.current(), self.shadow_models()
        with self.database.connect(autocommit=True) as connection:
            parameters = {"collection": name, "attempts": self._quarantine_attempts, "due": due}
            for model in shadows:
                if isinstance(model.table, ColumnDestination):
                    model.table.column(connection)  # somebody may have dropped it
            for model in [current, *shadows] if current else []:
                statement = model.table.statement("work/retries")
                retries = connection.execute(statement, {**parameters, "fingerprint": model.table.fingerprint})
                found = {**dict(retries.fetchall()), **found}
            if shadows:
                size = self.definition.attributes.items_per_batch
                incomplete = connection.execute(load_sql("work/incomplete_batches"), parameters).fetchall()
                found = {**{batch: size for (batch,) in incomplete}, **found}
        return dict(sorted(found.items()))

    def recent_items(self, days: int, limit: int) -> dict[int, list[str]]:
        """Batch → keys of items first seen in the last `days` of which nothing is committed; the `limit` oldest."""
        found: dict[int, list[str]] = {}
        with self.database.connect(autocommit=True) as connection:
            statement = self.tables.statement("work/recent_items")
            for batch, item_key in connection.execute(
                statement, {"collection": self.definition.name, "days": days, "limit": limit}
            ):
                found.setdefault(batch, []).append(item_key)
        return dict(sorted(found.items()))

    @property
    def _quarantine_attempts(self) -> int:
        return self.definition.attributes.quarantine.attempts

    def batches(self) -> list[int]:
        """Every batch of the collection, in order."""
        query = "SELECT batch FROM embeddings.batch WHERE collection = %s ORDER BY batch"
        with self.database.connect(autocommit=True) as connection:
            return [row[0] for row in connection.execute(query, [self.definition.name])]

    def item_keys(self, batch: int) -> list[str]:
        """The keys of a batch's items."""
        query = sql.SQL("SELECT item_key FROM {} WHERE batch = %s ORDER BY item_key").format(self.tables.item)
        with self.database.connect(autocommit=True) as connection:
            return [row[0] for row in connection.execute(query, [batch])]

    def repair(self) -> int:
        """Make items dirty whose texts or vectors are not what is committed, and remove orphans; how many were
        found.
        """
        model = self.current()
        if model is None:
            return 0
        found = 0
        with self.database.connect(autocommit=True) as connection:
            statement = model.table.statement("repair/damaged_batches")
            parameters: dict[str, Any] = {"collection": self.definition.name, "fingerprint": model.table.fingerprint}
            for (batch,) in connection.execute(statement, parameters).fetchall():
                with connection.transaction():
                    lock_batch(connection, self.definition.name, batch)
                    parameters["batch"] = batch
                    found += connection.execute(model.table.statement("repair/suspect"), parameters).rowcount
            found += connection.execute(model.table.statement("repair/orphans")).rowcount
            connection.execute(self.tables.statement("quarantine/sweep"), {"collection": self.definition.name})
        return found

    def current(self) -> Model | None:
        """The current model, or None before the first run."""
        with self.database.connect(autocommit=True) as connection:
            return current_model(connection, self.definition)

    def shadow_models(self) -> list[Model]:
        """The shadow models."""
        name = self.definition.name
        with self.database.connect(autocommit=True) as connection:
            rows = connection.execute(load_sql("work/shadow_models"), {"collection": name}).fetchall()
        return [Model(Profile(**row[3]), model_table(self.definition, *row[:3])) for row in rows]

    def model_tables(self, connection: psycopg.Connection) -> list[TableDestination]:
        """Every model table of the collection, the current one and others; none of them is dropped meanwhile."""
        query = "SELECT fingerprint, dimension, storage FROM embeddings.model WHERE collection = %s FOR KEY SHARE"
        name = self.definition.name
        return [model_table(self.definition, *row) for row in connection.execute(query, [name]).fetchall()]

    def quarantined(self, fingerprint: str, content_hashes: Sequence[bytes], *, waiting: bool = False) -> set[bytes]:
        """Which of these are in quarantine under this fingerprint; `waiting`: and not to be tried now."""
        if not content_hashes:
            return set()
        parameters = {
            "collection": self.definition.name,
            "fingerprint": fingerprint,
            "content_hashes": list(content_hashes),
            "waiting": waiting,
            "attempts": self._quarantine_attempts,
        }
        with self.database.connect(autocommit=True) as connection:
            return {row[0] for row in connection.execute(load_sql("quarantine/among"), parameters)}

    def quarantine_entries(self, *, every_model: bool = False) -> list[QuarantineEntry]:
        """What is in quarantine under the current model, newest first; `every_model`: and then under those beside
        it.
        """
        current = self.current()
        if current is None:
            return []
        parameters = {"collection": self.definition.name, "attempts": self._quarantine_attempts}
        entries = []
        with self.database.connect(autocommit=True) as connection:
            for model in [current, *(self.shadow_models() if every_model else [])]:
                own = {**parameters, "fingerprint": model.table.fingerprint, "profile": model.profile.name}
                rows = connection.execute(model.table.statement("quarantine/list"), own).fetchall()
                entries += [QuarantineEntry(*row) for row in rows]
        return entries

    def quarantine_retry(self, content_hashes: Sequence[bytes] | None = None) -> int:
        """Have these texts (or all) tried with the next run, with as many attempts as a new one; how many."""
        with self.database.connect(autocommit=True) as connection:
            parameters = {"collection": self.definition.name, "content_hashes": _list_or_none(content_hashes)}
            return connection.execute(load_sql("quarantine/retry"), parameters).rowcount

    def quarantine_clear(self, content_hashes: Sequence[bytes] | None = None) -> int:
        """Forget these texts (or all), which are new ones then: their items are dirty. How many."""
        parameters: dict[str, Any] = {
            "collection": self.definition.name,
            "content_hashes": _list_or_none(content_hashes),
        }
        with self.database.connect(autocommit=True) as connection:
            batches = [row[0] for row in connection.execute(self.tables.statement("quarantine/batches"), parameters)]
            with connection.transaction():
                for batch in batches:
                    lock_batch(connection, self.definition.name, batch)
                connection.execute(self.tables.statement("quarantine/suspect"), parameters)
                connection.execute(load_sql("quarantine/look_again"), {**parameters, "batches": batches})
                return connection.execute(load_sql("quarantine/clear"), parameters).rowcount

    def quarantine(self, fingerprint: str, bad: Mapping[bytes, tuple[str, str]]) -> None:
        """Put bad texts (content hash → text and reason) into quarantine. The commit takes out what went well."""
        if not bad:
            return
        with self.database.connect() as connection:
            for digest, (text, reason) in bad.items():
                log.warning("collection %r: a text went to quarantine: %s", self.definition.name, reason)
                parameters: dict[str, Any] = {"collection": self.definition.name, "fingerprint": fingerprint}
                parameters |= {"content_hash": digest, "text": text, "reason": reason}
                connection.execute(load_sql("quarantine/add"), parameters)

    def note_attempts(self, batches: Sequence[int]) -> None:
        """Note a try at these batches: until they are committed, each waits longer for its next one.

        Called before what may fail, so that a try that kills its process counts as well.
        """
        with self.database.connect(autocommit=True) as connection:
            connection.execute(
                load_sql("work/attempts"), {"collection": self.definition.name, "batches": list(batches)}
            )

    @contextmanager
    def _staged(self, source: Source) -> Iterator[psycopg.Connection]:
        """A session with the whole source in its table `scan_row`."""
        with source.connect() as reading, self.database.connect(autocommit=True) as connection:
            source.check(reading)
            connection.execute(load_sql("scan/stage"))
            with connection.cursor() as cursor, cursor.copy("COPY scan_row FROM STDIN (FORMAT binary)") as copy:
                copy.set_types(["text", "bytea"])
                for rows in source.scan(reading):
                    for row in rows:
                        copy.write_row((row.item_key, row.row_hash))
            try:
                connection.execute(load_sql("scan/staged"))
            except psycopg.errors.UniqueViolation as error:
                detail = (error.diag.message_detail or "").removeprefix("Key (item_key)=(")
                raise self._twice(detail.removesuffix(") is duplicated.")) from error
            yield connection

    def _twice(self, item_key: str) -> SourceError:
        key = ", ".join(self.definition.attributes.source.key)
        return SourceError(
            f"collection {self.definition.name!r}: the source has the key ({item_key}) more than once; `source.key:` "
            f"({key}) must identify a row"
        )

    def _compare(self, connection: psycopg.Connection, allow_deletes: bool) -> FullScan:
        row = connection.execute(self.tables.statement("scan/compare")).fetchone()
        assert row is not None
        *counts, committed = row
        found = FullScan(*counts)
        if found.gone > GONE_SHARE * committed and not allow_deletes:
            raise RefusedError(
                f"collection {self.definition.name!r}: {found.gone:,} of {committed:,} items are gone from the source, "
                f"more than {GONE_SHARE:.0%}; nothing was deleted. If that is right, sync with --allow-deletes "
                f"(or set allow_deletes on item_ledger in the launchpad)"
            )
        return found

    def _insert_new(self, connection: psycopg.Connection) -> int:
        """Give new items of `scan_row` their batch; how many there are."""
        name, per_batch = self.definition.name, self.definition.attributes.items_per_batch
        with connection.transaction():
            lock_collection(connection, self.definition.name)
            query = "SELECT last_batch, last_batch_size FROM embeddings.collection WHERE name = %s"
            row = connection.execute(query, [name]).fetchone()
            assert row is not None
            last_batch, size = row
            if size >= per_batch:
                last_batch, size = last_batch + 1, 0
            parameters = {"last_batch": last_batch, "last_batch_size": size, "items_per_batch": per_batch}
            inserted = connection.execute(self.tables.statement("scan/insert_new"), parameters).rowcount
            if inserted:
                last = last_batch + (size + inserted - 1) // per_batch
                size = (size + inserted - 1) % per_batch + 1
                parameters = {"collection": name, "first": last_batch, "last": last, "size": size}
                connection.execute(load_sql("scan/batches_added"), parameters)
                if inserted >= ANALYZE_FROM:
                    connection.execute(sql.SQL("ANALYZE {}").format(self.tables.item))
        return inserted


def _list_or_none(values: Sequence[bytes] | None) -> list[bytes] | None:
    return None if values is None else list(values)


def contiguous_ranges(
    items: Mapping[int, int], existing: Sequence[int | None], *, most_batches: int, most_items: int
) -> list[tuple[int, int]]:
    """Batches as (first, last) pairs without a gap among `existing`; `items`: batch → items to work on.

    `existing` is in the order in which Dagster knows the partitions; None where one is no batch. Each pair holds at
    most `most_batches`, and at most `most_items` unless it is a single batch.
    """
    place = {batch: n for n, batch in enumerate(existing) if batch is not None}
    ranges: list[tuple[int, int]] = []
    held = 0
    for batch in sorted(items.keys() & place.keys(), key=place.__getitem__):
        held += items[batch]
        if ranges:
            first, last = ranges[-1]
            follows = place[batch] == place[last] + 1 and place[batch] - place[first] < most_batches
            if follows and held <= most_items:
                ranges[-1] = (first, batch)
                continue
        ranges.append((batch, batch))
        held = items[batch]
    return ranges
