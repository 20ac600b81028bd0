"""The query path: a text or an item in, the nearest items out, never with another model's vectors (rule 6)."""

import logging
import reprlib
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile, resolve_profile
from embeddings_pipeline.config.reranking import RETURNED
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, NotFoundError, ProfileError, profile_command
from embeddings_pipeline.health.activity import Activity, described, under_way
from embeddings_pipeline.search.arguments import (
    HITS,
    Mode,
    Request,
    checked_query,
    checked_request,
    checked_rerank,
    key_text,
)
from embeddings_pipeline.search.beside import beside, search_alone
from embeddings_pipeline.search.encoding import fingerprint_lately, query_vector
from embeddings_pipeline.search.from_files import answer_from_files, known_outage, outage_behind, outage_of
from embeddings_pipeline.search.fusion import candidates
from embeddings_pipeline.search.hits import Explanation, Hits
from embeddings_pipeline.search.legs import Asking, Found, joined
from embeddings_pipeline.search.selectivity import Filter, filter_of
from embeddings_pipeline.store.condition import Condition
from embeddings_pipeline.store.database import Database, open_database_to_read
from embeddings_pipeline.store.destination.base import CollectionTables
from embeddings_pipeline.store.models import Model, current_model, made_by, shadow_models
from embeddings_pipeline.store.vector_range import why_not

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 3  # a model may be switched between reading its name and asking its table, or its files be changed

# Of each vector name to ask, what to compare its vectors with.
Wanted = Mapping[str, NDArray[np.float32]]
# Of a model, within a session: what makes them, outside of it.
Preparation = Callable[[psycopg.Connection, Model], Callable[[], Wanted]]
QueryEncoder = Callable[[CollectionDefinition, Settings, Model, Profile, str], NDArray[np.float32]]


class WeightsChangedError(ProfileError):
    """The files of a model are not those any more that were looked at before it encoded."""


def search(
    definition: CollectionDefinition,
    settings: Settings,
    query: str,
    *,
    k: int | None = None,
    where: Mapping[str, Any] | None = None,
    vectors: str | list[str] | None = None,
    index: Literal["pgvector", "faiss"] = "pgvector",
    profile: str | None = None,
    mode: Mode | None = None,
    encode: QueryEncoder | None = None,
    rerank: bool | None = None,
) -> Hits:
    """The `k` best items for `query`, best first, by the collection's current model.

    `mode`: `dense`, the nearest in meaning; `text`, those with the query's words, which loads no model; `hybrid`, both
    rankings joined, which is also meant by None if the definition has `words:`. `where`: a condition on the columns of
    `filters:`, as `search/where.py` has it. `vectors`: which of the items' vectors, one or several (an item counts by
    its nearest); the first one if left out. `index`: where to look for vectors; hits from FAISS are joined to live rows
    and to what has come since the index was built; if it is still of a previous model, PostgreSQL answers. `profile`:
    another model that is kept beside the current one. `encode`: in the place of `encode_query`. `rerank`: have a
    cross-encoder put the first hits into order; None: if ENABLE_RERANKER says so. `k` left out: 10, or RETURN_TOP_K if
    hits are reranked.
    """
    reranks = checked_rerank(rerank, settings)
    if k is None:
        k = (settings.return_top_k or RETURNED) if reranks else HITS
    request = checked_request(definition, k, where, vectors, index, profile, mode)
    text, vector_of = checked_query(query), encode or encode_query

    def prepare(connection: psycopg.Connection, model: Model) -> Callable[[], Wanted]:
        if request.mode == "text":
            return dict
        runnable, digest = _runnable(connection, definition, settings, model)

        def make() -> Wanted:
            vector = vector_of(definition, settings, model, runnable, text)
            if fingerprint_lately(runnable, settings) != digest:
                raise WeightsChangedError(
                    f"collection {definition.name!r}: the files of profile {runnable.name!r} were changed while it "
                    "encoded a query; ask again once they stay as they are"
                )
            return dict.fromkeys(request.vectors, vector)

        return make

    if not reranks:
        return _answer_from_somewhere(definition, settings, request, prepare, text=text)
    from embeddings_pipeline.search.rerank import candidates_of, reranked

    wide = replace(request, k=max(request.k, candidates_of(settings)))
    hits = _answer_from_somewhere(definition, settings, wide, prepare, text=text)
    ordered, reranking = reranked(definition, settings, text, hits)
    return Hits(ordered[: request.k], replace(hits.explanation, rerank=reranking))


