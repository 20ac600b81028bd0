"""A key is in no output, event, plan, table, file or list of processes, though the server repeats it."""

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.server.binaries import server_binaries
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.databases import name_of
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.hosted import KEY
from embeddings_pipeline_tests.support.workbench import by_name, definition, execute, films, make_films

HEADER = "header-secret-9876543210"
SECRETS = [
    form
    for secret in (KEY, HEADER)
    for form in (secret.encode(), secret.encode().hex().encode(), base64.b64encode(secret.encode()).rstrip(b"="))
]
LOOKS = ("status --json", "profile show hosted --json", "profile list --json", "cache statistics --json")


@pytest.fixture
def service(database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server whose profile the collection `films` has, with a key and a header of secrets; it refuses them at first,
    and repeats them.
    """
    make_films(database, films(30))
    monkeypatch.setenv("SERVICE_KEY", KEY)
    monkeypatch.setenv("SERVICE_HEADER", HEADER)
    with EmbeddingServer(latency=0.5) as server:
        hosted = {"name": "hosted", "provider": "openai", "model": "text-embedding-3-small", "dimensions": 64}
        hosted |= {"url": server.url, "key_variable": "SERVICE_KEY", "headers": {"X-Team": "${SERVICE_HEADER}"}}
        one = definition(profile="hosted", profiles=by_name(hosted, {**hosted, "name": "other", "dimensions": 32}))
        attributes = one.attributes.model_dump(exclude_defaults=True, mode="json")
        defs = tmp_path / "defs" / "films" / "defs.yaml"
        defs.parent.mkdir(parents=True)
        defs.write_text(yaml.safe_dump({"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}))
        monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(defs.parents[1]))
        yield server


def run(command: str, file: Path) -> tuple[int, list[str]]:
    """Its exit code, and the command lines of its processes; what it prints is added to the file."""
    words = [sys.executable, "-m", "embeddings_pipeline", *command.split()]
    lines: set[str] = set()
    with (
        file.open("ab") as output,
        subprocess.Popen(words, cwd=PROJECT, env=os.environ, stdout=output, stderr=output) as process,
    ):
        while process.poll() is None:
            for each in psutil.process_iter(["cmdline"]):
                lines.add(" ".join(each.info["cmdline"] or ()))
            time.sleep(0.1)
    return process.returncode, sorted(lines)


def dump(database: Database, name: str, file: Path) -> None:
    url = replace(database, url=database.ensure_sibling(name)).url
    subprocess.run([server_binaries() / "pg_dump", "--inserts", "-f", file, url], check=True)


@pytest.mark.timeout(300)
def test_a_key_is_nowhere(database: Database, project: Settings, service: EmbeddingServer, tmp_path: Path) -> None:
    written = tmp_path / "written"
    written.mkdir()
    said = f"Bearer {KEY} of {HEADER} is not welcome"
    service.fail("status", status=401, body={"error": {"message": said, "code": None}}, times=100)
    code, processes = run("sync", written / "output")
    assert code == 1 and any(" sync" in line for line in processes)
    assert "Bearer *** of *** is not welcome" in (written / "output").read_text()
    while service.next_fault():
        pass
    for command in ("sync --dry-run --json", "sync", "profile plan other", "profile plan other --json", *LOOKS):
        code, more = run(command, written / "output")
        assert code == 0, (written / "output").read_text()
        processes += more
    assert {headers["authorization"] for headers in service.headers} == {f"Bearer {KEY}"}
    assert {headers["x-team"] for headers in service.headers} == {HEADER}
    dump(database, name_of(database), written / "ours.sql")
    dump(database, f"{name_of(database)}_dagster", written / "dagster.sql")
    (written / "ps").write_text("\n".join(processes))
    assert execute(database, "SELECT count(*) FROM embeddings.embedding_spend") == [(1,)]
    assert "is not welcome" in (written / "dagster.sql").read_text()  # so events are in it
    files = [path for folder in (written, project.state_dir) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    holding = {str(path) for path in files for secret in SECRETS if secret in path.read_bytes()}
    assert not holding
