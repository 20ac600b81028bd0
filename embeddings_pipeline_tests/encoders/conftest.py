"""What tests of hosted models share, and those of models that are converted."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.sentence_transformer.modules import Pooling

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import conversion, convert, hosted, load_encoder
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.conversions import Load, profile_of
from embeddings_pipeline_tests.support.tiny_models import sentence_model
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


@pytest.fixture
def mine(tmp_path: Path) -> Profile:
    return profile_of(sentence_model(tmp_path / "model", Pooling(32)))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def load(state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Load]:
    """Load a profile as a new process would. The conversion is done in this one, which has imported torch."""

    def here(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        convert.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def load(profile: Profile, settings: Settings | None = None) -> Encoder:
        caplog.clear()
        monkeypatch.setattr("embeddings_pipeline.encoders._loaded", {})
        return load_encoder(profile, settings or Settings(embeddings_state_dir=state))

    monkeypatch.setattr(conversion.subprocess, "run", here)
    yield load
