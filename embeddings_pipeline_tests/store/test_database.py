"""The embedded server's life, and what users are told when a database cannot be used."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import sql

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store import schema
from embeddings_pipeline.store.database import EMBEDDED_DATABASE, MOST_SESSIONS, Database, open_database, psql_command
from embeddings_pipeline.store.schema import ensure_schema
from embeddings_pipeline.store.server.folders import ROOTS_FOLDER, digest
from embeddings_pipeline.store.sql import schema_versions
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.workbench import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

# Uses the database in the state folder argv[1] until its standard input ends.
USER = """
import sys
from pathlib import Path
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database
from embeddings_pipeline.store.schema import ensure_schema
database = open_database(Settings(embeddings_state_dir=Path(sys.argv[1])))
ensure_schema(database)
print("ready", flush=True)
for line in sys.stdin:
    with database.connect() as connection:
        print(connection.execute(line).fetchone()[0], flush=True)
"""


class User:
    """Another process that uses the database."""

    def __init__(self, state: Path, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, "-c", USER, str(state)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]

    def ready(self) -> "User":
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        return self

    def ask(self, query: str) -> str:
        self.process.stdin.write(query + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, how)
        self.process.communicate(timeout=60)


@pytest.fixture
def state(embedded: None, open_folder: Path) -> Iterator[Path]:
    """A state folder of this test's own, without a server yet; no process may be left when the test ends."""
    folder = open_folder / uuid.uuid4().hex[:8]
    folder.mkdir(mode=0o711)
    yield folder
    wait_until(lambda: not processes(folder))
    # Only this test's: another session's may be empty because its server is about to start.
    servers = [path for path in folder.rglob("postgres") if path.is_dir()]
    ours = [digest(str(path), str(path.stat().st_ino)) for path in servers]
    shutil.rmtree(folder)
    for left in (path for name in ours for path in Path("/tmp").glob(f"embeddings-pg-*-{name}")):
        with contextlib.suppress(OSError):
            left.rmdir()


