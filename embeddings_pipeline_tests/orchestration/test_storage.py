"""Dagster's storage beside the pipeline's database."""

import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg
import psutil
import pytest
from dagster import DagsterInstance
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy import Engine, event
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2

from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.orchestration.instance.event_log import PipelineEventLogStorage, partitions_held
from embeddings_pipeline.orchestration.instance.launcher import WatchedRunLauncher
from embeddings_pipeline.orchestration.instance.storage import PipelineStorage, dagster_database
from embeddings_pipeline.orchestration.runner import open_instance
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.urls import read_address, url_of
from embeddings_pipeline_tests.support.dagster_internals import InstanceRef
from embeddings_pipeline_tests.support.databases import as_role, dropped
from embeddings_pipeline_tests.support.workbench import execute

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def deployment(
    new_databases: None, settings: Settings, server: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """The settings of this test, as the environment names them; Dagster's database is dropped afterwards."""
    monkeypatch.setenv("DATABASE_URL", revealed(settings.database_url) or "")
    monkeypatch.setenv("EMBEDDINGS_STATE_DIR", str(settings.state_dir))
    yield settings
    name = dagster_database(settings)[0].parts["dbname"]
    with server.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def project_instance(scratch: Path) -> DagsterInstance:
    """The instance that `dg dev` makes in the project's folder without DAGSTER_HOME."""
    scratch.mkdir(exist_ok=True)
    return DagsterInstance.from_ref(InstanceRef.from_dir(str(scratch), config_dir=str(PROJECT)))


def test_instance_writes_to_the_database_and_below_the_state_folder_wherever_it_is_started(
    deployment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with project_instance(tmp_path / "scratch") as instance:

        @dg.asset
        def printed(context: dg.AssetExecutionContext) -> int:
            print("a line in the log")
            return 1

        assert dg.materialize([printed], instance=instance).success
        assert instance.get_runs_count() == 1
        assert isinstance(instance.run_launcher, WatchedRunLauncher)
    assert list(elsewhere.iterdir()) == []
    assert list((tmp_path / "scratch").iterdir()) == []
    written = [path for path in deployment.state_dir.rglob("*.out") if "a line in the log" in path.read_text()]
    assert written[0].is_relative_to(deployment.state_dir / "dagster")
    with project_instance(tmp_path / "scratch") as again:
        assert again.get_runs_count() == 1


def test_what_a_background_job_prints_is_captured_without_waiting(deployment: Settings, tmp_path: Path) -> None:
    # Dagster gives its copying processes 30 s to end after SIGTERM, and then fails.
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with project_instance(tmp_path / "scratch") as instance:
            manager = instance.compute_log_manager
            with manager.capture_logs(["run", "step"]):
                print("a line in the log", flush=True)
            assert manager.get_log_data(["run", "step"]).stdout == b"a line in the log\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, former)


def test_processes_that_start_together_make_the_tables_once(deployment: Settings) -> None:
    with ThreadPoolExecutor(3) as pool:
        storages = list(pool.map(lambda _: PipelineStorage(deployment), range(3)))
    for storage in storages:
        assert storage.run_storage.get_runs_count() == 0
        assert storage.event_log_storage.all_asset_keys() == []
        assert list(storage.schedule_storage.all_instigator_state()) == []
        for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
            part.dispose()


def test_processes_that_meet_a_new_pool_together_make_it_once(deployment: Settings, tmp_path: Path) -> None:
    def meets(number: int) -> bool:
        with project_instance(tmp_path / f"scratch {number}") as instance:
            return instance.event_log_storage.initialize_concurrency_limit_to_default("encoder")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(meets, range(4))) == [True] * 4
    with project_instance(tmp_path / "scratch") as instance:
        info = instance.event_log_storage.get_concurrency_info("encoder")
        assert (info.limit, info.slot_count, info.using_default_limit) == (1, 1, True)


def test_a_pool_follows_a_changed_default_limit(
    deployment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with project_instance(tmp_path / "scratch") as instance:
        for limit in (1, 3, 2):
            monkeypatch.setattr(DagsterInstance, "global_op_concurrency_default_limit", limit)
            instance.event_log_storage.initialize_concurrency_limit_to_default("encoder")
            info = instance.event_log_storage.get_concurrency_info("encoder")
            assert (info.limit, info.slot_count, info.using_default_limit) == (limit, limit, True)
        monkeypatch.setattr(DagsterInstance, "global_op_concurrency_default_limit", None)
        instance.event_log_storage.initialize_concurrency_limit_to_default("encoder")
        assert instance.event_log_storage.get_pool_limits() == []


def test_a_role_without_the_right_gets_the_statement_for_dagsters_database(
    superuser: None, database: Database, server: Database, settings: Settings
) -> None:
    with server.connect(autocommit=True) as connection:
        connection.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
    try:
        url = as_role(database, "plain", "plain").url
        with pytest.raises(DatabaseError, match=r'runs: CREATE DATABASE "test_\w+_dagster" OWNER "plain"$'):
            PipelineStorage(Settings(database_url=url, embeddings_state_dir=settings.state_dir))
    finally:
        with server.connect(autocommit=True) as connection:
            connection.execute("DROP ROLE plain")


def kill_server(state: Path) -> None:
    """SIGKILL for the embedded server of the state folder; returns when it has ended."""
    postmaster = psutil.Process(int((state / "postgres" / "data" / "postmaster.pid").read_text().split()[0]))
    postmaster.kill()
    with suppress(psutil.NoSuchProcess):
        while postmaster.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def encoded(parts: dict[str, str]) -> str:
    folder = quote(parts["host"], safe="")
    return f"postgresql://{parts['user']}:{parts['password']}@{folder}:{parts.get('port', 5432)}/{parts['dbname']}"


def two_hosts(parts: dict[str, str]) -> str:
    server = encoded(parts).replace("@", "@127.0.0.1:1,")
    return f"{server}?target_session_attrs=read-write"


def key_words(parts: dict[str, str]) -> str:
    return make_conninfo(**parts)


@pytest.mark.parametrize("written", [encoded, two_hosts, key_words])
def test_dagster_takes_any_address_and_shows_no_password(
    embedded: None, deployment: Settings, written: Callable[[dict[str, str]], str]
) -> None:
    parts = read_address(revealed(deployment.database_url) or "") | {"password": "s3cret"}
    settings = deployment.model_copy(update={"database_url": written(parts)})
    storage = PipelineStorage(settings)
    assert storage.run_storage.get_runs_count() == 0
    for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
        assert "s3cret" not in f"{part._engine!r} {vars(part)!r}"  # type: ignore[attr-defined]
        part.dispose()


def test_a_parameter_that_only_our_libpq_knows_is_one_line(deployment: Settings) -> None:
    url = url_of(read_address(revealed(deployment.database_url) or "") | {"min_protocol_version": "3.0"})
    with pytest.raises(DatabaseError, match=r'"min_protocol_version".*; leave it out$') as caught:
        PipelineStorage(deployment.model_copy(update={"database_url": url}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["''", "no_such_schema", "app", "pg_catalog", "pg_temp", "extensions, pg_temp", "information_schema"]
)
def test_dagsters_sessions_last_and_have_a_schema_whatever_the_role_is_set_to(
    superuser: None, database: Database, deployment: Settings, path: str
) -> None:
    role = f"role_{uuid.uuid4().hex[:8]}"
    execute(database, f"CREATE ROLE {role} LOGIN CREATEDB PASSWORD 'x'")
    execute(database, f"ALTER ROLE {role} SET search_path = {path}")
    execute(database, f"ALTER ROLE {role} SET idle_session_timeout = '300ms'")
    try:
        url = as_role(database, role, "x").url
        storage = PipelineStorage(deployment.model_copy(update={"database_url": url}))
        with storage.run_storage.connect() as connection:  # type: ignore[attr-defined]
            time.sleep(0.6)
            connection.exec_driver_sql("SELECT count(*) FROM public.runs")
        for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
            part.dispose()
    finally:
        dropped(database, dagster_database(deployment)[0].parts["dbname"])
        execute(database, f"DROP ROLE {role}")
        dagster_database(deployment)


def test_a_role_that_may_make_no_tables_for_dagster_is_one_line(
    superuser: None, database: Database, deployment: Settings
) -> None:
    role = f"role_{uuid.uuid4().hex[:8]}"
    execute(database, f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    execute(database, f"ALTER ROLE {role} SET search_path = pg_catalog")
    dagster_database(deployment)  # an administrator has made it
    try:
        url = as_role(database, role, "x").url
        with pytest.raises(DatabaseError, match=f'GRANT CREATE ON SCHEMA public TO "{role}"$') as caught:
            PipelineStorage(deployment.model_copy(update={"database_url": url}))
        assert "\n" not in str(caught.value)
    finally:
        execute(database, f"DROP ROLE {role}")


@pytest.mark.slow
def test_dagster_goes_on_after_the_server_was_killed(open_folder: Path) -> None:
    state = open_folder / "killed"
    state.mkdir(mode=0o711)
    storage = PipelineStorage(Settings(embeddings_state_dir=state))
    for _ in range(2):
        assert storage.run_storage.get_runs_count() == 0
        kill_server(state)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: storage.run_storage.get_runs_count(), range(4))) == [0] * 4
    storage.run_storage.database.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_dagster_waits_for_a_server_of_others_that_is_started_again(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = open_folder / "theirs"
    state.mkdir(mode=0o711)
    theirs = open_database(Settings(embeddings_state_dir=state))
    here = Settings(database_url=theirs.url, embeddings_state_dir=open_folder / "ours")
    storage = PipelineStorage(here)
    assert storage.run_storage.get_runs_count() == 0

    kill_server(state)
    with ThreadPoolExecutor(1) as pool:
        counted = pool.submit(storage.run_storage.get_runs_count)
        time.sleep(1)
        assert not counted.done()
        theirs.connect().close()  # it is started
        assert counted.result() == 0
    kill_server(state)
    monkeypatch.setattr("embeddings_pipeline.orchestration.instance.pool.WAIT_SECONDS", (0.01,))
    refused = pytest.raises(DatabaseError, match=r"^Dagster's database does not answer \(.*\): start it")
    with refused, dg.DagsterInstance.ephemeral() as instance, open_instance(instance):
        storage.run_storage.get_runs_count()
    theirs.close()


def test_partitions_that_another_process_added_or_removed_are_seen(deployment: Settings, tmp_path: Path) -> None:
    with project_instance(tmp_path / "one") as one, project_instance(tmp_path / "other") as other:
        for changed, keys in [
            (lambda: other.add_dynamic_partitions("a", ["2", "1"]), ["2", "1"]),
            (lambda: other.add_dynamic_partitions("b", ["9"]), ["2", "1"]),
            (lambda: other.delete_dynamic_partition("a", "2"), ["1"]),
            (lambda: other.add_dynamic_partitions("a", ["2"]), ["1", "2"]),
            (lambda: one.delete_dynamic_partition("a", "1"), ["2"]),
        ]:
            changed()
            assert list(one.get_dynamic_partitions("a")) == list(other.get_dynamic_partitions("a")) == keys


def test_partitions_that_have_not_changed_are_not_read_again(
    deployment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with project_instance(tmp_path / "one") as instance:
        instance.add_dynamic_partitions("a", ["1", "2"])
        assert list(instance.get_dynamic_partitions("a")) == ["1", "2"]
        read: list[str] = []
        base = PipelineEventLogStorage.__mro__[2]
        monkeypatch.setattr(base, "get_dynamic_partitions", lambda _, name: read.append(name))
        assert list(instance.get_dynamic_partitions("a")) == ["1", "2"] and not read


def test_within_partitions_held_what_was_asked_is_not_asked_again(deployment: Settings, tmp_path: Path) -> None:
    with project_instance(tmp_path / "one") as one, project_instance(tmp_path / "other") as other:
        one.add_dynamic_partitions("a", ["1", "2"])
        with partitions_held():
            assert one.has_dynamic_partition("a", "2") and not one.has_dynamic_partition("a", "3")
            assert list(one.get_dynamic_partitions("a")) == ["1", "2"]
            other.add_dynamic_partitions("a", ["3"])
            with statements() as asked:
                assert list(one.get_dynamic_partitions("a")) == ["1", "2"]
                assert one.has_dynamic_partition("a", "2") and not one.has_dynamic_partition("a", "3")
            assert asked == []
            assert list(one.get_dynamic_partitions("b")) == []
        assert one.has_dynamic_partition("a", "3") and list(one.get_dynamic_partitions("a")) == ["1", "2", "3"]


def test_planned_partitions_are_written_together_as_dagster_writes_them_one_by_one(
    deployment: Settings, tmp_path: Path
) -> None:
    keys = [f"{n:06}" for n in range(30)]

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(keys))
    def first() -> None: ...

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(keys), deps=[first])
    def second() -> None: ...

    job = dg.Definitions([first, second], jobs=[dg.define_asset_job("both", [first, second])]).resolve_job_def("both")

    def planned(last: str) -> tuple[str, int]:
        tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": last}
        with statements() as asked:
            run = instance.create_run_for_job(job, tags=tags)
        return run.run_id, len(asked)

    with project_instance(tmp_path / "one") as instance:
        planned(keys[0])  # what is asked once
        (few, for_few), (many, for_many) = planned(keys[2]), planned(keys[-1])
        assert for_many == for_few, "as many statements for 30 partitions as for 3"
        for run, expected in ((few, keys[:3]), (many, keys)):
            records = instance.all_logs(run, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
            seen = sorted((each.asset_key.path[-1], each.partition) for each in map(event_of, records))
            assert seen == [(name, key) for name in ("first", "second") for key in expected]
        for asset in (first, second):
            [record] = instance.get_asset_records([asset.key])
            assert record.asset_entry.last_run_id == many


def event_of(entry: dg.EventLogEntry) -> Any:
    return entry.get_dagster_event()


@contextmanager
def statements() -> Iterator[list[str]]:
    """What Dagster's storages ask, in this process."""
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_a_session_in_use_is_not_asked_whether_it_lives_and_is_replaced_once_it_was_ended(
    deployment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    ping = PGDialect_psycopg2.do_ping

    def noted(dialect: PGDialect_psycopg2, connection: Any) -> bool:
        asked.append(connection)
        return ping(dialect, connection)

    monkeypatch.setattr(PGDialect_psycopg2, "do_ping", noted)
    database = dagster_database(deployment)[0]
    with project_instance(tmp_path / "one") as instance:
        assert instance.get_runs_count() == 0
        asked.clear()
        assert [instance.get_runs_count() for _ in range(20)] == [0] * 20
        assert asked == []
        with database.connect(autocommit=True) as connection:
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            connection.execute(f"SELECT pg_terminate_backend(pid, 5000) {others}")
        assert instance.get_runs_count() == 0
        assert asked
