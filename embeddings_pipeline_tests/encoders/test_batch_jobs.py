"""Batch jobs: nothing is submitted twice, and nothing that was paid for is thrown away, whatever the server does."""

import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders import batch_api
from embeddings_pipeline.encoders import batch_jobs as module
from embeddings_pipeline.encoders.answers import Answers, OnAnswer
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.encoders.batch_submit import Submission
from embeddings_pipeline.encoders.cache import PostgresCache, sweep
from embeddings_pipeline.errors import ConfigurationError, OutageError, ProfileError
from embeddings_pipeline.store.database import Database
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
from embeddings_pipeline_tests.support.hosted import one_line
from embeddings_pipeline_tests.support.redis_server import is_there, redis_server
from embeddings_pipeline_tests.support.workbench import execute

pytestmark = pytest.mark.usefixtures("films_known")


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

    def test_a_batch_that_has_ended_before_it_is_cancelled_is_told_from_a_refusal(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        submit(database, service)
        [job] = jobs.due(now=True)
        assert (jobs.cancel(job), jobs.look(job), len(kept(database))) == ("completed", "done", 30)

    @pytest.mark.parametrize("fault, left", [("some", 10), ("missing", 10), ("duplicates", 0), ("others", 0)])
    def test_answers_that_are_missing_twice_or_another_s(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, fault: str, left: int
    ) -> None:
        service.batches.fail(fault)
        submit(database, service)
        assert look_at_all(jobs) == ["done"]
        assert (len(kept(database)), claims(database)) == (30 - left, 0)
        [(texts,)] = execute(database, "SELECT sum(texts) FROM embeddings.embedding_spend")
        assert texts == 30 - left
        assert execute(database, "SELECT count(*) FROM embeddings.embedding_cache") == [(30 - left,)]
        reason = jobs.listed()[0]["reason"]
        assert ("The server had an error" in reason) if fault == "some" else reason is None
        assert submit(database, service).texts == left

    def test_answers_of_no_use_are_noted_as_billed_and_not_submitted_again(
        self, database: Database, settings: Settings, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("nan")
        submit(database, service)
        assert look_at_all(jobs) == ["done"]
        [job] = jobs.listed()
        assert (job["answered"], job["refused"], job["unanswered"]) == (20, 10, 0)
        assert job["reason"].startswith("10 texts without an answer: Profile test: ")
        assert execute(database, "SELECT sum(tokens) FROM embeddings.embedding_spend") == [(service.tokens_billed,)]
        execute(database, "UPDATE embeddings.embedding_claim SET until = until - interval '2 days'")
        sweep(database, settings)
        assert submit(database, service) == Submission()

    def test_answers_that_no_server_gives_harm_nothing(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("odd")
        submit(database, service)
        assert look_at_all(jobs) == ["done"]
        assert len(kept(database)) == 20 and "without an answer" in jobs.listed()[0]["reason"]

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

        for _ in range(2):
            vectors, cached = Answers(database, PostgresCache(database), TERMS).of(texts, {}, encode)
            assert (asked.pop(), asked, len(vectors), len(cached)) == (poison, [], 30, 30)
            assert submit(database, service, texts) == Submission()  # also if the other way fails

    def test_a_refused_text_is_asked_about_by_one_at_a_time(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        poison = content_hash("POISON")
        submit(database, service, {poison: "POISON"})
        look_at_all(jobs)
        submit(database, service)
        first, second = (Answers(database, PostgresCache(database), TERMS) for _ in range(2))
        assert (first._claim([poison], {}), second._claim([poison], {})) == ([poison], [])  # and the first one dies
        vector = np.ones(64, np.float32)
        vectors, _ = second.of({poison: "POISON", **TEXTS}, {}, lambda texts, on_answer: dict.fromkeys(texts, vector))
        assert (list(vectors), claims(database)) == ([poison], 30)

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

    def test_a_page_in_place_of_a_file_is_never_taken_for_it(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("page file", times=3)
        submit(database, service)
        for _ in range(3):
            with pytest.raises(OutageError, match="and is read again") as error:
                look_at_all(jobs)
            assert one_line(error.value) and claims(database) == 30
            pass_time(database, module.LOST_SECONDS)
        assert look_at_all(jobs) == ["done"] and len(kept(database)) == 30 and billed_once(service)

    @pytest.mark.parametrize("fault", ["no file", "half file"])
    def test_a_lost_file_that_is_back_is_not_thrown_away(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, fault: str
    ) -> None:
        service.batches.fail(fault, times=3)
        submit(database, service)
        [job] = jobs.due(now=True)
        with contextlib.suppress(OutageError):
            jobs.look(job)
        pass_time(database, module.LOST_SECONDS)
        for _ in range(2):
            assert jobs.look(job) == "lost" and claims(database) == 0
            assert jobs.due() == []
            pass_time(database, module.LOST_LOOK_SECONDS)
        assert jobs.due() == [job] and jobs.look(job) == "done"
        assert len(kept(database)) == 30 and billed_once(service)
        assert (jobs.listed()[0]["answered"], jobs.listed()[0]["unanswered"]) == (30, 0)

    def test_a_page_that_says_404_loses_nothing(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        submit(database, service)
        service.batches.served = False
        for _ in range(2):
            with pytest.raises(OutageError, match="answered 404 with what is no answer of its API"):
                look_at_all(jobs)
            pass_time(database, module.LOST_SECONDS)
        assert claims(database) == 30

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

    def test_a_server_that_is_slow_to_answer_does_not_hold_up_a_sensor(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit(database, service)
        monkeypatch.setattr(batch_api, "ANSWER_SECONDS", 0.2)
        service.batches.latency = 3.0
        started = time.monotonic()
        with pytest.raises(OutageError, match="does not answer"):
            look_at_all(jobs, fetch=False)
        assert time.monotonic() - started < 2

    def test_no_room_for_a_file_is_told_as_that(
        self,
        database: Database,
        service: EmbeddingServer,
        jobs: BatchJobs,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        submit(database, service)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(OutageError, match="set TMPDIR") as error:
            look_at_all(jobs)
        assert one_line(error.value) and claims(database) == 30
        with pytest.raises(OutageError, match="set TMPDIR"):
            submit(database, service, {content_hash("new"): "new"})
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert look_at_all(jobs) == ["done"] and claims(database) == 0


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
