"""FAISS generations: exact, atomic, verified, and compared with the table."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.index import faiss_build, faiss_read
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import open_index, read_manifest
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.index.snapshot import TableVersion, table_version
from embeddings_pipeline.store.destination.table import TableDestination
from embeddings_pipeline_tests.support.model_tables import (
    FINGERPRINT,
    add_vectors,
    make_collection,
    raise_version,
    unit_vectors,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "faiss"


@pytest.fixture
def table(database):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(500))
    return table


def generations(folder):
    return sorted(path.name for path in (folder / "things").iterdir() if path.is_dir())


def in_process(code, database, folder, **popen):
    """A Python process that has `database`, `table` (of `things`) and `folder`."""
    prelude = f"""
    import sys
    from pathlib import Path
    from embeddings_pipeline.index import faiss_build, faiss_publish, faiss_read, parity
    from embeddings_pipeline.store.database import Database
    from embeddings_pipeline.store.destination.table import TableDestination
    database, folder = Database({database.url!r}), Path({str(folder)!r})
    table = TableDestination("things", {FINGERPRINT!r}, 32)
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **popen)


@pytest.mark.parametrize("storage", ["halfvec", "vector"])
def test_search_returns_the_exact_nearest(database, folder, storage):
    table = make_collection(database, storage=storage)
    vectors = unit_vectors(300)
    add_vectors(database, table, vectors, first_id=1000)
    manifest = build(database, table, folder)
    queries = unit_vectors(7, seed=1) * 3  # of another length: cosine does not mind
    scores, ids = open_index(folder, "things").search("base", queries, 10)

    exact = (queries / 3) @ vectors.astype(np.float16 if storage == "halfvec" else np.float32).T.astype(np.float32)
    order = np.argsort(-exact, axis=1)[:, :10]
    np.testing.assert_array_equal(ids, order + 1000)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), atol=1e-5)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
    assert manifest.vectors["base"].exact and manifest.recall_at_10 == 1


def test_vectors_that_are_not_of_length_one_are_ranked_by_cosine(database, folder):
    table = make_collection(database)
    vectors = unit_vectors(100)
    add_vectors(database, table, vectors * np.linspace(0.1, 9, 100, dtype=np.float32)[:, None])
    build(database, table, folder)
    scores, ids = open_index(folder, "things").search("base", vectors, 1)
    np.testing.assert_array_equal(ids[:, 0], np.arange(1, 101))
    np.testing.assert_allclose(scores, 1, atol=2e-3)


def test_manifest_says_what_the_generation_was_made_from(database, folder, table):
    add_vectors(database, table, unit_vectors(20, seed=3), name="title", first_id=9000)
    manifest = build(database, table, folder)
    assert read_manifest(folder, "things") == manifest
    of = (manifest.fingerprint, manifest.database, manifest.epoch, manifest.version, manifest.stamp)
    with database.connect() as connection:
        assert table_version(connection, "things") == TableVersion(*of)
    assert (manifest.version, manifest.dimension, manifest.count) == (2, 32, 520)
    assert {name: part.vectors for name, part in manifest.vectors.items()} == {"base": 500, "title": 20}


def test_reading_the_manifest_does_not_import_faiss(database, folder, table):
    build(database, table, folder)
    code = "print(faiss_read.read_manifest(folder, 'things').count, 'faiss' in sys.modules)"
    assert in_process(code, database, folder).communicate()[0].strip() == "500 False"


def test_an_empty_table_gives_an_empty_generation(database, folder):
    manifest = build(database, make_collection(database), folder)
    opened = open_index(folder, "things")
    scores, ids = opened.search("base", unit_vectors(2), 3)
    assert manifest.count == 0
    assert ids.tolist() == [[-1] * 3] * 2 and np.isneginf(scores).all()
    assert check_parity(database, make_table(), opened).ok


def make_table(**changes: Any) -> TableDestination:
    fields: dict[str, Any] = {"collection": "things", "fingerprint": FINGERPRINT, "dimension": 32} | changes
    return TableDestination(**fields)


