"""Fixtures for all tests: an embedded PostgreSQL for each worker, and a fresh database with the schema for each test.

The suite runs on three workers for two cores (pytest-xdist); one file or one test, named alone, runs in the process
itself. `-n 0` does so for more, `-n 2` takes another number. What is marked `slow` runs first, all of process/ is, and
`make test-fast` leaves it out. A test's databases, Dagster's too, are copies of templates, made once for each worker.

EMBEDDINGS_TESTS_DATABASE_URL names another server than the embedded one, by a database of its own for tests:
- a superuser: every test runs, but those of the embedded server itself;
- a role that owns the database, in which an administrator has installed pgvector, and may create others: as before, but
  what needs other roles or extensions is skipped;
- a role that owns the database and no more: `test` must be in its name, since all that the role has in it is dropped
  before each test, it serves one process (`-n 0`), and what needs a second database, as Dagster does, is skipped too.
DATABASE_URL itself is never looked at: it may name the developer's own data.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from xdist.scheduler import LoadScopeScheduling

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.instance.storage import PipelineStorage
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.schema import ensure_schema
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.databases import Rights
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer

# What would lead a test to the developer's own database, model or account.
DEPLOYMENT = re.compile(r"DATABASE_URL|DAGSTER_HOME|OPENAI_.*|LAKE_URI|EMBEDDING_.*|EMBEDDINGS_STATE_DIR|PG[A-Z]+")


PROJECT = Path(__file__).resolve().parents[1]
MOST_WORKERS = 8
# Their tests share a deployment and a browser, or a model: one worker has them all.
DEAR_FIXTURES = {"test_ui.py", "test_meaning.py", "test_encoders.py"}

# Thousands of small files: servers, state folders. In memory, if there is room, a test is quicker by a third.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if "TMPDIR" not in os.environ and MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
    there = os.statvfs(MEMORY)
    if there.f_bavail * there.f_frsize >= ROOM and not there.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a script's background job: its children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers on two cores, since tests wait half of their time. None if only one file or test is named, so that
    everything is seen at once.
    """
    if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).suffix == ".py":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + (cores + 1) // 2, MOST_WORKERS)


class Scheduler(LoadScopeScheduling):
    """Hands out test by test, in their order, but the tests of a file with dear fixtures together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if Path(file).name in DEAR_FIXTURES else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """A worker cannot send half a character, such as a failure may show, and would end without a word."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _sendable(each) for name, each in value.items()}
    return type(value)(map(_sendable, value)) if isinstance(value, list | tuple) else value


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is named at once: a run may be killed before its end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})", file=sys.__stderr__, flush=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of process/ is slow, and what has Dagster's tables or a server of its own (the fixture `state`). What is slow
    comes first, so that no worker waits for the last one in the end.
    """
    for item in items:
        if item.path.parent.name == "process" or {"dagster_tables", "state"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A test that left SIGINT ignored would have Dagster ignore SIGTERM, and every later child of the worker too."""
    former = signal.getsignal(signal.SIGINT)
    yield
    left = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, former)
    assert left == former


@pytest.fixture(autouse=True)
def _encoder_as_new() -> None:
    """What the test before had the encoder of the tests do is over."""
    DeterministicEncoder.reset()