def processes(state: Path) -> list[psutil.Process]:
    """PostgreSQL's processes on the state folder, and their supervisor."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(f"{state}/postgres/data" in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def postmaster(state: Path) -> psutil.Process:
    return psutil.Process(int((state / "postgres" / "data" / "postmaster.pid").read_text().split()[0]))


@contextlib.contextmanager
def opened(state: Path) -> Iterator[Database]:
    database = open_database(Settings(embeddings_state_dir=state))
    try:
        yield database
    finally:
        database.close()


def test_last_process_to_leave_stops_the_server(state: Path) -> None:
    first, second = User(state).ready(), User(state).ready()
    first.leave()
    assert second.ask("SELECT 'still here'") == "still here"
    second.leave()
    assert not processes(state)


def test_killed_processes_do_not_keep_the_server(state: Path) -> None:
    starter, other = User(state).ready(), User(state).ready()
    starter.kill()
    assert other.ask("SELECT 1") == "1"
    other.kill()
    wait_until(lambda: not processes(state), 10)


def test_terminated_process_does_not_keep_the_server(state: Path) -> None:
    User(state).ready().kill(signal.SIGTERM)
    wait_until(lambda: not processes(state), 10)


def test_interrupt_from_the_terminal_spares_the_server(state: Path) -> None:
    starter, other = User(state).ready(), User(state).ready()
    server = postmaster(state)
    starter.kill(signal.SIGINT)
    assert other.ask("SELECT 1") == "1"
    assert postmaster(state) == server
    other.leave()


def test_killed_server_is_started_again_and_has_what_was_committed(state: Path) -> None:
    with opened(state) as database:
        with database.connect() as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        postmaster(state).kill()
        with database.connect() as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_several_processes_start_a_killed_server_once(state: Path) -> None:
    users = [User(state).ready() for _ in range(3)]
    for process in processes(state):  # the supervisor as well
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with ThreadPoolExecutor() as pool:
        starts = set(pool.map(lambda user: user.ask("SELECT pg_postmaster_start_time()"), users))
    assert len(starts) == 1
    for user in users:
        user.leave()
    assert not processes(state)


def test_server_without_its_supervisor_stops_too(state: Path) -> None:
    with opened(state) as database:
        postmaster(state).parent().kill()
        with database.connect(autocommit=True) as connection:
            connection.execute("SELECT 1")
    wait_until(lambda: not processes(state), 10)


def test_processes_that_start_together_share_one_server_and_one_schema(state: Path) -> None:
    users = [User(state) for _ in range(4)]
    starts = {user.ready().ask("SELECT pg_postmaster_start_time()") for user in users}
    assert len(starts) == 1
    for user in users:
        user.leave()


def test_stale_pid_file_with_a_living_foreign_pid_does_not_hinder(state: Path) -> None:
    with opened(state):
        pass
    pid_file = state / "postgres" / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{pid_file.parent}\n1\n5432\n\n\n0 0\nready\n")
    with opened(state) as database:
        database.connect().close()


def test_initialisation_that_was_killed_is_done_again(state: Path) -> None:
    half_made = state / "postgres" / "data.new"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    with opened(state) as database:
        database.connect().close()
    assert not half_made.exists()


@pytest.mark.parametrize("name", ["with a space, and more", "long" * 30, "größe-'\"%20"])
def test_any_path_will_do(state: Path, name: str) -> None:
    folder = state / name
    folder.mkdir(mode=0o711)
    user = User(folder).ready()
    assert user.ask("SELECT 1") == "1"
    path, argv, environment = psql_command(
        database := open_database(Settings(embeddings_state_dir=folder)), ["-Atc", "SELECT 2"]
    )
    assert (
        subprocess.run([path, *argv[1:]], env=environment, check=False, capture_output=True, text=True).stdout == "2\n"
    )
    database.close()
    user.leave()
    assert not processes(folder)


def test_server_is_the_users_alone(state: Path) -> None:
    with opened(state) as database, database.connect() as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert stat.S_IMODE((state / "postgres").stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "postgres" / "data").stat().st_mode) == 0o700


def test_a_second_start_does_not_take_long(state: Path) -> None:
    with opened(state):
        pass
    begin = time.monotonic()
    with opened(state):
        assert time.monotonic() - begin < 5  # 0.2 s on an idle machine


@needs_root
def test_any_user_can_have_a_server(state: Path) -> None:
    # Kept: the right to read, since the interpreter may be root's own (below /root).
    as_nobody: tuple[str, ...] = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    as_nobody += ("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search")
    if (
        shutil.which("setpriv") is None
        or subprocess.run([*as_nobody, sys.executable, "-c", ""], check=False).returncode
    ):
        pytest.skip("setpriv cannot start this interpreter as another user")
    os.chown(state, 65534, 65534)
    user = User(state, as_nobody).ready()
    assert {process.uids().real for process in processes(state)} == {65534}
    user.leave()
    assert not processes(state)


@needs_root
def test_roots_private_folder_stays_private(state: Path) -> None:
    private = state / "private"
    private.mkdir(mode=0o700)
    before = set(ROOTS_FOLDER.iterdir()) if ROOTS_FOLDER.exists() else set()
    try:
        user = User(private).ready()
        assert user.ask("SELECT 1") == "1"
        user.leave()
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    finally:
        for stand_in in set(ROOTS_FOLDER.iterdir()) - before:
            shutil.rmtree(stand_in)


def test_server_that_cannot_start_names_its_log(state: Path) -> None:
    with opened(state):
        pass
    with (state / "postgres" / "data" / "postgresql.auto.conf").open("a") as settings:
        settings.write("shared_buffers = much\n")
    with pytest.raises(
        DatabaseError, match=r"^the embedded PostgreSQL did not start: .*shared_buffers|auto.conf.*server.log$"
    ) as caught:
        opened(state).__enter__()
    assert "\n" not in str(caught.value)


def test_data_of_another_postgresql_is_refused(state: Path) -> None:
    with opened(state):
        pass
    (state / "postgres" / "data" / "PG_VERSION").write_text("15\n")
    with pytest.raises(DatabaseError, match="was made by PostgreSQL 15"):
        opened(state).__enter__()


def test_folder_that_cannot_be_written_is_named(state: Path) -> None:
    (state / "postgres").write_text("in the way")
    with pytest.raises(DatabaseError, match=f"cannot use its folder {state}/postgres .*: make room there or"):
        opened(state).__enter__()


def test_sessions_are_the_same_whatever_the_role_is_set_to(database: Database) -> None:
    name = open_name(database)
    with database.connect(autocommit=True) as connection:
        for setting in ("timezone = 'Asia/Tokyo'", "statement_timeout = '10ms'", "datestyle = 'SQL'"):
            connection.execute(sql.SQL("ALTER DATABASE {} SET " + setting).format(sql.Identifier(name)))
    with database.connect(application_name="who") as connection:
        row = connection.execute("SELECT current_setting('timezone'), current_setting('application_name'), now()::text")
        [(zone, who, now)] = row.fetchall()
        connection.execute("SELECT pg_sleep(0.05)")
        assert (zone, who, now[-3:]) == ("UTC", "who", "+00")
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


def pid_of(connection: psycopg.Connection) -> int:
    return connection.info.backend_pid


def test_a_session_is_used_again_unless_something_is_left_in_it(database: Database) -> None:
    with database.session() as connection:
        first = pid_of(connection)
    with database.session() as connection, database.session() as beside:
        assert pid_of(connection) == first != pid_of(beside)
        second = pid_of(beside)
    with contextlib.suppress(ZeroDivisionError), database.session() as connection:
        failed = pid_of(connection)
        raise ZeroDivisionError
    with database.session() as connection:
        assert {failed, pid_of(connection)} == {first, second}
        connection.execute("BEGIN")
    with database.session() as connection:
        assert pid_of(connection) not in (first, second)


def test_a_session_that_the_server_has_ended_is_not_used_again(database: Database) -> None:
    with database.session() as connection:
        ended = pid_of(connection)
    with database.connect(autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [ended])
    with database.session() as connection:
        assert connection.execute("SELECT pg_backend_pid()").fetchone() != (ended,)


def test_a_killed_server_is_started_again_for_a_session(state: Path) -> None:
    with opened(state) as database:
        with database.session() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        backends = postmaster(state).children()
        postmaster(state).kill()
        psutil.wait_procs(backends, timeout=10)  # until then one may still answer
        with database.session() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


FORK = """
import os, sys
from embeddings_pipeline.store.database import Database
database = Database(sys.argv[1])

