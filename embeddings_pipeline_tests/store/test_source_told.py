"""What of a source is not there, may not be read or does not answer: one line that says what to do."""

from pathlib import Path

import psycopg
import pytest

from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.store.source import Source
from embeddings_pipeline_tests.support.databases import as_role
from embeddings_pipeline_tests.support.sources import (
    both_ways,
    make,
    source_of,
    titles,
)
from embeddings_pipeline_tests.support.workbench import execute


def refused(source: Source) -> str:
    with pytest.raises(PipelineError) as error, source.connect() as connection:
        source.check(connection)
        list(source.scan(connection))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_is_not_there_is_named_with_what_was_meant(database):
    make(database, "bigint", [1])
    execute(database, "CREATE SCHEMA other; CREATE TABLE other.people (id int)")
    for options, says in [
        ({"table": "thing"}, ["does not exist", "did you mean 'things'", "correct", "`source:`"]),
        ({"table": "other.peple"}, ["did you mean 'other.people'"]),
        ({"table": "zzz"}, ['"zzz" does not exist', "embeddings-pipeline load FILE --table zzz"]),
        ({"key": ["ide"]}, ["`source.key:` names a column 'ide'", "did you mean 'id'"]),
        ({"columns": ["tilte"]}, ["`columns:` names a column 'tilte'", "did you mean 'title'"]),
        ({"updated_at": "updated"}, ["`source.updated_at:` names a column 'updated'"]),
        ({"vectors": {"plot": "{title.__class__}"}}, ["template `plot:`", "'title.__class__'", "did you mean 'title'"]),
        ({"vectors": {"base": "{0}"}}, ["template `base:`", "names a column '0'"]),
        ({"vectors": {"base": "{title!r}"}}, ["'title!r'", "did you mean 'title'"]),
        ({"vectors": {"base": "{title:>10}"}}, ["'title:>10'", "did you mean 'title'"]),
        ({"vectors": {"base": "{to_json}"}}, ["names a column 'to_json'"]),
        ({"where": "removed = false"}, ['column "removed" does not exist', "`source:`"]),
        ({"where": "id = 'x'"}, ["invalid input syntax", "`source:`"]),
        ({"where": "id = "}, ["syntax error", "`source:`"]),
        ({"query": "SELECT id, t.title FROM things"}, ["missing FROM-clause entry"]),
        ({"query": "SELECT id, ttle AS title FROM things"}, ['"ttle" does not exist', "things.title"]),
        ({"query": "SELECT id, title, title FROM things"}, ["title", "ambiguous"]),
        ({"query": "DELETE FROM things RETURNING *"}, ["syntax error"]),
    ]:  # fmt: skip
        message = refused(source_of(database, **options))  # type: ignore[arg-type]
        assert message.startswith("collection 'things': "), message
        for part in says:
            assert part in message, message


@pytest.fixture
def reader(superuser, database):
    """A role with no rights, and the URL to log in with it."""
    name = execute(database, "SELECT 'reader_' || substr(md5(random()::text), 1, 8)")[0][0]
    execute(database, f"CREATE ROLE {name} LOGIN PASSWORD 'pw/@:%'")
    yield name, as_role(database, name, "pw/@:%").url
    execute(database, f"DROP OWNED BY {name}")
    execute(database, f"DROP ROLE {name}")


def test_a_role_without_rights_is_told_what_to_grant(database, reader):
    name, url = reader
    make(database, "bigint", [1])
    source = source_of(database, url=url)
    assert "permission denied for table things; GRANT SELECT on it" in refused(source)
    execute(database, f"GRANT SELECT (id) ON things TO {name}")
    assert "permission denied" in refused(source)
    execute(database, f"GRANT SELECT (title) ON things TO {name}")
    assert list(both_ways(source)) == ["1"]  # `other` is never read


def test_another_database_is_read_by_its_url_with_what_the_environment_holds(database, server, monkeypatch, tmp_path):
    execute(server, "DROP TABLE IF EXISTS public.elsewhere")
    execute(server, "CREATE TABLE public.elsewhere AS SELECT 1 AS id, 'Heat' AS title")
    source = source_of(
        database, table="elsewhere", url=server.url.replace("postgresql://", "postgresql+psycopg://${WHO}", 1)
    )
    source = source_of(database, table="elsewhere", url="${SOURCE_URL}")
    monkeypatch.delenv("SOURCE_URL", raising=False)
    assert "`source.url:` names ${SOURCE_URL}, which is not set; export it or put it in .env" in refused(source)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    (tmp_path / ".env").write_text(f"SOURCE_URL={server.url}\n")
    assert titles(both_ways(source)) == {"1": "Heat"}
    monkeypatch.setenv("SOURCE_URL", server.url.replace("postgresql://", "postgres://"))
    assert titles(both_ways(source)) == {"1": "Heat"}


URLS = [
    "postgresql://user:hunter2@127.0.0.1:1/db",
    "postgresql://user:hun/ter2@127.0.0.1:1/db",
    "postgresql://user:hun@ter2@127.0.0.1:1/db",
    "postgresql://user:hunter2@127.0.0.1:port/db",
    "postgresql://user:hunter2@/db?host=/nowhere",
    "postgresql://user:hunter2@no-such-host.invalid/db",
    "mysql://user:hunter2@127.0.0.1/db",
    "host=127.0.0.1 port=1 password=hunter2",
    "postgresql://user:hunter2@127.0.0.1:1/db?nonsense=1",
]


def test_a_url_that_does_not_answer_is_one_line_without_its_password(database):
    for url in URLS:
        message = refused(source_of(database, url=url))
        assert message.startswith("collection 'things': ")
        assert "`source.url:`" in message
        assert "ter2" not in message


def test_a_database_that_is_not_there_is_named(database, reader):
    _, url = reader
    message = refused(source_of(database, url=url.replace("test_", "no_such_database_")))
    assert "does not exist" in message and "check the URL" in message and "pw" not in message


def test_a_wrong_password_is_one_line_without_it(database, reader):
    name, url = reader
    hba = Path(execute(database, "SHOW hba_file")[0][0])
    before = hba.read_text()
    try:
        hba.write_text(f"local all {name} scram-sha-256\n{before}")
        execute(database, "SELECT pg_reload_conf()")
        make(database, "bigint", [1])
        execute(database, f"GRANT SELECT ON things TO {name}")
        assert list(both_ways(source_of(database, url=url))) == ["1"]
        message = refused(source_of(database, url=url.replace("pw%2F", "hunter2%2F")))
        assert "password authentication failed" in message and "check the URL" in message
        assert "hunter2" not in message
    finally:
        hba.write_text(before)
        execute(database, "SELECT pg_reload_conf()")


def test_an_error_of_the_pipelines_own_database_is_not_blamed_on_the_source(database):
    reading = source_of(database, url=database.url).connect()
    with pytest.raises(psycopg.errors.DivisionByZero), reading, database.connect() as own:
        own.execute("SELECT 1/0")
