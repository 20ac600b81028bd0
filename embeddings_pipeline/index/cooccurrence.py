"""Which items the same people liked: item–item co-occurrence from the interactions, in a table.

Two items are as near as the cosine of the people who liked them: how many liked both, over the geometric mean of how
many liked each [1]. Made anew as a whole; searches read it meanwhile as it was.

[1] Linden, Smith and York, "Amazon.com recommendations: item-to-item collaborative filtering", IEEE Internet Computing
7(1), 2003; Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.store.copy_binary import columns_of, copy_in
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.interactions import Interactions
from embeddings_pipeline.store.sql import load_sql

NEAREST = 50  # that are kept of each item
MOST_OF_A_PERSON = 1000  # items: who likes more says little of each
ITEMS_AT_ONCE = 1000


@dataclass(frozen=True)
class Cooccurrence:
    """What was found."""

    people: int
    left_out: int  # people who liked more than MOST_OF_A_PERSON items
    items: int
    pairs: int


def build_cooccurrence(database: Database, interactions: Interactions) -> Cooccurrence:
    """Read all interactions, and write which items the same people liked. VectorIndexError if there is no collection
    yet; SourceError.
    """
    people, items, keys = _read(interactions)
    number = np.bincount(people, minlength=1)
    kept = number[people] <= MOST_OF_A_PERSON if len(people) else np.zeros(0, bool)
    people, items = people[kept], items[kept]
    counts = np.bincount(items, minlength=len(keys))
    parts = list(_nearest(people, items, len(keys))) or [(np.zeros(0, np.int64),) * 2 + (np.zeros(0, np.float32),)]
    rows, others, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    _write(database, interactions.source.definition.name, keys, counts, rows, others, scores)
    left_out = int((number > MOST_OF_A_PERSON).sum())
    return Cooccurrence(len(np.unique(people)), left_out, int((counts > 0).sum()), len(rows))


def is_built(database: Database, collection: str) -> bool:
    """Whether anything is known of what people liked."""
    with database.session() as connection:
        row = connection.execute(load_sql("cooccurrence/is_built"), {"collection": collection}).fetchone()
    return row == (True,)


def _read(interactions: Interactions) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Person and item of each interaction, as numbers, and the items' keys."""
    numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
    columns: tuple[list[int], list[int]] = ([], [])
    for rows in interactions.liked():
        for column, known, values in zip(columns, numbers, zip(*rows, strict=True), strict=True):
            column.extend(known.setdefault(value, len(known)) for value in values)
    people, items = (np.array(column, np.int64) for column in columns)
    return people, items, list(numbers[1])


def _nearest(
    people: NDArray[np.int64], items: NDArray[np.int64], number: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Item, other item and score of each item's nearest, some items at a time."""
    from scipy.sparse import csr_array

    if not len(items):
        return
    unit = 1 / np.sqrt(np.bincount(items, minlength=number)[items]).astype(np.float32)
    by_item = csr_array((unit, (items, people)), (number, int(people.max()) + 1))
    by_person = by_item.T.tocsr()
    for start in range(0, number, ITEMS_AT_ONCE):
        both = (by_item[start : start + ITEMS_AT_ONCE] @ by_person).tocsr()
        for row in range(both.shape[0]):
            others = both.indices[both.indptr[row] : both.indptr[row + 1]].astype(np.int64)
            scores = both.data[both.indptr[row] : both.indptr[row + 1]]
            others, scores = others[others != start + row], scores[others != start + row]
            if len(others) > NEAREST:
                best = np.argpartition(-scores, NEAREST)[:NEAREST]
                others, scores = others[best], scores[best]
            yield np.full(len(others), start + row), others, scores.astype(np.float32)


def _write(
    database: Database,
    collection: str,
    keys: Sequence[str],
    counts: NDArray[np.int64],
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> None:
    texts, liked = pa.array(keys, pa.string()), np.flatnonzero(counts)
    named = {"collection": collection}
    with database.connect() as connection:
        if connection.execute(load_sql("cooccurrence/lock"), named).fetchone() is None:
            raise VectorIndexError(
                f"collection {collection!r}: nothing is committed yet; run `embeddings-pipeline sync` first"
            )
        connection.execute(load_sql("cooccurrence/stage"))
        connection.execute(load_sql("cooccurrence/stage_liked"))
        pairs = pa.table({"item_key": texts.take(pa.array(rows)), "other_key": texts.take(pa.array(others))})
        columns = {**columns_of(pairs), "score": scores}
        copy_in(connection, sql.Identifier("new_cooccurrence"), columns)
        people = {"item_key": texts.take(pa.array(liked)), "people": counts[liked]}
        copy_in(connection, sql.Identifier("new_liked"), people)
        connection.execute(load_sql("cooccurrence/replace"), named)
        connection.execute(load_sql("cooccurrence/replace_liked"), named)