def session():
    with database.session() as connection:
        return connection.execute("SELECT pg_backend_pid()").fetchone()[0]

own = session()
if (child := os.fork()) == 0:
    os._exit(session() == own)
assert os.waitpid(child, 0)[1] == 0, "the fork had its parent's session"
assert session() == own
database.close()
"""


def test_a_forked_process_has_sessions_of_its_own(database: Database) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, database.url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_database_that_is_gone_is_said_when_a_session_is_asked_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embeddings_pipeline.store.database.CONNECT_SECONDS", 1)
    gone = Database(database.url.replace(open_name(database), "nowhere"))

    def session() -> None:
        with gone.session():
            pass

    assert "create that database, or correct DATABASE_URL" in refused(session)
    gone.close()


def test_closing_a_database_ends_its_sessions(database: Database) -> None:
    plain = Database(database.url)
    with plain.session() as connection:
        pid = pid_of(connection)
    plain.close()
    with database.connect(autocommit=True) as connection:
        ended = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: connection.execute(ended, [pid]).fetchone() == (0,))


def test_threads_never_share_a_session(database: Database) -> None:
    def use(_: int) -> tuple[int, int]:
        with database.session() as connection:
            row = connection.execute("SELECT pg_backend_pid(), pg_sleep(0.002)").fetchone()
            assert row is not None
            return pid_of(connection), row[0]

    with ThreadPoolExecutor(8) as threads:
        assert all(mine == answered for mine, answered in threads.map(use, range(200)))
    with database.connect(autocommit=True) as connection:
        query = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name = 'embeddings-pipeline' AND pid <> pg_backend_pid()"""
        wait_until(lambda: connection.execute(query).fetchone()[0] <= MOST_SESSIONS)  # type: ignore[index]


