"""Where vectors are served from: the seam between the landing and the table that holds the vectors.

`ModelTable`, a table of our own for each model, is the target there is. A second one, a column of a table that the
user already has, implements the same protocol.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import psycopg
from psycopg import sql

from embeddings_pipeline.store.postgres import load_sql

PAGE_BYTES = 8000  # what a row may take to stay in its page


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
        connection.execute(self.statement("collection", **indexes))


class Target(Protocol):
    """Writes are made inside the landing's transaction, from the temporary table `landing_vector`."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def storage(self) -> Literal["halfvec", "vector"]: ...

    def delete(self, connection: psycopg.Connection) -> int:
        """Delete the vectors of the texts in the temporary table `landing_gone (id)`; the number deleted."""

    def write(self, connection: psycopg.Connection) -> int:
        """Write what `landing_vector` holds for live texts and is not there yet; the number written."""


@dataclass(frozen=True)
class ModelTable:
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
        """An empty table that is there while this is the active model: see embeddings.assert_model()."""
        return sql.Identifier("embeddings", f"{self.collection}_active_{self.fingerprint}")

    @property
    def bytes_per_vector(self) -> int:
        return 8 + self.dimension * (2 if self.storage == "halfvec" else 4)

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """As `CollectionTables.statement`, with {vector} for this table."""
        return self.tables.statement(name, vector=self.identifier, **others)

    def create_statement(self) -> sql.Composed:
        """Makes the table where it is not there yet."""
        plain = self.bytes_per_vector + 100 <= PAGE_BYTES
        return self.statement(
            "model_table",
            type=sql.SQL("{}({})").format(sql.SQL(self.storage), sql.Literal(self.dimension)),
            vector_storage=sql.SQL("PLAIN" if plain else "EXTERNAL"),
        )

    def create(self, connection: psycopg.Connection) -> None:
        """Make the table where it is not there yet."""
        connection.execute(self.create_statement())

    def show(self, connection: psycopg.Connection) -> None:
        """Point the collection's view at this table."""
        connection.execute(self.statement("view", bare_type=sql.SQL(self.storage)))

    def mark(self, connection: psycopg.Connection) -> None:
        """Make the marker of the active model where it is not there yet."""
        connection.execute(sql.SQL("CREATE TABLE IF NOT EXISTS {} ()").format(self.marker))

    def delete(self, connection: psycopg.Connection) -> int:
        return connection.execute(self.statement("landing/delete_vectors")).rowcount

    def write(self, connection: psycopg.Connection) -> int:
        return connection.execute(self.statement("landing/write_vectors")).rowcount
