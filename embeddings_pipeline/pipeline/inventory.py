"""What there is of a collection, whether or not it is still defined: in the database, in the lake and on this disk."""

from dataclasses import dataclass
from pathlib import Path

import psycopg
import pyarrow.fs as pafs
from psycopg import sql

from embeddings_pipeline.config.definition import collection_name
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.lake import open_lake
from embeddings_pipeline.store.schema import has_schema
from embeddings_pipeline.store.sql import load_sql


@dataclass(frozen=True)
class Inventory:
    """What is kept of one collection. Sizes are in bytes."""

    name: str
    in_database: bool
    renamed_from: str | None  # the renaming that has begun and not ended
    profile: str | None  # of the current model
    items: int
    vectors: int  # of the current model
    tables: tuple[str, ...]  # in the schema `embeddings`
    views: tuple[str, ...]
    user_columns: tuple[str, ...]  # of the user's own tables, with vectors in them
    database_bytes: int
    lake: str | None  # its folder
    lake_bytes: int
    faiss: Path | None
    faiss_bytes: int

    @property
    def exists(self) -> bool:
        """Whether anything at all is kept of it."""
        return self.in_database or bool(self.tables or self.views or self.lake or self.faiss)

    @property
    def bytes(self) -> int:
        return self.database_bytes + self.lake_bytes + self.faiss_bytes


def known_collections(database: Database) -> list[str]:
    """The names of the collections that the database knows."""
    if not has_schema(database):
        return []
    with database.connect(autocommit=True) as connection:
        return [row[0] for row in connection.execute(load_sql("collection/listed"))]


def empty_inventory(name: str) -> Inventory:
    """Nothing, of a collection of that name."""
    return Inventory(name, False, None, None, 0, 0, (), (), (), 0, None, 0, None, 0)


def take_inventory(database: Database, settings: Settings, name: str) -> Inventory:
    """What there is of a collection. Nothing is written. ConfigurationError if none can be called so: the name is part
    of paths and patterns.
    """
    try:
        collection_name(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    with database.connect(autocommit=True) as connection:
        is_there = has_schema(database)
        rows = {row[0]: row[1:] for row in connection.execute(load_sql("collection/listed"))} if is_there else {}
        renamed_from, fingerprint, profile = rows.get(name, (None, None, None))
        relations = connection.execute(load_sql("collection/relations"), {"collection": name}).fetchall()
        tables = tuple(relation for relation, kind, _ in relations if kind == "r")
        views = tuple(relation for relation, kind, _ in relations if kind == "v")
        counted = (f"{name}_item", f"{name}_vector_{fingerprint}")
        items, vectors = (_count(connection, each) if each in (*tables, *views) else 0 for each in counted)
        shown = [sql.Identifier("embeddings", view).as_string(connection).replace('"', "") for view in views]
        columns = connection.execute(load_sql("collection/user_columns"), {"views": shown}).fetchall() if shown else []
    lake, lake_bytes = _lake_folder(settings, name)
    faiss = faiss_folder(settings, name)
    return Inventory(
        name=name,
        in_database=name in rows,
        renamed_from=renamed_from,
        profile=profile,
        items=items,
        vectors=vectors,
        tables=tables,
        views=views,
        user_columns=tuple(row[0] for row in columns),
        database_bytes=sum(size for *_, size in relations),
        lake=lake,
        lake_bytes=lake_bytes,
        faiss=faiss if faiss.is_dir() else None,
        faiss_bytes=sum(file.stat().st_size for file in faiss.rglob("*") if file.is_file()),
    )


def faiss_folder(settings: Settings, name: str) -> Path:
    """Where a collection's FAISS generations are."""
    return settings.state_dir / "faiss" / name


def _count(connection: psycopg.Connection, relation: str) -> int:
    table = sql.Identifier("embeddings", relation)
    row = connection.execute(sql.SQL(load_sql("collection/count")).format(table=table)).fetchone()
    return row[0] if row else 0


def _lake_folder(settings: Settings, name: str) -> tuple[str | None, int]:
    lake = open_lake(settings)
    folder = f"{lake.root}/{name}"
    if lake.filesystem.get_file_info(folder).type != pafs.FileType.Directory:
        return None, 0
    files = lake.filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    return folder, sum(file.size or 0 for file in files if file.is_file)
