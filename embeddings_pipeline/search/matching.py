"""Which texts meet a filter: a process remembers that of its last filters, and asks again only for those batches that
were committed since.

Finding them takes three quarters of a search among the 10,000 of a million that match, and people filter by the same
values again and again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.store.condition import NOTHING, Condition
from embeddings_pipeline.store.destination.base import CollectionTables
from embeddings_pipeline.store.sql import load_sql

if TYPE_CHECKING:
    from embeddings_pipeline.index.faiss_read import FaissIndex

MOST_REMEMBERED = 50_000_000  # bytes of all filters together
TEXT_BYTES, BATCH_BYTES = 25, 250  # of what is remembered of one
MOST_FILTERS = 1000
MOST_COMMITTED = 20  # batches; if more were committed since, all is asked again
OF_BATCHES = sql.SQL("AND item.batch = ANY (%(batches)s::bigint[])")


@dataclass(frozen=True)
class Matching:
    """The texts of one vector name that meet a filter."""

    ids: NDArray[np.int64]  # (n,)
    batches: NDArray[np.int64]  # (n,) of their items

    @cached_property
    def written(self) -> str:
        """The ids as PostgreSQL writes an array."""
        return "{" + ",".join(map(str, self.ids.tolist())) + "}"

    @cached_property
    def _chosen(self) -> dict[tuple[str, str], NDArray[np.uint8]]:
        return {}

    def chosen(self, generation: "FaissIndex", vector_name: str) -> NDArray[np.uint8]:
        """Which of a generation's texts these are, as FAISS is told; of the last one that was asked."""
        key = generation.manifest.checksum, vector_name
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = generation.choice(vector_name, self.ids)
            self._chosen.clear()
            self._chosen[key] = chosen
        return chosen


@dataclass(frozen=True)
class _Remembered:
    state: tuple[Any, ...]  # of all commits, in one row
    commits: Mapping[int, tuple[str, str]]  # of each batch, the last one
    matching: Matching
    key_bytes: int

    @property
    def bytes(self) -> int:
        """About what it takes. Each filter has the commits of all batches, be there none that matches."""
        return TEXT_BYTES * len(self.matching.ids) + BATCH_BYTES * len(self.commits) + self.key_bytes


_remembered: OrderedDict[tuple[Any, ...], _Remembered] = OrderedDict()  # the one that was asked last is at the end
_mutex = ProcessLock()


def matching_texts(
    connection: psycopg.Connection, tables: CollectionTables, vector_name: str, condition: Condition
) -> Matching:
    """The texts of that name whose items meet the condition, as the session's transaction sees them.

    Whatever changes an item or its texts commits its batch, and each commit of a batch writes its row.
    """
    of = {"collection": tables.collection}
    [(*place, state)] = connection.execute(load_sql("search/commits"), of, prepare=True).fetchall()
    asked = condition.statement.as_string(connection), repr(sorted(condition.parameters.items()))
    key = (*place, tables.collection, vector_name, *asked)
    with _mutex:
        known = _remembered.get(key)
    if known is None or known.state != state:
        commits = {row[0]: row[1:] for row in connection.execute(load_sql("search/batch_commits"), of)}
        found = _found(connection, tables, vector_name, condition, commits, known)
        known = _Remembered(state, commits, found, sum(map(len, asked)))
    with _mutex:
        _remembered[key] = known
        _remembered.move_to_end(key)
        kept = sum(each.bytes for each in _remembered.values())
        while len(_remembered) > 1 and (kept > MOST_REMEMBERED or len(_remembered) > MOST_FILTERS):
            kept -= _remembered.popitem(last=False)[1].bytes
    return known.matching


def _found(
    connection: psycopg.Connection,
    tables: CollectionTables,
    vector_name: str,
    condition: Condition,
    commits: Mapping[int, tuple[str, str]],
    known: _Remembered | None,
) -> Matching:
    def ask(batches: Iterable[int] | None) -> Matching:
        statement = tables.statement(
            "search/matching_texts",
            vector_name=sql.Literal(vector_name),
            condition=condition.statement,
            of_batches=NOTHING if batches is None else OF_BATCHES,
        )
        parameters = {**condition.parameters, "batches": list(batches or ())}
        rows = connection.execute(statement, parameters).fetchall()
        pairs = np.array(rows, np.int64).reshape(-1, 2)
        return Matching(pairs[:, 0].copy(), pairs[:, 1].copy())

    if known is None:
        return ask(None)
    every = commits.keys() | known.commits.keys()
    changed = {batch for batch in every if commits.get(batch) != known.commits.get(batch)}
    if len(changed) > MOST_COMMITTED:
        return ask(None)
    old, new = known.matching, ask(changed)
    kept = ~np.isin(old.batches, list(changed))
    ids, batches = np.concatenate([old.ids[kept], new.ids]), np.concatenate([old.batches[kept], new.batches])
    return Matching(ids, batches)
