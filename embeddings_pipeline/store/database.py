"""The pipeline's database: the embedded server's, or the one that DATABASE_URL names.

database = open_database(load_settings())
ensure_schema(database)
with database.connect() as connection: ...
"""

import atexit
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
from psycopg import errors, pq, sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool, PoolTimeout

from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.errors import DatabaseError
from embeddings_pipeline.forks import ProcessLock
from embeddings_pipeline.store.server.binaries import server_binaries
from embeddings_pipeline.store.server.embedded import EmbeddedServer, embedded_server
from embeddings_pipeline.store.session import (
    APPLICATION_NAME,
    CONNECT_SECONDS,
    OUR_NETWORK,
    check_encoding,
    check_lasts,
    set_up,
    used_here,
)
from embeddings_pipeline.store.urls import (
    Parts,
    UnreadableAddress,
    database_name,
    read_address,
    url_of,
    without_secrets,
)

EMBEDDED_DATABASE = "embeddings"
MOST_SESSIONS = 16  # that a process keeps for its batches and searches, and their threads share


@dataclass(frozen=True)
class Database:
    """One database. The URL may hold a password: show `name_and_host` instead."""

    url: str = field(repr=False)
    server: EmbeddedServer | None = field(default=None, repr=False, compare=False)

    @property
    def embedded(self) -> bool:
        """Whether it is the embedded server's."""
        return self.server is not None

    @property
    def parts(self) -> Parts:
        """The URL's parts, by libpq's names for them. They may hold a password."""
        return read_address(self.url)

    @property
    def name_and_host(self) -> str:
        """For people: the database and where it is, without user and password."""
        parts = self.parts
        port = f":{parts['port']}" if parts.get("port") and not self.embedded else ""
        return f'database "{database_name(parts)}" on {parts.get("host") or "this machine"}{port}'

    def connect(self, *, autocommit: bool = False, application_name: str = APPLICATION_NAME) -> psycopg.Connection:
        """A new session, in UTC, read committed and without time limits. Raises DatabaseError if there is none, or a
        pooler would not keep it for us.

        An embedded server that was killed is started again first.
        """
        try:
            connection = self._open(application_name)
        except psycopg.OperationalError as error:
            if self.server is None:
                raise _explained(error, self) from error
            self.server.ensure_running()
            try:
                connection = self._open(application_name)
            except psycopg.OperationalError as again:
                raise _explained(again, self) from again
        connection.autocommit = autocommit
        return connection

    def _open(self, application_name: str) -> psycopg.Connection:
        connection = self._open_plain(application_name)
        try:
            self._check(connection)
            set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_plain(self, application_name: str = APPLICATION_NAME) -> psycopg.Connection:
        return psycopg.connect(self._conninfo(application_name), autocommit=True)

    @property
    def _is_checked(self) -> bool:
        return self.server is not None or self.url in _checked

    def _check(self, connection: psycopg.Connection) -> None:
        """Once a process: DatabaseError if nothing can be kept in the database, before anything is made there."""
        if not self._is_checked:
            check_encoding(connection, self.name_and_host)
            check_lasts(connection, self._open_plain, self.name_and_host)
            _checked.add(self.url)

    @contextmanager
    def session(self) -> Iterator[psycopg.Connection]:
        """As `connect(autocommit=True)`, but of the process's pool: a new session takes longer to make and to warm than
        a search. For short queries that leave nothing behind; each gets a plan of its own.
        """
        if not self._is_checked:
            self.connect().close()
        pool = self._pool()
        try:
            connection = pool.getconn()
        except PoolTimeout as error:
            self.connect().close()  # which says why there is none
            raise DatabaseError(
                f"{self.name_and_host}: all {MOST_SESSIONS} sessions of this process were busy for "
                f"{CONNECT_SECONDS} s; try again"
            ) from error
        try:
            with used_here(connection):
                yield connection
        except BaseException:
            connection.close()
            raise
        finally:
            if connection.info.transaction_status != pq.TransactionStatus.IDLE:
                connection.close()  # something was left in it; the pool makes another
            pool.putconn(connection)

    def _pool(self) -> ConnectionPool:
        """This process's pool of sessions, which a forked process does not share."""
        key = (os.getpid(), self.url, self.embedded)
        with _mutex:
            if key not in _pools:
                if not any(pid == key[0] for pid, *_ in _pools):
                    atexit.register(_close_pools)
                logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it warns of each session that we close
                _pools[key] = ConnectionPool(
                    self._conninfo_of_running,
                    kwargs={"autocommit": True, "prepare_threshold": sys.maxsize},  # what asks for it is prepared
                    configure=set_up,
                    check=ConnectionPool.check_connection,
                    min_size=0,
                    max_size=MOST_SESSIONS,
                    timeout=CONNECT_SECONDS,
                    reconnect_timeout=CONNECT_SECONDS,
                    num_workers=1,
                    open=True,
                )
            return _pools[key]

    def _close_pool(self) -> None:
        _close_pools((os.getpid(), self.url, self.embedded))

    def _conninfo(self, application_name: str) -> str:
        # What the URL says itself goes first.
        return make_conninfo(**{**OUR_NETWORK, **self.parts, "application_name": application_name})

    def _conninfo_of_running(self) -> str:
        """For the pool; an embedded server that was killed is started again first."""
        if self.server is not None:
            self.server.ensure_running()
        return self._conninfo(APPLICATION_NAME)

    def ensure_sibling(self, name: str) -> str:
        """The URL of the database `name` on the same server; it is created if it is missing."""
        with self.connect(autocommit=True) as connection:
            _create_database(connection, name, f"{self.name_and_host}: user {connection.info.user}")
        return url_of(self.parts | {"dbname": name})

    def close(self) -> None:
        """Leave the embedded server, which stops if this was its last user. Needed only before the process ends.

        Whoever else in this process uses the database loses it: see `join_database`.
        """
        self._close_pool()
        if self.server is not None:
            self.server.leave()


