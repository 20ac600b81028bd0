"""Items for somebody: near what they liked, away from what they disliked, new to them, and not all alike.

Candidates come from the vectors; from what the same people liked, for items without vectors; and from what is popular,
if there are too few. They are scored together (`ranking.py`), and each way that was gone is a leg of the explanation.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.recommending import Strategy
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, shown, unusable
from embeddings_pipeline.index.filters import expression_of
from embeddings_pipeline.search.arguments import MOST_HITS, Request, checked_request
from embeddings_pipeline.search.from_files import known_outage, outage_behind
from embeddings_pipeline.search.history import Taste, taste_of
from embeddings_pipeline.search.hits import Explanation, Hit, Hits, Leg, exact_cursor
from embeddings_pipeline.search.legs import Asking
from embeddings_pipeline.search.query import model_to_ask, tell_if_behind
from embeddings_pipeline.search.ranking import best_match, blended, diverse, matrix, mean_direction
from embeddings_pipeline.search.selectivity import filter_of
from embeddings_pipeline.store.condition import Condition
from embeddings_pipeline.store.copy_binary import copy_out
from embeddings_pipeline.store.database import open_database_to_read
from embeddings_pipeline.store.models import Model
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.wording import counted, many

log = logging.getLogger(__name__)

CANDIDATES, LEAST_CANDIDATES = 5, 100  # for each that is wanted, and at least
ASKED_OF_BEST = 5  # liked items around which `best` looks; all of them count
ALL = sql.SQL("true")


@dataclass(frozen=True)
class _Wishes:
    """How to rank: what the call says, else the definition."""

    strategy: Strategy
    diversity: float
    blend: Mapping[str, float]


@dataclass
class _Candidates:
    """What comes into question: likeness by item key, the hits that are known already, and the legs."""

    likeness: dict[str, float] = field(default_factory=dict)
    hits: dict[str, Hit] = field(default_factory=dict)
    legs: list[Leg] = field(default_factory=list)

    def add(self, scores: Mapping[str, float], hits: Iterable[Hit]) -> None:
        for key, score in scores.items():
            self.likeness[key] = max(score, self.likeness.get(key, 0.0))
        self.hits |= {hit.item_key: hit for hit in hits}


def recommend(
    definition: CollectionDefinition,
    settings: Settings,
    *,
    liked: Sequence[Any] = (),
    disliked: Sequence[Any] = (),
    history: Sequence[Any] = (),
    user: str | int | None = None,
    k: int = 10,
    where: Mapping[str, Any] | None = None,
    vectors: str | list[str] | None = None,
    index: Literal["pgvector", "faiss"] = "pgvector",
    profile: str | None = None,
    strategy: Strategy | None = None,
    diversity: float | None = None,
    half_life_days: float | None = None,
) -> Hits:
    """The `k` items that suit somebody best, without those that they know: see `CollectionClient.recommend`. Needs no
    encoder. A hit's `score` is its likeness, blended with the columns of `recommend.blend`.
    """
    began = time.perf_counter()
    request = checked_request(definition, k, where, vectors, index, profile)
    wishes = _wishes(definition, strategy, diversity)
    half_life = _number("half_life_days", half_life_days, definition.attributes.recommend.half_life_days, 1e-9, 1e5)
    if known := known_outage(settings):
        raise known
    given = {"liked": liked, "disliked": disliked, "history": history, "user": user}
    try:
        model, hits, legs = _recommended(definition, settings, request, wishes, given, half_life)
    except (DatabaseError, psycopg.OperationalError) as error:
        if gone := outage_behind(settings, error):
            raise gone from gone.__cause__
        raise
    explanation = Explanation(
        model.profile.name,
        model.destination.fingerprint,
        tuple(legs),
        milliseconds={"recommend": round(1000 * (time.perf_counter() - began), 3)},
    )
    return Hits(hits, explanation)


def _recommended(
    definition: CollectionDefinition,
    settings: Settings,
    request: Request,
    wishes: _Wishes,
    given: Mapping[str, Any],
    half_life: float | None,
) -> tuple[Model, list[Hit], list[Leg]]:
    database = open_database_to_read(settings)
    source = Source(definition, database)
    taste = taste_of(definition, source, **given, half_life_days=half_life)
    if not (taste.liked or wishes.blend or definition.attributes.interactions):
        raise ConfigurationError(
            f"collection {definition.name!r}: nothing was liked, and nothing says what is popular: give `liked`, or "
            f"declare `recommend: {{blend: …}}` or `interactions:` in {definition.path or 'defs.yaml'}"
        )
    with database.session() as connection:
        model, is_shadow = model_to_ask(connection, definition, database, request.profile)
        asking = _Asking(connection, definition, settings, model, is_shadow, _without(request, taste.seen), wishes)
        hits, legs = asking.recommended(taste)
    return model, hits, legs


def _wishes(definition: CollectionDefinition, strategy: object, diversity: object) -> _Wishes:
    rules = definition.attributes.recommend
    if strategy not in (None, "mean", "best"):
        raise unusable("strategy", strategy, "'mean' or 'best'")
    least_alike = _number("diversity", diversity, rules.diversity, 0, 1)
    return _Wishes(strategy or rules.strategy, least_alike or 0.0, rules.blend)


def _number(name: str, given: object, declared: float | None, least: float, most: float) -> float | None:
    if given is None:
        return declared
    if not isinstance(given, Real) or isinstance(given, bool) or not least <= float(given) <= most:
        raise unusable(
            name, given, f"a number from {least:g} to {most:g}" if least >= 0.001 or not least else "above 0"
        )
    return float(given)


def _without(request: Request, seen: frozenset[str]) -> Request:
    """The request with a condition that keeps these items out."""
    if not seen:
        return request
    given = request.condition or Condition(ALL)
    statement = sql.SQL("({}) AND item.item_key <> ALL (%(seen)s::text[])").format(given.statement)
    return replace(request, condition=Condition(statement, {**given.parameters, "seen": sorted(seen)}, given.columns))


@dataclass(frozen=True)
class _Asking:
    """One call, within a session."""

    connection: psycopg.Connection
    definition: CollectionDefinition
    settings: Settings
    model: Model
    is_shadow: bool
    request: Request
    wishes: _Wishes

    @property
    def condition(self) -> Condition:
        return self.request.condition or Condition(ALL)

    @property
    def most(self) -> int:
        return min(MOST_HITS, max(CANDIDATES * self.request.k, LEAST_CANDIDATES))

    def recommended(self, taste: Taste) -> tuple[list[Hit], list[Leg]]:
        """The hits in their order, and the legs."""
        tables = self.model.destination.tables
        if columns := self.condition.columns | frozenset(self.wishes.blend):
            tell_if_behind(self.connection, self.definition, tables, replace(self.condition, columns=columns))
        of = (self.connection, self.definition, self.settings, self.request, self.model, self.is_shadow)
        asking = Asking(*of, filter_of(self.connection, tables, self.condition))
        candidates, vectors = _Candidates(), dict[str, NDArray[np.float32]]()
        without_vector = dict(taste.liked)
        for name in self.request.vectors:
            known = self._vectors(name, list(taste.weights))
            without_vector = {key: weight for key, weight in without_vector.items() if key not in known}
            vectors = {**self._near(asking, candidates, name, taste, known), **vectors}
        if without_vector:
            self._tell_of_unknown(list(without_vector))
            self._cooccurring(candidates, without_vector)
        if len(candidates.likeness) < self.request.k:
            self._popular(candidates)
        return self._ranked(candidates, vectors), candidates.legs

    # --- by vectors ---

    def _near(
        self,
        asking: Asking,
        candidates: _Candidates,
        name: str,
        taste: Taste,
        known: Mapping[str, NDArray[np.float32]],
    ) -> dict[str, NDArray[np.float32]]:
        """Add the items near what was liked; their vectors."""
        (liked, weights), disliked = _part(taste.liked, known), _part(taste.disliked, known)
        if not len(liked):
            return {}
        direction = mean_direction(liked, weights, *disliked)
        best = self.wishes.strategy == "best" or not direction.any()
        asked = liked[np.argsort(-weights, kind="stable")[:ASKED_OF_BEST]] if best else direction[None, :]
        most = max(self.request.k, self.most // len(asked))
        hits: dict[str, Hit] = {}
        for vector in asked:
            found, leg = asking.dense_leg(name, vector, most)
            hits |= {hit.item_key: hit for hit in found}
            candidates.legs.append(leg)
        vectors = self._vectors(name, list(hits))
        rows = matrix([vectors.get(key) for key in hits], self.model.destination.dimension)
        scores = best_match(rows, liked, weights, disliked[0]) if best else rows @ direction
        candidates.add(dict(zip(hits, scores.tolist(), strict=True)), hits.values())
        return vectors

    def _vectors(self, name: str, keys: list[str]) -> dict[str, NDArray[np.float32]]:
        """Item key → direction, of length 1, of those that have a vector."""
        if not keys:
            return {}
        table = self.model.destination
        statement = table.statement("recommend/vectors_of_items", keys=sql.Literal(keys), vector_name=sql.Literal(name))
        kinds: dict[str, Literal["bigint", "vector"]] = {"place": "bigint", "direction": "vector"}
        rows = copy_out(self.connection, statement, kinds, dimension=table.dimension)
        lengths = np.linalg.norm(rows["direction"], axis=1)
        usable = np.isfinite(lengths) & (lengths > 0)
        places, directions = rows["place"][usable] - 1, rows["direction"][usable] / lengths[usable, None]
        return {keys[place]: direction for place, direction in zip(places, directions, strict=True)}

    def _tell_of_unknown(self, keys: list[str]) -> None:
        """Say which of these the collection does not have."""
        there = self._hits(keys)
        if unknown := [key for key in keys if key not in there]:
            log.warning(
                "warning: collection %r: of what was liked, %s %s not there: %s",
                *(self.definition.name, counted(len(unknown), "item"), many(len(unknown), "is"), shown(unknown)),
            )

    # --- by what others liked ---

    def _cooccurring(self, candidates: _Candidates, weights: Mapping[str, float]) -> None:
        """Add what those liked who liked these items, which have no vector."""
        began = time.perf_counter()
        parameters = {"item_keys": list(weights), "weights": list(weights.values())}
        scores = self._asked("cooccurring", parameters)
        total = sum(weights.values())
        how = f"what the same people liked as {len(weights)} items without a vector"
        self._add(candidates, "cooccurrence", how, {key: score / total for key, score in scores.items()}, began)

    def _popular(self, candidates: _Candidates) -> None:
        """Add what has the highest values in the columns of the blend, or, without one, what most people liked."""
        began, scores, how = time.perf_counter(), dict[str, float](), f"the highest {', '.join(self.wishes.blend)}"
        parameters = {**self.condition.parameters, "most": self.most}
        for column in self.wishes.blend:
            statement = self.model.destination.tables.statement(
                "recommend/highest", condition=self.condition.statement, value=self._value(column)
            )
            scores |= {row[0]: 0.0 for row in self.connection.execute(statement, parameters)}
        if not self.wishes.blend:
            people, how = self._asked("most_liked", {}), "what most people liked"
            scores = {key: count / max(people.values()) for key, count in people.items()}
        self._add(candidates, "popularity", how, scores, began)

    def _asked(self, name: str, parameters: Mapping[str, Any]) -> dict[str, float]:
        statement = self.model.destination.tables.statement(f"recommend/{name}", condition=self.condition.statement)
        own = {"collection": self.definition.name, "most": self.most}
        return dict(self.connection.execute(statement, {**self.condition.parameters, **own, **parameters}).fetchall())

    def _add(self, candidates: _Candidates, answered_by: str, how: str, scores: dict[str, float], began: float) -> None:
        new = [key for key in scores if key not in candidates.hits]
        hits = self._hits(new)
        scores = {key: score for key, score in scores.items() if key in candidates.hits or key in hits}
        ranks = {key: (rank, round(score, 6)) for rank, (key, score) in enumerate(scores.items(), 1)}
        milliseconds = round(1000 * (time.perf_counter() - began), 3)
        leg = Leg("", answered_by, how, 0, milliseconds, (), ranks)  # type: ignore[arg-type]
        candidates.legs.append(leg)
        candidates.add(scores, hits.values())

    def _hits(self, keys: list[str]) -> dict[str, Hit]:
        if not keys:
            return {}
        statement = self.model.destination.tables.statement("recommend/items")
        with exact_cursor(self.connection) as cursor:
            cursor.execute(statement, {"item_keys": keys, "vector_name": self.request.vectors[0]})
            return {row[0]: Hit(row[0], 0.0, *row[1:]) for row in cursor.fetchall()}

    # --- in order ---

    def _ranked(self, candidates: _Candidates, vectors: Mapping[str, NDArray[np.float32]]) -> list[Hit]:
        keys = sorted(candidates.likeness)
        if not keys:
            return []
        likeness = np.array([candidates.likeness[key] for key in keys], np.float64)
        scores = blended(likeness, self._values(keys), self.wishes.blend)
        rows = matrix([vectors.get(key) for key in keys], self.model.destination.dimension)
        chosen = diverse(scores, rows, self.request.k, self.wishes.diversity)
        return [replace(candidates.hits[keys[n]], score=float(scores[n])) for n in chosen]

    def _values(self, keys: list[str]) -> dict[str, NDArray[np.float64]]:
        """Column of the blend → value of each item, NaN for none."""
        columns = list(self.wishes.blend)
        if not columns:
            return {}
        parts = sql.SQL(", ").join(self._value(column) for column in columns)
        statement = self.model.destination.tables.statement("recommend/values", values=parts)
        rows = {row[0]: row[1:] for row in self.connection.execute(statement, {"item_keys": keys})}
        nothing = (None,) * len(columns)
        return {
            column: np.array([_float(rows.get(key, nothing)[n]) for key in keys], np.float64)
            for n, column in enumerate(columns)
        }

    def _value(self, column: str) -> sql.Composable:
        kind = self.definition.attributes.filters[column]
        return expression_of(kind, sql.Identifier("item", "payload"), sql.Literal(column), sql.SQL("''"))


def _part(
    weights: Mapping[str, float], known: Mapping[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors (n, d) and weights (n,) of those that have a vector."""
    keys = [key for key in weights if key in known]
    if not keys:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    given = np.array([weights[key] for key in keys])
    # They count beside one another alone, and as they are they may all be 0 in 32 bits: what is long past is.
    return np.stack([known[key] for key in keys]), (given / given.max()).astype(np.float32)


def _float(value: Any) -> float:
    if value is None:
        return float("nan")
    return float(value.timestamp() if hasattr(value, "timestamp") else value)
