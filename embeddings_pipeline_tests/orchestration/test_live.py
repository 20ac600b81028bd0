"""The job `live`, and what Dagster is told of what was done."""

import threading

import dagster as dg

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.live.done import Done
from embeddings_pipeline.live.reports import MinuteReports
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.dagster_internals import InMemoryJob
from embeddings_pipeline.orchestration.live import report
from embeddings_pipeline.orchestration.names import asset_key, partitions_name
from embeddings_pipeline.pipeline.figures import RunFigures
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.live.test_follow import insert, texts, with_updates
from embeddings_pipeline_tests.orchestration.test_storage import statements
from embeddings_pipeline_tests.support.dagster_internals import execute_run
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films, sync_once, wait_until


def test_the_job_follows_for_so_long_as_it_is_told_to(
    database: Database, project: Settings, instance: dg.DagsterInstance
) -> None:
    make_films(database, films(25))
    execute(database, "ALTER TABLE films ADD at timestamptz NOT NULL DEFAULT now()")
    sync_once(with_updates(), project)
    job = build_definitions(with_updates()).resolve_job_def("films_live")
    config = {"ops": {"films_follow_changes": {"config": {"minutes": 0.1}}}}
    run = instance.create_run_for_job(job, run_config=config)
    inserting = threading.Timer(1.0, lambda: insert(database, 100))
    inserting.start()
    assert execute_run(InMemoryJob(job), run, instance, raise_on_error=True).success
    inserting.join()
    assert "100" in texts(database)
    assert instance.get_materialized_partitions(asset_key(with_updates(), "pgvector_table")) == {"000002"}


def test_what_was_done_in_a_minute_is_one_materialization_of_each_asset(
    project: Settings, instance: dg.DagsterInstance
) -> None:
    figures = {0: RunFigures(rows=10, inserted=3, embedded=3), 7: RunFigures(rows=10, updated=2, embedded=1)}
    report({"films": definition()}, project, {"films": Done(figures, commits=4)}, instance)
    assert instance.get_dynamic_partitions(partitions_name(definition())) == ["000000", "000007"]
    [last, first] = instance.fetch_materializations(asset_key(definition(), "pgvector_table"), limit=9).records
    assert (first.partition_key, last.partition_key) == ("000000", "000007")
    metadata = first.asset_materialization.metadata if first.asset_materialization else {}
    assert (metadata["inserted"].value, metadata["done_by"].value) == (3, "live")
    [embedded, _] = instance.fetch_materializations(asset_key(definition(), "embeddings_32"), limit=9).records
    assert embedded.asset_materialization and embedded.asset_materialization.metadata["embedded"].value == 1


def test_what_was_done_to_many_batches_is_written_together(project: Settings, instance: dg.DagsterInstance) -> None:
    def told(batches: range, inserted: int) -> list[str]:
        figures = {batch: RunFigures(rows=10, inserted=inserted) for batch in batches}
        with statements() as asked:
            report({"films": definition()}, project, {"films": Done(figures)}, instance)
        return asked

    told(range(120), 1)  # the partitions are added, and what is asked once is asked
    few, many = told(range(3), 2), told(range(120), 3)
    assert len(many) <= 3 * len(few), "480 events in three writes"
    for asset in ("raw_items", "item_texts", "embeddings_32", "pgvector_table"):
        key = asset_key(definition(), asset)
        assert instance.get_materialized_partitions(key) == {f"{batch:06}" for batch in range(120)}
        records = instance.fetch_materializations(key, limit=200).records
        assert [record.partition_key for record in records[:120]] == [f"{n:06}" for n in reversed(range(120))]
        latest = instance.get_latest_materialization_event(key)
        assert latest is not None and latest.asset_materialization is not None
        assert latest.asset_materialization.partition == "000119"


def test_what_cannot_be_told_is_told_later() -> None:
    told: list[dict[int, int]] = []
    lines: list[str] = []
    away = True

    def tell(done: object) -> None:
        assert isinstance(done, dict)
        if away:
            raise RuntimeError("the database is away")
        told.append({batch: figures.inserted for batch, figures in done["films"].batches.items()})

    reports = MinuteReports(tell, lines.append)
    reports.add({"films": Done({0: RunFigures(inserted=1)})})
    wait_until(lambda: bool(lines))
    reports.add({"films": Done({0: RunFigures(inserted=2), 1: RunFigures(inserted=5)})})
    away = False
    reports.close()
    assert told == [{0: 3, 1: 5}]
    assert lines == ["warning: Dagster cannot be told what was done, and is told later: the database is away"]