_pools: dict[tuple[int, str, bool], ConnectionPool] = {}  # by process, URL, and whether we start the server
_checked: set[str] = set()  # URLs


def _close_pools(one: tuple[int, str, bool] | None = None) -> None:
    """Close this process's pools, or one."""
    with _mutex:
        keys = [key for key in _pools if key[0] == os.getpid() and one in (None, key)]
        pools = [_pools.pop(key) for key in keys]
    for pool in pools:
        pool.close()


_mutex = ProcessLock()


def open_database(settings: Settings) -> Database:
    """The database that `settings` name: DATABASE_URL (not connected to yet), else the embedded one, running.

    The embedded server lives under `settings.state_dir`/postgres and is started if it does not run. It stays while
    any process uses it.
    """
    if address := revealed(settings.database_url):
        try:
            return Database(url_of(read_address(address)))
        except UnreadableAddress as error:
            raise DatabaseError(f"DATABASE_URL {error}") from None
    server = embedded_server(settings.state_dir / "postgres")
    database = Database(server.url(EMBEDDED_DATABASE), server)
    with _mutex:
        if not server.in_use:
            server.ensure_running()
            Database(server.url("postgres"), server).ensure_sibling(EMBEDDED_DATABASE)
    return database


def was_used(settings: Settings) -> bool:
    """Whether the database can hold anything: the embedded one, once it was started; another, as far as is known."""
    return bool(revealed(settings.database_url)) or (settings.state_dir / "postgres").is_dir()


def open_database_to_read(settings: Settings) -> Database:
    """As `open_database` for what only looks. DatabaseError if the embedded one was never used; nothing is made."""
    if was_used(settings):
        return open_database(settings)
    raise DatabaseError(
        f"nothing is there yet: there is no database in {settings.state_dir}; `embeddings-pipeline load FILE` makes "
        "one and loads a table into it, or set DATABASE_URL"
    )


