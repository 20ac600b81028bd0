"""Batch jobs: nothing is submitted twice, and nothing that was paid for is thrown away, whatever the server does."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders import batch_jobs as module
from embeddings_pipeline.encoders.answers import Answers, OnAnswer
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.encoders.batch_submit import Submission
from embeddings_pipeline.encoders.cache import PostgresCache
from embeddings_pipeline.errors import ConfigurationError, OutageError, ProfileError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import job_lock
from embeddings_pipeline_tests.support.batch_jobs import (
    TERMS,
    TEXTS,
    billed_once,
    claims,
    kept,
    look_at_all,
    pass_time,
    submit,
)
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer
from embeddings_pipeline_tests.support.redis_server import is_there, redis_server
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


class TestWhatComesBack:
    def test_what_an_expired_batch_has_answered_is_kept_and_the_rest_is_free(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("expire")
        submit(database, service)
        assert look_at_all(jobs) == ["done"]
        [job] = jobs.listed()
        assert (job["remote_state"], job["answered"], job["unanswered"]) == ("expired", 15, 15)
        assert (len(kept(database)), claims(database)) == (15, 0)
        assert submit(database, service).texts == 15
        look_at_all(jobs)
        assert len(kept(database)) == 30 and billed_once(service)

    def test_a_batch_that_is_cancelled_keeps_what_it_has_answered(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.seconds = 60
        submit(database, service)
        [job] = jobs.due(now=True)
        assert jobs.look(job) == "submitted"
        jobs.cancel(job)
        assert jobs.look(job) == "done"
        assert (jobs.listed()[0]["remote_state"], len(kept(database))) == ("cancelled", 15)
        with pytest.raises(ConfigurationError, match="batch-job list"):
            jobs.cancel(job)

    @pytest.mark.parametrize(
        "fault, left", [("some", 10), ("missing", 10), ("nan", 10), ("duplicates", 0), ("others", 0)]
    )
    def test_answers_that_are_missing_twice_or_another_s(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, fault: str, left: int
    ) -> None:
        service.batches.fail(fault)
        submit(database, service)
        assert look_at_all(jobs) == ["done"]
        assert (len(kept(database)), claims(database)) == (30 - left, 0)
        [(texts,)] = execute(database, "SELECT sum(texts) FROM embeddings.embedding_spend")
        assert texts == 30 - left
        assert submit(database, service).texts == left

    def test_a_refused_text_is_not_submitted_again_and_may_be_asked_about_directly(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        poison = content_hash("POISON")
        texts = {**TEXTS, poison: "POISON"}
        submit(database, service, texts)
        assert look_at_all(jobs) == ["done"]
        assert (jobs.listed()[0]["refused"], len(kept(database)), claims(database)) == (1, 30, 0)
        assert submit(database, service, texts) == Submission()
        asked: list[bytes] = []

        def encode(wanted: Mapping[bytes, str], on_answer: OnAnswer) -> dict[bytes, Any]:
            asked.extend(wanted)
            return {}

        vectors, cached = Answers(database, PostgresCache(database), TERMS).of(texts, {}, encode)
        assert (asked, len(vectors), len(cached)) == ([poison], 30, 30)

    def test_a_batch_that_fails_as_a_whole_says_why_and_frees_its_texts(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("fail")
        submit(database, service)
        assert look_at_all(jobs) == ["failed"]
        assert jobs.listed()[0]["reason"].startswith("token_limit_exceeded: Enqueued token limit")
        assert claims(database) == 0 and not service.billed

    @pytest.mark.parametrize("fault", ["half file", "cut file", "no file"])
    def test_a_file_that_does_not_come_whole_is_read_again(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, fault: str
    ) -> None:
        service.batches.fail(fault)
        submit(database, service)
        [job] = jobs.due(now=True)
        if fault == "no file":
            assert jobs.look(job) == "ended"
        else:
            with pytest.raises(OutageError, match=r"read again|does not answer"):
                jobs.look(job)
        assert jobs.look(job) == "done"
        assert len(kept(database)) == 30 and claims(database) == 0 and billed_once(service)
        assert execute(database, "SELECT sum(texts) FROM embeddings.embedding_spend") == [(30,)]

    def test_a_batch_that_the_server_lost_frees_its_texts_after_a_while(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("lost")
        submit(database, service)
        assert look_at_all(jobs) == ["submitted"]  # it may be back in a moment
        pass_time(database, module.LOST_SECONDS)
        assert look_at_all(jobs) == ["lost"]
        assert claims(database) == 0 and "the server lost it" in jobs.listed()[0]["reason"]
        assert submit(database, service).texts == 30

    def test_a_lost_batch_that_is_back_is_not_thrown_away(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        submit(database, service)
        gone = dict(service.batches.batches)
        service.batches.batches.clear()
        look_at_all(jobs)
        pass_time(database, module.LOST_SECONDS)
        [job] = jobs.due(now=True)
        assert jobs.look(job) == "lost"
        service.batches.batches.update(gone)
        assert jobs.due() == []
        pass_time(database, module.LOST_LOOK_SECONDS)
        assert jobs.due() == [job] and jobs.look(job) == "done"
        assert len(kept(database)) == 30 and submit(database, service) == Submission()

    def test_another_key_does_not_lose_a_batch(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        submit(database, service)
        execute(database, "UPDATE embeddings.batch_job SET account = 'another', remote = 'batch_of_another'")
        pass_time(database, module.LOST_SECONDS)
        for _ in range(2):
            with pytest.raises(ProfileError, match="another key or address"):
                look_at_all(jobs)
        assert claims(database) == 30

    def test_a_server_that_does_not_answer_costs_nothing_but_time(self, database: Database, jobs: BatchJobs) -> None:
        with EmbeddingServer() as service:
            submit(database, service)
        with pytest.raises(OutageError, match="does not answer"):
            look_at_all(jobs)
        assert claims(database) == 30 and "does not answer" in jobs.listed()[0]["reason"]


class TestRedis:
    def test_answers_that_redis_does_not_keep_stay_with_the_server(
        self, database: Database, service: EmbeddingServer, skip_without: Any, tmp_path: Path
    ) -> None:
        skip_without("redis-server", is_there())
        with redis_server(tmp_path) as server:
            settings = Settings(embedding_cache_url=server.url)
            submit(database, service, settings=settings)
            [job] = BatchJobs(database, settings).due(now=True)
        jobs = BatchJobs(database, settings)
        with pytest.raises(OutageError, match="EMBEDDING_CACHE_URL"):
            jobs.look(job)
        assert claims(database) == 30
        assert BatchJobs(database, Settings()).look(job) == "done"
        assert len(kept(database)) == 30 and billed_once(service)