@pytest.mark.usefixtures("new_databases")
def test_siblings_are_created_once(database: Database) -> None:
    name = f"sibling_{uuid.uuid4().hex[:8]}"
    with ThreadPoolExecutor(4) as pool:
        urls = set(pool.map(lambda _: database.ensure_sibling(name), range(4)))
    assert len(urls) == 1
    with Database(urls.pop()).connect(autocommit=True) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == (name,)
        connection.execute("SELECT pg_sleep(0)")
    with database.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


@pytest.mark.usefixtures("embedded")
def test_threads_share_one_server_object(open_folder: Path, server: Database) -> None:
    found: list[Database] = []
    settings = Settings(embeddings_state_dir=open_folder)
    threads = [threading.Thread(target=lambda: found.append(open_database(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(database.server) for database in found} == {id(server.server)}


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_usual_spelling_of_the_url_is_read(database: Database, scheme: str) -> None:
    url = database.url.replace("postgresql", scheme, 1)
    other = open_database(Settings(database_url=url))
    assert not other.embedded
    with other.connect() as connection:
        connection.execute("SELECT 1")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/db", r'database "db" on 127.0.0.1:1 .*refused.*is the server running'),
        ("postgresql://me:s3cret@no-such-host.invalid/db", "no such host; correct DATABASE_URL"),
        ("mysql://me:s3cret@localhost/db", "does not name a PostgreSQL database"),
        ("postgresql://me:s3cret@here:p@rt/db", "cannot be read"),
        ("me:s3cret", "does not name a PostgreSQL database"),
    ],
)
def test_unusable_url_is_one_line_without_the_password(url: str, says: str) -> None:
    with pytest.raises(DatabaseError, match=says) as caught:
        open_database(Settings(database_url=url)).connect()
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def plain_role(server: Database, embedded: None, database: Database) -> Iterator[str]:
    """The name of a role without any rights, whose password `s3cret` is asked for."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    rules = server.server.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    with server.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 's3cret'").format(sql.Identifier(role)))
        rules.write_text(f"local all {role} scram-sha-256\n{before}")
        connection.execute("SELECT pg_reload_conf()")
    yield role
    rules.write_text(before)
    with database.connect(autocommit=True) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def as_role(database: Database, role: str, password: str = "s3cret") -> Database:
    return Database(database.url.replace("postgres@", f"{role}:{password}@", 1))


def open_name(database: Database) -> str:
    return databases.name_of(database)


def refused(call: Callable[[], object]) -> str:
    """The message of the DatabaseError that the call raises: one line without a password."""
    with pytest.raises(DatabaseError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    return str(caught.value)


def test_wrong_password_is_said_without_any(database: Database, plain_role: str) -> None:
    wait_until(lambda: "password" in refused(as_role(database, plain_role, "wr0ng").connect))
    message = refused(as_role(database, plain_role, "wr0ng").connect)
    assert "check user and password in DATABASE_URL" in message
    assert "wr0ng" not in message


def test_missing_database_is_said(database: Database) -> None:
    missing = replace(database, url=database.url.replace(open_name(database), "nowhere"), server=None)
    assert "create that database, or correct DATABASE_URL" in refused(missing.connect)


def test_role_that_may_not_create_a_database_gets_the_statement(database: Database, plain_role: str) -> None:
    message = refused(lambda: as_role(database, plain_role).ensure_sibling("new_dagster"))
    assert message.endswith(f'an administrator runs: CREATE DATABASE "new_dagster" OWNER "{plain_role}"')


@pytest.fixture
def empty(superuser: None, database: Database) -> Database:
    """The test's database as a newly created one is: without pgvector and schema."""
    with database.connect(autocommit=True) as connection:
        connection.execute("DROP SCHEMA embeddings CASCADE")
        connection.execute("DROP EXTENSION vector CASCADE")
    return database


def test_role_that_may_not_install_pgvector_gets_the_statement(empty: Database, plain_role: str) -> None:
    message = refused(lambda: ensure_schema(as_role(empty, plain_role)))
    assert message.endswith("an administrator runs there: CREATE EXTENSION vector")


def test_role_that_may_not_make_the_schema_gets_the_statement(empty: Database, plain_role: str) -> None:
    with empty.connect(autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    message = refused(lambda: ensure_schema(as_role(empty, plain_role)))
    assert message.endswith(f'an administrator runs: GRANT CREATE ON DATABASE "{open_name(empty)}" TO "{plain_role}"')


def test_role_with_create_on_the_database_can_do_it_all(empty: Database, plain_role: str) -> None:
    with empty.connect(autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")  # the wheel's is not marked as trusted
        names = (sql.Identifier(open_name(empty)), sql.Identifier(plain_role))
        connection.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(*names))
    ensure_schema(as_role(empty, plain_role))


def test_server_without_pgvector_is_said(empty: Database) -> None:
    with empty.connect(autocommit=True) as connection:  # where the server looks for extensions: nowhere
        name = sql.Identifier(open_name(empty))
        connection.execute(sql.SQL("ALTER DATABASE {} SET extension_control_path = '/nowhere'").format(name))
    assert "the server has no pgvector; install pgvector 0.7 or newer" in refused(lambda: ensure_schema(empty))


@pytest.mark.usefixtures("superuser")
def test_old_pgvector_is_said_with_the_statement_that_updates_it(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("UPDATE pg_extension SET extversion = '0.6.2' WHERE extname = 'vector'")
        connection.execute("DELETE FROM embeddings.schema_migration")
    message = refused(lambda: ensure_schema(database))
    assert "pgvector is 0.6.2" in message
    assert message.endswith("ALTER EXTENSION vector UPDATE")


def test_schema_of_a_newer_package_is_left_alone(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("INSERT INTO embeddings.schema_migration (version) VALUES (999)")
    message = refused(lambda: ensure_schema(database))
    assert "its schema has version 999" in message
    assert "install a newer embeddings-pipeline" in message


def test_only_files_that_the_database_does_not_have_are_run(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = schema_versions()
    assert [version for version, _ in first] == list(range(1, len(first) + 1))
    later = (len(first) + 1, "ALTER TABLE embeddings.scan ADD COLUMN extra text")
    monkeypatch.setattr(schema, "schema_versions", lambda: [*first, later])
    schema.forget_schemas()
    ensure_schema(database)
    with database.connect() as connection:
        rows = connection.execute("SELECT version FROM embeddings.schema_migration ORDER BY version").fetchall()
        assert rows == [(version,) for version, _ in [*first, later]]
        connection.execute("SELECT extra FROM embeddings.scan")


def test_a_schema_of_before_the_numbered_files_is_refused_and_kept(empty: Database) -> None:
    with empty.connect() as connection:
        connection.execute("CREATE SCHEMA embeddings")
        connection.execute("CREATE TABLE embeddings.schema_version (version bigint); CREATE TABLE embeddings.item ()")
    message = refused(lambda: ensure_schema(empty))
    assert "made by a version before 0.1" in message and "start over" in message
    with empty.connect() as connection:
        assert connection.execute("SELECT to_regclass('embeddings.item') IS NOT NULL").fetchone() == (True,)
        assert connection.execute("SELECT to_regclass('embeddings.collection') IS NULL").fetchone() == (True,)


def test_psql_gets_the_password_where_nobody_sees_it(database: Database, plain_role: str) -> None:
    path, argv, environment = psql_command(as_role(database, plain_role), ["-Atc", "SELECT current_user"])
    assert "s3cret" not in " ".join(argv)
    done = subprocess.run([path, *argv[1:]], env=environment, check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{plain_role}\n", "")


def test_program_that_replaces_the_process_keeps_the_server(state: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database, psql_command
database = open_database(Settings(embeddings_state_dir=Path(sys.argv[1])))
os.execve(*psql_command(database, ["-Atc", "SELECT pg_sleep(0.3); SELECT current_database()"]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(state)], check=False, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [EMBEDDED_DATABASE], done.stderr
    wait_until(lambda: not processes(state), 10)


def test_representation_has_no_password() -> None:
    assert "s3cret" not in repr(Database("postgresql://me:s3cret@host/db"))
