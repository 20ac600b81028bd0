"""The Batch API for a backfill and a change of the model: from a sync, the launchpad, the sensor and a terminal."""

import json
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.prices import Api
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.encoders.batch_submit import Submission
from embeddings_pipeline.encoders.budget import Purse
from embeddings_pipeline.errors import BudgetError, ConfigurationError, ProfileError, RefusedError, RunFailed
from embeddings_pipeline.model_change import backfill
from embeddings_pipeline.model_change.plan import price
from embeddings_pipeline.model_change.state import candidate_profile, open_change
from embeddings_pipeline.orchestration.batch_jobs import evaluate_jobs
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.jobs import build_pipeline
from embeddings_pipeline.orchestration.names import asset_key
from embeddings_pipeline.orchestration.partitions import range_tags
from embeddings_pipeline.orchestration.switch import SwitchResult, switch
from embeddings_pipeline.orchestration.sync import SyncResult, sync
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.pipeline.inventory import take_inventory
from embeddings_pipeline.pipeline.removal import remove_collection
from embeddings_pipeline.pipeline.submit import submit_texts
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.batch_jobs import FILMS, HOSTED, assert_once, of_films
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, tokens_of
from embeddings_pipeline_tests.support.workbench import (
    PROFILE,
    by_name,
    committed,
    definition,
    edit,
    execute,
    films,
    make_films,
)

APIS: tuple[Api, ...] = ("direct", "batch")


@pytest.fixture(autouse=True)
def _films(database: Database) -> None:
    make_films(database, films(FILMS))


@pytest.fixture
def hosted(service: EmbeddingServer) -> CollectionDefinition:
    return definition(profile={**HOSTED, "url": service.url})


@pytest.fixture
def run_sync(
    project: Settings, instance: dg.DagsterInstance, hosted: CollectionDefinition
) -> Callable[..., SyncResult]:
    def run(one: CollectionDefinition = hosted, **options: Any) -> SyncResult:
        return sync(one, project, instance=instance, **options)

    return run


@pytest.fixture
def tick(
    database: Database, project: Settings, instance: dg.DagsterInstance, hosted: CollectionDefinition
) -> Callable[..., list[str]]:
    """One look of the sensor, a minute after the last one, and the runs that it asks for; their jobs' names."""
    cursor: list[str | None] = [None]

    def run(one: CollectionDefinition = hosted) -> list[str]:
        later(database)
        result = evaluate_jobs(instance, one, 32, cursor[0])
        cursor[0] = result.cursor
        for event in result.asset_events:
            instance.report_runless_asset_event(event)  # type: ignore[arg-type]
        requests = result.run_requests or []
        pipeline = build_definitions(one)
        for request in requests:
            job = pipeline.resolve_job_def(str(request.job_name))
            assert job.execute_in_process(run_config=request.run_config, instance=instance, tags=request.tags).success
        return [str(request.job_name) for request in requests]

    return run


def later(database: Database, seconds: float = 61.0) -> None:
    for table, column in (("batch_job", "looked_at"), ("batch_job", "ended_at"), ("batch", "next_try")):
        execute(
            database,
            f"UPDATE embeddings.{table} SET {column} = {column} - make_interval(secs => %s)",
            [seconds],
        )


def asked_directly(service: EmbeddingServer) -> list[str]:
    return [text for body in service.bodies for text in body["input"] if text.startswith("Film")]


