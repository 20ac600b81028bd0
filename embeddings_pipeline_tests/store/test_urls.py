"""Addresses of databases: whatever libpq takes is taken, and no password is told."""

import re

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import ConfigurationError, DatabaseError
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.source_url import connect_url, expand_environment
from embeddings_pipeline.store.urls import UnreadableAddress, database_name, read_address, url_of
from embeddings_pipeline_tests.support.databases import dropped, name_of
from embeddings_pipeline_tests.support.workbench import execute

ADDRESSES = [
    "postgresql://me:pw@one:1,two:2/shop?target_session_attrs=read-write",
    "postgresql://me:pw@one,two/shop",
    "postgresql://me@one,two:5433/shop",
    "postgresql://me@%2Fvar%2Frun%2Fpostgresql:5433/shop",
    "postgresql:///shop?host=/var/run/postgresql&port=5433",
    "postgresql://me:p%40ss%2Fw%3Ard%25@host/My%20shop",
    "postgresql://me:p?w#x[y@host/shop",
    "postgresql://me:pw@[::1]:5432/shop?sslmode=require&options=-c%20geqo%3Doff",
    "postgresql://me@host",
    "postgresql://",
    "host=one,two port=1,2 dbname='My shop' user=me password='p w'",
    "service=shop",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_whatever_libpq_takes_is_read_as_it_reads_it(address: str) -> None:
    parts = conninfo_to_dict(address)
    assert read_address(address) == parts
    assert conninfo_to_dict(url_of(read_address(address))) == parts


VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(user=VALUES, password=VALUES, dbname=VALUES, host=VALUES)
def test_an_address_of_any_parts_is_read_as_these_parts(user: str, password: str, dbname: str, host: str) -> None:
    parts = {"user": user, "password": password, "dbname": dbname, "host": host.replace("@", "a")}
    assert read_address(url_of(parts)) == parts


UNREADABLE = [
    ("postgresql://me:s3cret@host/shop?schema=public", 'cannot be read: invalid URI query parameter: "schema"; leave'),
    ("postgresql://me:s3cret@host/shop?sslmode=require&pgbouncer=true", 'invalid URI query parameter: "pgbouncer"'),
    ("postgresql://me:s3cret@here:p@rt/shop", "cannot be read: it looks like"),
    ("postgresql://me:s3/cret?x@host/shop", "cannot be read: it looks like"),
    ("postgresql://me:s3/cr?et=x@host/shop", "cannot be read: it looks like"),
    ("postgresql://me:s3cret/x@host/shop", "cannot be read: it looks like"),
    ("postgresql://me:333/cret@host/shop", "cannot be read: it looks like"),
    ("postgresql://me:s3%cret@host/shop", "cannot be read: it looks like"),
    ("jdbc:postgresql://me:s3cret@host/shop", "does not name a PostgreSQL database"),
    ("mysql://me:s3cret@host/shop", "does not name a PostgreSQL database"),
    ("shop", "does not name a PostgreSQL database"),
]


@pytest.mark.parametrize(("address", "says"), UNREADABLE)
def test_what_it_does_not_take_is_one_line_without_the_password(address: str, says: str) -> None:
    with pytest.raises(UnreadableAddress) as caught:
        read_address(address)
    with pytest.raises(DatabaseError, match=r"^DATABASE_URL ") as ours:
        open_database(Settings(database_url=address))
    with pytest.raises(ConfigurationError, match=r"^`source\.url:` ") as source:
        connect_url(address)
    for message in map(str, (caught.value, ours.value, source.value)):
        assert says in message
        assert not re.search("s3|333|cret|\n", message)


def test_the_database_is_the_one_that_libpq_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert database_name({"user": "me"}) == "me"
    monkeypatch.setenv("PGDATABASE", "named")
    assert database_name({"user": "me"}) == "named"
    assert database_name({"user": "me", "dbname": "shop"}) == "shop"


# --- variables in `source.url:` ----------------------------------------------------------------------------------

WITH_VARIABLES = [
    ("postgresql://me:${PW}@host/shop", "password"),
    ("postgres://me:${PW}@host/shop", "password"),
    ("postgresql://${PW}:pw@host/shop", "user"),
    ("postgresql://me:pw@host/${PW}", "dbname"),
    ("postgresql://me@host/shop?password=${PW}", "password"),
    ("host=host user=me password=${PW}", "password"),
    ("host=host user=me password='${PW}' dbname=shop", "password"),
]


@pytest.mark.parametrize(("url", "part"), WITH_VARIABLES)
@given(value=VALUES)
def test_a_variable_is_put_in_as_the_part_that_it_is(url: str, part: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embeddings_pipeline.store.source_url._value", lambda _: value)
        assert conninfo_to_dict(re.sub("^postgres:", "postgresql:", expand_environment(url)))[part] == value


@pytest.mark.parametrize(
    ("url", "value", "parts"),
    [
        ("${V}", "postgresql://me:p%40ss@host/shop", {"password": "p@ss", "host": "host"}),
        ("postgresql://${V}/shop", "one:1,two:2", {"host": "one,two", "port": "1,2"}),
        ("postgresql://me:pw@${V}/shop", "[::1]:5433", {"host": "::1", "port": "5433"}),
        ("postgresql://me@${V}/shop", "/var/run/postgresql", {"host": "/var/run/postgresql"}),
        ("postgresql://me@host:${V}/shop", "5433", {"port": "5433"}),
    ],
)
def test_a_variable_may_be_the_whole_address_or_its_hosts(
    monkeypatch: pytest.MonkeyPatch, url: str, value: str, parts: dict[str, str]
) -> None:
    monkeypatch.setenv("V", value)
    assert parts.items() <= read_address(expand_environment(url)).items()


# --- a server behind them ----------------------------------------------------------------------------------------


def addresses(database: Database) -> list[str]:
    """The test's database by addresses that other readers of URLs take for something else."""
    parts = database.parts
    folder, port, name = parts["host"], parts.get("port", "5432"), name_of(database)
    encoded = folder.replace("/", "%2F")
    return [
        f"postgresql://{parts['user']}@{encoded}:{port}/{name}",
        f"postgresql://{parts['user']}@127.0.0.1:1,{encoded}:{port}/{name}?target_session_attrs=read-write",
        f"host='{folder}' port={port} user={parts['user']} dbname={name}",
    ]


@pytest.mark.usefixtures("embedded")
def test_a_database_is_opened_by_any_of_its_addresses(database: Database) -> None:
    for address in addresses(database):
        with open_database(Settings(database_url=address)).connect() as connection:
            assert connection.info.dbname == name_of(database)
        with connect_url(address) as connection:
            assert connection.info.dbname == name_of(database)


@pytest.mark.usefixtures("new_databases")
def test_a_database_whose_name_has_a_space_has_a_sibling(server: Database) -> None:
    url = server.ensure_sibling("My shop? 100%/é")
    try:
        with Database(url).connect() as connection:
            assert connection.info.dbname == "My shop? 100%/é"
        sibling = Database(url).ensure_sibling("My shop? 100%/é_dagster")
        with psycopg.connect(sibling) as connection:
            assert connection.info.dbname == "My shop? 100%/é_dagster"
        assert execute(Database(url), sql.SQL("SELECT current_database()")) == [("My shop? 100%/é",)]
    finally:
        dropped(server, "My shop? 100%/é")
        dropped(server, "My shop? 100%/é_dagster")
