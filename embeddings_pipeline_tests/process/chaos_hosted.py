"""Kill a sync that asks a hosted model, at random moments, while rows change: no text is billed twice but what was in
flight at a kill (rule 14).

python -m embeddings_pipeline_tests.process.chaos_hosted [--rounds 50] [--seed 1] [--keep]

A deployment of its own: embedded PostgreSQL, and the tests' own server of embeddings, which counts what it bills. Each
round changes rows, starts `sync`, and ends it with SIGKILL, at a moment between its first thought and its last answer.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders.pace import FIRST
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.forked import start
from embeddings_pipeline_tests.support.workbench import committed, execute, films, make_films, wait_until

FILMS, INPUTS, LATENCY = 600, 10, 0.05  # inputs: of a request
SYNC_SECONDS = 120
CHANGE = "UPDATE films SET overview = %s WHERE id = ANY (%s)"


def write_definition(folder: Path, server: EmbeddingServer) -> None:
    """The collection `films`, whose vectors the server makes, in a folder for EMBEDDINGS_DEFS_DIR."""
    attributes = {
        "name": "films",
        "source": {"table": "films", "key": ["id"]},
        "vectors": {"base": "{title} | {overview}"},
        "items_per_batch": 200,
        "profile": {
            "name": "hosted",
            "provider": "openai",
            "model": "text-embedding-3-small",
            "dimensions": 1536,
            "url": server.url,
            "batch_size": INPUTS,
            "requests_per_minute": 0,
        },
    }
    (folder / "films").mkdir(parents=True)
    component = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}
    (folder / "films" / "defs.yaml").write_text(yaml.safe_dump(component))


def kill_often(
    database: Database, server: EmbeddingServer, rounds: int, chance: random.Random, say: Callable[[str], None]
) -> dict[str, Any]:
    """So many kills; the environment says where the deployment is, and the table `films` is there. AssertionError if a
    text was billed too often.
    """
    lost, kills = Counter[str](), 0  # lost: in flight at a kill, and so not kept
    while kills < rounds:
        changed = chance.sample(range(1, FILMS + 1), chance.randint(FILMS // 10, FILMS))
        execute(database, CHANGE, [f"story {chance.randint(1, 2 * rounds)}", changed])  # an earlier one, at times
        known, before, requests = kept(database), billed(server), server.requests
        process = start(["sync"])
        after = before.total() + chance.randint(0, len(changed))
        wait_until(lambda: process.exitcode is not None or billed(server).total() >= after, pause=0.002)  # noqa: B023
        time.sleep(chance.random() * 2 * LATENCY)
        killed = process.exitcode is None
        process.kill()
        process.join()
        time.sleep(4 * LATENCY)  # what the server has begun, it bills
        now = billed(server) - before
        known_now = kept(database)
        lost_now = [text for text in now if content_hash(text) not in known_now]
        lost.update(lost_now)
        # A process begins with so many requests at once, and each answer makes it slightly more.
        at_once = math.isqrt(int(FIRST**2) + 2 * (server.requests - requests)) + 1
        assert not now or max(now.values()) == 1, "a process asked about one text twice"
        assert not [text for text in now if content_hash(text) in known], "what was kept was asked about"
        assert len(lost_now) <= killed * at_once * INPUTS, f"{len(lost_now)} texts lost, {at_once} requests at once"
        kills += killed
        if killed:
            say(f"{kills:3}  killed: {now.total()} texts billed, {len(lost_now)} of them in flight")
    process = start(["sync"])
    process.join(SYNC_SECONDS)
    assert process.exitcode == 0
    assert len(committed(database)) == FILMS
    texts = billed(server)
    assert all(number <= 1 + lost[text] for text, number in texts.items())
    again = texts.total() - len(texts)
    return {"kills": kills, "texts": len(texts), "billed": texts.total(), "again": again, "in flight": lost.total()}


def kept(database: Database) -> set[bytes]:
    """Content hashes of the answers that are in the cache."""
    return {bytes(row[0]) for row in execute(database, "SELECT content_hash FROM embeddings.embedding_cache")}


def billed(server: EmbeddingServer) -> Counter[str]:
    """How often each film's text was billed; not those with which it is tried whether the model works."""
    return Counter({text: number for text, number in list(server.billed.items()) if text.startswith("Film ")})


def run(rounds: int, seed: int, *, keep: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All of it, in a deployment of its own, which this process' environment names from then on."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    os.environ.pop("DATABASE_URL", None)
    places = {"EMBEDDINGS_STATE_DIR": folder / "state", "EMBEDDINGS_DEFS_DIR": folder / "defs", "DAGSTER_HOME": PROJECT}
    os.environ.update({name: str(path) for name, path in places.items()})
    database = open_database(Settings(database_url=None, embeddings_state_dir=folder / "state"))
    try:
        with EmbeddingServer(latency=LATENCY) as server:
            write_definition(folder / "defs", server)
            make_films(database, films(FILMS))
            start(["sync", "--limit", "1"]).join(SYNC_SECONDS)  # makes the tables
            found = kill_often(database, server, rounds, random.Random(seed), say)
    finally:
        database.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return {"seed": seed, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", action="store_true", help="leave the folder, to look at it")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.rounds, arguments.seed, keep=arguments.keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
