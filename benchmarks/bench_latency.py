"""How long until a new row is found: the UI's daemon at its default intervals, rows inserted at random moments.

python benchmarks/bench_latency.py [--inserts 40] [--most-seconds 20]

The sample catalogue, the real model, and a state folder of its own. A row counts as searchable when `embeddings.items`
has its vector, which searches read. How long the runs' processes took, from their launch to the first step, is read
from Dagster's events afterwards. One line of JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database, open_database

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"median_seconds": 8, "longest_seconds": 15, "worker_ready_seconds": 2}
FOUND = "SELECT item_key FROM embeddings.items WHERE item_key = ANY (%s)"
START_SENSOR = """mutation { startSensor(sensorSelector: {repositoryName: "__repository__",
    repositoryLocationName: "embeddings_pipeline", sensorName: "new_rows_sensor"}) { __typename } }"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inserts", type=int, default=40)
    parser.add_argument("--most-seconds", type=float, default=20.0, help="between two inserts")
    parser.add_argument("--workers", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers:
        print(json.dumps(workers_ready()))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="bench-latency-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    environment = {**os.environ, "EMBEDDINGS_STATE_DIR": str(folder), "DAGSTER_HOME": str(ROOT)}
    environment.pop("DATABASE_URL", None)
    program = [sys.executable, "-m", "embeddings_pipeline"]
    database = open_database(Settings(database_url=None, embeddings_state_dir=folder))
    ui = None
    try:
        for command in (["load", str(ROOT / "examples" / "movies.csv")], ["sync"]):
            subprocess.run([*program, *command], env=environment, cwd=ROOT, check=True, stdout=sys.stderr)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with (folder / "ui.log").open("w") as log:
            command = [*program, "ui", "--port", str(port)]
            ui = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        start_sensor(port)
        seconds = measure(database, arguments.inserts, arguments.most_seconds)
        command = [sys.executable, __file__, "--workers"]
        ready = json.loads(
            subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        )
    finally:
        if ui is not None:
            ui.send_signal(signal.SIGTERM)
            ui.wait(60)
        database.close()
        shutil.rmtree(folder, ignore_errors=True)
    ordered = sorted(seconds)
    print(
        json.dumps(
            {
                "inserts": len(seconds),
                "median_seconds": round(statistics.median(ordered), 1),
                "p90_seconds": round(ordered[int(0.9 * (len(ordered) - 1))], 1),
                "longest_seconds": round(ordered[-1], 1),
                "worker_ready_seconds": round(statistics.median(ready), 2),
                "longest_worker_ready_seconds": round(max(ready), 2),
                "goals": GOALS,
                "seconds": [round(value, 1) for value in seconds],
            }
        )
    )
    return 0


def start_sensor(port: int) -> None:
    deadline = time.monotonic() + 120
    body = json.dumps({"query": START_SENSOR}).encode()
    while time.monotonic() < deadline:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/graphql", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if json.load(answer)["data"]["startSensor"]["__typename"] == "Sensor":
                    time.sleep(30)  # the first tick finds the collection as the sync left it
                    return
        except (urllib.error.URLError, OSError, TypeError, KeyError):
            pass
        time.sleep(1)
    raise SystemExit("error: the sensor could not be started")


def workers_ready() -> list[float]:
    """Seconds from the launch of each run to its first step, but for the first run of the code server."""
    from embeddings_pipeline.orchestration.instance.home import project_instance

    seconds = []
    with project_instance() as instance:
        for run in instance.get_runs():
            at: dict[str, float] = {}
            for entry in instance.all_logs(run.run_id):
                if entry.dagster_event is not None:
                    at.setdefault(entry.dagster_event.event_type_value, entry.timestamp)
            if {"PIPELINE_STARTING", "STEP_START"} <= at.keys():
                seconds.append(at["STEP_START"] - at["PIPELINE_STARTING"])
    return seconds[:-1]


def measure(database: Database, inserts: int, most_seconds: float) -> list[float]:
    """Seconds from each commit to when the row's vector was there."""
    pauses = random.Random(0)
    waiting: dict[str, float] = {}
    seconds: list[float] = []
    made, next_insert = 0, time.monotonic()
    with database.connect(autocommit=True) as connection:
        while len(seconds) < inserts:
            if made < inserts and time.monotonic() >= next_insert:
                key = str(9_000_000 + made)
                connection.execute(
                    "INSERT INTO movies (id, title, overview, genres, release_year)"
                    " SELECT %s, title || ' again', overview || ' Number ' || %s, genres, release_year"
                    " FROM movies WHERE id < 9000000 ORDER BY md5(id::text || %s) LIMIT 1",
                    [int(key), key, key],
                )
                waiting[key] = time.monotonic()
                made, next_insert = made + 1, time.monotonic() + pauses.uniform(0, most_seconds)
            for (key,) in connection.execute(FOUND, [list(waiting)]).fetchall():
                seconds.append(time.monotonic() - waiting.pop(key))
                print(f"{len(seconds):3} {seconds[-1]:.1f} s", file=sys.stderr)
            time.sleep(0.1)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