@pytest.fixture(scope="session", autouse=True)
def _no_deployment(open_folder: Path) -> Iterator[None]:
    """Tests know nothing of the developer's deployment (environment, `.env`, `.state`), and ask nothing of the network.

    DAGSTER_HOME is a folder of the session's own, with the project's dagster.yaml.
    """
    home = open_folder / "home"
    home.mkdir()
    (home / "dagster.yaml").symlink_to(PROJECT / "dagster.yaml")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if DEPLOYMENT.fullmatch(name):
                patch.delenv(name)
        patch.setenv("DAGSTER_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def skip_without() -> Callable[[str, bool], None]:
    """`skip_without("chromium", there)`: skip where a machine lacks something; fail where CI has installed it."""
    required = os.environ.get("EMBEDDINGS_TESTS_REQUIRE", "").split()

    def skip(what: str, there: bool) -> None:
        if not there and what in required:
            pytest.fail(f"{what} is missing, and this environment promises it")
        if not there:
            pytest.skip(f"{what} is missing")

    return skip


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may pass through: as root, PostgreSQL runs as another user."""
    folder = Path(tempfile.gettempdir()) / f"embeddings-tests-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server(open_folder: Path) -> Iterator[Database]:
    """The session's server: a database of it that is there from the start. Tests take `database`."""
    if given := os.environ.get("EMBEDDINGS_TESTS_DATABASE_URL"):
        database = open_database(Settings(database_url=given))
    else:
        database = open_database(Settings(embeddings_state_dir=open_folder))
        with database.connect(autocommit=True) as connection:
            for setting in ("fsync", "full_page_writes", "synchronous_commit"):  # nothing has to survive the machine
                connection.execute(f"ALTER SYSTEM SET {setting} = off")  # type: ignore[arg-type]
            connection.execute("SELECT pg_reload_conf()")
    yield database
    database.close()


@pytest.fixture(scope="session")
def rights(server: Database) -> Rights:
    return databases.rights(server)


@pytest.fixture(scope="session")
def embedded(server: Database) -> None:
    """For tests that read or change the embedded server's files."""
    if not server.embedded:
        pytest.skip("EMBEDDINGS_TESTS_DATABASE_URL names another server than the embedded one")


@pytest.fixture(scope="session")
def superuser(rights: Rights) -> None:
    """For tests that make roles or extensions, or change the server's settings."""
    if not rights.superuser:
        pytest.skip("the role of EMBEDDINGS_TESTS_DATABASE_URL is no superuser")


@pytest.fixture(scope="session")
def new_databases(rights: Rights) -> None:
    """For tests that make databases of their own."""
    if not rights.create_databases:
        pytest.skip("the role of EMBEDDINGS_TESTS_DATABASE_URL may not create databases")


@pytest.fixture(scope="session")
def template(server: Database, rights: Rights) -> Iterator[str | None]:
    """The name of a database with the schema and nothing else, which each test's database is a copy of.

    None if the role may not create databases: then the server's one database is kept for this process.
    """
    if not rights.create_databases:
        with databases.kept(server):
            yield None
        return
    name = f"tests_{uuid.uuid4().hex[:8]}_template"
    if rights.superuser:
        ensure_schema(replace(server, url=server.ensure_sibling(name)))
    else:  # only a superuser can install pgvector
        ensure_schema(databases.copied(server, name, databases.name_of(server)))
    yield name
    databases.dropped(server, name)


@pytest.fixture(scope="session")
def dagster_template(server: Database, new_databases: None, open_folder: Path) -> Iterator[str]:
    """The name of a database with Dagster's tables, still empty: making them anew takes a second."""
    name = f"tests_{uuid.uuid4().hex[:8]}"
    settings = Settings(database_url=server.ensure_sibling(name), embeddings_state_dir=open_folder / name)
    storage = PipelineStorage(settings)
    for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
        part.dispose()
    databases.dropped(server, name)
    yield f"{name}_dagster"
    databases.dropped(server, f"{name}_dagster")


@pytest.fixture
def database(server: Database, template: str | None) -> Iterator[Database]:
    """A database of this test's own, with the schema."""
    if template is None:
        databases.emptied(server)
        yield databases.with_schema(server)
    else:
        name = f"test_{uuid.uuid4().hex[:12]}"
        database = databases.copied(server, name, template)
        yield database
        databases.forgotten(database)
        databases.dropped(server, name)


@pytest.fixture
def service() -> Iterator[EmbeddingServer]:
    """A server of embeddings on loopback, of this test's own."""
    with EmbeddingServer() as service:
        yield service


@pytest.fixture
def dagster_tables(server: Database, database: Database, dagster_template: str) -> Iterator[None]:
    """Dagster's database beside this test's, with Dagster's tables."""
    name = f"{databases.name_of(database)}_dagster"
    databases.copied(server, name, dagster_template)
    yield
    databases.dropped(server, name)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Models converted for OpenVINO, by any worker: each takes some seconds."""
    session = tmp_path_factory.getbasetemp()
    folder = (session if worker_id == "master" else session.parent) / "encoders"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def encoder_settings(converted: Path) -> Settings:
    """Settings for `load_encoder` alone."""
    return Settings(embeddings_state_dir=converted.parent)


@pytest.fixture
def settings(database: Database, tmp_path: Path, converted: Path) -> Settings:
    """Settings as they are when DATABASE_URL names this test's database; what is written goes below tmp_path."""
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "encoders").symlink_to(converted)
    return Settings(database_url=database.url, embeddings_state_dir=tmp_path / ".state")


@pytest.fixture
def project(database: Database, dagster_tables: None, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The environment in which Dagster, and processes of our own, find this test's database and state folder."""
    monkeypatch.setenv("DAGSTER_HOME", str(PROJECT))
    monkeypatch.setenv("DATABASE_URL", database.url)
    monkeypatch.setenv("EMBEDDINGS_STATE_DIR", str(settings.state_dir))
    return settings


@pytest.fixture
def instance(project: Settings) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.get() as instance:
        yield instance
