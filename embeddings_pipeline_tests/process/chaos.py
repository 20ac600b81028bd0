"""Kill whatever works, at random moments, while rows come, change and go; then compare with a clean build.

python -m embeddings_pipeline_tests.process.chaos [--rounds 50] [--seed 1] [--keep]

A deployment of its own: embedded PostgreSQL, Dagster's daemon with the sensor on, syncs from the command line, and two
`live`. Each round ends with SIGKILL for one of them: a sync, a live, a run's process, what that was forked from, the
daemon, its code server, or PostgreSQL itself.
What was killed is started again by whoever needs it, as in life. Some texts are poison, and go to quarantine. In the
end sensor and `live` must have brought the table to exactly what a clean build of the same source holds, and the FAISS
index must agree.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import yaml

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.health.lag import indexes_due
from embeddings_pipeline.index.faiss_read import open_index
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.models import collection_state
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import run_batch

PROJECT = Path(__file__).resolve().parents[2]
FILMS = 300
MODEL = "embeddings_pipeline_tests.process.chaos:SlowEncoder"
VICTIMS = ("sync", "live", "run", "fork server", "daemon", "code server", "postgres")
LIVES, LIVE_CHANCE = 2, 0.02
FORKED = "multiprocessing.forkserver"
SETTLE_SECONDS = 600  # a full scan a minute, and failed batches wait up to some minutes
FULL_SCAN = timedelta(seconds=20)  # more than one takes: what ended so long after a moment began after it
WAIT_SECONDS = 60  # for a process to kill
SYNC_CHANCE = 0.02  # five times a second
CHANGES = (
    "INSERT INTO films VALUES (%(new)s, 'New', 'row', 1)",
    "UPDATE films SET overview = 'v' || %(new)s, updated_at = now() WHERE id = %(one)s",
    "UPDATE films SET overview = 'flip', updated_at = now() WHERE id = %(one)s",
    "UPDATE films SET overview = 'flop', updated_at = now() WHERE id = %(one)s",
    "UPDATE films SET overview = 'poison', updated_at = now() WHERE id = %(one)s",
    "UPDATE films SET revenue = %(new)s, updated_at = now() WHERE id = %(one)s",
    "UPDATE films SET overview = NULL, title = ' ' WHERE id = %(one)s",  # only a full scan can see it
    "UPDATE films SET is_removed = NOT is_removed, updated_at = now() WHERE id = %(one)s",
    "DELETE FROM films WHERE id = (SELECT max(id) FROM films WHERE id > %(films)s)",
)
RESULT = """
SELECT v.item_key, v.vector_name, v.chunk, v.text, t.content_hash, v.payload, v.embedding::real[]
FROM embeddings.{name} AS v JOIN embeddings.{name}_text AS t USING (item_key, vector_name, chunk)
ORDER BY 1, 2, 3
"""


class SlowEncoder(DeterministicEncoder):
    """Takes its time, so that runs are killed while they encode, and no poison."""

    seconds_per_call = 0.2
    fail_on = "poison"


def definition(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": {"table": "films", "key": ["id"], "updated_at": "updated_at", "where": "NOT is_removed"},
        "columns": ["title", "revenue"],
        "vectors": {"base": "{title} | {overview}", "title": "{title}"},
        "profile": {"name": "chaos", "provider": "python", "model": MODEL, "dimensions": 32},
        "items_per_batch": 40,
        "automation": {"full_scan_minutes": 1, "index_lag_minutes": 1},
    }


@dataclass
class Chaos:
    """One deployment, its processes, and who was killed."""

    folder: Path
    chance: random.Random
    killed: Counter[str] = field(default_factory=Counter)
    edits: int = 0
    daemon: subprocess.Popen[bytes] | None = None
    sync: subprocess.Popen[bytes] | None = None
    lives: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return Settings(database_url=None, embeddings_state_dir=self.folder / "state")

    @property
    def database(self) -> Database:
        return open_database(self.settings)

    @property
    def environment(self) -> dict[str, str]:
        there = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        folders = {"EMBEDDINGS_STATE_DIR": self.folder / "state", "EMBEDDINGS_DEFS_DIR": self.folder / "defs"}
        return {**there, "DAGSTER_HOME": str(PROJECT), **{name: str(path) for name, path in folders.items()}}

    # --- the source ---

    def make_source(self) -> None:
        defs = self.folder / "defs" / "films"
        defs.mkdir(parents=True)
        component = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": definition("films")}
        (defs / "defs.yaml").write_text(yaml.safe_dump(component))
        with self.database.connect() as connection:
            connection.execute(
                """CREATE TABLE films (id bigint PRIMARY KEY, title text, overview text, revenue bigint,
                       is_removed boolean NOT NULL DEFAULT false, updated_at timestamptz NOT NULL DEFAULT now())"""
            )
            connection.execute(
                "INSERT INTO films SELECT n, 'Film ' || n, 'story ' || n, n FROM generate_series(1, %s) AS n", [FILMS]
            )

    def write(self, stop: threading.Event) -> None:
        """Insert, edit, undo, remove, bring back and delete rows, some of them in transactions that take a while."""
        next_id = 10_000
        while not stop.is_set():
            with suppress(psycopg.Error, PipelineError), self.database.connect() as connection:
                for _ in range(self.chance.randint(1, 5)):
                    one = self.chance.randint(1, FILMS)
                    next_id += 1
                    change = self.chance.choice(CHANGES)
                    connection.execute(change, {"one": one, "new": next_id, "films": FILMS})  # type: ignore[arg-type]
                    self.edits += 1
                time.sleep(self.chance.uniform(0, 0.2))
            time.sleep(self.chance.uniform(0, 0.3))

    # --- the processes ---

    def keep_running(self, *, syncs: bool = True) -> None:
        """Start the daemon where it is not running, and at times a `live` or a sync."""
        log = (self.folder / "processes.log").open("ab")
        if self.daemon is None or self.daemon.poll() is not None:
            command = [sys.executable, "-m", "dagster._daemon", "run", "-w", str(PROJECT / "workspace.yaml")]
            self.daemon = subprocess.Popen(
                command, env=self.environment, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
            )
        self.lives = [each for each in self.lives if each.poll() is None]
        if len(self.lives) < LIVES and self.chance.random() < LIVE_CHANCE:  # while none runs, the sensor does it all
            command = [sys.executable, "-m", "embeddings_pipeline", "live", "--json"]
            self.lives.append(subprocess.Popen(command, env=self.environment, cwd=PROJECT, stdout=log, stderr=log))
        # Not at once: what a sync does, the sensor has no need to.
        ended = self.sync is None or self.sync.poll() is not None
        if syncs and ended and self.chance.random() < SYNC_CHANCE:
            command = [sys.executable, "-m", "embeddings_pipeline", "sync", "--allow-deletes", "--json"]
            self.sync = subprocess.Popen(command, env=self.environment, cwd=PROJECT, stdout=log, stderr=log)

    def victims(self) -> dict[str, list[psutil.Process]]:
        """What of this deployment is running, by kind."""
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in VICTIMS}
        data = str(self.folder / "state" / "postgres")
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                line = " ".join(words)
                if process.ppid() and "postgres" in process.name() and data in line and "-D" in words:
                    found["postgres"].append(process)
                elif not self._ours(process):
                    continue
                elif FORKED in line:  # a run's process has the words of what it was forked from
                    parent = process.parent()
                    kind = "run" if parent and FORKED in " ".join(parent.cmdline()) else "fork server"
                    found[kind].append(process)
                elif "dagster._daemon" in words:
                    found["daemon"].append(process)
                elif "grpc" in words:
                    found["code server"].append(process)
                elif "embeddings_pipeline" in words and "sync" in words:
                    found["sync"].append(process)
                elif "embeddings_pipeline" in words and "live" in words:
                    found["live"].append(process)
        return found

    def _ours(self, process: psutil.Process) -> bool:
        return process.environ().get("EMBEDDINGS_STATE_DIR") == str(self.folder / "state")

    def kill_one(self) -> str:
        """SIGKILL for a process of the kind that was killed least, once one runs; the kind."""
        deadline = time.monotonic() + WAIT_SECONDS
        kinds = sorted(VICTIMS, key=lambda kind: (self.killed[kind], self.chance.random()))
        while time.monotonic() < deadline:
            self.keep_running()
            running = self.victims()
            # After most of the time any other kind will do.
            wanted = kinds[: 1 if time.monotonic() < deadline - WAIT_SECONDS / 4 else None]
            kind = next((kind for kind in wanted if running[kind]), None)
            if kind is not None:
                time.sleep(self.chance.uniform(0, 3))
                with suppress(psutil.NoSuchProcess):
                    self.chance.choice(running[kind]).kill()
                    self.killed[kind] += 1
                    return kind
            time.sleep(0.2)
        return "nothing"

    def end(self) -> None:
        """Stop everything of this deployment but PostgreSQL, which leaves with its last user."""
        for processes in (p for kind, p in self.victims().items() if kind != "postgres"):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        for own in (self.daemon, self.sync, *self.lives):
            if own is not None:
                own.wait()

    # --- the end ---

    def settle(self, definition: CollectionDefinition) -> Collection:
        """Wait until the sensor and the `live` have nothing left to do; a sync finds nothing more then."""
        written = datetime.now(UTC)
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self._quiet(definition, written):
            assert time.monotonic() < deadline, "the sensor does not come to an end"
            self.keep_running(syncs=False)
            time.sleep(2)
        self.end()
        # What was killed left no damage that an audit would have to mend; the lake may be behind the table.
        collection = open_collection(definition, self.settings)
        found = replace(audit(collection), vectors_not_in_lake=0)
        assert found.agree, found
        command = [sys.executable, "-m", "embeddings_pipeline", "sync", "--json"]
        done = subprocess.run(command, env=self.environment, cwd=PROJECT, capture_output=True, check=False)
        errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error")]
        assert all("check quarantine: " in line for line in errors), errors  # the poison, of which there is much
        assert done.returncode == (1 if errors else 0), done.stderr.decode()[-2000:]
        last = json.loads(done.stdout)
        assert (last["new"], last["changed"], last["deleted"], last["embedded"]) == (0, 0, 0, 0), last
        return collection

    def _quiet(self, definition: CollectionDefinition, since: datetime) -> bool:
        """Whether all that a full scan begun after `since` has seen is committed, and the indexes are current."""
        if self.sync is not None and self.sync.poll() is None:
            return False
        with suppress(PipelineError, psycopg.Error):
            collection = open_collection(definition, self.settings)
            with collection.database.connect() as connection:
                state = collection_state(connection, definition.name)
            scanned = state is not None and state.full_scan_at is not None and state.full_scan_at - since > FULL_SCAN
            return scanned and not collection.ledger.dirty_items() and not indexes_due(collection)
        return False

    def compare(self, collection: Collection) -> dict[str, int]:
        """AssertionError where the table is not what a clean build of the same source is."""
        clean = open_collection(
            CollectionDefinition(collection.definition.attributes.model_copy(update={"name": "clean"})), self.settings
        )
        clean.ledger.full_scan(clean.source)
        ledger_log = logging.getLogger("embeddings_pipeline.ledger.quarantine")
        ledger_log.disabled = True  # it tells of each poison text
        for batch in clean.ledger.dirty_batches():
            run_batch(clean, batch, "clean")
        ledger_log.disabled = False
        with collection.database.connect() as connection:
            ours = connection.execute(RESULT.format(name="films")).fetchall()  # type: ignore[arg-type]
            theirs = connection.execute(RESULT.format(name="clean")).fetchall()  # type: ignore[arg-type]
        assert [row[:6] for row in ours] == [row[:6] for row in theirs], "keys, texts, hashes or payloads differ"
        our_vectors, their_vectors = (np.array([row[6] for row in rows]) for rows in (ours, theirs))
        assert np.allclose(our_vectors, their_vectors, atol=1e-3), "vectors differ"
        covered = coverage(collection.database, collection.model)
        assert (covered.missing, covered.stale, covered.orphans) == (0, 0, 0), covered
        agreed = audit(collection)
        assert agreed.agree, agreed
        parity = check_parity(
            collection.database,
            collection.model.destination,
            open_index(self.settings.state_dir / "faiss", collection.definition.name),
        )
        assert parity.comparable and parity.ok, parity
        return {"items": covered.items, "vectors": covered.vectors}


def run(rounds: int, seed: int, *, keep: bool = False, say: Any = print) -> dict[str, Any]:
    """All of it; what was killed, how many edits were made, and what the table holds. AssertionError if it is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    chaos = Chaos(folder, random.Random(seed))
    database = chaos.database
    stop = threading.Event()
    try:
        chaos.make_source()
        command = [sys.executable, "-m", "embeddings_pipeline", "sync"]
        subprocess.run(command, env=chaos.environment, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        switch_on(chaos)
        writer = threading.Thread(target=chaos.write, args=[stop])
        writer.start()
        chaos.keep_running()
        for number in range(1, rounds + 1):
            say(f"{number:3}  killed: {chaos.kill_one()}")
        stop.set()
        writer.join()
        collection = chaos.settle(load_collections(folder / "defs")["films"])
        found = chaos.compare(collection)
    finally:
        stop.set()
        chaos.end()
        database.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return {"rounds": rounds, "seed": seed, "killed": dict(chaos.killed), "edits": chaos.edits, **found}


def switch_on(chaos: Chaos) -> None:
    """Switch the sensor on, as the UI does."""
    command = [sys.executable, "-m", "dagster", "sensor", "start", "films_new_rows_sensor"]
    where = ["-w", str(PROJECT / "workspace.yaml")]
    subprocess.run(
        [*command, *where], env=chaos.environment, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL, timeout=120
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", action="store_true", help="leave the folder, to look at it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(json.dumps(run(arguments.rounds, arguments.seed, keep=arguments.keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
