"""The query path: a text in, the nearest items out, never with another model's vectors (rule 6)."""

import json
import logging
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import Vector
from psycopg import sql
from psycopg.types.json import set_json_loads

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.profiles import Profile, resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import visible
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import (
    ConfigurationError,
    DatabaseError,
    ProfileError,
    did_you_mean,
    profile_command,
    unusable,
)
from embeddings_pipeline.forks import compute
from embeddings_pipeline.health.activity import Activity, described, under_way
from embeddings_pipeline.store.database import Database, open_database_to_read
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.models import Model, collection_state, current_model, made_by, shadow_models
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.store.vector_range import why_not

if TYPE_CHECKING:
    from embeddings_pipeline.index.faiss_read import FaissIndex

log = logging.getLogger(__name__)

ATTEMPTS = 3  # a model may be switched between reading its name and asking its table
MOST_HITS = 1000
MOST_DIGITS = 4000  # of an int: Python reads no longer ones
MOST_TIES = 10_000  # texts of one score that FAISS is asked for
ALL_COMPARED_BELOW = 50_000  # vectors: up to here comparing all takes some tens of milliseconds


class ExactNumber(Decimal):
    """A number with every digit that the database has; its text has no exponent."""

    def __str__(self) -> str:
        return format(self, "f")


@dataclass(frozen=True)
class Hit:
    """One of the nearest items: `score` is the cosine of its nearest text, `item` its payload, `text` that text.

    Numbers of the payload are as the database has them: an int, or a Decimal with every digit.
    """

    item_key: str
    score: float
    item: dict[str, Any]
    text: str


def search(
    definition: CollectionDefinition,
    settings: Settings,
    query: str,
    *,
    k: int = 10,
    vector_name: str | None = None,
    index: Literal["pgvector", "faiss"] = "pgvector",
    profile: str | None = None,
) -> list[Hit]:
    """The `k` items nearest to `query`, best first, by the collection's current model.

    `vector_name`: which of the item's vectors; the first one if left out. `index`: where to look; hits from FAISS are
    joined to live rows and to what has come since the index was built; if it is still of a previous model, PostgreSQL
    answers. `profile`: another model that is kept beside the current one.
    """
    name, k = _checked(definition, query, k, vector_name, index, profile), int(k)
    database = open_database_to_read(settings)
    for attempt in range(ATTEMPTS):
        with database.session() as connection:
            state, model = collection_state(connection, definition.name), current_model(connection, definition)
            if state is None or model is None:
                then = _until_then(_working(database, definition))
                raise DatabaseError(f"collection {definition.name!r} has no vectors yet; {then}")
            shadow = _shadow_model(definition, database, model, profile)
            model = shadow or model
            vector = _encode(connection, definition, settings, model, query)
            try:
                hits = None
                if index == "faiss" and shadow is None:
                    hits = _faiss(connection, settings, model, name, vector, k)
                return nearest_items(connection, definition, model, name, vector, k) if hits is None else hits
            except psycopg.errors.UndefinedTable:
                if attempt + 1 == ATTEMPTS:
                    raise
    raise AssertionError("unreachable")


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


def _checked(
    definition: CollectionDefinition, query: object, k: object, vector_name: object, index: object, profile: object
) -> str:
    """The name of the vector to ask, once all of these are what they may be: programs without types pass anything."""
    if not isinstance(query, str):
        raise unusable("query", query, "a text")
    if not visible(query):
        raise ConfigurationError("the query is blank: say what to search for")
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= int(k) <= MOST_HITS:
        raise unusable("k", k, f"a whole number from 1 to {MOST_HITS}")
    if index not in ("pgvector", "faiss"):
        raise unusable("index", index, "'pgvector' or 'faiss'")
    if profile is not None and not (isinstance(profile, str) and profile.strip()):
        raise unusable("profile", profile, "the name of a profile, or None for the current model's")
    names = list(definition.attributes.vectors)
    if vector_name is None:
        return names[0]
    if not isinstance(vector_name, str) or not vector_name.strip():
        known = ", ".join(repr(name) for name in names)
        raise unusable("vector_name", vector_name, f"one of {known}, or None for the first")
    if vector_name not in names:
        raise ConfigurationError(
            f"collection {definition.name!r} has no vector {vector_name!r}; it has {', '.join(names)}"
            f"{did_you_mean(vector_name, names)}"
        )
    return vector_name


