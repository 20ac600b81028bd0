"""The front door, as a web application uses it."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import embeddings_pipeline
from embeddings_pipeline import ConfigurationError, DatabaseError, PipelineError, open_collection
from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import (
    definition,
    execute,
    films,
    make_films,
    sync_once,
    wait_until,
)


@pytest.fixture
def defs_dir(tmp_path: Path) -> Path:
    config = definition().attributes.model_dump(exclude_defaults=True, mode="json")
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    return tmp_path / "defs"


def test_several_threads_search_one_collection_that_was_synced_through_it(
    database: Database, project: Settings, defs_dir: Path
) -> None:
    make_films(database, films(25))
    with open_collection("films", defs_dir=defs_dir) as collection:
        assert collection.sync().embedded == 25

        def answer(number: int) -> tuple[str, str]:
            [hit] = collection.search(f"Film {number} number {number}", k=1)
            return hit.item_key, hit.item["title"]

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(answer, [n % 25 + 1 for n in range(100)]))
        assert answers == [(str(n % 25 + 1), f"Film {n % 25 + 1}") for n in range(100)]
        status = collection.status()
        assert (status["items"], status["vectors"], status["coverage"]) == (25, 25, 1.0)
        execute(database, "UPDATE films SET overview = 'a lighthouse keeper' WHERE id = 3")
        assert collection.sync(dry_run=True).left == 1
    assert collection.search("lighthouse", k=1)  # it is opened again


def sessions(database: Database) -> int:
    query = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
               AND application_name = 'embeddings-pipeline' AND pid <> pg_backend_pid()"""
    [(count,)] = execute(database, query)
    return int(count)


def test_a_client_that_closes_leaves_the_others_their_sessions(
    database: Database, settings: Settings, defs_dir: Path
) -> None:
    make_films(database, films(5))
    sync_once(definition(), settings)
    given = {"defs_dir": defs_dir, "database_url": database.url, "state_dir": settings.state_dir}
    ended = threading.Event()

    def searches() -> int:
        count = 0
        with open_collection("films", **given) as steady:  # type: ignore[arg-type]
            while not ended.is_set():
                assert len(steady.search("a story", k=2)) == 2
                count += 1
        return count

    def comes_and_goes(_: int) -> None:
        for _ in range(10):
            with open_collection("films", **given) as guest:  # type: ignore[arg-type]
                assert len(guest.search("a story", k=2)) == 2
                assert guest.status()["items"] == 5

    with ThreadPoolExecutor(4) as threads:
        steady = [threads.submit(searches) for _ in range(2)]
        try:
            list(threads.map(comes_and_goes, range(2)))
        finally:
            ended.set()
        assert all(one.result() for one in steady)
    wait_until(lambda: sessions(database) == 0)  # the last one has let go


def test_a_client_may_close_while_its_own_threads_search(
    database: Database, settings: Settings, defs_dir: Path
) -> None:
    make_films(database, films(5))
    sync_once(definition(), settings)
    client = open_collection("films", defs_dir=defs_dir, database_url=database.url, state_dir=settings.state_dir)

    def use(number: int) -> int:
        if number % 3 == 0:
            client.close()
            client.close()
        return len(client.search("a story", k=2))

    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(use, range(120))) == {2}
    client.close()
    wait_until(lambda: sessions(database) == 0)


EMBEDDED = """
import sys
from embeddings_pipeline import PipelineError, open_collection
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import embedded_server
first, second = (open_collection("films", defs_dir=sys.argv[1], state_dir=sys.argv[2]) for _ in range(2))
server = embedded_server(first.settings.state_dir / "postgres")

def began():
    with server_connection() as connection:
        return connection.execute("SELECT pg_postmaster_start_time()").fetchone()

def server_connection():
    import psycopg
    return psycopg.connect(server.url("embeddings"))

first.status(); second.status()
start = began()
first.close()
assert server.in_use and began() == start, "the first to close stopped it"
second.close()
assert not server.in_use, "the last to close did not leave it"
second.status()
assert began() > start
second.close()
"""


