"""Where vectors are served from: the seam between the commit and what holds the vectors.

A `TableDestination` is a table of our own for each model. An `ColumnDestination` (adopted.py) is the same over a
column of a table that the user already has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.store.copy_binary import copy_in
from embeddings_pipeline.store.sql import load_sql

PAGE_BYTES = 8000  # what a row may take to stay in its page
ROW_BYTES = 90  # of a row of a model table beside its vector, its key's index included
NORM = {"halfvec": "l2_norm", "vector": "vector_norm"}  # pgvector's functions


@dataclass(frozen=True)
class CollectionTables:
    """The names of a collection's tables, as SQL identifiers."""

    collection: str

    @property
    def item(self) -> sql.Identifier:
        return sql.Identifier("embeddings", f"{self.collection}_item")

    @property
    def text(self) -> sql.Identifier:
        return sql.Identifier("embeddings", f"{self.collection}_text")

    @property
    def view(self) -> sql.Identifier:
        return sql.Identifier("embeddings", self.collection)

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """The statement `sql/NAME.sql` with {item}, {text}, {view} and what else it needs filled in."""
        return sql.SQL(load_sql(name)).format(item=self.item, text=self.text, view=self.view, **others)

    def create(self, connection: psycopg.Connection) -> None:
        """Make the tables where they are not there yet."""
        names = ("item_batch", "item_dirty", "text_item", "text_hash")
        indexes = {name: sql.Identifier(f"{self.collection}_{name}") for name in names}
        connection.execute(self.statement("table/collection", **indexes))


@dataclass(frozen=True)
class TableDestination:
    """The vectors of one collection under one fingerprint, in a table of their own."""

    collection: str
    fingerprint: str
    dimension: int
    storage: Literal["halfvec", "vector"] = "halfvec"

    @property
    def tables(self) -> CollectionTables:
        return CollectionTables(self.collection)

    @property
    def name(self) -> str:
        return f"{self.collection}_vector_{self.fingerprint}"

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier("embeddings", self.name)

    @property
    def marker(self) -> sql.Identifier:
        """An empty table that is there while this is the current model: see embeddings.assert_model()."""
        return sql.Identifier("embeddings", f"{self.collection}_current_{self.fingerprint}")

    @property
    def lacking(self) -> sql.Identifier:
        """The view of the texts that lack their vector in this model."""
        return sql.Identifier("embeddings", f"{self.collection}_lacking_{self.fingerprint}")

    @property
    def bytes_per_vector(self) -> int:
        return 8 + self.dimension * (2 if self.storage == "halfvec" else 4)

    @property
    def type(self) -> sql.Composed:
        """halfvec(n) or vector(n)."""
        return sql.SQL("{}({})").format(sql.SQL(self.storage), sql.Literal(self.dimension))

    @property
    def counted(self) -> tuple[sql.Identifier, int]:
        """A table that grows with the vectors, and what it takes for each, in bytes."""
        return self.identifier, self.bytes_per_vector + ROW_BYTES

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """As `CollectionTables.statement`, with {vector} for this table, {written} and {hash} for where it says which
        texts have their vector (this table too), and {lacking} for the view of those that have none.
        """
        here = {"vector": self.identifier, "written": self.identifier, "hash": self.identifier, "lacking": self.lacking}
        return self.tables.statement(name, **{**here, **others})

    def lacking_statement(self) -> sql.Composed:
        """Makes the view of the texts that lack their vector in this model."""
        names = {"collection_name": sql.Literal(self.collection), "model_fingerprint": sql.Literal(self.fingerprint)}
        return self.statement("models/lacking", **names)

    def create_statement(self) -> sql.Composed:
        """Makes the table where it is not there yet."""
        plain = self.bytes_per_vector + 100 <= PAGE_BYTES
        storage = sql.SQL("PLAIN" if plain else "EXTERNAL")
        create = self.statement("table/create", type=self.type, vector_storage=storage)
        return sql.Composed([create, sql.SQL("\n"), self.lacking_statement()])

    def create(self, connection: psycopg.Connection) -> None:
        """Make the table where it is not there yet."""
        connection.execute(self.create_statement())

    def drop_statement(self) -> sql.Composed:
        """Drops the table, and the view of what it lacks."""
        return self.statement("table/drop")

    def release(self, connection: psycopg.Connection) -> None:
        """Remove what `create` made, while nothing is committed."""
        connection.execute(self.drop_statement())

    def drop_statements(self, connection: psycopg.Connection) -> list[sql.Composed]:
        """What removes the model's vectors."""
        return [self.drop_statement()]

    def exclusive(self) -> list[sql.Identifier]:
        """What `drop_statements` exclude others from."""
        return [self.identifier]

    def show_statement(self) -> sql.Composed:
        """Points the collection's view at this table."""
        return self.statement("table/view", bare_type=sql.SQL(self.storage))

    def show(self, connection: psycopg.Connection) -> None:
        """Point the collection's view at this table."""
        connection.execute(self.show_statement())

    def mark(self, connection: psycopg.Connection) -> None:
        """Make the marker of the current model where it is not there yet."""
        connection.execute(sql.SQL("CREATE TABLE IF NOT EXISTS {} ()").format(self.marker))

    def delete(self, connection: psycopg.Connection, *, replaced: bool) -> int:
        """Within a commit: delete the vectors of the texts in its table `commit_gone (id)`; how many.

        `replaced`: the commit's own vectors are this model's, and `write` comes next.
        """
        return connection.execute(self.statement("table/delete")).rowcount

    def write(self, connection: psycopg.Connection, *, adopt: bool = False) -> int:
        """Within a commit: write what `commit_vector` holds for live texts and is not there yet; how many.

        `adopt`: vectors in the user's own column are this model's, and stay where the row is as it was first seen.
        """
        return connection.execute(self.statement("table/write")).rowcount

    def put(self, connection: psycopg.Connection, columns: Mapping[str, NDArray]) -> None:
        """Under the batch's lock: vectors of texts that have none. columns: text_id (n,), vector_name (n,),
        content_hash (n, 16), embedding (n, dimension).
        """
        copy_in(connection, self.identifier, columns, storage=self.storage)
