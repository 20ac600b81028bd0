"""What every part of the ledger knows: the collection, its database and its models."""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import CollectionTables, Destination
from embeddings_pipeline.store.destination.factory import destination_of
from embeddings_pipeline.store.models import Model, current_model, has_vectors, shadow_models


@dataclass(frozen=True)
class LedgerBase:
    """A collection's models, batches and item keys."""

    definition: CollectionDefinition
    database: Database

    @property
    def name(self) -> str:
        """The collection's."""
        return self.definition.name

    @property
    def tables(self) -> CollectionTables:
        return CollectionTables(self.name)

    def current(self) -> Model | None:
        """The current model, or None before the first run."""
        with self.database.session() as connection:
            return current_model(connection, self.definition)

    def has_vectors(self) -> bool:
        """Whether a vector is committed: until then the declared profile is taken."""
        with self.database.session() as connection:
            return has_vectors(connection, self.name)

    def shadow_models(self) -> list[Model]:
        """The models that are kept current beside the current one, the oldest first."""
        with self.database.session() as connection:
            return shadow_models(connection, self.definition)

    def model_tables(self, connection: psycopg.Connection) -> list[Destination]:
        """Every model's destination, the current one's and others'; none of them is dropped in this transaction."""
        query = "SELECT fingerprint, dimension, storage FROM embeddings.model WHERE collection = %s FOR KEY SHARE"
        return [destination_of(self.definition, *row) for row in connection.execute(query, [self.name]).fetchall()]

    def batches(self) -> list[int]:
        """Every batch of the collection, in order."""
        query = "SELECT batch FROM embeddings.batch WHERE collection = %s ORDER BY batch"
        with self.database.session() as connection:
            return [row[0] for row in connection.execute(query, [self.name])]

    def keys_of_batches(self, batches: Sequence[int]) -> dict[int, list[str]]:
        """The keys of each batch's items, in order."""
        query = "SELECT batch, item_key FROM {} WHERE batch = ANY (%s) ORDER BY batch, item_key"
        keys: dict[int, list[str]] = {batch: [] for batch in batches}
        with self.database.session() as connection:
            for batch, item_key in connection.execute(sql.SQL(query).format(self.tables.item), [list(batches)]):
                keys[batch].append(item_key)
        return keys
