"""Change the model under load: readers, writers, a sync loop, long transactions and VACUUM, through every phase.

python benchmarks/drill_migration.py [--rows 200000] [--current 1536] [--candidate 384] [--index ivfflat] [--adopted]
                                     [--alone] [--keep]

The readers are roles that may only read: the library with `SELECT` on the tables, the foreign program with `SELECT` on
the view alone. No model runs: vectors are computed from the numbers in a text, so that a query for a row has one right
answer under each model, its own row at a cosine of 1. Every answer is looked at. Before the others begin, and while
they rest, the steps that exclude anybody are taken by themselves. One line of JSON at the end.

`--adopted`: the vectors are in a column of the source table itself, with an index of the user's own, and the foreign
program asks that table. `--alone`: nobody else works, for the times of the phases by themselves.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from drill_workers import REST, SUBTOPICS, TOPICS, NumberEncoder, definition, work
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.profiles import resolve_profile
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.model_change.phases import backfill, contract, expand, roll_back, swap
from embeddings_pipeline.model_change.state import candidate_profile, incomplete_batches
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.run_batch import run_batch
from embeddings_pipeline.store.copy_binary import copy_in
from embeddings_pipeline.store.database import open_database

RIGHTS = """
CREATE ROLE drill_library LOGIN;
CREATE ROLE drill_reader LOGIN;
GRANT USAGE ON SCHEMA embeddings TO drill_library, drill_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA embeddings TO drill_library;
GRANT SELECT ON {shown} TO drill_reader
"""

SOURCE = """
CREATE TABLE films (id bigint PRIMARY KEY, title text NOT NULL, updated_at timestamptz NOT NULL DEFAULT now());
INSERT INTO films (id, title) SELECT n, 'topic ' || n %% 200 || ' sub ' || n / 200 %% 50 || ' film ' || n
FROM generate_series(1, %(rows)s) AS n;
CREATE INDEX ON films (updated_at);
ANALYZE films
"""

# Autovacuum comes again and again, and stays for long.
RESTLESS = """
ALTER TABLE films SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100,
                       autovacuum_vacuum_cost_delay = 20, autovacuum_vacuum_cost_limit = 20)
