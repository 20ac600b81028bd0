"""What there is to do, derived from state (rule 1), and when a batch that failed is tried again."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from embeddings_pipeline.config.templates import clean
from embeddings_pipeline.ledger.base import LedgerBase
from embeddings_pipeline.ledger.quarantine import LONGEST_TEXT_WAIT
from embeddings_pipeline.store.sql import load_sql

FIRST_BATCH_WAIT, LONGEST_BATCH_WAIT = timedelta(minutes=1), timedelta(minutes=64)
"""A batch that has been tried waits before it is tried again: 1, 2, 4 … 64 minutes. Its commit ends that."""


class Work(LedgerBase):
    """The part of the ledger that says which batches have something to do."""

    def dirty_batches(self) -> list[int]:
        """The batches with a dirty item, in order."""
        return list(self.dirty_items())

    def dirty_items(self, *, due: bool = False, free: bool = False) -> dict[int, int]:
        """Batch → how many of its items are dirty, for the batches that have any, in order.

        `due`: without the batches that were tried and wait for their next try. `free`: without the items that wait for
        a batch job.
        """
        with self.database.session() as connection:
            parameters = {"collection": self.name, "due": due, "free": free, "longest": LONGEST_BATCH_WAIT}
            return dict(connection.execute(self.tables.statement("work/dirty_batches"), parameters).fetchall())

    def dirty_since(self, moments: Mapping[int, datetime]) -> list[int]:
        """Of these batches, those with an item that has been dirty since before its moment."""
        parameters = {"batches": list(moments), "moments": list(moments.values())}
        with self.database.session() as connection:
            return [row[0] for row in connection.execute(self.tables.statement("work/dirty_since"), parameters)]

    def work(self, *, due: bool = False) -> dict[int, int]:
        """As `dirty_items`, and batches with a text whose time in quarantine is over, or in which a shadow model lacks
        vectors. What waits for a batch job is left out.
        """
        dirty, current, shadows = self.dirty_items(due=due, free=True), self.current(), self.shadow_models()
        retried: dict[int, int] = {}
        incomplete: dict[int, int] = {}
        attempts = self.definition.attributes.quarantine.attempts
        longest = {"longest": LONGEST_BATCH_WAIT, "longest_text": LONGEST_TEXT_WAIT}
        parameters = {"collection": self.name, "attempts": attempts, "due": due, **longest}
        with self.database.session() as connection:
            for model in shadows:
                model.destination.check_exists(connection)
            for model in reversed([current, *shadows] if current else []):
                own = {**parameters, "fingerprint": model.destination.fingerprint}
                retried |= dict(connection.execute(model.destination.statement("work/retries"), own).fetchall())
            if shadows:
                size = self.definition.attributes.items_per_batch
                rows = connection.execute(load_sql("work/incomplete_batches"), parameters)
                incomplete = {batch: size for (batch,) in rows}
        return dict(sorted({**incomplete, **retried, **dirty}.items()))

    def recent_items(self, days: int, limit: int) -> dict[int, list[str]]:
        """Batch → keys of items first seen in the last `days` of which nothing is committed; the `limit` oldest."""
        keys: dict[int, list[str]] = {}
        parameters = {"collection": self.name, "days": days, "limit": limit, "longest": LONGEST_BATCH_WAIT}
        with self.database.session() as connection:
            for batch, item_key in connection.execute(self.tables.statement("work/recent_items"), parameters):
                keys.setdefault(batch, []).append(item_key)
        return dict(sorted(keys.items()))

    def note_attempts(self, batches: Sequence[int]) -> None:
        """Note an attempt at these batches: until they are committed, each waits longer for its next one.

        Called before what may fail, so that an attempt that kills its process counts as well.
        """
        waits = {"first": FIRST_BATCH_WAIT, "longest": LONGEST_BATCH_WAIT}
        parameters = {"collection": self.name, "batches": list(batches), **waits}
        with self.database.session() as connection:
            connection.execute(load_sql("work/attempts"), parameters)

    def take_back_attempts(self, first: int, last: int, *, seconds: float) -> None:
        """The attempts at the batches from `first` to `last` that began within the last seconds do not count: somebody
        interrupted them.
        """
        waits = {"first_wait": FIRST_BATCH_WAIT, "longest": LONGEST_BATCH_WAIT}
        parameters = {"collection": self.name, "first": first, "last": last, "seconds": seconds + 1, **waits}
        with self.database.connect(autocommit=True) as connection:
            connection.execute(load_sql("work/interrupted"), parameters)

    def note_failure(self, batches: Sequence[int], reason: str) -> None:
        """Note why the last attempt at these batches failed, until they are committed."""
        parameters = {"collection": self.name, "batches": list(batches), "reason": clean(reason)}
        with self.database.session() as connection:
            connection.execute(load_sql("work/failed"), parameters)


def contiguous_ranges(
    items: Mapping[int, int], existing: Sequence[int | None], *, most_batches: int, most_items: int
) -> list[tuple[int, int]]:
    """Batches as (first, last) pairs without a gap among `existing`; `items`: batch → items to work on.

    `existing` is in the order in which Dagster knows the partitions; None for a partition that is no batch. Each pair
    holds at most `most_batches`, and at most `most_items` unless it is a single batch.
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
