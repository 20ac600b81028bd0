"""How good searches are: judged queries asked in several ways, side by side.

judgements = read_judgements(Path("golden_queries.jsonl"))
chosen = choose_ways(definition, settings, judgements)
evaluation = evaluate(definition, settings, judgements, chosen.ways)
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import visible
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, PipelineError, ProfileError, VectorIndexError
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.progress import Progress, silent
from embeddings_pipeline.search.arguments import Mode
from embeddings_pipeline.search.hits import Hits
from embeddings_pipeline.search.judgements import JudgedQuery, Judgements, read_judgements
from embeddings_pipeline.search.legs import ALONE
from embeddings_pipeline.search.measures import DEPTH, NDCG, Difference, Figure, Values, difference, figure, measured
from embeddings_pipeline.search.query import encode_query, search
from embeddings_pipeline.store.database import open_database_to_read
from embeddings_pipeline.store.models import Model, current_model, shadow_models
from embeddings_pipeline.wording import counted, many

Index = Literal["pgvector", "faiss"]
INDEXES: tuple[Index, ...] = get_args(Index)
GOLDEN = "golden_queries.jsonl"
SELF_QUERIES = 200
BY_DEFAULT: tuple[Mode, ...] = ("hybrid", "dense", "text")  # first what `search` does if there are words
TITLES = ("title", "name")  # columns that name an item, if it has them


@dataclass(frozen=True)
class Way:
    """A way of searching: what `search` is given beside the query. `profile` None: the current one."""

    profile: str | None = None
    index: Index = "pgvector"
    vectors: tuple[str, ...] = ()  # empty: the first
    mode: Mode = "dense"
    rerank: bool = False

    @property
    def name(self) -> str:
        """`minilm pgvector base+title`, and the mode before the vectors unless it is dense; `text base`; `reranked`
        behind them.
        """
        asked = (self.mode,) if self.mode == "text" else (self.profile, self.index, self.mode)
        words = (*asked, "+".join(self.vectors), "reranked" if self.rerank else "")
        return " ".join(each for each in words if each and each != "dense")

    def search(self, definition: CollectionDefinition, settings: Settings, query: str, **options: Any) -> Hits:
        """As the function `search`."""
        own = {**asdict(self), "vectors": list(self.vectors) or None}
        return search(definition, settings, query, **own, **options)


def golden_judgements(definition: CollectionDefinition) -> Judgements | None:
    """The judged queries of `evaluation:`; without it, of a file golden_queries.jsonl beside the `defs.yaml`, unless
    that is not there or blank. ConfigurationError says what is wrong with them.
    """
    declared, folder = definition.attributes.evaluation, (definition.path or Path()).parent
    if declared is not None:
        return read_judgements(folder / declared.queries, folder / declared.qrels if declared.qrels else None)
    file = folder / GOLDEN
    if definition.path is None or not file.is_file() or not file.read_bytes().strip():
        return None
    return read_judgements(file)


def floor_missed(definition: CollectionDefinition, evaluation: "Evaluation") -> str | None:
    """Why the evaluation of the declared queries is not good enough, by its first way; None if it is."""
    declared, reached = definition.attributes.evaluation, evaluation.ways[0].figures[NDCG].mean
    least = declared.least_ndcg if declared else None
    if least is None or reached >= least:
        return None
    return (
        f"collection {definition.name!r}: nDCG@10 of {counted(evaluation.queries, 'query')} is {reached:.4f}, and at "
        f"least {least:g} is asked for (`evaluation.least_ndcg`)"
    )


@dataclass(frozen=True)
class Chosen:
    """Ways to measure, the first one as `search` goes by default; why others were left out, by name; and by profile how
    many items cannot be found under it, since their vectors are missing.
    """

    ways: tuple[Way, ...]
    left_out: dict[str, str]
    uncovered: dict[str, int]

    @property
    def told(self) -> list[str]:
        """What a person should know of the choice."""
        left = [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        missing = [
            f"profile {name!r} has no vectors of {counted(items, 'item')}, which no search finds"
            for name, items in self.uncovered.items()
        ]
        return [*missing, *left]


@dataclass(frozen=True)
class Measured:
    """What came of one way."""

    way: Way
    figures: dict[str, Figure]  # by measure
    p50_ms: float  # of a search for DEPTH items, its query's encoding included
    p95_ms: float
    fell_back: int  # queries that the index asked for did not answer
    against_first: dict[str, Difference] | None  # by measure; None for the first way itself

    @property
    def name(self) -> str:
        return self.way.name


@dataclass(frozen=True)
class Evaluation:
    """Ways of searching side by side, on the same queries."""

    collection: str
    source: str
    queries: int
    relevant_items: int
    missing_items: int  # of them: those that the collection does not have
    notes: tuple[str, ...]  # what a person should know of the queries
    ways: tuple[Measured, ...]

    @property
    def told(self) -> list[str]:
        """What a person should know before trusting the figures."""
        told, missing = [*self.notes], self.missing_items
        if missing:
            told.append(
                f"{missing:,} of {counted(self.relevant_items, 'relevant item')} {many(missing, 'is')} not in the "
                f"collection, and {many(missing, 'counts')} as not found"
            )
        for way in self.ways:
            if way.fell_back:
                told.append(f"{way.name}: {counted(way.fell_back, 'query')} of {self.queries:,} did not go that way")
        return told

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ways": [{"name": each.name, **asdict(each)} for each in self.ways]}


def choose_ways(
    definition: CollectionDefinition,
    settings: Settings,
    judgements: Judgements,
    *,
    profiles: Sequence[str] = (),
    indexes: Sequence[Index] = (),
    vectors: Sequence[tuple[str, ...]] = (),
    modes: Sequence[Mode] = (),
    rerank: bool | None = None,
) -> Chosen:
    """Every combination of these. Left out: each profile that is kept, each index, each vector and all together, and
    each mode that the definition has indexes for. `rerank`: each with its hits reranked too, but for those that differ
    from another by the index alone; None: if ENABLE_RERANKER has searches reranked, which then come first.

    Each is tried once, which loads what it needs. One that was not asked for by name is left out if it cannot answer;
    for any other that is a ConfigurationError, DatabaseError, ProfileError, RerankerError or VectorIndexError.
    """
    names = list(definition.attributes.vectors)
    each = vectors or [*((name,) for name in names), *([tuple(names)] if len(names) > 1 else [])]
    kept = kept_models(definition, settings)
    ways: list[Way] = []
    left_out: dict[str, str] = {}
    asked: Sequence[str | None] = profiles or [*kept] or [None]  # None: a search says what is not there
    has_words = definition.attributes.words is not None
    wanted: Sequence[Mode] = modes or (BY_DEFAULT if has_words else ("dense",))
    on = bool(settings.enable_reranker)
    reranks = [on, not on] if rerank or (on and rerank is None) else [False]
    first = (asked[0], (indexes or INDEXES)[0])
    for mode, reranked, profile, index, some in product(wanted, reranks, asked, indexes or INDEXES, each):
        way = Way(profile, index, some, mode, reranked)
        if mode == "text" and (profile, index) != first:
            continue  # words are the same whatever the model and the index of vectors
        if reranked and index != first[1]:
            continue  # the reranker's time would be measured again
        try:
            _try(definition, settings, way, judgements.queries[0].text)
            ways.append(way)
        except (DatabaseError, ProfileError, RerankerError, VectorIndexError) as error:
            named = {
                ProfileError: profiles,
                VectorIndexError: indexes,
                DatabaseError: modes or mode == "dense",
                RerankerError: rerank,
            }
            if named[type(error)]:
                raise
            left_out[way.name] = str(error)
    if not ways:
        raise ConfigurationError(
            f"collection {definition.name!r}: no way of searching answers: {next(iter(left_out.values()))}"
        )
    chosen = {way.profile: kept[way.profile] for way in ways if way.profile in kept}
    covered = {name: coverage(open_database_to_read(settings), model).missing for name, model in chosen.items()}
    return Chosen(tuple(ways), left_out, {str(name): items for name, items in covered.items() if items})


class RerankerError(PipelineError):
    """A reranker cannot be asked."""


def _try(definition: CollectionDefinition, settings: Settings, way: Way, query: str) -> None:
    hits = way.search(definition, settings, query, k=1)
    if why := _not_reranked(hits):
        raise RerankerError(f"collection {definition.name!r}: the reranker does not answer: {why}")
    if why := _another_way(way, hits):
        of_words = way.mode != "dense" and why.endswith(ALONE)
        raise (DatabaseError if of_words else VectorIndexError)(
            f"collection {definition.name!r}: {'the words do' if of_words else f'{way.index} does'} not answer: {why}"
        )


def _another_way(way: Way, hits: Hits) -> str | None:
    """Why a search did not go the way that it was asked to go; None if it did."""
    elsewhere = [leg for leg in hits.explanation.legs if leg.answered_by in INDEXES and leg.answered_by != way.index]
    reasons = [*(reason for leg in elsewhere for reason in leg.fell_back), *hits.explanation.fell_back]
    return next(iter(reasons), None) or _not_reranked(hits)


def _not_reranked(hits: Hits) -> str | None:
    """Why no reranker scored hits that one was to score; None if one did, or if none was needed."""
    reranking = hits.explanation.rerank
    return next(iter(reranking.fell_back), None) if reranking and reranking.model is None else None


def kept_models(definition: CollectionDefinition, settings: Settings) -> dict[str | None, Model]:
    """The models whose vectors are kept, the current one first, by profile; by fingerprint if two have one name."""
    with open_database_to_read(settings).session() as connection:
        current = current_model(connection, definition)
        models = [current, *shadow_models(connection, definition)] if current else []
    names = [model.profile.name for model in models]
    return {
        name if names.count(name) == 1 else model.destination.fingerprint: model
        for name, model in zip(names, models, strict=True)
    }


def evaluate(
    definition: CollectionDefinition,
    settings: Settings,
    judgements: Judgements,
    ways: Sequence[Way],
    progress: Progress = silent,
) -> Evaluation:
    """Ask each query in each way, one after another. ConfigurationError if the collection has no judged item."""
    items = judgements.items
    missing = missing_items(definition, settings, judgements)
    encode, found, first = _Encoder(), list[Measured](), dict[str, Values]()
    for number, way in enumerate(ways):
        rankings, seconds, fell_back = list[list[str]](), list[float](), 0
        for n, query in enumerate(judgements.queries):
            progress(way.name, number * len(judgements.queries) + n, len(ways) * len(judgements.queries))
            encode.spared, began = 0.0, time.perf_counter()
            hits = way.search(definition, settings, query.text, k=DEPTH, encode=encode)
            seconds.append(time.perf_counter() - began + encode.spared)
            rankings.append([hit.item_key for hit in hits])
            fell_back += _another_way(way, hits) is not None
        values = measured([query.relevant for query in judgements.queries], rankings)
        p50, p95 = np.percentile(np.array(seconds) * 1000, [50, 95])
        figures = {name: figure(each) for name, each in values.items()}
        against = {name: difference(each, first[name]) for name, each in values.items()} if first else None
        first = first or values
        found.append(Measured(way, figures, float(p50), float(p95), fell_back, against))
    counts = (len(judgements.queries), len(items), missing)
    return Evaluation(definition.name, judgements.source, *counts, judgements.notes, tuple(found))


def missing_items(definition: CollectionDefinition, settings: Settings, judgements: Judgements) -> int:
    """How many of the relevant items the collection does not have. ConfigurationError if it has none of them."""
    wanted, name = judgements.items, definition.name
    [(known, example)] = _rows(definition, settings, "search/known", {"keys": list(wanted)})
    if example is None:
        raise DatabaseError(f"collection {name!r} has no items yet; run `embeddings-pipeline sync` first")
    if not known:
        raise ConfigurationError(
            f"{judgements.source}: collection {name!r} has none of the {counted(len(wanted), 'item')} that it names, "
            f"such as {min(wanted)!r}; its keys are as {example!r}: correct the file, or name another collection"
        )
    return len(wanted) - int(known)


@dataclass
class _Encoder:
    """Makes each query's vector once for each model; `spared`: seconds that it took, where it was there already."""

    known: dict[tuple[str, str], tuple[NDArray[np.float32], float]] = field(default_factory=dict)
    spared: float = 0.0

    def __call__(
        self, definition: CollectionDefinition, settings: Settings, model: Model, profile: Profile, query: str
    ) -> NDArray[np.float32]:
        key = (model.destination.fingerprint, query)
        if key in self.known:
            vector, seconds = self.known[key]
            self.spared += seconds
            return vector
        began = time.perf_counter()
        vector = encode_query(definition, settings, model, profile, query)
        self.known[key] = vector, time.perf_counter() - began
        return vector


