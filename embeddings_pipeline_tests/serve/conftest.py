"""Films that are served, with the deterministic encoder."""

from pathlib import Path

import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.index.words import ensure_words
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.model_change import OTHER
from embeddings_pipeline_tests.support.serving import write_definitions
from embeddings_pipeline_tests.support.workbench import by_name, definition, films, make_films, sync_once


@pytest.fixture
def one() -> CollectionDefinition:
    return definition(filters={"revenue": "number", "title": "text"}, profiles=by_name(OTHER))


@pytest.fixture
def served(database: Database, settings: Settings, tmp_path: Path, one: CollectionDefinition) -> Settings:
    """Settings of a service that has 25 films, one of them with a number that no float holds."""
    rows = [*films(24), (25, "Film 25", "A story about number 25 and its friends", 9007199254740993)]
    make_films(database, rows)
    sync_once(one, settings)
    folder = write_definitions(tmp_path / "defs", one)
    return settings.model_copy(update={"embeddings_defs_dir": folder})


@pytest.fixture
def worded(database: Database, served: Settings, tmp_path: Path, one: CollectionDefinition) -> Settings:
    """The same, of films whose words are looked for too, in PostgreSQL."""
    with_words = definition(**{**one.attributes.model_dump(exclude_defaults=True, mode="json"), "words": {}})
    sync_once(with_words, served)
    ensure_words(database, with_words)
    return served.model_copy(update={"embeddings_defs_dir": write_definitions(tmp_path / "worded", with_words)})
