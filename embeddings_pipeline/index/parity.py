"""Does the FAISS index hold what the model table holds, and find what an exact search in the table finds?"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.index.exact import SAME, TIE, nearest, unit
from embeddings_pipeline.index.faiss_build import LEAST_RECALL, RECALL_AT
from embeddings_pipeline.index.faiss_read import FaissIndex
from embeddings_pipeline.index.snapshot import snapshot, vector_blocks, vector_counts
from embeddings_pipeline.index.standing import Standing, standing
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import Destination


@dataclass(frozen=True)
class Parity:
    """How a generation compares with its model table. Unless `comparable`, nothing else was looked at."""

    comparable: bool  # the generation is the current one of the collection's current model
    in_index: int = 0
    in_table: int = 0
    missing_in_index: int = 0
    not_in_table: int = 0
    sampled: int = 0
    differing: int = 0  # samples whose nearest ten are not the exact ones, ties aside; an exact index has none
    recall_at_10: float = 1.0
    score_error: float = 0.0  # the largest difference between a returned score and the exact cosine
    exact: bool = True

    @property
    def ok(self) -> bool:
        """Same ids, and the recall that the kind of index promises."""
        same = self.comparable and not self.missing_in_index and not self.not_in_table
        found = not self.differing if self.exact else self.recall_at_10 >= LEAST_RECALL
        return same and found and self.score_error <= TIE


def check_parity(database: Database, table: Destination, index: FaissIndex, samples: int = 50) -> Parity:
    """Compare the ids of index and table, and the results of `samples` searches a vector name with exact ones.

    Reads the whole table once, in one snapshot, whatever its size in constant memory (but for the ids). The searches
    are for vectors of the table itself.
    """
    manifest = index.manifest
    with snapshot(database, table) as connection:
        ours = manifest.fingerprint == table.fingerprint
        if not ours or standing(connection, table.collection, manifest) is not Standing.CURRENT:
            return Parity(comparable=False)
        names = sorted({*vector_counts(connection, table), *manifest.vectors})
        return _sum([_compare(connection, table, index, name, samples) for name in names])


def _compare(connection: psycopg.Connection, table: Destination, index: FaissIndex, name: str, samples: int) -> Parity:
    """Of one vector name."""
    indexed = np.asarray(index.ids(name))
    queries = _queries(connection, table, indexed, samples)
    scores, ids = index.search(name, queries, RECALL_AT)
    true_scores = np.full(ids.shape, np.nan, np.float32)
    stored: list[NDArray] = []
    blocks = _watched(vector_blocks(connection, table, name), stored, queries, ids, true_scores)
    best, best_ids = nearest(queries, blocks, RECALL_AT)
    in_table = np.concatenate(stored)

    tenth = best[:, -1:]
    real, returned = best_ids >= 0, ids >= 0
    clear = real & (best > tenth + TIE)
    missed = [set(want[sure]) - set(got) for want, sure, got in zip(best_ids, clear, ids, strict=True)]
    exact = name not in index.manifest.vectors or index.manifest.vectors[name].exact
    hits = (returned & (true_scores >= tenth - (TIE if exact else SAME))).sum()
    errors = np.abs(scores - true_scores)[returned & ~np.isnan(true_scores)]
    return Parity(
        comparable=True,
        in_index=len(indexed),
        in_table=len(in_table),
        missing_in_index=len(np.setdiff1d(in_table, indexed)),
        not_in_table=len(np.setdiff1d(indexed, in_table)),
        sampled=len(queries),
        differing=sum(map(bool, missed)),
        recall_at_10=float(hits / real.sum()) if real.any() else 1.0,
        score_error=float(errors.max(initial=0)),
        exact=exact,
    )


def _queries(connection: psycopg.Connection, table: Destination, indexed: NDArray, samples: int) -> NDArray:
    """Vectors (n, dimension) of the table, of length 1, drawn from the ids that the index has."""
    chosen = np.random.default_rng().choice(indexed, min(samples, len(indexed)), replace=False)
    query = sql.SQL("SELECT embedding::real[] FROM {} WHERE text_id = ANY(%s)").format(table.identifier)
    drawn = [row[0] for row in connection.execute(query, [chosen.tolist()])]
    return unit(np.array(drawn, np.float32).reshape(len(drawn), table.dimension))


def _watched(
    blocks: Iterable[tuple[NDArray, NDArray]], stored: list[NDArray], queries: NDArray, ids: NDArray, scores: NDArray
) -> Iterator[tuple[NDArray, NDArray]]:
    """The blocks as they come; their ids go into `stored`, and the cosines of the ids (q, k) that the index returned
    for each query into `scores` (q, k).
    """
    for block_ids, block in blocks:
        stored.append(block_ids)
        if len(block_ids):
            by_id = np.argsort(block_ids)
            place = by_id[np.searchsorted(block_ids, ids, sorter=by_id).clip(max=len(block_ids) - 1)]
            here = block_ids[place] == ids
            vectors = unit(block[place[here]].astype(np.float32))
            query_of = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)[here]
            scores[here] = np.einsum("ij,ij->i", queries[query_of], vectors)
        yield block_ids, block


def _sum(parts: Sequence[Parity]) -> Parity:
    sampled = sum(part.sampled for part in parts)
    return Parity(
        comparable=True,
        in_index=sum(part.in_index for part in parts),
        in_table=sum(part.in_table for part in parts),
        missing_in_index=sum(part.missing_in_index for part in parts),
        not_in_table=sum(part.not_in_table for part in parts),
        sampled=sampled,
        differing=sum(part.differing for part in parts),
        recall_at_10=min((part.recall_at_10 for part in parts), default=1.0),
        score_error=max((part.score_error for part in parts), default=0.0),
        exact=all(part.exact for part in parts),
    )
