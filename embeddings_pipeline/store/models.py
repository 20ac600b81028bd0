"""Which models a collection has, and where it stands, as the database says."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.factory import destination_of
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class Model:
    """The profile that the database says is current for a collection, and the table with its vectors."""

    profile: Profile
    destination: Destination


@dataclass(frozen=True)
class CollectionState:
    """What the database knows of a collection as a whole."""

    fingerprint: str | None
    version: int
    epoch: str
    full_scan_at: datetime | None
    asked_at: datetime  # when that was so, by the database's clock, as all its times are


@dataclass(frozen=True)
class Identity:
    """Which database files are of, and which life of a collection's tables in it."""

    database: str
    epoch: str


def is_known(connection: psycopg.Connection, collection: str) -> bool:
    """Whether the collection is registered in this database."""
    return collection_state(connection, collection) is not None


def collection_identity(connection: psycopg.Connection, collection: str) -> Identity:
    """What the files of a registered collection are of."""
    row = connection.execute(load_sql("models/identity"), {"collection": collection}).fetchone()
    assert row is not None
    return Identity(*row)


def current_model(connection: psycopg.Connection, definition: CollectionDefinition) -> Model | None:
    """The current model of a collection; None if it is not known to the database yet."""
    try:
        row = connection.execute(load_sql("models/current"), {"collection": definition.name}, prepare=True).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    if row is None:
        return None
    return _model(definition, row)


def bind(connection: psycopg.Connection, values: Mapping[str, Any]) -> None:
    """Note that a profile makes a model's vectors; `values`: see the statement."""
    connection.execute(load_sql("models/bind"), values)


def made_by(connection: psycopg.Connection, collection: str, maker: str) -> str:
    """The fingerprint of the model whose vectors a profile makes: its own (`maker`), or that which it was bound to."""
    try:
        row = connection.execute(load_sql("models/made_by"), {"collection": collection, "maker": maker}).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return maker
    return row[0] if row else maker


def shadow_models(connection: psycopg.Connection, definition: CollectionDefinition) -> list[Model]:
    """The models of a collection that are kept current beside the current one, the oldest first."""
    rows = connection.execute(load_sql("models/shadows"), {"collection": definition.name}).fetchall()
    return [_model(definition, row) for row in rows]


def stored_profile(profile: Mapping[str, Any]) -> Profile:
    """A profile as `embeddings.model` keeps it.

    One without the key `similarity` was stored while every model was searched by cosine, which stays so.
    """
    return Profile(**{"similarity": "cosine", **profile})


def _model(definition: CollectionDefinition, row: tuple[Any, ...]) -> Model:
    fingerprint, dimension, storage, profile = row
    return Model(stored_profile(profile), destination_of(definition, fingerprint, dimension, storage))


def has_vectors(connection: psycopg.Connection, collection: str) -> bool:
    """Whether a vector of the collection is committed: until then the declared profile is taken."""
    try:
        row = connection.execute(load_sql("models/has_vectors"), {"collection": collection}).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return False
    return row == (True,)


def collection_state(connection: psycopg.Connection, collection: str) -> CollectionState | None:
    """Where a collection stands; None if it has never been synced."""
    try:
        row = connection.execute(load_sql("models/state"), {"collection": collection}).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    return CollectionState(*row) if row else None
