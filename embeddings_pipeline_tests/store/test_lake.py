"""The lake: whose files are read and swept, and folders in which nothing may be deleted."""

import os
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import LakeError
from embeddings_pipeline.pipeline.renaming import _rename_in_lake
from embeddings_pipeline.store.lake import (
    Lake,
    _written,
    embeddings_schema,
    open_lake,
    vectors_from_arrow,
    vectors_to_arrow,
)
from embeddings_pipeline.store.models import Identity

TABLE = pa.table({"content_hash": [b"0" * 16]})


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(pafs.LocalFileSystem(), str(tmp_path / "lake"), Identity("ours", "1"))


def long_ago(lake: Lake) -> list[str]:
    """Every file becomes old; their names."""
    files = sorted(Path(lake.root).rglob("*.parquet"))
    for n, file in enumerate(files):
        os.utime(file, (n + 1, n + 1))
    return [file.name for file in files]


def test_a_file_of_another_database_is_neither_read_nor_swept(lake: Lake) -> None:
    theirs = replace(lake, identity=Identity("theirs", "1"))
    lake.write(TABLE, "films/item_texts", 0, "a")
    for run in ("b", "c"):
        theirs.write(TABLE, "films/item_texts", 0, run)
    newest = [each.newest("films/item_texts", 0) for each in (lake, theirs)]
    assert [found and Path(found[0]).name for found in newest] == ["a.parquet", "c.parquet"]
    lake.write(TABLE, "films/item_texts", 0, "d")
    long_ago(lake)
    lake.sweep("films/item_texts", 0, keep="d.parquet")
    assert long_ago(lake) == ["b.parquet", "c.parquet", "d.parquet"]
    theirs.sweep("films/item_texts", 0, keep="c.parquet")
    assert long_ago(lake) == ["c.parquet", "d.parquet"]


@pytest.mark.parametrize("storage", ["halfvec", "vector"])
@pytest.mark.parametrize("rows", [0, 3])
def test_vectors_come_back_as_they_were_written(lake: Lake, storage: str, rows: int) -> None:
    schema = embeddings_schema(4, storage)
    vectors = np.arange(rows * 4).reshape(rows, 4).astype("f2" if storage == "halfvec" else "f4")
    texts = [[b"0" * 16] * rows, ["fp"] * rows, [True] * rows]
    columns = [["key"] * rows, ["base"] * rows, range(rows), *texts, vectors_to_arrow(vectors, schema)]
    written = pa.table([pa.array(c) if isinstance(c, range) else c for c in columns], schema=schema)
    path = lake.write(written.slice(1) if rows else written, "films/embeddings/fp", 0, "new")
    assert pq.read_schema(path).field("embedding").type == pa.binary(vectors.itemsize * 4)
    read = lake._read(path)  # not what is in memory
    assert read.schema.equals(schema)
    np.testing.assert_array_equal(vectors_from_arrow(read["embedding"]), vectors[1:])


def test_a_file_of_an_earlier_release_has_its_vectors_as_lists(lake: Lake) -> None:
    schema = embeddings_schema(4, "halfvec")
    vectors = np.arange(8).reshape(2, 4).astype("f2")
    columns = [["a", "b"], ["base"] * 2, [0, 0], [b"0" * 16] * 2, ["fp"] * 2, [True] * 2]
    folder = Path(lake.root, "films/embeddings/fp/000000")
    folder.mkdir(parents=True)
    pq.write_table(pa.table([*columns, vectors_to_arrow(vectors, schema)], schema=schema), folder / "old.parquet")
    _, read = lake.newest("films/embeddings/fp", 0) or ("", pa.table({}))
    np.testing.assert_array_equal(vectors_from_arrow(read["embedding"]), vectors)


def test_a_vector_may_be_of_any_database_if_there_is_none_of_ours(lake: Lake) -> None:
    theirs = replace(lake, identity=Identity("theirs", "1"))
    theirs.write(TABLE, "films/embeddings/fp", 0, "a")
    assert lake.newest("films/embeddings/fp", 0) is None
    path, _ = lake.newest("films/embeddings/fp", 0, of_any_database=True) or ("", None)
    assert path.endswith("a.parquet")
    lake.write(TABLE, "films/embeddings/fp", 0, "b")
    theirs.write(TABLE, "films/embeddings/fp", 0, "c")
    path, _ = lake.newest("films/embeddings/fp", 0, of_any_database=True) or ("", None)
    assert path.endswith("b.parquet")


