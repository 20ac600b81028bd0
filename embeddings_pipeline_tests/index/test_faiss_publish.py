"""FAISS generations are published whole, by one process at a time, whatever ends or is damaged meanwhile."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.failpoints import at_failpoint
from embeddings_pipeline.index.faiss_build import build
from embeddings_pipeline.index.faiss_read import open_index, read_manifest
from embeddings_pipeline_tests.support.generations import generations, in_process, make_table
from embeddings_pipeline_tests.support.model_tables import (
    add_vectors,
    raise_version,
    unit_vectors,
)

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
