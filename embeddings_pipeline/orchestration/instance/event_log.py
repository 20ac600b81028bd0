"""Dagster's events on PostgreSQL, with fewer questions than Dagster asks, and what `purge` has to know of them."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar

import dagster as dg

from embeddings_pipeline.orchestration.dagster_internals import (
    ConcurrencyLimitsTable,
    PostgresEventLogStorage,
    SqlEventLogStorageTable,
)
from embeddings_pipeline.orchestration.instance.pool import Pooled
from embeddings_pipeline.store.sql import load_sql

# Within `partitions_held`: name of a set of partitions → its keys in their order, and as a set.
_held: ContextVar[dict[str, tuple[Sequence[str], Set[str]]] | None] = ContextVar("held", default=None)


@contextmanager
def partitions_held() -> Iterator[None]:
    """Within it, what Dagster has asked about partitions is not asked again: of a run at work, they are given, and it
    asks several times for each of them.
    """
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


# Within `materializations_together`: those that are not written yet.
_gathered: ContextVar[list[dg.EventLogEntry] | None] = ContextVar("gathered", default=None)
EVENTS_TOGETHER = 200
_TOGETHER = (dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)


@contextmanager
def materializations_together(instance: dg.DagsterInstance) -> Iterator[None]:
    """Within it, materializations that are reported one by one are written together; the last ones at its end."""
    gathered = list[dg.EventLogEntry]()
    token = _gathered.set(gathered)
    try:
        yield
    finally:
        _gathered.reset(token)
    if gathered:
        instance.event_log_storage.store_event_batch(gathered)


class PipelineEventLogStorage(Pooled, PostgresEventLogStorage):
    """Events, and what else `purge` has to know of them."""

    _partitions: Mapping[str, tuple[tuple[int, ...], Sequence[str]]] = {}
    _tables: frozenset[str] = frozenset()

    def has_table(self, table_name: str) -> bool:
        # Dagster asks each time that it looks at a partition or writes a tag; what is there stays there.
        if table_name not in self._tables and super().has_table(table_name):
            self._tables |= {table_name}
        return table_name in self._tables

    def get_dynamic_partitions(self, partitions_def_name: str) -> Sequence[str]:
        # Dagster asks for all of them for each partition of a run: what is known is read again only if it has changed.
        if (held := _held.get()) is not None and partitions_def_name in held:
            return held[partitions_def_name][0]
        with self.index_connection() as connection:
            named = {"name": partitions_def_name}
            row = connection.exec_driver_sql(load_sql("dagster/partitions_standing"), named).one()
        standing, (known, keys) = tuple(row), self._partitions.get(partitions_def_name, ((), ()))
        if standing != known:
            keys = super().get_dynamic_partitions(partitions_def_name)
            self._partitions = {**self._partitions, partitions_def_name: (standing, keys)}
        if held is not None:
            held[partitions_def_name] = tuple(keys), frozenset(keys)
        return list(keys)

    def has_dynamic_partition(self, partitions_def_name: str, partition_key: str) -> bool:
        if (held := _held.get()) is not None and partitions_def_name in held:
            return partition_key in held[partitions_def_name][1]
        return super().has_dynamic_partition(partitions_def_name, partition_key)

    def store_event(self, event: dg.EventLogEntry) -> None:
        gathered = _gathered.get()
        if gathered is None or event.dagster_event_type != dg.DagsterEventType.ASSET_MATERIALIZATION:
            return super().store_event(event)
        gathered.append(event)
        if len(gathered) >= EVENTS_TOGETHER:
            self.store_event_batch(gathered)
            gathered.clear()

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        # Dagster writes together what was made of one asset, but one by one what is planned: four events a partition.
        together, others = list[dg.EventLogEntry](), list[dg.EventLogEntry]()
        for event in events:
            (together if event.dagster_event_type in _TOGETHER else others).append(event)
        if others:
            super().store_event_batch(others)
        if not together:
            return
        with self._connect() as connection:
            rows = self.prepare_insert_event_batch(together).returning(SqlEventLogStorageTable.c.id)
            ids = connection.execute(rows).scalars().all()
        newest = {event.get_dagster_event().asset_key: at for at, event in enumerate(together)}
        with self.index_transaction() as transaction:
            self._store_asset_event_tags(transaction, together, ids)
            for at in newest.values():
                self._store_asset_event(transaction, together[at], ids[at])

    def newest_runs(self) -> frozenset[str]:
        """The runs that say how an asset, a partition or a check is."""
        with self.index_connection() as connection:
            return frozenset(connection.exec_driver_sql(load_sql("dagster/newest")).scalars())

    def forget_checks(self) -> None:
        """Remove the results of checks of runs that are gone, but for the newest of each."""
        with self.index_transaction() as transaction:
            transaction.exec_driver_sql(load_sql("dagster/forget_checks"))

    def make_room(self) -> None:
        """Let what comes take the room of runs and events that are gone."""
        with self.index_connection() as connection:
            connection.exec_driver_sql(load_sql("dagster/make_room"))

    def initialize_concurrency_limit_to_default(self, concurrency_key: str) -> bool:
        # If the pool has a row (another process made it, or its default limit was changed), Dagster catches the
        # conflict of its INSERT and goes on in the failed transaction.
        limit = self._instance.global_op_concurrency_default_limit
        with self.database.connect() as connection:
            connection.execute("SELECT pg_advisory_xact_lock(hashtext('dagster pools'))")
            if limit is None or not any(pool.name == concurrency_key for pool in self.get_pool_limits()):
                return super().initialize_concurrency_limit_to_default(concurrency_key)
        own = ConcurrencyLimitsTable.c.concurrency_key == concurrency_key
        with self.index_transaction() as transaction:
            transaction.execute(ConcurrencyLimitsTable.update().where(own).values(limit=limit))
            self._allocate_concurrency_slots(transaction, concurrency_key, limit)
        return True
