"""What tests of hosted models share."""

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import hosted
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, films, make_films, sync_once


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts, shortened."""
    monkeypatch.setattr(hosted, "FIRST_WAIT", 0.01)


@pytest.fixture
def films_known(database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that knows the collection `films`."""
    monkeypatch.setattr(retry, "OUTAGE_FIRST_WAIT_SECONDS", 0.01)
    make_films(database, films(1))
    sync_once(definition(), settings)


@pytest.fixture
def jobs(database: Database, settings: Settings) -> BatchJobs:
    return BatchJobs(database, settings, "films")