def _shadow_model(
    definition: CollectionDefinition, database: Database, current: Model, name: str | None
) -> Model | None:
    """The shadow model that `name` names; None for the current one itself."""
    if name is None or name in (current.profile.name, current.destination.fingerprint):
        return None
    with database.session() as connection:
        shadows = shadow_models(connection, definition)
    for model in shadows:
        if name in (model.profile.name, model.destination.fingerprint):
            return model
    known = ", ".join(model.profile.name for model in [current, *shadows])
    raise ConfigurationError(
        f"collection {definition.name!r} has no vectors of profile {name!r}, but of {known}; "
        f"`{profile_command(f'add {name}', definition.name)}` keeps one more"
    )


def _texts_per_item(definition: CollectionDefinition) -> int:
    """How many of an item's texts are expected among the nearest, of which one counts."""
    return 5 if definition.attributes.chunk else 1


def _encode(
    connection: psycopg.Connection, definition: CollectionDefinition, settings: Settings, model: Model, query: str
) -> NDArray[np.float32]:
    profile = _runnable(connection, definition, settings, model)
    [vector] = compute(load_encoder(profile, settings).encode_queries, [query])
    length = np.linalg.norm(vector.astype(np.float64))
    if not (np.isfinite(length) and length > 0):
        raise ProfileError(
            f"collection {definition.name!r}: profile {profile.name!r} gives a vector that is not finite, or zero, for "
            f"the query {reprlib.repr(query)}: nothing can be compared with it; ask in other words"
        )
    if why_not(vector[None, :], model.destination.storage):  # a cosine is the same at any length
        return (vector / length).astype(np.float32)
    return vector


def _runnable(
    connection: psycopg.Connection, definition: CollectionDefinition, settings: Settings, model: Model
) -> Profile:
    """The declared profile if it makes the model's vectors, else the profile that they were made with."""
    declared = resolve_profile(definition.declared_profile, settings)
    for profile in (declared, model.profile):
        try:
            digest, wanted = fingerprint(profile, settings.state_dir), model.destination.fingerprint
            if digest == wanted or made_by(connection, definition.name, digest) == wanted:
                return profile
        except ProfileError:
            if profile is model.profile:
                raise
    raise ProfileError(
        f"collection {definition.name!r}: its vectors were made with profile {model.profile.name!r} "
        f"({model.profile.model}, fingerprint {model.destination.fingerprint}), and the weights here are others; "
        f"bring those back, or declare the profile that made them"
    )


def nearest_items(
    connection: psycopg.Connection,
    definition: CollectionDefinition,
    model: Model,
    name: str,
    vector: NDArray[np.float32],
    k: int,
) -> list[Hit]:
    """The `k` items nearest to a vector of that model, by PostgreSQL."""
    nearest = k * _texts_per_item(definition)
    with connection.transaction(), _exact_cursor(connection) as cursor:
        _search_settings(connection, model.destination, nearest)
        statement = model.destination.statement(
            "search/items", vector_name=sql.Literal(name), type=model.destination.type
        )
        cursor.execute(statement, {"query": Vector(vector).to_text(), "nearest": nearest, "k": k})
        return [Hit(*row) for row in cursor]


def _exact_cursor(connection: psycopg.Connection) -> psycopg.Cursor:
    """A cursor that reads the numbers of JSON with all their digits."""
    cursor = connection.cursor()
    set_json_loads(partial(json.loads, parse_float=ExactNumber, parse_int=_whole_number), context=cursor)
    return cursor


def _whole_number(digits: str) -> int | ExactNumber:
    return int(digits) if len(digits) < MOST_DIGITS else ExactNumber(digits)


