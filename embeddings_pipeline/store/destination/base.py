"""What a destination is: where the vectors of one collection under one fingerprint are kept, and its verbs.

All that reads vectors reads the table or view `identifier`, with the columns text_id, vector_name, content_hash and
embedding. What changes the schema is a list of `Change`s, which a plan prints and a run executes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import psycopg
from numpy.typing import NDArray
from psycopg import sql

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.store.copy_binary import Column
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.destination.indexes import AnnIndex, IndexChange
from embeddings_pipeline.store.destination.rights import ModelRights, option_changes, rights_changes, rights_of
from embeddings_pipeline.store.sql import load_sql

ROW_BYTES = 90  # of a row of a model table beside its vector, its key's index included
INDEX_FACTOR = 1.3  # an HNSW index beside the vectors it holds a copy of
NORM = {"halfvec": "l2_norm", "vector": "vector_norm"}  # pgvector's functions
MOST_DIMENSIONS = {"halfvec": 4000, "vector": 2000}  # of an index: README of pgvector, "HNSW", "IVFFlat"


class Limits(NamedTuple):
    """How much of a backfill is written together."""

    texts: int
    seconds: float  # with a slow model, what it made in so long


# A session, the columns as `put` takes them, and `kept`.
PutAhead = Callable[[psycopg.Connection, Mapping[str, Column], Callable[[psycopg.Connection], Any]], None]


@dataclass(frozen=True)
class Layout:
    """What a model's vectors are called in the catalog: their column, and the ANN indexes on it."""

    column: str  # empty if the user has dropped it
    indexes: tuple[AnnIndex, ...] = ()
    schema: str = "embeddings"  # of the indexes


@dataclass(frozen=True)
class Exchange:
    """What a swap renames, and the layouts afterwards: of the model that was current, and of the one that is."""

    changes: list[Change]
    previous: Layout
    current: Layout


def all_there(connection: psycopg.Connection, relations: Sequence[sql.Identifier]) -> bool:
    """Whether each of these tables and views is there."""
    query = "SELECT bool_and(to_regclass(name) IS NOT NULL) FROM unnest(%s::text[]) AS name"
    row = connection.execute(query, [[relation.as_string(connection) for relation in relations]]).fetchone()
    return row == (True,)


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
    def words(self) -> sql.Identifier:
        """The words of the texts: there with `words:` alone."""
        return sql.Identifier("embeddings", f"{self.collection}_text_words")

    @property
    def view(self) -> sql.Identifier:
        return sql.Identifier("embeddings", self.collection)

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """The statement NAME of `sql/` with {item}, {text}, {words}, {view} and what else it needs filled in."""
        names = {"item": self.item, "text": self.text, "words": self.words, "view": self.view}
        return sql.SQL(load_sql(name)).format(**{**names, **others})

    def are_made(self, connection: psycopg.Connection) -> bool:
        """Whether both tables are there."""
        return all_there(connection, [self.item, self.text])

    def create(self, connection: psycopg.Connection) -> None:
        """Make the tables if they are not there yet."""
        names = ("item_batch", "item_dirty", "text_item", "text_hash")
        indexes = {name: sql.Identifier(f"{self.collection}_{name}") for name in names}
        connection.execute(self.statement("table/collection", **indexes))


