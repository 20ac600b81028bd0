"""Batch jobs: whether one was begun, who works on it, and how it is given up."""

import asyncio
from datetime import timedelta

import pytest

from embeddings_pipeline.encoders import batch_jobs as module
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.errors import BudgetError, ConfigurationError, OutageError, ProfileError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import job_lock
from embeddings_pipeline_tests.support.batch_jobs import (
    TEXTS,
    billed_once,
    claims,
    kept,
    look_at_all,
    pass_time,
    submit,
)
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, tokens_of
from embeddings_pipeline_tests.support.hosted import one_line
from embeddings_pipeline_tests.support.workbench import execute

pytestmark = pytest.mark.usefixtures("films_known")


class TestWhetherItBegan:
    def test_an_answer_that_was_lost_is_found_by_the_batch_metadata(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("cut create")
        assert submit(database, service).texts == 30
        assert [job["state"] for job in jobs.listed()] == ["uploaded"]
        assert look_at_all(jobs) == ["done"]
        assert billed_once(service) and service.batches.counts()["batches"] == 1

    def test_an_answer_that_was_lost_is_found_at_a_server_that_keeps_no_metadata(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("cut create")
        submit(database, service)
        [batch] = service.batches.batches.values()
        batch |= {"metadata": None, "created_at": None}
        pass_time(database, module.GRACE_SECONDS)
        assert look_at_all(jobs) == ["done"]
        assert billed_once(service) and service.batches.counts()["batches"] == 1

    def test_what_did_not_begin_is_begun_again_once_that_is_certain(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("refused create", times=2)
        submit(database, service)
        assert look_at_all(jobs) == ["uploaded"]
        pass_time(database, module.GRACE_SECONDS)
        assert look_at_all(jobs) == ["uploaded"]  # it was refused again, and the wait begins anew
        assert look_at_all(jobs) == ["uploaded"]
        pass_time(database, module.GRACE_SECONDS)
        assert look_at_all(jobs) == ["done"]
        assert billed_once(service) and service.batches.uploads == 1

    @pytest.mark.parametrize("hours", [-1, 1, 24])
    def test_a_clock_that_jumps_does_not_hide_what_began(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, hours: int
    ) -> None:
        service.batches.fail("cut create")
        submit(database, service)
        moved = "UPDATE embeddings.batch_job SET made_at = made_at + %(by)s, asked_at = asked_at + %(by)s"
        execute(database, moved, {"by": timedelta(hours=hours)})
        assert look_at_all(jobs) == ["done"] and billed_once(service)

    def test_what_is_not_listed_for_another_key_is_not_begun_there(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("refused create")
        submit(database, service)
        execute(database, "UPDATE embeddings.batch_job SET account = 'another'")
        pass_time(database, module.GRACE_SECONDS)
        with pytest.raises(ProfileError, match="bring that back, or give it up with") as error:
            look_at_all(jobs)
        assert one_line(error.value) and claims(database) == 30 and service.batches.counts()["batches"] == 0

    def test_a_batch_without_a_name_is_looked_for(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.batches.nameless = True
        with pytest.raises(OutageError, match="cannot be read"):
            submit(database, service)
        assert claims(database) == 0
        upload = service.batches.upload
        monkeypatch.setattr(service.batches, "upload", lambda content: {**upload(content), "id": "file-named"})
        service.batches.files["file-named"] = b""
        submit(database, service)
        service.batches.nameless = False
        service.batches.files["file-named"] = list(service.batches.files.values())[-1]
        assert look_at_all(jobs) == ["done"] and billed_once(service)

    def test_who_works_on_a_job_is_alone(self, database: Database, service: EmbeddingServer, jobs: BatchJobs) -> None:
        submit(database, service)
        [job] = jobs.due(now=True)
        with job_lock(database, job):
            assert jobs.look(job) is None
        assert jobs.look(job) == "done"

    def test_a_notebook_whose_event_loop_runs_may_look_too(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        async def cell() -> list[str | None]:
            submit(database, service)
            return look_at_all(jobs)

        assert asyncio.run(cell()) == ["done"]

    def test_jobs_are_looked_at_once_a_minute(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        submit(database, service)
        assert jobs.due() == []
        pass_time(database, module.LOOK_SECONDS)
        assert len(jobs.due()) == 1


class TestForgetting:
    def test_a_job_whose_server_is_gone_can_be_given_up(self, database: Database, jobs: BatchJobs) -> None:
        with EmbeddingServer() as service:
            submit(database, service)
        [job] = jobs.due(now=True)
        jobs.forget(job)
        assert (claims(database), jobs.listed()[0]["state"]) == (0, "lost")
        with pytest.raises(ConfigurationError, match="it has ended"):
            jobs.forget(job)

    def test_a_budget_counts_what_a_forgotten_job_may_cost_yet(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        budget = sum(map(tokens_of, TEXTS.values())) / 1e6 + 1e-9
        submit(database, service, usd_per_day=budget)
        jobs.forget(jobs.due(now=True)[0])
        with pytest.raises(BudgetError, match="usd_per_day"):
            submit(database, service, usd_per_day=budget)

    def test_what_a_forgotten_job_has_answered_all_the_same_is_kept(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.seconds = 3600
        submit(database, service)
        [job] = jobs.due(now=True)
        jobs.forget(job)
        pass_time(database, module.LOST_LOOK_SECONDS)
        assert (jobs.due(), jobs.look(job)) == ([job], "lost")
        assert jobs.listed()[0]["reason"] == "it was forgotten by hand"
        service.batches.seconds = 0
        pass_time(database, module.LOST_LOOK_SECONDS)
        assert jobs.look(job) == "done" and len(kept(database)) == 30

    def test_a_job_that_was_never_begun_can_be_given_up(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("refused create")
        submit(database, service)
        [job] = jobs.due(now=True)
        jobs.forget(job)
        assert (claims(database), jobs.listed()[0]["state"], jobs.due(now=True)) == (0, "failed", [])