def self_judgements(definition: CollectionDefinition, settings: Settings) -> Judgements:
    """Titles of items as queries, each answered by the items that are called so: a smoke test, which says whether
    searches find what they are asked for by name, and not how good they are. The same sample each time.
    """
    name, columns = definition.name, definition.attributes.columns
    used = [column for column in columns if column in definition.template_columns] or list(columns)
    column = next((title for title in (*TITLES, *used) if title in columns), None)
    if column is None:
        raise ConfigurationError(f"collection {name!r} has no `columns:`, so that no item has a title to ask for")
    rows = _rows(definition, settings, "search/titles", {"column": column, "number": SELF_QUERIES})
    queries = [JudgedQuery(title, dict.fromkeys(keys, 1)) for title, keys in rows if visible(title)]
    if not queries:
        raise ConfigurationError(f"collection {name!r} has no item with a {column!r} to ask for")
    return Judgements(f"its own items' {column!r}", tuple(queries))


def _rows(
    definition: CollectionDefinition, settings: Settings, statement: str, parameters: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    with open_database_to_read(settings).session() as connection:
        model = current_model(connection, definition)
        if model is None:
            raise DatabaseError(
                f"collection {definition.name!r} has no vectors yet; run `embeddings-pipeline sync` first"
            )
        return connection.execute(model.destination.tables.statement(statement), parameters).fetchall()
