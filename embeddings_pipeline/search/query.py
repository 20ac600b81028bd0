"""The query path: a text in, the nearest items out, never with another model's vectors (rule 6)."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import Collection, did_you_mean
from embeddings_pipeline.config.profiles import Profile, fingerprint, resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import ConfigurationError, DatabaseError, ProfileError
from embeddings_pipeline.health.coverage import CollectionState, collection_state
from embeddings_pipeline.ledger.ledger import ActiveModel, Ledger, active_model
from embeddings_pipeline.store.database import Database, load_sql, open_database
from embeddings_pipeline.store.destination.table import ModelTable

log = logging.getLogger(__name__)

TRIES = 3  # a model may be switched between reading its name and asking its table
MOST_HITS = 1000
EXACT_BELOW = 50_000  # vectors: up to here comparing all takes some tens of milliseconds


@dataclass(frozen=True)
class Hit:
    """One item found: `score` is the cosine of its nearest text, `item` its payload."""

    item_key: str
    score: float
    item: dict[str, Any]


def search(
    collection: Collection,
    settings: Settings,
    query: str,
    *,
    k: int = 10,
    vector_name: str | None = None,
    index: Literal["pgvector", "faiss"] = "pgvector",
    profile: str | None = None,
) -> list[Hit]:
    """The `k` items nearest to `query`, best first, by the collection's active model.

    `vector_name`: which of the item's vectors; the first one if left out. `index`: where to look; hits from FAISS are
    joined to live rows, so what has changed since the index was built is not returned with a wrong payload; where it
    is still of a former model, PostgreSQL answers. `profile`: another model that is kept beside the active one.
    """
    if not query.strip():
        raise ConfigurationError("the query is blank: say what to search for")
    if not 1 <= k <= MOST_HITS:
        raise ConfigurationError(f"{k} results cannot be asked for: choose 1 to {MOST_HITS}")
    names = list(collection.config.vectors)
    name = vector_name or names[0]
    if name not in names:
        raise ConfigurationError(
            f"collection {collection.name!r} has no vector {name!r}; it has {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    database = open_database(settings)
    for attempt in range(TRIES):
        with database.session() as connection:
            state, model = collection_state(connection, collection.name), active_model(connection, collection)
            if state is None or model is None:
                raise DatabaseError(
                    f"collection {collection.name!r} has no vectors yet; run `embeddings-pipeline sync` first"
                )
            beside = _beside(collection, database, model, profile)
            model = beside or model
            vector = _encode(collection, settings, model, query)
            try:
                hits = None
                if index == "faiss" and beside is None:
                    hits = _faiss(connection, settings, state, model, name, vector, k)
                return nearest_items(connection, collection, model, name, vector, k) if hits is None else hits
            except psycopg.errors.UndefinedTable:
                if attempt + 1 == TRIES:
                    raise
    raise AssertionError("unreachable")


def _beside(collection: Collection, database: Database, active: ActiveModel, name: str | None) -> ActiveModel | None:
    """The model beside the active one that `name` names; None for the active one itself."""
    if name is None or name in (active.profile.name, active.table.fingerprint):
        return None
    beside = Ledger(collection, database).beside()
    for model in beside:
        if name in (model.profile.name, model.table.fingerprint):
            return model
    there = ", ".join(one.profile.name for one in [active, *beside])
    raise ConfigurationError(
        f"collection {collection.name!r} has no vectors of profile {name!r}, but of {there}; "
        f"`embeddings-pipeline profile add {name}` keeps one more"
    )


def _several(collection: Collection) -> int:
    """How many texts of one item may stand in each other's way."""
    return 5 if collection.config.chunk else 1


def _encode(collection: Collection, settings: Settings, model: ActiveModel, query: str) -> NDArray[np.float32]:
    profile = _runnable(collection, settings, model)
    return load_encoder(profile).encode_queries([query])[0]


def _runnable(collection: Collection, settings: Settings, model: ActiveModel) -> Profile:
    """The declared profile where it makes the active model's vectors, else the profile that they were made with."""
    declared = resolve_profile(collection.declared_profile, settings)
    for profile in (declared, model.profile):
        try:
            if fingerprint(profile, settings.state_dir) == model.table.fingerprint:
                return profile
        except ProfileError:
            if profile is model.profile:
                raise
    raise ProfileError(
        f"collection {collection.name!r}: its vectors were made with profile {model.profile.name!r} "
        f"({model.profile.model}, fingerprint {model.table.fingerprint}), and the weights here are others; "
        f"bring those back, or declare the profile that made them"
    )


def nearest_items(
    connection: psycopg.Connection,
    collection: Collection,
    model: ActiveModel,
    name: str,
    vector: NDArray[np.float32],
    k: int,
) -> list[Hit]:
    """The `k` items nearest to a vector of that model, by PostgreSQL."""
    nearest = k * _several(collection)
    with connection.transaction():
        _search_settings(connection, model.table, nearest)
        statement = model.table.statement("search", vector_name=sql.Literal(name), type=model.table.type)
        rows = connection.execute(statement, {"query": _text(vector), "nearest": nearest, "k": k})
        return [Hit(item_key, score, payload) for item_key, score, payload in rows]


def nearest_texts(
    connection: psycopg.Connection, table: ModelTable, name: str, vector: NDArray[np.float32], n: int
) -> list[tuple[int, float]]:
    """Ids and cosines of the `n` texts nearest to a vector, found as searches find them where there are many."""
    with connection.transaction():
        _search_settings(connection, table, n, exact_below=0)
        statement = table.statement("search_texts", vector_name=sql.Literal(name), type=table.type)
        return connection.execute(statement, {"query": _text(vector), "n": n}).fetchall()


def _search_settings(
    connection: psycopg.Connection, table: ModelTable, nearest: int, *, exact_below: int = EXACT_BELOW
) -> None:
    # An ANN index does not find every vector that lies apart from the others; where there are few, look at all.
    counted, bytes_each = table.counted
    connection.execute(
        load_sql("search_settings"),
        {
            "table": counted.as_string(connection),
            "exact_below": exact_below * bytes_each,
            "ef_search": str(min(max(200, 2 * nearest), MOST_HITS)),
        },
    )


def _faiss(
    connection: psycopg.Connection,
    settings: Settings,
    state: CollectionState,
    model: ActiveModel,
    name: str,
    vector: NDArray[np.float32],
    k: int,
) -> list[Hit] | None:
    """None where the index is of another model: it has just been switched."""
    from embeddings_pipeline.index.faiss_index import open_index

    opened = open_index(settings.state_dir / "faiss", model.table.collection)
    if (opened.manifest.fingerprint, opened.manifest.epoch) != (model.table.fingerprint, state.epoch):
        log.warning(
            "warning: collection %r: the FAISS index was built for another model; PostgreSQL answers until the next "
            "`embeddings-pipeline sync`",
            model.table.collection,
        )
        return None
    scores, ids = opened.search(name, vector[None, :], 2 * k + 10)
    found = {int(text_id): float(score) for text_id, score in zip(ids[0], scores[0], strict=True) if text_id >= 0}
    rows = connection.execute(
        model.table.tables.statement("search_ids"), {"ids": list(found), "vector_name": name}
    ).fetchall()
    best: dict[str, Hit] = {}
    for text_id, item_key, payload in sorted(rows, key=lambda row: -found[row[0]]):
        best.setdefault(item_key, Hit(item_key, found[text_id], payload))
    return list(best.values())[:k]


def _text(vector: NDArray[np.float32]) -> str:
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
