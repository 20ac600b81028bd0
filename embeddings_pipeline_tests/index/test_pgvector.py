"""The ANN indexes in PostgreSQL: valid, used, one a vector name, and never missing while they are replaced."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import psycopg
import pytest
from psycopg import sql

from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.index import pgvector_build
from embeddings_pipeline.index.pgvector import describe_indexes, ensure_index
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.indexes import AnnIndex, build_memory, index_name
from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline_tests.support.model_tables import (
    FINGERPRINT,
    add_vectors,
    make_collection,
    unit_vectors,
)
from embeddings_pipeline_tests.support.workbench import plain_role, wait_until

HNSW = IndexDefinition()
IVFFLAT = IndexDefinition(method="ivfflat")
NONE = IndexDefinition(method="none")


@pytest.fixture(params=["halfvec", "vector"])
def storage(request):
    return request.param


@pytest.fixture
def table(database):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(2000))
    return table


def indexes(database, table) -> list[AnnIndex]:
    with database.connect() as connection:
        return describe_indexes(connection, table)


def plan(database, query) -> str:
    with database.connect() as connection:
        connection.execute("ANALYZE")
        return "\n".join(row[0] for row in connection.execute(sql.SQL("EXPLAIN ") + query))


@pytest.mark.parametrize("config", [HNSW, IVFFLAT], ids=lambda config: config.method)
@pytest.mark.parametrize("relation", ["table", "view"])
def test_queries_use_the_index(database, storage, config, relation):
    table = make_collection(database, storage=storage)
    add_vectors(database, table, unit_vectors(3000))
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO embeddings.things_item (item_key, batch) SELECT i, 0 FROM generate_series(1, 3000) i"
        )
        connection.execute(
            "INSERT INTO embeddings.things_text (item_key, vector_name, chunk, content_hash, text, blank) "
            "SELECT i, 'base', 0, '', '', false FROM generate_series(1, 3000) i"
        )
    ensure_index(database, table, config, ["base"])
    query = sql.SQL("SELECT * FROM {} WHERE vector_name = 'base' ORDER BY embedding <=> {} LIMIT 10")
    vector = sql.Literal(str(unit_vectors(1)[0].tolist())) + sql.SQL("::" + storage)
    queried = table.identifier if relation == "table" else table.tables.view
    assert f"Index Scan using {index_name(table, 'base')}" in plan(database, query.format(queried, vector))


def test_hnsw_is_built_once_and_reported(database, table):
    first = ensure_index(database, table, HNSW, ["base"])
    (built,) = first.indexes
    assert (built.method, built.parameters) == ("hnsw", {"m": 16, "ef_construction": 64})
    assert (built.rows, built.reason) == (2000, "missing")
    assert built.build_seconds > 0 and built.bytes > 100_000
    (again,) = ensure_index(database, table, HNSW, ["base"]).indexes
    assert (again.build_seconds, again.reason, again.bytes) == (0, "", built.bytes)
    assert indexes(database, table) == [
        AnnIndex(built.name, "base", "hnsw", {"m": 16, "ef_construction": 64}, True, built.bytes)
    ]


def test_every_vector_name_has_an_index_and_no_other(database, table):
    add_vectors(database, table, unit_vectors(10), name="title", first_id=5000)
    report = ensure_index(database, table, HNSW, ["base", "title"])
    assert [(index.vector_name, index.rows) for index in report.indexes] == [("base", 2000), ("title", 10)]
    report = ensure_index(database, table, HNSW, ["title", "people"])
    assert report.dropped == (index_name(table, "base"),)
    assert {index.vector_name for index in indexes(database, table)} == {"title", "people"}
    assert ensure_index(database, table, NONE, ["title", "people"]).indexes == ()
    assert indexes(database, table) == []


def test_changed_parameters_or_method_rebuild(database, table):
    ensure_index(database, table, HNSW, ["base"])
    (built,) = ensure_index(database, table, IndexDefinition(m=8), ["base"]).indexes
    assert built.reason == "m was 16" and built.parameters["m"] == 8
    (built,) = ensure_index(database, table, IndexDefinition(m=8, ef_construction=32), ["base"]).indexes
    assert built.reason == "ef_construction was 64"
    (built,) = ensure_index(database, table, IVFFLAT, ["base"]).indexes
    assert built.reason == "was hnsw" and built.parameters == {"lists": 45}
    assert [index.name for index in indexes(database, table)] == [index_name(table, "base")]


def test_ivfflat_is_built_anew_when_its_rows_are_fourfold_or_a_fourth(database):
    table = make_collection(database)

    def reason() -> str:
        return ensure_index(database, table, IVFFLAT, ["base"]).indexes[0].reason

    assert reason() == "missing"
    assert reason() == ""  # empty: one list
    add_vectors(database, table, unit_vectors(100))
    assert reason() == "100 rows in 1 lists"
    add_vectors(database, table, unit_vectors(250), first_id=1000)
    assert reason() == ""
    add_vectors(database, table, unit_vectors(50), first_id=2000)
    assert reason() == "400 rows in 10 lists"
    with database.connect() as connection:
        connection.execute(f"DELETE FROM embeddings.{table.name} WHERE text_id >= 100")
    assert reason() == "99 rows in 20 lists"
    assert reason() == ""


def test_an_index_of_somebody_else_stays(database, table):
    with database.connect() as connection:
        connection.execute(
            f"CREATE INDEX mine ON embeddings.{table.name} USING hnsw (embedding halfvec_l2_ops) "
            "WHERE vector_name = 'base'"
        )
    ensure_index(database, table, HNSW, ["base"])
    ensure_index(database, table, NONE, ["base"])
    assert [index.name for index in indexes(database, table)] == ["mine"]


def test_the_index_is_never_missing_while_it_is_replaced(database, table):
    ensure_index(database, table, HNSW, ["base"])
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(sum(index.valid for index in indexes(database, table)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for m in (8, 12, 16):
        ensure_index(database, table, IndexDefinition(m=m), ["base"])
    done.set()
    watcher.join()
    assert len(seen) > 10 and min(seen) >= 1


def test_readers_and_writers_go_on_while_it_is_replaced(database, table):
    ensure_index(database, table, HNSW, ["base"])
    slowest, done = [0.0], threading.Event()

    def use() -> None:
        with database.connect(autocommit=True) as connection:
            connection.execute("SET lock_timeout = '3s'")
            while not done.is_set():
                began = time.monotonic()
                connection.execute(
                    f"UPDATE embeddings.{table.name} SET content_hash = 'x' WHERE text_id = (SELECT text_id FROM "
                    f"embeddings.{table.name} WHERE vector_name = 'base' ORDER BY embedding <=> %s::halfvec LIMIT 1)",
                    [str(unit_vectors(1)[0].tolist())],
                )
                slowest[0] = max(slowest[0], time.monotonic() - began)

    user = threading.Thread(target=use)
    user.start()
    ensure_index(database, table, IndexDefinition(m=8), ["base"])
    done.set()
    user.join()
    assert 0 < slowest[0] < 2


def hold_up(connection, table) -> None:
    """Write, and leave the transaction open: CREATE INDEX CONCURRENTLY waits for its end."""
    connection.execute(f"UPDATE embeddings.{table.name} SET content_hash = 'x' WHERE text_id = 1")


def builder(database, m=16):
    """Another process that says `waiting` when its CREATE INDEX is about to begin."""
    code = f"""
