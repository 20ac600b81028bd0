"""A switch whose process is killed, wherever that is, goes on and ends in the same state."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.model_change.state import open_change
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.model_change.test_switch import DEFINITION
from embeddings_pipeline_tests.support.command_line import run_here
from embeddings_pipeline_tests.support.forked import start
from embeddings_pipeline_tests.support.model_change import assert_whole
from embeddings_pipeline_tests.support.workbench import PROFILE, by_name, execute, films, make_films

KILLS = int(os.environ.get("EMBEDDINGS_TESTS_KILLS", "2"))
SLOW = {**PROFILE, "name": "slow", "dimensions": 48, "model": "embeddings_pipeline_tests.process.chaos:SlowEncoder"}
UNDO = {
    "profile switch slow --yes": ["profile rollback", "profile rollback"],
    "profile rollback": ["profile switch slow --yes"],
    "profile contract --now": ["profile switch test --yes", "profile contract --now", "profile switch slow --yes"],
}


@pytest.mark.timeout(900 + 60 * KILLS)
@pytest.mark.parametrize("destination", ["own", "adopted"])
@pytest.mark.parametrize("after", ["profile switch slow --yes", "profile rollback", "profile contract --now"])
def test_killed_anywhere_it_goes_on(
    database: Database, project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, destination: str
) -> None:
    """`after`: the command that is killed; those before it have been done."""
    defs = tmp_path / "defs" / "films" / "defs.yaml"
    defs.parent.mkdir(parents=True)
    adopted = "  destination: {table: films, profile: test}\n  profiles:"
    defs_yaml = DEFINITION if destination == "own" else re.sub(r"  profile: test.*\n  profiles:", adopted, DEFINITION)
    defs.write_text(
        defs_yaml + "    test: " + yaml.safe_dump(by_name(PROFILE)["test"], default_flow_style=True, width=1000)
    )
    defs.write_text(
        defs.read_text() + "    slow: " + yaml.safe_dump(by_name(SLOW)["slow"], default_flow_style=True, width=1000)
    )
    monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(defs.parents[1]))
    make_films(database, films(60))
    execute(database, "ALTER TABLE films ADD COLUMN embedding vector(32)")
    execute(database, "CREATE INDEX films_ann ON films USING hnsw (embedding vector_cosine_ops)")
    one = load_collections(defs.parents[1])["films"]
    sync(one, project)
    commands = ["profile switch slow --yes", "profile rollback", "profile switch slow --yes", "profile contract --now"]
    chance = random.Random(after)
    for command in commands[: len(commands) - commands[::-1].index(after) - 1]:
        assert run_here(tuple(command.split())).returncode == 0
    run("--help")  # what the processes are forked from is there
    killed, takes = 0, 2.0 if "switch" in after else 0.4  # seconds
    while killed < KILLS:
        begun_at = time.monotonic()
        if run(after, takes * chance.random()) == -signal.SIGKILL:
            killed += 1
            edit = "UPDATE films SET overview = 'edit ' || %s WHERE id = %s"
            execute(database, edit, [killed, chance.randint(1, 60)])
            execute(database, "INSERT INTO films VALUES (%s, 'New', 'row')", [1000 + killed])
        else:  # it came to its end; undone, it can be killed again
            takes = time.monotonic() - begun_at
            for command in UNDO[after]:
                run_here(tuple(command.split()))
    assert run(after) in (0, 1)  # 1: what was killed last had been done
    sync(one, project)
    collection = open_collection(one, project)
    assert collection.profile.name == ("test" if "rollback" in after else "slow")
    begun = open_change(collection)
    if "rollback" not in after:  # killed when it had been done, and done again, it has dropped the next model
        assert (begun is None) == ("contract" in after)
    assert collection.ledger.work() == {}
    assert_whole(collection)
    assert audit(collection).agree
    if destination == "adopted":
        beside = {"swapped": {"embedding_previous"}, "expanded": {"embedding_48"}}
        assert vector_columns(database) == {"embedding"} | (beside[begun.phase] if begun else set())
        shown = """SELECT count(*) FROM films
                   JOIN embeddings.films AS ours ON item_key = id::text AND films.embedding = ours.embedding"""
        assert execute(database, shown) == execute(database, "SELECT count(*) FROM films")
        assert execute(database, "SELECT reloptions FROM pg_class WHERE oid = 'films'::regclass") == [(None,)]
        valid = "SELECT count(*), bool_and(indisvalid) FROM pg_index WHERE indrelid = 'films'::regclass"
        assert execute(database, valid) == [(1 + len(vector_columns(database)), True)]


def vector_columns(database: Database) -> set[str]:
    query = """SELECT attname FROM pg_attribute WHERE attrelid = 'films'::regclass AND NOT attisdropped
               AND atttypid = 'vector'::regtype"""
    return {row[0] for row in execute(database, query)}


def run(command: str, seconds: float | None = None) -> int | None:
    """The exit code of a command; it is killed after so many seconds."""
    process = start(command.split())
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode
