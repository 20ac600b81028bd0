"""COPY's binary form, against what psycopg and pgvector themselves write and read."""

from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from pgvector import HalfVector, Vector
from pgvector.psycopg import register_vector
from psycopg import sql

from embeddings_pipeline.store import copy_binary
from embeddings_pipeline.store.copy_binary import columns_of, copy_blocks, copy_in, copy_out, jsonb

COLUMNS = {"id": "bigint", "hash": "bytea16", "embedding": "halfvec"}


@pytest.fixture(params=["halfvec", "vector"])
def storage(request):
    return request.param


@pytest.fixture
def connection(database, storage):
    with database.connect() as connection:
        connection.execute(f"CREATE TABLE t (id bigint, kind text, hash bytea, sure boolean, embedding {storage}(5))")
        yield connection


def write(connection, storage, vectors):
    n = len(vectors)
    columns = {
        "id": np.arange(n) - 1,
        "kind": np.full(n, b"base"),
        "hash": np.random.default_rng(1).integers(0, 256, (n, 16), np.uint8),
        "sure": np.arange(n) % 2 == 0,
        "embedding": vectors,
    }
    assert copy_in(connection, sql.Identifier("t"), columns, storage=storage) == n
    return columns


def read(connection, storage, dimension=5):
    query = sql.SQL("SELECT id, hash, embedding FROM t ORDER BY id")
    columns: dict[str, Any] = COLUMNS | {"embedding": storage}
    return copy_out(connection, query, columns, dimension=dimension)


@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_what_goes_in_comes_out(connection, storage, rows, monkeypatch):
    monkeypatch.setattr(copy_binary, "BLOCK_BYTES", 1000)  # several blocks, cut within a row
    vectors = np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)
    columns = write(connection, storage, vectors)
    result = read(connection, storage)
    np.testing.assert_array_equal(result["id"], columns["id"])
    assert [bytes(value) for value in result["hash"]] == [value.tobytes() for value in columns["hash"]]
    expected = vectors.astype(np.float16) if storage == "halfvec" else vectors
    assert result["embedding"].dtype == expected.dtype
    np.testing.assert_array_equal(result["embedding"], expected)


def test_pgvector_reads_what_we_wrote(connection, storage):
    register_vector(connection)
    columns = write(connection, storage, np.arange(15, dtype=np.float32).reshape(3, 5) / 8)
    rows = connection.execute("SELECT id, kind, hash, sure, embedding FROM t ORDER BY id").fetchall()
    for i, (id_, kind, hash_, sure, embedding) in enumerate(rows):
        assert (id_, kind, hash_, sure) == (i - 1, "base", columns["hash"][i].tobytes(), i % 2 == 0)
        read_back = embedding.to_numpy() if isinstance(embedding, HalfVector | Vector) else embedding
        np.testing.assert_array_equal(read_back, columns["embedding"][i])


def test_we_read_what_pgvector_wrote(connection, storage):
    connection.execute("INSERT INTO t VALUES (7, 'base', %s, true, '[1,-2,0.5,0,65504]')", [bytes(range(16))])
    result = read(connection, storage)
    assert result["id"].tolist() == [7]
    assert bytes(result["hash"][0]) == bytes(range(16))
    assert result["embedding"].tolist() == [[1, -2, 0.5, 0, 65504]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_and_nothing_is_written(connection, storage, bad):
    vectors = np.ones((3, 5), np.float32)
    vectors[1, 2] = bad
    with pytest.raises(psycopg.DataError), connection.transaction():
        write(connection, storage, vectors)
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


@pytest.mark.parametrize("storage", ["halfvec"], indirect=True)
def test_what_float16_cannot_hold_is_refused(connection, storage):
    with pytest.raises(psycopg.DataError, match="infinite"), connection.transaction():
        write(connection, storage, np.full((1, 5), 70000, np.float32))


def test_another_dimension_is_an_error_in_both_directions(connection, storage):
    with pytest.raises(psycopg.DataError, match="expected 5 dimensions"), connection.transaction():
        write(connection, storage, np.ones((2, 6), np.float32))
    write(connection, storage, np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match="another width"), connection.transaction():
        read(connection, storage, dimension=6)


def test_null_is_an_error(connection, storage):
    write(connection, storage, np.ones((2, 5), np.float32))
    connection.execute("UPDATE t SET hash = NULL WHERE id = 0")
    with pytest.raises(ValueError, match="another width"), connection.transaction():
        read(connection, storage)


def test_columns_of_different_lengths_are_an_error(connection, storage):
    columns: dict[str, np.ndarray] = {"id": np.arange(3), "embedding": np.ones((2, 5), np.float32)}
    with pytest.raises(ValueError, match="different lengths"):
        copy_in(connection, sql.Identifier("t"), columns, storage=storage)


def test_blocks_end_at_rows(connection, storage, monkeypatch):
    monkeypatch.setattr(copy_binary, "BLOCK_BYTES", 300)
    write(connection, storage, np.ones((50, 5), np.float32))
    query = sql.SQL("SELECT id FROM t ORDER BY id")
    blocks = list(copy_blocks(connection, query, {"id": "bigint"}, dimension=5))
    assert len(blocks) > 1
    assert np.concatenate([block["id"] for block in blocks]).tolist() == list(range(-1, 49))


@pytest.mark.parametrize("block_bytes", [1, 100, 2 << 20])
def test_arrow_columns_go_in_as_they_are(database, monkeypatch, block_bytes):
    monkeypatch.setattr(copy_binary, "BLOCK_BYTES", block_bytes)
    columns = {
        "key": ["a", "", "ü\n\t\\N", "x" * 100_000, None],
        "hash": [bytes(range(16)), b"\x00" * 16, None, b"\xff" * 16, b"\x00" * 15 + b"\x01"],
        "document": ['{"a": 12.50}', "[]", None, '"\\ud83c\\udfac"', '{"b":null}'],
        "number": [0, -1, 2**62, 4, 5],
        "sure": [True, False, True, True, False],
    }
    kinds = [pa.string(), pa.binary(16), pa.string(), pa.int64(), pa.bool_()]
    table = pa.table([pa.array(column, kind) for column, kind in zip(columns.values(), kinds, strict=True)], [*columns])
    table = pa.concat_tables([table[:2], table[2:4], table[4:]])  # in chunks, of which some begin within an array
    with database.connect() as connection:
        connection.execute("CREATE TABLE a (key text, hash bytea, document jsonb, number bigint, sure boolean)")
        assert (
            copy_in(connection, sql.Identifier("a"), {**columns_of(table), "document": jsonb(table["document"])}) == 5
        )
        rows = connection.execute("SELECT key, hash, document::text, number, sure FROM a").fetchall()
    assert [list(column) for column in zip(*rows, strict=True)] == [
        columns["key"],
        columns["hash"],
        ['{"a": 12.50}', "[]", None, '"🎬"', '{"b": null}'],
        columns["number"],
        columns["sure"],
    ]