@dataclass(frozen=True)
class Destination(ABC):
    """The vectors of one collection under one fingerprint."""

    collection: str
    fingerprint: str
    dimension: int
    storage: Literal["halfvec", "vector"] = "halfvec"

    # --- names ---

    @property
    def tables(self) -> CollectionTables:
        return CollectionTables(self.collection)

    @property
    def name(self) -> str:
        return f"{self.collection}_vector_{self.fingerprint}"

    @property
    def identifier(self) -> sql.Identifier:
        """The table or view from which vectors are read."""
        return sql.Identifier("embeddings", self.name)

    @property
    def marker(self) -> sql.Identifier:
        """An empty table that is there while this is the current model: see embeddings.assert_model()."""
        return sql.Identifier("embeddings", self._marker_name)

    @property
    def lacking(self) -> sql.Identifier:
        """The view of the texts that lack their vector in this model."""
        return sql.Identifier("embeddings", f"{self.collection}_lacking_{self.fingerprint}")

    @property
    def _marker_name(self) -> str:
        return f"{self.collection}_current_{self.fingerprint}"

    @property
    def bytes_per_vector(self) -> int:
        return 8 + self.dimension * (2 if self.storage == "halfvec" else 4)

    @property
    def type(self) -> sql.Composed:
        """halfvec(n) or vector(n)."""
        return sql.SQL("{}({})").format(sql.SQL(self.storage), sql.Literal(self.dimension))

    @property
    @abstractmethod
    def counted(self) -> tuple[sql.Identifier, int]:
        """A table that grows with the vectors, and what it takes for each, in bytes."""

    @property
    @abstractmethod
    def identity(self) -> str | None:
        """What the destination was made for, as `embeddings.model` keeps it; it is made anew if that changes."""

    def statement(self, name: str, **others: sql.Composable) -> sql.Composed:
        """As `CollectionTables.statement`, with {vector} for `identifier`, {written} and {hash} for what says which
        texts have their vector, and {lacking} for the view of those that have none.
        """
        here = {"vector": self.identifier, "written": self.identifier, "hash": self.identifier, "lacking": self.lacking}
        return self.tables.statement(name, **{**here, **others})

    # --- making and removing it ---

    @abstractmethod
    def create(self, connection: psycopg.Connection) -> None:
        """Make what holds the current model's vectors, if it is not there yet."""

    @abstractmethod
    def add_changes(self) -> list[Change]:
        """What makes a shadow model's place."""

    @abstractmethod
    def is_as_declared(self, connection: psycopg.Connection) -> bool:
        """Whether what is there was made for what the definition says now."""

    @abstractmethod
    def check_exists(self, connection: psycopg.Connection) -> None:
        """ConfigurationError if the user has dropped what holds the vectors."""

    @abstractmethod
    def release(self, connection: psycopg.Connection) -> None:
        """Remove what `create` made, while nothing is committed."""

    @abstractmethod
    def removal(self, connection: psycopg.Connection) -> Layout:
        """What there is to drop. ModelChangeError if something else depends on it."""

    @abstractmethod
    def drop_changes(self, layout: Layout) -> list[Change]:
        """What removes the model's vectors; the last one frees their space."""

    @property
    @abstractmethod
    def drop_relations(self) -> list[sql.Identifier]:
        """The tables that `drop_changes` exclude others from."""

    def lacking_change(self, **others: sql.Composable) -> Change:
        """Makes the view of the texts that lack their vector in this model."""
        names = {"collection_name": sql.Literal(self.collection), "model_fingerprint": sql.Literal(self.fingerprint)}
        statement = self.statement("models/lacking", **{**names, **others})
        return Change(statement, f"ACCESS SHARE of {self.place}; the view is new")

    def drop_lacking_change(self) -> Change:
        """Drops that view."""
        return Change(self.statement("models/drop_lacking"), "ACCESS EXCLUSIVE of it, which is ours")

    def show(self, connection: psycopg.Connection) -> None:
        """Point the collection's view at this model."""
        connection.execute(self.view_change().statement)

    def view_change(self) -> Change:
        """What points the collection's view at this model."""
        statement = self.statement("table/view", bare_type=sql.SQL(self.storage))
        return Change(statement, f"ACCESS EXCLUSIVE of the view embeddings.{self.collection}")

    def view_option_changes(self, rights: ModelRights) -> list[Change]:
        """What gives the view its options again, which `view_change` takes away."""
        return option_changes(self.tables.view, (), rights.view_options)

    def mark(self, connection: psycopg.Connection) -> None:
        """Make the marker of the current model if it is not there yet."""
        connection.execute(self.statement("table/create_marker", marker=self.marker))

    def marker_change(self, shadow: "Destination") -> Change:
        """What marks another model as the current one in this one's place."""
        name = sql.Identifier(shadow._marker_name)
        statement = self.statement("table/marker", marker=self.marker, new_name=name)
        return Change(statement, "ACCESS EXCLUSIVE of the marker, an empty table")

    # --- who may read it ---

    @property
    @abstractmethod
    def kept(self) -> list[sql.Identifier]:
        """The tables and views that the pipeline keeps of this model alone."""

    def is_made(self, connection: psycopg.Connection) -> bool:
        """Whether all of them are there."""
        return all_there(connection, self.kept)

    def rights(self, connection: psycopg.Connection) -> ModelRights:
        """Who may do what with them; what they get when they are made, if they are not there yet."""
        *kept, view = rights_of(connection, [*self.kept, self.tables.view])
        return ModelRights(tuple(kept), view.options)

    def rights_changes(self, own: ModelRights, wanted: ModelRights) -> list[Change]:
        """What gives this model's tables and views the owner, grants and policies of another model's."""
        of_each = zip(self.kept, own.kept, wanted.kept, strict=True)
        return [change for relation, one, other in of_each for change in rights_changes(relation, one, other)]

    # --- vectors within a commit ---

    @abstractmethod
    def delete(self, connection: psycopg.Connection, *, coming: Sequence[str] | None) -> int:
        """Within a commit: delete the vectors of the texts in its table `commit_gone (id)`; how many. coming: the items
        whose vectors `write` brings next; None if the commit's own vectors are another model's.
        """

    @abstractmethod
    def write(
        self, connection: psycopg.Connection, vectors: Mapping[str, Column], before: NDArray, *, adopt: bool
    ) -> int:
        """Within a commit: write vectors, as `put` has them, if they are not there or `encoded` anew; how many. before:
        whose texts were there (n,). adopt: what the user's own column has is this model's, and stays if its row does.
        """

    @abstractmethod
    def adoptable_items(self, connection: psycopg.Connection, item_keys: Sequence[str]) -> set[str]:
        """Which of these items have a vector that would be adopted, if they were committed as they are."""

    @abstractmethod
    def adopted_vectors(
        self, connection: psycopg.Connection, item_keys: Sequence[str], row_hashes: Sequence[bytes]
    ) -> tuple[NDArray, NDArray]:
        """Places in `item_keys` (n,), and vectors (n, dimension), of items that have one, are never committed, and are
        as they were first seen.
        """

    # --- vectors of a backfill ---

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """How much of a backfill is written together."""

    @abstractmethod
    def put(self, connection: psycopg.Connection, columns: Mapping[str, Column]) -> None:
        """Under the batch's lock: vectors of texts that have none. columns: text_id, vector_name, content_hash, and
        embedding (n, dimension).
        """

    @abstractmethod
    def put_ahead(self, batches: int, texts: int) -> PutAhead | None:
        """How so much is written before the batches' locks are taken; None if all of it waits for them.

        It does what `put` does, in short transactions; texts that change meanwhile are left out. `kept` is called in
        each: it raises if the model is kept no longer.
        """

    @abstractmethod
    def prepared(self, connection: psycopg.Connection) -> AbstractContextManager[None]:
        """While a backfill writes: the settings that it needs."""

    @abstractmethod
    def restore(self, connection: psycopg.Connection) -> None:
        """End what `prepared` began, though its process was killed."""

    @abstractmethod
    def setting_changes(self, connection: psycopg.Connection) -> tuple[list[Change], list[Change]]:
        """The settings that `prepared` changes, and how it changes them back."""

    @abstractmethod
    def put_changes(self) -> list[Change]:
        """What `put_ahead` does, or `put` if there is nothing to write ahead."""

    @abstractmethod
    def vectors_per_second(self, connection: psycopg.Connection) -> int:
        """How many vectors a backfill writes a second, about: see BENCHMARKS.md."""

    # --- ANN indexes ---

    @abstractmethod
    def layout(self, connection: psycopg.Connection) -> Layout:
        """What the model's vectors are called in the catalog now; what they will be called if it is not made yet."""

    @abstractmethod
    def current_layout(self, connection: psycopg.Connection) -> Layout:
        """The current model's layout, if its indexes are the pattern for this one's."""

    @abstractmethod
    def wants_index(self, config: IndexDefinition) -> bool:
        """Whether the definition asks for an ANN index here."""

    @abstractmethod
    def index_methods(self, connection: psycopg.Connection, config: IndexDefinition) -> list[str]:
        """The methods of the ANN indexes that a candidate gets if this is the current model."""

    @abstractmethod
    def index_changes(
        self,
        config: IndexDefinition,
        rows: Mapping[str, int],
        own: Layout,
        current: Layout,
        *,
        sizes_known: bool = True,
    ) -> list[IndexChange]:
        """What makes the ANN indexes of `own` what they are to be, in order. rows: of each vector name; without
        `sizes_known`, an index that rows have outgrown does.
        """

    @abstractmethod
    def manages(self, index: AnnIndex) -> bool:
        """Whether an ANN index is one that `index_changes` makes; others are strangers'."""

    # --- a model change ---

    @property
    @abstractmethod
    def user_tables(self) -> list[sql.Identifier]:
        """The user's own tables that a change of the model alters."""

    @property
    @abstractmethod
    def place(self) -> str:
        """The table that is written to, for people."""

    @abstractmethod
    def check_candidate(self, connection: psycopg.Connection, candidate: "Destination", *, is_kept: bool) -> None:
        """ModelChangeError if a candidate cannot be made beside this current model. is_kept: it is made already."""

    @abstractmethod
    def check_exchange(self, connection: psycopg.Connection, shadow: "Destination") -> None:
        """ModelChangeError if a shadow model cannot take this current model's place."""

    @abstractmethod
    def exchange(self, own: Layout, shadow: Layout) -> Exchange:
        """What gives a shadow model the place of this current one, beyond the view and the marker."""

    @abstractmethod
    def lost_vectors(self, connection: psycopg.Connection) -> tuple[int, str]:
        """Vectors that would be lost with this previous model, since nothing has them in the current one; how many,
        and where they are.
        """

    def needed_bytes(self, texts: int, method: str) -> int:
        """What that many vectors take on disk, with their index, in bytes."""
        rows = texts * (self.bytes_per_vector + ROW_BYTES)
        return round(rows + (INDEX_FACTOR * texts * self.bytes_per_vector if method != "none" else 0))

    @abstractmethod
    def freed_bytes(self, texts: int, method: str) -> int:
        """What is free again at once when the model is dropped, in bytes."""
