"""The items with any word of a query, by the BM25 files of a generation; and, of what came after it, by PostgreSQL.

That gives the texts that have a word: what those count is computed as if they were in the files.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psycopg
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index.searching import texts_per_item
from embeddings_pipeline.search.by_tsvector import EVERY, ranked_hits, tsquery_of
from embeddings_pipeline.search.hits import Hit, Leg
from embeddings_pipeline.search.matching import matching_texts
from embeddings_pipeline.search.nearest import GROWTH, leg_of
from embeddings_pipeline.search.selectivity import Filter
from embeddings_pipeline.store.condition import Condition
from embeddings_pipeline.store.models import Model

if TYPE_CHECKING:
    from embeddings_pipeline.index.bm25_read import WordsIndex

log = logging.getLogger(__name__)

ASKED, CHEAPER = 10.0, 3.5  # as of FAISS
MOST_TEXTS = 10_000  # that are asked so: beyond, those that match are looked up


def bm25_leg(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    settings: Settings,
    model: Model,
    names: Sequence[str],
    words: Sequence[str],
    k: int,
    *,
    filtered: Filter | None = None,
) -> tuple[list[Hit], Leg] | str:
    """As `tsvector_leg`, by the files; or why they cannot be asked: there are none here, they are of other stems than
    declared, or of a state of another database.
    """
    from embeddings_pipeline.index.terms import stems_of

    began = time.perf_counter()
    found = _index(connection, definition, settings)
    if isinstance(found, str):
        return found
    index, is_current = found
    is_current = is_current and index.manifest.fingerprint == model.destination.fingerprint
    if missing := [name for name in names if name not in index.parts]:
        return f"the BM25 files have no words of {' and '.join(missing)}"
    terms = stems_of(words, index.stem)
    scores = {name: index.parts[name].scores(terms) for name in names}
    # What is current needs no look at what came later.
    tsquery = "" if is_current else tsquery_of(connection, definition, words)
    asked = _Asked(connection, model, index, list(names), tsquery, terms, scores, filtered)
    n = (1 if is_current else 2) * k * texts_per_item(definition) + 10  # what is gone by now is among them
    among, only = n, None
    if filtered:
        if filtered.prefers_lookup(n, texts_per_item(definition), asked=ASKED, cheaper=CHEAPER):
            only = asked.matching()
        else:
            among = round(n / filtered.share)
    while True:
        hits, texts, exhausted = asked.best(k, n, among, only)
        if len(hits) >= k or exhausted:
            break
        n, among = GROWTH * n, GROWTH * among
        if filtered and only is None and among > MOST_TEXTS:
            only = asked.matching()
    changed = asked.changed_texts
    how = (
        f"{len(terms)} words in {sum(len(each) for each in scores.values())} texts, and {changed} texts that came later"
    )
    return hits, leg_of(hits, ", ".join(names), "bm25", how, texts, began, [])


@dataclass
class _Asked:
    """What one search asks of both parts: of what is in the files, and of what came later."""

    connection: psycopg.Connection
    model: Model
    index: "WordsIndex"
    names: list[str]
    tsquery: str  # asked of what came later; empty: of nothing
    terms: list[str]
    scores: dict[str, NDArray[np.float32]]
    filtered: Filter | None
    changed_texts: int = 0

    @property
    def condition(self) -> Condition:
        return self.filtered.condition if self.filtered else EVERY

    def best(self, k: int, n: int, among: int, only: NDArray[np.int64] | None) -> tuple[list[Hit], int, bool]:
        """The `k` best items of so many texts of both parts; how many those were, and whether there are no more."""
        found: list[tuple[int, float]] = []
        exhausted = True
        for name, of_name in self.scores.items():
            rows, best = self.index.parts[name].best(of_name, among, only)
            found += zip(rows.tolist(), best.tolist(), strict=True)
            exhausted = exhausted and len(rows) < among
        changed = [each for name in self.names for each in self._changed(name, n)]
        self.changed_texts = len(changed)
        exhausted = exhausted and len(changed) < n
        # A text that is in both parts was lacking its vector when the files were written, and is not in them.
        ids, scores = ([each[part] for each in found + changed] for part in (0, 1))
        statement = self.model.destination.statement("search/given")
        parameters: dict[str, object] = {"ids": ids, "scores": scores}
        hits, texts = ranked_hits(self.connection, self.model, statement, parameters, k, self.condition)
        return hits, texts, exhausted

    def _changed(self, name: str, n: int) -> list[tuple[int, float]]:
        """Of what came later: ids and scores."""
        part, manifest = self.index.parts[name], self.index.manifest
        if not self.tsquery:
            return []
        parameters = {"words": self.tsquery, "name": name, "texts": n}
        parameters |= {"newest": manifest.newest_text, "lacking": manifest.lacking, **self.condition.parameters}
        statement = self.model.destination.statement("search/changed_by_words", condition=self.condition.statement)
        rows = self.connection.execute(statement, parameters).fetchall()
        return [(text_id, part.score(text, self.terms)) for text_id, text in rows]

    def matching(self) -> NDArray[np.int64]:
        """The ids of the texts whose items match."""
        tables = self.model.destination.tables
        found = [matching_texts(self.connection, tables, name, self.condition).ids for name in self.names]
        return np.concatenate(found)


def _index(
    connection: psycopg.Connection, definition: CollectionDefinition, settings: Settings
) -> "tuple[WordsIndex, bool] | str":
    """The files, and whether they are of the very texts that the table has; or why they cannot be asked."""
    from embeddings_pipeline.index.bm25_read import open_words
    from embeddings_pipeline.index.standing import Standing, standing, why_foreign

    words = definition.attributes.words
    try:
        index = open_words(settings.state_dir / "faiss", definition.name)
    except VectorIndexError as error:
        log.warning("warning: %s", error)
        return f"the BM25 files cannot be read: {error}"
    if index is None:
        return "there are no BM25 files here"
    if words is None or index.stem != words.stem:
        return "the BM25 files have other stems than are declared now"
    stands = standing(connection, definition.name, index.manifest)
    if stands is Standing.FOREIGN:
        return f"the BM25 files are {why_foreign(connection, index.manifest)}"
    return index, stands is Standing.CURRENT
