"""Where Dagster keeps runs, events and files: on the pipeline's PostgreSQL server, and below the state folder.

`dagster.yaml` names these classes, so that plain `dg dev` and `dagster dev` find them, wherever they are started.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from psycopg.conninfo import make_conninfo
from sqlalchemy.dialects.postgresql import psycopg2

from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.orchestration.dagster_internals import (
    CapturedLogContext,
    ConfigurableClass,
    ConfigurableClassData,
    DagsterStorage,
    LocalArtifactStorage,
    LocalComputeLogManager,
    PostgresRunStorage,
    PostgresScheduleStorage,
    touch_file,
)
from embeddings_pipeline.orchestration.instance.event_log import PipelineEventLogStorage
from embeddings_pipeline.orchestration.instance.pool import Pooled
from embeddings_pipeline.store.dagster_database import dagster_database_name
from embeddings_pipeline.store.database import Database, one_line, open_database, quoted
from embeddings_pipeline.store.session import OUR_NETWORK
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.store.urls import url_of


def dagster_database(settings: Settings) -> tuple[Database, Database]:
    """Dagster's database, which is created if it is missing, and the pipeline's database beside it.

    Raises DatabaseError with the statement for an administrator if this user may not create it.
    """
    database = open_database(settings)
    with database.connect() as connection:
        name = dagster_database_name(connection.info.dbname, embedded=database.embedded)
    url = database.ensure_sibling(name)
    return _with_a_schema(Database(url, database.server)), database


def _with_a_schema(database: Database) -> Database:
    """The database, whose sessions make tables in `public` if the role may make none in the first schema of its search
    path. DatabaseError if it may not make them there either.
    """
    with database.connect(autocommit=True) as connection:
        [(in_first, in_public)] = connection.execute(load_sql("dagster/schemas")).fetchall()
        if in_first:
            return database
        if not in_public:
            raise DatabaseError(
                f"{database.name_and_host}: this user may not make Dagster's tables; an administrator runs there: "
                f"GRANT CREATE ON SCHEMA public TO {quoted(connection.info.user)}"
            )
    options = f"{database.parts.get('options', '')} -c search_path=public".strip()
    return Database(url_of(database.parts | {"options": options}), database.server)


@dataclass(frozen=True)
class _Password:
    """What Dagster asks for a password at each connection, so that it stands in no URL."""

    password: str = field(repr=False)

    def get_token(self) -> str:
        return self.password


def _for_dagster(database: Database) -> dict[str, Any]:
    """What Dagster's storages connect by. libpq reads the parts of the address, and SQLAlchemy none of them, since it
    takes several hosts, socket folders and names for something else.
    """
    parts = OUR_NETWORK | database.parts
    password = parts.pop("password", None)
    dsn = make_conninfo(**parts)
    try:
        psycopg2.dialect.import_dbapi().extensions.parse_dsn(dsn)
    except psycopg2.dialect.import_dbapi().ProgrammingError as error:
        raise DatabaseError(
            f"{database.name_and_host}: Dagster's libpq is older, and does not know each parameter of the address "
            f"({one_line(error)}); leave it out"
        ) from None
    return {
        "postgres_url": f"postgresql://?{urlencode({'dsn': dsn})}",
        "token_provider": _Password(password) if password else None,
    }


T = TypeVar("T", bound=Pooled)


class _RunStorage(Pooled, PostgresRunStorage):
    pass


class _ScheduleStorage(Pooled, PostgresScheduleStorage):
    pass


class PipelineStorage(DagsterStorage, ConfigurableClass):
    """dagster-postgres on the server of the pipeline's database; an embedded server is started by it."""

    def __init__(self, settings: Settings, inst_data: ConfigurableClassData | None = None) -> None:
        # Without it Dagster writes each partition's events one by one: minutes for a thousand partitions in a run.
        os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "200")
        dagsters, database = dagster_database(settings)
        address = _for_dagster(dagsters)
        self._inst_data = inst_data
        with _tables_made_once(dagsters) as made:
            address["should_autocreate_tables"] = not made  # else each storage looks at every table first
            self._runs = _pooled(_RunStorage(**address), database)
            self._events = _pooled(PipelineEventLogStorage(**address), database)
            self._schedules = _pooled(_ScheduleStorage(**address), database)
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @property
    def run_storage(self) -> PostgresRunStorage:
        return self._runs

    @property
    def event_log_storage(self) -> PipelineEventLogStorage:
        return self._events

    @property
    def schedule_storage(self) -> PostgresScheduleStorage:
        return self._schedules

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "PipelineStorage":
        return cls(load_settings(), inst_data)


def _pooled(storage: T, database: Database) -> T:
    storage.database = database
    # No time limit: migrations take long. The webserver sets its own, through the same method.
    storage.optimize_for_webserver(statement_timeout=0, pool_recycle=3600, max_overflow=20)
    return storage


@contextlib.contextmanager
def _tables_made_once(database: Database) -> Iterator[bool]:
    """Whether Dagster has its tables. Webserver, daemon and code server start together, and each would make them."""
    with database.connect(autocommit=True) as connection:
        # Schedules are the last of the three storages that are made.
        [(made,)] = connection.execute("SELECT to_regclass('instigators') IS NOT NULL").fetchall()
        if not made:
            connection.execute("SELECT pg_advisory_lock(hashtext('dagster tables'))")  # until the session ends
        yield made


class StateArtifactStorage(LocalArtifactStorage):
    """Dagster's local files, in the state folder's `dagster`, whatever the current folder is."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "StateArtifactStorage":
        return cls(str(load_settings().state_dir / "dagster"), inst_data)


@contextlib.contextmanager
def _children_end_by_sigterm() -> Iterator[None]:
    """A script's background job ignores SIGINT; Dagster then ignores SIGTERM too, and so would the processes that it
    starts here to copy what a run prints: it would wait 30 s for each of them to end.
    """
    ignored = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    )
    if ignored:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StateComputeLogs(LocalComputeLogManager):
    """What runs print, in the state folder's `dagster/logs`; of a `sync`, it belongs to the terminal."""

    capturing = True

    @property
    def folder(self) -> Path:
        """Where each run has a folder."""
        return Path(self._base_dir)

    @contextlib.contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        if self.capturing:
            with contextlib.ExitStack() as captures:
                with _children_end_by_sigterm():
                    captured = captures.enter_context(super().capture_logs(log_key))
                yield captured
        else:  # two processes less for each run
            yield CapturedLogContext(log_key)
            touch_file(self.complete_artifact_path(log_key))

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> "StateComputeLogs":
        return cls(str(load_settings().state_dir / "dagster" / "logs"), inst_data=inst_data)