from embeddings_pipeline.config.definition import IndexDefinition
from embeddings_pipeline.index.pgvector import ensure_index
from embeddings_pipeline.index.pgvector_build import IndexBuilder
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.table import TableDestination
create = IndexBuilder._build
IndexBuilder._build = lambda *each: (print("begins", flush=True), create(*each))[-1]
table = TableDestination("things", {FINGERPRINT!r}, 32)
report = ensure_index(Database({database.url!r}), table, IndexDefinition(m={m}), ["base"])
print(repr(report.indexes[0].reason))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_killed_build_is_cleared_away(database, table, replaces):
    if replaces:
        ensure_index(database, table, IndexDefinition(m=8), ["base"])
    with database.connect() as older:
        hold_up(older, table)
        with builder(database) as process:
            assert process.stdout.readline() == "begins\n"
            until(lambda: any(not index.valid for index in indexes(database, table)))
            process.send_signal(signal.SIGKILL)
        assert [index.valid for index in indexes(database, table)] == [True, False][1 - replaces :]
    (built,) = ensure_index(database, table, HNSW, ["base"]).indexes
    assert [(index.name, index.valid) for index in indexes(database, table)] == [(built.name, True)]
    assert built.parameters["m"] == 16


def test_a_server_stops_the_build_of_a_client_that_was_killed(database, table):
    with database.connect() as older:
        hold_up(older, table)
        with builder(database) as process:
            process.stdout.readline()
            until(lambda: indexes(database, table))
            process.kill()
        with pytest.raises(VectorIndexError, match="not done within"):  # by the older transaction: the lock was free
            ensure_index(database, table, NONE, ["base"], deadline_seconds=4)
    ensure_index(database, table, NONE, ["base"])
    assert indexes(database, table) == []


def test_two_at_once_build_it_once(database, table):
    with database.connect() as older:
        hold_up(older, table)
        first = builder(database)
        assert first.stdout.readline() == "begins\n"
        until(lambda: indexes(database, table))
        second = builder(database)
        time.sleep(1.5)
        older.rollback()
        assert first.communicate()[0].strip() == "'missing'"
        assert second.communicate()[0].strip() == "''"
    assert [index.valid for index in indexes(database, table)] == [True]


