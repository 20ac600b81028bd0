"""Which destination a collection has."""

from typing import Any, Literal

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.store.destination.base import Destination
from embeddings_pipeline.store.destination.column import ColumnDestination
from embeddings_pipeline.store.destination.column_checks import look
from embeddings_pipeline.store.destination.table import TableDestination


def destination_of(definition: CollectionDefinition, fingerprint: str, dimension: int, storage: Any) -> Destination:
    """Where a collection's vectors under one fingerprint are."""
    if definition.attributes.destination is None:
        return TableDestination(definition.name, fingerprint, dimension, storage)
    return _column(definition, fingerprint, dimension, storage)


def declared_storage(connection: psycopg.Connection, definition: CollectionDefinition) -> Literal["halfvec", "vector"]:
    """`storage:`, or what the destination's column is."""
    if definition.attributes.destination is None:
        return definition.attributes.storage
    column = _column(definition, "", 0, "vector")
    return "halfvec" if look(connection, column, column.declared.column)["type"] == "halfvec" else "vector"


def _column(definition: CollectionDefinition, fingerprint: str, dimension: int, storage: Any) -> ColumnDestination:
    declared = definition.attributes.destination
    assert declared is not None
    (vector_name,) = definition.attributes.vectors
    return ColumnDestination(
        definition.name,
        fingerprint,
        dimension,
        storage,
        declared=declared,
        key=declared.key or definition.attributes.source.key,
        source_key=definition.attributes.source.key,
        vector_name=vector_name,
    )