def test_files_of_before_the_identities_are_ours(lake: Lake) -> None:
    replace(lake, identity=None).write(TABLE, "films/item_texts", 0, "a")
    assert lake.newest("films/item_texts", 0) is not None


@pytest.fixture
def append_only(lake: Lake):
    """The lake, once `begin` was called, in folders from which nothing can be deleted."""
    if os.geteuid() != 0 or sys.platform != "linux" or not shutil.which("chattr"):
        pytest.skip("chattr needs root on Linux")

    def chattr(flag: str) -> int:
        folders = [lake.root, *(str(path) for path in Path(lake.root).rglob("*") if path.is_dir())]
        return subprocess.run(["chattr", flag, *folders], capture_output=True, check=False).returncode

    def begin() -> None:
        if chattr("+a"):
            pytest.skip("this file system has no chattr +a")

    yield begin
    chattr("-a")


def test_sweeping_where_nothing_may_be_deleted_is_one_warning(lake: Lake, append_only, caplog) -> None:
    for batch in (0, 1):
        for run in ("a", "b"):
            lake.write(TABLE, "films/item_texts", batch, run)
    names = long_ago(lake)
    append_only()
    for batch in (0, 1):
        lake.sweep("films/item_texts", batch, keep="b.parquet")
    assert sorted(path.name for path in Path(lake.root).rglob("*.parquet")) == sorted(names)
    assert [record.getMessage().startswith("warning: old files of the lake") for record in caplog.records] == [True]
    lake.delete_folder(f"{lake.root}/films")
    assert "stays, delete it yourself" in caplog.text


def test_a_folder_is_relative_to_the_project_wherever_a_command_is_started(tmp_path: Path, monkeypatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(project))
    monkeypatch.chdir(elsewhere)
    settings = Settings(lake_uri="data/lake", embeddings_state_dir=Path("data/state"))
    assert open_lake(settings).root == str(project / "data/lake")
    assert settings.state_dir == project / "data/state"
    assert open_lake(Settings(embeddings_state_dir=Path("data/state"))).root == str(project / "data/state/lake")


def test_a_collection_is_renamed_though_its_old_files_cannot_be_deleted(lake: Lake, append_only, caplog) -> None:
    lake.write(TABLE, "films/item_texts", 0, "a")
    append_only()
    for _ in range(2):  # a renaming that was killed is repeated
        _rename_in_lake(lake, "films", "movies")
        assert lake.newest("movies/item_texts", 0) is not None
    assert "stays, delete it yourself" in caplog.text


@pytest.mark.parametrize("uri", ["s3://", "s3://key:s3cret@", "nonsense://user:s3cret@host/path"])
def test_an_address_that_is_no_lake_is_one_line_without_a_secret(uri: str) -> None:
    with pytest.raises(
        LakeError, match=r"^LAKE_URI .* cannot be opened: .*; use a folder or s3://bucket/path$"
    ) as told:
        open_lake(Settings(lake_uri=uri))
    assert "s3cret" not in "".join(traceback.format_exception(told.value))


def test_what_was_written_last_is_in_memory_as_long_as_its_file_is_the_same(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(lake.write(TABLE, "films/item_texts", 0, "a"))
    content = path.read_bytes()
    _, table = lake.newest("films/item_texts", 0) or ("", None)
    assert table.column("content_hash").to_pylist() == [b"0" * 16]
    path.write_bytes(content[:-8])  # as a run leaves it that is killed
    assert lake.newest("films/item_texts", 0) is None
    other = pa.table({"content_hash": [b"1" * 16, b"2" * 16]})
    pq.write_table(other, path)
    _, table = lake.newest("films/item_texts", 0) or ("", None)
    assert table.num_rows == 2
    monkeypatch.setattr("embeddings_pipeline.store.lake.KEPT_BYTES", 100)
    for run in range(20):
        lake.write(TABLE, "films/item_texts", 1, f"run{run:02}")
    assert _written._bytes <= 100
    assert lake.newest("films/item_texts", 1, "run00") is not None  # forgotten, and read


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_begun(lake: Lake, tmp_path: Path) -> None:
    lake.check_writable()
    assert not list(Path(lake.root).iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        LakeError, match=r"^the lake cannot be written at .*/file/lake: [^\n]*; make room or allow writing$"
    ):
        replace(lake, root=str(tmp_path / "file" / "lake")).check_writable()