class TestBackfill:
    def test_a_sync_submits_and_a_later_one_commits(
        self, database: Database, service: EmbeddingServer, run_sync: Callable[..., SyncResult]
    ) -> None:
        service.batches.seconds = 3600
        first = run_sync(api="batch")
        tokens = sum(tokens_of(f"Film {n} | A story about number {n} and its friends") for n in range(1, FILMS + 1))
        assert (first.in_jobs, first.embedded, first.cached) == (FILMS, 0, 0)
        assert first.usd == pytest.approx(1.3 * tokens * 0.01 / 1e6, rel=0.1)
        assert (len(committed(database)), service.batches.counts()["batches"]) == (0, 1)
        again = run_sync()
        assert (again.embedded, again.in_jobs, asked_directly(service)) == (0, 0, [])
        service.batches.seconds = 0
        last = run_sync()
        assert (last.cached, last.embedded, last.in_jobs) == (FILMS, 0, 0)
        assert_once(database, service)
        [(usd,)] = execute(database, "SELECT sum(usd) FROM embeddings.embedding_spend WHERE told = %s", [tokens])
        assert usd == pytest.approx(tokens * 0.01 / 1e6)

    def test_rows_that_change_meanwhile_are_embedded_at_once(
        self, database: Database, service: EmbeddingServer, run_sync: Callable[..., SyncResult]
    ) -> None:
        service.batches.seconds = 3600
        run_sync(api="batch")
        edit(database, 31, "new, and in a batch of its own")
        edit(database, 32, "new too")
        assert (run_sync().embedded, len(committed(database))) == (2, 2)
        edit(database, 5, "edited while its first text is with a batch job")
        service.batches.seconds = 0
        assert run_sync().cached == FILMS - 1
        assert committed(database)["5"][0].endswith("is with a batch job")
        assert len(committed(database)) == FILMS + 2

    def test_the_sensor_fetches_and_commits(
        self,
        database: Database,
        service: EmbeddingServer,
        instance: dg.DagsterInstance,
        hosted: CollectionDefinition,
        run_sync: Callable[..., SyncResult],
        tick: Callable[..., list[str]],
    ) -> None:
        service.batches.seconds = 3600
        run_sync(api="batch")
        assert tick() == []
        event = instance.get_latest_materialization_event(asset_key(hosted, "batch_jobs"))
        assert event is not None and event.asset_materialization is not None
        shown = {name: value.value for name, value in event.asset_materialization.metadata.items()}
        assert (shown["at_work"], shown["texts"], shown["done"]) == (1, FILMS, 0)
        [row] = shown["jobs"].records
        assert (row.data["state"], row.data["server_says"]) == ("submitted", "in_progress")
        service.batches.seconds = 0
        assert tick() == ["films_batch_jobs"]
        assert tick() == ["films_batches"]
        assert tick() == [] and tick() == []
        assert_once(database, service)
        edit(database, 3, "an edit later on is no business of the jobs")
        open_collection(hosted, Settings(database_url=database.url)).ledger.full_scan(
            open_collection(hosted, Settings(database_url=database.url)).source
        )
        assert tick() == []

    def test_what_was_left_unanswered_is_submitted_again_and_not_asked_directly(
        self,
        database: Database,
        service: EmbeddingServer,
        run_sync: Callable[..., SyncResult],
        tick: Callable[..., list[str]],
    ) -> None:
        for fault in ("expire", "some", "fail"):
            service.batches.fail(fault)
        run_sync(api="batch")
        runs = [run for _ in range(14) for run in tick()]
        assert runs.count("films_batch_jobs") == 4
        assert_once(database, service)
        assert asked_directly(service) == []

    def test_what_max_cost_left_is_not_followed_up(
        self,
        database: Database,
        service: EmbeddingServer,
        run_sync: Callable[..., SyncResult],
        tick: Callable[..., Any],
    ) -> None:
        with pytest.raises(BudgetError, match="--max-cost"):
            run_sync(api="batch", purse=Purse(10 * 15 * 1.3 * 0.01 / 1e6))  # of about ten texts, in batches of ten
        [(batches,)] = execute(database, "SELECT batches FROM embeddings.batch_job")
        assert set(batches) <= {0, 1}
        for _ in range(8):
            tick()
        assert len(of_films(service)) <= 10 * len(batches) and len(committed(database)) == len(of_films(service))

    def test_after_jobs_that_answer_nothing_it_waits_longer_each_time(
        self,
        database: Database,
        service: EmbeddingServer,
        run_sync: Callable[..., SyncResult],
        tick: Callable[..., Any],
    ) -> None:
        service.batches.fail("fail", times=100)
        run_sync(api="batch")
        for _ in range(20):  # minutes
            tick()
        assert 3 <= service.batches.counts()["batches"] <= 5

    def test_poison_goes_to_quarantine_in_the_servers_words(
        self,
        database: Database,
        service: EmbeddingServer,
        hosted: CollectionDefinition,
        project: Settings,
        run_sync: Callable[..., SyncResult],
    ) -> None:
        edit(database, 7, "POISON")
        edit(database, 8, "word " * 20_000)
        run_sync(api="batch")
        assert run_sync(api="batch").quarantined == 2
        reasons = [each.reason for each in open_collection(hosted, project).ledger.quarantine_entries()]
        assert any("rejected by the safety system" in reason for reason in reasons)
        assert any("the model reads 8,192" in reason for reason in reasons)
        assert len(committed(database)) == FILMS - 2 and service.batches.counts()["batches"] == 1

    def test_a_limit_and_items_choose_what_is_submitted(
        self, database: Database, service: EmbeddingServer, run_sync: Callable[..., SyncResult]
    ) -> None:
        done = run_sync(api="batch", limit=12)
        assert (done.in_jobs, len(of_films(service))) == (12, 0)
        assert sum(len(json.loads(line)["body"]["input"]) for file in service.batches.files.values()
                   for line in file.splitlines()) == 12  # fmt: skip

    def test_the_launchpad_takes_it(
        self, database: Database, service: EmbeddingServer, project: Settings, instance: dg.DagsterInstance,
        hosted: CollectionDefinition, run_sync: Callable[..., SyncResult]
    ) -> None:  # fmt: skip
        run_sync(limit=1)
        job = build_pipeline(hosted).resolve_job_def("films_batches")

        def run(**config: Any) -> dg.ExecuteInProcessResult:
            ops = {"films__embeddings_32": {"config": config}}
            return job.execute_in_process(
                run_config={"ops": ops}, instance=instance, tags=range_tags(0, 2), raise_on_error=False
            )

        assert run(api="batch").success and len(of_films(service)) == 1
        BatchJobs(database, project, "films").look(BatchJobs(database, project).due(now=True)[0])
        assert run().success
        assert_once(database, service)
        assert not run(api="batch", force=True).success
        assert not run(api="overnight").success


