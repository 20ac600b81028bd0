"""Syncs, a tick, scans and a backfill of the same batches at once, while rows change, end as a clean build does."""

import faulthandler
import random
import subprocess
import sys
import threading
from pathlib import Path

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.health.audit import audit
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.dagster_internals import InMemoryJob
from embeddings_pipeline.orchestration.names import partitions_name
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.pipeline.collection import Collection, open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.dagster_internals import execute_run
from embeddings_pipeline_tests.support.workbench import committed, definition, execute, films, make_films, sync_once

PROJECT = Path(__file__).resolve().parents[2]


def test_syncs_a_tick_a_scan_and_a_backfill_at_once_end_as_a_clean_build(
    database: Database, project: Settings, instance: dg.DagsterInstance
) -> None:
    make_films(database, films(60))
    one = definition()
    sync_once(one, project)
    definitions = build_definitions(one)
    instance.add_dynamic_partitions(partitions_name(one), [f"{n:06d}" for n in range(6)])
    stop = threading.Event()
    failures: list[BaseException] = []

    def edit() -> None:
        chance = random.Random(5)
        while not stop.wait(0.02):
            film, change = chance.randint(1, 60), chance.choice(["flip", "flop", "once", None])
            if change is None:
                execute(database, "DELETE FROM films WHERE id = %s", [film])
                execute(database, "INSERT INTO films VALUES (%s, 'Back', 'again', 1)", [film])
            else:
                execute(database, "UPDATE films SET overview = %s WHERE id = %s", [change, film])

    def run() -> None:
        # One after the other: Dagster cannot set up two runs in one process at once.
        try:
            for job_name, tags in 2 * [("films_scan", {}), ("films_batches", range_tags(0, 5))]:
                job = definitions.resolve_job_def(job_name)
                made = instance.create_run_for_job(job, tags=tags)
                execute_run(InMemoryJob(job), made, instance, raise_on_error=True)
        except BaseException as error:
            failures.append(error)

    command = [sys.executable, "-m", "embeddings_pipeline_tests.support.sync_process", "0.05"]
    syncs = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL) for _ in range(2)]
    work = [
        threading.Thread(target=edit),
        threading.Thread(target=run),
    ]
    for thread in work:
        thread.start()
    try:
        evaluate(instance, one, 32)
        for process in syncs:
            assert process.wait(120) == 0
        work[1].join(180)
        if work[1].is_alive():
            faulthandler.dump_traceback()
        assert not work[1].is_alive()
    finally:
        stop.set()
        work[0].join()
    assert not failures

    sync(one, project, instance=instance, allow_deletes=True)
    assert committed(database) == rebuilt(database, one, project)
    collection = open_collection(one, project)
    found = coverage(database, collection.model)
    assert (found.items, found.missing, found.stale, found.orphans) == (60, 0, 0, 0)
    assert audit(collection).agree
    assert vectors(database, collection, "films") == vectors(database, collection, "clean")


def rebuilt(database: Database, one: CollectionDefinition, project: Settings) -> dict[str, object]:
    """What a clean build of the same source gives, made as a collection of its own."""
    clean = CollectionDefinition(one.attributes.model_copy(update={"name": "clean"}))
    sync_once(clean, project)
    return dict(committed(database, "clean"))


def vectors(database: Database, collection: Collection, name: str) -> dict[str, list[float]]:
    rows = execute(database, f"SELECT item_key, embedding::real[] FROM embeddings.{name}")
    return {key: [round(value, 3) for value in vector] for key, vector in rows}
