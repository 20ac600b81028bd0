"""What sessions have whatever the role is set to, what is left of them, and what stands between us and a server."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError, SourceError
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.search.query import search
from embeddings_pipeline.store import session
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.locks import run_lock, run_locked
from embeddings_pipeline.store.schema import ensure_schema, forget_schemas
from embeddings_pipeline.store.session import ReadLimits
from embeddings_pipeline_tests.support.databases import as_role, dropped, name_of
from embeddings_pipeline_tests.support.pooler import Pooler, pooler
from embeddings_pipeline_tests.support.sources import both_ways, make, scanned, source_of
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    make_films,
    sync_once,
    wait_until,
)

LIMITS = {
    "statement_timeout": 0,
    "lock_timeout": 0,
    "idle_in_transaction_session_timeout": 90_000,
    "idle_session_timeout": 140_000,
    "transaction_timeout": 170_000,
}  # each with the version of PostgreSQL that brought it


def set_for_all(database: Database, setting: str, value: str) -> None:
    """A setting of the database, for every session that begins from now on."""
    change = sql.SQL("ALTER DATABASE {} SET {} = {}")
    execute(database, change.format(sql.Identifier(name_of(database)), sql.SQL(setting), sql.SQL(value)))


@pytest.fixture
def limited(database: Database) -> Database:
    """A database whose sessions are ended by every limit that the server's version knows, after 200 ms."""
    with database.connect() as connection:
        version = connection.info.server_version
    for limit, since in LIMITS.items():
        if version >= since:
            set_for_all(database, limit, "'200ms'")
    return database


# --- limits of time ----------------------------------------------------------------------------------------------


def test_no_limit_of_time_ends_a_session_of_ours(limited: Database) -> None:
    with limited.connect() as connection, limited.session() as pooled:
        time.sleep(0.3)  # idle
        connection.execute("SELECT pg_sleep(0.3)")
        time.sleep(0.3)  # idle in its transaction
        connection.execute("SELECT pg_sleep(0.3)")
        pooled.execute("SELECT pg_sleep(0.3)")


def test_a_run_is_alive_for_as_long_as_its_process_holds_its_lock(limited: Database) -> None:
    with run_lock(limited, "a run"):
        time.sleep(0.4)
        with limited.connect(autocommit=True) as connection:
            assert run_locked(connection, "a run")


def test_no_limit_of_time_ends_a_read_of_the_source(limited: Database) -> None:
    execute(limited, "CREATE TABLE things AS SELECT 1 AS id, 'Heat' AS title")
    slow = "SELECT id, title FROM things, LATERAL (SELECT pg_sleep(0.3 + 0 * id)) AS slow"
    assert set(scanned(source_of(limited, query=slow, url=limited.url))) == {"1"}


def test_a_locked_source_ends_a_read_in_one_line_and_leaves_no_session(database: Database) -> None:
    make(database, "bigint", [1])
    source = replace(source_of(database, url=database.url), limits=ReadLimits(lock_seconds=1))
    others = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                AND backend_type = 'client backend' AND pid <> ALL (ARRAY[pg_backend_pid(), %s])"""
    with database.connect() as locker:
        locker.execute("LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
        there = execute(database, others, [locker.info.backend_pid])  # what keeps the database, where one is kept
        with pytest.raises(SourceError, match="another session has locked the source for more than 1 s") as caught:
            scanned(source)
        wait_until(lambda: execute(database, others, [locker.info.backend_pid]) == there, 10)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_too_slow_for_a_tick_is_one_line(database: Database) -> None:
    execute(database, "CREATE TABLE things AS SELECT 1 AS id, 'Heat' AS title")
    slow = "SELECT id, title FROM things, LATERAL (SELECT pg_sleep(20 + 0 * id)) AS slow"
    limits = ReadLimits(lock_seconds=1, statement_seconds=1)
    with pytest.raises(SourceError, match="the source did not answer within 1 s"):
        scanned(replace(source_of(database, query=slow), limits=limits))


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("statement_seconds", [1, None], ids=["tick", "run"])
def test_a_source_that_falls_silent_ends_a_read(
    database: Database, monkeypatch: pytest.MonkeyPatch, statement_seconds: int | None
) -> None:
    monkeypatch.setattr(session, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(session, "PROBE_SECONDS", 0.1)
    monkeypatch.setitem(session.SOURCE_NETWORK, "connect_timeout", 2)
    make(database, "bigint", [1])
    limits = ReadLimits(lock_seconds=1, statement_seconds=statement_seconds)
    with pooler(database) as between:
        source = replace(source_of(database, url=between.url), limits=limits)
        with source.connect() as connection:
            assert source.read(connection, ["1"]).table["item_key"].to_pylist() == ["1"]
            between.freeze()
            began = time.monotonic()
            with pytest.raises(SourceError, match="the source cannot be read") as caught:
                source.read(connection, ["1"])
        assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)


# --- poolers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def transactions(embedded: None, database: Database) -> Iterator[Pooler]:
    """A pooler in front of the test's database that lends sessions by the transaction."""
    with pooler(database) as between:
        yield between


