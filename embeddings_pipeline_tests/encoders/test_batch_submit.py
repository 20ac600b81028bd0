"""What is handed to the Batch API: each text once, within its limits, a budget and what is allowed."""

import json

import numpy as np
import pytest

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import content_hash
from embeddings_pipeline.encoders import batch_submit
from embeddings_pipeline.encoders.answers import Answers
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.encoders.batch_submit import Submission
from embeddings_pipeline.encoders.budget import Purse, spending
from embeddings_pipeline.encoders.cache import PostgresCache
from embeddings_pipeline.errors import BudgetError, ConfigurationError, OutageError, ProfileError
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.batch_jobs import TERMS, TEXTS, billed_once, claims, kept, look_at_all, submit
from embeddings_pipeline_tests.support.embedding_server import EmbeddingServer, tokens_of
from embeddings_pipeline_tests.support.hosted import KEY, expected, one_line
from embeddings_pipeline_tests.support.workbench import execute

pytestmark = pytest.mark.usefixtures("films_known")


class TestSubmitting:
    def test_what_was_submitted_comes_into_the_cache_at_half_the_price(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        done = submit(database, service)
        tokens = sum(map(tokens_of, TEXTS.values()))
        assert (done.jobs, done.texts, done.usd) == (1, 30, pytest.approx(tokens / 1e6))
        assert (kept(database), claims(database)) == ({}, 30)
        assert look_at_all(jobs) == ["done"]
        vectors = kept(database)
        given = np.stack([vectors[digest] for digest in TEXTS])
        assert np.allclose(given, expected(list(TEXTS.values())), atol=1e-3)
        assert claims(database) == 0 and billed_once(service) and service.requests == 0
        [spent] = execute(database, "SELECT texts, tokens, usd, told, counted FROM embeddings.embedding_spend")
        assert spent == (30, tokens, pytest.approx(tokens / 1e6), tokens, tokens)
        [job] = jobs.listed()
        assert (job["state"], job["answered"], job["billed_tokens"]) == ("done", 30, tokens)
        assert jobs.due(now=True) == []

    def test_a_text_is_in_one_job_and_nobody_else_asks_about_it(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        submit(database, service)
        assert submit(database, service) == Submission()
        answers = Answers(database, PostgresCache(database), TERMS)
        assert answers.of(TEXTS, {}, lambda texts, on_answer: pytest.fail("asked")) == ({}, set())
        assert answers.in_jobs == TEXTS.keys()
        look_at_all(jobs)
        assert submit(database, service) == Submission()
        assert service.batches.counts()["batches"] == 1

    def test_files_have_no_more_texts_and_bytes_than_a_server_takes(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(batch_submit, "MOST_TEXTS", 12)
        assert submit(database, service).jobs == 3
        monkeypatch.setattr(batch_submit, "MOST_BYTES", 1000)
        more = {content_hash(f"{n} {'x' * 300}"): f"{n} {'x' * 300}" for n in range(4)}
        assert submit(database, service, more).jobs == 4
        assert all(len(content) <= 3000 for content in service.batches.files.values())
        assert look_at_all(jobs) == ["done"] * 7

    def test_a_job_that_is_too_large_for_the_account_is_followed_by_smaller_ones(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(batch_submit, "LEAST_TOKENS", 10)
        service.batches.most_tokens = sum(map(tokens_of, TEXTS.values())) * 4 // 10
        for _ in range(6):
            submit(database, service)
            look_at_all(jobs)
        assert len(kept(database)) == 30 and billed_once(service)
        sizes = [job["texts"] for job in reversed(jobs.listed())]
        assert sizes[:4] == [30, 15, 15, 7] and len(sizes) <= 20

    def test_no_text_ends_a_line_of_the_file(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        text = "one\u2028two\u2029three\x85four\nfive"
        submit(database, service, {content_hash(text): text})
        [content] = service.batches.files.values()
        assert len(content.decode().splitlines()) == 1 and json.loads(content)["body"]["input"] == [text]

    def test_the_prompt_dimensions_and_no_key_are_in_the_file(self, database: Database) -> None:
        with EmbeddingServer(key=KEY) as service:
            settings = Settings(openai_api_key=KEY)
            of = {"key_variable": "OPENAI_API_KEY", "document_prompt": "passage: "}
            submit(database, service, settings=settings, profile=of)
            [content] = service.batches.files.values()
            assert b'"input": ["passage: a film about number 0"]' in content and b'"dimensions": 64' in content
            BatchJobs(database, settings).look(BatchJobs(database, settings).due(now=True)[0])
            stored = str(execute(database, "SELECT * FROM embeddings.batch_job"))
            assert "'done'" in stored and KEY not in stored

    @pytest.mark.parametrize("enough", [0, 10])
    def test_a_budget_stops_before_it_is_spent(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs, enough: int
    ) -> None:
        budget = sum(map(tokens_of, list(TEXTS.values())[:enough])) / 1e6 + 1e-9
        with pytest.raises(BudgetError, match="usd_per_day"):
            submit(database, service, usd_per_day=budget)
        with pytest.raises(BudgetError, match="usd_per_day"):  # what was submitted counts before it is billed
            submit(database, service, usd_per_day=budget)
        assert [job["texts"] for job in jobs.listed()] == [enough] * (enough > 0)
        look_at_all(jobs)
        with pytest.raises(BudgetError, match="usd_per_day"):  # and after
            submit(database, service, usd_per_day=budget)
        with spending(Purse(budget)) as purse, pytest.raises(BudgetError, match="--max-cost"):
            submit(database, service)
        assert purse.spent <= budget and len(service.billed) == enough

    def test_a_limit_without_a_price_and_a_profile_without_a_cache_are_refused(
        self, database: Database, service: EmbeddingServer
    ) -> None:
        with pytest.raises(ConfigurationError, match="no price is known"):
            submit(database, service, usd_per_day=1.0, usd_per_million=None)
        with pytest.raises(ProfileError, match="leave `cache: false` out"):
            submit(database, service, profile={"cache": False})

    def test_nothing_is_submitted_or_looked_at_if_it_is_forbidden(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        forbidden = Settings(embedding_enabled=False)
        with pytest.raises(ProfileError, match="EMBEDDING_ENABLED=false"):
            submit(database, service, settings=forbidden)
        assert (jobs.listed(), service.batches.uploads) == ([], 0)
        submit(database, service)
        with pytest.raises(ProfileError, match="EMBEDDING_ENABLED=false"):
            BatchJobs(database, forbidden).look(jobs.due(now=True)[0])

    def test_a_server_without_a_batch_api_is_told_from_an_outage(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.served = False
        with pytest.raises(ProfileError, match="it has no Batch API; leave `api: batch` out") as error:
            submit(database, service)
        assert one_line(error.value) and claims(database) == 0
        assert [job["state"] for job in jobs.listed()] == ["failed"]

    def test_no_credit_ends_the_job_at_once(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.fail("no credit")
        with pytest.raises(ProfileError, match="add credit"):
            submit(database, service)
        assert claims(database) == 0 and [job["state"] for job in jobs.listed()] == ["failed"]

    def test_a_key_that_is_refused_is_told_without_it(self, database: Database) -> None:
        with EmbeddingServer(key="sk-another") as service:
            of = {"key_variable": "OPENAI_API_KEY"}
            with pytest.raises(ProfileError, match="see OPENAI_API_KEY") as error:
                submit(database, service, settings=Settings(openai_api_key=KEY), profile=of)
        assert KEY not in one_line(error.value) and claims(database) == 0

    def test_a_page_in_place_of_an_answer_is_an_outage(
        self, database: Database, service: EmbeddingServer, jobs: BatchJobs
    ) -> None:
        service.batches.pages = True
        with pytest.raises(OutageError, match="cannot be read") as error:
            submit(database, service)
        assert one_line(error.value) and claims(database) == 0
        service.batches.pages = False
        submit(database, service)
        service.batches.pages = True
        with pytest.raises(OutageError, match="cannot be read"):
            look_at_all(jobs)
        assert claims(database) == 30