"""

ROLES = ("library", "foreign", "writer", "sync", "blocker", "vacuum")


class Locks:
    """Who waits for a lock, and for how long, seen every 2 ms; the change's own statements do not count. And how long
    the change's locks that exclude everybody are held.
    """

    QUERY = r"""SELECT pid, left(query, 60), query_start FROM pg_stat_activity
               WHERE wait_event_type = 'Lock' AND wait_event <> 'advisory' AND datname = current_database()
                 AND regexp_replace(query, '^(--[^\n]*\n\s*)*', '')
                     !~ '^(CREATE|ALTER|DROP|VACUUM|UPDATE embeddings.collection SET fingerprint)'"""

    HELD = """SELECT pid, relation::regclass::text FROM pg_locks JOIN pg_stat_activity USING (pid)
              WHERE mode = 'AccessExclusiveLock' AND granted AND backend_type = 'client backend'
                AND relation IN (SELECT oid FROM pg_class WHERE relname ~ '^(films|items|items_(vector|current)_.*)$')
                AND query !~* '^VACUUM'"""

    def __init__(self, settings: Settings) -> None:
        self.longest_ms, self.seen, self.done = 0.0, 0, threading.Event()
        self.settings, self.what = settings, ""
        self.phase, self.held = "before", dict[str, float]()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        waiting: dict[Any, float] = {}
        holding: dict[Any, float] = {}
        with open_database(self.settings).connect(autocommit=True) as connection:
            while not self.done.wait(0.002):
                now = time.perf_counter()
                rows = {(pid, start): query for pid, query, start in connection.execute(self.QUERY)}
                waiting = {key: waiting.get(key, now) for key in rows}
                self.seen += len(rows)
                for key, began in waiting.items():
                    waited = 1000 * (now - began) + 2
                    if waited > self.longest_ms:
                        self.longest_ms, self.what = round(waited, 1), " ".join(rows[key].split())
                holding = {key: holding.get(key, now) for key in connection.execute(self.HELD)}
                for began in holding.values():
                    self.held[self.phase] = max(self.held.get(self.phase, 0), round(1000 * (now - began) + 2, 1))

    def end(self) -> dict[str, Any]:
        self.done.set()
        self.thread.join()
        return {
            "longest_lock_wait_ms": self.longest_ms,
            "lock_waits_seen": self.seen,
            "waited": self.what,
            "exclusive_locks_held_ms": self.held,  # at most; what was shorter than 2 ms may have been missed
        }


# --- the drill ---------------------------------------------------------------------------------------------------


def drill(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    os.environ["EMBEDDINGS_STATE_DIR"] = str(folder)
    os.environ.pop("DATABASE_URL", None)
    one = definition(arguments.current, arguments.candidate, arguments.index, arguments.adopted)
    settings = load_settings()
    with open_database(settings).connect() as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(SOURCE % {"rows": arguments.rows})
        if arguments.adopted:
            _vectors_of_their_own(connection, one, arguments)
        connection.execute(RESTLESS)
    with open_database(settings).connect(autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        connection.execute("SELECT pg_reload_conf()")
    collection = open_collection(one, settings)
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.dirty_batches():
        run_batch(collection, [batch], "first")
    from embeddings_pipeline.index.pgvector import ensure_index

    ensure_index(collection.database, collection.model.destination, one.attributes.index, ["base"])
    with open_database(settings).connect() as connection:
        connection.execute(RIGHTS.format(shown="films" if arguments.adopted else "embeddings.items"))
    say(f"{arguments.rows:,} rows committed and indexed")
    locks = Locks(settings)
    found: dict[str, Any] = {}
    began = time.perf_counter()
    expand(collection, candidate_profile(collection, "second"))
    found["expand_alone_ms"] = round(1000 * (time.perf_counter() - began), 1)
    roll_back(collection, "undone")
    destination = "adopted" if arguments.adopted else "own"
    numbers = [str(arguments.rows), str(arguments.current), str(arguments.candidate), arguments.index, destination]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--role", role, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for role in (() if arguments.alone else ROLES)
    ]
    pause = 0 if arguments.alone else 6

    def tell(phase: str) -> None:
        say(phase)
        locks.phase = phase
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{phase}\n")
            worker.stdin.flush()

    try:
        time.sleep(2 * pause)
        tell("expand")
        began = time.perf_counter()
        change = expand(collection, candidate_profile(collection, "second"))
        found["expand_seconds"] = round(time.perf_counter() - began, 2)
        tell("backfill")
        began, written = time.perf_counter(), 0
        for _, backfilled in backfill(collection, incomplete_batches(collection, change.candidate), "backfill"):
            written += backfilled.vectors_written
        found["backfill_rows_per_second"] = round(written / (time.perf_counter() - began))
        tell("swap")
        done = swap(collection, "swap")
        assert done.gate is not None
        found["recall_at_10"], found["swap_locked_ms"] = done.gate.recall_at_10, done.exclusive.locked_ms
        time.sleep(pause)
        tell("roll back")
        back = roll_back(open_collection(one, settings), "back")
        assert back is not None
        found["roll_back_locked_ms"] = back.exclusive.locked_ms
        time.sleep(pause)
        tell("swap again")
        found["swap_again_locked_ms"] = swap(open_collection(one, settings), "again").exclusive.locked_ms
        time.sleep(pause)
        tell(REST)
        time.sleep(pause)
        for name, step in (("roll_back", roll_back), ("swap", swap)):
            done = step(open_collection(one, settings), REST)
            assert done is not None
            found[f"{name}_alone_ms"] = done.exclusive.transaction_ms
        tell("contract")
        dropped = contract(open_collection(one, settings), now=True)
        found["contract_locked_ms"], found["contract_ms"] = dropped.locked_ms, dropped.transaction_ms
        tell("after")
        time.sleep(pause)
    finally:
        found |= locks.end()
        results = []
        for worker in workers:
            out, _ = worker.communicate(timeout=300)
            results.append(json.loads(out) if out else {"role": "?", "failed": ["died"], "wrong": [], "took": {}})
    for result in results:
        took = [value for values in result["took"].values() for value in values]
        before = result["took"].get("before", [])
        entry: dict[str, Any] = {"done": len(took), "failed": len(result["failed"]), "wrong": len(result["wrong"])}
        if result["role"] in ("library", "foreign", "writer") and took:
            entry |= {"p99_ms": _percentile(took, 99), "longest_ms": round(max(took), 1), "again": result["again"]}
            entry |= {"p99_before_ms": _percentile(before, 99), "longest_before_ms": round(max(before, default=0), 1)}
            entry["longest_by_phase"] = {phase: round(max(values), 1) for phase, values in result["took"].items()}
        entry["said"] = [*result["failed"], *result["wrong"]][:3]
        found[result["role"]] = entry
    return {**vars(arguments), **found, **_settled(one, settings)}


def _vectors_of_their_own(
    connection: psycopg.Connection, one: CollectionDefinition, arguments: argparse.Namespace
) -> None:
    """The column as a user has it: vectors in it, and an index."""
    encoder = NumberEncoder(resolve_profile(one.declared_profile, Settings()))
    connection.execute(
        f"CREATE TEMPORARY TABLE made (id bigint, embedding vector({arguments.current})) ON COMMIT DROP;"
        "ALTER TABLE films RENAME TO bare"
    )
    for start in range(1, arguments.rows + 1, 10_000):
        numbers = np.arange(start, min(start + 10_000, arguments.rows + 1))
        texts = [f"topic {n % TOPICS} sub {n // TOPICS % SUBTOPICS} film {n}" for n in numbers]
        columns = {"id": numbers, "embedding": encoder.encode_documents(texts)}
        copy_in(connection, sql.Identifier("made"), columns, storage="vector")
    connection.execute(
        "CREATE TABLE films (id bigint PRIMARY KEY, title text NOT NULL, "
        f"updated_at timestamptz NOT NULL DEFAULT now(), embedding vector({arguments.current}));"
        "INSERT INTO films SELECT id, title, updated_at, embedding FROM bare JOIN made USING (id) ORDER BY id;"
        "DROP TABLE bare; CREATE INDEX ON films (updated_at); ANALYZE films"
    )
    options = {"ivfflat": f"WITH (lists = {round(arguments.rows**0.5)})", "hnsw": ""}
    if arguments.index != "none":
        connection.execute("SET maintenance_work_mem = '2GB'")
        connection.execute(
            f"CREATE INDEX films_embedding ON films USING {arguments.index} (embedding vector_cosine_ops) "
            + options[arguments.index]
        )


def _settled(one: CollectionDefinition, settings: Settings) -> dict[str, Any]:
    """Commit what is left, and see that each text has the vector that the new model gives it."""
    collection = open_collection(one, settings)
    collection.ledger.full_scan(collection.source)
    for batch in collection.ledger.work():
        run_batch(collection, [batch], "last")
    from embeddings_pipeline.health.coverage import coverage

    covered = coverage(collection.database, collection.model)
    return {"coverage": covered.share, "orphans": covered.orphans, "vectors": covered.vectors}


def _percentile(values: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 1) if values else 0.0


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--current", type=int, default=1536)
    parser.add_argument("--candidate", type=int, default=384)
    parser.add_argument("--index", choices=("hnsw", "ivfflat", "none"), default="ivfflat")
    parser.add_argument("--adopted", action="store_true", help="the vectors are a column of the user's own table")
    parser.add_argument("--alone", action="store_true", help="without readers and writers")
    parser.add_argument("--keep", action="store_true", help="leave the folder, to look at it")
    if sys.argv[1:2] == ["--role"]:
        role, rows, current, candidate, index, destination = sys.argv[2:8]
        work(role, definition(int(current), int(candidate), index, destination == "adopted"), int(rows))
        return 0
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    try:
        print(json.dumps(drill(arguments, folder)))
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