SETTINGS = "SELECT name, setting FROM pg_settings WHERE context = 'user' AND name <> 'application_name' ORDER BY name"


def test_nothing_that_a_source_is_read_with_is_left_to_others(database: Database, transactions: Pooler) -> None:
    make(database, "bigint", range(1, 6))

    def others() -> list[tuple[str, str]]:
        with psycopg.connect(transactions.url, prepare_threshold=None, autocommit=True) as other:
            other.execute("INSERT INTO things SELECT max(id) + 1 FROM things")
            return other.execute(SETTINGS).fetchall()

    before = others()
    source = source_of(database, url=transactions.url)
    assert len(both_ways(source)) == 6
    with source.connect() as reading:
        for _ in range(12):  # psycopg prepares what is done so often
            source.read(reading, ["1"])
            others()
        with pytest.raises(SourceError):
            replace(source, definition=source_of(database, where="1 / 0 = 1").definition).read(reading, ["1"])
    assert others() == before


def test_nothing_is_written_to_a_source(database: Database) -> None:
    execute(database, "CREATE TABLE things (id bigint, title text); CREATE SEQUENCE counter")
    execute(database, "INSERT INTO things VALUES (1, 'Heat')")
    with pytest.raises(SourceError, match="read-only transaction"):
        scanned(source_of(database, query="SELECT id, nextval('counter')::text AS title FROM things"))


def test_a_pooler_that_lends_by_the_transaction_is_refused_and_nothing_is_left(
    database: Database, transactions: Pooler
) -> None:
    with psycopg.connect(transactions.url, autocommit=True) as other:
        before = other.execute(SETTINGS).fetchall()
    ours = open_database(Settings(database_url=transactions.url))
    for use in (ours.connect, ours.connect, lambda: ours.session().__enter__()):
        with pytest.raises(DatabaseError, match="`pool_mode = session`, in DATABASE_URL") as caught:
            use()
        assert "\n" not in str(caught.value)
    with psycopg.connect(transactions.url, autocommit=True) as other:
        assert other.execute(SETTINGS).fetchall() == before


def test_a_pooler_that_lends_by_the_session_is_taken(embedded: None, database: Database) -> None:
    with pooler(database, by_session=True) as between, between.database(database).connect() as connection:
        assert connection.execute("SHOW timezone").fetchone() == ("UTC",)


# --- who we are --------------------------------------------------------------------------------------------------