def test_fewer_vectors_than_asked_for_are_padded(database, folder):
    table = make_collection(database)
    add_vectors(database, table, unit_vectors(2))
    build(database, table, folder)
    scores, ids = open_index(folder, "things").search("base", unit_vectors(1), 5)
    assert ids[0, 0] == 1 and ids[0, 2:].tolist() == [-1, -1, -1] and np.isneginf(scores[0, 2:]).all()


def test_queries_of_another_dimension_are_an_error(database, folder, table):
    build(database, table, folder)
    with pytest.raises(ValueError, match="need \\(n, 32\\)"):
        open_index(folder, "things").search("base", unit_vectors(1, 16), 5)


def test_above_the_limit_recall_is_measured_and_reached(database, folder, monkeypatch):
    monkeypatch.setattr(faiss_build, "EXACT_BELOW", 5000)
    table = make_collection(database)
    centres = unit_vectors(50, seed=5)
    vectors = centres[np.random.default_rng(0).integers(0, 50, 6000)] + 0.1 * unit_vectors(6000)
    add_vectors(database, table, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    manifest = build(database, table, folder)
    assert manifest.vectors["base"].index_type.startswith("IVF77,SQfp16,nprobe=")
    assert not manifest.vectors["base"].exact
    assert manifest.recall_at_10 >= faiss_build.WANTED_RECALL
    parity = check_parity(database, table, open_index(folder, "things"))
    assert parity.ok and parity.recall_at_10 >= faiss_build.LEAST_RECALL and parity.sampled == 50


def test_three_generations_stay_and_an_open_one_still_answers(database, folder, table):
    first = build(database, table, folder)
    opened = open_index(folder, "things")
    for _ in range(4):
        last = build(database, table, folder)
    assert len(generations(folder)) == 3 and first.generation not in generations(folder)
    assert read_manifest(folder, "things") == last
    assert opened.search("base", unit_vectors(1), 1)[1].tolist() == [[1]]


def test_opening_is_done_once_a_generation(database, folder, table):
    build(database, table, folder)
    assert open_index(folder, "things") is open_index(folder, "things")
    before = open_index(folder, "things")
    build(database, table, folder)
    assert open_index(folder, "things") is not before


def watched_hashing(monkeypatch):
    """The names of the files that are hashed from now on."""
    hashed: list[str] = []
    verify = faiss_read._verify

    def watched(path, expected):
        hashed.append(path.name)
        verify(path, expected)

    monkeypatch.setattr(faiss_read, "_verify", watched)
    return hashed


def mapped(folder):
    """The index files below the folder that this process has mapped into its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if ".faiss" in line and str(folder) in line}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_a_process_maps_the_current_generation_of_each_collection_and_no_other(database, folder, table, monkeypatch):
    hashed = watched_hashing(monkeypatch)
    build(database, table, folder)
    for n in range(12):  # more collections than a small cache would hold
        shutil.copytree(folder / "things", folder / f"other{n}")
    names = ["things", *(f"other{n}" for n in range(12))]
    for name in [*names, *names]:
        open_index(folder, name)
    assert len(hashed) == 2 * len(names) and len(mapped(folder)) == len(names)
    new = build(database, table, folder)
    for n in range(3):
        shutil.rmtree(folder / f"other{n}")
    open_index(folder, "things")
    assert len(mapped(folder)) == len(names) - 3
    assert {path.split("/")[-2] for path in mapped(folder / "things")} == {new.generation}


def test_threads_that_open_a_new_generation_hash_it_once(database, folder, table, monkeypatch):
    hashed = watched_hashing(monkeypatch)
    build(database, table, folder)
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: open_index(folder, "things"), range(16)))
    assert sorted(hashed) == ["base.faiss", "base.ids.npy"] and len({id(each) for each in opened}) == 1


NFS = """
import errno, fcntl, os
flock = fcntl.flock
def nfs(file, operation):  # flock(2), "NFS details"
    number = file if isinstance(file, int) else file.fileno()
    mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and mode == os.O_RDONLY or operation & fcntl.LOCK_SH and mode == os.O_WRONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return flock(file, operation)
fcntl.flock = nfs
(folder / "things").mkdir(parents=True)
(folder / "things" / ".building-deadbeef").mkdir()
for _ in range(2):
    faiss_build.build(database, table, folder)
print(sorted(path.name for path in (folder / "things").glob(".building-*")))
"""


def test_a_folder_on_nfs_is_locked_by_a_file_in_it(database, folder, table):
    assert in_process(NFS, database, folder).communicate()[0] == "[]\n"
    assert [path.name for path in (folder / "things" / generations(folder)[-1]).iterdir() if path.name == "lock"] == []
    assert len(generations(folder)) == 2


def test_another_model_is_refused(database, folder, table):
    with pytest.raises(VectorIndexError, match="model feed is not the current one"):
        build(database, make_table(fingerprint="feed"), folder)
    with pytest.raises(VectorIndexError, match="no FAISS index"):
        open_index(folder, "things")
    assert read_manifest(folder, "things") is None


def test_an_older_version_never_replaces_a_newer_one(database, folder, table):
    slow: list[bool] = []

    def overtaken():
        if not slow:
            slow.append(True)
            add_vectors(database, table, unit_vectors(1, seed=7), first_id=9000)
            build(database, table, folder)

    with at_failpoint("faiss.publish", overtaken):
        manifest = build(database, table, folder)  # read version 1, and version 2 is published meanwhile
    assert manifest.version == 2 and manifest.count == 501
    assert read_manifest(folder, "things") == manifest and len(generations(folder)) == 1


def test_what_an_earlier_epoch_left_is_replaced(database, folder, table):
    with database.connect() as connection:
        connection.execute("UPDATE embeddings.collection SET version = 50")
    build(database, table, folder)
    with database.connect() as connection:
        connection.execute("UPDATE embeddings.collection SET version = 3, epoch = gen_random_uuid()")
    assert build(database, table, folder).version == 3
    assert read_manifest(folder, "things").version == 3


def test_two_builders_at_once_both_end_well(database, folder, table):
    code = """
    for _ in range(5):
        faiss_build.build(database, table, folder)
    opened = faiss_read.open_index(folder, "things")
    print(parity.check_parity(database, table, opened).ok)
    """
    builders = [in_process(code, database, folder) for _ in range(2)]
    assert [builder.communicate()[0].strip() for builder in builders] == ["True", "True"]
    assert len(generations(folder)) == 3
    assert read_manifest(folder, "things").generation == generations(folder)[-1]


@pytest.mark.parametrize("stage", ["faiss_build._index", "faiss_publish.checksum_of", "faiss_publish._sync_folder"])
def test_a_killed_build_leaves_the_former_generation(database, folder, table, stage):
    before = build(database, table, folder)
    add_vectors(database, table, unit_vectors(1, seed=4), first_id=9000)
    code = f"""
    import os, signal
    {stage} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    faiss_build.build(database, table, folder)
    """
    assert in_process(code, database, folder).wait() == -signal.SIGKILL
    assert len(list((folder / "things").glob(".building-*"))) == 1
    assert read_manifest(folder, "things") == before
    assert open_index(folder, "things").search("base", unit_vectors(1), 1)[1].tolist() == [[1]]

    after = build(database, table, folder)
    assert after.count == 501 and generations(folder) == [before.generation, after.generation]


def test_a_build_in_another_process_is_not_swept(database, folder, table):
    code = """
    index = faiss_build._index
    faiss_build._index = lambda vectors: (print("here", flush=True), sys.stdin.read(), index(vectors))[-1]
    print(faiss_build.build(database, table, folder).generation)
    """
    with in_process(code, database, folder, stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "here\n"
        mine = build(database, table, folder)
        theirs = other.communicate("")[0].strip()
    assert generations(folder) == [mine.generation, theirs]
    assert read_manifest(folder, "things").generation == theirs


def test_a_generation_killed_before_it_became_current_is_harmless(database, folder, table):
    before = build(database, table, folder)
    shutil.copytree(folder / "things" / before.generation, folder / "things" / "000002-deadbeef")
    assert read_manifest(folder, "things") == before
    assert build(database, table, folder).generation.startswith("000003-")


@pytest.mark.parametrize("room", [300, 20_000, 32_050])
def test_a_full_disk_keeps_the_former_generation(database, folder, table, room):
    before = build(database, table, folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(VectorIndexError, match="cannot be written") as caught:
            build(database, table, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and "embeddings-pipeline sync" in str(caught.value)
    assert generations(folder) == [before.generation] and read_manifest(folder, "things") == before


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
@pytest.mark.parametrize("kilobytes", [16, 36])  # too small for the vectors; too small for vectors and ids
def test_a_small_file_system_is_one_clear_line(database, tmp_path, table, kilobytes):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(VectorIndexError, match="No space left on device"):
            build(database, table, mounted)
        assert generations(mounted) == []
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_folder_that_cannot_be_written_is_one_clear_line(database, tmp_path, table):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(VectorIndexError, match=r"cannot be written to .*/file/things: (File exists|Not a directory)"):
        build(database, table, tmp_path / "file")


@pytest.mark.parametrize("file", ["base.faiss", "base.ids.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_named_and_mended(database, folder, table, file, damage):
    manifest = build(database, table, folder)
    path = folder / "things" / manifest.generation / file
    content = path.read_bytes()
    if damage == "flip":
        place = content.index(b"500") if file == "manifest.json" else len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[:-5])
    else:
        path.unlink()
    with pytest.raises(VectorIndexError) as caught:
        open_index(folder, "things")
    message = str(caught.value)
    assert str(path) in message and "embeddings-pipeline sync" in message and "\n" not in message
    build(database, table, folder)
    assert open_index(folder, "things").search("base", unit_vectors(1), 1)[1].tolist() == [[1]]


@pytest.mark.parametrize("content", [b"", b"../elsewhere\n", b"\xff\xfe", b"000009-deadbeef\n"])
def test_a_damaged_pointer_is_found_and_mended(database, folder, table, content):
    build(database, table, folder)
    (folder / "things" / "CURRENT").write_bytes(content)
    with pytest.raises(VectorIndexError, match="embeddings-pipeline sync"):
        read_manifest(folder, "things")
    build(database, table, folder)
    assert read_manifest(folder, "things").count == 500


def test_a_manifest_of_another_format_is_named_as_such(database, folder, table):
    manifest = build(database, table, folder)
    path = folder / "things" / manifest.generation / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(VectorIndexError, match="another version of embeddings-pipeline"):
        read_manifest(folder, "things")


def test_readers_never_fail_while_generations_come_and_go(database, folder, table):
    build(database, table, folder)
    code = """
    for _ in range(12):
        faiss_build.build(database, table, folder)
    """
    with in_process(code, database, folder) as builder:
        searches = 0
        while builder.poll() is None:
            assert open_index(folder, "things").search("base", unit_vectors(1), 1)[1].tolist() == [[1]]
            searches += 1
    assert builder.returncode == 0 and searches > 10


def test_vectors_and_version_are_of_one_snapshot(database, folder, table):
    def committed_in_between():
        with database.connect() as connection:
            connection.execute(f"DELETE FROM embeddings.{table.name}")
            raise_version(connection)

    with at_failpoint("faiss.snapshot", committed_in_between):
        manifest = build(database, table, folder)
    assert (manifest.version, manifest.count) == (1, 500)


@pytest.mark.parametrize("order", ["torch, faiss", "faiss, torch"])
def test_torch_and_faiss_work_in_one_process(order):
    code = f"""
    import {order}
    import numpy as np
    x = np.random.default_rng(0).standard_normal((20000, 64)).astype("float32")
    index = faiss.IndexFlatIP(64)
    index.add(x)
    for _ in range(3):
        torch.from_numpy(x) @ torch.from_numpy(x[:500]).T
        index.search(x[:200], 10)
    print("well")
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "well", (done.stderr, time.monotonic() - began)