def similar(
    definition: CollectionDefinition,
    settings: Settings,
    item_key: Any,
    *,
    k: int = 10,
    where: Mapping[str, Any] | None = None,
    vectors: str | list[str] | None = None,
    index: Literal["pgvector", "faiss"] = "pgvector",
    profile: str | None = None,
) -> Hits:
    """The `k` items nearest to an item, itself left out; the rest as in `search`. Needs no encoder.

    `item_key`: as `Hit.item_key` has it, a number, or a list of the values of several key columns. An item of several
    chunks is compared by the mean of their directions.
    """
    request = checked_request(definition, k, where, vectors, index, profile)
    key = key_text(item_key)

    def prepare(connection: psycopg.Connection, model: Model) -> Callable[[], Wanted]:
        wanted = _vectors_of(connection, definition, model, key, request)
        return lambda: wanted

    return _answer_from_somewhere(definition, settings, request, prepare, without=key)


def _answer_from_somewhere(
    definition: CollectionDefinition,
    settings: Settings,
    request: Request,
    prepare: Preparation,
    *,
    text: str = "",
    without: str | None = None,
) -> Hits:
    """As `_answer`; while the database cannot be reached, from the published files, if they can say."""
    known = known_outage(settings)
    if known is None:
        try:
            return _answer(definition, settings, request, prepare, text=text, without=without)
        except (DatabaseError, psycopg.OperationalError) as error:
            known = outage_behind(settings, error)
            if known is None:
                raise
    return answer_from_files(definition, settings, request, outage_of(settings), known, text=text, item_key=without)


def _answer(
    definition: CollectionDefinition,
    settings: Settings,
    request: Request,
    prepare: Preparation,
    *,
    text: str = "",
    without: str | None = None,
) -> Hits:
    """The best items by all legs. No session is held while a model works. `text`: whose words are looked for, unless
    the request is for vectors alone. `without`: an item that is left out.
    """
    database = open_database_to_read(settings)
    more = request.k + (without is not None)
    for attempt in range(ATTEMPTS):
        try:
            began = time.perf_counter()
            with database.session() as connection:
                model, is_shadow = model_to_ask(connection, definition, database, request.profile)
                make = prepare(connection, model)
                filtered = _filter_of(connection, definition, model, request.condition)
            ask = partial(_in_a_session, database, definition, settings, request, model, is_shadow, filtered)
            found, encoded = _found(ask, definition, request, make, text, more)
            seconds = {"encode": encoded - began, "search": time.perf_counter() - encoded}
            explanation = Explanation(
                model.profile.name,
                model.destination.fingerprint,
                found.legs,
                filtered.items if filtered else None,
                milliseconds={key: round(1000 * value, 3) for key, value in seconds.items()},
                mode=request.mode,
                fell_back=found.fell_back,
            )
            return Hits([hit for hit in found.hits if hit.item_key != without][: request.k], explanation)
        except (psycopg.errors.UndefinedTable, WeightsChangedError):
            if attempt + 1 == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _found(
    ask: Callable[[Callable[[Asking], Any]], Any],
    definition: CollectionDefinition,
    request: Request,
    make: Callable[[], Wanted],
    text: str,
    k: int,
) -> tuple[Found, float]:
    """The `k` best by all legs, and when the query was encoded. Words are looked for while a model encodes."""
    if request.mode == "text":
        began = time.perf_counter()  # nothing is encoded
        return ask(lambda asking: asking.by_words(text, k)), began
    if request.mode == "dense":
        wanted, encoded = make(), time.perf_counter()
        return ask(lambda asking: asking.by_vectors(wanted, k)), encoded
    many = candidates(k)
    with search_alone() as is_alone:
        if not is_alone:
            wanted, encoded = make(), time.perf_counter()
            dense, found = ask(lambda asking: (asking.by_vectors(wanted, many), asking.text_leg(text, many)))
            return joined(definition, dense, found, k), encoded
        with beside(lambda: ask(lambda asking: asking.text_leg(text, many))) as text_leg:
            wanted, encoded = make(), time.perf_counter()
            dense = ask(lambda asking: asking.by_vectors(wanted, many))
            return joined(definition, dense, text_leg(), k), encoded


def _in_a_session(
    database: Database,
    definition: CollectionDefinition,
    settings: Settings,
    request: Request,
    model: Model,
    is_shadow: bool,
    filtered: Filter | None,
    how: Callable[[Asking], T],
) -> T:
    with database.session() as connection:
        return how(Asking(connection, definition, settings, request, model, is_shadow, filtered))


def _filter_of(
    connection: psycopg.Connection, definition: CollectionDefinition, model: Model, condition: Condition | None
) -> Filter | None:
    if condition is None:
        return None
    tell_if_behind(connection, definition, model.destination.tables, condition)
    return filter_of(connection, model.destination.tables, condition)