READS = """
import sys
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.session import RUN_LIMITS, reading
with open_database(Settings(database_url=sys.argv[1])).connect() as connection:
    connection.commit()
    with reading(connection, RUN_LIMITS, some_rows_do=False):
        print(*connection.execute("SELECT count(*) FROM films").fetchone())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_a_name_and_a_home_reads_a_source(embedded: None, database: Database) -> None:
    make_films(database, films(12))
    # Kept: the right to read, since the interpreter may be root's own (below /root).
    as_nobody = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups"]
    as_nobody += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    if (
        shutil.which("setpriv") is None
        or subprocess.run([*as_nobody, sys.executable, "-c", ""], check=False).returncode
    ):
        pytest.skip("setpriv cannot start this interpreter as another user")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    with pooler(database, by_session=True) as lending:
        command = [*as_nobody, sys.executable, "-c", READS, lending.url]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("12\n", "")


# --- where pgvector is, and what a database can hold -------------------------------------------------------------


@pytest.mark.usefixtures("superuser")
@pytest.mark.parametrize("where", ["extensions", "Odd schema"])
@pytest.mark.parametrize("path", ['"$user", public', "''", "app"])
def test_pgvector_is_found_in_any_schema(database: Database, settings: Settings, where: str, path: str) -> None:
    schema = sql.Identifier(where)
    execute(database, sql.SQL("CREATE SCHEMA {0}; ALTER EXTENSION vector SET SCHEMA {0}").format(schema))
    make_films(database, films(12))
    set_for_all(database, "search_path", path)
    collection, _ = sync_once(definition(source={"table": "public.films", "key": ["id"]}), settings)
    assert len(committed(database)) == 12
    ensure_index(database, collection.model.destination, IndexDefinition(method="ivfflat"), ["base"])
    assert search(collection.definition, settings, "Film 7 number 7", k=1)[0].item_key == "7"
    database.close()


@pytest.mark.usefixtures("superuser")
def test_an_index_is_built_once_though_the_role_has_all_names_quoted(database: Database, settings: Settings) -> None:
    make_films(database, films(12))
    set_for_all(database, "quote_all_identifiers", "on")
    collection, _ = sync_once(definition(), settings)
    index = IndexDefinition(method="ivfflat")
    reports = [ensure_index(database, collection.model.destination, index, ["base"]) for _ in range(2)]
    assert [report.build_seconds > 0 for report in reports] == [True, False]
    _, encoded = sync_once(definition(), settings)
    assert encoded == 0 and len(committed(database)) == 12
    database.close()


@pytest.mark.usefixtures("superuser")
@pytest.mark.parametrize("path", ["''", "no_such_schema", "pg_catalog", "pg_temp"])
def test_pgvector_is_installed_though_the_search_path_names_no_schema(database: Database, path: str) -> None:
    execute(database, "DROP SCHEMA embeddings CASCADE; DROP EXTENSION vector CASCADE")
    set_for_all(database, "search_path", path)
    forget_schemas()
    ensure_schema(database)
    assert execute(database, "SELECT 'vector'::regtype::text") == [("vector",)]
    schema = "SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'vector'"
    assert execute(database, schema) == [("public",)]


@pytest.mark.usefixtures("superuser")
def test_a_schema_of_pgvector_that_may_not_be_used_is_named(database: Database) -> None:
    role = f"role_{uuid.uuid4().hex[:8]}"
    execute(database, "DROP SCHEMA embeddings CASCADE; CREATE SCHEMA extensions")
    execute(database, f"ALTER EXTENSION vector SET SCHEMA extensions; CREATE ROLE {role} LOGIN PASSWORD 'x'")
    try:
        forget_schemas()
        with pytest.raises(DatabaseError, match=f'GRANT USAGE ON SCHEMA "extensions" TO "{role}"$'):
            ensure_schema(as_role(database, role, "x"))
    finally:
        execute(database, f"DROP ROLE {role}")


@pytest.mark.usefixtures("superuser", "new_databases")
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_text_is_refused_before_anything_is_made(
    server: Database, encoding: str
) -> None:
    name = f"test_{uuid.uuid4().hex[:12]}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'")
    with server.connect(autocommit=True) as connection:
        connection.execute(create.format(sql.Identifier(name), sql.Literal(encoding)))
    try:
        database = replace(server, url=server.ensure_sibling(name), server=None)
        with pytest.raises(DatabaseError, match=f"has the encoding {encoding}, which cannot hold every text"):
            database.ensure_sibling(f"{name}_dagster")
        found = execute(server, "SELECT datname FROM pg_database WHERE datname LIKE %s", [f"{name}%"])
        assert found == [(name,)]
    finally:
        dropped(server, name)


# --- row-level security ------------------------------------------------------------------------------------------


@pytest.fixture
def tenant(superuser: None, database: Database) -> Iterator[str]:
    """A role that row-level security shows every second row of `things`; the URL to log in as it."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    make(database, "bigint", range(1, 11))
    execute(database, f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT ON things TO {role}")
    execute(database, "ALTER TABLE things ENABLE ROW LEVEL SECURITY")
    execute(database, "CREATE POLICY even ON things FOR SELECT USING (id % 2 = 0)")
    yield as_role(database, role, "x").url
    execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_rows_that_row_level_security_hides_are_told_of(database: Database, tenant: str) -> None:
    for options in ({}, {"query": "SELECT * FROM things"}, {"where": "id > 0"}):
        source = source_of(database, url=tenant, **options)
        for read in (lambda source=source: scanned(source), lambda source=source: both_ways(source)):
            with pytest.raises(SourceError, match=r"BYPASSRLS.*`row_security: true` under `source:`") as caught:
                read()
            assert "would count as gone" in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_row_level_security_shows_are_the_collection_if_it_is_declared(
    database: Database, tenant: str
) -> None:
    assert set(both_ways(source_of(database, url=tenant, row_security=True))) == {"2", "4", "6", "8", "10"}


def test_row_level_security_that_hides_nothing_from_the_role_does_not_matter(database: Database, tenant: str) -> None:
    assert len(both_ways(source_of(database))) == 10  # the owner, and a superuser
    execute(database, "CREATE VIEW shown AS SELECT * FROM things")
    role = psycopg.conninfo.conninfo_to_dict(tenant)["user"]
    execute(database, f"GRANT SELECT ON shown TO {role}")
    assert len(both_ways(source_of(database, table="shown", url=tenant))) == 10  # with its owner's rights


def test_nothing_counts_as_gone_when_row_level_security_comes_later(
    database: Database, settings: Settings, tenant: str
) -> None:
    role = psycopg.conninfo.conninfo_to_dict(tenant)["user"]
    execute(database, f"ALTER ROLE {role} BYPASSRLS")
    source = {"table": "things", "key": ["id"], "url": tenant}
    things = definition("items", source=source, columns=["title"], vectors={"base": "{title}"})
    collection, encoded = sync_once(things, settings)
    assert encoded == 10
    execute(database, f"ALTER ROLE {role} NOBYPASSRLS")
    with pytest.raises(SourceError, match="row-level security"):
        collection.ledger.full_scan(collection.source, allow_deletes=True)
    assert collection.ledger.dirty_batches() == []
    assert len(committed(database, "items")) == 10


def test_a_thread_that_watches_a_read_ends_with_it(database: Database) -> None:
    make(database, "bigint", [1])
    with database.session():  # whose pool has threads of its own
        before = set(threading.enumerate())
    both_ways(source_of(database))
    assert set(threading.enumerate()) <= before


def test_a_read_that_takes_long_is_not_ended_while_its_server_answers(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PROBE_SECONDS", 0.1)
    execute(database, "CREATE TABLE things AS SELECT 1 AS id, 'Heat' AS title")
    slow = "SELECT id, title FROM things, LATERAL (SELECT pg_sleep(1.5 + 0 * id)) AS slow"
    assert set(scanned(source_of(database, query=slow, url=database.url))) == {"1"}


READER = """
import signal, sys
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.sources import scanned, source_of
class Interrupted(BaseException):
    pass
def interrupt(*_):
    raise Interrupted
if sys.argv[2] == "Interrupted":
    signal.signal(signal.SIGINT, interrupt)
scanned(source_of(Database(sys.argv[1]), url=sys.argv[1]))
"""


@pytest.mark.parametrize("by", ["KeyboardInterrupt", "Interrupted"])  # of Dagster, for one
def test_an_interrupt_ends_a_read_that_waits(database: Database, by: str) -> None:
    make(database, "bigint", [1])
    with database.connect() as locker:
        locker.execute("LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'things'::regclass AND NOT granted"
        command = [sys.executable, "-c", READER, database.url, by]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
            wait_until(lambda: locker.execute(waiting).fetchone() == (1,))
            reader.send_signal(signal.SIGINT)
            _, said = reader.communicate(timeout=120)
        assert by in said.splitlines()[-1] and "rollback" not in said
        wait_until(lambda: locker.execute(waiting).fetchone() == (0,), 5)
