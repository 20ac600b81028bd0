"""The collections whose model is changed: films in a table of ours, segments with a column of their own."""

from collections.abc import Iterator

import pytest

from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.model_change import WIDE
from embeddings_pipeline_tests.support.model_change import (
    definition as films_definition,
)
from embeddings_pipeline_tests.support.segments import (
    as_text,
    words,
)
from embeddings_pipeline_tests.support.workbench import (
    execute,
    films,
    make_films,
    sync_once,
)


@pytest.fixture
def collection(database: Database, settings: Settings) -> Collection:
    """Twenty-five films in three batches, committed."""
    make_films(database, films(25))
    return sync_once(films_definition(), settings)[0]


@pytest.fixture
def table(database: Database, settings: Settings) -> Database:
    """Twenty-five segments, twenty of them with vectors of the model `wide`, and an IVFFlat index."""
    execute(
        database,
        "CREATE TABLE segments (id bigint PRIMARY KEY, video text, words text, embedding vector(48), note text)",
    )
    encoder = load_encoder(resolve_profile(WIDE, settings), settings)
    with database.connect() as connection:
        for n in range(1, 26):
            vector = as_text(encoder.encode_documents([words(n)])[0]) if n <= 20 else None
            connection.execute("INSERT INTO segments VALUES (%s, 'a', %s, %s, 'mine')", [n, words(n), vector])
    execute(
        database,
        "CREATE INDEX segments_embedding ON segments USING ivfflat (embedding vector_cosine_ops) WITH (lists = 2)",
    )
    DeterministicEncoder.reset()
    return database


@pytest.fixture
def restless_autovacuum(superuser: None, server: Database) -> Iterator[None]:
    """Autovacuum looks for work every second, in every database of the tests' server."""

    def configure(change: str) -> None:
        with server.connect(autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM {change}")  # type: ignore[arg-type]
            connection.execute("SELECT pg_reload_conf()")

    configure("SET autovacuum_naptime = '1s'")
    yield
    configure("RESET autovacuum_naptime")
