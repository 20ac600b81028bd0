"""The ways of looking of one search: by vectors, by words, or both, joined."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.index.words import WordsState, configuration_of, words_state
from embeddings_pipeline.search.arguments import Request
from embeddings_pipeline.search.by_bm25 import bm25_leg
from embeddings_pipeline.search.by_faiss import faiss_leg
from embeddings_pipeline.search.by_tsvector import tsvector_leg
from embeddings_pipeline.search.fusion import fused
from embeddings_pipeline.search.hits import Hit, Leg, best_of
from embeddings_pipeline.search.nearest import nearest_leg
from embeddings_pipeline.search.selectivity import Filter
from embeddings_pipeline.store.models import Model

log = logging.getLogger(__name__)

ALONE = "vectors alone answered"
NO_WORDS_YET = "the words of its texts are not in PostgreSQL yet: `embeddings-pipeline sync` brings them there"


@dataclass(frozen=True)
class Found:
    """The items, best first, how they were found, and why a leg that was wanted is not among those."""

    hits: list[Hit]
    legs: tuple[Leg, ...]
    fell_back: tuple[str, ...] = ()


# The items that words find, best first, and how; or why there is nothing to find them by.
TextLeg = tuple[list[Hit], Leg] | str


@dataclass(frozen=True)
class Asking:
    """What the legs of one search share."""

    connection: psycopg.Connection
    definition: CollectionDefinition
    settings: Settings
    request: Request
    model: Model
    is_shadow: bool  # whether the model is not the current one
    filtered: Filter | None

    def by_vectors(self, wanted: Mapping[str, NDArray[np.float32]], k: int) -> Found:
        """The `k` items nearest to any of these vectors, by vector name."""
        found = [self.dense_leg(name, vector, k) for name, vector in wanted.items()]
        hits = [hit for hits, _ in found for hit in hits]
        return Found(best_of(hits, k), tuple(leg for _, leg in found))

    def by_words(self, text: str, k: int) -> Found:
        """The `k` items that words of the text are found in. DatabaseError if there is nothing to find them by."""
        found = self.text_leg(text, k)
        if isinstance(found, str):
            raise DatabaseError(f"collection {self.definition.name!r}: {found}; or search with mode 'dense'")
        return Found(found[0], (found[1],))

    def dense_leg(self, name: str, vector: NDArray[np.float32], k: int) -> tuple[list[Hit], Leg]:
        """The `k` items nearest to a vector of that name."""
        fell_back, of = [], (self.connection, self.definition)
        if self.request.index == "faiss":
            found: tuple[list[Hit], Leg] | str = "FAISS has no vectors of a model that is kept beside the current one"
            if not self.is_shadow:
                with self.connection.transaction():  # what it reads is of one moment
                    self.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    found = faiss_leg(*of, self.settings, self.model, name, vector, k, self.filtered)
            if not isinstance(found, str):
                return found
            fell_back.append(f"{found}: PostgreSQL answered")
        return nearest_leg(*of, self.model, name, vector, k, filtered=self.filtered, fell_back=fell_back)

    def text_leg(self, text: str, k: int) -> TextLeg:
        """By the BM25 files if they can be asked, else by PostgreSQL; or why neither can."""
        from embeddings_pipeline.index.terms import query_words

        words, names = self.definition.attributes.words, self.request.vectors
        if words is None or words_state(self.connection, self.definition.name) != WordsState(
            configuration_of(words), True
        ):
            return NO_WORDS_YET
        with self.connection.transaction():
            self.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            of, typed = (self.connection, self.definition), query_words(text, words)
            found = bm25_leg(*of, self.settings, self.model, names, typed, k, filtered=self.filtered)
            if not isinstance(found, str):
                return found
            why = [f"{found}: PostgreSQL answered"]
            return tsvector_leg(*of, self.model, names, typed, k, filtered=self.filtered, fell_back=why)


def joined(definition: CollectionDefinition, dense: Found, text: TextLeg, k: int) -> Found:
    """The `k` best items of both rankings together; each has `candidates(k)` of them."""
    words = definition.attributes.words
    assert words is not None
    if isinstance(text, str):
        log.warning("warning: collection %r: %s; vectors alone answer", definition.name, text)
        return Found(dense.hits[:k], dense.legs, (f"{text}; {ALONE}",))
    return Found(fused(dense.hits, text[0], words.fusion)[:k], (*dense.legs, text[1]))