@pytest.mark.parametrize("killed_after", ["build", "drop"])
def test_a_replacement_that_was_killed_half_way_is_completed(database, table, killed_after):
    ensure_index(database, table, IndexDefinition(m=8), ["base"])
    name = index_name(table, "base")
    with database.connect(autocommit=True) as connection:
        connection.execute(
            f"CREATE INDEX {name}_new ON embeddings.{table.name} USING hnsw (embedding halfvec_cosine_ops) "
            "WITH (m = 16, ef_construction = 64) WHERE vector_name = 'base'"
        )
        if killed_after == "drop":
            connection.execute(f"DROP INDEX embeddings.{name}")
        oid = connection.execute(f"SELECT 'embeddings.{name}_new'::regclass::oid").fetchone()
        (index,) = ensure_index(database, table, HNSW, ["base"]).indexes
        assert index.build_seconds == 0 and index.parameters["m"] == 16
        assert connection.execute(f"SELECT 'embeddings.{name}'::regclass::oid").fetchone() == oid
    assert [each.name for each in indexes(database, table)] == [name]


def test_the_deadline_is_one_clear_line_and_the_old_index_stays(database, table, monkeypatch):
    monkeypatch.setattr(pgvector_build, "REMOVE_SECONDS", 0.5)
    ensure_index(database, table, HNSW, ["base"])
    with database.connect() as older:
        hold_up(older, table)
        with pytest.raises(VectorIndexError, match="not done within 1 s") as caught:
            ensure_index(database, table, IndexDefinition(m=8), ["base"], deadline_seconds=1)
    assert "\n" not in str(caught.value) and "pg_stat_activity" in str(caught.value)
    assert [index.parameters["m"] for index in indexes(database, table) if index.valid] == [16]


def test_the_roles_own_time_limit_does_not_count(database, table):
    with database.connect(autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET statement_timeout = '1ms'").format(name))
        connection.execute(sql.SQL("ALTER DATABASE {} SET lock_timeout = '1ms'").format(name))
    assert ensure_index(database, table, HNSW, ["base"]).indexes[0].reason == "missing"


def test_too_many_dimensions_name_the_remedy(database):
    for storage, dimension, remedy in (
        ("vector", 3072, r"`storage: halfvec` \(up to 4000\) or `index: {method: none}`"),
        ("vector", 5000, "set `index: {method: none}`"),
        ("halfvec", 4096, "set `index: {method: none}`"),
    ):
        with pytest.raises(VectorIndexError, match=remedy):
            wide = TableDestination("wide", "f", dimension, storage)  # type: ignore[arg-type]
            ensure_index(database, wide, HNSW, ["base"])
    table = make_collection(database, dimension=4096)
    assert ensure_index(database, table, NONE, ["base"]).indexes == ()


def test_a_missing_table_is_one_clear_line(database):
    with pytest.raises(VectorIndexError, match=r"embeddings\.gone_vector_f: there is no such table"):
        ensure_index(database, TableDestination("gone", "f", 3), HNSW, ["base"])


def test_the_longest_names_fit():
    table = TableDestination("c" * 30, "0123456789abcdef", 384)
    names = {index_name(table, f"{'v' * 19}{i}") + "_new" for i in range(10)}
    assert len(names) == 10 and all(len(name) <= 63 for name in names)


@pytest.mark.parametrize(
    "config", [HNSW, IVFFLAT, IndexDefinition(m=48, ef_construction=100)], ids=["hnsw", "ivf", "m48"]
)
def test_a_build_stays_in_the_memory_that_is_asked_for(database, config):
    table = make_collection(database, dimension=16)
    add_vectors(database, table, unit_vectors(5000, 16))
    ivfflat = config.method == "ivfflat"
    parameters = {"lists": 141} if ivfflat else {"m": config.m, "ef_construction": config.ef_construction}
    needed = build_memory(table, parameters, 5000) - (64 << 20)  # less the margin
    options = ", ".join(f"{key} = {value}" for key, value in parameters.items())
    notices: list[str] = []
    with database.connect(autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        connection.execute(f"SET maintenance_work_mem = '{needed // 1024}kB'")
        try:
            connection.execute(
                f"CREATE INDEX ON embeddings.{table.name} USING {config.method} (embedding halfvec_cosine_ops) "
                f"WITH ({options})"
            )
        except psycopg.errors.ProgramLimitExceeded as error:
            pytest.fail(str(error))
    assert notices == []


@pytest.mark.parametrize("plain", [False, True], ids=["superuser", "plain role"])
def test_a_build_that_waits_says_for_whom(database, table, plain, monkeypatch, caplog):
    monkeypatch.setattr(pgvector_build, "SAY_AFTER_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        # a role without rights does not see how long another's transaction has been open
        url = stack.enter_context(plain_role(database, "builder")) if plain else database.url
        report = stack.enter_context(database.connect(application_name="a long report"))
        report.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        report.execute("SELECT count(*) FROM pg_class")
        building = threading.Thread(target=ensure_index, args=(Database(url), table, HNSW, ["base"]))
        building.start()
        wait_until(lambda: "transaction that" in caplog.text, 20)
        assert "waits for a transaction that a long report has had open for " in caplog.text
        assert ("an unknown time; end it" in caplog.text) == plain
        assert building.is_alive()
        report.rollback()
        building.join()
    assert [index.valid for index in indexes(database, table)] == [True]
