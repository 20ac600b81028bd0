"""What a year leaves in Dagster's storage: measured over some scans, edits, refreshes and ticks, and extrapolated.

python benchmarks/bench_growth.py [--times 20] [--seconds 60] [--keep-days 30]

One collection of 60 rows with the tests' deterministic encoder, on an embedded server of its own below a temporary
folder. Runs are those of the sensor and the schedules; ticks are those of a real daemon in `--seconds`. What the purge
removes is counted by what it leaves: runs of the last `--keep-days`, ticks of the last day. Scans leave the last one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[1]
SCANS, RECENTS, REFRESHES = 96, 4, 1  # a day, at the default intervals
TICK_DAYS = 1  # that skipped ticks are kept: dagster.yaml
TABLES = """SELECT sum(pg_total_relation_size(oid)) FROM pg_class
            WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"""
TICKS = "SELECT count(*), sum(pg_column_size(job_ticks.*) + 200) FROM job_ticks"  # and about so much in its indexes
FILMS = """CREATE TABLE films (id bigint PRIMARY KEY, title text, overview text, updated_at timestamptz DEFAULT now());
           INSERT INTO films (id, title, overview)
           SELECT n, 'Film ' || n, 'A story about number ' || n FROM generate_series(1, 60) AS n"""
ATTRIBUTES = {
    "name": "films",
    "source": {"table": "films", "key": ["id"], "updated_at": "updated_at"},
    "columns": ["title"],
    "vectors": {"base": "{title} | {overview}"},
    "items_per_batch": 10,
    "profile": {
        "name": "test",
        "provider": "python",
        "model": "embeddings_pipeline_tests.support.deterministic:DeterministicEncoder",
        "dimensions": 32,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=20, help="scans, and edits; a fifth as many refreshes")
    parser.add_argument("--seconds", type=int, default=60, help="that the daemon runs")
    parser.add_argument("--keep-days", type=int, default=30)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-growth-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    (folder / "defs" / "films").mkdir(parents=True)
    definition = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": ATTRIBUTES}
    (folder / "defs" / "films" / "defs.yaml").write_text(yaml.safe_dump(definition))
    os.environ.pop("DATABASE_URL", None)
    os.environ |= {
        "DAGSTER_HOME": str(PROJECT),
        "EMBEDDINGS_STATE_DIR": str(folder / "state"),
        "EMBEDDINGS_DEFS_DIR": str(folder / "defs"),
    }
    try:
        print(json.dumps(measure(folder / "state", arguments.times, arguments.seconds, arguments.keep_days), indent=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def measure(state: Path, times: int, seconds: int, keep_days: int) -> dict[str, object]:
    from embeddings_pipeline.config.loading import load_collections
    from embeddings_pipeline.config.settings import load_settings
    from embeddings_pipeline.orchestration.automation import build_refresh_jobs
    from embeddings_pipeline.orchestration.instance.storage import dagster_database
    from embeddings_pipeline.orchestration.runner import JobRunner, open_instance
    from embeddings_pipeline.orchestration.sync import sync
    from embeddings_pipeline.pipeline.collection import open_collection
    from embeddings_pipeline.store.database import Database, open_database

    settings = load_settings()
    database = open_database(settings)
    with database.connect() as connection:
        connection.execute(FILMS)  # type: ignore[arg-type]
    definition = load_collections(settings.defs_dir)["films"]
    history = Database(dagster_database(settings)[0], database.server)

    def size() -> tuple[int, int]:
        with history.connect(autocommit=True) as connection:
            connection.execute("VACUUM")  # as autovacuum does
            [(tables,)] = connection.execute(TABLES).fetchall()
        return int(tables), sum(1 for path in (state / "dagster").rglob("*") if path.is_file())

    def growth(what: Callable[[], object], times: int) -> tuple[float, float]:
        before = size()
        for _ in range(times):
            what()
        return tuple((after - start) / times for after, start in zip(size(), before, strict=True))  # type: ignore[return-value]

    def edit() -> None:
        with database.connect() as connection:
            connection.execute("UPDATE films SET overview = overview || '.', updated_at = now() WHERE id = 7")
        sync(definition, settings, instance=instance)

    with open_instance() as instance:
        sync(definition, settings, instance=instance)
        refresh, recent = build_refresh_jobs(definition)
        runner = JobRunner(open_collection(definition, settings), instance)
        scan = {"ops": {runner.op("item_ledger"): {"config": {"allow_deletes": False}}}}
        for _ in range(5):  # until the room that they need is there
            runner.execute("scan", scan, {})
        per_scan = growth(lambda: runner.execute("scan", scan, {}), times)
        per_edit = growth(edit, times)
        few = max(1, times // 5)
        per_refresh = growth(lambda: refresh.execute_in_process(instance=instance), few)
        per_recent = growth(lambda: recent.execute_in_process(instance=instance), few)
    tick_bytes, ticks_a_day = ticks(history, seconds)
    day = [SCANS * a + REFRESHES * b + RECENTS * c for a, b, c in zip(per_scan, per_refresh, per_recent, strict=True)]
    of_ticks = tick_bytes * ticks_a_day * TICK_DAYS
    return {
        "a scan that found nothing": in_words(per_scan),
        "an edited row": in_words(per_edit),
        "a daily refresh": in_words(per_refresh),
        "a refresh of recent items": in_words(per_recent),
        "ticks": f"{ticks_a_day:,.0f} a day of {tick_bytes:,.0f} bytes, kept for {TICK_DAYS} day",
        f"after a year at rest, as after {keep_days} days": in_words(
            (day[0] * keep_days + of_ticks, day[1] * keep_days)
        ),
    }


def ticks(history: "object", seconds: int) -> tuple[float, float]:
    """Bytes of a tick, and how many there are a day: a daemon runs, with every sensor on."""
    target = ["-m", "embeddings_pipeline.definitions"]
    start = [sys.executable, "-m", "dagster", "sensor", "start", "films_new_rows_sensor", *target]
    subprocess.run(start, cwd=PROJECT, check=True, capture_output=True)

    def counted() -> tuple[int, int]:
        with history.connect(autocommit=True) as connection:  # type: ignore[attr-defined]
            [(count, total)] = connection.execute(TICKS).fetchall()
        return int(count), int(total or 0)

    command = [sys.executable, "-m", "dagster._daemon", "run", *target]
    output = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output) as daemon:
        while not counted()[0]:
            time.sleep(1)
        before = counted()[0]
        time.sleep(seconds)
        count, total = counted()
        daemon.terminate()
    return total / count, (count - before) / seconds * 86_400


def in_words(figures: "tuple[float, float] | list[float]") -> str:
    return f"{figures[0] / 1000:,.1f} kB, {figures[1]:,.1f} files"


if __name__ == "__main__":
    sys.exit(main())
