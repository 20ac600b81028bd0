"""What tests of the pipeline share: a small collection over a real table, and its steps run without Dagster."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.pipeline import run_batch as pipeline
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.pipeline.commit import commit_batches
from embeddings_pipeline.pipeline.embed import EmbedOptions, embed_batches
from embeddings_pipeline.pipeline.figures import Committed, RunFigures
from embeddings_pipeline.pipeline.read import read_items
from embeddings_pipeline.pipeline.render import render_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.source import Source
from embeddings_pipeline.store.source_rows import SourceRows
from embeddings_pipeline_tests.support import databases

PROFILE = {
    "name": "test",
    "provider": "python",
    "model": "embeddings_pipeline_tests.support.deterministic:DeterministicEncoder",
    "dimensions": 32,
}


def definition(name: str = "films", **attributes: Any) -> CollectionDefinition:
    """A collection over the table `films`, with the deterministic encoder; attributes as in a `defs.yaml`."""
    defaults: dict[str, Any] = {
        "name": name,
        "source": {"table": "films", "key": ["id"]},
        "columns": ["title", "revenue"],
        "vectors": {"base": "{title} | {overview}"},
        "profile": PROFILE,
        "items_per_batch": 10,
    }
    return CollectionDefinition(CollectionAttributes.model_validate({**defaults, **attributes}))


def by_name(*profiles: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Profiles as `profiles:` of a definition has them: the name is the key."""
    return {one["name"]: {key: value for key, value in one.items() if key != "name"} for one in profiles}


def make_films(database: Database, rows: Iterable[tuple[int, str | None, str | None, int | None]]) -> None:
    """The table `films` with these rows: id, title, overview, revenue."""
    with database.connect() as connection:
        connection.execute(
            "CREATE TABLE films (id bigint PRIMARY KEY, title text, overview text, revenue bigint, note text)"
        )
        with connection.cursor() as cursor:
            cursor.executemany("INSERT INTO films VALUES (%s, %s, %s, %s)", list(rows))


def films(number: int) -> list[tuple[int, str | None, str | None, int | None]]:
    return [(n, f"Film {n}", f"A story about number {n} and its friends", 1000 + n) for n in range(1, number + 1)]


def execute(database: Database, statement: str | sql.Composable, parameters: Any = None) -> list[tuple[Any, ...]]:
    """Run one statement, committed; its rows if it has any."""
    with database.connect() as connection:
        cursor = connection.execute(statement, parameters)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def wait_until(holds: Callable[[], bool], seconds: float = 60, *, pause: float = 0.05) -> None:
    """Look again and again until something holds; after a longer pause if looking is itself work."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(pause)


@contextmanager
def plain_role(database: Database, name: str) -> Iterator[str]:
    """The database's URL for a role without special rights, which owns what is ours; it is gone afterwards."""
    if not databases.rights(database).superuser:
        pytest.skip("the role of EMBEDDINGS_TESTS_DATABASE_URL may not make roles")
    wait_until(lambda: not execute(database, "SELECT 1 FROM pg_roles WHERE rolname = %s", [name]))  # another worker's
    execute(database, f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
    try:
        relations = f"""SELECT format('ALTER TABLE embeddings.%I OWNER TO {name}', relname) FROM pg_class
                        WHERE relnamespace = 'embeddings'::regnamespace AND relkind IN ('r', 'v')"""
        for (change,) in execute(database, relations):
            execute(database, change)
        execute(database, f"ALTER SCHEMA embeddings OWNER TO {name}")
        yield databases.as_role(database, name, name).url
    finally:
        execute(database, f"REASSIGN OWNED BY {name} TO CURRENT_USER")
        execute(database, f"DROP OWNED BY {name}")
        execute(database, f"DROP ROLE {name}")


def run_batch(collection: Collection, batch: int, run: str, **options: Any) -> RunFigures:
    """One batch, as a run does it; options as `EmbedOptions` has them."""
    return pipeline.run_batch(collection, [batch], run, options=EmbedOptions(**options))


def prepare_batch(collection: Collection, batch: int, run: str, **options: Any) -> None:
    """The steps of one batch before its commit."""
    read_items(collection, [batch], run)
    render_texts(collection, batch, run)
    list(embed_batches(collection, [batch], run, EmbedOptions(**options)))


def commit_batch(collection: Collection, batch: int, run: str) -> Committed:
    """The commit of one batch."""
    return commit_batches(collection, [batch], run)[batch]


def run_without_shadows(collection: Collection, batch: int, run: str) -> None:
    """One batch as a run does it that dies before its shadow models get their vectors."""
    prepare_batch(collection, batch, run)
    commit_batch(collection, batch, run)


def sync_once(
    one: CollectionDefinition, settings: Settings, run: str = "run", **options: Any
) -> tuple[Collection, int]:
    """Scan and every dirty batch; the opened collection and how many texts were encoded."""
    collection = open_collection(one, settings)
    collection.ledger.full_scan(collection.source)
    encoded = 0
    for batch in collection.ledger.dirty_batches():
        encoded += run_batch(collection, batch, run, **options).embedded
    return collection, encoded


def committed(database: Database, name: str = "films") -> dict[str, tuple[str, str, Any]]:
    """item key → (text, content hash, payload) of every vector in the collection's view."""
    rows = execute(
        database,
        f"""SELECT v.item_key, v.text, t.content_hash, v.payload
            FROM embeddings.{name} v JOIN embeddings.{name}_text t USING (item_key, vector_name, chunk)""",
    )
    return {key: (text, bytes(digest).hex(), payload) for key, text, digest, payload in rows}


def later(database: Database, seconds: int) -> None:
    """Move what waits for its next try forward, as if time had passed."""
    for table in ("batch", "quarantine", "quarantined_item"):
        execute(database, f"UPDATE embeddings.{table} SET next_try = next_try - interval '{seconds} s'")


def overview(database: Database, film: int) -> str | None:
    """The overview in the vectors' text of a film; None if it has no vector."""
    found = committed(database).get(str(film))
    return found[0].split(" | ", 1)[1] if found else None


def edit(database: Database, film: int, text: str | None) -> None:
    """Give a film this overview, new or not; None deletes it."""
    if text is None:
        execute(database, "DELETE FROM films WHERE id = %s", [film])
    else:
        execute(
            database,
            "INSERT INTO films VALUES (%s, %s, %s, 0) ON CONFLICT (id) DO UPDATE SET overview = excluded.overview",
            [film, f"Film {film}", text],
        )


class OldSnapshot(Source):
    """A source whose scan returns what it saw at an earlier moment."""

    def remember(self) -> "OldSnapshot":
        with self.connect() as connection:
            object.__setattr__(self, "_seen", list(super().scan(connection)))
        return self

    def scan(self, connection: Any, apart: Any = ()) -> Any:
        seen: list[SourceRows] = self._seen  # type: ignore[attr-defined]
        return iter(seen)


def forget_vectors(database: Database, settings: Settings) -> None:
    """As if every vector were lost, in the table and in the lake."""
    [(table,)] = execute(database, "SELECT 'films_vector_' || fingerprint FROM embeddings.collection")
    execute(database, f"DELETE FROM embeddings.{table}")
    for file in (settings.state_dir / "lake" / "films" / "embeddings").rglob("*.parquet"):
        file.unlink()
