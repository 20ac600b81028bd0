"""The items nearest to a vector, by PostgreSQL: all texts are compared, or an ANN index is asked until there are enough
items.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import Vector
from psycopg import sql
from psycopg.types.json import Jsonb

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.index.searching import texts_per_item
from embeddings_pipeline.search.hits import Hit, Leg, exact_cursor
from embeddings_pipeline.search.matching import matching_texts
from embeddings_pipeline.search.selectivity import Filter
from embeddings_pipeline.store.condition import NOTHING, parts_of
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.store.sql import load_sql

ALL_COMPARED_BELOW = 50_000  # vectors: up to here comparing all takes some tens of milliseconds
MOST_FROM_INDEX = 20_000  # texts: beyond, comparing all is faster than asking the index
GROWTH = 4  # how many times as many texts are asked for, if they were of too few items
EF_SEARCH, MOST_EF_SEARCH, PROBES = 200, 1000, 20
# With a filter: how many times as many texts an index is asked for, since it misses more the farther it has to look;
# how many times as many the lists of IVFFlat have that are looked into, and microseconds for each of those; how many
# times as many as expected are asked whether they match, before it is given up.
DEEPER, WIDER, SCANNED, PATIENCE = 2, 40, 0.5, 3
LEAST_ASKED, MOST_ASKED = 1000, 40_000
COMPARE_ALL = sql.SQL(" + 0")  # no ANN index is ordered by such a sum


@dataclass
class _Asking:
    """How the texts are asked for now, and what did not go so."""

    texts: int
    index: "_Index | None"  # None: all that match are compared
    among: bool = False  # those that match are few, and found first
    looked_at: int = 0
    fell_back: list[str] = field(default_factory=list)

    def compare_all(self, why: str) -> None:
        self.fell_back.append(f"{why}: all were compared")
        self.index = None


@dataclass(frozen=True)
class _Index:
    """An ANN index to ask, and about how many vectors it is of."""

    method: str
    lists: int  # of IVFFlat
    vectors: int

    def probes(self, texts: int, share: float) -> int:
        """Into how many lists to look, so that the nearest texts, of which a share counts, are well within them."""
        wanted = math.ceil(WIDER * texts / share * self.lists / max(self.vectors, 1))
        return min(max(PROBES, wanted), max(self.lists, 1))

    def beforehand(self, texts: int, share: float) -> float:
        """Microseconds until it gives the first text."""
        return SCANNED * self.probes(texts, share) * self.vectors / self.lists if self.lists else 0.0


def nearest_items(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    model: Model,
    name: str,
    vector: NDArray[np.float32],
    k: int,
) -> list[Hit]:
    """The `k` items nearest to a vector of that model, each with its nearest text; fewer only if there are no more."""
    return nearest_leg(connection, definition, model, name, vector, k)[0]


def nearest_leg(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    model: Model,
    name: str,
    vector: NDArray[np.float32],
    k: int,
    *,
    filtered: Filter | None = None,
    fell_back: Sequence[str] = (),
) -> tuple[list[Hit], Leg]:
    """As `nearest_items`, with what was done. `filtered`: of items that meet its condition alone. `fell_back`: what was
    tried before, and why that did not do.
    """
    began, table = time.perf_counter(), model.destination
    asking = _Asking(k * texts_per_item(definition), _index_for(connection, table, name), fell_back=list(fell_back))
    if filtered and asking.index:
        asking.texts *= DEEPER
        beforehand = asking.index.beforehand(asking.texts, filtered.share)
        if filtered.prefers_lookup(asking.texts, texts_per_item(definition), beforehand=beforehand):
            asking.index, asking.among = None, True
    while True:
        hits, texts = _ask(connection, table, name, vector, k, asking, filtered)
        asking.looked_at = texts
        if len(hits) >= k or (texts < asking.texts and asking.index is None):
            break
        if texts < asking.texts and asking.index is not None:
            asking.compare_all(f"the {asking.index.method} index gave {texts} texts of {asking.texts}")
            continue
        asking.texts *= GROWTH
        if asking.index is not None and asking.texts > MOST_FROM_INDEX:
            asking.compare_all(f"the nearest {texts} texts are of {len(hits)} items")
    compared = "all that match compared" if filtered else "all compared"
    how = f"{asking.index.method} index" if asking.index else compared
    return hits, leg_of(hits, name, "pgvector", how, asking.looked_at, began, asking.fell_back)


def leg_of(
    hits: list[Hit], name: str, answered_by: str, how: str, texts: int, began: float, fell_back: list[str]
) -> Leg:
    """What was done; began: by `time.perf_counter()`."""
    ranks = {hit.item_key: (rank, hit.score) for rank, hit in enumerate(hits, 1)}
    milliseconds = round(1000 * (time.perf_counter() - began), 3)
    return Leg(name, answered_by, how, texts, milliseconds, tuple(fell_back), ranks)  # type: ignore[arg-type]


def _index_for(connection: psycopg.Connection, table: Destination, name: str) -> _Index | None:
    """The ANN index to ask for that vector; None if there is none, or so few vectors that all are compared.

    An ANN index does not find every vector that lies apart from the others.
    """
    counted, bytes_each = table.counted
    row = connection.execute(load_sql("search/size"), {"table": counted.as_string(connection)}, prepare=True).fetchone()
    vectors = row[0] // bytes_each if row else 0
    if vectors < ALL_COMPARED_BELOW:
        return None
    for index in table.layout(connection).indexes:
        if index.valid and index.vector_name in ("", name):
            return _Index(index.method, index.parameters.get("lists", 0), vectors)
    return None


def _ask(
    connection: psycopg.Connection,
    table: Destination,
    name: str,
    vector: NDArray[np.float32],
    k: int,
    asking: _Asking,
    filtered: Filter | None,
) -> tuple[list[Hit], int]:
    """The best `k` items of the nearest texts, and how many texts these were."""
    parameters: dict[str, object] = {"query": Vector(vector).to_text(), "texts": asking.texts}
    if filtered and asking.among:
        return _ask_among(connection, table, name, parameters, k, filtered)
    condition, settings = filtered.condition if filtered else None, {}
    if condition:
        parameters |= condition.parameters
    if filtered and asking.index:
        statement, parts = "search/nearest_asked", {"condition": filtered.condition.statement}
        parameters["most"] = min(max(round(PATIENCE * asking.texts / filtered.share), LEAST_ASKED), MOST_ASKED)
        settings = {"ivfflat.probes": asking.index.probes(asking.texts, filtered.share)}
    else:
        statement, parts = "search/nearest", parts_of(condition, table.tables)
        parts["compare_all"] = NOTHING if asking.index else COMPARE_ALL
    nearest = table.statement(statement, vector_name=sql.Literal(name), type=table.type, **parts)
    with connection.transaction():
        _set_for_search(connection, asking.texts, settings, by_index=asking.index is not None)
        return hits_of(connection, table, nearest, parameters, k)


def _ask_among(
    connection: psycopg.Connection,
    table: Destination,
    name: str,
    parameters: dict[str, object],
    k: int,
    filtered: Filter,
) -> tuple[list[Hit], int]:
    """As `_ask`, of the texts that match, which are found first."""
    of = {"vector_name": sql.Literal(name), "type": table.type, "compare_all": COMPARE_ALL}
    with connection.transaction():  # what it reads is of one moment
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        parameters["ids"] = matching_texts(connection, table.tables, name, filtered.condition).written
        return hits_of(connection, table, table.statement("search/nearest_among", **of), parameters, k)


def hits_of(
    connection: psycopg.Connection, table: Destination, nearest: sql.Composed, parameters: dict[str, object], k: int
) -> tuple[list[Hit], int]:
    """The best `k` items of the texts that a statement gives, and how many texts it gives."""
    with exact_cursor(connection) as cursor:
        cursor.execute(table.statement("search/hits", nearest=nearest), {**parameters, "k": k})
        rows = cursor.fetchall()
    return [Hit(*row[:-1]) for row in rows], rows[0][-1] if rows else 0


def nearest_texts(
    connection: psycopg.Connection, table: Destination, name: str, vector: NDArray[np.float32], n: int
) -> list[tuple[int, float]]:
    """Ids and cosines of the `n` texts nearest to a vector, found as searches find them if there are many."""
    with connection.transaction():
        _set_for_search(connection, n, {}, by_index=True)
        statement = table.statement("search/texts", vector_name=sql.Literal(name), type=table.type)
        return connection.execute(statement, {"query": Vector(vector).to_text(), "n": n}).fetchall()


def _set_for_search(
    connection: psycopg.Connection, texts: int, others: Mapping[str, object], *, by_index: bool
) -> None:
    """How thoroughly an ANN index is searched in this transaction. It goes on until it has as many texts as are asked
    for; relaxed, since strict leaves out what it finds late, and the statements order what they get.
    """
    settings: dict[str, object] = {
        "hnsw.ef_search": min(max(EF_SEARCH, 2 * texts), MOST_EF_SEARCH),
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.max_scan_tuples": MOST_ASKED,
        "hnsw.scan_mem_multiplier": 8,
        "ivfflat.probes": PROBES,
        "ivfflat.iterative_scan": "relaxed_order",
        "random_page_cost": 1.1,  # what is searched is in memory
    }
    if by_index:
        settings |= {**others, "enable_seqscan": "off"}
    given = {"settings": Jsonb({name: str(value) for name, value in settings.items()})}
    connection.execute(load_sql("search/settings"), given, prepare=True)