def test_the_embedded_server_is_left_by_the_last_client(embedded: None, open_folder: Path, defs_dir: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", EMBEDDED, str(defs_dir), str(open_folder / "two-clients")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_database_refuses_is_one_line(database: Database, settings: Settings, defs_dir: Path) -> None:
    make_films(database, films(5))
    _, count = sync_once(definition(), settings)
    assert count == 5
    given = {"defs_dir": defs_dir, "database_url": database.url, "state_dir": settings.state_dir}
    with open_collection("films", **given) as client:  # type: ignore[arg-type]
        client.search("a story")
        execute(database, "ALTER TABLE embeddings.collection RENAME COLUMN fingerprint TO something")
        for call in (lambda: client.search("a story"), client.status, lambda: client.sync(dry_run=True)):
            with pytest.raises(DatabaseError, match=r"^collection 'films': the database says: .*fingerprint") as caught:
                call()
            assert "\n" not in str(caught.value)


def test_where_things_are_can_be_said_instead_of_set_in_the_environment(
    database: Database, settings: Settings, defs_dir: Path
) -> None:
    client = open_collection(database_url=database.url, state_dir=settings.state_dir, defs_dir=defs_dir)
    assert client.definition.name == "films"
    assert client.status()["fingerprint"] is None
    with pytest.raises(ConfigurationError, match="did you mean 'films'"):
        open_collection("film", defs_dir=defs_dir)
    with pytest.raises(PipelineError, match="has no vectors yet; run"):
        client.search("lighthouse")


def test_every_exported_name_is_there_and_importing_the_package_loads_nothing() -> None:
    assert all(getattr(embeddings_pipeline, name) for name in embeddings_pipeline.__all__)
    assert set(dir(embeddings_pipeline)) == {*embeddings_pipeline.__all__, "__version__"}
    assert (Path(embeddings_pipeline.__file__).parent / "py.typed").is_file()
    script = (
        "import sys; before = set(sys.modules); import embeddings_pipeline\n"
        "ours = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; print(ours)\n"
        "from embeddings_pipeline import open_collection, PipelineError\n"
        "print([name for name in ('dagster', 'torch', 'faiss', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'embeddings_pipeline'}", "[]"]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = embeddings_pipeline.nonsense


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"query": None}, "query cannot be None: it may be a text"),
        ({"query": 3}, "query cannot be 3: "),
        ({"query": b"x"}, "query cannot be b'x': "),
        ({"query": ["x"]}, r"query cannot be \['x'\]: "),
        ({"query": " "}, "the query is blank"),
        ({"k": True}, "k cannot be True: it may be a whole number from 1 to 1000"),
        ({"k": 1.5}, "k cannot be 1.5: "),
        ({"k": "3"}, "k cannot be '3': "),
        ({"rerank": 1}, "rerank cannot be 1: it may be True, False, or None"),
        ({"k": 0}, "k cannot be 0: "),
        ({"k": 1001}, "k cannot be 1001: "),
        ({"index": "x"}, "index cannot be 'x': it may be 'pgvector' or 'faiss'"),
        ({"index": None}, "index cannot be None: "),
        ({"index": ["faiss"]}, r"index cannot be \['faiss'\]: "),
        ({"vectors": 3}, "vectors cannot be 3: it may be one of 'base', a list of them, or None for the first"),
        ({"vectors": ""}, "vectors cannot be '': "),
        ({"vectors": "bas"}, r"has no vector 'bas'; it has base \(did you mean 'base'\?\)"),
        ({"where": 3}, "where: 3 is no condition"),
        ({"where": {"title": "x"}}, "where: 'title' is not declared"),
        ({"profile": 3}, "profile cannot be 3: it may be the name of a profile"),
        ({"profile": ""}, "profile cannot be '': "),
    ],
)
def test_a_search_for_what_cannot_be_is_one_line_that_names_the_argument(
    defs_dir: Path, given: dict[str, Any], says: str
) -> None:
    nowhere = open_collection("films", defs_dir=defs_dir, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(ConfigurationError, match=says) as caught:
        nowhere.search(**{"query": "a story", **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [-1, 0, "x", 1.5, True])
def test_a_limit_that_cannot_be_is_named_before_anything_is_done(defs_dir: Path, limit: Any) -> None:
    nowhere = open_collection("films", defs_dir=defs_dir, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(ConfigurationError, match=r"limit cannot be .*: it may be a whole number from 1, or None"):
        nowhere.sync(limit=limit)


@pytest.mark.parametrize(
    "given", [{"name": 3}, {"name": b"films"}, {"defs_dir": 3}, {"state_dir": b"x"}, {"database_url": 3}]
)
def test_a_collection_cannot_be_opened_by_what_is_no_text(defs_dir: Path, given: dict[str, Any]) -> None:
    [argument] = given
    with pytest.raises(ConfigurationError, match=f"^{argument} cannot be .*: it may be "):
        open_collection(**{"name": "films", "defs_dir": defs_dir, **given})


def test_a_whole_number_of_numpy_is_one(database: Database, settings: Settings, defs_dir: Path) -> None:
    make_films(database, films(5))
    sync_once(definition(), settings)
    with open_collection("films", defs_dir=defs_dir, database_url=database.url, state_dir=settings.state_dir) as client:
        assert len(client.search("a story", k=np.int64(2))) == 2  # type: ignore[arg-type]
