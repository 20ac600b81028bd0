"""Sessions and addresses: what is kept of a session, what is said of a URL that cannot be used."""

import contextlib
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.store.database import MOST_SESSIONS, Database, open_database
from embeddings_pipeline_tests.support import databases
from embeddings_pipeline_tests.support.databases import refused
from embeddings_pipeline_tests.support.workbench import wait_until


def test_sessions_are_the_same_whatever_the_role_is_set_to(database: Database) -> None:
    name = databases.name_of(database)
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
    gone = Database(database.url.replace(databases.name_of(database), "nowhere"))

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


def test_representation_has_no_password() -> None:
    assert "s3cret" not in repr(Database("postgresql://me:s3cret@host/db"))
