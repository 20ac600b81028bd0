"""A collection of many batches in Dagster: a sync and a backfill of all, a tick, and the asset's page in a browser.

python benchmarks/bench_partitions.py [--partitions 10000] [--backfill 10000]

Batches of one item each, an encoder that costs nothing, and `ui` as its own processes with its daemon. The page is
timed in Chromium until it shows what the partitions are, and the tick as the daemon notes it. `--backfill`: how many of
the partitions the backfill takes, as "Materialize all" launches it. One line of JSON, in seconds.
"""

import argparse
import contextlib
import json
import os
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from bench_path import SOURCE

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database

ROOT = Path(__file__).resolve().parents[1]
ASSET = "embeddings_384"
PAGES = {"partitions": f"/assets/{ASSET}?view=partitions", "lineage": f"/assets/{ASSET}?view=lineage"}
SENSOR = {
    "repositoryName": "__repository__",
    "repositoryLocationName": "embeddings_pipeline",
    "sensorName": "new_rows_sensor",
}
START_SENSOR = "mutation($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename } }"
TICKS = """query($s: SensorSelector!) { sensorOrError(sensorSelector: $s) { ... on Sensor { sensorState {
    ticks(limit: 20) { status timestamp endTimestamp } } } } }"""
LAUNCH = """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
BACKFILL = "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--partitions", type=int, default=10_000)
    parser.add_argument("--backfill", type=int)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-partitions-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    try:
        print(json.dumps(measure(folder, arguments.partitions, arguments.backfill or arguments.partitions)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def measure(folder: Path, partitions: int, backfilled: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "EMBEDDINGS_STATE_DIR": str(folder),
        "EMBEDDINGS_DEFS_DIR": str(folder / "defs"),
        "DAGSTER_HOME": str(ROOT),
        "PYTHONPATH": str(ROOT / "benchmarks"),
    }
    environment.pop("DATABASE_URL", None)
    write_definition(folder / "defs" / "items")
    database = open_database(Settings(database_url=None, embeddings_state_dir=folder))
    seconds: dict[str, Any] = {"partitions": partitions}
    try:
        with database.connect(autocommit=True) as connection:
            for statement in SOURCE.format(rows=partitions).split(";"):
                connection.execute(statement)  # type: ignore[arg-type]
        with timed(seconds, "sync"):
            sync(environment)
        with timed(seconds, "sync_again"):
            sync(environment)
        with running_ui(folder, environment) as ask:
            seconds.update(pages(ask.address))
            seconds["tick"] = tick_seconds(ask)
            keys = [f"{n:06}" for n in range(backfilled)]
            with timed(seconds, f"backfill_of_{backfilled}"):
                backfill(ask, keys)
    finally:
        database.close()
    return seconds


def write_definition(folder: Path) -> None:
    folder.mkdir(parents=True)
    attributes = {
        "name": "items",
        "source": {"table": "movies", "key": ["id"], "updated_at": "updated_at"},
        "columns": ["title", "release_year"],
        "vectors": {"base": "{title} | {overview} | {genres}"},
        "profile": {"name": "free", "provider": "python", "model": "bench_path:FreeEncoder", "dimensions": 384},
        "index": {"method": "none"},
        "items_per_batch": 1,
    }
    component = {"type": "embeddings_pipeline.EmbeddingCollection", "attributes": attributes}
    (folder / "defs.yaml").write_text(yaml.safe_dump(component))


def sync(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "embeddings_pipeline", "sync"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=sys.stderr)


@contextlib.contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 1)
    print(f"{name}: {seconds[name]} s", file=sys.stderr)


class Ask:
    """Dagster's GraphQL of a running UI."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.address}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return dict(json.load(answer)["data"])


@contextlib.contextmanager
def running_ui(folder: Path, environment: dict[str, str]) -> Iterator[Ask]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "ui.log").open("w") as log:
        command = [sys.executable, "-m", "embeddings_pipeline", "ui", "--port", str(port)]
        ui = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    ask = Ask(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        try:
            return ask(START_SENSOR, s=SENSOR)["startSensor"]["__typename"] == "Sensor"
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait(ready, 180)
        yield ask
    finally:
        ui.send_signal(signal.SIGTERM)
        ui.wait(60)


def wait(condition: Callable[[], bool], most: float) -> None:
    deadline = time.monotonic() + most
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: nothing came of it within {most:.0f} s")
        time.sleep(0.5)


def pages(address: str) -> dict[str, float]:
    """Seconds until each page shows its partitions, the second time that it is opened."""
    from playwright.sync_api import sync_playwright

    seconds: dict[str, float] = {}
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        page = browser.new_page(base_url=address)
        page.set_default_timeout(120_000)
        for name, path in PAGES.items():
            for _ in range(2):
                began = time.perf_counter()
                page.goto(path)
                page.get_by_text("000001" if name == "partitions" else ASSET, exact=True).first.wait_for()
                seconds[f"{name}_page"] = round(time.perf_counter() - began, 1)
        browser.close()
    return seconds


def tick_seconds(ask: Ask) -> float:
    """The median of what a tick takes when nothing is new."""

    def ended() -> list[float]:
        ticks = ask(TICKS, s=SENSOR)["sensorOrError"]["sensorState"]["ticks"]
        return [tick["endTimestamp"] - tick["timestamp"] for tick in ticks if tick["status"] == "SKIPPED"]

    wait(lambda: len(ended()) >= 5, 300)
    return round(statistics.median(ended()), 2)


def backfill(ask: Ask, keys: list[str]) -> None:
    """Materialize these partitions of all assets that have them, as the UI does, and wait for the last run."""
    assets = [{"path": [name]} for name in ("raw_items", "item_texts", ASSET, "pgvector_table")]
    launched = ask(LAUNCH, p={"assetSelection": assets, "partitionNames": keys})["launchPartitionBackfill"]
    if "backfillId" not in launched:
        raise SystemExit(f"error: {launched}")

    def status() -> str:
        return str(ask(BACKFILL, id=launched["backfillId"])["partitionBackfillOrError"]["status"])

    wait(lambda: status() not in ("REQUESTED", "CANCELING", "FAILING"), 3 * 3600)
    if status() != "COMPLETED_SUCCESS":
        raise SystemExit(f"error: the backfill ended as {status()}")


if __name__ == "__main__":
    sys.exit(main())