def tell_if_behind(
    connection: psycopg.Connection, definition: CollectionDefinition, tables: CollectionTables, condition: Condition
) -> None:
    """Say that some items were committed before a column of the condition was in the payload."""
    columns, collection = sorted(condition.columns), definition.name
    parameters = {"collection": collection, "definition_hash": definition.definition_hash, "columns": columns}
    if connection.execute(tables.statement("search/payload_is_behind"), parameters).fetchone() == (True,):
        log.warning(
            "warning: collection %r: some items have no %s in their payload yet, and count as without a value until "
            "`embeddings-pipeline sync` has brought them up to date",
            *(collection, " or ".join(columns)),
        )


def nothing_found(definition: CollectionDefinition, settings: Settings) -> str:
    """Why a search may have found nothing, for people."""
    working = _working(open_database_to_read(settings), definition)
    if working is None:
        return "nothing found: no text of that name has a vector; `embeddings-pipeline status` says why"
    return f"nothing is there to be found yet; {_until_then(working)}"


def _working(database: Database, definition: CollectionDefinition) -> Activity | None:
    with suppress(psycopg.Error):  # without our tables nobody is at work
        return next(iter(under_way(database, definition.name)), None)
    return None


def _until_then(working: Activity | None) -> str:
    return f"wait for what is under way: {described(working)}" if working else "run `embeddings-pipeline sync` first"


def model_to_ask(
    connection: psycopg.Connection, definition: CollectionDefinition, database: Database, profile: str | None
) -> tuple[Model, bool]:
    """The model to ask, and whether it is not the current one."""
    current = current_model(connection, definition)
    if current is None:
        then = _until_then(_working(database, definition))
        raise DatabaseError(f"collection {definition.name!r} has no vectors yet; {then}")
    shadow = _shadow_model(connection, definition, current, profile)
    return shadow or current, shadow is not None


def _shadow_model(
    connection: psycopg.Connection, definition: CollectionDefinition, current: Model, name: str | None
) -> Model | None:
    """The shadow model that `name` names; None for the current one itself."""
    if name is None or name in (current.profile.name, current.destination.fingerprint):
        return None
    shadows = shadow_models(connection, definition)
    for model in shadows:
        if name in (model.profile.name, model.destination.fingerprint):
            return model
    known = ", ".join(model.profile.name for model in [current, *shadows])
    raise ConfigurationError(
        f"collection {definition.name!r} has no vectors of profile {name!r}, but of {known}; "
        f"`{profile_command(f'add {name}', definition.name)}` keeps one more"
    )


def encode_query(
    definition: CollectionDefinition, settings: Settings, model: Model, profile: Profile, query: str
) -> NDArray[np.float32]:
    """A query's vector under a model, whose vectors `profile` makes here. ProfileError if it is no direction."""
    vector = query_vector(definition, profile, settings, query)
    if why_not(vector[None, :], model.destination.storage):  # a cosine is the same at any length
        return (vector / np.linalg.norm(vector.astype(np.float64))).astype(np.float32)
    return vector


def _runnable(
    connection: psycopg.Connection, definition: CollectionDefinition, settings: Settings, model: Model
) -> tuple[Profile, str]:
    """The declared profile if it makes the model's vectors, else that which they were made with; its fingerprint."""
    declared = resolve_profile(definition.declared_profile, settings)
    for profile in (declared, model.profile):
        try:
            digest, wanted = fingerprint_lately(profile, settings), model.destination.fingerprint
            if digest == wanted or made_by(connection, definition.name, digest) == wanted:
                return profile, digest
        except ProfileError:
            if profile is model.profile:
                raise
    raise ProfileError(
        f"collection {definition.name!r}: its vectors were made with profile {model.profile.name!r} "
        f"({model.profile.model}, fingerprint {model.destination.fingerprint}), and the weights here are others; "
        f"bring those back, or declare the profile that made them"
    )


def _vectors_of(
    connection: psycopg.Connection, definition: CollectionDefinition, model: Model, item_key: str, request: Request
) -> Wanted:
    """Of each vector name, the item's vector, if it has one. ConfigurationError if it has none."""
    table = model.destination
    statement = table.statement("search/vectors_of", names=sql.Literal(list(request.vectors)))
    rows = connection.execute(statement, {"item_key": item_key}).fetchall()
    wanted = {name: np.array(direction, np.float32) for name, direction in rows}
    if usable := {name: vector for name, vector in wanted.items() if np.isfinite(vector).all() and vector.any()}:
        return usable
    is_known = connection.execute(table.tables.statement("search/is_item"), {"item_key": item_key}).fetchone()
    name, shown = definition.name, reprlib.repr(item_key)
    if is_known is None:
        raise NotFoundError(f"collection {name!r} has no item {shown}: an item's key is what a hit names, as text")
    raise ConfigurationError(
        f"collection {name!r}: item {shown} has no vector {' or '.join(request.vectors)} to compare others with: "
        f"its text is blank, in quarantine or not embedded yet; see `embeddings-pipeline status --collection {name}`"
    )