def nearest_texts(
    connection: psycopg.Connection, table: Destination, name: str, vector: NDArray[np.float32], n: int
) -> list[tuple[int, float]]:
    """Ids and cosines of the `n` texts nearest to a vector, found as searches find them if there are many."""
    with connection.transaction():
        _search_settings(connection, table, n, exact_below=0)
        statement = table.statement("search/texts", vector_name=sql.Literal(name), type=table.type)
        return connection.execute(statement, {"query": Vector(vector).to_text(), "n": n}).fetchall()


def _search_settings(
    connection: psycopg.Connection, table: Destination, nearest: int, *, exact_below: int = ALL_COMPARED_BELOW
) -> None:
    # An ANN index does not find every vector that lies apart from the others; if there are few, look at all.
    counted, bytes_each = table.counted
    connection.execute(
        load_sql("search/settings"),
        {
            "table": counted.as_string(connection),
            "exact_below": exact_below * bytes_each,
            "ef_search": str(min(max(200, 2 * nearest), MOST_HITS)),
        },
    )


def _faiss(
    connection: psycopg.Connection,
    settings: Settings,
    model: Model,
    name: str,
    vector: NDArray[np.float32],
    k: int,
) -> list[Hit] | None:
    """The nearest items by FAISS, and, of what came after its index was built, by PostgreSQL. None if the index is of
    another model, since it has just been switched, or of a state of another database: text ids mean something else
    there.
    """
    from embeddings_pipeline.index.faiss_delta import nearest_changed
    from embeddings_pipeline.index.faiss_read import open_index
    from embeddings_pipeline.index.standing import Standing, standing, why_foreign

    collection = model.destination.collection
    generation = open_index(settings.state_dir / "faiss", collection)
    stands, why = standing(connection, collection, generation.manifest), None
    if stands is Standing.FOREIGN:
        why = f"is {why_foreign(connection, generation.manifest)}"
    elif generation.manifest.fingerprint != model.destination.fingerprint:
        why = "was built for another model"
    if why is not None:
        log.warning(
            "warning: collection %r: the FAISS index %s; PostgreSQL answers until the next `embeddings-pipeline sync`",
            *(collection, why),
        )
        return None
    query = Vector(vector).to_text()
    found: list[Hit] = []
    n, exhausted = 2 * k + 10, False
    while len(found) < k and not exhausted:  # what is gone by now is among them
        ids = _nearest_by_faiss(generation, name, vector, n)
        found, exhausted = _live_hits(connection, model.destination, name, query, ids), len(ids) < n or n >= MOST_TIES
        n *= 4
    changed = nearest_changed(connection, model.destination, generation.manifest, name, query, 2 * k + 10)
    found += _live_hits(connection, model.destination, name, query, changed)
    best: dict[str, Hit] = {}
    for hit in sorted(found, key=lambda hit: (-hit.score, hit.item_key)):
        best.setdefault(hit.item_key, hit)
    return list(best.values())[:k]


def _live_hits(connection: psycopg.Connection, table: Destination, name: str, query: str, ids: list[int]) -> list[Hit]:
    """The items behind these texts, each once, best first; those that are gone are missing."""
    statement = table.statement("search/ids", type=table.type)
    best: dict[str, Hit] = {}
    with _exact_cursor(connection) as cursor:
        cursor.execute(statement, {"query": query, "ids": ids, "vector_name": name})
        for row in cursor:
            best.setdefault(row[0], Hit(*row))
    return list(best.values())


def _nearest_by_faiss(generation: "FaissIndex", name: str, vector: NDArray[np.float32], n: int) -> list[int]:
    """Ids of the `n` nearest texts, and of as many more as are exactly as near, within MOST_TIES."""
    while True:
        scores, ids = generation.search(name, vector[None, :], n)
        found = [int(text_id) for text_id in ids[0] if text_id >= 0]
        if len(found) < n or n >= MOST_TIES or scores[0][-1] != scores[0][n // 2]:
            return found
        n *= 4
