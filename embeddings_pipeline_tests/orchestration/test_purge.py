"""What Dagster has written goes after some days, and what happens all the time leaves next to nothing."""

import os
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import text

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.housekeeping import build_housekeeping
from embeddings_pipeline.orchestration.instance import purge as purging
from embeddings_pipeline.orchestration.instance.purge import Purged, purge, purge_daily
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films


def age(instance: dg.DagsterInstance, days: int) -> None:
    """As if all that Dagster has written had been written so many days ago."""
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        connection.execute(text(f"UPDATE runs SET create_timestamp = create_timestamp - interval '{days} days'"))
    for folder in run_folders(instance):
        os.utime(folder, (time.time() - days * 86_400,) * 2)


def run_folders(instance: dg.DagsterInstance) -> list[Path]:
    logs = instance.compute_log_manager.folder  # type: ignore[attr-defined]
    folders = [logs, Path(instance.storage_directory())]
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def jobs_of(instance: dg.DagsterInstance) -> list[str]:
    return sorted(run.job_name for run in instance.get_runs())


def events(instance: dg.DagsterInstance) -> int:
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        return int(connection.execute(text("SELECT count(*) FROM event_logs")).scalar_one())


def checks(instance: dg.DagsterInstance) -> int:
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        return int(connection.execute(text("SELECT count(*) FROM asset_check_executions")).scalar_one())


def edit_and_sync(database, project, instance, times: int) -> None:
    for n in range(times):
        execute(database, "UPDATE films SET overview = %s WHERE id = 1", [f"edit {n}"])
        sync(definition(), project, instance=instance)


def test_scans_that_found_nothing_leave_one_run_however_many_they_were(database, project, instance) -> None:
    make_films(database, films(5))
    for _ in range(2):
        sync(definition(), project, instance=instance)
    before, folders = events(instance), len(run_folders(instance))
    for _ in range(4):
        sync(definition(), project, instance=instance)
    # The first scan found what is there. Of the others the last has not ended when it looks for those before it.
    assert jobs_of(instance).count("films_scan") == 3
    assert events(instance) < 2 * before and len(run_folders(instance)) <= folders + 1
    edit_and_sync(database, project, instance, 1)
    assert jobs_of(instance).count("films_scan") == 4  # it found something


def test_old_runs_go_with_their_events_checks_and_files(database, project, instance) -> None:
    make_films(database, films(25))
    sync(definition(), project, instance=instance)
    edit_and_sync(database, project, instance, 3)
    age(instance, 31)
    edit_and_sync(database, project, instance, 1)
    runs, before, results = len(instance.get_runs()), events(instance), checks(instance)
    purged = purge(instance, project)
    # The last run of batch 0 and of the indexes is new; the first of all embedded the batches 1 and 2.
    assert (purged.runs, purged.kept) == (runs - 3 - 1, 1)
    assert {"films_scan", "films_batches", "films_index"} <= set(jobs_of(instance))
    assert events(instance) < before / 2 and checks(instance) < results / 2
    kept = {run.run_id for run in instance.get_runs()}
    assert {folder.name for folder in run_folders(instance)} <= kept
    assert purge(instance, project) == Purged(kept=1)


def test_what_the_ui_knows_of_assets_partitions_and_checks_outlives_their_runs(database, project, instance) -> None:
    make_films(database, films(25))
    sync(definition(), project, instance=instance)
    age(instance, 400)
    for _ in range(2):
        purge(instance, project)
    for asset in ("raw_items", "item_texts", "embeddings_32", "pgvector_table"):
        done = instance.get_materialized_partitions(dg.AssetKey(["films", asset]))
        assert done == {"000000", "000001", "000002"}, asset
    for asset in ("item_ledger", "pgvector_index", "faiss_index"):
        assert instance.get_latest_materialization_event(dg.AssetKey(["films", asset])) is not None
    for key in build_definitions(definition()).resolve_asset_graph().asset_check_keys:
        history = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
        assert [record.status.value for record in history] in ([], ["SUCCEEDED"])


def test_younger_runs_and_all_with_0_days_stay(database, project, instance) -> None:
    make_films(database, films(5))
    sync(definition(), project, instance=instance)
    edit_and_sync(database, project, instance, 2)
    age(instance, 29)
    assert purge(instance, project).runs == 0
    for_ever = Settings(**{**project.model_dump(), "embeddings_keep_days": 0})
    age(instance, 1000)
    assert purge(instance, for_ever) == Purged()
    a_week = Settings(**{**project.model_dump(), "embeddings_keep_days": 7})
    assert purge(instance, a_week).runs > 0


def test_folders_of_runs_that_were_deleted_in_the_ui_go_too(project, instance) -> None:
    folder = instance.compute_log_manager.folder / "a-run-that-is-gone" / "compute_logs"
    folder.mkdir(parents=True)
    (folder / "step.out").write_text("printed")
    assert purge(instance, project).folders == 0
    age(instance, 31)
    assert purge(instance, project).folders == 1
    assert not folder.exists()


def test_another_instance_keeps_its_runs(project) -> None:
    with dg.DagsterInstance.ephemeral() as theirs:

        @dg.job
        def anything() -> None:
            pass

        theirs.create_run_for_job(anything)
        assert purge(theirs, project) == Purged()
        assert theirs.get_runs_count() == 1


@pytest.mark.parametrize(("hours_ago", "again"), [(1, False), (21, True), (-48, True)])
def test_sync_purges_once_a_day(project, instance, monkeypatch, hours_ago: int, again: bool) -> None:
    """A time in the future counts as none."""
    calls: list[Any] = []
    monkeypatch.setattr(purging, "purge", lambda *arguments, **options: calls.append(arguments))
    purge_daily(instance, project)
    assert len(calls) == 1
    done = project.state_dir / "dagster" / "purged"
    os.utime(done, (time.time() - hours_ago * 3600,) * 2)
    purge_daily(instance, project)
    assert len(calls) == 1 + again


class TestHousekeeping:
    def test_the_daily_job_is_on_from_the_start_and_removes_old_runs(self, database, project, instance) -> None:
        make_films(database, films(5))
        sync(definition(), project, instance=instance)
        edit_and_sync(database, project, instance, 1)
        age(instance, 31)
        repository = build_housekeeping().get_repository_def()
        [schedule] = repository.schedule_defs
        assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
        before = instance.get_runs_count()
        assert repository.get_job(schedule.job_name).execute_in_process(instance=instance).success
        assert instance.get_runs_count() <= before - 2

    def test_a_new_collection_gets_its_first_partition_and_no_other_one(self, project, instance) -> None:
        definitions = dg.Definitions.merge(
            build_definitions(definition("films")), build_definitions(definition("items")), build_housekeeping()
        )
        repository = definitions.get_repository_def()
        sensor = repository.get_sensor_def("first_partitions")
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
        instance.add_dynamic_partitions("items_batches", ["000000", "000001"])
        for _ in range(2):
            sensor.evaluate_tick(dg.build_sensor_context(instance=instance, repository_def=repository))
        assert list(instance.get_dynamic_partitions("films_batches")) == ["000000"]
        assert list(instance.get_dynamic_partitions("items_batches")) == ["000000", "000001"]