class DatabaseUse:
    """One of this process's users of a database, from `join_database` until `leave`; the last lets go of it."""

    def __init__(self, database: Database, users: "_Users") -> None:
        self.database, self._users = database, users
        self._process: int | None = os.getpid()

    @property
    def lasts(self) -> bool:
        """Whether it was not left; a forked process has no part in it."""
        return self._process == os.getpid()

    def leave(self) -> None:
        """Let go of the database if nobody else in this process uses it. Once is enough; more does no harm."""
        with _users_mutex:
            if not self.lasts:
                return
            self._process = None
            self._users.count -= 1
            if self._users.count:
                return
            self.database._close_pool()
            if self.database.server is not None and self._users.started:
                self.database.server.leave()


@dataclass
class _Users:
    """How many users a database has in this process, and whether the first of them came before any other code did."""

    count: int = 0
    started: bool = False


_users: dict[tuple[int, str, bool], _Users] = {}  # as `_pools`
_users_mutex = ProcessLock()  # taken before `_mutex`, and held until the last user has gone


def join_database(settings: Settings) -> DatabaseUse:
    """As `open_database`, for one of several users in a process, of which each may leave before the others do.

    The embedded server is left with the last of them, unless other code of this process used it before the first came.
    """
    with _users_mutex:
        started = not revealed(settings.database_url) and not embedded_server(settings.state_dir / "postgres").in_use
        database = open_database(settings)
        users = _users.setdefault((os.getpid(), database.url, database.embedded), _Users())
        if not users.count:
            users.started = started
        users.count += 1
        return DatabaseUse(database, users)


def psql_command(database: Database, args: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """(path, argv, environment) that runs the wheel's psql on the database, for `subprocess` or `os.execve`.

    The password travels in the environment: a command line is everybody's to read.
    """
    parts = database.parts
    environment = dict(os.environ)
    if (password := parts.pop("password", None)) is not None:
        environment["PGPASSWORD"] = password
    if database.server is not None:
        database.server.ensure_running()
        database.server.keep_through_exec()
    path = str(server_binaries() / "psql")
    return path, ["psql", f"--dbname={make_conninfo(**parts)}", *args], environment


def _create_database(connection: psycopg.Connection, name: str, who: str) -> None:
    if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
        return
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(sql.Identifier(name))
    try:
        connection.execute(statement)
    except (errors.DuplicateDatabase, errors.UniqueViolation):  # another process was first
        return
    except errors.InsufficientPrivilege as error:
        raise DatabaseError(
            f"{who} may not create the database {name}; an administrator runs: "
            f"CREATE DATABASE {quoted(name)} OWNER {quoted(connection.info.user)}"
        ) from error
    except psycopg.Error as error:
        raise DatabaseError(f"{who} cannot create the database {name}: {one_line(error)}") from error


def quoted(identifier: str) -> str:
    return '"{}"'.format(identifier.replace('"', '""'))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# What libpq says → what to do. Servers may say it in another language: then its own words must do.
_REMEDIES = (
    (r"password authentication failed|no password supplied|auth.* failed", "check user and password in {source}"),
    (r"database .* does not exist", "create that database, or correct {source}"),
    (r"local user with ID|could not look up", "name the user in {source}: this process's has no name in /etc/passwd"),
    (r"role .* does not exist", "correct the user in {source}"),
    (r"no pg_hba.conf entry|SSL|ssl", "the server does not let this user in this way; see its pg_hba.conf and sslmode"),
    (r"too many clients|connection slots|too many connections", "close other programs or raise max_connections"),
    (r"translate host name|resolve host|Name or service", "no such host; correct {source}"),
    (r"", "is the server running there? It is named by {source}"),
)


def _explained(error: psycopg.OperationalError, database: Database) -> DatabaseError:
    said = without_secrets(one_line(error), database.parts)
    remedy = next(what for pattern, what in _REMEDIES if re.search(pattern, said))
    source = f"the server's log {database.server.log}" if database.server else "DATABASE_URL"
    said = re.sub(r"^(connection (failed|to server).*?: )+(FATAL: *)?", "", said)
    said = re.sub(r" Is the server running .*\?$", "", said)  # which the remedy asks
    return DatabaseError(f"{database.name_and_host} cannot be used: {said}; {remedy.format(source=source)}")
