"""The items nearest to a vector, by FAISS; and, of what came after its index was built, by PostgreSQL."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import Vector
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.searching import texts_per_item
from embeddings_pipeline.index.standing import Standing, standing, why_foreign
from embeddings_pipeline.search.hits import Hit, Leg, best_of
from embeddings_pipeline.search.matching import Matching, matching_texts
from embeddings_pipeline.search.nearest import GROWTH, hits_of, leg_of
from embeddings_pipeline.search.selectivity import Filter
from embeddings_pipeline.store.condition import Condition
from embeddings_pipeline.store.models import Model

if TYPE_CHECKING:
    from embeddings_pipeline.index.faiss_read import FaissIndex

log = logging.getLogger(__name__)

# Microseconds for each text that is asked afterwards whether its item matches, and how much faster than PostgreSQL it
# compares those that match: see selectivity.py.
ASKED, CHEAPER = 10.0, 3.5
MOST_TEXTS = 10_000  # that FAISS is asked for; beyond, PostgreSQL compares all


def faiss_leg(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    settings: Settings,
    model: Model,
    name: str,
    vector: NDArray[np.float32],
    k: int,
    filtered: Filter | None = None,
) -> tuple[list[Hit], Leg] | str:
    """As `nearest_leg`, by FAISS; or why PostgreSQL is to answer: the index is of another model, since it has just been
    switched, or of a state of another database (text ids mean something else there), or it would be asked for too much.
    """
    from embeddings_pipeline.index.faiss_read import open_index

    began, collection = time.perf_counter(), model.destination.collection
    generation = open_index(settings.state_dir / "faiss", collection)
    stands = _standing(connection, model, generation)
    if not isinstance(stands, Standing):
        log.warning(
            "warning: collection %r: the FAISS index %s; PostgreSQL answers until the next `embeddings-pipeline sync`",
            *(collection, stands),
        )
        return f"the FAISS index {stands}"
    first = 2 * k * texts_per_item(definition) + 10  # what is gone by now is among them
    only = _only(connection, model, name, filtered, first, texts_per_item(definition))
    condition, is_current = filtered.condition if filtered else None, stands is Standing.CURRENT
    chosen = None if only is None else only.chosen(generation, name)
    asked = _Asked(connection, model, generation, name, vector, condition, chosen, is_current)
    among = first if filtered is None or only is not None else round(first / filtered.share)
    parts = [_best(asked, asked.in_generation, k, among), _best(asked, asked.changed, k, first)]
    hits = best_of([hit for part in parts for hit in part.hits], k)
    if any(len(part.hits) < k and not part.exhausted for part in parts):
        return f"{MOST_TEXTS} texts are nearer than those of {k} items"
    files = generation.manifest.vectors.get(name)
    among_which = "" if only is None else f" among {len(only.ids)} texts that match"
    how = f"{files.index_type if files else 'empty'}{among_which}, and {parts[1].texts} texts that came later"
    return hits, leg_of(hits, name, "faiss", how, sum(part.texts for part in parts), began, [])


@dataclass(frozen=True)
class _Part:
    """The best items of what is in the generation, or of what came later."""

    hits: list[Hit]
    texts: int
    exhausted: bool


def _best(asked: "_Asked", part: Callable[[int], tuple[list[int], bool]], k: int, n: int) -> _Part:
    """Asks for more and more texts until they are of `k` items."""
    while True:
        n = min(n, MOST_TEXTS)
        ids, exhausted = part(n)
        hits = asked.live_hits(ids, k) if ids else []
        if len(hits) >= k or exhausted or n == MOST_TEXTS:
            return _Part(hits, len(ids), exhausted)
        n *= GROWTH


@dataclass(frozen=True)
class _Asked:
    """What one search asks, of two parts: ids of the nearest texts, and whether there are no more."""

    connection: psycopg.Connection
    model: Model
    generation: "FaissIndex"
    name: str
    vector: NDArray[np.float32]
    condition: Condition | None
    chosen: NDArray[np.uint8] | None  # which of its texts FAISS is to choose from; None: from all
    is_current: bool  # whether nothing came after the generation

    def in_generation(self, n: int) -> tuple[list[int], bool]:
        """The `n` nearest, and all that are exactly as near as the last of them, within MOST_TEXTS."""
        asked = n + 1  # which says whether the last of them is alone
        while True:
            scores, ids = self.generation.search(self.name, self.vector[None, :], asked, chosen=self.chosen)
            if ids[0][-1] < 0 and self.chosen is None:  # it has looked into too few of its lists, or has no more
                scores, ids = self.generation.search(self.name, self.vector[None, :], asked, thorough=True)
            if ids[0][-1] < 0:
                return ids[0][ids[0] >= 0].tolist(), True
            last = scores[0][n - 1]
            if scores[0][-1] < last or asked >= MOST_TEXTS:
                return ids[0][scores[0] >= last].tolist(), False
            asked = max(n + 1, min(GROWTH * asked, MOST_TEXTS))

    def changed(self, n: int) -> tuple[list[int], bool]:
        """Of what came later."""
        from embeddings_pipeline.index.faiss_delta import nearest_changed

        if self.is_current:
            return [], True
        manifest, query = self.generation.manifest, Vector(self.vector).to_text()
        table = self.model.destination
        ids = nearest_changed(self.connection, table, manifest, self.name, query, n, self.condition)
        return ids, len(ids) < n

    def live_hits(self, ids: list[int], k: int) -> list[Hit]:
        """The best `k` items of these texts; those that are gone are missing."""
        table = self.model.destination
        statement = table.statement(
            "search/of_ids",
            vector_name=sql.Literal(self.name),
            type=table.type,
            condition=self.condition.statement if self.condition else sql.SQL("true"),
        )
        parameters: dict[str, object] = {"query": Vector(self.vector).to_text(), "ids": ids}
        if self.condition:
            parameters |= self.condition.parameters
        return hits_of(self.connection, table, statement, parameters, k)[0]


def _only(
    connection: psycopg.Connection, model: Model, name: str, filtered: Filter | None, texts: int, texts_per_item: int
) -> Matching | None:
    """The texts that FAISS is to choose from; None: of all, and who matches is asked afterwards."""
    if filtered is None or not filtered.prefers_lookup(texts, texts_per_item, asked=ASKED, cheaper=CHEAPER):
        return None
    return matching_texts(connection, model.destination.tables, name, filtered.condition)


def _standing(connection: psycopg.Connection, model: Model, generation: "FaissIndex") -> Standing | str:
    """How the generation stands; or why it cannot be asked."""
    stands = standing(connection, model.destination.collection, generation.manifest)
    if stands is Standing.FOREIGN:
        return f"is {why_foreign(connection, generation.manifest)}"
    if generation.manifest.fingerprint != model.destination.fingerprint:
        return "was built for another model"
    return stands
