"""The test suite on a server that is not the embedded one: over TCP, as a role that owns one database and no more."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.server.embedded import server_binaries
from embeddings_pipeline_tests.support.workbench import wait_until

PROJECT = Path(__file__).resolve().parents[2]
ROOMS = [("store",), ("ledger", "pipeline", "search")]  # what two long tests have time for
EXPECTED = 150  # tests that pass in each, at least; the others make roles, databases or a server


@contextmanager
def over_tcp(folder: Path) -> Iterator[str]:
    """The address and port of a PostgreSQL as others run it, on 127.0.0.1, where a password is asked for.

    Its administrator has made the role `plain`, its database `plain_tests`, and the extension in it.
    """
    folder.mkdir(mode=0o711)
    database = open_database(Settings(embeddings_state_dir=folder))
    with database.connect(autocommit=True) as administrator:
        administrator.execute("CREATE ROLE plain LOGIN PASSWORD 'plain' NOSUPERUSER NOCREATEDB NOCREATEROLE")
        administrator.execute("CREATE DATABASE plain_tests OWNER plain")
    with Database(database.ensure_sibling("plain_tests")).connect() as administrator:
        administrator.execute("CREATE EXTENSION vector")
    database.close()  # it stops; from here on it is no longer the embedded one
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    data = folder / "postgres" / "data"
    owner = data.stat()
    user = [owner.st_uid, owner.st_gid] if os.geteuid() == 0 else None
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    process = subprocess.Popen(
        [
            str(server_binaries(user) / "postgres"),
            "-D",
            str(data),
            *(f"--{name}={value}" for name, value in settings.items()),
        ],
        cwd=data,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user[0] if user else None,
        group=user[1] if user else None,
        extra_groups=[] if user else None,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rooms", ROOMS, ids=" ".join)
def test_the_suite_runs_as_a_plain_role_that_owns_one_database(open_folder: Path, rooms: tuple[str, ...]) -> None:
    with over_tcp(open_folder / f"plain-role-{rooms[0]}") as address:
        url = f"postgresql://plain:plain@{address}/plain_tests"
        wait_until(lambda: answers(url))
        folders = [str(PROJECT / "embeddings_pipeline_tests" / room) for room in rooms]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "not slow", "-p", "no:cacheprovider", *folders],
            env={**os.environ, "EMBEDDINGS_TESTS_DATABASE_URL": url},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= EXPECTED, done.stdout[-5000:]
    reasons = set(re.findall(r"^SKIPPED .*: (.*)$", done.stdout, re.MULTILINE))
    assert all("EMBEDDINGS_TESTS_DATABASE_URL" in reason or "is missing" in reason for reason in reasons), reasons