class TestModelChange:
    def test_a_switch_submits_and_the_same_command_ends_it(
        self, database: Database, service: EmbeddingServer, project: Settings, instance: dg.DagsterInstance
    ) -> None:
        own = {**HOSTED, "url": service.url}
        one = definition(profiles=by_name(own))
        sync(one, project, instance=instance)
        service.batches.seconds = 3600

        def change() -> SwitchResult:
            return switch(one, project, "hosted", api="batch", instance=instance)

        assert (change().in_jobs, service.batches.counts()["batches"]) == (FILMS, 1)
        edit(database, 2, "edited meanwhile")
        assert sync(one, project, instance=instance).embedded == 1
        assert change().in_jobs in (FILMS, FILMS - 1)  # nothing is submitted twice, and nothing swapped
        assert (service.batches.counts()["batches"], open_collection(one, project).profile.name) == (1, "test")
        service.batches.seconds = 0
        done = change()
        done = change() if done.in_jobs else done
        assert (done.in_jobs, done.recall_at_10) == (0, 1.0)
        assert open_collection(one, project).profile.name == "hosted"
        assert set(of_films(service).values()) == {1}

    def test_what_fails_while_more_is_submitted_is_not_asked_about_directly(
        self,
        database: Database,
        service: EmbeddingServer,
        project: Settings,
        instance: dg.DagsterInstance,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        one = definition(profiles=by_name({**HOSTED, "url": service.url}))
        sync(one, project, instance=instance)
        service.batches.fail("fail", times=3)
        monkeypatch.setattr(backfill, "MOST_TEXTS", 10)
        jobs = BatchJobs(database, project, "films")

        def submit_after_a_look(*arguments: Any) -> Submission:
            for job in jobs.due(now=True):
                jobs.look(job)
            return submit_texts(*arguments)

        monkeypatch.setattr(backfill, "submit_texts", submit_after_a_look)
        assert switch(one, project, "hosted", api="batch", instance=instance).in_jobs == FILMS
        assert [job["state"] for job in jobs.listed()] == ["submitted", "failed", "failed"]
        assert asked_directly(service) == []

    def test_its_price_before_is_half(
        self, project: Settings, instance: dg.DagsterInstance, service: EmbeddingServer
    ) -> None:
        one = definition(profiles=by_name({**HOSTED, "url": service.url}))
        sync(one, project, instance=instance)
        collection = open_collection(one, project)
        direct, half = (price(collection, candidate_profile(collection, "hosted"), api).quote for api in APIS)
        assert direct is not None and half is not None and direct.usd and half.usd
        assert (half.usd, half.jobs) == (pytest.approx(direct.usd / 2), 1)
        with pytest.raises(ConfigurationError, match="leave it out"):
            price(collection, collection.profile, "batch")

    def test_a_candidate_that_is_no_service_is_refused_before_anything_is_touched(
        self, project: Settings, instance: dg.DagsterInstance
    ) -> None:
        one = definition(profiles=by_name({**PROFILE, "name": "wide", "dimensions": 48}))
        sync(one, project, instance=instance)
        with pytest.raises(ConfigurationError, match="is of provider python: leave it out"):
            switch(one, project, "wide", api="batch", instance=instance)
        assert open_change(open_collection(one, project)) is None

    def test_the_sensor_goes_on_with_the_backfill(
        self,
        database: Database,
        service: EmbeddingServer,
        project: Settings,
        instance: dg.DagsterInstance,
        tick: Callable[..., list[str]],
    ) -> None:
        one = definition(profiles=by_name({**HOSTED, "url": service.url}))
        sync(one, project, instance=instance)
        service.batches.fail("expire")
        switch(one, project, "hosted", api="batch", instance=instance)
        runs = [run for _ in range(6) for run in tick(one)]
        assert runs == ["films_batch_jobs", "films_migration_backfill"] * 2
        assert switch(one, project, "hosted", instance=instance).recall_at_10 == 1.0
        assert list(of_films(service).values()) == [1] * FILMS


class TestRefused:
    def test_a_model_that_is_no_service(self, run_sync: Callable[..., SyncResult]) -> None:
        for dry_run in (False, True):
            with pytest.raises(ConfigurationError, match="is of provider python: leave it out"):
                run_sync(definition(profile=PROFILE), api="batch", dry_run=dry_run)

    def test_what_excludes_each_other_and_what_is_forbidden(
        self, project: Settings, run_sync: Callable[..., SyncResult], hosted: CollectionDefinition,
        instance: dg.DagsterInstance, service: EmbeddingServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:  # fmt: skip
        with pytest.raises(ConfigurationError, match="exclude each other"):
            run_sync(api="batch", force=True)
        monkeypatch.setenv("EMBEDDING_ENABLED", "false")
        with pytest.raises((RunFailed, ProfileError), match="EMBEDDING_ENABLED=false"):
            run_sync(api="batch")
        assert service.batches.uploads == 0

    def test_a_budget_counts_what_is_submitted(
        self, service: EmbeddingServer, run_sync: Callable[..., SyncResult], hosted: CollectionDefinition
    ) -> None:
        price = 1_000_000 / 13  # about two dollars a text: half of that by batch jobs, times what is set aside
        one = definition(
            profile={**HOSTED, "url": service.url, "price": price}, budget={"usd_per_day": 10}, items_per_batch=100
        )
        for _ in range(2):
            with pytest.raises(BudgetError, match="usd_per_day: 10"):
                run_sync(one, api="batch")
        assert 10 <= len(of_films(service)) <= 20 and set(of_films(service).values()) == {1}

    def test_a_collection_is_not_removed_while_jobs_are_at_work(
        self, database: Database, project: Settings, service: EmbeddingServer, run_sync: Callable[..., SyncResult]
    ) -> None:
        service.batches.seconds = 3600
        run_sync(api="batch")
        with pytest.raises(RefusedError, match="1 batch job is at work, and paid for"):
            remove_collection(database, project, take_inventory(database, project, "films"))
