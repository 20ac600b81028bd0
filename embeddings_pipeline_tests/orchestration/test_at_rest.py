"""A sync of a collection at rest looks, and ends without Dagster; whatever there is to do or to show brings it in."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RunFailed
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.orchestration import at_rest
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.orchestration.instance.liveness import PROCESS_TAG, process_tags
from embeddings_pipeline.orchestration.names import asset_key, partitions_name
from embeddings_pipeline.orchestration.sync import SyncResult, sync
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.dagster_internals import create_run_for_test
from embeddings_pipeline_tests.support.workbench import committed, definition, execute, films, make_films

SYNC_AND_TELL = """
import sys
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline_tests.support.workbench import definition

assert sync(definition(), load_settings()).scanned == 12
print(*{name.partition(".")[0] for name in sys.modules})
"""


@pytest.fixture
def synced(database: Database, project: Settings, instance: dg.DagsterInstance) -> Callable[[], SyncResult]:
    """Twelve films in two batches, synced; the function is another sync, as from the command line."""
    make_films(database, films(12))
    assert sync(definition(), project).embedded == 12
    return lambda: sync(definition(), project)


def runs(instance: dg.DagsterInstance) -> list[str]:
    return [run.job_name for run in instance.get_runs()]


def test_a_sync_with_nothing_to_do_starts_no_run_and_imports_no_dagster(
    synced: Callable[[], SyncResult], instance: dg.DagsterInstance, database: Database
) -> None:
    before = runs(instance)
    read = execute(database, "SELECT full_scan_at FROM embeddings.scan")
    done = synced()
    assert (done.scanned, done.new, done.changed, done.embedded, done.checks) == (12, 0, 0, 0, [])
    assert runs(instance) == before
    assert execute(database, "SELECT full_scan_at FROM embeddings.scan") > read
    command = [sys.executable, "-c", SYNC_AND_TELL]
    imported = subprocess.run(command, cwd=PROJECT, env=os.environ, capture_output=True, text=True, check=True).stdout
    assert "psycopg" in imported.split()
    assert not {"dagster", "sqlalchemy", "grpc", "pandas", "torch", "transformers"} & set(imported.split())


def edit(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    execute(database, "UPDATE films SET overview = 'edited' WHERE id = 5")


def lose_a_vector(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    [(table,)] = execute(database, "SELECT 'films_vector_' || fingerprint FROM embeddings.collection")
    execute(database, f"DELETE FROM embeddings.{table} WHERE text_id = 2")


def lose_the_index(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    (project.state_dir / "faiss" / "films" / "CURRENT").unlink()


def lose_the_map(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    (project.state_dir / "faiss" / "films" / "map.json").unlink()


def fail_a_check(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    execute(database, "UPDATE embeddings.check_result SET passed = false, severity = 'error' WHERE name = 'coverage'")


def forget_partitions(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    instance.delete_dynamic_partition(partitions_name(definition()), "000001")


def forget_what_was_read(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    instance.wipe_assets([asset_key(definition(), "item_ledger")])


def forget_the_purge(database: Database, project: Settings, instance: dg.DagsterInstance) -> None:
    at_rest.purge_mark(project).unlink()


@pytest.mark.parametrize(
    ("before", "started"),
    [
        (edit, {"films_scan", "films_batches", "films_index"}),
        (lose_a_vector, {"films_scan", "films_batches", "films_index"}),
        (lose_the_index, {"films_scan", "films_index"}),
        (lose_the_map, {"films_scan", "films_index"}),
        (fail_a_check, {"films_scan", "films_audit"}),
        (forget_partitions, {"films_scan"}),
        (forget_what_was_read, {"films_scan"}),
        (forget_the_purge, {"films_scan"}),
    ],
)
def test_what_is_to_be_done_or_shown_is_runs_and_then_it_is_at_rest_again(
    database: Database,
    project: Settings,
    instance: dg.DagsterInstance,
    synced: Callable[[], SyncResult],
    before: Callable[..., None],
    started: set[str],
) -> None:
    first = len(runs(instance))
    before(database, project, instance)
    assert synced().checks == []
    assert set(runs(instance)[: len(runs(instance)) - first]) == started
    assert instance.has_dynamic_partition(partitions_name(definition()), "000001")
    assert len(committed(database)) == 12
    last = len(runs(instance))
    synced()
    assert len(runs(instance)) == last


def test_a_run_that_died_is_ended_by_a_sync_with_nothing_to_do(
    synced: Callable[[], SyncResult], instance: dg.DagsterInstance
) -> None:
    dead = create_run_for_test(instance, job_name="films_batches", status=dg.DagsterRunStatus.STARTED)
    noted = process_tags(dead.run_id)[PROCESS_TAG]
    another = noted.replace('"started": "', '"started": "0')  # it has our process's number
    instance.add_run_tags(dead.run_id, {PROCESS_TAG: another})
    synced()
    found = instance.get_run_by_id(dead.run_id)
    assert found is not None and found.status == dg.DagsterRunStatus.CANCELED


def test_what_was_read_long_ago_is_shown_again(
    synced: Callable[[], SyncResult], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_rest, "SHOWN_EVERY", timedelta(0))
    before = len(runs(instance))
    synced()
    assert runs(instance)[:-before] == ["films_scan"]


def test_the_source_is_read_once_by_a_sync(
    synced: Callable[[], SyncResult], instance: dg.DagsterInstance, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[Any] = []
    full_scan = Ledger.full_scan

    def counted(ledger: Ledger, *arguments: Any, **options: Any) -> Any:
        scans.append(full_scan(ledger, *arguments, **options))
        return scans[-1]

    monkeypatch.setattr(Ledger, "full_scan", counted)
    edit(database, Settings(), instance)
    done = synced()
    assert (len(scans), done.changed, done.embedded) == (1, 1, 1)
    shown = instance.get_latest_materialization_event(asset_key(definition(), "item_ledger"))
    assert shown is not None and shown.asset_materialization is not None
    assert shown.asset_materialization.metadata["changed"].value == 1


def test_a_scan_that_is_refused_is_a_failed_run_as_ever(
    synced: Callable[[], SyncResult], instance: dg.DagsterInstance, database: Database
) -> None:
    execute(database, "TRUNCATE films")
    with pytest.raises(RunFailed, match=r"12 of 12 items are gone .*--allow-deletes"):
        synced()
    [run, *_] = instance.get_runs()
    assert (run.job_name, run.status) == ("films_scan", dg.DagsterRunStatus.FAILURE)
    assert len(committed(database)) == 12


@pytest.mark.slow
def test_what_is_asked_does_not_grow_with_the_number_of_batches(
    database: Database, project: Settings, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    ask = psycopg.Cursor.execute

    def noted(cursor: psycopg.Cursor, query: Any, *given: Any, **options: Any) -> Any:
        asked.append(query)
        return ask(cursor, query, *given, **options)

    def asks(what: Callable[[], object]) -> int:
        asked.clear()
        what()
        return len(asked)

    monkeypatch.setattr(psycopg.Cursor, "execute", noted)
    make_films(database, films(2))
    one = definition(items_per_batch=1)
    each: dict[str, Callable[[], object]] = {
        "sync": lambda: sync(one, project),
        "status": lambda: collection_status(one, database, project),
        "tick": lambda: evaluate(instance, one, 32),
    }
    sync(one, project)
    few = {name: asks(what) for name, what in each.items()}
    execute(database, "INSERT INTO films SELECT n, 'Film ' || n, 'another story', n FROM generate_series(3, 60) AS n")
    assert sync(one, project).embedded == 58
    before = runs(instance)
    many = {name: asks(what) for name, what in each.items()}
    assert all(many[name] <= few[name] for name in each), (few, many)
    assert runs(instance) == before
